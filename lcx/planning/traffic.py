"""The bytes that a compiled step moves: between devices by mesh axis, in the memory of a device, and to the host's."""

import dataclasses
import math
import re

import numpy as np

from lcx.planning.program import Instruction, Program

# What each device sends for each byte of the whole array, on a ring of n devices.
SENT = {
    "all-gather": lambda n: (n - 1) / n,
    "reduce-scatter": lambda n: (n - 1) / n,
    "all-reduce": lambda n: 2 * (n - 1) / n,
    "all-to-all": lambda n: (n - 1) / n,
    "ragged-all-to-all": lambda n: (n - 1) / n,
    "collective-permute": lambda n: 1.0,
    "collective-broadcast": lambda n: 1.0,
}
# Instructions that make no array of their own.
_NO_ARRAY = {"parameter", "tuple", "get-tuple-element", "bitcast", "while", "conditional", "call", "constant"}
_NO_ARRAY |= {
    "after-all",
    "optimization-barrier",
    "async-start",
    "async-update",
    "async-done",
    "partition-id",
}


@dataclasses.dataclass(frozen=True)
class Sent:
    """What one collective operation sends in a step: bytes per device, over `axes` of the mesh.

    Attributes:
      kind: as XLA names it.
      axes: the mesh axes along which its groups extend, joined by "+".
      nbytes: bytes that each device sends in one step, over all times that it runs.
      span: devices from the first to the last of a group, counted along the mesh: 8 or fewer may share a host.
    """

    kind: str
    axes: str
    nbytes: float
    span: int


def collectives(program: Program, mesh_shape: dict[str, int]) -> list[Sent]:
    """Every collective operation of the program between at least two devices."""
    found, seen = [], set()
    for run in program.runs():
        one = run.instruction
        kind = one.op.removesuffix("-start")
        if kind not in SENT:
            continue
        channel = re.search(r"channel_id=(\d+)", one.text)
        if (
            run.fused and channel
        ):  # libtpu writes an asynchronous one into every fusion that takes a part of it
            if channel[1] in seen:
                continue
            seen.add(channel[1])
        members = groups(one.text, math.prod(mesh_shape.values()))
        size = max(map(len, members), default=1)
        if size < 2:
            continue
        axes, span = along(members, mesh_shape)
        nbytes = run.times * SENT[kind](size) * whole_bytes(one, kind, size)
        found.append(Sent(kind, axes, nbytes, span))
    return found


def by_axis(sent: list[Sent]) -> dict[str, float]:
    """axes -> bytes that each device sends in a step, the most first."""
    total: dict[str, float] = {}
    for one in sent:
        total[one.axes] = total.get(one.axes, 0.0) + one.nbytes
    return dict(sorted(total.items(), key=lambda item: -item[1]))


def whole_bytes(one: Instruction, kind: str, size: int) -> float:
    """Bytes of the array that a collective of `size` devices works on: the gathered or the unreduced one."""
    nbytes = sum(array.nbytes for array in one.results if array.shape) or one.nbytes
    if kind in ("all-gather", "reduce-scatter") and one.op.endswith("-start"):  # (inputs, outputs)
        return nbytes * size / (size + 1)
    if kind == "collective-permute" and one.op.endswith("-start"):
        return nbytes / 2
    return nbytes * size if kind == "reduce-scatter" else nbytes


_NAMED = r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\([^)]*\))? ?\{([^}]*)\}"


