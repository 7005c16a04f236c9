"""Softmax attention with decay on GPU: the tiles of `kernels_pallas.attention`, on the grid of `tiles_gpu`."""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from kernels_pallas import tiles_gpu
from kernels_pallas.attention_plan import LOG2E, NEVER, Bias, Cotangent, Options
from kernels_pallas.tiles import Reach, Tile
from kernels_pallas.tiles_gpu import Specs, call, cut, fall, off_diagonal, times


def _visit(steps, count, at, body, sums):
    """tiles_gpu.visit, with the sum of the chunks' log decays as the scalar."""
    zero = jnp.log(jnp.ones((), jnp.float32))
    return tiles_gpu.visit(steps, count, at, body, sums, grow=jnp.add, begin=zero)


def _logits(s, options, column, scalar, start, size):
    """Scores of a tile off the diagonal, without the row part of the decay."""
    s = s * (options.scale * LOG2E)
    return s if column is None else s + (column[pl.ds(start, size)] + scalar)[None, :]


def _own_logits(s, options, local, runs, queries, keys, *, keys_down=False):
    decay, seen = fall(local, runs, queries, keys, s.shape, keys_down=keys_down)
    s = s * (options.scale * LOG2E)
    return jnp.where(seen, s if decay is None else s + decay * LOG2E, jnp.float32(NEVER))


