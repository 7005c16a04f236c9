"""Projections shared by mixers with heads: to rotated queries, keys and values, and back to the residual stream."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from lcx import rope as rope_lib
from lcx.errors import UserError
from lcx.layers import Linear
from lcx.mixers.kv_cache import Cache


def rotated_heads(
    mixer,
    x: Float[Array, "B T D"],
    positions: Int[Array, "B T"] | None,
    cache: Cache | None,
    rotate: Callable[..., Array] = rope_lib.rotate,
    *,
    segment_ids: Int[Array, "B T"] | None = None,
    keys_as_values: bool = False,
) -> tuple[Float[Array, "B T N H"], Float[Array, "B T K H"], Float[Array, "B T K H"]]:
    """Queries, keys and values of a mixer with Attention's settings; call it inside the mixer's compact __call__.

    With mixer.rope None nothing is rotated. The norm "l2" comes after the rotation, all others before it.

    Args:
      keys_as_values: the values are the keys before norm and rotation.
    """

    def projected(name: str, axis: str, number: int) -> Array:
        shape, names = (number, mixer.head_dim), ("embed", axis, "head_dim")
        return Linear((x.shape[-1],), shape, names, mixer.qkv_bias, name=f"{name}_proj")(x)

    q = projected("q", "heads", mixer.num_heads)
    k = projected("k", "kv_heads", mixer.num_kv_heads)
    v = k if keys_as_values else projected("v", "kv_heads", mixer.num_kv_heads)
    late = mixer.qk_norm == "l2"
    if mixer.qk_norm and not late:
        q, k = (_normed(mixer, heads, name) for heads, name in ((q, "q_norm"), (k, "k_norm")))
    # Cancels the operators' own division by sqrt(head_dim).
    factor = None if mixer.scale is None else mixer.scale * math.sqrt(mixer.head_dim)
    if factor is not None and not late:
        q = q * factor
    if mixer.rope is not None:
        rotation = positions_and_frequencies(mixer, x.shape[1], positions, cache, segment_ids)
        q, k = (rotate(heads, *rotation) for heads in (q, k))
    if late:
        q, k = (unit_heads(heads, mixer.norm_eps) for heads in (q, k))
        q = q if factor is None else q * factor
    return q, k, v


def positions_of(
    num_tokens: int, positions: Int[Array, "B T"] | None, cache: Cache | None
) -> Int[Array, "B T"]:
    """The positions of these tokens, [B or 1, T]: as given, or counted from the first token in the cache."""
    if positions is not None:
        return positions
    start = 0 if cache is None else cache["index"]
    return start + jnp.arange(num_tokens, dtype=jnp.int32)[None]


def unit_heads(x: Float[Array, "B T N H"], eps: float) -> Float[Array, "B T N H"]:
    """Each head divided by its root mean square, computed in float32."""
    wide = x.astype(jnp.float32)
    rate = jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + eps)
    return (wide * rate).astype(x.dtype)


def positions_and_frequencies(
    mixer,
    num_tokens: int,
    positions: Int[Array, "B T"] | None,
    cache: Cache | None,
    segment_ids: Int[Array, "B T"] | None,
) -> tuple[Array, Array, Any]:
    """(positions [B or 1, T], inv_freq, attention scaling): how a mixer rotates these tokens, see rope.rotate.

    RoPE types that depend on the sequence length use the length of the text without a cache (excluding padding), as
    transformers does, and the fixed `rope_length` of the cache otherwise.
    """
    positions = positions_of(num_tokens, positions, cache)
    counted = positions if segment_ids is None else jnp.where(segment_ids != 0, positions, 0)
    rope_length = jnp.max(counted) + 1 if cache is None else cache["rope_length"]
    return positions, *mixer.rope.frequencies(mixer.head_dim, rope_length)


def _normed(mixer, x: Float[Array, "B T N H"], name: str) -> Float[Array, "B T N H"]:
    """Normalised queries or keys: per head, or over all heads together if qk_norm is "all_heads"."""
    if mixer.qk_norm not in (True, "all_heads"):
        raise UserError(
            f"qk_norm is {mixer.qk_norm!r}, expected False, True, 'all_heads' or 'l2': change qk_norm"
        )
    if mixer.qk_norm is True:
        return mixer.norm(mixer.head_dim, mixer.norm_eps, ("head_dim",), name=name)(x)
    flat = x.reshape(*x.shape[:2], -1)
    return mixer.norm(flat.shape[-1], mixer.norm_eps, name=name)(flat).reshape(x.shape)


def merged_heads(mixer, y: Float[Array, "B T N H"], hidden_size: int) -> Float[Array, "B T D"]:
    """Projects the heads' outputs back to the residual stream."""
    names = ("heads", "head_dim", "embed")
    return Linear((mixer.num_heads, mixer.head_dim), (hidden_size,), names, mixer.o_bias, name="o_proj")(y)
