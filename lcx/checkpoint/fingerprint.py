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
_DEVICE_BLOCK = 1 << 22  # elements per pass on a device
_UNSIGNED = {1: "uint8", 2: "uint16", 4: "uint32", 8: "uint32"}  # 8-byte elements count as two words


def fingerprint(x: jax.Array) -> jax.Array:
    """uint32 scalar for an array of any shape and sharding, computed on the devices that hold it.

    Beside its shard of the array a device needs memory for a block of 2^22 elements.

    For typed PRNG keys pass their key data. Raises KeyError for elements that are not 1, 2, 4 or 8 bytes wide.
    """
    from jax.sharding import NamedSharding

    shards = x.sharding if isinstance(x.sharding, NamedSharding) else None
    return _program(shards and shards.mesh, shards and shards.spec)(x)


@functools.cache
def _program(mesh: Any, spec: Any) -> Any:
    """The compiled sum for arrays of this sharding, or of one device (None). One compilation per shape and dtype."""
    import jax
    from jax.sharding import PartitionSpec

    def of_whole(x: jax.Array) -> jax.Array:
        strides = _strides(x.shape, x.dtype)
        if mesh is None or mesh.size == 1:
            return _sum_in_blocks(x, 0, strides)
        by_axis = [(names,) if isinstance(names, str) else tuple(names or ()) for names in spec]
        names = tuple(name for axis in by_axis for name in axis)

        def of_shard(part: jax.Array) -> jax.Array:
            first = jax.numpy.uint32(0)
            for axis, size, stride in zip(by_axis, part.shape, strides):
                if axis:
                    first += jax.lax.axis_index(axis).astype("uint32") * jax.numpy.uint32(size * stride % 2**32)
            total = _sum_in_blocks(part, first, strides)
            return jax.lax.psum(total, names) if names else total

        one = PartitionSpec()
        return jax.shard_map(of_shard, mesh=mesh, in_specs=spec, out_specs=one, check_vma=False)(x)

    return jax.jit(of_whole)


def _strides(shape: tuple[int, ...], dtype: Any) -> tuple[int, ...]:
    """The distance of neighbours on each axis, in the words of a row-major array."""
    words = max(1, dtype.itemsize // 4)
    return tuple(words * math.prod(shape[axis + 1 :]) for axis in range(len(shape)))


def _sum_in_blocks(x: jax.Array, first: Any, strides: tuple[int, ...]) -> jax.Array:
    """The sum over x, whose first element has the index `first`: block by block, since XLA stores what it sums up."""
    import jax
    import jax.numpy as jnp

    if x.size <= _DEVICE_BLOCK:
        return _sum_of_mixed(x, first, strides)
    rows = _DEVICE_BLOCK // math.prod(x.shape[1:])  # in a block; 0: one row is too large for it
    step = max(1, rows)

    def of_rows(start: Any, count: int) -> jax.Array:
        block = jax.lax.dynamic_slice_in_dim(x, start, count)
        begin = first + jnp.asarray(start).astype(jnp.uint32) * jnp.uint32(strides[0] % 2**32)
        return _sum_of_mixed(block, begin, strides) if rows else _sum_in_blocks(block[0], begin, strides[1:])

    whole, rest = divmod(x.shape[0], step)
    total = jax.lax.fori_loop(0, whole, lambda i, total: total + of_rows(i * step, step), jnp.uint32(0))
    return total + of_rows(whole * step, rest) if rest else total


def _sum_of_mixed(x: jax.Array, first: Any, strides: tuple[int, ...]) -> jax.Array:
    import jax
    import jax.numpy as jnp

    x = x.astype(jnp.uint8) if x.dtype == jnp.bool_ else x
    bits = jax.lax.bitcast_convert_type(x, jnp.dtype(_UNSIGNED[x.dtype.itemsize])).astype(jnp.uint32)
    strides = strides if bits.ndim == x.ndim else (*strides, 1)  # elements of two words
    index = jnp.full(bits.shape, first, jnp.uint32)
    for axis, stride in enumerate(strides):
        index += jax.lax.broadcasted_iota(jnp.uint32, bits.shape, axis) * jnp.uint32(stride % 2**32)
    mixed = bits ^ (index * jnp.uint32(_GOLDEN))
    mixed = (mixed ^ (mixed >> 16)) * jnp.uint32(_MIX)
    return jnp.sum(mixed ^ (mixed >> 15), dtype=jnp.uint32)


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
