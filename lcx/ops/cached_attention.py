"""Softmax attention of a few new tokens over a cache of keys and values, which is only read.

The scores against the cache and those among the new tokens share one maximum and one sum. No array of the size of the
cache is copied or written, so the cost per token is one read of the cache. (Writing the new tokens into the cache first
would give the same result, but a scan over layers would have to carry whole caches.)

Letters: B batch, T new tokens, S slots, N query heads, K key/value heads, G = N / K, H head dim.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from lcx.ops import dispatch
from lcx.ops.attention_tiles import NEG
from lcx.ops.decay import gaps


def cached_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    *,
    cached_k: Float[Array, "B K S H"],
    cached_v: Float[Array, "B K S H"],
    segment_ids: Int[Array, "B T"],
    cached_segment_ids: Int[Array, "B S"],
    length: Int[Array, ""],
    log_decay: Float[Array, "B T N"] | None = None,
    cached_log_decay: Float[Array, "B N S"] | None = None,
    window: int | None = None,
    scale: float | None = None,
) -> Float[Array, "B T N H"]:
    """ops.attention with the new tokens placed after the first `length` slots: outputs [B, T, N, H] in q's dtype.

    Memory: B N T (S + T) scores in float32.

    Args:
      cached_k, cached_v: in any dtype; heads before slots, so that products read contiguous memory.
      segment_ids, cached_segment_ids: tokens with id 0 (padding, empty slots) see nothing and are not seen.
      log_decay, cached_log_decay: of the new and of the cached tokens; both or neither. Values at padding are ignored.
    """
    B, T, N, H = q.shape
    K, S = cached_k.shape[1:3]
    wide = jnp.promote_types(q.dtype, jnp.float32)
    narrow = wide if dispatch.platform() == "cpu" else q.dtype  # a CPU has no batched bf16 x bf16 -> float32
    k, v = (jnp.swapaxes(x, 1, 2).astype(narrow) for x in (k, v))
    cached_k, cached_v = cached_k.astype(narrow), cached_v.astype(narrow)
    scale = H**-0.5 if scale is None else scale
    grouped = jnp.moveaxis((q * scale).astype(narrow).reshape(B, T, K, N // K, H), 1, 3)  # [B, K, G, T, H]

    def product(equation, x, y):
        return jnp.einsum(equation, x, y, preferred_element_type=wide)

    old, new = (product("bkgth,bksh->bkgts", grouped, keys) for keys in (cached_k, k))
    if log_decay is not None and cached_log_decay is not None:
        rate = jnp.where(segment_ids[..., None] != 0, log_decay.astype(wide), 0)
        cached_rate = jnp.where(cached_segment_ids[:, None] != 0, cached_log_decay.astype(wide), 0)
        far, near = _gaps(jnp.swapaxes(rate, 1, 2), cached_rate)
        old, new = old + far.reshape(old.shape), new + near.reshape(new.shape)
    cached_place = jnp.cumsum(cached_segment_ids != 0, axis=1)
    place = cached_place[:, -1:] + jnp.cumsum(segment_ids != 0, axis=1)
    see_old = _seen(segment_ids, cached_segment_ids, place[:, :, None] - cached_place[:, None], window)
    see_old &= (jnp.arange(S) < length)[None, None, None, None]
    see_new = _seen(segment_ids, segment_ids, place[:, :, None] - place[:, None], window)
    old, new = jnp.where(see_old, old, NEG), jnp.where(see_new, new, NEG)
    top = jnp.maximum(old.max(-1, keepdims=True), new.max(-1, keepdims=True))
    old, new = jnp.where(see_old, jnp.exp(old - top), 0), jnp.where(see_new, jnp.exp(new - top), 0)
    total = old.sum(-1, keepdims=True) + new.sum(-1, keepdims=True)
    y = product("bkgts,bksh->bkgth", old.astype(narrow), cached_v)
    y += product("bkgts,bksh->bkgth", new.astype(narrow), v)
    y = y / jnp.where(total == 0, 1, total)
    return jnp.moveaxis(y, 3, 1).reshape(B, T, N, H).astype(q.dtype)


def _seen(q_ids: Array, kv_ids: Array, distance: Array, window: int | None) -> Array:
    """The mask [B, 1, 1, T, S], from distances [B, T, S] between tokens that do not count padding."""
    seen = distance >= 0
    if window is not None:
        seen &= distance < window
    same = (q_ids[:, :, None] == kv_ids[:, None, :]) & (q_ids[:, :, None] != 0)
    return (seen & same)[:, None, None]


def _gaps(rate: Array, cached: Array) -> tuple[Array, Array]:
    """L_i - L_j of new tokens i: [B, N, T, S] to cached tokens j, [B, N, T, T] to new ones; at most 0 where visible."""
    since = jnp.cumsum(rate, axis=-1)[..., None]
    new = gaps(rate, jnp.arange(rate.shape[-1]))
    later = jnp.cumsum(cached[..., :0:-1], axis=-1)[..., ::-1]  # the sum over the slots after each slot
    to_end = jnp.pad(later, ((0, 0), (0, 0), (0, 1)))
    return since + to_end[:, :, None], new
