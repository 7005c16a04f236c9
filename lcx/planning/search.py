"""Other settings of the same training: which of them fit the devices, and which is the fastest.

What is tried changes neither the batch, the rows nor the objective, so every choice trains the same model: the mesh,
what is recomputed (remat), the rows processed at once (accumulation), and rows in pieces. Each is compiled like
any plan. A mesh is tried from the least memory upwards, so that most choices that cannot fit are never compiled:

    remat full      accumulation raised until it fits
    remat host      as full, but with less accumulation than full needs, where the devices have a host with memory of
                    its own; if neither fits, rows longer than PIECE in pieces
    remat dots      from where full fits on
    remat none      from there on

At equal accumulation `host` computes what `full` does and copies besides, so it is tried only where `full` does not
fit.
A choice whose weights, optimizer and stored inputs of blocks alone exceed the memory is not compiled either.
"""

import dataclasses
import itertools
import math
import time
from collections.abc import Callable, Generator
from typing import Any

from lcx import sharding
from lcx.errors import UserError
from lcx.planning import topology
from lcx.trainer import Trainer

PIECE = 16384  # tokens of the pieces that are tried
WIDEST = 8  # devices along `tensor`, and along `context`: wider ones rarely pay, and each costs a compilation
REMATS = ("full", "dots", "none")  # from the least memory to the most


@dataclasses.dataclass(frozen=True)
class Choice:
    """Settings of a run that do not change what it trains."""

    mesh: sharding.MeshShape
    remat: str
    accumulation: int
    piece_length: int | None

    def of(self, trainer: Trainer) -> Trainer:
        """The run with these settings."""
        mine = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return dataclasses.replace(trainer, **mine)

    def flags(self) -> dict[str, Any]:
        """The same as bindings of a .gin file."""
        axes = {f"MeshShape.{axis}": size for axis, size in dataclasses.asdict(self.mesh).items()}
        names = ("remat", "accumulation", "piece_length")
        return axes | {f"Trainer.{name}": getattr(self, name) for name in names}


@dataclasses.dataclass(frozen=True)
class Found:
    """What a search has found.

    Attributes:
      plans: of every choice that was compiled, {**plan, "settings": its flags}; those that fit first, fastest first.
      refused: choices that the model, the mesh or the compiler refuses, with the reason.
      untried: meshes for which no compilation or no time was left.
      too_large: choices that were not compiled, since what is known of them before exceeds the memory.
    """

    plans: list[dict[str, Any]]
    refused: list[tuple[Choice, str]]
    untried: list[sharding.MeshShape]
    too_large: int = 0


def search(
    trainer: Trainer,
    devices: int,
    plan: Callable[[Trainer], dict[str, Any]],
    limit: int,
    *,
    seconds: float = math.inf,
    possible: Callable[[Trainer], bool] = lambda choice: True,
    hosts: bool = False,
) -> Found:
    """Plans other settings of a run.

    Args:
      hosts: whether the devices have a host with memory of its own.
      plan: run -> its plan, see `report.plan`. UserError: it cannot be planned.
      limit: how many to plan at most.
      seconds: after which no further plan is begun.
      possible: run -> whether it may fit, from what is known without compiling. UserError: it cannot be planned.
    """
    plans: list[dict[str, Any]] = []
    refused: list[tuple[Choice, str]] = []
    untried, too_large, end = [], 0, time.monotonic() + seconds

    def left() -> bool:
        return len(plans) + len(refused) < limit and time.monotonic() < end

    for mesh in meshes(trainer, devices):
        if not left():
            untried.append(mesh)
            continue
        walk = choices(trainer, mesh, hosts=hosts)
        fits: bool | None = None
        while left():
            try:
                choice = walk.send(fits)
            except StopIteration:
                break
            try:
                fits = possible(choice.of(trainer))
                if fits:
                    plans.append(plan(choice.of(trainer)) | {"settings": choice.flags()})
                    fits = plans[-1]["fits"] is not False
                else:
                    too_large += 1
            except UserError as error:
                refused.append((choice, str(error)))
                break  # of another remat or accumulation it would be the same
    return Found(sorted(plans, key=_rank), refused, untried, too_large)


