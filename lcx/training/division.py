"""How the rows of a run are divided over devices of which it does not know the number: any number works.

A mesh axis of -1 takes all remaining devices. If these are more devices than rows, the rest go to `context`, so that
several devices share a row. Rows that still do not divide evenly get rows of padding beside them, which have no weight.
A micro-batch has at least one row for every device, so on more devices there are fewer micro-batches. None of this
changes what is trained: losses are sums over the rows of the whole batch.
"""

import dataclasses
from typing import Any

import jax
from jax.sharding import Mesh

from lcx import sharding
from lcx.errors import UserError
from lcx.wording import quantity

SPARE = 9 / 8  # rows with padding over rows without, up to which devices are not moved to `context`


def mesh_of(trainer: Any, devices: Any = None) -> Mesh:
    """The mesh of a `trainer.Trainer` on these devices; None: all devices of all processes.

    Raises:
      UserError: the sizes do not match the devices, there are fewer rows than devices that were asked to take some, or
        rows of seq_len tokens do not divide over `context`.
    """
    devices = jax.devices() if devices is None else list(devices)
    mesh = _shape(trainer, len(devices)).build(devices)
    check(trainer, mesh)
    return mesh


def check(trainer: Any, mesh: Mesh) -> None:
    """Raises UserError if the rows of a run cannot be divided over the mesh."""
    parts = sharding.row_parts(mesh)
    if trainer.batch_size < parts and _free_axis(trainer.mesh) is None:
        raise UserError(
            f"{quantity(trainer.batch_size, 'row')} (Trainer.batch_size) for data x fsdp = {parts} devices; raise "
            "Trainer.batch_size, or give devices to MeshShape.context or MeshShape.tensor"
        )
    if trainer.seq_len % mesh.shape["context"]:
        raise UserError(
            f"seq_len {trainer.seq_len} does not divide over context = {mesh.shape['context']} devices; "
            "change Trainer.seq_len or the mesh"
        )


def micro_batches(trainer: Any, mesh: Mesh) -> int:
    """How many micro-batches a step has."""
    rows = sharding.padded_rows(trainer.batch_size, mesh)
    return sharding.micro_batch_count(rows, trainer.accumulation, sharding.row_parts(mesh))


def remarks(trainer: Any, mesh: Mesh) -> list[str]:
    """What differs from the settings, because of the number of devices."""
    parts, rows = sharding.row_parts(mesh), trainer.batch_size
    count = micro_batches(trainer, mesh)
    lines = []
    if (context := mesh.shape["context"]) != trainer.mesh.context > 0:
        lines.append(
            f"{quantity(rows, 'row')} on {quantity(mesh.size, 'device')}: {context} devices share each row (context)"
        )
    if count != trainer.accumulation:
        lines.append(
            f"{quantity(count, 'micro-batch', 'micro-batches')} instead of {trainer.accumulation} "
            "(Trainer.accumulation): each has a row for every device, and all of them divide evenly"
        )
    if extra := sharding.padded_rows(rows, mesh) - rows:
        lines.append(
            f"{quantity(rows, 'row')} do not divide over {quantity(parts, 'device')} (data x fsdp): every batch gets "
            f"{quantity(extra, 'row')} of padding; a multiple of {parts} as Trainer.batch_size needs none"
        )
    return lines


def _shape(trainer: Any, devices: int) -> sharding.MeshShape:
    """Trainer.mesh, with devices along `context` that an axis of -1 would take without having rows for them."""
    shape, free = trainer.mesh, _free_axis(trainer.mesh)
    if free is None:
        return shape
    fixed = {axis: size for axis, size in dataclasses.asdict(shape).items() if axis != free}
    known = fixed["context"] * fixed["tensor"]
    other = fixed["fsdp" if free == "data" else "data"]
    if any(size < 1 for size in fixed.values()) or devices % (known * other):
        return shape  # which cannot be built
    left = devices // (known * other)
    tokens = trainer.piece_length or trainer.seq_len
    found = []
    for more in range(1, left + 1):
        context = shape.context * more
        if left % more or (more > 1 and (tokens % context or trainer.seq_len % context)):
            continue
        parts = other * left // more
        found.append((-(-trainer.batch_size // parts) * parts, more))
    good = [more for rows, more in found if rows <= SPARE * trainer.batch_size]
    more = good[0] if good else min(found)[1]
    if more == 1:
        return shape
    return dataclasses.replace(shape, **{free: left // more, "context": shape.context * more})


def _free_axis(shape: sharding.MeshShape) -> str | None:
    """The axis of rows that takes all remaining devices."""
    return next((axis for axis in sharding.BATCH_AXES if getattr(shape, axis) == -1), None)
