"""Prefill and a decoded token on several devices, also where there are more of them than kv heads."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lcx import sharding
from lcx.mixers.attention import Attention
from lcx.mixers.linear_attention import LinearAttention
from lcx.mixers.two_mamba import TwoMamba

MIXERS = {
    "attention": Attention(4, 2, 8, window=11),
    "two_mamba_exp": TwoMamba(4, 8, score="exp"),
    "terraced": LinearAttention(4, 2, 8, window=5, feature_dim=6),
    "affine": LinearAttention(4, 2, 8, window=5, feature_dim=6, affine=True),
    "published": LinearAttention(4, 2, 8, window=5, feature_dim=6, published_quirks=True),
}


@pytest.mark.parametrize("mixer", MIXERS.values(), ids=MIXERS)
def test_prefill_and_decode_are_those_of_one_device(mixer):
    x = jax.random.normal(jax.random.key(0), (2, 18, 16))
    boxed = jax.jit(mixer.init)(jax.random.key(1), x)["params"]

    def two_pieces(params, x):
        y, cache = mixer.apply({"params": params}, x[:, :-1], cache=mixer.init_cache(2, 18, jnp.float32))
        return y, mixer.apply({"params": params}, x[:, -1:], cache=cache)[0]

    expected = jax.jit(two_pieces)(nn.meta.unbox(boxed), x)
    for tensor in (2, 4):
        mesh = sharding.make_mesh(fsdp=8 // tensor, tensor=tensor)
        with jax.set_mesh(mesh):
            placed = jax.device_put(nn.meta.unbox(boxed), sharding.tree_shardings(boxed, mesh))
            found = jax.jit(two_pieces)(placed, x)
        for a, b in zip(found, expected, strict=True):
            np.testing.assert_allclose(a, b, atol=2e-5 * np.abs(b).max())