def meshes(trainer: Trainer, devices: int) -> list[sharding.MeshShape]:
    """How the devices may be divided, those that divide rows and layers least first; `data` stays as it is."""
    data = max(trainer.mesh.data, 1)
    left = devices // data
    found = []
    for context, tensor in itertools.product(range(1, WIDEST + 1), repeat=2):
        if left % (context * tensor) or trainer.seq_len % context:
            continue
        fsdp = left // (context * tensor)
        if trainer.batch_size % (data * fsdp) == 0:
            found.append(sharding.MeshShape(data, fsdp, context, tensor))
    return sorted(found, key=lambda mesh: (mesh.context * mesh.tensor, mesh.tensor))


def choices(
    trainer: Trainer, mesh: sharding.MeshShape, *, hosts: bool = False
) -> Generator[Choice, bool | None, None]:
    """Yields what to try on a mesh, in the order explained above; it is sent whether the last one fits."""
    most = trainer.batch_size // (mesh.data * mesh.fsdp)
    rows = [count for count in range(1, most + 1) if most % count == 0]
    lengths = [trainer.piece_length]
    if trainer.piece_length is None and trainer.seq_len > PIECE:
        lengths.append(PIECE)
    for piece in lengths:
        left, found = list(rows), False
        for remat in REMATS:
            while left and not (yield Choice(mesh, remat, left[0], piece)):
                left.pop(0)  # does not fit, and neither will it with less recomputation
            if remat == "full" and hosts and piece is None:
                for count in rows[: len(rows) - len(left)]:
                    if (yield Choice(mesh, "host", count, piece)):
                        found = True
                        break
            found = found or bool(left)
        if found:
            return


def _rank(plan: dict[str, Any]) -> tuple:
    """Those that fit first; the fastest first, or for devices of unknown speed those with the least operations."""
    seconds = plan["step_seconds"]
    return plan["fits"] is False, plan["executed_flops"] if seconds is None else seconds, plan["peak_bytes"]


def gin(settings: dict[str, Any]) -> list[str]:
    """Settings of `Choice.flags` as lines of a .gin file, which imports what they name."""
    modules = {"MeshShape": "sharding", "Trainer": "trainer"}
    lines = [f"from lcx import {module}" for module in modules.values()]
    if any(name.startswith("MeshShape.") for name in settings):
        lines.append("trainer.Trainer.mesh = @sharding.MeshShape()")
    return lines + [f"{modules[name.partition('.')[0]]}.{name} = {value!r}" for name, value in settings.items()]


def text(found: Found, size: Callable[[float], str]) -> str:
    """The table of a search, and the flags of the fastest choice that fits."""
    rows = [plan for plan in found.plans if plan["fits"] is not False]
    lines = [f"{'mesh':<34}{'remat':<7}{'accumulation':>12}{'pieces':>8}{'peak':>12}{'step':>10}{'MFU':>6}"]
    for plan in rows:
        mesh, settings = topology.shape_text(plan["mesh"]), plan["settings"]
        step = "" if plan["step_seconds"] is None else f"{plan['step_seconds']:.3g} s"
        mfu = "" if plan["mfu"] is None else f"{plan['mfu']:.0%}"
        piece = settings["Trainer.piece_length"] or "whole"
        lines.append(
            f"{mesh:<34}{plan['remat']:<7}{plan['accumulation']:>12}{piece:>8}{size(plan['peak_bytes']):>12}"
            f"{step:>10}{mfu:>6}"
        )
    if not rows:
        lines = ["nothing that was tried fits"]
    lines.append(f"{len(found.plans)} planned, {len(found.plans) - len(rows)} of them do not fit")
    if found.too_large:
        lines.append(f"{found.too_large} not compiled: weights, optimizer and inputs of blocks alone do not fit")
    lines += [f"refused: {topology.shape_text(vars(choice.mesh))}: {why}" for choice, why in found.refused]
    if found.untried:
        names = ", ".join(topology.shape_text(vars(mesh)) for mesh in found.untried)
        lines.append(f"not tried: {names}; a larger --search or --search_seconds tries more")
    if rows:
        best = rows[0]["settings"]
        flags = (f"--gin.{name}={value!r}" for name, value in best.items())
        lines.append("the fastest: " + " ".join(f'"{flag}"' if "'" in flag else flag for flag in flags))
        lines += ["", "# the same as lines at the end of a .gin file", *gin(best)]
    return "\n".join(lines)
