"""Extending a pretrained RoPE: what is asked for happens, and what would not happen is a one-line error."""

import numpy as np
import pytest
from rope_oracle import KEY, assert_same, hf_config, hf_frequencies

from lcx import rope as rope_lib
from lcx.errors import UserError
from lcx.extend import extend
from lcx.rope import Rope

BANDS = {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
LISTS = {"short_factor": [1.0] * 32, "long_factor": [1.0 + i for i in range(32)]}
OPTIONS = {"yarn": {"beta_fast": 16, "truncate": False}, "llama3": BANDS, "longrope": LISTS}


def run(scaling, context=None, *, rope=None, window=256, head_dim=64):
    rope = Rope(rope_theta=20000.0) if rope is None else rope
    return extend(
        rope, max_position_embeddings=window, rope_scaling=scaling, context_length=context, head_dim=head_dim
    )


@pytest.mark.parametrize("name", ["linear", "dynamic", "yarn", "llama3", "longrope"])
@pytest.mark.parametrize("given", ["factor", "context_length", "both", "type and float"])
def test_every_type_becomes_what_transformers_makes_of_the_same_dict(name, given):
    scaling = {"rope_type": name, **OPTIONS.get(name, {})}
    if given == "type and float":
        scaling["type"] = scaling.pop("rope_type")
    if given != "context_length":
        scaling["factor"] = 4
    context = {"factor": None, "context_length": 1024, "both": 1024, "type and float": 1024.0}[given]
    before = str(scaling)
    rope, window = run(scaling, context)
    assert (window, type(window), str(scaling)) == (1024, int, before)
    written = {"rope_type": name, "factor": 4.0, "rope_theta": 20000.0, KEY: 256, **OPTIONS.get(name, {})}
    hf = hf_config(written, 64, 256 if name == "dynamic" else 1024)
    for length in (1, 256, 1024):
        assert_same(rope.frequencies(64, length), hf_frequencies(hf, length))


def test_ntk_and_a_new_base():
    rope, window = run({"rope_type": "ntk", "factor": 4.0})
    assert (rope, window) == (Rope("ntk", 20000.0, 4.0, 256), 1024)
    rope, window = run({"rope_type": "default", "rope_theta": 1e6}, 1024)
    assert (rope, window) == (Rope("default", 1e6, None, 256), 1024)
    assert run({"rope_theta": 1e6}, 1024) == (rope, window)
    assert run({"rope_theta": 1e6}) == (rope, 256)
    rope, window = run({"rope_type": "yarn", "factor": 4.0, "rope_theta": 5e5})
    assert rope.rope_theta == 5e5


def test_unscaled_has_to_be_asked_for():
    assert run({"rope_type": "default"}, 1024) == (
        Rope(rope_theta=20000.0, original_max_position_embeddings=256),
        1024,
    )
    assert run({"rope_type": "default"}, 256)[1] == 256
    yarn = Rope("yarn", 20000.0, 4.0, 256)
    assert run({"rope_type": "default"}, rope=yarn, window=1024)[0].rope_type == "default"
    with pytest.raises(
        UserError, match="context_length 1024 is beyond the model's window of 256.*set rope_scaling"
    ):
        run(None, 1024)


def test_nothing_asked_nothing_changed():
    rope = Rope(rope_theta=20000.0)
    for context in (None, 256, 256.0):
        assert run(None, context, rope=rope) == (rope, 256)


@pytest.mark.parametrize("scaling", [None, {"rope_type": "default"}, {"rope_theta": 1e6}])
def test_a_shorter_window_is_refused_where_it_would_have_no_effect(scaling):
    with pytest.raises(UserError, match="context_length is 255, below the model's window of 256"):
        run(scaling, 255)


def test_a_window_that_the_file_already_scales_needs_no_scaling():
    dynamic = Rope("dynamic", 1e4, 4.0, 256)  # its config.json keeps max_position_embeddings at 256
    assert run(None, 1024, rope=dynamic) == (dynamic, 1024)
    with pytest.raises(UserError, match="beyond the model's window of 1024"):
        run(None, 1025, rope=dynamic)


def test_a_second_extension_starts_from_the_original_window():
    """2k -> 8k -> 32k: the second scale is 16, not 4."""
    first, window = run({"rope_type": "yarn"}, 8192, window=2048)
    second, window = run({"rope_type": "yarn"}, 32768, rope=first, window=window)
    assert (second, window) == (Rope("yarn", 20000.0, 16.0, 2048), 32768)
    assert run({"rope_type": "yarn", "factor": 16.0}, rope=first, window=8192) == (second, 32768)
    llama31 = Rope("llama3", 5e5, 8.0, 8192, low_freq_factor=1.0, high_freq_factor=4.0)
    with pytest.raises(
        UserError, match="factor 4 times the original window 8192 is 32768, below the present 131072"
    ):
        run({"rope_type": "yarn", "factor": 4.0}, rope=llama31, window=131072)
    with pytest.raises(UserError, match="factor 2 times .* is 4096, below the present 8192"):
        run({"rope_type": "yarn", "factor": 2.0}, rope=first, window=8192)


def test_partial_rotary_and_odd_heads_are_checked_on_the_real_head():
    rope = Rope(rope_theta=20000.0, partial_rotary_factor=0.4)
    assert run({"rope_type": "yarn", "factor": 4.0}, rope=rope, head_dim=80)[0].partial_rotary_factor == 0.4
    assert run({"rope_type": "yarn", "factor": 4.0}, rope=rope, head_dim=None)[1] == 1024
    with pytest.raises(UserError, match="even number"):
        run({"rope_type": "yarn", "factor": 4.0}, rope=rope, head_dim=64)
    with pytest.raises(UserError, match="short_factor has 32 numbers, expected 64"):
        run({"rope_type": "longrope", "factor": 4.0, **LISTS}, head_dim=128)
    assert run({"rope_type": "longrope", "factor": 4.0, **LISTS}, head_dim=None)[1] == 1024


def test_types_without_a_factor():
    half = {"rope_type": "proportional", "partial_rotary_factor": 0.5}
    rope, window = run(half)
    assert (rope.factor, window) == (None, 256)
    assert run(half, 1024)[0].factor == 4.0
    rope, window = run({"rope_type": shifted}, 1024)
    assert (rope.rope_type, rope.factor, window) == (shifted, 4.0, 1024)


def shifted(rope, head_dim, length):
    inv_freq, scaling = rope_lib.default(rope, head_dim, length)
    return inv_freq * np.float32(0.5), scaling


def idle(rope, head_dim, length):
    return rope_lib.default(rope, head_dim, length)


ENLARGED = "if max_position_embeddings is enlarged already, set original_max_position_embeddings"
BAD = [
    # factor, window and context that do not fit together: all three numbers, and what to change
    (
        {"rope_type": "yarn", "factor": 4.0},
        2048,
        f"factor 4 x .* window 256 is 1024, not context_length 2048.*{ENLARGED}",
    ),
    ({"rope_type": "linear", "factor": 4.0}, 256, "is 1024, not context_length 256.*: 64 would fit"),
    ({"rope_type": "yarn", "factor": 4.0, KEY: 128}, 1024, "window 128 is 512, not context_length 1024"),
    (
        {"rope_type": "yarn"},
        256,
        f"factor 1.0 .*original window 256, context_length 256.* no effect.*{ENLARGED}",
    ),
    ({"rope_type": "yarn"}, 128, "factor 0.5 .* no effect unless it is more than 1"),
    ({"rope_type": "yarn"}, None, "'yarn' has neither factor nor context_length"),
    ({"rope_type": "yarn", "factor": None}, None, "'yarn' has neither factor nor context_length"),
    # without effect
    ({"rope_type": "linear", "factor": 1.0}, None, "factor 1.0 .* no effect"),
    ({"rope_type": "dynamic", "factor": 1}, 256, "factor 1 .* no effect"),
    (
        {"rope_type": "default"},
        None,
        "default.* no effect, its frequencies at 256 tokens are those the model has",
    ),
    ({"rope_type": "default", "rope_theta": 20000}, None, "no effect"),
    ({"rope_type": "default", "factor": 4.0}, 1024, "factor has no effect on rope_type 'default'"),
    ({"rope_type": idle, "factor": 4.0}, None, r"\(idle\) has no effect"),
    (
        {"rope_type": "yarn", "factor": 4.0, "beta_fast": 1e-3, "beta_slow": 1e-3, "attention_factor": 1.0},
        None,
        "no eff",
    ),
    (
        {"rope_type": "longrope", "factor": 4.0, "attention_factor": 1.0, **LISTS, "long_factor": [1.0] * 32},
        None,
        "no ef",
    ),
    (
        {"rope_type": "linear", "factor": 4.0, "beta_fast": 32},
        None,
        "beta_fast has no effect on rope_type 'linear'",
    ),
    ({"factor": 4.0}, None, "has no rope_type"),
    ({}, 1024, "has no rope_type"),
    ({KEY: 64}, 1024, "has no rope_type"),
    # keys and values
    (
        {"rope_type": "yarn", "facter": 4.0},
        None,
        "unknown key 'facter' in rope_scaling: did you mean 'factor'",
    ),
    ({"rope_type": "yarn", "original_max_position": 64}, None, f"did you mean '{KEY}'"),
    ({"rope_typ": "yarn", "factor": 4.0}, None, "did you mean 'rope_type'"),
    ({"rope_type": "yearn", "factor": 4.0}, None, "unknown rope_type 'yearn': did you mean 'yarn'"),
    ({"rope_type": "yarn", "type": "linear", "factor": 4.0}, None, "rope_type 'yarn' and type 'linear'"),
    ({"rope_type": "yarn", "factor": 4.0, "rope_theta": None}, None, "rope_theta is null"),
    ({"rope_type": "yarn", "factor": "4"}, None, "factor .* is '4', expected a number"),
    ({"rope_type": "yarn", "factor": True}, None, "factor .* is True, expected a number"),
    ({"rope_type": "llama3", "factor": 4.0}, None, "'llama3' has no low_freq_factor"),
    ({"rope_type": "yarn", "factor": 4.0, KEY: 64.5}, None, "is 64.5, expected a whole number of tokens"),
    ({"rope_type": "yarn", "factor": 4.0}, 1024.5, "context_length is 1024.5, expected a whole number"),
    ({"rope_type": "yarn", "factor": 4.0}, "1024", "context_length is '1024', expected a whole number"),
    ({"rope_type": "yarn", "factor": 4.0}, float("inf"), "context_length is inf"),
    (None, 0, "context_length is 0"),
    ("yarn", None, "rope_scaling is 'yarn', expected a dict"),
]


@pytest.mark.parametrize("scaling, context, message", BAD)
def test_what_would_not_happen_is_an_error(scaling, context, message):
    with pytest.raises(UserError, match=message) as error:
        run(scaling, context)
    assert "\n" not in str(error.value)


def test_the_model_has_it_already():
    yarn = Rope("yarn", 20000.0, 4.0, 256)
    with pytest.raises(UserError, match="yarn.* no effect.* those the model has already"):
        run({"rope_type": "yarn", "factor": 4.0}, rope=yarn, window=1024)


def test_a_scaled_model_that_does_not_say_its_original_window():
    linear = Rope("linear", 10000.0, 4.0)  # as a Hugging Face file gives it
    with pytest.raises(
        UserError, match="already scaled .'linear', factor 4.*set original_max_position_embeddings"
    ):
        run({"rope_type": "yarn"}, 4096, rope=linear, window=1024)
    assert run({"rope_type": "yarn", KEY: 256}, 4096, rope=linear, window=1024)[0].factor == 16.0


LLAMA31 = Rope("llama3", 5e5, 8.0, 8192, low_freq_factor=1.0, high_freq_factor=4.0)


@pytest.mark.parametrize(
    "scaling, context, theta, factor",
    [
        (None, 262144, 5e5, 8.0),
        ({"rope_theta": 8e6}, 262144, 8e6, 8.0),
        ({"rope_theta": 8e6}, None, 8e6, 8.0),
        ({"rope_type": "llama3"}, 262144, 5e5, 32.0),
        ({"rope_type": "llama3", "factor": 8.0}, 262144, 5e5, 8.0),
        ({"rope_type": "llama3", "factor": 16.0}, None, 5e5, 16.0),
        ({"rope_type": "llama3", "factor": 32.0, "rope_theta": 1e6}, None, 1e6, 32.0),
    ],
)
def test_llama3_is_kept_at_a_larger_window(scaling, context, theta, factor):
    """Llama 3.1: factor 8, and 16 times its original window of 8192. Its factor is no ratio of windows."""
    rope, window = run(scaling, context, rope=LLAMA31, window=131072)
    expected = Rope("llama3", theta, factor, 8192, low_freq_factor=1.0, high_freq_factor=4.0)
    assert (rope, window) == (expected, 262144 if context or factor == 32 else 131072)


def test_a_new_base_keeps_the_scaling_of_a_model_that_has_one():
    yarn = Rope("yarn", 20000.0, 4.0, 256, beta_fast=16.0)
    rope, window = run({"rope_theta": 1e6}, rope=yarn, window=1024)
    assert (rope, window) == (Rope("yarn", 1e6, 4.0, 256, beta_fast=16.0), 1024)
    with pytest.raises(
        UserError, match="beyond the model's window of 1024, which is the limit of its scaling .yarn, factor 4"
    ):
        run({"rope_theta": 1e6}, 2048, rope=yarn, window=1024)
    with pytest.raises(UserError, match="no effect"):
        run({"rope_theta": 20000.0}, rope=yarn, window=1024)


def test_no_message_advises_what_would_remove_a_scaling():
    for rope, window in (
        (LLAMA31, 131072),
        (Rope("linear", 1e4, 4.0, 256), 1024),
        (Rope("ntk", 1e4, 4.0, 256), 1024),
    ):
        for scaling, context in (({"factor": 4.0}, None), ("yarn", None), ({}, None), (None, 4096)):
            if rope is LLAMA31 and scaling is None:
                continue  # allowed
            with pytest.raises(UserError) as error:
                run(scaling, context, rope=rope, window=window)
            text = str(error.value)
            assert (
                f'{{"rope_type": "{rope.rope_type}"' in text and "default" not in text.partition("known")[0]
            )


@pytest.mark.parametrize("new, word", [("yarn", "replaced by 'yarn'"), ("default", "is removed")])
def test_a_scaling_that_goes_is_said(caplog, new, word):
    run({"rope_type": new, **({"factor": 32.0} if new == "yarn" else {})}, rope=LLAMA31, window=131072)
    assert f"(llama3, factor 8) is {word.removeprefix('is ')}" in caplog.text


def test_a_scaling_that_does_not_say_its_window_reaches_factor_times_it():
    linear = Rope("linear", 1e4, 4.0)  # vicuna-16k: max_position_embeddings 4096 is its original window
    assert run(None, 16384, rope=linear, window=4096) == (linear, 16384)
    with pytest.raises(UserError, match="beyond the model's window of 16384"):
        run(None, 16385, rope=linear, window=4096)
