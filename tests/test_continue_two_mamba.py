"""A run continues a folder of the published trainer: its moments, its schedule, its losses; and what is refused."""

import dataclasses
import itertools
import json

import numpy as np
import pytest
import safetensors.torch
import torch
import two_mamba_torch
from flax.traverse_util import flatten_dict
from test_convert_two_mamba import random_params, tiny
from tiny_runs import write_text
from two_mamba_folders import CONFIG, make

import lcx
from lcx.convert import api, formats
from lcx.convert.command import convert
from lcx.convert.core.model_source import TreeSource
from lcx.convert.core.training_state import StoredRun
from lcx.convert.two_mamba import training_state
from lcx.data import BatchSpec, Dataset
from lcx.errors import UserError
from lcx.model import Mlp, Stage
from lcx.optim import AdamW
from lcx.trainer import Trainer
from lcx.training import continued

pytestmark = pytest.mark.filterwarnings("ignore:The epoch parameter")
SQUARE = "squared__sm_norm__A_mask_type_neg_softplus__in_conv_k_2"
SIZES = {"vocab": 258, "hidden": 32, "heads": 2, "inner": 48, "depth": 2, "length": 32}
WARMUP, TOTAL, BEFORE, MORE, AFTER = 2, 40, 4, 10, 3
PUBLISHED = AdamW(
    learning_rate=3e-3,
    schedule="linear",
    lag=1,
    warmup_steps=WARMUP,
    final_fraction=0.0,
    b2=0.999,
    eps=1e-7,
    weight_decay=0.01,
    decay=".",
    clip_norm=None,
)


def step(model, optimizer, schedule, number, batch):
    """One update of the published loop; returns the loss before it."""
    loss = model.loss(
        {
            key: torch.tensor(x).long() if x.dtype != np.float32 else torch.tensor(x)
            for key, x in batch.items()
        }
    )
    loss.backward()
    optimizer.step()
    schedule.step(number)
    optimizer.zero_grad()
    return loss.item()


def save(folder, model, optimizer, schedule, number):
    """As the published trainer saves."""
    folder.mkdir()
    safetensors.torch.save_file(model.state_dict(), folder / "model.safetensors")
    changes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2, "num_key_value_heads": 2}
    changes |= {"vocab_size": 258, "max_position_embeddings": 32, "attention_type": SQUARE}
    (folder / "config.json").write_text(json.dumps(CONFIG | changes))
    torch.save(optimizer.state_dict(), folder / "optimizer.pt")
    torch.save(schedule.state_dict(), folder / "scheduler.pt")
    settings = {"dataset": "dummy", "learning_rate": 3e-3, "warmup_steps": WARMUP, "num_steps": TOTAL}
    settings |= {"clipping_value": None, "weight_decay": 0.01, "step_ckpt": number, "attention_type": SQUARE}
    torch.save(settings, folder / "config.pt")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """The folder of a torch run after four updates, the losses of its next thirteen, and the data of those."""
    folder = tmp_path_factory.mktemp("published")
    write_text(folder)
    data = Dataset(str(folder / "text"), cache_dir=str(folder / "cache"), document_mask=False)
    torch.manual_seed(0)
    model = two_mamba_torch.Model(**SIZES)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, eps=1e-7, weight_decay=0.01)
    schedule = two_mamba_torch.scheduler(optimizer, WARMUP, TOTAL)
    rng = np.random.default_rng(0)
    for number in range(BEFORE):
        tokens = rng.integers(0, 258, (4, 33))
        batch = {
            "tokens": tokens[:, :-1],
            "labels": tokens[:, 1:],
            "loss_weights": np.ones((4, 32), np.float32),
        }
        step(model, optimizer, schedule, number, batch)
    save(folder / "run", model, optimizer, schedule, BEFORE - 1)
    with data.opened().batches(BatchSpec("train", 4, 32, 0, 0, 1, vocab_size=258)) as batches:
        losses = [step(model, optimizer, schedule, BEFORE + i, next(batches)) for i in range(MORE + AFTER)]
    return folder / "run", data, losses


def trainer(world, **changes):
    folder, data, _ = world
    settings = {"data": data, "steps": TOTAL, "stop_at": BEFORE + MORE, "batch_size": 4, "seq_len": 32}
    settings |= {"init_from": str(folder), "init_optimizer": True, "optimizer": PUBLISHED, "eval_batches": 1}
    return Trainer(**settings | {"log_every": 1, "checkpoint_every": 1000} | changes)


