"""Folders of the published 2Mamba trainer: its saved models' logits, round trips to the bit, all 28 names."""

import json
import re

import jax
import numpy as np
import pytest
import safetensors.numpy
import torch
from two_mamba_folders import CONFIG, make

import lcx
from lcx.convert import api, formats
from lcx.convert.core import model_source
from lcx.convert.two_mamba import settings_writer
from lcx.errors import UserError
from lcx.mixers.two_mamba import PUBLISHED, published
from lcx.mlps.plain import PlainMlp
from lcx.model import Block, Decoder, Mlp, Stage

SQUARE = "squared__sm_norm__A_mask_type_neg_softplus__in_conv_k_2"
SAVED = [
    SQUARE,
    "exp__sm_norm__A_mask_type_neg_softplus__in_conv_k_2",
    "linear",
    "linear__output_norm__A_mask_type_neg_softplus__in_conv_k_2__dt_on_values",
    "softmax",
    "mamba",
]
NAMES = ("softmax", "mamba", *PUBLISHED)


def tensors_at(folder):
    return safetensors.numpy.load_file(folder / "model.safetensors")


@pytest.mark.parametrize("name", SAVED)
def test_a_published_folder_gives_the_published_logits_and_is_written_again_to_the_bit(
    reference, tmp_path, name
):
    folder, saved = make(reference, tmp_path / "published", name)
    assert formats.detect(folder).name == "two_mamba"
    model, params = lcx.load(folder)
    logits = lcx.logits(model, params, saved["input_ids"].astype(np.int32))
    np.testing.assert_allclose(logits, saved["logits"], atol=5e-5)
    lcx.save(tmp_path / "again", model, params, format="two_mamba", like=folder)
    found, expected = tensors_at(tmp_path / "again"), tensors_at(folder)
    assert found.keys() == expected.keys()
    for key, x in expected.items():
        assert found[key].dtype == x.dtype, key
        if key.endswith("rotary_emb.freqs"):
            np.testing.assert_allclose(found[key], x, rtol=1e-6)  # computed again
        else:
            np.testing.assert_array_equal(found[key], x, err_msg=key)
    written = json.loads((tmp_path / "again" / "config.json").read_text())
    wanted = CONFIG | {"attention_type": name}
    ignored = ("pretraining_tp", "transformers_version")
    assert {key: written.get(key) for key in wanted if key not in ignored} == {
        key: value for key, value in wanted.items() if key not in ignored
    }


def tiny(name):
    block = Block(mixer=published(name, num_heads=2, head_dim=8), mlp=Mlp(24, parent=None), parent=None)
    return Decoder(11, 16, (Stage((block,), 2),), max_position_embeddings=8, parent=None)


def random_params(model, seed=0):
    rng, tree = np.random.default_rng(seed), {}
    for path, shape in model_source.leaf_shapes(model).items():
        node = tree
        *above, last = path.split("/")
        for key in above:
            node = node.setdefault(key, {})
        node[last] = rng.normal(size=shape).astype(np.float32)
    return tree


def extra_tensors(name):
    """The names that the published modules register for this attention_type, from its settings in its name."""
    if name == "softmax":
        return {"rotary_emb.freqs", "qkv_proj.weight", "o_proj.weight"}
    if name == "mamba":
        inner = "dt_bias A_log D in_proj.weight conv1d.weight norm.weight out_proj.weight"
        return {f"mamba_layer.{each}" for each in inner.split()}
    found = {"qkv_proj.weight", "o_proj.weight", "attn_mask"}
    found |= {"conv1d.weight", "conv1d.bias"} if "in_conv" in name else set()
    found |= {"A_mask_proj.weight"} if "neg_softplus" in name else set()
    found |= {"A_log", "dt_proj.weight"} if "discretize" in name else set()
    found |= {"dt_proj.weight"} if "dt_on_values" in name else set()
    found |= {"D"} if "D_res" in name else set()
    found |= {"z_gate_proj.weight", "z_gate_proj.bias"} if "Z_out_gate" in name else set()
    return found | ({"out_norm.weight"} if "output_norm" in name or "out_norm" in name else set())


@pytest.mark.parametrize("name", NAMES)
def test_every_published_name_is_written_and_read(tmp_path, name):
    model = tiny(name)
    params = random_params(model)
    lcx.save(tmp_path / "a", model, params, format="two_mamba")
    prefix = "model.layers.1.self_attn."
    found = {key.removeprefix(prefix) for key in tensors_at(tmp_path / "a") if key.startswith(prefix)}
    assert found == extra_tensors(name)
    config = json.loads((tmp_path / "a" / "config.json").read_text())
    assert tiny(config["attention_type"]).stages == model.stages
    settings = torch.load(tmp_path / "a" / "config.pt", weights_only=True)  # what its inference scripts read
    assert (settings["attention_type"], settings["model_max_length"]) == (config["attention_type"], 8)
    loaded, again = lcx.load(tmp_path / "a")
    assert loaded.stages == model.stages
    assert jax.tree.structure(again) == jax.tree.structure(params)
    jax.tree.map(np.testing.assert_array_equal, again, params)


OTHER_EPS = "the published code builds models with rms_norm_eps 1e-05, this one has 1e-06"


