"""Each family against transformers on tiny random models: logits, every gradient, and the way back."""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from flax.traverse_util import flatten_dict

from lcx import extend
from lcx import model as model_lib
from lcx.convert.core import model_source, rules
from lcx.convert.hf import families, writer
from lcx.convert.hf.source import HfSource
from lcx.errors import UserError
from lcx.rope import Rope, default

SMALL = dict(
    vocab_size=67,
    hidden_size=32,
    intermediate_size=40,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
    initializer_range=0.3,
    pad_token_id=None,
    bos_token_id=1,
    eos_token_id=[2, 3],
)
YARN = dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=24, rope_theta=1e4)
LLAMA3 = dict(
    rope_type="llama3",
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=32,
    rope_theta=5e5,
)
LONG = dict(
    rope_type="longrope",
    rope_theta=1e4,
    short_factor=[1.0, 1.1, 1.3],
    long_factor=[1.0, 2.5, 6.0],
    original_max_position_embeddings=32,
)


def phi3(**changes):
    keys = dict(partial_rotary_factor=0.75, max_position_embeddings=128, original_max_position_embeddings=32)
    return transformers.Phi3Config(**SMALL | keys | changes)


def make(cls, **changes):
    return cls(**SMALL | changes)


CASES = {
    "llama": lambda: make(
        transformers.LlamaConfig, rope_parameters=dict(rope_type="default", rope_theta=5e3)
    ),
    "llama biases": lambda: make(transformers.LlamaConfig, attention_bias=True, mlp_bias=True),
    "llama tied, wide heads": lambda: make(transformers.LlamaConfig, tie_word_embeddings=True, head_dim=12),
    "llama yarn": lambda: make(
        transformers.LlamaConfig, max_position_embeddings=96, rope_parameters=dict(YARN)
    ),
    "llama yarn with every option": lambda: make(
        transformers.LlamaConfig,
        max_position_embeddings=96,
        rope_parameters=YARN | dict(beta_fast=16.0, beta_slow=2.0, attention_factor=1.5, truncate=False),
    ),
    "llama llama3": lambda: make(transformers.LlamaConfig, rope_parameters=dict(LLAMA3)),
    "llama linear": lambda: make(
        transformers.LlamaConfig, rope_parameters=dict(rope_type="linear", factor=4.0, rope_theta=1e4)
    ),
    "llama proportional": lambda: make(
        transformers.LlamaConfig,
        rope_parameters=dict(rope_type="proportional", partial_rotary_factor=0.5, rope_theta=1e4),
    ),
    "llama dynamic": lambda: make(
        transformers.LlamaConfig,
        max_position_embeddings=32,
        rope_parameters=dict(rope_type="dynamic", factor=4.0, rope_theta=1e4),
    ),
    "llama longrope": lambda: make(
        transformers.LlamaConfig,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=6,
        max_position_embeddings=128,
        rope_parameters=LONG | dict(factor=4.0),
    ),
    "mistral": lambda: make(transformers.MistralConfig, sliding_window=9, head_dim=10),
    "mistral without window": lambda: make(transformers.MistralConfig, sliding_window=None),
    "qwen2": lambda: make(transformers.Qwen2Config, tie_word_embeddings=True),
    "qwen2 mixed": lambda: make(
        transformers.Qwen2Config, use_sliding_window=True, sliding_window=7, max_window_layers=3
    ),
    "qwen2 alternating": lambda: make(
        transformers.Qwen2Config,
        use_sliding_window=True,
        sliding_window=7,
        layer_types=["full_attention", "sliding_attention"] * 2,
        max_position_embeddings=96,
        rope_parameters=dict(YARN),
    ),
    "qwen3": lambda: make(transformers.Qwen3Config, head_dim=14),
    "qwen3 biases, mixed": lambda: make(
        transformers.Qwen3Config,
        head_dim=8,
        attention_bias=True,
        use_sliding_window=True,
        sliding_window=5,
        layer_types=["full_attention", "sliding_attention"] * 2,
    ),
    "phi3": lambda: phi3(sliding_window=9),
    "phi3 longrope": lambda: phi3(rope_parameters=dict(LONG)),
}
WITH_GRADIENTS = (
    "llama biases",
    "llama tied, wide heads",
    "mistral",
    "qwen2 mixed",
    "qwen3 biases, mixed",
    "phi3 longrope",
)
LENGTH, SHORT = 45, 31  # odd, and on both sides of the original windows of dynamic and longrope (32)


