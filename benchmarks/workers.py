"""Sides that live in processes of their own, each with the environment that it would have outside of a benchmark.

    class Side:                                              # in benchmarks/x.py
        def __init__(self, kind): ...                        # "lcx" or "torch"
        def threads(self): return {"threads": 2}
        def prepare(self, T): ...
        def step(self): ...

    with workers.started(__file__, ("lcx", "torch")) as sides:
        run = harness.Run("a step", threads=sides.threads)
        sides.ask("prepare", T=256)
        turns = run.turns(sides.timed("step"), rounds=7)
        peer = workers.faster(turns, "torch")

    if __name__ == "__main__":
        workers.serve(Side) if workers.asked() else main()

lcx runs as its commands do (lcx/huge_pages.py). A peer runs as it would, and a second time with pages of 2 MB where
lcx has them ("torch, 2 MB pages"): `faster` picks the one that counts. A worker that is not asked waits for a line on
a pipe; what it uses of a CPU meanwhile, such as threads that spin, the harness counts like the work of other processes.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import harness

from lcx import huge_pages

HUGE, FLAG = ", 2 MB pages", "--worker"


class Library:
    """A side that runs lcx, or another library with torch; base class of the sides of benchmarks of decoding."""

    def __init__(self, kind: str):
        self.lcx = kind == "lcx"
        if not self.lcx:
            import torch  # noqa: F401  (its threads)

    def threads(self) -> dict:
        if self.lcx:
            return harness.jax_threads()
        import torch

        return {"threads": torch.get_num_threads()}


def asked() -> bool:
    """Whether this process is a worker."""
    return sys.argv[1:2] == [FLAG]


def serve(make: Callable[[str], Any]) -> None:
    """Calls the methods of make(kind) that lines on stdin name, until there are no more, and answers their results."""
    side = make(sys.argv[2])
    for line in sys.stdin:
        request = json.loads(line)
        method, calls = getattr(side, request.pop("do")), request.pop("calls", None)
        if before := request.pop("before", None):
            getattr(side, before)()
        start = time.perf_counter()
        for _ in range(calls or 1):
            answer = method(**request)
        seconds = time.perf_counter() - start
        print("answer " + json.dumps(answer if calls is None else seconds), flush=True)


def environments(side: str) -> dict[str, dict[str, str]]:
    """{name: environment} of the processes for one side."""
    plain = {huge_pages.TUNABLES: ""}
    if not huge_pages.wanted({**os.environ, **plain}):
        return {side: {}}
    large = huge_pages.with_tunable(plain)
    return {side: large} if side == "lcx" else {side: plain, side + HUGE: large}


class Sides:
    """Worker processes by name."""

    def __init__(self, program: str, kinds: tuple[str, ...]):
        self.processes, pages = dict[str, harness.Child](), dict[str, str]()
        for kind in kinds:
            for name, env in environments(kind).items():
                self.processes[name] = harness.Child(sys.executable, program, FLAG, kind, env=env, stderr=None)
                pages[name] = harness.malloc_pages(os.environ | env)
        self.threads = {name: {**own, "pages": pages[name]} for name, own in self.ask("threads").items()}

    def ask(self, method: str, **arguments) -> dict[str, Any]:
        """The result of this method in each process, one after the other."""
        answers = {}
        for name, process in self.processes.items():
            answers[name] = process.ask({"do": method, **arguments})
            if not process.alive:
                raise SystemExit(f"the process for {name!r} has ended in {method!r}: its message is above")
        return answers

    def timed(self, method: str, **arguments) -> dict[str, harness.Side]:
        """Sides for `Run.turns`, which call this method; before=NAME: and another one first, which is not timed."""
        return {name: x.side({"do": method, **arguments}) for name, x in self.processes.items()}


@contextlib.contextmanager
def started(program: str, kinds: tuple[str, ...]) -> Iterator[Sides]:
    """The processes of `program --worker KIND`, in their environments."""
    sides = Sides(program, kinds)
    try:
        yield sides
    finally:
        for process in sides.processes.values():
            process.close()


def faster(turns: harness.Turns, peer: str) -> str:
    """The peer's name, with or without large pages: the one whose median is smaller."""
    names = [name for name in (peer, peer + HUGE) if name in turns.times]
    return min(names, key=turns.seconds)
