"""The needle test of the 2Mamba paper: a pass key in 1K to 16K characters of repeated text, after nanotron's data set.

The prompts are those of nanotron/simple_needle_in_a_hay_stack, of which the published script takes a shuffled part; a
greedy continuation of ten tokens is right if its first word is the key (Mongaras & Larson 2026, arXiv 2602.17363).
"""

import dataclasses
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, cast

import numpy as np

from lcx.data import Tokenizer, special_tokens
from lcx.errors import UserError, check_sizes
from lcx.evals import Result
from lcx.evals.support import answers, grids, remembered
from lcx.evals.support.haystack import NOISE
from lcx.evals.support.model_facts import facts
from lcx.evals.support.progress import progress
from lcx.model import Decoder

TASK = (
    "There is an important info hidden inside a lot of irrelevant text. Find it and memorize them. I will quiz you"
    " about the important information there. "
)
NEEDLE = "The pass key is {key}. Remember it. {key} is the pass key. "
QUESTION = " \n\nWhat is the pass key? The pass key is "
DEPTHS = 21  # evenly spaced, from the beginning to the end
COLUMNS = ("prompt", "answer", "context_length", "depth_percent")
LENGTHS = (1024, 2048, 4096, 8192, 16384)  # of the data set's haystacks, but for the longest
_TOO_LONG = 32768  # rows of so many characters are not asked
_KEYS = (1, 10_000)  # the second is not drawn
_FIRST = 8  # paths that a message lists
_ROUNDING = 1e-6  # characters: depths are fractions here, whole percents in the published script


@dataclasses.dataclass(frozen=True)
class Row:
    """A prompt with its key; `length` is that of the haystack in characters, `depth` from 0 to 1."""

    prompt: str
    answer: str
    length: int
    depth: float


