"""Models as JSON: round trips, and descriptions that nobody should follow."""

import json

import pytest

from lcx import describe
from lcx.errors import UserError
from lcx.model import llama
from lcx.rope import Rope, linear

SIZES = dict(vocab_size=97, hidden_size=32, intermediate_size=48, num_heads=4, max_position_embeddings=64)
MODELS = {
    "plain": llama(**SIZES, num_layers=2),
    "everything": llama(
        **SIZES,
        num_layers=5,
        num_kv_heads=2,
        head_dim=16,
        rope=Rope(rope_type="yarn", factor=4.0, original_max_position_embeddings=16, truncate=False),
        layer_windows=(None, None, None, 7, 7),
        qkv_bias=True,
        qk_norm=True,
        tie_word_embeddings=True,
        model_type="qwen2",
        dtype="bfloat16",
        remat="full",
    ),
    "own_rope_function": llama(**SIZES, num_layers=1, rope=Rope(rope_type=linear, factor=2.0)),
}


@pytest.mark.parametrize("name", MODELS)
def test_round_trip_through_text(name):
    model = MODELS[name]
    back = describe.from_json(json.loads(json.dumps(describe.to_json(model))))
    assert back == model and hash(back) == hash(model)


def test_fields_at_their_defaults_are_left_out():
    assert "remat" not in describe.to_json(MODELS["plain"])
    assert describe.to_json(MODELS["everything"])["remat"] == "full"


@pytest.mark.parametrize(
    "hostile",
    [
        {"class": "os:system"},
        {"class": "subprocess:Popen", "args": "true"},
        {"function": "os:getcwd.__globals__"},
        {"class": "lcx.model:jax"},
        {"class": "lcx.convert.torch_bin:torch"},
        {"function": "builtins:eval.__self__"},
    ],
    ids=str,
)
def test_a_checkpoint_cannot_name_anything_else(hostile):
    with pytest.raises(UserError, match="checkpoint"):
        describe.from_json(hostile)


def test_a_package_that_is_not_imported_is_asked_for():
    with pytest.raises(UserError, match="antigravity is not imported: import it before loading"):
        describe.from_json({"class": "antigravity:Mixer"})


def test_unknown_fields_are_named():
    description = describe.to_json(MODELS["plain"]) | {"num_experts": 8}
    with pytest.raises(UserError, match="num_experts"):
        describe.from_json(description)


def test_what_json_cannot_carry():
    with pytest.raises(UserError, match="cannot be found again"):
        describe.to_json(llama(**SIZES, num_layers=1, rope=Rope(rope_type=lambda rope, head_dim, length: None)))
