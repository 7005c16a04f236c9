"""Multi-query associative recall (Arora et al. 2023, arXiv 2312.04927): for tiny models, in tokens instead of words."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from lcx.data import Tokenizer
from lcx.errors import UserError, check_sizes
from lcx.evals import Result
from lcx.evals.support import forced, grids, scoring
from lcx.evals.support.model_facts import facts
from lcx.evals.support.progress import progress
from lcx.model import Decoder


@dataclasses.dataclass(frozen=True)
class Recall:
    """The share of keys after which the likeliest token is the value that they had before, by length of the row.

    A row begins with pairs of a key and a value. Then all keys come again, each followed by its value, at places that
    are drawn by a power law of their distance, with filler in between. Keys are from the lower half of the vocabulary,
    values from the upper half; the model sees ids, no text.

    Attributes:
      lengths: of the rows, in tokens; None: half of the model's context length, all of it, and twice as much.
      pairs: of each row.
      rows: at each length.
      filler: the id between the queries.
      first_id: the lowest id in use, above special tokens.
      vocabulary: the ids in use; None: all from first_id on.
      power: of the law by which the distances of queries are drawn; 0.01 in the paper.
      tokens_per_batch: limit on the tokens of a batch.
      seed: for the rows.
      name: key in results.json.
    """

    lengths: tuple[int, ...] | None = None
    pairs: int = 8
    rows: int = 64
    filler: int = 0
    first_id: int = 1
    vocabulary: int | None = None
    power: float = 0.01
    tokens_per_batch: int = scoring.TOKENS_PER_BATCH
    seed: int = 0
    name: str = "recall"

    def __post_init__(self):
        check_sizes("Recall", pairs=self.pairs, rows=self.rows, vocabulary=self.vocabulary)
        if self.power <= 0:
            raise UserError(f"Recall.power is {self.power}, expected a positive number")

    def check_model(self, model: Decoder, tokenizer: Tokenizer | None) -> None:
        self._keys(min(self._lengths(model)), model.vocab_size)

    def _lengths(self, model: Decoder) -> tuple[int, ...]:
        window = model.max_position_embeddings
        lengths = self.lengths or tuple(n for n in (window // 2, window, 2 * window) if n >= 4 * self.pairs)
        if not lengths:
            raise UserError(
                f"Recall: {self.pairs} pairs need rows of {4 * self.pairs} tokens: set Recall.lengths"
            )
        return lengths

    def __call__(self, model: Decoder, params: Any, tokenizer: Tokenizer | None) -> Result:
        lengths = self._lengths(model)
        cells, far = [], _Distances()
        with progress(self.name, self.rows * sum(lengths), "tokens") as bar:
            for length in sorted(set(lengths)):
                tokens, places = self.made(length, model.vocab_size)
                found = forced.likeliest(
                    model,
                    params,
                    tokens.tolist(),
                    places.tolist(),
                    tokens_per_batch=self.tokens_per_batch,
                    bar=bar,
                )
                right = np.stack(found) == np.take_along_axis(tokens, places, 1)
                cells.append(grids.cell(right.mean(1).tolist(), length=length))
                far.add(places - (1 + 2 * np.arange(self.pairs)), right)
        table = {f"{cell['length']}": round(100 * cell["score"], 1) for cell in cells}
        return {
            "definition": (
                f"multi-query associative recall (arXiv 2312.04927): rows that begin with {self.pairs} pairs of tokens;"
                " the share of keys after which the likeliest token is their value, when they come again; places drawn"
                f" with a power law of exponent {self.power:g}; {self.rows} rows at each length; chance is"
                f" {200 / self._ids(model.vocab_size):.2g}%"
            ),
            "summary": ", ".join(f"{value:.0f}% at {length}" for length, value in table.items()),
            "table": table,
            "unit": "% of values recalled",
            "model": facts(model),
            "cells": cells,
            "by_distance": far.buckets(),
        }

    def made(self, length: int, vocab_size: int) -> tuple[np.ndarray, np.ndarray]:
        """(rows [rows, length], the places of the values that are asked for [rows, pairs]).

        Raises:
          UserError: the rows are too short for the pairs, or the vocabulary is too small.
        """
        half = self._keys(length, vocab_size)
        rng = np.random.default_rng([self.seed, length])
        slots = (length - 2 * self.pairs) // 2
        weights = self.power * np.arange(1, slots + 1, dtype=np.float64) ** (self.power - 1)
        weights /= weights.sum()
        tokens = np.full((self.rows, length), self.filler, np.int32)
        places = np.zeros((self.rows, self.pairs), np.int32)
        for i in range(self.rows):
            keys = self.first_id + rng.choice(half, self.pairs, replace=False)
            values = self.first_id + half + rng.choice(half, self.pairs, replace=False)
            tokens[i, 0 : 2 * self.pairs : 2], tokens[i, 1 : 2 * self.pairs : 2] = keys, values
            at = 2 * self.pairs + 2 * rng.choice(slots, self.pairs, replace=False, p=weights)
            tokens[i, at], tokens[i, at + 1] = keys, values
            places[i] = at + 1
        return tokens, places

    def _keys(self, length: int, vocab_size: int) -> int:
        """How many ids are keys. Raises UserError if the rows or the vocabulary have no room for the pairs."""
        if length < 4 * self.pairs:
            raise UserError(
                f"Recall: rows of {length} tokens are too short for {self.pairs} pairs, expected at least"
                f" {4 * self.pairs}: raise Recall.lengths, or lower Recall.pairs"
            )
        half = self._ids(vocab_size) // 2
        if half < self.pairs:
            raise UserError(
                f"Recall: {2 * half} ids give {half} keys, expected at least {self.pairs}: lower Recall.pairs, or"
                " raise Recall.vocabulary"
            )
        return half

    def _ids(self, vocab_size: int) -> int:
        wanted = self.vocabulary or vocab_size - self.first_id
        if self.first_id < 0 or self.first_id + wanted > vocab_size or not 0 <= self.filler < vocab_size:
            raise UserError(
                f"Recall: ids up to {self.first_id + wanted - 1}, and filler {self.filler}, expected ids of the model,"
                f" 0 to {vocab_size - 1}: lower Recall.vocabulary"
            )
        return wanted

    def finding(self, results: Mapping[str, Result]) -> str:
        """The share of values recalled at the longest rows."""
        parts = []
        for label, result in results.items():
            last = max(result["cells"], key=lambda cell: cell["length"])
            who = f"“{label}” recalls" if len(results) > 1 else "recalls"
            parts.append(f"{who} {100 * last['score']:.0f}% of the values in rows of {last['length']} tokens")
        return "; ".join(parts)

    def plot(self, axes: Any, results: Mapping[str, Result]) -> None:
        title = "Associative recall by length (band: 95% interval)"
        grids.curves(axes, results, across="length", ylabel="values recalled (%)", title=title)


@dataclasses.dataclass
class _Distances:
    """Which values were right, by the tokens between the two places of a value, over rows of all lengths."""

    right: dict[int, list[bool]] = dataclasses.field(default_factory=dict)

    def add(self, distances: np.ndarray, right: np.ndarray) -> None:
        for bucket, one in zip(
            np.log2(distances).astype(int).ravel().tolist(), right.ravel().tolist(), strict=True
        ):
            self.right.setdefault(bucket, []).append(one)

    def buckets(self) -> list[dict[str, Any]]:
        """Octaves of distances [from, to) with the share of values recalled and its 95% interval."""
        found = []
        for bucket, right in sorted(self.right.items()):
            low, high = grids.wilson_of(sum(right), len(right))
            place = {"from": 2**bucket, "to": 2 ** (bucket + 1), "score": sum(right) / len(right)}
            found.append({**place, "low": low, "high": high, "samples": len(right)})
        return found
