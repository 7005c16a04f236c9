"""Blocks and MLPs: at their defaults they are what was recorded; every other setting against transformers.

Every setting at once, saved, loaded and generating: test_parameters.py. The capped loss: test_ops_cross_entropy.py.
"""

import dataclasses
import functools
import json
import re
import types
from collections.abc import Callable

import block_defaults
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from flax.traverse_util import flatten_dict, unflatten_dict

from lcx import blockwise, config
from lcx.block import Block
from lcx.checkpoint import model_json
from lcx.convert.hf.llama_like import layers as hf_layers
from lcx.errors import UserError
from lcx.layers import Norm
from lcx.llama import llama
from lcx.mixers.attention import Attention
from lcx.mlps.gated import GatedMlp
from lcx.mlps.plain import PlainMlp
from lcx.model import Decoder, Layers, Stage, abstract_params, layers, stages_of
from lcx.ops.cross_entropy import cross_entropy
from lcx.rope import Rope

# ------------------------------------------------------------------------------------------------------- defaults

RECORDED = json.loads(block_defaults.RECORDED.with_suffix(".json").read_text())


@pytest.mark.parametrize("name", RECORDED)
def test_defaults_are_what_they_were(name):
    """To the letter in what a checkpoint says; in numbers, up to what another CPU or version of XLA may round."""
    model = block_defaults.models()[name]
    recorded = {key: value for key, value in RECORDED[name].items() if key != "sha256"}
    described = block_defaults.described(model)
    assert described == recorded and list(described["params"]) == list(recorded["params"])
    assert model_json.from_json(recorded["model"]) == model
    # 32 units in the last place of the largest number: sums of 16 to 64 products in another order. A logit of a model
    # whose activations are bfloat16 (8 bits) may fall on the other side of a rounding in each of its two layers.
    tolerance = 2.0**-6 if model.dtype == "bfloat16" else 2.0**-19
    with np.load(block_defaults.RECORDED.with_suffix(".npz")) as file:
        expected = {kind: file[f"{name}/{kind}"] for kind in ("logits", "loss", "gradient")}
    logits, loss, gradient = block_defaults.answers(model, block_defaults.params_of(model))
    probes = [block_defaults.probe(np.asarray(x)) for x in flatten_dict(gradient).values()]
    for found, kind in ((logits, "logits"), (loss, "loss"), (probes, "gradient")):
        atol = tolerance * np.abs(expected[kind]).max()
        np.testing.assert_allclose(found, expected[kind], atol=atol, rtol=0, err_msg=kind)


# ------------------------------------------------------------------------------------- settings, against transformers