@pytest.mark.parametrize(("change", "said"), [({}, None), ({"norm_eps": 1e-6}, OTHER_EPS)])
def test_a_size_is_named_only_if_the_published_code_builds_that_model(
    tmp_path, caplog, monkeypatch, change, said
):
    """It builds a model by its size alone, with norms of 1e-5."""
    monkeypatch.setitem(settings_writer.SIZES, "small", (16, 24, 2, 8, 2))
    plain = tiny(SQUARE)
    block = plain.stages[0].pattern[0].clone(**change, parent=None)
    model = plain.clone(stages=(Stage((block,), 2),), **change, parent=None)
    lcx.save(tmp_path / "a", model, random_params(model), format="two_mamba")
    settings = torch.load(tmp_path / "a" / "config.pt", weights_only=True)
    assert settings["model_size"] == (None if said else "small")
    assert said in caplog.text if said else not caplog.text


def test_a_spelling_is_kept(tmp_path):
    """Two published names are one mixer. A folder read with the second is written with it."""
    name = "linear__out_norm__A_mask_type_neg_softplus__in_conv_k_2"
    model = tiny(name)
    lcx.save(tmp_path / "a", model, random_params(model), format="two_mamba")
    config = json.loads((tmp_path / "a" / "config.json").read_text())
    assert config["attention_type"] == name.replace("out_norm", "output_norm")
    (tmp_path / "a" / "config.json").write_text(json.dumps(config | {"attention_type": name}))
    source = formats.detect(tmp_path / "a").open(tmp_path / "a")
    api.write(tmp_path / "b", source, format="two_mamba")
    assert json.loads((tmp_path / "b" / "config.json").read_text())["attention_type"] == name


REFUSED = [
    (
        {"attention_type": SQUARE + "__cubed"},
        {},
        SQUARE + "__cubed', expected one of softmax, mamba, linear,",
    ),
    ({"attention_type": None}, {}, "attention_type = None, expected one of softmax"),
    ({"attention_type": 3}, {}, "attention_type = 3, expected one of softmax"),
    (
        {"attention_type": "linear"},
        {},
        r"attention_type 'linear' \(6 unexpected: .*A_mask_proj.weight, .*conv1d.bias",
    ),
    ({"num_key_value_heads": 2}, {}, "num_key_value_heads 2, and attention_type '.*' needs as many as"),
    ({"attention_bias": True}, {}, "attention_bias true, which is not read with attention_type"),
    ({}, {"model.layers.0.self_attn.attn_mask": np.zeros((1, 1, 4, 5), bool)}, r"\[1, 1, L, L\]"),
    ({}, {"model.layers.0.self_attn.attn_mask": np.zeros((1, 1, 4, 4), np.float32)}, "causal mask"),
    (
        {},
        {"model.layers.0.self_attn.dt_bias_value": np.zeros((1, 1, 4), np.float32)},
        "unexpected: .*dt_bias",
    ),
]


@pytest.mark.parametrize(("config", "tensors", "message"), REFUSED)
def test_what_does_not_fit_is_refused(reference, tmp_path, config, tensors, message):
    folder, _ = make(
        reference, tmp_path / "a", SQUARE, config=config, tensors=lambda state: state.update(tensors)
    )
    with pytest.raises(UserError, match=message) as error:
        lcx.load(folder)
    assert "\n" not in str(error.value)


def test_frequencies_of_another_base_are_refused(reference, tmp_path):
    def other_base(state):
        for name in state:
            if "rotary" in name:
                state[name] = 5e5 ** (-np.arange(8, dtype=np.float32) / 8)

    folder, _ = make(reference, tmp_path / "a", "softmax", tensors=other_base)
    with pytest.raises(UserError, match=r"rotary_emb.freqs holds other frequencies than those of base 10000"):
        lcx.load(folder)


def test_a_model_that_no_published_name_describes_is_not_written(tmp_path):
    wide = tiny(SQUARE)
    mixer = wide.stages[0].pattern[0].mixer.clone(conv_width=4, parent=None)
    block = wide.stages[0].pattern[0].clone(mixer=mixer, parent=None)
    model = wide.clone(stages=(Stage((block,), 2),), parent=None)
    with pytest.raises(UserError, match=re.escape("the TwoMamba of layer 0 is none of the published")):
        lcx.save(tmp_path / "a", model, random_params(model), format="two_mamba")
    assert not (tmp_path / "a").exists()
    block = tiny(SQUARE).stages[0].pattern[0].clone(mlp=PlainMlp(24, parent=None), parent=None)
    plain = wide.clone(stages=(Stage((block,), 2),), parent=None)
    with pytest.raises(UserError, match="the MLP of layer 0 is PlainMlp, and the 'two_mamba' format holds GatedMlp"):
        lcx.save(tmp_path / "a", plain, random_params(plain), format="two_mamba")
    mixed = wide.clone(
        stages=(Stage((*wide.stages[0].pattern, tiny("linear").stages[0].pattern[0]), 1),), parent=None
    )
    with pytest.raises(UserError, match="the TwoMamba of layer 1 differs from layer 0"):
        lcx.save(tmp_path / "a", mixed, random_params(mixed), format="two_mamba")
