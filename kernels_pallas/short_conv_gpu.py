"""The shifted multiply-adds on GPU, through Triton: the passes of `kernels_pallas.short_conv`.

A program has a tile [channels, tokens] of one row of the batch; every array is read at the K shifts of the tile, of
which all but one are in the L1 cache. Whole vectors of 16 bytes are loaded at a shift of 0, and as wide as the shift
divides at the others. The backward pass walks along a piece of the time and keeps the sums of dw and dbias per channel.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from kernels_pallas.backends import triton

CHANNELS = 4
PIECE = 16  # maximum number of tiles per piece


@dataclasses.dataclass(frozen=True)
class Pass:
    B: int
    D: int
    T: int
    K: int
    tokens: int
    num_warps: int

    @property
    def tiles(self) -> int:
        return -(-self.T // self.tokens)

    @property
    def pieces(self) -> int:
        return -(-self.tiles // PIECE)


def plan(kind: str, v: jax.Array, w: jax.Array) -> Pass:
    """Tokens per tile and warps, such that nothing spills when compiled for an H200.

    registers and instructions a thread (of 16 elements forward, 8 backward) in 16 bits:
      K 3, no gates:     forward 40, 280    backward 48, 344
      K 7, both gates:   forward 80, 928    backward 128, 1208;    with runs 165, 1896 and 198, 2176
    In 32 bits the backward pass with runs would spill at 8 elements a thread, so it has 4.
    """
    tokens = 512 if kind == "forward" else 256
    B, D, T = v.shape
    return Pass(B, D, T, w.shape[1], tokens, 8 if kind == "backward" and v.dtype.itemsize == 4 else 4)


class Tile:
    """Tiles of arrays [B, D, T] at a block of channels, a row of the batch and a tile of tokens."""

    def __init__(self, size: Pass, tile, channels, row):
        self.size, self.row = size, row
        self.channel = (channels * CHANNELS + jnp.arange(CHANNELS, dtype=jnp.int32))[:, None]
        self.token = (tile * size.tokens + jnp.arange(size.tokens, dtype=jnp.int32))[None, :]
        self.shape = (CHANNELS, size.tokens)

    def mask(self, shift: int):
        """The mask of elements whose neighbour `shift` tokens later is inside the arrays; None: all are."""
        token, conditions = self.token + shift, []
        if self.size.D % CHANNELS:
            conditions.append(jnp.broadcast_to(self.channel < self.size.D, self.shape))
        if shift < 0:
            conditions.append(jnp.broadcast_to(token >= 0, self.shape))
        if shift > 0 or self.size.T % self.size.tokens:
            conditions.append(jnp.broadcast_to(token < self.size.T, self.shape))
        return functools.reduce(jnp.logical_and, conditions) if conditions else None

    def index(self, token):
        spread = [jnp.broadcast_to(x, self.shape) for x in (self.row, self.channel, token)]
        return tuple(spread)

    def load(self, ref, shift: int):
        mask = self.mask(shift)
        x = triton.load(
            ref.at[self.index(self.token + shift)], mask=mask, other=None if mask is None else 0.0
        )
        return x.astype(jnp.float32)

    def value(self, shift: int, *refs):
        return functools.reduce(jnp.multiply, [self.load(ref, shift) for ref in refs if ref is not None])

    def inputs(self, shift: int, x2, v, state):
        """u at a shift; before the row it comes from the state [B, D, K - 1]."""
        u = self.value(shift, x2, v)
        if state is None or shift == 0:
            return u
        place = self.token + (shift + self.size.K - 1)
        mask = (self.token + shift < 0) & (place >= 0) & (self.channel < self.size.D)
        return u + triton.load(state.at[self.index(place)], mask=mask, other=0.0).astype(jnp.float32)

    def runs(self, ref, shift: int):
        """[1, tokens] of runs [B, K - 1 + T], which begin with the state's; -1 outside."""
        place = self.token + (shift + self.size.K - 1)
        mask = (place >= 0) & (place < self.size.T + self.size.K - 1)
        return triton.load(ref.at[jnp.broadcast_to(self.row, place.shape), place], mask=mask, other=-1)

    def per_channel(self, ref, *index):
        spread = [jnp.broadcast_to(i, self.channel.shape) for i in index]
        return triton.load(ref.at[(self.channel, *spread)], mask=self.channel < self.size.D, other=0.0)

    def store(self, ref, x):
        triton.store(ref.at[self.index(self.token)], x.astype(ref.dtype), mask=self.mask(0))


def _meets(own, other, x):
    """x where both tokens are in the same run, otherwise 0."""
    return x if own is None else jnp.where((own == other) & (own >= 0), x, jnp.float32(0))


