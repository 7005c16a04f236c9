"""Attention transfer block by block: the same as in one run, wherever it is stopped, and what it refuses."""

import dataclasses
import functools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lcx
from lcx import blockwise, objectives
from lcx import model as model_lib
from lcx.blockwise import Blocks
from lcx.errors import UserError
from lcx.linearize import Linearize
from lcx.mixers.linear_attention import LinearAttention
from lcx.optim import AdamW, leaf_paths
from lcx.trainer import train
from lcx.training import residual_store
from tests.tiny_runs import tiny_trainer, write_text

SETTINGS = Linearize(window=8, feature_dim=8, feature_init="identity", keep_softmax=(1,))
STEPS = 6


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Text, and a model of four layers."""
    folder = tmp_path_factory.mktemp("blockwise")
    write_text(folder)
    model = model_lib.llama(
        vocab_size=258,
        hidden_size=32,
        intermediate_size=48,
        num_layers=4,
        num_heads=4,
        num_kv_heads=2,
        max_position_embeddings=32,
    )
    params = model_lib.init_params(model, jax.random.key(0))
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda x: x + 0.1 * rng.normal(size=x.shape).astype(np.float32), params)
    lcx.save(folder / "model", model, params, format="lcx")
    return folder


def trainer(folder, **changes):
    settings = {
        "init_from": str(folder / "model"),
        "linearize": SETTINGS,
        "objective": objectives.attention_transfer,
        "steps": STEPS,
        "batch_size": 4,
        "checkpoint_every": 3,
        "optimizer": AdamW(
            learning_rate=1e-2,
            schedule="constant",
            warmup_steps=0,
            clip_norm=None,
            trainable="feature_map_|window_factors",
        ),
    }
    return tiny_trainer(folder, **{**settings, **changes})


def maps_of(path):
    model, params = lcx.load(path)
    flat = dict(zip(leaf_paths(params), jax.tree.leaves(params), strict=True))
    found = {}
    for number, layer in enumerate(model_lib.layers(model)):
        for name, x in flat.items():
            if name.startswith(f"{layer.path}/"):
                found[number, name.removeprefix(layer.path)] = np.asarray(x[layer.repeat])
    return model, found


@pytest.fixture(scope="module")
def joint(folder):
    run = trainer(folder).run(str(folder / "joint"))
    return run, losses(folder / "joint")


def losses(workdir):
    lines = [json.loads(line) for line in (pathlib.Path(workdir) / "metrics.jsonl").read_text().splitlines()]
    return [line["eval_loss"] for line in lines if "eval_loss" in line][-1], [
        line["loss"] for line in lines if "loss" in line
    ]


@pytest.fixture(scope="module")
def whole(folder):
    """The workdir of all in one go."""
    workdir = folder / "whole"
    assert Blocks(trainer(folder), layers_per_block=2).run(str(workdir)) == str(workdir / "linear")
    return workdir


def test_blocks_learn_what_one_run_over_all_layers_learns(folder, joint, whole):
    """Equal data, order and seed: the same loss of every layer and the same maps, up to rounding."""
    model, found = maps_of(whole / "linear")
    expected_model, expected = maps_of(folder / "joint")
    assert model == expected_model and found.keys() == expected.keys()
    changed = 0
    for key, x in found.items():
        if "feature_map" in key[1] or "window_factors" in key[1]:
            np.testing.assert_allclose(x, expected[key], atol=2e-4, err_msg=str(key))
            changed += 1
        else:
            assert x.tobytes() == expected[key].tobytes(), key
    assert changed == 3 * 3
    # the mean over a block's linear layers (one, then two), against the mean over all
    evals = [losses(whole / "blocks" / number) for number in ("000", "001")]
    for got, wanted in (
        (np.average([e[0] for e in evals], weights=[1, 2]), joint[1][0]),
        (np.average([e[1] for e in evals], axis=0, weights=[1, 2]), joint[1][1]),
    ):
        np.testing.assert_allclose(got, wanted, rtol=2e-3)


def test_the_stream_is_the_raw_residual(folder):
    """What is stored for layer 2 is what layer 2 gets in the whole model; the norm is not applied yet."""
    job = Blocks(trainer(folder, steps=1), layers_per_block=2, only=())
    assert job.run(str(folder / "stream")) is None
    rows = next(
        residual_store.Rows(blockwise.stream_folder(folder / "stream" / "inputs", "train", 2), batch_size=4)
    )
    model, params = lcx.load(folder / "model")
    with trainer(folder).data.batches("train", global_batch_size=4, seq_len=32, seed=0) as batches:
        batch = next(batches)
    for name in residual_store.MASKS:
        assert np.array_equal(rows[name], batch[name])
    half = model.clone(
        stages=model_lib.stages_of(tuple(layer.block for layer in model_lib.layers(model)[:2])), parent=None
    )
    half_params = {**params, "stages_0": jax.tree.map(lambda x: x[:2], params["stages_0"])}
    half_params["final_norm"] = {"scale": jnp.ones(32)}
    masks = {name: jnp.asarray(batch[name]) for name in residual_store.MASKS}
    normed, _ = half.apply({"params": half_params}, jnp.asarray(batch["tokens"]), **masks, method="hidden")
    stream = rows["residual"].astype(np.float64)
    again = stream / np.sqrt(np.mean(stream**2, axis=-1, keepdims=True) + 1e-5)
    np.testing.assert_allclose(again, normed, atol=1e-5)
    assert np.abs(stream).max() > 1.5 * np.abs(again).max()


class Stop(Exception):
    pass


def test_a_kill_costs_no_more_than_the_batches_not_yet_on_disk(folder, whole, monkeypatch):
    """Killed while it writes inputs, then in the second block: the result is that of a run left alone."""
    workdir, job = folder / "killed", Blocks(trainer(folder), layers_per_block=2)
    monkeypatch.setattr(blockwise, "FLUSH_EVERY", 2)
    write, calls = residual_store.Writer.write, []

    def failing(self, *args):
        calls.append(1)
        if len(calls) == 5:
            raise Stop
        return write(self, *args)

    monkeypatch.setattr(residual_store.Writer, "write", failing)
    with pytest.raises(Stop):
        job.run(str(workdir))
    monkeypatch.setattr(residual_store.Writer, "write", write)
    place = blockwise.stream_folder(workdir / "inputs", "train", 0)
    assert residual_store.progress(place)["rows"] == 4 * 4
    with pytest.raises(UserError, match="found 16 of 24 rows; run with Blocks.only = \\(\\) first"):
        residual_store.Rows(place, batch_size=4)
    monkeypatch.setattr(blockwise.BlockTrainer, "_save", functools.partialmethod(_save_once, []))
    with pytest.raises(Stop):
        job.run(str(workdir))
    monkeypatch.undo()
    assert job.run(str(workdir)) == str(workdir / "linear")
    (_, ours), (_, expected) = maps_of(workdir / "linear"), maps_of(whole / "linear")
    for key, x in ours.items():
        assert x.tobytes() == expected[key].tobytes(), key


def _save_once(self, saved, *args, **kwargs):
    """The second block's second checkpoint is not reached."""
    saved.append(1)
    if len(saved) == 4:
        raise Stop
    return super(blockwise.BlockTrainer, self)._save(*args, **kwargs)


