"""The likeliest tokens of rows of which many begin alike: what they share is read once (a grid of needles, few-shot
questions with several answers).

All rows of one shape are read in pieces of the same size, and sorted, so that rows with the same beginning are
neighbours. One path of states, one row wide, goes from piece to piece along the shared tokens; each group of rows
continues from the end of what it shares, and the next group from where both still agree. The programs are those of one
piece of one row, of one piece of a whole group, and of the answers: three for each shape, whatever the rows share.
"""

import functools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from lcx import pieces
from lcx.evals.support import scoring, shared_prefixes
from lcx.evals.support.model_facts import varies
from lcx.model import Decoder

PIECES = 8  # of a row: what rows share is read once in whole pieces
# Tokens saved times parameters from which three programs are worth their compilation: 2e12 floating-point operations,
# tens of seconds on a CPU. A model of a million parameters never saves that much.
WORTH = 1e12
# The states that wait, one at each piece, and those of the rows at once may take as much memory as the parameters do,
# or this many bytes.
STATES = 1 << 30

Row = Int[np.ndarray, " T"]


class Group(NamedTuple):
    """Rows (their numbers) that share so many pieces with each other."""

    rows: list[int]
    shared: int


class Plan(NamedTuple):
    """How to read the rows of one shape: the groups in their order, the tokens of a piece, the rows at once, and how
    many tokens are saved, the rows that fill up a batch counted."""

    groups: list[Group]
    step: int
    size: int
    saved: int


