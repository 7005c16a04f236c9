"""Parameters as users have them, and blocks without a part, through save, load, logits and generate."""

import flax.core
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lcx
from lcx import parameters
from lcx.errors import UserError
from lcx.layers import Norm
from lcx.mixers.attention import Attention
from lcx.mixers.linear_attention import LinearAttention
from lcx.mlps.plain import PlainMlp
from lcx.model import Block, Decoder, Mlp, Stage

PROMPTS = [[1, 2, 3], [4, 5, 6, 7, 8, 9, 10, 11]]


def decoder(*blocks, repeat=1, **settings):
    stages = (Stage(blocks, repeat),) if blocks else ()
    sizes = {"vocab_size": 32, "hidden_size": 16, "max_position_embeddings": 64}
    return Decoder(**sizes, stages=stages, parent=None, **settings)


def attention():
    return Attention(2, 2, 8, parent=None)


def mlp():
    return Mlp(16, parent=None)


NORM = Norm(center=True, bias=True, offset=1.0)
MODELS = {
    "no mlp, tied": decoder(Block(attention(), None, parent=None), repeat=2, tie_word_embeddings=True),
    "no mixer": decoder(Block(attention(), None, parent=None), Block(None, mlp(), parent=None)),
    "every setting": decoder(
        Block(
            Attention(2, 2, 8, rope=None, qk_norm="all_heads", norm=NORM, scale=0.5, parent=None),
            PlainMlp(16, bias=True, activation="relu2", parent=None),
            norm=NORM,
            norms="both",
            parallel=True,
            shared_norm=True,
            residual_multiplier=0.5,
            parent=None,
        ),
        norm=NORM,
        embedding_multiplier=4.0,
        logit_multiplier=0.25,
        logit_softcap=2.0,
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_shapes_are_those_of_an_initialization(name):
    """Tracing for shapes alone leaves out a part; names of axes, by which arrays are sharded, are compared too."""
    model = MODELS[name]
    whole = jax.eval_shape(lambda: model.init(jax.random.key(0), model.example())["params"])
    found = parameters._abstract_boxed(model)
    assert jax.tree.structure(found) == jax.tree.structure(whole)
    assert jax.tree.leaves(found) == jax.tree.leaves(whole)


@pytest.fixture(scope="module")
def variables():
    model = MODELS["no mixer"]
    return jax.jit(model.init)(jax.random.key(0), model.example())


@pytest.mark.parametrize("name", MODELS)
def test_blocks_without_a_part(name, tmp_path):
    """Saved and loaded; cached decoding is the full forward pass."""
    model = MODELS[name]
    params = jax.jit(model.init)(jax.random.key(0), model.example())["params"]
    lcx.save(tmp_path / "saved", model, params, format="lcx")
    again, loaded = lcx.load(tmp_path / "saved")
    assert again == model
    texts = [list(prompt) for prompt in PROMPTS]
    out = lcx.generate(model, loaded, PROMPTS, max_new_tokens=4)
    for text, row in zip(texts, out.tolist(), strict=True):
        logits = lcx.logits(model, params, [[*text, *row, *[0] * (12 - len(text) - 4)]])[0]
        assert row == jnp.argmax(logits, axis=-1)[len(text) - 1 : len(text) + 3].tolist()
    with pytest.raises(UserError, match="save with format 'lcx'") as caught:
        lcx.save(tmp_path / "hf", model, params, format="hf")
    assert "\n" not in str(caught.value)


FORMS = {
    "of init": lambda variables: variables,
    "boxed": lambda variables: variables["params"],
    "frozen": flax.core.freeze,
    "numpy": lambda variables: jax.tree.map(np.asarray, nn.meta.unbox(variables["params"])),
    "bfloat16": lambda variables: jax.tree.map(lambda x: x.astype(jnp.bfloat16), variables["params"]),
}


@pytest.mark.parametrize("form", FORMS)
def test_parameters_in_every_form(variables, form, tmp_path):
    model, params = MODELS["no mixer"], FORMS[form](variables)
    lcx.save(tmp_path / "saved", model, params, format="lcx")
    _, loaded = lcx.load(tmp_path / "saved")
    plain = nn.meta.unbox(FORMS["bfloat16" if form == "bfloat16" else "boxed"](variables))
    jax.tree.map(np.testing.assert_array_equal, loaded, plain)
    np.testing.assert_array_equal(
        lcx.logits(model, params, PROMPTS[:1]), lcx.logits(model, loaded, PROMPTS[:1])
    )


def without(tree, name):
    return {key: value for key, value in tree.items() if key != name}


BAD = {
    "missing": (lambda p: without(p, "final_norm"), r"final_norm/scale is missing, expected \(16,\)"),
    "extra": (lambda p: {**p, "bias": np.zeros(3)}, r"bias is \(3,\), expected nothing"),
    "shape": (
        lambda p: {**p, "final_norm": {"scale": np.zeros(15, np.float32)}},
        r"final_norm/scale is \(15,\), expected \(16,\)",
    ),
    "integers": (
        lambda p: {**p, "final_norm": {"scale": np.zeros(16, int)}},
        "scale is int64, expected floating",
    ),
    "no array": (lambda p: {**p, "final_norm": {"scale": [1.0] * 16}}, "scale is a list, expected an array"),
    "a state": (
        lambda p: {"params": p, "opt_state": ()},
        r"hold opt_state in addition to params: pass params\['params'\]",
    ),
    "nothing": (lambda p: None, "params are a NoneType, expected the tree"),
}


@pytest.mark.parametrize("name", BAD)
def test_parameters_that_do_not_fit_are_refused_in_one_line(variables, name, tmp_path):
    model, (change, says) = MODELS["no mixer"], BAD[name]
    params = change(nn.meta.unbox(variables["params"]))
    calls = (
        lambda: lcx.save(tmp_path / "saved", model, params, format="lcx"),
        lambda: lcx.logits(model, params, PROMPTS[:1]),
        lambda: lcx.generate(model, params, PROMPTS[:1], max_new_tokens=1),
    )
    for call in calls:
        with pytest.raises(UserError, match=says) as caught:
            call()
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "saved").exists()


def test_blocks_and_stages_of_nothing_are_refused():
    with pytest.raises(UserError, match="mixer None and mlp None, expected one of them"):
        Stage((Block(None, None, parent=None),))
    for pattern, repeat in (((), 1), ((Block(attention(), None, parent=None),), 0)):
        with pytest.raises(UserError, match="expected at least one block, once"):
            Stage(pattern, repeat)


@pytest.mark.parametrize("kind", ["terraced", "sliding"])
def test_a_published_model_generates_what_each_prompt_gives_alone(kind):
    """Against prefill of exactly the prompt and single steps, which hold no padding."""
    mixer = LinearAttention(
        2, 2, 8, window=4, window_kind=kind, feature_dim=8, published_quirks=True, parent=None
    )
    model = decoder(Block(mixer, mlp(), parent=None), repeat=2)
    params = nn.meta.unbox(jax.jit(model.init)(jax.random.key(3), model.example())["params"])
    params = jax.tree.map(lambda x: x * (4 if x.ndim > 2 else 1), params)  # so that keys matter
    run = jax.jit(lambda tokens, cache: model.apply({"params": params}, tokens, cache=cache, method="hidden"))
    out = lcx.generate(model, params, PROMPTS, max_new_tokens=8)
    for prompt, row in zip(PROMPTS, out.tolist(), strict=True):
        x, cache = run(jnp.array([prompt]), model.init_cache(1, 64))
        for token in row:
            assert int(jnp.argmax(model.head(params) @ x[0, -1])) == token
            x, cache = run(jnp.array([[token]]), cache)
