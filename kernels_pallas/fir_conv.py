"""Gated causal convolution with up to 256 taps, shared by groups of channels: Hyena-SE and Hyena-MR.

    u = x2 * v,   y_t = x1_t * ( sum_k h[group, k] u_{t-k} + skip u_t ),   k = 0 .. K-1

For K <= 8, if few channels share a filter or `runs` are given, `kernels_pallas.short_conv` computes it by shifted
multiply-adds, with skip added to the tap of the current token. All other cases are computed here, including 7 taps
shared by 16 channels: the matrix units are idle anyway, whereas shifting both gated inputs takes 58 instructions per
element on an H200, which can issue 53 in the time that memory needs for 8 bytes (here 9), and 2600 bundles for 131072
elements on a v5e, where memory needs 1920 cycles (here 710).

Block Toeplitz products (Ku et al. 2025, "Systems and Algorithms for Convolutional Multi-Hybrid Language Models at
Scale", section 3.2; arXiv 2503.01868). Time is split into blocks of C tokens; the rows of a matrix are blocks of
channels that share a filter. With M_j[s, t] = h[C j + t - s] (0 outside of h) and u_c the rows of block c,

    y_c = x1_c * ( u_c M_0 + u_{c-1} M_1 + ... + u_{c-n} M_n + skip u_c ),     n = ceil(K / C).

Time comes last and is contiguous, so rows are read contiguously, whether a filter has one channel or a thousand. On
GPU C is 64: 3 blocks for 128 taps take 384 FLOPs per element and 24 KiB, while 2 blocks of 128 take 512 and 64 KiB. On
TPU, where the matrix unit is 128 wide, C is 128.

Data placement. A program walks along time, so it still has the inputs before a block from its last step: in registers
on GPU (`fir_conv_gpu`), in VMEM on TPU (`fir_conv_tpu`). M_j is built on chip from the taps and stays there.

Backward, with g = dy x1, in one walk from the end: du_c = sum_j g_{c+j} M_j^T + skip g_c, dx2 = du v, dv = du x2,
dx1 = dy (the recomputed convolution), dM_j = sum_c u_c^T g_{c+j} in float32, and dh[k] is the sum of dM_j where
C j + t - s = k. dskip is the sum of g u. The contribution of the K - 1 inputs before the row is computed in plain jax.

Memory traffic per element in 16 bits: 8 bytes forward (x1, x2, v in, y out), 14 backward (dy, x1, x2, v in, dx1, dx2,
dv out). FLOPs per element for K = 128: 384 and 1152 on GPU, 512 and 1536 on TPU. The intensity, 48 to 110 FLOPs per
byte, is below the balance of each machine (H200 184, v5e 240), so the kernels are memory bound. Per element of B D T:

    H200 4.3 TB/s, 790 TF/s: 1.86 ps forward (products 0.49), 3.26 ps backward (products 1.46)
    v5e  819 GB/s, 197 TF/s: 9.8 ps forward (products 2.6), 17.1 ps backward (products 7.8)

Additional traffic: on GPU the taps' blocks, gathered once per walk, 48 KiB of dM per program of the backward walk, and
the halo of a piece of time; on TPU 128 tokens of x2 and v per step of the backward walk.

Compiler statistics for 16 bits, B 8, D 4096, T 8192, G 256, K 128, no skip. H200: loops of 327 instructions for 32
elements per thread forward, 730 for 16 backward; all products are wgmma, and nothing spills. TPU, bundles of a grid
step against the cycles of its memory traffic: forward v5e 710 / 1920, v5p (one core) 812 / 1328; backward 1216 / 1680,
1423 / 1162.
"""

import functools

import jax
import jax.numpy as jnp

from kernels_pallas import backends, fir_conv_gpu, fir_conv_tpu, short_conv
from kernels_pallas.fir_conv_plan import MOSAIC_TAPS, reached

MAX_TAPS = 256
SHARED = 8  # from this many channels per group, filters with few taps also use matrix products


def obstacle(v: jax.Array, h: jax.Array, *, platform: str, segments: bool = False) -> str | None:
    """None if the kernel supports arrays of these shapes, otherwise the reason why not."""
    if platform == "mosaic" and (reason := _mosaic_obstacle(v, h)):
        return reason
    if h.shape[1] <= short_conv.MAX_TAPS:
        return None
    if h.shape[1] > MAX_TAPS:
        return f"{h.shape[1]} taps, the kernel has up to {MAX_TAPS}"
    if segments:
        return f"segments with more than {short_conv.MAX_TAPS} taps"
    if platform == "tpu" and fir_conv_tpu.channels(v.shape[1], h.shape[0]) is None:
        return f"groups of {v.shape[1] // h.shape[0]} channels do not tile"
    return None


