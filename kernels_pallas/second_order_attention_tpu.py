"""Squared attention on TPU: the tiles of `kernels_pallas.second_order_attention`.

Heads come first, [B N, T, H], so that a tile is rows by lanes. The grid is (heads, chunks, steps), steps innermost: a
row of it holds one chunk and its sums in VMEM, and each step brings one tile of others, off the diagonal from the
diagonal outwards, then the chunk itself. How far that goes is data: the bounds of all chunks are prefetched to scalar
memory, the grid has as many steps as the furthest-seeing chunk needs, and a step past a chunk's own bound names the
tile that is there already, so nothing is fetched and nothing computed.

Numbers that belong to tokens (decays, sums) are rows of [B N, 1, T], since a column would take 128 times its size;
where a tile needs one along its rows it is turned in the kernel, once a chunk. VMEM at C = 512, H = 128, bfloat16:
two or three C x C float32 tiles (3 MiB), windows twice (2 MiB), sums (0.6 MiB).
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas.second_order_attention import FLOOR, Cotangent, Fold, Options, Reach, Tile

LANES = 128


def _dot(a, b, axes):
    """Contracts axes[0] of a with axes[1] of b."""
    exact = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    dims = (((axes[0],), (axes[1],)), ((), ()))
    return jax.lax.dot_general(a, b, dims, precision=exact, preferred_element_type=jnp.float32)


def _column(row):
    """[1, C] -> [C, 1]."""
    return jnp.transpose(jnp.broadcast_to(row, (8, row.shape[1])))[:, :1]


def _row(partial):
    """Sums along the lanes of [C, L], as a row [1, C]: a product with ones, so that nothing is turned."""
    return _dot(jnp.ones((8, partial.shape[1]), jnp.float32), partial, (1, 1))[:1]


def _lanes(x):
    """Sums of groups of lanes, [C, S] -> [C, 128]: additions of whole registers."""
    C, S = x.shape
    if S <= LANES:
        return x
    return sum(x[:, at : at + LANES] for at in range(LANES, S, LANES)) + x[:, :LANES]


def _times(x, scalar):
    return x if scalar is None else x * scalar


def _decay(local, runs, C, *, keys_down=False):
    """e^{l_i - l_j} of the tile of the diagonal, 0 where query i does not see key j."""
    rows, columns = (jax.lax.broadcasted_iota(jnp.int32, (C, C), axis) for axis in (0, 1))
    seen = rows <= columns if keys_down else rows >= columns
    if runs is not None:
        seen &= _column(runs[...].astype(jnp.float32)) == runs[...].astype(jnp.float32)
    if local is None:
        return seen.astype(jnp.float32)
    fall = _column(local[...]) - local[...]
    return jnp.exp(jnp.where(seen, -fall if keys_down else fall, -1e30))


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
        acc[...] += _dot(w, v[...], (1, 0))
        if options.normalize:
            total[...] += _lanes(w.astype(jnp.float32))

    @pl.when(t < count)
    def _():
        s = _dot(q[...], keys[...], (1, 1))
        add(s * _times(s, scalar[0] if decayed else None))
        if decayed:
            scalar[0] = scalar[0] * steps[at - 1 - t]

    @pl.when(t == count)
    def _():
        if decayed:
            row = _column(enter[...])
            acc[...] *= row
            total[...] *= row
        s = _dot(q[...], k[...], (1, 1))
        add(s * s * _decay(local, runs, s.shape[0]))
        if options.normalize:
            sums = jnp.sum(total[...], axis=1, keepdims=True)
            empty = sums <= FLOOR  # not true of NaN, which shall be seen
            y[...] = jnp.where(empty, 0.0, acc[...] / jnp.where(empty, 1.0, sums)).astype(y.dtype)
            den[...] = _row(total[...])
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

    def add(keys, cotangent, means, factor):
        s = _dot(q[...], keys[...], (1, 1))
        dp = _dot(cotangent[...], v[...], (1, 1))
        if means is not None:
            dp -= _column(means[...])
        ds = _times(s, factor) * dp
        acc[...] += _dot(ds.astype(keys.dtype), keys[...], (1, 0))
        if decayed:
            flow[...] += _lanes(s * ds)

    @pl.when(t < count)
    def _():
        add(keys, g, bias, scalar[0] if decayed else None)
        if decayed:
            scalar[0] = scalar[0] * steps[at - 1 - t]

    @pl.when(t == count)
    def _():
        add(k, dy, mean, _decay(local, runs, acc.shape[0]) * _column(ratio[...]))
        dq[...] = (2 * acc[...]).astype(dq.dtype)
        row[...] = _row(flow[...])


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

    def add(keys, cotangent, means, factor):
        """Keys down the rows."""
        s = _dot(keys[...], q[...], (1, 1))
        dp = _dot(v[...], cotangent[...], (1, 1))
        if means is not None:
            dp -= means[...]
        weighted = _times(s, factor)
        ds = weighted * dp
        dk_sum[...] += _dot(ds.astype(q.dtype), q[...], (1, 0))
        dv_sum[...] += _dot((s * weighted).astype(q.dtype), cotangent[...], (1, 0))
        if decayed:
            flow[...] += _lanes(s * ds)

    @pl.when(t < count)
    def _():
        add(keys, g, bias, scalar[0] if decayed else None)
        if decayed:
            scalar[0] = scalar[0] * steps[at + 1 + t]

    @pl.when(t == count)
    def _():
        if decayed:
            dk_sum[...] *= _column(leave[...])
        add(k, dy, mean, _decay(local, runs, dk_sum.shape[0], keys_down=True) * ratio[...])
        dk[...] = (2 * dk_sum[...]).astype(dk.dtype)
        dv[...] = dv_sum[...].astype(dv.dtype)
        column[...] = _row(flow[...])


class _Specs:
    """Blocks for a grid (B N, J, steps): those of the chunk that a row of the grid holds, and those that pass by.

    away: the tile of step t < count lies t + 1 chunks from the own one, before it (-1) or after it (+1).
    """

    def __init__(self, shape, C, away):
        self.B, self.T, self.N, self.H = shape
        self.C, self.J, self.away = C, self.T // C, away

    def _passing(self, h, i, t, bound, *, back):
        """The tile of step t; at the last step the chunk itself (back), or what is there already."""
        limit = bound[h * self.J + i]
        count = (limit - i) * self.away
        return jnp.where(t < count, i + self.away * (t + 1), i if back else limit)

    def own(self, heads=None):
        G = self.N // (heads or self.N)
        return pl.BlockSpec((None, self.C, self.H), lambda h, i, t, bound, steps: (h // G, i, 0))

    def passing(self, heads, *, back=False):
        G = self.N // heads
        return pl.BlockSpec(
            (None, self.C, self.H),
            lambda h, i, t, bound, steps: (h // G, self._passing(h, i, t, bound, back=back), 0),
        )

    def own_row(self, heads=None):
        """Of [B N, 1, T], or of [B, 1, T] (heads=1)."""
        G = self.N // (heads or self.N)
        return pl.BlockSpec((None, 1, self.C), lambda h, i, t, bound, steps: (h // G, 0, i))

    def passing_row(self):
        return pl.BlockSpec(
            (None, 1, self.C), lambda h, i, t, bound, steps: (h, 0, self._passing(h, i, t, bound, back=False))
        )


def _call(kernel, specs: _Specs, bound, fold, options, operands, outputs, scratch, name):
    """operands and outputs: pairs of an array or a shape, and its block; an array is None where there is none."""
    J = specs.J
    arrays, in_specs = zip(*((x, None if x is None else spec) for x, spec in operands), strict=True)
    shapes, out_specs = zip(*outputs, strict=True)
    steps = jnp.max((bound - jnp.arange(J, dtype=jnp.int32)) * specs.away) + 1
    factors = jnp.ones(bound.shape, jnp.float32) if fold is None else fold.step
    grid = pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=2,
        grid=(specs.B * specs.N, J, J if fold is None else steps),
        in_specs=in_specs,
        out_specs=out_specs,
        scratch_shapes=[
            *(pltpu.VMEM(shape, jnp.float32) for shape in scratch),
            pltpu.SMEM((1,), jnp.float32),
        ],
    )
    return pl.pallas_call(
        functools.partial(kernel, options=options, decayed=fold is not None),
        grid_spec=grid,
        out_shape=shapes,
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary")),
        interpret=options.interpret,
        name=name,
    )(bound.reshape(-1), factors.reshape(-1), *arrays)


def _heads_first(x):
    B, T, N, H = x.shape
    return jnp.swapaxes(x, 1, 2).reshape(B * N, T, H)


def _tokens_first(x, N):
    return jnp.swapaxes(x.reshape(-1, N, *x.shape[1:]), 1, 2)


def _rows(x):
    """[B, N, T] or [B, T] -> [B N, 1, T] or [B, 1, T]."""
    return None if x is None else x.reshape(-1, 1, x.shape[-1])


def forward(q, k, v, fold: Fold | None, reach: Reach, runs, options: Options, tile: Tile, dtype):
    """y [B, T, N, H] in `dtype`, and the sums of the weights [B, N, T] float32 (0 without normaliser)."""
    B, T, N, H = q.shape
    at, K, C = _Specs(q.shape, tile.held, -1), k.shape[2], tile.held
    keys = k if fold is None else fold.keys
    operands = [
        (_heads_first(q), at.own()),
        (_heads_first(k), at.own(K)),
        (_heads_first(keys), at.passing(keys.shape[2])),
        (_heads_first(v), at.passing(K, back=True)),
        (_rows(fold and fold.local), at.own_row()),
        (_rows(fold and fold.enter), at.own_row()),
        (_rows(runs), at.own_row(1)),
    ]
    outputs = [
        (jax.ShapeDtypeStruct((B * N, T, H), dtype), at.own()),
        (jax.ShapeDtypeStruct((B * N, 1, T), jnp.float32), at.own_row()),
    ]
    scratch = [(C, H), (C, min(C, LANES))]
    y, den = _call(
        _forward_kernel, at, reach.first, fold, options, operands, outputs, scratch, "second_order_forward"
    )
    return _tokens_first(y, N), den.reshape(B, N, T)


def backward_dq(q, k, v, ct: Cotangent, fold: Fold | None, reach: Reach, runs, options: Options, tile: Tile):
    """dq [B, T, N, H] and sum_j w_ij dw_ij [B, N, T] (0 without decay and documents)."""
    B, T, N, H = q.shape
    at, K, C = _Specs(q.shape, tile.held, -1), k.shape[2], tile.held
    keys = k if fold is None else fold.keys
    operands = [
        (_heads_first(q), at.own()),
        (_heads_first(k), at.own(K)),
        (_heads_first(keys), at.passing(keys.shape[2])),
        (_heads_first(v), at.passing(K, back=True)),
        (_heads_first(ct.dy), at.own()),
        (_rows(ct.ratio), at.own_row()),
        (_rows(ct.mean) if options.normalize else None, at.own_row()),
        (_heads_first(ct.g), at.own()),
        (_rows(ct.bias) if options.normalize else None, at.own_row()),
        (_rows(fold and fold.local), at.own_row()),
        (_rows(runs), at.own_row(1)),
    ]
    outputs = [
        (jax.ShapeDtypeStruct((B * N, T, H), q.dtype), at.own()),
        (jax.ShapeDtypeStruct((B * N, 1, T), jnp.float32), at.own_row()),
    ]
    scratch = [(C, H), (C, min(C, LANES))]
    dq, row = _call(_dq_kernel, at, reach.first, fold, options, operands, outputs, scratch, "second_order_dq")
    return _tokens_first(dq, N), row.reshape(B, N, T)


def backward_dkv(q, k, v, ct: Cotangent, fold: Fold | None, reach: Reach, runs, options: Options, tile: Tile):
    """dk and dv for each query head, [B, T, N, H], and sum_i w_ij dw_ij [B, N, T]."""
    B, T, N, H = q.shape
    at, K, C = _Specs(q.shape, tile.held, 1), k.shape[2], tile.held
    keys = k if fold is None else fold.keys
    operands = [
        (_heads_first(k), at.own(K)),
        (_heads_first(keys), at.own(keys.shape[2])),
        (_heads_first(v), at.own(K)),
        (_rows(fold and fold.leave), at.own_row()),
        (_heads_first(q), at.passing(N, back=True)),
        (_heads_first(ct.dy), at.own()),
        (_rows(ct.ratio), at.own_row()),
        (_rows(ct.mean) if options.normalize else None, at.own_row()),
        (_heads_first(ct.g), at.passing(N)),
        (_rows(ct.bias) if options.normalize else None, at.passing_row()),
        (_rows(fold and fold.local), at.own_row()),
        (_rows(runs), at.own_row(1)),
    ]
    shape = jax.ShapeDtypeStruct((B * N, T, H), k.dtype)
    outputs = [
        (shape, at.own()),
        (shape, at.own()),
        (jax.ShapeDtypeStruct((B * N, 1, T), jnp.float32), at.own_row()),
    ]
    scratch = [(C, H), (C, H), (C, min(C, LANES))]
    dk, dv, column = _call(
        _dkv_kernel, at, reach.last, fold, options, operands, outputs, scratch, "second_order_dkv"
    )
    return _tokens_first(dk, N), _tokens_first(dv, N), column.reshape(B, N, T)
