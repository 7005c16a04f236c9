"""The checks of a Trainer's settings, before any weights exist."""

from typing import Any

from jax.sharding import Mesh

from lcx import mixers, objectives, pieces
from lcx import model as model_lib
from lcx.errors import UserError
from lcx.training import continued, doubtful, profiling, row_state
from lcx.training.logger import MODES
from lcx.wording import quantity

DTYPES = ("float32", "bfloat16")  # float16 would need loss scaling
_COUNTS = "steps batch_size seq_len accumulation log_every checkpoint_every keep_checkpoints eval_batches"
_LEAST = {"eval_every": 0} | dict.fromkeys(_COUNTS.split(), 1)


def check(trainer: Any) -> None:
    """Raises UserError for the first setting of a `trainer.Trainer` that is wrong or does not go with the others.

    What needs the data or the model is checked later.
    """
    _check_origin(trainer)
    for name, least in _LEAST.items():
        if getattr(trainer, name) < least:
            raise UserError(f"Trainer.{name} is {getattr(trainer, name)}, expected at least {least}")
    for name, known in {"dtype": DTYPES, "remat": tuple(model_lib.REMAT), "wandb": MODES}.items():
        if getattr(trainer, name) not in (None, *known):
            raise UserError(
                f"Trainer.{name} is {getattr(trainer, name)!r}, expected one of {', '.join(known)}"
            )
    for name in ("steps", "seq_len", "batch_size"):  # int32 on the devices
        if getattr(trainer, name) >= 2**31:
            raise UserError(f"Trainer.{name} is {getattr(trainer, name)}, expected less than 2**31")
    if trainer.copy_every is not None and (trainer.copy_every < 1 or trainer.copy_every % trainer.checkpoint_every):
        raise UserError(
            f"Trainer.copy_every is {trainer.copy_every}, expected a multiple of checkpoint_every, which is "
            f"{trainer.checkpoint_every}"
        )
    profiling.check(trainer.profile, trainer.last_step)
    objectives.check(trainer.objective)
    row_state.check(trainer)
    continued.check(trainer)
    for name in ("warmup_steps", "lag"):
        if (getattr(trainer.optimizer, name) or 0) > trainer.steps:
            raise UserError(
                f"AdamW.{name} is {getattr(trainer.optimizer, name)}, more than the "
                f"{quantity(trainer.steps, 'step')} of the run: lower it, or raise Trainer.steps"
            )
    if not 0 <= trainer.seed < 2**32:  # jax.random.key keeps 32 bits
        raise UserError(f"Trainer.seed is {trainer.seed}, expected 0 to 2**32 - 1")
    doubtful.check_sizes_and_schedule(trainer)


def at_once(trainer: Any) -> tuple[int, bool]:
    """(tokens of a row that are processed at once, whether they follow those in a cache)."""
    in_pieces = trainer.piece_length is not None and trainer.piece_length < trainer.seq_len
    return (trainer.piece_length if in_pieces else trainer.seq_len), in_pieces or trainer.stateful


def check_model(trainer: Any, model: Any, mesh: Mesh) -> None:
    """Raises UserError for a model whose mixers cannot process rows as a `trainer.Trainer` divides them."""
    tokens, cached = at_once(trainer)
    if cached:
        pieces.check(model)
    devices, tensor = mesh.shape["context"], mesh.shape["tensor"]
    for layer in model_lib.layers(model):
        if devices > 1 and (mixer := layer.block.mixer) is not None:
            mixers.context_method(mixer, devices=devices, tensor=tensor, seq_len=tokens, cached=cached)


def _check_origin(trainer: Any) -> None:
    """Where the weights come from, and what changes them."""
    if (trainer.model is None) == (trainer.init_from is None):
        found = "neither" if trainer.model is None else "both"
        raise UserError(f"Trainer.model and Trainer.init_from: expected one of the two, found {found}")
    if trainer.init_format is not None and trainer.init_from is None:
        raise UserError("Trainer.init_format is the format of a pretrained model: set Trainer.init_from")
    changes = (
        trainer.rope_scaling,
        trainer.context_length,
        trainer.linearize,
        trainer.expects_linear or None,
    )
    if trainer.init_from is None and any(change is not None for change in changes):
        raise UserError(
            "Trainer.rope_scaling, context_length, linearize (expects_linear) change a pretrained model: "
            "set Trainer.init_from"
        )
    if trainer.adapter is not None and (trainer.init_from is None or trainer.linearize is not None):
        raise UserError(
            "Trainer.adapter belongs to a pretrained model as it is: set Trainer.init_from, and linearize to None"
        )
