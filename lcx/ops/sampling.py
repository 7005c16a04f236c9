"""From logits to the next token: greedy, temperature, top-k, top-p, among all tokens or some.

Letters: B batch, V vocabulary.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

from lcx.errors import UserError


def choose(
    logits: Float[Array, "B V"],
    *,
    step: Int[Array, ""] | int = 0,
    keys: Key[Array, " B"] | None = None,
    temperature: float | Float[Array, ""] = 1.0,
    top_p: float | Float[Array, ""] | None = None,
    top_k: int | Int[Array, ""] | None = None,
    allowed: Bool[Array, " V"] | None = None,
) -> Int[Array, " B"]:
    """The next token of every row [B]: the most likely one if there are no keys, otherwise sampled.

    The random key of a draw is derived from the row's key and the step. Only `allowed` tokens are chosen; then top_k
    applies, then top_p, in the order of transformers.
    """
    if allowed is not None:
        logits = jnp.where(allowed, logits, -jnp.inf)
    if keys is None:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    # Subtract the maximum first: a tiny temperature then gives 0 and -inf instead of inf - inf = NaN.
    logits = (logits - jnp.max(logits, axis=-1, keepdims=True)) / temperature
    if top_k is not None:
        logits = likeliest(logits, top_k)
    if top_p is not None:
        logits = nucleus(logits, top_p)
    step_keys = jax.vmap(jax.random.fold_in, (0, None))(keys, step)
    return jax.vmap(jax.random.categorical)(step_keys, logits).astype(jnp.int32)


def among(
    sampling: dict[str, Any], vocab_size: int, top_k: int | None, allowed: Sequence[int] | None
) -> dict[str, Any]:
    """Keyword arguments of `choose`, restricted to the k most likely and to allowed tokens.

    Raises:
      UserError: a k below 1, or allowed tokens that are none or outside the vocabulary.
    """
    sampling = dict(sampling)
    if top_k is not None:
        if not isinstance(top_k, int | np.integer) or isinstance(top_k, bool) or top_k < 1:
            raise UserError(f"top_k is {top_k!r}, expected an integer >= 1: change top_k")
        if sampling:
            sampling["top_k"] = np.int32(min(top_k, vocab_size))
    if allowed is not None:
        ids = np.array(list(allowed), np.int64)
        if not ids.size or ids.min() < 0 or ids.max() >= vocab_size:
            raise UserError(f"allowed_tokens is {list(allowed)!r:.80}, expected ids from 0 to {vocab_size - 1}")
        sampling["allowed"] = np.isin(np.arange(vocab_size), ids)
    return sampling


def likeliest(logits: Float[Array, "B V"], top_k: int | Int[Array, ""]) -> Float[Array, "B V"]:
    """Logits with -inf for every token less likely than the k-th most likely one; ties with it stay."""
    ascending = jnp.sort(logits, axis=-1)
    last = jnp.maximum(logits.shape[-1] - top_k, 0)
    smallest = jnp.take_along_axis(ascending, jnp.full((logits.shape[0], 1), last), axis=-1)
    return jnp.where(logits < smallest, -jnp.inf, logits)


def nucleus(logits: Float[Array, "B V"], top_p: float | Float[Array, ""]) -> Float[Array, "B V"]:
    """Logits with -inf for every token outside the smallest set of most likely tokens with total probability >= top_p.

    Tokens are removed in ascending order of probability while the removed total is at most 1 - top_p. The most likely
    token always stays.
    """
    order = jnp.argsort(logits, axis=-1, stable=True)
    ascending = jnp.take_along_axis(logits, order, axis=-1)
    removed = jnp.cumsum(jax.nn.softmax(ascending, axis=-1), axis=-1) <= 1 - top_p
    removed = removed.at[:, -1].set(False)
    kept = jnp.where(removed, -jnp.inf, ascending)
    return jnp.zeros_like(logits).at[jnp.arange(logits.shape[0])[:, None], order].set(kept)
