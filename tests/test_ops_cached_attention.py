"""A few new tokens over a cache equal the last rows of attention over everything, formed in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_ops_attention import arrays, numpy_attention

from lcx.mixers import kv_cache
from lcx.mixers.attention import Attention
from lcx.mixers.two_mamba import TwoMamba
from lcx.model import Block, Decoder, Mlp, Stage

SLOTS = 128


def filled(k, v, ids, a, length, dtype=jnp.float32):
    """A cache of SLOTS with the first `length` tokens of [B, S, ...] in it, written in two pieces."""
    B, _, K, H = k.shape
    cache = kv_cache.empty(B, SLOTS, K, H, dtype)
    if a is not None:
        cache["log_decay"] = jnp.zeros((B, a.shape[2], SLOTS))
    for piece in (slice(0, length // 3), slice(length // 3, length)):
        rows = (None if x is None else jnp.asarray(x[:, piece]) for x in (k, v, ids, a))
        cache = kv_cache.append(cache, kv_cache.entries(*rows))
    return cache


@pytest.mark.parametrize(
    "heads, window, segmented, decays",
    [
        ((4, 2), None, True, False),
        ((4, 1), 17, False, False),
        ((2, 2), None, True, True),
        ((4, 2), 30, True, True),
    ],
)
@pytest.mark.parametrize("T", [1, 7])
def test_equals_the_last_rows_of_the_whole(T, heads, window, segmented, decays, monkeypatch):
    """With slots to spare, documents that end in the cache, and padding inside it; whole, and in chunks of a layer."""
    (N, K), B, S, H = heads, 2, 100, 16
    q, k, v, w, ids = arrays(B, S, N, K, H, segmented)
    ids = np.ones((B, S), np.int32) if ids is None else np.array(ids)
    if segmented:  # the last rows belong to a document that begins in the cache
        ids[:, S - S // 5 :] = 3
        ids[0, :9], ids[1, S - 2] = 0, 0
    a = np.random.default_rng(3).uniform(-0.3, 0, (B, S, N)).astype(np.float32) if decays else None
    left_out = None if a is None else np.where(ids[..., None] != 0, a, 0)
    expected = numpy_attention(q, k, v, w, ids, window, left_out)[0][:, S - T :]

    @jax.jit
    def run(q, k, v, ids, a):
        cache = filled(k, v, ids, a, S - T)
        new = kv_cache.entries(*(None if x is None else x[:, S - T :] for x in (k, v, ids, a)))
        alone = kv_cache.attend(cache, q[:, S - T :], new, window=window)
        if decays:
            return [alone]
        # The last of three chunks overlaps the second.
        monkeypatch.setattr("lcx.ops.cached_attention._chunk_slots", lambda numbers: 48)
        stacked = {name: jnp.stack([jnp.ones_like(x), x]) for name, x in cache.items()}
        layer = kv_cache.LayerOf(stacked, jnp.int32(1))
        return [alone, kv_cache.attend(layer, q[:, S - T :], new, window=window)]

    for got in run(q, k, v, ids, a):
        np.testing.assert_allclose(got, expected, atol=2e-6, rtol=2e-5)


def test_bfloat16_is_near():
    (q, k, v, w, _), ids = (
        arrays(2, 100, 4, 2, 16, False),
        np.repeat([[1], [2]], 100, axis=1).astype(np.int32),
    )
    expected = numpy_attention(q, k, v, w, ids, None)[0][:, -1:]
    low = [jnp.asarray(x, jnp.bfloat16) for x in (q, k, v)]
    cache = filled(*low[1:], ids, None, 99, jnp.bfloat16)
    new = kv_cache.entries(low[1][:, 99:], low[2][:, 99:], jnp.asarray(ids[:, 99:]))
    got = kv_cache.attend(cache, low[0][:, 99:], new)
    assert got.dtype == jnp.bfloat16
    assert np.linalg.norm(np.asarray(got, np.float32) - expected) < 1e-2 * np.linalg.norm(expected)


def test_a_token_that_sees_nothing_gives_nothing():
    q, k, v, _, _ = arrays(1, 4, 2, 2, 16, False)
    cache = kv_cache.empty(1, SLOTS, 2, 16, jnp.float32)
    new = kv_cache.entries(*(jnp.asarray(x) for x in (k, v)), jnp.array([[0, 1, 1, 0]]))
    got = np.asarray(kv_cache.attend(cache, jnp.asarray(q), new))
    assert not got[0, [0, 3]].any() and np.allclose(got[0, 1], v[0, 1], atol=1e-6)


@pytest.mark.parametrize(
    "mixer",
    [Attention(4, 2, 16), TwoMamba(2, 16, score="exp")],
    ids=["attention", "two_mamba_exp"],
)
def test_decoding_holds_no_second_cache(mixer):
    """A compiled loop over tokens needs, beside the caches of 8 layers that it updates in place, about one layer's."""
    block = Block(mixer, Mlp(32, parent=None), parent=None)
    model = Decoder(64, 32, (Stage((block,), 8),), 4096, parent=None)
    params = jax.eval_shape(lambda: model.init(jax.random.key(0), model.example())["params"])
    cache = jax.eval_shape(lambda: model.init_cache(1, 4096))

    def decode(params, tokens, cache):
        def step(_, carry):
            x, cache = model.apply({"params": params}, carry[0], cache=carry[1], method="hidden")
            return jnp.argmax(x, -1).astype(jnp.int32), cache

        return jax.lax.fori_loop(0, 3, step, (tokens, cache))

    token = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    memory = jax.jit(decode, donate_argnums=2).lower(params, token, cache).compile().memory_analysis()
    held = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(cache))
    assert memory.temp_size_in_bytes < held / 3, (memory.temp_size_in_bytes, held)
