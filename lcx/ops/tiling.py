"""Helpers of operators that work tile by tile: adding a slice in place, products that accumulate in float32."""

import jax
import jax.numpy as jnp
from jaxtyping import Array

from lcx.ops import dispatch

PIECE = 2**20  # bytes


def cut(x: Array, start, size: int, axis: int = 0) -> Array:
    return jax.lax.dynamic_slice_in_dim(x, start, size, axis)


def put(x: Array, part: Array, start, axis: int = 0) -> Array:
    return jax.lax.dynamic_update_slice_in_dim(x, part.astype(x.dtype), start, axis)


def add(x: Array, part: Array, start, axis: int = 0) -> Array:
    """x with `part` added to the slice that begins at `start`."""
    return put(x, cut(x, start, part.shape[axis], axis) + part, start, axis)


def factor(x: Array) -> Array:
    """x as a factor of a product with a float32 result; a CPU needs care with bfloat16.

    Without instructions for bfloat16, XLA runs such a product at two thirds of the speed of one with float32 factors,
    which is as exact. With them, it may merge a transpose into the product after it has decided how to compute it, and
    then cannot run it ("Unsupported element type for DotThunk"): the barrier keeps the factor an array of its own.
    """
    if x.dtype != jnp.bfloat16 or dispatch.platform() != "cpu":
        return x
    return jax.lax.optimization_barrier(x) if dispatch.multiplies_bfloat16() else x.astype(jnp.float32)


def dot(a: Array, b: Array, a_axis: int, b_axis: int) -> Array:
    """Contracts one axis of each matrix; accumulates in, and returns, float32 or wider."""
    dims, a, b = (((a_axis,), (b_axis,)), ((), ())), factor(a), factor(b)
    return jax.lax.dot_general(a, b, dims, preferred_element_type=jnp.promote_types(a.dtype, jnp.float32))


def biased(y: Array, bias: Array) -> Array:
    """y + bias in y's dtype, for a bias of all tokens: its gradient is a sum over them, in float32 or wider.

    In bfloat16 a sum ends as soon as a term is less than half of its last bit.
    """
    return (y.astype(jnp.promote_types(y.dtype, jnp.float32)) + bias).astype(y.dtype)


def scaled(x: Array, scale: Array) -> Array:
    """x * scale in x's dtype, for a scale of all tokens, with its gradient summed as that of a bias."""
    return (x.astype(jnp.promote_types(x.dtype, jnp.float32)) * scale).astype(x.dtype)


def row_dots(a: Array, b: Array) -> Array:
    """The sum of a * b over the last axis, for rows of float32 or wider.

    On a CPU it is a product of vectors: as a sum, XLA spends about a microsecond on each row of 64 numbers or more.
    """
    if dispatch.platform() == "cpu":
        return jnp.einsum("...d,...d->...", a, b)
    return jnp.sum(a * b, axis=-1)


def by_pieces(fn, *arrays):
    """fn(*arrays), for a function that treats each token of [B, T, ...] by itself, without a gradient.

    On a CPU it gets some MB of tokens at a time, as XLA's sums over the last axis hold four times their argument there.
    """
    T = arrays[0].shape[1]
    size = max(1, PIECE // (max(x.size * x.dtype.itemsize for x in arrays) // T))
    if size >= T or dispatch.platform() != "cpu":
        return fn(*arrays)

    def piece(i, out):
        start = jnp.minimum(i * size, T - size)
        parts = fn(*(cut(x, start, size, axis=1) for x in arrays))
        return jax.tree.map(lambda x, part: put(x, part, start, axis=1), out, parts)

    out = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(fn, *arrays))
    return jax.lax.fori_loop(0, -(-T // size), piece, out)


def each_head(fn, arrays, *, at_once: int = 1):
    """Maps fn over the first axis of every array.

    On a CPU this is a loop over `at_once` heads, so that their tiles stay in cache; elsewhere it is a vmap over all, to
    fill the chip. `at_once` has to divide the number of heads.
    """
    if dispatch.platform() != "cpu":
        return jax.vmap(fn)(*arrays)
    if at_once == 1:
        return jax.lax.map(lambda xs: fn(*xs), arrays)
    return jax.lax.map(lambda xs: fn(*xs), arrays, batch_size=at_once)
