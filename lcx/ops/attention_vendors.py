"""Softmax attention by the kernels that come with JAX: cuDNN's on NVIDIA GPUs, splash attention on TPUs.

For unsupported arguments each reports the reason (an obstacle), and ops/attention.py tries the next form.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from lcx.ops import MIXER_RESIDUALS, dispatch

LANES = 128  # lanes of a TPU vector register
BLOCK = 512  # queries, and keys, per block: fits VMEM forward and backward up to H = 256
WIDE = 512  # bytes of a head up to which twice as many fit
TABLE = 3 << 18  # bytes of a TPU's 1 MiB of scalar memory for splash attention's table of blocks


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


def splash_obstacle(
    q: Array, k: Array, *, window: int | None, cached: bool, decays: bool, more: str | None = None
) -> str | None:
    if missing := dispatch.on("tpu"):
        return missing
    if q.dtype not in (jnp.bfloat16, jnp.float32):
        return f"splash attention takes bfloat16 and float32, found {q.dtype}"
    if _block(q, window) is None:
        return f"splash attention's table of blocks for {q.shape[1]} tokens is larger than a TPU's scalar memory"
    return _common(q, k, cached=cached, decays=decays, more=more)


def _block(q: Array, window: int | None) -> int | None:
    """Queries, and keys, per block of splash attention for q [B, T, N, H]; None if no table fits scalar memory.

    The table has three bytes for each block of queries and each block of keys that one of them may see: the block to
    read next, and whether it needs a mask.
    """
    T, width = q.shape[1], q.shape[3] * q.dtype.itemsize
    for block in (BLOCK, 2 * BLOCK) if width <= WIDE else (BLOCK,):
        blocks = -(-T // block)
        seen = blocks if window is None else min(blocks, -(-(window - 1) // block) + 1)
        if 3 * blocks * seen <= TABLE:
            return min(block, -(-T // LANES) * LANES)
    return None


def _mask(T: int, window: int | None) -> Any:
    """The causal mask of splash attention, or that of a window.

    JAX looks at every block when a kernel is made. Its masks compare all positions of each, which takes minutes for
    long rows; the corners tell whether a block is seen as a whole or not at all.
    """
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    base: Any = masks.CausalMask if window is None else masks.LocalMask
    answers = {seen: np.full((1, 1), seen) for seen in (True, False)}  # only any() and all() of a block are asked for

    class Corners(base):
        def __getitem__(self, index: tuple[slice, slice]) -> np.ndarray:
            (first, end, _), (first_key, end_key, _) = (part.indices(T) for part in index)
            nearest, furthest = first - (end_key - 1), end - 1 - first_key
            if nearest >= 0 and (window is None or furthest < window):
                return answers[True]
            if furthest < 0 or (window is not None and nearest >= window):
                return answers[False]
            return super().__getitem__(index)

        __hash__ = base.__hash__

    return Corners((T, T)) if window is None else Corners((T, T), (window - 1, 0), 0)


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
    block = _block(q, window) or BLOCK
    ids = jnp.ones((B, T), jnp.int32) if segment_ids is None else segment_ids
    pad = (0, -T % block)  # at the end, where the causal mask hides it
    padded_ids = jnp.pad(ids, ((0, 0), pad))
    heads_first = (jnp.pad(jnp.moveaxis(x, 1, 2), ((0, 0), (0, 0), pad, (0, 0))) for x in (q * scale, k, v))
    length = padded_ids.shape[1]
    read, computed = ("q", "kv", "q_dkv", "kv_dkv", "q_dq", "kv_dq"), ("kv_compute", "kv_dkv_compute")
    sizes: Any = {f"block_{name}": block for name in read}
    sizes |= {f"block_{name}": min(block, BLOCK) for name in computed}
    kernel = kernels.make_splash_mha_single_device(
        mask=masks.MultiHeadMask([_mask(length, window)] * N),
        block_sizes=kernels.BlockSizes(**sizes),
        residual_checkpoint_name=MIXER_RESIDUALS,
        interpret=interpret,
    )
    if segment_ids is None:
        out = jax.vmap(kernel)(*heads_first)
    else:
        out = jax.vmap(kernel)(*heads_first, kernels.SegmentIds(padded_ids, padded_ids))
    return jnp.where((ids != 0)[:, :, None, None], jnp.moveaxis(out, 2, 1)[:, :T], 0)