def groups(text: str, count: int) -> list[list[int]]:
    """The groups of devices of a collective, by their place in the mesh; one of all `count` where none are named."""
    if (pairs := re.search(r"source_target_pairs=\{(\{.*?\})\}", text)) is not None:
        return [[int(a), int(b)] for a, b in re.findall(r"\{(\d+),(\d+)\}", pairs[1])]
    if (iota := re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", text)) is not None:
        shape, source = _numbers(iota[1]), _numbers(iota[2])
        ids = np.arange(math.prod(source)).reshape(source)
        ids = ids.transpose(_numbers(iota[3])) if iota[3] else ids
        return ids.reshape(shape[0], -1).tolist()
    if (named := re.search(_NAMED, text)) is not None:
        axes = re.findall(r"'(\w+)'=(\d+)", named[1])
        used = re.findall(r"'(\w+)'", named[2])
        sizes = [int(size) for _, size in axes]
        order = [i for i, (name, _) in enumerate(axes) if name not in used]
        order += [i for i, (name, _) in enumerate(axes) if name in used]
        length = math.prod(int(size) for name, size in axes if name in used)
        return np.arange(math.prod(sizes)).reshape(sizes).transpose(order).reshape(-1, length).tolist()
    if (listed := re.search(r"replica_groups=\{(\{[\d,{}]*\})\}", text)) is not None:
        return [_numbers(one) for one in re.findall(r"\{([\d,]+)\}", listed[1])]
    return [list(range(count))]


def along(members: list[list[int]], mesh_shape: dict[str, int]) -> tuple[str, int]:
    """The mesh axes along which groups extend ("fsdp", "data+fsdp"), and the longest distance within one, plus 1."""
    where = [np.array(np.unravel_index(group, tuple(mesh_shape.values()))) for group in members]
    moved = [name for i, name in enumerate(mesh_shape) if any((at[i] != at[i][0]).any() for at in where)]
    return "+".join(moved), max(max(group) - min(group) + 1 for group in members)


def memory_bytes(program: Program) -> float:
    """Bytes that a device reads and writes in a step, if every array is written once and read once.

    Arrays inside fusions stay in registers. An update in place of a slice counts the slice alone.
    """
    made = {one.name: one for body in program.computations.values() for one in body}
    total = 0.0
    for run in program.runs():
        one = run.instruction
        if run.fused or one.op in _NO_ARRAY or one.op.endswith("-done"):
            continue
        total += 2.0 * run.times * _written(program, one, made)
    return total + sum(one.held for one in program.computations[program.entry] if one.op == "parameter")


def host_bytes(program: Program) -> float:
    """Bytes that a device copies to the memory of the host and back in a step: of a slice, the slice alone."""
    made = {one.name: one.results for body in program.computations.values() for one in body}
    total = 0.0
    for run in program.runs():
        one = run.instruction
        if run.fused or one.op in _NO_ARRAY or one.op.endswith("-done"):
            continue
        arrays = [*one.results, *(array for name in one.operands for array in made.get(name, ()))]
        there = [array.nbytes for array in arrays if array.on_host]
        here = [array.nbytes for array in arrays if not array.on_host and array.shape]
        if there and here:
            total += run.times * min(max(there), max(here))
    return total


def _written(program: Program, one: Instruction, made: dict[str, Instruction]) -> int:
    """Bytes that an instruction writes to the device's memory; `made`: every instruction of the program by name."""
    if not one.held:
        return 0
    if one.op == "dynamic-update-slice":
        return _updated(one, made)
    called = re.search(r"calls=%?([\w.\-]+)", one.text) if one.op == "fusion" else None
    if called and called[1] in program.computations:
        root = program.root(called[1])
        roots = [made[name] for name in root.operands if name in made] if root.op == "tuple" else [root]
        return sum(_updated(each, made) for each in roots) or one.held
    return one.held


def _updated(root: Instruction, made: dict[str, Instruction]) -> int:
    """Bytes of the slice that is updated; of the whole result, if it is no update."""
    while root.op in ("bitcast", "copy", "convert") and root.operands and root.operands[0] in made:
        if made[root.operands[0]].op not in ("dynamic-update-slice", "bitcast", "copy", "convert"):
            break
        root = made[root.operands[0]]
    if root.op == "dynamic-update-slice" and len(root.operands) > 1 and root.operands[1] in made:
        update = made[root.operands[1]]
        return update.held or update.nbytes  # it may come from a TPU's vector memory
    return root.held


def _numbers(text: str) -> list[int]:
    return [int(number) for number in text.split(",") if number]