def torch_model(name: str) -> torch.nn.Module:
    """A random model in which no parameter is 0 or 1 by default."""
    torch.manual_seed(sum(name.encode()))
    model = transformers.AutoModelForCausalLM.from_config(CASES[name](), dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def save(model, folder: pathlib.Path, style: str) -> None:
    """save_pretrained (which writes transformers 5's spelling), respelled as transformers 4 did, or both."""
    model.save_pretrained(folder)
    path = folder / "config.json"
    config = json.loads(path.read_text())
    if style == "v5":
        return
    rope = config["rope_parameters"] if style == "dual" else config.pop("rope_parameters")
    old = {key: value for key, value in rope.items() if key not in ("rope_theta", "partial_rotary_factor")}
    config["rope_theta"] = rope["rope_theta"]
    config["rope_scaling"] = None if rope["rope_type"] == "default" else old
    if "partial_rotary_factor" in rope:
        config["partial_rotary_factor"] = rope["partial_rotary_factor"]
    if style == "v4" and config["rope_scaling"] is not None:
        old["type"] = old.pop("rope_type")
    config["torch_dtype"] = config.pop("dtype")
    path.write_text(json.dumps(config))


def tokens(length: int) -> np.ndarray:
    return np.random.default_rng(length).integers(0, SMALL["vocab_size"], (2, length))


def torch_gradients(model, ids: np.ndarray) -> dict[str, np.ndarray]:
    logits = model(torch.tensor(ids)).logits
    losses = torch.nn.functional.cross_entropy(logits[:, :-1].transpose(1, 2), torch.tensor(ids[:, 1:]))
    losses.backward()
    return {name: parameter.grad.numpy() for name, parameter in model.named_parameters()}


def jax_logits(model, params, ids: np.ndarray) -> jax.Array:
    return jax.jit(lambda params, ids: model.apply({"params": params}, ids))(params, jnp.asarray(ids))


def jax_gradients(model, params, ids: np.ndarray):
    def loss(params, ids):
        log_probabilities = jax.nn.log_softmax(model.apply({"params": params}, ids)[:, :-1])
        return -jnp.take_along_axis(log_probabilities, ids[:, 1:, None], -1).mean()

    return jax.device_get(jax.jit(jax.grad(loss))(params, jnp.asarray(ids)))


@pytest.mark.parametrize("name", CASES)
def test_logits_and_round_trip(name, tmp_path):
    reference = torch_model(name)
    save(reference, tmp_path / "hf", ("v4", "v5", "dual")[list(CASES).index(name) % 3])
    source = HfSource(tmp_path / "hf")
    params = model_source.to_devices(source, dtype=None, mesh=None)
    for ids in (
        [tokens(SHORT), tokens(LENGTH)] if "dynamic" in name or "longrope" in name else [tokens(LENGTH)]
    ):
        with torch.no_grad():
            logits = reference(torch.tensor(ids)).logits.numpy()
        np.testing.assert_allclose(jax_logits(source.model, params, ids), logits, atol=2e-4, rtol=0)
    assert_loads_equal(tmp_path / "back", source.model, params, reference, ids, logits)


@pytest.mark.parametrize("name", WITH_GRADIENTS)
def test_gradients_of_all_parameters(name, tmp_path):
    reference = torch_model(name)
    save(reference, tmp_path / "hf", "dual")
    source = HfSource(tmp_path / "hf")
    params = model_source.to_devices(source, dtype=None, mesh=None)
    table = rules.Table(families.rules(source.model), model_source.leaf_shapes(source.model))
    gradients = torch_gradients(reference, tokens(LENGTH))
    mapped = table.to_foreign(flatten_dict(jax_gradients(source.model, params, tokens(LENGTH)), sep="/"))
    assert set(mapped) == set(gradients)
    for key, gradient in gradients.items():
        error = np.abs(mapped[key] - gradient).max() / np.abs(gradient).max()
        assert error < 2e-4, (key, error)


def assert_loads_equal(folder, model, params, reference, ids, logits):
    """transformers loads what we write with nothing missing, bit-equal weights, and the same function."""
    folder.mkdir()
    writer.write(folder, model_source.TreeSource(model, params), max_shard_bytes=20_000)
    assert (folder / "model.safetensors.index.json").exists()
    back, info = transformers.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    state = back.state_dict()
    assert set(state) == set(reference.state_dict())
    for key, tensor in reference.state_dict().items():
        assert state[key].dtype == tensor.dtype and torch.equal(state[key], tensor), key
    with torch.no_grad():
        np.testing.assert_array_equal(back.eval()(torch.tensor(ids)).logits.numpy(), logits)
    again = HfSource(folder)
    assert again.model == model


def spelled(tmp_path, name: str, style: str):
    save(torch_model(name), tmp_path / style, style)
    return HfSource(tmp_path / style).model


@pytest.mark.parametrize(
    "name", ["llama yarn", "llama llama3", "llama dynamic", "phi3 longrope", "qwen2 alternating"]
)
def test_the_spellings_of_the_rotary_settings_agree(name, tmp_path):
    models = [spelled(tmp_path, name, style) for style in ("v4", "v5", "dual")]
    assert models[0] == models[1] == models[2]


def test_written_config_keeps_both_spellings_and_integers(tmp_path):
    save(torch_model("phi3 longrope"), tmp_path / "hf", "v5")
    config = writer.config_of(HfSource(tmp_path / "hf"))
    assert config["rope_theta"] == 1e4 and config["rope_scaling"]["type"] == "longrope"
    assert config["rope_parameters"]["rope_type"] == "longrope"
    assert config["original_max_position_embeddings"] == 32 and config["max_position_embeddings"] == 128
    assert config["torch_dtype"] == config["dtype"] == "float32"
    assert config["partial_rotary_factor"] == 0.75
    assert config["bos_token_id"] == 1 and config["eos_token_id"] == [2, 3] and config["pad_token_id"] is None
    for key in ("vocab_size", "hidden_size", "num_hidden_layers", "original_max_position_embeddings"):
        assert type(config[key]) is int
    save(torch_model("llama dynamic"), tmp_path / "dynamic", "v5")
    source = HfSource(tmp_path / "dynamic")
    longer = extend.extend_model(source.model, {"rope_type": "dynamic", "factor": 8.0}, 256)
    params = model_source.to_devices(source, dtype=None, mesh=None)
    config = writer.config_of(model_source.TreeSource(longer, params))
    assert config["max_position_embeddings"] == 32 and config["rope_scaling"]["factor"] == 8.0


def test_half_precision_survives_bit_for_bit(tmp_path):
    for dtype in (torch.bfloat16, torch.float16):
        reference = torch_model("qwen3").to(dtype)
        save(reference, tmp_path / str(dtype), "dual")
        source = HfSource(tmp_path / str(dtype))
        assert source.model.dtype == str(dtype).removeprefix("torch.")
        params = model_source.to_devices(source, dtype=None, mesh=None)
        assert {str(leaf.dtype) for leaf in jax.tree.leaves(params)} == {source.model.dtype}
        out = tmp_path / f"{dtype}-back"
        out.mkdir()
        writer.write(out, model_source.TreeSource(source.model, params))
        back = transformers.AutoModelForCausalLM.from_pretrained(out)
        assert back.dtype == dtype
        for key, tensor in reference.state_dict().items():
            assert torch.equal(back.state_dict()[key], tensor), key


def test_mixed_dtypes_keep_every_number(tmp_path):
    reference = torch_model("llama").bfloat16()
    reference.model.layers[1].input_layernorm.float()
    reference.model.layers[1].self_attn.q_proj.float()
    reference.model.layers[1].self_attn.o_proj.half()
    save(reference, tmp_path / "hf", "v5")
    source = HfSource(tmp_path / "hf")
    assert source.model.dtype == "bfloat16"
    for name in ("q_proj", "o_proj"):
        assert str(source.leaves[f"stages_0/block_0/mixer/{name}/kernel"].dtype) == "float32"
    assert str(source.leaves["stages_0/block_0/mixer/k_proj/kernel"].dtype) == "bfloat16"
    params = model_source.to_devices(source, dtype=np.dtype(np.float32), mesh=None)
    table = rules.Table(families.rules(source.model), model_source.leaf_shapes(source.model))
    found = table.to_foreign(flatten_dict(jax.device_get(params), sep="/"))
    for key, tensor in reference.state_dict().items():
        np.testing.assert_array_equal(found[key], tensor.float().numpy())


def test_phi3_extended_with_yarn_is_written_as_an_equal_longrope(tmp_path, caplog):
    save(torch_model("phi3"), tmp_path / "hf", "v5")
    source = HfSource(tmp_path / "hf")
    scaling = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
    model = extend.extend_model(source.model, scaling, 128)
    params = model_source.to_devices(source, dtype=None, mesh=None)
    (tmp_path / "out").mkdir()
    writer.write(tmp_path / "out", model_source.TreeSource(model, params))
    assert "written as 'longrope' with the same frequencies" in caplog.text
    back = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    for ids in (tokens(SHORT), tokens(LENGTH)):
        with torch.no_grad():
            expected = back(torch.tensor(ids)).logits.numpy()
        np.testing.assert_allclose(jax_logits(model, params, ids), expected, atol=2e-4, rtol=0)


def test_extension_while_loading_equals_transformers(tmp_path):
    save(torch_model("llama"), tmp_path / "hf", "v5")
    source = HfSource(tmp_path / "hf")
    scaling = {"rope_type": "yarn", "factor": 4.0}
    model = extend.extend_model(source.model, scaling, 256)
    assert model.max_position_embeddings == 256
    config = transformers.AutoConfig.from_pretrained(tmp_path / "hf")
    config.max_position_embeddings = 256
    config.rope_parameters = config.rope_parameters | scaling | {"original_max_position_embeddings": 64}
    reference = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf", config=config).eval()
    ids = tokens(151)
    with torch.no_grad():
        expected = reference(torch.tensor(ids)).logits.numpy()
    params = model_source.to_devices(source, dtype=None, mesh=None)
    np.testing.assert_allclose(jax_logits(model, params, ids), expected, atol=2e-4, rtol=0)


# ------------------------------------------------------------------------------------------------ what does
# not fit


def rewrite(folder: pathlib.Path, **changes):
    path = folder / "config.json"
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in config.items() if value != "REMOVE"}))


