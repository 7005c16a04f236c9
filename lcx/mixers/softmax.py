"""Softmax attention on a mesh, for the mixers that have nothing else in their island."""

import functools
from collections.abc import Callable
from typing import Any

from jax.sharding import PartitionSpec as Axes
from jaxtyping import Array, Float

from lcx import sharding
from lcx.ops.attention import attention
from lcx.ops.attention_shards import balanced


def softmax_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K W"],
    *,
    segment_ids: Array | None,
    kv_segment_ids: Array | None = None,
    q_offset: Array | None = None,
    sinks: Float[Array, " N"] | None = None,
    window: int | None = None,
    softcap: float | None = None,
    implementation: str | None = None,
    over_context: str | None = None,
) -> Float[Array, "B T N W"]:
    """ops.attention on each device's own rows, heads and queries.

    Without a cache T is split over `context` by one of the methods of ops/attention_shards.py. With one (q_offset),
    every device of `context` holds some of the heads for the whole text: queries, new keys and values are sent there
    and the outputs back (all-to-all, by the compiler). If `context` does not divide the kv heads, the queries are split
    along T instead, in blocks that leave all devices equal work, and every device holds all keys and values, of which
    the compiler gathers the new ones.

    Args:
      segment_ids: those of the queries.
      kv_segment_ids, q_offset: with a cache: see ops.attention.
      sinks, window, softcap, implementation: see ops.attention.
      over_context: the method; None: chosen by rule.
    """
    if q_offset is None:
        options = {"window": window, "softcap": softcap, "implementation": implementation}
        return _of_rows(q, k, v, segment_ids, sinks, over_context, options)
    arrays = {"k": k, "v": v, "sinks": sinks, "kv_segment_ids": kv_segment_ids, "q_offset": q_offset}
    heads = Axes("rows", None, "heads")
    axes = {"k": heads, "v": heads, "sinks": Axes("heads")}
    axes |= dict.fromkeys(("kv_segment_ids", "q_offset"), Axes("rows"))

    def attend(q: Array, ids: Array, start: Array | int, arrays: dict[str, Any]) -> Array:
        k, v, sinks, kv_ids, offset = (arrays[name] for name in axes)
        masks = {"q_segment_ids": ids, "kv_segment_ids": kv_ids, "q_offset": offset + start}
        how = {"window": window, "softcap": softcap, "sinks": sinks, "implementation": implementation}
        return attention(q, k, v, **masks, **how)

    return attention_to_cache(attend, q, segment_ids, arrays, axes, heads=k.shape[2], window=window)


def attention_to_cache(
    attend: Callable[..., Array],
    q: Float[Array, "B T N H"],
    segment_ids: Array | None,
    arrays: dict[str, Any],
    axes: dict[str, Axes],
    *,
    heads: int,
    window: int | None = None,
) -> Float[Array, "B T N W"]:
    """Attention of new tokens to a cache on each device's own rows and heads, or rows and queries (softmax_attention).

    Args:
      attend: attend(queries, their segment ids, how many new tokens come before them, arrays=arrays) -> outputs.
      arrays: what else it reads, none of it divided along T; axes: theirs, as sharding.island takes them.
      heads: of the keys that a device needs for its queries.
      window: see ops.attention.
    """
    over = sharding.head_axes(heads)
    time = None if "context" in over else "time"
    q = q if time else sharding.by_token(q)
    arrays = arrays | {"q": q, "segment_ids": segment_ids}
    axes = axes | {"q": Axes("rows", time, "heads"), "segment_ids": Axes("rows", time)}

    def run(arrays: dict[str, Any], mesh_axis: str | None = None) -> Array:
        q, ids = arrays["q"], arrays["segment_ids"]
        if mesh_axis is None:
            return attend(q, ids, 0, arrays=arrays)
        return balanced(functools.partial(attend, arrays=arrays), q, ids, window, mesh_axis)

    y = sharding.island(run, arrays, axes, axes["q"], heads=over)
    return y if time else sharding.by_token(y)


def _of_rows(
    q: Array,
    k: Array,
    v: Array,
    segment_ids: Array | None,
    sinks: Array | None,
    over_context: str | None,
    options: dict[str, Any],
) -> Array:
    """softmax_attention without a cache; options: window, softcap and implementation."""
    per_head, ids = Axes("rows", "time", "heads"), Axes("rows", "time")
    arrays = {"q": q, "k": k, "v": v, "segment_ids": segment_ids, "sinks": sinks}
    axes = {"q": per_head, "k": per_head, "v": per_head, "segment_ids": ids, "sinks": Axes("heads")}

    def run(arrays: dict[str, Any], mesh_axis: str | None = None) -> Array:
        q, k, v, ids, sinks = (arrays[name] for name in axes)
        masks: dict[str, Any] = {"q_segment_ids": ids, "kv_segment_ids": ids, "sinks": sinks}
        return attention(q, k, v, **masks, **options, mesh_axis=mesh_axis, over_context=over_context)

    return sharding.island(run, arrays, axes, per_head)
