"""Sides of a benchmark in processes of their own: environments, answers, and what they use while they wait."""

import os
import sys

import pytest
from doc_pages import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))
import harness
import workers

from lcx import huge_pages

PROGRAM = f"""
import os, sys, threading, time
sys.path.insert(0, {str(ROOT / "benchmarks")!r})

class Side:
    def __init__(self, kind):
        self.kind, self.done = kind, []
    def threads(self):
        return {{"threads": 3}}
    def pages(self):
        return os.environ.get("GLIBC_TUNABLES", "")
    def step(self, size):
        self.done.append(size)
        return len(self.done)
    def spin(self):
        def use():
            end = time.process_time() + 0.4
            while time.process_time() < end:
                pass
        threading.Thread(target=use).start()
    def fail(self):
        sys.exit("a reason")
"""
# serve() without the harness, which imports jax
ALONE = """
import types
sys.modules["harness"] = types.ModuleType("harness")
import workers
workers.serve(Side)
"""


@pytest.fixture
def program(tmp_path, monkeypatch):
    path = tmp_path / "program.py"
    path.write_text(PROGRAM + ALONE)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    return str(path)


@pytest.fixture
def large_pages(monkeypatch):
    monkeypatch.setattr(huge_pages, "wanted", lambda environment: True)
    monkeypatch.setenv(huge_pages.TUNABLES, "glibc.malloc.hugetlb=1")  # of whoever runs the benchmark


def test_each_side_has_its_own_environment(program, large_pages, monkeypatch):
    """lcx as its commands run it; the peer as it is and with large pages; neither as the benchmark was started."""
    with workers.started(program, ("lcx", "torch")) as sides:
        tunables = sides.ask("pages")
        assert sides.threads["torch"] == {"threads": 3, "pages": "4 KB"}
        assert sides.threads["lcx"] == sides.threads["torch, 2 MB pages"] == {"threads": 3, "pages": "2 MB"}
    large = "glibc.malloc.hugetlb=1"
    assert tunables == {"lcx": large, "torch": "", "torch, 2 MB pages": large}
    monkeypatch.setattr(huge_pages, "wanted", lambda environment: False)
    assert workers.environments("torch") == {"torch": {}}


def test_turns_of_processes(program, large_pages):
    """A worker keeps its state between turns, and what it uses of a CPU while another has its turn is counted."""
    with workers.started(program, ("lcx", "torch")) as sides:
        run = harness.Run("steps", threads=sides.threads)
        turns = run.turns(sides.timed("step", size=2), rounds=3)
        assert sides.ask("step", size=1) == dict.fromkeys(sides.processes, 5)
        assert {name: len(times) for name, times in turns.times.items()} == dict.fromkeys(sides.processes, 3)
        ours, theirs = sides.processes["lcx"], sides.processes["torch"]
        theirs.ask({"do": "spin"})

        def until_it_has_spun(n):
            before = harness.cpu_seconds(theirs.process.pid)
            while harness.cpu_seconds(theirs.process.pid) < before + 0.2:
                pass
            return 1.0

        lazy = {"lcx": until_it_has_spun, "torch": theirs.side({"do": "step", "size": 1})}
        with run.watched() as idle, harness._idle_apart_from(lazy, "lcx", idle):
            lazy["lcx"](1)
        assert ours.alive and idle["torch, waiting"] >= 0.2
        assert run.sections[-1]["busiest"]["torch, waiting"] >= 0.2 <= run.sections[-1]["other"]


def test_a_worker_that_fails_ends_the_benchmark(program, capfd):
    with workers.started(program, ("lcx",)) as sides, pytest.raises(SystemExit, match="'lcx' has ended in 'fail'"):
        sides.ask("fail")
    assert "a reason" in capfd.readouterr().err


def test_the_faster_kind_of_pages_counts():
    turns = harness.Turns({"lcx": [1.0], "torch": [2.0, 2.0, 5.0], "torch, 2 MB pages": [3.0, 1.9, 3.0]})
    assert workers.faster(turns, "torch") == "torch"
    assert workers.faster(harness.Turns({"torch": [2.0]}), "torch") == "torch"
    turns = harness.Turns({**turns.times, "torch, 2 MB pages": [1.0, 1.9, 3.0]})
    assert workers.faster(turns, "torch") == "torch, 2 MB pages"
    assert turns.ratio("torch, 2 MB pages", "lcx") == {"median": 1.9, "min": 1.0, "max": 3.0}  # lcx ran once


def test_a_process_that_is_not_there():
    assert harness.cpu_seconds(os.getpid()) > 0 and harness.cpu_seconds(2**30) == 0
