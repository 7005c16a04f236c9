"""Softmax attention with decay on TPU: the tiles of `kernels_pallas.attention`, on the grid of `tiles_tpu`.

The running maximum is broadcast over the lanes of a [C, 128] array, so that it combines with [C, S] scores and [C, H]
sums without a transposition.
"""

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from kernels_pallas.attention_plan import LOG2E, NEVER, Bias, Cotangent, Options
from kernels_pallas.tiles import Reach, Tile
from kernels_pallas.tiles_tpu import (
    LANES,
    Specs,
    as_pairs,
    as_rows,
    call,
    dot,
    fall,
    heads_first,
    lanes,
    off_diagonal,
    times,
    to_column,
    to_row,
    tokens_first,
)


def _own_logits(s, options, local, runs, *, keys_down=False):
    decay, seen = fall(local, runs, s.shape[0], keys_down=keys_down)
    s = s * (options.scale * LOG2E)
    return jnp.where(seen, s if decay is None else s + decay * LOG2E, NEVER)


def _place():
    """Grid indices: of the chunk among all heads' chunks, of the chunk in its head, and of the step."""
    chunk = pl.program_id(1)
    return pl.program_id(0) * pl.num_programs(1) + chunk, chunk, pl.program_id(2)


def _forward_kernel(
    bound,
    steps,
    q,
    k,
    passing,
    v,
    column,
    row,
    local,
    runs,
    y,
    lse,
    acc,
    total,
    top,
    scalar,
    *,
    options,
    decayed,
):
    at, i, t = _place()
    count = i - bound[at]

    @pl.when(t == 0)
    def _():
        acc[...] = jnp.zeros_like(acc)
        total[...] = jnp.zeros_like(total)
        top[...] = jnp.full_like(top, NEVER)
        scalar[0] = 0.0

    def add(z):
        old = top[...]
        new = jnp.maximum(old, jnp.max(z, axis=1, keepdims=True))
        shrink = jnp.exp2(old - new)
        p = jnp.exp2(z - new[:, :1]).astype(v.dtype)
        acc[...] = acc[...] * shrink[:, :1] + dot(p, v[...], (1, 0))
        total[...] = total[...] * shrink + lanes(p.astype(jnp.float32))
        top[...] = new

    @pl.when(t < count)
    def _():
        s = dot(q[...], passing[...], (1, 1)) * (options.scale * LOG2E)
        add(s + (column[...] + scalar[0]) if decayed else s)
        if decayed:
            scalar[0] = scalar[0] + steps[at - 1 - t]

    @pl.when(t == count)
    def _():
        if decayed:  # for rows of another document the sums so far become negligible
            top[...] += to_column(row[...])
        add(_own_logits(dot(q[...], k[...], (1, 1)), options, local, runs))
        sums = jnp.sum(total[...], axis=1, keepdims=True)
        y[...] = (acc[...] / sums).astype(y.dtype)
        lane = jax.lax.broadcasted_iota(jnp.int32, top.shape, 1)
        lse[...] = to_row(jnp.where(lane == 0, top[...] + jnp.log2(sums), 0.0))


def _dq_kernel(
    bound,
    steps,
    q,
    k,
    passing,
    v,
    dy,
    mean,
    lse,
    far,
    column,
    local,
    runs,
    dq,
    row,
    acc,
    flow,
    scalar,
    *,
    options,
    decayed,
):
    at, i, t = _place()
    count = i - bound[at]

    @pl.when(t == 0)
    def _():
        acc[...] = jnp.zeros_like(acc)
        flow[...] = jnp.zeros_like(flow)
        scalar[0] = 0.0

    def add(z, keys, others=None):
        ds = jnp.exp2(z) * (dot(dy[...], v[...], (1, 1)) - to_column(mean[...]))
        acc[...] += dot(ds.astype(keys.dtype), keys[...], (1, 0))
        if decayed:
            flow[...] += lanes(times(ds, others))

    @pl.when(t < count)
    def _():
        s = dot(q[...], passing[...], (1, 1)) * (options.scale * LOG2E) - to_column(far[...])
        add(s + (column[...] + scalar[0]) if decayed else s, passing)
        if decayed:
            scalar[0] = scalar[0] + steps[at - 1 - t]

    @pl.when(t == count)
    def _():
        s = dot(q[...], k[...], (1, 1))
        others = off_diagonal(acc.shape[0]) if decayed else None
        add(_own_logits(s, options, local, runs) - to_column(lse[...]), k, others)
        dq[...] = (acc[...] * options.scale).astype(dq.dtype)
        row[...] = to_row(flow[...])


