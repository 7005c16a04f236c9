"""DeepSeek V2 and V3 beside what test_families.py holds every family to: released files, and the absorbed form."""

import copy
import json
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.torch
import torch
from test_families import described, loaded, torch_model
from test_mixers import MIXERS, D, inputs, noisy_params

import lcx
from lcx import extend, mixers
from lcx import model as model_lib
from lcx.convert.core import model_source
from lcx.convert.hf import config as hf_config
from lcx.convert.hf import writer
from lcx.convert.hf.source import HfSource
from lcx.errors import UserError
from lcx.linearize import Linearize
from lcx.mixers.latent_attention import LatentAttention
from lcx.model import num_params
from lcx.ops import attention_parts
from lcx.planning import flops

YARN = dict(
    type="yarn", factor=40, original_max_position_embeddings=4096, beta_fast=32, beta_slow=1, mscale=0.707,
    mscale_all_dim=0.707,
)  # fmt: skip
LITE = dict(
    model_type="deepseek_v2", architectures=["DeepseekV2ForCausalLM"], vocab_size=102400, hidden_size=2048,
    intermediate_size=10944, moe_intermediate_size=1408, num_hidden_layers=27, num_attention_heads=16,
    num_key_value_heads=16, n_shared_experts=2, n_routed_experts=64, ep_size=1, routed_scaling_factor=1.0,
    kv_lora_rank=512, q_lora_rank=None, qk_rope_head_dim=64, v_head_dim=128, qk_nope_head_dim=128,
    topk_method="greedy", n_group=1, topk_group=1, num_experts_per_tok=6, moe_layer_freq=1, first_k_dense_replace=1,
    norm_topk_prob=False, scoring_func="softmax", aux_loss_alpha=0.001, seq_aux=True, hidden_act="silu",
    max_position_embeddings=163840, rms_norm_eps=1e-6, rope_theta=10000, rope_scaling=YARN, attention_bias=False,
    attention_dropout=0.0, tie_word_embeddings=False, use_cache=True, pretraining_tp=1, torch_dtype="bfloat16",
)  # fmt: skip
V2 = LITE | dict(
    hidden_size=5120, intermediate_size=12288, moe_intermediate_size=1536, num_hidden_layers=60,
    num_attention_heads=128, num_key_value_heads=128, n_routed_experts=160, routed_scaling_factor=16.0,
    q_lora_rank=1536, topk_method="group_limited_greedy", n_group=8, topk_group=3,
)  # fmt: skip
V3 = V2 | dict(
    model_type="deepseek_v3", architectures=["DeepseekV3ForCausalLM"], vocab_size=129280, hidden_size=7168,
    intermediate_size=18432, moe_intermediate_size=2048, num_hidden_layers=61, n_shared_experts=1,
    n_routed_experts=256,
    routed_scaling_factor=2.5, topk_method="noaux_tc", topk_group=4, num_experts_per_tok=8, first_k_dense_replace=3,
    norm_topk_prob=True, scoring_func="sigmoid", num_nextn_predict_layers=1,
    rope_scaling=YARN | dict(mscale=1.0, mscale_all_dim=1.0),
    quantization_config=dict(activation_scheme="dynamic", fmt="e4m3", quant_method="fp8", weight_block_size=[128, 128]),
)  # fmt: skip


@pytest.mark.parametrize(
    ("config", "parameters"), [(LITE, 15.7e9), (V2, 235.7e9), (V3, 671.0e9)], ids=["V2-Lite", "V2", "V3"]
)
def test_released_settings(config, parameters):
    """As many parameters as their model cards say, and settings that survive both directions."""
    model = hf_config.from_config(config)
    assert num_params(model) == pytest.approx(parameters, abs=0.06e9)
    assert model.max_position_embeddings == 163840
    written = hf_config.to_config(model, dtype="bfloat16")
    assert hf_config.from_config(written) == model
    kept = set(config) - {"ep_size", "moe_layer_freq", "aux_loss_alpha", "seq_aux", "scoring_func", "attention_dropout"}
    for key in kept - {"rope_scaling", "quantization_config", "num_nextn_predict_layers", "pretraining_tp"}:
        if key != "topk_method" or config is not V3:
            assert written[key] == config[key], key


