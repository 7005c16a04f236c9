"""The long convolution on TPUs: a sequence and its spectrum stay in VMEM from the first gate to the last.

See `long_conv.py` for the algorithm. A program processes 8 channels of two rows of the batch. In HBM, time lies along
lanes, but the first product sums over n1, the slow part of time. The gated inputs are therefore written to VMEM scratch
as rows (n1, channel) of N2 lanes, which moves no data between lanes, and a channel is read from there with a stride of
8 sublanes.

The static schedule for a v5e (`aot.tpu_bundles`) has about 500 bundles per channel of two rows of 8192 tokens (1060 in
float32), and 340 to copy 8 row pieces of 8 channels to scratch and back; 2700 and 340 at 32768 tokens.
"""

import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas import dft

LANES = 128
CHANNELS = 8  # one per sublane: the narrowest block of [D, T] that a TPU moves efficiently
TILE = 128  # maximum k1 per step
SLACK = 4 << 20  # bytes of VMEM reserved for the compiler: products, spilled registers


def plan(length: int) -> dft.Plan:
    """The layout [n1, n2]: rows of 128 lanes, 256 from 64K tokens on, where F1 costs more than F2. n1 / 2 is a multiple
    of 16, the rows of a bfloat16 tile."""
    n2 = 128 if length < 65536 else 256
    rows = -(-length // (16 * n2)) * 16
    return dft.Plan(2 * rows, n2, rows)


def _tile(plan: dft.Plan) -> int:
    """The number of k1 per step: their spectrum must fit in registers and compiler temporaries."""
    return next(m for m in range(min(plan.n1, TILE), 0, -1) if plan.n1 % m == 0 and m % 16 == 0)


@functools.cache
def _constants(plan: dft.Plan, parts: int) -> list[np.ndarray]:
    """The complex matrices as real ones, so that the matrix unit also does the additions of a complex product.

    F1 [2 n1, 2 rows], F2 and its inverse [2 n2, 2 n2], the inverse of F1 [2 rows, 2 n1], each [parts, ...] bfloat16;
    n1 is in tiles: the real parts of a tile, then its imaginary parts. The twiddle factors [2, n1, n2] come last.
    """
    (f1r, f1i), (f2r, f2i) = (dft.matrix(m) for m in (plan.n1, plan.n2))
    f1r, f1i = f1r[:, : plan.rows], f1i[:, : plan.rows]
    tiles = np.arange(2 * plan.n1).reshape(2, -1, _tile(plan)).swapaxes(0, 1).reshape(-1)
    matrices = [
        np.block([[f1r, -f1i], [f1i, f1r]])[tiles],
        np.block([[f2r, f2i], [-f2i, f2r]]),
        np.block([[f2r, -f2i], [f2i, f2r]]),
        np.block([[f1r.T, f1i.T], [-f1i.T, f1r.T]])[:, tiles],
    ]
    return [dft.split_constant(m, parts) for m in matrices] + [dft.twiddles(plan)]


def _loop(count: int, body, unroll: int = 4):
    """Runs body(0), ..., body(count - 1), with some iterations unrolled so that the scheduler can overlap them."""
    together = count if count <= unroll else math.gcd(count, unroll)

    def step(i, carry):
        for j in range(together):
            body(i * together + j)
        return carry

    if together == count:
        step(0, None)
    else:
        jax.lax.fori_loop(0, count // together, step, None)


def _tokens(r, b: int, half: int, plan: dft.Plan, channels: int):
    """The indices of 128 tokens of every channel: in a [2, channels, T] window, and in scratch."""
    lanes = pl.ds(pl.multiple_of(r * plan.n2 + half * LANES, LANES), LANES)
    return (b, slice(None), lanes), (
        b,
        half,
        pl.ds(pl.multiple_of(r * channels, channels), channels),
        slice(None),
    )


def _gather(scratch, inputs, plan: dft.Plan, alone):
    """Writes the product of `inputs` to scratch as rows (n1, channel), for both rows of the batch.

    alone: whether the second row does not exist (it is then written as zeros), or None if it always exists.
    """
    _, channels, T = inputs[0].shape

    def row(r):
        for b, half in itertools.product(range(2), range(plan.n2 // LANES)):
            there, here = _tokens(r, b, half, plan, channels)
            u = functools.reduce(jnp.multiply, [ref[there].astype(jnp.float32) for ref in inputs])
            if b == 1 and alone is not None:
                u = jnp.where(alone, 0.0, u)  # memory beyond the batch may hold anything, including NaN
            scratch[here] = u

    full = T // plan.n2
    _loop(full, row, 8)
    if full < plan.rows:
        rest = (*scratch.shape[:2], (plan.rows - full) * channels, LANES)
        scratch[:, :, full * channels :, :] = jnp.zeros(rest, jnp.float32)


def _scatter(scratch, outputs, plan: dft.Plan):
    """Writes each output: the rows of `scratch`, times its gate unless that is None."""
    _, channels, T = outputs[0][0].shape

    def row(r):
        for b, half in itertools.product(range(2), range(plan.n2 // LANES)):
            there, here = _tokens(r, b, half, plan, channels)
            y = scratch[here]
            for ref, gate in outputs:
                ref[there] = (y if gate is None else y * gate[there].astype(jnp.float32)).astype(ref.dtype)

    _loop(T // plan.n2, row, 8)


class _Transform:
    """The transform of channel d of two rows in `scratch` and its inverse, one tile of k1 at a time."""

    def __init__(self, plan: dft.Plan, constants, spectrum_ref):
        self.plan, self.tile, self.h = plan, _tile(plan), spectrum_ref
        self.f1, self.f2, self.g2, self.g1, self.twiddles = constants
        self.parts = self.f1.shape[0]

    def _rows(self, ref, start, size):
        return tuple(ref[p, pl.ds(start, size), :] for p in range(self.parts))

    def _whole(self, ref):
        return tuple(ref[p] for p in range(self.parts))

    def read(self, scratch, d):
        """Returns [2 rows, n2] in parts: the real signal above the imaginary one."""
        at, halves = self._channel(scratch, d), range(scratch.shape[1])
        x = [jnp.concatenate([scratch.at[b].at[half][at] for half in halves], axis=1) for b in range(2)]
        return dft.split(jnp.concatenate(x, axis=0), self.parts)

    def _channel(self, scratch, d):
        return pl.ds(d, self.plan.rows, stride=scratch.shape[2] // self.plan.rows), slice(None)

    def _factors(self, i):
        k1 = pl.ds(i * self.tile, self.tile)
        return self.twiddles[0, k1, :], self.twiddles[1, k1, :]

    def filter(self, d, i):
        k1 = pl.ds(i * self.tile, self.tile)
        return self.h[d, 0, k1, :], self.h[d, 1, k1, :]

    def forward(self, x, i):
        """Tile i of the spectrum of x: (re, im), each [tile, n2] float32."""
        a = dft.product(self._rows(self.f1, i * 2 * self.tile, 2 * self.tile), x)
        a = dft.times((a[: self.tile], a[self.tile :]), self._factors(i))
        b = dft.product(dft.split(jnp.concatenate(a, axis=1), self.parts), self._whole(self.f2))
        return b[:, : self.plan.n2], b[:, self.plan.n2 :]

    def backward(self, y, i, store):
        """Inverts the product with F2 and the twiddle factors of tile i; writes to `store` [2 n1, n2]."""
        c = dft.product(dft.split(jnp.concatenate(y, axis=1), self.parts), self._whole(self.g2))
        c = dft.times((c[:, : self.plan.n2], c[:, self.plan.n2 :]), self._factors(i), conj=True)
        store[pl.ds(i * 2 * self.tile, 2 * self.tile), :] = jnp.concatenate(c, axis=0).astype(store.dtype)

    def write(self, store, scratch, d):
        """Inverts the product with F1; writes to `scratch`."""
        rows = self.plan.rows
        c = dft.split(store[...], self.parts)
        for b in range(2):
            y = dft.product(tuple(self.g1[p, b * rows : (b + 1) * rows, :] for p in range(self.parts)), c)
            for half in range(scratch.shape[1]):
                scratch.at[b].at[half][self._channel(scratch, d)] = y[:, half * LANES : (half + 1) * LANES]


def _forward_kernel(*refs, plan, batch, gates):
    x1, x2, v, h, *constants, y, scratch, store = dft.present(
        refs, (*gates, True, True, *[True] * 5, True, True, True)
    )
    alone = _alone(batch)
    both = _Transform(plan, constants, h)
    _gather(scratch, [x for x in (x2, v) if x is not None], plan, alone)

    def channel(d, carry):
        x = both.read(scratch, d)
        _loop(
            plan.n1 // both.tile,
            lambda i: both.backward(dft.times(both.forward(x, i), both.filter(d, i)), i, store),
        )
        both.write(store, scratch, d)
        return carry

    jax.lax.fori_loop(0, v.shape[1], channel, None)
    _scatter(scratch, [(y, x1)], plan)


def _alone(batch: int):
    """Whether this program's second row lies beyond the batch; None for an even batch, where it never does."""
    return pl.program_id(1) == batch // 2 if batch % 2 else None


def _backward_kernel(*refs, plan, batch, gates):
    """dy, x1, x2, v -> dx1 = dy conv(u), dx2 = du v, dv = du x2 and the filter's dH, summed over the batch."""
    given = (True, *gates, True, True, *[True] * 5, *gates, True, True, True, True, True, True)
    dy, x1, x2, v, h, *constants, dx1, dx2, dv, dh, u, g, store_g, store_u = dft.present(refs, given)
    alone = _alone(batch)
    both = _Transform(plan, constants, h)
    _gather(u, [x for x in (x2, v) if x is not None], plan, alone)
    _gather(g, [x for x in (x1, dy) if x is not None], plan, alone)
    first = pl.program_id(1) == 0

    def channel(d, carry):
        xu, xg = both.read(u, d), both.read(g, d)

        def tile(i):
            z, w, h_tile = both.forward(xu, i), both.forward(xg, i), both.filter(d, i)
            for part, value in enumerate(dft.times(w, z, conj=True)):
                at = (d, part, pl.ds(i * both.tile, both.tile), slice(None))
                dh[at] = jnp.where(first, 0.0, dh[at]) + value
            both.backward(dft.times(w, h_tile, conj=True), i, store_g)
            if dx1 is not None:
                both.backward(dft.times(z, h_tile), i, store_u)

        _loop(plan.n1 // both.tile, tile)
        both.write(store_g, g, d)
        if dx1 is not None:
            both.write(store_u, u, d)
        return carry

    jax.lax.fori_loop(0, v.shape[1], channel, None)
    _scatter(g, [(dv, x2)] + ([(dx2, v)] if dx2 is not None else []), plan)
    if dx1 is not None:
        _scatter(u, [(dx1, dy)], plan)


def call(arrays, H, gates, *, is_backward: bool, interpret: bool):
    """Runs the forward or the backward kernel; see `long_conv._kernels`.

    The grid is (channel blocks, pairs of rows): a block's filter and its gradient stay in VMEM over all pairs.
    """
    B, D, T = arrays[-1].shape
    dtype, outputs = arrays[-1].dtype, 1 + is_backward * sum(gates)
    points, kernel = plan(T), _backward_kernel if is_backward else _forward_kernel
    pad = -T % points.n2
    arrays = [jnp.pad(x, ((0, 0), (0, 0), (0, pad))) if pad else x for x in arrays]
    channels, pairs = min(CHANNELS, D), -(-B // 2)
    signal = pl.BlockSpec((2, channels, T + pad), lambda d, p: (p, d, 0))
    spectrum = pl.BlockSpec((channels, 2, points.n1, points.n2), lambda d, p: (d, 0, 0, 0))
    constants = _constants(points, dft.parts_of(dtype))
    whole = [pl.BlockSpec(c.shape, lambda d, p, rank=c.ndim: (0,) * rank) for c in constants]
    signals = 2 if is_backward else 1  # transformed at a time
    macs = signals * D * pairs * points.n * (4 * points.n1 + 8 * points.n2) * (2 * dft.parts_of(dtype) - 1)
    out = pl.pallas_call(
        functools.partial(kernel, plan=points, batch=B, gates=gates),
        out_shape=[jax.ShapeDtypeStruct((B, D, T + pad), dtype)] * outputs
        + [jax.ShapeDtypeStruct(H.shape, jnp.float32)] * is_backward,
        grid=(-(-D // channels), pairs),
        in_specs=[signal] * len(arrays) + [spectrum, *whole],
        out_specs=[signal] * outputs + [spectrum] * is_backward,
        scratch_shapes=[pltpu.VMEM((2, points.n2 // LANES, points.rows * channels, LANES), jnp.float32)]
        * signals
        + [pltpu.VMEM((2 * points.n1, points.n2), dtype)] * signals,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"),
            vmem_limit_bytes=vmem_bytes(T, dtype, len(arrays) + outputs, is_backward),
        ),
        cost_estimate=pl.CostEstimate(
            flops=2 * macs,
            bytes_accessed=sum(x.nbytes for x in arrays) * (len(arrays) + outputs) // len(arrays)
            + (1 + is_backward) * H.size * 4,
            transcendentals=0,
        ),
        interpret=interpret,
        name="long_conv_backward" if is_backward else "long_conv",
    )(*arrays, H, *map(jnp.asarray, constants))
    return [*(x[:, :, :T] for x in out[:outputs]), *out[outputs:]]


def vmem_bytes(length: int, dtype, signals: int, is_backward: bool) -> int:
    """The bytes of VMEM that a program needs: two buffers per window, since the next one is prefetched, and scratch.

    Args:
      signals: the number of [B, D, T] inputs and outputs.
    """
    points, size = plan(length), jnp.dtype(dtype).itemsize
    rows = 2 * CHANNELS * points.rows * points.n2
    matrices = 8 * points.n1 * points.rows + 8 * points.n2**2
    constants = 2 * dft.parts_of(dtype) * matrices + 8 * points.n
    windows = signals * rows * size + (1 + is_backward) * CHANNELS * 2 * points.n * 4 + constants
    return 2 * windows + (1 + is_backward) * (rows * 4 + 2 * points.n * size) + SLACK
