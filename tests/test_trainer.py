"""Whole runs: what they write, how they go on, where their weights come from, what they refuse."""

import dataclasses
import json
import math
import shutil

import jax
import numpy as np
import pytest
from tiny_runs import (  # noqa: F401
    StopAt,
    assert_same_checkpoint,
    dataset,
    lines,
    losses,
    saved,
    text_fixture,
    tiny_hf_config,
    tiny_model,
    tiny_trainer,
)

import lcx
from lcx import model as model_lib
from lcx import trainer as trainer_lib
from lcx.data import ByteTokenizer, Dataset, Mixture, store
from lcx.errors import UserError
from lcx.lora import LoRA, merge
from lcx.optim import AdamW, leaf_paths
from lcx.rope import Rope
from lcx.sharding import MeshShape
from lcx.training import step as train_step


@pytest.fixture(scope="module")
def whole(text, tmp_path_factory):
    """(workdir, run) of a run that nothing disturbed."""
    workdir, opened, open_store = tmp_path_factory.mktemp("whole"), [], store.open_store
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            store, "open_store", lambda *args, **named: opened.append(1) or open_store(*args, **named)
        )
        run = tiny_trainer(text, eval_every=10).run(str(workdir))
    assert len(opened) == 1  # for training, for four evaluations and for what is said of the data
    return workdir, run


def stopped(monkeypatch, trainer, workdir, step):
    with monkeypatch.context() as patch:
        patch.setattr(trainer_lib, "StopRequest", lambda: StopAt(step))
        run = trainer.run(str(workdir))
    assert run.step == step
    return run


# --- what a run writes


def test_the_loss_falls_on_real_text(whole, text):
    """To what bytes cost by their frequency alone, and a little: the text is another one in every Python."""
    count = np.bincount(
        np.frombuffer(b"".join(p.read_bytes() for p in sorted(text.glob("text/*"))), np.uint8)
    )
    share = count[count > 0] / count.sum()
    found = losses(whole[0])
    assert math.log(258) - 0.1 < found[0] < math.log(258) + 0.6
    assert found[-1] < 0.05 - np.sum(share * np.log(share))
    held_out = [line["eval_loss"] for line in lines(whole[0]) if "eval_loss" in line]
    assert held_out[-1] < held_out[0] and held_out[-1] < 3.6


def test_metrics(whole):
    workdir, run = whole
    raw = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    training = [line for line in raw if "loss" in line]
    assert [line["step"] for line in training] == [*range(3, 40, 3), 40]  # every third, and the last
    for line in training:
        assert {*line, "tokens_per_second"} == {
            *("step", "loss", "tokens_per_second", "learning_rate", "grad_norm", "tokens", "goodput"),
            *("time", "wall_seconds", "data_seconds", "compute_seconds", "save_seconds"),
        }
        assert line["grad_norm"] > 0 and line.get("tokens_per_second", 1) > 0  # none after less than 0.1 s
        assert 0 < line["tokens"] <= 8 * 32
        rate = AdamW(learning_rate=1e-2, warmup_steps=4).learning_rates(40)(line["step"] - 1)
        assert line["learning_rate"] == pytest.approx(float(rate), rel=1e-6)
    assert [line["step"] for line in raw if "eval_loss" in line] == [10, 20, 30, 40]
    assert run.step == 40


def test_the_logged_loss_is_the_mean_since_the_last_line(whole, text, tmp_path):
    tiny_trainer(text, eval_every=10, log_every=1).run(str(tmp_path))
    every = losses(tmp_path)
    means = [sum(every[i : i + 3]) / len(every[i : i + 3]) for i in range(0, 40, 3)]
    assert losses(whole[0]) == pytest.approx(means, rel=1e-12)


def test_the_checkpoint_says_what_it_is(whole, text):
    workdir, run = whole
    step, arrays, documents = saved(workdir)
    assert step == 40
    assert documents["meta"]["tokenizer"] == ByteTokenizer().to_json()
    assert documents["meta"]["seq_len"] == 32 and documents["meta"]["lcx_version"] == lcx.__version__
    model, params = lcx.load(workdir)
    assert model == run.model
    for x, y in zip(jax.tree.leaves(params), jax.tree.leaves(run.state["params"]), strict=True):
        assert x.tobytes() == y.tobytes()
    assert sum(name.startswith("['opt_state']") for name in arrays) > 2 * len(jax.tree.leaves(params))
    with dataset(text).batches("train", global_batch_size=8, seq_len=32) as batches:
        assert documents["data"]["next_index"] == 40 * 8
        assert documents["data"]["fingerprint"] == batches.fingerprint


