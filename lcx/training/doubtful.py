"""Settings of a run that do not fit each other or its data: some are refused, others are pointed out at its start."""

from collections.abc import Iterator
from typing import Any

from lcx.convert.hf.families import FAMILIES
from lcx.errors import UserError
from lcx.wording import quantity


def settings(trainer: Any, model: Any) -> Iterator[str]:
    """One line for each setting of a `trainer.Trainer` that works, but perhaps not as intended."""
    if model.max_position_embeddings < trainer.seq_len:
        yield (
            f"Trainer.seq_len {trainer.seq_len} exceeds the model's window of {model.max_position_embeddings} "
            "tokens: set context_length (and rope_scaling, unless it keeps its own)"
        )
    known, given = (*FAMILIES, "striped_hyena"), getattr(trainer.model, "model_type", None)
    if given is not None and given not in known:
        yield (
            f"model_type {given!r} is not one of {', '.join(known)}: to convert this model to 'hf', you will need a "
            "format of your own"
        )
    length = getattr(trainer, "piece_length", None)
    if length is not None and length >= trainer.seq_len:
        yield f"Trainer.piece_length {length} has no effect: rows have {quantity(trainer.seq_len, 'token')}"
    yield from trainer.optimizer.without_effect(trainer.steps)


def check_sizes_and_schedule(trainer: Any) -> None:
    """Raises UserError if a setting contradicts another one."""
    if trainer.optimizer.schedule == "plateau" and not trainer.eval_every:
        raise UserError(
            "AdamW.schedule 'plateau' follows the held-out loss, and Trainer.eval_every is 0: set eval_every"
        )
    if trainer.batch_size % trainer.accumulation:
        raise UserError(
            f"Trainer.batch_size {trainer.batch_size} is not a multiple of accumulation {trainer.accumulation}: "
            "change one of them; accumulation 1 always fits"
        )


def check_held_out(trainer: Any, opened: Any) -> None:
    """Raises UserError if evaluations are asked for during the run, but no text is held out."""
    parts = getattr(opened, "parts", None)  # a block of layers trains on stored activations
    if trainer.eval_every and parts is not None and not any(len(part.corpus.eval) for part in parts):
        raise UserError(
            f"Trainer.eval_every is {trainer.eval_every}, but no document is held out: raise Dataset.eval_fraction, "
            "add documents, or set eval_every to 0"
        )
