"""Needles in a haystack, by length and depth: numbers of cities hidden in a text, and a question about some of them.

The prompt is that of EasyContext (github.com/jzhang38/EasyContext). Without generation (`forced`) an answer is right if
all its tokens are the likeliest ones, which is what a greedy continuation would give, for one forward pass.
"""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from lcx.data import Tokenizer, special_tokens
from lcx.errors import UserError, check_sizes
from lcx.evals import Result
from lcx.evals.support import answers, forced, grids, scoring
from lcx.evals.support.haystack import Haystack
from lcx.evals.support.model_facts import facts
from lcx.evals.support.progress import progress
from lcx.model import Decoder

CITIES = (
    "Singapore", "Chicago", "Sydney", "London", "Paris", "Tokyo", "Cairo", "Lima", "Oslo", "Rome", "Madrid", "Delhi"
)  # fmt: skip
_BEFORE = "This is a very long story book: <book> "
_NEEDLE = "\nThe special magic {city} number is: {number}.\n"
_ONE = "</book>.\n Based on the content of the book, Question: What is the special magic {asked} number? Answer: The"
_ONE += " special magic {asked} number is:"
_MANY = "</book>.\n Based on the content of the book, Question: What are the special magic numbers of {asked}? Answer:"
_MANY += " The special magic numbers are:"


@dataclasses.dataclass(frozen=True)
class Trial:
    """One prompt: its text, its answer, and the numbers that the answer must contain."""

    prompt: str
    answer: str
    numbers: list[str]
    length: int
    depth: float


