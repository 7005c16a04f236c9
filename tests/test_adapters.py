"""PEFT adapters on a base: read against the peft package, written for it, trained further, refused; the commands."""

import json
import random
import shutil
import warnings

import jax
import numpy as np
import peft as peft_package
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tiny_runs import losses, tiny_trainer, write_text

import lcx
from lcx import lora as lora_lib
from lcx import trainer as trainer_lib
from lcx.convert import adapted, peft, peft_files
from lcx.convert.__main__ import main as convert_main
from lcx.convert.hf import HfSource
from lcx.convert.lcx_folder import LcxSource
from lcx.data import ByteTokenizer
from lcx.errors import UserError
from lcx.lora import LoRA
from lcx.sharding import MeshShape
from lcx.stopping import StopRequest

V = 258
TOKENS = np.random.default_rng(0).integers(0, V, (2, 24))
YARN = {"rope_type": "yarn", "factor": 4.0}
SIZES = dict(
    vocab_size=V,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=32,
    initializer_range=0.1,
    bos_token_id=None,
    eos_token_id=None,
    pad_token_id=None,
)
CONFIGS = {
    "llama": lambda: transformers.LlamaConfig(**SIZES),
    "tied": lambda: transformers.Qwen2Config(**SIZES, tie_word_embeddings=True),  # with biases on q, k, v
    "phi3": lambda: transformers.Phi3Config(**SIZES | {"eos_token_id": 2}, original_max_position_embeddings=32),
}


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """Folders of tiny random base models, biases and norms away from 0 and 1."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("bases")
    for name, config in CONFIGS.items():
        hf_model = transformers.AutoModelForCausalLM.from_config(config())
        with torch.no_grad():
            for key, x in hf_model.named_parameters():
                if "bias" in key or "norm" in key:
                    x.add_(0.1 * torch.randn_like(x))
        hf_model.save_pretrained(folder / name)
    return folder


def hf_base(folder, **changes):
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **changes)


def hf_logits(hf_model):
    with torch.no_grad():
        return hf_model.eval()(torch.from_numpy(TOKENS)).logits.numpy()


def logits(model, params):
    return np.asarray(lcx.logits(model, params, TOKENS))


def write_adapter(base, folder, **settings):
    """An adapter of the peft package with everything that trains moved; its logits."""
    torch.manual_seed(1)
    config = peft_package.LoraConfig(task_type="CAUSAL_LM", **{"r": 4, "lora_alpha": 8} | settings)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        hf_model = peft_package.get_peft_model(hf_base(base), config)
        with torch.no_grad():
            for _, x in hf_model.named_parameters():
                if x.requires_grad:
                    x.add_(torch.randn_like(x) * 0.1)
        hf_model.save_pretrained(str(folder))
    return hf_logits(hf_model)


def edit(folder, **changes):
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


# ---------------------------------------------------------------------------------------------- reading

Q = ["q_proj"]
READ = {
    "list": ("llama", dict(target_modules=["q_proj", "v_proj"])),
    "regex": ("llama", dict(target_modules=r".*layers\.1\.self_attn\.(q|o)_proj")),
    "all-linear": ("llama", dict(target_modules="all-linear", exclude_modules=["up_proj"])),
    "rslora, patterns": (
        "llama",
        dict(
            target_modules=["q_proj", "k_proj", "down_proj"],
            use_rslora=True,
            rank_pattern={"k_proj": 2, r"layers\.1\.mlp\.down_proj": 6},
            alpha_pattern={"layers.0.self_attn.q_proj": 3},
        ),
    ),
    "layers": ("llama", dict(target_modules=["v_proj"], layers_to_transform=[1], layers_pattern="layers")),
    "start": ("llama", dict(target_modules=Q, init_lora_weights="gaussian", fan_in_fan_out=True)),
    "DoRA": ("llama", dict(target_modules=["q_proj", "o_proj", "down_proj"], use_dora=True)),
    "DoRA of a fused module": ("phi3", dict(target_modules=["qkv_proj", "gate_up_proj"], use_dora=True)),
    "saved": ("llama", dict(target_modules=Q, modules_to_save=["embed_tokens", "lm_head", "norm"])),
    "saved modules of modules": ("llama", dict(target_modules=["v_proj", "up_proj"], modules_to_save=["mlp"])),
    "saved embedding, tied": ("tied", dict(target_modules=Q, modules_to_save=["embed_tokens"])),
    "saved head, tied": ("tied", dict(target_modules=Q, modules_to_save=["lm_head"])),
    "saved both as one": (
        "tied",
        dict(target_modules=Q, modules_to_save=["embed_tokens"], ensure_weight_tying=True),
    ),
    "pairs of tables": ("llama", dict(target_modules=["q_proj", "embed_tokens", "lm_head"])),
    "pair of the embedding, tied": ("tied", dict(target_modules=["q_proj", "embed_tokens"])),
    "pair of the head, tied": ("tied", dict(target_modules=["q_proj", "lm_head"])),
    "pair of both as one": ("tied", dict(target_modules=["q_proj", "embed_tokens"], ensure_weight_tying=True)),
    "rows": (
        "llama",
        dict(target_modules=Q, trainable_token_indices={"embed_tokens": [3, 200], "lm_head": [2]}),
    ),
    "rows, tied": ("tied", dict(target_modules=Q, trainable_token_indices=[3, 200])),
    "all biases": ("tied", dict(target_modules=["q_proj", "o_proj"], bias="all")),
    "biases of pairs": ("tied", dict(target_modules=["q_proj", "o_proj"], bias="lora_only")),
}


@pytest.mark.parametrize("name", READ)
def test_an_adapter_on_its_base_is_the_peft_model(name, bases, tmp_path):
    base, settings = READ[name]
    expected = write_adapter(bases / base, tmp_path / "a", **settings)
    assert np.abs(expected - hf_logits(hf_base(bases / base))).max() > 0.02
    model, params = lcx.load(bases / base, adapter=tmp_path / "a")
    np.testing.assert_allclose(logits(model, params), expected, atol=2e-5)
    assert model.tie_word_embeddings == (base == "tied" and ("one" in name or "rows" in name or "biases" in name))


def test_adapters_add_up(bases, tmp_path):
    for seed, name in enumerate("ab"):
        write_adapter(bases / "llama", tmp_path / name, target_modules=[f"{'qv'[seed]}_proj", "o_proj"])
    hf_model = peft_package.PeftModel.from_pretrained(hf_base(bases / "llama"), str(tmp_path / "a"))
    hf_model.load_adapter(str(tmp_path / "b"), "b")
    hf_model.base_model.set_adapter(["default", "b"])
    found = lcx.load(bases / "llama", adapter=[tmp_path / "a", tmp_path / "b"])
    np.testing.assert_allclose(logits(*found), hf_logits(hf_model), atol=2e-5)
    write_adapter(bases / "llama", tmp_path / "c", target_modules=["o_proj"], use_dora=True)
    with pytest.raises(UserError, match="both change model.layers.0.self_attn.o_proj.weight as a whole"):
        lcx.load(bases / "llama", adapter=[tmp_path / "a", tmp_path / "c"])


def test_a_half_precision_base_keeps_all_of_the_update_in_float32(bases, tmp_path):
    hf_base(bases / "llama").bfloat16().save_pretrained(tmp_path / "base")
    expected = write_adapter(tmp_path / "base", tmp_path / "a", target_modules="all-linear")
    found = lcx.load(tmp_path / "base", adapter=tmp_path / "a", dtype="float32")
    np.testing.assert_allclose(logits(*found), expected, atol=2e-5)
    _, stored = lcx.load(tmp_path / "base", adapter=tmp_path / "a")
    assert {str(x.dtype) for x in jax.tree.leaves(stored)} == {"bfloat16"}


@pytest.mark.parametrize("name", ["DoRA of a fused module", "rows", "saved", "pair of the embedding, tied"])
def test_slices_are_those_of_the_whole(name, bases, tmp_path):
    """As devices of a mesh read them; on a base that lies in lcx's format, too."""
    base, settings = READ[name]
    write_adapter(bases / base, tmp_path / "a", **settings)
    lcx.save(tmp_path / "lcx", *lcx.load(bases / base), format="lcx")
    source, other = (
        adapted.AdaptedSource(kind(path), tmp_path / "a")
        for kind, path in ((HfSource, bases / base), (LcxSource, tmp_path / "lcx"))
    )
    rng = np.random.default_rng(0)
    assert source.changed == other.changed
    for path in source.changed:
        shape = source.leaves[path].shape
        whole = source.read(path, tuple(slice(0, size) for size in shape))
        bounds = [sorted(rng.choice(size + 1, 2, replace=False).tolist()) for size in shape]
        index = tuple(slice(*pair) for pair in bounds)
        for one in (source, other):
            np.testing.assert_allclose(one.read(path, index), whole[index], atol=1e-6)


