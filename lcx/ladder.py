"""The ladder: a context extended in rungs, each a training run that starts from the one before.

Every rung states its length; its scale is always relative to the original window, never to the rung before
(2K -> 8K -> 16K -> 32K are factors 4, 8, 16 of 2K). With a gate, a rung is repeated until the model has earned the
next one: its loss inside the old window has recovered, and it finds a passkey at the new length, which is how Llama 3.1
went from 8K to 128K in six stages (arXiv 2407.21783, section 3.4.2).

In the workdir each rung has a workdir of its own, `8192/round_0`; a rung that is done is not done again, and one that
was cut short goes on.
"""

import dataclasses
import json
import logging
import os
import pathlib
from typing import Any

import jax
from jax.sharding import Mesh

from lcx import sharding
from lcx.errors import UserError
from lcx.model import Decoder
from lcx.trainer import Trainer

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Rung:
    """One length of the ladder. What is None comes from the Ladder's trainer.

    Attributes:
      context_length: tokens of a row, and the model's new window.
      learning_rate: the base rate; the rung trains at learning_rate / sqrt(context_length / original window).
    """

    context_length: int
    steps: int
    batch_size: int | None = None
    accumulation: int | None = None
    learning_rate: float | None = None
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
    """

    trainer: Trainer
    rungs: tuple[Rung, ...]
    rope_scaling: dict
    gate: Gate | None = None

    def __post_init__(self):
        lengths = [rung.context_length for rung in self.rungs]
        if not lengths or lengths != sorted(set(lengths)):
            raise UserError(
                f"Ladder.rungs have context lengths {lengths}: expected at least one, each longer than the last"
            )
        if self.trainer.init_from is None:
            raise UserError("Ladder.trainer has no init_from: a ladder extends a pretrained model")
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
        original = original_window(source)
        baseline = None if self.gate is None else self._baseline(workdir, source, original)
        for rung in self.rungs:
            for number in range(1 if self.gate is None else self.gate.max_rounds):
                folder = os.path.join(workdir, str(rung.context_length), f"round_{number}")
                verdict = self._climb(rung, folder, source, original, baseline)
                source = folder
                if verdict is None:
                    break
                log.warning("rung %d, round %d: %s", rung.context_length, number, verdict)
            else:
                assert self.gate is not None
                raise UserError(
                    f"rung {rung.context_length} did not pass its gate in {self.gate.max_rounds} rounds ({verdict}); "
                    "raise Rung.steps or Gate.max_rounds, or loosen the gate. All rounds are kept in the workdir"
                )
        return source

    def _climb(
        self, rung: Rung, folder: str, source: str, original: int, baseline: float | None
    ) -> str | None:
        """Trains one round; None when the gate opens, else why it stays shut."""
        done = pathlib.Path(folder) / "gate.json"
        if done.exists():
            return json.loads(done.read_text())["verdict"]
        trainer = self._trainer_for(rung, source, original)
        os.makedirs(folder, exist_ok=True)
        run = trainer.run(folder)
        if run.step < trainer.steps:
            raise Stopped
        verdict = (
            None
            if self.gate is None
            else self._verdict(run.model, run.merged_params(), rung, original, baseline)
        )
        if jax.process_index() == 0:
            done.write_text(json.dumps({"verdict": verdict}))
        return verdict

    def _trainer_for(self, rung: Rung, source: str, original: int) -> Trainer:
        scale = rung.context_length / original
        optimizer = dataclasses.replace(self.trainer.optimizer, context_scale=max(scale, 1.0))
        if rung.learning_rate is not None:
            optimizer = dataclasses.replace(optimizer, learning_rate=rung.learning_rate)
        given = {name: getattr(rung, name) for name in ("batch_size", "accumulation", "mesh")}
        return dataclasses.replace(
            self.trainer,
            init_from=source,
            steps=rung.steps,
            seq_len=rung.context_length,
            context_length=rung.context_length,
            rope_scaling={**self.rope_scaling, "factor": scale, "original_max_position_embeddings": original},
            optimizer=optimizer,
            **{name: value for name, value in given.items() if value is not None},
        )

    # ------------------------------------------------------------------------------------------------------ the gate

    def _baseline(self, workdir: str, source: str, original: int) -> float:
        """Held-out loss of the pretrained model inside its own window; kept for a ladder that is resumed."""
        kept = pathlib.Path(workdir) / "baseline.json"
        if kept.exists():
            return json.loads(kept.read_text())["loss"]
        from lcx.convert.api import load

        mesh = self.trainer.mesh.build()
        model, params = load(source, dtype="float32", mesh=mesh)
        loss = self._short_loss(model, params, original, mesh)
        if jax.process_index() == 0:
            kept.write_text(json.dumps({"loss": loss, "context_length": original}))
        return loss

    def _short_loss(self, model: Decoder, params: Any, original: int, mesh: Mesh) -> float:
        short = dataclasses.replace(self.trainer, seq_len=original, steps=1)
        with jax.set_mesh(mesh):
            return short.held_out_loss(model, {"params": params}, mesh)

    def _verdict(
        self, model: Decoder, params: Any, rung: Rung, original: int, baseline: float | None
    ) -> str | None:
        gate = self.gate
        assert gate is not None and baseline is not None
        mesh = (rung.mesh or self.trainer.mesh).build()
        loss = self._short_loss(model, params, original, mesh)
        if loss > baseline + gate.max_loss_increase:
            return f"loss inside the original window is {loss:.4f}, {loss - baseline:.4f} above that of the start"
        if gate.min_passkey_accuracy > 0:
            from lcx.evals.passkey import Passkey

            search = Passkey(context_length=rung.context_length, num_distances=gate.passkey_trials, trials=1)
            found = search(model, params, self.trainer.data.load_tokenizer())["mean_rate"]
            if found < gate.min_passkey_accuracy:
                return f"passkey success is {found:.2f}, expected {gate.min_passkey_accuracy:.2f}"
        return None


def original_window(path: str) -> int:
    """The window a model was pretrained with: what every factor is relative to."""
    from lcx.convert.api import SOURCES, detect

    model = SOURCES[detect(path)](path).model
    ropes = [getattr(block.mixer, "rope", None) for stage in model.stages for block in stage.pattern]
    windows = [rope.original_max_position_embeddings for rope in ropes if rope is not None]
    return next((window for window in windows if window is not None), model.max_position_embeddings)