@dataclasses.dataclass(frozen=True)
class PublishedNeedle:
    """The share of pass keys found, by length of the haystack in characters.

    Attributes:
      file: the data set's parquet file, or a folder of them; None: prompts of the same form about our own haystack,
        five sentences repeated, which the results say.
      lengths: of the haystacks, in characters; None: 1024 to 16384 without file, with it all below 32768, as published.
      samples: prompts in all: the first of the shuffled ones, as published.
      seed: for the order, and without file for the keys; 420 as published.
      window: new tokens, and the tokens at the end of prompt and continuation whose first word must be the key. A model
        that ends its text earlier has tokens of the prompt among them.
      batch_size, tokens_per_batch: prompts at once, and the limit on their tokens.
      add_bos: whether each prompt starts with BOS; None: as the tokenizer does.
      name: key in results.json.
    """

    file: str | None = None
    lengths: tuple[int, ...] | None = None
    samples: int = 1000
    seed: int = 420
    window: int = 10
    batch_size: int = 8
    tokens_per_batch: int = answers.TOKENS_PER_BATCH
    add_bos: bool | None = None
    name: str = "published_needle"

    def __post_init__(self):
        for field in ("samples", "window", "batch_size"):
            check_sizes("PublishedNeedle", **{field: getattr(self, field)})
        if self.lengths is not None and (not self.lengths or min(self.lengths) < 1):
            raise UserError(f"PublishedNeedle.lengths is {self.lengths}, expected numbers of characters")
        if not 0 <= self.seed < 2**32:
            raise UserError(f"PublishedNeedle.seed is {self.seed}, expected 0 to 2**32 - 1")

    def check_model(self, model: Decoder, tokenizer: Tokenizer | None) -> None:
        answers.needed(tokenizer, model, "PublishedNeedle")
        remembered.once(id(self), self.rows)

    def __call__(self, model: Decoder, params: Any, tokenizer: Tokenizer | None) -> Result:
        tokenizer = answers.needed(tokenizer, model, "PublishedNeedle")
        rows = remembered.once(id(self), self.rows)
        before = special_tokens(tokenizer, add_bos=self.add_bos).before
        prompts = [[*before, *tokenizer.encode(row.prompt).tolist()] for row in rows]
        with progress(self.name, sum(len(prompt) + self.window for prompt in prompts), "tokens") as bar:
            texts = answers.continuations(
                model,
                params,
                cast(Tokenizer, _Numbers(tokenizer)),  # only decode and the tokens that stop are used
                prompts,
                max_new_tokens=self.window,
                batch_size=self.batch_size,
                tokens_per_batch=self.tokens_per_batch,
                bar=bar,
            )
        new = [[int(number) for number in text.split()] for text in texts]
        scores = [
            float(self.right(tokenizer, prompt, ids, row.answer))
            for prompt, ids, row in zip(prompts, new, rows, strict=True)
        ]
        return self._result(model, rows, prompts, scores)

    def right(self, tokenizer: Tokenizer, prompt: Sequence[int], new: Sequence[int], answer: str) -> bool:
        """Whether the digits of the first word of the last tokens are the answer, as the published script decides."""
        text = tokenizer.decode([*prompt, *new][-self.window :])
        return "".join(c for c in text.split(" ")[0] if c.isnumeric()) == answer

    def rows(self) -> list[Row]:
        """The prompts: shuffled, of the wanted lengths, the first `samples` of them.

        Raises:
          UserError: the file has no such rows.
        """
        every = self._made() if self.file is None else read(self.file)
        order = np.arange(len(every))
        np.random.RandomState(self.seed).shuffle(order)
        wanted = [every[i] for i in order.tolist() if self._is_asked(every[i].length)]
        if not wanted:
            found = ", ".join(map(str, sorted({row.length for row in every})[:_FIRST])) or "no rows"
            expected = f"of {', '.join(map(str, self.lengths))}" if self.lengths else f"below {_TOO_LONG}"
            raise UserError(
                f"{self.file} has context_length {found}, expected some {expected}: change PublishedNeedle.lengths"
            )
        return wanted[: self.samples]

    def _is_asked(self, length: int) -> bool:
        return length < _TOO_LONG if self.lengths is None else length in self.lengths

    def _made(self) -> list[Row]:
        """At least `samples` prompts, as many at each length and depth."""
        rng = np.random.default_rng(self.seed)
        lengths = self.lengths or LENGTHS
        each = -(-self.samples // (len(lengths) * DEPTHS))
        return [
            _row(length, depth, int(key))
            for length in lengths
            for depth in np.linspace(0, 1, DEPTHS).tolist()
            for key in rng.integers(*_KEYS, each)
        ]

    def _result(
        self, model: Decoder, rows: list[Row], prompts: list[list[int]], scores: list[float]
    ) -> Result:
        places = sorted({(row.length, row.depth) for row in rows})
        cells = [
            grids.cell(
                [s for row, s in zip(rows, scores, strict=True) if (row.length, row.depth) == place],
                length=place[0],
                depth=place[1],
            )
            for place in places
        ]
        tokens = {
            length: float(np.mean([len(p) for p, row in zip(prompts, rows, strict=True) if row.length == length]))
            for length in sorted({row.length for row in rows})
        }
        found = {length: grids.mean(own) or 0.0 for length, own in _pooled(rows, scores).items()}
        return {
            "definition": self._definition(len(rows)),
            "summary": ", ".join(f"{100 * found[n]:.0f}% at {n}" for n in tokens),
            "table": {f"{n}": round(100 * found[n], 1) for n in tokens},
            "unit": "% of pass keys found, by characters of the haystack",
            "notes": [] if self.file else ["the haystack is our own, not that of the data set (PublishedNeedle.file)"],
            "model": facts(model),
            "tokens": {f"{n}": round(count, 1) for n, count in tokens.items()},
            "cells": cells,
        }

    def _definition(self, count: int) -> str:
        source = "nanotron/simple_needle_in_a_hay_stack" if self.file else "a haystack of our own"
        return (
            f"needle test of the 2Mamba paper (arXiv 2602.17363): {count} prompts from {source}, all depths together,"
            f" shuffled with seed {self.seed}; right if the digits of the first word of the last {self.window} tokens,"
            f" after a greedy continuation of {self.window}, are the key; 95% Wilson intervals"
        )

    def finding(self, results: Mapping[str, Result]) -> str:
        """The share of keys that each model finds in its longest haystack."""
        found = grids.at_longest(results)
        return "; ".join(f"{who} {share} of the pass keys in {longest} characters" for who, share, longest in found)

    def plot(self, axes: Any, results: Mapping[str, Result]) -> None:
        """Of several models, a row for each, as in the paper; of one, a row for each depth."""
        shown, down = dict(results), "depth"
        if len(results) > 1:
            down = "model"
            cells = [
                grids.cell([s for one in own for s in one["scores"]], length=length, model=label)
                for label, result in results.items()
                for length, own in grids.by(result["cells"], "length").items()
            ]
            shown = {"": {"cells": cells}}
        grids.heat_maps(
            axes,
            shown,
            across="length",
            down=down,
            xlabel="haystack (characters)",
            ylabel=down,
            title="Pass keys found (%)",
        )


class _Numbers:
    """A tokenizer whose text is the ids themselves: what is scored is the last ids, not their text alone."""

    def __init__(self, tokenizer: Tokenizer):
        self.eos_id = tokenizer.eos_id
        self.stop_ids = getattr(tokenizer, "stop_ids", ())

    def decode(self, ids: Sequence[int]) -> str:
        return " ".join(map(str, ids))


def _row(length: int, depth: float, key: int) -> Row:
    """A prompt of the published form: the needle right before the nearest full stop, at the very end for depth 1.

    There the needle replaces the end of the haystack; elsewhere it is on top of `length` characters.
    """
    filler = " ".join(NOISE) + " "
    haystack = (filler * -(-length // len(filler)))[:length]
    needle = NEEDLE.format(key=key)
    if depth == 1:
        text = haystack[: max(length - len(needle), 0)] + needle
    else:
        at = max(haystack.rfind(".", 0, int(depth * length + _ROUNDING) + 1), 0)  # without a stop before: the beginning
        text = haystack[:at] + needle + haystack[at:]
    return Row(TASK + text + QUESTION, str(key), length, depth)


def read(path: str) -> list[Row]:
    """The rows of the data set, in its order.

    Args:
      path: a parquet file, or a folder whose parquet files are read in the order of their names.

    Raises:
      UserError: there is no such file, it is damaged, or it has other columns.
    """
    import pyarrow
    import pyarrow.parquet

    place = pathlib.Path(path).expanduser()
    files = sorted(place.rglob("*.parquet")) if place.is_dir() else [place]
    if not files:
        raise UserError(f"{path} has no parquet files, expected those of the data set: change PublishedNeedle.file")
    rows = []
    for file in files:
        try:
            table = pyarrow.parquet.read_table(file, columns=list(COLUMNS))
            found = [table.column(name).to_pylist() for name in COLUMNS]
        except (OSError, KeyError, pyarrow.ArrowException) as error:
            reason = str(error).splitlines()[0][:120]
            raise UserError(
                f"{file}: not the parquet file of the data set, with {', '.join(COLUMNS)} ({reason}): change "
                "PublishedNeedle.file"
            ) from None
        for prompt, answer, length, depth in zip(*found, strict=True):
            if not isinstance(prompt, str) or None in (answer, length, depth):
                raise UserError(f"{file}: row {len(rows)} is not complete: change PublishedNeedle.file")
            rows.append(Row(prompt, str(answer), int(length), float(depth) / 100))
    return rows


def _pooled(rows: list[Row], scores: list[float]) -> dict[int, list[grids.Cell]]:
    """length -> one cell with the scores of all depths, so that every prompt counts alike."""
    lengths = sorted({row.length for row in rows})
    return {
        length: [grids.cell([s for row, s in zip(rows, scores, strict=True) if row.length == length], length=length)]
        for length in lengths
    }