def renamed(folder, change):
    state = load_file(folder / "adapter_model.safetensors")
    save_file({change(key): x for key, x in state.items()}, folder / "adapter_model.safetensors")


@pytest.mark.parametrize(
    "change",
    [
        lambda key: key.replace("lora_A.weight", "lora_A.mine.weight").replace("lora_B.weight", "lora_B.mine.weight"),
        lambda key: key.removeprefix("base_model.model."),
        lambda key: "_orig_mod." + key.replace("layers.", "layers.module."),
    ],
    ids=["the adapter's name", "no prefix", "wrappers"],
)
def test_names_that_tools_leave(bases, tmp_path, change, caplog):
    expected = write_adapter(bases / "llama", tmp_path / "a", target_modules=Q)
    renamed(tmp_path / "a", change)
    np.testing.assert_allclose(logits(*lcx.load(bases / "llama", adapter=tmp_path / "a")), expected, atol=2e-5)
    assert ("wrappers" in caplog.text) == ("mine" not in change("lora_A.weight"))


# ---------------------------------------------------------------------------------------------- refusals


@pytest.fixture(scope="module")
def plain(bases, tmp_path_factory):
    folder = tmp_path_factory.mktemp("plain") / "a"
    write_adapter(bases / "llama", folder, target_modules=["q_proj", "v_proj"])
    return folder