def test_hosts_share_a_folder(folder):
    """Inputs first, then the blocks in any order, each by itself, then the rest."""
    workdir = str(folder / "hosts")
    for only in ((), (1,), (0,)):
        assert Blocks(trainer(folder), layers_per_block=2, only=only).run(workdir) is None
    written = [Blocks(trainer(folder), layers_per_block=2, only=only).writes(folder) for only in (None, (), (1, 0, 1))]
    assert written == [(folder,), (folder,), (folder / "blocks" / "001", folder / "blocks" / "000")]
    before = {path: path.stat().st_mtime_ns for path in (folder / "hosts").rglob("stream.bin")}
    linear = Blocks(trainer(folder), layers_per_block=2).run(workdir)
    assert {path: path.stat().st_mtime_ns for path in (folder / "hosts").rglob("stream.bin")} == before
    model, params = lcx.load(linear)
    kinds = [isinstance(layer.block.mixer, LinearAttention) for layer in model_lib.layers(model)]
    assert kinds == [True, False, True, True]
    assert np.isfinite(np.asarray(lcx.logits(model, params, jnp.ones((1, 20), jnp.int32)))).all()


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"only": (2,)}, "Blocks.only has block 2, expected 0 to 1"),
        (
            {"only": (1,)},
            "expected the inputs of a block, found nothing; run with Blocks.only = \\(\\) first",
        ),
        ({"layers_per_block": 0}, "layers_per_block is 0, expected at least 1"),
        (
            {"trainer": {"linearize": None}},
            "Blocks.trainer linearizes a pretrained model: set Trainer.init_from and Trainer.linearize",
        ),
        ({"trainer": {"init_from": "/nowhere"}}, "no checkpoint at /nowhere"),
    ],
)
def test_what_cannot_be(folder, tmp_path, settings, says):
    changes = settings.pop("trainer", {})
    with pytest.raises(UserError, match=says) as caught:
        Blocks(**{"trainer": trainer(folder, **changes), "layers_per_block": 2, **settings}).run(
            str(tmp_path)
        )
    assert "\n" not in str(caught.value)


