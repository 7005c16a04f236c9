"""Effects of sequence variants: the log-likelihood of the sequence with a variant minus that of the reference."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from lcx.data import Tokenizer, special_tokens
from lcx.errors import UserError
from lcx.evals import Result
from lcx.evals.support import dna, figures, scoring
from lcx.evals.support.intervals import auroc
from lcx.evals.support.model_facts import facts
from lcx.evals.support.variants import Variant, obstacle, read_variants, windows_around
from lcx.evals.support.windows import beyond_window, check_windows, windows_of
from lcx.model import Decoder
from lcx.wording import quantity


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

    Attributes:
      sequences: FASTA file with the reference.
      variants: a VCF file (.vcf, .vcf.gz), or a table separated by tabs or commas with the columns chrom, pos, ref, alt
        and optionally label. `chrom` is the first word of a FASTA header.
      window: letters around a variant; None: the model's context length.
      upper_case: whether sequences are converted to upper case before they are scored.
      both_strands: score the mean of both strands.
      tokens_per_batch: tokens per forward pass.
      name: key in results.json.
    """

    sequences: str
    variants: str
    window: int | None = None
    upper_case: bool = True
    both_strands: bool = False
    tokens_per_batch: int = scoring.TOKENS_PER_BATCH
    name: str = "variant_effects"
    stride = None  # needed by windows_of; a sequence here is exactly one window long, so windows do not overlap

    def __post_init__(self):
        check_windows(self)

    def check(self) -> None:
        dna.check_files(self.sequences, owner="VariantEffects.sequences")
        next(read_variants(self.variants), None)  # raises if the file cannot be read or has other columns

    def __call__(self, model: Decoder, params: Any, tokenizer: Tokenizer | None) -> Result:
        window, stride = windows_of(self, model)
        letters = window if tokenizer is None else window - len(special_tokens(tokenizer).before)
        variants, left_out, pairs = self._pairs(letters)
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
        if left_out:
            said += f"; {len(left_out)} not scored, the first is {left_out[0]['variant'][:60]}: {left_out[0]['reason']}"
        return {
            "definition": (
                f"log p(alt window) - log p(ref window) in nats, sums over windows of {letters} letters (fewer "
                f"in shorter sequences, equally many for both) of {self.sequences} with the variant in the middle"
                f"{', mean of both strands' if self.both_strands else ''}"
                f"; variants of {self.variants}; AUROC of -score for label 1"
            ),
            "summary": f"{quantity(len(rows), 'variant')}, mean score {scores.mean():.4g} nats{said}",
            "table": {"mean score (nats)": float(scores.mean()), "AUROC": area, "variants": len(rows)}
            | ({"not scored": len(left_out)} if left_out else {}),
            "notes": beyond_window(window, model),
            "model": facts(model),
            "auroc": area,
            "variants": rows,
            "not_scored": left_out,
        }

    def _pairs(self, letters: int) -> tuple[list[Variant], list[dict[str, str]], list[tuple[str, str]]]:
        """(variants to score, variants not scored with the reason, (ref window, alt window) of those to score)."""
        contigs = dna.read_contigs(self.sequences, owner="VariantEffects.sequences")
        scored, left_out, pairs = [], [], []
        for variant in read_variants(self.variants):
            reason = obstacle(variant, contigs, letters=letters, sequences=self.sequences)
            if reason is not None:
                left_out.append({"variant": str(variant), "reason": reason})
                continue
            ref, alt = windows_around(variant, contigs[variant.chrom], letters=letters)
            scored.append(variant)
            pairs.append((ref.upper(), alt.upper()) if self.upper_case else (ref, alt))
        if not scored:
            first = "; ".join(f"{one['variant']}: {one['reason']}" for one in left_out[:1])
            raise UserError(
                f"{self.variants} holds no variant{f' that can be scored; the first is {first}' if first else ''}: "
                "change VariantEffects.variants"
            )
        return scored, left_out, pairs

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
