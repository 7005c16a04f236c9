"""Packed rows for operators that carry a state along T.

A row is a sequence of documents, each with its own id > 0; id 0 is padding. For such an operator:

- a document begins at a token whose id differs from that of the last earlier token that is not padding;
- padding adds nothing to the state, does not decay it, and has output 0;
- a state stores the id of its document, and only tokens of that document see it.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int


def runs(segment_ids: Int[Array, "B T"], before: Int[Array, " B"] | None = None) -> Int[Array, "B T"]:
    """The index of each token's document in its row: 0 for the one that `before` names, then 1, 2, ...

    Padding takes the index of the token before it, so indices are non-decreasing, and two tokens share a document
    exactly if their indices are equal. `before` is the id of the state's document (0: no state; the first document has
    index 1).
    """
    before = jnp.zeros(segment_ids.shape[0], segment_ids.dtype) if before is None else before
    filled = _fill(jnp.concatenate([before[:, None], segment_ids], axis=1))
    return jnp.cumsum(filled[:, 1:] != filled[:, :-1], axis=1, dtype=jnp.int32)


def last(segment_ids: Int[Array, "B T"], before: Int[Array, " B"] | None = None) -> Int[Array, " B"]:
    """The id of the document to which the state after the T tokens belongs."""
    before = jnp.zeros(segment_ids.shape[0], segment_ids.dtype) if before is None else before
    return _fill(jnp.concatenate([before[:, None], segment_ids], axis=1))[:, -1]


def end(segment_ids: Int[Array, "B T"]) -> Int[Array, " B"]:
    """The index after the last token that is not padding: padding from here on is not between two tokens."""
    return jnp.max(jnp.where(segment_ids != 0, jnp.arange(1, segment_ids.shape[1] + 1), 0), axis=1)


def _fill(ids: Array) -> Array:
    """The ids with padding replaced by the id of the token before it."""
    place = jnp.where(ids != 0, jnp.arange(ids.shape[1]), 0)
    return jnp.take_along_axis(ids, jax.lax.cummax(place, axis=1), axis=1)
