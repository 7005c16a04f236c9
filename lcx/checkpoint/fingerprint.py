"""One number per array: does it still hold the values that were saved?

Every element is mixed with its row-major index by a bijection of 32-bit words and the results are added
modulo 2^32. Because each term is a bijection of its element, changing any single element always changes the
sum; because the index enters before the mixing, moved, swapped or zeroed elements change it too (up to
chance, about 2^-32). Addition does not care about order, so the number is the same on one device, on any
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
    """uint32 scalar of an array of any shape and sharding, computed where it lies.

    Typed PRNG keys have no bits of their own: pass their key data. Raises KeyError for elements that are not
    1, 2, 4 or 8 bytes wide.
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
    """Sum over the elements of x, taken as elements start, start + 1, ... (row-major) of a larger array.

    Needs memory for a few blocks of 2^18 elements besides x (and a copy of x where it is not contiguous).
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