def test_ten_more_steps_have_the_losses_of_torch(world, tmp_path, caplog, capfd):
    run = trainer(world).run(str(tmp_path))
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    losses = {line["step"]: line["loss"] for line in lines if "loss" in line}
    assert list(losses) == list(range(BEFORE + 1, BEFORE + MORE + 1)) and run.step == BEFORE + MORE
    np.testing.assert_allclose(list(losses.values()), world[2][:MORE], rtol=2e-4)
    rates = [line["learning_rate"] for line in lines if "learning_rate" in line]
    expected = [3e-3 * (1 - (i - 1 - WARMUP) / (TOTAL - WARMUP)) for i in range(BEFORE, BEFORE + MORE)]
    np.testing.assert_allclose(rates, expected, rtol=1e-5)
    assert "the run there had" not in caplog.text
    check_that_torch_goes_on(world, tmp_path)
    said = capfd.readouterr().err
    assert f"continuing {world[0]} after 4 updates, with its optimizer; the data starts" in said
    assert "TwoMamba computes 32 tokens in tiles (quadratic)\n" in said


def check_that_torch_goes_on(world, workdir):
    """The folder that a run of lcx is converted to has the next losses of the torch run that never stopped."""
    folder = workdir / "published"
    convert(src=str(workdir), dst=str(folder), dst_format="two_mamba")
    model = two_mamba_torch.Model(**SIZES)
    model.load_state_dict(safetensors.torch.load_file(folder / "model.safetensors"))
    stored = {
        name: torch.load(folder / f"{name}.pt", weights_only=True) for name in ("optimizer", "scheduler", "config")
    }
    optimizer = torch.optim.AdamW(model.parameters())
    optimizer.load_state_dict(stored["optimizer"])
    schedule = two_mamba_torch.scheduler(optimizer, stored["config"]["warmup_steps"], stored["config"]["num_steps"])
    schedule.load_state_dict(stored["scheduler"])
    optimizer.param_groups[0]["lr"] = stored["optimizer"]["param_groups"][0]["lr"]  # LambdaLR's first step sets it
    done = BEFORE + MORE
    assert (stored["config"]["step_ckpt"], stored["config"]["attention_type"]) == (done - 1, SQUARE)
    assert stored["config"]["clipping_value"] is None and schedule.last_epoch == done - 1
    assert stored["config"]["log_steps"] == 10  # by which the published trainer divides
    assert "dataset" not in stored["config"]  # that trainer opens what it names, or else its default
    with world[1].opened().batches(BatchSpec("train", 4, 32, 0, 0, 1, vocab_size=258)) as batches:
        following = list(itertools.islice(batches, MORE + AFTER))[MORE:]
    losses = [step(model, optimizer, schedule, done + i, batch) for i, batch in enumerate(following)]
    np.testing.assert_allclose(losses, world[2][MORE:], rtol=2e-4)


def test_a_setting_that_differs_from_the_stored_run_is_said(world, caplog):
    other = trainer(world, steps=50, optimizer=dataclasses.replace(PUBLISHED, b2=0.95))
    model, _ = lcx.load(world[0])
    lines = continued._differences(training_state.read(world[0], model), other)
    assert lines == [
        "the run there had AdamW.b2 = 0.999, this one has 0.95",
        "the run there had Trainer.steps = 40, this one has 50",
        "the next update there has the learning rate 0.00292105, here it has 0.0029375",
    ]


@pytest.mark.parametrize(
    "name", ["softmax", "mamba", "linear__output_norm__A_mask_type_neg_softplus__in_conv_k_2__dt_on_values"]
)
def test_every_moment_belongs_to_its_parameter(reference, tmp_path, name):
    """The parameters of a saved model are in the order in which its modules register them."""
    folder, saved = make(reference, tmp_path / "a", name)
    parameters = []
    for key, x in saved.items():
        if key.startswith("param/"):
            p = torch.nn.Parameter(torch.tensor(x), requires_grad="rotary" not in key)
            p.grad = p.detach() * 0.5 if p.requires_grad else None
            parameters.append(p)
    optimizer = torch.optim.AdamW(parameters, eps=1e-7)
    optimizer.step()
    torch.save(optimizer.state_dict(), folder / "optimizer.pt")
    model, params = lcx.load(folder)
    state = formats.detect(folder).training_state(folder, model)
    assert (state.step, state.updates) == (1, 1)
    for path, x in flatten_dict(params, sep="/").items():
        np.testing.assert_allclose(state.moment(path, "first"), 0.05 * x, rtol=1e-5, err_msg=path)
        np.testing.assert_allclose(state.moment(path, "second"), 2.5e-4 * x**2, rtol=1e-4, err_msg=path)


