"""Windows of scaled models: read from config.json, extended a second time, and written for transformers."""

import json

import numpy as np
import pytest
import transformers
from hf_folders import changed, make
from rope_oracle import KEY, assert_same, hf_frequencies

from lcx import extend
from lcx.convert.__main__ import main
from lcx.convert.hf import config as hf_config
from lcx.convert.hf.source import HfSource
from lcx.errors import UserError
from lcx.rope import Rope

BANDS = {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
LISTS = {"short_factor": [1.0, 1.5], "long_factor": [2.0, 9.0]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make(tmp_path_factory.mktemp("windows") / "m")


WINDOWS = [
    # max_position_embeddings, the scaling, the window
    (64, {"rope_type": "yarn", "factor": 4.0, KEY: 64}, 256),
    (80, {"rope_type": "yarn", "factor": 4.0, KEY: 64}, 256),  # Qwen3: 40960 = 32768 and room for the answer
    (256, {"rope_type": "yarn", "factor": 4.0, KEY: 64}, 256),
    (64, {"rope_type": "yarn", "factor": 4.0}, 256),
    (64, {"rope_type": "linear", "factor": 4.0, KEY: 64}, 256),
    (64, {"rope_type": "linear", "factor": 4.0}, 64),  # the file does not say which of the two it is
    (64, {"rope_type": "dynamic", "factor": 4.0}, 256),
    (64, {"rope_type": "llama3", "factor": 4.0, **BANDS, KEY: 64}, 256),
    (1024, {"rope_type": "llama3", "factor": 8.0, **BANDS, KEY: 64}, 1024),
    (1024, {"rope_type": "llama3", "factor": 32.0, **BANDS, KEY: 64}, 1024),  # Llama 3.2
    (64, {"rope_type": "longrope", "factor": 4.0, **LISTS, KEY: 64}, 256),
    (128, {"rope_type": "longrope", "factor": 4.0, **LISTS, KEY: 64}, 128),
    (64, {"rope_type": "default"}, 64),
]


@pytest.mark.parametrize("stated, scaling, window", WINDOWS)
@pytest.mark.parametrize("spelling", ["rope_scaling", "rope_parameters"])
def test_the_window_of_a_scaled_model(folder, stated, scaling, window, spelling):
    config = json.loads((folder / "config.json").read_text())
    for key in ("rope_scaling", "rope_parameters", "rope_theta"):
        config.pop(key, None)
    config |= {"head_dim": 4, "max_position_embeddings": stated}
    if spelling == "rope_scaling":
        config |= {"rope_theta": 1e4, "rope_scaling": scaling}
    else:
        config["rope_parameters"] = scaling | {"rope_theta": 1e4}
    model = hf_config.from_config(config)
    assert model.max_position_embeddings == window
    truth = transformers.LlamaConfig(**json.loads(json.dumps(config)))
    again = hf_config.to_config(model, dtype="float32")
    for length in (1, 65, window):
        rope = model.stages[0].pattern[0].mixer.rope
        assert_same(rope.frequencies(4, length), hf_frequencies(truth, length))
        written = transformers.LlamaConfig(**json.loads(json.dumps(again)))
        assert_same(rope.frequencies(4, length), hf_frequencies(written, length))
    assert hf_config.from_config(again) == model


def test_a_window_beyond_any_position(folder, tmp_path):
    scaling = {"rope_type": "yarn", "factor": 1e8, KEY: 64}
    bad = changed(
        folder, tmp_path / "m", config=lambda c: c.update(rope_scaling=scaling, rope_parameters=None)
    )
    with pytest.raises(UserError, match="factor 1e.08, which makes a window of 6400000000 tokens"):
        HfSource(bad)


@pytest.mark.parametrize("model_type", ["llama", "qwen2", "phi3"])
@pytest.mark.parametrize(
    "first, second, expected",
    [
        ({"rope_type": name, "factor": 4.0}, {"rope_type": name, "factor": 16.0}, (name, 1e4, 16.0))
        for name in ("linear", "ntk", "yarn", "dynamic")
    ]
    + [
        ({"rope_theta": 1e6}, {"rope_theta": 4e6}, ("default", 4e6, None)),
        ({"rope_type": "ntk", "factor": 4.0}, {"rope_type": "yarn", "factor": 16.0}, ("yarn", 1e4, 16.0)),
        ({"rope_theta": 1e6}, {"rope_type": "yarn"}, ("yarn", 1e6, 16.0)),
    ],
)
def test_a_second_extension_starts_from_the_original_window(folder, first, second, expected, model_type):
    """4 and then 16 are 16, through config.json and through transformers, which keeps what it does not know."""
    if model_type == "phi3" and first.get("rope_type") == "dynamic":
        pytest.skip("Phi-3 has no dynamic")
    config = json.loads((folder / "config.json").read_text()) | {
        "model_type": model_type,
        "architectures": None,
    }
    config = {k: v for k, v in config.items() if "bias" not in k}
    plain = hf_config.from_config(config)
    extended = extend.extend_model(plain, first, 256)
    written = hf_config.to_config(extended, dtype="float32")
    classes = {"llama": "LlamaConfig", "qwen2": "Qwen2Config", "phi3": "Phi3Config"}
    theirs = getattr(transformers, classes[model_type])(**json.loads(json.dumps(written))).to_dict()
    for text in (written, theirs | {"architectures": None}):
        read = hf_config.from_config(json.loads(json.dumps(text)))
        assert read == extended, text
        again = extend.extend_model(read, second, 1024)
        rope = again.stages[0].pattern[0].mixer.rope
        assert (rope.rope_type, rope.rope_theta, rope.factor) == expected
        assert (rope.original_max_position_embeddings, again.max_position_embeddings) == (64, 1024)


def test_what_was_remembered_counts_only_while_it_is_true(folder, caplog):
    plain = HfSource(folder).model
    written = hf_config.to_config(
        extend.extend_model(plain, {"rope_type": "ntk", "factor": 4.0}, 256), dtype="float32"
    )
    assert written["lcx_rope"] == {"rope_type": "ntk", "factor": 4.0, KEY: 64}
    written["rope_theta"] = written["rope_parameters"]["rope_theta"] = 5e5
    rope = hf_config.from_config(written).stages[0].pattern[0].mixer.rope
    assert rope == Rope(rope_theta=5e5, original_max_position_embeddings=64)
    assert "lcx_rope no longer matches its rotary settings" in caplog.text
    for bad in ("x", {"facter": 1}, {"rope_type": "ntk"}, {"rope_type": "default", "factor": []}):
        with pytest.raises(UserError):
            hf_config.from_config(written | {"lcx_rope": bad})


@pytest.mark.parametrize(
    "stated, written", [(64, 256), (256, 256), (131072, 131072), (10**30, 10**30), (None, None)]
)
def test_model_max_length_follows_the_window(folder, tmp_path, stated, written):
    source = changed(folder, tmp_path / "m")
    value = {"bos_token": "<s>", "note": "é"} | ({} if stated is None else {"model_max_length": stated})
    text = json.dumps(value)
    (source / "tokenizer_config.json").write_text(text)
    scaling = '--rope_scaling={"rope_type": "yarn", "factor": 4.0}'
    assert main([f"--src={source}", f"--dst={tmp_path}/out", "--dst_format=hf", scaling]) == 0
    found = (tmp_path / "out" / "tokenizer_config.json").read_text(encoding="utf-8")
    assert json.loads(found) == value | ({} if written is None else {"model_max_length": written})
    assert (found == text) == (stated == written)  # to the byte, where there is nothing to change
    assert np.isclose(
        json.loads((tmp_path / "out" / "config.json").read_text())["max_position_embeddings"], 256
    )
