"""Checks the settings of evaluations before a model is loaded, so that a mistake shows within a second."""

from collections.abc import Collection, Sequence
from typing import Any

from lcx.data import Dataset, Mixture, Tokenizer, find_files
from lcx.data.corpus import SPLITS
from lcx.errors import UserError, as_read, check_sizes, first_line
from lcx.model import Decoder
from lcx.multihost.agreement import require_same_outcome


def check(evals: Sequence[Any]) -> None:
    """Raises UserError if an evaluation cannot run whatever the model is: its name, its sizes, its split, its files."""
    if not evals:
        raise UserError("evaluate.evals is empty, expected at least one evaluation")
    for evaluation in evals:
        if isinstance(evaluation, type):
            name = evaluation.__name__
            raise UserError(f"evaluate.evals has the class {name}, expected an instance: write {name}(), or @{name}()")
    names = [evaluation.name for evaluation in evals]
    for evaluation in evals:
        owner = type(evaluation).__name__
        check_name(evaluation.name, f"{owner}.name")
        if names.count(evaluation.name) > 1:
            raise UserError(f"two evaluations are named {evaluation.name!r}: set `name` of one of them")
        check_sizes(owner, tokens_per_batch=getattr(evaluation, "tokens_per_batch", None))
        split = getattr(evaluation, "split", SPLITS[0])
        if split not in SPLITS:
            raise UserError(f"{owner}.split is {split!r}, expected one of {', '.join(SPLITS)}: change it")
        most = getattr(evaluation, "max_tokens", None)
        if most is not None and most < 2:
            raise UserError(f"{owner}.max_tokens is {most}, expected at least 2: change {owner}.max_tokens")
        if (own := getattr(evaluation, "check", None)) is not None:
            own()


def check_model(
    evals: Sequence[Any],
    model: Decoder,
    tokenizer: Tokenizer | None,
    *,
    label: str,
    optional: Collection[str] = (),
) -> dict[str, str]:
    """{name: why it is left out} of the optional evaluations that cannot run with this model and this tokenizer.

    Args:
      label: of the model, for messages.
      optional: names of the evaluations that may be left out.

    Raises:
      UserError: another evaluation cannot run, or none can.
    """
    left_out: dict[str, str] = {}
    for evaluation in evals:
        why, check = "", getattr(evaluation, "check_model", None)
        try:
            if check is not None:
                check(model, tokenizer)
        except UserError as error:
            why = as_read(first_line(error))
        require_same_outcome(f"{label}: the settings of {evaluation.name}", why)
        if why and evaluation.name not in optional:
            raise UserError(why)
        if why:
            left_out[evaluation.name] = why
    if left_out and len(left_out) == len(evals):
        raise UserError("; ".join(f"{name}: {why}" for name, why in left_out.items()))
    return left_out


def check_name(name: str, setting: str) -> None:
    """Raises UserError for a name that cannot be a label: an empty one, or one with line breaks."""
    if not name.strip() or not name.isprintable():
        raise UserError(f"{setting} is {name!r}, expected a name of printable characters: change {setting}")


def check_text(evals: Sequence[Any]) -> None:
    """Raises UserError if the data set of an evaluation has no files."""
    for evaluation in evals:
        dataset = getattr(evaluation, "dataset", None)
        parts = [part for part, _ in dataset.parts] if isinstance(dataset, Mixture) else [dataset]
        for part in parts:
            if isinstance(part, Dataset):
                find_files(part.source, format=part.format)
