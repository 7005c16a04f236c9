"""Gradients of parameters that every token uses: sums over all tokens, also where activations are bfloat16."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import meta

from lcx.layers import Embedding, Linear
from lcx.ops.short_conv import short_conv
from lcx.ops.tiling import scaled

T, D = 1 << 14, 8


def upstream(dtype):
    """Gradients [1, T, D] whose sum grows with T, exact in bfloat16."""
    x = np.random.default_rng(0).normal(1.0, 1.0, (1, T, D)).astype(np.float32)
    return jnp.asarray(x, jnp.bfloat16).astype(dtype)


def gradients(module, *args, narrow, **options):
    params = meta.unbox(module.init(jax.random.key(0), *args, **options))
    _, backward = jax.vjp(lambda params: module.apply(params, *args, **options), params)
    return jax.jit(backward)(upstream(narrow))[0]["params"]


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_gradients_of_an_embedding_are_summed_over_many_tokens(dtype):
    tokens = np.random.default_rng(1).integers(0, 4, (1, T)).astype(np.int32)
    found = gradients(Embedding(5, D), tokens, narrow=dtype, dtype=dtype)["embedding"]
    expected = np.zeros((5, D))
    np.add.at(expected, tokens[0], np.asarray(upstream("float32")[0], np.float64))
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, expected, rtol=1e-5)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_gradients_of_a_bias_are_summed_over_many_tokens(dtype):
    module = Linear((3,), (D,), ("embed", "mlp"), bias=True)
    found = gradients(module, jnp.ones((1, T, 3), dtype), narrow=dtype)["bias"]
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, np.asarray(upstream("float32"), np.float64).sum((0, 1)), rtol=1e-5)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_gradients_of_short_convolutions_are_summed_over_many_tokens(dtype):
    """Of the bias and of a skip, with a product behind them, which XLA merges into the sum."""
    weights, ones = jnp.ones((D, 2), dtype), jnp.ones((1, T, D), dtype)

    def weighted(bias, skip):
        y = scaled(short_conv(ones, weights, bias=bias, time_axis=1)[0], skip)
        return jnp.sum(y.astype(jnp.float32) * upstream("float32"))

    found = jax.jit(jax.grad(weighted, argnums=(0, 1)))(jnp.zeros(D), jnp.ones(D))
    exact = np.asarray(upstream("float32")[0], np.float64)
    np.testing.assert_allclose(found[0], exact.sum(0), rtol=1e-5)
    np.testing.assert_allclose(found[1], 2 * exact[1:].sum(0) + exact[0], rtol=1e-5)
