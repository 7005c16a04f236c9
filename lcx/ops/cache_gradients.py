"""The gradient of a cache of keys and values that the layers of a scan read: added up in one array.

The layers of a stage are a scan, and each reads its own part of their stacked cache. Differentiated as it stands, such
a scan writes the parts of the cache's gradient to a new array, which is then added to the gradient that was there: that
of the later pieces of a row (lcx/pieces.py). Two arrays of the size of all keys and values would be in memory.

So the cache also takes part in what the scan hands from layer to layer, unchanged. Its gradient then goes through the
layers in reverse, and `read` adds a layer's part to it, in place. The values that a layer works with come from the
scanned cache, which has no gradient.
"""

import functools
from typing import Any

import jax
from jaxtyping import Array, Int

Tree = Any


@jax.custom_vjp
def read(cache: Tree, stacked: Tree, layer: Int[Array, ""]) -> tuple[Tree, Tree]:
    """(the cache of this layer, those of all layers), as they came in; gradients go into those of all layers."""
    return cache, stacked


def _forward(cache: Tree, stacked: Tree, layer: Array) -> tuple[tuple[Tree, Tree], Array]:
    return (cache, stacked), layer


def _backward(layer: Array, cotangents: tuple[Tree, Tree]) -> tuple[None, Tree, None]:
    def added(part: Array, so_far: Array) -> Array:
        if part.dtype == jax.dtypes.float0:
            return so_far
        whole = jax.lax.dynamic_index_in_dim(so_far, layer, keepdims=False)
        return jax.lax.dynamic_update_index_in_dim(so_far, whole + part, layer, 0)

    return None, jax.tree.map(added, *cotangents), None


read.defvjp(_forward, _backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def write(slots: Array, new: Array, start: Int[Array, ""], axis: int) -> Array:
    """The slots with new entries from `start` on along `axis`, where no entry was written before.

    The gradient by those slots, which held nothing, should be zero. It is left as it is, and nothing reads it: writing
    zeros would make the compiler copy the whole array, of which it does not know that the part was read before.
    """
    return jax.lax.dynamic_update_slice_in_dim(slots, new, start, axis)


def _write_forward(slots: Array, new: Array, start: Array, axis: int) -> tuple[Array, tuple[Array, int]]:
    return write(slots, new, start, axis), (start, new.shape[axis])


def _write_backward(axis: int, kept: tuple[Array, int], d_slots: Array) -> tuple[Array, Array, None]:
    start, size = kept
    return d_slots, jax.lax.dynamic_slice_in_dim(d_slots, start, size, axis), None


write.defvjp(_write_forward, _write_backward)
