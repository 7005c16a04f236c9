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
    """The next token of every row: the likeliest without keys, else drawn with the key of the row and the step."""
    if keys is None:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    # From the row's maximum, so that a tiny temperature gives 0 and -inf, not inf - inf.
    logits = (logits - jnp.max(logits, axis=-1, keepdims=True)) / temperature
    if top_p is not None:
        logits = nucleus(logits, top_p)
    step_keys = jax.vmap(jax.random.fold_in, (0, None))(keys, step)
    return jax.vmap(jax.random.categorical)(step_keys, logits).astype(jnp.int32)


def nucleus(logits: Float[Array, "B V"], top_p: float | Float[Array, ""]) -> Float[Array, "B V"]:
    """Logits with -inf for every token outside the smallest set of likeliest ones with probability >= top_p.

    In ascending order of probability, tokens go while their sum is at most 1 - top_p; the likeliest always stays.
    """
    order = jnp.argsort(logits, axis=-1, stable=True)
    ascending = jnp.take_along_axis(logits, order, axis=-1)
    removed = jnp.cumsum(jax.nn.softmax(ascending, axis=-1), axis=-1) <= 1 - top_p
    removed = removed.at[:, -1].set(False)
    kept = jnp.where(removed, -jnp.inf, ascending)
    return jnp.zeros_like(logits).at[jnp.arange(logits.shape[0])[:, None], order].set(kept)