REFUSED = {
    "model_type": (dict(model_type="gemma3n"), "supported are llama, mistral, qwen2, qwen3, phi3"),
    "no model_type": (dict(model_type="REMOVE"), "model_type None"),
    "architecture": (dict(architectures=["LlamaForSequenceClassification"]), "expected ['LlamaForCausalLM']"),
    "activation": (dict(hidden_act="gelu"), "hidden_act 'gelu'"),
    "softcap": (dict(attn_logit_softcapping=50.0), "attn_logit_softcapping = 50.0"),
    "experts": (dict(num_local_experts=8), "num_local_experts = 8"),
    "multiplier": (dict(residual_multiplier=0.22), "residual_multiplier"),
    "quantized": (dict(quantization_config={"bits": 4}), "quantization_config"),
    "partial rotary": (dict(partial_rotary_factor=0.5), "partial_rotary_factor 0.5"),
    "window of a llama": (dict(sliding_window=8), "change model_type to 'mistral'"),
    "rope by layer type": (
        dict(
            rope_parameters={
                "full_attention": {"rope_type": "default", "rope_theta": 1e4},
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e6},
            }
        ),
        "differ by layer type",
    ),
    "unknown rope": (dict(rope_parameters={"rope_type": "yarm", "rope_theta": 1e4}), "yarm"),
    "float size": (dict(hidden_size=32.0), "hidden_size = 32.0, expected an integer"),
    "float window": (dict(max_position_embeddings=64.0), "max_position_embeddings"),
    "text size": (dict(vocab_size="67"), "vocab_size = '67'"),
    "negative size": (dict(num_hidden_layers=-1), "num_hidden_layers = -1"),
    "missing size": (dict(intermediate_size="REMOVE"), "no intermediate_size"),
    "eps": (dict(rms_norm_eps="1e-5"), "rms_norm_eps"),
    "boolean": (dict(attention_bias="yes"), "attention_bias"),
    "heads": (dict(num_key_value_heads=3), "num_key_value_heads 3"),
    "other width": (dict(intermediate_size=41), "mlp.gate_proj.weight is (40, 32), expected (41, 32)"),
    "other depth": (dict(num_hidden_layers=5), "9 missing: model.layers.4.self_attn.q_proj.weight"),
    "less depth": (dict(num_hidden_layers=3), "9 unexpected: model.layers.3"),
    "biases that are not there": (dict(attention_bias=True), "16 missing"),
    "tied but another head": (dict(tie_word_embeddings=True), "set tie_word_embeddings to false"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_config_is_refused(case, tmp_path):
    changes, message = REFUSED[case]
    save(torch_model("llama"), tmp_path, "v5")
    rewrite(tmp_path, **changes)
    with pytest.raises(UserError) as error:
        HfSource(tmp_path)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_qwen_window_settings_must_agree(tmp_path):
    save(torch_model("qwen2 mixed"), tmp_path, "v5")
    rewrite(tmp_path, use_sliding_window=False)
    with pytest.raises(UserError, match="set use_sliding_window"):
        HfSource(tmp_path)
    rewrite(tmp_path, layer_types=["full_attention", "chunked_attention"] * 2)
    with pytest.raises(UserError, match="layer_types chunked_attention"):
        HfSource(tmp_path)


def test_head_that_is_not_there(tmp_path):
    save(torch_model("llama tied, wide heads"), tmp_path, "v5")
    rewrite(tmp_path, tie_word_embeddings=False)
    with pytest.raises(UserError, match="lm_head.weight is missing; set tie_word_embeddings"):
        HfSource(tmp_path)


def test_tied_head_stored_twice_and_old_buffers_are_skipped(tmp_path, caplog):
    reference = torch_model("llama tied, wide heads")
    save(reference, tmp_path, "v5")
    (tmp_path / "model.safetensors").unlink()
    state = {key: tensor.clone() for key, tensor in reference.state_dict().items()}
    assert "lm_head.weight" in state
    state["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(6)
    torch.save(state, tmp_path / "pytorch_model.bin")
    source = HfSource(tmp_path)
    assert "lm_head/embedding" not in source.leaves
    assert "skipped 1 buffers" in caplog.text and "inv_freq" in caplog.text
    np.testing.assert_array_equal(
        source.read("embed/embedding", (slice(0, 67), slice(0, 32))), state["lm_head.weight"].numpy()
    )


def test_unused_but_innocent_keys_are_stated(tmp_path, caplog):
    save(torch_model("llama"), tmp_path, "v5")
    rewrite(
        tmp_path,
        unsloth_version="2025.1",
        attention_dropout=0.1,
        _attn_implementation_autoset=True,
        full_attn_mod=1,
    )
    HfSource(tmp_path)
    assert "unsloth_version" in caplog.text and "attention_dropout is not applied" in caplog.text


def own_rope(rope, head_dim, length):
    return default(rope, head_dim, length)


def attention(model, **changes):
    return model_lib.map_mixers(model, lambda mixer: mixer.clone(**changes, parent=None))


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda m: attention(m, window=8), "or change model_type to 'mistral' or 'phi3'"),
        (
            lambda m: attention(m, qk_norm=True),
            "has False in the 'hf' format; save with format 'lcx', or change model_type to 'qwen3'",
        ),
        (lambda m: attention(m, qkv_bias=True), "o_bias False, model_type 'llama' has True"),
        (lambda m: m.clone(model_type="mamba"), "model_type 'mamba'"),
        (lambda m: m.clone(norm_eps=1e-3), "config.json can state one for all"),
        (lambda m: attention(m, rope=Rope(rope_type=own_rope)), "own_rope"),
    ],
)
def test_models_that_config_json_cannot_state(change, message):
    model = model_lib.llama(
        vocab_size=11,
        hidden_size=8,
        intermediate_size=8,
        num_layers=2,
        num_heads=2,
        max_position_embeddings=8,
    )
    model = change(model)
    params = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), model_lib.abstract_params(model))
    with pytest.raises(UserError) as error:
        writer.config_of(model_source.TreeSource(model, params))
    assert message in str(error.value)


# ------------------------------------------------------------------------------------------------ real
# weights


@pytest.mark.parametrize("name", ["babyllama105", "stories260K"])
def test_real_weights(name, reference, tmp_path):
    folder = reference / "data" / "weights" / name / "hf"
    source = HfSource(folder)
    params = model_source.to_devices(source, dtype=None, mesh=None)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    text = (reference / "data" / "text" / "tinystories_train_2MiB.txt").read_text()[:1500]
    ids = np.array([[1, *tokenizer(text, add_special_tokens=False).input_ids[:300]]])
    original = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    with torch.no_grad():
        expected = original(torch.tensor(ids)).logits.numpy()
    found = jax_logits(source.model, params, ids)
    np.testing.assert_allclose(found, expected, atol=2e-4, rtol=0)
    assert_loads_equal(tmp_path / "back", source.model, params, original, ids, expected)
