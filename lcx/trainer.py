"""The training run, top to bottom: from a configuration to checkpoints.

Pretraining, extending a context, fine-tuning and LoRA are the same loop; what differs is where the weights come from,
which of them train, and the objective. The order of events in `Trainer.run` is the order of this file.
"""

import collections
import dataclasses
import logging
import math
import os
import pathlib
import time
from collections.abc import Callable
from typing import Any, Protocol

import jax
import numpy as np

from lcx import __version__, describe, hardware, objectives, sharding, train_step
from lcx import lora as lora_lib
from lcx import model as model_lib
from lcx.checkpoint import Checkpointer
from lcx.data import BatchIterator, Dataset, Mixture
from lcx.errors import UserError
from lcx.metrics import MetricsLogger
from lcx.model import Decoder
from lcx.optim import AdamW
from lcx.stopping import StopRequest
from lcx.train_step import State

log = logging.getLogger(__name__)

IN_FLIGHT = 2  # steps queued on the devices: enough to hide the host; forced CPU devices deadlock with dozens


class Job(Protocol):
    """What `train` runs: a Trainer, a Ladder, or your own."""

    def run(self, workdir: str) -> Any: ...


def train(
    *, workdir: str, job: Job, config_text: str = "", operative_config: Callable[[], str] | None = None
) -> None:
    """Runs the job that the .gin file binds to `train.job`. Its configuration is kept in WORKDIR/config.gin."""
    folder = pathlib.Path(workdir).expanduser()
    folder.mkdir(parents=True, exist_ok=True)
    if config_text and jax.process_index() == 0:
        (folder / "config.gin").write_text(config_text)
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
      init_from: a Hugging Face folder, an lcx checkpoint or workdir.
      rope_scaling: with init_from, as Hugging Face writes it: {"rope_type": "yarn", "factor": 4.0}.
      context_length: with init_from, the new window in tokens; by default what rope_scaling gives.
      dtype: of activations ("bfloat16", "float32"); None keeps the model's. Master weights are float32.
      remat: which activations are recomputed: none, dots, full; None keeps the model's.
      lora: train low-rank pairs instead of the weights.
      accumulation: micro-batches per step.
      mesh: sizes of the mesh axes.
      eval_every: steps between evaluations of the held-out loss; 0 for none but the last. eval_batches of them.
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
    dtype: str | None = None
    remat: str | None = None
    optimizer: AdamW = AdamW()
    lora: lora_lib.LoRA | None = None
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
        if self.init_from is None and (self.rope_scaling is not None or self.context_length is not None):
            raise UserError(
                "Trainer.rope_scaling and context_length change a pretrained model: set Trainer.init_from"
            )
        for name in (
            "steps",
            "batch_size",
            "seq_len",
            "accumulation",
            "log_every",
            "checkpoint_every",
            "eval_batches",
        ):
            if getattr(self, name) < 1:
                raise UserError(f"Trainer.{name} is {getattr(self, name)}, expected at least 1")
        if self.batch_size % self.accumulation:
            raise UserError(
                f"Trainer.batch_size {self.batch_size} is not a multiple of accumulation {self.accumulation}"
            )

    def run(self, workdir: str) -> "Run":
        """Trains to the last step, or to a request to stop. Goes on with what is in the workdir."""
        mesh = self.mesh.build()
        self._check_rows(mesh)
        with (
            jax.set_mesh(mesh),
            Checkpointer(
                os.path.join(workdir, "checkpoints"), max_to_keep=self.keep_checkpoints
            ) as checkpointer,
        ):
            batches = self._batches("train")
            run = self._resume(checkpointer, mesh, batches) or self._start(mesh)
            if run.model.max_position_embeddings < self.seq_len:
                log.warning(
                    "Trainer.seq_len %d exceeds the model's window of %d tokens: set rope_scaling and context_length",
                    self.seq_len,
                    run.model.max_position_embeddings,
                )
            with _metrics(self, workdir, run.step) as metrics, StopRequest() as stop:
                return self._loop(run, mesh, batches, checkpointer, metrics, stop)

    # ---------------------------------------------------------------------------------------------- initial state

    def _resume(self, checkpointer: Checkpointer, mesh, batches: BatchIterator) -> "Run | None":
        """The newest checkpoint that verifies, on this mesh, whatever mesh wrote it."""
        if not checkpointer.steps():
            return None
        _, _, documents = checkpointer.restore({})
        model = self._adjusted(describe.from_json(documents["meta"]["model"]))
        run = self._prepared(model, model_lib.abstract_params(model, mesh=mesh), mesh)
        step, state, documents = checkpointer.restore(run.abstract)
        batches.restore(documents["data"])
        if step < self.steps:
            log.info("resuming at step %d of %d", step, self.steps)
        return dataclasses.replace(run, state=state, step=step, saved=step)

    def _start(self, mesh) -> "Run":
        """A warm start from init_from, or random weights."""
        if self.init_from is None:
            assert self.model is not None
            model = self._adjusted(self.model)
            params = model_lib.init_params(model, jax.random.key(self.seed), mesh=mesh)
        else:
            from lcx.convert.api import load

            model, params = load(
                self.init_from,
                dtype="float32",
                mesh=mesh,
                rope_scaling=self.rope_scaling,
                context_length=self.context_length,
            )
            model = self._adjusted(model)
        weights = {"params": params}
        if self.lora is not None:
            weights["lora"] = self.lora.init(jax.random.key(self.seed), model, mesh=mesh)
        run = self._prepared(model, model_lib.abstract_params(model, mesh=mesh), mesh)
        state = {**weights, "opt_state": train_step.init_opt_state(run.optimizer, weights, run.abstract)}
        return dataclasses.replace(run, state=state)

    def _adjusted(self, model: Decoder) -> Decoder:
        """The model with the run's dtype and remat."""
        changes = {
            name: getattr(self, name) for name in ("dtype", "remat") if getattr(self, name) is not None
        }
        return model.clone(parent=None, **changes)

    def _prepared(self, model: Decoder, abstract_params: Any, mesh) -> "Run":
        weights = {"params": abstract_params}
        if self.lora is not None:
            weights["lora"] = self.lora.abstract(model, mesh=mesh)
        optimizer = self.optimizer.build(weights[train_step.trained(weights)], self.steps)
        abstract = train_step.abstract_state(weights, optimizer, mesh)
        return Run(model, optimizer, abstract)

    # -------------------------------------------------------------------------------------------------- the loop

    def _loop(
        self, run: "Run", mesh, batches, checkpointer, metrics: MetricsLogger, stop: StopRequest
    ) -> "Run":
        step_fn = train_step.make_step(
            run.model,
            run.optimizer,
            self.objective,
            self.optimizer.learning_rates(self.steps),
            accumulation=self.accumulation,
            abstract=run.abstract,
        )
        meter = Meter(run.model, self.batch_size * self.seq_len, self.seq_len, self.log_every)
        state, in_flight = run.state, collections.deque[tuple[int, dict]]()
        step, saved = run.step, run.saved
        while step < self.steps and not stop.requested(step):
            batch = sharding.shard_batch(next(batches), mesh)
            state, values = step_fn(state, batch, np.int32(step))
            step += 1
            in_flight.append((step, values))
            if len(in_flight) >= IN_FLIGHT:
                meter.record(*in_flight.popleft(), metrics)
            checkpointer.poll()
            last = step == self.steps
            if self.eval_every and step % self.eval_every == 0 and not last:
                _drain(in_flight, meter, metrics)
                with meter.paused():
                    metrics.log(step, {"eval_loss": self.held_out_loss(run.model, state, mesh)})
            if step % self.checkpoint_every == 0 and not last:
                _drain(
                    in_flight, meter, metrics
                )  # a state is saved only once its losses are known to be finite
                with meter.paused():
                    saved = step if self._save(checkpointer, run, state, step, batches) else saved
        _drain(in_flight, meter, metrics)
        if step > saved:
            self._save(checkpointer, run, state, step, batches, wait=True)
        if step == self.steps and step > run.step:
            metrics.log(step, {"eval_loss": self.held_out_loss(run.model, state, mesh)})
        return dataclasses.replace(run, state=state, step=step, saved=step)

    def _save(
        self, checkpointer: Checkpointer, run: "Run", state: State, step: int, batches, *, wait=False
    ) -> bool:
        meta = {
            "model": describe.to_json(run.model),
            "tokenizer": self.data.load_tokenizer().to_json(),
            "seq_len": self.seq_len,
            "lcx_version": __version__,
            "data": describe.to_json(self.data),
        }
        if self.lora is not None:
            meta["lora"] = describe.to_json(self.lora)
        return checkpointer.save(step, state, json={"data": batches.state(), "meta": meta}, wait=wait)

    def held_out_loss(self, model: Decoder, state: State, mesh) -> float:
        """Mean nll per token over the first eval_batches of the held-out data; nan when nothing is held out."""
        try:
            held_out = self._batches("eval")
        except UserError as e:
            log.warning("no evaluation: %s", e)
            return math.nan
        sums = train_step.make_sums(model, self.objective)
        weights = {name: state[name] for name in ("params", "lora") if name in state}
        loss = weight = 0.0
        with held_out:
            for _, batch in zip(range(self.eval_batches), held_out, strict=False):
                batch_loss, batch_weight = sums(weights, sharding.shard_batch(batch, mesh))
                loss, weight = loss + float(batch_loss), weight + float(batch_weight)
        return loss / weight if weight else math.nan

    def _batches(self, split: str) -> BatchIterator:
        return self.data.batches(
            split,
            global_batch_size=self.batch_size // (1 if split == "train" else self.accumulation),
            seq_len=self.seq_len,
            seed=self.seed,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
        )

    def _check_rows(self, mesh) -> None:
        rows, parts = self.batch_size // self.accumulation, mesh.shape["data"] * mesh.shape["fsdp"]
        if rows % parts:
            raise UserError(
                f"{rows} rows per micro-batch (batch_size {self.batch_size} / accumulation {self.accumulation}) do not "
                f"divide over data x fsdp = {parts} devices; change Trainer.batch_size, accumulation or the mesh"
            )
        if self.seq_len % mesh.shape["context"]:
            raise UserError(
                f"seq_len {self.seq_len} does not divide over context = {mesh.shape['context']} devices"
            )


