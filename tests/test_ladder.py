"""The ladder: 64 -> 128 -> 256 from a tiny pretrained model; killed, resumed, gated."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import re
import signal
import subprocess
import time

import jax
import pytest
from tiny_runs import (
    StopAt,
    assert_same_checkpoint,
    command,
    dataset,
    environment,
    lines,
    losses,
    saved,
    tiny_model,
    tiny_trainer,
    write_gin,
    write_text,
)

import lcx
from lcx import train
from lcx import trainer as trainer_lib
from lcx.checkpoint import Checkpointer
from lcx.convert.workdir.format import Workdir
from lcx.errors import UserError
from lcx.evals import passkey
from lcx.ladder import Gate, Ladder, Rung
from lcx.optim import AdamW
from lcx.sharding import MeshShape
from lcx.trainer import Trainer

RUNGS = (
    Rung(context_length=128, steps=3),
    Rung(context_length=256, steps=6, batch_size=2, accumulation=2, learning_rate=4e-3),
)
GIN = """
from __gin__ import dynamic_registration
from lcx import data
from lcx import ladder
from lcx import optim
from lcx import trainer

trainer.train.job = @ladder.Ladder()
ladder.Ladder.trainer = @trainer.Trainer()
ladder.Ladder.rope_scaling = {'rope_type': 'yarn'}
ladder.Ladder.rungs = (@first/ladder.Rung(), @second/ladder.Rung())
first/ladder.Rung.context_length = 128
first/ladder.Rung.steps = 3
second/ladder.Rung.context_length = 256
second/ladder.Rung.steps = 6
second/ladder.Rung.batch_size = 2
second/ladder.Rung.accumulation = 2
second/ladder.Rung.learning_rate = 4e-3
trainer.Trainer.init_from = '{folder}/base'
trainer.Trainer.data = @data.Dataset()
trainer.Trainer.optimizer = @optim.AdamW()
trainer.Trainer.steps = 1
trainer.Trainer.seq_len = 64
trainer.Trainer.batch_size = 4
trainer.Trainer.log_every = 1
trainer.Trainer.checkpoint_every = 2
trainer.Trainer.eval_batches = 2
optim.AdamW.learning_rate = 1e-3
optim.AdamW.warmup_steps = 1
data.Dataset.source = '{folder}/text'
data.Dataset.cache_dir = '{folder}/cache'
data.Dataset.split = 'tail'
data.Dataset.eval_fraction = 0.2
"""


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A folder with text, and a model with a window of 64 tokens that was pretrained on it."""
    folder = tmp_path_factory.mktemp("base")
    write_text(folder)
    model = tiny_model(max_position_embeddings=64)
    tiny_trainer(folder, model=model, checkpoint_every=100).run(str(folder / "base"))
    return folder


def tiny_ladder(base, **changes) -> Ladder:
    trainer = Trainer(
        init_from=str(base / "base"),
        data=dataset(base),
        optimizer=AdamW(learning_rate=1e-3, warmup_steps=1),
        steps=1,
        seq_len=64,
        batch_size=4,
        log_every=1,
        checkpoint_every=2,
        eval_batches=2,
    )
    settings = {"trainer": trainer, "rungs": RUNGS, "rope_scaling": {"rope_type": "yarn"}}
    return Ladder(**{**settings, **changes})


@pytest.fixture(scope="module")
def whole(base, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("whole")
    assert tiny_ladder(base).run(str(workdir)) == str(workdir / "256" / "round_0")
    return workdir


def test_each_rung_is_relative_to_the_original_window(whole):
    for length, factor in ((128, 2.0), (256, 4.0)):
        model, _ = lcx.load(whole / str(length) / "round_0")
        assert model.max_position_embeddings == length
        rope = model.stages[0].pattern[0].mixer.rope
        assert (rope.rope_type, rope.factor, rope.original_max_position_embeddings) == ("yarn", factor, 64)


def test_each_rung_has_its_own_length_batch_and_rate(whole):
    for length, rows, steps, rate in ((128, 4, 3, 1e-3 / 2**0.5), (256, 2, 6, 4e-3 / 2)):
        workdir = whole / str(length) / "round_0"
        step, _, documents = saved(workdir)
        assert step == steps
        assert documents["meta"]["seq_len"] == length
        assert documents["data"]["next_index"] == rows * steps
        rates = [line["learning_rate"] for line in lines(workdir) if "loss" in line]
        assert len(rates) == steps and rates[0] == 0
        assert max(rates) == rates[1] == pytest.approx(rate, rel=1e-6)  # one step of warmup


def test_each_rung_starts_from_the_one_before(base, whole, tmp_path):
    trainer = tiny_ladder(base).trainer
    alone = dataclasses.replace(
        trainer,
        init_from=str(whole / "128" / "round_0"),
        steps=6,
        seq_len=256,
        batch_size=2,
        accumulation=2,
        context_length=256,
        rope_scaling={"rope_type": "yarn", "factor": 4.0},
        optimizer=AdamW(learning_rate=4e-3, warmup_steps=1, context_scale=4.0),
    )
    alone.run(str(tmp_path))
    assert_same_checkpoint(tmp_path, whole / "256" / "round_0")


def test_a_finished_ladder_is_left_alone(base, whole, monkeypatch):
    monkeypatch.setattr(Trainer, "run", lambda *_: pytest.fail("trained again"))
    assert tiny_ladder(base).run(str(whole)) == str(whole / "256" / "round_0")


def test_killed_in_the_second_rung_and_resumed(base, whole, tmp_path):
    gin_file = write_gin(base, GIN)
    process = subprocess.Popen(
        command(gin_file, tmp_path), env=environment(), stderr=subprocess.PIPE, text=True
    )
    second = tmp_path / "256" / "round_0"
    deadline = time.monotonic() + 200
    while not (second / "checkpoints" / "2" / "commit_success.txt").exists():
        assert process.poll() is None and time.monotonic() < deadline, process.communicate(timeout=60)
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=60)
    assert not (second / "gate.json").exists()
    before = (tmp_path / "128" / "round_0" / "metrics.jsonl").read_bytes()
    assert train.main([f"--gin_file={gin_file}", f"--workdir={tmp_path}"]) == 0
    assert (tmp_path / "128" / "round_0" / "metrics.jsonl").read_bytes() == before  # the first rung was done
    for rung in ("128", "256"):
        assert_same_checkpoint(tmp_path / rung / "round_0", whole / rung / "round_0")
        assert lines(tmp_path / rung / "round_0") == lines(whole / rung / "round_0")