def test_fp8_in_blocks_and_layers_of_next_tokens(tmp_path, caplog):
    """A folder as V3 is released: dequantized as its authors' code does, and what is left out is said."""
    reference, block, rng = torch_model("deepseek_v3"), (16, 12), np.random.default_rng(0)
    reference.save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    tensors, expected = safetensors.torch.load_file(path), {}
    for name in [name for name, x in tensors.items() if "_proj" in name and x.ndim == 2]:
        weight = tensors[name].to(torch.float8_e4m3fn)
        counts = [-(-size // step) for size, step in zip(weight.shape, block, strict=True)]
        scales = torch.tensor(rng.uniform(0.1, 2, counts), dtype=torch.float32)
        tensors |= {name: weight, f"{name}_scale_inv": scales}
        rows, columns = (torch.arange(size) // step for size, step in zip(weight.shape, block, strict=True))
        expected[name] = (weight.float() * scales[rows][:, columns]).bfloat16()
    assert len(expected) > 50
    tensors |= {f"model.layers.4.{name}.weight": torch.ones(3) for name in ("enorm", "shared_head.head")}
    safetensors.torch.save_file(tensors, path)
    config = json.loads((tmp_path / "config.json").read_text())
    quantization = dict(quant_method="fp8", fmt="e4m3", weight_block_size=list(block))
    (tmp_path / "config.json").write_text(json.dumps(config | dict(quantization_config=quantization)))
    with caplog.at_level(logging.WARNING):
        source = HfSource(tmp_path)
    assert "2 tensors are not read: layers of multi-token prediction" in caplog.text
    for name in ("half", "back"):
        (tmp_path / name).mkdir()
    writer.write(tmp_path / "half", source, dtype=np.dtype("float16"))
    bias = "model.layers.1.mlp.gate.e_score_correction_bias"
    half = safetensors.torch.load_file(tmp_path / "half" / "model.safetensors")
    assert torch.equal(half[bias], reference.state_dict()[bias])  # kept in float32, as transformers keeps it
    writer.write(tmp_path / "back", source)
    written = safetensors.torch.load_file(tmp_path / "back" / "model.safetensors")
    assert not any("layers.4." in name or name.endswith("scale_inv") for name in written)
    for name, x in expected.items():
        assert torch.equal(written[name], x), name
    assert "quantization_config" not in json.loads((tmp_path / "back" / "config.json").read_text())
    params = model_source.to_devices(source, dtype=np.dtype("bfloat16"), mesh=None)
    assert params["stages_1"]["block_0"]["mlp"]["choice_bias"].dtype == jnp.float32
    other = dict(quantization_config=quantization | {"fmt": "e5m2"})
    (tmp_path / "config.json").write_text(json.dumps(config | other))
    with pytest.raises(UserError, match=r"expected weight_block_size \[rows, columns\] and fmt 'e4m3'"):
        HfSource(tmp_path)


def test_pairs_of_lora_in_the_absorbed_form():
    """Token by token as at once, where the expanded form applies the pair of kv_b_proj as any other."""
    mixer = MIXERS["latent_attention"]
    params, x, rng = noisy_params(mixer), inputs(7), np.random.default_rng(0)
    kernel = params["kv_b_proj"]["kernel"]
    pair = {"a": (len(kernel), 3), "b": (3, *kernel.shape[1:])}
    pair = {name: rng.normal(size=shape).astype(np.float32) for name, shape in pair.items()}
    lora = {"kv_b_proj": pair | {"scale": np.float32(0.5)}}

    @jax.jit
    def run(lora, x, cache=None):
        return mixer.apply({"params": params, "lora": lora}, x, cache=cache)

    whole, _ = run(lora, x)
    cache, ys = mixer.init_cache(2, 7, jnp.float32), []
    for t in range(7):
        y, cache = run(lora, x[:, t : t + 1], cache)
        ys.append(y)
    np.testing.assert_allclose(jnp.concatenate(ys, axis=1), whole, atol=1e-5)
    assert np.abs(np.asarray(run(lora | {"kv_b_proj": pair | {"scale": np.float32(0)}}, x)[0] - whole)).max() > 0.1


def test_a_step_reads_the_latents_of_a_cache_and_no_more():
    """The cache holds R + rope numbers a token; each of its slots costs N (2 R + rope) multiply-adds in a step."""
    mixer = LatentAttention(4, 12, 6, 4, 5, q_lora_rank=10, parent=None)
    params, x = noisy_params(mixer), inputs(1)

    def step(slots):
        cache = jax.eval_shape(lambda: mixer.init_cache(2, slots, jnp.bfloat16))
        assert sum(leaf.size for leaf in jax.tree.leaves(cache) if leaf.ndim == 4) == 2 * slots * (12 + 4)
        run = jax.jit(lambda x, cache: mixer.apply({"params": params}, x, cache=cache, deferred=True))
        return flops.count(run.trace(x, cache)).flops

    assert step(300) - step(100) == 200 * 2 * 2 * 4 * (2 * 12 + 4)
    assert mixers.macs_per_token(mixer, 99) == 4 * (6 + 4 + 5) * 50


def test_a_long_cache_is_expanded_part_by_part(monkeypatch):
    """Prompts in pieces as at once, in value and gradient; no array holds the keys and values of all slots."""
    mixer, T = MIXERS["latent_attention"], 61
    params, x = noisy_params(mixer), inputs(T)
    ids = jnp.asarray([[1] * T, [0] * 7 + [1] * 20 + [2] * (T - 27)])
    positions = jnp.asarray([[*range(T)], [*[0] * 7, *range(20), *range(T - 27)]])

    def loss(params, x, cuts):
        ys, cache = [], mixer.init_cache(2, 70, jnp.float32) if cuts else None
        for first, last in zip((0, *cuts), (*cuts, T), strict=True):
            at = (slice(None), slice(first, last))
            new = {"positions": positions[at], "segment_ids": ids[at], "cache": cache}
            y, cache = mixer.apply({"params": params}, x[at], **new)
            ys.append(y)
        y = jnp.concatenate(ys, axis=1)
        return jnp.sum(jnp.sin(y) * (ids != 0)[..., None]), y

    run = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True), static_argnums=2)
    (_, whole), gradients = run(params, x, ())
    monkeypatch.setattr(attention_parts, "SLOTS", 16)
    (_, pieces), found = run(params, x, (25, 48))
    np.testing.assert_allclose(jnp.where((ids != 0)[..., None], pieces - whole, 0), 0, atol=2e-6)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(gradients), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-6 * max(float(np.abs(b).max()), 1))

    def temporary(slots):
        cache = jax.eval_shape(lambda: mixer.init_cache(2, slots, jnp.float32))
        step = jax.jit(lambda x, cache: mixer.apply({"params": params}, x, cache=cache, deferred=True))
        return step.lower(x[:, :16], cache).compile().memory_analysis().temp_size_in_bytes

    latents = 2 * 4 * (12 + 4)  # bytes of a slot; the keys and values of its heads are 15 / 4 as many
    assert temporary(4064) - temporary(2032) < 2032 * latents * 2.5


