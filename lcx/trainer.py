"""A training run from its configuration to its checkpoints.

Pretraining, context extension, fine-tuning and LoRA share the same loop. They differ in where the weights come from,
which of them train, and the objective. The methods below are in the order in which `Trainer.run` calls them.
"""

import contextlib
import dataclasses
import functools
import itertools
import logging
import os
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import jax
import numpy as np

from lcx import lora as lora_lib
from lcx import model as model_lib
from lcx import objectives, sharding
from lcx.checkpoint import Checkpointer, as_stored, model_json
from lcx.convert import start as convert
from lcx.data import BatchIterator, BatchSpec, Dataset, Mixture, Opened
from lcx.errors import UserError
from lcx.linearize import Linearize, check_linear
from lcx.locks import LOCK
from lcx.model import Decoder
from lcx.multihost.agreement import require_shared
from lcx.optim import AdamW
from lcx.pieces import Pieces
from lcx.training import (
    continued,
    division,
    doubtful,
    resume_check,
    same_data,
    settings,
    statements,
    workdirs,
)
from lcx.training import step as train_step
from lcx.training.logger import MetricsLogger, logger_of
from lcx.training.memory import check_fits
from lcx.training.meter import Meter, NotFiniteError, meter_of
from lcx.training.run import OPTIONAL_ITEMS, Run, prepared, with_state
from lcx.training.signals import StopRequest, interrupted
from lcx.training.step import State
from lcx.version import __version__

log = logging.getLogger(__name__)

ADVICE = "lower AdamW.learning_rate, lengthen AdamW.warmup_steps, or look at the data of this step"


class Job(Protocol):
    """What `train` runs: a Trainer, a Ladder, Blocks, or a class of your own.

    A job may also have a method `check(workdir)`. It is called before anything is written, and raises UserError if the
    workdir belongs to a run with other settings. A method `writes(folder)` returns the parts of the workdir that it
    writes to, of which each has one writer at a time; without it, that is the workdir.
    """

    def run(self, workdir: str) -> Any: ...


def train(
    *,
    workdir: str,
    job: Job,
    config_text: str = "",
    operative_config: Callable[[], str] | None = None,
) -> int:
    """Runs the job that the .gin file binds to `train.job`.

    Args:
      workdir: folder for checkpoints, metrics and the configuration, here or in a bucket (gs://, s3://).
      job: what to run.
      config_text: the configuration as text, written to WORKDIR/config.gin.
      operative_config: called at the end; returns the settings that were used, for WORKDIR/operative_config.gin.

    Returns:
      The exit status: 0, or 130 if Ctrl-C stopped the run.

    Raises:
      UserError: a setting is wrong, the workdir belongs to another run or another process writes to it.
    """
    with contextlib.ExitStack() as stack:
        copy_every = getattr(getattr(job, "trainer", job), "copy_every", None)
        folder = stack.enter_context(workdirs.opened(workdir, copy_every))
        if (check := getattr(job, "check", None)) is not None:
            check(str(folder))
        writes: Callable[[Path], Sequence[Path]] = getattr(job, "writes", lambda folder: (folder,))
        claims = writes(folder)
        if jax.process_index() == 0:
            stack.enter_context(workdirs.claimed(claims, config_text))
        require_shared(claims[0] / LOCK, "--workdir")
        job.run(str(folder))
        if operative_config is not None and jax.process_index() == 0:
            for claim in claims:
                (claim / "operative_config.gin").write_text(operative_config())
    return 128 + signal.SIGINT if interrupted() else 0


