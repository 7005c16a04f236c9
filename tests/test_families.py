"""Each softmax family of 2024 to 2026 against transformers, on tiny random models: one row of the table, one program.

A batch holds a whole text, two texts packed into a row, and a text after padding. The text is longer than windows and
original contexts, so its logits are those below, at and beyond them.
"""

import functools
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import safetensors.torch
import torch
import transformers
from flax.traverse_util import flatten_dict

import lcx
from lcx import extend
from lcx import model as model_lib
from lcx.convert.core import model_source, rules
from lcx.convert.hf import config as hf_config
from lcx.convert.hf import families, layered, writer
from lcx.convert.hf.source import HfSource
from lcx.convert.peft import adapter
from lcx.convert.peft.merged import AdaptedSource
from lcx.errors import UserError
from lcx.rope import Rope

V, T, NEW = 67, 45, 6
SMALL = dict(
    vocab_size=V,
    hidden_size=32,
    intermediate_size=40,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=96,
    pad_token_id=None,
    bos_token_id=1,
    eos_token_id=None,
)
YARN = dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=24)
DEFAULT = dict(rope_type="default", rope_theta=1e4)
PARTIAL = dict(YARN, rope_theta=1e4, partial_rotary_factor=0.5)
FIVE = dict(rope_theta=5e5)
TWO_KINDS = dict(sliding_window=9, layer_types=["sliding_attention", "full_attention"] * 2)
DEEP = dict(YARN, rope_theta=1e4, mscale=0.7, mscale_all_dim=1.0)
LATENT = dict(
    num_key_value_heads=4, kv_lora_rank=12, qk_nope_head_dim=6, qk_rope_head_dim=8, v_head_dim=5, n_group=3,
    topk_group=2, num_experts_per_tok=3, n_routed_experts=6, moe_intermediate_size=24, first_k_dense_replace=1,
    rope_parameters=DEEP,
)  # fmt: skip
ROWS = {
    "gemma2": dict(
        head_dim=10, query_pre_attn_scalar=20, attn_logit_softcapping=2.0, final_logit_softcapping=3.0, **TWO_KINDS
    ),
    "gemma3_text": dict(
        head_dim=8,
        query_pre_attn_scalar=12,
        rope_parameters=dict(full_attention=YARN | dict(rope_theta=1e6), sliding_attention=DEFAULT),
        **TWO_KINDS,
    ),
    "olmo2": dict(rope_parameters=dict(YARN, rope_theta=1e4)),
    "olmo3": dict(TWO_KINDS, rope_parameters=dict(full_attention=YARN | FIVE, sliding_attention=DEFAULT | FIVE)),
    # Without positions, a bias on keys has no effect and no gradient: attention_bias is in the row of Granite.
    "smollm3": dict(mlp_bias=True, no_rope_layer_interval=2, rope_parameters=dict(YARN, rope_theta=2e4)),
    "granite": dict(
        attention_bias=True, embedding_multiplier=3.0, residual_multiplier=0.6, attention_multiplier=0.2,
        logits_scaling=6.0,
    ),
    "cohere2": dict(logit_scale=0.3, **TWO_KINDS),
    "glm4": dict(head_dim=12, attention_bias=True, rope_parameters=DEFAULT | dict(partial_rotary_factor=0.5)),
    "glm": dict(head_dim=12, rope_parameters=PARTIAL),
    "mixtral": dict(num_local_experts=5, num_experts_per_tok=2, sliding_window=9, head_dim=10),
    "qwen3_moe": dict(
        num_experts=6, num_experts_per_tok=3, moe_intermediate_size=24, norm_topk_prob=True, head_dim=10,
        mlp_only_layers=[1, 3], rope_parameters=dict(YARN, rope_theta=1e6),
    ),
    "qwen2_moe": dict(
        num_experts=5, num_experts_per_tok=2, moe_intermediate_size=24, shared_expert_intermediate_size=20,
        norm_topk_prob=False,
    ),
    "gpt_oss": dict(
        head_dim=8, num_local_experts=5, num_experts_per_tok=2, swiglu_limit=1.5, **TWO_KINDS,
        rope_parameters=dict(YARN, rope_theta=1.5e5, truncate=False),
    ),
    "deepseek_v2": dict(
        LATENT, q_lora_rank=None, topk_method="group_limited_greedy", routed_scaling_factor=1.7, n_shared_experts=2
    ),
    "deepseek_v3": dict(LATENT, q_lora_rank=10, attention_bias=True),
    "llama4_text": dict(
        head_dim=8, attention_chunk_size=9, floor_scale=7, attn_scale=0.4, num_local_experts=5, num_experts_per_tok=2,
        intermediate_size=24, intermediate_size_mlp=40, no_rope_layer_interval=2, moe_layers=[1, 2, 3],
        rope_parameters=dict(
            rope_type="llama3", rope_theta=5e5, factor=4.0, low_freq_factor=1.0, high_freq_factor=4.0,
            original_max_position_embeddings=24,
        ),
    ),
    "gemma4_text": dict(
        TWO_KINDS, head_dim=8, global_head_dim=16, num_global_key_value_heads=1, attention_k_eq_v=True,
        hidden_size_per_layer_input=0, final_logit_softcapping=3.0, enable_moe_block=True, num_experts=5,
        top_k_experts=2, moe_intermediate_size=24,
    ),
    "arcee": dict(attention_bias=True, mlp_bias=True),
    "nemotron": dict(head_dim=12, attention_bias=True, mlp_bias=True, rope_parameters=PARTIAL),
    "seed_oss": dict(head_dim=10, attention_out_bias=True),
    "exaone4": TWO_KINDS,
    "ernie4_5": dict(head_dim=10, use_bias=True),
    "olmoe": dict(num_experts=5, num_experts_per_tok=2, norm_topk_prob=True),
    "ministral": dict(head_dim=10, rope_parameters=dict(YARN, rope_theta=1e4), **TWO_KINDS),
    "ministral3": dict(head_dim=10, rope_parameters=dict(
        YARN, rope_theta=1e4, original_max_position_embeddings=12, factor=8.0, llama_4_scaling_beta=0.7,
    )),
    # Phi-4-mini. Each text is longer than the original context, since a batch has one length for longrope.
    "phi3": dict(
        tie_word_embeddings=True, original_max_position_embeddings=16, rope_parameters=dict(
            rope_type="longrope", rope_theta=1e4, partial_rotary_factor=0.75, original_max_position_embeddings=16,
            short_factor=[1.0, 1.2, 1.4], long_factor=[1.5, 4.0, 6.0],
        ),
    ),
    # Mistral Small: heads that are smaller than hidden_size / num_heads, and no window.
    "mistral": dict(head_dim=6, sliding_window=None, rope_parameters=DEFAULT | dict(rope_theta=1e8)),
}  # fmt: skip


