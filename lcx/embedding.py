"""Embeddings of sequences: pooled activations of a model at named points.

A sequence is read in pieces of which each continues from the state that the previous one left (``lcx/pieces.py``), so
memory does not grow with its length, apart from the keys and values of attention, and the result does not depend on the
size of the pieces. Points are named as in ``lcx/activations.py``.

    model, params = lcx.load("evo2_7b.pt")
    lcx.embed(model, params, ["ACGTTGCA", "GATTACA"], layers=["blocks.28.mlp.l3"])   -> {name: float32 [2, F]}
"""

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Float, Int

from lcx import activations, layer_order, parameters, pieces
from lcx.data import ByteTokenizer, Tokenizer, check_vocabulary, special_tokens
from lcx.data.nucleotides import reverse_complement
from lcx.errors import UserError, check_sizes
from lcx.model import Decoder

PIECE_LENGTH = 1 << 14
_SHORTEST = 128
_MOST_NUMBERS = 1 << 26  # of one point, all copies of a layer together, where every position is kept


def embed(
    model: Decoder,
    params: Any,
    sequences: Sequence[str] | Sequence[Sequence[int]] | Int[np.ndarray, "B T"],
    *,
    layers: Sequence[str | int] | str | int,
    pool: str | None = "mean",
    piece_length: int | None = None,
    window: int | None = None,
    overlap: int = 0,
    reverse_complement: bool = False,
    tokenizer: Tokenizer | None = None,
    tokens_per_batch: int = PIECE_LENGTH,
) -> dict[str, Any]:
    """Embeddings of sequences of any length.

    Args:
      model, params: from lcx.load.
      sequences: texts, or token ids: [B, T], or a list of lists of different lengths. Texts are encoded by `tokenizer`,
        with the special tokens that it puts before a text.
      layers: names of points (`lcx.activations`), such as "layers.5", "blocks.28.mlp.l3" or 5.
      pool: over the tokens of a sequence: "mean", "last" (its last token), "max", or "none" (None): every position.
      piece_length: tokens per forward pass; None: 16,384. It does not change the result.
      window: embed windows of so many tokens separately; None: the whole sequence.
      overlap: tokens that consecutive windows share.
      reverse_complement: the mean of the embeddings of a sequence of DNA and of its reverse complement; needs texts.
      tokenizer: of the texts. None: bytes, for Evo 2.
      tokens_per_batch: short sequences are read together, up to so many tokens.

    Returns:
      {name: float32 array}: [sequences, F] if pooled and without windows. With windows, a list with [windows, F] for
      each sequence; with pool "none" a list of [T, F], or [B, T, F] if `sequences` is an array.

    Raises:
      UserError: an unknown layer or pool, an empty sequence, sizes out of range, texts without a tokenizer.
    """
    embedder = Embedder(
        model,
        params,
        tuple(layers) if isinstance(layers, list | tuple) else (layers,),  # type: ignore[arg-type]
        pool=pool or "none",
        piece_length=piece_length,
        window=window,
        overlap=overlap,
        reverse_complement=reverse_complement,
        tokenizer=tokenizer,
        tokens_per_batch=tokens_per_batch,
    )
    count = len(sequences)
    found: dict[str, list[list[np.ndarray]]] = {name: [[] for _ in range(count)] for name in embedder.points}
    for part in embedder(sequences):
        for name, values in part.values.items():
            found[name][part.sequence].append(values)
    whole = embedder.pool != "none" and window is None
    stacked = whole or (embedder.pool == "none" and window is None and hasattr(sequences, "ndim"))

    def joined(rows: list[list[np.ndarray]]) -> Any:
        if stacked:
            return np.stack([row[0] for row in rows]) if rows else np.zeros((0, 0), np.float32)
        return [row[0] if window is None else np.stack(row) if embedder.pool != "none" else row for row in rows]

    return {name: joined(rows) for name, rows in found.items()}


@dataclasses.dataclass(frozen=True)
class Embedded:
    """The embedding of the tokens start, ..., stop - 1 of a sequence: {point: [F], or [stop - start, F]}."""

    sequence: int
    start: int
    stop: int
    values: dict[str, Float[np.ndarray, "..."]]


@dataclasses.dataclass(frozen=True)
class _Row:
    """Tokens to embed: `head` special tokens, then those of a window; on the other strand in the opposite order."""

    sequence: int
    start: int
    tokens: Int[np.ndarray, " T"]
    head: int
    backward: bool = False


def check_settings(
    pool: str,
    *,
    overlap: int,
    window: int | None,
    piece_length: int | None = None,
    tokens_per_batch: int | None = PIECE_LENGTH,
) -> None:
    """Raises UserError for settings of `embed` that cannot work, whatever the model is."""
    if pool not in activations.POOLS:
        raise UserError(f"pool is {pool!r}, expected one of {', '.join(activations.POOLS)}: change pool")
    check_sizes("embed", piece_length=piece_length, window=window, tokens_per_batch=tokens_per_batch)
    if not 0 <= overlap < (window or 1):
        raise UserError(f"overlap is {overlap}, expected 0 .. window - 1, and 0 without a window: change overlap")


