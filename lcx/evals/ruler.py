"""RULER version 1 (Hsieh et al. 2024, arXiv 2404.06654): 13 tasks of retrieval, tracking, counting and QA by length."""

import dataclasses
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

from lcx.data import Tokenizer, special_tokens
from lcx.errors import UserError, check_sizes
from lcx.evals import Result
from lcx.evals.support import answers, grids
from lcx.evals.support.model_facts import facts
from lcx.evals.support.progress import progress
from lcx.evals.support.ruler import published, scores
from lcx.evals.support.ruler.lengths import Lengths
from lcx.evals.support.ruler.questions import Questions
from lcx.model import Decoder

_PUBLISHED = (4096, 8192, 16384, 32768, 65536, 131072)


@dataclasses.dataclass(frozen=True)
class Ruler:
    """Scores of RULER's tasks at several lengths, their averages, and the effective length.

    Samples are those of RULER's own generator for the same tokenizer, text for text (`lcx.evals.support.ruler` says
    where they are not). A length counts the prompt, the special tokens before it and the tokens that are generated.
    Continuations are greedy; prompts are never cut.

    Attributes:
      tasks: some of `lcx.evals.support.ruler.published.TASKS`; None: all whose text is there. Six need no text:
        niah_single_1, niah_multikey_2, niah_multikey_3, vt, cwe, fwe.
      lengths: in tokens; None: the published ones (4096, 8192, ..., 131072) within the model's window; for a window
        below 4096, half of it, the window and twice as much.
      samples: of each task at each length; 500 in the paper.
      seed: of the samples; 42 in RULER.
      essays: text file, or folder of .txt files, in which niah_single_2, niah_single_3, niah_multikey_1,
        niah_multivalue and niah_multiquery hide their needles. The paper uses essays of Paul Graham; with other texts
        the scores are those of a custom haystack.
      squad: file in the layout of SQuAD, for qa_1. The paper uses SQuAD 2.0 (dev).
      hotpotqa: file in the layout of HotpotQA (distractor setting), for qa_2.
      english_words: RULER's english_words.json, for cwe at lengths that need more than 8166 words.
      model_template: text around a prompt, such as "[INST] {task_template} [/INST]"; its tokens count.
      threshold: the average that an effective length reaches; 85.6 in the paper.
      batch_size: prompts generated at once.
      tokens_per_batch: limits the batch where prompts are long.
      add_bos: whether each prompt starts with BOS; None: as the tokenizer does.
      name: key in results.json.
    """

    tasks: tuple[str, ...] | None = None
    lengths: tuple[int, ...] | None = None
    samples: int = 50
    seed: int = published.SEED
    essays: str | None = None
    squad: str | None = None
    hotpotqa: str | None = None
    english_words: str | None = None
    model_template: str = published.PLAIN
    threshold: float = scores.THRESHOLD
    batch_size: int = 8
    tokens_per_batch: int = answers.TOKENS_PER_BATCH
    add_bos: bool | None = None
    name: str = "ruler"

    def __post_init__(self):
        check_sizes("Ruler", samples=self.samples, batch_size=self.batch_size)
        for task in self.tasks or ():
            if task not in published.TASKS:
                raise UserError(f"Ruler.tasks names {task!r}, expected some of {', '.join(published.TASKS)}")
        for setting in ("tasks", "lengths"):
            chosen = getattr(self, setting)
            if chosen is not None and (not chosen or len(set(chosen)) < len(chosen)):
                raise UserError(f"Ruler.{setting} is {chosen}, expected at least one, and none twice")
        if self.lengths is not None and min(self.lengths) < 1:
            raise UserError(f"Ruler.lengths is {self.lengths}, expected lengths of at least 1 token")

    def check_model(self, model: Decoder, tokenizer: Tokenizer | None) -> None:
        tokenizer = answers.needed(tokenizer, model, "Ruler")
        material, counter = self._material(), Lengths(tokenizer)
        lengths, notes = self._lengths(model)
        for length in dict.fromkeys((min(lengths), max(lengths))):  # what fits the shortest fits the others
            fits = False
            for task in self._tasks():
                try:
                    next(self._samples(task, length, tokenizer, material, counter))
                    fits = True
                except UserError as error:
                    if not self._may_miss(error):
                        raise
            if fits:
                return
        raise self._nothing_fits(notes)

    def _may_miss(self, error: UserError) -> bool:
        """Whether a task is left out at a length that is too short for it: at the default lengths."""
        return self.lengths is None and "too short" in str(error)

    def _nothing_fits(self, notes: list[str]) -> UserError:
        why = notes[-1] if notes else "none is set"
        return UserError(f"Ruler: no task fits any length ({why}); set Ruler.lengths")

    def __call__(self, model: Decoder, params: Any, tokenizer: Tokenizer | None) -> Result:
        tokenizer = answers.needed(tokenizer, model, "Ruler")
        material, counter = self._material(), Lengths(tokenizer)
        lengths, notes = self._lengths(model)
        cells, chosen = [], self._tasks()
        too_short: dict[str, list[str]] = {}
        with progress(self.name, len(chosen) * self.samples * sum(lengths), "tokens") as bar:
            for task in chosen:
                for length in lengths:
                    try:
                        made = list(self._samples(task, length, tokenizer, material, counter))
                    except UserError as error:
                        if not self._may_miss(error):
                            raise
                        too_short.setdefault(task, []).append(str(length))
                        continue
                    cells.append(self._measure(model, params, tokenizer, task, length, made, bar))
        if too_short:
            which = "; ".join(f"{task} in {', '.join(found)}" for task, found in too_short.items())
            notes.append(f"not measured, because its shortest prompt and answer do not fit: {which} tokens")
        return self._result(model, cells, notes)

    def _samples(
        self, task: str, length: int, tokenizer: Tokenizer, material: published.Material, counter: Lengths
    ) -> Iterator[published.Sample]:
        return published.samples(
            task,
            tokenizer=tokenizer,
            length=length,
            count=self.samples,
            seed=self.seed,
            material=material,
            model_template=self.model_template,
            reserved=len(special_tokens(tokenizer, add_bos=self.add_bos).before),
            lengths=counter,
        )

    def _measure(
        self,
        model: Decoder,
        params: Any,
        tokenizer: Tokenizer,
        task: str,
        length: int,
        made: list[published.Sample],
        bar: Any,
    ) -> grids.Cell:
        before = special_tokens(tokenizer, add_bos=self.add_bos).before
        texts = answers.continuations(
            model,
            params,
            tokenizer,
            [[*before, *tokenizer.encode(s.input + s.answer_prefix).tolist()] for s in made],
            max_new_tokens=published.TASKS[task].answer_tokens,
            batch_size=self.batch_size,
            tokens_per_batch=self.tokens_per_batch,
            bar=bar,
        )
        match = scores.match_part if isinstance(published.TASKS[task], Questions) else scores.match_all
        values = [match(text, sample.outputs) for text, sample in zip(texts, made, strict=True)]
        example = {"expected": made[0].outputs, "continuation": texts[0]}
        found = grids.cell(values, task=task, length=length)
        return {**found, "longest": max(sample.length for sample in made), "example": example}

    def _tasks(self) -> tuple[str, ...]:
        if self.tasks is not None:
            return self.tasks
        given = {"squad": self.squad, "hotpotqa": self.hotpotqa}
        return tuple(
            name
            for name, task in published.TASKS.items()
            if name in published.OFFLINE
            or (name in published.ESSAY and self.essays is not None)
            or (isinstance(task, Questions) and given[task.layout] is not None)
        )

    def _lengths(self, model: Decoder) -> tuple[tuple[int, ...], list[str]]:
        if self.lengths is not None:
            return tuple(sorted(self.lengths)), []
        window = model.max_position_embeddings
        if window < _PUBLISHED[0]:
            found = tuple(length for length in (window // 2, window, 2 * window) if length > 0)
            return found, [f"the window of {window} tokens is below RULER's shortest length, 4096"]
        return tuple(length for length in _PUBLISHED if length <= window), []

    def _material(self) -> published.Material:
        essay = None if self.essays is None else _text(self.essays)
        return published.Material(essay, self.squad, self.hotpotqa, self.english_words)

    def _result(self, model: Decoder, cells: list[grids.Cell], notes: list[str]) -> Result:
        if not cells:
            raise self._nothing_fits(notes)
        table: dict[str, dict[int, float]] = {}
        for one in cells:
            table.setdefault(one["task"], {})[one["length"]] = 100 * one["score"]
        averages = scores.averages(table)
        effective = scores.effective_length(averages, self.threshold)
        low = scores.weighted(averages, increasing=False) if averages else None
        high = scores.weighted(averages, increasing=True) if averages else None
        longest = max(averages, default=0)
        best = f"{averages[longest]:.1f} at {longest} tokens, " if averages else ""
        reach = effective or f"below {min(averages, default=0)}"
        return {
            "definition": self._definition(table),
            "summary": f"{best}effective length {reach} ({len(table)} tasks)",
            "table": {
                "effective length": effective or 0,
                **{f"{length}": round(value, 1) for length, value in averages.items()},
                "wAvg (inc)": None if high is None else round(high, 1),
                "wAvg (dec)": None if low is None else round(low, 1),
            },
            "notes": notes,
            "model": facts(model),
            "averages": {str(length): value for length, value in averages.items()},
            "effective_length": effective,
            "weighted_increasing": high,
            "weighted_decreasing": low,
            "cells": cells,
        }

    def _definition(self, table: Mapping[str, Any]) -> str:
        custom = [task for task in table if task in published.ESSAY]
        haystack = f"; {', '.join(custom)} in a custom haystack, {self.essays}" if custom else ""
        whole = len(table) == len(published.TASKS)
        part = "" if whole else f" ({len(table)} of its 13 tasks: {', '.join(table)})"
        return (
            f"{published.VERSION}{part}, {self.samples} samples per task and length, seed {self.seed}; lengths count"
            " prompt, special tokens and generated tokens, with the model's tokenizer; greedy; a sample's score is"
            " the share of its expected strings that occur in the continuation (qa: 1 if any does), in percent;"
            f" average over tasks at each length; effective length: the longest with an average of at least"
            f" {self.threshold:g}; wAvg: lengths weighted 1, 2, ... upwards (inc) or downwards (dec){haystack}"
        )

    def finding(self, results: Mapping[str, Result]) -> str:
        """How far each model reads by RULER's threshold, and its average at the longest common length."""
        parts = []
        for label, result in results.items():
            by_length = {int(length): value for length, value in result["averages"].items()}
            who = f"“{label}”" if len(results) > 1 else "the model"
            if not by_length:
                parts.append(f"{who} has no length that all its tasks fit")
                continue
            reach = result["effective_length"]
            far = f"reads {reach} tokens" if reach else f"does not read {min(by_length)} tokens"
            parts.append(
                f"{who} {far} (average of at least {self.threshold:g}); {by_length[max(by_length)]:.1f} at"
                f" {max(by_length)}"
            )
        return "; ".join(parts)

    def plot(self, axes: Any, results: Mapping[str, Result]) -> None:
        if len(results) > 1:
            title = "RULER by length (mean over samples of all tasks; band: 95% interval)"
            grids.curves(axes, results, across="length", ylabel="score (%)", title=title)
            return
        grids.heat_maps(
            axes,
            results,
            across="length",
            down="task",
            xlabel="length of the prompt with its answer (tokens)",
            ylabel="",
            title="RULER: score by task and length (%)",
        )


def _text(path: str) -> str:
    """The text of a file, or of all .txt files of a folder in order of name.

    Raises:
      UserError: there is none.
    """
    place = pathlib.Path(path).expanduser()
    files = sorted(place.glob("*.txt")) if place.is_dir() else [place]
    if not files:
        raise UserError(f"{path} holds no .txt file: change Ruler.essays")
    try:
        return "\n".join(file.read_text(encoding="utf-8-sig") for file in files)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; change Ruler.essays") from None
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path} is not UTF-8 text ({error.reason}); convert it, or change Ruler.essays"
        ) from None