def _dkv_kernel(
    bound,
    steps,
    k,
    v,
    column,
    q,
    dy,
    mean,
    lse,
    far,
    local,
    runs,
    dk,
    dv,
    flows,
    dk_sum,
    dv_sum,
    flow,
    scalar,
    *,
    options,
    decayed,
):
    at, j, t = _place()
    count = bound[at] - j

    @pl.when(t == 0)
    def _():
        dk_sum[...] = jnp.zeros_like(dk_sum)
        dv_sum[...] = jnp.zeros_like(dv_sum)
        flow[...] = jnp.zeros_like(flow)
        scalar[0] = 0.0

    def add(z, others=None):
        """Adds one tile of queries; keys run down the rows of the tile."""
        p = jnp.exp2(z)
        ds = p * (dot(v[...], dy[...], (1, 1)) - mean[...])
        dk_sum[...] += dot(ds.astype(q.dtype), q[...], (1, 0))
        dv_sum[...] += dot(p.astype(q.dtype), dy[...], (1, 0))
        if decayed:
            flow[...] += lanes(times(ds, others))

    @pl.when(t < count)
    def _():
        s = dot(k[...], q[...], (1, 1)) * (options.scale * LOG2E) - far[...]
        add(s + (to_column(column[...]) + scalar[0]) if decayed else s)
        if decayed:
            scalar[0] = scalar[0] + steps[at + 1 + t]

    @pl.when(t == count)
    def _():
        s = dot(k[...], q[...], (1, 1))
        others = off_diagonal(dk_sum.shape[0]) if decayed else None
        add(_own_logits(s, options, local, runs, keys_down=True) - lse[...], others)
        dk[...] = (dk_sum[...] * options.scale).astype(dk.dtype)
        dv[...] = dv_sum[...].astype(dv.dtype)
        flows[...] = to_row(flow[...])


def forward(q, k, v, bias: Bias | None, reach: Reach, runs, options: Options, tile: Tile, dtype):
    """y [B, T, N, H] in `dtype`, and log2 of the sums of exponentials [B, N, T], float32."""
    B, T, N, H = q.shape
    at, K, C = Specs(q.shape, tile.held, -1), k.shape[2], tile.held
    keys = heads_first(k)
    operands = [
        (heads_first(q), at.own()),
        (keys, at.own(K)),
        (keys, at.passing(K)),
        (heads_first(v), at.passing(K, back=True)),
        (as_rows(bias and bias.column), at.passing_row()),
        (as_rows(bias and bias.row), at.own_row()),
        (as_pairs(bias and bias.local), at.own_pair()),
        (as_rows(runs), at.own_row(1)),
    ]
    outputs = [
        (jax.ShapeDtypeStruct((B * N, T, H), dtype), at.own()),
        (jax.ShapeDtypeStruct((B * N, 1, T), jnp.float32), at.own_row()),
    ]
    scratch = [(C, H), (C, min(C, LANES)), (C, min(C, LANES))]
    steps = bias and bias.step
    y, lse = call(
        _forward_kernel, at, reach.first, steps, options, operands, outputs, scratch, "attention_forward"
    )
    return tokens_first(y, N), lse.reshape(B, N, T)


def backward_dq(q, k, v, ct: Cotangent, bias: Bias | None, reach: Reach, runs, options: Options, tile: Tile):
    """dq [B, T, N, H] and the sums of ds_ij over j < i, [B, N, T] (0 without decay and documents)."""
    B, T, N, H = q.shape
    at, K, C = Specs(q.shape, tile.held, -1), k.shape[2], tile.held
    keys = heads_first(k)
    operands = [
        (heads_first(q), at.own()),
        (keys, at.own(K)),
        (keys, at.passing(K)),
        (heads_first(v), at.passing(K, back=True)),
        (heads_first(ct.dy), at.own()),
        *((as_rows(x), at.own_row()) for x in (ct.mean, ct.lse, ct.far)),
        (as_rows(bias and bias.column), at.passing_row()),
        (as_pairs(bias and bias.local), at.own_pair()),
        (as_rows(runs), at.own_row(1)),
    ]
    outputs = [
        (jax.ShapeDtypeStruct((B * N, T, H), q.dtype), at.own()),
        (jax.ShapeDtypeStruct((B * N, 1, T), jnp.float32), at.own_row()),
    ]
    scratch = [(C, H), (C, min(C, LANES))]
    steps = bias and bias.step
    dq, row = call(_dq_kernel, at, reach.first, steps, options, operands, outputs, scratch, "attention_dq")
    return tokens_first(dq, N), row.reshape(B, N, T)


def backward_dkv(q, k, v, ct: Cotangent, bias: Bias | None, reach: Reach, runs, options: Options, tile: Tile):
    """dk and dv per query head, [B, T, N, H] each, and the sums of ds_ij over i > j, [B, N, T]."""
    B, T, N, H = q.shape
    at, K, C = Specs(q.shape, tile.held, 1), k.shape[2], tile.held
    operands = [
        (heads_first(k), at.own(K)),
        (heads_first(v), at.own(K)),
        (as_rows(bias and bias.column), at.own_row()),
        (heads_first(q), at.passing(N, back=True)),
        (heads_first(ct.dy), at.passing(N, back=True)),
        (as_rows(ct.mean), at.passing_row(back=True)),
        (as_rows(ct.lse), at.own_row()),
        (as_rows(ct.far), at.passing_row()),
        (as_pairs(bias and bias.local), at.own_pair()),
        (as_rows(runs), at.own_row(1)),
    ]
    shape = jax.ShapeDtypeStruct((B * N, T, H), k.dtype)
    outputs = [
        (shape, at.own()),
        (shape, at.own()),
        (jax.ShapeDtypeStruct((B * N, 1, T), jnp.float32), at.own_row()),
    ]
    scratch = [(C, H), (C, H), (C, min(C, LANES))]
    steps = bias and bias.step
    dk, dv, column = call(
        _dkv_kernel, at, reach.last, steps, options, operands, outputs, scratch, "attention_dkv"
    )
    return tokens_first(dk, N), tokens_first(dv, N), column.reshape(B, N, T)
