"""StripedHyena 2 against the published code: a tiny model's blocks, logits, decode and states; inits; placement."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lcx import model as model_lib
from lcx.errors import UserError
from lcx.mixers.attention import Attention
from lcx.mixers.hyena import HyenaLI, HyenaMR, HyenaSE
from lcx.model import Block, Decoder, Mlp, Stage
from lcx.optim import AdamW
from lcx.rope import Rope

C, VOCAB, HEADS = 64, 512, 4


def tiny_model():
    """SE, MR, LI, attention; exact gelu in the first block alone."""
    mixers = (
        HyenaSE(num_channels=C, num_groups=8),
        HyenaMR(num_channels=C, num_groups=16, init_length=256),
        HyenaLI(num_channels=C, init_length=256),
        Attention(HEADS, HEADS, C // HEADS, rope=Rope(rope_theta=1e4), o_bias=True),
    )
    blocks = tuple(
        Block(mixer=mixer, mlp=Mlp(176, activation="identity" if i else "gelu"), norm_eps=1e-6)
        for i, mixer in enumerate(mixers)
    )
    return Decoder(
        vocab_size=VOCAB,
        hidden_size=C,
        stages=(Stage(blocks),),
        max_position_embeddings=256,
        norm_eps=1e-6,
        tie_word_embeddings=True,
    )


def published_params(w):
    """savanna's names -> ours, by hand."""

    def block(i):
        p = f"sequential.{i + 2}."

        def get(name):
            return w[p + name]

        mlp = {
            f"{n}_proj": {"kernel": get(f"mlp.w{j}.weight").T}
            for j, n in enumerate(("gate", "up", "down"), 1)
        }
        out = {"kernel": get("mixer.dense.weight").T, "bias": get("mixer.dense.bias")}
        rows = get("mixer.dense_projection.weight")
        if i == 3:  # rows are per head: q, k, v of head 0, then of head 1, ...
            qkv = rows.reshape(HEADS, 3, C // HEADS, C)
            mixer = {f"{n}_proj": {"kernel": qkv[:, j].transpose(2, 0, 1)} for j, n in enumerate("qkv")}
            mixer["o_proj"] = {"kernel": out["kernel"].reshape(HEADS, C // HEADS, C), "bias": out["bias"]}
        else:
            taps = get("mixer.hyena_proj_conv.short_conv_weight")[:, 0, ::-1]
            mixer = {
                "in_proj": {"kernel": rows.reshape(C, 3, C).transpose(2, 0, 1)},
                "featurizer": taps.reshape(C, 3, 3),
                "out_proj": out,
            }
        if i == 0:
            mixer["h"] = get("mixer.mixer.short_conv.short_conv_weight")[:, 0, ::-1]
        if i == 1:  # stored to 256 taps, alive to 128
            mixer |= {
                "h": get("mixer.mixer.filter.h")[:, :128],
                "decay": get("mixer.mixer.filter.decay")[:, :128],
            }
        if i == 2:
            mixer |= {name: get(f"mixer.mixer.filter.{name}") for name in ("p", "gamma", "R")}
        if i in (1, 2):
            mixer["skip"] = get("mixer.mixer.conv_bias")
        norms = {
            "mixer_norm": {"scale": get("input_layernorm.scale")},
            "mlp_norm": {"scale": get("pre_mlp_layernorm.scale")},
        }
        return jax.tree.map(lambda x: jnp.array(x)[None], {**norms, "mixer": mixer, "mlp": mlp})

    return {
        "embed": {"embedding": jnp.array(w["sequential.0.word_embeddings.weight"])},
        "stages_0": {f"block_{i}": block(i) for i in range(4)},
        "final_norm": {"scale": jnp.array(w["sequential.7.norm.scale"])},
    }


@pytest.fixture(scope="module")
def published(reference):
    load_file = pytest.importorskip("safetensors.numpy").load_file
    folder = reference / "reference" / "evo2"
    return {
        name: load_file(folder / f"tiny_a_{name}.safetensors")
        for name in ("savanna_weights", "savanna_io", "vortex_decode_P100", "vortex_forward_L100")
    }


@pytest.fixture(scope="module")
def params(published):
    params = published_params(published["savanna_weights"])
    expected = model_lib.abstract_params(tiny_model())
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, expected)
    return params


@functools.partial(jax.jit, static_argnums=0)
def forward(model, params, tokens, cache=None, segment_ids=None):
    def both(model):
        x, new = model.hidden(tokens, cache=cache, segment_ids=segment_ids)
        return model.embed.logits(x), new

    return model.apply({"params": params}, method=both)


def test_logits_equal_savanna_and_vortex(published, params):
    logits, _ = forward(tiny_model(), params, jnp.array(published["savanna_io"]["tokens"]))
    np.testing.assert_allclose(logits, published["savanna_io"]["logits"], atol=3e-4)
    vortex = published["vortex_forward_L100"]
    logits, _ = forward(tiny_model(), params, jnp.array(vortex["L100.tokens"]))
    np.testing.assert_allclose(logits, vortex["L100.logits"], atol=3e-4)


def test_blocks_equal_savanna(published, params):
    """Each block from the published input of that block: an error cannot hide behind the norm of the next."""
    io, model = published["savanna_io"], tiny_model()
    x = jnp.array(io["act.embed"])
    for i, block in enumerate(model.stages[0].pattern[:3]):
        weights = jax.tree.map(lambda leaf: leaf[0], params["stages_0"][f"block_{i}"])
        y, _ = jax.jit(functools.partial(block.apply, positions=None, segment_ids=None))(
            {"params": weights}, x
        )
        np.testing.assert_allclose(
            y, io[f"act.block{i}"], rtol=1e-4, atol=2e-5 * np.abs(io[f"act.block{i}"]).max()
        )
        x = jnp.array(io[f"act.block{i}"])


def test_decode_and_states_equal_vortex(published, params):
    reference, model = published["vortex_decode_P100"], tiny_model()
    tokens = reference["P100.tokens"]
    logits, cache = forward(model, params, tokens[:, :100], model.init_cache(2, 140))
    found = jax.tree.map(lambda x: x[0], cache["stages_0"])
    for i, name in enumerate(("hcs", "hcm", "hcl")):
        state = found[f"block_{i}"]["featurizer"].inputs.reshape(2, 3 * C, 2)
        np.testing.assert_allclose(
            state, reference[f"P100.cache_after_prefill.{name}.fir.{i}"], rtol=1e-4, atol=1e-5
        )
    inner = found["block_0"]["filter"].inputs
    np.testing.assert_allclose(inner, reference["P100.cache_after_prefill.hcs.inner.0"], rtol=1e-4, atol=1e-5)
    inner = found["block_1"]["filter"].inputs
    np.testing.assert_allclose(
        inner[..., -100:], reference["P100.cache_after_prefill.hcm.inner.1"], rtol=1e-4, atol=1e-4
    )
    modes = found["block_2"]["filter"].modes
    np.testing.assert_allclose(modes, reference["P100.cache_after_prefill.hcl.state.2"], rtol=1e-4, atol=1e-3)
    for t in range(100, 140):
        np.testing.assert_allclose(logits[:, -1], reference["P100.decode_logits"][:, t - 100], atol=3e-4)
        logits, cache = forward(model, params, tokens[:, t : t + 1], cache)


@pytest.mark.parametrize("prompt", [1, 2, 4, 7])
def test_short_prompts_decode_like_the_whole(published, params, prompt):
    """Published decoding is wrong below 6 tokens: its short filters meet a history that is shorter than they are."""
    io, model = published["savanna_io"], tiny_model()
    tokens, expected = io["tokens"], io["logits"]
    cache, at = model.init_cache(2, 16), 0
    for size in (prompt, *[1] * 6):
        logits, cache = forward(model, params, tokens[:, at : at + size], cache)
        np.testing.assert_allclose(logits, expected[:, at : at + size], atol=3e-4)
        at += size


def init(mixer, x):
    return nn.meta.unbox(jax.jit(mixer.init)(jax.random.key(0), x))["params"]


def test_inits_are_the_published_ones():
    x = jnp.zeros((1, 2, C))
    mr = init(HyenaMR(num_channels=C, num_groups=16, init_length=300), x)
    rates = 10.0 ** np.linspace(-2, 2, 16)
    np.testing.assert_allclose(mr["decay"], np.exp(-np.outer(rates, np.arange(128)) / 299), rtol=1e-6)
    assert np.std(mr["h"]) == pytest.approx(1e-5 / np.sqrt(300), rel=0.1)
    assert np.abs(mr["skip"]).max() <= 128**-0.5 and np.abs(mr["featurizer"]).max() <= 3**-0.5
    li = init(HyenaLI(num_channels=C), x)
    gamma = np.exp(li["gamma"])
    assert (li["p"] == -1).all() and gamma.min() >= 0.01 and gamma.max() <= 0.1
    assert gamma.mean() == pytest.approx(0.055, rel=0.05) and np.std(li["R"]) == pytest.approx(0.025, rel=0.1)


def test_training_leaves_the_decay_alone():
    """Also with weight decay on everything that its regular expression matches by default."""
    mixer = HyenaMR(num_channels=C, num_groups=16)
    x = jax.random.normal(jax.random.key(0), (1, 20, C))
    params = init(mixer, x)
    optimizer = AdamW(learning_rate=0.1, weight_decay=0.1, warmup_steps=0).build(params, 10)
    grads = jax.jit(jax.grad(lambda p: jnp.sum(mixer.apply({"params": p}, x)[0] ** 2)))(params)
    updates, _ = optimizer.update(grads, optimizer.init(params), params)
    assert not np.any(updates["decay"])
    assert all(np.any(updates[name]) for name in ("h", "skip", "featurizer"))


def test_mistakes_name_the_setting():
    with pytest.raises(UserError, match="change num_groups"):
        HyenaSE(num_channels=C, num_groups=7).init(jax.random.key(0), jnp.zeros((1, 2, C)))
    with pytest.raises(UserError, match="implementation 'cuda'"):
        HyenaLI(num_channels=C, implementation="cuda").init(jax.random.key(0), jnp.zeros((1, 2, C)))


def test_filters_count_what_they_multiply():
    """Taps that reach back over the start of a sequence do not count."""
    mr = HyenaMR(num_channels=1, num_groups=1)
    for length in (5, 128, 1000):
        taps = sum(min(t + 1, 128) for t in range(length)) / length
        assert mr.macs_per_token(length) == pytest.approx(taps + 3 * 3 + 2)