def _mosaic_obstacle(v: jax.Array, h: jax.Array) -> str | None:
    if reason := backends.missing("mosaic"):
        return reason
    if v.dtype not in (jnp.float32, jnp.bfloat16):
        return f"{v.dtype}: expected float32 or bfloat16"
    least, most = short_conv.MAX_TAPS + 1, MOSAIC_TAPS
    return None if least <= h.shape[1] <= most else f"{h.shape[1]} taps, expected {least} to {most}"


def fir_conv(
    x1: jax.Array | None,
    x2: jax.Array | None,
    v: jax.Array,
    h: jax.Array,
    *,
    skip: jax.Array | None = None,
    runs: jax.Array | None = None,
    initial_inputs: jax.Array | None = None,
    initial_runs: jax.Array | None = None,
    platform: str,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """(y [B, D, T] in v's dtype, the last K - 1 gated inputs [B, D, K - 1]).

    Args:
      x1, x2, v: [B, D, T]; a gate may be None. h: [G, K]; channel d uses filter d // (D/G), and the first tap belongs
        to the current token. skip: [D].
      runs, initial_inputs (gated), initial_runs: as in `short_conv.short_conv`; runs require K <= 8.
      platform: "gpu" (through Triton), "mosaic" (a Hopper GPU, through Mosaic GPU) or "tpu".
      interpret: run on any machine, slowly, for tests.

    Raises:
      ValueError: the obstacle, if there is one.
    """
    reason = obstacle(v, h, platform=platform, segments=runs is not None)
    if reason is not None:
        raise ValueError(f"fir_conv kernel: {reason}")
    D, (G, K) = v.shape[1], h.shape
    h = h.astype(jnp.float32)
    skip = None if skip is None else skip.astype(jnp.float32)
    if runs is not None or not _is_product(D, G, K, platform):
        w = jnp.repeat(h, D // G, axis=0)
        w = w if skip is None else w.at[:, 0].add(skip)
        before = initial_inputs, initial_runs
        y = short_conv.gated(x1, x2, v, w, None, runs, *before, platform=platform, interpret=interpret)
    else:
        y = _toeplitz(x1, x2, v, h, skip, initial_inputs, platform, interpret)
    last = slice(max(0, v.shape[2] - (K - 1)), None)
    u = v[:, :, last] if x2 is None else x2[:, :, last] * v[:, :, last]
    return y, short_conv.last_inputs(u, initial_inputs, K)


def _is_product(D: int, G: int, K: int, platform: str) -> bool:
    if K > short_conv.MAX_TAPS:
        return True
    steps = fir_conv_tpu.channels(D, G) or (0, False)
    return D // G >= SHARED and (platform == "gpu" or steps[1])


@functools.partial(jax.custom_vjp, nondiff_argnums=(6, 7))
def _toeplitz(x1, x2, v, h, skip, before, platform, interpret):
    return _kernels(platform).forward(x1, x2, v, h, skip, before, interpret=interpret)


def _kernels(platform: str):
    if platform == "mosaic":  # takes a second to import, so only where it is used
        from kernels_pallas import fir_conv_mosaic

        return fir_conv_mosaic
    return {"gpu": fir_conv_gpu, "tpu": fir_conv_tpu}[platform]


def _toeplitz_forward(x1, x2, v, h, skip, before, platform, interpret):
    return _toeplitz(x1, x2, v, h, skip, before, platform, interpret), (x1, x2, v, h, skip, before)


def _toeplitz_backward(platform, interpret, residuals, dy):
    x1, x2, v, h, skip, before = residuals
    *gradients, blocks, dskip = _kernels(platform).backward(
        dy, x1, x2, v, h, skip, before, interpret=interpret
    )
    dh, d_before = _diagonals(blocks, h.shape[1]), None
    if before is not None:
        n = min(before.shape[2], dy.shape[2])
        g = dy[:, :, :n].astype(jnp.float32) * (1 if x1 is None else x1[:, :, :n].astype(jnp.float32))
        _, pull = jax.vjp(functools.partial(reached, n=n), before, h)
        d_before, more = pull(g)
        dh = dh + more
    return *gradients, dh, dskip, d_before


def _diagonals(blocks: jax.Array, K: int) -> jax.Array:
    """dh [G, K] from dM [G, j, s, t]: the sum over all entries with C j + t - s = k."""
    G, _, C, _ = blocks.shape
    rows = jnp.swapaxes(blocks, 1, 2).reshape(G, -1)  # row s: C j + t
    longer = jnp.pad(rows, ((0, 0), (0, C))).reshape(G, C, -1)  # shifts row s left by s
    return longer[:, :, :K].sum(axis=1)


_toeplitz.defvjp(_toeplitz_forward, _toeplitz_backward)
