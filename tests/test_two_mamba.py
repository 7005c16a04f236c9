"""2Mamba and its family against the published models: logits, loss, gradients, decoding, kernel."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from two_mamba_oracle import load, mixer_params, model_params, softmax_params, triangular

from lcx.errors import UserError
from lcx.mixers.two_mamba import PUBLISHED, TwoMamba, published
from lcx.model import Block, Decoder, Mlp, Stage, init_params
from lcx.ops.second_order_attention import second_order_attention

N, H, D, VOCAB = 4, 16, 64, 97  # of every saved model, with 2 layers and an mlp of 128
SQUARE = "squared__sm_norm__A_mask_type_neg_softplus__in_conv_k_2"
SAVED = [
    SQUARE,
    "exp__sm_norm__A_mask_type_neg_softplus__in_conv_k_2",
    "linear",
    "linear__output_norm__A_mask_type_neg_softplus__in_conv_k_2__dt_on_values",
    "softmax",
]


def decoder(name):
    mixer = published(name, num_heads=N, head_dim=H)
    block = Block(mixer=mixer, mlp=Mlp(128, parent=None), parent=None)
    return Decoder(VOCAB, D, (Stage((block,), 2),), max_position_embeddings=64, parent=None)


def to_ours(name):
    convert = softmax_params if name == "softmax" else mixer_params
    return lambda saved: convert(saved, N, H)


def assert_trees_close(got, want, **tolerance):
    paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(want)]
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for path, g, x in zip(paths, jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(g, x, err_msg=jax.tree_util.keystr(path), **tolerance)


@pytest.mark.parametrize("name", SAVED)
def test_logits_loss_and_gradients_equal_the_published_model(reference, name):
    saved, model = load(reference, f"model_{name}"), decoder(name)
    params = model_params(saved, "param", to_ours(name))
    tokens, labels = jnp.array(saved["input_ids"], jnp.int32), jnp.array(saved["labels"])

    def loss_of(params):
        logits = model.apply({"params": params}, tokens)
        log_p = jax.nn.log_softmax(logits)
        picked = jnp.take_along_axis(log_p, jnp.maximum(labels, 0)[..., None], axis=-1)[..., 0]
        counted = labels != -100
        return -jnp.sum(picked * counted) / jnp.sum(counted), logits

    (loss, logits), grads = jax.jit(jax.value_and_grad(loss_of, has_aux=True))(params)
    np.testing.assert_allclose(logits, saved["logits"], atol=5e-5)
    np.testing.assert_allclose(loss, saved["loss"], rtol=1e-5)
    assert_trees_close(grads, model_params(saved, "grad", to_ours(name)), rtol=1e-3, atol=1e-5)


def test_one_layer_equals_its_published_internals(reference):
    saved = load(reference, f"model_{SQUARE}")
    params = jax.tree.map(
        lambda x: x[0], model_params(saved, "param", to_ours(SQUARE))["stages_0"]["block_0"]
    )
    mixer = published(SQUARE, num_heads=N, head_dim=H)
    y, _ = jax.jit(mixer.apply)({"params": params["mixer"]}, saved["L0/input_layernorm.out"])
    np.testing.assert_allclose(y, saved["L0/o_proj.out"], atol=2e-5)


def test_decoding_equals_the_published_steps_and_states(reference):
    saved, model = load(reference, "infer_2mamba"), decoder(SQUARE)
    params = model_params(saved, "param", to_ours(SQUARE))

    @jax.jit
    def step(tokens, cache):
        x, cache = model.apply({"params": params}, tokens, cache=cache, method="hidden")
        return x[:, -1] @ params["lm_head"]["embedding"].T, cache

    tokens = jnp.array(saved["prompt"], jnp.int32)
    cache = model.init_cache(1, 32)
    for i, greedy in enumerate(saved["greedy_tokens"]):
        logits, cache = step(tokens, cache)
        np.testing.assert_allclose(logits[0], saved["step_logits"][i], atol=5e-5)
        assert int(jnp.argmax(logits)) == greedy
        tokens = jnp.array([[greedy]], jnp.int32)
        state = cache["stages_0"]["block_0"]
        for layer in range(2):
            if f"state_after_step{i}/L{layer}/hidden_num" not in saved:
                continue
            want = {
                key: saved[f"state_after_step{i}/L{layer}/hidden_{key}"] for key in ("conv", "num", "denom")
            }
            kv, k_sum = (np.array(x[layer]) for x in state["state"][:2])
            num = np.moveaxis(triangular(np.moveaxis(kv, 2, 3), H), 3, 2)
            np.testing.assert_allclose(num, want["num"], rtol=1e-4, atol=1e-5)
            np.testing.assert_allclose(triangular(k_sum, H)[..., None], want["denom"], rtol=1e-4, atol=1e-5)
            inputs = state["conv"].inputs[layer].reshape(1, 1, -1)
            np.testing.assert_allclose(inputs, want["conv"], atol=1e-5)


@pytest.mark.parametrize("form", ["tiles", "states"])
def test_the_operator_equals_the_published_kernel(reference, form):
    """The kernel's own products are TF32: hence its tolerance, that of the spread it showed against float64."""
    saved = load(reference, "kernel_2Mamba2Furious_square")
    q, k, v, d_out = (jnp.moveaxis(jnp.array(saved[name]), 1, 2) for name in ("q", "k", "v", "do"))
    a = jnp.moveaxis(jnp.array(saved["A"]), 1, 2)

    def f(q, k, v, a):
        scale = float(saved["sm_scale"])
        return second_order_attention(q, k, v, log_decay=a, scale=scale, form=form)[0]

    y, pull = jax.vjp(f, q, k, v, a)
    dq, dk, dv, da = pull(d_out)
    got = {"o": y, "dq": dq, "dk": dk, "dv": dv}
    for name, x in got.items():
        np.testing.assert_allclose(jnp.moveaxis(x, 2, 1), saved[name], rtol=1e-3, atol=5e-5, err_msg=name)
    want = np.cumsum(saved["dA_cumsum"][:, :, ::-1], axis=2)[:, :, ::-1]
    np.testing.assert_allclose(jnp.moveaxis(da, 2, 1), want, rtol=1e-3, atol=2e-4)


