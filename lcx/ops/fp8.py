"""Products in FP8 as Transformer Engine computes them: e4m3 inputs and weights, e5m2 gradients, a scale per tensor.

    x8 = e4m3(clip(x * scale_x)),  w8 = e4m3(clip(w * scale_w)),  y = (x8 w8 accumulated in float32) / (scale_x scale_w)

A scale is 448 / (largest magnitude), so that the largest element reaches the end of e4m3's range. With delayed
scaling it comes from earlier steps and is stored with the weights; a stored scale of 0 means current scaling, that of
the tensor itself. Elements beyond the range are clipped. (Micikevicius et al. 2022, arXiv 2209.05433.)

In training the scaling is delayed: each step records the largest magnitudes of inputs, weights and gradients, and
`next_scales` makes the next scales from those of the last HISTORY steps, as Transformer Engine's DelayedScaling does.

The rounded numbers are exact in bfloat16 and float32, so they are multiplied in the type that is fast: on a CPU
float32, on a GPU FP8 itself (the gradients too, as products of e5m2 and e4m3), elsewhere bfloat16.

Gradients are straight-through: those of the unrounded product, computed from the rounded factors. The incoming gradient
is rounded to e5m2.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from lcx.ops import dispatch

E4M3_MAX, E5M2_MAX = 448.0, 57344.0
FLOAT32_MAX = 3.4028234663852886e38
HISTORY = 16  # steps, as Evo 2 was trained
COLLECTION = "fp8"  # of Flax variables: the histories of a run, at the paths of the projections they belong to
Product = Callable[[Array, Array], Array]


def e4m3(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """The nearest number of float8_e4m3fn (ties to even), clipped to +-448; float32."""
    return _rounded(x, E4M3_MAX, mantissa_bits=3, smallest_normal=2.0**-6)


def e5m2(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """The nearest number of float8_e5m2 (ties to even), clipped to +-57344; float32."""
    return _rounded(x, E5M2_MAX, mantissa_bits=2, smallest_normal=2.0**-14)


def current_scale(x: Float[Array, "..."], largest: float) -> Float[Array, ""]:
    """The scale that brings the largest magnitude of x to `largest`; 1 if x is all zero or not finite."""
    amax = _amax(x)
    return jnp.where((amax > 0) & jnp.isfinite(amax), largest / amax, 1.0)


def next_scales(
    scales: Float[Array, "*L 3"], history: Float[Array, "*L S 3"], recorded: Float[Array, "*L 3"], *, margin: int = 0
) -> tuple[Float[Array, "*L 3"], Float[Array, "*L S 3"]]:
    """(scales, history) after a step, by Transformer Engine's rules with its algorithm "max".

    Row 0 of the history takes what the step recorded. A scale becomes (largest of its format / largest of the history)
    / 2^margin, at most the largest float32; it stays as it is where the history is all 0 or holds a number that is not
    finite. Then the history is rolled: row i takes row i + 1, the last takes row 0, and row 0 becomes 0.

    Args:
      scales: of inputs and weights (e4m3), and of gradients (e5m2).
      recorded: the largest magnitudes of the same in this step.
    """
    history = history.at[..., 0, :].max(recorded)
    amax = jnp.max(history, axis=-2)
    wanted = jnp.array([E4M3_MAX, E4M3_MAX, E5M2_MAX], jnp.float32) / amax / 2.0**margin
    usable = (amax > 0) & jnp.isfinite(amax)
    scales = jnp.where(usable, jnp.minimum(wanted, FLOAT32_MAX), scales)
    return scales, jnp.roll(history, -1, axis=-2).at[..., 0, :].set(0)


def accumulated(total: Any, part: Any) -> Any:
    """The sum of two trees of gradients; of magnitudes recorded in the collection "fp8" the larger ones."""

    def one(path: tuple[Any, ...], x: Array, y: Array) -> Array:
        in_fp8 = any(getattr(key, "key", None) == COLLECTION for key in path)
        return jnp.maximum(x, y) if in_fp8 else x + y

    return jax.tree_util.tree_map_with_path(one, total, part)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def product(
    multiply: Product,
    x: Float[Array, "..."],
    w: Float[Array, "..."],
    scales: Float[Array, "3"],
    record: Float[Array, "3"],
) -> Float[Array, "..."]:
    """multiply(x, w) in FP8; in the dtype of x.

    Args:
      multiply: contracts the last axes of x with the first of w. It accumulates in float32 and returns float32, also of
        FP8 and bfloat16 factors.
      scales: of x, of w and of the gradient of the product; 0 for current scaling.
      record: not read. Its "gradient" is what a step records: the largest magnitudes of x, of w and of the gradient.
    """
    return _forward(multiply, x, w, scales, record)[0]


def _forward(multiply, x, w, scales, record):
    stored = scales.astype(jnp.float32)
    scale_x, scale_w = (
        jnp.where(stored[i] > 0, stored[i], current_scale(tensor, E4M3_MAX)) for i, tensor in enumerate((x, w))
    )
    x8 = _narrow(e4m3(x.astype(jnp.float32) * scale_x), jnp.float8_e4m3fn)
    w8 = _narrow(e4m3(w.astype(jnp.float32) * scale_w), jnp.float8_e4m3fn)
    y = multiply(x8, w8).astype(jnp.float32) * (1 / (scale_x * scale_w))
    like = jnp.zeros((), x.dtype), jnp.zeros((), w.dtype), record
    return y.astype(x.dtype), (x8, w8, scale_x, scale_w, stored[2], _amax(x), _amax(w), scales, like)


def _backward(multiply, kept, dy):
    x8, w8, scale_x, scale_w, stored, amax_x, amax_w, scales, (like_x, like_w, record) = kept
    scale = jnp.where(stored > 0, stored, current_scale(dy, E5M2_MAX))
    dx, dw = _pulled(multiply, x8, w8, _narrow(e5m2(dy.astype(jnp.float32) * scale), jnp.float8_e5m2))
    dx, dw = dx * (1 / (scale * scale_w)), dw * (1 / (scale * scale_x))
    recorded = jnp.stack([amax_x, amax_w, _amax(dy)]).astype(record.dtype)
    return dx.astype(like_x.dtype), dw.astype(like_w.dtype), jnp.zeros_like(scales), recorded


product.defvjp(_forward, _backward)


def _amax(x: Array) -> Float[Array, ""]:
    return jnp.max(jnp.abs(x.astype(jnp.float32)))


def _narrow(rounded: Array, native: Any) -> Array:
    """Numbers of the FP8 type `native` in the type in which this platform multiplies them fastest."""
    return rounded.astype({"cpu": jnp.float32, "gpu": native}.get(dispatch.platform(), jnp.bfloat16))


def _pulled(multiply: Product, x8: Array, w8: Array, dy8: Array) -> tuple[Float[Array, "..."], Float[Array, "..."]]:
    """The gradients of multiply(x8, w8), float32."""
    if x8.dtype == jnp.float32:
        return jax.vjp(multiply, x8, w8)[1](dy8)
    # A gradient by jax.vjp would have the dtype of the factor, and be rounded to it.
    num_in = (x8.ndim + w8.ndim - dy8.ndim) // 2
    rows, outs = tuple(range(x8.ndim - num_in)), tuple(range(num_in, w8.ndim))
    of_x = (tuple(range(len(rows), dy8.ndim)), outs), ((), ())
    of_w = (rows, rows), ((), ())
    dot = functools.partial(jax.lax.dot_general, preferred_element_type=jnp.float32)
    return dot(dy8, w8, of_x), dot(x8, dy8, of_w)


def _rounded(x: Array, largest: float, *, mantissa_bits: int, smallest_normal: float) -> Array:
    x = jnp.clip(x.astype(jnp.float32), -largest, largest)
    normal = jax.lax.reduce_precision(x, exponent_bits=8, mantissa_bits=mantissa_bits)
    step = smallest_normal * 2.0**-mantissa_bits  # between subnormal numbers
    subnormal = jax.lax.round(x / step, jax.lax.RoundingMethod.TO_NEAREST_EVEN) * step
    return jnp.where(jnp.abs(x) < smallest_normal, subnormal, normal)
