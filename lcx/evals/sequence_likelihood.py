"""The log-likelihood of every record of a FASTA file."""

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Float

from lcx.data import Tokenizer
from lcx.evals import Result
from lcx.evals.support import dna, figures, per_position, remembered, scoring
from lcx.evals.support.intervals import mean_and_error
from lcx.evals.support.letters import Letters, Part, ReverseComplement, counts
from lcx.evals.support.likelihoods import Scorer
from lcx.evals.support.model_facts import facts
from lcx.evals.support.progress import progress
from lcx.evals.support.windows import beyond_window, check_windows, cut_into_windows, windows_of
from lcx.model import Decoder
from lcx.wording import quantity


@dataclasses.dataclass(frozen=True)
class SequenceLikelihood:
    """log p of each sequence under the model in nats: the sum and the mean over the scored letters.

    Without BOS the first letter has no context and is not scored. A record in which no letter is scored is listed with
    null. Ambiguous letters (N, R, ...) are scored like any other; the result lists how many there are. It also lists
    the number of lower-case letters (soft-masked repeats). Sequences are read and scored in parts, so memory does not
    grow with their length.

    Attributes:
      sequences: a FASTA file, a glob or a folder; files may be compressed (bgzip allows random access).
      window: tokens per forward pass; None: the model's context length. Longer sequences are scored with overlapping
        windows, every letter once.
      stride: tokens between the starts of windows; None: half a window.
      upper_case: whether sequences are converted to upper case before they are scored.
      both_strands: score the mean of the sequence and its reverse complement.
      tokens_per_batch: tokens per forward pass over a batch of windows.
      name: key in results.json.
      regions: a BED file; its regions are scored instead of the records. None: the records.
      tag: text before every window that is not scored, such as a taxonomic tag "|d__Bacteria;...|".
      per_position: a parquet file to write with the probability of every letter (`per_position.PositionsFile`); None:
        none.
    """

    sequences: str
    window: int | None = None
    stride: int | None = None
    upper_case: bool = True
    both_strands: bool = False
    tokens_per_batch: int = scoring.TOKENS_PER_BATCH
    name: str = "sequence_likelihood"
    regions: str | None = None
    tag: str = ""
    per_position: str | None = None

    def __post_init__(self):
        check_windows(self)

    def check(self) -> None:
        dna.check_files(self.sequences, owner="SequenceLikelihood.sequences")

    def check_model(self, model: Decoder, tokenizer: Tokenizer | None) -> None:
        self._scorer(model, None, tokenizer)
        remembered.once(id(self), self._records)

    def _scorer(self, model: Decoder, params: Any, tokenizer: Tokenizer | None) -> tuple[Scorer, int]:
        """(what scores windows, the tokens between their starts)."""
        window, stride = windows_of(self, model)
        return Scorer(model, params, tokenizer, window, self.tokens_per_batch, self.tag, description=None), stride

    def __call__(self, model: Decoder, params: Any, tokenizer: Tokenizer | None) -> Result:
        scorer, stride = self._scorer(model, params, tokenizer)
        window, records = scorer.window, remembered.once(id(self), self._records)
        sums, scored = np.zeros(len(records)), np.zeros(len(records), np.int64)
        letters = sum(len(text) for _, text in records) * (1 + self.both_strands)
        with progress(self.name, letters, "letters") as bar:
            for number, log_p in self._scored(scorer, records, stride):
                sums[number] += log_p.sum(dtype=np.float64) / (1 + self.both_strands)
                scored[number] += len(log_p)
                bar.update(len(log_p))
        scored //= 1 + self.both_strands
        mean, error = mean_and_error(-sums, scored)
        rows: list[dict[str, Any]] = [
            {
                "name": name,
                "length": len(text),
                "scored": int(count),
                "log_likelihood": float(total) if count else None,
                "mean_log_likelihood": float(total / count) if count else None,
                **counts(text),
            }
            for (name, text), total, count in zip(records, sums, scored, strict=True)
        ]
        perplexity = None if mean is None else math.exp(min(mean, 700))
        return {
            "definition": self._definition(window, stride),
            "summary": f"{quantity(len(rows), 'sequence')}, {quantity(int(scored.sum()), 'letter')}, "
            + ("nothing to score" if perplexity is None else f"perplexity {perplexity:.4g} per letter"),
            "table": {"perplexity per letter": perplexity, "sequences": len(rows)},
            "notes": [
                *dna.foreign([row["name"] for row in rows if 2 * row["ambiguous"] > row["length"]], len(rows)),
                *cut_into_windows([len(text) for _, text in records], window, scorer.room, stride),
                *beyond_window(window, model),
            ],
            "model": facts(model),
            "nll": mean,
            "standard_error": error,
            "perplexity": perplexity,
            "sequences": rows,
        }

    def _records(self) -> list[tuple[str, Letters]]:
        """(name, sequence) of what is scored: the records, or the regions."""
        if self.regions is None:
            return list(dna.records(self.sequences, owner="SequenceLikelihood.sequences"))
        regions = dna.Regions(self.regions, owner="SequenceLikelihood.regions")
        contigs = dna.read_contigs(self.sequences, owner="SequenceLikelihood.sequences")
        regions.check(contigs)
        return [
            (name, Part(contigs[record], start, end))
            for record, found in regions.of.items()
            for start, end, name in found
        ]

    def _scored(
        self, scorer: Scorer, records: Sequence[tuple[str, Letters]], stride: int
    ) -> Iterator[tuple[int, Float[np.ndarray, " scored"]]]:
        """Yields (number of the record, log p of some of its letters), until every letter was scored on each strand."""
        strands: list[Letters] = [text for _, text in records]
        if self.both_strands:
            strands += [ReverseComplement(text) for text in strands]
        change = str.upper if self.upper_case else str
        if self.per_position is None or jax.process_index() > 0:
            for number, _, values in scorer.sequences(strands, stride=stride, change=change):
                yield number % len(records), values
            return
        assert scorer.tokenizer is not None  # Scorer has checked it
        measure = per_position.measure(per_position.letter_ids(scorer.tokenizer))
        with per_position.PositionsFile(self.per_position) as file:
            found = scorer.sequences(strands, stride=stride, change=change, measure=measure, width_of=6)
            for number, start, values in found:
                name, text = records[number % len(records)]
                along = np.arange(start, start + len(values))
                forward = number < len(records)
                letters = change(strands[number][start : start + len(values)])
                file.add(name, "+-"[not forward], along + 1 if forward else len(text) - along, letters, values)
                yield number % len(records), -values[:, 0]

    def _definition(self, window: int, stride: int) -> str:
        return (
            f"log p of each sequence of {self.sequences} in nats, sum and mean over scored letters; "
            f"{'upper case; ' if self.upper_case else ''}windows of {window} tokens, stride {stride}, each letter "
            "scored once; the first letter only after BOS"
            f"{'; mean of both strands' if self.both_strands else ''}"
            f"{f'; after the tag {self.tag}' if self.tag else ''}; the perplexity is over all letters, its "
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
