"""Packed rows, for operators that carry a state along T.

A row is a sequence of documents, each with its own id > 0; id 0 is padding. For such an operator

- a document begins where a token has another id than the last token before it that is not padding;
- padding adds nothing to a state, does not make it decay, and gives 0;
- a state remembers the id of its document, and only a token of that document sees it.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int


def runs(segment_ids: Int[Array, "B T"], before: Int[Array, " B"] | None = None) -> Int[Array, "B T"]:
    """The index of each token's document in its row: 0 for the one that `before` names, then 1, 2, ...

    Padding takes the index of what precedes it, so indices never fall: two tokens share a document exactly where
    their indices are equal. `before` is the id of the state's document (0: no state, the first document is 1).
    """
    before = jnp.zeros(segment_ids.shape[0], segment_ids.dtype) if before is None else before
    filled = _fill(jnp.concatenate([before[:, None], segment_ids], axis=1))
    return jnp.cumsum(filled[:, 1:] != filled[:, :-1], axis=1, dtype=jnp.int32)


def last(segment_ids: Int[Array, "B T"], before: Int[Array, " B"] | None = None) -> Int[Array, " B"]:
    """The id of the document that a state after the T tokens belongs to."""
    before = jnp.zeros(segment_ids.shape[0], segment_ids.dtype) if before is None else before
    return _fill(jnp.concatenate([before[:, None], segment_ids], axis=1))[:, -1]


def end(segment_ids: Int[Array, "B T"]) -> Int[Array, " B"]:
    """The place after the last token that is no padding; what comes later is not between two tokens of a document."""
    return jnp.max(jnp.where(segment_ids != 0, jnp.arange(1, segment_ids.shape[1] + 1), 0), axis=1)


def _fill(ids: Array) -> Array:
    """Padding takes the id of what precedes it."""
    place = jnp.where(ids != 0, jnp.arange(ids.shape[1]), 0)
    return jnp.take_along_axis(ids, jax.lax.cummax(place, axis=1), axis=1)
