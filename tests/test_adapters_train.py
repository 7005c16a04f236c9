"""Adapters that train: from a base or from an adapter, written for the peft package and read back; the commands."""

import json
import shutil
import warnings

import jax
import numpy as np
import peft as peft_package
import pytest
import torch
import transformers
from peft_models import bases_fixture, hf_base, hf_logits, logits, plain_fixture, write_adapter  # noqa: F401
from safetensors.torch import load_file
from tiny_runs import losses, text_fixture, tiny_trainer  # noqa: F401

import lcx
from lcx import lora as lora_lib
from lcx import trainer as trainer_lib
from lcx.convert.__main__ import main as convert_main
from lcx.convert.peft import adapter as peft
from lcx.convert.workdir.source import LcxSource
from lcx.data import ByteTokenizer
from lcx.errors import UserError
from lcx.lora import LoRA
from lcx.optim import AdamW
from lcx.sharding import MeshShape
from lcx.training.signals import StopRequest

YARN = {"rope_type": "yarn", "factor": 4.0}


def trainer(text, base, **changes):
    settings = {"init_from": str(base), "steps": 3, "log_every": 1, "checkpoint_every": 2}
    optimizer = AdamW(learning_rate=1e-2, warmup_steps=3)
    return tiny_trainer(text, **{**settings, "optimizer": optimizer, **changes})


def run_of(text, base, workdir, **changes):
    trainer(text, base, **changes).run(str(workdir))
    return workdir


@pytest.fixture(scope="module", params=["llama", "tied"])
def trained(request, text, bases, tmp_path_factory):
    """(base, workdir of a run on an extended base, that trained embedding, norms and biases beside its pairs)."""
    workdir = tmp_path_factory.mktemp("run") / "run"
    lora = LoRA(rank=2, beside="embed|norm|bias" if request.param == "tied" else "embed|norm")
    return bases / request.param, run_of(text, bases / request.param, workdir, rope_scaling=YARN, lora=lora)


def exported(workdir, out, *flags):
    return convert_main([f"--src={workdir}", f"--dst={out}", "--dst_format=peft", *flags])


def test_what_trained_beside_the_pairs_goes_out_and_comes_back(trained, tmp_path, capsys):
    base, workdir = trained
    assert exported(workdir, tmp_path / "a") == 0
    said = capsys.readouterr().out
    assert "8 pairs (q_proj 2, k_proj 2, v_proj 2, o_proj 2) of rank 2, alpha 16; " in said
    assert "full tensors (embed_tokens, " in said and f"base: {base}" in said
    assert 'scaling: the base needs --rope_scaling=\'{"rope_type": "yarn"' in said
    expected = logits(*lcx.load(workdir))
    # As the README that was written says it, on a base that has its scaling.
    readme = (tmp_path / "a" / "README.md").read_text()
    line = next(line for line in readme.splitlines() if line.startswith("base = "))
    scope = {"AutoModelForCausalLM": transformers.AutoModelForCausalLM}
    exec(line, scope)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*(issing|nexpected|tie_word_embeddings).*")
        hf_model = peft_package.PeftModel.from_pretrained(scope["base"].float(), str(tmp_path / "a"))
    np.testing.assert_allclose(hf_logits(hf_model), expected, atol=2e-5)
    theirs = peft_package.get_peft_model_state_dict(hf_model)
    ours = load_file(tmp_path / "a" / "adapter_model.safetensors")
    assert theirs.keys() == ours.keys() and all(torch.equal(ours[key], x) for key, x in theirs.items())
    model, params = lcx.load(base, adapter=tmp_path / "a", rope_scaling=YARN)
    np.testing.assert_allclose(logits(model, params), expected, atol=1e-6)
    assert model.tie_word_embeddings == (base.name == "tied")
    again = convert_main([f"--src={base}", f"--adapter={tmp_path}/a", f"--dst={tmp_path}/hf", "--dst_format=hf"])
    assert again == 2 and "pass --rope_scaling='{" in capsys.readouterr().err


