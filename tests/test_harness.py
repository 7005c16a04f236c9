"""The benchmarks' harness: turns, and work of others on the machine, from real and from written tables of processes."""

import json
import os
import pathlib
import subprocess
import sys

import pytest
from doc_pages import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))
import harness

THREADS = {"a": {"threads": 1}, "b": {"threads": 1}}
TICKS = os.sysconf("SC_CLK_TCK")
ME, CHILD, OTHER = 10, 11, 20


def proc(
    folder: pathlib.Path, *, busy: float, seconds: dict[tuple[int, int, str], tuple[float, float]]
) -> pathlib.Path:
    """A /proc: seconds is {(pid, parent, name): (own CPU seconds, those of its ended children)}."""
    folder.mkdir()
    (folder / "stat").write_text(
        f"cpu  {round(busy * TICKS)} 0 0 999 55 0 0 0 0 0\ncpu0 1 1 1 1 1 1 1 1 0 0\n"
    )
    for (pid, parent, name), (own, ended) in seconds.items():
        (folder / str(pid)).mkdir()
        times = f"{round(own * TICKS)} 0 {round(ended * TICKS)} 0"
        (folder / str(pid) / "stat").write_text(
            f"{pid} ({name}) S {parent} 0 0 0 0 0 0 0 0 0 {times} 0 0 0 0 {pid}\n"
        )
    return folder


# What was used between two tables: (ours, a child of ours that ended in between, another's, a short-lived one's).
@pytest.mark.parametrize(
    ("ours", "other", "unseen", "expected"),
    [(5.0, 0.0, 0.0, 0.0), (5.0, 2.0, 0.0, 2.0), (0.0, 0.0, 1.5, 1.5), (3.0, 2.0, 1.5, 3.5)],
    ids=["quiet", "another process", "one that came and went", "both"],
)
def test_other_work(tmp_path, ours, other, unseen, expected):
    me, child, stranger = (ME, 1, "python"), (CHILD, ME, "python"), (OTHER, 1, "a (b) c")
    before = proc(
        tmp_path / "before", busy=107.0, seconds={me: (1.0, 0.0), child: (2.0, 0.0), stranger: (4.0, 100.0)}
    )
    after = proc(  # the child has ended: its parent has its seconds
        tmp_path / "after",
        busy=107.0 + ours + other + unseen,
        seconds={me: (1.0, 2.0 + ours), stranger: (4.0 + other, 100.0)},
    )
    first, last = harness.sample(ME, before), harness.sample(ME, after)
    assert first.own == 3.0
    total, busiest = harness.beside(first, last)
    assert total == pytest.approx(expected, abs=0.02)
    assert busiest == ({"a (b) c": other} if other else {})


def test_other_work_without_a_total(tmp_path):
    """Where /proc/stat does not say how busy the machine was, the processes do."""
    tables = [
        proc(tmp_path / name, busy=0, seconds={(ME, 1, "python"): (1.0, 0.0), (OTHER, 1, "x"): (used, 0.0)})
        for name, used in (("before", 1.0), ("after", 3.0))
    ]
    for table in tables:
        (table / "stat").unlink()
    assert harness.beside(*(harness.sample(ME, table) for table in tables)) == (2.0, {"x": 2.0})
    assert harness.sample(ME, tmp_path / "nothing") is None


