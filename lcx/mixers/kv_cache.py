"""The cache of keys and values of earlier tokens, a fixed number of slots filled in order.

A layer with a window needs only its last tokens. Its cache is a ring of `ring_slots` slots, unless the text is shorter:
token p is written to slot p modulo their number, in place of one that no later token sees.

Heads come before slots, so that decoding reads contiguous memory. On a mesh they are divided over `tensor`, and over
`context` as well if there are enough of them. A mixer only reads its cache and returns the entries
to add; the decoder, which holds the caches of all layers, appends them to all layers at once, in place.

Letters: B batch, T new tokens, N query heads, K key/value heads, H head dim.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from lcx import sharding
from lcx.ops import cache_gradients
from lcx.ops.cached_attention import cached_attention

Cache = dict[str, Array]
GRAIN = 32  # the slots of a ring are a multiple of this
FEW = 8  # up to this many new tokens, a single product over all slots is fastest


class LayerOf(NamedTuple):
    """The cache of one layer, as a view of the caches of all layers, stacked. Only what is indexed is copied."""

    stacked: Cache
    layer: Int[Array, ""]

    def __getitem__(self, name: Any) -> Any:
        return self.stacked[name][self.layer]

    def get(self, name: str) -> Any:
        return self[name] if name in self.stacked else None


def empty(
    batch_size: int, length: int, num_heads: int, head_dim: int, dtype: jnp.dtype, *, values: bool = True
) -> Cache:
    """A cache of `length` free slots. Unused slots have segment id 0, so no query sees them.

    Args:
      values: whether it holds values; without, the value of a token is a part of its key.
    """
    kv = (batch_size, num_heads, length, head_dim)
    return {
        **{name: jnp.zeros(kv, dtype) for name in ("k", "v")[: 1 + values]},
        "segment_ids": jnp.zeros((batch_size, length), jnp.int32),
        "index": jnp.zeros((), jnp.int32),
    }


def entries(k: Array, v: Array | None, segment_ids: Array | None, log_decay: Array | None = None) -> Cache:
    """The entries that T tokens add: k, v [B, T, K, H], segment_ids [B, T], log_decay [B, T, N].

    Args:
      v: None: the cache holds no values.
    """
    ids = jnp.ones((1, 1), jnp.int32) if segment_ids is None else segment_ids
    new = {"k": k, "segment_ids": jnp.broadcast_to(ids, k.shape[:2])} | ({} if v is None else {"v": v})
    return new if log_decay is None else {**new, "log_decay": log_decay}


def ring_slots(window: int) -> int:
    """The slots of the ring of a layer with this window."""
    return -(-window // GRAIN) * GRAIN


def append(cache: Cache, new: Cache, *, ring: bool = False) -> Cache:
    """The cache with these entries written to its next slots. Both may have a leading axis of layers."""
    start = cache["index"].reshape(-1)[0]  # the same for all layers
    if ring:
        return _append_to_ring(cache, new, start)
    written = {}
    for name, x in new.items():
        if name != "segment_ids":  # the cache has time after heads
            x = jnp.swapaxes(x, -3, -2) if name in ("k", "v") else jnp.swapaxes(x, -2, -1)
        axis = x.ndim - (2 if name in ("k", "v") else 1)
        slots, x = cache[name], _divided(name, x)
        written[name] = _divided(name, cache_gradients.write(slots, x.astype(slots.dtype), start, axis))
    return {**cache, **written, "index": cache["index"] + new["segment_ids"].shape[-1]}


def _append_to_ring(cache: Cache, new: Cache, index: Array) -> Cache:
    slots, T = cache["segment_ids"].shape[-1], new["segment_ids"].shape[-1]
    written = {}
    for name, x in new.items():
        axis = cache[name].ndim - (2 if name in ("k", "v") else 1)
        x = (jnp.swapaxes(x, -3, -2) if name in ("k", "v") else x).astype(cache[name].dtype)
        if T <= FEW:  # in place
            held = cache[name]
            for t in range(T):
                token = jax.lax.slice_in_dim(x, t, t + 1, axis=axis)
                held = jax.lax.dynamic_update_slice_in_dim(held, token, (index + t) % slots, axis)
        else:
            both = jnp.concatenate([jnp.roll(cache[name], -index, axis), x], axis)
            held = jnp.roll(jax.lax.slice_in_dim(both, T, T + slots, axis=axis), index + T, axis)
        written[name] = _divided(name, held)
    return {**cache, **written, "index": cache["index"] + T}


def _divided(name: str, slots: Array) -> Array:
    """Keys, values or decays [..., B, heads, S, ...] on the devices that hold their rows and heads.

    Said of new entries as well: their gradient is a slice of the cache's, which would be gathered to be cut otherwise.
    """
    axis = {"k": slots.ndim - 3, "v": slots.ndim - 3, "log_decay": slots.ndim - 2}.get(name)
    if axis is None:
        return slots
    places: list[Any] = [None] * slots.ndim
    places[axis - 1], places[axis] = sharding.BATCH_AXES, sharding.head_axes(slots.shape[axis])
    return sharding.constrain(slots, *places)


def _filled(cache: Any) -> Array:
    """The segment ids [B, S] of the slots filled so far; 0 for the others, whatever they hold (see lcx/pieces.py)."""
    ids = cache["segment_ids"]
    return jnp.where(jnp.arange(ids.shape[1]) < cache["index"], ids, 0)


def attend(
    cache: Any,
    q: Array,
    new: Cache,
    *,
    value_width: int | None = None,
    window: int | None = None,
    ring: bool = False,
    **options: Any,
) -> Array:
    """Attention outputs of at most FEW new tokens, [B, T, N, H], over a Cache or a LayerOf.

    Args:
      value_width: of a cache without values: how many numbers at the start of a key are its value.
      options: scale, softcap and sinks of `cached_attention`.
    """
    kv, layer = (cache.stacked, cache.layer) if isinstance(cache, LayerOf) else (cache, None)
    return cached_attention(
        q,
        new["k"],
        new["k"][..., :value_width] if "v" not in new else new["v"],
        cached_k=kv["k"],
        cached_v=kv.get("v"),
        layer=layer,
        segment_ids=new["segment_ids"],
        cached_segment_ids=_filled(cache),
        length=cache["index"],
        log_decay=new.get("log_decay"),
        cached_log_decay=cache.get("log_decay"),
        window=window,
        oldest=cache["index"] % kv["segment_ids"].shape[-1] if ring else None,
        **options,
    )


def arguments(
    cache: Cache, q: Array, new: Cache, *, window: int | None = None, ring: bool = False
) -> tuple[Array, Array, Array, dict[str, Array | None]]:
    """Arguments of ops.attention for many new tokens, time before heads: q, k, v, and the keyword arguments.

    v is k for a cache without values.
    """
    before = {**cache, "segment_ids": _filled(cache)}
    if ring:  # the ring from its oldest slot on, and room for the new tokens
        before = _unrolled(before, new["segment_ids"].shape[1])
    index = before["index"]
    kept = append(before, new)
    if window is not None:  # the operator counts the window in slots, so padding must not lie between tokens
        kept = _padding_first(kept, index, new["segment_ids"])
    k, v = (jnp.swapaxes(kept[name], 1, 2).astype(q.dtype) for name in ("k", "v" if "v" in kept else "k"))
    others: dict[str, Array | None] = {
        "q_segment_ids": new["segment_ids"],
        "kv_segment_ids": kept["segment_ids"],
        "q_offset": jnp.broadcast_to(index, q.shape[:1]),
    }
    if "log_decay" in kept:
        others["log_decay"] = jnp.swapaxes(kept["log_decay"], 1, 2)
    return q, k, v, others


def _unrolled(cache: Cache, room: int) -> Cache:
    """A ring in the order of its tokens, and `room` free slots after them."""
    found = {"index": jnp.full_like(cache["index"], cache["segment_ids"].shape[1])}
    for name in ("k", "v", "segment_ids"):
        axis = 2 if name != "segment_ids" else 1
        x = jnp.roll(cache[name], -cache["index"], axis)
        found[name] = jnp.pad(x, [(0, room if a == axis else 0) for a in range(x.ndim)])
    return {**cache, **found}


def _padding_first(kept: Cache, index: Array, new_ids: Array) -> Cache:
    """The slots with all padding before the first new token moved to the front of its row.

    New tokens keep their slots and the earlier ones become adjacent to them, so a window counted in slots covers the
    same tokens, however the earlier pieces were padded.
    """
    # The slot of the first new token that is not padding.
    before = index + jnp.argmax(new_ids != 0, axis=1, keepdims=True)
    slots = jnp.arange(kept["segment_ids"].shape[1])
    padding = (slots < before) & (kept["segment_ids"] == 0)
    order = jnp.argsort(~padding, axis=1, stable=True)

    def moved(name: str, x: Array) -> Array:
        if name in ("k", "v"):
            return jnp.take_along_axis(x, order[:, None, :, None], axis=2)
        return jnp.take_along_axis(x, order if name == "segment_ids" else order[:, None], axis=-1)

    return {name: x if x.ndim == 0 or name == "rope_length" else moved(name, x) for name, x in kept.items()}