@pytest.fixture
def adapter(plain, tmp_path):
    return shutil.copytree(plain, tmp_path / "a")


LAYER = "base_model.model.model.layers.0.self_attn.q_proj"


def without(key):
    return lambda state: state.pop(key)


def put(key, *shape, value=1.0):
    return lambda state: state.__setitem__(key, torch.full(shape, value))


@pytest.mark.parametrize(
    "settings,change,says",
    [
        (dict(peft_type="IA3"), None, "has peft_type 'IA3', expected 'LORA'"),
        (dict(peft_type="PROMPT_TUNING"), None, "has peft_type 'PROMPT_TUNING'"),
        (dict(peft_type=None), None, "has no peft_type"),
        (dict(task_type="SEQ_CLS"), None, "has task_type 'SEQ_CLS', expected 'CAUSAL_LM'"),
        (dict(lora_bias=True), None, "has lora_bias True"),
        (dict(target_parameters=["mlp.experts"]), None, "has target_parameters"),
        (dict(layer_replication=[[0, 2]]), None, "has layer_replication"),
        (dict(use_magic=True), None, "'use_magic' True, a variant of LoRA that is not known"),
        (dict(init_lora_weights="olora"), None, "init_lora_weights 'olora', which changes the base"),
        (dict(lora_alpha=-8), None, "has lora_alpha -8, expected a positive number"),
        (dict(lora_alpha=float("nan")), None, "has lora_alpha nan, expected a positive number"),
        (dict(r=10**12), None, "has r 1000000000000, expected a positive number"),
        (dict(r="4"), None, "has r '4', expected"),
        (dict(target_modules=5), None, "has target_modules 5, expected a list of names"),
        (dict(target_modules=["q_proj"]), None, "pairs for model.layers.0.self_attn.v_proj, .*does not mean"),
        (dict(target_modules=["q_proj", "v_proj", "k_proj"]), None, "means 6 modules, and the tensors of 2"),
        (dict(target_modules="(q|v_proj"), None, "no regular expression"),
        (dict(rank_pattern=[1]), None, r"has rank_pattern \[1\], expected an object"),
        (dict(modules_to_save=["norm"]), None, "input_layernorm.weight.*, which the adapter does not hold"),
        (dict(trainable_token_indices=[1]), None, "trainable_token_indices .* 'embed_tokens', whose rows"),
        ({}, without(f"{LAYER}.lora_A.weight"), "q_proj has lora_B alone"),
        ({}, put(f"{LAYER}.lora_A.weight", 5, 32), r"has A \(5, 32\) and B \(32, 4\)"),
        ({}, put(f"{LAYER}.lora_A.weight", 4, 31), "maps 31 to 32 features, the model's 32 to 32"),
        ({}, put(f"{LAYER}.lora_A.weight", 4, 32, value=np.nan), "not finite"),
        ({}, put(f"{LAYER}.lora_A.other.weight", 4, 32), "the same, expected one"),
        ({}, put("base_model.model.model.norm.weight", 32), "unexpected tensor .* modules_to_save"),
        ({}, put("base_model.model.lm_head.weight", V + 2, 32), "its vocabulary was resized"),
        ({}, put("base_model.model.score.weight", 2, 32), "tensors for score, expected modules such as model.layers"),
        ({}, put("../../etc/passwd", 2), "unexpected tensor '../../etc/passwd'"),
        ({}, put("x" * 1000, 2), "name has 1000 characters"),
    ],
)
def test_what_cannot_be_read_is_refused_by_name(adapter, bases, settings, change, says):
    edit(adapter, **settings)
    if change is not None:
        state = load_file(adapter / "adapter_model.safetensors")
        change(state)
        save_file(state, adapter / "adapter_model.safetensors")
    with pytest.raises(UserError, match=says) as error:
        lcx.load(bases / "llama", adapter=adapter)
    assert "\n" not in str(error.value)