class Embedder:
    """Embeds sequences one after the other, a batch at a time; see `embed` for the arguments.

    Attributes:
      points: {name: Point} of the layers.
    """

    def __init__(
        self,
        model: Decoder,
        params: Any,
        layers: Sequence[str | int],
        *,
        pool: str = "mean",
        piece_length: int | None = None,
        window: int | None = None,
        overlap: int = 0,
        reverse_complement: bool = False,
        tokenizer: Tokenizer | None = None,
        tokens_per_batch: int = PIECE_LENGTH,
    ):
        sizes = {"piece_length": piece_length, "window": window, "tokens_per_batch": tokens_per_batch}
        check_settings(pool, overlap=overlap, **sizes)
        self.model, self.params = model, parameters.fitting(model, params)
        self.points, self.pool = activations.points(model, layers), pool
        self.piece_length = piece_length or PIECE_LENGTH
        self.window, self.overlap, self.tokenizer = window, overlap, tokenizer
        self.reverse_complement, self.tokens_per_batch = reverse_complement, tokens_per_batch
        if pool == "none":
            width = max(stage.repeat for stage in model.stages) * 4 * model.hidden_size
            most = max(_SHORTEST, _MOST_NUMBERS // width)
            self.piece_length = min(self.piece_length, 1 << (most.bit_length() - 1))
            self.tokens_per_batch = min(tokens_per_batch, self.piece_length)

    def __call__(self, sequences: Iterable[Any]) -> Iterator[Embedded]:
        """Yields the embeddings of all windows, in order. `sequences` may be a generator."""
        waiting: list[_Row] = []
        for row in self._rows(sequences):
            width = max(len(one.tokens) for one in [*waiting, row])
            if waiting and (len(waiting) + 1) * width > self.tokens_per_batch and not row.backward:
                yield from self._strands(waiting)
                waiting = []
            waiting.append(row)
        if waiting:
            yield from self._strands(waiting)

    # -------------------------------------------------------------------------------------------------- rows

    def _rows(self, sequences: Iterable[Any]) -> Iterator[_Row]:
        for number, sequence in enumerate(sequences):
            whole, head, other = self._encoded(number, sequence)
            total = len(whole) - head
            step = total if self.window is None else self.window - self.overlap
            for start in range(0, total, step):
                stop = total if self.window is None else min(start + self.window, total)
                first = whole[:head]
                yield _Row(number, start, np.concatenate([first, whole[head + start : head + stop]]), head)
                if other is not None:
                    part = other[head + total - stop : head + total - start]
                    yield _Row(number, start, np.concatenate([first, part]), head, backward=True)
                if stop == total:
                    break

    def _encoded(self, number: int, sequence: Any) -> tuple[np.ndarray, int, np.ndarray | None]:
        """(tokens, how many of them are special tokens before the text, the tokens of the other strand)."""
        if not isinstance(sequence, str):
            if self.reverse_complement:
                raise UserError("reverse_complement needs sequences of letters, found token ids: pass texts")
            tokens = np.asarray(sequence)
            bad = tokens.ndim != 1 or not tokens.size or not np.issubdtype(tokens.dtype, np.integer)
            if bad or tokens.min() < 0 or tokens.max() >= self.model.vocab_size:
                raise UserError(
                    f"sequence {number} is {str(tokens)[:60]!r}, expected a text, or a list of token ids from 0 to "
                    f"{self.model.vocab_size - 1}"
                )
            return tokens.astype(np.int32), 0, None
        encode = self._encoder()
        if not sequence:
            raise UserError(f"sequence {number} is empty: leave it out")
        before = np.array(special_tokens(self._tokenizer()).before, np.int32)
        other = None
        if self.reverse_complement:
            other = np.concatenate([before, encode(reverse_complement(sequence))])
            if len(other) != len(before) + len(sequence):
                raise UserError("both strands need a token per letter: use a model of bytes, or leave out both_strands")
        return np.concatenate([before, encode(sequence)]), len(before), other

    def _encoder(self) -> Callable[[str], np.ndarray]:
        tokenizer = self._tokenizer()
        return lambda text: np.asarray(tokenizer.encode(text), np.int32)

    def _tokenizer(self) -> Tokenizer:
        if self.tokenizer is None:
            if self.model.model_type != "striped_hyena" or self.model.vocab_size <= 255:
                raise UserError("the sequences are texts: set tokenizer (lcx.load_tokenizer), or pass token ids")
            self.tokenizer = ByteTokenizer(bos_id=None, eos_id=0, vocab_size=self.model.vocab_size)
        check_vocabulary(self.tokenizer, self.model.vocab_size)
        return self.tokenizer

    # ------------------------------------------------------------------------------------------------ batches

    def _strands(self, rows: list[_Row]) -> Iterator[Embedded]:
        """The embeddings of a batch, with both strands of a window in one."""
        values = self._batch(rows)
        for i, row in enumerate(rows):
            if row.backward:
                continue
            found = {name: arrays[i] for name, arrays in values.items()}
            if i + 1 < len(rows) and rows[i + 1].backward:
                flip = slice(None, None, -1 if self.pool == "none" else 1)
                found = {name: (one + values[name][i + 1][flip]) / 2 for name, one in found.items()}
            yield Embedded(row.sequence, row.start, row.start + len(row.tokens) - row.head, found)

    def _batch(self, rows: list[_Row]) -> dict[str, list[np.ndarray]]:
        """{point: the pooled activations of each row}."""
        lengths = np.array([len(row.tokens) for row in rows])
        longest, B = int(lengths.max()), _power(len(rows))
        step = _power(max(longest, _SHORTEST)) if longest <= self.piece_length else self.piece_length
        total = -(-longest // step) * step
        arrays = self._padded(rows, B, total)
        last = np.full(B, -1)
        last[: len(rows)] = lengths - 1
        state = None
        if total > step:
            pieces.check(self.model)
            if self.pool != "none" and layer_order.saves(self.model, B, total):
                return self._by_layers(rows, arrays, last, step, longest)
            state = _empty_state(self.model, B, total, longest)
        pooling = _Pooling(self.pool, rows)
        for start in range(0, total, step):
            inside = (last >= start) & (last < start + step)
            at = np.where(inside, last - start, -1).astype(np.int32)
            found, state = activations.piece(
                self.model,
                tuple(self.points.values()),
                self.pool,
                self.params,
                state,
                **{name: x[:, start : start + step] for name, x in arrays.items()},
                last=at,
            )
            pooling.add(found, at)
        return dict(zip(self.points, pooling.result(), strict=True))

    def _by_layers(
        self, rows: list[_Row], arrays: dict[str, np.ndarray], last: np.ndarray, step: int, longest: int
    ) -> dict[str, list[np.ndarray]]:
        """`_batch` layer by layer, for models whose keys and values of all layers would be too many."""
        row = {name: arrays[name] for name in ("positions", "segment_ids", "counted")} | {"last": last.astype(np.int32)}
        pooling, points = _Pooling(self.pool, rows), tuple(self.points.values())
        options = (step, longest, points, self.pool)
        pooling.add(layer_order.pooled(self.model, self.params, arrays["tokens"], row, *options), last)
        return dict(zip(self.points, pooling.result(), strict=True))

    def _padded(self, rows: list[_Row], B: int, total: int) -> dict[str, np.ndarray]:
        """The arrays [B, total] of a batch. Special tokens condition the others and are not part of an embedding."""
        tokens, positions, ids = (np.zeros((B, total), np.int32) for _ in range(3))
        counted = np.zeros((B, total), bool)
        for i, row in enumerate(rows):
            n = len(row.tokens)
            tokens[i, :n], positions[i, :n], ids[i, :n], counted[i, row.head : n] = row.tokens, np.arange(n), 1, True
        return {"tokens": tokens, "positions": positions, "segment_ids": ids, "counted": counted}


class _Pooling:
    """The pooled activations of a batch, piece by piece."""

    def __init__(self, pool: str, rows: Sequence[_Row]):
        self.pool, self.rows = pool, rows
        self.parts: list[list[np.ndarray]] = []

    def add(self, arrays: Sequence[jax.Array], at: Int[np.ndarray, " B"]) -> None:
        """Adds a piece; at: where in it the last token of a row is, or -1."""
        new = [np.asarray(array, np.float32)[: len(self.rows)] for array in arrays]
        if self.pool == "none":
            self.parts.append(new)
        elif not self.parts:
            self.parts = [[x.astype(np.float64) for x in new]]
        else:
            here = at[: len(self.rows), None] >= 0
            before = self.parts[0]
            pairs = zip(before, new, strict=True)
            if self.pool == "last":
                self.parts = [[np.where(here, one, old) for old, one in pairs]]
            else:
                combine = np.add if self.pool == "mean" else np.maximum
                self.parts = [[combine(old, one) for old, one in pairs]]

    def result(self) -> list[list[np.ndarray]]:
        """For each point, the embedding of each row."""
        found = []
        for parts in zip(*self.parts, strict=True):
            if self.pool == "none":
                whole = np.concatenate(parts, axis=1)
                found.append([whole[i, row.head : len(row.tokens)] for i, row in enumerate(self.rows)])
                continue
            counts = np.array([len(row.tokens) - row.head for row in self.rows])
            values = parts[0] / counts[:, None] if self.pool == "mean" else parts[0]
            found.append(list(values.astype(np.float32)))
        return found


_empty_state = jax.jit(pieces.empty_state, static_argnums=(0, 1, 2))


def _power(size: int) -> int:
    return 1 << (size - 1).bit_length()
