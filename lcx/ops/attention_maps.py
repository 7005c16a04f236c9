"""Cross-entropy between the attention weights of linear and of softmax attention: attention transfer's second loss.

    a_ij  softmax over j of q_i.k_j / sqrt(H)
    b_ij  (e_ij + l_ij) / sum_j (e_ij + l_ij)    (windowed_linear_attention.py; without a window l_ij alone)
    loss_i = - sum_j a_ij log(max(b_ij, floor) / sum_j max(b_ij, floor))

(LoLCATS, Zhang et al. 2024, arXiv 2410.10254, section 3.1; Hedgehog, arXiv 2402.04347, eq. 4.) The loss is over all
pairs, so its cost is quadratic in T. Memory is linear: queries are processed in chunks, which the backward pass
recomputes.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from lcx.ops.linear_chunks import dot
from lcx.ops.linear_state import Window
from lcx.ops.windowed_linear_attention import NEG, Slots

CHUNK = 64
FLOOR = 1e-12


def cross_entropy_of_maps(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T N H"],
    q_features: Float[Array, "B T N P"],
    k_features: Float[Array, "B T N P"],
    *,
    window: Window | None = None,
    softmax_window: int | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
) -> Float[Array, "B T"]:
    """The loss of every query [B, T], averaged over heads, in nats, float32; 0 at padding.

    Args:
      q, k: queries and keys of the softmax attention, after rotation; its weights are the target and get no gradient.
      window: the window of the linear attention; only kind, size and scale are used.
      softmax_window: the sliding window of the softmax attention, in keys; None: all earlier keys.
    """
    B, T, N, _ = q.shape
    blank = Window("sliding", 1, q, k, jnp.zeros((N,))) if window is None else window
    slots = Slots.of(blank, segment_ids, None, B, T)
    nearest = jnp.arange(1, T + 1)[None] if window is None else slots.nearest
    rows = -(-T // CHUNK) * CHUNK

    def chunks(x):
        x = jnp.pad(x, ((0, 0), (0, rows - T), *((0, 0),) * (x.ndim - 2)))
        return jnp.moveaxis(x.reshape(B, -1, CHUNK, *x.shape[2:]), 1, 0)

    q, k, q_features, k_features = (slots.arrange(None, x) for x in (q, k, q_features, k_features))
    k = jax.lax.stop_gradient(k)
    gamma = None if window is None else window.scale.astype(jnp.float32)[:, None, None]
    one = functools.partial(_chunk, k=k, k_features=k_features, gamma=gamma, softmax_window=softmax_window)
    places = (jnp.broadcast_to(x, (B, T)) for x in (jnp.arange(T)[None], slots.oldest, nearest))
    arrays = (jax.lax.stop_gradient(q), q_features, *places)
    losses = jax.lax.map(lambda x: jax.checkpoint(one)(*x), tuple(chunks(x) for x in arrays))
    losses = jnp.moveaxis(losses, 0, 1).reshape(B, rows)[:, :T]
    return slots.restore(losses[..., None, None])[..., 0, 0]


def _chunk(q, q_features, own, oldest, nearest, *, k, k_features, gamma, softmax_window) -> Array:
    """The losses [B, C] of a chunk of C queries, against all keys."""
    key = jnp.arange(k.shape[1])
    own, oldest, nearest = (x[:, None, :, None] for x in (own, oldest, nearest))
    seen = (key >= oldest) & (key <= own)
    far, near = seen & (key < nearest), seen & (key >= nearest)
    scores = dot("btnh,bsnh->bnts", q, k) * q.shape[-1] ** -0.5
    wanted = seen if softmax_window is None else seen & (key > own - softmax_window)
    target = jax.nn.softmax(jnp.where(wanted, scores, NEG), axis=-1)
    weights = jnp.where(far, dot("btnp,bsnp->bnts", q_features, k_features), 0)
    if gamma is not None:
        top = jnp.max(jnp.where(near, scores, NEG), axis=-1, keepdims=True)
        weights += gamma * jnp.where(near, jnp.exp(jnp.minimum(scores - top, 0)), 0)
    total = jnp.sum(weights, axis=-1, keepdims=True)
    share = jnp.maximum(weights / jnp.maximum(total, FLOOR), FLOOR)
    log_share = jnp.log(share) - jnp.log(jnp.sum(jnp.where(seen, share, 0), axis=-1, keepdims=True) + FLOOR)
    return -jnp.mean(jnp.sum(jnp.where(wanted, target * log_share, 0), axis=-1), axis=1)