def test_a_full_disk_is_seen_before_anything_is_written(folder, tmp_path, monkeypatch):
    usage = residual_store.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(residual_store.shutil, "disk_usage", lambda path: usage._replace(free=100_000))
    with pytest.raises(
        UserError,
        match=r"all blocks take 279 kB and their checkpoints 653 kB, found 100 kB free; lower Trainer.steps",
    ) as caught:
        Blocks(trainer(folder), layers_per_block=2).run(str(tmp_path))
    assert "\n" not in str(caught.value) and not list(tmp_path.rglob("stream.bin"))


def test_other_settings_in_the_same_workdir_are_refused(folder, tmp_path):
    Blocks(trainer(folder), layers_per_block=2, only=()).run(str(tmp_path))
    other = dataclasses.replace(trainer(folder), seed=1)
    with pytest.raises(
        UserError, match="holds inputs of seed = 0, found 1: set it back, or set another --workdir"
    ):
        Blocks(other, layers_per_block=2).run(str(tmp_path))
    write_text(tmp_path, documents=11)
    data = dataclasses.replace(trainer(folder).data, source=f"{tmp_path}/text")
    other = dataclasses.replace(trainer(folder), data=data)
    with pytest.raises(UserError, match="holds inputs of data = "):
        Blocks(other, layers_per_block=2).run(str(tmp_path))
    stream = blockwise.stream_folder(tmp_path / "inputs", "train", 0) / "stream.bin"
    stream.write_bytes(stream.read_bytes()[:-4])
    with pytest.raises(UserError, match="expected 98304 bytes, found 98300"):
        Blocks(trainer(folder), layers_per_block=2, only=(0,)).run(str(tmp_path))


def test_another_cut_is_refused_before_inputs_are_written(folder, whole):
    """As `train` asks it, which then leaves config.gin as it was, too."""
    before = sorted(pathlib.Path(whole).rglob("*"))
    Blocks(trainer(folder), layers_per_block=2).check(str(whole))
    with pytest.raises(UserError, match=r"started with Trainer.layers = .*, found .*: set it back"):
        train(workdir=str(whole), job=Blocks(trainer(folder), layers_per_block=1), config_text="another")
    assert sorted(pathlib.Path(whole).rglob("*")) == before
