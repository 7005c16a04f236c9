"""Prefill in two stretches and a decoded token on several devices, whatever is split over them.

Over `context` a stretch of 9 tokens lies on 8 devices, two on each of the first four, one on the fifth.
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lcx import mixers, sharding
from lcx.mixers.attention import Attention
from lcx.mixers.hyena import HyenaLI, HyenaMR
from lcx.mixers.latent_attention import LatentAttention
from lcx.mixers.linear_attention import LinearAttention
from lcx.mixers.mamba2 import Mamba2
from lcx.mixers.two_mamba import TwoMamba

MIXERS = {
    "attention": Attention(4, 2, 8, window=11),
    "latent_attention": LatentAttention(4, 6, 5, 4, 3, q_lora_rank=8),
    "two_mamba_exp": TwoMamba(4, 8, score="exp"),
    "terraced": LinearAttention(4, 2, 8, window=5, feature_dim=6),
    "affine": LinearAttention(4, 2, 8, window=5, feature_dim=6, affine=True),
    "sliding": LinearAttention(4, 2, 8, window=5, window_kind="sliding", feature_dim=6),
    "mamba2": Mamba2(4, 8, 8),
    "two_mamba": TwoMamba(4, 8),
    "hyena_mr": HyenaMR(num_channels=16, num_groups=4),
    "hyena_li": HyenaLI(num_channels=16),
    "published": LinearAttention(4, 2, 8, window=5, feature_dim=6, published_quirks=True),
}


TENSOR = [{"fsdp": 4, "tensor": 2}, {"fsdp": 2, "tensor": 4}]
CONTEXT = [{"fsdp": 1, "context": 8}]
BOTH = (
    "attention",
    "latent_attention",
    "two_mamba_exp",
    "terraced",
)  # the others are tested with tensor elsewhere, or read whole prompts
ON = {name: TENSOR + CONTEXT if name in BOTH else CONTEXT for name in MIXERS}
ON |= {"published": TENSOR[:1], "affine": TENSOR[1:]}  # as many key heads as devices, and fewer


@pytest.mark.parametrize("name", MIXERS)
def test_prefill_and_decode_are_those_of_one_device(name):
    """The first row holds two documents, the second ends with padding: its decoded token follows the one before it."""
    mixer = MIXERS[name]
    x = jax.random.normal(jax.random.key(0), (2, 19, 16))
    boxed = jax.jit(mixer.init)(jax.random.key(1), x)["params"]
    segments = jnp.array([[1] * 7 + [2] * 12, [1] * 14 + [0] * 4 + [1]])
    positions = jnp.array([[*range(7), *range(12)], [*range(14), 0, 0, 0, 0, 14]])
    if mixers.whole_prompt(mixer):
        segments, positions = jnp.ones((2, 19), jnp.int32), jnp.tile(jnp.arange(19), (2, 1))

    def stretch(params, cache, at):
        x, segments, positions = at
        y, cache = mixer.apply({"params": params}, x, positions=positions, segment_ids=segments, cache=cache)
        return cache, jnp.where(segments[..., None] != 0, y, 0)

    def stretches(params, x):
        rows, cache = (x, segments, positions), mixer.init_cache(2, 19, jnp.float32)
        length = 18 if mixers.whole_prompt(mixer) else 9
        cuts = jax.tree.map(lambda row: jnp.stack(jnp.split(row[:, :18], 18 // length, axis=1)), rows)
        # Equal stretches are one program.
        cache, prefilled = jax.lax.scan(functools.partial(stretch, params), cache, cuts)
        _, decoded = stretch(params, cache, jax.tree.map(lambda row: row[:, 18:], rows))
        return [*prefilled, decoded]

    expected = jax.jit(stretches)(nn.meta.unbox(boxed), x)
    for sizes in ON[name]:
        mesh = sharding.make_mesh(**sizes)
        with jax.set_mesh(mesh):
            placed = jax.device_put(nn.meta.unbox(boxed), sharding.tree_shardings(boxed, mesh))
            found = jax.jit(stretches)(placed, x)
        for a, b in zip(found, expected, strict=True):
            np.testing.assert_allclose(a, b, atol=2e-5 * np.abs(b).max())
