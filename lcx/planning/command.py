"""`python -m lcx.plan`: reads the job, compiles its step, prints the plan."""

import json
import math
import sys

from lcx.planning import longest as longest_rows
from lcx.planning import report
from lcx.planning.abstract import trainer_of
from lcx.planning.compiled import mesh_of, step_of
from lcx.planning.topology import Topology, find
from lcx.trainer import Job, Trainer


def plan(*, job: Job, topology: str, as_json: bool = False, longest: bool = False) -> int:
    """Plans the job that a .gin file binds to `train.job`, and prints the plan.

    Args:
      job: a Trainer, or a Ladder, of which the longest rung is planned.
      topology: the devices, see `topology.find`.
      as_json: print one JSON object.
      longest: also search for the longest rows that fit, which compiles several times.

    Returns:
      The exit status: 0 if the step fits, 1 if it does not.

    Raises:
      UserError: see `topology.find` and `compiled.step_of`.
    """
    place = find(topology)
    trainer, notes = trainer_of(job)
    step = step_of(trainer, place)
    found = _longest(trainer, place, step.memory.peak) if longest else None
    made = report.plan(step, trainer, place, found, notes)
    print(json.dumps(made) if as_json else report.text(made))
    return 1 if made["fits"] is False else 0


def _longest(trainer: Trainer, place: Topology, peak: int) -> int | None:
    """The longest rows that fit; None if the memory of the devices is unknown."""
    if place.memory is None:
        return None
    known = {trainer.seq_len: peak}
    unit = math.lcm(
        mesh_of(trainer, place).shape["context"], 128 if place.chip else 1, trainer.piece_length or 1
    )

    def peak_at(seq_len: int) -> int:
        if seq_len not in known:
            known[seq_len] = step_of(longest_rows.with_length(trainer, seq_len), place).memory.peak
            print(f"{seq_len} tokens: {report.size(known[seq_len])}", file=sys.stderr, flush=True)
        return known[seq_len]

    return longest_rows.longest(peak_at, place.memory, start=trainer.seq_len, unit=unit)