def test_asked_to_stop_in_the_second_rung(base, whole, tmp_path, monkeypatch):
    stops = iter([StopAt(1000), StopAt(4)])
    with monkeypatch.context() as patch:
        patch.setattr(trainer_lib, "StopRequest", lambda: next(stops))
        assert tiny_ladder(base).run(str(tmp_path)) is None
    assert saved(tmp_path / "256" / "round_0")[0] == 4
    assert not (tmp_path / "256" / "round_0" / "gate.json").exists()
    assert tiny_ladder(base).run(str(tmp_path)) == str(tmp_path / "256" / "round_0")
    assert_same_checkpoint(tmp_path / "256" / "round_0", whole / "256" / "round_0")


# --- the gate


def short_loss(base, path) -> float:
    """Mean nll of the held-out rows of 64 tokens, from the public logits."""
    model, params = lcx.load(path)
    total = weight = 0.0
    with dataset(base).batches("eval", global_batch_size=4, seq_len=64) as batches:
        for _, batch in zip(range(2), batches, strict=False):
            places = {key: batch[key] for key in ("positions", "segment_ids")}
            logits = jax.nn.log_softmax(lcx.logits(model, params, batch["tokens"], **places))
            picked = jax.numpy.take_along_axis(logits, batch["labels"][..., None], -1)[..., 0]
            total, weight = (
                total - float((picked * batch["loss_weights"]).sum()),
                weight + batch["loss_weights"].sum(),
            )
    return total / weight


ONE = (RUNGS[0],)


def verdicts(workdir, length=128) -> list[str | None]:
    rounds = sorted((workdir / str(length)).glob("round_*/gate.json"))
    return [json.loads(path.read_text())["verdict"] for path in rounds]


def test_a_gate_that_opens(base, whole, tmp_path):
    path = tiny_ladder(base, rungs=ONE, gate=Gate(max_loss_increase=5.0)).run(str(tmp_path))
    assert path == str(tmp_path / "128" / "round_0")
    assert verdicts(tmp_path) == [None]
    baseline = json.loads((tmp_path / "baseline.json").read_text())
    assert baseline == {
        "loss": pytest.approx(short_loss(base, base / "base"), rel=1e-5),
        "context_length": 64,
    }
    assert_same_checkpoint(path, whole / "128" / "round_0")  # a gate that opens changes nothing


def test_a_gate_that_stays_shut_repeats_the_rung_and_gives_up(base, whole, tmp_path, caplog):
    gate = Gate(max_loss_increase=-5.0, max_rounds=2)
    with pytest.raises(
        UserError, match=r"rung 128 did not pass its gate in 2 rounds \(loss inside the original"
    ) as e:
        tiny_ladder(base, gate=gate).run(str(tmp_path))
    assert "\n" not in str(e.value) and "raise Rung.steps or Gate.max_rounds" in str(e.value)
    assert not (tmp_path / "256").exists()
    assert "rung 128, round 0: loss inside" in caplog.text
    said = [re.search(r"is (\S+), (\S+) above", verdict).groups() for verdict in verdicts(tmp_path)]
    start = short_loss(base, base / "base")
    for number, (loss, above) in enumerate(said):
        expected = short_loss(base, tmp_path / "128" / f"round_{number}")
        assert float(loss) == pytest.approx(expected, abs=1e-4)
        assert float(above) == pytest.approx(expected - start, abs=2e-4)
    first, second = (lcx.load(tmp_path / "128" / f"round_{number}") for number in (0, 1))
    assert first[0] == second[0]  # the second round extends nothing
    assert losses(tmp_path / "128" / "round_0")[0] != losses(tmp_path / "128" / "round_1")[0]  # and reads on


