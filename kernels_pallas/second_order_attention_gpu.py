"""Second-order attention on GPU, through Triton: the tiles of `kernels_pallas.second_order_attention`.

The grid, the loops and the layout are those of `kernels_pallas.tiles_gpu`.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from kernels_pallas import tiles_gpu
from kernels_pallas.second_order_attention_plan import FLOOR, Cotangent, Fold, Options
from kernels_pallas.tiles import Reach, Tile
from kernels_pallas.tiles_gpu import Specs, call, cut, fall, off_diagonal, times


def _visit(steps, count, at, body, sums):
    """tiles_gpu.visit, with the product of the chunks' decays as the scalar."""
    one = jnp.exp(jnp.zeros((), jnp.float32))
    return tiles_gpu.visit(steps, count, at, body, sums, grow=jnp.multiply, begin=one)


def _decay(local, runs, queries, keys, size, *, keys_down=False):
    """e^{L_i - L_j} of a tile on the diagonal, 0 where query i does not see key j."""
    exponent, seen = fall(local, runs, queries, keys, size, keys_down=keys_down)
    if exponent is None:
        return seen.astype(jnp.float32)
    return jnp.exp(jnp.where(seen, exponent, jnp.float32(-1e30)))


def _forward_kernel(first, steps, q, k, keys, v, local, enter, runs, y, den, *, tile, options):
    C, S, dot = tile.held, tile.streamed, functools.partial(tiles_gpu.dot, options=options)
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
        return add(s * times(s, scalar), start, sums)

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
        y[...] = (acc if options.raw else acc * _inverse(total)[:, None]).astype(y.dtype)
    else:
        den[...] = jnp.zeros(C, jnp.float32)
        y[...] = (acc * options.scale**2).astype(y.dtype)


def _inverse(total):
    """1 / total, 0 where that is below the floor (and NaN where it is NaN)."""
    empty = total <= FLOOR
    return jnp.where(empty, jnp.zeros_like(total), 1 / jnp.where(empty, jnp.ones_like(total), total))


