"""Products in FP8 as Transformer Engine computes them: e4m3 inputs and weights, e5m2 gradients, a scale per tensor.

    x8 = e4m3(clip(x * scale_x)),  w8 = e4m3(clip(w * scale_w)),  y = (x8 w8 accumulated in float32) / (scale_x scale_w)

A scale is 448 / (largest magnitude), so that the largest element reaches the end of e4m3's range. With delayed
scaling it comes from earlier steps and is stored with the weights; a stored scale of 0 means current scaling, that of
the tensor itself. Elements beyond the range are clipped. (Micikevicius et al. 2022, arXiv 2209.05433.)

The rounded numbers are exact in bfloat16 and float32, so they are multiplied in the type that is fast: on a CPU
float32, on a GPU FP8 itself, elsewhere bfloat16.

Gradients are straight-through: those of the unrounded product, computed from the rounded factors. The incoming gradient
is rounded to e5m2 with current scaling.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

E4M3_MAX, E5M2_MAX = 448.0, 57344.0
Product = Callable[[Array, Array], Array]


def e4m3(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """The nearest number of float8_e4m3fn (ties to even), clipped to +-448; float32."""
    return _rounded(x, E4M3_MAX, mantissa_bits=3, smallest_normal=2.0**-6)


def e5m2(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """The nearest number of float8_e5m2 (ties to even), clipped to +-57344; float32."""
    return _rounded(x, E5M2_MAX, mantissa_bits=2, smallest_normal=2.0**-14)


def current_scale(x: Float[Array, "..."], largest: float) -> Float[Array, ""]:
    """The scale that brings the largest magnitude of x to `largest`; 1 if x is all zero or not finite."""
    amax = jnp.max(jnp.abs(x.astype(jnp.float32)))
    return jnp.where((amax > 0) & jnp.isfinite(amax), largest / amax, 1.0)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def product(
    multiply: Product, x: Float[Array, "..."], w: Float[Array, "..."], scales: Float[Array, "2"]
) -> Float[Array, "..."]:
    """multiply(x, w), a bilinear function, in FP8; in the dtype of x.

    Args:
      multiply: accumulates in float32 and returns float32, also of FP8 and bfloat16 factors.
      scales: of x and of w; 0 for current scaling.
    """
    return _forward(multiply, x, w, scales)[0]


def _forward(multiply, x, w, scales):
    stored = scales.astype(jnp.float32)
    scale_x, scale_w = (
        jnp.where(stored[i] > 0, stored[i], current_scale(tensor, E4M3_MAX)) for i, tensor in enumerate((x, w))
    )
    x8, w8 = e4m3(x.astype(jnp.float32) * scale_x), e4m3(w.astype(jnp.float32) * scale_w)
    y = _multiplied(multiply, x8, w8) * (1 / (scale_x * scale_w))
    return y.astype(x.dtype), (x8, w8, scale_x, scale_w, jnp.zeros((), x.dtype), jnp.zeros((), w.dtype), scales)


def _backward(multiply, kept, dy):
    x8, w8, scale_x, scale_w, like_x, like_w, scales = kept
    scale = current_scale(dy, E5M2_MAX)
    _, pull = jax.vjp(multiply, x8, w8)
    dx, dw = pull(e5m2(dy.astype(jnp.float32) * scale))
    dx, dw = dx * (1 / (scale * scale_w)), dw * (1 / (scale * scale_x))
    return dx.astype(like_x.dtype), dw.astype(like_w.dtype), jnp.zeros_like(scales)


product.defvjp(_forward, _backward)


def _multiplied(multiply: Product, x8: Array, w8: Array) -> Float[Array, "..."]:
    kind = {"cpu": jnp.float32, "gpu": jnp.float8_e4m3fn}.get(jax.default_backend(), jnp.bfloat16)
    return multiply(x8.astype(kind), w8.astype(kind)).astype(jnp.float32)


def _rounded(x: Array, largest: float, *, mantissa_bits: int, smallest_normal: float) -> Array:
    x = jnp.clip(x.astype(jnp.float32), -largest, largest)
    normal = jax.lax.reduce_precision(x, exponent_bits=8, mantissa_bits=mantissa_bits)
    step = smallest_normal * 2.0**-mantissa_bits  # between subnormal numbers
    subnormal = jax.lax.round(x / step, jax.lax.RoundingMethod.TO_NEAREST_EVEN) * step
    return jnp.where(jnp.abs(x) < smallest_normal, subnormal, normal)
