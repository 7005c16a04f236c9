"""What a line of a run says of its speed, recomputed from when each step was done."""

from __future__ import annotations

import types

import jax.numpy as jnp
import pytest
from tiny_runs import tiny_model

from lcx.optim import AdamW
from lcx.training import doubtful
from lcx.training import meter as meter_lib
from lcx.training.meter import Meter, NotFiniteError
from lcx.training.statements import counted

TOKENS = 8 * 32


class Log:
    def __init__(self):
        self.lines = {}

    def log(self, step, numbers):
        self.lines[step] = numbers

    def advance(self, step):
        pass


@pytest.fixture
def clock(monkeypatch):
    """Steps are done at the times that a test writes here."""
    times: list[float] = []
    monkeypatch.setattr(meter_lib, "_done", lambda value: times.pop(0))
    monkeypatch.setattr(meter_lib.time, "perf_counter", lambda: clock_now[0])
    clock_now = [0.0]
    return times, clock_now


def metered(log, *, every, last, peak, monkeypatch):
    monkeypatch.setattr(meter_lib, "peak_flops", lambda: peak)
    return Meter(tiny_model(), log, batch_size=8, seq_len=32, every=every, last=last, losses=[])


def values(loss=1.0):
    return {"loss": jnp.float32(loss), "grad_norm": jnp.float32(1)}


def test_every_line_has_the_speed_of_its_own_steps(clock, monkeypatch):
    """The first step compiles, an evaluation pauses, and steps queue up behind the host: none of it counts."""
    times, now = clock
    log = Log()
    meter = metered(log, every=1, last=6, peak=None, monkeypatch=monkeypatch)
    times += [60.0, 60.5, 61.0]  # compilation took the first minute
    for step in (1, 2, 3):
        meter.add(step, values(step))
    now[0] = 61.0
    with meter.paused():
        now[0] = 90.0  # an evaluation of 29 s
    times += [90.25, 90.75, 91.0]
    for step in (4, 5, 6):
        meter.add(step, values(step))
    meter.drain()
    speeds = {step: line.get("tokens_per_second") for step, line in log.lines.items()}
    seconds = {2: 0.5, 3: 0.5, 4: 0.25, 5: 0.5, 6: 0.25}
    assert speeds == {1: None} | {step: pytest.approx(TOKENS / s) for step, s in seconds.items()}
    assert [line["loss"] for line in log.lines.values()] == [1, 2, 3, 4, 5, 6]
    assert not any("mfu" in line for line in log.lines.values())


def test_a_line_of_several_steps_and_the_share_of_a_known_peak(clock, monkeypatch):
    times, _ = clock
    log = Log()
    meter = metered(log, every=3, last=5, peak=1e9, monkeypatch=monkeypatch)
    times += [10.0, 11.0, 12.0, 13.0, 15.0]
    for step in range(1, 6):
        meter.add(step, values(step))
    meter.drain()
    assert set(log.lines) == {3, 5}
    assert log.lines[3]["tokens_per_second"] == pytest.approx(2 * TOKENS / 2)  # the first is not timed
    assert log.lines[5]["tokens_per_second"] == pytest.approx(2 * TOKENS / 3)
    flops = meter_lib.model_lib.flops_per_token(tiny_model(), 32)
    assert log.lines[5]["mfu"] == pytest.approx(2 * TOKENS / 3 * flops / 1e9)
    assert log.lines[3]["loss"] == 2 and log.lines[5]["loss"] == 4.5


def test_a_loss_that_is_no_number_names_its_step():
    log = Log()
    meter = Meter(tiny_model(), log, batch_size=8, seq_len=32, every=1, last=9, losses=[])
    meter.add(1, values())
    meter.add(2, values(float("nan")))
    with pytest.raises(NotFiniteError, match="loss is nan at step 2") as error:
        meter.add(3, values())
    assert error.value.step == 2 and set(log.lines) == {1}


@pytest.mark.parametrize(
    "number, words",
    [(950, "950"), (12_345, "12.3 thousand"), (1_240_000, "1.24 million"), (8_030_261_248, "8.03 billion")],
)
def test_counts_in_words(number, words):
    assert counted(number) == words


def test_a_line_too_soon_to_measure_has_no_speed_and_the_next_counts_its_steps(clock, monkeypatch):
    times, _ = clock
    log = Log()
    meter = metered(log, every=1, last=4, peak=None, monkeypatch=monkeypatch)
    times += [60.0, 60.001, 60.101, 60.2]  # the end of the first step was seen 49 ms late
    for step in range(1, 5):
        meter.add(step, values(step))
    meter.drain()
    speeds = {step: line.get("tokens_per_second") for step, line in log.lines.items()}
    assert speeds == {1: None, 2: None, 3: pytest.approx(2 * TOKENS / 0.101), 4: None}
    assert [line["loss"] for line in log.lines.values()] == [1, 2, 3, 4]


def test_settings_without_effect_are_named():
    def said(optimizer, model, **more):
        job = types.SimpleNamespace(optimizer=optimizer, model=model, steps=40, seq_len=32, **more)
        return list(doubtful.settings(job, model))

    optimizer = AdamW(plateau_patience=3, warmup_from=0.5, warmup_steps=0, decay="kernel")
    model = tiny_model(model_type="lama", max_position_embeddings=16)
    for line, expected in zip(
        said(optimizer, model, piece_length=64),
        (
            "Trainer.seq_len 32 exceeds the model's window of 16",
            "model_type 'lama' is not one of llama, mistral",
            "Trainer.piece_length 64 has no effect: rows have 32 tokens",
            "AdamW.plateau_patience has no effect: schedule is 'cosine'",
            "AdamW.warmup_from has no effect: there are no warmup_steps",
            "AdamW.decay has no effect: weight_decay is 0",
        ),
        strict=True,
    ):
        assert line.startswith(expected)
    assert not said(AdamW(), tiny_model())
