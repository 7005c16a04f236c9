"""Continues the run of another trainer: Adam's moments and the count of updates, from the folder of its weights."""

import dataclasses
import logging
import math
from typing import Any

import jax
import numpy as np
import optax

from lcx import hub
from lcx.convert import formats
from lcx.convert.core.training_state import TrainingState
from lcx.errors import UserError
from lcx.training.run import Run

log = logging.getLogger(__name__)


def check(trainer: Any) -> None:
    """Raises UserError for values of stop_at and init_optimizer that do not go with the other settings."""
    if trainer.stop_at is not None and not 1 <= trainer.stop_at <= trainer.steps:
        raise UserError(
            f"Trainer.stop_at is {trainer.stop_at}, expected 1 to Trainer.steps = {trainer.steps}, over which the "
            "schedule extends"
        )
    if not trainer.init_optimizer:
        return
    if trainer.init_from is None:
        raise UserError(
            "Trainer.init_optimizer continues the optimizer of a stored run: set Trainer.init_from"
        )
    for name in ("rope_scaling", "context_length", "linearize", "lora", "adapter"):
        if getattr(trainer, name) is not None:
            raise UserError(
                f"Trainer.{name} changes the model, and Trainer.init_optimizer continues its optimizer: set one of them"
            )


def with_optimizer(trainer: Any, run: Run) -> Run:
    """A run that has its weights, with the moments and the count of updates that `init_from` holds beside them.

    The position in the data is not stored there, so the data starts at its beginning; `statements.opening` says so.

    Args:
      trainer: the settings, a `trainer.Trainer`.

    Raises:
      UserError: the format stores no optimizer, or it is damaged or that of another model.
    """
    path = hub.local(trainer.init_from)
    reader = formats.reader(path, trainer.init_format, where="Trainer.init_format")
    stored = reader.training_state(path, run.model)
    for line in _differences(stored, trainer):
        log.warning("%s: %s", trainer.init_from, line)
    state = {**run.state, "opt_state": _filled(run.state["opt_state"], stored)}
    return dataclasses.replace(run, state=state, step=stored.step)


def _filled(opt_state: Any, stored: TrainingState) -> Any:
    """The optimizer's state with the stored moments and counts, in the same shardings."""

    def tree(moments: Any, which: str) -> Any:
        def one(path: Any, old: jax.Array) -> jax.Array:
            name = "/".join(str(key.key) for key in path).removeprefix("params/")
            return jax.device_put(stored.moment(name, which).astype(old.dtype), old.sharding)

        return jax.tree_util.tree_map_with_path(one, moments)

    def count(old: jax.Array, value: int) -> jax.Array:
        return jax.device_put(np.asarray(value, old.dtype), old.sharding)

    def part(state: Any) -> Any:
        if isinstance(state, optax.ScaleByAdamState):
            mu, nu = tree(state.mu, "first"), tree(state.nu, "second")
            return state._replace(count=count(state.count, stored.updates), mu=mu, nu=nu)
        if isinstance(state, optax.ScaleByScheduleState):
            return state._replace(count=count(state.count, stored.step))
        return state

    return jax.tree.map(part, opt_state, is_leaf=_is_known)


def _is_known(state: Any) -> bool:
    return isinstance(state, optax.ScaleByAdamState | optax.ScaleByScheduleState)


def _differences(stored: TrainingState, trainer: Any) -> list[str]:
    """One line for each setting in which this run differs from the stored one."""
    owners = {"AdamW": trainer.optimizer, "Trainer": trainer}
    lines = []
    for name, before in stored.settings.items():
        owner, _, field = name.partition(".")
        now = getattr(owners[owner], field)
        if now != before:
            lines.append(f"the run there had {name} = {before!r}, this one has {now!r}")
    if stored.step != stored.updates:
        lines.append(
            f"the optimizer there has done {stored.updates} updates and the schedule {stored.step}: both go on"
        )
    rate = float(trainer.optimizer.learning_rates(trainer.steps)(stored.step))
    if stored.next_rate is not None and not math.isclose(rate, stored.next_rate, rel_tol=1e-4, abs_tol=1e-12):
        lines.append(
            f"the next update there has the learning rate {stored.next_rate:g}, here it has {rate:g}"
        )
    return lines
