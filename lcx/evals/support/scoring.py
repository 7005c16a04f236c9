"""The loss of every token of many rows, on one device or a mesh, without storing the logits.

One program is compiled per shape. Rows longer than LONG tokens are processed in pieces, each of which continues from
the state that the previous one left (see ``lcx/pieces.py``): memory then does not grow with the row, apart from keys
and values.
"""

import base64
import collections
import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Float, Int

from lcx import layer_order, pieces, sharding
from lcx.evals.support import journal
from lcx.evals.support.progress import progress
from lcx.model import Decoder
from lcx.ops.cross_entropy import token_nll

TOKENS_PER_BATCH = 1 << 14
LONG = 1 << 16
_IN_FLIGHT = 2  # batches queued on the devices; with many, several CPU devices of one process can deadlock


def mesh_of(params: Any) -> Mesh | None:
    """The mesh over which the parameters are sharded; None if they are on a single device."""
    for leaf in jax.tree.leaves(params):
        placed = getattr(leaf, "sharding", None)
        if isinstance(placed, NamedSharding) and isinstance(placed.mesh, Mesh) and placed.mesh.size > 1:
            return placed.mesh
    return None


def on_mesh(params: Any) -> contextlib.AbstractContextManager:
    """The context manager (jax.set_mesh) in which to compile and call functions of these parameters."""
    mesh = mesh_of(params)
    return contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh)


def score(
    model: Decoder,
    params: Any,
    tokens: Int[np.ndarray, "R T"],
    labels: Int[np.ndarray, "R T"],
    *,
    positions: Int[np.ndarray, "R T"] | None = None,
    segment_ids: Int[np.ndarray, "R T"] | None = None,
    tokens_per_batch: int = TOKENS_PER_BATCH,
    description: str | None = "scoring",
    measure: Callable[..., jax.Array] = token_nll,
    width_of: int | None = None,
    kept: bool = True,
) -> Float[np.ndarray, "R T *measured"]:
    """-log p(label) in nats of every token, float32, computed in the model's dtype.

    Rows are processed in batches of tokens_per_batch tokens, and rows of more than LONG tokens one by one, in pieces of
    that size. The last batch is padded to the same shape, so that one compiled program serves all. The progress is
    shown. With several processes, each passes all rows and receives all results. Rows whose losses are in
    the journal of the evaluation (`journal.keeping`) are not computed again.

    Args:
      description: label of the progress; None: it is not shown.
      measure: computes something else than the loss, from the same arguments as `token_nll`, with `width_of` numbers
        per token; a module-level function, so that its program is compiled once. It is not kept in a journal.
      kept: whether losses are kept in the journal; False for an evaluation that keeps its own results.
    """
    arrays = {"tokens": tokens, "labels": labels, "positions": positions, "segment_ids": segment_ids}
    known = journal.current() if kept and measure is token_nll else None
    R, T = tokens.shape
    out = np.empty((R, T) if width_of is None else (R, T, width_of), np.float32)
    left, keys = list(range(R)), [""] * R
    if known is not None:
        keys = [_key(arrays, row) for row in range(R)]
        found = {row: value for row in range(R) if (value := known.get(keys[row])) is not None}
        for row, value in found.items():
            out[row] = np.frombuffer(base64.b64decode(value), np.float32)
        left = [row for row in range(R) if row not in found]
    with on_mesh(params), progress(description, R * T, "tokens", initial=(R - len(left)) * T) as bar:
        rows = {name: None if x is None else x[left] for name, x in arrays.items()}
        for place, nll in _measured(model, params, rows, tokens_per_batch, bar, measure, width_of) if left else ():
            out[left[place]] = nll
            if known is not None:
                known.put(keys[left[place]], base64.b64encode(nll.tobytes()).decode())
    return out


def _key(arrays: dict[str, np.ndarray | None], row: int) -> str:
    parts = [None if x is None else np.ascontiguousarray(x[row], np.int32).tobytes() for x in arrays.values()]
    return journal.key_of(*parts)