V, D, F, L, N, K, H, T = 37, 32, 48, 2, 4, 2, 8, 12
SIZES = dict(vocab_size=V, hidden_size=D, max_position_embeddings=64)
THEIRS = dict(
    vocab_size=V,
    hidden_size=D,
    intermediate_size=F,
    num_hidden_layers=L,
    num_attention_heads=N,
    num_key_value_heads=K,
    head_dim=H,
    max_position_embeddings=64,
    pad_token_id=None,
    bos_token_id=None,
    eos_token_id=None,
    attn_implementation="eager",
)
HALVES = np.arange(H).reshape(H // 2, 2).T.reshape(-1)  # from rotated pairs (2j, 2j+1) to halves (j, j + H/2)

Get = Callable[[str], np.ndarray]


def attention(get: Get, prefix: str, *, pairs=False) -> dict[str, np.ndarray]:
    found = {}
    for ours, heads in (("q_proj", N), ("k_proj", K), ("v_proj", K)):
        order = HALVES if pairs and ours != "v_proj" else np.arange(H)
        found[f"{ours}/kernel"] = get(f"{prefix}{ours}.weight").T.reshape(D, heads, H)[..., order]
    found["o_proj/kernel"] = get(f"{prefix}o_proj.weight").T.reshape(N, H, D)
    return {f"mixer/{name}": x for name, x in found.items()}


def neox_attention(get: Get, prefix: str) -> dict[str, np.ndarray]:
    kernels = get(f"{prefix}query_key_value.weight").reshape(N, 3, H, D)
    biases = get(f"{prefix}query_key_value.bias").reshape(N, 3, H)
    found = {
        "o_proj/kernel": get(f"{prefix}dense.weight").T.reshape(N, H, D),
        "o_proj/bias": get(f"{prefix}dense.bias"),
    }
    for i, name in enumerate(("q_proj", "k_proj", "v_proj")):
        found |= {
            f"{name}/kernel": kernels[:, i].transpose(2, 0, 1),
            f"{name}/bias": biases[:, i],
        }
    return {f"mixer/{name}": x for name, x in found.items()}


def named(get: Get, prefix: str, *, bias: bool = False, **names: str) -> dict[str, np.ndarray]:
    """Kernels (matrices, transposed) and scales (vectors) by our path, `/` written `__`."""
    found = {}
    for ours, theirs in names.items():
        path, weight = ours.replace("__", "/"), get(f"{prefix}{theirs}.weight")
        found[f"{path}/{'kernel' if weight.ndim == 2 else 'scale'}"] = weight.T
        if bias:
            found[f"{path}/bias"] = get(f"{prefix}{theirs}.bias")
    return found


GATED = dict(mlp__gate_proj="mlp.gate_proj", mlp__up_proj="mlp.up_proj", mlp__down_proj="mlp.down_proj")
PRE = dict(mixer_norm="input_layernorm", mlp_norm="post_attention_layernorm")
POST = dict(mixer_post_norm="post_attention_layernorm", mlp_post_norm="post_feedforward_layernorm")
SANDWICH = POST | dict(mixer_norm="input_layernorm", mlp_norm="pre_feedforward_layernorm")
QK = dict(mixer__q_norm="self_attn.q_norm", mixer__k_norm="self_attn.k_norm")


def usual(get: Get, prefix: str, *, pairs=False, **names) -> dict[str, np.ndarray]:
    return attention(get, f"{prefix}self_attn.", pairs=pairs) | named(get, prefix, **names)


def neox(get: Get, prefix: str) -> dict[str, np.ndarray]:
    rest = dict(mlp__up_proj="mlp.dense_h_to_4h", mlp__down_proj="mlp.dense_4h_to_h")
    return neox_attention(get, f"{prefix}attention.") | named(get, prefix, bias=True, **PRE, **rest)


@dataclasses.dataclass(frozen=True)
class Row:
    """A family: its settings in transformers, ours, and how a layer's tensors are called."""

    theirs: dict
    block: dict = dataclasses.field(default_factory=dict)
    decoder: dict = dataclasses.field(default_factory=dict)
    attention: dict | tuple = dataclasses.field(default_factory=dict)  # a tuple: by layer
    mlp: object = GatedMlp(F, parent=None)
    layer: Callable = functools.partial(usual, **PRE, **GATED)
    stem: str = "model."
    names: tuple = ("embed_tokens", "norm", "lm_head")

    def model(self) -> Decoder:
        by_layer = self.attention if isinstance(self.attention, tuple) else (self.attention,) * L
        eps = {"norm_eps": 1e-3}  # large enough to be seen
        blocks = tuple(
            Block(
                Attention(**dict(num_heads=N, num_kv_heads=K, head_dim=H, **eps) | own, parent=None),
                self.mlp,
                **eps,
                **self.block,
                parent=None,
            )
            for own in by_layer
        )
        return Decoder(**SIZES, **eps, stages=stages_of(blocks), **self.decoder, parent=None)


GEGLU = GatedMlp(F, activation="gelu_tanh", parent=None)
LAYERNORM = Norm(center=True, bias=True)
WINDOWS = dict(sliding_window=5, layer_types=["sliding_attention", "full_attention"])
RMS = dict(rms_norm_eps=1e-3)
NEOX = Rope(partial_rotary_factor=0.5)
CAPS = dict(final_logit_softcapping=0.7, attn_logit_softcapping=None)
ROWS = {
    "gemma2": Row(
        dict(**RMS, query_pre_attn_scalar=24, layer_types=["full_attention"] * L, **CAPS),
        dict(norms="both", norm=Norm(offset=1.0)),
        dict(norm=Norm(offset=1.0), embedding_multiplier=D**0.5, logit_softcap=0.7, tie_word_embeddings=True),
        dict(scale=24**-0.5),
        GEGLU,
        functools.partial(usual, **SANDWICH, **GATED),
    ),
    "gemma3_text": Row(
        dict(**RMS, query_pre_attn_scalar=H, **WINDOWS),
        dict(norms="both", norm=Norm(offset=1.0)),
        dict(norm=Norm(offset=1.0), embedding_multiplier=D**0.5, tie_word_embeddings=True),
        tuple(
            dict(qk_norm=True, norm=Norm(offset=1.0), window=window, rope=Rope(rope_theta=theta))
            for window, theta in ((5, 1e4), (None, 1e6))
        ),
        GEGLU,
        functools.partial(usual, **SANDWICH, **GATED, **QK),
    ),
    "olmo2": Row(
        RMS,
        dict(norms="after"),
        attention=dict(qk_norm="all_heads"),
        layer=functools.partial(usual, **POST, **GATED, **QK),
    ),
    "granite": Row(
        dict(**RMS, embedding_multiplier=3.0, residual_multiplier=0.6, attention_multiplier=0.2, logits_scaling=4.0),
        dict(residual_multiplier=0.6),
        dict(embedding_multiplier=3.0, logit_multiplier=1 / 4.0),
        dict(scale=0.2),
    ),
    "cohere2": Row(
        dict(layer_norm_eps=1e-3, **WINDOWS, logit_scale=0.3),
        dict(norm=Norm(center=True), parallel=True, shared_norm=True),
        dict(norm=Norm(center=True), logit_multiplier=0.3, tie_word_embeddings=True),
        (dict(window=5), dict(rope=None)),
        layer=functools.partial(usual, pairs=True, mixer_norm="input_layernorm", **GATED),
    ),
    "gpt_neox": Row(
        dict(layer_norm_eps=1e-3, rotary_pct=0.5, use_parallel_residual=True),
        dict(norm=LAYERNORM, parallel=True),
        dict(norm=LAYERNORM),
        dict(num_kv_heads=N, qkv_bias=True, o_bias=True, rope=NEOX),
        PlainMlp(F, bias=True, parent=None),
        neox,
        "gpt_neox.",
        ("embed_in", "final_layer_norm", "lm_head"),
    ),
    "nemotron": Row(
        dict(norm_eps=1e-3, partial_rotary_factor=0.5),
        dict(norm=Norm(center=True, bias=True, offset=1.0)),
        dict(norm=Norm(center=True, bias=True, offset=1.0)),
        dict(rope=NEOX),
        PlainMlp(F, activation="relu2", parent=None),
        lambda get, prefix: (
            attention(get, f"{prefix}self_attn.")
            | named(get, prefix, bias=True, **PRE)
            | named(get, prefix, mlp__up_proj="mlp.up_proj", mlp__down_proj="mlp.down_proj")
        ),
    ),
}  # fmt: skip


def tree(row: Row, model: Decoder, get: Get) -> dict:
    """What transformers holds (weights or gradients), in our parameter tree."""
    embed, norm, head = row.names
    flat = {"embed/embedding": get(f"{row.stem}{embed}.weight")}
    flat |= named(get, row.stem, bias=model.norm.bias, final_norm=norm)
    if not model.tie_word_embeddings:
        flat["lm_head/embedding"] = get(f"{head}.weight")
    stacked: dict[str, list] = {}
    for i, layer in enumerate(layers(model)):
        for name, x in row.layer(get, f"{row.stem}layers.{i}.").items():
            stacked.setdefault(f"{layer.path}/{name}", []).append(x)
    return unflatten_dict(flat | {path: np.stack(rows) for path, rows in stacked.items()}, sep="/")


def answers_of_transformers(name: str, row: Row) -> tuple:
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(
        name, **THEIRS | row.theirs, tie_word_embeddings=bool(row.decoder.get("tie_word_embeddings"))
    )
    hf = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for path, x in hf.named_parameters():
            x.copy_(
                torch.randn(x.shape) * 0.2
                + (x.ndim == 1 and "norm" in path and path.endswith("weight") and x.mean() > 0.5)
            )
    ids = torch.tensor(np.random.default_rng(1).integers(0, V, (2, T)))
    logits = hf(ids).logits
    loss = torch.nn.functional.cross_entropy(logits[:, :-1].transpose(1, 2), ids[:, 1:], reduction="sum")
    loss.backward()
    held = dict(hf.named_parameters())
    weights, gradients = (
        lambda path: held[path].detach().numpy().astype(np.float32),
        lambda path: held[path].grad.numpy(),
    )
    return ids.numpy(), weights, logits.detach().numpy(), float(loss.detach()), gradients


@functools.partial(jax.jit, static_argnums=0)
def answers(model, params, ids):
    weights = jnp.ones(ids.shape).at[:, -1].set(0)

    def loss(params):
        x, _ = model.apply({"params": params}, ids, method="hidden")
        total = cross_entropy(
            x, model.head(params), jnp.roll(ids, -1, 1), weights, transform=model.logit_transform
        )
        return total, model.apply({"params": params}, x, method="logits")

    return jax.value_and_grad(loss, has_aux=True)(params)


@pytest.mark.parametrize("name", ROWS)
def test_families_of_transformers(name):
    """Logits, loss and the gradient in every parameter."""
    row = ROWS[name]
    model = row.model()
    ids, weights, logits, loss, gradients = answers_of_transformers(name, row)
    params = tree(row, model, weights)
    (found_loss, found_logits), found_gradients = answers(model, params, jnp.asarray(ids, jnp.int32))
    np.testing.assert_allclose(found_logits, logits, atol=1e-5 * np.abs(logits).max())
    assert float(found_loss) == pytest.approx(loss, rel=1e-5)
    expected = flatten_dict(tree(row, model, gradients), sep="/")
    found = flatten_dict(found_gradients, sep="/")
    assert set(found) == set(expected)
    for path, x in expected.items():
        np.testing.assert_allclose(found[path], x, atol=1e-5 * np.abs(x).max(), err_msg=path)


# ---------------------------------------------------------------------------------------------------------- the rest


def attn(**settings) -> Attention:
    return Attention(2, 2, 8, **settings, parent=None)


def mlp(**settings) -> GatedMlp:
    return GatedMlp(16, **settings, parent=None)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            dict(norms="post"),
            "Block.norms is 'post', expected one of before, after, both: change Block.norms",
        ),
        (dict(shared_norm=True), "no meaning with parallel = False"),
        (dict(shared_norm=True, parallel=True, norms="after"), "no meaning with norms = 'after'"),
        (dict(shared_norm=True, parallel=True, mlp=None), "no meaning with mlp = None"),
        (dict(residual_multiplier=float("nan")), "residual_multiplier is nan, expected a finite number"),
        (
            dict(mlp=mlp(activation="swish")),
            "activation 'swish': expected a function or one of silu, gelu, gelu_t",
        ),
        (dict(mixer=attn(qk_norm="all")), "qk_norm is 'all', expected False, True, 'all_heads' or 'l2'"),
    ],
)
def test_settings_that_mean_nothing(settings, message):
    with pytest.raises(UserError, match=message) as caught:
        block = Block(**dict(mixer=attn(), mlp=mlp()) | settings, parent=None)
        abstract_params(Layers(16, (Stage((block,)),), 8, parent=None))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "settings", [dict(logit_softcap=0.0), dict(logit_multiplier=-1.0), dict(embedding_multiplier=0.0)]
)
def test_multipliers_that_are_none(settings):
    (name,) = settings
    with pytest.raises(UserError, match=f"Decoder.{name} is .*, expected a positive number"):
        abstract_params(Decoder(**SIZES, stages=(), **settings, parent=None))