def _forward_kernel(first, steps, q, k, v, column, row, local, runs, y, lse, *, tile, options):
    C, S, dot = tile.held, tile.streamed, functools.partial(tiles_gpu.dot, options=options)
    i = pl.num_programs(0) - 1 - pl.program_id(0)
    queries, base = q[...], i * (C // S)

    def add(z, start, sums):
        acc, total, top = sums
        new = jnp.maximum(top, jnp.max(z, axis=1))
        shrink = jnp.exp2(top - new)
        p = jnp.exp2(z - new[:, None]).astype(v.dtype)
        acc = acc * shrink[:, None] + dot(p, v[pl.ds(start, S), :])
        return acc, total * shrink + jnp.sum(p.astype(jnp.float32), axis=1), new

    def off(t, scalar, sums):
        start = (base - 1 - t) * S
        s = dot(queries, k[pl.ds(start, S), :].T)
        return add(_logits(s, options, column, scalar, start, S), start, sums)

    def diagonal(t, sums):
        start = (base + t) * S
        s = dot(queries, k[pl.ds(start, S), :].T)
        return add(_own_logits(s, options, local, runs, i * C, start), start, sums)

    sums = jnp.zeros(queries.shape, jnp.float32), jnp.zeros(C, jnp.float32), jnp.full(C, NEVER, jnp.float32)
    acc, total, top = _visit(steps, (i - first[i]) * (C // S), lambda t: base - 1 - t, off, sums)
    if row is not None:  # for rows of another document the sums so far become negligible
        top += row[pl.ds(i * C, C)]
    acc, total, top = jax.lax.fori_loop(0, C // S, diagonal, (acc, total, top))
    y[...] = (acc / total[:, None]).astype(y.dtype)
    lse[...] = top + jnp.log2(total)


def _dq_kernel(first, steps, q, k, v, dy, mean, lse, far, column, local, runs, dq, row, *, tile, options):
    C, S, dot = tile.held, tile.streamed, functools.partial(tiles_gpu.dot, options=options)
    i = pl.num_programs(0) - 1 - pl.program_id(0)
    queries, cotangent, means, base = q[...], dy[...], mean[pl.ds(i * C, C)][:, None], i * (C // S)

    def add(logits, start, sums, others=None):
        keys = k[pl.ds(start, S), :]
        p = jnp.exp2(logits(dot(queries, keys.T)))
        ds = p * (dot(cotangent, v[pl.ds(start, S), :].T) - means)
        flow = None if sums[1] is None else sums[1] + jnp.sum(times(ds, others), axis=1)
        return sums[0] + dot(ds.astype(keys.dtype), keys), flow

    above = far[pl.ds(i * C, C)][:, None]

    def off(t, scalar, sums):
        start = (base - 1 - t) * S
        return add(lambda s: _logits(s, options, column, scalar, start, S) - above, start, sums)

    sums = jnp.zeros(queries.shape, jnp.float32), None if local is None else jnp.zeros(C, jnp.float32)
    sums = _visit(steps, (i - first[i]) * (C // S), lambda t: base - 1 - t, off, sums)
    top = lse[pl.ds(i * C, C)][:, None]

    def diagonal(t, sums):
        start = (base + t) * S
        others = None if local is None else off_diagonal(i * C, start, (C, S))
        return add(lambda s: _own_logits(s, options, local, runs, i * C, start) - top, start, sums, others)

    acc, flow = jax.lax.fori_loop(0, C // S, diagonal, sums)
    dq[...] = (acc * options.scale).astype(dq.dtype)
    row[...] = jnp.zeros(C, jnp.float32) if flow is None else flow


def _dkv_kernel(
    last, steps, k, v, column, q, dy, mean, lse, far, local, runs, dk, dv, flows, *, tile, options
):
    C, S, dot = tile.held, tile.streamed, functools.partial(tiles_gpu.dot, options=options)
    j = pl.program_id(0)
    keys, values, base = k[...], v[...], (j + 1) * (C // S)

    def add(logits, start, sums, others=None):
        """Adds one tile of queries; keys run down the rows of the tile."""
        queries, cotangent = q[pl.ds(start, S), :], dy[pl.ds(start, S), :]
        p = jnp.exp2(logits(dot(keys, queries.T)))
        ds = p * (dot(values, cotangent.T) - mean[pl.ds(start, S)][None, :])
        flow = None if local is None else sums[2] + jnp.sum(times(ds, others), axis=1)
        dk_sum = sums[0] + dot(ds.astype(queries.dtype), queries)
        return dk_sum, sums[1] + dot(p.astype(cotangent.dtype), cotangent), flow

    down = cut(column, j * C, C)

    def off(t, scalar, sums):
        start = (base + t) * S

        def logits(s):
            s = s * (options.scale * LOG2E) - far[pl.ds(start, S)][None, :]
            return s if down is None else s + (down + scalar)[:, None]

        return add(logits, start, sums)

    zeros = jnp.zeros(keys.shape, jnp.float32)
    sums = zeros, zeros, None if local is None else jnp.zeros(C, jnp.float32)
    sums = _visit(steps, (last[j] - j) * (C // S), lambda t: base + t, off, sums)

    def diagonal(t, sums):
        start = j * C + t * S

        def logits(s):
            own = _own_logits(s, options, local, runs, start, j * C, keys_down=True)
            return own - lse[pl.ds(start, S)][None, :]

        others = None if local is None else off_diagonal(j * C, start, (C, S))
        return add(logits, start, sums, others)

    dk_sum, dv_sum, flow = jax.lax.fori_loop(0, C // S, diagonal, sums)
    dk[...], dv[...] = (dk_sum * options.scale).astype(dk.dtype), dv_sum.astype(dv.dtype)
    flows[...] = jnp.zeros(C, jnp.float32) if flow is None else flow


def forward(q, k, v, bias: Bias | None, reach: Reach, runs, options: Options, tile: Tile, dtype):
    """y [B, T, N, H] in `dtype`, and log2 of the sums of exponentials [B, N, T], float32."""
    B, T, N, H = q.shape
    at, K = Specs(q.shape, tile.held, reverse=True), k.shape[2]
    column, row, local = (None, None, None) if bias is None else bias[:3]
    operands = [
        *((x, at.row(x)) for x in (reach.first, _steps(bias, tile, 0))),
        (q, at.own(N)),
        (k, at.whole(K)),
        (v, at.whole(K)),
        *((x, at.row(x)) for x in (column, row, local, runs)),
    ]
    outputs = [
        (jax.ShapeDtypeStruct(q.shape, dtype), at.own(N)),
        (jax.ShapeDtypeStruct((B, N, T), jnp.float32), at.own_row()),
    ]
    return call(_forward_kernel, at, tile, options, operands, outputs, "attention_forward")


def backward_dq(q, k, v, ct: Cotangent, bias: Bias | None, reach: Reach, runs, options: Options, tile: Tile):
    """dq [B, T, N, H], and the sums of ds_ij over j < i, [B, N, T] (0 without decay and documents)."""
    B, T, N, H = q.shape
    at, K = Specs(q.shape, tile.held, reverse=True), k.shape[2]
    column, _, local = (None, None, None) if bias is None else bias[:3]
    operands = [
        *((x, at.row(x)) for x in (reach.first, _steps(bias, tile, 0))),
        (q, at.own(N)),
        (k, at.whole(K)),
        (v, at.whole(K)),
        (ct.dy, at.own(N)),
        *((x, at.row(x)) for x in (ct.mean, ct.lse, ct.far, column, local, runs)),
    ]
    outputs = [
        (jax.ShapeDtypeStruct(q.shape, q.dtype), at.own(N)),
        (jax.ShapeDtypeStruct((B, N, T), jnp.float32), at.own_row()),
    ]
    return call(_dq_kernel, at, tile, options, operands, outputs, "attention_dq")


def backward_dkv(q, k, v, ct: Cotangent, bias: Bias | None, reach: Reach, runs, options: Options, tile: Tile):
    """dk and dv per query head, [B, T, N, H] each, and the sums of ds_ij over i > j, [B, N, T]."""
    B, T, N, H = q.shape
    at, K = Specs(q.shape, tile.held), k.shape[2]
    column, _, local = (None, None, None) if bias is None else bias[:3]
    steps = _steps(bias, tile, tile.held // tile.streamed - 1)
    operands = [
        *((x, at.row(x)) for x in (reach.last, steps)),
        (k, at.own(K)),
        (v, at.own(K)),
        (column, at.row(column)),
        (q, at.whole(N)),
        (ct.dy, at.whole(N)),
        *((x, at.row(x)) for x in (ct.mean, ct.lse, ct.far, local, runs)),
    ]
    outputs = [
        (jax.ShapeDtypeStruct(q.shape, k.dtype), at.own(N)),
        (jax.ShapeDtypeStruct(q.shape, v.dtype), at.own(N)),
        (jax.ShapeDtypeStruct((B, N, T), jnp.float32), at.own_row()),
    ]
    return call(_dkv_kernel, at, tile, options, operands, outputs, "attention_dkv")


def _steps(bias: Bias | None, tile: Tile, at: int):
    return None if bias is None else tiles_gpu.spread(bias.step, tile.held // tile.streamed, at, 0.0)
