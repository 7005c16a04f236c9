"""The training step of a run, compiled ahead of time for devices that need not exist, and the memory that it takes."""

import dataclasses
import logging
import math
import re
import time
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from kernels_pallas import aot
from lcx import objectives, sharding
from lcx.errors import UserError, first_line
from lcx.planning import cache, flops, program, silence
from lcx.planning.abstract import fields_of, run_of
from lcx.planning.topology import Topology
from lcx.trainer import Trainer
from lcx.training import division
from lcx.training.run import Run
from lcx.training.step import weights_of

log = logging.getLogger(__name__)

# What products on several CPU threads take beside the compiler's arrays, for operands that they copy in blocks: at most
# 30 MiB were measured for small models (benchmarks/plan_errors.py), nothing on one thread.
CPU_RUNTIME = 32 * 2**20

# libtpu counts arguments and results among the "temporaries"; older versions write the second form.
_TOO_LARGE = re.compile(
    r"(?:required for HLO temporaries \(|Used )([\d.]+)([KMGT]?)(?:\) exceeds available HBM| of [\d.]+[KMGT]? hbm)"
)
_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes of each device during a step.

    Attributes:
      parameters: the weights, low-rank ones included.
      optimizer: the optimizer's state.
      batch: the rows of one batch.
      rest: activations, gradients, the compiler's other temporary arrays, the program itself.
      runtime: what the device's libraries take beside the program's arrays; known for CPUs alone.
      host: what waits in the memory of the host, which is no part of the peak; on CPUs it is a part of `rest`.
    """

    parameters: int
    optimizer: int
    batch: int
    rest: int
    runtime: int = 0
    host: int = 0

    @property
    def peak(self) -> int:
        return self.parameters + self.optimizer + self.batch + self.rest + self.runtime


@dataclasses.dataclass(frozen=True)
class Step:
    """A compiled step.

    Attributes:
      program: None if the compiler refused the program because it does not fit.
      compile_seconds: of tracing and compiling; less where an equal program was planned before.
    """

    run: Run
    memory: Memory
    count: flops.Count
    program: program.Program | None
    compile_seconds: float


def mesh_of(trainer: Trainer, topology: Topology) -> Mesh:
    """The mesh of the run on these devices.

    Raises:
      UserError: the devices do not match Trainer.mesh, or the rows do not divide over it.
    """
    try:
        return division.mesh_of(trainer, list(np.ravel(topology.devices)))
    except UserError as error:
        raise UserError(f"--topology={topology.name} does not match Trainer.mesh: {error}") from error
    except (NotImplementedError, ValueError) as error:
        raise UserError(
            f"--topology={topology.name}: Trainer.mesh cannot be laid on this slice ({first_line(error)}); change the "
            "mesh sizes to products of the slice's"
        ) from error


def step_of(trainer: Trainer, topology: Topology) -> Step:
    """Compiles the step of a run.

    Raises:
      UserError: the mesh, the rows or the model do not fit the run, or the compiler fails.
    """
    mesh, start = mesh_of(trainer, topology), time.perf_counter()
    run = run_of(trainer, mesh)
    batch = batch_of(trainer, run, mesh)
    with jax.set_mesh(mesh), aot.uncached():
        number = jax.ShapeDtypeStruct((), np.int32)
        function: Any = trainer.step_function(run)  # compiled by jax.jit
        traced = function.trace(run.abstract, batch, number)
        made = _compile(traced.lower(), topology)
    known = {
        "parameters": device_bytes(weights_of(run.abstract)),
        "optimizer": device_bytes(run.abstract["opt_state"]),
        "batch": device_bytes(batch),
    }
    runtime = CPU_RUNTIME // mesh.size if topology.chip is None else 0
    memory = Memory(**known, rest=max(made.peak - sum(known.values()), 0), runtime=runtime, host=made.host)
    parsed = None if made.text is None else program.parse(made.text)
    return Step(run, memory, flops.count(traced), parsed, time.perf_counter() - start)


def batch_of(trainer: Trainer, run: Run, mesh: Mesh) -> dict[str, jax.ShapeDtypeStruct]:
    """A batch as shapes with shardings."""
    rows = sharding.batch_sharding(mesh)
    shape = (sharding.padded_rows(trainer.batch_size, mesh), trainer.seq_len)
    fields = fields_of(trainer, run).items()
    return {name: jax.ShapeDtypeStruct(shape + more, dtype, sharding=rows) for name, (more, dtype) in fields}


def least_bytes(trainer: Trainer, topology: Topology) -> int:
    """Bytes that a device needs at least, without compiling: the state and a batch; in training of all weights on whole
    rows also the input of every block, which the backward pass starts from even with remat full (not with host).

    Raises:
      UserError: see `step_of`.
    """
    mesh = mesh_of(trainer, topology)
    run = run_of(trainer, mesh)
    tokens = sharding.padded_rows(trainer.batch_size, mesh) * trainer.seq_len // mesh.size
    known = device_bytes(run.abstract) + device_bytes(batch_of(trainer, run, mesh))
    everything = trainer.piece_length is None and trainer.objective is objectives.next_token
    if everything and run.model.remat != "host" and all(jax.tree.leaves(run.trains)):
        width = run.model.hidden_size * np.dtype(run.model.dtype).itemsize
        known += tokens // division.micro_batches(trainer, mesh) * run.model.num_layers * width
    return known


def _compile(lowered: Any, topology: Topology) -> cache.Compiled:
    """What the compiler says about the program, now or the last time."""
    key = cache.key(lowered.as_text(), topology.name)
    if (known := cache.read(key)) is not None:
        return known
    try:
        with silence.quiet():
            made = lowered.compile()
            analysis = made.memory_analysis()
            answer = cache.Compiled(_peak(analysis), analysis.host_temp_size_in_bytes, made.as_text())
    except jax.errors.JaxRuntimeError as error:
        answer = cache.Compiled(_refused(error), 0, None)
    cache.write(key, answer)
    return answer


def _peak(analysis: Any) -> int:
    """Bytes of arguments, results that are not written over them, temporary arrays and the program."""
    results = analysis.output_size_in_bytes - analysis.alias_size_in_bytes
    held = analysis.argument_size_in_bytes + results + analysis.temp_size_in_bytes
    return held + analysis.generated_code_size_in_bytes


def _refused(error: jax.errors.JaxRuntimeError) -> int:
    """Bytes that a program would need which libtpu refuses for its memory: arguments, results and temporary arrays.

    Raises:
      UserError: the compiler says something else.
    """
    found = _TOO_LARGE.search(str(error))
    if found is None:
        raise UserError(f"the compiler refuses the training step: {first_line(error)}") from error
    return int(float(found[1]) * _UNITS[found[2]])


def device_bytes(tree: Any) -> int:
    """Bytes of one device's part of abstract arrays with shardings."""
    return sum(
        math.prod(x.sharding.shard_shape(x.shape) if x.sharding else x.shape) * x.dtype.itemsize
        for x in jax.tree.leaves(tree)
    )
