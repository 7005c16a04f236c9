"""A causal convolution with filters as long as the sequence, gates fused: y = x1 * (h conv (x2 * v) + skip * x2 * v).

FlashFFTConv (Fu et al., arXiv 2311.05908) for GPU and TPU: one kernel reads the gates and the signal, transforms to the
spectrum and back on the matrix units, and writes y. With an FFT library, padding, transforms, products and slicing go
through device memory, about 65 bytes per element; here it is 8 bytes in bfloat16 (x1, x2, v, y), plus 16 / B for the
filter.

The algorithm (formulas: `dft.py`). A sequence of T tokens is padded with zeros to n >= 2 T points, so that the
circular convolution of a transform is the causal one, and laid out as [n1, n2], time = n1 N2 + n2:

    u = x2 v                             two rows of the batch, as real and imaginary part of one signal
    A = F1 u * twiddles                  matrix product from the left, with half of F1, since half of u is padding
    Y = (A F2) * H                       and from the right: the spectrum, in the order [k1, k2]
    C = (Y conj F2) * conj twiddles
    y = x1 * conj F1 C                   only the T needed rows

F1 and F2 are DFT matrices of N1 and N2 points. XLA computes the spectrum of h once for all rows of the batch, in
almost float32 precision, in the order [k1, k2] and divided by n. skip is added to h[0], the tap for the current token.

Cost per element of y: 8 N1 + 16 N2 FLOPs on the matrix unit (3072 at T = 8192, where N1 = N2 = 128), three times that
for float32, and 3 complex elementwise products. The kernel is compute bound on all devices: an H200 needs 3.9 ps for
3072 FLOPs at 790 TFLOP/s against 1.9 ps for 8 bytes at 4.3 TB/s, a v5e 15.6 against 9.8 ps, a v5p 6.7 against 2.9 ps.

Data placement. TPU (`long_conv_tpu.py`): 8 channels of two rows, their filters and all intermediates are in VMEM; the
grid is (channels, pairs of rows). GPU (`long_conv_gpu.py`): up to 4096 points, a program holds the signal of a pair of
rows in registers; for more, persistent programs stage it through their own scratch in the L2 cache.

Precision. bfloat16 arrays are multiplied in bfloat16 and accumulated in float32: 3.5e-3 relative error of y and of
every gradient. float16 operands would give 4e-4, but gradients of 1e-7 underflow, an outlier summed over 64 rows of F1
overflows, and TPUs have no float16 products. float32 arrays are split into two bfloat16 parts and multiplied in three
products: 1e-5.

Backward, g = x1 dy: dv = x2 du and dx2 = v du with du = conv of g with conj(H); dx1 = dy conv(u), recomputed, as is the
spectrum of u; dH = sum over the batch of G conj(U), accumulated by the one program that owns the channel (without
atomics, so it is deterministic), dh = its inverse transform by XLA, and dskip = dh[0]. Twice the work of the forward
pass.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from kernels_pallas import dft, long_conv_gpu, long_conv_tpu

# VMEM of a core in MiB, by JAX's name of the chip; unknown chips get the smallest value.
VMEM = {"TPU v5 lite": 128, "TPU v5": 64, "TPU v5p": 64, "TPU v6 lite": 128}
GPU_LENGTH = 65536  # beyond this, products with DFT matrices of 2048 points and more cost more than an FFT


def long_conv(
    x1: Float[Array, "B D T"] | None,
    x2: Float[Array, "B D T"] | None,
    v: Float[Array, "B D T"],
    h: Float[Array, "D S"],
    *,
    skip: Float[Array, " D"] | None = None,
    platform: str,
    interpret: bool = False,
) -> Float[Array, "B D T"]:
    """y = x1 * (h conv (x2 * v) + skip * x2 * v), differentiable in every array.

    Args:
      x1, x2: gates, or None for 1; float32 or bfloat16, the same dtype as v.
      h: taps; h[:, 0] multiplies the current token, taps from T on are ignored.
      platform: "gpu" or "tpu". `obstacle` returns why arrays are not supported, if so.
      interpret: run the kernel in Pallas' interpreter, on any platform.
    """
    taps = h[:, : v.shape[2]].astype(jnp.float32)
    if skip is not None:
        taps = taps.at[:, 0].add(skip.astype(jnp.float32))
    return _long_conv(x1, x2, v, taps, platform, interpret)


def obstacle(shape: tuple[int, int, int], dtype, platform: str) -> str | None:
    """Why long_conv cannot take arrays of this shape [B, D, T] and dtype, forward or backward; None if it can."""
    if dtype not in (jnp.float32, jnp.bfloat16):
        return f"the kernel takes float32 and bfloat16, found {jnp.dtype(dtype).name}"
    T = shape[2]
    if platform == "gpu":
        return f"the kernel takes up to {GPU_LENGTH} tokens, found {T}" if T > GPU_LENGTH else None
    needed, here = _kernels("tpu").vmem_bytes(T, dtype, 7, True) >> 20, vmem_mib()
    if needed <= here:
        return None
    return f"the kernel holds whole sequences in VMEM: {T} tokens need {needed} MiB of it, found {here}"


def vmem_mib() -> int:
    """VMEM in MiB that a kernel may use, for the chip of the current mesh or of the first device."""
    device = getattr(jax.sharding.get_abstract_mesh(), "abstract_device", None)
    kind = jax.devices()[0].device_kind if device is None else device.device_kind
    return VMEM.get(kind, 64)


def _kernels(platform: str):
    """The module of a platform: `plan(T)`, and `call(arrays, H, gates, is_backward=, interpret=)`.

    `call` takes the arrays [B, D, T] that are not None (x1, x2, v; backward dy, x1, x2, v), a spectrum
    [D, 2, n1, n2] by `dft.spectrum` for `plan(T)`, and which of the two gates are given. It returns [y], or the
    gradients of x1, x2 (those given), v and H.
    """
    return long_conv_tpu if platform == "tpu" else long_conv_gpu


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _long_conv(x1, x2, v, h, platform, interpret):
    return _forward(x1, x2, v, h, platform, interpret)[0]


def _forward(x1, x2, v, h, platform, interpret):
    kernels = _kernels(platform)
    H = dft.spectrum(h, kernels.plan(v.shape[2]), by_matmul=platform == "tpu")
    gates = (x1 is not None, x2 is not None)
    (y,) = kernels.call(_given(x1, x2, v), H, gates, is_backward=False, interpret=interpret)
    return y, (x1, x2, v, h)


def _backward(platform, interpret, saved, dy):
    x1, x2, v, h = saved
    kernels, plan = _kernels(platform), _kernels(platform).plan(v.shape[2])
    H = dft.spectrum(h, plan, by_matmul=platform == "tpu")
    gates = (x1 is not None, x2 is not None)
    out = kernels.call(_given(dy, x1, x2, v), H, gates, is_backward=True, interpret=interpret)
    dx1, dx2, dv, dH = dft.present(out, (*gates, True, True))
    return dx1, dx2, dv, dft.taps(dH, plan, h.shape[1], by_matmul=platform == "tpu")


def _given(*arrays):
    return [x for x in arrays if x is not None]


_long_conv.defvjp(_forward, _backward)