def test_an_adapter_is_not_used_on_a_base_without_its_scaling(trained, tmp_path, caplog):
    base, workdir = trained
    exported(workdir, tmp_path / "a")
    needed = r"rotary embedding .* pass rope_scaling='{\"rope_type\": \"yarn\".*\"factor\": 4.0.*context_length=128"
    with pytest.raises(UserError, match=needed):
        lcx.load(base, adapter=tmp_path / "a")
    caplog.clear()
    lcx.load(base, adapter=tmp_path / "a", rope_scaling={"rope_type": "linear", "factor": 4.0})
    assert "expect other results than with rope_scaling=" in caplog.text
    caplog.clear()
    lcx.load(base, adapter=tmp_path / "a", rope_scaling=YARN)
    assert "rotary" not in caplog.text


def test_what_has_no_place_in_an_adapter_is_refused(trained, tmp_path):
    base, workdir = trained
    source = LcxSource(workdir, merge=False)
    lora = peft.stored_pairs(workdir)
    params = lcx.load(workdir)[1]
    for beside, says in (
        (["stages_0/block_0/mixer/feature_map_q/layer"], "1 parameters trained in full have no place"),
        (["stages_0/block_0/mixer/q_proj/kernel"], "has a pair and was also trained in full"),
    ):
        with pytest.raises(UserError, match=says):
            peft.save(tmp_path / "a", source.model, lora, params=params, beside=beside)
    assert not (tmp_path / "a").exists()


def test_there_and_back_keeps_every_byte(bases, tmp_path):
    """Ranks of their own, layers left out."""
    write_adapter(
        bases / "llama",
        tmp_path / "a",
        target_modules=["q_proj", "down_proj"],
        rank_pattern={"layers.1.mlp.down_proj": 7, "q_proj": 2},
        alpha_pattern={"q_proj": 5},
        exclude_modules=["model.layers.0.mlp.down_proj"],
    )
    model, _ = lcx.load(bases / "llama")
    peft.save(tmp_path / "b", model, peft.load(tmp_path / "a", model))
    a, b = (load_file(tmp_path / name / "adapter_model.safetensors") for name in "ab")
    assert a.keys() == b.keys()
    for key, x in a.items():
        assert x.shape == b[key].shape and x.numpy().tobytes() == b[key].numpy().tobytes(), key


def test_training_goes_on_from_an_adapter(text, bases, tmp_path, monkeypatch, capsys):
    """From where it was, with its rank, alpha and modules, what it holds beside the pairs too; stopped and resumed."""
    settings = dict(target_modules=["q_proj", "v_proj"], rank_pattern={"v_proj": 2}, modules_to_save=["norm"])
    write_adapter(bases / "llama", tmp_path / "a", **settings)
    start = {"adapter": str(tmp_path / "a")}
    run_of(text, bases / "llama", tmp_path / "whole", **start)
    assert "LoRA rank 4 on 4 matrices: Attention q_proj 2, v_proj 2; " in capsys.readouterr().err
    with jax.set_mesh(mesh := MeshShape().build()):
        begun = trainer(text, bases / "llama", **start)._start(mesh)
    merged = lora_lib.merge(begun.state["params"], begun.state["lora"])
    expected = logits(*lcx.load(bases / "llama", adapter=tmp_path / "a"))
    np.testing.assert_allclose(logits(begun.model, merged), expected, atol=2e-5)

    class Stop(StopRequest):
        def requested(self, step):
            return step >= 2

    with monkeypatch.context() as patch:
        patch.setattr(trainer_lib, "StopRequest", Stop)
        run_of(text, bases / "llama", tmp_path / "parts", **start)
    (tmp_path / "a").rename(tmp_path / "gone")  # a run that goes on reads its own checkpoint
    run_of(text, bases / "llama", tmp_path / "parts", **start)
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")
    assert exported(tmp_path / "whole", tmp_path / "b") == 0
    before, after = (json.loads((tmp_path / x / "adapter_config.json").read_text()) for x in ("gone", "b"))
    assert (after["r"], after["lora_alpha"]) == (before["r"], before["lora_alpha"])
    states = [load_file(tmp_path / x / "adapter_model.safetensors") for x in ("gone", "b")]
    assert {k: x.shape for k, x in states[0].items()} == {k: x.shape for k, x in states[1].items()}
    assert not any(torch.equal(x, states[1][key]) for key, x in states[0].items())  # all of it trained
    found = lcx.load(bases / "llama", adapter=tmp_path / "b")
    np.testing.assert_allclose(logits(*found), logits(*lcx.load(tmp_path / "whole")), atol=1e-6)


