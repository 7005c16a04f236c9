"""Loss by position: how well the model predicts the next token given 100, 1000 or 10000 tokens before it.

If a model uses its context, its loss decreases with the position. Beyond the context length of its training, the loss
of a model without RoPE scaling rises steeply, while that of a successfully extended model keeps decreasing.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from lcx.data import Dataset, Mixture, Tokenizer
from lcx.data.packing import assemble, plan_concat
from lcx.errors import UserError
from lcx.evals import Result
from lcx.evals.support import documents, figures, scoring
from lcx.evals.support.intervals import mean_and_error
from lcx.evals.support.model_facts import facts
from lcx.model import Decoder

_CURVE_START, _CURVE_PER_OCTAVE = 8, 4
_PLOTTED_FROM = 32  # the high loss at the first positions would compress the interesting part of the plot


@dataclasses.dataclass(frozen=True)
class LossByPosition:
    """Mean negative log-likelihood in nats, by buckets of position that double in size: 0-128, 128-256, 256-512, ...

    Position p is that of the input token, so the label at p is predicted from p + 1 tokens.

    Attributes:
      dataset: the text; None: the data that the checkpoint was trained on.
      split: "eval" or "train".
      lengths: the row lengths to evaluate, in tokens; None: the model's context length.
      max_tokens: tokens of text to read for each length, from the beginning of the split.
      first_bucket: end of the first bucket, in tokens.
      document_mask: True: attention is limited to one document, and positions restart at each document. False:
        documents are concatenated and attention covers the whole row, so every row has the full length as context.
      score_document_starts: whether the first token of a document (its BOS) counts as a label. A model trained with a
        document mask has never learned to predict it.
      tokens_per_batch: tokens per forward pass.
      name: key in results.json.
    """

    dataset: Dataset | Mixture | None = None
    split: str = "eval"
    lengths: tuple[int, ...] | None = None
    max_tokens: int = 1 << 17
    first_bucket: int = 128
    document_mask: bool = False
    score_document_starts: bool = True
    tokens_per_batch: int = scoring.TOKENS_PER_BATCH
    name: str = "loss_by_position"

    def __post_init__(self):
        if self.lengths is not None and (not self.lengths or min(self.lengths) < 1):
            raise UserError(f"LossByPosition.lengths is {self.lengths}, expected lengths of at least 1 token")
        if self.first_bucket < 1:
            raise UserError(f"LossByPosition.first_bucket is {self.first_bucket}, expected at least 1")

    def __call__(self, model: Decoder, params: Any, tokenizer: Tokenizer | None) -> Result:
        text = documents.read(
            self.dataset,
            self.split,
            tokenizer=tokenizer,
            model=model,
            max_tokens=self.max_tokens + 1,  # a row of T inputs needs the label after its last
            packed=True,
            owner="LossByPosition",
        )
        lengths = self.lengths or (model.max_position_embeddings,)
        bytes_per_token = text.num_bytes() / text.num_tokens
        measured = [self._measure(model, params, text, T, bytes_per_token) for T in lengths]
        longest = max(measured, key=lambda entry: entry["length"])
        return {
            "definition": self._definition(text),
            "summary": _summary(longest, text.unit),
            "table": {_title(b): b["nll"] for b in longest["buckets"]},
            "model": facts(model),
            "unit": text.unit,
            "bytes_per_token": bytes_per_token,
            "lengths": measured,
        }

    def _measure(
        self, model: Decoder, params: Any, text: documents.Documents, T: int, bytes_per_token: float
    ) -> dict[str, Any]:
        batch, weights = self._rows(text, T)
        masks = {name: batch[name] for name in ("positions", "segment_ids")} if self.document_mask else {}
        nll = scoring.score(
            model,
            params,
            batch["tokens"],
            batch["labels"],
            tokens_per_batch=self.tokens_per_batch,
            description=f"{self.name} at {T}",
            **masks,
        )

        def between(start: int, end: int) -> dict[str, Any]:
            inside = weights * ((batch["positions"] >= start) & (batch["positions"] < end))
            mean, error = mean_and_error(
                (nll * inside).sum(1, dtype=np.float64), inside.sum(1, dtype=np.float64)
            )
            return {
                "start": start,
                "end": end,
                "nll": mean,
                "standard_error": error,
                "tokens": int(inside.sum()),
            }

        whole = between(0, T)
        return {
            "length": T,
            "rows": len(nll),
            **whole,
            "bytes": round(whole["tokens"] * bytes_per_token),
            "nll_per_byte": None if whole["nll"] is None else whole["nll"] / bytes_per_token,
            "buckets": [between(*edges) for edges in doubling(T, self.first_bucket)],
            "last_quarter": between(T - T // 4, T),
            "curve": [between(*edges) for edges in doubling(T, _CURVE_START, _CURVE_PER_OCTAVE)],
        }

    def _rows(self, text: documents.Documents, T: int) -> tuple[dict[str, np.ndarray], np.ndarray]:
        """(a batch of all rows, the weights of its labels): the concatenated documents, cut every T tokens."""
        lengths = np.array([len(document) for document in text.tokens])
        starts = np.cumsum(lengths) - lengths
        plan = plan_concat(starts, lengths, seq_len=T, joined=not self.document_mask)
        # The extra token that was read as the last label must not become a row of its own.
        rows = np.arange(max(1, plan.num_rows - (int(lengths.sum()) % T == 1)))
        batch = assemble(
            plan,
            np.concatenate(text.tokens),
            rows,
            document_mask=self.document_mask,
            loss_mask=np.concatenate(text.masks),
        )
        weights = batch["loss_weights"]
        if not self.score_document_starts:
            is_start = np.zeros(int(lengths.sum()), np.int32)
            is_start[starts] = 1
            weights = weights * (
                assemble(plan, is_start, rows, document_mask=self.document_mask)["labels"] == 0
            )
        return batch, weights

    def _definition(self, text: documents.Documents) -> str:
        if self.document_mask:
            where = "attention and positions inside each document; "
        else:
            where = "attention over the whole row, across documents; "
            where += "" if self.score_document_starts else "the first token of a document is no label; "
        return (
            f"mean negative log-likelihood ({text.unit}){text.scored} of the token after position p, for p in"
            " [start, end);"
            f" documents of {text.source} end to end, in order, the first {text.num_tokens} tokens, cut into rows of"
            f" the evaluated length; {text.special}; {where}standard errors take rows as independent"
        )

    def plot(self, axes: Any, results: Mapping[str, Result]) -> None:
        styles = figures.styles(results)
        finals = {}
        for label, result in results.items():
            for entry in result["lengths"]:
                plotted_from = min(_PLOTTED_FROM, entry["length"] // 4)
                curve = [b for b in entry["curve"] if b["tokens"] and b["start"] >= plotted_from]
                middle = np.array([(b["start"] + b["end"]) / 2 for b in curve])
                nll = np.array([b["nll"] for b in curve], float)
                error = np.array([b["standard_error"] or 0.0 for b in curve])
                main = entry is max(result["lengths"], key=lambda e: e["length"])
                color = styles[label]["color"]
                axes.fill_between(middle, nll - 2 * error, nll + 2 * error, color=color, alpha=0.15, lw=0)
                axes.plot(
                    middle, nll, label=label if main else None, alpha=1 if main else 0.5, **styles[label]
                )
                if main and len(nll):
                    finals[label] = nll[-1]
        figures.position_axis(axes, "position in the context (tokens)")
        figures.mark_window(axes, results)
        axes.set_ylabel(f"loss ({next(iter(results.values()))['unit']})")
        axes.set_title(_headline(results))
        figures.legend(axes, sorted(finals, key=lambda label: -finals[label]))


def doubling(T: int, first: int, per_octave: int = 1) -> list[tuple[int, int]]:
    """(start, end) of intervals that cover [0, T): [0, first), then `per_octave` intervals per doubling."""
    edges, k = [0, min(first, T)], 0
    while edges[-1] < T:
        k += 1
        edges.append(min(T, max(edges[-1] + 1, round(first * 2 ** (k / per_octave)))))
    return list(zip(edges[:-1], edges[1:], strict=True))


def _title(bucket: Mapping[str, Any]) -> str:
    return f"{bucket['start']}-{bucket['end']}"


def _summary(entry: Mapping[str, Any], unit: str) -> str:
    numbers = [f"{_title(b)}: {b['nll']:.3f}" for b in entry["buckets"] if b["nll"] is not None]
    return f"{unit} at {', '.join(numbers)}"


def _headline(results: Mapping[str, Result]) -> str:
    """The title of the plot: the worst and the best model at the end of the longest context, with their losses."""
    last = {}
    for label, result in results.items():
        filled = [
            b for b in max(result["lengths"], key=lambda e: e["length"])["buckets"] if b["nll"] is not None
        ]
        if filled:
            last[label] = filled[-1]
    if not last:
        return "Loss by position"
    worst, best = max(last, key=lambda k: last[k]["nll"]), min(last, key=lambda k: last[k]["nll"])
    where = f"At positions {last[best]['start']}–{last[best]['end']}"
    text = f"{best} {last[best]['nll']:.2f}"
    if worst != best and _title(last[worst]) == _title(last[best]):
        text = f"{worst} {last[worst]['nll']:.2f}, {text}"
    return f"{where}: {text} {next(iter(results.values()))['unit']}"
