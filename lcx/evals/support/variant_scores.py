"""Scores of many variants, in bounded memory, and the lines of the files that hold them."""

import csv
import dataclasses
import itertools
from collections.abc import Iterable, Iterator, Mapping

import numpy as np
from jaxtyping import Float, Int

from lcx.data.nucleotides import reverse_complement
from lcx.errors import UserError
from lcx.evals.support import shared_prefixes
from lcx.evals.support.dna import Regions
from lcx.evals.support.letters import Letters
from lcx.evals.support.likelihoods import Scorer
from lcx.evals.support.variants import Line, Obstacle, Variant, obstacle, windows_around

COLUMNS = (
    "chrom", "pos", "id", "ref", "alt", "score", "log_likelihood_ref", "log_likelihood_alt", "label", "not_scored",
    "reason",
)  # fmt: skip
_BATCHES = 4  # scored together
_FIELDS = ("LCX_SCORE", "LCX_NOT_SCORED")
OUTSIDE = Obstacle("outside_regions", "it lies in none of the regions")


@dataclasses.dataclass(frozen=True)
class Scored:
    """A variant with the log-likelihoods of both windows in nats and their difference, or why there are none."""

    variant: Variant
    obstacle: Obstacle | None = None
    score: float | None = None
    log_likelihood_ref: float | None = None
    log_likelihood_alt: float | None = None


