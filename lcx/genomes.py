"""Scores of genomes: the jobs of `python -m lcx.variants` and `python -m lcx.score`."""

import contextlib
import csv
import dataclasses
import functools
import os
import sys
from collections.abc import Mapping
from typing import Any

from lcx import paths
from lcx.errors import UserError, check_sizes, naming
from lcx.evals import Result
from lcx.evals.sequence_likelihood import SequenceLikelihood
from lcx.evals.support import scoring
from lcx.evals.support.remembered import remembering
from lcx.evals.variant_effects import VariantEffects
from lcx.text import opened

_ENDINGS = (".tsv", ".txt", ".tab")
#: Fields of the evaluations, and the flags of the commands that set them.
_FLAGS = {"sequences": "--fasta", "upper_case": "--keep_case"}
_COLUMNS = ("name", "length", "scored", "log_likelihood", "mean_log_likelihood", "ambiguous", "lower_case")


def _flags(of: type, prefix: str) -> dict[str, str | None]:
    """{a setting as messages name it: its flag}, of a command whose parameters `prefix` names."""
    names = [field.name for field in dataclasses.fields(of)]
    said: dict[str, str | None] = {f"setting {name}": f"--{name}" for name in ("window", "stride")}
    return said | {
        f"{owner}.{name}": _FLAGS.get(name, f"--{name}") for owner in (of.__name__, prefix) for name in names
    }


@naming(_flags(VariantEffects, "variants"))
def score_variants(
    *,
    checkpoint: str,
    fasta: str,
    variants: str,
    output: str,
    annotated: str | None = None,
    window: int | None = None,
    both_strands: bool = False,
    keep_case: bool = False,
    regions: str | None = None,
    tag: str = "",
    strict: bool = False,
    overwrite: bool = False,
    tokens_per_batch: int = scoring.TOKENS_PER_BATCH,
    **loading: Any,
) -> None:
    """Scores the variants of a file into a table (evals.variant_effects.VariantEffects).

    Args:
      checkpoint: as in lcx.load.
      fasta, variants, window, both_strands, regions, tag, strict, annotated, overwrite, tokens_per_batch: fields of
        VariantEffects.
      output: the table to write, .tsv.
      keep_case: whether lower-case letters stay as they are.
      loading: other settings of lcx.load.

    Raises:
      UserError: a file cannot be read or written, a setting is out of range, or no variant can be scored.
    """
    _check_table(output)
    if annotated is not None and not annotated.lower().endswith(".vcf"):
        raise UserError(f"--annotated is {annotated}, expected a name that ends in .vcf: change --annotated")
    check_sizes("variants", tokens_per_batch=tokens_per_batch)
    if not os.path.exists(os.path.expanduser(variants)):
        raise UserError(f"--variants is {variants}, and there is no such file: change --variants")
    inputs = {"--checkpoint": checkpoint, "--fasta": fasta, "--variants": variants, "--regions": regions}
    paths.refuse_inputs(output, "--output", inputs)
    paths.refuse_inputs(annotated, "--annotated", inputs)
    evaluation = VariantEffects(
        fasta,
        variants,
        window=window,
        upper_case=not keep_case,
        both_strands=both_strands,
        tokens_per_batch=tokens_per_batch,
        regions=regions,
        tag=tag,
        strict=strict,
        output=output,
        annotated=annotated,
        overwrite=overwrite,
    )
    _run(evaluation, checkpoint, loading)


@naming(_flags(SequenceLikelihood, "score"))
def score_sequences(
    *,
    checkpoint: str,
    fasta: str,
    output: str,
    per_position: str | None = None,
    window: int | None = None,
    stride: int | None = None,
    both_strands: bool = False,
    keep_case: bool = False,
    regions: str | None = None,
    tag: str = "",
    overwrite: bool = False,
    tokens_per_batch: int = scoring.TOKENS_PER_BATCH,
    **loading: Any,
) -> None:
    """Scores the records of FASTA files, or the regions of a BED file, into a table (evals.sequence_likelihood).

    Args:
      checkpoint: as in lcx.load.
      fasta, per_position, window, stride, both_strands, regions, tag, tokens_per_batch: fields of SequenceLikelihood.
      output: the table to write, .tsv, one row per sequence.
      keep_case: whether lower-case letters stay as they are.
      overwrite: whether existing outputs are replaced.
      loading: other settings of lcx.load.

    Raises:
      UserError: a file cannot be read or written, or a setting is out of range.
    """
    _check_table(output)
    check_sizes("score", tokens_per_batch=tokens_per_batch)
    if per_position is not None and not per_position.endswith(".parquet"):
        raise UserError(f"--per_position is {per_position}, expected a name that ends in .parquet")
    inputs = {"--checkpoint": checkpoint, "--fasta": fasta, "--regions": regions}
    paths.refuse_inputs(output, "--output", inputs)
    with contextlib.ExitStack() as stack:
        claim = functools.partial(paths.claimed_file, overwrite=overwrite)
        table = stack.enter_context(claim(output, "--output"))
        if per_position is not None:
            per_position = str(stack.enter_context(claim(per_position, "--per_position")))
        evaluation = SequenceLikelihood(
            fasta,
            window=window,
            stride=stride,
            upper_case=not keep_case,
            both_strands=both_strands,
            tokens_per_batch=tokens_per_batch,
            regions=regions,
            tag=tag,
            per_position=per_position,
        )
        result = _run(evaluation, checkpoint, loading)
        with open(table, "w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file, delimiter="\t", lineterminator="\n")
            writer.writerow(_COLUMNS)
            writer.writerows([row[name] for name in _COLUMNS] for row in result["sequences"])


def _check_table(output: str) -> None:
    if paths.destination(output, "--output").suffix.lower() not in _ENDINGS:
        raise UserError(f"--output is {output}, expected a name that ends in .tsv: change --output")


def _run(evaluation: SequenceLikelihood | VariantEffects, checkpoint: str, loading: Mapping[str, Any]) -> Result:
    """Runs an evaluation, and says what was found on stderr."""
    evaluation.check()
    with remembering():
        result = evaluation(*opened(checkpoint, of="sequence", check=evaluation.check_model, **loading))
    for line in (result["summary"], *result.get("notes", ())):
        print(line, file=sys.stderr)
    return result
