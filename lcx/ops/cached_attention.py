"""Softmax attention of a few new tokens over a cache of keys and values, which is only read.

The scores against the cache and those among the new tokens share one maximum and one sum. No array of the size of the
cache is copied or written, so the cost per token is one read of the cache; on a CPU, of its filled part. (Writing the
new tokens into the cache first would give the same result, but a scan over layers would have to carry whole caches.)

Letters: B batch, T new tokens, S slots, N query heads, K key/value heads, G = N / K, H head dim, W width of a value.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from lcx.ops import dispatch
from lcx.ops.attention_tiles import NEG
from lcx.ops.decay import gaps
from lcx.ops.tiling import cut

# On a CPU a cache is read in chunks of about so many numbers, rows and heads together, so that a chunk of keys and one
# of values stay in the second-level cache. Measured in float32 with H = 64: 8 rows of 2 heads in chunks of 2048 slots
# take 1.4 us a slot, in chunks of 256 0.66 us; below 128 slots the loop itself costs more.
CHUNK_SIZE, LEAST_SLOTS = 1 << 17, 128


def cached_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K W"],
    *,
    cached_k: Float[Array, "*L B K S H"],
    cached_v: Float[Array, "*L B K S W"] | None,
    segment_ids: Int[Array, "B T"],
    cached_segment_ids: Int[Array, "B S"],
    length: Int[Array, ""],
    log_decay: Float[Array, "B T N"] | None = None,
    cached_log_decay: Float[Array, "B N S"] | None = None,
    window: int | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Float[Array, " N"] | None = None,
    layer: Int[Array, ""] | None = None,
    oldest: Int[Array, ""] | None = None,
) -> Float[Array, "B T N W"]:
    """ops.attention with the new tokens placed after the first `length` slots: outputs [B, T, N, W] in q's dtype.

    Memory: B N T (S + T) scores in float32; on a CPU, B N T (chunk + T), and only chunks that some token sees are read.

    Args:
      cached_k, cached_v: in any dtype; heads before slots, so that products read contiguous memory. cached_v None: the
        value of a cached token is the first W numbers of its key (latent attention).
      segment_ids, cached_segment_ids: tokens with id 0 (padding, empty slots) see nothing and are not seen.
      log_decay, cached_log_decay: of the new and of the cached tokens; both or neither. Values at padding are ignored.
      oldest: the slot of the oldest token, from which the others follow, around the end of the cache; None: slot 0.
        Matters with a window.
      layer: cached_k and cached_v have a leading axis of layers, of which this one is read, without copying it first.
    """
    B, T, N, H = q.shape
    K, S = cached_k.shape[-3], cached_k.shape[-2]
    wide = jnp.promote_types(q.dtype, jnp.float32)
    on_cpu = dispatch.platform() == "cpu"
    chunk = _chunk_slots(B * K * H)
    in_chunks = on_cpu and chunk < S and log_decay is None
    k, v = (jnp.swapaxes(x, 1, 2).astype(q.dtype) for x in (k, v))
    scale = H**-0.5 if scale is None else scale
    grouped = jnp.moveaxis((q * scale).reshape(B, T, K, N // K, H), 1, 3)  # [B, K, G, T, H]
    place = jnp.cumsum(segment_ids != 0, axis=1)  # of the new tokens, among themselves
    later = None  # how many tokens of the cache follow each of its slots
    if window is not None:
        real = cached_segment_ids != 0
        counted = jnp.cumsum(real if oldest is None else jnp.roll(real, -oldest, axis=1), axis=1)
        later = counted[:, -1:] - counted
        later = later if oldest is None else jnp.roll(later, oldest, axis=1)

    def seen(start: Array | int, size: int) -> Array:
        distance = None if later is None else place[:, :, None] + cut(later, start, size, 1)[:, None]
        filled = (start + jnp.arange(size) < length)[None, None, None, None]
        return _seen(segment_ids, cut(cached_segment_ids, start, size, 1), distance, window) & filled

    far = near = jnp.zeros((), wide)
    if log_decay is not None and cached_log_decay is not None:
        rate = jnp.where(segment_ids[..., None] != 0, log_decay.astype(wide), 0)
        cached_rate = jnp.where(cached_segment_ids[:, None] != 0, cached_log_decay.astype(wide), 0)
        gap = _gaps(jnp.swapaxes(rate, 1, 2), cached_rate)
        far, near = (x.reshape(*grouped.shape[:-1], x.shape[-1]) for x in gap)
    start = _Softmax.empty(
        grouped, v.shape[-1], softcap, None if sinks is None else sinks.astype(wide).reshape(1, K, -1, 1)
    )
    if in_chunks:
        state = _over_chunks(start, grouped, cached_k, cached_v, layer, seen, chunk)
    else:

        def whole(x: Array) -> Array:
            return (x if layer is None else x[layer]).astype(q.dtype)

        keys = whole(cached_k)
        values = keys[..., : v.shape[-1]] if cached_v is None else whole(cached_v)
        state = start.over(grouped, keys, values, seen(0, S), far)
    see = _seen(segment_ids, segment_ids, place[:, :, None] - place[:, None], window)
    state = state.over(grouped, k, v, see, near)
    y = state.y / jnp.where(state.total == 0, 1, state.total)[..., None]
    return jnp.moveaxis(y, 3, 1).reshape(B, T, N, -1).astype(q.dtype)


class _Softmax(NamedTuple):
    """A softmax over the slots seen so far: their largest score, and the sums of exp(score - top) and of that times v.

    Letters: [B, K, G, T], and y [B, K, G, T, W]; float32 or wider. `cap` is the soft cap of the scores, if any.
    """

    top: Array
    total: Array
    y: Array
    cap: Array | None = None

    @classmethod
    def empty(cls, q: Array, width: int, softcap: float | None, sinks: Array | None) -> "_Softmax":
        """The softmax over nothing, or over the heads' sinks [1, K, G, 1], which have no value."""
        y = jnp.zeros((*q.shape[:-1], width), jnp.promote_types(q.dtype, jnp.float32))
        zeros, cap = jnp.zeros_like(y[..., 0]), None if softcap is None else jnp.asarray(softcap, y.dtype)
        return cls(zeros + NEG, zeros, y, cap) if sinks is None else cls(zeros + sinks, zeros + 1, y, cap)

    def over(self, q: Array, k: Array, v: Array, see: Array, gap: Array | float = 0.0) -> "_Softmax":
        """The softmax over these slots too: k [B, K, S, H], v [B, K, S, W], mask [B, 1, 1, T, S], a term of scores."""
        product = functools.partial(jnp.einsum, preferred_element_type=self.y.dtype)
        scores = product("bkgth,bksh->bkgts", q, k)
        if self.cap is not None:
            scores = self.cap * jnp.tanh(scores / self.cap)
        scores = jnp.where(see, scores + gap, NEG)
        top = jnp.maximum(self.top, scores.max(-1))
        weights = jnp.where(see, jnp.exp(scores - top[..., None]), 0)
        before = jnp.exp(self.top - top)
        y = product("bkgts,bksh->bkgth", weights.astype(v.dtype), v)
        return _Softmax(top, self.total * before + weights.sum(-1), self.y * before[..., None] + y, self.cap)


