"""Where the time of a run goes: the parts of a step, the goodput over restarts, the window of the profiler."""

from __future__ import annotations

import json
import types

import pytest
from tiny_runs import text_fixture, tiny_trainer  # noqa: F401

from lcx.errors import UserError
from lcx.training import goodput, profiling
from lcx.training.goodput import Ledger, ledger_of


@pytest.fixture
def clock(monkeypatch):
    """The seconds of both clocks, set by the test."""
    now = [1000.0]
    fake = types.SimpleNamespace(time=lambda: now[0], perf_counter=lambda: now[0])
    monkeypatch.setattr(goodput, "time", fake)
    return now


def test_a_step_is_data_and_compute(clock):
    ledger = Ledger()
    ledger.step(0.0, 0.5, 2.0)  # dispatched half a second after the one before was done
    ledger.step(2.0, 1.0, 3.0)  # dispatched while the one before still ran
    with ledger.saving():
        clock[0] += 4.0
    clock[0] = 1010.0
    line = ledger.line()
    assert (line["data_seconds"], line["compute_seconds"], line["save_seconds"]) == (0.5, 2.5, 4.0)
    assert line["wall_seconds"] == 10.0 and line["goodput"] == 0.25 and line["time"] == 1010.0
    clock[0] = 1020.0
    line = ledger.line()
    assert (line["data_seconds"], line["compute_seconds"], line["save_seconds"]) == (0.0, 0.0, 0.0)
    assert line["goodput"] == 0.125, "of the whole run"
    assert ledger.summary() == "goodput: 12.5% of the 20 s since the run was first started went into its steps"


def test_a_resumed_run_goes_on_counting_and_lost_steps_do_not_count(clock, tmp_path):
    first = Ledger()
    lines = []
    for step in (1, 2, 3):
        clock[0] += 10.0
        first.step(0.0, 0.0, 8.0)
        lines.append({"step": step, **first.line()})
    lines.insert(2, {"step": 2, "eval_loss": 1.0})
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 4, "l')
    clock[0] = 1100.0  # 70 seconds after the third step, of which the second was the last that had been saved
    again = ledger_of(str(tmp_path), 2)
    again.step(0.0, 0.0, 4.0)
    line = again.line()
    assert line["wall_seconds"] == pytest.approx(100) and line["goodput"] == pytest.approx(0.2)
    assert ledger_of(str(tmp_path), 0).line()["wall_seconds"] < 1e-6  # a new run
    (tmp_path / "metrics.jsonl").write_text('{"step": 2, "loss": 1.0}\n[]\n')  # written before there was a goodput
    assert ledger_of(str(tmp_path), 2).line()["goodput"] == 0.0


@pytest.mark.parametrize(
    "window, before, steps, recorded",
    [
        ((3, 4), 0, 6, [("start", 2), ("stop", 4)]),
        ((1, 1), 0, 2, [("start", 0), ("stop", 1)]),
        ((3, 9), 0, 5, [("start", 2), ("stop", "end")]),
        ((3, 6), 4, 8, [("start", 4), ("stop", 6)]),  # resumed within the window
        ((3, 6), 6, 8, []),
        (None, 0, 4, []),
    ],
)
def test_the_window_of_the_profiler(monkeypatch, tmp_path, window, before, steps, recorded):
    seen, at = [], [before]
    monkeypatch.setattr(profiling.jax.profiler, "start_trace", lambda folder: seen.append(("start", at[0])))
    monkeypatch.setattr(profiling.jax.profiler, "stop_trace", lambda: seen.append(("stop", at[0])))
    profile = profiling.Profile(window, str(tmp_path), before)
    for step in range(before + 1, steps + 1):
        at[0] = step
        profile.after(step)
    at[0] = "end"
    profile.close()
    assert seen == recorded


@pytest.mark.parametrize("window", [(0, 3), (4, 3), (2,)])
def test_windows_that_cannot_be(window):
    with pytest.raises(UserError, match="Trainer.profile is .* expected the first and the last step"):
        profiling.check(window, 100)
    with pytest.raises(UserError, match="expected steps of the run, which ends after 100"):
        profiling.check((101, 103), 100)


def test_a_profiler_that_fails_does_not_stop_the_run(monkeypatch, tmp_path, caplog):
    def taken(folder):
        raise RuntimeError("Only one profile may be run at a time.")

    monkeypatch.setattr(profiling.jax.profiler, "start_trace", taken)
    profile = profiling.Profile((1, 2), str(tmp_path), 0)
    profile.after(1)
    profile.after(2)
    profile.close()
    assert "Only one profile may be run at a time" in caplog.text


def test_a_run_writes_a_trace_and_its_times(text, tmp_path, capsys):
    run = tiny_trainer(text, steps=8, log_every=2, checkpoint_every=4, profile=(5, 6)).run(str(tmp_path))
    assert run.step == 8
    (trace,) = (tmp_path / "profile" / "plugins" / "profile").glob("*/*.xplane.pb")
    assert b"jit_" in trace.read_bytes()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    lines = [line for line in lines if "goodput" in line]
    assert [line["step"] for line in lines] == [2, 4, 6, 8]
    spent = sum(line[f"{part}_seconds"] for line in lines for part in goodput.PARTS)
    assert 0 < spent <= lines[-1]["wall_seconds"] * 1.001
    assert sum(line["save_seconds"] > 0 for line in lines) == 1, "the save of step 4, in the line of step 6"
    computed = sum(line["compute_seconds"] for line in lines)
    assert lines[-1]["goodput"] == pytest.approx(computed / lines[-1]["wall_seconds"])
    assert "goodput: " in capsys.readouterr().err