BUFFERS = ("e_score_correction_bias", "layer_scalar")  # stored with the weights, but not trained


@functools.cache
def torch_model(name: str) -> torch.nn.Module:
    """A random model in which no parameter has its initial value."""
    torch.manual_seed(sum(name.encode()))
    config = transformers.AutoConfig.for_model(name, **SMALL | ROWS[name])
    model = transformers.AutoModelForCausalLM.from_config(
        config, dtype=torch.float32, attn_implementation="eager"
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_((0.3 if parameter.ndim == 1 else 0.2) * torch.randn_like(parameter))
        for key, buffer in model.named_buffers():
            if key.endswith(BUFFERS):
                buffer.add_(0.3 * torch.randn_like(buffer))
    return model.eval()


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("families")

    @functools.cache
    def folder(name: str):
        torch_model(name).save_pretrained(root / name)
        return root / name

    return folder


TEXTS = [np.random.default_rng(i).integers(4, V, size) for i, size in enumerate((T, 20, T - 20, T - 8))]
IDS = np.stack([TEXTS[0], np.concatenate(TEXTS[1:3]), np.concatenate([np.zeros(8, int), TEXTS[3]])])
SEGMENTS = np.array([[1] * T, [1] * 20 + [2] * (T - 20), [0] * 8 + [1] * (T - 8)])
POSITIONS = np.stack([[*range(T)], [*range(20), *range(T - 20)], [*[0] * 8, *range(T - 8)]])
PLACES = ((0, 0), (1, 0), (1, 20), (2, 8))  # row and first token of each text


@functools.partial(jax.jit, static_argnums=0)
def answers(model, params):
    """The logits of the batch, and the gradients of the summed loss of all texts."""
    ids, segments, positions = (jnp.asarray(x, jnp.int32) for x in (IDS, SEGMENTS, POSITIONS))

    def loss(params):
        logits = model.apply({"params": params}, ids, segment_ids=segments, positions=positions)
        scores = jnp.take_along_axis(jax.nn.log_softmax(logits[:, :-1]), ids[:, 1:, None], -1)[..., 0]
        same = (segments[:, 1:] == segments[:, :-1]) & (segments[:, 1:] != 0)
        return -jnp.sum(jnp.where(same, scores, 0)), logits

    (_, logits), gradients = jax.value_and_grad(loss, has_aux=True)(params)
    return logits, gradients


def answers_of_transformers(model):
    """The logits of each text, and the gradients of the summed loss."""
    model.zero_grad()
    all_logits = []
    for text in TEXTS:
        ids = torch.tensor(text)[None]
        logits = model(ids).logits
        torch.nn.functional.cross_entropy(logits[0, :-1], ids[0, 1:], reduction="sum").backward()
        all_logits.append(logits[0].detach().numpy())
    return all_logits, {name: parameter.grad.numpy() for name, parameter in model.named_parameters()}


def loaded(folder):
    source = HfSource(folder)
    return source.model, model_source.to_devices(source, dtype=None, mesh=None)


@pytest.mark.parametrize("name", ROWS)
def test_logits_gradients_and_generation(name, folders):
    reference = torch_model(name)
    model, params = loaded(folders(name))
    expected, gradients = answers_of_transformers(reference)
    logits, found = answers(model, params)
    for (row, first), text in zip(PLACES, expected, strict=True):
        np.testing.assert_allclose(logits[row, first : first + len(text)], text, atol=2e-4, rtol=0)
    table = rules.Table(families.rules(model), model_source.leaf_shapes(model))
    mapped = table.to_foreign(flatten_dict(jax.device_get(found), sep="/"))
    for key in [key for key in mapped if key.endswith(BUFFERS)]:
        assert not mapped.pop(key).any()  # no parameter in transformers
    check_gradients(fused(mapped), gradients)
    ids = np.stack([TEXTS[0], np.concatenate([TEXTS[3], TEXTS[3][:8]])])
    with torch.no_grad():
        theirs = reference.generate(torch.tensor(ids), max_new_tokens=NEW, do_sample=False)[:, T:].numpy()
    np.testing.assert_array_equal(lcx.generate(model, params, ids, max_new_tokens=NEW), theirs)


def fused(tensors):
    """The tensors of experts, each stored alone, as transformers holds them: stacked, gate and up in one."""
    out, experts = {}, {}
    for name, x in tensors.items():
        found = re.fullmatch(r"(.*)\.(?:block_sparse_moe|mlp)\.experts\.(\d+)\.(\w+)\.weight", name)
        if found:
            experts.setdefault((found[1], found[3]), []).append(x)
        else:
            out[name.replace(".block_sparse_moe.", ".mlp.")] = x
    for layer in {layer for layer, _ in experts}:
        gate, up, down = (
            np.stack(experts[layer, old if (layer, old) in experts else new])
            for old, new in (("w1", "gate_proj"), ("w3", "up_proj"), ("w2", "down_proj"))
        )
        out |= {f"{layer}.mlp.experts.gate_up_proj": np.concatenate([gate, up], 1)}
        out |= {f"{layer}.mlp.experts.down_proj": down}
    return out


def check_gradients(mapped, gradients):
    assert set(mapped) == set(gradients)
    for key, gradient in gradients.items():
        error = np.abs(mapped[key] - gradient).max() / np.abs(gradient).max()
        assert error < 2e-4, (key, error)


@pytest.mark.parametrize("name", ROWS)
def test_written_folder_is_what_was_read(name, folders, tmp_path):
    reference, source = torch_model(name), HfSource(folders(name))
    writer.write(tmp_path, source, max_shard_bytes=40_000)
    back, info = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, output_loading_info=True, attn_implementation="eager"
    )
    assert not any(info.values()), info
    for key, tensor in reference.state_dict().items():
        assert torch.equal(back.state_dict()[key], tensor), key
    ids = torch.tensor(TEXTS[0])[None]
    with torch.no_grad():
        np.testing.assert_array_equal(back(ids).logits.numpy(), reference(ids).logits.numpy())
    assert HfSource(tmp_path).model == source.model
    config = json.loads((tmp_path / "config.json").read_text())
    assert config.keys() <= reference.config.to_dict().keys() | OTHER_SPELLINGS
    check_spelling_of_version_4(config)


