"""RoPE in config.json: read as transformers reads it, written so that transformers reads it back."""

import json
import math
import warnings

import numpy as np
import pytest
from rope_oracle import KEY, assert_same, hf_config, hf_frequencies

from lcx.convert.hf.config import rope_from_config as from_hf
from lcx.convert.hf.rope_parameters import to_hf, written_max_position_embeddings
from lcx.errors import UserError
from lcx.rope import Rope

pytest.importorskip("transformers")
from transformers import LlamaConfig, MistralConfig, Phi3Config, Qwen2Config, Qwen3Config
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

CONFIGS = {"llama": LlamaConfig, "mistral": MistralConfig, "phi3": Phi3Config}
CONFIGS |= {"qwen2": Qwen2Config, "qwen3": Qwen3Config}

YARN4 = {"type": "yarn", "factor": 4.0, KEY: 256}
LONG = {"short_factor": [1.0 + i / 50 for i in range(8)], "long_factor": [2.0 + i for i in range(8)]}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, KEY: 8192}
FILES = {
    "no key at all": ("llama", {}),
    "v4 theta": ("llama", {"rope_theta": 500000.0}),
    "v4 null scaling": ("mistral", {"rope_theta": 1000000, "rope_scaling": None}),
    "v4 linear, no theta": ("llama", {"rope_scaling": {"type": "linear", "factor": 8}}),
    "v4 linear, both names": (
        "llama",
        {"rope_scaling": {"type": "linear", "rope_type": "linear", "factor": 8.0}},
    ),
    "v4 dynamic": ("llama", {"rope_theta": 1e4, "rope_scaling": {"type": "dynamic", "factor": 2.0}}),
    "v4 yarn": ("qwen2", {"rope_theta": 1e6, "rope_scaling": YARN4}),
    "v4 yarn, extra keys": ("llama", {"rope_theta": 1e4, "rope_scaling": YARN4 | {"finetuned": True}}),
    "v4 yarn, no window": ("llama", {"rope_theta": 1e4, "rope_scaling": {"type": "yarn", "factor": 4.0}}),
    "v4 yarn, null factor": ("llama", {"rope_theta": 1e4, "rope_scaling": YARN4 | {"factor": None}}),
    "v4 yarn, window outside too": ("llama", {"rope_theta": 1e4, "rope_scaling": YARN4, KEY: 256}),
    "v4 linear, factor spelled out": ("llama", {"rope_scaling": {"rope_type": "default", "factor": 1.0}}),
    "v4 llama3": ("llama", {"rope_theta": 5e5, "rope_scaling": LLAMA3}),
    "v4 longrope": ("llama", {"rope_theta": 1e4, "rope_scaling": {"type": "longrope", **LONG}, KEY: 128}),
    "v4 longrope, factor": ("llama", {"rope_scaling": {"type": "longrope", "factor": 32.0, **LONG, KEY: 64}}),
    "v4 phi-3 su": ("phi3", {"rope_theta": 1e4, "rope_scaling": {"type": "su", **LONG, KEY: 128}, KEY: 128}),
    "v4 phi-3 yarn": ("phi3", {"rope_theta": 1e4, "rope_scaling": {"type": "yarn", **LONG}, KEY: 128}),
    "v4 phi-3 without its window": ("phi3", {"rope_scaling": {"type": "longrope", **LONG}}),
    "v4 phi-3 partial": ("phi3", {"rope_theta": 1e4, "partial_rotary_factor": 0.5}),
    "v5 default": ("qwen3", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}),
    "v5 default, no theta": ("llama", {"rope_parameters": {"rope_type": "default"}}),
    "v5 yarn": ("llama", {"rope_parameters": YARN4 | {"rope_theta": 5e5, "truncate": False}}),
    "v5 theta outside": (
        "llama",
        {"rope_theta": 7e4, "rope_parameters": {"rope_type": "linear", "factor": 2.0}},
    ),
    "v5 partial": ("phi3", {"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.25}}),
    "v5 proportional": ("llama", {"rope_parameters": {"rope_type": "proportional", "rope_theta": 1e4}}),
    "dual": (
        "llama",
        {"rope_theta": 5e5, "rope_scaling": YARN4, "rope_parameters": YARN4 | {"rope_theta": 5e5}},
    ),
    "dual, other spellings": (
        "phi3",
        {
            "rope_scaling": {"type": "longrope", **LONG},
            "rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4, **LONG, KEY: 128},
            "rope_theta": 1e4,
            KEY: 128,
        },
    ),
}


@pytest.mark.parametrize("name", FILES)
def test_from_hf_reads_as_transformers(name):
    model_type, keys = FILES[name]
    shape = {"hidden_size": 64, "num_attention_heads": 4, "max_position_embeddings": 1024, "pad_token_id": 0}
    head_dim = 16 if model_type != "qwen3" else 128
    hf = CONFIGS[model_type](**shape, **json.loads(json.dumps(keys)))
    config = {"model_type": model_type, **shape, **keys}
    before = json.dumps(config)
    rope = from_hf(config)
    assert json.dumps(config) == before
    for length in (1, 128, 129, 5000):
        assert_same(rope.frequencies(head_dim, length), hf_frequencies(hf, length))


@pytest.mark.parametrize("layer_type", ["full_attention", "sliding_attention"])
def test_from_hf_parameters_of_each_layer_type(layer_type):
    nested = {
        "full_attention": {"rope_type": "yarn", "factor": 8.0, "rope_theta": 1e6, KEY: 256},
        "sliding_attention": {"rope_type": "default"},
    }
    shape = {
        "hidden_size": 64,
        "num_attention_heads": 4,
        "num_hidden_layers": 2,
        "max_position_embeddings": 2048,
    }
    shape |= {"layer_types": ["full_attention", "sliding_attention"], "rope_theta": 30000.0}
    hf = Qwen2Config(**shape, rope_parameters=json.loads(json.dumps(nested)))
    parameters = hf.rope_parameters[layer_type]
    if layer_type == "sliding_attention":
        expected = hf_frequencies(hf_config(parameters, 16, 2048))
    else:
        expected = [np.asarray(v) for v in ROPE_INIT_FUNCTIONS["yarn"](hf, None, layer_type=layer_type)]
    rope = from_hf(shape | {"rope_parameters": nested}, layer_type=layer_type)
    assert_same(rope.frequencies(16, 1), expected)
    with pytest.raises(UserError, match="full_attention, sliding_attention"):
        from_hf(shape | {"rope_parameters": nested})
    same = {"full_attention": nested["full_attention"], "sliding_attention": nested["full_attention"]}
    assert from_hf(shape | {"rope_parameters": same}).factor == 8.0


def test_from_hf_corrects_a_dynamic_scaling_that_was_switched_off():
    scaling = {"rope_type": "dynamic", "factor": 4.0, KEY: 64}
    with pytest.warns(UserWarning, match="max_position_embeddings 256 is already 4 x the original 64"):
        rope = from_hf({"rope_scaling": scaling, "max_position_embeddings": 256})
    right = hf_config({"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0}, 16, 64)
    assert_same(rope.frequencies(16, 256), hf_frequencies(right, 256))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert from_hf({"rope_scaling": scaling, "max_position_embeddings": 64}) == rope
        other = from_hf(
            {"rope_scaling": scaling, "max_position_embeddings": 100}
        )  # transformers scales from 100
    assert other.original_max_position_embeddings == 100


WINDOW = {"max_position_embeddings": 256}
BAD_FILES = [
    ({"rope_parameters": {"rope_type": "default", "rope_theta": None}}, "rope_theta is null"),
    ({"rope_theta": None, "rope_scaling": {"type": "linear", "factor": 2}}, "rope_theta is null"),
    ({"rope_parameters": {"rope_type": "linear", "factor": 2.0}}, "rope_theta is missing"),
    (
        {"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_parameters": {"rope_theta": 5e5}},
        "rope_theta is in rope_parameters, but missing in and next to rope_scaling .linear.: keep one",
    ),
    ({"rope_scaling": {"type": "yarm", "factor": 2.0}}, "'yarm': did you mean 'yarn'.*linear.*longrope"),
    ({"rope_scaling": {"type": "LLaMA3", "factor": 2.0}}, "did you mean 'llama3'"),
    ({"rope_scaling": {"type": "mrope", "factor": 2.0}}, "unknown rope_type 'mrope'.*proportional"),
    ({"rope_scaling": {"factor": 2.0}}, "no rope_type, which would scale nothing"),
    ({"rope_scaling": {"type": "linear"}}, "'linear' has no factor"),
    ({"rope_scaling": {"type": "yarn"}}, "'yarn' has no factor"),
    ({"rope_scaling": {"type": "dynamic"}}, "'dynamic' has no factor"),
    (
        {"rope_scaling": {"type": "llama3", "factor": 8.0, "low_freq_factor": 1.0}},
        "'llama3' has no high_freq_factor",
    ),
    ({"rope_scaling": {"type": "longrope", "long_factor": [1.0]}}, "'longrope' has no short_factor"),
    ({"rope_scaling": {"type": "linear", "factor": 0.5}}, "factor is 0.5, expected at least 1"),
    ({"rope_scaling": {"type": "linear", "factor": "2"}}, "factor is '2', expected a number"),
    ({"rope_scaling": {"type": "linear", "factor": math.nan}}, "factor is nan, expected a number"),
    ({"rope_scaling": YARN4 | {KEY: 256.5}}, "is 256.5, expected a whole number of tokens"),
    (
        {"rope_scaling": YARN4 | {"beta_fast": 1, "beta_slow": 32}},
        "beta_fast is 1, expected at least beta_slow = 32",
    ),
    ({"rope_scaling": YARN4 | {"attention_factor": -1.0}}, "attention_factor is -1, expected more than 0"),
    ({"rope_scaling": LLAMA3 | {"high_freq_factor": 0.5}}, "high_freq_factor is 0.5, expected at least"),
    (
        {"rope_scaling": {"type": "longrope", "short_factor": 1.0, "long_factor": [1.0]}},
        "short_factor is 1.0",
    ),
    ({"rope_scaling": "yarn"}, "rope_scaling is 'yarn', expected an object"),
    ({"partial_rotary_factor": 1.5}, "partial_rotary_factor is 1.5, expected at most 1"),
    ({"rope_theta": 0}, "rope_theta is 0, expected more than 1"),
    # settings that disagree
    (
        {"rope_theta": 5e5, "rope_scaling": YARN4, "rope_parameters": LLAMA3},
        "disagree: rope_type is 'yarn' by",
    ),
    (
        {"rope_theta": 5e5, "rope_scaling": YARN4, "rope_parameters": YARN4 | {"factor": 8.0}},
        "disagree: factor is 4.0 by the one and 8.0",
    ),
    (
        {"rope_theta": 5e5, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
        "rope_theta is 1000000.0 in rope_parameters and 500000.0 at the top level",
    ),
    ({"rope_scaling": YARN4, KEY: 128}, f"{KEY} is 256 in rope_scaling and 128 at the top level"),
    (
        {"rope_scaling": {"type": "linear", "rope_type": "yarn", "factor": 4.0}},
        "rope_type 'yarn' and type 'linear'",
    ),
    (
        {"partial_rotary_factor": 0.5, "rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.25}},
        "partial_rotary_factor is 0.25 in rope_parameters and 0.5",
    ),
    (
        {"model_type": "phi3", "rope_scaling": {"type": "longrope", **LONG, KEY: 128}},
        "is 128 in rope_scaling and missing at the top level",
    ),
    # keys that would be ignored
    (
        {"rope_scaling": YARN4 | {"facter": 8.0}},
        "unknown key 'facter' in rope_scaling: did you mean 'factor'",
    ),
    ({"rope_scaling": {"type": "longrope", **LONG, "short_mscale": 1.1}}, "unknown key 'short_mscale'"),
    ({"rope_scaling": {"type": "dynamic", "alpha": 1000.0, "factor": 1.0}}, "unknown key 'alpha'"),
    ({"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "factor": 4.0}}, "factor has no effect"),
    ({"rope_scaling": {"type": "linear", "factor": 4.0, "beta_fast": 32}}, "beta_fast has no effect"),
    # factors out of range
    *(
        ({"rope_scaling": {"type": "linear", "factor": bad}}, f"factor is {word}, expected")
        for bad, word in (
            (0, "0"),
            (-4.0, "-4"),
            (math.inf, "inf"),
            (-math.inf, "-inf"),
            (True, "True"),
            ([4.0], r"\[4.0\]"),
            (10**400, r"1000+\.\.\."),
            (1e300, r"1e\+300"),
        )
    ),
    ({"rope_scaling": YARN4 | {"beta_fast": -1.0}}, "beta_fast is -1, expected at least 0"),
    ({"rope_scaling": YARN4 | {"mscale": -1.0, "mscale_all_dim": 1.0}}, "mscale is -1, expected at least 0"),
    ({"rope_scaling": YARN4 | {KEY: 0}}, f"{KEY} is 0, expected a whole number"),
    ({"rope_scaling": LLAMA3 | {"low_freq_factor": 0}}, "low_freq_factor is 0, expected more than 0"),
    (
        {"rope_scaling": {"type": "longrope", **LONG, "long_factor": [2.0, 0.0]}},
        r"long_factor\[1\] is 0, expected more than 0",
    ),
    ({"rope_scaling": []}, r"rope_scaling is \[\], expected an object"),
    ({"rope_theta": 1e300}, r"rope_theta is 1e\+300, expected at most"),
]


@pytest.mark.parametrize("config, message", BAD_FILES)
def test_from_hf_names_what_is_wrong(config, message):
    with pytest.raises(UserError, match=message) as error:
        from_hf(WINDOW | config)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("kind", ["yarn", "llama3", "dynamic", "longrope"])
def test_from_hf_needs_a_window(kind):
    scaling = {"rope_type": kind, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, **LONG}
    with pytest.raises(UserError, match=KEY):
        from_hf({"rope_scaling": scaling})


def test_frequencies_check_the_head():
    for rope, head_dim in (
        (Rope(), 15),
        (Rope(partial_rotary_factor=0.3), 50),
        (Rope(partial_rotary_factor=0.01), 64),
    ):
        with pytest.raises(UserError, match="even number"):
            rope.frequencies(head_dim, 1)
    short = Rope("longrope", 1e4, 4.0, 64, short_factor=[1.0] * 8, long_factor=[1.0] * 7)
    with pytest.raises(UserError, match="long_factor has 7 numbers, expected 8"):
        short.frequencies(16, 1)
    with pytest.raises(UserError, match="expected at least 4"):
        Rope("ntk", factor=2.0).frequencies(2, 1)


@pytest.mark.parametrize(
    "field", [{"factor": 4.0}, {"beta_fast": 16.0}, {"truncate": False}, {"long_factor": [2.0]}]
)
def test_a_field_that_would_be_ignored_is_an_error(field):
    with pytest.raises(UserError, match=f"{next(iter(field))} has no effect on rope_type 'default'"):
        Rope(**field)


EXPORTS = [
    Rope(rope_theta=5e5),
    Rope(partial_rotary_factor=0.5),
    Rope("linear", 1e4, 4.0, 256),
    Rope("ntk", 1e4, 4.0),
    Rope("dynamic", 1e4, 4.0, 256),
    Rope("yarn", 5e5, 4.0, 256),
    Rope(
        "yarn", 5e5, 4.0, 256, mscale=1.0, mscale_all_dim=0.7, beta_fast=16.0, beta_slow=2.0, truncate=False
    ),
    Rope("yarn", 5e5, 4.0, 256, attention_factor=1.0, partial_rotary_factor=0.5),
    Rope("llama3", 5e5, 8.0, 128, low_freq_factor=1.0, high_freq_factor=4.0),
    Rope("longrope", 1e4, 4.0, 256, short_factor=[1.0] * 32, long_factor=[3.0] * 32),
    Rope("longrope", 1e4, None, 256, attention_factor=1.2, short_factor=[1.0] * 32, long_factor=[3.0] * 32),
    Rope("proportional", 1e4, 2.0, partial_rotary_factor=0.5),
]


@pytest.mark.parametrize("rope", EXPORTS, ids=lambda r: str(r.rope_type))
def test_to_hf_is_read_back_to_the_same_frequencies(rope):
    window = written_max_position_embeddings(rope, 1024)
    parameters = json.loads(json.dumps(to_hf(rope, max_position_embeddings=window, head_dim=64)))
    again = from_hf({"rope_parameters": parameters, "max_position_embeddings": window})
    hf = hf_config(parameters, 64, window)
    for length in (1, 256, 257, 1024, 3000):
        assert_same(rope.frequencies(64, length), hf_frequencies(hf, length))
        assert_same(again.frequencies(64, length), rope.frequencies(64, length))


def test_to_hf_refuses_what_it_cannot_say():
    dynamic = Rope("dynamic", 1e4, 4.0, 256)
    assert written_max_position_embeddings(dynamic, 1024) == 256
    with pytest.raises(UserError, match="write max_position_embeddings 256"):
        to_hf(dynamic, max_position_embeddings=1024)
    with pytest.raises(UserError, match="pass head_dim"):
        to_hf(Rope("ntk", factor=4.0), max_position_embeddings=1024)