def test_halves_of_a_head_are_rotated_where_the_config_says_so(tmp_path):
    """rope_interleave: false."""
    reference = copy.deepcopy(torch_model("deepseek_v3"))
    reference.config.rope_interleave = False
    reference.save_pretrained(tmp_path)
    model, params = loaded(tmp_path)
    text = np.random.default_rng(1).integers(4, 67, (1, 29))
    with torch.no_grad():
        expected = reference(torch.tensor(text)).logits.numpy()
        pairs = torch_model("deepseek_v3")(torch.tensor(text)).logits.numpy()
    np.testing.assert_allclose(lcx.logits(model, params, text), expected, atol=2e-4, rtol=0)
    assert np.abs(expected - pairs).max() > 0.1


def test_a_second_extension_keeps_the_scale_of_scores():
    """mscale and mscale_all_dim are kept from YaRN to YaRN: without them scores would be scaled otherwise."""
    model = hf_config.from_config(V3)
    rope = extend.rotaries(extend.extend_model(model, {"rope_type": "yarn", "factor": 80.0}, None))[0].rope
    assert (rope.factor, rope.mscale, rope.mscale_all_dim) == (80, 1, 1)


def test_latent_attention_is_not_linearized():
    with pytest.raises(UserError, match="no Attention .*LatentAttention"):
        Linearize(window=8, feature_dim=4).model(described("deepseek_v3"))


@pytest.mark.parametrize(
    ("change", "message"),
    [(dict(kv_lora_rank=0), "LatentAttention.kv_lora_rank is 0"), (dict(norm_eps=-1.0), "norm_eps is -1.0")],
)
def test_sizes_that_cannot_be(change, message):
    sizes = dict(num_heads=2, kv_lora_rank=4, qk_nope_head_dim=4, qk_rope_head_dim=4, v_head_dim=4)
    mixer = LatentAttention(**sizes | change, parent=None)
    with pytest.raises(UserError, match=f"{message}.*: change "):
        jax.eval_shape(mixer.init, jax.random.key(0), jnp.zeros((1, 2, D)))


def test_a_model_without_experts_is_written(tmp_path):
    """first_k_dense_replace beyond the last layer, as in a part of a model."""
    model = described("deepseek_v3", first_k_dense_replace=9)
    assert {type(layer.block.mlp).__name__ for layer in model_lib.layers(model)} == {"GatedMlp"}
    assert hf_config.from_config(hf_config.to_config(model, dtype="float32")) == model
