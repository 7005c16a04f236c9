"""LongPPL (Fang et al. 2024, arXiv 2410.23771): perplexity of the tokens whose prediction needs the long context.

A key token is one that is predicted much better from everything before it than from the last few thousand tokens. The
mean over all tokens hides what happens to them; the published correlation with benchmarks of long contexts is -0.96 for
LongPPL, where that of perplexity is near 0. No judge is needed.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from lcx.data import Dataset, Mixture, Tokenizer
from lcx.errors import UserError, check_sizes
from lcx.evals import Result
from lcx.evals.support import documents, figures, scoring, words
from lcx.evals.support.intervals import mean_and_error
from lcx.evals.support.model_facts import facts
from lcx.model import Decoder

_SHOWN, _CONTEXT = 12, 8  # key tokens in the notes, and the tokens before each


@dataclasses.dataclass(frozen=True)
class LongPPL:
    """exp of the mean negative log-likelihood of the key tokens, given everything before them in the document.

    A token is a key token if log p(token | all before) - log p(token | the last `short` tokens) > alpha, and
    log p(token | all before) > beta, with natural logarithms. Which tokens are key tokens is decided by one evaluator
    for all models; without one, each model decides for itself, and then the sets differ between models.

    Attributes:
      dataset: the text; None: the data that the checkpoint was trained on.
      split: "eval" or "train".
      length: of the parts into which documents are cut; None: the model's context length, or the longest document if
        that is shorter. Shorter parts count if they have more than `short` tokens.
      short: tokens of the short context; 4096 in the paper. None: an eighth of the length.
      stride: the short context has short - stride to short - 1 tokens; 1024 in the paper. None: a quarter of `short`.
      alpha, beta: the thresholds; 2 and -2 in the paper.
      evaluator: a checkpoint with the same tokenizer that finds the key tokens; None: the model itself.
      max_documents: parts of documents, from the beginning of the split.
      tokens_per_batch: tokens per forward pass.
      name: key in results.json.
    """

    dataset: Dataset | Mixture | None = None
    split: str = "eval"
    length: int | None = None
    short: int | None = None
    stride: int | None = None
    alpha: float = 2.0
    beta: float = -2.0
    evaluator: str | None = None
    max_documents: int = 32
    tokens_per_batch: int = scoring.TOKENS_PER_BATCH
    name: str = "long_ppl"

    def __post_init__(self):
        check_sizes(
            "LongPPL",
            length=self.length,
            short=self.short,
            stride=self.stride,
            max_documents=self.max_documents,
        )
        if self.short is not None and (self.short < 2 or (self.stride or 1) >= self.short):
            raise UserError(
                f"LongPPL.short is {self.short} and stride {self.stride}, expected a short context of at least 2 tokens"
                " and a smaller stride"
            )

    def check_model(self, model: Decoder, tokenizer: Tokenizer | None) -> None:
        text, _, _ = self._parts(model, tokenizer)
        if self.evaluator is not None:
            self._judges(text.tokenizer)

    def _parts(
        self, model: Decoder, tokenizer: Tokenizer | None
    ) -> tuple[documents.Documents, list[np.ndarray], tuple[int, int, int]]:
        """(the text, its parts that are long enough, the length, short and stride)."""
        most = self.length or model.max_position_embeddings
        text = documents.read(
            self.dataset,
            self.split,
            tokenizer=tokenizer,
            model=model,
            max_tokens=self.max_documents * most,
            owner="LongPPL",
        )
        length = most if self.length else min(most, max(map(len, text.tokens)))
        length, short, stride = self._sizes(length)
        parts = [one[start : start + length] for one in text.tokens for start in range(0, len(one), length)]
        texts = [part for part in parts if len(part) > short][: self.max_documents]
        if not texts:
            longest = max(map(len, text.tokens))
            raise UserError(
                f"LongPPL: no document of {text.source} has more than {short} tokens (the longest has {longest}): set"
                " LongPPL.short, or another dataset"
            )
        return text, texts, (length, short, stride)

    def __call__(self, model: Decoder, params: Any, tokenizer: Tokenizer | None) -> Result:
        text, texts, (length, short, stride) = self._parts(model, tokenizer)
        judge = (model, params) if self.evaluator is None else self._judge(text.tokenizer)
        judged = self._long(*judge, texts)
        gains = [a - b for a, b in zip(self._short(*judge, texts, short, stride), judged, strict=True)]
        own = judged if self.evaluator is None else self._long(model, params, texts)
        keys = [
            (gain > self.alpha) & (-nll > self.beta) & np.isfinite(gain)
            for gain, nll in zip(gains, judged, strict=True)
        ]
        return self._result(model, text, texts, own, keys, gains, (length, short, stride))

    def _sizes(self, length: int) -> tuple[int, int, int]:
        short = self.short or max(2, length // 8)
        if short >= length:
            raise UserError(
                f"LongPPL.short is {short}, expected less than the length of {length}: lower LongPPL.short"
            )
        return length, short, self.stride or max(1, short // 4)

    def _judge(self, tokenizer: Tokenizer) -> tuple[Decoder, Any]:
        from lcx.convert.api import load

        return load(self._judges(tokenizer))

    def _judges(self, tokenizer: Tokenizer) -> str:
        """The folder of the evaluator. Raises UserError if it has another tokenizer."""
        from lcx import hub
        from lcx.data import load_tokenizer
        from lcx.data.tokenizers import identity

        assert self.evaluator is not None
        place = hub.local(self.evaluator)
        if identity(load_tokenizer(place)) != identity(tokenizer):
            raise UserError(
                f"LongPPL.evaluator {self.evaluator} has another tokenizer than the model, expected the same: change it"
            )
        return place

    def _long(self, model: Decoder, params: Any, texts: list[np.ndarray]) -> list[np.ndarray]:
        """The loss of every token but the first of each document, given all before it."""
        width = max(map(len, texts)) - 1
        tokens, labels = (np.zeros((len(texts), width), np.int32) for _ in range(2))
        for i, one in enumerate(texts):
            tokens[i, : len(one) - 1], labels[i, : len(one) - 1] = one[:-1], one[1:]
        nll = self._scored(model, params, tokens, labels, "long contexts")
        return [nll[i, : len(one) - 1] for i, one in enumerate(texts)]

    def _short(
        self, model: Decoder, params: Any, texts: list[np.ndarray], short: int, stride: int
    ) -> list[np.ndarray]:
        """The same given at most `short` tokens; not a number where that is everything before it."""
        windows = [
            (i, start)
            for i, one in enumerate(texts)
            for start in range(stride, len(one) - 1, stride)
            if start + short - stride < len(one) - 1
        ]
        tokens, labels = (np.zeros((len(windows), short), np.int32) for _ in range(2))
        for row, (i, start) in enumerate(windows):
            one = texts[i][start : start + short + 1]
            tokens[row, : len(one) - 1], labels[row, : len(one) - 1] = one[:-1], one[1:]
        found = [np.full(len(one) - 1, np.nan) for one in texts]
        if windows:
            nll = self._scored(model, params, tokens, labels, "short contexts")
            for row, (i, start) in enumerate(windows):
                first = short - stride
                new = nll[row, first : first + len(found[i][start + first : start + short])]
                found[i][start + first : start + short] = new
        return found

    def _scored(
        self, model: Decoder, params: Any, tokens: np.ndarray, labels: np.ndarray, what: str
    ) -> np.ndarray:
        return scoring.score(
            model,
            params,
            tokens,
            labels,
            tokens_per_batch=self.tokens_per_batch,
            description=f"{self.name}, {what}",
        )

    def _result(
        self,
        model: Decoder,
        text: documents.Documents,
        texts: list[np.ndarray],
        own: list[np.ndarray],
        keys: list[np.ndarray],
        gains: list[np.ndarray],
        sizes: tuple[int, int, int],
    ) -> Result:
        sums, counts = (
            np.array([f(n, k) for n, k in zip(own, keys)]) for f in (lambda n, k: n[k].sum(), _count)
        )
        mean, error = mean_and_error(sums, counts)
        plain = float(np.concatenate(own).mean())
        total = sum(map(len, own))
        value = None if mean is None else math.exp(min(mean, 700))
        shown = self._shown(text.tokenizer, texts, keys, gains)
        few = f"{int(counts.sum())} of {total} tokens are key tokens"
        return {
            "definition": self._definition(text, len(texts), sizes),
            "summary": f"{few}; LongPPL {'not defined' if value is None else f'{value:.4g}'}, perplexity"
            f" {math.exp(min(plain, 700)):.4g}",
            "table": {
                "LongPPL": value,
                "perplexity of all tokens": math.exp(min(plain, 700)),
                "key tokens": int(counts.sum()),
                "share of key tokens": round(int(counts.sum()) / total, 5),
            },
            "notes": shown,
            "model": facts(model),
            "unit": text.unit.replace("nats ", ""),
            "tokenizer_id": text.tokenizer_id,
            "long_ppl": value,
            "nll": mean,
            "standard_error": error,
            "by_document": [[float(s), int(n)] for s, n in zip(sums, counts)],
        }

    def _shown(
        self, tokenizer: Tokenizer, texts: list[np.ndarray], keys: list[np.ndarray], gains: list[np.ndarray]
    ) -> list[str]:
        """The key tokens that gain most, each with the words before it."""
        places = [(float(gains[i][p]), i, int(p)) for i, key in enumerate(keys) for p in np.flatnonzero(key)]
        out = []
        for gain, i, place in sorted(places, reverse=True)[:_SHOWN]:
            before = texts[i][max(0, place + 1 - _CONTEXT) : place + 1].tolist()
            lead = tokenizer.decode(before)
            token = tokenizer.decode([*before, int(texts[i][place + 1])])[len(lead) :]
            out.append(
                f"key token at {place + 1}: “…{' '.join(lead.split())}” → “{token.strip()}” (+{gain:.1f} nats)"
            )
        return out

    def _definition(self, text: documents.Documents, count: int, sizes: tuple[int, int, int]) -> str:
        who = "the model itself" if self.evaluator is None else self.evaluator
        return (
            f"LongPPL (arXiv 2410.23771): exp of the mean negative log-likelihood of the key tokens of {count}"
            f" parts of {sizes[0]} tokens of the documents of {text.source}; a key token gains more"
            f" than {self.alpha:g} nats"
            f" from what lies beyond the last {sizes[1] - sizes[2]} to {sizes[1]} tokens and has a log-likelihood above"
            f" {self.beta:g}, by {who}; {text.special}; standard error with documents as independent"
        )

    def finding(self, results: Mapping[str, Result]) -> str:
        """LongPPL of each model, with its uncertainty."""
        values = {
            label: (
                result["long_ppl"],
                result["standard_error"] and result["standard_error"] * result["long_ppl"],
            )
            for label, result in results.items()
            if result["long_ppl"] is not None
        }
        if not values:
            return "no token needs the long context by the model's own judgement, so LongPPL is not defined"
        if len(results) == 1:
            return f"LongPPL is {words.with_error(next(iter(values.values())))}"
        if len(values) < 2 or not words.same_tokens(results.values()):
            return "LongPPL cannot be compared: fewer than two models have key tokens, or their tokens differ"
        unit = next(iter(results.values()))["unit"]
        text = words.ranked(values, what="LongPPL", unit=unit)
        return text if self.evaluator else f"{text} (each on its own key tokens: set LongPPL.evaluator)"

    def plot(self, axes: Any, results: Mapping[str, Result]) -> None:
        values = {label: result["long_ppl"] or math.nan for label, result in results.items()}
        figures.bars(axes, values, results, texts={label: f"{value:.4g}" for label, value in values.items()})
        axes.set_xlabel("LongPPL")
        axes.set_title("LongPPL, of key tokens (lower is better)")


def _count(nll: np.ndarray, key: np.ndarray) -> int:
    return int(key.sum())