@dataclasses.dataclass(frozen=True)
class VariantScorer:
    """Scores variants of `contigs`.

    Attributes:
      sequences: where the contigs come from, for messages.
      upper_case: whether letters are converted to upper case first.
      both_strands: whether a score is the mean over both strands.
      regions: variants elsewhere are left out; None: no restriction.
    """

    scorer: Scorer
    contigs: Mapping[str, Letters]
    sequences: str
    upper_case: bool = True
    both_strands: bool = False
    regions: Regions | None = None

    @property
    def chunk(self) -> int:
        """How many variants are scored together."""
        return max(16, min(4096, _BATCHES * self.scorer.tokens_per_batch // self.scorer.window))

    def obstacle(self, variant: Variant) -> Obstacle | None:
        if self.regions is not None and not self.regions.covers(variant.chrom, variant.pos - 1):
            return OUTSIDE
        return obstacle(variant, self.contigs, letters=self.scorer.room, sequences=self.sequences)

    def scores(self, variants: Iterable[Variant]) -> list[Scored]:
        """The scores of some variants, in their order; all of their windows are in memory."""
        variants = list(variants)
        obstacles = [self.obstacle(variant) for variant in variants]
        pairs = [
            windows_around(variant, self.contigs[variant.chrom], letters=self.scorer.room)
            for variant, why in zip(variants, obstacles, strict=True)
            if why is None
        ]
        found = iter(self._scored(pairs))
        return [
            Scored(variant, why) if why is not None else Scored(variant, None, *next(found))
            for variant, why in zip(variants, obstacles, strict=True)
        ]

    def _scored(self, pairs: list[tuple[str, str]]) -> list[tuple[float, float, float]]:
        """(score, log p of ref, log p of alt) of pairs of windows."""
        if self.upper_case:
            pairs = [(ref.upper(), alt.upper()) for ref, alt in pairs]
        strands = [pairs]
        if self.both_strands:
            strands.append([(reverse_complement(ref), reverse_complement(alt)) for ref, alt in pairs])
        head = self.scorer.head
        windows = (window for strand in strands for pair in strand for window in pair)
        rows = [np.concatenate([head, self.scorer.encode(window)]) for window in windows]
        values = [value[max(len(head) - 1, 0) :] for value in self._log_p(rows)]
        each = [
            _difference(rows[i][len(head) :], rows[i + 1][len(head) :], values[i], values[i + 1])
            for i in range(0, len(rows), 2)
        ]
        means = np.array(each, np.float64).reshape(len(strands), len(pairs), 3).mean(0)
        return [(float(score), float(ref), float(alt)) for score, ref, alt in means]

    def _log_p(self, rows: list[Int[np.ndarray, " T"]]) -> list[Float[np.ndarray, " scored"]]:
        """log p of every token but the first of pairs of rows; what comes before the variant is computed once."""
        scorer, whole, paired = self.scorer, list[int](), list[int]()
        shared = shared_prefixes.cut(scorer.model, scorer.params, scorer.window)
        for i in range(0, len(rows), 2):
            ref, alt = rows[i : i + 2]
            alike = len(ref) == len(alt) == scorer.window and (ref[: shared + 1] == alt[: shared + 1]).all()
            (paired if shared and alike else whole).extend((i, i + 1))
        found: dict[int, np.ndarray] = dict(zip(whole, scorer.rows([rows[i] for i in whole]), strict=True))
        if paired:
            values = shared_prefixes.score(
                scorer.model,
                scorer.params,
                [rows[i] for i in paired],
                shared,
                tokens_per_batch=scorer.tokens_per_batch,
            )
            found |= zip(paired, values, strict=True)
        return [found[i] for i in range(len(rows))]


def _difference(
    ref: Int[np.ndarray, " T"],
    alt: Int[np.ndarray, " T"],
    log_p_ref: Float[np.ndarray, " scored"],
    log_p_alt: Float[np.ndarray, " scored"],
) -> tuple[float, float, float]:
    """(score, log p of ref, log p of alt).

    Up to the first letter that differs both windows have the same probabilities, so only the rest is summed: long
    convolutions by FFT would otherwise add the rounding errors of thousands of equal terms.
    """
    size = min(len(ref), len(alt))
    different = np.flatnonzero(ref[:size] != alt[:size])
    same = int(different[0]) if len(different) else size
    unscored = len(ref) - len(log_p_ref)  # 1 if the first letter has no context
    first = max(same - unscored, 0)
    score = log_p_alt[first:].sum(dtype=np.float64) - log_p_ref[first:].sum(dtype=np.float64)
    return score, log_p_ref.sum(dtype=np.float64), log_p_alt.sum(dtype=np.float64)


def chunks(lines: Iterable[Line], size: int) -> Iterator[list[Line]]:
    """Consecutive lines that hold about `size` variants together."""
    waiting, count = list[Line](), 0
    for line in lines:
        waiting.append(line)
        count += len(line.variants)
        if count >= size:
            yield waiting
            waiting, count = [], 0
    if waiting:
        yield waiting


def scored_lines(scorer: VariantScorer, lines: list[Line]) -> list[tuple[Line, list[Scored]]]:
    """Each line with the scores of its variants."""
    found = iter(scorer.scores(itertools.chain.from_iterable(line.variants for line in lines)))
    return [(line, list(itertools.islice(found, len(line.variants)))) for line in lines]


# ------------------------------------------------------------------------------------------------------ files


def table_row(one: Scored) -> str:
    """One line of the table of COLUMNS, separated by tabs, without its line break."""
    variant, why = one.variant, one.obstacle or Obstacle("", "")
    numbers = (one.score, one.log_likelihood_ref, one.log_likelihood_alt)
    cells = [
        *(variant.chrom, str(variant.pos), variant.id, variant.ref, variant.alt),
        *("" if number is None else f"{number:.9g}" for number in numbers),
        *("" if variant.label is None else str(variant.label), why.kind, why.reason),
    ]
    return "\t".join(cell.replace("\t", " ") for cell in cells)


def read_table(path: str) -> Iterator[dict[str, str]]:
    """The rows of a table of COLUMNS."""
    with open(path, encoding="utf-8", errors="surrogateescape", newline="") as file:
        reader = csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE)
        next(reader, None)
        for cells in reader:
            yield dict(zip(COLUMNS, cells, strict=True))


def annotated(line: Line, scored: list[Scored], definition: str) -> str:
    """A line of a VCF file with LCX_SCORE, one number per alternative, and LCX_NOT_SCORED, a word each.

    Earlier annotations of these names are replaced. "" for a line that is left out.

    Raises:
      UserError: the line has no INFO column.
    """
    if not scored:
        return _annotated_header(line.text, definition)
    cells = line.text.split("\t")
    if len(cells) < 8:
        raise UserError(
            f"{str(scored[0].variant)[:60]} has {len(cells)} columns, expected INFO as the 8th: leave the annotated "
            "file out"
        )
    kept = [field for field in cells[7].split(";") if field.partition("=")[0] not in _FIELDS and field != "."]
    numbers = ("." if one.score is None else f"{one.score:.9g}" for one in scored)
    kept = [field for field in kept if field] + [f"LCX_SCORE={','.join(numbers)}"]
    if any(one.obstacle for one in scored):
        kept.append(f"LCX_NOT_SCORED={','.join(one.obstacle.kind if one.obstacle else '.' for one in scored)}")
    cells[7] = ";".join(kept)
    return "\t".join(cells)


def _annotated_header(text: str, definition: str) -> str:
    if any(text.startswith(f"##INFO=<ID={field},") for field in _FIELDS):
        return ""
    if not text.startswith("#CHROM"):
        return text
    return (
        f'##INFO=<ID=LCX_SCORE,Number=A,Type=Float,Description="{definition}">\n'
        '##INFO=<ID=LCX_NOT_SCORED,Number=A,Type=String,Description="Why an alternative has no LCX_SCORE">\n'
        f"{text}"
    )
