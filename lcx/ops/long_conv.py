"""Gated causal convolution with a filter as long as the sequence, by FFT: Hyena-LI.

    g = x2 * v,   y_t = x1_t * ( sum_k h[d, k] g_{t-k} + skip g_t ),   k = 0 .. t

Letters: B batch, D channels, T time, S >= T taps, b half a block. Taps are in convolution order, one filter a channel.

``reference``  the definition, with every T x T Toeplitz matrix materialised, in float32.
``triton``, ``tpu``  kernels_pallas.long_conv: the transform as matrix products, one pass; for packed rows one pass per
               document (`packed_conv`), on a GPU only if they are few.
``xla``        irfft(rfft(g) rfft(h)) over 2 T points, float32 throughout: O(T log T). bfloat16 inputs are converted
               to float32, since rounding between the stages of an FFT spreads over the whole sequence.

Documents. The transform mixes all tokens of a row, so a packed row is halved recursively down to blocks of 256 tokens.
At most one document crosses the middle of a block: the left half, masked to that document, goes through an FFT of the
block's length, and the right half of the result is kept. Blocks of 256 tokens use the products of `fir_conv`. Each
level takes FFTs of T points in total: log2(T / 256) / 2 times the cost of an unpacked row, for any number of documents.

The backward pass saves the inputs and the result before the gate x1, and transforms the inputs again. A filter is
transformed once for all rows. On a CPU some channels of all rows are processed at a time: enough of them for the FFT to
be efficient, few enough for their spectra to stay in cache.
"""

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from lcx.errors import UserError
from lcx.ops import MIXER_RESIDUALS, dispatch, segments
from lcx.ops.fir_conv import each_group, toeplitz, unless_packed, within
from lcx.ops.packed_conv import by_document
from lcx.ops.short_conv import KERNELS

BLOCK = 256  # tokens below which Toeplitz products take over from the FFT, in packed rows
# Numbers of v processed at a time on a CPU; fewer with documents, whose levels of FFTs are all in memory at once.
GROUP, GROUP_PACKED = 2**20, 2**17
# Passes of the GPU kernel over a packed row that move about as many bytes as the levels of FFTs do. There is no limit
# on a TPU, which has no FFT unit: libtpu expands FFTs to products, which take 30 times the kernel's cycles and minutes
# to compile.
PASSES = 8


def long_conv(
    x1: Float[Array, "B D T"] | None,
    x2: Float[Array, "B D T"] | None,
    v: Float[Array, "B D T"],
    h: Float[Array, "D S"],
    *,
    skip: Float[Array, " D"] | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
    implementation: str | None = None,
) -> Float[Array, "B D T"]:
    """y [B, D, T] in v's dtype; a gate that is None is 1. Has no state: for filters with a recurrence use `ops.modal`.

    Args:
      segment_ids: documents of a packed row, 0 for padding; None: one document.

    Raises:
      UserError: a filter shorter than the sequence, or an implementation that cannot run here.
    """
    (D, S), T = h.shape, v.shape[2]
    if v.shape[1] != D or S < T:
        raise UserError(
            f"long_conv of {v.shape} [B, D, T] with filters {h.shape}: expected [D, S] with D = {v.shape[1]} and "
            f"S >= {T}; fir_conv takes filters that are shorter than the sequence"
        )
    name = dispatch.choose("long_conv", implementation, _forms(v))
    if name == "reference":
        return reference(x1, x2, v, h, skip, segment_ids)
    if name in KERNELS:
        y = _kernel(x1, x2, v, h, skip, segment_ids, KERNELS[name])
        return checkpoint_name(y, MIXER_RESIDUALS)
    return _xla(x1, x2, v, h[:, :T], skip, segment_ids)


def _forms(v: Array) -> dict[str, str | None]:
    def obstacle(platform: str) -> str | None:
        from kernels_pallas import long_conv as kernels

        B, D, T = v.shape
        return kernels.obstacle((B, D, T), v.dtype, platform)

    forms = {name: dispatch.kernels(platform) or obstacle(platform) for name, platform in KERNELS.items()}
    return forms | {"xla": None, "reference": None}


def _kernel(x1, x2, v, h, skip, ids, platform: str) -> Array:
    from kernels_pallas import long_conv as kernels

    def one_document(signals, weights):
        return kernels.long_conv(*signals, weights[0], skip=weights[1], platform=platform)

    def at_once(signals, weights, ids):
        (x1, x2, v), (h, skip) = signals, weights
        return _xla(x1, x2, v, h, skip, ids)

    signals, weights, T = (x1, x2, v), (h[:, : v.shape[2]], skip), v.shape[2]
    if ids is None:
        return one_document(signals, weights)
    otherwise = at_once if platform == "gpu" else None
    return by_document(one_document, signals, weights, ids, taps=T, otherwise=otherwise, most=PASSES)


def reference(x1, x2, v, h, skip, ids) -> Array:
    """The definition, in float32. ids None: one document."""
    T = v.shape[2]
    g = v.astype(jnp.float32) if x2 is None else x2.astype(jnp.float32) * v.astype(jnp.float32)
    distance = jnp.arange(T)[:, None] - jnp.arange(T)
    seen = (distance >= 0)[None]
    if ids is not None:
        runs = segments.runs(ids)
        seen = seen & (runs[:, :, None] == runs[:, None]) & (ids[:, :, None] != 0) & (ids[:, None] != 0)
        g = jnp.where(ids[:, None] != 0, g, 0)
    taps = h.astype(jnp.float32)[:, distance]
    y = jnp.einsum("dts,bts,bds->bdt", taps, seen.astype(jnp.float32), g, precision="highest")
    if skip is not None:
        y = y + skip.astype(jnp.float32)[:, None] * g
    return (y if x1 is None else y * x1.astype(jnp.float32)).astype(v.dtype)


