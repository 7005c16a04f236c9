"""Running sums and maxima that compile quickly.

jax.lax.associative_scan unrolls its log2 T levels, and XLA expands a cumsum into seven loops: together they took more
than half of the compile time of second-order attention. Here the levels are iterations of a loop, compiled once.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def running(join: Callable, xs: Any, nothing: Any, *, axis: int) -> Any:
    """join(...join(xs_1, xs_2)..., xs_i) for each i along an axis, as jax.lax.associative_scan; log2 T passes over xs.

    Args:
      join: an associative function of two trees of arrays; the first argument holds the earlier entries.
      nothing: the identity, a tree of numbers: join(nothing, x) = x.
    """
    T = jax.tree.leaves(xs)[0].shape[axis]

    def double(level, xs):
        def earlier(x, none):
            blank = jnp.full_like(x, none)
            return jax.lax.dynamic_slice_in_dim(jnp.concatenate([blank, x], axis), T - (1 << level), T, axis)

        return join(jax.tree.map(earlier, xs, nothing), xs)

    return jax.lax.fori_loop(0, (T - 1).bit_length(), double, xs)


def sums_of_tile(x: Float[Array, "*batch C"]) -> Float[Array, "*batch C"]:
    """Running sums along a short axis of finite numbers, as a product with a triangular matrix of ones."""
    order = jnp.arange(x.shape[-1])
    ones = (order[:, None] <= order).astype(x.dtype)
    return jnp.matmul(x, ones, precision=jax.lax.Precision.HIGHEST)


def later_sums(terms: Float[Array, "*batch S"], documents: Int[Array, "*some S"] | None) -> Float[Array, "*batch S"]:
    """Each token's sum of its own term and the later ones of its document. None: one document.

    So the gradient of a log decay comes from those of its running sums. The terms of each other document add up to 0,
    but only up to rounding.

    Args:
      documents: a number for each token, equal for the tokens of one document; broadcast to the terms.
    """
    if documents is None:
        return jax.lax.cumsum(terms, axis=terms.ndim - 1, reverse=True)

    def joined(later, earlier):
        (sums, of), (term, own) = later, earlier
        return jnp.where(of == own, sums, 0) + term, own

    reversed_ids = jnp.broadcast_to(documents[..., ::-1], terms.shape)
    sums, _ = running(joined, (terms[..., ::-1], reversed_ids), (0, -1), axis=terms.ndim - 1)
    return sums[..., ::-1]
