"""The shifted multiply-adds on TPU: the passes of `kernels_pallas.short_conv`.

A grid step has up to 64 channels by up to 2048 tokens of a row in VMEM; steps along time follow each other. A step goes
through its channels 16 at a time: u = x2 v behind the last 128 tokens before it, in scratch from the step before; the
tap k is that row of lanes rotated by k (the rotate unit), times a column of w (the vector unit).

The backward pass walks from the end, with the first 128 of g in scratch; the 128 tokens of x2 and v before the step are
read again. dw is summed per lane in its output block, which stays in VMEM; the lanes are added up outside.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

LANES = 128
ROWS = 16  # channels processed at once: the rows of a packed bfloat16 register
CHANNELS, TOKENS = 64, 2048  # of a step: 256 KiB an array in 16 bits, seven arrays twice in the backward pass


@dataclasses.dataclass(frozen=True)
class Pass:
    B: int
    D: int
    T: int
    K: int
    channels: int
    tokens: int

    @property
    def grid(self):
        return -(-self.D // self.channels), self.B, -(-self.T // self.tokens)


def plan(v: jax.Array, w: jax.Array) -> Pass:
    B, D, T = v.shape
    channels = D if D < ROWS else min(CHANNELS, D // ROWS * ROWS)
    return Pass(B, D, T, w.shape[1], channels, min(TOKENS, -(-T // LANES) * LANES))


def _value(rows, *refs):
    """The product of the given blocks [1, channels, n] at some channels, skipping None, in float32."""
    tiles = [ref[0, rows, :].astype(jnp.float32) for ref in refs if ref is not None]
    return functools.reduce(jnp.multiply, tiles)


def _inside(x, time, size: Pass):
    """x [., tokens], with 0 after the end of the row."""
    if size.T % size.tokens == 0:
        return x
    token = time * size.tokens + jax.lax.broadcasted_iota(jnp.int32, x.shape, 1)
    return jnp.where(token < size.T, x, 0.0)


def _behind(before, x, k: int):
    """x[t - k], where `before` [., 128] comes before it."""
    return pltpu.roll(jnp.concatenate([before, x], axis=1), k, 1)[:, LANES:] if k else x


def _ahead(x, after, k: int):
    """x[t + k], where `after` [., 128] follows it."""
    whole = jnp.concatenate([x, after], axis=1)
    return pltpu.roll(whole, whole.shape[1] - k, 1)[:, : x.shape[1]] if k else x


def _same(own, other):
    """1.0 where both tokens are in the same run, [1, tokens]; None without runs."""
    return None if own is None else jnp.where((own == other) & (own >= 0), 1.0, 0.0)


def _times(x, factor):
    return x if factor is None else x * factor


def _each(size: Pass, body):
    """Runs body(a slice of channels) for all channels of a step, 16 at a time."""
    if size.channels < ROWS:
        body(slice(0, size.channels))
        return

    def one(i, _):
        body(pl.ds(pl.multiple_of(i * ROWS, ROWS), ROWS))

    jax.lax.fori_loop(0, size.channels // ROWS, one, None)


def _forward(refs, *, size: Pass):
    (x1, x2, v, w, bias, state, runs, runs_before), (y,), (before,) = refs
    time = pl.program_id(2)

    @pl.when(time == 0)
    def _():
        before[...] = jnp.zeros(before.shape, jnp.float32) if state is None else state[0].astype(jnp.float32)

    own = None if runs is None else runs[0]
    masks = [_same(own, None if own is None else _behind(runs_before[0], own, k)) for k in range(size.K)]

    def some(rows):
        u = _value(rows, x2, v)
        taps = (w[rows, k : k + 1] * _times(_behind(before[rows, :], u, k), masks[k]) for k in range(size.K))
        z = sum(taps) if bias is None else sum(taps) + _times(bias[rows, :], masks[0])
        y[0, rows, :] = (z if x1 is None else z * _value(rows, x1)).astype(y.dtype)
        before[rows, :] = u[:, size.tokens - LANES :]

    _each(size, some)


def _backward(refs, *, size: Pass):
    inputs, (dx1, dx2, dv, dw, dbias), (after, runs_after) = refs
    dy, x1, x2, v, w, bias, state, runs, runs_before, x2_before, v_before = inputs
    row, step = pl.program_id(1), pl.program_id(2)
    time = size.grid[2] - 1 - step

    @pl.when((row == 0) & (step == 0))
    def _():
        dw[...] = jnp.zeros(dw.shape, jnp.float32)
        if bias is not None:
            dbias[...] = jnp.zeros(dbias.shape, jnp.float32)

    @pl.when(step == 0)
    def _():
        after[...] = jnp.zeros(after.shape, jnp.float32)
        runs_after[...] = jnp.full(runs_after.shape, -1, jnp.int32)

    own, taps = None if runs is None else runs[0], range(size.K)
    behind = [_same(own, None if own is None else _behind(runs_before[0], own, k)) for k in taps]
    ahead = [_same(own, None if own is None else _ahead(own, runs_after[...], k)) for k in taps]

    def some(rows):
        u, g = _inside(_value(rows, x2, v), time, size), _inside(_value(rows, dy, x1), time, size)
        first = 0.0 if state is None else _value(rows, state)
        before = jnp.where(time == 0, first, _value(rows, x2_before, v_before))
        du, z = jnp.zeros_like(u), jnp.zeros_like(u)
        for k in taps:
            tap = w[rows, k : k + 1]
            du = du + tap * _times(_ahead(g, after[rows, :], k), ahead[k])
            part = _times(_behind(before, u, k), behind[k])
            z = z + tap * part
            dw[k, rows, :] += _lanes(g * part)
        if bias is not None:
            dbias[rows, :] += _lanes(_times(g, behind[0]))
            z = z + _times(bias[rows, :], behind[0])
        after[rows, :] = g[:, :LANES]
        if x1 is not None:
            dx1[0, rows, :] = (z * _value(rows, dy)).astype(dx1.dtype)
        if x2 is not None:
            dx2[0, rows, :] = (du * _value(rows, v)).astype(dx2.dtype)
            du = du * _value(rows, x2)
        dv[0, rows, :] = du.astype(dv.dtype)

    _each(size, some)
    if runs is not None:
        runs_after[...] = runs[0][:, :LANES]


def _lanes(x):
    """[., tokens] to [., 128]: the sum of every 128th."""
    return sum(x[:, i : i + LANES] for i in range(0, x.shape[1], LANES))


def forward(x1, x2, v, w, bias, runs, state, *, interpret: bool = False):
    """y [B, D, T]; arrays as in `kernels_pallas.short_conv`, w and bias float32, runs [B, K - 1 + T]."""
    return _call(_forward, plan(v, w), (x1, x2, v), (w, bias, state, runs), (v,), interpret)[0]


def backward(dy, x1, x2, v, w, bias, runs, state, *, interpret: bool = False):
    """(dx1, dx2, dv, dw [D, K], dbias [D]), None where there is no such input."""
    size, (D, K) = plan(v, w), w.shape
    dw = jax.ShapeDtypeStruct((K, D, LANES), jnp.float32)
    dbias = None if bias is None else jax.ShapeDtypeStruct((D, LANES), jnp.float32)
    outputs = _call(
        _backward, size, (dy, x1, x2, v), (w, bias, state, runs), (x1, x2, v, dw, dbias), interpret
    )
    dx1, dx2, dv, dw, dbias = outputs
    return dx1, dx2, dv, dw.sum(axis=2).T, None if bias is None else dbias.sum(axis=1)


def _runs(runs, size: Pass):
    """(those of the steps [B, 1, T], of the 128 tokens before each step [B, steps, 1, 128]), -1 outside."""
    if runs is None:
        return None, None
    K, tokens = size.K, size.tokens
    first = jnp.pad(runs[:, : K - 1], ((0, 0), (LANES - K + 1, 0)), constant_values=-1)
    own = jnp.pad(runs[:, None, K - 1 :], ((0, 0), (0, 0), (0, -size.T % tokens)), constant_values=-1)
    ends = own.reshape(size.B, -1, tokens)[:, :-1, tokens - LANES :]
    return own, jnp.concatenate([first[:, None], ends], axis=1)[:, :, None]


def _specs(size: Pass, back: bool):
    """The blocks of signals, w, bias, state, runs, runs before and what is before; of outputs."""
    count, K = size.channels, size.K
    last, per = size.grid[2] - 1, size.tokens // LANES

    def time(t):
        return last - t if back else t

    def halo(t):
        return jnp.maximum(time(t) * per - 1, 0)

    signal = pl.BlockSpec((1, count, size.tokens), lambda d, b, t: (b, d, time(t)))
    before = pl.BlockSpec((1, count, LANES), lambda d, b, t: (b, d, halo(t)))
    in_specs = [
        *(signal for _ in range(4 if back else 3)),
        pl.BlockSpec((count, K), lambda d, b, t: (d, 0)),
        pl.BlockSpec((count, 1), lambda d, b, t: (d, 0)),
        pl.BlockSpec((1, count, LANES), lambda d, b, t: (b, d, 0)),
        pl.BlockSpec((1, 1, size.tokens), lambda d, b, t: (b, 0, time(t))),
        pl.BlockSpec((1, None, 1, LANES), lambda d, b, t: (b, time(t), 0, 0)),
        *((before, before) if back else ()),
    ]
    out_specs = [
        *(signal for _ in range(3 if back else 1)),
        pl.BlockSpec((K, count, LANES), lambda d, b, t: (0, d, 0)),
        pl.BlockSpec((count, LANES), lambda d, b, t: (d, 0)),
    ]
    return in_specs, out_specs


def _call(body, size: Pass, signals, weights, likes, interpret):
    """Runs body((inputs, outputs, scratch), size=size) over the grid; for an input or output None it passes None."""
    back, count, K = body is _backward, size.channels, size.K
    w, bias, state, runs = weights
    bias = None if bias is None else bias[:, None]
    state = None if state is None else jnp.pad(state, ((0, 0), (0, 0), (LANES - K + 1, 0)))
    runs, runs_before = _runs(runs, size)
    in_specs, out_specs = _specs(size, back)
    arrays = (*signals, w, bias, state, runs, runs_before, *(signals[2:] if back else ()))
    here = [[x is not None for x in part] for part in (arrays, likes)]

    def kernel(*refs):
        left = iter(refs)
        filled = [[next(left) if there else None for there in part] for part in here]
        body((*filled, list(left)), size=size)

    outputs = pl.pallas_call(
        kernel,
        grid=size.grid,
        in_specs=[spec for x, spec in zip(arrays, in_specs) if x is not None],
        out_specs=[spec for x, spec in zip(likes, out_specs) if x is not None],
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in likes if x is not None],
        scratch_shapes=[
            pltpu.VMEM((count, LANES), jnp.float32),
            *([pltpu.VMEM((1, LANES), jnp.int32)] * back),
        ],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary", "arbitrary")),
        interpret=interpret,
        name=f"short_conv{body.__name__}",
    )(*(x for x in arrays if x is not None))
    found = iter(outputs)
    return [next(found) if there else None for there in here[1]]
