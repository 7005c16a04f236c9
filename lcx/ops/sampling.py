"""From logits to the next token: greedy, temperature, top-p.

Letters: B batch, V vocabulary.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key


def choose(
    logits: Float[Array, "B V"],
    *,
    step: Int[Array, ""] | int = 0,
    keys: Key[Array, " B"] | None = None,
    temperature: float | Float[Array, ""] = 1.0,
    top_p: float | Float[Array, ""] | None = None,
) -> Int[Array, " B"]:
    """The next token of every row [B]: the most likely one if there are no keys, otherwise sampled.

    The random key of a draw is derived from the row's key and the step.
    """
    if keys is None:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    # Subtract the maximum first: a tiny temperature then gives 0 and -inf instead of inf - inf = NaN.
    logits = (logits - jnp.max(logits, axis=-1, keepdims=True)) / temperature
    if top_p is not None:
        logits = nucleus(logits, top_p)
    step_keys = jax.vmap(jax.random.fold_in, (0, None))(keys, step)
    return jax.vmap(jax.random.categorical)(step_keys, logits).astype(jnp.int32)


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
