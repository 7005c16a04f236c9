"""The state form of second-order attention as kernels, interpreted, against the formula in float64 numpy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_checks import NAMES, assert_no_bit_differs, changed, check
from test_kernels_second_order_attention import arrays, by_hand

from kernels_pallas import second_order_either, second_order_states
from kernels_pallas.second_order_attention_plan import TILES
from kernels_pallas.second_order_states import obstacle, second_order_attention
from kernels_pallas.second_order_states_plan import SIZES, Sizes
from kernels_pallas.tiles import Tile, Tiles
from lcx.ops import dispatch, segments
from lcx.ops.second_order_attention import empty_state
from lcx.ops.second_order_attention import second_order_attention as operator

PLATFORMS = ["gpu", "tpu"]
# B, T, N, K, H, mean log-decay (None: no decay; resets: hardly any or e^-95), documents, normalize, dtype, block
CASES = [
    (2, 257, 2, 1, 16, -0.1, True, True, "float32", 8),
    (1, 100, 1, 1, 32, None, False, True, "float32", 16),
    (1, 63, 2, 2, 16, -0.02, True, False, "float32", 16),
    (1, 1, 1, 1, 16, None, False, True, "float32", 8),
    (1, 130, 1, 1, 32, -0.02, True, True, "bfloat16", 16),
    (1, 257, 1, 1, 16, "resets", False, True, "float32", 8),
]


def small(platform, block, chunk=64):
    """Several chunks in a short row, and several tiles in a chunk."""
    gpu = platform == "gpu"
    parts, walk = ((1, 2, 2), Tile(4, 16, 4, 1)) if gpu else ((1, 1, 1), Tile(8, 32))
    tiles = Tiles(*(Tile(32, 32 // part, 4, 1) for part in parts))
    return {
        "tiles": tiles,
        "sizes": Sizes(chunk, block, walk, Tile(32, 8, 4, 1), Tile(32, 8, 4, 1)),
        "platform": platform,
        "interpret": True,
    }


@pytest.mark.parametrize("platform", PLATFORMS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_values_and_gradients(platform, case):
    *_, normalize, dtype, block = case
    q, k, v, a, runs, dy = arrays(case)

    @jax.jit
    def run(q, k, v, a, dy):
        def attend(q, k, v, a):
            settings = small(platform, block, chunk=64 if len(q[0]) > 100 else 32)
            return second_order_attention(q, k, v, log_decay=a, runs=runs, normalize=normalize, **settings)[0]

        y, back = jax.vjp(attend, q, k, v, a)
        return y, *back(dy)

    limit, found = 1e-4 if dtype == "float32" else 1e-2, run(q, k, v, a, dy)
    check(found, by_hand(q, k, v, a, runs, dy, normalize), dtype, limit)
    if case is CASES[0]:  # no bit of a document depends on another one
        mine = np.asarray(runs == 1)
        assert_no_bit_differs(found, run(*changed(mine, q, k, v, a, dy)), ~mine)


@pytest.mark.parametrize("platform", PLATFORMS)
def test_a_state_comes_in_and_goes_out(platform):
    """Against the operator's definition: values, states, and the gradients by and through both."""
    B, T, N, K, H = 2, 70, 2, 1, 32
    rng = np.random.default_rng(0)

    def normal(*shape):
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    q, k, v, a = normal(B, T, N, H), normal(B, T, K, H), normal(B, T, K, H), -0.05 * jnp.abs(normal(B, T, N))
    before = normal(B, 20, N, H), normal(B, 20, K, H), normal(B, 20, K, H)
    old = jnp.asarray([[1] * 20, [2] * 20])
    ids = jnp.asarray([[1] * 40 + [2] * 30, [3] * T])  # the second row's state is another document's
    of_prompt = functools.partial(operator, segment_ids=old, implementation="reference")
    _, state = jax.jit(of_prompt)(*before)

    def definition(q, k, v, a, kv, k_sum):
        initial = state._replace(kv=kv, k_sum=k_sum)
        y, after = operator(
            q, k, v, log_decay=a, segment_ids=ids, initial_state=initial, implementation="reference"
        )
        return y, after.kv, after.k_sum

    def kernel(q, k, v, a, kv, k_sum):
        runs = segments.runs(ids, state.segment_ids)
        settings = small(platform, 16, chunk=32)
        y, after = second_order_attention(
            q, k, v, log_decay=a, runs=runs, initial_state=(kv, k_sum), **settings
        )
        return y, *after

    cotangents = normal(B, T, N, H), normal(*state.kv.shape), normal(*state.k_sum.shape)

    def both(f):
        def run(*xs):
            out, back = jax.vjp(f, *xs)
            return *out, *back(cotangents)

        return jax.jit(run)(q, k, v, a, state.kv, state.k_sum)

    for found, right in zip(both(kernel), both(definition), strict=True):
        assert found.shape == right.shape
        assert np.abs(found - right).max() < 2e-5 * np.abs(right).max()


