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
from lcx.evals.support import documents, figures, scoring, words
from lcx.evals.support.intervals import mean_and_error
from lcx.evals.support.model_facts import facts, varies
from lcx.evals.support.reach import beyond
from lcx.model import Decoder

_LEAST_ROWS = 4  # fewer rows have no useful standard error
_CURVE_START, _CURVE_PER_OCTAVE = 8, 4
_PLOTTED_FROM = 32  # the high loss at the first positions would compress the interesting part of the plot


@dataclasses.dataclass(frozen=True)
class LossByPosition:
    """Mean negative log-likelihood in nats, by buckets of position that double in size: 0-128, 128-256, 256-512, ...

    Position p is that of the input token, so the label at p is predicted from p + 1 tokens.

    Attributes:
      dataset: the text; None: the data that the checkpoint was trained on.
      split: "eval" or "train".
      lengths: the row lengths to evaluate, in tokens. None: 4 times the model's context length, to show whether the
        model works beyond it; 2 times or the context length itself where the text has fewer than 4 such rows or a row
        has more than tokens_per_batch tokens. A RoPE scaling that depends on the length of the row (dynamic NTK,
        LongRoPE) is also measured at the context length.
      max_tokens: tokens of text to read for each length, from the beginning of the split.
      first_bucket: end of the first bucket, in tokens.
      document_mask: True: attention is limited to one document, and positions restart at each document. False:
        documents are concatenated and attention covers the whole row, so every row has the full length as context.
      score_document_starts: whether the first token of a document (its BOS) counts as a label. A model trained with a
        document mask has never learned to predict it.
      tokens_per_batch: tokens per forward pass. A row that is longer is a forward pass of its own.
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

    def check_model(self, model: Decoder, tokenizer: Tokenizer | None) -> None:
        self._text(model, tokenizer)

    def _text(self, model: Decoder, tokenizer: Tokenizer | None) -> documents.Documents:
        return documents.read(
            self.dataset,
            self.split,
            tokenizer=tokenizer,
            model=model,
            max_tokens=self.max_tokens + 1,  # a row of T inputs needs the label after its last
            packed=True,
            owner="LossByPosition",
        )

    def __call__(self, model: Decoder, params: Any, tokenizer: Tokenizer | None) -> Result:
        text = self._text(model, tokenizer)
        lengths, notes = self._lengths(model, text)
        bytes_per_token = text.num_bytes() / text.num_tokens
        measured = [self._measure(model, params, text, T, bytes_per_token) for T in lengths]
        longest = max(measured, key=lambda entry: entry["length"])
        table = _table(measured if self.lengths is None else [longest])
        return {
            "definition": self._definition(text, lengths),
            "summary": _summary(table, text.unit),
            "table": table,
            "notes": notes,
            "model": facts(model),
            "unit": text.unit,
            "bytes_per_token": bytes_per_token,
            "tokenizer_id": text.tokenizer_id,
            "lengths": measured,
        }

    def _lengths(self, model: Decoder, text: documents.Documents) -> tuple[tuple[int, ...], list[str]]:
        """The row lengths to evaluate, and what to say about them."""
        if self.lengths is not None:
            lengths = tuple(dict.fromkeys(self.lengths))
            long = max(lengths)
            read = f"only {text.num_tokens - 1} tokens were read, so positions beyond are not measured"
            note = f"rows of {long} tokens: {read} (LossByPosition.max_tokens)"
            return lengths, [note] if long >= text.num_tokens else []
        window = model.max_position_embeddings
        limits = {
            f"LossByPosition.tokens_per_batch, {self.tokens_per_batch}": self.tokens_per_batch,
            f"the text, of which {text.num_tokens} tokens were read": text.num_tokens // _LEAST_ROWS,
        }
        reach = beyond(window, unit="rows", limits=limits)
        lengths = (window, reach.length) if varies(model) and reach.length > window else (reach.length,)
        return lengths, [reach.note]

    def _measure(
        self, model: Decoder, params: Any, text: documents.Documents, T: int, bytes_per_token: float
    ) -> dict[str, Any]:
        batch, weights = self._rows(text, T)
        masks: dict[str, Any] = {}
        if self.document_mask:
            masks = {name: batch[name] for name in ("positions", "segment_ids")}
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
        T = min(T, int(lengths.sum()))  # a row that is longer than the text would be padded to its length
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

    def _definition(self, text: documents.Documents, lengths: tuple[int, ...]) -> str:
        if self.document_mask:
            where = "attention and positions inside each document; "
        else:
            where = "attention over the whole row, across documents; "
            where += "" if self.score_document_starts else "the first token of a document is no label; "
        several = ""
        if len(lengths) > 1:
            which = "the shortest rows that have it" if self.lengths is None else f"rows of {max(lengths)}"
            several = f"the table has each position in {which}; "
        return (
            f"mean negative log-likelihood ({text.unit}){text.scored} of the token after position p, for p in"
            " [start, end);"
            f" documents of {text.source} end to end, in order, the first {text.num_tokens} tokens, cut into rows of"
            f" {' and '.join(map(str, lengths))} tokens; {text.special}; {where}"
            f"{several}standard errors take rows as independent"
        )

    def finding(self, results: Mapping[str, Result]) -> str:
        """The losses at the last positions that all models were measured at, and within the window of pretraining."""
        if len(results) == 1:
            return _alone(next(iter(results.values())))
        return _compared(results)

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


def _table(measured: list[dict[str, Any]]) -> dict[str, float | None]:
    """The loss at each bucket of positions, in the shortest rows that have it."""
    table: dict[str, float | None] = {}
    for entry in sorted(measured, key=lambda entry: entry["length"]):
        for bucket in entry["buckets"]:
            table.setdefault(_title(bucket), bucket["nll"])
    return table


def _title(bucket: Mapping[str, Any]) -> str:
    return f"{bucket['start']}-{bucket['end']}"


def _summary(table: Mapping[str, float | None], unit: str) -> str:
    numbers = [f"{title}: {nll:.3f}" for title, nll in table.items() if nll is not None]
    return f"{unit} at {', '.join(numbers)}"


def _buckets(result: Result) -> dict[tuple[int, int], words.Measured]:
    """The loss at each bucket of positions, (mean, standard error), from the shortest rows that have it."""
    found: dict[tuple[int, int], words.Measured] = {}
    for entry in sorted(result["lengths"], key=lambda entry: entry["length"]):
        for bucket in entry["buckets"]:
            if bucket["nll"] is not None:
                found.setdefault((bucket["start"], bucket["end"]), (bucket["nll"], bucket["standard_error"]))
    return found


def _alone(result: Result) -> str:
    found, unit, window = _buckets(result), result["unit"], result["model"]["window"]
    inside = [edges for edges in found if edges[1] <= window]
    beyond = [edges for edges in found if edges[0] >= window]
    if not found:
        return "no position was measured"
    if not inside or not beyond:
        first, last = min(found), max(found)
        text = f"{words.with_error(found[first])} {unit} at positions {first[0]}–{first[1]}"
        if last != first:
            text += f", {words.with_error(found[last])} at {last[0]}–{last[1]}"
        return f"{text}; nothing was measured beyond its window of {window} tokens"
    near, far = max(inside), max(beyond)
    text = (
        f"{words.with_error(found[near])} {unit} at positions {near[0]}–{near[1]}, the last of its window of {window}"
        f" tokens, and {words.with_error(found[far])} at {far[0]}–{far[1]}, beyond it"
    )
    gap = found[far][0] - found[near][0]
    if not words.differ(found[far], found[near]):
        return f"{text}: no difference is established"
    return f"{text}: {'worse' if gap > 0 else 'better'} by {abs(gap):.2f}"


def _compared(results: Mapping[str, Result]) -> str:
    unit = next(iter(results.values()))["unit"]
    if not words.same_tokens(results.values()):
        return "the models split the text into different tokens, so their losses per token cannot be compared"
    found = {label: _buckets(result) for label, result in results.items()}
    common = set.intersection(*map(set, found.values()))
    if not common:
        return "no positions were measured for all models, so their losses cannot be compared"

    def at(edges: tuple[int, int], also: str | None = None) -> str:
        values = {label: buckets[edges] for label, buckets in found.items()}
        return (
            f"at positions {edges[0]}–{edges[1]}, {words.ranked(values, what='loss', unit=unit, also=also)}"
        )

    best = min(found, key=lambda label: found[label][max(common)][0])
    text, window = at(max(common)), min(result["model"]["original_window"] for result in results.values())
    inside = [edges for edges in common if edges[1] <= window and edges != max(common)]
    return f"{text}. Within the window of pretraining, {at(max(inside), best)}" if inside else text


def _headline(results: Mapping[str, Result]) -> str:
    """The title of the plot: the worst and the best model at the last positions that all have, with their losses."""
    found = {label: _buckets(result) for label, result in results.items()}
    common = set.intersection(*map(set, found.values()))
    if not common:
        return "Loss by position"
    edges = max(common)
    last = {label: buckets[edges][0] for label, buckets in found.items()}
    worst, best = max(last, key=last.__getitem__), min(last, key=last.__getitem__)
    text = f"{best} {last[best]:.2f}"
    if worst != best:
        text = f"{worst} {last[worst]:.2f}, {text}"
    return f"At positions {edges[0]}–{edges[1]}: {text} {next(iter(results.values()))['unit']}"