def _xla(x1, x2, v, h, skip, ids) -> Array:
    """The gate x1 is outside of the custom gradient: what it multiplies is kept for it, an inverse FFT less."""
    y = checkpoint_name(_by_channels(x2, v, h, skip, ids), MIXER_RESIDUALS)
    return y if x1 is None else (x1.astype(jnp.float32) * y.astype(jnp.float32)).astype(v.dtype)


@jax.custom_vjp
def _by_channels(x2, v, h, skip, ids) -> Array:
    return _by_channels_forward(x2, v, h, skip, ids)[0]


def _by_channels_forward(x2, v, h, skip, ids):
    groups, weights = _cut(len(v), h, skip, GROUP if ids is None else GROUP_PACKED)
    y, _ = each_group(lambda *group: (_slab(*group), ()), (x2, v), weights, ids, groups)
    return y, (x2, v, h, skip, ids)


def _by_channels_backward(residuals, dy):
    x2, v, h, skip, ids = residuals

    def slab_gradient(signals, weights, ids):
        *inputs, dy = signals
        _, pull = jax.vjp(lambda i, w: _slab(i, w, ids), tuple(inputs), weights)
        return pull(dy)

    groups, cut = _cut(len(v), h, skip, GROUP if ids is None else GROUP_PACKED)
    signals, weights = each_group(slab_gradient, (x2, v, dy), cut, ids, groups)
    return *signals, *jax.tree.map(lambda dw, w: dw.reshape(w.shape), weights, (h, skip)), None


_by_channels.defvjp(_by_channels_forward, _by_channels_backward)


def _cut(B: int, h: Array, skip: Array | None, most: int):
    """(number of groups of channels, the weights split into these groups)."""
    D, T = h.shape
    size = max(n for n in range(1, D + 1) if D % n == 0 and (n == 1 or B * n * T <= most))
    return D // size, (h.reshape(-1, size, T), skip)


def _slab(signals, weights, ids):
    """R channels of all rows: signals [B, R, T], (h [R, T], skip [R]), ids [B, T] -> y [B, R, T]."""
    (x2, v), (h, skip) = signals, weights
    g, h = v.astype(jnp.float32), h.astype(jnp.float32)
    g = g if x2 is None else g * x2.astype(jnp.float32)
    runs = None
    if ids is not None:
        g, runs = jnp.where(ids[:, None] != 0, g, 0), segments.runs(ids)
    y = unless_packed(lambda g, runs: _convolve(g, h, runs), g, runs)
    if skip is not None:
        y = y + jnp.einsum("d,bdt->bdt", skip.astype(jnp.float32), g)
    return (y if ids is None else jnp.where(ids[:, None] != 0, y, 0)).astype(v.dtype)


def _convolve(g: Array, h: Array, runs: Array | None) -> Array:
    """The causal convolution of g [..., R, T] and h [R, T]; with runs [T], non-decreasing, of g [R, T] within them."""
    if runs is not None:
        return _by_document(g, h, runs)
    T = g.shape[-1]
    return _fft(g, h, fft_size(2 * T - 1))[..., :T]


def _fft(g: Array, h: Array, n: int) -> Array:
    """Circular convolution over n points of the last axis."""
    return jnp.fft.irfft(jnp.fft.rfft(g, n) * jnp.fft.rfft(h, n), n)


def _by_document(g: Array, h: Array, runs: Array) -> Array:
    R, T = g.shape
    y = _near(g, h, runs)
    size = BLOCK
    while size < T:
        pad = -T % (2 * size)
        halves = jnp.pad(g, ((0, 0), (0, pad))).reshape(R, -1, 2, size)
        ids = jnp.pad(runs, (0, pad), mode="edge").reshape(-1, 2, size)
        crossing = ids[:, 1, :1]
        left = jnp.where(ids[:, 0] == crossing, halves[:, :, 0], 0)
        # The circular wrap-around only affects the left half, which is dropped.
        reached = _fft(left, h[:, None, : 2 * size], 2 * size)[..., size:]
        second = jnp.where(ids[:, 1] == crossing, reached, 0)
        whole = jnp.pad(second[:, :, None], ((0, 0), (0, 0), (1, 0), (0, 0)))
        y = y + whole.reshape(R, -1)[:, :T]
        size *= 2
    return y


def _near(g: Array, h: Array, runs: Array) -> Array:
    """The convolution inside each block of 256 tokens, channel by channel, since each channel has its own filter."""
    R, T = g.shape
    pad = -T % BLOCK
    blocks = jnp.pad(g, ((0, 0), (0, pad))).reshape(R, -1, BLOCK)
    ids = jnp.pad(runs, (0, pad), mode="edge").reshape(-1, BLOCK)
    taps = jnp.pad(h[:, :BLOCK], ((0, 0), (0, max(BLOCK - T, 0))))

    def channel(x, h):
        return within(x[None], h, ids, toeplitz(h, BLOCK // 2, 2))[0]

    return jax.vmap(channel)(blocks, taps).reshape(R, -1)[:, :T]


def fft_size(n: int) -> int:
    """The smallest even number >= n without a prime factor above 5, a size that FFT libraries handle fast."""
    sizes = (2 * 2**a * 3**b * 5**c for a in range(40) for b in range(3) for c in range(3))
    return min(size for size in sizes if size >= n)