def test_code_in_a_torch_file_is_not_run(adapter, bases, tmp_path):
    class Code:
        def __reduce__(self):
            return (open, (str(tmp_path / "ran"), "w"))

    (adapter / "adapter_model.safetensors").unlink()
    torch.save({"base_model.model.x": Code()}, adapter / "adapter_model.bin")
    with pytest.raises(UserError, match="nothing in it was executed"):
        lcx.load(bases / "llama", adapter=adapter)
    assert not (tmp_path / "ran").exists()


def test_a_folder_that_is_no_base(adapter, bases):
    with pytest.raises(UserError, match="is a PEFT adapter: pass its base, '.*llama', as the model"):
        lcx.load(adapter)
    with pytest.raises(UserError, match="no adapter at"):
        lcx.load(bases / "llama", adapter=adapter / "nothing")
    with pytest.raises(UserError, match="adapter_config.json is missing"):
        lcx.load(bases / "llama", adapter=bases / "llama")


WEIRD = (None, True, -1, 0, 1e400, float("nan"), "", "x" * 500, "(((", [], {}, [[[]]], {"a": {"b": []}}, 2**70, [None])


def mutated(rng, config, weights):
    """One damaged pair of files: a value, a key, or bytes of the header."""
    kind = rng.random()
    if kind < 0.6:
        key = rng.choice(sorted(config))
        config = {**config, key: rng.choice(WEIRD)}
        return json.dumps(config).encode(), weights
    text, length = json.dumps(config).encode(), int.from_bytes(weights[:8], "little")
    damaged = bytearray(text if kind < 0.7 else weights)
    for _ in range(rng.choice((1, 1, 4))):
        damaged[rng.randrange(min(len(damaged), 8 + length))] = rng.randrange(32, 127)
    if rng.random() < 0.1:
        del damaged[rng.randrange(len(damaged)) :]
    return (bytes(damaged), weights) if kind < 0.7 else (text, bytes(damaged))


def fuzz(folder, known, count, seed):
    """(refused, read) of so many damaged adapters. Anything but a UserError of one line is raised."""
    config = json.loads((folder / "adapter_config.json").read_text())
    weights, rng, counts = (folder / "adapter_model.safetensors").read_bytes(), random.Random(seed), [0, 0]
    for _ in range(count):
        text, data = mutated(rng, config, weights)
        (folder / "adapter_config.json").write_bytes(text)
        (folder / "adapter_model.safetensors").write_bytes(data)
        try:
            peft_files.read(folder, known)
            counts[1] += 1
        except UserError as error:
            assert "\n" not in str(error)
            counts[0] += 1
    return counts


def test_damaged_files_end_in_one_line(adapter, bases):
    known = adapted.known(lcx.load(bases / "llama")[0])
    refused, read = fuzz(adapter, known, 150, seed=0)
    assert refused > 75 and read > 5  # a null in place of null changes nothing


# ---------------------------------------------------------------------------------------------- training


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    write_text(folder)
    return folder


def trainer(text, base, **changes):
    return tiny_trainer(text, **{"init_from": str(base), "steps": 3, "log_every": 1, "checkpoint_every": 2} | changes)


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
    assert again == 2 and "pass rope_scaling=" in capsys.readouterr().err


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
        (["stages_0/block_0/mixer/feature_map_q/layer"], "1 parameters that trained .* have no place"),
        (["stages_0/block_0/mixer/q_proj/kernel"], "has a pair and trained as a whole too"),
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
    write_adapter(bases / "llama", tmp_path / "a", target_modules=Q, use_dora=True)
    with pytest.raises(UserError, match="q_proj.weight has DoRA, which does not train here: merge"):
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
        (["--dst_format=hf", "--base_model=x"], "base_model is what a 'peft' adapter names"),
    ],
)
def test_flags_that_do_not_go_together(bases, tmp_path, capsys, flags, says):
    assert convert_main([f"--src={bases}/llama", f"--dst={tmp_path}/out", *flags]) == 2
    error = capsys.readouterr().err
    assert says in error and error.count("\n") == 1
