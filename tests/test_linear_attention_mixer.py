"""The linear attention layer against the published one: feature maps, starts, outputs and gradients.

The published terraced window counts blocks from the end of a row; at multiples of the window that is the same.
"""

import functools
import json

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lcx.errors import UserError
from lcx.mixers.linear_attention import FeatureMap, LinearAttention, features
from lcx.ops.linear_attention import Window, linear_attention


def load(reference, name):
    with np.load(reference / "reference" / "lolcats" / f"{name}.npz") as file:
        return {key: file[key] for key in file.files}


def layer(file, kind):
    """The mixer and its parameters."""
    config, D = json.loads(str(file["cfg_json"])), 64
    N, K, H = config["heads"], config["kv_heads"], config["head_dim"]
    window = {} if kind is None else {"window_kind": kind}
    mixer = LinearAttention(N, K, H, window=config["window"] if kind else None, feature_dim=8, **window)
    params = {
        f"{name}_proj": {"kernel": file[f"w/{name}_proj.weight"].T.reshape(D, n, H)}
        for name, n in (("q", N), ("k", K), ("v", K))
    }
    params["o_proj"] = {"kernel": file["w/o_proj.weight"].T.reshape(N, H, D)}
    params |= {f"feature_map_{x}": {"layer": file[f"w/feature_map_{x}.mlp.layer"]} for x in "qk"}
    if kind:
        params["window_factors"] = file["w/window_factors"].reshape(N)
    return mixer, jax.tree.map(jnp.array, params)


CASES = [
    ("layer_hedgehog_linear", None, (32, 13)),
    ("layer_hybrid_sw", "sliding", (32, 27, 8, 1)),
    ("layer_hybrid_tk", "terraced", (32, 16)),
]


@pytest.mark.parametrize(("name", "kind", "lengths"), CASES, ids=lambda x: str(x))
def test_outputs_equal_the_published_layer(reference, name, kind, lengths):
    file = load(reference, name)
    mixer, params = layer(file, kind)
    for T in lengths:
        y, _ = jax.jit(mixer.apply)({"params": params}, jnp.array(file[f"T{T}/hidden_states"]))
        want = file[f"T{T}/infer/out"]
        np.testing.assert_allclose(y, want, atol=2e-5 * np.abs(want).max(), err_msg=f"T {T}")


@pytest.mark.parametrize(("name", "kind", "lengths"), CASES, ids=lambda x: str(x))
def test_gradients_equal_the_published_layer(reference, name, kind, lengths):
    """Of 1000 times the mean square of what separates linear from softmax attention, by heads."""
    file, T = load(reference, name), lengths[0]
    mixer, params = layer(file, kind)
    q, k, v, target = (jnp.swapaxes(file[f"T{T}/{x}"], 1, 2) for x in ("q", "k", "v", "train/y_true"))
    phi = FeatureMap(mixer.num_heads, mixer.head_dim, mixer.feature_dim)
    trained = {
        name: value for name, value in params.items() if "feature_map" in name or name == "window_factors"
    }

    def loss(params):
        window = None
        if kind:
            window = Window(kind, mixer.window, q, k, jax.nn.sigmoid(params["window_factors"]))
        fq, fk = (phi.apply({"params": params[f"feature_map_{n}"]}, x) for n, x in (("q", q), ("k", k)))
        y, _ = linear_attention(fq, fk, v, normalize=True, window=window)
        return 1000 * jnp.mean(jnp.square(y - target))

    value, grads = jax.jit(jax.value_and_grad(loss))(trained)
    at = f"T{T}/xent0_mse1000"
    np.testing.assert_allclose(value, file[f"{at}/loss"], rtol=2e-5)
    for n in "qk":
        want = file[f"{at}/grad/feature_map_{n}.mlp.layer"]
        np.testing.assert_allclose(grads[f"feature_map_{n}"]["layer"], want, atol=5e-5 * np.abs(want).max())
    if kind:
        want = file[f"{at}/grad/window_factors"].reshape(-1)
        np.testing.assert_allclose(grads["window_factors"], want, atol=5e-5 * np.abs(want).max())


def test_feature_maps_equal_the_published_ones(reference):
    file = load(reference, "feature_maps")
    for name, want in file.items():
        if not name.startswith("x"):
            activation, _, rest = name.rpartition("_full")
            x = jnp.array(file["x_large" if rest.endswith("large") else "x"])
            got = jax.jit(functools.partial(features, activation=activation, full_space=rest[0] == "1"))(x)
            np.testing.assert_allclose(got, want, rtol=2e-5, atol=1e-12, err_msg=name)


def test_parameters_start_as_published(reference):
    file = load(reference, "init_facts")

    def start(**settings):
        mixer = LinearAttention(4, 2, 16, feature_dim=8, window=8, **settings)
        return nn.meta.unbox(jax.jit(mixer.init)(jax.random.key(0), jnp.ones((1, 2, 64))))["params"]

    uniform = start()
    largest = np.abs(uniform["feature_map_q"]["layer"]).max()
    assert 0.97 * file["bound_pred_hd16_fd8"] < largest <= file["bound_pred_hd16_fd8"] * (1 + 1e-6)
    np.testing.assert_array_equal(uniform["feature_map_q"]["layer"], uniform["feature_map_k"]["layer"])
    np.testing.assert_allclose(jax.nn.sigmoid(uniform["window_factors"]), 0.1, rtol=1e-6)
    first = start(feature_init="identity", tied=True)
    np.testing.assert_array_equal(first["feature_map_q"]["layer"], file["zero_init_hd16_fd8"])
    assert "feature_map_k" not in first


def test_skip_and_adapter_start_as_the_identity():
    x = jax.random.normal(jax.random.key(0), (1, 3, 4, 8))
    want = features(x, "softmax_dim")
    for settings in ({"skip": True, "start": "identity"}, {"adapter": 5}):
        got, _ = jax.jit(FeatureMap(4, 8, 8, **settings).init_with_output)(jax.random.key(1), x)
        np.testing.assert_allclose(got, want, rtol=1e-6)


def test_mistakes_are_named():
    for settings, message in [
        ({"feature_map": "cosine"}, "expected one of softmax_dim"),
        ({"window_kind": "round"}, "expected one of sliding"),
        ({"skip": True}, "set feature_dim to it"),
        ({"window": 0}, "None for no window"),
        ({"num_heads": 3}, "multiple of num_kv_heads"),
    ]:
        mixer = LinearAttention(**{"num_heads": 4, "num_kv_heads": 2, "head_dim": 8} | settings)
        with pytest.raises(UserError, match=message):
            mixer.init(jax.random.key(0), jnp.ones((1, 2, 16)))
