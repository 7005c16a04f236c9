"""Second-order attention on TPU: the tiles of `kernels_pallas.second_order_attention`, on the grid of `tiles_tpu`."""

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from kernels_pallas.second_order_attention_plan import FLOOR, Cotangent, Fold, Options
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


def _decay(local, runs, C, *, keys_down=False):
    """e^{L_i - L_j} of the tile on the diagonal, 0 where query i does not see key j."""
    exponent, seen = fall(local, runs, C, keys_down=keys_down)
    if exponent is None:
        return seen.astype(jnp.float32)
    return jnp.exp(jnp.where(seen, exponent, -1e30))


def _forward_kernel(
    bound, steps, q, k, keys, v, local, enter, runs, y, den, acc, total, scalar, *, options, decayed
):
    at, i, t = pl.program_id(0) * pl.num_programs(1) + pl.program_id(1), pl.program_id(1), pl.program_id(2)
    count = i - bound[at]

    @pl.when(t == 0)
    def _():
        acc[...] = jnp.zeros_like(acc)
        total[...] = jnp.zeros_like(total)
        scalar[0] = 1.0

    def add(w):
        w = w.astype(v.dtype)
        acc[...] += dot(w, v[...], (1, 0))
        if options.normalize:
            total[...] += lanes(w.astype(jnp.float32))

    @pl.when(t < count)
    def _():
        s = dot(q[...], keys[...], (1, 1))
        add(s * times(s, scalar[0] if decayed else None))
        if decayed:
            scalar[0] = scalar[0] * steps[at - 1 - t]

    @pl.when(t == count)
    def _():
        if decayed:
            row = to_column(enter[...])
            acc[...] *= row
            total[...] *= row
        s = dot(q[...], k[...], (1, 1))
        add(s * s * _decay(local, runs, s.shape[0]))
        if options.normalize:
            sums = jnp.sum(total[...], axis=1, keepdims=True)
            empty = sums <= FLOOR  # False for NaN, so that NaN propagates
            divided = jnp.where(empty, 0.0, acc[...] / jnp.where(empty, 1.0, sums))
            y[...] = (acc[...] if options.raw else divided).astype(y.dtype)
            den[...] = to_row(total[...])
        else:
            y[...] = (acc[...] * options.scale**2).astype(y.dtype)
            den[...] = jnp.zeros_like(den)


