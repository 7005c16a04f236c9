"""A discrete Fourier transform as two matrix products (order-2 Monarch): the code shared by GPU and TPU kernels.

n = N1 N2 points, time t = n1 N2 + n2, frequency k = k1 + N1 k2. With w_m = exp(-2 pi i / m)

    A[k1, n2] = sum_n1 w_N1^(k1 n1) x[n1, n2]          a product with F1 from the left
    A[k1, n2] *= w_n^(k1 n2)                           the twiddle factors
    X[k1, k2] = sum_n2 A[k1, n2] w_N2^(n2 k2)          a product with F2 from the right

and the inverse applies the same steps in reverse order with conjugated constants. The spectrum stays in the order
[k1, k2]: it is only multiplied by another spectrum in the same order, so nothing is ever transposed. Rows n1 that
consist of padding drop out of the sums: for a signal padded to twice its length the product with F1 costs half.

Two real signals a and b are transformed as one complex signal a + ib. A filter h is real, so the convolution of h with
a + ib is conv(h, a) + i conv(h, b), and the results need not be separated. In the backward pass, the real part of the
inverse transform of sum conj(Z) W over such pairs is the sum of the two correlations.

Matrix units multiply bfloat16. A float32 product takes three such products: with x = hi + lo, hi the upper 16 bits of
x, hi hi' + hi lo' + lo hi' has a relative error of about 2^-16 ("parts" = 2 below; one part is plain bfloat16).
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np


@dataclasses.dataclass(frozen=True)
class Plan:
    """A transform of n1 n2 points, of which only the first `rows` x n2 may be non-zero; rows <= n1 / 2."""

    n1: int
    n2: int
    rows: int

    @property
    def n(self) -> int:
        return self.n1 * self.n2


def parts_of(dtype) -> int:
    """How many bfloat16 numbers represent one number of this dtype."""
    return 1 if dtype == jnp.bfloat16 else 2


def split(x, parts: int):
    """Splits x into a tuple of `parts` bfloat16 arrays whose sum is (nearly) x. Works inside kernels."""
    if parts == 1:
        return (x.astype(jnp.bfloat16),)
    # Bit operations, because XLA may remove a cast to bfloat16 and back, and the low part with it.
    bits = jax.lax.bitcast_convert_type(x.astype(jnp.float32), jnp.int32)
    hi = jax.lax.bitcast_convert_type(bits & jnp.int32(-65536), jnp.float32)
    return hi.astype(jnp.bfloat16), (x - hi).astype(jnp.bfloat16)


def product(a, b, total=None):
    """The matrix product of two split arrays, accumulated in float32, plus `total` if given."""
    pairs = [(a[0], b[0])] if len(a) == 1 else [(a[1], b[0]), (a[0], b[1]), (a[0], b[0])]
    for x, y in pairs:  # in sequence, so that the compiler sees a chain of additions to one accumulator
        dot = jnp.dot(x, y, preferred_element_type=jnp.float32)
        total = dot if total is None else total + dot
    return total


def times(a, b, conj: bool = False):
    """The complex product a b, or a conj(b), of (re, im) pairs."""
    (ar, ai), (br, bi) = a, b
    if conj:
        return ar * br + ai * bi, ai * br - ar * bi
    return ar * br - ai * bi, ar * bi + ai * br


@functools.cache
def matrix(n: int) -> tuple[np.ndarray, np.ndarray]:
    """cos and -sin of 2 pi j k / n, [n, n] float64: the real and the imaginary part of the DFT matrix."""
    angle = 2 * math.pi / n * (np.arange(n)[:, None] * np.arange(n) % n)
    return np.cos(angle), -np.sin(angle)


@functools.cache
def twiddles(plan: Plan) -> np.ndarray:
    """w_n^(k1 n2) as [2 (re, im), n1, n2] float32."""
    angle = 2 * math.pi / plan.n * (np.arange(plan.n1)[:, None] * np.arange(plan.n2))
    return np.stack([np.cos(angle), -np.sin(angle)]).astype(np.float32)


def split_constant(x: np.ndarray, parts: int) -> np.ndarray:
    """A float64 constant as [parts, ...] bfloat16; each part is the rounded remainder after the previous parts."""
    out = []
    for _ in range(parts):
        out.append(x.astype(jnp.bfloat16))
        x = x - out[-1].astype(np.float64)
    return np.stack(out)


def spectrum(h, plan: Plan, *, by_matmul: bool):
    """The transform of taps h [D, S], S <= n, divided by n, as [D, 2 (re, im), n1, n2] float32 in the order [k1, k2].

    by_matmul: compute it by matrix products, for TPUs, which have no FFT unit; otherwise call the FFT library.
    """
    h = jnp.pad(h.astype(jnp.float32) / plan.n, ((0, 0), (0, plan.n - h.shape[1])))
    if not by_matmul:
        # k = k1 + n1 k2: frequencies in order are [k2, k1]
        H = jnp.fft.fft(h, axis=-1).reshape(-1, plan.n2, plan.n1).swapaxes(1, 2)
        return jnp.stack([H.real, H.imag], axis=1)
    f1, f2 = matrix(plan.n1), matrix(plan.n2)
    x = h.reshape(-1, plan.n1, plan.n2)[:, : plan.rows]
    a = tuple(_apply("kn,dnm->dkm", f[:, : plan.rows], x) for f in f1)
    re, im = times(a, tuple(twiddles(plan)))
    right = functools.partial(_apply, "mj,dkm->dkj")
    return jnp.stack([right(f2[0], re) - right(f2[1], im), right(f2[1], re) + right(f2[0], im)], axis=1)


def taps(H, plan: Plan, length: int, *, by_matmul: bool):
    """The real part of the inverse transform of H [D, 2, n1, n2]: [D, length] float32, length <= rows n2."""
    if not by_matmul:
        H = jax.lax.complex(H[:, 0], H[:, 1]).swapaxes(1, 2).reshape(-1, plan.n)
        return jnp.fft.ifft(H, axis=-1).real[:, :length]
    f1, f2 = matrix(plan.n1), matrix(plan.n2)
    re, im = H[:, 0], H[:, 1]
    right = functools.partial(_apply, "mj,dkj->dkm")
    c = right(f2[0], re) + right(f2[1], im), right(f2[0], im) - right(f2[1], re)
    re, im = times(c, tuple(twiddles(plan)), conj=True)
    left = functools.partial(_apply, "kn,dkm->dnm")
    h = left(f1[0][:, : plan.rows], re) + left(f1[1][:, : plan.rows], im)
    return h.reshape(h.shape[0], -1)[:, :length] / plan.n


def present(arrays, given):
    """Distributes arrays over optional arguments: the next array where `given` is true, otherwise None."""
    arrays = iter(arrays)
    return [next(arrays) if there else None for there in given]


def _apply(formula: str, constant: np.ndarray, x):
    """einsum of a float64 constant and x as three products of bfloat16 parts, which compile faster than XLA's own."""
    c, x = split_constant(constant, 2), split(x, 2)
    dot = functools.partial(jnp.einsum, formula, preferred_element_type=jnp.float32)
    return dot(c[1], x[0]) + dot(c[0], x[1]) + dot(c[0], x[0])