def _chunk_slots(numbers: int) -> int:
    """The slots of a chunk, from how many numbers one slot has: a power of two."""
    return max(1 << (CHUNK_SIZE // numbers).bit_length() >> 1, LEAST_SLOTS)


def _over_chunks(
    state: _Softmax,
    q: Array,
    k: Array,
    v: Array | None,
    layer: Array | None,
    seen: Callable[..., Array],
    chunk: int,
) -> _Softmax:
    """The softmax over a cache, `chunk` slots at a time. Chunks that no token sees are skipped."""
    S = k.shape[-2]

    def read(x: Array, start: Array) -> Array:
        if layer is None:
            return cut(x, start, chunk, 2).astype(q.dtype)
        sizes = (*q.shape[:2], chunk, x.shape[-1])
        return jax.lax.dynamic_slice(x, (layer, 0, 0, start, 0), (1, *sizes))[0].astype(q.dtype)

    def step(state: _Softmax, number: Array) -> tuple[_Softmax, None]:
        start = jnp.minimum(number * chunk, S - chunk)  # the last chunk may overlap the one before it
        see = seen(start, chunk) & (start + jnp.arange(chunk) >= number * chunk)

        def over(state: _Softmax) -> _Softmax:
            keys = read(k, start)
            values = keys[..., : state.y.shape[-1]] if v is None else read(v, start)
            return state.over(q, keys, values, see)

        return jax.lax.cond(jnp.any(see), over, lambda state: state, state), None

    return jax.lax.scan(step, state, jnp.arange(-(-S // chunk)))[0]


def _seen(q_ids: Array, kv_ids: Array, distance: Array | None, window: int | None) -> Array:
    """The mask [B, 1, 1, T, S], from distances [B, T, S] between tokens that do not count padding.

    Distances may be None if all of them are positive and there is no window.
    """
    seen = (q_ids[:, :, None] == kv_ids[:, None, :]) & (q_ids[:, :, None] != 0)
    if distance is not None:
        seen &= distance >= 0
    if distance is not None and window is not None:
        seen &= distance < window
    return seen[:, None, None]


def _gaps(rate: Array, cached: Array) -> tuple[Array, Array]:
    """L_i - L_j of new tokens i: [B, N, T, S] to cached tokens j, [B, N, T, T] to new ones; at most 0 where visible."""
    since = jnp.cumsum(rate, axis=-1)[..., None]
    new = gaps(rate, jnp.arange(rate.shape[-1]))
    later = jnp.cumsum(cached[..., :0:-1], axis=-1)[..., ::-1]  # the sum over the slots after each slot
    to_end = jnp.pad(later, ((0, 0), (0, 0), (0, 1)))
    return since + to_end[:, :, None], new
