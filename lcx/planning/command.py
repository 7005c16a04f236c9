"""`python -m lcx.plan`: reads the job, compiles its step, prints the plan."""

import json
import math
import sys
from typing import Any

import numpy as np
import tqdm

from lcx.errors import UserError
from lcx.planning import longest as longest_rows
from lcx.planning import report
from lcx.planning import search as settings
from lcx.planning.abstract import trainer_of
from lcx.planning.compiled import Memory, least_bytes, mesh_of, step_of
from lcx.planning.topology import Topology, find, shape_text
from lcx.trainer import Job, Trainer


def plan(
    *,
    job: Job,
    topology: str,
    as_json: bool = False,
    longest: bool = False,
    search: int | None = None,
    search_seconds: float | None = None,
) -> int:
    """Plans the job that a .gin file binds to `train.job`, and prints the plan.

    Args:
      job: a Trainer, or a Ladder, of which the longest rung is planned.
      topology: the devices, see `topology.find`.
      as_json: print one JSON object.
      longest: also search for the longest rows that fit, which compiles several times.
      search: plan so many other settings of the same training instead, and print those that fit.
      search_seconds: begin no further plan of a search after so many seconds.

    Returns:
      The exit status: 0 if the step (of a search: any) fits, 1 if it does not.

    Raises:
      UserError: see `topology.find` and `compiled.step_of`.
    """
    if search_seconds is not None and (search is None or not search_seconds > 0):
        raise UserError(f"--search_seconds={search_seconds:g}: expected a time above 0, together with --search")
    place = find(topology)
    trainer, notes = trainer_of(job)
    if search is not None:
        if longest:
            raise UserError("--search and --longest: each plans many steps; run one after the other")
        return _search(trainer, place, search, search_seconds, notes, as_json)
    step = step_of(trainer, place)
    found = _longest(trainer, place, step.memory) if longest else None
    made = report.plan(step, trainer, place, found, notes)
    print(json.dumps(made) if as_json else report.text(made))
    return 1 if made["fits"] is False else 0


def _search(
    trainer: Trainer, place: Topology, limit: int, seconds: float | None, notes: list[str], as_json: bool
) -> int:
    if limit < 1:
        raise UserError(f"--search={limit}: expected at least 1, the number of settings to try")

    def possible(choice: Trainer) -> bool:
        return place.memory is None or least_bytes(choice, place) <= place.memory

    with tqdm.tqdm(total=limit, desc="plans", file=sys.stderr, disable=not sys.stderr.isatty()) as bar:

        def planned(choice: Trainer) -> dict[str, Any]:
            made = report.plan(step_of(choice, place), choice, place, None, notes)
            mesh = shape_text(made["mesh"])
            about = f"{mesh}, remat {made['remat']}, accumulation {made['accumulation']}"
            bar.write(f"{about}: {report.size(made['peak_bytes'])}", file=sys.stderr)
            bar.update()
            return made

        count, hosts = np.size(place.devices), place.host_memory is not None
        end = math.inf if seconds is None else seconds
        found = settings.search(trainer, count, planned, limit, seconds=end, possible=possible, hosts=hosts)
    if as_json:
        refused = [{"settings": choice.flags(), "reason": why} for choice, why in found.refused]
        untried = [vars(mesh) for mesh in found.untried]
        answer = {"plans": found.plans, "refused": refused, "untried": untried, "too_large": found.too_large}
        print(json.dumps(answer))
    else:
        print(settings.text(found, report.size))
    return 0 if any(made["fits"] is not False for made in found.plans) else 1


def _longest(trainer: Trainer, place: Topology, memory: Memory) -> int | None:
    """The longest rows that fit, devices and hosts; None if the memory of the devices is unknown."""
    if place.memory is None:
        return None
    known = {trainer.seq_len: memory}
    unit = math.lcm(
        mesh_of(trainer, place).shape["context"], 128 if place.chip else 1, trainer.piece_length or 1
    )

    def needed_at(seq_len: int) -> int:
        if seq_len not in known:
            known[seq_len] = step_of(longest_rows.with_length(trainer, seq_len), place).memory
            print(f"{seq_len} tokens: {report.size(known[seq_len].peak)}", file=sys.stderr, flush=True)
        return place.needed(known[seq_len].peak, known[seq_len].host)

    return longest_rows.longest(needed_at, place.memory, start=trainer.seq_len, unit=unit)