def _dq_kernel(
    bound,
    steps,
    q,
    k,
    keys,
    v,
    dy,
    ratio,
    mean,
    g,
    bias,
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
    at, i, t = pl.program_id(0) * pl.num_programs(1) + pl.program_id(1), pl.program_id(1), pl.program_id(2)
    count = i - bound[at]

    @pl.when(t == 0)
    def _():
        acc[...] = jnp.zeros_like(acc)
        flow[...] = jnp.zeros_like(flow)
        scalar[0] = 1.0

    def add(keys, cotangent, means, factor, others=None):
        s = dot(q[...], keys[...], (1, 1))
        dp = dot(cotangent[...], v[...], (1, 1))
        if means is not None:
            dp -= to_column(means[...])
        ds = times(s, factor) * dp
        acc[...] += dot(ds.astype(keys.dtype), keys[...], (1, 0))
        if decayed:
            flow[...] += lanes(times(s * ds, others))

    @pl.when(t < count)
    def _():
        add(keys, g, bias, scalar[0] if decayed else None)
        if decayed:
            scalar[0] = scalar[0] * steps[at - 1 - t]

    @pl.when(t == count)
    def _():
        factor = _decay(local, runs, acc.shape[0]) * to_column(ratio[...])
        add(k, dy, mean, factor, off_diagonal(acc.shape[0]) if decayed else None)
        dq[...] = (2 * acc[...]).astype(dq.dtype)
        row[...] = to_row(flow[...])


def _dkv_kernel(
    bound,
    steps,
    k,
    keys,
    v,
    leave,
    q,
    dy,
    ratio,
    mean,
    g,
    bias,
    local,
    runs,
    dk,
    dv,
    column,
    dk_sum,
    dv_sum,
    flow,
    scalar,
    *,
    options,
    decayed,
):
    at, j, t = pl.program_id(0) * pl.num_programs(1) + pl.program_id(1), pl.program_id(1), pl.program_id(2)
    count = bound[at] - j

    @pl.when(t == 0)
    def _():
        dk_sum[...] = jnp.zeros_like(dk_sum)
        dv_sum[...] = jnp.zeros_like(dv_sum)
        flow[...] = jnp.zeros_like(flow)
        scalar[0] = 1.0

    def add(keys, cotangent, means, factor, others=None):
        """Adds one tile of queries; keys run down the rows of the tile."""
        s = dot(keys[...], q[...], (1, 1))
        dp = dot(v[...], cotangent[...], (1, 1))
        if means is not None:
            dp -= means[...]
        weighted = times(s, factor)
        ds = weighted * dp
        dk_sum[...] += dot(ds.astype(q.dtype), q[...], (1, 0))
        dv_sum[...] += dot((s * weighted).astype(q.dtype), cotangent[...], (1, 0))
        if decayed:
            flow[...] += lanes(times(s * ds, others))

    @pl.when(t < count)
    def _():
        add(keys, g, bias, scalar[0] if decayed else None)
        if decayed:
            scalar[0] = scalar[0] * steps[at + 1 + t]

    @pl.when(t == count)
    def _():
        if decayed:
            dk_sum[...] *= to_column(leave[...])
        factor = _decay(local, runs, dk_sum.shape[0], keys_down=True) * ratio[...]
        add(k, dy, mean, factor, off_diagonal(dk_sum.shape[0]) if decayed else None)
        dk[...] = (2 * dk_sum[...]).astype(dk.dtype)
        dv[...] = dv_sum[...].astype(dv.dtype)
        column[...] = to_row(flow[...])


def forward(q, k, v, fold: Fold | None, reach: Reach, runs, options: Options, tile: Tile, dtype):
    """y [B, T, N, H] in `dtype`, and the sums of the weights [B, N, T] float32 (0 without normaliser)."""
    B, T, N, H = q.shape
    at, K, C = Specs(q.shape, tile.held, -1), k.shape[2], tile.held
    keys = k if fold is None else fold.keys
    operands = [
        (heads_first(q), at.own()),
        (heads_first(k), at.own(K)),
        (heads_first(keys), at.passing(keys.shape[2])),
        (heads_first(v), at.passing(K, back=True)),
        (as_pairs(fold and fold.local), at.own_pair()),
        (as_rows(fold and fold.enter), at.own_row()),
        (as_rows(runs), at.own_row(1)),
    ]
    outputs = [
        (jax.ShapeDtypeStruct((B * N, T, H), dtype), at.own()),
        (jax.ShapeDtypeStruct((B * N, 1, T), jnp.float32), at.own_row()),
    ]
    scratch = [(C, H), (C, min(C, LANES))]
    y, den = call(
        _forward_kernel,
        at,
        reach.first,
        fold and fold.step,
        options,
        operands,
        outputs,
        scratch,
        "second_order_forward",
    )
    return tokens_first(y, N), den.reshape(B, N, T)


def backward_dq(q, k, v, ct: Cotangent, fold: Fold | None, reach: Reach, runs, options: Options, tile: Tile):
    """dq [B, T, N, H] and sum_j w_ij dw_ij [B, N, T] (0 without decay and documents)."""
    B, T, N, H = q.shape
    at, K, C = Specs(q.shape, tile.held, -1), k.shape[2], tile.held
    keys = k if fold is None else fold.keys
    operands = [
        (heads_first(q), at.own()),
        (heads_first(k), at.own(K)),
        (heads_first(keys), at.passing(keys.shape[2])),
        (heads_first(v), at.passing(K, back=True)),
        (heads_first(ct.dy), at.own()),
        (as_rows(ct.ratio), at.own_row()),
        (as_rows(ct.mean) if options.normalize else None, at.own_row()),
        (heads_first(ct.g), at.own()),
        (as_rows(ct.bias) if options.normalize else None, at.own_row()),
        (as_pairs(fold and fold.local), at.own_pair()),
        (as_rows(runs), at.own_row(1)),
    ]
    outputs = [
        (jax.ShapeDtypeStruct((B * N, T, H), q.dtype), at.own()),
        (jax.ShapeDtypeStruct((B * N, 1, T), jnp.float32), at.own_row()),
    ]
    scratch = [(C, H), (C, min(C, LANES))]
    dq, row = call(
        _dq_kernel,
        at,
        reach.first,
        fold and fold.step,
        options,
        operands,
        outputs,
        scratch,
        "second_order_dq",
    )
    return tokens_first(dq, N), row.reshape(B, N, T)


def backward_dkv(q, k, v, ct: Cotangent, fold: Fold | None, reach: Reach, runs, options: Options, tile: Tile):
    """dk and dv per query head, [B, T, N, H] each, and sum_i w_ij dw_ij [B, N, T]."""
    B, T, N, H = q.shape
    at, K, C = Specs(q.shape, tile.held, 1), k.shape[2], tile.held
    keys = k if fold is None else fold.keys
    operands = [
        (heads_first(k), at.own(K)),
        (heads_first(keys), at.own(keys.shape[2])),
        (heads_first(v), at.own(K)),
        (as_rows(fold and fold.leave), at.own_row()),
        (heads_first(q), at.passing(N, back=True)),
        (heads_first(ct.dy), at.own()),
        (as_rows(ct.ratio), at.own_row()),
        (as_rows(ct.mean) if options.normalize else None, at.own_row()),
        (heads_first(ct.g), at.passing(N)),
        (as_rows(ct.bias) if options.normalize else None, at.passing_row()),
        (as_pairs(fold and fold.local), at.own_pair()),
        (as_rows(runs), at.own_row(1)),
    ]
    shape = jax.ShapeDtypeStruct((B * N, T, H), k.dtype)
    outputs = [
        (shape, at.own()),
        (shape, at.own()),
        (jax.ShapeDtypeStruct((B * N, 1, T), jnp.float32), at.own_row()),
    ]
    scratch = [(C, H), (C, H), (C, min(C, LANES))]
    dk, dv, column = call(
        _dkv_kernel,
        at,
        reach.last,
        fold and fold.step,
        options,
        operands,
        outputs,
        scratch,
        "second_order_dkv",
    )
    return tokens_first(dk, N), tokens_first(dv, N), column.reshape(B, N, T)