def test_either_form_in_one_program(monkeypatch):
    """Several chunks, so that the two forms do not come to the same kernels."""
    case = (1, 130, 2, 1, 16, -0.1, True, True, "float32", None)
    q, k, v, a, runs, dy = arrays(case)
    kind = "gpu", 4, 16
    monkeypatch.setitem(SIZES, kind, small("gpu", 8)["sizes"])
    monkeypatch.setitem(TILES, kind, small("gpu", 8)["tiles"])

    @jax.jit
    def run(short, q, k, v, a, dy):
        named = {"short_reach": short, "scale": 0.25, "platform": "gpu", "interpret": True}
        attend = functools.partial(second_order_either.second_order_attention, runs=runs, **named)
        y, back = jax.vjp(lambda q, k, v, a: attend(q, k, v, log_decay=a), q, k, v, a)
        return y, *back(dy)

    by_tiles, by_states = (run(jnp.array(short), q, k, v, a, dy) for short in (True, False))
    assert any((x != y).any() for x, y in zip(by_tiles, by_states, strict=True))
    expected = by_hand(q, k, v, a, runs, dy, True)
    for name, *found, right in zip(NAMES, by_tiles, by_states, expected, strict=True):
        for x in found:
            assert np.abs(x - right).max() < 1e-4 * np.abs(right).max(), name


@pytest.mark.parametrize("platform", PLATFORMS)
def test_the_operator_reads_a_prompt_in_pieces(platform, monkeypatch):
    """As one piece, with documents and padding across the cut; the state then serves a step of decoding."""
    B, T, N, H, cut = 1, 90, 2, 16, 45
    rng = np.random.default_rng(1)
    q, k, v = (jnp.asarray(rng.normal(size=(B, T, N, H)), jnp.float32) for _ in range(3))
    a = jnp.asarray(-rng.uniform(0, 0.1, (B, T, N)), jnp.float32)
    ids = jnp.asarray([[1] * 30 + [0] * 4 + [2] * (T - 40) + [0] * 6])
    definition = jax.jit(functools.partial(operator, implementation="reference"))
    expected, right = definition(q, k, v, log_decay=a, segment_ids=ids)
    kernel = functools.partial(second_order_attention, **{**small(platform, 16), "platform": platform})
    monkeypatch.setattr(dispatch, "platform", lambda: platform)
    monkeypatch.setattr(
        second_order_states, "second_order_attention", lambda *xs, platform, **options: kernel(*xs, **options)
    )
    named = {"form": "states", "implementation": {"gpu": "triton", "tpu": "tpu"}[platform]}
    read = jax.jit(functools.partial(operator, **named))
    ys, state = [], empty_state(B, N, H)
    for piece in (slice(0, cut), slice(cut, T)):
        y, state = read(
            *(x[:, piece] for x in (q, k, v)),
            log_decay=a[:, piece],
            segment_ids=ids[:, piece],
            initial_state=state,
        )
        ys.append(y)
    np.testing.assert_allclose(jnp.concatenate(ys, axis=1), expected, rtol=2e-5, atol=2e-5)
    assert state.segment_ids == right.segment_ids == 2
    np.testing.assert_allclose(state.kv, right.kv, rtol=2e-5, atol=2e-5)
    np.testing.assert_allclose(state.k_sum, right.k_sum, rtol=2e-5, atol=2e-5)


def test_obstacles():
    x = jax.ShapeDtypeStruct((1, 128, 2, 128), jnp.float32)
    assert "[16, 32, 64]" in obstacle(x, x, x, platform="gpu")
    assert obstacle(x, x, x, platform="tpu") is None
    assert set(SIZES) == set(TILES)