def test_the_held_out_loss_is_the_mean_over_its_tokens(whole, text):
    workdir, run = whole
    held_out = next(line["eval_loss"] for line in reversed(lines(workdir)) if "eval_loss" in line)
    total = weight = 0.0
    with dataset(text).batches("eval", global_batch_size=8, seq_len=32) as batches:
        for _, batch in zip(range(2), batches, strict=False):
            places = {key: batch[key] for key in ("positions", "segment_ids")}
            logits = lcx.logits(run.model, run.state["params"], batch["tokens"], **places)
            nll = -np.take_along_axis(np.asarray(jax.nn.log_softmax(logits)), batch["labels"][..., None], -1)[
                ..., 0
            ]
            total, weight = total + (nll * batch["loss_weights"]).sum(), weight + batch["loss_weights"].sum()
    assert held_out == pytest.approx(total / weight, rel=1e-5)


def test_the_held_out_loss_does_not_depend_on_how_rows_are_grouped(whole, text):
    _, run = whole
    mesh = tiny_trainer(text).mesh.build()
    changes = [{"accumulation": count} for count in (1, 2, 4)]
    changes += [
        {"batch_size": size, "eval_batches": 1000} for size in (8, 5)
    ]  # all there is, and rows of padding
    with jax.set_mesh(mesh):
        losses = [
            tiny_trainer(text, **change).held_out_loss(run.model, run.state, mesh) for change in changes
        ]
    np.testing.assert_allclose(losses[:3], losses[0], rtol=1e-6)
    np.testing.assert_allclose(losses[3], losses[4], rtol=1e-6)
    assert abs(losses[0] / losses[3] - 1) > 1e-4  # the first two batches are not all there is


# --- going on


@pytest.mark.parametrize("step", [7, 20])  # between lines and checkpoints, and on one
def test_stopped_and_resumed_is_the_same_run(whole, text, tmp_path, monkeypatch, step):
    trainer = tiny_trainer(text, eval_every=10)
    stopped(monkeypatch, trainer, tmp_path, step)
    assert saved(tmp_path)[0] == step
    run = trainer.run(str(tmp_path))
    assert run.step == 40
    assert_same_checkpoint(tmp_path, whole[0])
    assert lines(tmp_path) == lines(whole[0])


def test_a_finished_run_is_left_alone(whole, text, tmp_path, capsys):
    shutil.copytree(whole[0], tmp_path / "run")
    before = sorted(path for path in (tmp_path / "run").rglob("*"))
    run = tiny_trainer(text, eval_every=10).run(str(tmp_path / "run"))
    assert run.step == 40 and run.state["params"]
    assert sorted(path for path in (tmp_path / "run").rglob("*")) == before
    assert lines(tmp_path / "run") == lines(whole[0])
    assert "step 40 of 40 is done: nothing is left to do" in capsys.readouterr().err


def test_a_run_can_be_made_longer_and_may_change_what_is_no_part_of_the_model(whole, text, tmp_path, capsys):
    shutil.copytree(whole[0], tmp_path / "run")
    changes = {"remat": "dots", "batch_size": 4, "accumulation": 2}
    changes["optimizer"] = AdamW(learning_rate=5e-3, warmup_steps=4)
    run = tiny_trainer(text, steps=42, **changes).run(str(tmp_path / "run"))
    assert run.step == 42 and run.model.remat == "dots"
    assert saved(tmp_path / "run")[2]["data"]["next_index"] == 40 * 8 + 2 * 4
    said = capsys.readouterr().err
    assert "step 40 of 42 is done: resuming" in said
    for line in (
        "Trainer.steps changes from 40 to 42",
        "Trainer.batch_size changes from 8 to 4",
        "Trainer.accumulation changes from 1 to 2",
        "Trainer.optimizer.learning_rate changes from 0.01 to 0.005",
        "Trainer.remat changes from the default to 'dots'",
    ):
        assert line in said
    assert said.count(" changes from ") == 5
    assert [line["step"] for line in lines(tmp_path / "run") if "loss" in line][-2:] == [40, 42]


