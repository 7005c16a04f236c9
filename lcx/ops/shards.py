"""Rows whose tokens lie on several devices: what an operator sends between them, inside a shard_map over T.

Device r of the P devices of a mesh axis holds the r-th of P equal, consecutive parts of every row. An operator on a
part needs what came before it, which takes one of two forms:

    a halo     the n tokens before the part, for windows and convolutions       sent: n tokens
    a state    the result of a recurrence over all earlier parts                received: P - 1 states

Neither depends on T. States form a monoid (`Part`, `joined`): what follows a part sees the state before it, decayed
over the part, plus what the part adds. Up to GATHERED devices each device all-gathers all parts and joins the earlier
ones; more devices take 1 + log2 P steps of a parallel prefix instead, in each of which a device sends one state.

Documents follow ops/segments.py: a state belongs to a document, and only tokens of that document see it.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from lcx.ops import segments

GATHERED = 8  # up to this many devices an all-gather of the states takes less time than a prefix of log depth


def halo(x: Array, size: int, mesh_axis: str, *, axis: int = 1, before: Array | None = None) -> Array:
    """The `size` tokens before this device's part x, along `axis`.

    Before the first part lies `before`, an array of `size` tokens, or zeros. A halo longer than a part is sent in
    several steps, one for each part that it covers.
    """
    if size == 0:
        return jax.lax.slice_in_dim(x, 0, 0, axis=axis)
    P, T = jax.lax.axis_size(mesh_axis), x.shape[axis]
    steps = min(-(-size // T), P - 1)
    sent = jax.lax.slice_in_dim(x, T - min(size, T), T, axis=axis)
    parts = []  # nearest first; zeros where there is no such part
    for _ in range(steps):
        sent = jax.lax.ppermute(sent, mesh_axis, [(i, i + 1) for i in range(P - 1)])
        parts.insert(0, sent)
    length = parts[0].shape[axis]
    oldest = jnp.zeros_like(x, shape=(*x.shape[:axis], size, *x.shape[axis + 1 :]))
    whole = jnp.concatenate([oldest, *parts], axis=axis)
    if before is not None:
        there = jnp.minimum(jax.lax.axis_index(mesh_axis), steps)
        start = (steps - there) * length
        whole = jax.lax.dynamic_update_slice_in_dim(whole, before.astype(x.dtype), start, axis)
    return jax.lax.slice_in_dim(whole, whole.shape[axis] - size, whole.shape[axis], axis=axis)


class Part(NamedTuple):
    """What a part of a row does to a state. All zeros: nothing, like a part of padding alone."""

    state: Any  # a tree of arrays [B, ...]: what the part's last document adds
    log_decay: Any  # an array [B, ...], leading axes of the state's: the decay of the earlier state; None: 0
    first: Int[Array, " B"]  # the id of the part's first document; 0: only padding
    last: Int[Array, " B"]  # the id of its last document
    alone: Bool[Array, " B"]  # whether that is one and the same document


def part(state: Any, log_decay: Array | None, segment_ids: Int[Array, "B T"] | None) -> Part:
    """A Part from its segment ids; None: one document, with id 1."""
    if segment_ids is None:
        one = jnp.ones(jax.tree.leaves(state)[0].shape[:1], jnp.int32)
        return Part(state, log_decay, one, one, one == 1)
    first = jnp.take_along_axis(segment_ids, jnp.argmax(segment_ids != 0, axis=1)[:, None], axis=1)[:, 0]
    alone = segments.runs(segment_ids)[:, -1] <= 1
    return Part(state, log_decay, first, segments.last(segment_ids), alone)


def joined(left: Part, right: Part) -> Part:
    """Two consecutive parts as one."""
    empty = right.last == 0
    continues = empty | (right.alone & (right.first == left.last))
    keep = (
        continues if right.log_decay is None else _over(continues, right.log_decay) * jnp.exp(right.log_decay)
    )
    state = jax.tree.map(lambda old, new: _over(keep, old) * old + new, left.state, right.state)
    decay = None if right.log_decay is None else left.log_decay + right.log_decay
    return Part(
        state,
        decay,
        jnp.where(left.last == 0, right.first, left.first),
        jnp.where(empty, left.last, right.last),
        jnp.where(left.last == 0, right.alone, left.alone & continues),
    )


def _over(x: Array, like: Array) -> Array:
    """x [B, ...] with trailing axes of size 1 for those of `like` that it lacks."""
    return x.reshape(*x.shape, *(1,) * (like.ndim - x.ndim)).astype(like.dtype)


def state_before(
    own: Part, mesh_axis: str, initial: tuple[Any, Int[Array, " B"]] | None = None
) -> tuple[Any, Int[Array, " B"]]:
    """(the state before this device's part, the id of its document; 0: there is none).

    Args:
      own: this device's part.
      initial: the state before the row and its id; None: there is none.
    """
    before = jax.tree.map(jnp.zeros_like, own)
    if initial is not None:
        state, ids = initial
        like = jax.tree.map(lambda x, zero: x.astype(zero.dtype), state, before.state)
        before = before._replace(state=like, first=ids, last=ids, alone=jnp.ones_like(before.alone))
    found = (_by_gather if jax.lax.axis_size(mesh_axis) <= GATHERED else _by_steps)(before, own, mesh_axis)
    return found.state, found.last


def _by_gather(before: Part, own: Part, mesh_axis: str) -> Part:
    parts, place = jax.lax.all_gather(own, mesh_axis), jax.lax.axis_index(mesh_axis)
    for i in range(jax.lax.axis_size(mesh_axis) - 1):
        longer = joined(before, jax.tree.map(lambda x, i=i: x[i], parts))
        before = jax.tree.map(lambda new, old, i=i: jnp.where(i < place, new, old), longer, before)
    return before


def _by_steps(before: Part, own: Part, mesh_axis: str) -> Part:
    """Each device first takes its neighbour's part; after step s it holds those of the 2^s devices before it."""
    P, place = jax.lax.axis_size(mesh_axis), jax.lax.axis_index(mesh_axis)

    def sent(x: Part, distance: int) -> Part:  # zeros, an empty part, where nothing comes
        pairs = [(i, i + distance) for i in range(P - distance)]
        return jax.tree.map(lambda leaf: jax.lax.ppermute(leaf, mesh_axis, pairs), x)

    held = jax.tree.map(lambda first, new: jnp.where(place == 0, first, new), before, sent(own, 1))
    distance = 1
    while distance < P:
        held = joined(sent(held, distance), held)
        distance *= 2
    return held


def after_row(state: Any, segment_ids: Int[Array, "B T"] | None, mesh_axis: str | None) -> Any:
    """The state after whole rows, on every device: that of the device with the row's last token that is not padding.

    Args:
      state: a tree of arrays [B, ...]: the state after this device's part.
      mesh_axis: None: the part is the whole row.
    """
    if mesh_axis is None:
        return state
    P, place = jax.lax.axis_size(mesh_axis), jax.lax.axis_index(mesh_axis)
    if segment_ids is None:
        return jax.tree.map(lambda x: jax.lax.psum(jnp.where(place == P - 1, x, 0), mesh_axis), state)
    last = jax.lax.pmax(jnp.where(jnp.any(segment_ids != 0, axis=1), place, 0), mesh_axis)
    return jax.tree.map(
        lambda x: jax.lax.psum(jnp.where(_over(last == place, x) != 0, x, 0), mesh_axis), state
    )


def halo_in_words(size: int) -> str:
    return f"a halo of {size} token{'' if size == 1 else 's'}"


def weights_to_end(
    log_decay: Float[Array, "B T N"] | None, segment_ids: Int[Array, "B T"] | None, shape: tuple[int, ...]
) -> tuple[Float[Array, "B T _"], Float[Array, "B N"] | None]:
    """(the weight of each token in the state at the end of its part [B, T, N or 1], the decay over the whole part).

    A weight is the decay between a token and the end, 0 for padding and for all but the last document. The sum starts
    at the end, so the weights that matter, those near 1, are sums of few numbers.

    Args:
      log_decay: 0 at padding; -inf is allowed.
      shape: (B, T).
    """
    weights = jnp.ones((*shape, 1), jnp.float32)
    if segment_ids is not None:
        runs = segments.runs(segment_ids)
        weights = ((runs == runs[:, -1:]) & (segment_ids != 0)).astype(jnp.float32)[..., None]
    if log_decay is None:
        return weights, None
    sums = jax.lax.cumsum(log_decay, axis=1, reverse=True)
    later = jnp.pad(sums[:, 1:], ((0, 0), (0, 1), (0, 0)))
    return weights * jnp.exp(later), sums[:, 0]
