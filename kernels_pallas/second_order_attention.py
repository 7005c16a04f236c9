"""Second-order attention with decay in quadratic tiles (2Mamba, arXiv 2602.17363; power attention, arXiv 2507.04239).

    w_ij = (scale q_i.k_j)^2 e^{L_i - L_j} for j <= i, L the running sum of log_decay;
    y_i = sum_j w_ij v_j / sum_j w_ij

Weights are never negative and the decay only shrinks them, so plain float32 sums and one division suffice: no running
maximum, and no rescaling of accumulators.

**No exponential off the diagonal.** T is cut into chunks of C tokens. With l the running sum of log_decay inside a
chunk and tot its end, token i of chunk I sees token j of an earlier chunk J through

    e^{L_i - L_j} = e^{l_i}  *  prod of e^{tot} over the chunks between J and I  *  e^{tot_J - l_j}
                    row            one scalar per pair of chunks                    column

The column is folded into the keys once (as its root, for the score is squared), the row is applied to the finished
sum, and the scalar is a running product while tiles are visited outwards from the diagonal. Each of these is at most
1, and sums never leave a chunk, so nothing overflows or cancels at any T. Only the tile on the diagonal evaluates
exp.

**Documents** are separable in the same way: a pair in two chunks shares a document only if it is the last one of chunk
J and the first one of chunk I. So tokens of other documents get a column or row factor of 0, and only the diagonal tile
compares documents.

**Skipping.** The chunks that a chunk of queries sees begin at `first`, an integer from the totals: a decay below
e^-30 (1e-13) counts as 0, and so does another document. On GPU it bounds the loop, on TPU the grid and the index maps
(a step past the bound fetches nothing). The cost is then linear in T once the decay forgets.

**Backward** (Dao 2023, arXiv 2307.08691, with the square's derivative), two passes, scores recomputed:

    g_i = dy_i / den_i,  D_i = dy_i.y_i / den_i,  ds_ij = 2 s_ij e^{L_i - L_j} (g_i.v_j - D_i)        (s_ij = q_i.k_j)
    dq_i = sum_j ds_ij k_j,   dk_j = sum_i ds_ij q_i,   dv_j = sum_i w_ij g_i

Row factors go into g and D, column factors sit in the folded keys: off the diagonal the backward tiles have no
factors but the scalar either. The gradient of log_decay at t is the sum of w_ij dw_ij over i >= t > j, the pairs
that token t's decay affects. It is the sum from t on of (row sums - column sums), which the two passes accumulate
alongside their products, in float32 and before rounding, so that all other pairs cancel to the last digits. What a
token adds to itself would be in both of its sums, and can be most of either: it is left out of them. (With the
normaliser, row sums are 0 in exact arithmetic and column sums alone would suffice, but the rounding errors of all later
documents would then remain in the sum: in bfloat16 the error is four times larger.) For such cancellations, including
that in dy.v - dy.y, y is kept in float32 and the sum of weights uses the weights as rounded for the product with v: a
row that sees a single key then has D = g.v exactly.

Data placement. Forward: a program (GPU) or a grid row (TPU) holds C queries and their sums, and streams keys and
values. dq: the same. dk, dv: it holds C keys and streams queries and g. Query heads that share keys read the same ones;
their dk and dv are written separately and added by XLA.

Cost for a token and head, bf16, without skipping: 2 T H FLOPs forward (two products over the lower triangle), 7 T H
backward: 0.70 ms and 2.4 ms at B T N H = 2 x 8192 x 16 x 128 for 790 TFLOP/s. HBM: 14 H bytes forward (k folded, then
q, k, the folded k, v and y once each; 10 H without decay), everything else comes from L2 or VMEM: bound by the matrix
units from T of about 1300. A streamed tile does C FLOPs for each byte on its way to the registers. Apart from the
products, each score costs four float32 operations (square, scalar, rounding, sum), and no exp. Kept for the backward
pass: y in float32 and the sums, 4 H + 4 bytes.
"""

import functools

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from kernels_pallas import second_order_attention_gpu, second_order_attention_tpu
from kernels_pallas.second_order_attention_plan import FLOOR, TILES, Cotangent, Fold, Options
from kernels_pallas.tiles import (
    FORGOTTEN,
    RESIDUALS,
    Reach,
    Tiles,
    chunked,
    fitting,
    later_sums,
    over_groups,
    padded,
)


def obstacle(q: Array, k: Array, v: Array, *, platform: str, initial_state=None) -> str | None:
    """Why these kernels do not support the arrays, or None. Anything with a shape and a dtype serves as an array."""
    H = q.shape[-1]
    if initial_state is not None:
        return "the tiles take no initial state"
    if not q.dtype == k.dtype == v.dtype or q.dtype not in (jnp.bfloat16, jnp.float32):
        return f"q, k and v must all be bfloat16 or all float32, found {q.dtype}, {k.dtype} and {v.dtype}"
    known = [size for where, itemsize, size in TILES if (where, itemsize) == (platform, q.dtype.itemsize)]
    if v.shape[-1] != H or H not in known:
        return f"head sizes {H} and {v.shape[-1]} in {q.dtype}: the tiles are made for equal ones in {known}"
    return None


