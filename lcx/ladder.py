"""The ladder: a context extended in rungs, each a training run that starts from the one before.

Every rung states its length; its scale is always relative to the original window, never to the rung before
(2K -> 8K -> 16K -> 32K are factors 4, 8, 16 of 2K). With a gate, a rung is repeated until the model has earned the
next one: its loss inside the old window has recovered, and it finds a passkey at the new length, which is how Llama 3.1
went from 8K to 128K in six stages (arXiv 2407.21783, section 3.4.2).

In the workdir each rung has a workdir of its own, `8192/round_0`; a rung that is done is not done again, and one that
was cut short goes on.
"""

import contextlib
import dataclasses
import json
import logging
import math
import os
from collections.abc import Iterator
from typing import Any

import jax
from jax.sharding import Mesh

from lcx import extend, sharding
from lcx.convert import api as convert
from lcx.errors import UserError
from lcx.model import Decoder
from lcx.trainer import Trainer

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Rung:
    """One length of the ladder. What is None comes from the Ladder's trainer.

    Attributes:
      context_length: tokens of a row, and the model's new window.
      learning_rate: the base rate (Ladder.scale_learning_rate).
      rope_theta: a new base of the rotary embedding; None keeps that of the weights.
    """

    context_length: int
    steps: int
    batch_size: int | None = None
    accumulation: int | None = None
    learning_rate: float | None = None
    rope_theta: float | None = None
    mesh: sharding.MeshShape | None = None


@dataclasses.dataclass(frozen=True)
class Gate:
    """When a rung may be left.

    Attributes:
      max_loss_increase: nats per token that the mean loss inside the original window may lie above the first model's.
      min_passkey_accuracy: share of passkeys found at the rung's length; 0 skips the search.
      passkey_trials: how many are hidden, at depths spread over the text.
      max_rounds: how often a rung is trained before the ladder gives up.
    """

    max_loss_increase: float = 0.05
    min_passkey_accuracy: float = 0.0
    passkey_trials: int = 20
    max_rounds: int = 3


class Stopped(Exception):
    """A rung was asked to stop and has saved."""


