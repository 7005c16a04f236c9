"""The far part of second-order attention on GPU, through Triton; `kernels_pallas.second_order_states` defines it.

The unit is a slice: row m of the square times a block of R columns, H x R numbers of the state. Slices are numbered
block by block, with m from 0 to the block's last row. Using a slice takes one small matrix product whose other factor
is formed in registers: a row of x (read from a copy with T last, so that it is contiguous) times a tile of x:

    walk       [H, tokens] x [tokens, R]   (u * x_m) x_block: a program holds `held` slices, float32, and loops over T
    read       [tokens, R] x [R, H]        (x_m * x_block) S: a program holds sums of its tokens and streams slices
    contract   [tokens, H] x [H, R]        u S: a program holds gradients of a block of columns and streams slices

All programs of a chunk stream the same slices, so these come from L2: 2 P H bytes per `held` tokens.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from kernels_pallas import tiles_gpu
from kernels_pallas.backends import triton
from kernels_pallas.second_order_states_plan import Plan
from kernels_pallas.tiles import Tile


def _begin(block, R):
    """The first slice of a block of columns."""
    return R * (block * (block + 1) // 2)


def _walk_kernel(weights, rows, columns, values, kept, initial, states, final, *, plan, reverse):
    C, R, (U, S, *_) = plan.sizes.chunk, plan.sizes.block, plan.sizes.walk
    J, blocks, dtype = states.shape[0], rows.shape[0] // R, columns.dtype
    first = pl.program_id(0) * U
    block = sum(jnp.where(first >= _begin(b, R), jnp.int32(1), jnp.int32(0)) for b in range(1, blocks))
    m = first - _begin(block, R)
    # Rows before the block represent both orders.
    twice = jnp.where(m >= block * R, jnp.float32(1), jnp.float32(2))

    def tile(start, sums):
        tokens = pl.ds(start, S)
        column, value = columns[tokens, pl.ds(block * R, R)], values[:, tokens]
        weight = weights[tokens] * twice
        new = []
        for i in range(U):
            row = (rows[m + i, tokens].astype(jnp.float32) * weight).astype(dtype)
            new.append(sums[i] + tiles_gpu.dot(value * row[None, :], column, plan.options))
        return tuple(new)

    def chunk(t, sums):
        c = J - 1 - t if reverse else t
        for i in range(U):
            states[c, first + i, :, :] = sums[i].astype(dtype)
        sums = tuple(x * kept[c] for x in sums)
        return jax.lax.fori_loop(0, C // S, lambda t, sums: tile(c * C + t * S, sums), sums)

    if initial is None:
        sums = tuple(jnp.zeros(final.shape[1:], jnp.float32) for _ in range(U))
    else:
        sums = tuple(initial[first + i, :, :] for i in range(U))
    sums = jax.lax.fori_loop(0, J, chunk, sums)
    for i in range(U):
        final[first + i, :, :] = sums[i]


def _read_kernel(live, x, rows, states, factor, near, near_den, squares, out, den, *, plan):
    R, (S, *_) = plan.sizes.block, plan.sizes.read
    i, dot = pl.program_id(0), functools.partial(tiles_gpu.dot, options=plan.options)
    j, blocks = i // (plan.sizes.chunk // S), x.shape[1] // R

    def block(b, acc):
        columns = x[:, pl.ds(b * R, R)]

        def row(m, acc):
            features = rows[m, :][:, None] * columns
            return acc + dot(features, states[j, _begin(b, R) + m, :, :].T)

        return jax.lax.fori_loop(0, (b + 1) * R * live[i], row, acc)

    acc = jax.lax.fori_loop(0, blocks, block, jnp.zeros(x.shape, jnp.float32))
    weight = factor[...]
    acc *= weight[:, None]
    if near is not None:
        acc += near[...]
    if squares is None:
        den[...] = jnp.zeros_like(weight)
    else:
        queries = x[...]
        far = jnp.sum(queries.astype(jnp.float32) * dot(queries, squares[j, :, :]), axis=1)
        total = near_den[...] + weight * far
        den[...] = total
        empty = total <= plan.floor
        acc *= jnp.where(empty, jnp.zeros_like(total), 1 / jnp.where(empty, jnp.ones_like(total), total))[
            :, None
        ]
    out[...] = acc.astype(out.dtype)


def _contract_kernel(live, x, rows, u, states, bias, squares, out, products, *, plan):
    R, (S, *_) = plan.sizes.block, plan.sizes.contract
    blocks, dot = x.shape[1] // R, functools.partial(tiles_gpu.dot, options=plan.options)
    i, b = pl.program_id(0) // blocks, blocks - 1 - pl.program_id(0) % blocks
    j = i // (plan.sizes.chunk // S)
    columns, given = x[:, pl.ds(b * R, R)], u[...]
    wide = columns.astype(jnp.float32)

    def row(m, acc):
        g = dot(given, states[j, _begin(b, R) + m, :, :])
        products[m, :] = jnp.sum(wide * g, axis=1)
        return acc + rows[m, :].astype(jnp.float32)[:, None] * g

    acc = jax.lax.fori_loop(0, (b + 1) * R * live[i], row, jnp.zeros((S, R), jnp.float32))
    if squares is not None:
        acc += 2 * bias[...][:, None] * dot(x[...], squares[j, :, pl.ds(b * R, R)])
    out[...] = acc


def walk(weights, x, u, kept, initial, plan: Plan, *, reverse=False):
    """States [B, N, J, slices, H, R] in x's dtype, before each chunk, and after the last one in float32."""
    (B, T, n, H), (_, N, J), R = x.shape, kept.shape, plan.sizes.block
    slices, m, tile = plan.features(H) // R, u.shape[2], plan.sizes.walk
    whole = pl.BlockSpec((None, None, slices, H, R), lambda p, h, b: (b, h, 0, 0, 0))
    turned = lambda heads: pl.BlockSpec((None, None, H, T), lambda p, h, b: (b, h * heads // N, 0, 0))  # noqa: E731
    operands = [
        (weights, pl.BlockSpec((None, None, T), lambda p, h, b: (b, h, 0))),
        (_turned(x), turned(n)),
        (x, pl.BlockSpec((None, T, None, H), lambda p, h, b: (b, 0, h * n // N, 0))),
        (_turned(u), turned(m)),
        (kept, pl.BlockSpec((None, None, J), lambda p, h, b: (b, h, 0))),
        (None if initial is None else _cut(initial, R), None if initial is None else whole),
    ]
    outputs = [
        (
            jax.ShapeDtypeStruct((B, N, J, slices, H, R), x.dtype),
            pl.BlockSpec((None, None, J, slices, H, R), lambda p, h, b: (b, h, 0, 0, 0, 0)),
        ),
        (jax.ShapeDtypeStruct((B, N, slices, H, R), jnp.float32), whole),
    ]
    kernel = functools.partial(_walk_kernel, reverse=reverse)
    states, final = _call(
        kernel, (slices // tile.held, N, B), tile, operands, outputs, plan, "second_order_walk"
    )
    return states, jnp.swapaxes(final, 3, 4).reshape(B, N, -1, H)


def read(x, states, factor, plan: Plan, dtype, *, near=None, near_den=None, squares=None):
    """factor * (the state, read by x) + near, [B, T, N, H]; with `squares`, divided by the sum of the weights."""
    B, (N, T), H, tile = len(x), factor.shape[1:], x.shape[3], plan.sizes.read
    at = _Specs(T, N, H, tile.held)
    operands = [
        *at.common(x, states, factor),
        (factor, at.own_row()),
        (near, None if near is None else at.own(N)),
        (near_den, at.own_row()) if squares is not None else (None, None),
        (squares, at.all(squares)) if squares is not None else (None, None),
    ]
    outputs = [
        (jax.ShapeDtypeStruct((B, T, N, H), dtype), at.own(N)),
        (jax.ShapeDtypeStruct((B, N, T), jnp.float32), at.own_row()),
    ]
    out, den = _call(_read_kernel, (T // tile.held, N, B), tile, operands, outputs, plan, "second_order_read")
    return out, den


def contract(x, u, states, factor, plan: Plan, *, bias=None, squares=None):
    """The gradient with respect to x of factor * u . (the state, read by x) and of bias * x . squares x, float32."""
    B, (N, T), H, R, tile = len(x), factor.shape[1:], x.shape[3], plan.sizes.block, plan.sizes.contract
    at, blocks = _Specs(T, N, H, tile.held, H // R), H // R
    operands = [*at.common(x, states, factor)]
    operands.insert(3, (u, at.own(u.shape[2])))
    operands.append((bias, None if squares is None else at.own_row()))
    operands.append((squares, None if squares is None else at.all(squares)))
    last = lambda p: blocks - 1 - p % blocks  # noqa: E731
    outputs = [
        (
            jax.ShapeDtypeStruct((B, T, N, H), jnp.float32),
            pl.BlockSpec((None, tile.held, None, R), lambda p, h, b: (b, p // blocks, h, last(p))),
        ),
        (
            jax.ShapeDtypeStruct((B, N, blocks, H, T), jnp.float32),
            pl.BlockSpec((None, None, None, H, tile.held), lambda p, h, b: (b, h, last(p), 0, p // blocks)),
        ),
    ]
    grid = T // tile.held * blocks, N, B
    out, products = _call(_contract_kernel, grid, tile, operands, outputs, plan, "second_order_contract")
    written = jnp.arange(H) < (jnp.arange(blocks)[:, None] + 1) * R
    products = jnp.sum(jnp.where(written[..., None], products, 0), axis=2)
    far = (out + jnp.transpose(products, (0, 3, 1, 2))) * jnp.swapaxes(factor, 1, 2)[..., None]
    return jnp.where(jnp.swapaxes(factor, 1, 2)[..., None] > 0, far, 0)


class _Specs:
    """Blocks of a grid (tiles x parts, N, B)."""

    def __init__(self, T, N, H, S, parts=1):
        self.T, self.N, self.H, self.S, self.parts = T, N, H, S, parts

    def own(self, heads):
        return pl.BlockSpec(
            (None, self.S, None, self.H), lambda p, h, b: (b, p // self.parts, h * heads // self.N, 0)
        )

    def own_row(self):
        return pl.BlockSpec((None, None, self.S), lambda p, h, b: (b, h, p // self.parts))

    def all(self, x):
        rest = (0,) * (x.ndim - 2)
        return pl.BlockSpec((None, None, *x.shape[2:]), lambda p, h, b: (b, h, *rest))

    def common(self, x, states, factor):
        """Operands of read and contract: which tiles are live, x, its copy with T last, and the states."""
        live = jnp.any(factor.reshape(*factor.shape[:2], -1, self.S) > 0, axis=-1).astype(jnp.int32)
        heads = x.shape[2]
        turned = pl.BlockSpec(
            (None, None, self.H, self.S), lambda p, h, b: (b, h * heads // self.N, 0, p // self.parts)
        )
        return (live, self.all(live)), (x, self.own(heads)), (_turned(x), turned), (states, self.all(states))


def _turned(x):
    return jnp.transpose(x, (0, 2, 3, 1))


def _cut(state, R):
    """[B, N, P, H] -> [B, N, slices, H, R]."""
    B, N, P, H = state.shape
    return jnp.swapaxes(state.reshape(B, N, P // R, R, H), 3, 4)


def _call(kernel, grid, tile: Tile, operands, outputs, plan, name):
    arrays, in_specs = zip(*operands, strict=True)
    shapes, out_specs = zip(*outputs, strict=True)
    return pl.pallas_call(
        functools.partial(kernel, plan=plan),
        grid=grid,
        in_specs=in_specs,
        out_specs=out_specs,
        out_shape=shapes,
        compiler_params=triton.CompilerParams(num_warps=tile.warps, num_stages=tile.stages),
        interpret=plan.options.interpret,
        name=name,
    )(*arrays)