@dataclasses.dataclass(frozen=True)
class NeedleGrid:
    """The share of needles found, by length of the context and depth of the needle in it.

    Attributes:
      lengths: of prompt, special tokens and answer together, in tokens; None: a quarter of the model's context length,
        half of it, all of it, and twice as much.
      depths: where the needle is, from 0 (the beginning) to 1 (the end).
      trials: prompts in each cell, each with its own numbers.
      needles: 1, or several, all of which are asked for in one question; the first is at the depth of the cell, the
        others are spread over the rest.
      distractors: numbers of other cities, spread over the text, which are not asked for.
      digits: of a number.
      forced: True: one forward pass for each prompt with its answer, and no generation. A cell then counts whole
        answers. False: a greedy continuation; what counts is the share of the numbers in it.
      text: a text file as the haystack; None: five sentences of noise, again and again.
      max_new_tokens: of a continuation; None: enough for the numbers.
      batch_size, tokens_per_batch: prompts at once, and the limit on their tokens.
      seed: for the numbers.
      add_bos: whether each prompt starts with BOS; None: as the tokenizer does.
      name: key in results.json.
    """

    lengths: tuple[int, ...] | None = None
    depths: tuple[float, ...] = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
    trials: int = 5
    needles: int = 1
    distractors: int = 0
    digits: int = 7
    forced: bool = True
    text: str | None = None
    max_new_tokens: int | None = None
    batch_size: int = 8
    tokens_per_batch: int = scoring.TOKENS_PER_BATCH
    seed: int = 0
    add_bos: bool | None = None
    name: str = "needle_grid"

    def __post_init__(self):
        for field in ("trials", "needles", "digits", "batch_size", "max_new_tokens"):
            check_sizes("NeedleGrid", **{field: getattr(self, field)})
        if not self.depths or not all(0 <= depth <= 1 for depth in self.depths):
            raise UserError(f"NeedleGrid.depths is {self.depths}, expected numbers from 0 to 1")
        if self.distractors < 0 or self.needles + self.distractors > len(CITIES):
            raise UserError(
                f"NeedleGrid has {self.needles} needles and {self.distractors} distractors, expected at most"
                f" {len(CITIES)} together, and no negative number: change needles or distractors"
            )

    def check_model(self, model: Decoder, tokenizer: Tokenizer | None) -> None:
        tokenizer = answers.needed(tokenizer, model, "NeedleGrid")
        lengths = self._lengths(model)
        haystack = Haystack(tokenizer, self.text, owner="NeedleGrid.text")
        needed = min(lengths) if self.lengths else max(lengths)
        if dataclasses.replace(self, depths=self.depths[:1], trials=1).made(tokenizer, haystack, needed) is None:
            raise self._too_short(needed)

    def _lengths(self, model: Decoder) -> tuple[int, ...]:
        window = model.max_position_embeddings
        return self.lengths or tuple(n for n in (window // 4, window // 2, window, 2 * window) if n)

    def _too_short(self, length: int) -> UserError:
        if self.lengths is None:
            return UserError(f"NeedleGrid: no prompt fits {length} tokens: set NeedleGrid.lengths")
        return UserError(
            f"NeedleGrid: {length} tokens are too short for the question and its needles: raise NeedleGrid.lengths"
        )

    def __call__(self, model: Decoder, params: Any, tokenizer: Tokenizer | None) -> Result:
        tokenizer = answers.needed(tokenizer, model, "NeedleGrid")
        lengths = self._lengths(model)
        trials, notes = [], []
        haystack = Haystack(tokenizer, self.text, owner="NeedleGrid.text")
        for length in sorted(set(lengths)):
            made = self.made(tokenizer, haystack, length)
            if made is None and self.lengths is not None:
                raise self._too_short(length)
            if made is None:
                notes.append(f"{length} tokens are too short for the question and its needles: not measured")
            trials += made or []
        if not trials:
            raise self._too_short(max(lengths))
        with progress(self.name, sum(trial.length for trial in trials), "tokens") as bar:
            scored = (self._forced if self.forced else self._generated)(model, params, tokenizer, trials, bar)
        cells = [
            grids.cell(
                [s for t, s in zip(trials, scored, strict=True) if (t.length, t.depth) == place],
                length=place[0],
                depth=place[1],
            )
            for place in dict.fromkeys((trial.length, trial.depth) for trial in trials)
        ]
        return self._result(model, cells, notes)

    def made(self, tokenizer: Tokenizer, haystack: Haystack, length: int) -> list[Trial] | None:
        """The trials of one length; None if the shortest prompt does not fit."""
        rng = np.random.default_rng([self.seed, length])
        reserved = len(special_tokens(tokenizer, add_bos=self.add_bos).before)
        found = []
        for depth in self.depths:
            for _ in range(self.trials):
                count = self.needles + self.distractors
                low = 10 ** (self.digits - 1)
                numbers = [str(n) for n in rng.choice(9 * low, count, replace=False) + low]
                cities = [CITIES[0], *rng.permutation(CITIES[1:]).tolist()][:count]
                places = [depth, *rng.random(count - 1).tolist()]
                needles = [_NEEDLE.format(city=c, number=n) for c, n in zip(cities, numbers, strict=True)]
                asked, wanted = cities[: self.needles], numbers[: self.needles]
                question = (_ONE if self.needles == 1 else _MANY).format(asked=", ".join(asked))
                answer = " " + ", ".join(wanted)
                room = length - reserved - self._room(tokenizer, question, answer)
                filled = haystack.filled(
                    room, hidden=list(zip(places, needles, strict=True)), before=_BEFORE, after=question
                )
                if filled is None:
                    return None
                found.append(Trial(filled[0], answer, wanted, length, depth))
        return found

    def _room(self, tokenizer: Tokenizer, question: str, answer: str) -> int:
        """Tokens for the answer, which count in the length."""
        if self.max_new_tokens is not None and not self.forced:
            return self.max_new_tokens
        return len(tokenizer.encode(question + answer)) - len(tokenizer.encode(question)) + 4

    def _forced(
        self, model: Decoder, params: Any, tokenizer: Tokenizer, trials: list[Trial], bar: Any
    ) -> list[float]:
        before = special_tokens(tokenizer, add_bos=self.add_bos).before
        pairs = [forced.joined(tokenizer, before, trial.prompt, trial.answer) for trial in trials]
        found = forced.likeliest(
            model,
            params,
            [row for row, _ in pairs],
            [places for _, places in pairs],
            tokens_per_batch=self.tokens_per_batch,
            bar=bar,
        )
        return [
            float(ids.tolist() == [row[place] for place in places])
            for ids, (row, places) in zip(found, pairs, strict=True)
        ]

    def _generated(
        self, model: Decoder, params: Any, tokenizer: Tokenizer, trials: list[Trial], bar: Any
    ) -> list[float]:
        before = special_tokens(tokenizer, add_bos=self.add_bos).before
        room = max(self._room(tokenizer, ":", trial.answer) for trial in trials)
        texts = answers.continuations(
            model,
            params,
            tokenizer,
            [[*before, *tokenizer.encode(trial.prompt).tolist()] for trial in trials],
            max_new_tokens=self.max_new_tokens or room,
            batch_size=self.batch_size,
            tokens_per_batch=self.tokens_per_batch,
            bar=bar,
        )
        said = [re.findall(r"[0-9]+", text) for text in texts]
        if self.needles == 1:  # the first number must be it, so that a list of all numbers is no answer
            return [float(found[:1] == trial.numbers) for found, trial in zip(said, trials, strict=True)]
        return [
            sum(number in found[: self.needles] for number in trial.numbers) / self.needles
            for found, trial in zip(said, trials, strict=True)
        ]

    def _result(self, model: Decoder, cells: list[grids.Cell], notes: list[str]) -> Result:
        by_length = {length: grids.mean(own) for length, own in grids.by(cells, "length").items()}
        return {
            "definition": self._definition(),
            "summary": ", ".join(f"{100 * (v or 0):.0f}% at {length}" for length, v in by_length.items()),
            "table": {f"{length}": round(100 * (value or 0), 1) for length, value in by_length.items()},
            "unit": "% of needles found, mean over depths",
            "notes": notes,
            "model": facts(model),
            "cells": cells,
        }

    def _definition(self) -> str:
        kind = "share of the numbers in a greedy continuation (with one needle: its first number)"
        if self.forced:
            kind = (
                "an answer is right if each of its tokens is the likeliest one after the right ones before it"
            )
        haystack = self.text or "five sentences of noise"
        return (
            f"{self.needles} number(s) of {self.digits} digits hidden in {haystack} (prompt of EasyContext),"
            f" {self.distractors} numbers of other cities beside them; {self.trials} trials at each length and depth;"
            f" lengths count prompt, special tokens and answer; {kind}; 95% Wilson intervals"
        )

    def finding(self, results: Mapping[str, Result]) -> str:
        """How much each model finds at its longest length, and the longest length at which it finds 90%."""
        parts = []
        for (who, share, longest), result in zip(grids.at_longest(results), results.values(), strict=True):
            by_length = grids.by(result["cells"], "length")
            good = [n for n, own in by_length.items() if (grids.mean(own) or 0) >= 0.9]
            reach = f"90% or more up to {max(good)} tokens" if good else "90% at no length"
            parts.append(f"{who} {reach}; {share} of the needles at {longest}")
        return "; ".join(parts)

    def plot(self, axes: Any, results: Mapping[str, Result]) -> None:
        grids.heat_maps(
            axes,
            results,
            across="length",
            down="depth",
            xlabel="length of the prompt with its answer (tokens)",
            ylabel="depth",
            title="Needles found (%), by length and depth",
        )