def plan(rows: Sequence[Sequence[int]], places: Sequence[Sequence[int]], width: int, size: int) -> Plan:
    """Groups of neighbours in the sorted rows, each with the pieces that its rows share.

    Args:
      places: indices whose tokens are asked for; what comes before the first of them may be shared.
      width: tokens to which the rows are padded otherwise; size: the most rows at once.
    """
    step = -(-width // PIECES)
    order = sorted(range(len(rows)), key=lambda i: np.asarray(rows[i], ">i4").tobytes())
    most = [max(0, min(places[i], default=1) - 1) // step for i in order]
    common = [
        min(_alike(rows[a], rows[b]) // step, most[n], most[n + 1])
        for n, (a, b) in enumerate(zip(order[:-1], order[1:], strict=True))
    ]
    depth = [max(before, after) for before, after in zip([0, *common], [*common, 0], strict=True)]
    groups: list[Group] = []
    for n, number in enumerate(order):
        if n and depth[n] == depth[n - 1] == common[n - 1]:
            groups[-1].rows.append(number)
        else:
            groups.append(Group([number], depth[n]))
    read, path, size = 0, 0, min(size, max(len(group.rows) for group in groups))
    for group in groups:
        longest = max(len(rows[i]) for i in group.rows)
        read += -(-len(group.rows) // size) * size * (-(-longest // step) - group.shared)
    for group, before in zip(groups, [None, *groups[:-1]], strict=True):
        kept = 0 if before is None else _alike(rows[group.rows[0]], rows[before.rows[0]]) // step
        path += max(0, group.shared - min(kept, group.shared if before is None else before.shared))
    whole = sum(-(-len(row) // step) for row in rows)
    return Plan(groups, step, size, (whole - read - path) * step)


def worthwhile(
    model: Decoder, params: Any, rows: Sequence[Sequence[int]], places: Sequence[Sequence[int]], width: int, size: int
) -> Plan | None:
    """The plan (arguments as there) if sharing costs less than it saves and gives the same numbers: not for a rotation
    that depends on the length of a row, not over several devices, and not if the states would need too much memory."""
    parameters = sum(x.size for x in jax.tree.leaves(params))
    if sum(map(len, rows)) * parameters < WORTH:  # whatever they share
        return None
    if scoring.mesh_of(params) is not None or shared_prefixes.whole_only(model) or varies(model):
        return None
    found = plan(rows, places, width, size)
    weights = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(params))
    state = jax.eval_shape(lambda: model.init_cache(1, PIECES * found.step))
    states = (PIECES + 1 + 2 * found.size) * sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state))
    return found if found.saved * parameters >= WORTH and states <= max(weights, STATES) else None


def judged(
    model: Decoder,
    params: Any,
    rows: Sequence[Sequence[int]],
    places: Sequence[Sequence[int]],
    found: Plan,
    *,
    most: int,
) -> Iterator[tuple[list[int], Int[np.ndarray, "R P"], Float[np.ndarray, "R P"]]]:
    """(numbers of some rows, their likeliest tokens, log p of their tokens), batch by batch.

    Args:
      most: P, the places of a row.
    """
    step, size = found.step, found.size
    length = step * max(-(-len(row) // step) for row in rows)
    walk, path = [_empty(model, length)], np.zeros(0, np.int32)
    for group in found.groups:
        own = np.asarray(rows[group.rows[0]], np.int32)[: group.shared * step]
        walk = walk[: _alike(path, own) // step + 1]
        for first in range(step * (len(walk) - 1), len(own), step):
            new = own[None, first : first + step]
            walk.append(_piece(model, params, walk[-1], new, np.ones_like(new)))
        path = own
        for start in range(0, len(group.rows), size):
            batch = group.rows[start : start + size]
            texts, asked = [rows[i] for i in batch], [places[i] for i in batch]
            yield batch, *_continued(model, params, walk[-1], texts, asked, (size, most, step, len(own)))


def _continued(model, params, state, rows, places, shape: tuple[int, int, int, int]) -> tuple[np.ndarray, np.ndarray]:
    """(the likeliest tokens, log p of the tokens) at the places of rows, of which `state` holds the first tokens."""
    size, most, step, first = shape
    end = -(-max(map(len, rows)) // step) * step
    tokens, segment_ids = (np.zeros((size, end), np.int32) for _ in range(2))
    before, labels = (np.zeros((size, most), np.int32) for _ in range(2))
    for i, (row, place) in enumerate(zip(rows, places, strict=True)):
        tokens[i, : len(row)], segment_ids[i, : len(row)] = row, 1
        before[i, : len(place)] = np.asarray(place, np.int32) - 1
        labels[i, : len(place)] = np.asarray(row, np.int32)[np.asarray(place, np.int32)]
    state = _repeated(model, state, size)
    x = jnp.zeros((size, most, model.hidden_size), model.dtype)
    for start in range(first, end, step):
        new = slice(start, start + step)
        x, state = _piece_of_all(model, params, state, x, tokens[:, new], segment_ids[:, new], before - start)
    ids, logp = _read(model, params, x, labels)
    return np.asarray(ids)[: len(rows)], np.asarray(logp)[: len(rows)]


@functools.partial(jax.jit, static_argnums=(0, 1))
def _empty(model: Decoder, length: int):
    return pieces.empty_state(model, 1, length, length)


@functools.partial(jax.jit, static_argnums=(0, 2))
def _repeated(model: Decoder, state: Any, size: int):
    return shared_prefixes.taken(model, state, jnp.zeros(size, jnp.int32))


@functools.partial(jax.jit, static_argnums=0)
def _piece(model: Decoder, params: Any, state: Any, tokens: Array, segment_ids: Array):
    """The state after a piece of one row; the state before it stays, because other rows continue from there."""
    return model.apply({"params": params}, tokens, segment_ids=segment_ids, cache=state, method="hidden")[1]


@functools.partial(jax.jit, static_argnums=0, donate_argnums=(2, 3))
def _piece_of_all(model, params, state, found, tokens, segment_ids, before):
    """(`found` with the hidden states at the places that are in this piece, the state after it)."""
    x, state = model.apply({"params": params}, tokens, segment_ids=segment_ids, cache=state, method="hidden")
    inside = (before >= 0) & (before < x.shape[1])
    here = jnp.take_along_axis(x, jnp.clip(before, 0, x.shape[1] - 1)[:, :, None], axis=1)
    return jnp.where(inside[:, :, None], here.astype(found.dtype), found), state


@functools.partial(jax.jit, static_argnums=0)
def _read(model, params, x, labels):
    logits = model.apply({"params": params}, x, method="logits")
    logp = jnp.take_along_axis(jax.nn.log_softmax(logits), labels[:, :, None], axis=-1)[..., 0]
    return jnp.argmax(logits, -1).astype(jnp.int32), logp


def _alike(a: Sequence[int] | np.ndarray, b: Sequence[int] | np.ndarray) -> int:
    """How many tokens both begin with."""
    n = min(len(a), len(b))
    differ = np.flatnonzero(np.asarray(a[:n], np.int32) != np.asarray(b[:n], np.int32))
    return int(differ[0]) if len(differ) else n