def _dq_kernel(first, steps, q, k, keys, v, dy, ratio, mean, g, bias, local, runs, dq, row, *, tile, options):
    C, S, dot = tile.held, tile.streamed, functools.partial(tiles_gpu.dot, options=options)
    i = pl.num_programs(0) - 1 - pl.program_id(0)
    queries, base = q[...], i * (C // S)

    def add(sums, keys, start, cotangent, means, factor, others=None):
        s = dot(queries, keys.T)
        dp = dot(cotangent, v[pl.ds(start, S), :].T)
        dp = dp if means is None else dp - means[:, None]
        ds = times(s, factor) * dp
        flow = None if sums[1] is None else sums[1] + jnp.sum(times(s * ds, others), axis=1)
        return sums[0] + dot(ds.astype(keys.dtype), keys), flow

    cotangent, means = g[...], cut(bias, i * C, C)

    def off(t, scalar, sums):
        start = (base - 1 - t) * S
        return add(sums, keys[pl.ds(start, S), :], start, cotangent, means, scalar)

    sums = jnp.zeros(queries.shape, jnp.float32), None if local is None else jnp.zeros(C, jnp.float32)
    sums = _visit(steps, (i - first[i]) * (C // S), lambda t: base - 1 - t, off, sums)
    plain, plain_means, scale = dy[...], cut(mean, i * C, C), ratio[pl.ds(i * C, C)][:, None]

    def diagonal(t, sums):
        start = (base + t) * S
        factor = _decay(local, runs, i * C, start, (C, S)) * scale
        others = None if local is None else off_diagonal(i * C, start, (C, S))
        return add(sums, k[pl.ds(start, S), :], start, plain, plain_means, factor, others)

    acc, flow = jax.lax.fori_loop(0, C // S, diagonal, sums)
    dq[...] = (2 * acc).astype(dq.dtype)
    row[...] = jnp.zeros(C, jnp.float32) if flow is None else flow


def _dkv_kernel(
    last, steps, k, keys, v, leave, q, dy, ratio, mean, g, bias, local, runs, dk, dv, column, *, tile, options
):
    C, S, dot = tile.held, tile.streamed, functools.partial(tiles_gpu.dot, options=options)
    j = pl.program_id(0)
    values, base = v[...], (j + 1) * (C // S)

    def add(sums, keys, start, cotangent, means, factor, others=None):
        """Adds the queries from `start` on to dk / 2, dv and the sums of w dw; keys run down the rows of the tile."""
        queries = q[pl.ds(start, S), :]
        s = dot(keys, queries.T)
        dp = dot(values, cotangent.T)
        dp = dp if means is None else dp - means[None, :]
        weighted = times(s, factor)
        ds = weighted * dp
        flow = None if local is None else sums[2] + jnp.sum(times(s * ds, others), axis=1)
        dk_sum = sums[0] + dot(ds.astype(queries.dtype), queries)
        return dk_sum, sums[1] + dot((s * weighted).astype(cotangent.dtype), cotangent), flow

    held = keys[...]

    def off(t, scalar, sums):
        start = (base + t) * S
        return add(sums, held, start, g[pl.ds(start, S), :], cut(bias, start, S), scalar)

    zeros = jnp.zeros(values.shape, jnp.float32)
    sums = zeros, zeros, None if local is None else jnp.zeros(C, jnp.float32)
    dk_sum, dv_sum, flow = _visit(steps, (last[j] - j) * (C // S), lambda t: base + t, off, sums)
    if leave is not None:
        dk_sum *= leave[pl.ds(j * C, C)][:, None]
    plain = k[...]

    def diagonal(t, sums):
        start = j * C + t * S
        factor = _decay(local, runs, start, j * C, (C, S), keys_down=True) * ratio[pl.ds(start, S)][None, :]
        others = None if local is None else off_diagonal(j * C, start, (C, S))
        return add(sums, plain, start, dy[pl.ds(start, S), :], cut(mean, start, S), factor, others)

    dk_sum, dv_sum, flow = jax.lax.fori_loop(0, C // S, diagonal, (dk_sum, dv_sum, flow))
    dk[...], dv[...] = (2 * dk_sum).astype(dk.dtype), dv_sum.astype(dv.dtype)
    column[...] = jnp.zeros(C, jnp.float32) if flow is None else flow


def forward(q, k, v, fold: Fold | None, reach: Reach, runs, options: Options, tile: Tile, dtype):
    """y [B, T, N, H] in `dtype`, and the sums of the weights [B, N, T] float32 (0 without normaliser)."""
    B, T, N, H = q.shape
    at, K = Specs(q.shape, tile.held, reverse=True), k.shape[2]
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
    return call(_forward_kernel, at, tile, options, operands, outputs, "second_order_forward")


def backward_dq(q, k, v, ct: Cotangent, fold: Fold | None, reach: Reach, runs, options: Options, tile: Tile):
    """dq [B, T, N, H] and sum_j w_ij dw_ij [B, N, T] (0 where it is not needed)."""
    B, T, N, H = q.shape
    at, K = Specs(q.shape, tile.held, reverse=True), k.shape[2]
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
    return call(_dq_kernel, at, tile, options, operands, outputs, "second_order_dq")


def backward_dkv(q, k, v, ct: Cotangent, fold: Fold | None, reach: Reach, runs, options: Options, tile: Tile):
    """dk and dv per query head, [B, T, N, H] each, and sum_i w_ij dw_ij [B, N, T]."""
    B, T, N, H = q.shape
    at, K = Specs(q.shape, tile.held), k.shape[2]
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
    return call(_dkv_kernel, at, tile, options, operands, outputs, "second_order_dkv")


def _parts(fold: Fold | None, k, tile: Tile, at: int):
    """Folded keys, local sums, row factors, and the scalars of the streamed tiles."""
    if fold is None:
        return k, None, None, None
    steps = tiles_gpu.spread(fold.step, tile.held // tile.streamed, at, 1.0)
    return fold.keys, fold.local, fold.enter, steps