REFUSED = {
    "Block.norms = 'both'": dict(norms="both"),
    "Block.parallel = True": dict(parallel=True),
    "Block.residual_multiplier = 0.5": dict(residual_multiplier=0.5),
    "Block.norm = Norm(center=True": dict(norm=Norm(center=True)),
    "GatedMlp.activation = 'gelu'": dict(mlp=mlp(activation="gelu")),
    "Attention.scale = 0.3": dict(mixer=attn(scale=0.3)),
    "Attention.rope = None": dict(mixer=attn(rope=None)),
    "Decoder.logit_softcap = 3.0": dict(logit_softcap=3.0),
    "Decoder.embedding_multiplier = 2.0": dict(embedding_multiplier=2.0),
}


@pytest.mark.parametrize("says", REFUSED)
def test_what_a_format_cannot_say_is_not_exported(says):
    """config.json of a Llama has no place for them; before, the activation went unnoticed."""
    settings = dict(REFUSED[says])
    of_model = {
        name: settings.pop(name) for name in (*settings,) if name in ("logit_softcap", "embedding_multiplier")
    }
    block = Block(**dict(mixer=attn(), mlp=mlp()) | settings, parent=None)
    model = Decoder(**SIZES, stages=(Stage((block,)),), **of_model, parent=None)
    with pytest.raises(UserError, match=re.escape(says)) as caught:
        hf_layers(model)
    assert "save with format 'lcx'" in str(caught.value) and "\n" not in str(caught.value)