def train_here(job, workdir):
    """As the command does it: a refused run leaves config.gin as it was, too."""
    trainer_lib.train(workdir=workdir, job=job, config_text="another")


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"model": tiny_model(hidden_size=64)}, "Trainer.model.hidden_size = 32, found 64"),
        ({"model": tiny_model(num_layers=3)}, "Trainer.model.stages.repeat = 2, found 3"),
        (
            {"model": tiny_model(rope=Rope(rope_theta=5e5))},
            "mixer.rope = the default, found Rope(rope_theta=500000.0)",
        ),
        ({"lora": LoRA()}, "Trainer.lora = the default, found LoRA()"),
    ],
)
def test_another_model_in_the_same_workdir_is_refused(whole, text, changes, says):
    before = sorted(whole[0].rglob("*"))
    for start in (train_here, lambda job, workdir: job.run(workdir)):
        with pytest.raises(UserError, match="holds a run that started with") as caught:
            start(tiny_trainer(text, **changes), str(whole[0]))
    assert says in str(caught.value)
    assert str(caught.value).endswith("set it back, or set another --workdir")
    assert "\n" not in str(caught.value)
    assert sorted(whole[0].rglob("*")) == before


def test_other_trained_parameters_in_the_same_workdir_are_refused(whole, text):
    with pytest.raises(UserError, match="does not fit: in opt_state.*check the model and optimizer settings"):
        tiny_trainer(text, optimizer=AdamW(frozen="mlp")).run(str(whole[0]))


def test_a_converted_model_is_not_a_run(text, tmp_path):
    model = tiny_model()
    lcx.save(tmp_path / "m", model, model_lib.init_params(model, jax.random.key(0)), format="lcx")
    with pytest.raises(UserError, match="holds a model, not a run: set Trainer.init_from to it"):
        tiny_trainer(text, model=model).run(str(tmp_path / "m"))