def test_the_second_round_passes(base, tmp_path, monkeypatch):
    """A passkey gate: shut at first, open later; the next rung starts from the round that passed."""
    asked, answers = [], iter([0.4, 1.0, 1.0])

    class Found:
        def __init__(self, *, context_length, num_distances, trials):
            asked.append((context_length, num_distances, trials))

        def __call__(self, model, params, tokenizer):
            assert model.max_position_embeddings == asked[-1][0] and tokenizer.vocab_size >= 256
            return {"mean_rate": next(answers)}

    monkeypatch.setattr(passkey, "Passkey", Found)
    sources = []
    load = Workdir.load  # by which the gate and the trainer both read a round
    monkeypatch.setattr(
        Workdir, "load", lambda self, path, **kw: sources.append(str(path)) or load(self, path, **kw)
    )
    gate = Gate(max_loss_increase=9.0, min_passkey_accuracy=0.9, passkey_trials=5)
    path = tiny_ladder(base, gate=gate).run(str(tmp_path))
    assert path == str(tmp_path / "256" / "round_0")
    assert verdicts(tmp_path) == ["passkey success is 0.40, expected 0.90", None]
    assert verdicts(tmp_path, 256) == [None]
    assert asked == [(128, 5, 1), (128, 5, 1), (256, 5, 1)]
    assert [source.replace(str(tmp_path), "") for source in sources if str(tmp_path) in source] == [
        "/128/round_0",  # measured
        "/128/round_0",  # the second round starts from it
        "/128/round_1",
        "/128/round_1",
        "/256/round_0",
    ]


def test_a_loss_that_is_no_number_passes_no_gate(base, monkeypatch):
    ladder = tiny_ladder(base, gate=Gate(max_loss_increase=5.0))
    monkeypatch.setattr(Ladder, "_loaded", lambda *_: contextlib.nullcontext((None, None, None)))
    for loss, verdict in ((math.nan, "loss inside the original window is nan"), (6.5, "is 6.5000, 5.5000 above")):
        monkeypatch.setattr(Ladder, "_short_loss", lambda *_, loss=loss: loss)
        assert verdict in ladder._verdict("", 128, 64, 1.0)


def test_a_resumed_gate_measures_again_without_training(base, whole, tmp_path, monkeypatch):
    gate = Gate(max_loss_increase=5.0)
    tiny_ladder(base, rungs=ONE, gate=gate).run(str(tmp_path))
    (tmp_path / "128" / "round_0" / "gate.json").unlink()  # killed while it was measured
    before = saved(tmp_path / "128" / "round_0")[0]
    tiny_ladder(base, rungs=ONE, gate=gate).run(str(tmp_path))
    assert verdicts(tmp_path) == [None]
    assert Checkpointer(tmp_path / "128" / "round_0" / "checkpoints").steps()[-1] == before


# --- mistakes


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"rungs": ()}, r"Ladder.rungs have context lengths \[\]: expected at least one"),
        (
            {"rungs": RUNGS[::-1]},
            r"context lengths \[256, 128\]: expected at least one, each longer than the last",
        ),
        (
            {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}},
            "Ladder.rope_scaling has a factor: leave it out",
        ),
    ],
)
def test_ladders_that_cannot_be(base, changes, says):
    with pytest.raises(UserError, match=says):
        tiny_ladder(base, **changes)


def test_a_ladder_extends_a_pretrained_model(base):
    with pytest.raises(UserError, match="Ladder.trainer has no init_from"):
        tiny_ladder(base, trainer=tiny_trainer(base))


@pytest.mark.parametrize(
    ("rung", "says"),
    [
        (Rung(context_length=256, steps=1, batch_size=3, accumulation=2), "batch_size 3 is not a multiple"),
        (Rung(context_length=256, steps=1, mesh=MeshShape(fsdp=64)), "needs 64 devices"),
    ],
)
def test_mistakes_in_the_last_rung_show_before_the_first_one_trains(base, tmp_path, rung, says):
    with pytest.raises(UserError, match=says):
        tiny_ladder(base, rungs=(RUNGS[0], rung)).run(str(tmp_path))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"rungs": (Rung(context_length=64, steps=1),)}, "no effect"),
        ({"rungs": (Rung(context_length=32, steps=1),)}, "no effect"),
        ({"rope_scaling": {"rope_type": "yarm"}}, "yarm"),
    ],
)
def test_rungs_that_extend_nothing(base, tmp_path, changes, says):
    with pytest.raises(UserError, match=says) as caught:
        tiny_ladder(base, **changes).run(str(tmp_path))
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_a_gate_without_held_out_text(base, tmp_path):
    trainer = dataclasses.replace(tiny_ladder(base).trainer, data=dataset(base, eval_fraction=0.0))
    with pytest.raises(UserError, match="held-out text and there is none: set eval_fraction"):
        tiny_ladder(base, trainer=trainer, gate=Gate()).run(str(tmp_path))
