"""Packed rows with convolution kernels that support only one document per row.

Documents that are further apart than the filter's length do not affect each other. So the documents of a row are
assigned to classes, document number modulo `count`, such that no window of the filter's length contains two documents
of one class. Each class takes one pass of the kernel, with the inputs of all other classes set to 0. A row with one
document, padded or not, takes one pass. Documents at least as long as the filter take two passes, whatever their
number. With a filter as long as the row every document takes its own pass. `count` is computed from the ids at run
time, as the maximum over all rows.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from lcx.ops import segments

Signals = tuple[Array | None, Array | None, Array]  # x1, x2, v [B, D, T]


def by_document(
    kernel: Callable[[Signals, Any], Array],
    signals: Signals,
    weights: Any,
    ids: Array,
    *,
    taps: int,
    otherwise: Callable[[Signals, Any, Array], Array] | None = None,
    most: int = 0,
) -> Array:
    """y [B, D, T] with gradients for signals and weights.

    Args:
      kernel: (signals, weights) -> y, linear in v and causal, for rows of one document.
      ids: segment_ids [B, T], 0 for padding.
      taps: the filter's length, including the tap of the current token.
      otherwise: (signals, weights, ids) -> y at a cost that does not depend on the documents; used if more than `most`
        passes would be needed. None: the number of passes is not limited.
    """
    runs = jnp.maximum(segments.runs(ids), 1)  # index 0 is padding before the first document
    first = jnp.pad(runs, ((0, 0), (taps - 1, 0)), mode="edge")[:, : runs.shape[1]]
    count = 1 + jnp.max(runs - first)
    classes = jnp.where(ids != 0, runs % count, -1)
    return _by_class(kernel, otherwise, most, signals, weights, ids, classes, count)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _by_class(kernel, otherwise, most, signals, weights, ids, classes, count):
    def passes():
        def one(i, y):
            mine = (classes == i)[:, None]
            return jnp.where(mine, kernel(_only(mine, signals), weights), y)

        return lax.fori_loop(0, count, one, jnp.zeros_like(signals[2]))

    if otherwise is None:
        return passes()
    return lax.cond(count <= most, passes, lambda: otherwise(signals, weights, ids))


def _only(mine: Array, signals: Signals) -> Signals:
    x1, x2, v = signals
    return x1, x2, jnp.where(mine, v, 0)


def _forward(kernel, otherwise, most, *arrays):
    return _by_class(kernel, otherwise, most, *arrays), arrays


def _backward(kernel, otherwise, most, arrays, dy):
    signals, weights, ids, classes, count = arrays

    def passes():
        def one(i, sums):
            mine = (classes == i)[:, None]
            _, pull = jax.vjp(kernel, _only(mine, signals), weights)
            d_signals, d_weights = pull(jnp.where(mine, dy, 0))
            own = jax.tree.map(lambda new, old: jnp.where(mine, new, old), d_signals, sums[0])
            return own, jax.tree.map(jnp.add, d_weights, sums[1])

        return lax.fori_loop(0, count, one, jax.tree.map(jnp.zeros_like, (signals, weights)))

    def at_once():
        _, pull = jax.vjp(lambda signals, weights: otherwise(signals, weights, ids), signals, weights)
        return pull(dy)

    grads = passes() if otherwise is None else lax.cond(count <= most, passes, at_once)
    return *grads, None, None, None


_by_class.defvjp(_forward, _backward)
