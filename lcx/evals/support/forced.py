"""The likeliest token at some places of many rows, in one forward pass for each batch: no generation.

A greedy continuation is right in all its tokens if and only if each of them is the likeliest one after the prompt and
the right tokens before it. So an answer that is known can be tested without generating it.
"""

import functools
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from lcx import sharding
from lcx.evals.support import beginnings, journal, scoring
from lcx.evals.support.answers import batches
from lcx.model import Decoder

_LEAST = 128  # tokens of the shortest shape that is compiled


def likeliest(
    model: Decoder,
    params: Any,
    rows: Sequence[Sequence[int]],
    places: Sequence[Sequence[int]],
    *,
    tokens_per_batch: int = scoring.TOKENS_PER_BATCH,
    bar: Any = None,
) -> list[Int[np.ndarray, " places"]]:
    """The likeliest token at each of the places of each row, after the tokens of the row before it.

    Args:
      rows: token ids; a longer row than `tokens_per_batch` is a forward pass of its own.
      places: for each row, indices of at least 1.
      bar: a progress bar, which is moved on by the tokens of each row.
    """
    known = journal.current()
    keys = [
        journal.key_of(np.asarray(row, np.int32).tobytes(), "likeliest", [int(p) for p in place])
        for row, place in zip(rows, places, strict=True)
    ]
    found: list[Any] = [None if known is None else known.get(key) for key in keys]
    left = [i for i, value in enumerate(found) if value is None]
    if bar is not None:
        bar.update(sum(len(rows[i]) for i, value in enumerate(found) if value is not None))
    chosen = [rows[i] for i in left], [places[i] for i in left]
    for j, ids, _ in _judged(model, params, *chosen, tokens_per_batch=tokens_per_batch, bar=bar):
        found[left[j]] = ids.tolist()
        if known is not None:
            known.put(keys[left[j]], found[left[j]])
    return [np.asarray(ids, np.int32) for ids in found]


def log_likelihoods(
    model: Decoder,
    params: Any,
    rows: Sequence[Sequence[int]],
    places: Sequence[Sequence[int]],
    *,
    tokens_per_batch: int = scoring.TOKENS_PER_BATCH,
    bar: Any = None,
) -> list[tuple[float, bool]]:
    """(the sum of log p of the tokens at the places, whether each of them is the likeliest), for each row."""
    found: list[tuple[float, bool]] = [(0.0, True)] * len(rows)
    for i, ids, logp in _judged(model, params, rows, places, tokens_per_batch=tokens_per_batch, bar=bar):
        right = ids == np.asarray(rows[i], np.int32)[np.asarray(places[i], np.int32)]
        found[i] = float(logp.sum(dtype=np.float64)), bool(right.all())
    return found


def _judged(
    model: Decoder,
    params: Any,
    rows: Sequence[Sequence[int]],
    places: Sequence[Sequence[int]],
    *,
    tokens_per_batch: int,
    bar: Any,
) -> Iterator[tuple[int, Int[np.ndarray, " places"], Float[np.ndarray, " places"]]]:
    """(number of a row, its likeliest tokens, log p of its tokens), row by row in batches of similar length."""
    most = max((len(place) for place in places), default=0)
    by_width: dict[int, list[int]] = {}
    for i, row in enumerate(rows):
        by_width.setdefault(_width(len(row)), []).append(i)
    with scoring.on_mesh(params):
        for width, members in sorted(by_width.items()):
            size = scoring.even(len(members), tokens_per_batch // width)
            texts, asked = [rows[i] for i in members], [places[i] for i in members]
            shared = beginnings.worthwhile(model, params, texts, asked, width, size)
            if shared is not None:
                for group, ids, logp in beginnings.judged(model, params, texts, asked, shared, most=most):
                    for j, best, value in zip(group, ids, logp, strict=True):
                        yield members[j], best[: len(asked[j])], value[: len(asked[j])]
                    if bar is not None:
                        bar.update(sum(len(texts[j]) for j in group))
                continue
            for group in batches([len(rows[i]) for i in members], size):
                batch = [members[j] for j in group]
                shape = size, width, most
                ids, logp = _batch(model, params, [rows[i] for i in batch], [places[i] for i in batch], shape)
                for i, best, value in zip(batch, ids, logp, strict=False):
                    yield i, best[: len(places[i])], value[: len(places[i])]
                if bar is not None:
                    bar.update(sum(len(rows[i]) for i in batch))


def _width(length: int) -> int:
    """The shape for rows of this length: a power of two, or three quarters of one, so that few are compiled."""
    power = max(_LEAST, 1 << max(length - 1, 1).bit_length())
    return power * 3 // 4 if length <= power * 3 // 4 and power > _LEAST else power


def _batch(model, params, rows, places, shape: tuple[int, int, int]) -> tuple[np.ndarray, np.ndarray]:
    size, width, most = shape
    tokens, segment_ids = (np.zeros((size, width), np.int32) for _ in range(2))
    before, labels = (np.zeros((size, most), np.int32) for _ in range(2))
    for i, (row, place) in enumerate(zip(rows, places, strict=True)):
        tokens[i, : len(row)], segment_ids[i, : len(row)] = row, 1
        before[i, : len(place)] = np.asarray(place, np.int32) - 1
        labels[i, : len(place)] = np.asarray(row, np.int32)[np.asarray(place, np.int32)]
    ids, logp = _at(model, params, tokens, segment_ids, before, labels)
    return np.asarray(ids), np.asarray(logp)


@functools.partial(jax.jit, static_argnames="model")
def _at(model, params, tokens, segment_ids, before, labels):
    def chosen(model):
        x, _ = model.hidden(tokens, segment_ids=segment_ids)
        logits = model.logits(jnp.take_along_axis(x, before[:, :, None], axis=1))
        logp = jnp.take_along_axis(jax.nn.log_softmax(logits), labels[:, :, None], axis=-1)[..., 0]
        found = jnp.argmax(logits, -1).astype(jnp.int32), logp
        return tuple(sharding.constrain(x, None, None) for x in found)  # replicated: each process reads all of it

    return model.apply({"params": params}, method=chosen)


def joined(tokenizer: Any, before: Sequence[int], prompt: str, answer: str) -> tuple[list[int], list[int]]:
    """(ids of a prompt and its answer, the places of the answer), with `before` in front.

    The answer's tokens are those that it has after the prompt. Where the answer changes the last token of the prompt,
    it is encoded by itself, because the prompt must be the same as for a generation.
    """
    ids = tokenizer.encode(prompt).tolist()
    both = tokenizer.encode(prompt + answer).tolist()
    tail = both[len(ids) :] if both[: len(ids)] == ids else tokenizer.encode(answer).tolist()
    row = [*before, *ids, *tail]
    return row, list(range(len(row) - len(tail), len(row)))
