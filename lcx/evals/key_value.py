"""Key/value retrieval: many random pairs, and the question for the value of one key, by length and position."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from lcx.data import Tokenizer, special_tokens
from lcx.errors import UserError, check_sizes
from lcx.evals import Result
from lcx.evals.support import answers, grids, records, remote
from lcx.evals.support.model_facts import facts
from lcx.evals.support.progress import progress
from lcx.model import Decoder

_MODEL_TEMPLATE = "{task_template}"


@dataclasses.dataclass(frozen=True)
class Trial:
    """One prompt with the value that its continuation must contain, and its cell."""

    prompt: str
    value: str
    tokens: int
    length: int
    position: float


@dataclasses.dataclass(frozen=True)
class KeyValue:
    """The share of values found. An answer is right if the value occurs in the continuation, without the prompt.

    Attributes:
      form: "uuid": keys of 8 and values of 4 hexadecimal digits, asked as h2oGPT does; "json": a JSON object of UUIDs,
        as in "Lost in the Middle"; "helmet": the same with two solved examples, as in HELMET.
      lengths: of prompt, special tokens and generated tokens together; None: half of the model's context length, all of
        it, and twice as much.
      positions: of the pair that is asked for, from 0 (first) to 1 (last).
      trials: prompts in each cell; of a file, its first records.
      file: kv-retrieval-75_keys.jsonl of "Lost in the Middle", or another; its records replace the random pairs and the
        lengths. It needs form "json" or "helmet".
      model_template: text around a prompt, such as "[INST] {task_template} [/INST]".
      max_new_tokens: of a continuation; None: as published for the form (256 or 100).
      batch_size, tokens_per_batch: prompts at once, and the limit on their tokens.
      seed: for the random pairs.
      add_bos: whether each prompt starts with BOS; None: as the tokenizer does.
      server: base URL of an OpenAI completions endpoint that answers in place of the checkpoint, for example
        "http://127.0.0.1:8000/v1" of `python -m lcx.serve`. The checkpoint's tokenizer still counts the lengths.
        Answers of a server are not kept for a resumed evaluation.
      server_model: the name of the model there; None: the first that the server lists.
      name: key in results.json.
    """

    form: str = "uuid"
    lengths: tuple[int, ...] | None = None
    positions: tuple[float, ...] = (0.2, 0.5, 0.8)
    trials: int = 10
    file: str | None = None
    model_template: str = _MODEL_TEMPLATE
    max_new_tokens: int | None = None
    batch_size: int = 8
    tokens_per_batch: int = answers.TOKENS_PER_BATCH
    seed: int = 0
    add_bos: bool | None = None
    server: str | None = None
    server_model: str | None = None
    name: str = "key_value"

    def __post_init__(self):
        check_sizes(
            "KeyValue", trials=self.trials, batch_size=self.batch_size, max_new_tokens=self.max_new_tokens
        )
        if self.form not in records.FORMS:
            raise UserError(f"KeyValue.form is {self.form!r}, expected one of {', '.join(records.FORMS)}")
        if not self.positions or not all(0 <= position <= 1 for position in self.positions):
            raise UserError(f"KeyValue.positions is {self.positions}, expected numbers from 0 to 1")
        if self.file is not None and self.form == "uuid":
            raise UserError("KeyValue.file holds JSON records: set KeyValue.form to 'json' or 'helmet'")
        if self.file is not None and self.lengths is not None:
            raise UserError("KeyValue.lengths has no effect on the records of a file: remove lengths or file")
        if self.server is None and self.server_model is not None:
            raise UserError("KeyValue.server_model is a model of a server: set KeyValue.server")
        if self.server is not None and self.add_bos is not None:
            raise UserError("KeyValue.add_bos has no effect on a server, which gets text: remove add_bos or server")
        if self.model_template.count(_MODEL_TEMPLATE) != 1:
            raise UserError(
                f"KeyValue.model_template is {self.model_template!r}, expected {_MODEL_TEMPLATE} once in it"
            )

    @property
    def _form(self) -> records.Form:
        return records.FORMS[self.form]

    @property
    def _new_tokens(self) -> int:
        return self.max_new_tokens or self._form.answer_tokens

    def check_model(self, model: Decoder, tokenizer: Tokenizer | None) -> None:
        tokenizer = answers.needed(tokenizer, model, "KeyValue")
        self._served_by()
        if self.file is None:
            self._pairs_at(model, tokenizer)
        else:
            self._records()

    def _served_by(self) -> str | None:
        """The name of the model of the server; None without a server."""
        if self.server is None or self.server_model is not None:
            return self.server_model
        return remote.model_of(self.server, setting="KeyValue.server")

    def __call__(self, model: Decoder, params: Any, tokenizer: Tokenizer | None) -> Result:
        tokenizer = answers.needed(tokenizer, model, "KeyValue")
        served = self._served_by()
        trials, notes = self.made(model, tokenizer)
        if served is not None:
            notes = [*notes, f"answered by {served} at {self.server}, not by the checkpoint"]
        with progress(self.name, sum(trial.tokens for trial in trials), "tokens") as bar:
            if served is None:
                texts = self._answers(model, params, tokenizer, trials, bar)
            else:
                texts = self._served(served, trials, bar)
        right = [trial.value.lower() in text.lower() for trial, text in zip(trials, texts, strict=True)]
        cells = []
        for place in dict.fromkeys((trial.length, trial.position) for trial in trials):
            own = [i for i, trial in enumerate(trials) if (trial.length, trial.position) == place]
            example = {"expected": trials[own[0]].value, "continuation": texts[own[0]][:300]}
            cell = grids.cell([float(right[i]) for i in own], length=place[0], position=place[1])
            cells.append({**cell, "example": example})
        return self._result(model, cells, notes)

    def _answers(
        self, model: Decoder, params: Any, tokenizer: Tokenizer, trials: list[Trial], bar: Any
    ) -> list[str]:
        before = special_tokens(tokenizer, add_bos=self.add_bos).before
        return answers.continuations(
            model,
            params,
            tokenizer,
            [[*before, *tokenizer.encode(trial.prompt).tolist()] for trial in trials],
            max_new_tokens=self._new_tokens,
            batch_size=self.batch_size,
            tokens_per_batch=self.tokens_per_batch,
            bar=bar,
        )

    def _served(self, model: str, trials: list[Trial], bar: Any) -> list[str]:
        assert self.server is not None
        texts: list[str] = []
        for found in remote.continuations(
            self.server,
            [trial.prompt for trial in trials],
            model=model,
            max_new_tokens=self._new_tokens,
            batch_size=self.batch_size,
            setting="KeyValue.server",
        ):
            bar.update(sum(trial.tokens for trial in trials[len(texts) : len(texts) + len(found)]))
            texts += found
        return texts

    def made(self, model: Decoder, tokenizer: Tokenizer) -> tuple[list[Trial], list[str]]:
        """The trials of all cells, and what to say about lengths that were left out."""
        if self.file is not None:
            return self._of_file(tokenizer), []
        most, notes = self._pairs_at(model, tokenizer)
        trials = [
            self._fitted(tokenizer, length, position, i, count)
            for length, count in most.items()
            for position in self.positions
            for i in range(self.trials)
        ]
        return trials, notes

    def _pairs_at(self, model: Decoder, tokenizer: Tokenizer) -> tuple[dict[int, int], list[str]]:
        """(about how many pairs fit each length, what to say about lengths that were left out)."""
        window = model.max_position_embeddings
        lengths = self.lengths or (window // 2, window, 2 * window)
        most, notes = {}, []
        for length in sorted(set(lengths)):
            count = self._most_pairs(tokenizer, length)
            if count >= 2:
                most[length] = count
                continue
            text = f"{length} tokens are too short for two pairs, the question and {self._new_tokens} new tokens"
            if self.lengths is not None:
                raise UserError(f"KeyValue: {text}: raise KeyValue.lengths, or lower KeyValue.max_new_tokens")
            notes.append(f"{text}: not measured")
        if not most:
            raise UserError(f"KeyValue: {notes[-1]}; set KeyValue.lengths, or lower KeyValue.max_new_tokens")
        return most, notes

    def _records(self) -> Sequence[records.Record]:
        """As many records of the file as there are trials."""
        assert self.file is not None
        known = records.read(self.file)
        if len(known) < self.trials:
            raise UserError(
                f"{self.file} holds {len(known)} records, expected {self.trials}: lower KeyValue.trials"
            )
        return known[: self.trials]

    def _of_file(self, tokenizer: Tokenizer) -> list[Trial]:
        known, made = self._records(), []
        for position in self.positions:
            for record in known:
                pairs = record.moved(round(position * (len(record.pairs) - 1)))
                text = self._framed(self._form.prompt(pairs, record.key))
                made.append((text, record.value, self._counted(tokenizer, text), position))
        longest = max(
            tokens for _, _, tokens, _ in made
        )  # one column: its records have about the same length
        return [Trial(text, value, tokens, longest, position) for text, value, tokens, position in made]

    def _most_pairs(self, tokenizer: Tokenizer, length: int) -> int:
        """About how many pairs fit: from the tokens of 32 of them."""
        rng = np.random.default_rng([self.seed, length])
        pairs = records.distinct(self._form, 34, rng)
        few = self._counted(tokenizer, self._framed(self._form.prompt(pairs[:2], pairs[1][0])))
        many = self._counted(tokenizer, self._framed(self._form.prompt(pairs, pairs[1][0])))
        return 2 + int((length - few) * 32 / (many - few)) if length >= few else 0

    def _fitted(self, tokenizer: Tokenizer, length: int, position: float, index: int, count: int) -> Trial:
        """The trial with as many pairs as fit."""
        rng = np.random.default_rng([self.seed, length, index])
        pairs = records.distinct(self._form, count + 4, rng)
        while True:
            place = round(position * (len(pairs) - 1))
            key, value = pairs[place]
            text = self._framed(self._form.prompt(pairs, key))
            tokens = self._counted(tokenizer, text)
            if tokens <= length or len(pairs) <= 2:
                return Trial(text, value, tokens, length, position)
            pairs = pairs[: len(pairs) - max(1, int((tokens - length) * len(pairs) / (2 * tokens)))]

    def _framed(self, prompt: str) -> str:
        return self.model_template.replace(_MODEL_TEMPLATE, prompt)

    def _counted(self, tokenizer: Tokenizer, text: str) -> int:
        before = special_tokens(tokenizer, add_bos=self.add_bos).before
        return len(before) + len(tokenizer.encode(text)) + self._new_tokens

    def _result(self, model: Decoder, cells: list[grids.Cell], notes: list[str]) -> Result:
        by_length = {length: grids.mean(own) or 0.0 for length, own in grids.by(cells, "length").items()}
        of = f"the records of {self.file}" if self.file else "random pairs without equal keys or values"
        return {
            "definition": (
                f"key/value retrieval ({self._form.citation}): {of}, {self.trials} trials at each length and position;"
                f" lengths count prompt, special tokens and {self._new_tokens} generated tokens; right if the value"
                " occurs in the greedy continuation, regardless of case; 95% Wilson intervals"
            ),
            "summary": ", ".join(f"{value:.0%} at {length}" for length, value in by_length.items()),
            "table": {f"{length}": round(100 * value, 1) for length, value in by_length.items()},
            "unit": "% of values found, mean over positions",
            "notes": notes,
            "model": facts(model),
            "cells": cells,
        }

    def finding(self, results: Mapping[str, Result]) -> str:
        """How many values each model finds at its longest length."""
        found = grids.at_longest(results)
        return "; ".join(f"{who} {share} of the values at {longest} tokens" for who, share, longest in found)

    def plot(self, axes: Any, results: Mapping[str, Result]) -> None:
        grids.heat_maps(
            axes,
            results,
            across="length",
            down="position",
            xlabel="length of the prompt with its answer (tokens)",
            ylabel="position of the pair",
            title="Values found (%), by length and position",
        )
