"""The training run, top to bottom: from a configuration to checkpoints.

Pretraining, extending a context, fine-tuning and LoRA are the same loop; what differs is where the weights come from,
which of them train, and the objective. The order of events in `Trainer.run` is the order of this file.
"""

import contextlib
import dataclasses
import functools
import logging
import math
import os
import pathlib
from collections.abc import Callable
from typing import Any, Protocol

import jax
import numpy as np

from lcx import lora as lora_lib
from lcx import model as model_lib
from lcx import objectives, paths, sharding
from lcx.checkpoint import Checkpointer, as_stored, model_json
from lcx.convert import start as convert
from lcx.data import BatchIterator, BatchSpec, Dataset, Mixture, Opened
from lcx.errors import UserError
from lcx.linearize import Linearize, check_linear
from lcx.locks import LOCK, only_writer
from lcx.model import Decoder
from lcx.optim import AdamW
from lcx.training import resume_check, statements
from lcx.training import step as train_step
from lcx.training.distributed import join
from lcx.training.logger import MODES, MetricsLogger
from lcx.training.memory import check_fits
from lcx.training.meter import Meter, NotFiniteError
from lcx.training.run import Run, prepared
from lcx.training.signals import StopRequest
from lcx.training.step import State
from lcx.version import __version__

log = logging.getLogger(__name__)

DTYPES = ("float32", "bfloat16")  # float16 would need loss scaling
ADVICE = "lower AdamW.learning_rate, lengthen AdamW.warmup_steps, or look at the data of this step"
_COUNTS = "steps batch_size seq_len accumulation log_every checkpoint_every keep_checkpoints eval_batches"
_LEAST = {"eval_every": 0} | dict.fromkeys(_COUNTS.split(), 1)


class Job(Protocol):
    """What `train` runs: a Trainer, a Ladder, or your own, which may have `check(workdir)` too.

    That is called before anything is written; it raises UserError for a workdir of other settings."""

    def run(self, workdir: str) -> Any: ...


def train(
    *,
    workdir: str,
    job: Job,
    config_text: str = "",
    operative_config: Callable[[], str] | None = None,
    distributed: bool = False,
    coordinator_address: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
) -> None:
    """Runs the job that the .gin file binds to `train.job`. Its configuration is kept in WORKDIR/config.gin.

    With `distributed`, or a coordinator_address, it first joins the other processes (join).
    """
    if distributed or coordinator_address is not None:
        join(coordinator_address, num_processes, process_id)
    folder = paths.destination(workdir, "--workdir")
    if (check := getattr(job, "check", None)) is not None:
        check(str(folder))
    with contextlib.ExitStack() as stack:
        if jax.process_index() == 0:
            folder.mkdir(parents=True, exist_ok=True)
            stack.enter_context(only_writer(folder / LOCK, of=str(folder), setting="--workdir"))
            resume_check.keep_config(folder, config_text)
        job.run(str(folder))
        if operative_config is not None and jax.process_index() == 0:
            (folder / "operative_config.gin").write_text(operative_config())