# --- mistakes


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"model": None}, "Trainer.model and Trainer.init_from: expected one of the two, found neither"),
        ({"model": tiny_model(), "init_from": "somewhere"}, "expected one of the two, found both"),
        ({"rope_scaling": {"rope_type": "yarn"}}, "change a pretrained model: set Trainer.init_from"),
        ({"context_length": 64}, "change a pretrained model: set Trainer.init_from"),
        ({"steps": 0}, "Trainer.steps is 0, expected at least 1"),
        ({"eval_every": -1}, "Trainer.eval_every is -1, expected at least 0"),
        ({"accumulation": 3}, "Trainer.batch_size 8 is not a multiple of accumulation 3"),
        ({"dtype": "bf16"}, "Trainer.dtype is 'bf16', expected one of float32, bfloat16"),
        ({"remat": "all"}, "Trainer.remat is 'all', expected one of none, full, host, dots"),
        ({"wandb": "yes"}, "Trainer.wandb is 'yes', expected one of auto, offline, online, off"),
        (lambda: {"model": tiny_model(num_layers=0)}, "llama.num_layers is 0, expected at least 1"),
        (lambda: {"model": tiny_model(intermediate_size=0)}, "llama.intermediate_size is 0, expected at least 1"),
        (lambda: {"model": tiny_model(num_heads=0)}, "llama.num_heads is 0, expected at least 1"),
        ({"steps": 3}, "AdamW.warmup_steps is 4, more than the 3 steps of the run"),
        ({"optimizer": AdamW(lag=100)}, "AdamW.lag is 100, more than the .* steps of the run"),
        ({"steps": 2**31}, "Trainer.steps is 2147483648, expected less than 2"),
        ({"seq_len": 2**31}, "Trainer.seq_len is 2147483648, expected less than 2"),
        (lambda: tiny_model(vocab_size=2**31).check() or {}, "Decoder.vocab_size is 2147483648, expected less than 2"),
        ({"objective": len}, "Trainer.objective len cannot be called with .model, variables, batch."),
        (lambda: {"optimizer": AdamW(plateau_factor=0.0)}, "AdamW.plateau_factor is 0.0, expected a number between"),
    ],
)
def test_settings_that_cannot_be(text, changes, says):
    with pytest.raises(UserError, match=says):
        tiny_trainer(text, **(changes() if callable(changes) else changes))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"mesh": MeshShape(fsdp=3)}, "needs 3 devices, found"),
        ({"model": tiny_model(vocab_size=200)}, "vocab_size is 200"),
        ({"model": tiny_model(layer_windows=(0, None))}, "Attention.window is 0, expected at least 1"),
        ({"model": tiny_model().clone(max_position_embeddings=0)}, "Decoder.max_position_embeddings is 0, expected"),
        ({"model": tiny_model().clone(norm_eps=-1.0)}, "Decoder.norm_eps is -1.0, expected a finite"),
        ({"model": tiny_model().clone(stages=())}, "Decoder.stages is empty"),
        ({"model": tiny_model(hidden_size=1 << 20)}, "take 79,.* GB, and this machine has .* GB of memory"),
        ({"optimizer": AdamW(frozen="nothing")}, "AdamW.frozen 'nothing' matches none"),
        ({"data": {"source": "/nowhere.txt"}}, "/nowhere.txt"),
        ({"data": {"eval_fraction": 1.0}}, "the train split of .* is empty"),
        ({"seq_len": 4096}, "fewer than global_batch_size=8"),
        ({"optimizer": AdamW(trainable="nothing")}, "nothing to train"),
        ({"lora": LoRA(targets="conv")}, "LoRA.targets 'conv' matches no projection"),
        ({"lora": LoRA(rank=1000)}, "LoRA.rank is 1000, more than the smaller side of every matrix"),
        ({"data": {"eval_fraction": 0.0}, "eval_every": 2}, "Trainer.eval_every is 2, but no document is held out"),
    ],
)
def test_mistakes_that_show_before_the_first_step(text, tmp_path, monkeypatch, changes, says):
    monkeypatch.setattr(model_lib, "init_params", zeros)  # in no time
    if "data" in changes:
        changes = {**changes, "data": dataset(text, **changes["data"])}
    with pytest.raises(UserError, match=says) as caught:
        tiny_trainer(text, **changes).run(str(tmp_path))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "checkpoints").exists()


def zeros(model, key, *, mesh):
    return jax.tree.map(
        lambda x: jax.device_put(np.zeros(x.shape, x.dtype), x.sharding),
        model_lib.abstract_params(model, mesh=mesh),
    )


def test_nothing_held_out_is_a_warning(text, tmp_path, caplog):
    run = tiny_trainer(text, data=dataset(text, eval_fraction=0.0)).run(str(tmp_path))
    assert run.step == 40
    assert not [line for line in lines(tmp_path) if "eval_loss" in line]
    assert "no evaluation: the eval split" in caplog.text
    assert train_step.mean_loss(lambda *_: (0.0, 0.0), {}, [{}], MeshShape().build()) is None  # no weight


def test_rows_longer_than_the_window_are_a_warning(text, tmp_path, monkeypatch, capsys):
    trainer = tiny_trainer(text, seq_len=48, data=Mixture(((dataset(text), 1.0),)))
    stopped(monkeypatch, trainer, tmp_path, 0)
    assert "seq_len 48 exceeds the model's window of 32 tokens" in capsys.readouterr().err


def test_rows_without_a_label_are_a_warning(tmp_path, monkeypatch, capsys):
    """The last of five rows holds one token, which has no next one: a batch of two may be that row twice."""
    (tmp_path / "a.txt").write_text("a text of 4 T + 1 tokens, with its last.")
    data = Dataset(str(tmp_path / "a.txt"), cache_dir=str(tmp_path / "cache"), eval_fraction=0.0)
    tokens = data.opened().parts[0].corpus.train.num_tokens
    assert tokens % 4 == 1
    T = tokens // 4
    for batch_size, seq_len, said in ((1, T, 1), (2, T, 1), (3, T, 0), (1, T - 1, 0)):
        trainer = tiny_trainer(tmp_path, data=data, seq_len=seq_len, batch_size=batch_size)
        with trainer._batches("train", trainer.model, trainer.mesh.build()) as batches:
            found = batches.remarks()
        assert [line[:24] for line in found] == ["warning: 1 of 5 rows of "] * said


