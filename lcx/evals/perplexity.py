"""Perplexity of whole documents, with a sliding window that gives every token a long context."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Int

from lcx.data import Dataset, Mixture, Tokenizer
from lcx.errors import UserError
from lcx.evals import Result
from lcx.evals.support import documents, figures, scoring, windows, words
from lcx.evals.support.intervals import mean_and_error
from lcx.evals.support.model_facts import facts
from lcx.evals.support.reach import beyond
from lcx.model import Decoder

KINDS = ("press", "non_overlapping", "yarn", "longlora")
_WINDOW_TOKENS = 1 << 20  # in windows longer than the model's own: the longest default evaluation
_KEPT_DOCUMENTS = 2000  # whose losses are in results.json, for differences between models
_WIDTH_STEP = 128  # windows longer than every document are cut to a multiple of this


@dataclasses.dataclass(frozen=True)
class Perplexity:
    """exp of the mean negative log-likelihood, with every token of a document scored once.

    The sliding window is that of Press et al. 2021 (arXiv 2108.12409, appendix B). Windows of W tokens start every S
    tokens until one reaches the end of the document. The first window scores all its targets. Each later one scores
    only the targets that were not scored before, so these have W - S to W - 1 tokens of context. The mean is over
    tokens, not over windows or documents. The first token of a document is scored only if BOS precedes it; that BOS is
    part of the W tokens.

    The cost is about W / S forward passes over the text.

    Attributes:
      dataset: the text; None: the data that the checkpoint was trained on.
      split: "eval" or "train".
      windows: one or several W in tokens. The same targets are scored for each. None: a quarter of the model's context
        length, the context length, and 4 times as much, to show whether the model works beyond it; 2 times or nothing
        beyond where no document is that long, where a window has more than tokens_per_batch tokens, or where the
        windows together have more than 2^20 tokens.
      kind: the published definition. "press": as above. "non_overlapping": S = W - 1 (`stride` has no effect).
        "yarn", the script of YaRN (arXiv 2309.00071): BOS before every window, which is part of its W tokens, and the
        mean of the windows' means, so that a token in a short window counts more. "longlora", the script of LongLoRA
        (arXiv 2309.12307): every window of W tokens scores all of them, also those that an earlier one has scored, and
        windows count equally; what is left at the end of a document is not scored. The last two flatter or punish:
        use them to compare with published numbers only.
      stride: S in tokens. None: windows share only the one token from which the next window's first target is
        predicted. This is the convention of lm-evaluation-harness, which counts the W - 1 inputs as the window.
      max_tokens: tokens of text to read, from the beginning of the split.
      max_document_length: longer documents are truncated to this many tokens.
      tokens_per_batch: tokens per forward pass.
      name: key in results.json.
    """

    dataset: Dataset | Mixture | None = None
    split: str = "eval"
    windows: tuple[int, ...] | None = None
    kind: str = "press"
    stride: int | None = 256
    max_tokens: int = 1 << 16
    max_document_length: int | None = None
    tokens_per_batch: int = scoring.TOKENS_PER_BATCH
    name: str = "perplexity"

    def __post_init__(self):
        if self.windows is not None and (not self.windows or min(self.windows) < 2):
            raise UserError(f"Perplexity.windows is {self.windows}, expected windows of at least 2 tokens")
        if self.kind not in KINDS:
            raise UserError(f"Perplexity.kind is {self.kind!r}, expected one of {', '.join(KINDS)}")
        if self.kind == "non_overlapping":
            object.__setattr__(self, "stride", None)
        if self.stride is not None and self.stride < 1:
            raise UserError(f"Perplexity.stride is {self.stride}, expected at least 1 token")
        if self.windows is not None and self.stride is not None and self.stride >= min(self.windows):
            raise UserError(
                f"Perplexity.stride {self.stride} leaves no overlap in a window of {min(self.windows)}: lower"
                " Perplexity.stride, or set it to None for windows that do not overlap"
            )
        if self.max_document_length is not None and self.max_document_length < 2:
            found = f"Perplexity.max_document_length is {self.max_document_length}"
            raise UserError(f"{found}, expected at least 2 tokens: change Perplexity.max_document_length")

    def check_model(self, model: Decoder, tokenizer: Tokenizer | None) -> None:
        self._text(model, tokenizer)

    def _text(self, model: Decoder, tokenizer: Tokenizer | None) -> documents.Documents:
        text = documents.read(
            self.dataset,
            self.split,
            tokenizer=tokenizer,
            model=model,
            max_tokens=self.max_tokens,
            max_length=self.max_document_length,
            owner="Perplexity",
        )
        if self.kind == "yarn" and text.tokenizer.bos_id is None:
            raise UserError(
                "Perplexity.kind 'yarn' puts BOS before every window, and the tokenizer has none: change kind"
            )
        return text

    def __call__(self, model: Decoder, params: Any, tokenizer: Tokenizer | None) -> Result:
        text = self._text(model, tokenizer)
        bytes_per_token = text.num_bytes() / text.num_tokens
        chosen, notes = self._windows(model, text)
        measured = [self._measure(model, params, text, W, bytes_per_token) for W in chosen]
        best = max(measured, key=lambda entry: entry["window"])
        return {
            "definition": self._definition(text),
            "summary": f"{_number(best['perplexity'])} per {text.unit.split()[-1]} with a window of {best['window']}",
            "table": {f"window {entry['window']}": entry["perplexity"] for entry in measured},
            "notes": notes,
            "model": facts(model),
            "unit": f"per {text.unit.split()[-1]}",
            "bytes_per_token": bytes_per_token,
            "tokenizer_id": text.tokenizer_id,
            "windows": measured,
        }

    def _windows(self, model: Decoder, text: documents.Documents) -> tuple[tuple[int, ...], list[str]]:
        """The windows to evaluate, and what to say about them."""
        if self.windows is not None:
            return tuple(dict.fromkeys(self.windows)), []
        own = model.max_position_embeddings
        # Every `stride` tokens of text cost a window: a budget of tokens for them limits the size of the window.
        longest, starts = max(map(len, text.tokens)), text.num_tokens / (self.stride or own)
        limits = {
            f"Perplexity.tokens_per_batch, {self.tokens_per_batch}": self.tokens_per_batch,
            f"the longest document, {longest} tokens": longest,
            f"the time: at most {_WINDOW_TOKENS} tokens in windows": int(_WINDOW_TOKENS / starts),
        }
        reach = beyond(own, unit="windows", limits=limits)
        shorter = (own // 4,) if own >= 8 else ()
        return tuple(dict.fromkeys((*shorter, own, reach.length))), [reach.note]

    def _measure(
        self, model: Decoder, params: Any, text: documents.Documents, W: int, bytes_per_token: float
    ) -> dict[str, Any]:
        S = W - 1 if self.stride is None else self.stride if self.stride < W else max(1, W // 2)
        bos = text.tokenizer.bos_id
        texts, masks, before = text.tokens, text.masks, None
        if self.kind == "yarn":
            begins = [int(len(one) > 0 and one[0] == bos) for one in texts]
            texts = [one[n:] for one, n in zip(texts, begins)]
            masks, before = [one[n:] for one, n in zip(masks, begins)], bos
        rows = windows.rows_of(self.kind, [len(document) for document in texts], window=W, stride=S)
        longest = max(map(len, texts)) + (before is not None)
        width = min(W, -(-longest // _WIDTH_STEP) * _WIDTH_STEP)
        tokens, labels, weights = _cut(texts, masks, rows, width, before)
        nll = scoring.score(
            model,
            params,
            tokens,
            labels,
            tokens_per_batch=self.tokens_per_batch,
            description=f"{self.name} with window {W}",
        )
        totals, scored = (nll * weights).sum(1, dtype=np.float64), weights.sum(1, dtype=np.float64)
        tokens_scored = int(scored.sum())
        if self.kind in ("yarn", "longlora"):  # windows count equally
            totals, scored = totals[scored > 0] / scored[scored > 0], np.ones(int((scored > 0).sum()))
            rows = rows[weights.any(1)]
        sums, counts = (
            np.bincount(rows[:, 0], weights=values, minlength=len(texts)) for values in (totals, scored)
        )
        mean, error = mean_and_error(sums, counts)
        assert mean is not None
        return {
            "window": W,
            "stride": S,
            "perplexity": _exp(mean),
            "nll": mean,
            "standard_error": error,
            "nll_per_byte": mean / bytes_per_token,
            "bits_per_byte": mean / bytes_per_token / math.log(2),
            "tokens": tokens_scored,
            "bytes": round(tokens_scored * bytes_per_token),
            "documents": int((counts > 0).sum()),
            "by_document": [[round(float(s), 4), int(n)] for s, n in zip(sums, counts) if n][
                :_KEPT_DOCUMENTS
            ],
            "forward_passes_of_one_window": len(rows),
        }

    def _definition(self, text: documents.Documents) -> str:
        bos = text.tokenizer.bos_id
        starts = bos is not None and all(document[0] == bos for document in text.tokens)
        first = "scored after BOS, which the window counts" if starts else "not scored (no BOS before it)"
        if self.kind in ("yarn", "longlora"):
            return self._equal_windows(text)
        kind = "non-overlapping windows of W tokens (the first of each is the last of the one before)"
        if self.stride is not None:
            kind = (
                f"sliding window (Press et al. 2021, arXiv 2108.12409) of W tokens, stride {self.stride} (W / 2 where"
                " that is no less than W),"
                " each window after the first scoring only targets not scored before, with W - stride to W - 1 tokens"
                " of context"
            )
        return (
            f"exp(sum of negative log-likelihoods / number of scored tokens{text.scored}) over all documents"
            f" (token-weighted); {kind}; the first token of a document is {first};"
            f" {text.special}; the first {text.num_tokens} tokens of {text.source}; standard error of the nll with"
            " documents as independent"
        )

    def _equal_windows(self, text: documents.Documents) -> str:
        which = (
            "perplexity of YaRN's script (arXiv 2309.00071): BOS before every window of W tokens, each window scores"
            " the targets not scored before"
        )
        if self.kind == "longlora":
            which = (
                "perplexity of LongLoRA's script (arXiv 2309.12307): every window of W tokens scores all of its"
                " targets, also those scored before; the rest of a document is left out"
            )
        return (
            f"{which}, stride {self.stride or 'W - 1'}; exp of the mean over windows of the mean{text.scored} of each,"
            f" so not token-weighted; the first {text.num_tokens} tokens of {text.source}; standard error of the nll"
            " with documents as independent"
        )

    def finding(self, results: Mapping[str, Result]) -> str:
        """The perplexities at the largest window of all models, or of one model by window, with their uncertainty."""
        unit = next(iter(results.values()))["unit"]
        found = [{e["window"]: _with_error(e) for e in result["windows"]} for result in results.values()]
        if len(results) == 1:
            entries = sorted(found[0].items())
            parts = [f"{words.with_error(value)} with a window of {W}" for W, value in entries]
            return f"{', '.join(parts)} ({unit})"
        if not words.same_tokens(results.values()):
            return "the models split the text into different tokens, so their perplexities cannot be compared"
        common = set.intersection(*map(set, found))
        if not common:
            return "no window was measured for all models, so their perplexities cannot be compared"
        values = {label: one[max(common)] for label, one in zip(results, found, strict=True)}
        return f"with a window of {max(common)}, {words.ranked(values, what='perplexity', unit=unit)}"

    def plot(self, axes: Any, results: Mapping[str, Result]) -> None:
        if all(len(result["windows"]) == 1 for result in results.values()):
            self._bars(axes, results)
            return
        styles = figures.styles(results)
        for label, result in results.items():
            entries = sorted(result["windows"], key=lambda entry: entry["window"])
            values = [_plottable(entry["perplexity"]) for entry in entries]
            axes.plot([entry["window"] for entry in entries], values, label=label, **styles[label])
        figures.position_axis(axes, "window (tokens)")
        figures.log_axis(axes, "y")
        figures.mark_window(axes, results)
        axes.set_ylabel(f"perplexity {next(iter(results.values()))['unit']}")
        axes.set_title("Perplexity by window (lower is better)")
        figures.legend(axes, list(results))

    def _bars(self, axes: Any, results: Mapping[str, Result]) -> None:
        entries = {label: result["windows"][0] for label, result in results.items()}
        figures.bars(
            axes,
            {label: _plottable(entry["perplexity"]) for label, entry in entries.items()},
            results,
            texts={
                label: f"{_number(e['perplexity'])}  (window {e['window']})" for label, e in entries.items()
            },
        )
        axes.set_xlabel(f"perplexity {next(iter(results.values()))['unit']}")
        axes.set_title("Perplexity (lower is better)")


def _cut(
    texts: list[np.ndarray],
    masks: list[np.ndarray],
    rows: Int[np.ndarray, "R 4"],
    width: int,
    before: int | None = None,
) -> tuple[Int[np.ndarray, "R W"], Int[np.ndarray, "R W"], np.ndarray]:
    """(tokens, labels, weights) of all windows, padded on the right to `width`.

    Args:
      texts, masks: tokens of each document, and which of them are scored.
      rows: (document, begin, end, first scored token) of each window.
      width: W, the length of a row.
      before: a token in front of every window, from which its first token is predicted.
    """
    if before is not None:
        texts = [np.concatenate(([before], text)) for text in texts]
        masks = [np.concatenate(([False], mask)) for mask in masks]
        rows = rows + np.array([0, 0, 1, 1])
    tokens, labels = (np.zeros((len(rows), width), np.int32) for _ in range(2))
    weights = np.zeros((len(rows), width), bool)
    for i, (document, begin, end, first) in enumerate(rows.tolist()):
        count = end - begin
        tokens[i, :count] = texts[document][begin:end][:width]
        if before is not None:
            tokens[i, 0] = before
        labels[i, : count - 1] = texts[document][begin + 1 : end]
        weights[i, first - begin - 1 : count - 1] = masks[document][first:end]
    return tokens, labels, weights


def _with_error(entry: Mapping[str, Any]) -> words.Measured:
    """The perplexity of a window and its standard error, that of the nll times the perplexity (delta method)."""
    value, error = entry["perplexity"], entry.get("standard_error")
    if value is None:
        return math.inf, None
    return value, None if error is None else value * error


def _exp(x: float) -> float:
    return math.exp(x) if x < 700 else math.inf


def _plottable(value: float | None) -> float:
    return math.nan if value is None else min(value, 1e9)


def _number(value: float | None) -> str:
    return "not finite" if value is None or not math.isfinite(value) else f"{value:.4g}"
