"""The time of a step from what it computes and moves: a roofline, with no efficiency guessed.

Each resource is taken at the full speed of its data sheet, or on CPUs at the speed that it was measured to reach. A
step takes at least the longest of the four times (everything overlaps) and, at these speeds, at most their sum
(nothing does); the plan states the sum.
"""

import dataclasses

from lcx import mixers, objectives, parameters
from lcx.errors import UserError
from lcx.model import Decoder
from lcx.planning import topology, traffic
from lcx.planning.compiled import Step
from lcx.planning.topology import Chip, Host
from lcx.trainer import Trainer
from lcx.training.run import trained_sizes

_DATA_SHEET = (
    "products run at the chip's full bfloat16 rate, memory and links at the full rate of the data sheet",
    "no accelerator has been timed against these numbers yet",
)
_EVERYWHERE = (
    "nothing overlaps: step_seconds is the sum of the times of products, memory, links and copies to the host's "
    "memory; if all of them overlapped it would be step_seconds_overlapped",
    "every array of the program is written once and read once",
    "collectives run as rings along one axis of the mesh; each axis has links of its own",
    "no time for data, checkpoints, evaluation, compilation or waiting for slower devices",
)
LOOPS = "of attention in loops of a length that the program decides, and of kernels that state no cost, operations are "
LOOPS += "estimated: forward 1, recomputed 1 with remat, backward 2.5 times what a forward pass needs"


@dataclasses.dataclass(frozen=True)
class Work:
    """What one step does.

    Attributes:
      model_flops: of the model, over all devices, as MFU counts them: without recomputation.
      executed_flops: of the program, over all devices, with it.
      estimated: a part of executed_flops is not counted in the program but follows from the model (LOOPS).
      collective_bytes: mesh axes -> bytes that each device sends; None if there is no compiled program.
      memory_bytes: that each device reads and writes; None likewise.
      link_bytes: of collective_bytes: (within reach of the fast links, beyond).
      host_bytes: that each device copies to the memory of its host and back.
    """

    model_flops: float | None
    executed_flops: float
    estimated: bool
    collective_bytes: dict[str, float] | None
    memory_bytes: float | None
    link_bytes: tuple[float, float]
    host_bytes: float = 0.0


@dataclasses.dataclass(frozen=True)
class Time:
    """Seconds of one step: of products, memory, links and copies to the host's memory and back, and in total."""

    compute: float
    memory: float
    links: float
    host: float

    @property
    def total(self) -> float:
        return self.compute + self.memory + self.links + self.host

    @property
    def overlapped(self) -> float:
        return max(self.compute, self.memory, self.links, self.host)


def work(step: Step, trainer: Trainer, mesh_shape: dict[str, int], chip: Chip) -> Work:
    """What the step computes and moves."""
    tokens = trainer.batch_size * trainer.seq_len
    try:
        local = objectives.is_local(trainer.objective)
        of_token = parameters.flops_per_token(step.run.model, trainer.seq_len, trained_sizes(step.run), local=local)
        model_flops = tokens * of_token
    except UserError:  # a mixer without a count
        model_flops = None
    executed, estimated = step.count.flops, bool(step.count.loops or step.count.kernels)
    if estimated:
        passes = 3.5 + (step.run.model.remat != "none")
        executed += tokens * passes * _mixing(step.run.model, trainer.seq_len)
    if step.program is None:
        return Work(model_flops, executed, estimated, None, None, (0.0, 0.0))
    sent = traffic.collectives(step.program, mesh_shape)
    far = sum(one.nbytes for one in sent if topology.spans_hosts(chip, one.span))
    near = sum(one.nbytes for one in sent) - far
    moved = traffic.memory_bytes(step.program)
    copied = traffic.host_bytes(step.program)
    return Work(model_flops, executed, estimated, traffic.by_axis(sent), moved, (near, far), copied)


def _mixing(model: Decoder, seq_len: int) -> float:
    """Operations of a forward pass for each token between tokens: what a mixer's projections are not."""
    blocks = [(stage.repeat, block.mixer) for stage in model.stages for block in stage.pattern]
    try:
        return sum(2.0 * repeat * mixers.macs_per_token(mixer, seq_len) for repeat, mixer in blocks)
    except UserError:
        return 0.0


def assumptions(chip: Chip, *, measured: bool, devices: int, copies: bool) -> tuple[str, ...]:
    """What the time rests on, in sentences. copies: whether the step copies to the host's memory."""
    if not measured:
        return _DATA_SHEET + _EVERYWHERE + ((host_link(chip, chip.host),) if copies and chip.host else ())
    flops, bandwidth = devices * chip.flops / 1e9, devices * chip.bandwidth / 1e9
    speeds = f"products run at {flops:.0f} GFLOP/s and memory at {bandwidth:.1f} GB/s"
    where = "which this machine's cores reached when the plan was made; the devices share them"
    return (f"{speeds}, {where}", *_EVERYWHERE)


def host_link(chip: Chip, host: Host) -> str:
    """What the time of copies to the host's memory rests on."""
    rate = f"copies to the host's memory and back run at {host.link / 1e9:.0f} GB/s in one direction at a time"
    kind = "PCIe 5.0 x16; NVLink-C2C to a Grace CPU has 450" if chip.near else "the chip's PCIe link"
    memory = f"the memory of a host is {host.memory / 1e9:,.0f} GB for {host.devices} devices"
    where = "as in a DGX; in a smaller machine it is less" if chip.near else "as Google's machines have it"
    return f"{rate} ({kind}), though the compiler starts them ahead of their use; {memory}, {where}"


def time_of(work: Work, chip: Chip, devices: int) -> Time | None:
    """None for a program that was not compiled."""
    if work.memory_bytes is None:
        return None
    near, far = work.link_bytes
    flops = work.executed_flops / devices
    links, copies = near / chip.link + far / chip.far, work.host_bytes / chip.host.link if chip.host else 0.0
    return Time(flops / chip.flops, work.memory_bytes / chip.bandwidth, links, copies)
