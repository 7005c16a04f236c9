"""The log-likelihood of every record of a FASTA file."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from lcx.data import Tokenizer
from lcx.evals import Result
from lcx.evals.support import dna, figures, scoring
from lcx.evals.support.intervals import mean_and_error
from lcx.evals.support.model_facts import facts
from lcx.evals.support.windows import beyond_window, check_windows, windows_of
from lcx.model import Decoder
from lcx.wording import quantity


@dataclasses.dataclass(frozen=True)
class SequenceLikelihood:
    """log p of each sequence under the model in nats: the sum and the mean over the scored letters.

    Without BOS the first letter has no context and is not scored. A record in which no letter is scored is listed with
    null. Ambiguous letters (N, R, ...) are scored like any other; the result lists how many there are. It also lists
    the number of lower-case letters (soft-masked repeats).

    Attributes:
      sequences: a FASTA file, a glob or a folder; files may be compressed (.gz).
      window: tokens per forward pass; None: the model's context length. Longer sequences are scored with overlapping
        windows, every letter once.
      stride: tokens between the starts of windows; None: half a window.
      upper_case: whether sequences are converted to upper case before they are scored.
      both_strands: score the mean of the sequence and its reverse complement.
      tokens_per_batch: tokens per forward pass over a batch of windows.
      name: key in results.json.
    """

    sequences: str
    window: int | None = None
    stride: int | None = None
    upper_case: bool = True
    both_strands: bool = False
    tokens_per_batch: int = scoring.TOKENS_PER_BATCH
    name: str = "sequence_likelihood"

    def __post_init__(self):
        check_windows(self)

    def check(self) -> None:
        dna.check_files(self.sequences, owner="SequenceLikelihood.sequences")

    def __call__(self, model: Decoder, params: Any, tokenizer: Tokenizer | None) -> Result:
        documents = dna.read(self.sequences, owner="SequenceLikelihood.sequences")
        records = [record.text.upper() if self.upper_case else record.text for record in documents]
        strands = [*records, *map(dna.reverse_complement, records)] if self.both_strands else records
        window, stride = windows_of(self, model)
        values = dna.token_log_likelihoods(
            model,
            params,
            tokenizer,
            strands,
            window=window,
            stride=stride,
            tokens_per_batch=self.tokens_per_batch,
            description=self.name,
        )
        sums = np.array([v.sum(dtype=np.float64) for v in values]).reshape(-1, len(records)).mean(0)
        counts = np.array([len(v) for v in values[: len(records)]])
        mean, error = mean_and_error(-sums, counts)
        rows = [
            {
                "name": document.name,
                "length": len(document.text),
                "scored": int(count),
                "log_likelihood": float(total) if count else None,
                "mean_log_likelihood": float(total / count) if count else None,
                "ambiguous": dna.ambiguous(document.text),
                "lower_case": sum(map(str.islower, document.text)),
            }
            for document, total, count in zip(documents, sums, counts, strict=True)
        ]
        perplexity = None if mean is None else math.exp(min(mean, 700))
        return {
            "definition": self._definition(window, stride),
            "summary": f"{quantity(len(rows), 'sequence')}, {quantity(int(counts.sum()), 'letter')}, "
            + ("nothing to score" if perplexity is None else f"perplexity {perplexity:.4g} per letter"),
            "table": {"perplexity per letter": perplexity, "sequences": len(rows)},
            "notes": beyond_window(window, model),
            "model": facts(model),
            "nll": mean,
            "standard_error": error,
            "perplexity": perplexity,
            "sequences": rows,
        }

    def _definition(self, window: int, stride: int) -> str:
        return (
            f"log p of each sequence of {self.sequences} in nats, sum and mean over scored letters; "
            f"{'upper case; ' if self.upper_case else ''}windows of {window} tokens, stride {stride}, each letter "
            "scored once; the first letter only after BOS"
            f"{'; mean of both strands' if self.both_strands else ''}; the perplexity is over all letters, its "
            "standard error with sequences as independent"
        )

    def plot(self, axes: Any, results: Mapping[str, Result]) -> None:
        styles = figures.styles(results)
        for label, result in results.items():
            rows = [row for row in result["sequences"] if row["scored"]]
            axes.plot(
                [row["length"] for row in rows],
                [row["mean_log_likelihood"] for row in rows],
                label=label,
                **{**styles[label], "linestyle": "none", "marker": "o"},
            )
        figures.position_axis(axes, "length (letters)")
        axes.set_ylabel("mean log-likelihood (nats per letter)")
        axes.set_title("Likelihood of each sequence (higher is likelier)")
        figures.legend(axes, list(results))