#: What transformers 5 reads, and writes under another name or in rope_parameters.
OTHER_SPELLINGS = {
    "rope_theta", "rope_scaling", "rope_local_base_freq", "partial_rotary_factor", "original_max_position_embeddings",
    "torch_dtype",
    "num_experts", "global_head_dim", "num_global_key_value_heads",
}  # fmt: skip


def check_spelling_of_version_4(config):
    """The rotary settings as transformers 4 reads them: it ignores rope_parameters, and two families check the keys."""
    if config["model_type"] in ("gemma4_text", "ministral3"):  # unknown to it
        assert "rope_scaling" not in config
        return
    new = config["rope_parameters"].get("full_attention", config["rope_parameters"])
    expected = {key: value for key, value in new.items() if key != "rope_theta"}
    if config["model_type"] == "phi3":
        expected = {"type": "longrope"} | {key: expected[key] for key in ("short_factor", "long_factor")}
    assert config["rope_scaling"] == (None if new["rope_type"] == "default" else expected)
    assert config["rope_theta"] == new["rope_theta"]
    if config["model_type"] == "gemma3_text":
        assert config["rope_local_base_freq"] == config["rope_parameters"]["sliding_attention"]["rope_theta"]


def test_olmo2_is_scaled_in_the_spelling_that_transformers_4_takes():
    longer = extend.extend_model(
        described("olmo2", max_position_embeddings=24), {"rope_type": "linear", "factor": 4.0}, None
    )
    assert hf_config.to_config(longer, dtype="float32")["rope_scaling"] == {"type": "linear", "factor": 4.0}


