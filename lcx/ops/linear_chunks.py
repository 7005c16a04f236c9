"""The parts of chunked linear attention: T split into chunks of C tokens, weights in a chunk, and the chunks' states.

Inside, arrays are [B, G, r, C, ...]: G groups of heads, the same for all arrays, and r heads per group, or r = 1 for an
array that the heads of a group share.
"""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array

from lcx.ops.decay import split
from lcx.ops.tiling import factor


def grouped(arrays, C):
    """[B, T, n, ...] -> [T / C, B, G, r, C, ...], G groups for all, r 1 or N / G: the heads of one group."""
    heads = [x.shape[2] for x in arrays if x is not None]
    N = max(heads)
    groups = math.gcd(*heads)

    def cut(x):
        if x is None:
            return None
        B, T, n = x.shape[:3]
        if n not in (groups, N):
            x, n = jnp.repeat(x, N // n, axis=2), N
        x = jnp.pad(x, ((0, 0), (0, -T % C), *((0, 0),) * (x.ndim - 2)))
        x = x.reshape(B, -1, C, groups, n // groups, *x.shape[3:])
        return jnp.moveaxis(x, (1, 3, 4), (0, 2, 3))

    return [cut(x) for x in arrays]


def ungrouped(x: Array, T: int) -> Array:
    """[T / C, B, G, r, C, ...] -> [B, T, G r, ...], with the padding removed."""
    x = jnp.moveaxis(x, (0, 2, 3), (1, 3, 4))
    return x.reshape(x.shape[0], x.shape[1] * x.shape[2], -1, *x.shape[5:])[:, :T]


def dot(spec: str, x: Array, y: Array, heads: int | None = None) -> Array:
    """einsum into float32; the second operand takes the first's dtype. heads = 1: the result sums over r, kept as 1."""
    if heads == 1:
        return jnp.expand_dims(dot(spec[::-1].replace("r", "", 1)[::-1], x, y), 2)
    return jnp.einsum(spec, factor(x), factor(y.astype(x.dtype)), preferred_element_type=jnp.float32)


def chunk_weights(a: Array | None, first: Array | None, C: int) -> tuple[Array, Array, Array, Array]:
    """The decay weights of one chunk, with leading axes B, G, r or 1.

    Returns four weights: of each pair of tokens [.., C, C]; of the entering state in each query [.., C]; of each key in
    the state at the chunk's end [.., C]; and of the entering state in that state [.., 1].
    """
    seen, leaving = same_document(first, C)
    carried = jnp.ones((1, 1, 1, 1), jnp.float32)
    entering = jnp.ones((1, 1, 1, C), jnp.float32)
    if first is not None:
        entering = (first[:, None, None] < 0).astype(jnp.float32)
        carried = entering[..., -1:]
    if a is None:
        return seen, entering, leaving, carried
    g = _sums("bgrts,xbgrs->xbgrt", seen, split(a, C))
    pairs = jnp.sum(g[..., :, None] - g[..., None, :], axis=0)
    decay = jnp.exp(jnp.where(seen != 0, pairs, -jnp.inf))
    to_end = jnp.exp(jnp.where(leaving != 0, jnp.sum(g[..., -1:] - g, axis=0), -jnp.inf))
    from_start = jnp.exp(jnp.sum(g, axis=0))
    return decay, entering * from_start, to_end, carried * from_start[..., -1:]


def same_document(first: Array | None, C: int) -> tuple[Array, Array]:
    """1 where token i of a chunk sees token j [B, 1, 1, C, C], and for the tokens of its last document [B, 1, 1, C].

    0 elsewhere: products with these are sums over the tokens of one document, to which no other one adds as much as a
    rounding error.
    """
    place = jnp.arange(C)
    seen, last = (place <= place[:, None])[None, None, None], jnp.ones((1, 1, 1, C), bool)
    if first is not None:
        seen = seen & (place >= first[:, None, None, :, None])
        last = place >= first[:, None, None, -1:]
    return seen.astype(jnp.float32), last.astype(jnp.float32)


def decay_gradient(terms: Array, at_end: Array, first: Array | None, C: int) -> Array:
    """The sums of terms [B, G, r, C] over the later tokens of a chunk that are of the same document, and at_end
    [B, G, r] for those of its last document."""
    seen, last = same_document(first, C)
    return _sums("bgrts,bgrt->bgrs", seen, terms) + last * at_end[..., None]


def _sums(spec: str, ones: Array, x: Array) -> Array:
    """einsum of zeros and ones, the same for all heads, with numbers."""
    spec = spec.replace("bgrts", "bts" if ones.shape[0] > 1 else "ts", 1)
    ones = ones[:, 0, 0] if ones.shape[0] > 1 else ones[0, 0, 0]
    return jnp.einsum(spec, ones, x, precision=jax.lax.Precision.HIGHEST)


def next_state(k: Array, v: Array, leaving: Array, carried: Array, state):
    """The state (kv, z or None) at the end of a chunk."""
    kv, z = state
    weighted = (v * leaving[..., None]).astype(v.dtype)
    kv = carried[..., None] * kv + dot("bgrsp,bgrsh->bgrph", k, weighted)
    if z is not None:
        z = carried * z + jnp.einsum("bgrsp,bgrs->bgrp", k.astype(jnp.float32), leaving)
    return kv, z


def nonzero(norm):
    return jnp.where(norm == 0, 1.0, norm)


def states_before(k, v, a, first, state):
    """The states that enter each chunk, stacked, and the state after the last chunk."""

    def step(state, x):
        k, v, a, first = x
        _, _, leaving, carried = chunk_weights(a, first, k.shape[3])
        return next_state(k, v, leaving, carried, state), state

    last, before = jax.lax.scan(step, state, (k, v, a, first))
    return before, last
