"""The far part of second-order attention on TPU; `kernels_pallas.second_order_states` defines it.

Tokens run along the lanes, [H, tokens], so that a row of x is broadcast over a block of rows without a transposition:
M rows m times a block of R rows n are M R features, which the matrix unit contracts. The whole state of a head, P x H,
is in VMEM: walk keeps it in float32 from one step of the grid to the next, and read and contract fetch it once per
chunk. Results are transposed once per tile, to [tokens, H]. VMEM at H = 128 in bfloat16: 5 MiB for the sums of
walk, 10 for the two windows of the final state, 5 for those of the states.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas.second_order_states_plan import Plan
from kernels_pallas.tiles_tpu import dot, heads_first, to_column, tokens_first

VMEM = 48 << 20  # of 128 MiB on v5e and v6e, 64 on v5p


def _visit(H, R, rows, live, body):
    """Runs body(block, m) for each block of columns and, inside it, for every `rows` rows m of its slices."""

    def block(b, _):
        def some(t, _):
            body(b, pl.multiple_of(t * rows, rows))
            return _

        return jax.lax.fori_loop(0, (b + 1) * (R // rows) * live, some, 0)

    jax.lax.fori_loop(0, H // R, block, 0)


def _features(rows, columns):
    """The products of all pairs of rows: [M, S] and [R, S] -> [M R, S]."""
    return jnp.concatenate([rows[i : i + 1] * columns for i in range(len(rows))], axis=0)


def _slices(b, m, R, rows):
    """The index of the features of `rows` rows of block b, from row m on."""
    return pl.ds(pl.multiple_of((R * (b * (b + 1) // 2) + m) * R, rows * R), rows * R)


def _walk_kernel(kept, weights, x, u, initial, states, final, sums, wide, weighted, *, plan, last, reverse):
    R, H, M, t = plan.sizes.block, x.shape[0], plan.sizes.walk.held, pl.program_id(2)
    each = plan.sizes.chunk // x.shape[1]
    J = (last + 1) // each
    c = J - 1 - t // each if reverse else t // each
    keep = kept[(pl.program_id(0) * pl.num_programs(1) + pl.program_id(1)) * J + c]

    @pl.when(t == 0)
    def _():
        sums[...] = jnp.zeros_like(sums) if initial is None else initial[...]

    @pl.when(t % each == 0)
    def _():
        states[...] = sums[...].astype(states.dtype)
        sums[...] *= keep

    wide[...] = x[...].astype(jnp.float32)
    weighted[...] = wide[...] * weights[...]

    def add(b, m):
        twice = jnp.where(m >= b * R, 1.0, 2.0)  # rows before the block represent both orders
        rows, columns = weighted[pl.ds(m, M), :] * twice, wide[pl.ds(pl.multiple_of(b * R, R), R), :]
        features = _features(rows, columns).astype(u.dtype)
        sums[_slices(b, m, R, M), :] += dot(features, u[...], (1, 1))

    _visit(H, R, M, 1, add)

    @pl.when(t == last)
    def _():
        final[...] = sums[...]


def _live(live):
    return live[
        (pl.program_id(0) * pl.num_programs(1) + pl.program_id(1)) * pl.num_programs(2) + pl.program_id(2)
    ]


def _read_kernel(live, x, states, factor, near, near_den, squares, out, den, sums, wide, *, plan):
    R, H, M = plan.sizes.block, x.shape[0], plan.sizes.read.streamed
    sums[...] = jnp.zeros_like(sums)
    wide[...] = x[...].astype(jnp.float32)

    def add(b, m):
        rows, columns = wide[pl.ds(m, M), :], wide[pl.ds(pl.multiple_of(b * R, R), R), :]
        features = _features(rows, columns).astype(x.dtype)
        sums[...] += dot(states[_slices(b, m, R, M), :], features, (0, 0))

    _visit(H, R, M, _live(live), add)
    weight = factor[...]
    if squares is not None:
        far = jnp.sum(wide[...] * dot(squares[...], x[...], (1, 0)), axis=0, keepdims=True)
        total = near_den[...] + weight * far
        den[...] = total
        empty = total <= plan.floor
        inverse = jnp.where(empty, 0.0, 1 / jnp.where(empty, 1.0, total))
        result = jnp.transpose(sums[...] * (weight * inverse)) + near[...] * to_column(inverse)
    else:
        den[...] = jnp.zeros_like(den)
        result = jnp.transpose(sums[...] * weight)
        result = result if near is None else result + near[...]
    out[...] = result.astype(out.dtype)


def _contract_kernel(live, x, u, states, factor, bias, squares, out, sums, wide, *, plan):
    R, H, M = plan.sizes.block, x.shape[0], plan.sizes.contract.streamed
    sums[...] = jnp.zeros_like(sums)
    wide[...] = x[...].astype(jnp.float32)

    def add(b, m):
        rows, at = wide[pl.ds(m, M), :], pl.ds(pl.multiple_of(b * R, R), R)
        columns = wide[at, :]
        g = dot(states[_slices(b, m, R, M), :], u[...], (1, 0))
        parts = [g[i * R : (i + 1) * R] for i in range(M)]
        sums[at, :] += sum(rows[i : i + 1] * part for i, part in enumerate(parts))
        products = [jnp.sum(columns * part, axis=0, keepdims=True) for part in parts]
        sums[pl.ds(m, M), :] += jnp.concatenate(products, axis=0)

    _visit(H, R, M, _live(live), add)
    if squares is not None:
        sums[...] += 2 * bias[...] * dot(squares[...], x[...], (1, 0))
    out[...] = jnp.transpose(sums[...] * factor[...])


def walk(weights, x, u, kept, initial, plan: Plan, *, reverse=False):
    """States [B, N, J, slices, R, H] in x's dtype, before each chunk, and after the last one in float32."""
    (B, T, n, H), (_, N, J), R = x.shape, kept.shape, plan.sizes.block
    P, m, S = plan.features(H), u.shape[2], plan.sizes.walk.streamed
    each, last = plan.sizes.chunk // S, T // S - 1
    at = _Specs(N, H, S, lambda t: last - t) if reverse else _Specs(N, H, S)
    order = (lambda t: J - 1 - t // each) if reverse else (lambda t: t // each)
    whole = pl.BlockSpec((None, None, P, H), lambda b, h, t, _: (b, h, 0, 0))
    operands = [
        (_row(weights), at.row()),
        (_turned(x), at.turned(n)),
        (_turned(u), at.turned(m)),
        (initial, None if initial is None else whole),
    ]
    outputs = [
        (
            jax.ShapeDtypeStruct((B, N, J, P, H), x.dtype),
            pl.BlockSpec((None, None, None, P, H), lambda b, h, t, _: (b, h, order(t), 0, 0)),
        ),
        (jax.ShapeDtypeStruct((B, N, P, H), jnp.float32), whole),
    ]
    kernel = functools.partial(_walk_kernel, last=last, reverse=reverse)
    scratch = [(P, H), (H, S), (H, S)]
    grid = B, N, T // S
    states, final = _call(kernel, grid, kept, operands, outputs, scratch, plan, "second_order_walk")
    return states.reshape(B, N, J, P // R, R, H), final


def read(x, states, factor, plan: Plan, dtype, *, near=None, near_den=None, squares=None):
    """factor * (the state, read by x) + near, [B, T, N, H]; with `squares`, divided by the sum of the weights."""
    (B, T, n, H), N, S = x.shape, factor.shape[1], plan.sizes.read.held
    at, each = _Specs(N, H, S), plan.sizes.chunk // S
    normalized = squares is not None
    operands = [
        (_turned(x), at.turned(n)),
        (_whole(states), at.chunk(plan.features(H), each)),
        (_row(factor), at.row()),
        (None if near is None else heads_first(near), None if near is None else at.tokens()),
        (_row(near_den) if normalized else None, at.row() if normalized else None),
        (squares, at.chunk(H, each) if normalized else None),
    ]
    outputs = [
        (jax.ShapeDtypeStruct((B * N, T, H), dtype), at.tokens()),
        (jax.ShapeDtypeStruct((B, N, 1, T), jnp.float32), at.row()),
    ]
    grid = B, N, T // S
    scratch = [(H, S), (H, S)]
    out, den = _call(
        _read_kernel, grid, _lives(factor, S), operands, outputs, scratch, plan, "second_order_read"
    )
    return tokens_first(out, N), den.reshape(B, N, T)


def contract(x, u, states, factor, plan: Plan, *, bias=None, squares=None):
    """The gradient with respect to x of factor * (u . (the state, read by x) + bias * x . squares x), float32."""
    (B, T, n, H), N, S = x.shape, factor.shape[1], plan.sizes.contract.held
    at, each = _Specs(N, H, S), plan.sizes.chunk // S
    operands = [
        (_turned(x), at.turned(n)),
        (_turned(u), at.turned(u.shape[2])),
        (_whole(states), at.chunk(plan.features(H), each)),
        (_row(factor), at.row()),
        (None if squares is None else _row(bias), None if squares is None else at.row()),
        (squares, None if squares is None else at.chunk(H, each)),
    ]
    outputs = [(jax.ShapeDtypeStruct((B * N, T, H), jnp.float32), at.tokens())]
    grid = B, N, T // S
    scratch = [(H, S), (H, S)]
    (out,) = _call(
        _contract_kernel, grid, _lives(factor, S), operands, outputs, scratch, plan, "second_order_contract"
    )
    return tokens_first(out, N)


class _Specs:
    """Blocks for a grid (B, N, tiles), with one prefetched array of scalars."""

    def __init__(self, N, H, S, order=lambda t: t):
        self.N, self.H, self.S, self.order = N, H, S, order

    def turned(self, heads):
        """A tile of [B, heads, H, T]."""
        return pl.BlockSpec(
            (None, None, self.H, self.S), lambda b, h, t, _: (b, h * heads // self.N, 0, self.order(t))
        )

    def tokens(self):
        """A tile of [B N, T, H]."""
        return pl.BlockSpec((None, self.S, self.H), lambda b, h, t, _: (b * self.N + h, self.order(t), 0))

    def row(self):
        """A tile of [B, N, 1, T]."""
        return pl.BlockSpec((None, None, 1, self.S), lambda b, h, t, _: (b, h, 0, self.order(t)))

    def chunk(self, rows, each):
        """The chunk of [B, N, J, rows, H] that a tile belongs to; a chunk has `each` tiles."""
        return pl.BlockSpec((None, None, None, rows, self.H), lambda b, h, t, _: (b, h, t // each, 0, 0))


def _turned(x):
    return jnp.transpose(x, (0, 2, 3, 1))


def _row(x):
    return x[:, :, None]


def _whole(states):
    return states.reshape(*states.shape[:3], -1, states.shape[-1])


def _lives(factor, S):
    return jnp.any(factor.reshape(*factor.shape[:2], -1, S) > 0, axis=-1).astype(jnp.int32)


def _call(kernel, grid, scalars, operands, outputs, scratch, plan, name):
    arrays, in_specs = zip(*operands, strict=True)
    shapes, out_specs = zip(*outputs, strict=True)
    return pl.pallas_call(
        functools.partial(kernel, plan=plan),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=grid,
            in_specs=in_specs,
            out_specs=out_specs,
            scratch_shapes=[pltpu.VMEM(shape, jnp.float32) for shape in scratch],
        ),
        out_shape=shapes,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"), vmem_limit_bytes=VMEM
        ),
        interpret=plan.options.interpret,
        name=name,
    )(scalars.reshape(-1), *arrays)