def _measured(
    model: Decoder,
    params: Any,
    arrays: dict[str, np.ndarray | None],
    tokens_per_batch: int,
    bar: Any,
    measure: Callable[..., jax.Array],
    width_of: int | None,
) -> Iterator[tuple[int, Float[np.ndarray, "T *measured"]]]:
    """(number of a row, its losses or other values), as soon as they are there."""
    assert arrays["tokens"] is not None
    R, T = arrays["tokens"].shape
    mesh = mesh_of(params)
    parts, context = (
        (1, 1) if mesh is None else (mesh.shape["data"] * mesh.shape["fsdp"], mesh.shape["context"])
    )
    size = _rounded(even(R, tokens_per_batch // T), parts)
    width = _rounded(T, context)
    piece = _rounded(tokens_per_batch, context) if width > max(LONG, tokens_per_batch) else None
    pending: collections.deque[tuple[tuple[int, int], jax.Array]] = collections.deque()
    batch = np.empty((size, T) if width_of is None else (size, T, width_of), np.float32)

    def collect() -> Iterator[tuple[int, np.ndarray]]:
        (start, first), values = pending.popleft()
        nll = np.asarray(values)[: R - start, : T - first]
        batch[: len(nll), first : first + nll.shape[1]] = nll
        bar.update(nll.shape[0] * nll.shape[1])
        if first + nll.shape[1] == T:
            yield from ((start + i, batch[i].copy()) for i in range(len(nll)))

    for start in range(0, R, size):
        rows = {name: None if x is None else x[start : start + size] for name, x in arrays.items()}
        for first, nll in _scored(model, params, rows, (size, width), piece, mesh, measure):
            pending.append(((start, first), nll))
            if len(pending) >= _IN_FLIGHT:
                yield from collect()
    while pending:
        yield from collect()


def _scored(
    model: Decoder,
    params: Any,
    rows: dict[str, np.ndarray | None],
    shape: tuple[int, int],
    piece: int | None,
    mesh: Mesh | None,
    measure: Callable[..., jax.Array],
) -> Iterator[tuple[int, jax.Array]]:
    """(first token, losses) of whole rows, or of one piece of `piece` tokens after the other.

    Args:
      shape: rows and tokens to which the batch is padded.
    """
    size, width = shape
    state, step = None, width
    by_layers = piece is not None and mesh is None and layer_order.saves(model, size, _rounded(width, piece))
    if piece is not None:
        pieces.check(model)
        step = piece
        longest = width
        if rows["positions"] is not None:
            real = True if rows["segment_ids"] is None else rows["segment_ids"] != 0
            longest = 1 + int((rows["positions"] * real).max())
        if by_layers:
            yield from _by_layers(model, params, rows, (size, _rounded(width, step)), step, longest, measure)
            return
        state = _empty_state(model, size, _rounded(width, step), longest)
    for first in range(0, width, step):
        batch = {
            name: None if x is None else placed(filled(x[:, first : first + step], size, step), mesh)
            for name, x in rows.items()
        }
        nll, state = _score(model, measure, params, state, **batch)
        yield first, nll


def _by_layers(
    model: Decoder,
    params: Any,
    rows: dict[str, np.ndarray | None],
    shape: tuple[int, int],
    step: int,
    longest: int,
    measure: Callable[..., jax.Array],
) -> Iterator[tuple[int, jax.Array]]:
    """`_scored` layer by layer, for models whose keys and values of all layers would be too many."""
    arrays = {name: None if x is None else filled(x, *shape) for name, x in rows.items()}
    row = {name: arrays[name] for name in ("positions", "segment_ids")}
    tokens, labels = arrays["tokens"], arrays["labels"]
    assert tokens is not None and labels is not None
    x = layer_order.hidden(model, params, tokens, row, step, longest)
    yield from layer_order.losses(model, measure, step, params, x, labels)


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnames="state")
def _score(model, measure, params, state, tokens, labels, positions, segment_ids):
    x, state = model.apply(
        {"params": params},
        tokens,
        positions=positions,
        segment_ids=segment_ids,
        cache=state,
        method="hidden",
    )
    values = measure(x, model.head(params), labels, transform=model.logit_transform)
    return sharding.constrain(values, *[None] * values.ndim), state  # replicated, because each process reads all of it


_empty_state = jax.jit(pieces.empty_state, static_argnums=(0, 1, 2))


def even(count: int, most: int) -> int:
    """The size of the fewest batches of at most `most` rows, made equal: the last one is filled up to the same size, so
    66 rows are 5 batches of 14 and not of 16."""
    batches = -(-count // max(1, most))
    return -(-count // max(1, batches)) or 1


def filled(rows: np.ndarray, size: int, width: int) -> np.ndarray:
    """Pads with zeros on the right and below. Causal attention does not attend to padding on the right."""
    return np.pad(rows, ((0, size - rows.shape[0]), (0, width - rows.shape[1])))


def placed(rows: np.ndarray | None, mesh: Mesh | None) -> Any:
    if rows is None or mesh is None:
        return rows
    return jax.make_array_from_callback(rows.shape, sharding.batch_sharding(mesh), lambda index: rows[index])


def _rounded(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
