"""The product of activations and a kernel, in the form that is fastest on the platform.

On a CPU a product of two bfloat16 matrices takes twice as long with a bfloat16 result as with a float32 result, because
XLA has a fast form only for the latter. So there all three products, of the forward pass and of the two gradients, are
computed with float32 results. y and dx are then rounded to bfloat16, as on other platforms.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from lcx.ops import dispatch
from lcx.ops.tiling import dot, laid_out_transpose


def product(x: Float[Array, "rows inner"], kernel: Float[Array, "inner cols"]) -> Float[Array, "rows cols"]:
    """x @ kernel, in the dtype of both; accumulated in float32 or wider."""
    narrow = x.dtype == kernel.dtype == jnp.bfloat16
    return _with_wide_results(x, kernel) if narrow and dispatch.platform() == "cpu" else x @ kernel


@jax.custom_vjp
def _with_wide_results(x: Array, kernel: Array) -> Array:
    return dot(x, kernel, 1, 0).astype(x.dtype)


def _forward(x: Array, kernel: Array) -> tuple[Array, tuple[Array, Array]]:
    return _with_wide_results(x, kernel), (x, kernel)


def _backward(residuals: tuple[Array, Array], dy: Array) -> tuple[Array, Array]:
    x, kernel = residuals
    dx, d_kernel = dot(dy, kernel, 1, 1), dot(laid_out_transpose(x), dy, 1, 0)
    return dx.astype(x.dtype), d_kernel.astype(kernel.dtype)


_with_wide_results.defvjp(_forward, _backward)
