"""The passes of `windowed_linear_attention.py` on an NVIDIA GPU, through Triton.

`recurrence`: a program handles one head (and one piece of T, if there are few heads) and `columns` of the value
dimension. It processes the chunks in order and holds its part of the state, P x columns in float32, in registers. All
products of a chunk have 64 rows (wgmma for bfloat16): the scores of one tile at a time, multiplied by its values at
once, and then the state. Loops over tiles are not unrolled, or the compiler would hoist all their loads into registers.
Tiles come from L2, where the previous chunk left them; those outside of T are skipped.

`near`: it needs no state, so there is a program per chunk and head, with all columns. It computes its tiles twice:
first for the total of each row, then for the gradient.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from kernels_pallas import state_tiles_gpu
from kernels_pallas.backends import triton
from kernels_pallas.state_tiles_gpu import NARROW, Tile
from kernels_pallas.windowed_linear_attention_plan import NEVER, Plan

WHOLE = ("nearest", "oldest", "reach", "kept", "whole")  # per row of the batch, the same for all heads

chunk = state_tiles_gpu.chunk


def tile(arrays: dict, plan: Plan) -> Tile:
    """Tiles that compile for an H200 without register spills, with jax 0.10.2 (CUDA 12), 0.11.2 and 0.12.0.1 (CUDA 13).

    P = H = 128, bfloat16, windows of 64; registers per thread (spills) of the forward and the worst backward pass:

        columns, warps, stages   terraces, aligned             terraces, not aligned   sliding
        128, 8, 2                255, 231                       255 (27), 234           255 (30), 255 (2)
        128, 8, 3                255, 236                       255 (22), 251           255 (35), 255 (4)
        64, 8, 2                 242, 185                       255, 216                255, 216
        64, 8, 3                 246, 185                       255, 239                255, 254
        64, 4, 1                 255, 245                       255, 255 (26)           255, 255 (56)
        64, 4, 2                 255 (26), 241                  255 (68), 255           255 (115), 255 (30)

    Up to 146 KB of 227 of shared memory, so one program per multiprocessor. With 64 columns, scores are computed twice.
    float32 as three TensorFloat-32 products keeps each operand twice, hence chunks of 16 tokens and up to 64 features.
    """
    far = plan.tiles - plan.first_far
    if arrays["v"].dtype == jnp.float32:
        return Tile(16 if "sums" in arrays else 32, 4, 1)
    if "sums" in arrays:
        return Tile(128, 8, 2) if far <= 0 else Tile(64, 8, 2)
    return Tile(64, 8, 2) if far == 1 else Tile(128, 8, 2)


def recurrence(arrays: dict, plan: Plan, *, reverse: bool = False, last: bool = False) -> dict:
    """The recurrence; `windowed_linear_attention.py` describes arguments and results."""
    B, T, _, V = arrays["v"].shape
    P, N, G, dtype = arrays["k"].shape[-1], plan.heads, plan.split, arrays["v"].dtype
    best = tile(arrays, plan)
    W = min(best.columns, V)
    shapes = {}
    if "q" in arrays:
        shapes["out"] = jax.ShapeDtypeStruct((B, T, N, V), dtype)
    if "sums" in arrays and "q" in arrays:
        shapes["norm"] = shapes["top"] = jax.ShapeDtypeStruct((B, N, T), jnp.float32)
    if last:
        of = {"state": (P, V), "row": (V,), "sums": (P,)}
        carried = {name: of[name] for name in of if name in arrays}
        shapes |= {
            f"last_{name}": jax.ShapeDtypeStruct((B, N, G, *shape), jnp.float32)
            for name, shape in carried.items()
        }
    kernel = functools.partial(_recurrence, names=(*arrays, *shapes), reverse=reverse, plan=plan)
    call = pl.pallas_call(
        kernel,
        grid=(B * N, G, V // W),
        in_specs=[_block(name, x.shape, N, W) for name, x in arrays.items()],
        out_specs=[_block(name, x.shape, N, W) for name, x in shapes.items()],
        out_shape=list(shapes.values()),
        compiler_params=triton.CompilerParams(num_warps=best.warps, num_stages=best.stages),
        interpret=plan.interpret,
        name="windowed_linear_attention" if "q" in arrays else "windowed_linear_attention_states",
    )
    return dict(zip(shapes, call(*arrays.values()), strict=True))


def _block(name: str, shape: tuple[int, ...], N: int, W: int) -> pl.BlockSpec:
    """The part of an array that a program reads: its head (or the one that it shares), its piece and its columns."""
    if name == "gamma":
        return pl.BlockSpec((None, 1), lambda i, g, j: (i % N, 0))
    if name in WHOLE:
        return pl.BlockSpec((None, shape[1]), lambda i, g, j: (i // N, 0))
    if len(shape) == 4 and "row" not in name and "sums" not in name:  # [B, T, n, P]
        shared, own = N // shape[2], name in ("v", "out")
        return pl.BlockSpec(
            (None, shape[1], None, W if own else shape[3]),
            lambda i, g, j: (i // N, 0, i % N // shared, j if own else 0),
        )
    if len(shape) == 3:  # [B, N, T]
        return pl.BlockSpec((None, None, shape[2]), lambda i, g, j: (i // N, i % N, 0))
    if "sums" in name:
        return pl.BlockSpec((None, None, None, shape[3]), lambda i, g, j: (i // N, i % N, g, 0))
    rest = (0,) * (len(shape) - 4)
    return pl.BlockSpec((None, None, None, *shape[3:-1], W), lambda i, g, j: (i // N, i % N, g, *rest, j))


class Tiles:
    """The tiles that the rows of chunk c are multiplied with: at and before c or, with reverse, at and after c."""

    def __init__(self, refs, c, reverse, plan: Plan):
        self.refs, self.c, self.reverse, self.plan = refs, c, reverse, plan
        self.C, self.T = plan.chunk, refs["nearest"].shape[0]
        self.rows = pl.ds(c * self.C, self.C)
        # Tiles outside of T are skipped. A dynamic bound also keeps a loop over one tile from being unrolled.
        self.count = jnp.minimum(plan.tiles, self.T // self.C - c if reverse else c + 1)
        self.own = {}  # results of this program for its own rows; reading them back from memory would be a race

    def at(self, t):
        """The slice of tokens of tile t."""
        return pl.ds((self.c + (t if self.reverse else -t)) * self.C, self.C)

    def of_query(self, name, t):
        """A value per query, shaped to broadcast along the query axis of the scores."""
        if self.reverse:
            return self.refs[name][self.at(t)][None, :]
        x = self.own[name] if name in self.own else self.refs[name][self.rows]
        return x[:, None]

    def keys(self, t):
        """The positions of queries and of keys, each in the shape of the scores."""
        down, across = (lax.broadcasted_iota(jnp.int32, (self.C, self.C), i) for i in (0, 1))
        down, across = down + self.c * self.C, across + (self.c + (t if self.reverse else -t)) * self.C
        return (across, down) if self.reverse else (down, across)

    def near(self, t):
        query, key = self.keys(t)
        return (key >= self.of_query("nearest", t)) & (key <= query)

    def far(self, t):
        query, key = self.keys(t)
        return (key >= self.of_query("oldest", t)) & (key < self.of_query("nearest", t))

    def soft(self, s, t):
        """exp(scale (s - max)) for the near pairs, 0 for others, from the products s."""
        s = (s - self.of_query("top", t)) * self.plan.scale
        return jnp.exp(jnp.where(self.near(t), s, jnp.float32(NEVER)))


def _recurrence(*given, names, reverse, plan):
    refs = dict(zip(names, given, strict=True))
    dot = functools.partial(state_tiles_gpu.dot, interpret=plan.interpret)
    chunks = refs["v"].shape[0] // plan.chunk // plan.split
    begin = pl.program_id(1) * chunks

    def step(i, carry):
        c = begin + (chunks - 1 - i if reverse else i)
        tiles = Tiles(refs, c, reverse, plan)
        if "q" in refs:
            _outputs(tiles, carry, dot)
        return _advance(tiles, carry, dot)

    carry = {name: refs[name][...] for name in ("state", "row", "sums") if name in refs}
    if "sums" in refs:
        carry["sums"] = jnp.broadcast_to(carry["sums"][:, None], (refs["sums"].shape[0], NARROW))
    carry = lax.fori_loop(0, chunks, step, carry)
    if "last_sums" in refs:
        carry["sums"] = jnp.max(carry["sums"], axis=1)
    for name in carry:
        if f"last_{name}" in refs:
            refs[f"last_{name}"][...] = carry[name]


def _outputs(tiles: Tiles, carry, dot):
    """Computes the results of one chunk: the near pairs, the far pairs in the tiles, and the state."""
    refs, rows, plan = tiles.refs, tiles.rows, tiles.plan
    dtype = refs["v"].dtype
    sums = jnp.zeros((tiles.C, refs["v"].shape[1]), jnp.float32), jnp.zeros((tiles.C,), jnp.float32)
    if "near_q" in refs:
        sums = _known_softmax(tiles, sums, dot) if tiles.reverse else _softmax(tiles, sums, dot)

    def far(t, sums):
        scores = dot(refs["q"][rows, :], refs["k"][tiles.at(t), :], 1, 1)
        if "bias" in refs:
            scores += tiles.of_query("bias", t)
        scores = jnp.where(tiles.far(t), scores, 0.0)
        return _spend(tiles, t, scores, sums, dot)

    out, norm = sums
    if plan.first_far < plan.tiles:
        out, norm = lax.fori_loop(plan.first_far, tiles.count, far, sums)
    # Read after the loops, during which no register holds it. q is scaled before the product, so that the matrix unit
    # can accumulate into `out`.
    reach = refs["reach"][rows]
    q = refs["q"][rows, :] * reach[:, None].astype(dtype)
    if "row" in refs:
        row = reach if tiles.reverse else reach * refs["bias"][rows]
        out += carry["row"][None, :] * row[:, None]
    out += dot(q, carry["state"].astype(dtype), 1, 0)
    if "sums" in refs:
        norm += jnp.max(dot(q, carry["sums"].astype(dtype), 1, 0), axis=1) + plan.eps
        refs["norm"][rows] = norm
        out *= (1.0 / jnp.where(norm == 0.0, 1.0, norm))[:, None]
    refs["out"][rows, :] = out.astype(refs["out"].dtype)


def _spend(tiles: Tiles, t, weights, sums, dot):
    """Adds a tile's weights times its values to the sums."""
    v = tiles.refs["v"][tiles.at(t), :]
    norm = sums[1] + jnp.sum(weights, axis=1) if "sums" in tiles.refs else sums[1]
    return sums[0] + dot(weights.astype(v.dtype), v, 1, 0), norm