def test_every_published_name_builds_and_runs():
    mixers = {name: published(name, num_heads=2, head_dim=8) for name in (*PUBLISHED, "softmax", "mamba")}
    x = jax.random.normal(jax.random.key(0), (2, 11, 16))

    @jax.jit  # one program: many small ones take longer to compile
    def run_all(key, x):
        return {name: mixer.init_with_output(key, x)[0][0] for name, mixer in mixers.items()}

    for name, y in run_all(jax.random.key(1), x).items():
        assert y.shape == x.shape and bool(jnp.isfinite(y).all()) and float(jnp.std(y)) > 1e-3, name
        assert mixers[name].macs_per_token(128) > 0, name


def test_the_names_are_the_published_28_and_a_wrong_one_raises():
    assert len({*PUBLISHED, "softmax", "mamba"}) == 28
    different = {tuple(sorted(settings.items())) for settings in PUBLISHED.values()}
    assert len(different) == 25  # two spellings of one
    with pytest.raises(UserError, match="expected one of 'softmax', 'mamba', 'linear'"):
        published("cubed", num_heads=2, head_dim=8)


def test_settings_that_do_not_exist_raise():
    x = jnp.ones((1, 2, 16))
    with pytest.raises(UserError, match="score 'cube': expected one of 'linear', 'square', 'exp'"):
        TwoMamba(2, 8, score="cube").init(jax.random.key(0), x)
    with pytest.raises(UserError, match="set norm='scores'"):
        TwoMamba(2, 8, score="exp", norm="output").init(jax.random.key(0), x)
    with pytest.raises(UserError, match="TwoMamba.form 'chunks': expected 'tiles', 'states', 'recurrent' or None"):
        TwoMamba(2, 8, form="chunks").init(jax.random.key(0), x)
    with pytest.raises(UserError, match="score 'linear': only 'square' has forms; set form=None"):
        TwoMamba(2, 8, score="linear", form="tiles").init(jax.random.key(0), x)