def _forward(refs, *, size: Pass):
    x1, x2, v, w, bias, runs, state, y = refs
    tile = Tile(size, pl.program_id(0), pl.program_id(1), pl.program_id(2))
    own = None if runs is None else tile.runs(runs, 0)
    z = None
    for k in range(size.K):
        other = None if runs is None else tile.runs(runs, -k)
        part = tile.per_channel(w, k) * _meets(own, other, tile.inputs(-k, x2, v, state))
        z = part if z is None else z + part
    if bias is not None:
        z = z + _meets(own, own, jnp.broadcast_to(tile.per_channel(bias), tile.shape))
    tile.store(y, z if x1 is None else z * tile.load(x1, 0))


def _backward(refs, *, size: Pass):
    dy, x1, x2, v, w, bias, runs, state, dx1, dx2, dv, dw, dbias = refs
    piece, channels, row = (pl.program_id(axis) for axis in range(3))

    def step(i, sums):
        tile = Tile(size, piece * PIECE + i, channels, row)
        own = None if runs is None else tile.runs(runs, 0)
        g, z, du, parts = None, None, None, []
        for k in range(size.K):
            behind = None if runs is None else tile.runs(runs, -k)
            u = _meets(own, behind, tile.inputs(-k, x2, v, state))
            ahead = None if runs is None else tile.runs(runs, k)
            later = tile.value(k, dy, x1)
            g = later if k == 0 else g
            tap = tile.per_channel(w, k)
            given, formed = tap * _meets(own, ahead, later), tap * u
            du, z = (given, formed) if k == 0 else (du + given, z + formed)
            parts.append(jnp.sum(g * u, axis=1))
        if bias is not None:
            parts.append(jnp.sum(_meets(own, own, g), axis=1))
            z = z + _meets(own, own, jnp.broadcast_to(tile.per_channel(bias), tile.shape))
        if x1 is not None:
            tile.store(dx1, z * tile.load(dy, 0))
        if x2 is not None:
            tile.store(dx2, du * tile.load(v, 0))
            du = du * tile.load(x2, 0)
        tile.store(dv, du)
        return tuple(total + part for total, part in zip(sums, parts))

    count = size.K if bias is None else size.K + 1
    zeros = tuple(jnp.zeros((CHANNELS,), jnp.float32) for _ in range(count))
    steps = jnp.minimum(PIECE, size.tiles - piece * PIECE)
    sums = jax.lax.fori_loop(0, steps, step, zeros)
    for k in range(size.K):
        dw[k] = sums[k]
    if bias is not None:
        dbias[...] = sums[size.K]


def forward(x1, x2, v, w, bias, runs, state, *, interpret: bool = False):
    """y [B, D, T]; arrays as in `kernels_pallas.short_conv`, w and bias float32, runs [B, K - 1 + T]."""
    size = plan("forward", v, w)
    grid = size.tiles, -(-size.D // CHANNELS), size.B
    return _call(_forward, size, grid, (x1, x2, v, w, bias, runs, state), (v,), (), interpret)[0]


def backward(dy, x1, x2, v, w, bias, runs, state, *, interpret: bool = False):
    """(dx1, dx2, dv, dw [D, K], dbias [D]), None where there is no such input."""
    size = plan("backward", v, w)
    grid = size.pieces, -(-size.D // CHANNELS), size.B
    sums = (size.K, CHANNELS), None if bias is None else (CHANNELS,)
    inputs = (dy, x1, x2, v, w, bias, runs, state)
    dx1, dx2, dv, dw, dbias = _call(_backward, size, grid, inputs, (x1, x2, v), sums, interpret)
    dw = jnp.swapaxes(dw.sum(axis=(0, 2)), 1, 2).reshape(-1, size.K)[: size.D]
    return dx1, dx2, dv, dw, None if bias is None else dbias.sum(axis=(0, 2)).reshape(-1)[: size.D]


def _own(rank: int, *program):
    """The index of a program's block: the program's own indices, followed by `rank` zeros."""
    return (*program, *(0,) * rank)


def _call(body, size: Pass, grid, inputs, likes, sums, interpret):
    """Runs body(references, size=size) for every program; for an input or output None the reference is None.

    likes: arrays with the shape and dtype of each output. sums: the shape of each float32 output per program, which are
    [*grid, *shape] in total.
    """
    here = [x is not None for x in (*inputs, *likes, *sums)]
    shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in likes if x is not None]
    specs = [pl.BlockSpec() for _ in shapes]
    for shape in sums:
        if shape is not None:
            shapes.append(jax.ShapeDtypeStruct((*grid, *shape), jnp.float32))
            specs.append(pl.BlockSpec((None, None, None, *shape), functools.partial(_own, len(shape))))

    def kernel(*refs):
        left = iter(refs)
        body([next(left) if there else None for there in here], size=size)

    outputs = pl.pallas_call(
        kernel,
        grid=grid,
        out_shape=shapes,
        out_specs=specs,
        compiler_params=triton.CompilerParams(num_warps=size.num_warps, num_stages=1),
        interpret=interpret,
        name=f"short_conv{body.__name__}",
    )(*(x for x in inputs if x is not None))
    found = iter(outputs)
    return [next(found) if there else None for there in here[len(inputs) :]]
