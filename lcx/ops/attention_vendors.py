"""Softmax attention by the kernels that come with JAX: cuDNN's on NVIDIA GPUs, splash attention on TPUs.

For unsupported arguments each reports the reason (an obstacle), and ops/attention.py tries the next form.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from lcx.ops import MIXER_RESIDUALS, dispatch

LANES = 128  # lanes of a TPU vector register
BLOCK = 512  # queries, and keys, per block: fits VMEM forward and backward up to H = 256


def _common(q: Array, k: Array, *, cached: bool, decays: bool, more: str | None) -> str | None:
    if cached or q.shape[1] != k.shape[1]:
        return "queries against a cache of keys are not covered"
    if more is not None:
        return f"{more}: not covered"
    return "log_decay is not covered" if decays else None


def cudnn_obstacle(
    q: Array, k: Array, *, segmented: bool, cached: bool, decays: bool, more: str | None = None
) -> str | None:
    if missing := dispatch.on("gpu"):
        return missing
    if q.dtype not in (jnp.bfloat16, jnp.float16):
        return f"cuDNN takes bfloat16 and float16, found {q.dtype}"
    if q.shape[-1] % 8 or q.shape[-1] > 128:
        return f"cuDNN takes head sizes that are multiples of 8 up to 128, found {q.shape[-1]}"
    if segmented:  # cuDNN would need a T x T bias
        return "packed segments are not covered"
    return _common(q, k, cached=cached, decays=decays, more=more)


def cudnn(q: Array, k: Array, v: Array, *, window: int | None, scale: float) -> Array:
    """Causal attention by cuDNN: q [B, T, N, H], k and v [B, T, K, H] -> [B, T, N, H]."""
    span = None if window is None else (window - 1, 0)
    return jax.nn.dot_product_attention(
        q, k, v, scale=scale, is_causal=True, local_window_size=span, implementation="cudnn"
    )


def splash_obstacle(q: Array, k: Array, *, cached: bool, decays: bool, more: str | None = None) -> str | None:
    if missing := dispatch.on("tpu"):
        return missing
    if q.dtype not in (jnp.bfloat16, jnp.float32):
        return f"splash attention takes bfloat16 and float32, found {q.dtype}"
    return _common(q, k, cached=cached, decays=decays, more=more)


def splash(
    q: Array,
    k: Array,
    v: Array,
    segment_ids: Array | None,
    *,
    window: int | None,
    scale: float,
    interpret: bool = False,
) -> Array:
    """Causal splash attention: q [B, T, N, H], k and v [B, T, K, H], segment_ids [B, T]. Padding gives 0."""
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    B, T, N, _ = q.shape
    block = min(BLOCK, -(-T // LANES) * LANES)
    ids = jnp.ones((B, T), jnp.int32) if segment_ids is None else segment_ids
    pad = (0, -T % block)  # at the end, where the causal mask hides it
    padded_ids = jnp.pad(ids, ((0, 0), pad))
    heads_first = (jnp.pad(jnp.moveaxis(x, 1, 2), ((0, 0), (0, 0), pad, (0, 0))) for x in (q * scale, k, v))
    length = padded_ids.shape[1]
    mask: masks.Mask
    if window is None:
        mask = masks.CausalMask((length, length))
    else:
        mask = masks.LocalMask((length, length), (window - 1, 0), 0)
    names = ("q", "kv", "kv_compute", "q_dkv", "kv_dkv", "kv_dkv_compute", "q_dq", "kv_dq")
    sizes: Any = {f"block_{name}": block for name in names}
    kernel = kernels.make_splash_mha_single_device(
        mask=masks.MultiHeadMask([mask] * N),
        block_sizes=kernels.BlockSizes(**sizes),
        residual_checkpoint_name=MIXER_RESIDUALS,
        interpret=interpret,
    )
    if segment_ids is None:
        out = jax.vmap(kernel)(*heads_first)
    else:
        out = jax.vmap(kernel)(*heads_first, kernels.SegmentIds(padded_ids, padded_ids))
    return jnp.where((ids != 0)[:, :, None, None], jnp.moveaxis(out, 2, 1)[:, :T], 0)
