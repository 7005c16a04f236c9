"""A 32-bit fingerprint of an array, which shows whether it still holds the values that were saved.

Each element is combined with its row-major index and mixed by a bijection of 32-bit words; the results are added
modulo 2^32. Because each term is a bijection of its element, changing any single element always changes the
sum. Because the index enters before the mixing, elements that are moved, swapped or zeroed change it too, except
with a probability of about 2^-32. Addition is commutative, so the fingerprint is the same on one device, on any
mesh, and when the array passes through the host one slice at a time.

`fingerprint` runs on the devices that hold the array; `partial` is the same sum in numpy over a contiguous
run of elements, and partial sums add up: `(partial(a) + partial(b, a.size)) % 2**32`.
"""

from __future__ import annotations

import functools
import math
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import jax

_GOLDEN = (
    0x9E3779B1  # odd, so index -> index * _GOLDEN is a bijection of 32-bit words that spreads neighbours
)
_MIX = 0x21F0AAAD  # odd multiplier of a published low-bias integer hash
_BLOCK = 1 << 18  # elements per numpy pass: the temporaries stay in cache
_UNSIGNED = {1: "uint8", 2: "uint16", 4: "uint32", 8: "uint32"}  # 8-byte elements count as two words


def fingerprint(x: jax.Array) -> jax.Array:
    """uint32 scalar for an array of any shape and sharding, computed on the devices that hold it.

    For typed PRNG keys pass their key data. Raises KeyError for elements that are not 1, 2, 4 or 8 bytes wide.
    """
    return _on_device()(x)


@functools.cache
def _on_device() -> Any:
    import jax
    import jax.numpy as jnp

    def sum_of_mixed(x):
        x = x.astype(jnp.uint8) if x.dtype == jnp.bool_ else x
        bits = jax.lax.bitcast_convert_type(x, jnp.dtype(_UNSIGNED[x.dtype.itemsize])).astype(jnp.uint32)
        index = jnp.zeros(bits.shape, jnp.uint32)
        for axis in range(bits.ndim):
            stride = math.prod(bits.shape[axis + 1 :]) % 2**32
            index += jax.lax.broadcasted_iota(jnp.uint32, bits.shape, axis) * jnp.uint32(stride)
        mixed = bits ^ (index * jnp.uint32(_GOLDEN))
        mixed = (mixed ^ (mixed >> 16)) * jnp.uint32(_MIX)
        return jnp.sum(mixed ^ (mixed >> 15), dtype=jnp.uint32)

    return jax.jit(sum_of_mixed)  # one compilation per shape, dtype and sharding


def partial(x: np.ndarray, start: int = 0) -> int:
    """Partial sum over x, whose elements are start, start + 1, ... (row-major) of a larger array.

    In addition to x it needs memory for a few blocks of 2^18 elements, and for a copy of x if x is not contiguous.
    """
    bits = np.ascontiguousarray(x).reshape(-1).view(np.dtype(_UNSIGNED[x.dtype.itemsize]))
    first = start * max(1, x.dtype.itemsize // 4)
    total = 0
    for low in range(0, bits.size, _BLOCK):
        block = bits[low : low + _BLOCK].astype(np.uint32)
        mixed = _index_terms()[: block.size] + np.uint32((first + low) * _GOLDEN % 2**32)
        mixed ^= block
        mixed ^= np.right_shift(mixed, 16, out=block)
        mixed *= np.uint32(_MIX)
        mixed ^= np.right_shift(mixed, 15, out=block)
        total += int(mixed.sum(dtype=np.uint64))
    return total % 2**32


@functools.cache
def _index_terms() -> np.ndarray:
    return np.arange(_BLOCK, dtype=np.uint32) * np.uint32(_GOLDEN)
