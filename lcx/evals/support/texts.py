"""Which text the evaluations of a checkpoint read: their own, the command's, or what the checkpoint was trained on."""

import contextlib
import dataclasses
import pathlib
from collections.abc import Callable
from typing import Any

from lcx.checkpoint import model_json
from lcx.checkpoint.folder import find_step, read_json
from lcx.data import ByteTokenizer, Dataset, Mixture, Tokenizer
from lcx.errors import UserError
from lcx.evals.support import settings

Text = Dataset | Mixture
NAMES = {  # what errors call the settings of a text that --dataset gives
    "Dataset.source": "--dataset",
    **dict.fromkeys(("Dataset.eval_fraction", "Dataset.separator", "Dataset.text_field", "Dataset.format")),
}


def of_path(path: str) -> Dataset:
    """All of the text at a path, which --dataset gives. Its tokenizer is the checkpoint's."""
    if not path.strip():
        raise UserError("--dataset is empty, expected a file, folder or glob of text: set --dataset")
    return Dataset(source=path, eval_fraction=1.0)


def recorded(checkpoint: str, tokenizer: Tokenizer | None, say: Callable[[str], None]) -> Text | None:
    """The data that the checkpoint was trained on; else, for a model of text as bytes, the standard library; else None.

    The bytes of models of DNA have another vocabulary.
    """
    document = _meta(checkpoint).get("data")
    if document is not None:
        try:
            return _untokenized(model_json.from_json(document))
        except (UserError, TypeError) as error:
            say(f"warning: the dataset recorded in the checkpoint cannot be used: {error}")
    return Dataset(source="stdlib") if tokenizer == ByteTokenizer() else None


def readable(evals: tuple[Any, ...], text: Text | None) -> tuple[tuple[Any, ...], dict[str, str]]:
    """(the evaluations that have a text or need none, why the others are left out)."""
    if text is not None:
        return evals, {}
    without = {evaluation.name for evaluation in evals if getattr(evaluation, "dataset", evals) is None}
    why = "it needs a text, and the checkpoint does not say what it was trained on: set --dataset"
    kept = tuple(evaluation for evaluation in evals if evaluation.name not in without)
    if not kept:
        raise UserError(f"the suite has nothing without a text ({', '.join(sorted(without))}): {why}")
    return kept, dict.fromkeys((e.name for e in evals if e.name in without), why)


def filled(evals: tuple[Any, ...], text: Text | None) -> tuple[Any, ...]:
    """The evaluations, with the text filled in wherever one has a field `dataset` and it is None.

    Raises:
      UserError: an evaluation has no text, or its text has no files.
    """
    without = [evaluation.name for evaluation in evals if getattr(evaluation, "dataset", evals) is None]
    if without and text is None:
        raise UserError(
            f"no text for {', '.join(without)}: none is set, and the checkpoint does not say what it was trained on;"
            " set --dataset to a file, folder or glob"
        )
    found = tuple(
        dataclasses.replace(evaluation, dataset=text) if evaluation.name in without else evaluation
        for evaluation in evals
    )
    settings.check_text(found)
    return found


def _meta(checkpoint: str) -> dict[str, Any]:
    """The metadata that a training run stored in its checkpoint; {} for any other kind of checkpoint."""
    if (pathlib.Path(checkpoint).expanduser() / "config.json").is_file():
        return {}
    with contextlib.suppress(UserError):
        directory, step = find_step(checkpoint)
        return read_json(directory / str(step), "meta")
    return {}


def _untokenized(dataset: Text) -> Text:
    """The dataset without its tokenizer, whose file may no longer exist; the checkpoint's own is used instead."""
    if isinstance(dataset, Dataset):
        return dataclasses.replace(dataset, tokenizer="bytes")
    parts = tuple((dataclasses.replace(part, tokenizer="bytes"), weight) for part, weight in dataset.parts)
    return dataclasses.replace(dataset, parts=parts)
