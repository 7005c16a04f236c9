"""The block-Toeplitz convolution on GPU, through Triton: the walks of `kernels_pallas.fir_conv`.

A lane is a channel of one row of the batch, or a piece of its time. A program owns M lanes of one group and walks them
along time together, 64 tokens per step: one tile [M, 64] of each array, with 128 contiguous bytes per row. The group's
Toeplitz blocks are gathered once from the taps and stay in shared memory, where the tensor cores (wgmma) read them. The
gated inputs of previous steps are carried in registers, so that each element is read from memory once. Loads of the
next step overlap with the products of the current one. A group has B (D/G) channel rows, each split into as many pieces
as are needed to fill the device; only the last program of a group has idle lanes.

The backward pass walks from the end. At each step it reads dy, x1 (so g = dy x1), x2 and v (so u = x2 v), carries g of
later steps and u of earlier ones, and computes du = sum_j g_{c+j} M_j^T, the convolution again, and dM_j += u_c^T
g_{c+j}, which stays in float32 registers over the whole walk.

float32 operands are split into two bfloat16 numbers and multiplied in three products (the fourth is below 2^-16).
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from kernels_pallas.backends import triton

BLOCK = 64
SPREAD = 528  # programs that keep the 132 processors of an H200 evenly busy: 4 waves


@dataclasses.dataclass(frozen=True)
class Tile:
    lanes: int
    num_warps: int
    num_stages: int = 1
    whole: bool = True  # the backward walk also computes dx1


def tile(kind: str, size: int, K: int, skip: bool, aligned: bool) -> Tile:
    """Lanes and warps for elements of `size` bytes, such that nothing spills when compiled for an H200.

    registers / wgmma + mma in the code, B 8, D 4096, T 8192, G 256, gates and skip:
      forward   2 bytes  K 128: 168 / 12 + 0 (three programs share a processor)    K 256: 246 / 20 + 0
      forward   4 bytes  K 128: 128 / 0 + 72     K 256: 166 / 0 + 120    (64 lanes spill)
      backward  2 bytes  K 128: 183 / 6 + 48     K 256: 255 / 10 + 80    (64 lanes spill, but 255 / 52 + 0 without skip)
      backward  4 bytes  K 128: 255 / 15 + 72    K 256: dx1 apart, or 112 bytes of stack
    """
    if not aligned:
        return Tile(lanes=16, num_warps=8, whole=size == 2)
    if kind == "forward":
        return Tile(lanes=64, num_warps=4) if size == 2 else Tile(lanes=32, num_warps=8)
    if size == 2:
        return Tile(lanes=32 if skip or K > 128 else 64, num_warps=8)
    return Tile(lanes=16, num_warps=8, whole=K <= 128)


@dataclasses.dataclass(frozen=True)
class Walk:
    """How lanes map to data: lane n of a group is piece n % pieces of the group's channel row n // pieces."""

    tile: Tile
    G: int
    D: int
    T: int
    K: int
    rows: int  # channel rows of a group, over the batch
    pieces: int
    steps: int  # per lane

    @property
    def programs(self) -> int:
        return -(-self.rows * self.pieces // self.tile.lanes)

    @property
    def blocks(self) -> int:
        return -(-self.K // BLOCK) + 1

    @property
    def ragged(self) -> bool:
        return self.pieces * self.steps * BLOCK != self.T


def plan(kind: str, v: jax.Array, h: jax.Array, skip: jax.Array | None) -> Walk:
    """Chooses pieces that fill the lanes of a program, then the device, with at least 8 steps to amortise the setup."""
    (B, D, T), (G, K) = v.shape, h.shape
    size = v.dtype.itemsize
    shape = tile(kind, size, K, skip is not None, T * size % 16 == 0)
    rows, steps, pieces = B * (D // G), -(-T // BLOCK), 1
    while rows * pieces < shape.lanes and pieces < steps:
        pieces *= 2
    while G * -(-rows * pieces // shape.lanes) < SPREAD and 16 * pieces <= steps:
        pieces *= 2
    return Walk(shape, G, D, T, K, rows, pieces, -(-steps // pieces))


class Lanes:
    """The program's lanes, and tiles [lanes, 64] of arrays [B D, T] at a step of each lane."""

    def __init__(self, walk: Walk):
        lane = pl.program_id(1) * walk.tile.lanes + jnp.arange(walk.tile.lanes, dtype=jnp.int32)
        row, self.walk = lane // walk.pieces, walk
        self.valid = row < walk.rows
        per_group = walk.D // walk.G
        self.row = row // per_group * walk.D + pl.program_id(0) * per_group + row % per_group
        self.first = lane % walk.pieces * walk.steps
        self.everywhere = walk.rows * walk.pieces % walk.tile.lanes == 0

    def mask(self, token):
        """The mask of positions inside the array; None: all are inside."""
        mask = None if self.everywhere else jnp.broadcast_to(self.valid[:, None], token.shape)
        if self.walk.ragged:
            mask = (token < self.walk.T) if mask is None else mask & (token < self.walk.T)
        return mask

    def index(self, chunk):
        token = chunk[:, None] * BLOCK + jnp.arange(BLOCK, dtype=jnp.int32)[None, :]
        return jnp.broadcast_to(self.row[:, None], token.shape), token

    def load(self, ref, step, *, outside=False):
        """The tile of `ref` at a step. outside: the step may be before or after the lane's row, where the tile is 0."""
        row, token = self.index(self.first + step)
        mask = self.mask(token)
        if outside:
            inside = (token >= 0) & (token < self.walk.T)
            mask = inside if mask is None else mask & inside
        return triton.load(ref.at[row, token], mask=mask, other=None if mask is None else 0.0)

    def product(self, one, other, step, **where):
        """one * other, either may be None."""
        tiles = [self.load(ref, step, **where) for ref in (one, other) if ref is not None]
        return tiles[0] if len(tiles) == 1 else tiles[0] * tiles[1]

    def store(self, ref, step, value):
        row, token = self.index(self.first + step)
        triton.store(ref.at[row, token], value.astype(ref.dtype), mask=self.mask(token))

    def before(self, x2, v, state, step):
        """u at a step that may be before the row, where it comes from the state [B D, K - 1]."""
        u = self.product(x2, v, step, outside=True)
        if state is None:
            return u
        row, token = self.index(self.first + step)
        place = token + (self.walk.K - 1)
        return u + triton.load(state.at[row, place], mask=(token < 0) & (place >= 0), other=0.0).astype(
            u.dtype
        )


def _parts(x):
    """x as operands of the tensor cores: itself, or two bfloat16 arrays that add up to a float32 x."""
    if x.dtype != jnp.float32:
        return (x,)
    bits = jax.lax.bitcast_convert_type(x, jnp.int32) & jnp.int32(
        -65536
    )  # truncated, not rounded, so exact in bfloat16
    high = jax.lax.bitcast_convert_type(bits, jnp.float32)
    return high.astype(jnp.bfloat16), (x - high).astype(jnp.bfloat16)


def _dot(a, b, contract=((1,), (0,))):
    """The sum of the products of parts, the smallest first."""
    pairs = [(x, y) for i, x in enumerate(a) for j, y in enumerate(b) if i + j < max(len(a), len(b))]
    dims = (contract, ((), ()))
    return sum(
        jax.lax.dot_general(x, y, dims, preferred_element_type=jnp.float32) for x, y in reversed(pairs)
    )


def _toeplitz(h, walk: Walk, dtype):
    """The blocks M_j[s, t] = h[64 j + t - s]."""
    square = (BLOCK, BLOCK)
    group = jnp.broadcast_to(pl.program_id(0), square)
    distance = jax.lax.broadcasted_iota(jnp.int32, square, 1) - jax.lax.broadcasted_iota(jnp.int32, square, 0)
    blocks = []
    for j in range(walk.blocks):
        tap = distance + BLOCK * j
        taps = triton.load(h.at[group, tap], mask=(tap >= 0) & (tap < walk.K), other=0.0)
        blocks.append(_parts(taps.astype(dtype)))
    return blocks


def _skip(ref, lanes: Lanes):
    return None if ref is None else triton.load(ref.at[lanes.row % lanes.walk.D]).astype(jnp.float32)[:, None]


def _forward(refs, *, walk: Walk):
    x1, x2, v, h, skip, state, y = refs
    lanes = Lanes(walk)
    blocks = _toeplitz(h, walk, v.dtype)
    skip = _skip(skip, lanes)
    history = tuple(_parts(lanes.before(x2, v, state, -j)) for j in range(1, walk.blocks))
    last = walk.steps - 1

    def step(i, carry):
        u, history = carry
        following = [lanes.load(ref, jnp.minimum(i + 1, last)) for ref in (x2, v) if ref is not None]
        gate = None if x1 is None else lanes.load(x1, i)
        parts = _parts(u)
        z = sum(_dot(x, block) for x, block in zip((parts, *history), blocks))
        z = z if skip is None else z + skip * u.astype(jnp.float32)
        lanes.store(y, i, z if gate is None else z * gate.astype(jnp.float32))
        return functools.reduce(jnp.multiply, following), (parts, *history[:-1])

    jax.lax.fori_loop(0, walk.steps, step, (lanes.product(x2, v, 0), history))


def _backward(refs, *, walk: Walk):
    dy, x1, x2, v, h, skip, state, dx1, dx2, dv, dblocks, dskip = refs
    lanes = Lanes(walk)
    blocks = _toeplitz(h, walk, v.dtype)
    skip = _skip(skip, lanes)
    reach, last = walk.blocks - 1, walk.steps - 1
    ahead = tuple(_parts(lanes.product(dy, x1, last + j, outside=True)) for j in range(1, walk.blocks))
    behind = () if dx1 is None else tuple(_parts(lanes.before(x2, v, state, last - j)) for j in range(reach))

    def step(n, carry):
        ahead, behind, sums, dskips = carry
        i = last - n
        raw = lanes.product(dy, x1, i)
        g = (_parts(raw), *ahead)
        du = sum(_dot(x, block, ((1,), (1,))) for x, block in zip(g, blocks))
        if skip is not None:
            du = du + skip * raw.astype(jnp.float32)
        lanes.store(dv, i, du if x2 is None else du * lanes.load(x2, i).astype(jnp.float32))
        if x2 is not None:
            lanes.store(dx2, i, du * lanes.load(v, i).astype(jnp.float32))
        u = behind[0] if behind else _parts(lanes.product(x2, v, i))
        sums = tuple(total + _dot(u, x, ((0,), (0,))) for total, x in zip(sums, g))
        if skip is not None:
            whole = lanes.product(x2, v, i).astype(jnp.float32)
            dskips = dskips + jnp.sum(whole * raw.astype(jnp.float32), axis=1)
        if behind:
            behind = (*behind, _parts(lanes.before(x2, v, state, i - reach)))
            z = sum(_dot(x, block) for x, block in zip(behind, blocks))
            z = z if skip is None else z + skip * whole
            lanes.store(dx1, i, z * lanes.load(dy, i).astype(jnp.float32))
        return g[:-1], behind[1:], sums, dskips

    dskips = None if skip is None else jnp.zeros((walk.tile.lanes,), jnp.float32)
    zeros = jnp.zeros((BLOCK, BLOCK), jnp.float32)
    carry = ahead, behind, (zeros,) * walk.blocks, dskips
    *_, sums, dskips = jax.lax.fori_loop(0, walk.steps, step, carry)
    for j, total in enumerate(sums):
        dblocks[j] = total
    if skip is not None:
        dskip[...] = dskips


def forward(x1, x2, v, h, skip, state, *, interpret: bool = False):
    """y [B, D, T]; arrays as in `kernels_pallas.fir_conv`, h float32."""
    return _call(_forward, plan("forward", v, h, skip), (x1, x2, v, h, skip, state), (v,), (), interpret)[0]


def backward(dy, x1, x2, v, h, skip, state, *, interpret: bool = False):
    """(dx1, dx2, dv, dM [G, blocks, 64, 64], dskip [D]), None where there is no such input."""
    walk = plan("backward", v, h, skip)
    sums = (walk.blocks, BLOCK, BLOCK), None if skip is None else (walk.tile.lanes,)
    inputs = (dy, x1, x2, v, h, skip, state)
    alone = x1 is not None and not walk.tile.whole
    dx1, dx2, dv, dblocks, dskip = _call(
        _backward, walk, inputs, (None if alone else x1, x2, v), sums, interpret
    )
    if alone:
        dx1 = forward(dy, x2, v, h, skip, state, interpret=interpret)
    if skip is not None:
        dskip = dskip.reshape(walk.G, -1)[:, : walk.rows * walk.pieces]
        dskip = dskip.reshape(walk.G, v.shape[0], -1, walk.pieces).sum(axis=(1, 3)).reshape(-1)
    return dx1, dx2, dv, dblocks.sum(axis=1), dskip


def _own(rank: int, *program):
    """The index of a program's block: the program's own indices, followed by `rank` zeros."""
    return (*program, *(0,) * rank)


def _call(body, walk: Walk, inputs, likes, sums, interpret):
    """Runs body(references, walk=walk) for every program; for an input or output None the reference is None.

    likes: arrays with the shape [B, D, T] and dtype of each output. sums: the shape of each float32 output per program,
    which are [G, programs, *shape] in total.
    """
    here = [x is not None for x in (*inputs, *likes, *sums)]
    shapes = [
        jax.ShapeDtypeStruct((x.shape[0] * x.shape[1], x.shape[2]), x.dtype) for x in likes if x is not None
    ]
    specs = [pl.BlockSpec() for _ in shapes]
    for shape in sums:
        if shape is not None:
            shapes.append(jax.ShapeDtypeStruct((walk.G, walk.programs, *shape), jnp.float32))
            specs.append(pl.BlockSpec((None, None, *shape), functools.partial(_own, len(shape))))

    def kernel(*refs):
        left = iter(refs)
        body([next(left) if there else None for there in here], walk=walk)

    outputs = pl.pallas_call(
        kernel,
        grid=(walk.G, walk.programs),
        out_shape=shapes,
        out_specs=specs,
        compiler_params=triton.CompilerParams(num_warps=walk.tile.num_warps, num_stages=walk.tile.num_stages),
        interpret=interpret,
        name=f"fir_conv{body.__name__}",
    )(*(x.reshape(-1, x.shape[2]) if x.ndim == 3 else x for x in inputs if x is not None))
    found = iter(outputs)
    filled = [next(found) if there else None for there in here[len(inputs) :]]
    return [
        x if like is None else x.reshape(like.shape)
        for x, like in zip(filled, (*likes, *(None for _ in sums)))
    ]
