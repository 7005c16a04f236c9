"""Losses of rows that begin alike: the shared tokens are computed once, and each row continues from their state."""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from lcx import mixers, pieces
from lcx.evals.support import scoring
from lcx.model import Decoder, layers
from lcx.ops.cross_entropy import token_nll

_STEP = 64  # a shared part has a multiple of so many tokens, so that few shapes are compiled
_LEAST = 128  # shorter parts are not worth a second program


def cut(model: Decoder, params: Any, row_length: int) -> int:
    """How many tokens of rows of `row_length` tokens to share where both halves differ late enough; 0: none.

    Nothing is shared by mixers that read a text in one piece, over the mesh axis `context`, and in rows that are
    processed in pieces (`scoring.LONG`).
    """
    mesh = scoring.mesh_of(params)
    if whole_only(model) or row_length > scoring.LONG or (mesh is not None and mesh.shape["context"] > 1):
        return 0
    size = (row_length // 2 - 2) // _STEP * _STEP  # the letter in the middle differs, on either strand
    return size if size >= _LEAST else 0


def whole_only(model: Decoder) -> bool:
    """Whether a mixer reads a text in one piece, so that there is no state to continue from."""
    return any(mixers.whole_prompt(layer.block.mixer) for layer in layers(model))


def taken(model: Decoder, state: Any, whose: Int[Array, " R"]) -> Any:
    """The state of R rows, of which row i continues from row whose[i] of `state`."""
    one, two = (jax.eval_shape(functools.partial(model.init_cache, number, 1)) for number in (1, 2))
    return jax.tree.map(lambda x, a, b: x if a.shape == b.shape else jnp.take(x, whose, axis=1), state, one, two)


def score(
    model: Decoder,
    params: Any,
    rows: Sequence[Int[np.ndarray, " T"]],
    shared: int,
    *,
    tokens_per_batch: int = scoring.TOKENS_PER_BATCH,
) -> list[Float[np.ndarray, " scored"]]:
    """Of each row, log p in nats of every token but the first. Equal rows are scored once.

    Args:
      rows: all of the same length T.
      shared: how many tokens of a row are computed once for all rows that begin with them; 0 < shared < T.
    """
    unique: dict[bytes, int] = {}
    which = [unique.setdefault(row.tobytes(), len(unique)) for row in rows]
    tokens = np.stack([np.frombuffer(key, np.int32) for key in unique])
    begins: dict[bytes, int] = {}
    group = np.array([begins.setdefault(row[:shared].tobytes(), len(begins)) for row in tokens])
    shapes = _shapes(params, tokens.shape, np.bincount(group), tokens_per_batch)
    found = np.zeros((len(tokens), tokens.shape[1] - 1), np.float32)
    with scoring.on_mesh(params):
        for batch in _batches(group, shapes):
            found[batch] = -_batch(model, params, tokens[batch], group[batch], shared, shapes)
    return [found[number] for number in which]


class _Shapes(NamedTuple):
    """The numbers of shared parts and of rows in a batch."""

    parts: int
    rows: int


def _shapes(params: Any, shape: tuple[int, ...], sizes: np.ndarray, tokens_per_batch: int) -> _Shapes:
    """Powers of two in the proportion in which they occur, divisible over the devices that split a batch."""
    mesh = scoring.mesh_of(params)
    devices = 1 if mesh is None else mesh.shape["data"] * mesh.shape["fsdp"]
    rows = max(int(sizes.max()), min(tokens_per_batch // shape[1], shape[0]), 1)
    parts = min(-(-rows * len(sizes) // int(sizes.sum())), len(sizes))
    parts, rows = (-(-_power(x) // devices) * devices for x in (parts, rows))
    return _Shapes(parts, rows)


def _batches(group: np.ndarray, shapes: _Shapes) -> list[np.ndarray]:
    """The numbers of the rows of each batch: rows with the same shared part stay together."""
    batches, parts = [list[int]()], 0
    for members in np.split(np.argsort(group, kind="stable"), np.cumsum(np.bincount(group))[:-1]):
        if batches[-1] and (parts == shapes.parts or len(batches[-1]) + len(members) > shapes.rows):
            batches.append([])
            parts = 0
        batches[-1] += members.tolist()
        parts += 1
    return [np.array(batch) for batch in batches]


def _batch(
    model: Decoder, params: Any, tokens: np.ndarray, group: np.ndarray, shared: int, shapes: _Shapes
) -> Float[np.ndarray, "R scored"]:
    """-log p of all tokens but the first of each row."""
    mesh, (R, T) = scoring.mesh_of(params), tokens.shape
    firsts, of = np.unique(group, return_index=True, return_inverse=True)[1:]
    padded = scoring.filled(tokens, shapes.rows, T)
    part = scoring.filled(tokens[firsts], shapes.parts, T)
    labels = np.pad(padded[:, 1:], ((0, 0), (0, 1)))
    arrays = part[:, :shared], part[:, 1 : shared + 1], padded[:, shared:], labels[:, shared:]
    whose = np.pad(of, (0, shapes.rows - R)).astype(np.int32)
    first, rest = _score(model, params, T, *(scoring.placed(x, mesh) for x in arrays), whose)
    return np.concatenate([np.asarray(first)[of], np.asarray(rest)[:R, :-1]], axis=1)


@functools.partial(jax.jit, static_argnums=(0, 2))
def _score(model, params, length, first, first_labels, rest, rest_labels, whose):
    """(losses of the shared parts, losses of what follows). Row i of `rest` follows the part whose[i]."""
    state = pieces.empty_state(model, first.shape[0], length, length)

    def losses(tokens, labels, state):
        x, state = model.apply({"params": params}, tokens, cache=state, method="hidden")
        return token_nll(x, model.head(params), labels, transform=model.logit_transform), state

    shared, state = losses(first, first_labels, state)
    return shared, losses(rest, rest_labels, taken(model, state, whose))[0]


def _power(size: int) -> int:
    return 1 << (size - 1).bit_length()
