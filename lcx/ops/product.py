"""Products of two bfloat16 matrices in the form that is fast on a CPU: bfloat16 factors, a float32 result.

This is for CPUs with instructions for bfloat16. On others XLA widens the factors of a product with a bfloat16 result,
which costs nothing beside the product, and `tiling.factor` does the same for one with a float32 result.

XLA's own choices on a CPU with them, for two bfloat16 matrices of 1024 columns, in CPU time: 48 ms with a bfloat16
result, 24 ms with a float32 result, 49 ms again if the left factor is contracted over its first axis. So all three
products of a projection, the forward pass and both gradients, are computed with float32 results and the left factor
contracted over its last axis.

XLA merges transposes into products. One that is merged into a bfloat16 product with a float32 result cannot be run
("Unsupported element type"), and one that is merged into a factor makes it slow. An optimization barrier prevents both.
"""

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from lcx.ops import PRODUCTS, dispatch
from lcx.ops.tiling import dot

FEW_ROWS = 8


def narrow_on_cpu(x: Array) -> bool:
    return x.dtype == jnp.bfloat16 and dispatch.platform() == "cpu"


def narrow_products(x: Array) -> bool:
    """Whether products with x are fast with bfloat16 factors and float32 results alone."""
    return narrow_on_cpu(x) and dispatch.multiplies_bfloat16()


def product(x: Float[Array, "rows inner"], kernel: Float[Array, "inner cols"]) -> Float[Array, "rows cols"]:
    """x @ kernel, in the dtype of both; accumulated in float32 or wider."""
    if not narrow_products(x):
        return x @ kernel
    return checkpoint_name(_with_wide_results(x, kernel), PRODUCTS)


def wide(a: Array, b: Array, b_axis: int) -> Array:
    """The last axis of a contracted with an axis of b, in float32; safe and fast for bfloat16 on a CPU."""
    return jax.lax.optimization_barrier(dot(a, b, 1, b_axis))


def few_with_table(x: Float[Array, "rows inner"], table: Float[Array, "V inner"]) -> Float[Array, "rows V"]:
    """x @ table^T in float32, for at most FEW_ROWS rows in bfloat16 on a CPU, without another copy of a large table.

    Otherwise XLA converts the table to float32 for a single row, and transposes it before a loop of decode steps.
    """
    rows = x.shape[0]
    padded = jnp.pad(x, ((0, FEW_ROWS - rows), (0, 0)))
    return dot(padded, jax.lax.optimization_barrier(table), 1, 1)[:rows]


def laid_out_transpose(x: Array) -> Array:
    """x^T of a matrix, or of each of a stack of matrices, as an array of its own."""
    moved = jax.lax.optimization_barrier(jnp.swapaxes(x, -1, -2)[None])  # the new axis fixes the usual layout
    return moved.reshape(moved.shape[1:])


@jax.custom_vjp
def _with_wide_results(x: Array, kernel: Array) -> Array:
    return wide(x, kernel, 0).astype(x.dtype)


def _forward(x: Array, kernel: Array) -> tuple[Array, tuple[Array, Array]]:
    return _with_wide_results(x, kernel), (x, kernel)


def _backward(residuals: tuple[Array, Array], dy: Array) -> tuple[Array, Array]:
    x, kernel = residuals
    return wide(dy, kernel, 1).astype(x.dtype), wide(laid_out_transpose(x), dy, 0).astype(kernel.dtype)


_with_wide_results.defvjp(_forward, _backward)