@pytest.mark.parametrize(
    "changes,says",
    [
        (dict(lora=LoRA(rank=8, alpha=8.0, targets="(q|v)_proj")), "LoRA.rank is 8, the adapter's 4"),
        (dict(lora=LoRA(rank=4, alpha=16.0, targets="(q|v)_proj")), "LoRA.alpha is 16.0, the adapter's 8"),
        (dict(lora=LoRA(rank=4, alpha=8.0)), "k_proj has no pair in the adapter"),
        (dict(init_from=None), "Trainer.adapter belongs to a pretrained model"),
        (dict(lora=LoRA(rank=4, alpha=8.0, targets="(q|v)_proj", beside="nrm")), "'nrm' matches none"),
    ],
)
def test_starts_that_do_not_fit(text, bases, plain, tmp_path, changes, says):
    if "init_from" in changes:
        changes = {"model": lcx.load(bases / "llama")[0], **changes}
    with pytest.raises(UserError, match=says):
        run_of(text, bases / "llama", tmp_path / "run", adapter=str(plain), **changes)


def test_an_adapter_that_cannot_train_says_so(text, bases, tmp_path):
    write_adapter(bases / "llama", tmp_path / "a", target_modules=["q_proj"], use_dora=True)
    with pytest.raises(UserError, match="q_proj.weight has DoRA, which cannot be trained here: merge"):
        run_of(text, bases / "llama", tmp_path / "run", adapter=str(tmp_path / "a"))


# ---------------------------------------------------------------------------------------------- commands


def test_the_commands_take_an_adapter(bases, plain, tmp_path, capsys):
    from lcx.evaluate import main as evaluate
    from lcx.generate import main as generate

    expected = logits(*lcx.load(bases / "llama", adapter=plain))
    base = shutil.copytree(bases / "llama", tmp_path / "base")
    (base / "lcx_tokenizer.json").write_text(json.dumps(ByteTokenizer().to_json()))
    args = [f"--src={base}", f"--adapter={plain}", f"--dst={tmp_path}/hf", "--dst_format=hf"]
    assert convert_main(args) == 0
    np.testing.assert_allclose(hf_logits(hf_base(tmp_path / "hf")), expected, atol=2e-5)
    capsys.readouterr()
    said = []
    for checkpoint, more in ((base, [f"--adapter={plain}"]), (tmp_path / "hf", []), (base, [])):
        assert generate([f"--checkpoint={checkpoint}", "--prompt=abc", "--max_new_tokens=8", *more]) == 0
        said.append(capsys.readouterr().out)
    assert said[0] == said[1] != said[2]
    (tmp_path / "text.txt").write_text("some words " * 30)
    flags = [
        f"--checkpoint={base}",
        f"--adapter={plain}",
        f"--output={tmp_path}/out",
        "--gin.evaluate.dataset=@lcx.data.Dataset()",
        f"--gin.Dataset.source='{tmp_path}/text.txt'",
        f"--gin.Dataset.cache_dir='{tmp_path}/cache'",
        "--gin.evaluate.evals=(@lcx.evals.perplexity.Perplexity(),)",
        "--gin.Perplexity.windows=(32,)",
        "--gin.Perplexity.stride=None",
        "--gin.Perplexity.split='train'",
        "--gin.Dataset.eval_fraction=0.0",
    ]
    status = evaluate(flags)
    assert status == 0, capsys.readouterr().err
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["adapter"] == [str(plain)] and results["name"] == f"base + {plain.name}"


@pytest.mark.parametrize(
    "flags,says",
    [
        (["--dst_format=peft"], "'peft' is written from the workdir of a run that trained with LoRA"),
        (["--dst_format=hf", "--base_model=x"], "base_model is the base that a 'peft' adapter names"),
    ],
)
def test_flags_that_do_not_go_together(bases, tmp_path, capsys, flags, says):
    assert convert_main([f"--src={bases}/llama", f"--dst={tmp_path}/out", *flags]) == 2
    error = capsys.readouterr().err
    assert says in error and error.count("\n") == 1
