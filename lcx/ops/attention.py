"""Causal softmax attention with grouped heads, sliding windows, packed segments and decay, without T x T arrays.

Letters: B batch, T queries, S keys, N query heads, K key/value heads, G = N / K, H head dim, W width of a value. W is H
except in latent attention; kernels, which know one width, then get the narrower arrays filled up with zeros.

``reference``  the definition, in float32 with quadratic memory; the other forms are tested against it.
``xla``        one tile at a time, with its own backward pass (attention_tiles.py).
``cudnn``      NVIDIA's kernel; ``splash`` is JAX's kernel for TPUs (attention_vendors.py).
``triton``     our GPU kernel, for decay or packed rows; ``tpu`` is the one for TPUs (kernels_pallas/attention.py). Both
               treat a document that is interrupted by padding as two documents.

Masks. A query sees the keys of its own segment that are at or before its position and less than `window` tokens back.
Segment id 0 is padding: it sees nothing, and its output is 0. With a cache the T queries are part of the S keys, and
`q_offset` keys precede the first query. (For a few new tokens against a cache see cached_attention.py.)

A soft cap c turns each score s into c tanh(s / c) before the mask (Gemma 2, arXiv 2408.00118). A sink is a trained
score of each head that counts in its softmax and has no value: with weights exp(s_j) / (exp(sink) + sum exp(s_j)) a
head may attend to nothing (gpt-oss, arXiv 2508.10925).

Decay. With log_decay a and L its running sum over the keys, the weights are softmax(s_ij + L_i - L_j): the Forgetting
Transformer (arXiv 2503.02130), and 2Mamba-E (arXiv 2602.17363).
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from lcx.errors import UserError
from lcx.ops import attention_shards, attention_vendors, dispatch
from lcx.ops.attention_tiles import NEG, tiled
from lcx.ops.decay import gaps

PLATFORMS = {"triton": "gpu", "tpu": "tpu"}  # of our kernels


def attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K W"],
    *,
    log_decay: Float[Array, "B S N"] | None = None,
    q_segment_ids: Int[Array, "B T"] | None = None,
    kv_segment_ids: Int[Array, "B S"] | None = None,
    q_offset: Int[Array, " B"] | None = None,
    window: int | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Float[Array, " N"] | None = None,
    implementation: str | None = None,
    mesh_axis: str | None = None,
    over_context: str | None = None,
) -> Float[Array, "B T N W"]:
    """softmax(scale q k^T + decay + mask) v; scale defaults to H^-0.5. Result in q's dtype.

    Args:
      log_decay: one value per key's token, at most 0; -inf hides all earlier tokens. Values at padding are ignored.
        None: no decay.
      softcap, sinks: see above; None: neither.
      implementation: see dispatch.py; here "reference", "xla", "cudnn", "splash", "triton", "tpu", or None for the
        fastest valid one.
      mesh_axis: in a shard_map over this axis, the arguments are this device's part of the rows (shards.py); without
        q_offset, and with the same segment ids for queries and keys.
      over_context: how the parts see each other, a method of attention_shards.py; None: chosen by rule.

    Raises:
      UserError: an implementation that is unknown or does not support these arguments, or a number of query heads that
        is not a multiple of the number of key/value heads.
    """
    if q.shape[2] % k.shape[2]:
        raise UserError(
            f"{q.shape[2]} query heads over {k.shape[2]} kv heads: num_heads must be a multiple of num_kv_heads"
        )
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if mesh_axis is not None:
        settings: dict[str, Any] = {"scale": scale, "softcap": softcap, "implementation": implementation}
        attend = functools.partial(attention, **settings)
        places: dict[str, Any] = {"window": window, "method": over_context}
        arrays = q, k, v, log_decay, q_segment_ids, sinks
        return attention_shards.attention(attend, *arrays, **settings, **places, mesh_axis=mesh_axis)
    width, widest = v.shape[-1], max(q.shape[-1], v.shape[-1])
    filled = _filled_up(q, widest), _filled_up(k, widest), _filled_up(v, widest)
    has: dict[str, Any] = {"cached": q_offset is not None, "decays": log_decay is not None}
    has["more"] = "a soft cap of scores" if softcap is not None else "attention sinks" if sinks is not None else None
    obstacles = {
        "cudnn": attention_vendors.cudnn_obstacle(*filled[:2], segmented=q_segment_ids is not None, **has),
        "splash": attention_vendors.splash_obstacle(*filled[:2], window=window, **has),
        **_kernel_obstacles(*filled, window, cached=has["cached"], more=has["more"]),
        "xla": None,
        "reference": None,
    }
    name = dispatch.choose("attention", implementation, obstacles)
    if name == "cudnn":
        return attention_vendors.cudnn(*filled, window=window, scale=scale)[..., :width]
    if name == "splash":
        return attention_vendors.splash(*filled, q_segment_ids, window=window, scale=scale)[..., :width]
    if name in PLATFORMS:
        return _kernel(*filled, log_decay, q_segment_ids, scale=scale, platform=PLATFORMS[name])[..., :width]
    if log_decay is not None and kv_segment_ids is not None:
        log_decay = jnp.where(kv_segment_ids[:, :, None] != 0, log_decay, 0)
    more: dict[str, Any] = {"scale": scale, "softcap": softcap, "sinks": sinks}
    segments = q_segment_ids, kv_segment_ids
    if name == "xla":
        return tiled(q, k, v, *segments, q_offset, log_decay, window=window, **more)[0]
    offset = jnp.full(q.shape[:1], k.shape[1] - q.shape[1]) if q_offset is None else q_offset
    mask = _mask(*segments, offset, window, q.shape[1], k.shape[1])
    between = None
    if log_decay is not None:
        rates = jnp.moveaxis(log_decay.astype(jnp.float32), 1, 2)
        between = gaps(rates, offset[:, None, None] + jnp.arange(q.shape[1]))
    return reference(q, k, v, mask, between, **more)


def _filled_up(x: Array, width: int) -> Array:
    """Heads [B, T, N, H] filled up with zeros to this width, which changes no score and no sum of values."""
    missing = width - x.shape[-1]
    return jnp.pad(x, ((0, 0), (0, 0), (0, 0), (0, missing))) if missing else x


def _kernel_obstacles(q, k, v, window, *, cached: bool, more: str | None) -> dict[str, str | None]:
    def of(platform: str) -> str | None:
        if missing := dispatch.kernels(platform):
            return missing
        from kernels_pallas.attention import obstacle

        if window is not None or cached:
            return "a window or a cache is not covered"
        if more is not None:
            return f"{more}: not covered"
        return obstacle(q, k, v, platform=platform)

    return {name: of(platform) for name, platform in PLATFORMS.items()}


def _kernel(q, k, v, log_decay, ids, *, scale: float, platform: str) -> Array:
    from kernels_pallas.attention import attention as kernel

    if ids is None:
        return kernel(q, k, v, log_decay=log_decay, scale=scale, platform=platform)
    real = (ids != 0)[:, :, None]
    # Padding gets its own index. A zero key adds nothing to a linear state, but it would count in a softmax.
    runs = jnp.cumsum(ids != jnp.pad(ids[:, :-1], ((0, 0), (1, 0))), axis=1, dtype=jnp.int32)
    decay = None if log_decay is None else jnp.where(real, log_decay, 0)
    y = kernel(q, k, v, log_decay=decay, runs=runs, scale=scale, platform=platform)
    return jnp.where(real[..., None], y, 0)


def _mask(q_segments, kv_segments, offset, window, T, S) -> Array:
    """Boolean [B, T, S]: whether query t sees key s."""
    distance = (offset[:, None] + jnp.arange(T))[:, :, None] - jnp.arange(S)
    seen = distance >= 0
    if window is not None:
        seen &= distance < window
    if q_segments is not None:
        seen &= (q_segments[:, :, None] == kv_segments[:, None, :]) & (q_segments[:, :, None] != 0)
    return seen


def reference(
    q: Array,
    k: Array,
    v: Array,
    mask: Array,
    between: Array | None = None,
    *,
    scale: float,
    softcap: float | None = None,
    sinks: Array | None = None,
) -> Array:
    """The definition, in float32. A query that sees no key gives 0."""
    B, T, N, H = q.shape
    K = k.shape[2]
    grouped = q.reshape(B, T, K, N // K, H).astype(jnp.float32) * scale
    scores = jnp.einsum("btkgh,bskh->bkgts", grouped, k.astype(jnp.float32))
    if softcap is not None:
        scores = softcap * jnp.tanh(scores / softcap)
    if between is not None:
        scores += between.reshape(scores.shape)
    mask = mask[:, None, None]
    scores = jnp.where(mask, scores, NEG)
    if sinks is not None:
        own = sinks.astype(jnp.float32).reshape(1, K, N // K, 1, 1)
        scores = jnp.concatenate([scores, jnp.broadcast_to(own, (*scores.shape[:-1], 1))], axis=-1)
    weights = jax.nn.softmax(scores, axis=-1)[..., : k.shape[1]] * mask
    out = jnp.einsum("bkgts,bskh->btkgh", weights, v.astype(jnp.float32))
    return out.reshape(B, T, N, -1).astype(q.dtype)
