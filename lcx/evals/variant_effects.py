"""Effects of sequence variants: the log-likelihood of the sequence with a variant minus that of the reference."""

import collections
import contextlib
import dataclasses
import itertools
import os
import tempfile
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np

from lcx.data import Tokenizer
from lcx.data.readers.fasta_index import Contig
from lcx.errors import UserError
from lcx.evals import Result
from lcx.evals.support import dna, figures, remembered, scoring, variant_scores
from lcx.evals.support.growing_files import GrowingFiles, file_identity
from lcx.evals.support.intervals import auroc
from lcx.evals.support.letters import Letters, is_foreign
from lcx.evals.support.likelihoods import Scorer
from lcx.evals.support.model_facts import facts, identity
from lcx.evals.support.progress import progress
from lcx.evals.support.variant_scores import VariantScorer
from lcx.evals.support.variants import is_vcf, read_lines, read_variants
from lcx.evals.support.windows import beyond_window, check_windows, windows_of
from lcx.model import Decoder
from lcx.wording import quantity

_LOOKED_AT = 100  # records of the FASTA files that are looked at for letters of DNA
LISTED = 10_000  # variants in results.json; the table has all


@dataclasses.dataclass(frozen=True)
class VariantEffects:
    """score = log p(window with alt) - log p(window with ref) in nats; negative if the model finds alt less likely.

    A window has `window` letters with the variant in the middle, as in Evo 2's zero-shot score of BRCA1 variants (Brixi
    et al. 2025). Both windows have the same number of letters (in a short sequence that of the shorter one), so a model
    that finds all letters equally likely scores 0. Near the ends of a sequence the windows shift to stay inside it
    (`variants.windows_around`). If the variants have labels, the area under the ROC curve of -score is reported, where
    label 1 means damaging.

    Variants without an explicit sequence (`<DEL>`, `*`, breakends) and variants that do not match the reference are not
    scored; they are listed with the reason.

    Variants are read, scored and written a few at a time, so memory does not grow with their number. A run that was
    interrupted continues where the table of an equal run ends.

    Attributes:
      sequences: FASTA file with the reference, read in parts; files may be compressed (bgzip allows random access).
      variants: a VCF file (.vcf, .vcf.gz), or a table separated by tabs or commas with the columns chrom, pos, ref, alt
        and optionally label. `chrom` is the first word of a FASTA header.
      window: letters around a variant; None: the model's context length.
      upper_case: whether sequences are converted to upper case before they are scored.
      both_strands: score the mean of both strands.
      tokens_per_batch: tokens per forward pass.
      name: key in results.json.
      regions: a BED file; only variants in its regions are scored. None: all.
      tag: text before every window that is not scored, such as a taxonomic tag "|d__Bacteria;...|".
      strict: whether a variant that cannot be scored is an error, before anything is scored.
      output: the table of all scores (`variant_scores.COLUMNS`); None: a temporary file, or NAME.tsv in the folder of
        `python -m lcx.evaluate`.
      annotated: a VCF file to write, the lines of `variants` with LCX_SCORE in INFO; None: none.
      overwrite: whether existing outputs are replaced.
    """

    sequences: str
    variants: str
    window: int | None = None
    upper_case: bool = True
    both_strands: bool = False
    tokens_per_batch: int = scoring.TOKENS_PER_BATCH
    name: str = "variant_effects"
    regions: str | None = None
    tag: str = ""
    strict: bool = False
    output: str | None = None
    annotated: str | None = None
    overwrite: bool = False
    stride = None  # needed by windows_of; a sequence here is exactly one window long, so windows do not overlap

    def __post_init__(self):
        check_windows(self)

    def check(self) -> None:
        dna.check_files(self.sequences, owner="VariantEffects.sequences")
        next(read_variants(self.variants), None)  # raises if the file cannot be read or has other columns

    def check_model(self, model: Decoder, tokenizer: Tokenizer | None) -> None:
        self._variants(model, None, tokenizer)

    def _variants(self, model: Decoder, params: Any, tokenizer: Tokenizer | None) -> VariantScorer:
        """What scores variants. Raises UserError for files that do not fit each other."""
        window, _ = windows_of(self, model)
        scorer = Scorer(model, params, tokenizer, window, self.tokens_per_batch, self.tag, description=None)
        if self.annotated is not None and not is_vcf(self.variants):
            raise UserError(
                f"{self.variants} is a table, expected a VCF file to annotate: leave out VariantEffects.annotated"
            )
        contigs, regions = remembered.once(id(self), self._sequences)
        found = VariantScorer(scorer, contigs, self.sequences, self.upper_case, self.both_strands, regions)
        if self.strict:
            remembered.once((id(self), "strict"), lambda: self._refuse(found))
        return found

    def _sequences(self) -> tuple[Mapping[str, Contig], dna.Regions | None]:
        """(the records of the FASTA files, the regions)."""
        regions = None if self.regions is None else dna.Regions(self.regions, owner="VariantEffects.regions")
        return dna.read_contigs(self.sequences, owner="VariantEffects.sequences"), regions

    def __call__(self, model: Decoder, params: Any, tokenizer: Tokenizer | None) -> Result:
        variants = self._variants(model, params, tokenizer)
        with contextlib.ExitStack() as stack:
            writes = jax.process_index() == 0  # all processes score all variants
            table, others = self.output, [self.annotated] if writes and self.annotated is not None else []
            if table is None or not writes:
                folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="lcx-variants-"))
                table = os.path.join(folder, "scores.tsv")
            self._score(variants, [table, *others])
            return self._result(variants, table)

    def _refuse(self, variants: VariantScorer) -> None:
        """Raises UserError if some variants cannot be scored."""
        bad, first, total = 0, "", 0
        for variant in read_variants(self.variants):
            why = variants.obstacle(variant)
            total += 1
            if why is not None and why != variant_scores.OUTSIDE:
                bad, first = bad + 1, first or f"{str(variant)[:80]}: {why.reason}"
        if bad:
            raise UserError(
                f"{bad} of {total} variants of {self.variants} cannot be scored; the first is {first}; correct them, or"
                " leave out VariantEffects.strict to score the others"
            )

    def _score(self, variants: VariantScorer, outputs: list[str]) -> None:
        """Scores all variants into the outputs: the table, and perhaps the annotated VCF file."""
        files = GrowingFiles(
            outputs,
            settings=self._settings(variants.scorer),
            setting="VariantEffects.output",
            overwrite=self.overwrite,
            resume=jax.process_count() == 1,  # several processes must start at the same variant
        )
        with files, progress(self.name, None, "variants") as bar:
            if not files.done:
                files.append(["\t".join(variant_scores.COLUMNS) + "\n", *[""] * (len(outputs) - 1)], done=0)
            lines = itertools.islice(read_lines(self.variants), files.done, None)
            for chunk in variant_scores.chunks(lines, variants.chunk):
                scored = variant_scores.scored_lines(variants, chunk)
                texts = ["".join(f"{variant_scores.table_row(one)}\n" for _, found in scored for one in found)]
                if len(outputs) > 1:
                    new = (variant_scores.annotated(line, found, _MEANING) for line, found in scored)
                    texts.append("".join(f"{line}\n" for line in new if line))
                files.append(texts, done=files.done + len(chunk))
                bar.update(sum(len(found) for _, found in scored))
            files.finish()

    def _settings(self, scorer: Scorer) -> dict[str, Any]:
        """What decides the scores, for continuing a run of the same ones only."""
        own = {"output", "annotated", "overwrite", "strict", "tokens_per_batch", "name"}
        fields = {field.name for field in dataclasses.fields(self)} - own
        settings = {name: getattr(self, name) for name in sorted(fields)} | {"window": scorer.window}
        if self.output is not None:
            settings["model"] = identity(scorer.model, scorer.params)
            settings["variants"] = file_identity(self.variants)
        return settings

    def _result(self, variants: VariantScorer, table: str) -> Result:
        scorer = variants.scorer
        count, total, listed, left_out, labelled = 0, 0.0, list[dict](), list[dict](), (list[int](), list[float]())
        reasons: collections.Counter[str] = collections.Counter()
        for row in variant_scores.read_table(table):
            variant = f"{row['chrom']}:{row['pos']}:{row['ref']}>{row['alt']}"
            if row["not_scored"]:
                reasons[row["not_scored"]] += 1
                if len(left_out) < LISTED:
                    left_out.append({"variant": variant, "id": row["id"], "reason": row["reason"]})
                continue
            score, label = float(row["score"]), int(row["label"]) if row["label"] else None
            count, total = count + 1, total + score
            if label is not None:
                labelled[0].append(label)
                labelled[1].append(-score)
            if len(listed) < LISTED:
                ref = float(row["log_likelihood_ref"])
                values = {"score": score, "log_likelihood_ref": ref, "label": label}
                listed.append({"variant": variant, "id": row["id"], **values})
        if not count:
            if not left_out:
                raise UserError(f"{self.variants} holds no variant: change VariantEffects.variants")
            first = f"{left_out[0]['variant']:.60}: {left_out[0]['reason']}"
            listed_in = f", of which {self.output} says why" if self.output else ""
            raise UserError(
                f"{self.variants} holds no variant that can be scored{listed_in}; the first is {first}; change "
                "VariantEffects.variants or VariantEffects.sequences"
            )
        area = auroc(*labelled) if labelled[0] else None
        said = "" if area is None else f", AUROC {area:.3f} over {len(labelled[0])} labelled"
        if left_out:
            first = f"{left_out[0]['variant'][:60]}: {left_out[0]['reason']}"
            said += f"; {reasons.total()} not scored, the first is {first}"
        return {
            "definition": self._definition(scorer),
            "summary": f"{quantity(count, 'variant')}, mean score {total / count:.4g} nats{said}",
            "table": {"mean score (nats)": total / count, "AUROC": area, "variants": count}
            | ({"not scored": reasons.total()} if left_out else {}),
            "model": facts(scorer.model),
            "auroc": area,
            "variants": listed,
            "not_scored": left_out,
            "not_scored_counts": dict(reasons),
            "scores": self.output and os.path.abspath(self.output),
            "notes": [
                *self._notes(count, reasons),
                *_foreign(variants.contigs),
                *beyond_window(scorer.window, scorer.model),
            ],
        }

    def _definition(self, scorer: Scorer) -> str:
        return (
            f"log p(alt window) - log p(ref window) in nats, sums over windows of {scorer.room} letters (fewer "
            f"in shorter sequences, equally many for both) of {self.sequences} with the variant in the middle"
            f"{', mean of both strands' if self.both_strands else ''}"
            f"{f', after the tag {self.tag}' if self.tag else ''}"
            f"; variants of {self.variants}; AUROC of -score for label 1"
        )

    def _notes(self, count: int, reasons: Mapping[str, int]) -> Iterator[str]:
        if reasons:
            counts = ", ".join(f"{name} {number}" for name, number in sorted(reasons.items()))
            yield f"{sum(reasons.values())} of {count + sum(reasons.values())} variants are not scored: {counts}"
        if count > LISTED:
            where = self.output or "the table that VariantEffects.output names"
            yield f"results.json lists the first {LISTED} variants, {where} all {count}"

    def finding(self, results: Mapping[str, Result]) -> str:
        """The mean score of each model, the area under its curve, and how many variants it could not score."""
        parts = []
        for label, result in results.items():
            table = result["table"]
            count = quantity(table["variants"], "variant")
            text = f"a mean score of {table['mean score (nats)']:.3g} nats over {count}"
            text += f", AUROC {result['auroc']:.3f}" if result["auroc"] is not None else ""
            text += f"; {table['not scored']} not scored" if table.get("not scored") else ""
            parts.append(f"“{label}”: {text}" if len(results) > 1 else text)
        return "; ".join(parts)

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


_MEANING = "log p(window with ALT) - log p(window with REF) of a language model in nats"


def _foreign(contigs: Mapping[str, Letters]) -> list[str]:
    found = dict(itertools.islice(contigs.items(), _LOOKED_AT))
    return dna.foreign([name for name, letters in found.items() if is_foreign(letters)], len(found))