def test_the_moments_of_a_tied_model_with_biases_are_written_and_read(tmp_path):
    """Its modules register a bias behind each weight of an MLP, and no head of its own."""
    plain = tiny("linear")
    block = plain.stages[0].pattern[0].clone(mlp=Mlp(24, bias=True, parent=None), parent=None)
    model = plain.clone(stages=(Stage((block,), 2),), tie_word_embeddings=True, parent=None)
    source = TreeSource(model, random_params(model))
    params, powers = flatten_dict(source.params, sep="/"), {"first": 1, "second": 2}
    source.stored_run = StoredRun(
        3, 3, TOTAL, PUBLISHED, None, lambda which, path, index: params[path][index] ** powers[which]
    )
    written: list[int] = []
    said = api.write(tmp_path / "a", source, format="two_mamba", progress=written.append)
    assert sum(written) == formats.named("two_mamba").planned_bytes(source, dtype=None)
    assert f"{sum(x.size for x in params.values()):,} parameters" in said  # and not the masks
    found = torch.load(tmp_path / "a" / "optimizer.pt", weights_only=True)["state"]
    tensors = safetensors.torch.load_file(tmp_path / "a" / "model.safetensors")
    names = ["self_attn.qkv_proj.weight", "self_attn.o_proj.weight"]
    names += [f"mlp.{name}_proj.{kind}" for name in ("gate", "up", "down") for kind in ("weight", "bias")]
    for i, name in enumerate(names, 1):
        assert torch.equal(found[i]["exp_avg"], tensors[f"model.layers.0.{name}"]), name
    state = training_state.read(tmp_path / "a", model)
    for path, x in params.items():
        np.testing.assert_allclose(state.moment(path, "second"), x**2, rtol=1e-6, err_msg=path)


class Hostile:
    def __reduce__(self):
        return print, ("executed",)


def damage(folder, what):
    optimizer = torch.load(folder / "optimizer.pt", weights_only=True)
    if what == "no file":
        (folder / "optimizer.pt").unlink()
        return
    if what == "fewer":
        optimizer["param_groups"][0]["params"].pop()
    elif what == "lost":
        del optimizer["state"][3]["exp_avg"]
    elif what == "shape":
        optimizer["state"][3]["exp_avg"] = optimizer["state"][3]["exp_avg"][:1].clone()
    elif what == "count":
        optimizer["state"][3]["step"] = torch.tensor(7.0)
    elif what == "code":
        optimizer["state"][3]["step"] = Hostile()
    elif what == "step":
        torch.save({"step_ckpt": "three"}, folder / "config.pt")
    torch.save(optimizer, folder / "optimizer.pt")


DAMAGES = {
    "no file": "optimizer.pt is missing",
    "fewer": "the optimizer of 22 parameters, expected the model's 23",
    "lost": "has no exp_avg of parameter 3, model.layers.0.self_attn.A_mask_proj.weight",
    "shape": r"A_mask_proj.weight is \(1, 32\), expected \(2, 32\)",
    "count": "the parameters differ in their step",
    "code": "nothing in it was executed",
    "step": "step_ckpt is 'three', expected the number of the last update",
}


@pytest.mark.parametrize("what", DAMAGES)
def test_a_damaged_optimizer_is_refused(world, tmp_path, what):
    folder = tmp_path / "run"
    folder.mkdir()
    for file in world[0].iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    damage(folder, what)
    with pytest.raises(UserError, match=DAMAGES[what]) as error:
        training_state.read(folder, formats.detect(folder).open(folder).model)
    assert "\n" not in str(error.value)


def test_settings_that_do_not_go_together_are_refused(world, tmp_path):
    with pytest.raises(UserError, match="Trainer.stop_at is 41, expected 1 to Trainer.steps = 40"):
        trainer(world, stop_at=41)
    with pytest.raises(UserError, match="Trainer.context_length changes the model"):
        trainer(world, context_length=64)
    with pytest.raises(UserError, match=r"AdamW.lag is -1, expected a finite number, at least 0"):
        AdamW(lag=-1)
    with pytest.raises(UserError, match="the format 'hf' stores no optimizer that a run could continue"):
        formats.named("hf").training_state("somewhere", None)
