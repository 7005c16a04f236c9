"""The state of second-order attention before one device's part of a row (see shards.py).

A part adds sum_t expand(k_t) (w_t [v_t, 1])^T, with w_t the decay from t to the part's end. A device receives P - 1
times N (p (H + 1) + 1) numbers per row, p = `expanded_size(H)`; the backward pass sends as much.

Chunks in which no key weighs more than exp(SKIP) (second_order_ends.py) of the heaviest one are left out, so with a
strong decay a device only computes with the end of its part.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array

from lcx.ops import shards
from lcx.ops.second_order_ends import SKIP
from lcx.ops.second_order_expand import expand, expanded_size

CHUNK = 128  # tokens whose expanded keys are in memory at a time


def state_before(
    k: Array, v: Array, decay: Array, segment_ids: Array, initial, *, scale: float, mesh_axis: str
) -> tuple[tuple[Array, Array], Array]:
    """((kv [B, N, p, H], k_sum [B, N, p]), ids [B]) for k, v [B, T, K, H] and decay [B, T, N], 0 at padding.

    Args:
      initial: the state before the row: a SecondOrderState; its id is 0 if it is empty.
    """
    weights, total = shards.weights_to_end(decay, segment_ids, k.shape[:2])
    sums = scale**2 * _sums(k.astype(decay.dtype), v.astype(decay.dtype), weights)
    own = shards.part((sums[..., :-1], sums[..., -1]), total, segment_ids)
    return shards.state_before(own, mesh_axis, ((initial.kv, initial.k_sum), initial.segment_ids))


def _sums(k: Array, v: Array, weights: Array) -> Array:
    """sum_t w_t expand(k_t) [v_t, 1]^T [B, N, p, H + 1], some tokens at a time, recomputed in the backward pass."""
    (B, T, K, H), N = k.shape, weights.shape[2]
    ones = jnp.ones_like(v[..., :1])
    v, weights = jnp.concatenate([v, ones], axis=-1), weights.reshape(B, T, K, N // K, 1)
    heavy = jax.lax.stop_gradient(weights[..., 0] * jnp.sum(k * k, axis=-1, keepdims=True))
    light = heavy < jnp.exp(SKIP) * jnp.max(heavy, axis=1, keepdims=True)  # NaN is not light

    def chunks(x: Array) -> Array:
        x = jnp.pad(x, ((0, 0), (0, -T % CHUNK), *((0, 0),) * (x.ndim - 2)))
        return jnp.moveaxis(x.reshape(B, -1, min(CHUNK, x.shape[1]), *x.shape[2:]), 1, 0)

    @jax.checkpoint
    def add(total: Array, k: Array, v: Array, weights: Array) -> Array:
        sums = jnp.einsum("bskp,bskgw->bkgpw", expand(k), v[:, :, :, None] * weights, precision="highest")
        return total + sums

    def chunk(total: Array, xs: tuple[Array, ...]) -> tuple[Array, None]:
        *arrays, matters = xs
        return jax.lax.cond(jnp.any(matters), add, lambda total, *_: total, total, *arrays), None

    nothing = jnp.zeros((B, K, N // K, expanded_size(H), H + 1), v.dtype)
    sums, _ = jax.lax.scan(chunk, nothing, tuple(map(chunks, (k, v, weights, ~light))))
    return sums.reshape(B, N, *sums.shape[3:])