@dataclasses.dataclass
class Run:
    """What a run holds: the model, its optimizer, the shapes and shardings of the state, and the state itself."""

    model: Decoder
    optimizer: Any
    abstract: State
    state: State = dataclasses.field(default_factory=dict)
    step: int = 0
    saved: int = -1  # the newest step on disk

    def merged_params(self) -> Any:
        """The parameters with the low-rank pairs added, if there are any."""
        if "lora" not in self.state:
            return self.state["params"]
        return lora_lib.merge(self.state["params"], self.state["lora"])


class Meter:
    """Turns the values of finished steps into metrics: a mean loss, tokens per second, MFU. Stops on a bad loss."""

    def __init__(self, model: Decoder, tokens_per_step: int, seq_len: int, every: int):
        self._every = every
        self._tokens = tokens_per_step
        self._flops = tokens_per_step * model_lib.flops_per_token(model, seq_len)
        self._peak = hardware.peak_flops()
        self._losses: list[float] = []
        self._since: float | None = None  # the first step compiles: its time says nothing
        self._timed = 0

    def record(self, step: int, values: dict[str, jax.Array], metrics: MetricsLogger) -> None:
        """Waits for a step, checks it, and logs every `every` steps.

        Raises:
          UserError: the loss or the gradient is not finite.
        """
        numbers = {name: float(value) for name, value in values.items()}
        for name in ("loss", "grad_norm"):
            if not math.isfinite(numbers[name]):
                raise UserError(
                    f"{name} is {numbers[name]} at step {step}: the last checkpoint before it is kept; "
                    "lower AdamW.learning_rate, lengthen warmup_steps or look at the data of this step"
                )
        self._losses.append(numbers["loss"])
        now = time.perf_counter()
        if self._since is None:
            self._since = now
        else:
            self._timed += 1
        if step % self._every == 0:
            numbers["loss"] = sum(self._losses) / len(self._losses)
            if self._timed:
                rate = self._timed / (now - self._since)
                numbers["tokens_per_second"] = rate * self._tokens
                numbers["mfu"] = rate * self._flops / self._peak
            metrics.log(step, numbers)
            self._losses, self._since, self._timed = [], now, 0

    def paused(self) -> "_Paused":
        """Context in which time does not count as training."""
        return _Paused(self)

    def shift(self, seconds: float) -> None:
        if self._since is not None:
            self._since += seconds


class _Paused:
    def __init__(self, meter: Meter):
        self._meter = meter

    def __enter__(self):
        self._start = time.perf_counter()

    def __exit__(self, *_):
        self._meter.shift(time.perf_counter() - self._start)


def _drain(in_flight: collections.deque, meter: Meter, metrics: MetricsLogger) -> None:
    while in_flight:
        meter.record(*in_flight.popleft(), metrics)


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