def test_mxfp4_is_read_as_transformers_reads_it(tmp_path):
    """Packed experts, blocks in every exponent, against transformers' own unpacking."""
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    rows = SMALL | ROWS["gpt_oss"] | dict(hidden_size=64, intermediate_size=32, num_hidden_layers=2)
    rows["layer_types"] = rows["layer_types"][:2]
    model = transformers.AutoModelForCausalLM.from_config(
        transformers.AutoConfig.for_model("gpt_oss", **rows)
    )
    model.bfloat16().save_pretrained(tmp_path)
    path, rng = tmp_path / "model.safetensors", np.random.default_rng(0)
    tensors, expected = safetensors.torch.load_file(path), {}
    for name in [name for name in tensors if name.endswith(("gate_up_proj", "down_proj"))]:
        experts, width, out = tensors.pop(name).shape
        blocks = torch.tensor(rng.integers(0, 256, (experts, out, width // 32, 16), np.uint8))
        scales = torch.tensor(rng.integers(100, 140, (experts, out, width // 32), np.uint8))
        tensors |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
        expected[name] = convert_moe_packed_tensors(blocks, scales)
    safetensors.torch.save_file(tensors, path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    source = HfSource(tmp_path)
    (tmp_path / "back").mkdir()
    writer.write(tmp_path / "back", source)
    written = safetensors.torch.load_file(tmp_path / "back" / "model.safetensors")
    assert "quantization_config" not in json.loads((tmp_path / "back" / "config.json").read_text())
    for name, x in expected.items():
        assert torch.equal(written[name], x), name
    assert {str(info.dtype) for info in source.leaves.values()} == {"bfloat16"}


# --------------------------------------------------------------------------------------- extension, by kind of layer

PLAIN = dict(rope_type="default", rope_theta=1e4)
TINY = {key: value for key, value in SMALL.items() if not key.endswith("token_id")}


def described(name: str, **changes) -> model_lib.Decoder:
    """The model of a config.json in transformers 4's spelling, without anything extended."""
    keys = dict(TINY, model_type=name, tie_word_embeddings=False, **ROWS[name]) | changes
    keys.pop("rope_parameters", None)
    return hf_config.from_config(keys)


@pytest.mark.parametrize(
    "name", ["gemma3_text", "olmo3", "smollm3", "gpt_oss", "qwen3_moe", "ministral", "deepseek_v3"]
)
def test_a_scaling_goes_where_the_family_puts_it(name):
    """The extended model is that of the config.json that transformers extends (compared with it in logits, above)."""
    given = ROWS[name]["rope_parameters"]
    full = given.get("full_attention", given)
    none = {"rope_type": "default"}  # without it, gpt-oss is scaled
    plain = described(name, rope_theta=full["rope_theta"], max_position_embeddings=24, rope_scaling=none)
    scaling = {key: value for key, value in full.items() if key != "rope_theta"}
    longer = extend.extend_model(plain, scaling, None)
    keys = dict(TINY, model_type=name, tie_word_embeddings=False, max_position_embeddings=96, **ROWS[name])
    assert not layered.difference(longer, hf_config.from_config(keys))
    for ours, theirs in zip(*map(model_lib.layers, (longer, hf_config.from_config(keys))), strict=True):
        assert ours.block.mixer == theirs.block.mixer
    written = hf_config.to_config(longer, dtype="float32")
    assert hf_config.from_config(written) == longer


def test_gpt_oss_without_rotary_settings_is_scaled_as_in_transformers():
    theirs = transformers.GptOssConfig().rope_parameters
    rope = extend.rotaries(described("gpt_oss", max_position_embeddings=131072))[0].rope
    assert {key: getattr(rope, key) for key in theirs} == theirs


def test_layers_that_a_scaling_leaves_alone():
    """A scaling for each kind; layers without positions; layers that rotate only inside a window."""
    olmo = described("olmo3", max_position_embeddings=24)
    both = {"full_attention": dict(YARN), "sliding_attention": {"rope_type": "linear", "factor": 2.0}}
    assert [one.rope.rope_type for one in extend.rotaries(extend.extend_model(olmo, both, 96))] == [
        "linear",
        "yarn",
    ]
    only = extend.extend_model(olmo, {"full_attention": dict(YARN)}, None)
    assert only == extend.extend_model(olmo, dict(YARN), None)
    assert "\n".join(extend.table(only)) == (
        "kind of layer      layers  window  rope_theta  scaling               sees tokens back\n"
        "sliding_attention       2       9      500000  none                                 9\n"
        "full_attention          2       -      500000  yarn, factor 4                      96"
    )
    cohere = described("cohere2", max_position_embeddings=24)
    assert extend.extend_model(cohere, None, 96) == cohere.clone(max_position_embeddings=96, parent=None)
    with pytest.raises(UserError, match="set context_length alone"):
        extend.extend_model(cohere, dict(YARN), None)
    assert "no rope" in extend.table(described("smollm3"))[2]
    assert extend.table(described("llama4_text"))[1].startswith("chunked_attention       2       9")
    gemma = described("gemma4_text", max_position_embeddings=24)
    with pytest.raises(UserError, match="would rotate other dimensions of a head than the model's, 'proportional'"):
        extend.extend_model(gemma, dict(YARN), None)
    longer = extend.extend_model(gemma, {"rope_type": "proportional", "factor": 4.0}, None)
    assert [one.rope.factor for one in extend.rotaries(longer)] == [None, 4]
    assert hf_config.from_config(hf_config.to_config(longer, dtype="float32")) == longer
    assert extend.table(described("olmo2")) == []
    with pytest.raises(UserError, match="expected a scaling for each of full_attention: change rope_scaling"):
        extend.extend_model(described("olmo2"), {"sliding_attention": dict(YARN)}, None)


# ---------------------------------------------------------------------------------------------------- what is refused

REFUSED = {
    "bidirectional": (
        "gemma3_text",
        dict(use_bidirectional_attention=True),
        "use_bidirectional_attention True",
    ),
    "activation": ("gemma2", dict(hidden_activation="relu"), "hidden_activation 'relu'"),
    "no window": ("gemma2", dict(sliding_window=None), "sliding_attention but no sliding_window"),
    "sequential": ("cohere2", dict(use_parallel_block=False), "use_parallel_block False"),
    "multiplier": (
        "granite",
        dict(residual_multiplier="0.2"),
        "residual_multiplier = '0.2', expected a positive",
    ),
    "rope flags": ("smollm3", dict(no_rope_layers=[1, 0]), "no_rope_layers"),
    "one rope for two kinds": ("olmo3", dict(rope_parameters=dict(PLAIN)), "expected an object for each"),
    "two ropes for one": (
        "olmo2",
        dict(rope_parameters={"full_attention": PLAIN, "sliding_attention": PLAIN | FIVE}),
        "differ by layer type",
    ),
    "jitter": ("mixtral", dict(router_jitter_noise=0.1), "router_jitter_noise 0.1"),
    "chosen": ("mixtral", dict(num_experts_per_tok=9), "expected at most num_experts"),
    "experts": ("mixtral", dict(num_local_experts=1_000_000), "expected at most 10000"),
    "two numbers": ("qwen3_moe", dict(num_local_experts=7), "which differ"),
    "windows": ("qwen2_moe", dict(use_sliding_window=True), "add layer_types"),
    "alpha": ("gpt_oss", dict(swiglu_alpha=2.0), "swiglu_alpha 2.0"),
    "quantized": ("granite", dict(quantization_config={"quant_method": "mxfp4"}), "quantization_config"),
    "unknown": ("dots1", dict(), "model_type 'dots1', supported are"),
    "what it needs": ("qwen3_next", dict(), "model_type 'qwen3_next', which needs the gated delta rule; supported are"),
    "no temperature": ("ministral3", dict(rope_parameters=DEFAULT), "no llama_4_scaling_beta in rope_parameters"),
    "windows of two kinds": ("ministral3", TWO_KINDS, "layer_types that differ from sliding_window"),
    "shared latents": ("deepseek_v3", dict(num_key_value_heads=2), "num_key_value_heads 2, expected"),
    "choice": ("deepseek_v3", dict(topk_method="greedy"), "topk_method 'greedy'"),
    "published and transformers differ": ("deepseek_v2", dict(norm_topk_prob=True), "norm_topk_prob True"),
    "a cap that transformers ignores": ("gemma3_text", dict(attn_logit_softcapping=4.0), "attn_logit_softcapping 4.0"),
    "kinds": ("llama4_text", dict(layer_types=["sliding_attention"] * 4), "expected full_attention or chunked"),
    "layers with experts": ("llama4_text", dict(moe_layers=[4]), "expected a list of layers from 0 to 3"),
    "no chunk": ("llama4_text", dict(attention_chunk_size=None), "no attention_chunk_size"),
    "per layer": ("gemma4_text", dict(hidden_size_per_layer_input=256), "hidden_size_per_layer_input 256"),
    "shared": ("gemma4_text", dict(num_kv_shared_layers=2), "num_kv_shared_layers 2"),
    "sizes": ("gemma4_text", dict(per_layer_config={"0": {"head_dim": 4}}), "per_layer_config"),
    "groups": ("deepseek_v3", dict(n_group=4), "expected a multiple of num_groups = 4"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_config_is_refused_in_one_line(case):
    name, changes, message = REFUSED[case]
    with pytest.raises(UserError) as error:
        hf_config.from_config(dict(TINY, model_type=name, **ROWS.get(name, {}) | changes))
    assert message in str(error.value) and "\n" not in str(error.value)


CHANGED = {
    "softcap": ("gemma3_text", lambda mixer: dict(sinks=True), "Attention.sinks = True"),
    "one scale of two": ("granite", lambda mixer: dict(scale=0.5), None),
    "windows": ("olmo3", lambda mixer: dict(window=5 if mixer.window else None), None),
    "one window of two": ("olmo2", lambda mixer: dict(window=5), None),
    "norm": ("qwen3_moe", lambda mixer: dict(qk_norm=False), "Attention.qk_norm = False"),
    "sinks": ("gpt_oss", lambda mixer: dict(sinks=False), "Attention.sinks = False"),
    "a chunk of its own": ("llama4_text", lambda mixer: dict(chunked=False), "Attention.chunked = False"),
    "heads": ("gemma4_text", lambda mixer: dict(value_norm=False), "Attention.value_norm = False"),
    "steps": ("ministral3", lambda mixer: dict(temperature_floor=13), "Attention.temperature_floor = 13"),
    "no steps": ("ministral3", lambda _: dict(temperature=None, temperature_floor=8192, temperature_offset=1), None),
    "a whole head": ("glm4", lambda mixer: dict(rope=Rope(partial_rotary_factor=1.0)), None),
    "rope": ("cohere2", lambda mixer: dict(rope=Rope()), "layer 1 has Attention.rope"),
}


@pytest.mark.parametrize("case", CHANGED)
def test_what_a_config_cannot_say_is_refused_and_all_else_survives(case):
    name, changes, message = CHANGED[case]
    model = model_lib.map_mixers(described(name), lambda mixer: mixer.clone(**changes(mixer), parent=None))
    if message is None:
        assert hf_config.from_config(hf_config.to_config(model, dtype="float32")) == model
        return
    with pytest.raises(UserError, match=re.escape(message)) as error:
        hf_config.to_config(model, dtype="float32")
    assert "cannot express; save with format 'lcx'" in str(error.value) and "\n" not in str(error.value)


def test_adapters_of_heads_that_are_rotated_in_pairs(folders, tmp_path):
    """A pair that training would use as it is changes the kernel as merging it into the stored layout does."""
    source = HfSource(folders("cohere2"))
    name = "model.layers.0.self_attn.q_proj"
    rng = np.random.default_rng(0)
    tensors = {
        f"base_model.model.{name}.lora_A.weight": rng.normal(size=(3, 32)).astype(np.float32),
        f"base_model.model.{name}.lora_B.weight": rng.normal(size=(32, 3)).astype(np.float32),
    }
    safetensors.numpy.save_file(tensors, tmp_path / "adapter_model.safetensors")
    config = dict(peft_type="LORA", r=3, lora_alpha=6, target_modules=["q_proj"], layers_to_transform=[0])
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    pair = adapter.load(tmp_path, source.model)["stages_0"]["block_0"]["mixer"]["q_proj"]
    change = np.einsum("ldr,lrnh,l->ldnh", pair["a"], pair["b"], pair["scale"])
    path = "stages_0/block_0/mixer/q_proj/kernel"
    whole = tuple(slice(0, size) for size in source.leaves[path].shape)
    merged = AdaptedSource(source, tmp_path).read(path, whole) - source.read(path, whole)
    assert np.abs(change).max() > 1
    np.testing.assert_allclose(merged, change, atol=1e-5)
