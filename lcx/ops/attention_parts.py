"""Softmax attention over keys and values that are made a part at a time, from something narrower, and never kept.

For many new tokens against a long cache of latents: the keys and values of all heads would be many times its size. Each
part gives outputs and logarithms of sums of exponentials, which are merged as the tiles of a part are. Parts that no
query sees are skipped, and the backward pass makes each part again.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from lcx.ops.attention_tiles import NEG, tiled
from lcx.ops.tiling import cut

SLOTS = 1024  # of a part


def attention_in_parts(
    q: Float[Array, "B T N H"],
    made: Callable[[Array], tuple[Array, Array]],
    source: Float[Array, "B S R"],
    width: int,
    *,
    q_segment_ids: Int[Array, "B T"],
    kv_segment_ids: Int[Array, "B S"],
    q_offset: Int[Array, " B"],
    scale: float,
) -> Float[Array, "B T N W"]:
    """ops.attention over the keys and values made(source).

    Args:
      made: some slots of `source`, [B, s, R] -> their keys [B, s, K, H] and values [B, s, K, W].
      width: W.
    """
    T, S = q.shape[1], source.shape[1]
    size = min(SLOTS, S)

    @jax.checkpoint
    def over(state: tuple[Array, Array], number: Array) -> tuple[Array, Array]:
        start = jnp.minimum(number * size, S - size)  # the last part may overlap the one before it
        ids = cut(kv_segment_ids, start, size, 1)
        ids = jnp.where(start + jnp.arange(size) >= number * size, ids, 0)
        keys, values = made(cut(source, start, size, 1))
        y, total = tiled(q, keys, values, q_segment_ids, ids, q_offset - start, None, window=None, scale=scale)
        before, top = state[1], jnp.logaddexp(state[1], total)
        shares = (jnp.exp(x - top)[..., None] for x in (before, total))
        return state[0] * next(shares) + y * next(shares), top

    def step(state, number):
        seen = number * size < jnp.max(q_offset) + T
        return jax.lax.cond(seen, over, lambda state, number: state, state, number), None

    y = jnp.zeros((*q.shape[:3], width), jnp.float32)
    state = y, jnp.full(q.shape[:3], NEG, jnp.float32)
    (y, _), _ = jax.lax.scan(step, state, jnp.arange(-(-S // size)))
    return y.astype(q.dtype)