def test_a_busy_neighbour_is_noticed(tmp_path):
    """A real one, which is no child of this process: such a run is marked, with the numbers, and says so."""
    loop = "import os\nwhile os.getppid() and not os.path.exists('stop'): sum(range(100000))"
    shell = f'{sys.executable} -c "{loop}" >/dev/null 2>&1 & echo $!'
    pid = int(subprocess.run(["sh", "-c", shell], cwd=tmp_path, stdout=subprocess.PIPE, check=True).stdout)
    run = harness.Run("nothing", threads=THREADS)
    try:
        with run.watched():
            before = harness.sample()
            while harness.beside(before, harness.sample())[1].get(pathlib.Path(sys.executable).name, 0) < 0.5:
                assert pathlib.Path(f"/proc/{pid}").exists()
    finally:
        (tmp_path / "stop").touch()
    run.write(tmp_path / "out.json", rows=[{"a": 1}, {"a": 2}])
    result = json.loads((tmp_path / "out.json").read_text())
    assert result["quiet"] is False and result["rows"] == [{"a": 1}, {"a": 2}]
    assert result["watch"]["other_cpu_seconds"] >= 0.5
    assert result["threads"] == THREADS and result["versions"]["jax"]
    assert {"cpu", "device", "commit", "memory_gib"} <= set(result["machine"])


def test_turns(monkeypatch):
    """Every round calls every side once, in fresh order; the ratio is that of the same round."""
    monkeypatch.setattr(harness, "sample", lambda root: harness.Sample(0.0, 0.0, {}))
    called: list[str] = []

    def side(name, seconds):
        return lambda n: called.append(name) or seconds.pop(0)

    run = harness.Run("turns", threads=THREADS)
    turns = run.turns({"a": side("a", [9.0, 1.0, 2.0, 4.0]), "b": side("b", [9.0, 2.0, 2.0, 2.0])}, rounds=3)
    assert called == ["a", "b", *"ab", *"ba", *"ab"]
    assert turns.medians() == {"a": 2.0, "b": 2.0}
    assert turns.ratio("b", "a") == {"median": 1.0, "min": 0.5, "max": 2.0}
    assert run.quiet and run.record()["watch"]["other_cpu_seconds"] == 0.0
    slow = run.turns({"a": side("a", [9.0]), "b": side("b", [1.0, 0.5])}, rounds=1, slow=5.0)
    assert slow.times == {"a": [9.0], "b": [0.5]}


@pytest.mark.parametrize(("rounds", "low", "high"), [(6, 1, 6), (9, 2, 8), (20, 6, 15), (41, 14, 28)])
def test_the_interval_of_a_median(rounds, low, high):
    """Ranks from the usual tables for the sign test at 95%."""
    turns = harness.Turns({"a": [float(number) for number in range(rounds, 0, -1)], "b": [1.0] * rounds})
    assert turns.interval("a", "b") == [low, high]
    with pytest.raises(ValueError, match="5 rounds; expected at least 6"):
        harness.Turns({"a": [1.0] * 5, "b": [1.0] * 5}).interval("a", "b")


def test_a_side_in_another_process():
    """It answers for as long as it lives, and nothing stands for a number once it has died."""
    program = "import json, sys\nfor x in map(json.loads, sys.stdin):\n  print('noise')\n"
    program += (
        "  print('answer', json.dumps(x['calls'] / x['rate']), flush=True)\n  x['calls'] == 3 and sys.exit()"
    )
    child = harness.Child(sys.executable, "-c", program)
    side = child.side({"rate": 4})
    assert side(2) == 0.5 and side(3) == 0.75
    child.process.wait(60)
    assert side(1) != side(1)  # nan
    child.close()


def test_no_measurement_is_not_quiet():
    assert not harness.Run("nothing", threads=THREADS).quiet


@pytest.mark.parametrize(
    ("seconds", "used", "worst", "expected"),
    [
        (100.0, 9.0, 0.2, True),
        (100.0, 11.0, 0.2, False),  # 5.5% of two CPUs
        (100.0, 1.0, 0.4, False),  # little, but all in one measurement
        (0.2, 0.09, 0.09, True),  # a few ticks of the clock
        (100.0, None, None, False),  # the system does not tell
    ],
)
def test_what_counts_as_quiet(seconds, used, worst, expected):
    watch = {"seconds": seconds, "other_cpu_seconds": used, "other_cpus_at_most": worst}
    assert harness.quiet(watch, 2) is expected
