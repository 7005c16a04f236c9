"""The largest arrays of a compiled step on one device, each with the setting that would make it smaller."""

import collections
import dataclasses

import jax
from jax.sharding import Mesh

from lcx import sharding
from lcx.planning.compiled import Step
from lcx.trainer import Trainer
from lcx.training import division
from lcx.training.step import weights_of

Shape = tuple[int, ...]
_NONE = {"tuple", "get-tuple-element", "bitcast", "while", "conditional", "call", "constant", "after-all"}


@dataclasses.dataclass(frozen=True)
class Buffer:
    """An array on each device.

    Attributes:
      nbytes: that it holds, padding of a TPU's tiles included.
      what: weights, optimizer state, batch, gradients or activations, as far as its shape says.
      where: the place in the model that makes it, as jax names it; empty if the compiler does not say.
      setting: what would make it smaller.
    """

    nbytes: int
    dtype: str
    shape: Shape
    what: str
    where: str
    setting: str


def largest(step: Step, trainer: Trainer, mesh: Mesh, count: int = 5) -> list[Buffer]:
    """The largest arrays, one for each dtype and shape; not all need exist at the same time."""
    if step.program is None:
        return []
    found: dict[tuple[str, Shape], Buffer] = {}
    weights = _shapes(step, mesh)
    for run in step.program.runs():
        one = run.instruction
        if run.fused or one.op in _NONE or (one.op == "parameter" and not one.op_name):
            continue
        for array in one.results:
            key = (array.dtype, array.shape)
            if key in found and not found[key].where:
                found[key] = dataclasses.replace(found[key], where=_where(one.op_name))
            if key in found or (
                len(found) >= 8 * count and array.held < min(b.nbytes for b in found.values())
            ):
                continue
            what = _what(array.shape, one.op, one.op_name, weights)
            floating = array.dtype.startswith(("f", "bf"))
            setting = _setting(what, floating, step, trainer, mesh)
            found[key] = Buffer(array.held, *key, what, _where(one.op_name), setting)
    return sorted(found.values(), key=lambda buffer: -buffer.nbytes)[:count]


def _shapes(step: Step, mesh: Mesh) -> set[Shape]:
    """The sorted shapes of weights and their gradients on a device: sharded or gathered, of all layers or of one."""
    found = set()
    for leaf in jax.tree.leaves(weights_of(step.run.abstract)):
        spec = [axis if axis is not None else () for axis in leaf.sharding.spec] + [()] * leaf.ndim
        for kept in ((), ("tensor",), ("fsdp",), ("tensor", "fsdp")):
            split = [
                size // (mesh.shape[axis] if isinstance(axis, str) and axis in kept else 1)
                for size, axis in zip(leaf.shape, spec, strict=False)
            ]
            found |= {_order(split), _order(split[1:])}
    return {shape for shape in found if len(shape) > 1}


def _order(shape) -> Shape:
    return tuple(sorted(size for size in shape if size > 1))


def _what(shape: Shape, op: str, op_name: str, weights: set[Shape]) -> str:
    if op == "parameter":
        return "optimizer state" if "opt_state" in op_name else "batch" if "batch" in op_name else "weights"
    return "weights or gradients" if _order(shape) in weights else "activations"


def _where(op_name: str) -> str:
    """`jit(step)/while/body/transpose(jvp(Decoder.hidden))/.../mlp/up_proj/dot_general` -> what names a place."""
    noise = (
        "jit(",
        "while",
        "body",
        "closed_call",
        "checkpoint",
        "shard_map",
        "rematted_computation",
        "remat",
    )
    parts = [part for part in op_name.split("/") if not part.startswith(noise)]
    name = "/".join(collections.OrderedDict.fromkeys(parts)) if set("/[") & set(op_name) else ""
    return name.replace("\\'", "'")  # the compiler escapes the quotes of batch['labels']


def _setting(what: str, floating: bool, step: Step, trainer: Trainer, mesh: Mesh) -> str:
    if what == "batch":
        return "Trainer.batch_size, Trainer.seq_len or more devices along MeshShape.fsdp or MeshShape.context"
    if what in ("weights", "optimizer state", "weights or gradients"):
        ways = ["more devices along MeshShape.fsdp"]
        if trainer.lora is None and trainer.init_from is not None:
            ways.append("Trainer.lora")
        return " or ".join(ways)
    rows = sharding.padded_rows(trainer.batch_size, mesh) // sharding.row_parts(mesh)
    rows //= division.micro_batches(trainer, mesh)
    ways, remat = [], step.run.model.remat
    if remat not in ("full", "host"):
        ways.append("Trainer.remat = 'full'")
    if rows > 1:
        ways.append(f"a higher Trainer.accumulation ({rows} rows at a time now)")
    if floating and str(step.run.model.dtype) == "float32":
        ways.append("Trainer.dtype = 'bfloat16'")
    if trainer.piece_length is None:
        on_host = remat == "full" and mesh.devices.flat[0].platform != "cpu"
        ways += [*(["Trainer.remat = 'host'"] if on_host else []), "Trainer.piece_length"]
    return " or ".join([*ways[:2], "more devices along MeshShape.context"])
