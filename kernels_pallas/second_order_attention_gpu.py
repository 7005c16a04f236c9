"""Squared attention on GPU, through Triton: the tiles of `kernels_pallas.second_order_attention`.

Arrays stay as they come, [B, T, N, H]: a tile's rows lie N H elements apart, H contiguous elements each, so nothing
is transposed. A program owns the rows of one chunk (sums in registers, about half of the file at H = 128) and streams
tiles of `streamed` tokens through shared memory: first the chunks off the diagonal, as many as it sees, from the
diagonal outwards; then its own chunk, where the decay is an exp and the triangle and the documents are masked.
Programs with most to do (late queries; early keys) start first.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from kernels_pallas.second_order_attention import FLOOR, Cotangent, Fold, Options, Reach, Tile

EXACT = jax.lax.DotAlgorithmPreset.TF32_TF32_F32_X3  # float32 products from three passes of TF32


def _dot(a, b, options):
    exact = jax.lax.Precision.HIGHEST if options.interpret else EXACT  # a CPU has no TF32
    return jnp.dot(
        a, b, preferred_element_type=jnp.float32, precision=exact if a.dtype == jnp.float32 else None
    )


def _cut(ref, start, size):
    return None if ref is None else ref[pl.ds(start, size)]


def _times(x, scalar):
    return x if scalar is None else x * scalar


def _visit(steps, count, at, body, sums):
    """sums = body(t, scalar, sums) for t = 0 .. count - 1; the scalar begins at 1, then takes on steps[at(t)]."""
    if steps is None:
        return jax.lax.fori_loop(0, count, lambda t, sums: body(t, None, sums), sums)

    def visit(t, carry):
        scalar, sums = carry
        return scalar * steps[at(t)], body(t, scalar, sums)

    return jax.lax.fori_loop(0, count, visit, (jnp.exp(jnp.zeros((), jnp.float32)), sums))[1]


def _decay(local, runs, queries, keys, size, *, keys_down=False):
    """e^{l_i - l_j} of a tile of the diagonal, 0 where query i does not see key j.

    queries, keys: the first token of each. Keys run along the columns, or down the rows (keys_down).
    """
    down, across = (keys, queries) if keys_down else (queries, keys)
    rows = down + jax.lax.broadcasted_iota(jnp.int32, size, 0)
    columns = across + jax.lax.broadcasted_iota(jnp.int32, size, 1)
    seen = rows <= columns if keys_down else rows >= columns
    if runs is not None:
        seen &= runs[pl.ds(down, size[0])][:, None] == runs[pl.ds(across, size[1])][None, :]
    if local is None:
        return seen.astype(jnp.float32)
    fall = local[pl.ds(down, size[0])][:, None] - local[pl.ds(across, size[1])][None, :]
    return jnp.exp(jnp.where(seen, -fall if keys_down else fall, jnp.float32(-1e30)))


def _forward_kernel(first, steps, q, k, keys, v, local, enter, runs, y, den, *, tile, options):
    C, S, dot = tile.held, tile.streamed, functools.partial(_dot, options=options)
    i = pl.num_programs(0) - 1 - pl.program_id(0)
    queries, base = q[...], i * (C // S)

    def add(w, start, sums):
        acc, total = sums
        w = w.astype(v.dtype)
        acc += dot(w, v[pl.ds(start, S), :])
        return acc, total if total is None else total + jnp.sum(w.astype(jnp.float32), axis=1)

    def off(t, scalar, sums):
        start = (base - 1 - t) * S
        s = dot(queries, keys[pl.ds(start, S), :].T)
        return add(s * _times(s, scalar), start, sums)

    def diagonal(t, sums):
        start = (base + t) * S
        s = dot(queries, k[pl.ds(start, S), :].T)
        return add(s * s * _decay(local, runs, i * C, start, (C, S)), start, sums)

    sums = jnp.zeros(queries.shape, jnp.float32), jnp.zeros(C, jnp.float32) if options.normalize else None
    acc, total = _visit(steps, (i - first[i]) * (C // S), lambda t: base - 1 - t, off, sums)
    if enter is not None:
        row = enter[pl.ds(i * C, C)]
        acc, total = acc * row[:, None], total if total is None else total * row
    acc, total = jax.lax.fori_loop(0, C // S, diagonal, (acc, total))
    if options.normalize:
        den[...] = total
        y[...] = (acc * _inverse(total)[:, None]).astype(y.dtype)
    else:
        den[...] = jnp.zeros(C, jnp.float32)
        y[...] = (acc * options.scale**2).astype(y.dtype)


def _inverse(total):
    """1 / total, 0 where that is below the floor (and NaN where it is NaN)."""
    empty = total <= FLOOR
    return jnp.where(empty, jnp.zeros_like(total), 1 / jnp.where(empty, jnp.ones_like(total), total))


def _dq_kernel(first, steps, q, k, keys, v, dy, ratio, mean, g, bias, local, runs, dq, row, *, tile, options):
    C, S, dot = tile.held, tile.streamed, functools.partial(_dot, options=options)
    i = pl.num_programs(0) - 1 - pl.program_id(0)
    queries, base = q[...], i * (C // S)

    def add(sums, keys, start, cotangent, means, factor):
        s = dot(queries, keys.T)
        dp = dot(cotangent, v[pl.ds(start, S), :].T)
        dp = dp if means is None else dp - means[:, None]
        ds = _times(s, factor) * dp
        flow = None if sums[1] is None else sums[1] + jnp.sum(s * ds, axis=1)
        return sums[0] + dot(ds.astype(keys.dtype), keys), flow

    cotangent, means = g[...], _cut(bias, i * C, C)

    def off(t, scalar, sums):
        start = (base - 1 - t) * S
        return add(sums, keys[pl.ds(start, S), :], start, cotangent, means, scalar)

    sums = jnp.zeros(queries.shape, jnp.float32), None if local is None else jnp.zeros(C, jnp.float32)
    sums = _visit(steps, (i - first[i]) * (C // S), lambda t: base - 1 - t, off, sums)
    plain, plain_means, scale = dy[...], _cut(mean, i * C, C), ratio[pl.ds(i * C, C)][:, None]

    def diagonal(t, sums):
        start = (base + t) * S
        factor = _decay(local, runs, i * C, start, (C, S)) * scale
        return add(sums, k[pl.ds(start, S), :], start, plain, plain_means, factor)

    acc, flow = jax.lax.fori_loop(0, C // S, diagonal, sums)
    dq[...] = (2 * acc).astype(dq.dtype)
    row[...] = jnp.zeros(C, jnp.float32) if flow is None else flow


def _dkv_kernel(
    last, steps, k, keys, v, leave, q, dy, ratio, mean, g, bias, local, runs, dk, dv, column, *, tile, options
):
    C, S, dot = tile.held, tile.streamed, functools.partial(_dot, options=options)
    j = pl.program_id(0)
    values, base = v[...], (j + 1) * (C // S)

    def add(sums, keys, start, cotangent, means, factor):
        """Keys down the rows: what queries at `start` .. give to dk / 2, dv and the sums of w dw."""
        queries = q[pl.ds(start, S), :]
        s = dot(keys, queries.T)
        dp = dot(values, cotangent.T)
        dp = dp if means is None else dp - means[None, :]
        weighted = _times(s, factor)
        ds = weighted * dp
        flow = None if local is None else sums[2] + jnp.sum(s * ds, axis=1)
        dk_sum = sums[0] + dot(ds.astype(queries.dtype), queries)
        return dk_sum, sums[1] + dot((s * weighted).astype(cotangent.dtype), cotangent), flow

    held = keys[...]

    def off(t, scalar, sums):
        start = (base + t) * S
        return add(sums, held, start, g[pl.ds(start, S), :], _cut(bias, start, S), scalar)

    zeros = jnp.zeros(values.shape, jnp.float32)
    sums = zeros, zeros, None if local is None else jnp.zeros(C, jnp.float32)
    dk_sum, dv_sum, flow = _visit(steps, (last[j] - j) * (C // S), lambda t: base + t, off, sums)
    if leave is not None:
        dk_sum *= leave[pl.ds(j * C, C)][:, None]
    plain = k[...]

    def diagonal(t, sums):
        start = j * C + t * S
        factor = _decay(local, runs, start, j * C, (C, S), keys_down=True) * ratio[pl.ds(start, S)][None, :]
        return add(sums, plain, start, dy[pl.ds(start, S), :], _cut(mean, start, S), factor)

    dk_sum, dv_sum, flow = jax.lax.fori_loop(0, C // S, diagonal, (dk_sum, dv_sum, flow))
    dk[...], dv[...] = (2 * dk_sum).astype(dk.dtype), dv_sum.astype(dv.dtype)
    column[...] = jnp.zeros(C, jnp.float32) if flow is None else flow


class _Specs:
    """Blocks for a grid (J, N, B) of chunks: those of the program's own chunk, and whole rows to stream from."""

    def __init__(self, shape, C, *, reverse=False):
        self.B, self.T, self.N, self.H = shape
        self.C, self.J = C, self.T // C
        self.at = (lambda i: self.J - 1 - i) if reverse else (lambda i: i)

    def own(self, heads):
        G = self.N // heads
        return pl.BlockSpec((None, self.C, None, self.H), lambda i, n, b: (b, self.at(i), n // G, 0))

    def whole(self, heads):
        G = self.N // heads
        return pl.BlockSpec((None, self.T, None, self.H), lambda i, n, b: (b, 0, n // G, 0))

    def own_row(self):
        return pl.BlockSpec((None, None, self.C), lambda i, n, b: (b, n, self.at(i)))

    def row(self, x):
        """Of [B, N, anything] or [B, T], all of it."""
        if x is None:
            return None
        if x.ndim == 2:
            return pl.BlockSpec((None, x.shape[1]), lambda i, n, b: (b, 0))
        return pl.BlockSpec((None, None, x.shape[2]), lambda i, n, b: (b, n, 0))


def _call(kernel, specs: _Specs, tile, options, operands, outputs, name):
    """operands and outputs: pairs of an array or a shape, and its block; None where there is none."""
    arrays, in_specs = zip(*operands, strict=True)
    shapes, out_specs = zip(*outputs, strict=True)
    return pl.pallas_call(
        functools.partial(kernel, tile=tile, options=options),
        grid=(specs.J, specs.N, specs.B),
        in_specs=in_specs,
        out_specs=out_specs,
        out_shape=shapes,
        compiler_params=triton.CompilerParams(num_warps=tile.warps, num_stages=tile.stages),
        interpret=options.interpret,
        name=name,
    )(*arrays)


def _steps(step, parts, at):
    """One factor a streamed tile: that of its chunk on the last one visited (number `at` of `parts`), else 1."""
    spread = jnp.ones((*step.shape, parts), jnp.float32).at[..., at].set(step)
    return spread.reshape(*step.shape[:2], -1)


def forward(q, k, v, fold: Fold | None, reach: Reach, runs, options: Options, tile: Tile, dtype):
    """y [B, T, N, H] in `dtype`, and the sums of the weights [B, N, T] float32 (0 without normaliser)."""
    B, T, N, H = q.shape
    at, K = _Specs(q.shape, tile.held, reverse=True), k.shape[2]
    keys, local, enter, steps = _parts(fold, k, tile, 0)
    rows = [(x, at.row(x)) for x in (local, enter, runs)]
    operands = [
        *((x, at.row(x)) for x in (reach.first, steps)),
        (q, at.own(N)),
        (k, at.whole(K)),
        (keys, at.whole(keys.shape[2])),
        (v, at.whole(K)),
        *rows,
    ]
    outputs = [
        (jax.ShapeDtypeStruct(q.shape, dtype), at.own(N)),
        (jax.ShapeDtypeStruct((B, N, T), jnp.float32), at.own_row()),
    ]
    return _call(_forward_kernel, at, tile, options, operands, outputs, "second_order_forward")


def backward_dq(q, k, v, ct: Cotangent, fold: Fold | None, reach: Reach, runs, options: Options, tile: Tile):
    """dq [B, T, N, H] and sum_j w_ij dw_ij [B, N, T] (0 where it is not needed)."""
    B, T, N, H = q.shape
    at, K = _Specs(q.shape, tile.held, reverse=True), k.shape[2]
    keys, local, _, steps = _parts(fold, k, tile, 0)
    mean, bias = (ct.mean, ct.bias) if options.normalize else (None, None)
    operands = [
        *((x, at.row(x)) for x in (reach.first, steps)),
        (q, at.own(N)),
        (k, at.whole(K)),
        (keys, at.whole(keys.shape[2])),
        (v, at.whole(K)),
        (ct.dy, at.own(N)),
        *((x, at.row(x)) for x in (ct.ratio, mean)),
        (ct.g, at.own(N)),
        *((x, at.row(x)) for x in (bias, local, runs)),
    ]
    outputs = [
        (jax.ShapeDtypeStruct(q.shape, q.dtype), at.own(N)),
        (jax.ShapeDtypeStruct((B, N, T), jnp.float32), at.own_row()),
    ]
    return _call(_dq_kernel, at, tile, options, operands, outputs, "second_order_dq")


def backward_dkv(q, k, v, ct: Cotangent, fold: Fold | None, reach: Reach, runs, options: Options, tile: Tile):
    """dk and dv for each query head, [B, T, N, H], and sum_i w_ij dw_ij [B, N, T]."""
    B, T, N, H = q.shape
    at, K = _Specs(q.shape, tile.held), k.shape[2]
    parts = tile.held // tile.streamed
    keys, local, _, steps = _parts(fold, k, tile, parts - 1)
    mean, bias = (ct.mean, ct.bias) if options.normalize else (None, None)
    leave = None if fold is None else fold.leave
    operands = [
        *((x, at.row(x)) for x in (reach.last, steps)),
        (k, at.own(K)),
        (keys, at.own(keys.shape[2])),
        (v, at.own(K)),
        (leave, at.row(leave)),
        (q, at.whole(N)),
        (ct.dy, at.whole(N)),
        *((x, at.row(x)) for x in (ct.ratio, mean)),
        (ct.g, at.whole(N)),
        *((x, at.row(x)) for x in (bias, local, runs)),
    ]
    outputs = [
        (jax.ShapeDtypeStruct(q.shape, k.dtype), at.own(N)),
        (jax.ShapeDtypeStruct(q.shape, v.dtype), at.own(N)),
        (jax.ShapeDtypeStruct((B, N, T), jnp.float32), at.own_row()),
    ]
    return _call(_dkv_kernel, at, tile, options, operands, outputs, "second_order_dkv")


def _parts(fold: Fold | None, k, tile: Tile, at: int):
    """Folded keys, local sums, row factors, and the scalars of the streamed tiles."""
    if fold is None:
        return k, None, None, None
    return fold.keys, fold.local, fold.enter, _steps(fold.step, tile.held // tile.streamed, at)
