"""The cache of a layer with a window is a ring: the same answers as whole rows, in the memory of the window."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lcx.llama import llama
from lcx.model import init_params

T = 150
MODEL = llama(
    vocab_size=31,
    hidden_size=16,
    intermediate_size=24,
    num_layers=4,
    num_heads=2,
    max_position_embeddings=256,
    layer_windows=(20, 40, 20, 40),
)
RNG = np.random.default_rng(0)
SEGMENTS = np.ones((2, T), np.int32)
SEGMENTS[1, :37] = 0  # padding before the text
TOKENS = RNG.integers(1, 31, (2, T), np.int32)
POSITIONS = np.where(SEGMENTS > 0, np.cumsum(SEGMENTS, 1) - 1, 0).astype(np.int32)


@functools.cache
def whole():
    params = init_params(MODEL, jax.random.key(0))
    given = dict(positions=POSITIONS, segment_ids=SEGMENTS, method="hidden")
    x, _ = jax.jit(lambda params: MODEL.apply({"params": params}, TOKENS, **given))(params)
    return params, x


@functools.partial(jax.jit, donate_argnums=1)
def step(params, cache, tokens, positions, segment_ids):
    given = dict(positions=positions, segment_ids=segment_ids, cache=cache)
    return MODEL.apply({"params": params}, tokens, **given, method="hidden")


@pytest.mark.parametrize(
    "sizes", [[1] * T, [70, 1, 9, 70]], ids=["token by token", "in stretches"]
)
def test_the_same_as_whole_rows(sizes):
    """Stretches that end inside a ring and after several rounds, longer and shorter than the ring."""
    params, want = whole()
    cache, found, start = MODEL.init_cache(2, T), [], 0
    for size in sizes:
        new = slice(start, start + size)
        x, cache = step(params, cache, TOKENS[:, new], POSITIONS[:, new], SEGMENTS[:, new])
        found.append(x)
        start += size
    real = SEGMENTS[..., None] > 0
    np.testing.assert_allclose(
        jnp.where(real, jnp.concatenate(found, 1), 0), jnp.where(real, want, 0), atol=2e-5
    )


def test_slots_of_the_window():
    """20 keys need a ring of 32 slots, 40 one of 64; a shorter text is held as a whole."""

    def slots(length):
        cache = jax.eval_shape(lambda: MODEL.init_cache(1, length))
        return [cache["stages_0"][f"block_{i}"]["k"].shape[-2] for i in range(2)]

    assert slots(T) == [32, 64] and slots(48) == [32, 48] and slots(30) == [30, 30]
