"""The state of linear attention before one device's part of a row (see shards.py).

The state that a part adds is a single product, sum_t k_t (w_t v_t)^T, with w_t the decay from t to the part's end. So
the states are on their way before any output is computed. A device receives P - 1 times n (p H + p + 1) numbers per
row: n states of p x H numbers with their normaliser and decay, for p features. n is the number of heads that differ:
the larger of those of k and v, or all N with a decay or an earlier state. The backward pass sends as much.

With a window the newest keys are not in the state: a device gets the R keys before its part as a halo, with values and
features, and the states are those of R tokens earlier. That is R (K H + Kv H + Nk p) numbers more.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from lcx.ops import segments, shards
from lcx.ops.decay import GONE
from lcx.ops.linear_chunks import dot
from lcx.ops.linear_state import Held, LinearState, Window
from lcx.ops.windowed_linear_attention import held_slots


def state_before(
    k: Array,
    v: Array,
    log_decay: Array | None,
    segment_ids: Array | None,
    initial: LinearState | None,
    *,
    heads: int,
    normalize: bool,
    mesh_axis: str,
) -> LinearState:
    """The state before this device's part, for k [B, T, Nk, p], v [B, T, Nv, H] and log_decay [B, T, Na]."""
    if log_decay is not None:
        log_decay = jnp.maximum(log_decay.astype(jnp.float32), GONE)
        if segment_ids is not None:
            log_decay = jnp.where((segment_ids != 0)[..., None], log_decay, 0)
    weights, decay = shards.weights_to_end(log_decay, segment_ids, k.shape[:2])
    kv: Array = _sums(k, v, weights, heads)
    k_sum: Array | None = _key_sums(k, weights) if normalize else None
    before = None
    if initial is not None:
        before = (initial.kv, initial.k_sum if normalize else None), initial.segment_ids
    if decay is not None or before is not None:  # every head has a state of its own
        kv, k_sum, decay = jax.tree.map(lambda x: _repeated(x, heads), (kv, k_sum, decay))
    own = shards.part((kv, k_sum), decay, segment_ids)
    state, ids = shards.state_before(own, mesh_axis, before)
    kv, k_sum = jax.tree.map(lambda x: _repeated(x, heads), state)
    return LinearState(kv, k_sum, ids)


def _sums(k: Array, v: Array, weights: Array, heads: int) -> Array:
    """sum_t w_t k_t v_t^T [B, n, p, H], with no more heads than the arguments have."""
    v = (v * weights[..., None]).astype(v.dtype)
    few, many = sorted((k.shape[2], v.shape[2]))
    if many % few:
        k, v = (_repeated(x, heads, axis=2) for x in (k, v))
        few = heads
    k, v = (
        x.reshape(*x.shape[:2], few, -1, x.shape[3]) for x in (k, v)
    )  # one of them has one head per group
    sums = dot("bsgrp,bsgqh->bgrqph", k, v)
    return sums.reshape(sums.shape[0], -1, *sums.shape[4:])


def _key_sums(k: Array, weights: Array) -> Array:
    """sum_t w_t k_t [B, n, p]."""
    n = max(k.shape[2], weights.shape[2])
    wide = _repeated(k.astype(jnp.float32), n, axis=2)
    return jnp.sum(wide * _repeated(weights, n, axis=2)[..., None], axis=1)


def _repeated(x: Array, heads: int, axis: int = 1) -> Array:
    return x if x.shape[axis] == heads else jnp.repeat(x, heads // x.shape[axis], axis=axis)


def windowed_state_before(
    k: Array,
    v: Array,
    window: Window,
    segment_ids: Array | None,
    initial: LinearState | None,
    *,
    heads: int,
    mesh_axis: str,
) -> LinearState:
    """The state before this device's part, with the held keys of a window. k: the features [B, T, Nk, p].

    Padding between two tokens of one document is not allowed: the halo would hold it instead of tokens.
    """
    B, T = k.shape[:2]
    ids = jnp.ones((B, T), jnp.int32) if segment_ids is None else segment_ids
    R = held_slots(window.kind, window.size)
    held: Any = (None, None, None)
    old_ids = None
    if initial is not None:
        held = initial.held
        used = jnp.arange(R) >= R - jnp.minimum(held.length, R)[:, None]
        old_ids = jnp.where(used, initial.segment_ids[:, None], 0)
    own = (window.k, v, k)
    keys, values, features = (
        shards.halo(x, R, mesh_axis, before=old) for x, old in zip(own, held[:3], strict=True)
    )
    near = shards.halo(ids, R, mesh_axis, before=old_ids)
    # The tokens that are R behind those of this part.
    old_k, old_v, behind = (
        jnp.concatenate(pair, axis=1)[:, :T] for pair in ((features, k), (values, v), (near, ids))
    )
    linear = state_before(
        old_k, old_v, None, behind, initial, heads=heads, normalize=True, mesh_axis=mesh_axis
    )
    continues = (segments.runs(near, linear.segment_ids)[:, -1] == 0).astype(jnp.float32)
    return LinearState(
        continues[:, None, None, None] * linear.kv,
        continues[:, None, None] * jnp.asarray(linear.k_sum),
        segments.last(near, linear.segment_ids),
        Held(keys, values, features, _length(ids, initial, mesh_axis)),
    )


def _length(ids: Array, initial: LinearState | None, mesh_axis: str) -> Array:
    """[B] the tokens before this part that belong to the document of the last of them."""
    runs = segments.runs(ids)
    count = jnp.sum((runs == runs[:, -1:]) & (ids != 0), axis=1, dtype=jnp.int32)
    before = None
    if initial is not None and initial.held is not None:
        before = initial.held.length, initial.segment_ids
    return shards.state_before(shards.part(count, None, ids), mesh_axis, before)[0]