def second_order_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    *,
    log_decay: Float[Array, "B T N"] | None = None,
    runs: Int[Array, "B T"] | None = None,
    normalize: bool = True,
    scale: float | None = None,
    platform: str,
    interpret: bool = False,
    tiles: Tiles | None = None,
) -> Float[Array, "B T N H"]:
    """y in q's dtype, with gradients for q, k, v and log_decay. Query head n reads kv head n K / N.

    Args:
      log_decay: at most 0; values below -104, where e^a is 0 in float32, are a hard reset. None: no decay.
      runs: the index of each token's document, non-decreasing along T. None: one document.
      normalize: divide by the sum of the weights (a row whose sum is below 1e-30 gives 0).
      scale: factor on q.k, H^-0.5 by default; no effect if normalised.
      tiles: replaces the entry of `second_order_attention_plan.TILES`.
    """
    T, H = q.shape[1], q.shape[3]
    options = Options(
        normalize=normalize,
        scale=H**-0.5 if scale is None else scale,
        platform=platform,
        interpret=interpret,
        tiles=tiles or fitting(TILES[platform, q.dtype.itemsize, H], T),
    )
    return _attention(*padded(q, k, v, log_decay, runs, options.tiles), options)[:, :T]


def fold(k: Array, log_decay: Array | None, runs: Array | None, N: int, C: int) -> tuple[Fold | None, Reach]:
    """The fold and the reach for chunks of C, from log_decay [B, N, T]. No fold without decay and documents."""
    shape = k.shape[0], N, k.shape[1]
    chunks, reach = chunked(log_decay, runs, shape, C, FORGOTTEN)
    if chunks is None:
        return None, reach
    leave, enter = jnp.exp(chunks.rest / 2), jnp.exp(chunks.local)
    if chunks.leaves is not None and chunks.enters is not None:
        leave, enter = leave * chunks.leaves, enter * chunks.enters
    leave, enter = leave.reshape(shape), enter.reshape(shape)
    keys = jnp.repeat(k, N // k.shape[2], axis=2) * jnp.swapaxes(leave, 1, 2)[..., None]
    return Fold(keys.astype(k.dtype), leave, enter, chunks.parts, jnp.exp(chunks.total)), reach


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def _attention(q, k, v, log_decay, runs, options: Options):
    return _forward(q, k, v, log_decay, runs, options, q.dtype)[0]


def _kernels(platform: str):
    return second_order_attention_gpu if platform == "gpu" else second_order_attention_tpu


def _forward(q, k, v, log_decay, runs, options: Options, dtype):
    tile = options.tiles.forward
    folded, reach = fold(k, log_decay, runs, q.shape[2], tile.held)
    return _kernels(options.platform).forward(q, k, v, folded, reach, runs, options, tile, dtype)


def _forward_saving(q, k, v, log_decay, runs, options: Options):
    # y in float32: the gradient of a score, dy.v - dy.y, cancels similar numbers (rounding y doubles dk's error).
    y, den = _forward(q, k, v, log_decay, runs, options, jnp.float32)
    y, den = checkpoint_name(y, RESIDUALS), checkpoint_name(den, RESIDUALS)
    return y.astype(q.dtype), (q, k, v, log_decay, runs, y, den)


def _cotangent(dy: Array, y: Array, den: Array, folded: Fold | None, options: Options) -> Cotangent:
    if options.normalize:
        empty = den <= FLOOR  # False for NaN, so that NaN propagates
        ratio = jnp.where(empty, 0, 1 / jnp.where(empty, 1, den))
    else:
        ratio, y = jnp.full(den.shape, options.scale**2, jnp.float32), jnp.zeros((), jnp.float32)
    row = ratio if folded is None else ratio * folded.enter
    g = (dy.astype(jnp.float32) * jnp.swapaxes(row, 1, 2)[..., None]).astype(dy.dtype)

    def along(x):  # uses the rounded g, so that sums over a row still cancel
        return jnp.swapaxes(jnp.sum(x.astype(jnp.float32) * y, axis=-1), 1, 2)

    return Cotangent(dy, ratio, along(dy), g, along(g))


def _backward(options: Options, residuals, dy):
    q, k, v, log_decay, runs, y, den = residuals
    kernels, N = _kernels(options.platform), q.shape[2]
    folded, reach = fold(k, log_decay, runs, N, options.tiles.dq.held)
    cotangent = _cotangent(dy, y, den, folded, options)
    dq, row = kernels.backward_dq(q, k, v, cotangent, folded, reach, runs, options, options.tiles.dq)
    dk, dv, column = kernels.backward_dkv(q, k, v, cotangent, folded, reach, runs, options, options.tiles.dkv)
    dk, dv = over_groups(dk, k.shape[2]), over_groups(dv, k.shape[2])
    if log_decay is None:
        return dq, dk, dv, None, None
    return dq, dk, dv, later_sums(row - column, runs), None


_attention.defvjp(_forward_saving, _backward)