# --- where weights come from, and which of them train


@pytest.fixture(scope="module")
def hf_folder(tmp_path_factory):
    import torch
    import transformers

    torch.manual_seed(0)
    config = tiny_hf_config(bos_token_id=256, eos_token_id=[257, 255])
    folder = tmp_path_factory.mktemp("hf")
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return folder


YARN = {"rope_type": "yarn", "factor": 2.0}


@pytest.fixture
def extension(hf_folder, text):
    return tiny_trainer(text, init_from=str(hf_folder), rope_scaling=YARN, seq_len=64, steps=4, batch_size=4)


def test_extending_a_hugging_face_folder(extension, hf_folder, tmp_path, monkeypatch):
    expected, start = lcx.load(hf_folder, rope_scaling=YARN)
    stopped(monkeypatch, extension, tmp_path / "a", 0)
    _, params = lcx.load(tmp_path / "a")
    for path, x, y in zip(leaf_paths(start), jax.tree.leaves(params), jax.tree.leaves(start), strict=True):
        assert np.array_equal(x, y), path
    run = extension.run(str(tmp_path / "a"))
    model, _ = lcx.load(tmp_path / "a")
    assert model == expected == run.model
    assert model.max_position_embeddings == 64
    rope = model.stages[0].pattern[0].mixer.rope
    assert (rope.rope_type, rope.factor, rope.original_max_position_embeddings) == ("yarn", 2.0, 32)
    meta = saved(tmp_path / "a")[2]["meta"]
    assert (meta["hf_config"]["bos_token_id"], meta["hf_config"]["eos_token_id"]) == (256, [257, 255])


def test_an_init_from_that_has_moved_is_a_warning_and_another_scaling_is_not(
    extension, tmp_path, monkeypatch, caplog
):
    stopped(monkeypatch, extension, tmp_path, 3)
    moved = dataclasses.replace(extension, init_from="/gone")
    assert moved.run(str(tmp_path)).step == 4  # a run that goes on reads its own checkpoint only
    assert "/gone is ignored" in caplog.text
    other = dataclasses.replace(extension, rope_scaling={"rope_type": "linear", "factor": 2.0})
    with pytest.raises(UserError, match="Trainer.rope_scaling.rope_type = 'yarn', found 'linear'"):
        other.run(str(tmp_path))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (
            {"rope_scaling": YARN, "context_length": 96},
            "factor 2 x the original window 32 is 64, not Trainer.context_length 96",
        ),
        ({"context_length": 64}, "there is no Trainer.rope_scaling"),
        ({"rope_scaling": {"rope_type": "yarm", "factor": 2.0}}, "yarm"),
        ({"init_from": "/nowhere"}, "no checkpoint at /nowhere"),
    ],
)
def test_warm_starts_that_cannot_be(hf_folder, text, tmp_path, changes, says):
    with pytest.raises(UserError, match=says) as caught:
        tiny_trainer(text, **{"init_from": str(hf_folder), **changes}).run(str(tmp_path))
    assert "\n" not in str(caught.value)


def test_frozen_weights_stay_to_the_bit(hf_folder, text, tmp_path):
    optimizer = AdamW(
        learning_rate=1e-2, warmup_steps=0, weight_decay=0.1, trainable="q_proj|norm", frozen="final"
    )
    run = tiny_trainer(text, init_from=str(hf_folder), steps=3, optimizer=optimizer).run(str(tmp_path))
    _, start = lcx.load(hf_folder)
    _, params = lcx.load(tmp_path)
    changed = [
        path
        for path, x, y in zip(leaf_paths(start), jax.tree.leaves(start), jax.tree.leaves(params), strict=True)
        if np.asarray(x).tobytes() != np.asarray(y).tobytes()
    ]
    names = ["mixer/q_proj/kernel", "mixer_norm/scale", "mlp_norm/scale"]
    assert changed == [f"stages_0/block_0/{name}" for name in names]
    sizes = {leaf.size for leaf in jax.tree.leaves(run.state["opt_state"]) if leaf.ndim}
    assert sizes == {2 * 32 * 32, 2 * 32}  # moments of the kernel and of the norms, of nothing else


