"""Questions about long documents, and summaries of them: LongBench v1 and v2, GovReport, or a file of your own."""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

from lcx.data import Tokenizer, special_tokens
from lcx.errors import UserError, check_sizes
from lcx.evals import Result
from lcx.evals.support import answers, figures, grids, remembered
from lcx.evals.support.documents_qa import rows, scores
from lcx.evals.support.documents_qa.rows import Row
from lcx.evals.support.model_facts import facts
from lcx.evals.support.progress import progress
from lcx.model import Decoder

_SAMPLING = {"gov_report": (0.5, 0.95), "longbench_v2": (0.1, 1.0)}  # temperature and top-p, as published
_METRICS = ("f1", "exact", "contains", "rouge_l", "rouge", "f1_zh", "rouge_l_zh")


@dataclasses.dataclass(frozen=True)
class LongDocuments:
    """The score of answers about documents, which are in the prompt as far as they fit.

    A document that is too long loses its middle; the question is never cut. A question with several expected answers
    counts the best. Scores and prompts are those of the layout.

    Attributes:
      file: JSON lines, or a JSON list.
      layout: "longbench" (v1: context, input, answers, dataset; files of LongBench-E give a score by length, too),
        "longbench_v2" (choices A to D), "gov_report" (report, summary), or "qa" (document, question, answers; or
        context and input).
      length: of prompt, special tokens and answer together, in tokens; None: the model's context length.
      document: tokens of a document, which is cut at its end before anything else; None: 15000 for gov_report, else no
        limit.
      max_new_tokens: of an answer; None: as published for the task (32 to 1000).
      temperature, top_p: None: as published (GovReport 0.5 and 0.95, LongBench v2 0.1 and 1, else 0 and 1).
      metric: "f1", "exact", "contains", "rouge_l", "rouge" (all four), or "f1_zh" and "rouge_l_zh" for Chinese; None:
        that of the task. Layout "qa": contains.
      samples: the first rows of the file; None: all.
      model_template: text around a prompt, such as "[INST] {task_template} [/INST]".
      batch_size, tokens_per_batch: prompts at once, and the limit on their tokens.
      seed: for temperatures above 0.
      add_bos: whether each prompt starts with BOS; None: as the tokenizer does.
      name: key in results.json.
    """

    file: str
    layout: str = "qa"
    length: int | None = None
    document: int | None = None
    max_new_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    metric: str | None = None
    samples: int | None = None
    model_template: str = "{task_template}"
    batch_size: int = 8
    tokens_per_batch: int = answers.TOKENS_PER_BATCH
    seed: int = 0
    add_bos: bool | None = None
    name: str = "long_documents"

    def __post_init__(self):
        check_sizes(
            "LongDocuments",
            length=self.length,
            document=self.document,
            max_new_tokens=self.max_new_tokens,
            samples=self.samples,
            batch_size=self.batch_size,
        )
        if self.layout not in rows.LAYOUTS:
            raise UserError(
                f"LongDocuments.layout is {self.layout!r}, expected one of {', '.join(rows.LAYOUTS)}"
            )
        if self.metric is not None and (self.metric not in _METRICS or self.layout == "longbench_v2"):
            raise UserError(
                f"LongDocuments.metric is {self.metric!r} for layout {self.layout}, expected one of"
                f" {', '.join(_METRICS)}, and none for longbench_v2"
            )
        if self.model_template.count("{task_template}") != 1:
            raise UserError(
                f"LongDocuments.model_template is {self.model_template!r}, expected {{task_template}} once in it"
            )

    def check_model(self, model: Decoder, tokenizer: Tokenizer | None) -> None:
        tokenizer = answers.needed(tokenizer, model, "LongDocuments")
        length, outer = self.length or model.max_position_embeddings, self._outer(tokenizer)
        for row in self._rows():
            self._room(row, length - outer, length)

    def _rows(self) -> list[Row]:
        return remembered.once(id(self), lambda: rows.read(self.file, self.layout, limit=self.samples))

    def _outer(self, tokenizer: Tokenizer) -> int:
        """Tokens of a prompt around the text of a question: special tokens and the template."""
        before = special_tokens(tokenizer, add_bos=self.add_bos).before
        return len(before) + len(tokenizer.encode(self.model_template.replace("{task_template}", "")))

    def _room(self, row: Row, most: int, length: int) -> int:
        """Tokens for the text of a question, of `most` with its answer. Raises UserError if there is no room for it."""
        room = most - self._new_tokens(row)
        if room < 2:
            raise UserError(
                f"LongDocuments: {self._new_tokens(row)} new tokens leave no room for a prompt in {length} tokens:"
                " raise LongDocuments.length, or lower LongDocuments.max_new_tokens"
            )
        return room

    def __call__(self, model: Decoder, params: Any, tokenizer: Tokenizer | None) -> Result:
        tokenizer = answers.needed(tokenizer, model, "LongDocuments")
        asked = self._rows()
        prompts, cuts = self.prompts(tokenizer, asked, self.length or model.max_position_embeddings)
        temperature, top_p = _SAMPLING.get(self.layout, (0.0, 1.0))
        texts: list[str] = [""] * len(asked)
        by_length: dict[int, list[int]] = {}
        for i, row in enumerate(asked):
            by_length.setdefault(self._new_tokens(row), []).append(i)
        with progress(self.name, sum(map(len, prompts)) + sum(map(self._new_tokens, asked)), "tokens") as bar:
            for new_tokens, members in sorted(by_length.items()):
                found = answers.continuations(
                    model,
                    params,
                    tokenizer,
                    [prompts[i] for i in members],
                    max_new_tokens=new_tokens,
                    batch_size=self.batch_size,
                    tokens_per_batch=self.tokens_per_batch,
                    temperature=temperature if self.temperature is None else self.temperature,
                    top_p=top_p if self.top_p is None else self.top_p,
                    seed=self.seed,
                    bar=bar,
                )
                for i, text in zip(members, found, strict=True):
                    texts[i] = text
        scored = [self.score(row, text) for row, text in zip(asked, texts, strict=True)]
        return self._result(model, asked, texts, scored, cuts)

    def prompts(
        self, tokenizer: Tokenizer, asked: list[Row], length: int
    ) -> tuple[list[list[int]], list[int]]:
        """(the ids of each prompt, the tokens that were cut from each document)."""
        before = special_tokens(tokenizer, add_bos=self.add_bos).before
        head, tail = self.model_template.split("{task_template}")
        outer = self._outer(tokenizer)
        document = self.document or (15000 if self.layout == "gov_report" else None)
        made, cuts = [], []
        for row in asked:
            room = self._room(row, length - outer, length)
            text, cut = rows.prompt(row, tokenizer, room=room, document=document)
            made.append([*before, *tokenizer.encode(head + text + tail).tolist()])
            cuts.append(cut)
        return made, cuts

    def _new_tokens(self, row: Row) -> int:
        return self.max_new_tokens or row.task.answer_tokens

    def score(self, row: Row, text: str) -> dict[str, float]:
        """The scores of an answer by name, each the best over the expected answers."""
        metric = self.metric or row.task.metric
        if row.task.first_line:
            text = text.lstrip("\n").split("\n")[0]
        if metric == "choice":
            return {"accuracy": float(_choice(text) == row.answers[0].strip())}
        if metric == "rouge":
            each = [scores.rouge(text, answer) for answer in row.answers]
            return {name: max(one[name] for one in each) for name in scores.ROUGE}
        if metric == "classification":
            return {metric: max(scores.classification(text, answer, row.classes) for answer in row.answers)}
        return {metric: max(getattr(scores, metric)(text, answer) for answer in row.answers)}

    def _result(
        self,
        model: Decoder,
        asked: list[Row],
        texts: list[str],
        scored: list[dict[str, float]],
        cuts: list[int],
    ) -> Result:
        groups: dict[str, list[int]] = {}
        for i, row in enumerate(asked):
            groups.setdefault(row.group, []).append(i)
        cells = []
        for group, members in groups.items():
            example = {"expected": asked[members[0]].answers[:3], "continuation": texts[members[0]][:300]}
            for metric in scored[members[0]]:
                cell = grids.cell([scored[i][metric] for i in members], task=group, metric=metric)
                cells.append({**cell, "example": example})
        overall = [next(iter(one.values())) for one in scored]
        mean = 100 * sum(overall) / len(overall)
        cut = sum(n > 0 for n in cuts)
        several, by_kind = len(cells) > 1, self.layout == "longbench_v2"
        table = {
            f"{c['task']}, {c['metric']}" if several else c["metric"]: round(100 * c["score"], 2)
            for c in cells
        }
        if by_kind:
            table = _by_kind([row.group for row in asked], overall)
        return {
            "definition": self._definition(len(asked)),
            "summary": f"{mean:.1f} over {len(asked)} questions",
            "table": {**({"all": round(mean, 2)} if len(groups) > 1 or by_kind else {}), **table},
            "unit": "score in percent",
            "notes": [f"{cut} of {len(asked)} documents were cut, by {sum(cuts)} tokens in all"]
            if cut
            else [],
            "model": facts(model),
            "mean": mean,
            "cells": cells,
        }

    def _definition(self, count: int) -> str:
        by = self.metric or {"longbench_v2": "accuracy", "gov_report": "ROUGE", "qa": "contains"}.get(
            self.layout, "LongBench's own score of each task"
        )
        return (
            f"{count} questions of {self.file} (layout {self.layout}), {by}, the best over all expected answers;"
            f" documents that do not fit {self.length or 'the window'} lose their middle, questions"
            " nothing; ROUGE: F1 of"
            " the package rouge-score with stemming; Chinese: over words as rjieba cuts them;"
            " code similarity: difflib's ratio; the mean is over questions; 95%"
            " Wilson intervals"
        )

    def finding(self, results: Mapping[str, Result]) -> str:
        """The mean score of each model, with its interval."""
        parts = []
        for label, result in results.items():
            first = {}
            for cell in result["cells"]:
                first.setdefault(cell["task"], cell)
            own = [score for cell in first.values() for score in cell["scores"]]
            low, high = grids.wilson_of(sum(own), len(own))
            who = f"“{label}” scores" if len(results) > 1 else "scores"
            parts.append(f"{who} {result['mean']:.1f} (95% interval {100 * low:.0f} to {100 * high:.0f})")
        return f"about documents, {'; '.join(parts)}"

    def plot(self, axes: Any, results: Mapping[str, Result]) -> None:
        values = {label: result["mean"] for label, result in results.items()}
        figures.bars(axes, values, results, texts={label: f"{value:.1f}" for label, value in values.items()})
        axes.set_xlabel("score (%)")
        axes.set_title("Questions about long documents")


def _by_kind(groups: list[str], scored: list[float]) -> dict[str, float]:
    """The accuracies that LongBench v2 publishes beside the overall one: by difficulty, and by length."""
    table = {}
    for kind in ("easy", "hard", "short", "medium", "long"):
        own = [score for group, score in zip(groups, scored, strict=True) if kind in group.split(", ")]
        if own:
            table[f"{kind}, accuracy"] = round(100 * sum(own) / len(own), 2)
    return table


def _choice(text: str) -> str | None:
    """The letter of the answer, as LongBench v2 reads it."""
    text = text.replace("*", "")
    found = re.search(r"The correct answer is \(([A-D])\)", text) or re.search(
        r"The correct answer is ([A-D])", text
    )
    return found[1] if found else None