def _softmax(tiles: Tiles, sums, dot):
    """Adds the near pairs with a running maximum; stores each query's largest product with a near key."""
    refs, gamma = tiles.refs, tiles.refs["gamma"][0]

    def more(t, carry):
        top, out, norm = carry
        s = dot(refs["near_q"][tiles.rows, :], refs["near_k"][tiles.at(t), :], 1, 1)
        s = jnp.where(tiles.near(t), s, jnp.float32(NEVER))
        new = jnp.maximum(jnp.max(s, axis=1), top)
        shrink = jnp.exp((top - new) * tiles.plan.scale)
        weights = jnp.exp((s - new[:, None]) * tiles.plan.scale)
        return new, *_spend(tiles, t, weights, (out * shrink[:, None], norm * shrink), dot)

    top = jnp.full((tiles.C,), NEVER / 2, jnp.float32)  # above the score of masked keys
    top, out, norm = lax.fori_loop(0, tiles.count, more, (top, *sums))
    refs["top"][tiles.rows] = top
    return out * gamma, norm * gamma


def _known_softmax(tiles: Tiles, sums, dot):
    """Adds the near pairs in the reversed recurrence, where each query's maximum is known."""
    refs, gamma = tiles.refs, tiles.refs["gamma"][0]

    def more(t, sums):
        s = dot(refs["near_q"][tiles.rows, :], refs["near_k"][tiles.at(t), :], 1, 1)
        return _spend(tiles, t, tiles.soft(s, t), sums, dot)

    out, norm = lax.fori_loop(0, tiles.count, more, sums)
    return out * gamma, norm


