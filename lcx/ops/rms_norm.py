"""RMSNorm with its backward pass written out, all statistics in float32.

With n = x / r, r = sqrt(mean(x^2) + eps), and g = dy * scale,

    dx = (g - n mean(g n)) / r,      dscale = the sum of dy n over all tokens

Derived step by step, the same takes more time on a CPU.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from lcx.ops.tiling import row_dots


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def rms_norm(x: Float[Array, "*tokens D"], scale: Float[Array, " D"], eps: float) -> Float[Array, "*tokens D"]:
    """x / sqrt(mean(x^2) + eps) * scale in x's dtype (Zhang & Sennrich 2019, arXiv 1910.07467)."""
    return _forward(x, scale, eps)[0]


def _forward(x, scale, eps):
    wide = x.astype(jnp.float32)
    rate = jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + eps)
    return (wide * rate).astype(x.dtype) * scale.astype(x.dtype), (x, scale, rate)


def _backward(eps, residuals, dy):
    x, scale, rate = residuals
    dy, normed = dy.astype(jnp.float32), x.astype(jnp.float32) * rate
    g = dy * scale.astype(x.dtype).astype(jnp.float32)
    dx = rate * (g - normed * row_dots(g, normed)[..., None] / x.shape[-1])
    d_scale = jnp.sum(dy * normed, axis=tuple(range(x.ndim - 1)))
    return dx.astype(x.dtype), d_scale.astype(scale.dtype)


rms_norm.defvjp(_forward, _backward)
