"""PEFT adapters on a base: read against the peft package, or refused in one line."""

import json
import random
import shutil

import jax
import numpy as np
import peft as peft_package
import pytest
import torch
import transformers
from peft_models import (  # noqa: F401
    SIZES,
    TOKENS,
    V,
    bases_fixture,
    edit,
    hf_base,
    hf_logits,
    logits,
    plain_fixture,
    write_adapter,
)
from safetensors.torch import load_file, save_file

import lcx
from lcx.convert.hf.families import FAMILIES
from lcx.convert.hf.source import HfSource
from lcx.convert.peft import adapter as peft_adapter
from lcx.convert.peft import files as peft_files
from lcx.convert.peft import merged
from lcx.convert.workdir.source import LcxSource
from lcx.errors import UserError
from lcx.lora import LoRA

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
    both = "both change model.layers.0.self_attn.o_proj.weight, and the changes do not add up"
    with pytest.raises(UserError, match=both):
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
        merged.AdaptedSource(kind(path), tmp_path / "a")
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


def test_pairs_of_experts_are_those_that_peft_fuses(tmp_path):
    sizes = dict(num_experts=3, num_experts_per_tok=2, moe_intermediate_size=20, head_dim=8)
    torch.manual_seed(0)
    config = transformers.Qwen3MoeConfig(**SIZES | sizes)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "base")
    model, params = lcx.load(tmp_path / "base")
    lora = LoRA(rank=3, targets="/mlp/(gate|up|down)_proj").init(jax.random.key(0), model)
    rng = np.random.default_rng(0)
    lora = jax.tree.map(lambda x: x if x.ndim == 1 else 0.2 * rng.normal(size=x.shape).astype(np.float32), lora)
    peft_adapter.save(tmp_path / "a", model, lora)
    expected = np.asarray(jax.jit(model.apply)({"params": params, "lora": lora}, TOKENS))
    assert np.abs(expected - logits(model, params)).max() > 0.1
    hf_model = peft_package.PeftModel.from_pretrained(hf_base(tmp_path / "base"), str(tmp_path / "a"))
    np.testing.assert_allclose(hf_logits(hf_model), expected, atol=2e-5)
    np.testing.assert_allclose(logits(*lcx.load(tmp_path / "base", adapter=tmp_path / "a")), expected, atol=2e-5)
    jax.tree.map(np.testing.assert_array_equal, peft_adapter.load(tmp_path / "a", model), lora)


def test_a_router_trained_in_full_goes_to_peft_and_back(tmp_path):
    """transformers 5 names Mixtral's router otherwise than the checkpoint, and PEFT finds it by that name only."""
    torch.manual_seed(0)
    config = transformers.MixtralConfig(**SIZES, num_local_experts=3, sliding_window=None)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "base")
    expected = write_adapter(tmp_path / "base", tmp_path / "a", target_modules=Q, modules_to_save=["gate"])
    model, params = lcx.load(tmp_path / "base", adapter=tmp_path / "a")
    np.testing.assert_allclose(logits(model, params), expected, atol=2e-5)

    lora = LoRA(rank=2, targets="q_proj").init(jax.random.key(0), model)
    router = "stages_0/block_0/mlp/router/kernel"
    peft_adapter.save(tmp_path / "b", model, lora, params=params, beside=[router])
    hf_model = peft_package.PeftModel.from_pretrained(hf_base(tmp_path / "base"), str(tmp_path / "b"))
    ours = logits(*lcx.load(tmp_path / "base", adapter=tmp_path / "b"))
    np.testing.assert_allclose(hf_logits(hf_model), ours, atol=2e-5)
    assert np.abs(ours - logits(*lcx.load(tmp_path / "base"))).max() > 1e-3


def test_experts_that_share_a_tensor_have_no_modules_to_write(tmp_path):
    config = {"model_type": "gpt_oss", **SIZES, "head_dim": 8, "num_local_experts": 2, "num_experts_per_tok": 1}
    model = FAMILIES["gpt_oss"].model(config, dtype="float32")
    lora = LoRA(rank=2, targets="_proj").init(jax.random.key(0), model)
    with pytest.raises(UserError, match="down_proj has pairs of experts, .*'gpt_oss' keeps in one tensor"):
        peft_adapter.save(tmp_path / "a", model, lora)


# ---------------------------------------------------------------------------------------------- refusals


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
        (dict(target_modules=["q_proj"]), None, "pairs for model.layers.0.self_attn.v_proj, .*does not select"),
        (dict(target_modules=["q_proj", "v_proj", "k_proj"]), None, "selects 6 modules, and the tensors of 2"),
        (dict(target_modules="(q|v_proj"), None, "not a valid regular expression"),
        (dict(rank_pattern=[1]), None, r"has rank_pattern \[1\], expected an object"),
        (dict(modules_to_save=["norm"]), None, "input_layernorm.weight.*, which the adapter lacks"),
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
    with pytest.raises(UserError, match="holds neither adapter_config.json nor .*: change the setting adapter"):
        lcx.load(bases / "llama", adapter=bases / "llama")
    with pytest.raises(UserError, match="is given twice, and would be merged twice"):
        lcx.load(bases / "llama", adapter=(adapter, f"{adapter}/../{adapter.name}"))


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
    known = merged.known(lcx.load(bases / "llama")[0])
    refused, read = fuzz(adapter, known, 150, seed=0)
    assert refused > 75 and read > 5  # a null in place of null changes nothing
