"""Softmax attention on a mesh, for the mixers that have nothing else in their island."""

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
    cached = q_offset is not None
    over = sharding.head_axes(k.shape[2]) if cached else ("tensor",)
    time = None if "context" in over else "time"
    per_head = Axes("rows", time, "heads")
    of_keys = Axes("rows", None, "heads") if cached else per_head
    q = q if time else sharding.by_token(q)
    arrays: dict[str, Any] = {"q": q, "k": k, "v": v, "segment_ids": segment_ids, "sinks": sinks}
    axes = {
        "q": per_head,
        "k": of_keys,
        "v": of_keys,
        "segment_ids": Axes("rows", time),
        "sinks": Axes("heads"),
    }
    if cached:
        arrays |= {"kv_segment_ids": kv_segment_ids, "q_offset": q_offset}
        axes |= {"kv_segment_ids": Axes("rows"), "q_offset": Axes("rows")}

    def run(arrays: dict[str, Any], mesh_axis: str | None = None) -> Array:
        heads, ids = [arrays[name] for name in "qkv"], arrays["segment_ids"]
        options: dict[str, Any] = {"window": window, "softcap": softcap, "sinks": arrays["sinks"]}
        options |= {"implementation": implementation, "q_segment_ids": ids}
        if not cached:
            options |= {"kv_segment_ids": ids, "mesh_axis": mesh_axis, "over_context": over_context}
            return attention(*heads, **options)
        q, *kv = heads

        def outputs(q: Array, ids: Array, start: Array | int) -> Array:
            masks = {"q_segment_ids": ids, "kv_segment_ids": arrays["kv_segment_ids"]}
            return attention(q, *kv, **options | masks, q_offset=arrays["q_offset"] + start)

        return outputs(q, ids, 0) if mesh_axis is None else balanced(outputs, q, ids, window, mesh_axis)

    y = sharding.island(run, arrays, axes, per_head, heads=over)
    return y if time else sharding.by_token(y)
