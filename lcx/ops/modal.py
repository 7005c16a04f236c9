"""Filters that are sums of decaying exponentials, and the equivalent recurrence: Hyena-LI.

    h[d, t] = sum_p residue[d, p] exp(log_pole[d, p] t)          taps, for `long_conv`
    s_t = exp(log_pole) s_{t-1} + g_t,   y_t = sum_p residue s_t  the same convolution, one token at a time

Letters: B batch, D channels, P modes (16 in Hyena-LI), T time, C block of times.

No array here has D x P x T elements: with t = i C + j, exp(log_pole t) = exp(log_pole i C) exp(log_pole j), so taps,
states and responses are products of two small tables of exponentials. Since log_pole <= 0, no exponent is positive.
Everything is float32; poles are real.

Distances are counted in positions of the row, as in every convolution: padding between two tokens of a document counts
as distance, although its input is 0. A state is taken at the last token, so padding after it does not count.
"""

import math
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from lcx.ops import segments, shards

BLOCK = 128  # length of the tables of powers of the poles, D x P x BLOCK elements


class ModalState(NamedTuple):
    """s after the last token, and the id of its document; 0: the state is empty."""

    modes: Float[Array, "B D P"]
    segment_ids: Int[Array, " B"]


def taps(
    log_pole: Float[Array, "D P"], residue: Float[Array, "D P"], length: int
) -> Float[Array, "D {length}"]:
    """h[:, :length], float32."""
    return _sums(log_pole.astype(jnp.float32), residue.astype(jnp.float32), length)


def state(
    g: Float[Array, "B D T"],
    log_pole: Float[Array, "D P"],
    *,
    segment_ids: Int[Array, "B T"] | None = None,
    initial_state: ModalState | None = None,
) -> ModalState:
    """The state at the last token of the inputs g: s = sum_k exp(log_pole (T-1-k)) g_k over the row's last document."""
    B, _, T = g.shape
    log_pole = log_pole.astype(jnp.float32)
    g = g.astype(jnp.float32)
    last, continued = jnp.ones(B, jnp.int32), jnp.zeros(B, bool)
    if segment_ids is not None or initial_state is not None:
        ids = jnp.ones((B, T), jnp.int32) if segment_ids is None else segment_ids
        before = None if initial_state is None else initial_state.segment_ids
        last, runs = segments.last(ids, before), segments.runs(ids, before)
        g = jnp.where(((runs == runs[:, -1:]) & (ids != 0))[:, None], g, 0)
        continued = runs[:, -1] == 0
        last_place = segments.end(ids)
        source = jnp.arange(T) - (T - last_place)[:, None]  # moves padding from the end to the front
        moved = jnp.take_along_axis(g, jnp.maximum(source, 0)[:, None], axis=2)
        g = jnp.where((source >= 0)[:, None], moved, 0)
    modes = _modes(g, log_pole)
    if initial_state is not None:
        held = initial_state.modes * jnp.exp(log_pole * last_place[:, None, None])
        modes = modes + jnp.where(continued[:, None, None], held, 0)
    return ModalState(modes, last)


def _modes(g: Array, log_pole: Array) -> Array:
    """sum_k exp(log_pole (T - 1 - k)) g_k [B, D, P] for g [B, D, T]."""
    B, D, T = g.shape
    blocks = jnp.pad(g, ((0, 0), (0, 0), (-T % BLOCK, 0))).reshape(B, D, -1, BLOCK)
    fine = _powers(log_pole, jnp.arange(BLOCK - 1, -1, -1))
    coarse = _powers(log_pole * BLOCK, jnp.arange(blocks.shape[2] - 1, -1, -1))
    partial = jnp.einsum("bdij,djp->bdip", blocks, fine, precision="highest")
    return jnp.einsum("bdip,dip->bdp", partial, coarse, precision="highest")


def state_before(
    g: Float[Array, "B D T"],
    log_pole: Float[Array, "D P"],
    *,
    segment_ids: Int[Array, "B T"] | None = None,
    initial_state: ModalState | None = None,
    mesh_axis: str,
) -> ModalState:
    """The state before this device's part of the rows, in a shard_map over mesh_axis (shards.py).

    A device receives P' - 1 times (B + 1) D P numbers from P' devices, and ids. Padding at the end of a part counts as
    distance here.
    """
    log_pole, g = log_pole.astype(jnp.float32), g.astype(jnp.float32)
    if segment_ids is not None:
        runs = segments.runs(segment_ids)
        g = jnp.where(((runs == runs[:, -1:]) & (segment_ids != 0))[:, None], g, 0)
    own = shards.part(_modes(g, log_pole), (log_pole * g.shape[2])[None], segment_ids)
    return ModalState(*shards.state_before(own, mesh_axis, initial_state))


def response(
    initial_state: ModalState,
    log_pole: Float[Array, "D P"],
    residue: Float[Array, "D P"],
    *,
    length: int,
    segment_ids: Int[Array, "B T"] | None = None,
) -> Float[Array, "B D {length}"]:
    """The response of earlier tokens at the next `length` tokens, float32: sum_p residue exp(log_pole (t + 1)) s."""
    if segment_ids is None:
        segment_ids = jnp.ones((initial_state.modes.shape[0], length), jnp.int32)
    log_pole = log_pole.astype(jnp.float32)
    weights = initial_state.modes * jnp.exp(log_pole) * residue.astype(jnp.float32)
    y = _sums(log_pole, weights, length)
    sees = (segments.runs(segment_ids, initial_state.segment_ids) == 0) & (segment_ids != 0)
    return jnp.where(sees[:, None], y, 0)


def step(
    g: Float[Array, "B D"],
    log_pole: Float[Array, "D P"],
    residue: Float[Array, "D P"],
    initial_state: ModalState,
    *,
    segment_ids: Int[Array, " B"] | None = None,
) -> tuple[Float[Array, "B D"], ModalState]:
    """One token: (sum_p residue s, the new state), float32. At padding the output is 0 and the state is unchanged."""
    ids = jnp.ones(g.shape[0], jnp.int32) if segment_ids is None else segment_ids
    held = initial_state.modes * jnp.exp(log_pole.astype(jnp.float32))
    there, same = ids != 0, ids == initial_state.segment_ids
    held = jnp.where(there[:, None, None], jnp.where(same[:, None, None], held, 0), initial_state.modes)
    modes = held + jnp.where(there[:, None], g.astype(jnp.float32), 0)[:, :, None]
    y = jnp.einsum("bdp,dp->bd", modes, residue.astype(jnp.float32), precision="highest")
    last = jnp.where(there, ids, initial_state.segment_ids)
    return jnp.where(there[:, None], y, 0), ModalState(modes, last)


def _sums(log_pole: Array, weights: Array, length: int) -> Array:
    """sum_p weights exp(log_pole t) for t < length; weights [..., D, P] -> [..., D, length]."""
    C = 1 << math.ceil(math.log2(max(length, 1)) / 2)
    count = -(-length // C)
    coarse = weights[..., None, :] * _powers(log_pole * C, jnp.arange(count))
    fine = _powers(log_pole, jnp.arange(C))
    h = jnp.einsum("...dip,djp->...dij", coarse, fine, precision="highest")
    return h.reshape(*h.shape[:-2], -1)[..., :length]


def _powers(log_pole: Array, times: Array) -> Array:
    """exp(log_pole t), [D, len(times), P]."""
    return jnp.exp(log_pole[:, None] * times[:, None])
