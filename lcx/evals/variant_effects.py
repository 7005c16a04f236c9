"""What a variant of a sequence costs: its likelihood in its surroundings against that of the reference."""

import csv
import dataclasses
import gzip
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from lcx.data import Tokenizer, special_tokens
from lcx.errors import UserError
from lcx.evals import Result, dna, figures, scoring
from lcx.evals.intervals import auroc
from lcx.evals.model_facts import facts
from lcx.evals.sequence_likelihood import check_windows, windows_of
from lcx.model import Decoder

_COLUMNS = ("chrom", "pos", "ref", "alt")


@dataclasses.dataclass(frozen=True)
class Variant:
    """`ref` at the 1-based position `pos` of record `chrom` becomes `alt`, as in VCF; label: 1 pathogenic, 0 not."""

    chrom: str
    pos: int
    ref: str
    alt: str
    label: int | None = None

    def __str__(self) -> str:
        return f"{self.chrom}:{self.pos}:{self.ref}>{self.alt}"


@dataclasses.dataclass(frozen=True)
class VariantEffects:
    """score = log p(window with alt) - log p(window with ref), in nats: below 0 where the model finds alt less likely.

    Both windows begin at the same letter of the reference, `window` letters with the variant in the middle (Evo 2's
    zero-shot score of BRCA1 variants, Brixi et al. 2025). Where the variants carry labels, the area under the ROC curve
    of -score is reported (label 1 = damaging).

    Attributes:
      sequences: the reference, FASTA.
      variants: a VCF (.vcf, .vcf.gz), or a table with tabs or commas and the columns chrom, pos, ref, alt and
        optionally label. A `chrom` is the first word of a FASTA header.
      window: letters around a variant; None for the model's window.
      both_strands: the mean of both strands' scores.
    """

    sequences: str
    variants: str
    window: int | None = None
    upper_case: bool = True
    both_strands: bool = False
    tokens_per_batch: int = scoring.TOKENS_PER_BATCH
    name: str = "variant_effects"
    stride = None  # one window holds all

    def __post_init__(self):
        check_windows(self)

    def __call__(self, model: Decoder, params: Any, tokenizer: Tokenizer | None) -> Result:
        window, stride = windows_of(self, model)
        letters = window if tokenizer is None else window - len(special_tokens(tokenizer).before)
        records = {
            record.name.partition(":")[2]: record.text
            for record in dna.read(self.sequences, owner="VariantEffects.sequences")
        }
        variants = list(read_variants(self.variants))
        if not variants:
            raise UserError(f"{self.variants} holds no variant: change VariantEffects.variants")
        pairs = [self._pair(variant, records, letters) for variant in variants]
        sequences = [sequence for pair in pairs for sequence in pair]
        if self.both_strands:
            sequences += [dna.reverse_complement(sequence) for sequence in sequences]
        values = dna.token_log_likelihoods(
            model,
            params,
            tokenizer,
            sequences,
            window=window,
            stride=stride,
            tokens_per_batch=self.tokens_per_batch,
            description=self.name,
        )
        totals = np.array([v.sum(dtype=np.float64) for v in values]).reshape(-1, len(pairs), 2).mean(0)
        scores = totals[:, 1] - totals[:, 0]
        rows = [
            {"variant": str(v), "score": float(score), "log_likelihood_ref": float(ref), "label": v.label}
            for v, score, (ref, _) in zip(variants, scores, totals, strict=True)
        ]
        labelled = [
            (v.label, -float(s)) for v, s in zip(variants, scores, strict=True) if v.label is not None
        ]
        area = auroc(*zip(*labelled, strict=True)) if labelled else None
        said = "" if area is None else f", AUROC {area:.3f} over {len(labelled)} labelled"
        return {
            "definition": (
                f"log p(alt window) - log p(ref window) in nats, sums over windows of {letters} letters of "
                f"{self.sequences} with the variant in the middle"
                f"{', mean of both strands' if self.both_strands else ''}"
                f"; variants of {self.variants}; AUROC of -score for label 1"
            ),
            "summary": f"{len(rows)} variants, mean score {scores.mean():.4g} nats{said}",
            "table": {"mean score (nats)": float(scores.mean()), "AUROC": area, "variants": len(rows)},
            "model": facts(model),
            "auroc": area,
            "variants": rows,
        }

    def _pair(self, variant: Variant, records: Mapping[str, str], letters: int) -> tuple[str, str]:
        """The window with ref and with alt."""
        if variant.chrom not in records:
            known = ", ".join(list(records)[:5])
            raise UserError(f"{variant} names no record of {self.sequences}, which has {known}: change chrom")
        text, at = records[variant.chrom], variant.pos - 1
        found = text[at : at + len(variant.ref)]
        if at < 0 or found.upper() != variant.ref.upper():
            raise UserError(
                f"{variant}: {self.sequences} has {found or 'nothing'!r} there, expected ref {variant.ref!r}: "
                "positions count from 1; is it the same assembly?"
            )
        if not (variant.ref + variant.alt).isalpha():
            raise UserError(f"{variant}: expected letters for ref and alt; remove what is no plain sequence")
        if max(len(variant.ref), len(variant.alt)) > letters // 2:
            raise UserError(
                f"{variant} is longer than half the window of {letters}: raise VariantEffects.window"
            )
        start = max(0, min(at - letters // 2, len(text) - letters))
        changed = (
            text[start:at] + variant.alt + text[at + len(variant.ref) : start + letters + len(variant.ref)]
        )
        pair = text[start : start + letters], changed[:letters]
        return (pair[0].upper(), pair[1].upper()) if self.upper_case else pair

    def plot(self, axes: Any, results: Mapping[str, Result]) -> None:
        styles = figures.styles(results)
        for label, result in results.items():
            for kind in (None, 0, 1):
                scores = sorted(row["score"] for row in result["variants"] if row["label"] == kind)
                if scores:
                    name = label if kind is None else f"{label}, label {kind}"
                    style = {**styles[label], "linestyle": {None: "-", 0: "--", 1: "-"}[kind]}
                    axes.plot(scores, np.arange(1, len(scores) + 1) / len(scores), label=name, **style)
        axes.set_xlabel("score (nats; below 0: less likely than the reference)")
        axes.set_ylabel("share of variants at or below")
        axes.set_title("Effects of variants")
        axes.legend()


def read_variants(path: str) -> Iterator[Variant]:
    """The variants of a VCF or of a table with a header; several alternatives in one line are several variants.

    Raises:
      UserError: no such file, a missing column, or a line that cannot be read.
    """
    opened = gzip.open if path.endswith(".gz") else open
    try:
        with opened(path, "rt", encoding="utf-8", newline="") as file:
            lines = [line.rstrip("\r\n") for line in file]
    except (OSError, UnicodeDecodeError, EOFError) as error:
        raise UserError(f"cannot read {path}: {error}; change VariantEffects.variants") from None
    lines = [line for line in lines if line.strip() and not line.startswith("##")]
    if not lines:
        raise UserError(f"{path} holds no variant: change VariantEffects.variants")
    delimiter = "\t" if "\t" in lines[0] else ","
    header = [name.strip().lower().lstrip("#") for name in next(csv.reader(lines[:1], delimiter=delimiter))]
    missing = [name for name in _COLUMNS if name not in header]
    if missing:
        raise UserError(
            f"{path} has the columns {header}, expected {', '.join(_COLUMNS)}: {missing[0]} is missing"
        )
    for number, cells in enumerate(csv.reader(lines[1:], delimiter=delimiter), start=2):
        row = dict(zip(header, (cell.strip() for cell in cells)))
        try:
            label = int(row["label"]) if row.get("label", "") not in ("", ".") else None
            pos = int(row["pos"])
            chrom, ref, alternatives = row["chrom"], row["ref"], row["alt"].split(",")
        except (KeyError, ValueError):
            raise UserError(
                f"{path}, line {number} after comments: {cells}, expected {header}, with a whole number for pos (and 0 "
                "or 1 for label, where there is one)"
            ) from None
        yield from (Variant(chrom, pos, ref, alt, label) for alt in alternatives)