@dataclasses.dataclass(frozen=True)
class Trainer:
    """One training run.

    Weights come from the first of these that exists: the newest intact checkpoint in the workdir (the run is resumed),
    `init_from` (a warm start, for which every tensor of the model must be found), the random initialisation of `model`.

    Attributes:
      data: what to train on; its held-out part is used for evaluation.
      steps: total number of optimizer updates, over which the schedule extends.
      batch_size: rows of the global batch, over all devices and micro-batches (see training.division).
      seq_len: tokens per row.
      model: the model to initialise at random. Set either this or init_from.
      init_from: a Hugging Face folder, the name of a model on the hub, or an lcx checkpoint or workdir.
      rope_scaling: with init_from, in Hugging Face's format: {"rope_type": "yarn", "factor": 4.0}.
      context_length: with init_from, the new context window in tokens; None: what rope_scaling implies.
      linearize: with init_from, replace its softmax attention with linear attention.
      expects_linear: init_from must already be a linearized model; a softmax model is an error.
      dtype: of activations ("bfloat16", "float32"); None: that of `model`, or float32 with init_from. Weights that
        train are float32; weights that do not train keep the dtype in which they are stored.
      remat: which activations are recomputed in the backward pass: none, dots, full, host (as full, with the
        inputs of blocks in the memory of the host and the MLPs of long rows in tiles); None: as the model says.
      optimizer: AdamW with its schedule.
      init_optimizer: with init_from, continue its optimizer and its count of updates too (format 'two_mamba').
      lora: train low-rank matrices instead of the weights.
      adapter: with init_from, a PEFT adapter for it whose training continues: its low-rank matrices and any other
        weights it contains. Its rank, alpha and modules apply; `lora`, if set, must agree with them.
      init_format: with init_from, its format: a name, or for a family or format of your own "my_package.toy:FORMAT";
        None: detected.
      objective: the loss, see lcx.objectives.
      accumulation: micro-batches per step.
      piece_length: process each row in pieces of this many tokens, with the gradients of the whole row and the
        activations of one piece in memory (see lcx.pieces); None: whole rows.
      carry: with piece_length, what passes between pieces in the backward pass: "exact" gradients, or "stop": none
        (truncated backpropagation through time).
      stateful: row i of a batch continues where row i of the batch before ended, from the state that it left there; no
        gradient flows between batches (see training.row_state). The held-out loss reads every row by itself.
      borders: with piece_length, where the states between pieces wait for the backward pass: "device" or "host".
      mesh: sizes of the mesh axes.
      stop_at: end the run after this many updates, before the end of the schedule; None: after `steps`.
      seed: for the initialisation and the order of the data.
      log_every: steps between lines of metrics.
      eval_every: steps between evaluations of the held-out loss; 0: only at the end.
      eval_batches: batches of batch_size rows per evaluation; fewer if the held-out data is smaller.
      checkpoint_every: steps between checkpoints.
      keep_checkpoints: how many of the newest checkpoints to keep.
      copy_every: with a workdir in a bucket, copy only the checkpoints of steps that are multiples of it, and the last;
        the others stay on this machine, from whose newest the same machine goes on. None: copy all.
      wandb: auto, online, offline or off.
      tensorboard: whether to write TensorBoard event files to WORKDIR/tensorboard.
      profile: (first, last) step that JAX's profiler records into WORKDIR/profile; None: none.
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
    init_format: str | None = None
    init_optimizer: bool = False
    objective: Callable = objectives.next_token
    accumulation: int = 1
    piece_length: int | None = None
    carry: str = "exact"
    borders: str = "device"
    stateful: bool = False
    mesh: sharding.MeshShape = sharding.MeshShape()
    stop_at: int | None = None
    seed: int = 0
    log_every: int = 10
    eval_every: int = 0
    eval_batches: int = 16
    checkpoint_every: int = 500
    keep_checkpoints: int = 3
    copy_every: int | None = None
    wandb: str = "off"
    tensorboard: bool = False
    profile: tuple[int, int] | None = None

    def __post_init__(self):
        settings.check(self)
        _ = self._objective

    @property
    def last_step(self) -> int:
        """The number of updates after which the run is done."""
        return self.steps if self.stop_at is None else self.stop_at

    def run(self, workdir: str) -> Run:
        """Trains to the last step or until asked to stop (SIGTERM, Ctrl-C), and saves. Resumes a run in the workdir.

        Returns:
          The run with its final state; `step` is less than `last_step` if it was asked to stop.

        Raises:
          UserError: the settings, the data or the model do not fit; the loss or gradient is not finite; or the last
            checkpoint could not be written.
        """
        mesh = division.mesh_of(self)
        # Tokenises the data first, so that a mistake in it shows before a model is loaded.
        same_data.check(self._opened)
        doubtful.check_held_out(self, self._opened)
        folder = os.path.join(workdir, "checkpoints")
        with (
            jax.set_mesh(mesh),
            Checkpointer(folder, max_to_keep=self.keep_checkpoints) as checkpointer,
        ):
            run = self._resume(checkpointer, mesh, workdir) or self._start(mesh)
            with (
                self._batches("train", run.model, mesh) as batches,
                logger_of(self, workdir, run.step) as metrics,
                StopRequest() as stop,
            ):
                if run.data is not None:
                    batches.restore(run.data)
                for line in statements.opening(self, run, self._opened, batches, mesh, workdir):
                    metrics.message(line)
                try:
                    return self._loop(run, mesh, batches, checkpointer, metrics, stop, workdir)
                except NotFiniteError as bad:
                    raise UserError(f"{bad}: {workdirs.retreat(checkpointer, bad.step)}; {ADVICE}") from None

    def check(self, workdir: str) -> None:
        """Checks the settings against the workdir before anything is written.

        Raises:
          UserError: the workdir holds a run that started with other settings, or a model that is not a run; or, for a
            new run with expects_linear, init_from is not a linearized model.
        """
        with Checkpointer(os.path.join(workdir, "checkpoints")) as checkpointer:
            if checkpointer.steps():
                self._check_origin(checkpointer.restore({})[2], workdir)
                return
        if self.linearize is not None:
            self.linearize.check_rows(self.seq_len)
        if self.expects_linear and self.init_from is not None and self.linearize is None:
            model = convert.model_at(self.init_from, self.init_format)
            check_linear(model, seq_len=self.seq_len, where=self.init_from)

    def _check_origin(self, documents: dict[str, Any], workdir: str) -> None:
        if not {"data", "origin"} <= documents.keys():
            raise UserError(
                f"{workdir} holds a model, not a run: set Trainer.init_from to it, and another --workdir"
            )
        resume_check.check(documents["origin"], self._origin(), workdir)

    # ---------------------------------------------------------------------------------------------- initial state

    def _resume(self, checkpointer: Checkpointer, mesh, workdir: str) -> Run | None:
        """The run restored from the newest checkpoint that verifies; None if there is none.

        The checkpoint may have been written on any mesh; it is restored straight into the shardings of this one.
        """
        if not checkpointer.steps():
            return None
        step, _, documents = checkpointer.restore({})
        self._check_origin(documents, workdir)
        model = self.adjusted(self.model or model_json.from_json(documents["meta"]["model"]))
        lora = self.lora if self.adapter is None else model_json.from_json(documents["meta"]["lora"])
        stored = as_stored(model_lib.abstract_params(model, mesh=mesh), checkpointer.directory / str(step))
        run = self.prepared(model, mesh, lora, stored)
        step, state, documents = checkpointer.restore(run.abstract, optional=OPTIONAL_ITEMS)
        return dataclasses.replace(
            with_state(run, state),
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
            check_fits(self.prepared(model, mesh, self.lora).abstract, mesh)
            params = model_lib.init_params(model, jax.random.key(self.seed), mesh=mesh)
            begun = convert.Start(model, params, carried={}, lora=self.lora)
        else:
            begun = self.load(mesh)
            if self.expects_linear:
                check_linear(begun.model, seq_len=self.seq_len, where=self.init_from)
        model, lora = self.adjusted(begun.model), begun.lora
        run = self.prepared(model, mesh, lora, begun.params)
        weights = {"params": train_step.as_kept(begun.params, run.abstract["params"])}
        if lora is not None:
            weights["lora"] = begun.pairs or lora.init(jax.random.key(self.seed), model, mesh=mesh)
        opt_state = train_step.init_opt_state(run.optimizer, weights, run.abstract, run.trains)
        run = with_state(run, {**weights, "opt_state": opt_state}, begun.fp8_scaling)
        run = dataclasses.replace(run, carried=begun.carried)
        return continued.with_optimizer(self, run) if self.init_optimizer else run

    def load(self, mesh) -> convert.Start:
        """The pretrained model, extended and linearized as configured, with its parameters in their stored dtypes."""
        assert self.init_from is not None
        begun = convert.start(
            self.init_from,
            mesh=mesh,
            rope_scaling=self.rope_scaling,
            context_length=self.context_length,
            adapter=self.adapter,
            lora=self.lora,
            format=self.init_format,
        )
        if self.linearize is None:
            return begun
        model, params = self.linearize(begun.model, begun.params, jax.random.key(self.seed))
        return dataclasses.replace(begun, model=model, params=params)

    def adjusted(self, model: Decoder) -> Decoder:
        """The model with the run's dtype and remat."""
        given = {name: getattr(self, name) for name in ("dtype", "remat")}
        return model.clone(parent=None, **{name: value for name, value in given.items() if value is not None})

    def prepared(self, model: Decoder, mesh, lora: lora_lib.LoRA | None, stored: Any = None) -> Run:
        """The run of this model without its arrays: see training.run.prepared."""
        settings.check_model(self, model, mesh)
        rows = self._stateful_rows
        return prepared(self.optimizer, self.steps, model, mesh, lora, stored, stateful_rows=rows)

    @property
    def _stateful_rows(self) -> int:
        return self.batch_size if self.stateful else 0

    def _origin(self) -> dict[str, Any]:
        return resume_check.record(
            model=self.model,
            init_from=self.init_from,
            rope_scaling=self.rope_scaling,
            context_length=self.context_length,
            linearize=self.linearize,
            lora=self.lora,
            adapter=self.adapter,
            stateful_rows=self._stateful_rows,
        )

    # -------------------------------------------------------------------------------------------------- the loop

    def _loop(
        self, run: Run, mesh, batches, checkpointer, metrics: MetricsLogger, stop: StopRequest, workdir: str
    ) -> Run:
        step_fn = self.step_function(run)
        meter = meter_of(self, run, metrics, workdir, ahead=self._ahead(mesh))
        state, step = run.state, run.step
        stop.safe = "stopped before the first step, nothing is lost"  # a signal may interrupt the compilation
        if step < self.last_step and not stop.requested(step):
            train_step.compile_first(step_fn, state, sharding.abstract_batch(batches.padding(), mesh))
            metrics.begin()
        while step < self.last_step and not stop.requested(step):
            state, values = step_fn(state, sharding.shard_batch(next(batches), mesh), np.int32(step))
            stop.safe = None
            step += 1
            meter.add(step, values)
            checkpointer.poll()
            if len(checkpointer.failures) > 1 and not checkpointer.steps():
                failed = f"none of the first {len(checkpointer.failures)} checkpoints could be saved"
                raise UserError(f"{failed}, so the run stops: {checkpointer.failures[-1]}")
            evaluate = self.eval_every and step % self.eval_every == 0
            save = step % self.checkpoint_every == 0
            if (evaluate or save) and step < self.last_step:
                with meter.paused():  # waits for all steps, so that weights are saved only after finite losses
                    if evaluate:
                        if (loss := self.held_out_loss(run.model, state, mesh)) is not None:
                            metrics.log(step, {"eval_loss": loss})
                            state = {**state, "opt_state": self.optimizer.observe(state["opt_state"], loss)}
                    if save:
                        self._save(checkpointer, run, state, step, batches, meter)
        meter.drain()
        self._save(checkpointer, run, state, step, batches, meter, wait=True)
        whole = isinstance(run.model, Decoder)  # a block of layers cannot be evaluated by itself
        closing = statements.closing(workdir, step, self.last_step, whole=whole)
        if step == self.last_step and step > run.step:
            stop.safe = f"the last evaluation is left out; {closing}"
            if (loss := self.held_out_loss(run.model, state, mesh)) is not None:
                metrics.log(step, {"eval_loss": loss})
        metrics.message(f"{meter.summary()}\n{closing}")
        return dataclasses.replace(run, state=state, step=step)

    def step_function(self, run: Run) -> Callable:
        """The compiled training step of a run: see training.step.make_step."""
        return train_step.make_step(
            run.model,
            run.optimizer,
            self._objective,
            self.optimizer.learning_rates(self.steps),
            accumulation=self.accumulation,
            abstract=run.abstract,
            trains=run.trains,
        )

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
        """Saves a checkpoint in the background. A failure is a warning, or with wait=True a UserError."""
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
        with meter.saving():
            checkpointer.save(step, state, json=documents, wait=wait)

    @functools.cached_property
    def _opened(self) -> Opened:
        """The data, opened (and tokenised) once per run."""
        return self.data.opened()

    @functools.cached_property
    def _objective(self) -> Callable:
        """The objective, over pieces if piece_length is set."""
        if self.piece_length is None:
            for name, whole in {"carry": "exact", "borders": "device"}.items():
                if (value := getattr(self, name)) != whole:
                    raise UserError(f"Trainer.{name} is {value!r} without pieces: set Trainer.piece_length")
            return self.objective
        return objectives.over_pieces(self.objective, Pieces(self.piece_length, self.carry, self.borders))

    def held_out_loss(self, model: Decoder, state: State, mesh) -> float | None:
        """Mean negative log-likelihood per token over the first eval_batches of the held-out data.

        Every token has the same weight, and accumulation does not change the rows. None, with a warning, if no text is
        held out or none of it has a label.
        """
        try:
            held_out = self._batches("eval", model, mesh)
        except UserError as e:
            log.warning("no evaluation: %s", e)
            return None
        sums = train_step.make_sums(model, self._objective, self.accumulation)
        with held_out:
            first = itertools.islice(held_out, self.eval_batches)
            loss = train_step.mean_loss(sums, train_step.weights_of(state), first, mesh)
        if loss is None:
            log.warning("no evaluation: no held-out token has a label; raise Dataset.eval_fraction, or add documents")
        return loss

    def _batches(self, split: str, model: Decoder, mesh) -> BatchIterator:
        rows = (self.batch_size, self.seq_len, self.seed, *sharding.process_rows(mesh))
        ahead = self._ahead(mesh)
        streams = self.stateful and split == "train"
        spec = BatchSpec(split, *rows, vocab_size=model.vocab_size, num_threads=ahead, streams=streams)
        return self._opened.batches(spec)

    def _ahead(self, mesh) -> int:
        """Whether batches are prepared during a step; not those of long rows on CPUs, which lack the memory for two."""
        return int(self.piece_length is None or mesh.devices.flat[0].platform != "cpu")