@dataclasses.dataclass(frozen=True)
class Trainer:
    """One training run.

    Weights come from the first of these that there is: the newest good checkpoint in the workdir (the run goes on),
    `init_from` (a warm start: every tensor must find its place), the random initialisation of `model`.

    Attributes:
      data: what to train on; its held-out part is evaluated.
      steps: optimizer updates in all.
      batch_size: rows of the global batch, over all devices and micro-batches.
      seq_len: tokens of a row.
      model: the model to initialise at random. Not together with init_from.
      init_from: a Hugging Face folder or the name of a model on the hub, an lcx checkpoint or workdir.
      rope_scaling: with init_from, as Hugging Face writes it: {"rope_type": "yarn", "factor": 4.0}.
      context_length: with init_from, the new window in tokens; by default what rope_scaling gives.
      linearize: with init_from, linear attention in place of its softmax attention.
      expects_linear: this run goes on from a linearized model; one that is still softmax is an error.
      dtype: of activations ("bfloat16", "float32"); None is the model's, float32 with init_from. What trains is
        float32; weights that do not train stay as they are stored.
      remat: which activations are recomputed: none, dots, full; None keeps the model's.
      lora: train low-rank pairs instead of the weights.
      adapter: with init_from, a PEFT adapter of it that trains on: its pairs, with their rank, alpha and modules (which
        `lora`, if it is set, must agree with), and what it holds beside them.
      accumulation: micro-batches per step.
      mesh: sizes of the mesh axes.
      eval_every: steps between evaluations of the held-out loss; 0 for none but the last.
      eval_batches: batches of batch_size rows that an evaluation reads, or all there are.
      wandb: auto, online, offline or off.
    """

    data: Dataset | Mixture
    steps: int
    batch_size: int
    seq_len: int
    model: Decoder | None = None
    init_from: str | None = None
    rope_scaling: dict | None = None
    context_length: int | None = None
    linearize: Linearize | None = None
    expects_linear: bool = False
    dtype: str | None = None
    remat: str | None = None
    optimizer: AdamW = AdamW()
    lora: lora_lib.LoRA | None = None
    adapter: str | None = None
    objective: Callable = objectives.next_token
    accumulation: int = 1
    mesh: sharding.MeshShape = sharding.MeshShape()
    seed: int = 0
    log_every: int = 10
    eval_every: int = 0
    eval_batches: int = 16
    checkpoint_every: int = 500
    keep_checkpoints: int = 3
    wandb: str = "off"

    def __post_init__(self):
        if (self.model is None) == (self.init_from is None):
            found = "neither" if self.model is None else "both"
            raise UserError(f"Trainer.model and Trainer.init_from: expected one of the two, found {found}")
        changes = (self.rope_scaling, self.context_length, self.linearize, self.expects_linear or None)
        if self.init_from is None and any(change is not None for change in changes):
            raise UserError(
                "Trainer.rope_scaling, context_length, linearize (expects_linear) change a pretrained model: "
                "set Trainer.init_from"
            )
        if self.adapter is not None and (self.init_from is None or self.linearize is not None):
            raise UserError(
                "Trainer.adapter belongs to a pretrained model as it is: set Trainer.init_from, and linearize to None"
            )
        for name, least in _LEAST.items():
            if getattr(self, name) < least:
                raise UserError(f"Trainer.{name} is {getattr(self, name)}, expected at least {least}")
        for name, known in {"dtype": DTYPES, "remat": tuple(model_lib.REMAT), "wandb": MODES}.items():
            if getattr(self, name) not in (None, *known):
                raise UserError(
                    f"Trainer.{name} is {getattr(self, name)!r}, expected one of {', '.join(known)}"
                )
        if (self.optimizer.warmup_steps or 0) > self.steps:
            raise UserError(
                f"AdamW.warmup_steps is {self.optimizer.warmup_steps}, more than the {self.steps} steps of the run: "
                "lower it, or raise Trainer.steps"
            )
        if self.batch_size % self.accumulation:
            raise UserError(
                f"Trainer.batch_size {self.batch_size} is not a multiple of accumulation {self.accumulation}"
            )

    def run(self, workdir: str) -> Run:
        """Trains to the last step, or to a request to stop. Goes on with what is in the workdir."""
        mesh = self.mesh.build()
        self.check_rows(mesh)
        _ = self._opened  # tokenises; a mistake in the data shows before a model is read
        folder = os.path.join(workdir, "checkpoints")
        with (
            jax.set_mesh(mesh),
            Checkpointer(folder, max_to_keep=self.keep_checkpoints) as checkpointer,
        ):
            run = self._resume(checkpointer, mesh, workdir) or self._start(mesh)
            with (
                self._batches("train", run.model, mesh) as batches,
                _metrics(self, workdir, run.step) as metrics,
                StopRequest() as stop,
            ):
                if run.data is not None:
                    batches.restore(run.data)
                for line in statements.opening(self, run, self._opened, mesh, workdir):
                    metrics.message(line)
                try:
                    return self._loop(run, mesh, batches, checkpointer, metrics, stop, workdir)
                except NotFiniteError as bad:
                    raise UserError(f"{bad}: {_retreat(checkpointer, bad.step)}; {ADVICE}") from None

    def check(self, workdir: str) -> None:
        """Raises UserError when the workdir holds a run that began with other settings, or no run, and when a new run
        would not start from the kind of model that it expects."""
        with Checkpointer(os.path.join(workdir, "checkpoints")) as checkpointer:
            if checkpointer.steps():
                self._check_origin(checkpointer.restore({})[2], workdir)
                return
        if self.expects_linear and self.init_from is not None and self.linearize is None:
            model = convert.model_at(self.init_from)
            check_linear(model, seq_len=self.seq_len, where=self.init_from)

    def _check_origin(self, documents: dict[str, Any], workdir: str) -> None:
        if not {"data", "origin"} <= documents.keys():
            raise UserError(
                f"{workdir} holds a model, not a run: set Trainer.init_from to it, and another --workdir"
            )
        resume_check.check(documents["origin"], self._origin(), workdir)

    # ---------------------------------------------------------------------------------------------- initial state

    def _resume(self, checkpointer: Checkpointer, mesh, workdir: str) -> Run | None:
        """The newest checkpoint that verifies, on this mesh, whatever mesh wrote it."""
        if not checkpointer.steps():
            return None
        step, _, documents = checkpointer.restore({})
        self._check_origin(documents, workdir)
        model = self.adjusted(self.model or model_json.from_json(documents["meta"]["model"]))
        lora = self.lora if self.adapter is None else model_json.from_json(documents["meta"]["lora"])
        stored = as_stored(model_lib.abstract_params(model, mesh=mesh), checkpointer.directory / str(step))
        run = prepared(self.optimizer, self.steps, model, mesh, lora, stored)
        step, state, documents = checkpointer.restore(run.abstract)
        return dataclasses.replace(
            run,
            state=state,
            step=step,
            data=documents["data"],
            losses=documents["meter"]["losses"],
            before=documents.get("settings") or {},
            carried=documents["meta"].get("hf_config") or {},
        )

    def _start(self, mesh) -> Run:
        """A warm start from init_from, or random weights."""
        if self.init_from is None:
            assert self.model is not None
            model = self.adjusted(self.model)
            check_fits(prepared(self.optimizer, self.steps, model, mesh, self.lora).abstract, mesh)
            params = model_lib.init_params(model, jax.random.key(self.seed), mesh=mesh)
            begun = convert.Start(model, params, carried={}, lora=self.lora)
        else:
            begun = self.load(mesh)
            if self.expects_linear:
                check_linear(begun.model, seq_len=self.seq_len, where=self.init_from)
        model, lora = self.adjusted(begun.model), begun.lora
        run = prepared(self.optimizer, self.steps, model, mesh, lora, begun.params)
        weights = {"params": train_step.as_kept(begun.params, run.abstract["params"])}
        if lora is not None:
            weights["lora"] = begun.pairs or lora.init(jax.random.key(self.seed), model, mesh=mesh)
        opt_state = train_step.init_opt_state(run.optimizer, weights, run.abstract, run.trains)
        return dataclasses.replace(run, state={**weights, "opt_state": opt_state}, carried=begun.carried)

    def load(self, mesh) -> convert.Start:
        """The pretrained model with the changes that are asked for, and its parameters as they are stored."""
        assert self.init_from is not None
        begun = convert.start(
            self.init_from,
            mesh=mesh,
            rope_scaling=self.rope_scaling,
            context_length=self.context_length,
            adapter=self.adapter,
            lora=self.lora,
        )
        if self.linearize is None:
            return begun
        model, params = self.linearize(begun.model, begun.params, jax.random.key(self.seed))
        return dataclasses.replace(begun, model=model, params=params)

    def adjusted(self, model: Decoder) -> Decoder:
        """The model with the run's dtype and remat."""
        changes = {
            name: getattr(self, name) for name in ("dtype", "remat") if getattr(self, name) is not None
        }
        return model.clone(parent=None, **changes)

    def _origin(self) -> dict[str, Any]:
        return resume_check.record(
            model=self.model,
            init_from=self.init_from,
            rope_scaling=self.rope_scaling,
            context_length=self.context_length,
            linearize=self.linearize,
            lora=self.lora,
            adapter=self.adapter,
        )

    # -------------------------------------------------------------------------------------------------- the loop

    def _loop(
        self, run: Run, mesh, batches, checkpointer, metrics: MetricsLogger, stop: StopRequest, workdir: str
    ) -> Run:
        step_fn = train_step.make_step(
            run.model,
            run.optimizer,
            self.objective,
            self.optimizer.learning_rates(self.steps),
            accumulation=self.accumulation,
            abstract=run.abstract,
            trains=run.trains,
        )
        sizes = {"batch_size": self.batch_size, "seq_len": self.seq_len}
        meter = Meter(run.model, metrics, **sizes, every=self.log_every, last=self.steps, losses=run.losses)
        state, step = run.state, run.step
        stop.unsaved = False  # until the first step, which compiles
        while step < self.steps and not stop.requested(step):
            batch = sharding.shard_batch(next(batches), mesh)
            state, values = step_fn(state, batch, np.int32(step))
            stop.unsaved = True
            step += 1
            meter.add(step, values)
            checkpointer.poll()
            evaluate = self.eval_every and step % self.eval_every == 0
            save = step % self.checkpoint_every == 0
            if (evaluate or save) and step < self.steps:
                with meter.paused():  # what is saved is known to come from finite losses
                    if evaluate:
                        loss = self.held_out_loss(run.model, state, mesh)
                        metrics.log(step, {"eval_loss": loss})
                        state = {**state, "opt_state": self.optimizer.observe(state["opt_state"], loss)}
                    if save:
                        self._save(checkpointer, run, state, step, batches, meter)
        meter.drain()
        self._save(checkpointer, run, state, step, batches, meter, wait=True)
        if step == self.steps and step > run.step:
            metrics.log(step, {"eval_loss": self.held_out_loss(run.model, state, mesh)})
        metrics.message(statements.closing(workdir, step, self.steps))
        return dataclasses.replace(run, state=state, step=step)

    def _save(
        self,
        checkpointer: Checkpointer,
        run: Run,
        state: State,
        step: int,
        batches: BatchIterator,
        meter: Meter,
        *,
        wait: bool = False,
    ) -> None:
        """A failure is a warning, unless wait is set: then it is an error."""
        meta = {
            "model": model_json.to_json(run.model),
            "tokenizer": self._opened.tokenizer.to_json(),
            "seq_len": self.seq_len,
            "lcx_version": __version__,
            "data": model_json.to_json(self.data),
            "hf_config": run.carried,
            "lora": model_json.to_json(run.lora),
        }
        documents = {
            "meta": meta,
            "origin": self._origin(),
            "data": batches.state(),
            "meter": {"losses": meter.losses},
            "settings": resume_check.changeable(self),
        }
        checkpointer.save(step, state, json=documents, wait=wait)

    @functools.cached_property
    def _opened(self) -> Opened:
        """The data, which a run opens once."""
        return self.data.opened()

    def held_out_loss(self, model: Decoder, state: State, mesh) -> float:
        """Mean nll per token over the first eval_batches of the held-out data; nan when nothing is held out.

        Batches have batch_size rows whatever the accumulation, and every token weighs the same.
        """
        try:
            held_out = self._batches("eval", model, mesh)
        except UserError as e:
            log.warning("no evaluation: %s", e)
            return math.nan
        sums = train_step.make_sums(model, self.objective, self.accumulation)
        weights = train_step.weights_of(state)
        loss = weight = 0.0
        with held_out:
            for _, batch in zip(range(self.eval_batches), held_out, strict=False):
                batch_loss, batch_weight = sums(weights, sharding.shard_batch(batch, mesh))
                loss, weight = loss + float(batch_loss), weight + float(batch_weight)
        return loss / weight if weight else math.nan

    def _batches(self, split: str, model: Decoder, mesh) -> BatchIterator:
        index, count = sharding.process_rows(mesh)
        rows = (self.batch_size, self.seq_len, self.seed, index, count)
        return self._opened.batches(BatchSpec(split, *rows, vocab_size=model.vocab_size))

    def check_rows(self, mesh) -> None:
        """Raises UserError when a batch does not divide over the mesh."""
        rows, parts = self.batch_size // self.accumulation, mesh.shape["data"] * mesh.shape["fsdp"]
        if rows % parts:
            raise UserError(
                f"{rows} rows per micro-batch (batch_size {self.batch_size} / accumulation {self.accumulation}) do not "
                f"divide over data x fsdp = {parts} devices; change Trainer.batch_size, accumulation or the mesh"
            )
        if self.seq_len % mesh.shape["context"]:
            raise UserError(
                f"seq_len {self.seq_len} does not divide over context = {mesh.shape['context']} devices; "
                "change Trainer.seq_len or the mesh"
            )


def _retreat(checkpointer: Checkpointer, bad_step: int) -> str:
    """Which checkpoint to go on from. That of the step before is of the weights that gave the bad numbers."""
    with contextlib.suppress(UserError):
        checkpointer.close()  # a save may be under way
    checkpointer.reject(bad_step - 1)
    steps = checkpointer.steps()
    return f"the checkpoint of step {steps[-1]} is kept" if steps else "there is no checkpoint yet"


def _metrics(trainer: Trainer, workdir: str, step: int) -> MetricsLogger:
    config = pathlib.Path(workdir) / "config.gin"
    return MetricsLogger(
        workdir,
        total_steps=trainer.steps,
        mode=trainer.wandb,
        resume_step=step,
        print_every=trainer.log_every,
        config_text=config.read_text() if config.exists() else "",
    )