class Segments(nn.Module):
    """An MLP that says what it was given."""

    takes_segment_ids = True

    def __call__(self, x, *, segment_ids):
        return jnp.zeros_like(x) + segment_ids[..., None]


def test_an_mlp_may_ask_for_the_segments():
    ids = jnp.array([[1, 1, 2, 0]])
    model = Layers(
        16, (Stage((Block(None, Segments(parent=None), parent=None),), 3),), 8, remat="full", parent=None
    )
    variables = jax.jit(functools.partial(model.init, segment_ids=ids))(
        jax.random.key(0), jnp.zeros((1, 4, 16))
    )
    y = model.apply(variables, jnp.zeros((1, 4, 16)), segment_ids=ids)
    np.testing.assert_array_equal(y[..., 0], 3 * ids)


def test_the_stream_that_a_block_of_layers_learns_from_has_the_embedding_multiplier():
    model = Decoder(**SIZES, stages=(), embedding_multiplier=3.0, parent=None)
    table = np.random.default_rng(0).normal(size=(V, D)).astype(np.float32)
    source = types.SimpleNamespace(leaves={"embed/embedding": table}, read=lambda name, index: table[index])
    tokens = jnp.array([[1, 2, 5]], jnp.int32)
    np.testing.assert_allclose(blockwise._embedding(source, model)({"tokens": tokens}), 3 * table[tokens])