@dataclasses.dataclass(frozen=True)
class Ladder:
    """Trains the rungs one after the other; a job for `train`.

    Attributes:
      trainer: the settings that rungs share; its init_from is the pretrained model. Its steps, seq_len, context_length
        and rope_scaling are set rung by rung.
      rope_scaling: the type and its settings without a factor: {"rope_type": "yarn"}.
      gate: None climbs without looking back.
      scale_learning_rate: a rung trains at learning_rate / sqrt(context_length / original window); else at
        learning_rate.
    """

    trainer: Trainer
    rungs: tuple[Rung, ...]
    rope_scaling: dict
    gate: Gate | None = None
    scale_learning_rate: bool = True

    def __post_init__(self):
        lengths = [rung.context_length for rung in self.rungs]
        if not lengths or lengths != sorted(set(lengths)):
            raise UserError(
                f"Ladder.rungs have context lengths {lengths}: expected at least one, each longer than the last"
            )
        if self.trainer.init_from is None:
            raise UserError("Ladder.trainer has no init_from: a ladder extends a pretrained model")
        if self.trainer.adapter is not None:
            raise UserError(
                "Ladder.trainer has an adapter, which belongs to one context length: merge it into init_from first "
                "(python -m lcx.convert --adapter)"
            )
        if "factor" in self.rope_scaling:
            raise UserError(
                "Ladder.rope_scaling has a factor: leave it out, each rung's follows from its context_length"
            )

    def run(self, workdir: str) -> str | None:
        """Returns the workdir of the last rung's last round; None when asked to stop before (saved, and resumable)."""
        try:
            return self._run(workdir)
        except Stopped:
            return None

    def _run(self, workdir: str) -> str:
        source = self.trainer.init_from
        assert source is not None
        original = self._check_rungs(source)
        baseline = math.nan if self.gate is None else self._baseline(workdir, source, original)
        for rung in self.rungs:
            for number in range(1 if self.gate is None else self.gate.max_rounds):
                folder = os.path.join(workdir, str(rung.context_length), f"round_{number}")
                trainer = self._trainer_for(rung, source, original, number)
                verdict = self._climb(trainer, folder, original, baseline)
                source = folder
                if verdict is None:
                    break
                log.warning("rung %d, round %d: %s", rung.context_length, number, verdict)
            else:
                raise UserError(
                    f"rung {rung.context_length} did not pass its gate in {number + 1} rounds ({verdict}); "
                    "raise Rung.steps or Gate.max_rounds, or loosen the gate. All rounds are kept in the workdir"
                )
        return source

    def _check_rungs(self, source: str) -> int:
        """The original window; mistakes in any rung show before the first one trains."""
        model = convert.source(source).model
        original = original_window(model)
        for rung in self.rungs:
            trainer = self._trainer_for(rung, source, original, 0)
            trainer.check_rows(trainer.mesh.build())
            extend.extend_model(model, trainer.rope_scaling, trainer.context_length)
        return original

    def _trainer_for(self, rung: Rung, source: str, original: int, number: int) -> Trainer:
        """The trainer of a round. A repeated round is of the rung's length already, and reads on in other text."""
        scale = max(rung.context_length / original, 1.0) if self.scale_learning_rate else 1.0
        optimizer = dataclasses.replace(self.trainer.optimizer, context_scale=scale)
        if rung.learning_rate is not None:
            optimizer = dataclasses.replace(optimizer, learning_rate=rung.learning_rate)
        scaling = {**self.rope_scaling, "original_max_position_embeddings": original}
        if rung.rope_theta is not None:
            scaling["rope_theta"] = rung.rope_theta
        given = {name: getattr(rung, name) for name in ("batch_size", "accumulation", "mesh")}
        return dataclasses.replace(
            self.trainer,
            init_from=source,
            steps=rung.steps,
            seq_len=rung.context_length,
            context_length=rung.context_length,
            rope_scaling=scaling if number == 0 else None,
            optimizer=optimizer,
            seed=self.trainer.seed + number,
            **{name: value for name, value in given.items() if value is not None},
        )

    def _climb(self, trainer: Trainer, folder: str, original: int, baseline: float) -> str | None:
        """Trains one round; None when the gate opens, else why it stays shut."""
        done = os.path.join(folder, "gate.json")
        if os.path.exists(done):
            return _read_json(done)["verdict"]
        if trainer.run(folder).step < trainer.steps:
            raise Stopped
        verdict = None if self.gate is None else self._verdict(folder, trainer.seq_len, original, baseline)
        _write_json(done, {"verdict": verdict})
        return verdict

    # ------------------------------------------------------------------------------------------------------ the gate

    def _baseline(self, workdir: str, source: str, original: int) -> float:
        """Held-out loss of the pretrained model inside its own window; kept for a ladder that is resumed."""
        kept = os.path.join(workdir, "baseline.json")
        if os.path.exists(kept):
            return _read_json(kept)["loss"]
        with self._loaded(source) as (model, params, mesh):
            loss = self._short_loss(model, params, original, mesh)
        if math.isnan(loss):
            raise UserError(
                "Ladder.gate compares losses on held-out text and there is none: set eval_fraction"
            )
        _write_json(kept, {"loss": loss, "context_length": original})
        return loss

    def _verdict(self, folder: str, length: int, original: int, baseline: float) -> str | None:
        assert self.gate is not None
        with self._loaded(folder) as (model, params, mesh):
            loss = self._short_loss(model, params, original, mesh)
            if loss > baseline + self.gate.max_loss_increase:
                return (
                    f"loss inside the original window is {loss:.4f}, {loss - baseline:.4f} above the start's"
                )
            if self.gate.min_passkey_accuracy > 0:
                from lcx.evals.passkey import Passkey

                search = Passkey(context_length=length, num_distances=self.gate.passkey_trials, trials=1)
                found = search(model, params, self.trainer.data.load_tokenizer())["mean_rate"]
                if found < self.gate.min_passkey_accuracy:
                    return f"passkey success is {found:.2f}, expected {self.gate.min_passkey_accuracy:.2f}"
        return None

    @contextlib.contextmanager
    def _loaded(self, path: str) -> Iterator[tuple[Decoder, Any, Mesh]]:
        """A checkpoint on the trainer's own mesh, whatever the rung's: all are measured alike, on the same rows."""
        mesh = self.trainer.mesh.build()
        with jax.set_mesh(mesh):
            model, params = convert.load(path, dtype="float32", mesh=mesh)
            yield self.trainer.adjusted(model), params, mesh

    def _short_loss(self, model: Decoder, params: Any, original: int, mesh: Mesh) -> float:
        short = dataclasses.replace(self.trainer, seq_len=original)
        short.check_rows(mesh)
        return short.held_out_loss(model, {"params": params}, mesh)


def original_window(model: Decoder) -> int:
    """The window a model was pretrained with: what every factor is relative to."""
    windows = [rope.original_max_position_embeddings for rope, _ in extend.rotaries(model)]
    return next((window for window in windows if window is not None), model.max_position_embeddings)


def _read_json(path: str) -> dict[str, Any]:
    with open(path) as file:
        return json.load(file)


def _write_json(path: str, value: dict[str, Any]) -> None:
    """Whole or not at all: a kill must not leave half of a verdict."""
    if jax.process_index() == 0:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(f"{path}.new", "w") as file:
            json.dump(value, file)
        os.replace(f"{path}.new", path)