def _advance(tiles: Tiles, carry, dot):
    """The states after this chunk: the furthest tile moves to the state."""
    refs, rows, new = tiles.refs, tiles.rows, {}
    lag = tiles.plan.tiles - 1
    chunk = tiles.c + (lag if tiles.reverse else -lag)
    at = pl.ds(jnp.clip(chunk * tiles.C, 0, tiles.T - tiles.C), tiles.C)  # outside of T, kept is 0
    k, v, kept, whole = refs["k"][at, :], refs["v"][at, :], refs["kept"][rows], refs["whole"][tiles.c]
    weighted = v.astype(jnp.float32) * kept[:, None]
    if "state" in carry:
        new["state"] = carry["state"] * whole + dot(k, weighted.astype(v.dtype), 0, 0)
    if "row" in carry:
        if tiles.reverse:
            weighted *= refs["bias"][at][:, None]
        new["row"] = carry["row"] * whole + jnp.sum(weighted, axis=0)
    if "sums" in carry:
        wide = jnp.broadcast_to(kept[:, None], (tiles.C, NARROW)).astype(k.dtype)
        new["sums"] = carry["sums"] * whole + dot(k, wide, 0, 0)
    return new


def near(arrays: dict, plan: Plan, *, reverse: bool = False) -> dict:
    """The gradient of the softmax's queries or, with reverse, of its keys."""
    B, T, _, H = arrays["near_q"].shape
    N, dtype = plan.heads, arrays["near_q"].dtype
    shapes = {"out": jax.ShapeDtypeStruct((B, T, N, H), dtype)}
    if not reverse:
        shapes["total"] = shapes["mass"] = jax.ShapeDtypeStruct((B, N, T), jnp.float32)
        shapes["place"] = jax.ShapeDtypeStruct((B, N, T), jnp.int32)

    def block(name, shape):
        whole = _block(name, shape, N, H)
        return pl.BlockSpec(whole.block_shape, lambda c, n, b: whole.index_map(b * N + n, 0, 0))

    call = pl.pallas_call(
        functools.partial(_near, names=(*arrays, *shapes), reverse=reverse, plan=plan),
        grid=(T // plan.chunk, N, B),
        in_specs=[block(name, x.shape) for name, x in arrays.items()],
        out_specs=[block(name, x.shape) for name, x in shapes.items()],
        out_shape=list(shapes.values()),
        compiler_params=triton.CompilerParams(num_warps=4, num_stages=1),
        interpret=plan.interpret,
        name="windowed_linear_attention_near",
    )
    return dict(zip(shapes, call(*arrays.values()), strict=True))


def _near(*given, names, reverse, plan):
    refs = dict(zip(names, given, strict=True))
    dot = functools.partial(state_tiles_gpu.dot, interpret=plan.interpret)
    tiles = Tiles(refs, pl.program_id(0), reverse, plan)
    s_rows, w_rows = refs["near_q"][tiles.rows, :], refs["q"][tiles.rows, :]

    def soft(t):
        """The products s, exp(scale (s - max)), and its cotangent dw."""
        s = dot(s_rows, refs["near_k"][tiles.at(t), :], 1, 1)
        dw = dot(w_rows, refs["k"][tiles.at(t), :], 1, 1) + tiles.of_query("bias", t)
        return s, tiles.soft(s, t), dw

    def totals(t, carry):
        s, e, dw = soft(t)
        best, place, total, mass = carry
        s = jnp.where(tiles.near(t), s, jnp.float32(NEVER))
        most = jnp.max(s, axis=1)
        found = jnp.max(jnp.where(s == most[:, None], tiles.keys(t)[1], -1), axis=1)
        place = jnp.where(most > best, found, place)
        return jnp.maximum(most, best), place, total + jnp.sum(e * dw, axis=1), mass + jnp.sum(e, axis=1)

    if not reverse:
        zeros = jnp.zeros((tiles.C,), jnp.float32)
        start = zeros + NEVER / 2, jnp.full((tiles.C,), -1, jnp.int32), zeros, zeros
        _, *found = lax.fori_loop(0, tiles.count, totals, start)
        for name, x in zip(("place", "total", "mass"), found, strict=True):
            refs[name][tiles.rows] = tiles.own[name] = x

    def add(t, out):
        top = tiles.keys(t)[1] == tiles.of_query("place", t)
        _, e, dw = soft(t)
        ds = e * dw - jnp.where(top, tiles.of_query("total", t), 0.0)
        return out + dot(ds.astype(refs["near_k"].dtype), refs["near_k"][tiles.at(t), :], 1, 0)

    out = lax.fori_loop(0, tiles.count, add, jnp.zeros(s_rows.shape, jnp.float32))
    refs["out"][tiles.rows, :] = (out * (refs["gamma"][0] * plan.scale)).astype(refs["out"].dtype)
