"""Mamba-2 against the published models: whole networks with every gradient, and its minimal recurrence."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lcx.layers import RMSNorm
from lcx.mixers.mamba2 import Mamba2, gated_norm
from lcx.model import Block, Decoder, Mlp, Stage
from lcx.ops.linear_attention import LinearState, linear_attention
from tests.two_mamba_oracle import load

HIDDEN, STATE, LAYERS = 64, 128, 2


def mixer_params(read, num_heads, head_dim, mlp):
    """One layer's published parameters in our layout. in_proj has rows [gate | up | z | x | B | C | dt]."""
    heads, group = (num_heads, head_dim), (1, STATE)
    parts = {"gate": (mlp,), "up": (mlp,), "z": heads, "x": heads, "b": group, "c": group, "dt": (num_heads,)}
    rows = np.split(read("in_proj.weight"), np.cumsum([np.prod(shape) for shape in parts.values()])[:-1])
    out = {
        f"{name}_proj": {"kernel": w.T.reshape(HIDDEN, *shape)}
        for (name, shape), w in zip(parts.items(), rows, strict=True)
        if w.size
    }
    taps = np.split(read("conv1d.weight")[:, 0, ::-1], np.cumsum([num_heads * head_dim, STATE]))
    for name, w in zip("xbc", taps, strict=True):
        out[f"{name}_conv"] = w.reshape(*(heads if name == "x" else group), -1)
    out |= {"dt_bias": read("dt_bias"), "A_log": read("A_log"), "D": read("D").reshape(heads)}
    w = read("out_proj.weight").T
    out |= {
        "norm": read("norm.weight").reshape(heads),
        "out_proj": {"kernel": w[mlp:].reshape(*heads, HIDDEN)},
    }
    return out | ({"down_proj": {"kernel": w[:mlp]}} if mlp else {})


def model_params(file, prefix, sizes):
    def read(name):
        return file[f"{prefix}/{name}"]

    def layer(n):
        at = f"model.layers.{n}"
        return {
            "mixer": mixer_params(lambda name: read(f"{at}.self_attn.mamba_layer.{name}"), *sizes),
            "mlp": {
                f"{name}_proj": {"kernel": read(f"{at}.mlp.{name}_proj.weight").T}
                for name in ("gate", "up", "down")
            },
            "mixer_norm": {"scale": read(f"{at}.input_layernorm.weight")},
            "mlp_norm": {"scale": read(f"{at}.post_attention_layernorm.weight")},
        }

    return {
        "embed": {"embedding": read("model.embed_tokens.weight")},
        "lm_head": {"embedding": read("lm_head.weight")},
        "final_norm": {"scale": read("model.norm.weight")},
        "stages_0": {"block_0": jax.tree.map(lambda *x: np.stack(x), *(layer(n) for n in range(LAYERS)))},
    }


@pytest.mark.parametrize(
    ("name", "sizes"),
    [("model_mamba", (1, 16, 48)), ("model_mamba__d_ssm_full", (4, 16, 0))],
    ids=["one_head", "full"],
)
def test_logits_and_gradients_equal_the_published_model(reference, name, sizes):
    file = load(reference, name)
    num_heads, head_dim, mlp = sizes
    mixer = Mamba2(
        num_heads, head_dim, STATE, conv_size=2, conv_bias=False, skip_per_channel=True, mlp_size=mlp
    )
    block = Block(mixer=mixer, mlp=Mlp(128))
    model = Decoder(
        vocab_size=97, hidden_size=HIDDEN, stages=(Stage((block,), LAYERS),), max_position_embeddings=64
    )
    params = jax.tree.map(jnp.array, model_params(file, "param", sizes))

    def loss(params):
        logits = model.apply({"params": params}, jnp.array(file["input_ids"], jnp.int32))
        labels = jnp.array(file["labels"])
        nll = jax.nn.logsumexp(logits, axis=-1) - jnp.take_along_axis(logits, labels[..., None], -1)[..., 0]
        counts = labels != -100
        return jnp.sum(jnp.where(counts, nll, 0)) / jnp.sum(counts), logits

    (value, logits), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
    np.testing.assert_allclose(logits, file["logits"], atol=5e-5)
    np.testing.assert_allclose(value, file["loss"], rtol=1e-5)
    want = model_params(file, "grad", sizes)
    assert jax.tree.structure(grads) == jax.tree.structure(want)
    for (path, g), w in zip(jax.tree_util.tree_leaves_with_path(grads), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(g, w, rtol=1e-3, atol=1e-5, err_msg=jax.tree_util.keystr(path))


def test_the_operator_equals_the_minimal_recurrence(reference):
    """The published chunked SSD: outputs, final states, gradients through both, with and without an initial state."""
    file = load(reference, "mamba2_ssd_minimal")

    def run(x, a, b, c, state=None):
        return linear_attention(c, b, x, log_decay=a, initial_state=state, chunk_size=16)

    arrays = [jnp.array(file[name]) for name in ("Xdt", "Adt", "B", "C")]
    (y, state), pull = jax.vjp(run, *arrays)
    final = jnp.swapaxes(state.kv, 2, 3)
    np.testing.assert_allclose(y, file["Y"], atol=1e-5)
    np.testing.assert_allclose(final, file["final_state"], atol=1e-5)
    zeros = np.zeros(state.segment_ids.shape, jax.dtypes.float0)
    grads = pull((jnp.array(file["gY"]), LinearState(jnp.swapaxes(file["gfinal"], 2, 3), None, zeros)))
    for got, name in zip(grads, ("dXdt", "dAdt", "dB", "dC"), strict=True):
        np.testing.assert_allclose(got, file[name], atol=2e-5, rtol=1e-4, err_msg=name)
    before = LinearState(
        jnp.swapaxes(file["initial_state"][:, 0], 2, 3), None, jnp.ones_like(state.segment_ids)
    )
    y, state = run(*arrays, before)
    np.testing.assert_allclose(y, file["Y_init"], atol=1e-5)
    np.testing.assert_allclose(jnp.swapaxes(state.kv, 2, 3), file["final_state_init"], atol=1e-5)


def test_group_norm_is_over_a_groups_channels():
    """With one group, what RMSNorm does to all heads' channels together; with two, to each half."""
    x = jax.random.normal(jax.random.key(0), (1, 5, 4, 8))
    z = jax.random.normal(jax.random.key(1), x.shape)
    for groups in (1, 2):
        got = gated_norm(x, z, jnp.ones((4, 8)), num_groups=groups, eps=1e-5)
        parts = (x * jax.nn.silu(z)).reshape(1, 5, groups, -1)
        want = RMSNorm(parts.shape[-1]).apply({"params": {"scale": jnp.ones(parts.shape[-1])}}, parts)
        np.testing.assert_allclose(got.reshape(want.shape), want, atol=1e-6)
