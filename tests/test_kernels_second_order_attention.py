"""The kernels of second-order attention, interpreted, against the formula in float64: values and every gradient."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_checks import check, decay_and_runs

from kernels_pallas.second_order_attention import fold, obstacle, second_order_attention
from kernels_pallas.tiles import Tile, Tiles

PLATFORMS = ["gpu", "tpu"]
# B, T, N, K, H, mean log-decay (None: no decay; resets: hardly any or e^-95),
# documents, normalize, dtype, tile (None: the table's)
CASES = [
    (2, 257, 2, 1, 16, -2.0, True, True, "float32", 32),  # most tiles are skipped
    (1, 257, 2, 2, 16, -0.01, False, True, "float32", 64),  # none is
    (1, 257, 2, 1, 16, None, False, True, "float32", 64),
    (1, 100, 2, 2, 32, -0.1, False, False, "float32", None),
    (2, 63, 1, 1, 16, None, True, False, "float32", 16),
    (1, 1, 1, 1, 16, -0.5, True, True, "float32", 16),
    (2, 257, 2, 1, 64, -0.1, True, True, "bfloat16", 32),
    (1, 257, 1, 1, 16, "resets", False, True, "float32", 128),
]


def arrays(case, seed=0):
    B, T, N, K, H, mean, documents, _, dtype, _ = case
    rng = np.random.default_rng([T, seed])
    q, k, v, dy = (jnp.asarray(rng.normal(size=(B, T, n, H)), dtype) for n in (N, K, K, N))
    if (
        mean == "resets"
    ):  # a row that sees itself alone divides by its own score: not near 0, or dq has no digits
        k = k + q
    a, runs = decay_and_runs(rng, B, T, N, mean, documents)
    return q, k, v, a, runs, dy


def by_hand(q, k, v, a, runs, dy, normalize):
    """y and the gradients of sum(dy y) by q, k, v, a: float64, the formulas written out."""
    q, k, v, dy = (np.asarray(x, np.float64) for x in (q, k, v, dy))
    (B, T, N, H), K = q.shape, k.shape[2]
    keys, values = np.repeat(k, N // K, 2), np.repeat(v, N // K, 2)
    s = np.einsum("bind,bjnd->bnij", q, keys) / np.sqrt(H)
    M = np.broadcast_to(np.tril(np.ones((T, T))), s.shape)
    if a is not None:
        L = np.cumsum(np.swapaxes(np.asarray(a, np.float64), 1, 2), -1)
        M = M * np.exp(np.minimum(L[..., :, None] - L[..., None, :], 0))
    if runs is not None:
        runs = np.asarray(runs)
        M = M * (runs[:, None, :, None] == runs[:, None, None, :])
    W = s * s * M
    den = W.sum(-1, keepdims=True) if normalize else np.ones((B, N, T, 1))
    y = np.einsum("bnij,bjnd->bind", W / den, values)
    mean = np.einsum("bind,bind->bni", dy, y)[..., None] if normalize else 0
    dW = (np.einsum("bind,bjnd->bnij", dy, values) - mean) / den
    ds = 2 * s * M * dW / np.sqrt(H)
    dk, dv = np.einsum("bnij,bind->bjnd", ds, q), np.einsum("bnij,bind->bjnd", W / den, dy)
    dk, dv = (x.reshape(B, T, K, N // K, H).sum(3) for x in (dk, dv))
    dL = (W * dW).sum(-1) - (W * dW).sum(-2)
    da = np.flip(np.cumsum(np.flip(dL, -1), -1), -1)
    return y, np.einsum("bnij,bjnd->bind", ds, keys), dk, dv, np.swapaxes(da, 1, 2)


def tiles(platform, size):
    """Small ones; on GPU the streamed ones are a part of the held, differently in each pass."""
    if size is None:
        return None
    parts = (1, 2, 2) if platform == "gpu" else (1, 1, 1)
    return Tiles(*(Tile(size, size // part, 4, 1) for part in parts))


def attend(platform, normalize, size):
    return functools.partial(
        second_order_attention,
        normalize=normalize,
        platform=platform,
        interpret=True,
        tiles=tiles(platform, size),
    )


@pytest.mark.parametrize("platform", PLATFORMS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_values_and_gradients(platform, case):
    *_, normalize, dtype, size = case
    q, k, v, a, runs, dy = arrays(case)

    @jax.jit
    def run(q, k, v, a, dy):
        attention = attend(platform, normalize, size)
        y, back = jax.vjp(lambda q, k, v, a: attention(q, k, v, log_decay=a, runs=runs), q, k, v, a)
        return y, *back(dy)

    limit = 1e-5 if dtype == "float32" else 1e-2
    check(run(q, k, v, a, dy), by_hand(q, k, v, a, runs, dy, normalize), dtype, limit)


@pytest.mark.parametrize("platform", PLATFORMS)
def test_a_strong_decay_has_a_gradient_without_what_tokens_add_to_themselves(platform):
    """Which is 1e5 times what they add to others here, so that a difference of both would keep no digit of it."""
    _, k, v, a, _, dy = arrays((1, 40, 1, 1, 16, -0.1, False, False, "float32", 32))
    q, a, attention = 3 * k, a - 12, attend(platform, False, 32)
    _, back = jax.vjp(jax.jit(lambda a: attention(q, k, v, log_decay=a)), a)
    *_, expected = by_hand(q, k, v, a, None, dy, False)
    assert np.abs(back(dy)[0] - expected).max() < 1e-5 * np.abs(expected).max()


@pytest.mark.parametrize("platform", PLATFORMS)
def test_skips_what_the_decay_or_a_document_hides(platform):
    """Keys that cannot matter are never read: there they are NaN."""
    T, far = 256, 64
    q, k, v, *_ = arrays((1, T, 2, 2, 16, None, False, True, "float32", 32))
    decay = jnp.full((1, T, 2), -1.0)
    documents = jnp.asarray(np.arange(T) >= 128, jnp.int32)[None]
    attention = attend(platform, True, 32)
    poison = jnp.where(jnp.arange(T)[None, :, None, None] < far, jnp.nan, 0)
    for options in ({"log_decay": decay}, {"runs": documents}):
        run = jax.jit(lambda k, v, options=options: attention(q, k, v, **options))
        clean, poisoned = run(k, v), run(k + poison, v + poison)
        np.testing.assert_array_equal(poisoned[:, 128:], clean[:, 128:])
        assert np.isnan(poisoned[:, :far]).any()


def test_reach():
    """A decay of -1 a token reaches over 30 tokens, wherever in the row, in chunks of 16: 2 or 3 chunks back."""
    k = jnp.zeros((1, 256, 1, 16))
    _, reach = fold(k, jnp.full((1, 1, 256), -1.0), None, 1, 16)
    np.testing.assert_array_equal(reach.first[0, 0], np.maximum(np.arange(16) - 2, 0))
    np.testing.assert_array_equal(reach.last[0, 0], np.minimum(np.arange(16) + 2, 15))
    runs = jnp.asarray(np.arange(256) // 40, jnp.int32)[None]
    _, reach = fold(k, None, runs, 1, 16)
    begins = (
        np.arange(0, 256, 16) // 40 * 40 // 16
    )  # the chunk where the document of a chunk's first token begins
    np.testing.assert_array_equal(reach.first[0, 0], begins)


@pytest.mark.parametrize("platform", PLATFORMS)
def test_a_decay_of_minus_infinity_is_a_new_document(platform):
    q, k, v, _, runs, dy = arrays((1, 100, 1, 1, 16, None, True, True, "float32", 32), seed=1)
    begins = np.diff(np.asarray(runs), axis=1, prepend=0) > 0
    a = jnp.where(jnp.asarray(begins)[..., None], -jnp.inf, 0.0)

    @jax.jit
    def run(a):
        return jax.value_and_grad(lambda a: jnp.sum(dy * attend(platform, True, 32)(q, k, v, log_decay=a)))(a)

    y, *_ = by_hand(q, k, v, None, runs, dy, True)
    value, gradient = run(a)
    np.testing.assert_allclose(value, np.sum(np.asarray(dy) * y), rtol=1e-5)
    assert np.isfinite(gradient).all()


def test_rows_of_zeros_give_zeros():
    q, k, v, *_ = arrays((1, 64, 1, 1, 16, None, False, True, "float32", 32))
    gradient = jax.grad(lambda q: jnp.sum(attend("gpu", True, 32)(q, k, v)))(q.at[:, 5].set(0))
    assert not attend("gpu", True, 32)(q.at[:, 5].set(0), k, v)[:, 5].any()
    assert not gradient[:, 5].any() and np.isfinite(gradient).all()


def test_obstacles():
    def why(H=64, dtype=jnp.bfloat16, other=None, platform="gpu", state=None):
        x = jax.ShapeDtypeStruct((1, 128, 2, H), dtype)
        return obstacle(x, x, x if other is None else other, platform=platform, initial_state=state)

    assert why() is None and why(H=128) is None and why(H=128, dtype=jnp.float32, platform="tpu") is None
    assert "[16, 32, 64]" in why(H=128, dtype=jnp.float32)
    assert "24" in why(H=24) and "float16" in why(dtype=jnp.float16)
    assert "initial state" in why(state=())
    assert "head sizes" in why(other=jax.ShapeDtypeStruct((1, 128, 2, 32), jnp.bfloat16))