def test_lora_trains_pairs_only(hf_folder, text, tmp_path, monkeypatch):
    """In bfloat16; stopped and resumed to the bit; loads merged."""
    lora = LoRA(rank=4, targets="(q|v)_proj")
    data = dataset(text, eval_fraction=0.0)
    trainer = tiny_trainer(text, init_from=str(hf_folder), lora=lora, dtype="bfloat16", steps=6, data=data)
    run = trainer.run(str(tmp_path / "whole"))
    stopped(monkeypatch, trainer, tmp_path / "parts", 3)
    trainer.run(str(tmp_path / "parts"))
    assert_same_checkpoint(tmp_path / "parts", tmp_path / "whole")
    assert losses(tmp_path / "whole")[-1] < losses(tmp_path / "whole")[0]
    _, start = lcx.load(hf_folder)
    for x, y in zip(jax.tree.leaves(start), jax.tree.leaves(run.state["params"]), strict=True):
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()
    pairs = jax.tree.leaves(run.state["lora"])
    assert all(np.any(x) for x in pairs) and {x.dtype for x in pairs} == {np.dtype("float32")}
    scale = run.state["lora"]["stages_0"]["block_0"]["mixer"]["q_proj"]["scale"]
    assert np.array_equal(scale, [4.0, 4.0])  # alpha / rank: no parameter
    model, merged = lcx.load(tmp_path / "whole")
    expected = merge(run.state["params"], run.state["lora"])
    for x, y in zip(jax.tree.leaves(merged), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-6, atol=1e-7)
    kernel = merged["stages_0"]["block_0"]["mixer"]["q_proj"]["kernel"]
    assert np.abs(kernel - start["stages_0"]["block_0"]["mixer"]["q_proj"]["kernel"]).max() > 1e-4


@pytest.mark.parametrize(
    "frozen", [{"lora": LoRA(rank=4)}, {"optimizer": AdamW(trainable="q_proj", warmup_steps=0)}]
)
def test_weights_that_do_not_train_stay_as_they_are_stored(hf_folder, text, tmp_path, monkeypatch, frozen):
    """From bfloat16, the run is the same as from the same numbers in float32, in memory, on disk and resumed."""
    import torch
    import transformers

    model = transformers.LlamaForCausalLM.from_pretrained(hf_folder, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "narrow")
    model.float().save_pretrained(tmp_path / "wide")
    narrow, wide = (
        tiny_trainer(text, init_from=str(tmp_path / x), steps=4, **frozen) for x in ("narrow", "wide")
    )
    wide.run(str(tmp_path / "b"))
    stopped(monkeypatch, narrow, tmp_path / "a", 2)
    run = narrow.run(str(tmp_path / "a"))
    assert losses(tmp_path / "a") == losses(tmp_path / "b")
    assert run.model.dtype == "float32"
    _, start = lcx.load(tmp_path / "narrow")
    for params in (run.state["params"], saved(tmp_path / "a")[1]):
        kept = [x for x in jax.tree.leaves(params) if x.dtype == jax.numpy.bfloat16]
        assert len(kept) == len(jax.tree.leaves(start)) - ("optimizer" in frozen)
    moved = run.state["params"]["stages_0"]["block_0"]["mixer"]["q_proj"]["kernel"]
    assert moved.dtype == ("bfloat16" if "lora" in frozen else "float32")
    if "lora" in frozen:  # merging in float32 keeps all of the update
        _, merged = lcx.load(tmp_path / "a", dtype="float32")
        for x, y in zip(*map(jax.tree.leaves, (merged, lcx.load(tmp_path / "b")[1])), strict=True):
            assert np.array_equal(x, y)


# --- wandb


def test_wandb_offline_records_the_run(text, tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.delenv("WANDB_MODE", raising=False)
    stopped(monkeypatch, tiny_trainer(text, wandb="offline"), tmp_path, 3)
    (folder,) = (tmp_path / "wandb").glob("offline-run-*")
    assert next(folder.glob("run-*.wandb")).stat().st_size > 0