def test_the_form_is_a_setting():
    x = jnp.array(np.random.default_rng(0).normal(size=(1, 40, 16)), jnp.float32)
    forms = {form: TwoMamba(2, 8, form=form) for form in ("tiles", "states")}
    params = forms["tiles"].init(jax.random.key(0), x)
    tiles, states = (jax.jit(lambda p, x, m=m: m.apply(p, x)[0])(params, x) for m in forms.values())
    np.testing.assert_allclose(tiles, states, atol=1e-5)
    text = {
        form: str(jax.make_jaxpr(lambda p, x, m=m: m.apply(p, x)[0])(params, x)) for form, m in forms.items()
    }
    assert text["tiles"] != text["states"]
    assert forms["states"].macs_per_token(10**6) == TwoMamba(2, 8).macs_per_token(10**6)
    assert forms["tiles"].macs_per_token(10**6) > 1000 * forms["states"].macs_per_token(10**6)


def test_a_new_model_is_drawn_as_the_published_one():
    """Uniform within 1 / sqrt(fan-in), as nn.Linear, in attention and MLP; the moments tell it from a normal one."""
    for name in ("softmax", "mamba"):
        model = decoder(name).clone(initialization="torch", parent=None)
        block = init_params(model, jax.random.key(0))["stages_0"]["block_0"]
        kernels = {"mlp": ("gate_proj", "down_proj"), "mixer": ("q_proj", "o_proj")}
        kernels["mixer"] = ("gate_proj", "out_proj") if name == "mamba" else kernels["mixer"]
        for part, names in kernels.items():
            for one in names:
                kernel = np.asarray(block[part][one]["kernel"])
                fan_in = {"down_proj": 128, "out_proj": H}.get(one, D)
                bound = fan_in**-0.5
                assert 0.97 * bound < np.abs(kernel).max() <= bound, one
                np.testing.assert_allclose(np.mean(kernel**2), bound**2 / 3, rtol=0.06, err_msg=one)
                np.testing.assert_allclose(np.mean(kernel**4), bound**4 / 5, rtol=0.1, err_msg=one)
    with pytest.raises(UserError, match="initialization is 'xavier', expected one of normal, torch"):
        decoder("softmax").clone(initialization="xavier", parent=None).check()


def test_positions_in_bfloat16_collapse_as_published():
    """The quirk equals the exact mixer at the positions that torch's bfloat16 leaves; below 256 it changes nothing."""
    exact, quirk = (
        published("softmax", num_heads=N, head_dim=H, bf16_positions=on).clone(parent=None) for on in (False, True)
    )
    x = jnp.asarray(np.random.default_rng(0).normal(size=(1, 700, D)), jnp.float32)
    params = exact.init(jax.random.key(0), x[:, :2])
    collapsed = torch.arange(700).to(torch.bfloat16).long().numpy()
    assert len(set(collapsed.tolist())) == 256 + 128 + 48
    got = jax.jit(lambda x: quirk.apply(params, x)[0])(x)
    plain = jax.jit(lambda x, places: exact.apply(params, x, positions=places)[0])
    np.testing.assert_allclose(got, plain(x, jnp.asarray(collapsed[None], jnp.int32)), atol=1e-5)
    other = np.asarray(plain(x, jnp.arange(700, dtype=jnp.int32)[None]))
    np.testing.assert_allclose(got[:, :257], other[:, :257], atol=1e-5)
    assert np.abs(np.asarray(got) - other)[:, 300:].max() > 1e-3
