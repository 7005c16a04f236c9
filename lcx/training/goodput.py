"""Where the time of a run goes: data, compute, saving; and which share of it since the start made progress (goodput).

A step's time is what passes between the end of the step before and its own. The part of it in which the devices had
nothing to do, because the step had not been dispatched yet, counts as data; the rest as compute. Goodput is the compute
time of all steps that count, divided by the time since the run was first started: compilation, restarts, the pauses
between them, steps that were lost and done again, saves and evaluations all lower it.
"""

from __future__ import annotations

import contextlib
import json
import pathlib
import time
from collections.abc import Iterator

PARTS = ("data", "compute", "save")


class Ledger:
    """The times of one run, over its restarts.

    Args:
      started: when the run was first started, in seconds of `time.time()`; None: now.
      productive: seconds of compute in earlier processes, of steps that still count.
    """

    def __init__(self, started: float | None = None, productive: float = 0.0):
        self._started = time.time() if started is None else started
        self._productive = productive
        self._since = dict.fromkeys(PARTS, 0.0)  # the last line

    def step(self, begin: float, dispatched: float, end: float) -> None:
        """Adds a step that ran from `begin` to `end` and was dispatched at `dispatched`, seconds of one clock."""
        waited = min(max(0.0, dispatched - begin), end - begin)
        self._since["data"] += waited
        self._since["compute"] += end - begin - waited
        self._productive += end - begin - waited

    @contextlib.contextmanager
    def saving(self) -> Iterator[None]:
        begin = time.perf_counter()
        try:
            yield
        finally:
            self._since["save"] += time.perf_counter() - begin

    def line(self) -> dict[str, float]:
        """What a line of metrics.jsonl says: the seconds of each part since the line before, and the goodput so far."""
        now = time.time()
        wall = max(now - self._started, 1e-9)
        parts = {f"{name}_seconds": seconds for name, seconds in self._since.items()}
        self._since = dict.fromkeys(PARTS, 0.0)
        share = min(1.0, self._productive / wall)
        return {"time": round(now, 3), "wall_seconds": wall, **parts, "goodput": share}

    def summary(self) -> str:
        wall = max(time.time() - self._started, 1e-9)
        share = min(1.0, self._productive / wall)
        return f"goodput: {share:.1%} of the {wall:.0f} s since the run was first started went into its steps"


def ledger_of(workdir: str, step: int) -> Ledger:
    """The ledger of a run that resumes after `step` updates, as far as its metrics.jsonl tells; else a new one."""
    last = None
    with contextlib.suppress(OSError), open(pathlib.Path(workdir) / "metrics.jsonl", "rb") as file:
        for text in file:
            with contextlib.suppress(ValueError, TypeError, AttributeError):
                record = json.loads(text)
                if record.get("step", 0) <= step and {"time", "wall_seconds", "goodput"} <= record.keys():
                    last = record
    if not step or last is None:
        return Ledger()
    wall = float(last["wall_seconds"])
    return Ledger(float(last["time"]) - wall, float(last["goodput"]) * wall)
