"""Extends a context in several rungs, each a training run that starts from the weights of the previous one.

Every rung sets its context length. Its scaling factor is always relative to the original window, never to the previous
rung (2K -> 8K -> 16K -> 32K are factors 4, 8, 16 of 2K). With a gate, a rung is repeated until its model passes two
checks: the loss inside the original window has recovered, and the model finds a passkey at the new length. Llama 3.1
was extended from 8K to 128K in six stages in this way (arXiv 2407.21783, section 3.4.2).

Each rung has its own workdir inside the workdir, such as `8192/round_0`. Finished rungs are skipped and an interrupted
one is resumed.
"""

import contextlib
import dataclasses
import json
import logging
import math
import os
import sys
from collections.abc import Iterator
from typing import Any

import jax
from jax.sharding import Mesh

from lcx import extend, sharding
from lcx.convert import api as convert
from lcx.errors import UserError, check_sizes, naming
from lcx.model import Decoder
from lcx.trainer import Trainer
from lcx.training import division, statements
from lcx.wording import quantity

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Rung:
    """One stage of the ladder. A field that is None is taken from the Ladder's trainer.

    Attributes:
      context_length: tokens per row, and the model's new window.
      steps: optimizer updates per round.
      batch_size: rows of the global batch.
      accumulation: micro-batches per step.
      learning_rate: the peak before Ladder.scale_learning_rate is applied.
      rope_theta: new base of the rotary embedding; None keeps that of the model.
      mesh: sizes of the mesh axes.
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
    """The conditions for moving on to the next rung.

    Attributes:
      max_loss_increase: how much the mean held-out loss inside the original window may exceed that of the pretrained
        model, in nats per token.
      min_passkey_accuracy: fraction of passkeys that must be found at the rung's length; 0 skips this check.
      passkey_trials: number of passkeys, at distances spread over the context.
      max_rounds: how often a rung is trained before the ladder fails.
    """

    max_loss_increase: float = 0.05
    min_passkey_accuracy: float = 0.0
    passkey_trials: int = 20
    max_rounds: int = 3

    def __post_init__(self):
        if not math.isfinite(self.max_loss_increase):
            raise UserError(
                f"Gate.max_loss_increase is {self.max_loss_increase}, expected a finite number: change it"
            )
        check_sizes("Gate", passkey_trials=self.passkey_trials, max_rounds=self.max_rounds)
        if not 0 <= self.min_passkey_accuracy <= 1:
            raise UserError(
                f"Gate.min_passkey_accuracy is {self.min_passkey_accuracy}, expected a fraction from 0 to 1: change it"
            )


class Stopped(Exception):
    """A rung was asked to stop (SIGTERM, Ctrl-C) and has saved a checkpoint."""


@dataclasses.dataclass(frozen=True)
class Ladder:
    """Trains the rungs one after the other; a job for `train`.

    Attributes:
      trainer: the settings shared by all rungs; its init_from is the pretrained model. Its steps, seq_len,
        context_length and rope_scaling are replaced for each rung.
      rungs: the stages, each with a longer context than the last.
      rope_scaling: the type and its settings without a factor: {"rope_type": "yarn"}.
      gate: None: every rung is trained once, without checks.
      scale_learning_rate: True: the learning rate of a rung is divided by sqrt(context_length / original window).
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
        for name in ("context_length", "rope_scaling"):
            if getattr(self.trainer, name) is not None:
                raise UserError(
                    f"Ladder.trainer has a {name}, which each rung replaces: leave it out, and set Rung.context_length "
                    "and Ladder.rope_scaling"
                )
        if "factor" in self.rope_scaling:
            raise UserError(
                "Ladder.rope_scaling has a factor: leave it out, each rung's follows from its context_length"
            )

    def run(self, workdir: str) -> str | None:
        """Trains all rungs and returns the workdir of the last round.

        Returns None if asked to stop earlier; the run has then saved a checkpoint and can be resumed.

        Raises:
          UserError: a setting is wrong, or a rung did not pass its gate within Gate.max_rounds.
        """
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
                trainer = self.trainer_for(rung, source, original, number)
                verdict = self._climb(trainer, folder, original, baseline)
                source = folder
                if verdict is None:
                    break
                log.warning("rung %d, round %d: %s", rung.context_length, number, verdict)
            else:
                raise UserError(
                    f"rung {rung.context_length} did not pass its gate in {quantity(number + 1, 'round')} ({verdict}); "
                    "raise Rung.steps or Gate.max_rounds, or loosen the gate. All rounds are kept in the workdir"
                )
        if jax.process_index() == 0:
            passed = "" if self.gate is None else " and passed its gate"
            next_command = statements.following(source, workdir)
            print(f"every rung is done{passed}; {next_command}", file=sys.stderr, flush=True)
        return source

    @naming({"rope_scaling": "Ladder.rope_scaling", "context_length": "Rung.context_length"})
    def _check_rungs(self, source: str) -> int:
        """Returns the original window. Checks every rung, so that mistakes show before the first one is trained."""
        model = convert.source(source, self._format(source)).model
        original = original_window(model)
        for rung in self.rungs:
            trainer = self.trainer_for(rung, source, original, 0)
            division.mesh_of(trainer)
            extend.extend_model(model, trainer.rope_scaling, trainer.context_length)
        return original

    def trainer_for(self, rung: Rung, source: str, original: int, number: int) -> Trainer:
        """The trainer of one round.

        A repeated round starts from a model that already has the rung's scaling, so it sets none; its seed differs so
        that it trains on the data in another order.
        """
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
            init_format=self._format(source),
            steps=rung.steps,
            seq_len=rung.context_length,
            context_length=rung.context_length,
            rope_scaling=scaling if number == 0 else None,
            optimizer=optimizer,
            seed=self.trainer.seed + number,
            **{name: value for name, value in given.items() if value is not None},
        )

    def _format(self, path: str) -> str | None:
        """The format of the model that the ladder starts from; None, detected, for the workdirs of its rounds."""
        return self.trainer.init_format if path == self.trainer.init_from else None

    def _climb(self, trainer: Trainer, folder: str, original: int, baseline: float) -> str | None:
        """Trains one round. Returns None if it passes the gate, else the reason why it does not."""
        done = os.path.join(folder, "gate.json")
        if os.path.exists(done):
            return _read_json(done)["verdict"]
        if trainer.run(folder).step < trainer.last_step:
            raise Stopped
        verdict = None if self.gate is None else self._verdict(folder, trainer.seq_len, original, baseline)
        _write_json(done, {"verdict": verdict})
        return verdict

    # ------------------------------------------------------------------------------------------------------ the gate

    def _baseline(self, workdir: str, source: str, original: int) -> float:
        """Held-out loss of the pretrained model inside its original window; stored for a ladder that is resumed."""
        kept = os.path.join(workdir, "baseline.json")
        if os.path.exists(kept):
            return _read_json(kept)["loss"]
        with self._loaded(source) as (model, params, mesh):
            loss = self._short_loss(model, params, original, mesh)
        if loss is None:
            raise UserError(
                "Ladder.gate compares losses on held-out text and there is none: set eval_fraction"
            )
        if not math.isfinite(loss):
            raise UserError(f"the loss of {source} on held-out text is {loss}: choose another Trainer.init_from")
        _write_json(kept, {"loss": loss, "context_length": original})
        return loss

    def _verdict(self, folder: str, length: int, original: int, baseline: float) -> str | None:
        assert self.gate is not None
        with self._loaded(folder) as (model, params, mesh):
            loss = self._short_loss(model, params, original, mesh)
            assert loss is not None, "there was one for the baseline"
            if not loss <= baseline + self.gate.max_loss_increase:  # NaN passes no gate
                return (
                    f"loss inside the original window is {loss:.4f}, {loss - baseline:.4f} above the pretrained model's"
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
        """A checkpoint on the trainer's own mesh, not the rung's, so that all rungs are evaluated on the same rows."""
        mesh = division.mesh_of(self.trainer)
        with jax.set_mesh(mesh):
            model, params = convert.load(path, format=self._format(path), dtype="float32", mesh=mesh)
            yield self.trainer.adjusted(model), params, mesh

    def _short_loss(self, model: Decoder, params: Any, original: int, mesh: Mesh) -> float | None:
        short = dataclasses.replace(self.trainer, seq_len=original)
        division.check(short, mesh)
        return short.held_out_loss(model, {"params": params}, mesh)


def original_window(model: Decoder) -> int:
    """The context window in tokens that a model was pretrained with, to which every scaling factor is relative."""
    windows = [rope.original_max_position_embeddings for rope, _ in extend.rotaries(model)]
    return next((window for window in windows if window is not None), model.max_position_embeddings)


def _read_json(path: str) -> dict[str, Any]:
    with open(path) as file:
        return json.load(file)


def _write_json(path: str, value: dict[str, Any]) -> None:
    """Writes the file atomically on process 0, so that a kill cannot leave a partial file."""
    if jax.process_index() == 0:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(f"{path}.new", "w") as file:
            json.dump(value, file)
        os.replace(f"{path}.new", path)
