"""Causal softmax attention with a decay (Forgetting Transformer, arXiv 2503.02130; 2Mamba-E, arXiv 2602.17363).

    p_ij = softmax_j(scale q_i.k_j + L_i - L_j) for j <= i, L the running sum of log_decay;   y_i = sum_j p_ij v_j

The tiles of flash attention (Dao 2023, arXiv 2307.08691): running maximum and sum forward, scores recomputed backward.
The decay costs one addition per score. Of the three parts of L_i - L_j in `kernels_pallas.tiles`, the column and the
scalar of the pair of chunks are added to the scores as one row. The row part is folded into the running maximum once,
after the chunks off the diagonal (backward: into the saved logsumexp). Only the diagonal tile computes l_i - l_j.
Exponents are in base 2, with log2(e) folded into scale and decay.

**Skipping** (as in adaptive computation pruning, arXiv 2504.06949). No score in a head exceeds U = scale max|q| max|k|,
and a token's score with itself is at least -U. So a key whose decay is below e^-(30 + 2 U) weighs less than e^-30 of
the token itself, and the bound on the first visible chunk holds for all scores.

**Backward**, D_i = dy_i.y_i with y in float32:

    ds_ij = p_ij (dy_i.v_j - D_i)
    dq_i = scale sum_j ds_ij k_j,   dk_j = scale sum_i ds_ij q_i,   dv_j = sum_i p_ij dy_i

and log_decay's gradient at t is the sum of ds_ij over i >= t > j, from row and column sums of the unrounded ds
(second_order_attention.py says why). Both leave out ds_ii: of a token that attends to hardly anything else it is a
rounding error, of p_ii near 1 times the difference of two equal numbers, and not the same one in both passes.

Data placement, bytes and FLOPs are those of second_order_attention.py (but no folded keys: 8 H bytes forward). In
addition to the products each score costs a multiply-add, a maximum, a subtraction, an exp2, a rounding and a sum.
"""

import functools

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from kernels_pallas import attention_gpu, attention_tpu
from kernels_pallas.attention_plan import LOG2E, NEVER, TILES, Bias, Cotangent, Options
from kernels_pallas.tiles import (
    FORGOTTEN,
    GONE,
    RESIDUALS,
    Reach,
    Tiles,
    chunked,
    fitting,
    later_sums,
    over_groups,
    padded,
)


def obstacle(q: Array, k: Array, v: Array, *, platform: str) -> str | None:
    """Why these kernels do not support the arrays, or None. Anything with a shape and a dtype serves as an array."""
    H = q.shape[-1]
    if q.shape[1] != k.shape[1]:
        return f"as many queries as keys, found {q.shape[1]} and {k.shape[1]}: the tiles know no cache"
    if not q.dtype == k.dtype == v.dtype or q.dtype not in (jnp.bfloat16, jnp.float32):
        return f"q, k and v must all be bfloat16 or all float32, found {q.dtype}, {k.dtype} and {v.dtype}"
    widest = max(head_sizes(q.dtype, platform))
    if v.shape[-1] != H or widest < H:
        return (
            f"head sizes {H} and {v.shape[-1]} in {q.dtype}: the tiles are made for equal ones up to {widest}"
        )
    return None


def head_sizes(dtype, platform: str) -> list[int]:
    """The head sizes for which there are tiles; other sizes are padded to the next larger one."""
    kind = platform, jnp.dtype(dtype).itemsize
    return sorted(H for *where, H in TILES if tuple(where) == kind)


def attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    *,
    log_decay: Float[Array, "B T N"] | None = None,
    runs: Int[Array, "B T"] | None = None,
    scale: float | None = None,
    platform: str,
    interpret: bool = False,
    tiles: Tiles | None = None,
) -> Float[Array, "B T N H"]:
    """y in q's dtype, with gradients for q, k, v and log_decay. Query head n reads kv head n K / N.

    Args:
      log_decay: at most 0. Values so low that no earlier token can weigh e^-30 of a token itself, whatever the scores,
        are clamped. None: no decay.
      runs: the index of each token's document, non-decreasing along T. None: one document.
      scale: factor on q.k, H^-0.5 by default.
      tiles: replaces the entry of `attention_plan.TILES`.
    """
    T, H = q.shape[1], q.shape[3]
    size = next(size for size in head_sizes(q.dtype, platform) if size >= H)
    q, k, v = (jnp.pad(x, ((0, 0), (0, 0), (0, 0), (0, size - H))) for x in (q, k, v))
    options = Options(
        scale=H**-0.5 if scale is None else scale,
        platform=platform,
        interpret=interpret,
        tiles=tiles or fitting(TILES[platform, q.dtype.itemsize, size], T),
    )
    lowest = -forgotten(jax.lax.stop_gradient(q), jax.lax.stop_gradient(k), options.scale)[:, None]
    lowest = jnp.minimum(lowest, GONE)
    return _attention(*padded(q, k, v, log_decay, runs, options.tiles, lowest), options)[:, :T, :, :H]


def forgotten(q: Array, k: Array, scale: float) -> Float[Array, "B N"]:
    """The -log of the decay beyond which a key weighs less than e^-30 of the token itself, whatever the scores."""

    def longest(x):  # [B, heads]
        return jnp.sqrt(jnp.max(jnp.sum(jnp.square(x.astype(jnp.float32)), axis=-1), axis=1))

    most = abs(scale) * longest(q) * jnp.repeat(longest(k), q.shape[2] // k.shape[2], axis=1)
    return FORGOTTEN + 2 * most


def bias(q, k, log_decay, runs, options: Options, C: int) -> tuple[Bias | None, Reach]:
    """The bias and the reach for chunks of C, from log_decay [B, N, T]. No bias without decay and documents."""
    B, T, N, _ = q.shape
    chunks, reach = chunked(log_decay, runs, (B, N, T), C, forgotten(q, k, options.scale)[..., None])
    if chunks is None:
        return None, reach
    column, row = chunks.rest * LOG2E, chunks.local * LOG2E
    if chunks.leaves is not None and chunks.enters is not None:
        column, row = jnp.where(chunks.leaves, column, NEVER), jnp.where(chunks.enters, row, NEVER)
    column, row = column.reshape(B, N, T), row.reshape(B, N, T)
    return Bias(column, row, chunks.parts, chunks.total * LOG2E), reach


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def _attention(q, k, v, log_decay, runs, options: Options):
    return _forward(q, k, v, log_decay, runs, options, q.dtype)[0]


def _kernels(platform: str):
    return attention_gpu if platform == "gpu" else attention_tpu


def _forward(q, k, v, log_decay, runs, options: Options, dtype):
    tile = options.tiles.forward
    biases, reach = bias(q, k, log_decay, runs, options, tile.held)
    return _kernels(options.platform).forward(q, k, v, biases, reach, runs, options, tile, dtype)


def _forward_saving(q, k, v, log_decay, runs, options: Options):
    y, lse = _forward(q, k, v, log_decay, runs, options, jnp.float32)
    y, lse = checkpoint_name(y, RESIDUALS), checkpoint_name(lse, RESIDUALS)
    return y.astype(q.dtype), (q, k, v, log_decay, runs, y, lse)


def _backward(options: Options, residuals, dy):
    q, k, v, log_decay, runs, y, lse = residuals
    kernels, tiles = _kernels(options.platform), options.tiles
    biases, reach = bias(q, k, log_decay, runs, options, tiles.dq.held)
    mean = jnp.swapaxes(jnp.sum(dy.astype(jnp.float32) * y, axis=-1), 1, 2)
    cotangent = Cotangent(dy, mean, lse, lse if biases is None else lse - biases.row)
    dq, row = kernels.backward_dq(q, k, v, cotangent, biases, reach, runs, options, tiles.dq)
    dk, dv, column = kernels.backward_dkv(q, k, v, cotangent, biases, reach, runs, options, tiles.dkv)
    dk, dv = over_groups(dk, k.shape[2]), over_groups(dv, k.shape[2])
    if log_decay is None:
        return dq, dk, dv, None, None
    return dq, dk, dv, later_sums(row - column, runs), None


_attention.defvjp(_forward_saving, _backward)