GIN = """
from __gin__ import dynamic_registration
from lcx import layers
from lcx import model
from lcx.mixers import attention
from lcx.mlps import plain
import test_block

test_block.start.model = @model.Decoder()
model.Decoder:
  vocab_size = 37
  hidden_size = 32
  max_position_embeddings = 64
  stages = (@model.Stage(),)
  norm = @layers.Norm()
  logit_softcap = 30
model.Stage.pattern = (@model.Block(), @plain/model.Block())
model.Block.mixer = @attention.Attention()
model.Block.norm = @layers.Norm()
model.Block.norms = 'both'
model.Block.mlp = @model.Mlp()
plain/model.Block.mlp = @plain.PlainMlp()
model.Mlp.intermediate_size = 48
plain.PlainMlp.intermediate_size = 64
plain.PlainMlp.activation = 'relu2'
layers.Norm.offset = 1
attention.Attention.num_heads = 4
attention.Attention.num_kv_heads = 2
attention.Attention.head_dim = 8
attention.Attention.rope = None
"""
MODELS = []


def start(*, model: nn.Module):
    MODELS.append(model)


def test_a_configuration_states_them(tmp_path):
    """`model.Mlp` is what .gin files call the gated MLP."""
    (tmp_path / "a.gin").write_text(GIN)
    argv = [f"--gin_file={tmp_path / 'a.gin'}", "--gin.Mlp.bias=True"]
    import test_block  # the module that gin imports, whatever pytest calls this one

    assert config.run(config.parser("A test."), "test_block:start", argv) == 0
    norm, mixer = Norm(offset=1.0), Attention(4, 2, 8, rope=None, parent=None)
    mlps = (GatedMlp(48, bias=True, parent=None), PlainMlp(64, activation="relu2", parent=None))
    blocks = tuple(Block(mixer, own, norm=norm, norms="both", parent=None) for own in mlps)
    expected = Decoder(**SIZES, stages=(Stage(blocks),), norm=norm, logit_softcap=30.0, parent=None)
    (found,) = test_block.MODELS
    assert found == expected and model_json.to_json(found) == model_json.to_json(expected)
    stored = json.loads(json.dumps(model_json.to_json(found)))
    assert stored["stages"]["tuple"][0]["pattern"]["tuple"][0]["mlp"]["class"] == "lcx.model:Mlp"
    assert model_json.from_json(stored) == expected


def test_a_rope_for_each_layer():
    sizes = dict(**SIZES, intermediate_size=48, num_heads=4)
    ropes = (Rope(), Rope(), None, Rope())
    model = llama(**sizes, num_layers=4, layer_ropes=ropes)
    assert tuple(layer.block.mixer.rope for layer in layers(model)) == ropes
    with pytest.raises(UserError, match="layer_ropes has 4 entries for num_layers 3"):
        llama(**sizes, num_layers=3, layer_ropes=ropes)
