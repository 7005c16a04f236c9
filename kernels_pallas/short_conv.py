"""Depthwise causal convolution with up to 8 taps, gated or not, in one pass over memory.

    u = x2 * v,   y_t = x1_t * ( sum_k w[:, k] u_{t-k} + bias ),   k = 0 .. K-1;   x1, x2 or bias may be missing

(`lcx.ops.short_conv` is this without gates; `kernels_pallas.fir_conv` calls it for filters of up to 8 taps, where each
channel has the taps of its group, and its skip is added to the tap of the current token.)

A tile is a few channels by a few hundred tokens, with time contiguous. K multiply-adds per element are far below any
machine's balance, and a matrix unit would multiply mostly zeros. Instead the taps use shifted copies, which a GPU reads
from its L1 cache at shifted addresses (`short_conv_gpu`) and a TPU makes in registers by lane rotations
(`short_conv_tpu`).

Bytes per element in 16 bits: 4 (8 with both gates) forward, 6 (14) backward, each array once. FLOPs: 2 K forward, 6 K
backward. The roofline on an H200 (4.3 TB/s) is 0.93 (1.86) ps per element forward, on a v5e (819 GB/s) 4.9 (9.8) ps.

Backward, with g = dy x1: du_t = sum_k w[:, k] g_{t+k}, dw[:, k] = sum_t g_t u_{t-k} in float32, dx2 = du v, dv = du x2,
and dx1 = dy (conv u), recomputed from the u that dw needs anyway. All in one pass.

Documents. `runs` (-1 at padding) counts a tap where both tokens have the same run >= 0; elsewhere y is 0.
"""

import functools

import jax
import jax.numpy as jnp

from kernels_pallas import short_conv_gpu, short_conv_tpu

MAX_TAPS = 8


def short_conv(
    x: jax.Array,
    w: jax.Array,
    *,
    bias: jax.Array | None = None,
    runs: jax.Array | None = None,
    initial_inputs: jax.Array | None = None,
    initial_runs: jax.Array | None = None,
    platform: str,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """(y [B, D, T] in x's dtype, the last K - 1 inputs [B, D, K - 1]).

    Args:
      x: [B, D, T]. w: [D, K], the tap of the current token first, K up to 8.
      runs: [B, T] int32, document indices, non-decreasing apart from -1 at padding; None: one document.
      initial_inputs: [B, D, K - 1] inputs before the first token, with runs `initial_runs` [B, K - 1]; None: zeros.
      platform: "gpu" or "tpu".
      interpret: run on any machine, slowly, for tests.
    """
    y = gated(
        None, None, x, w, bias, runs, initial_inputs, initial_runs, platform=platform, interpret=interpret
    )
    return y, last_inputs(x, initial_inputs, w.shape[1])


def gated(x1, x2, v, w, bias, runs, initial_inputs, initial_runs, *, platform: str, interpret: bool):
    """y as defined in the docstring of this module."""
    K = w.shape[1]
    if runs is not None:
        if initial_runs is None:
            initial_runs = jnp.full((v.shape[0], K - 1), -1, jnp.int32)
        runs = jnp.concatenate([initial_runs, runs], axis=1).astype(jnp.int32)
    f32 = jnp.float32
    bias = None if bias is None else bias.astype(f32)
    return _gated(
        x1, x2, v, w.astype(f32), bias, initial_inputs if K > 1 else None, runs, platform, interpret
    )


def last_inputs(u: jax.Array, before: jax.Array | None, K: int) -> jax.Array:
    """The last K - 1 inputs so far, padded with zeros if there were fewer."""
    if u.shape[2] < K - 1:
        if before is None:
            return jnp.pad(u, ((0, 0), (0, 0), (K - 1 - u.shape[2], 0)))
        u = jnp.concatenate([before.astype(u.dtype), u], axis=2)
    return u[:, :, u.shape[2] - (K - 1) :]


@functools.partial(jax.custom_vjp, nondiff_argnums=(7, 8))
def _gated(x1, x2, v, w, bias, before, runs, platform, interpret):
    kernels = {"gpu": short_conv_gpu, "tpu": short_conv_tpu}[platform]
    return kernels.forward(x1, x2, v, w, bias, runs, before, interpret=interpret)


def _gated_forward(x1, x2, v, w, bias, before, runs, platform, interpret):
    y = _gated(x1, x2, v, w, bias, before, runs, platform, interpret)
    return y, (x1, x2, v, w, bias, before, runs)


def _gated_backward(platform, interpret, residuals, dy):
    x1, x2, v, w, bias, before, runs = residuals
    kernels = {"gpu": short_conv_gpu, "tpu": short_conv_tpu}[platform]
    gradients = kernels.backward(dy, x1, x2, v, w, bias, runs, before, interpret=interpret)
    d_before = None if before is None else _before_gradient(dy, x1, w, before, runs)
    return *gradients, d_before, None


def _before_gradient(dy, x1, w, before, runs):
    """The gradient of the K - 1 inputs before the row: sum_k w[:, k] g_{t+k}, over tokens of the row only."""
    n, T = before.shape[2], min(before.shape[2], dy.shape[2])
    g = dy[:, :, :T].astype(jnp.float32) * (1 if x1 is None else x1[:, :, :T].astype(jnp.float32))
    place, token = jnp.arange(n)[:, None], jnp.arange(T)
    tap = n + token - place  # from input `place`, n - place tokens before the first
    counts = tap <= n
    if runs is not None:
        own = runs[:, n : n + T]
        counts = counts & (runs[:, :n, None] == own[:, None]) & (own >= 0)[:, None]
        counts = counts[:, None]
    taps = jnp.where(counts, w[:, jnp.minimum(tap, n)], 0)
    return jnp.einsum("...dpt,bdt->bdp" if runs is None else "bdpt,bdt->bdp", taps, g).astype(before.dtype)


_gated.defvjp(_gated_forward, _gated_backward)
