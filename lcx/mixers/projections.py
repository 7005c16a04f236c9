"""Projections that mixers with heads share: into rotated queries, keys and values, and back to the residual stream."""

from collections.abc import Callable

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from lcx import rope as rope_lib
from lcx.layers import Linear, RMSNorm
from lcx.mixers.kv_cache import Cache


def rotated_heads(
    mixer,
    x: Float[Array, "B T D"],
    positions: Int[Array, "B T"] | None,
    cache: Cache | None,
    rotate: Callable[..., Array] = rope_lib.rotate,
    *,
    segment_ids: Int[Array, "B T"] | None = None,
) -> tuple[Float[Array, "B T N H"], Float[Array, "B T K H"], Float[Array, "B T K H"]]:
    """Queries, keys and values of a mixer with Attention's settings, inside its compact __call__.

    Without a cache the rotation sees the length that is there, as in transformers (padding does not count); a cache
    fixes it in advance. With rope None nothing is rotated.
    """
    heads = {"q": ("heads", mixer.num_heads), "k": ("kv_heads", mixer.num_kv_heads)}
    q, k, v = (
        Linear(
            (x.shape[-1],),
            (number, mixer.head_dim),
            ("embed", axis, "head_dim"),
            mixer.qkv_bias,
            name=f"{name}_proj",
        )(x)
        for name, (axis, number) in (*heads.items(), ("v", heads["k"]))
    )
    if mixer.qk_norm:
        q = RMSNorm(mixer.head_dim, mixer.norm_eps, ("head_dim",), name="q_norm")(q)
        k = RMSNorm(mixer.head_dim, mixer.norm_eps, ("head_dim",), name="k_norm")(k)
    if mixer.rope is None:
        return q, k, v
    if positions is None:
        start = 0 if cache is None else cache["index"]
        positions = start + jnp.arange(x.shape[1], dtype=jnp.int32)[None]
    counted = positions if segment_ids is None else jnp.where(segment_ids != 0, positions, 0)
    rope_length = jnp.max(counted) + 1 if cache is None else cache["rope_length"]
    frequencies = mixer.rope.frequencies(mixer.head_dim, rope_length)
    q, k = (rotate(heads, positions, *frequencies) for heads in (q, k))
    return q, k, v


def merged_heads(mixer, y: Float[Array, "B T N H"], hidden_size: int) -> Float[Array, "B T D"]:
    """The heads' outputs back in the residual stream."""
    names = ("heads", "head_dim", "embed")
    return Linear((mixer.num_heads, mixer.head_dim), (hidden_size,), names, mixer.o_bias, name="o_proj")(y)
