"""The kernels of attention with a decay, interpreted, against the formula in float64 numpy: values, every gradient."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_checks import check, decay_and_runs

from kernels_pallas import attention_gpu, attention_tpu
from kernels_pallas.attention import Options, attention, bias, obstacle
from kernels_pallas.attention_plan import Cotangent
from kernels_pallas.tiles import Tile, Tiles, square

# B, T, N, K, H, mean log-decay (None: no decay; resets: hardly any or e^-95),
# documents, dtype, tile (None: the table's)
CASES = [
    (2, 257, 2, 1, 16, -2.0, True, "float32", 32),  # skips
    (1, 100, 2, 2, 16, None, False, "float32", None),
    (1, 63, 2, 1, 24, None, True, "float32", 16),  # padded heads
    (1, 1, 1, 1, 16, -0.5, False, "float32", 16),
    (1, 257, 1, 1, 16, "resets", False, "float32", 128),
    (2, 257, 2, 1, 32, -0.1, True, "bfloat16", 64),
]


def arrays(case):
    B, T, N, K, H, mean, documents, dtype, _ = case
    rng = np.random.default_rng(T)
    q, k, v, dy = (rng.normal(size=(B, T, n, H)).astype(jnp.dtype(dtype)) for n in (N, K, K, N))
    a, runs = decay_and_runs(rng, B, T, N, mean, documents)
    return q, k, v, a, runs, dy


def by_hand(q, k, v, a, runs, dy):
    """y and the gradients of sum(dy y) by q, k, v, a: float64, the formulas written out."""
    q, k, v, dy = (np.asarray(x, np.float64) for x in (q, k, v, dy))
    (B, T, N, H), K = q.shape, k.shape[2]
    keys, values = np.repeat(k, N // K, 2), np.repeat(v, N // K, 2)
    z = np.einsum("bind,bjnd->bnij", q, keys) / np.sqrt(H)
    seen = np.tril(np.ones((T, T), bool))
    if a is not None:
        L = np.cumsum(np.swapaxes(np.asarray(a, np.float64), 1, 2), -1)
        z = z + L[..., :, None] - L[..., None, :]
    if runs is not None:
        seen = seen & (np.asarray(runs)[:, None, :, None] == np.asarray(runs)[:, None, None, :])
    z = np.where(seen, z, -np.inf)
    P = np.exp(z - z.max(-1, keepdims=True))
    P /= P.sum(-1, keepdims=True)
    y = np.einsum("bnij,bjnd->bind", P, values)
    ds = P * (np.einsum("bind,bjnd->bnij", dy, values) - np.einsum("bind,bind->bni", dy, y)[..., None])
    dq = np.einsum("bnij,bjnd->bind", ds, keys) / np.sqrt(H)
    dk, dv = np.einsum("bnij,bind->bjnd", ds, q) / np.sqrt(H), np.einsum("bnij,bind->bjnd", P, dy)
    dk, dv = (x.reshape(B, T, K, N // K, H).sum(3) for x in (dk, dv))
    da = np.flip(np.cumsum(np.flip(ds.sum(-1) - ds.sum(-2), -1), -1), -1)
    return y, dq, dk, dv, np.swapaxes(da, 1, 2)


@pytest.mark.parametrize("platform", ["gpu", "tpu"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_values_and_gradients(platform, case):
    *_, dtype, size = case
    q, k, v, a, runs, dy = arrays(case)
    parts = (
        (1, 2, 2) if platform == "gpu" else (1, 1, 1)
    )  # on GPU the streamed tiles are a part of the held ones
    tiles = size and Tiles(*(Tile(size, size // part, 4, 1) for part in parts))
    attend = functools.partial(attention, platform=platform, interpret=True, tiles=tiles)

    @jax.jit
    def run(q, k, v, a, dy):
        y, back = jax.vjp(lambda q, k, v, a: attend(q, k, v, log_decay=a, runs=runs), q, k, v, a)
        return y, *back(dy)

    limit = 1e-5 if dtype == "float32" else 1e-2
    check(run(q, k, v, a, dy), by_hand(q, k, v, a, runs, dy), dtype, limit)


def test_a_strong_decay_has_a_gradient_without_what_tokens_add_to_themselves():
    """Which is rounding alone, and on GPU not the same in the two backward passes, whose products have other shapes."""
    q, k, v, a, _, dy = arrays((1, 129, 1, 1, 64, -0.1, False, "float32", None))
    a = a - 17  # the gradients are below 1e-5
    attend = functools.partial(
        attention, platform="gpu", interpret=True
    )  # in passes of 128 x 32 and 128 x 16
    _, back = jax.vjp(jax.jit(lambda a: attend(q, k, v, log_decay=a)), a)
    *_, expected = by_hand(q, k, v, a, None, dy)
    assert np.abs(back(dy)[0] - expected).max() < 1e-5 * np.abs(expected).max()


@pytest.mark.parametrize("kernels", [attention_gpu, attention_tpu])
def test_no_pass_sums_what_a_token_adds_to_itself(kernels):
    """Documents of one token have nothing else, here with a mean that does not cancel it."""
    q, k, v, a, _, dy = arrays((1, 32, 1, 1, 16, -0.1, False, "float32", 16))
    runs, zeros = jnp.arange(32)[None], jnp.zeros((1, 1, 32))
    options = Options(scale=1.0, platform=kernels.__name__[-3:], interpret=True, tiles=square(16))
    biases, reach = bias(q, k, jnp.swapaxes(a, 1, 2), runs, options, 16)
    arguments = (
        q,
        k,
        v,
        Cotangent(dy, zeros, zeros, zeros),
        biases,
        reach,
        runs,
        options,
        Tile(16, 16, 4, 1),
    )
    (_, row), (*_, dv, column) = kernels.backward_dq(*arguments), kernels.backward_dkv(*arguments)
    assert np.abs(dv).min() > 0 and not np.any(row) and not np.any(column)


def test_skipping_allows_for_the_scores():
    """A far key whose score outweighs a decay of e^-64 is still seen, and one past the bound is not."""
    T, C = 256, 16
    q, k, v = np.zeros((3, 1, T, 1, 16), np.float32)
    q[..., 0], k[:, 0, :, 0], v[:, 0] = 10.0, 10.0, 1.0
    decay = jnp.full((1, T, 1), -1.0)
    options = Options(scale=1.0, platform="tpu", interpret=True, tiles=square(C))

    @jax.jit
    def reach_of(q, k):
        return bias(q, k, jnp.swapaxes(decay, 1, 2), None, options, C)[1].first

    first = reach_of(q, k)  # |q| |k| = 100: sees 230 tokens
    np.testing.assert_array_equal(first[0, 0], np.maximum(np.arange(16) - 15, 0))
    settings = {"scale": 1.0, "platform": "tpu", "interpret": True, "tiles": square(C)}
    y = jax.jit(functools.partial(attention, log_decay=decay, **settings))(q, k, v)
    weight = 1 / (1 + np.exp(64 - 100) * np.sum(np.exp(-np.arange(64.0))))
    np.testing.assert_allclose(y[0, 64, 0], weight, rtol=1e-5)
    first = reach_of(q / 10, k / 20)  # 0.5: sees 31 tokens
    np.testing.assert_array_equal(first[0, 0], np.maximum(np.arange(16) - 2, 0))


def test_obstacles():
    x = jax.ShapeDtypeStruct((1, 128, 2, 64), jnp.bfloat16)
    assert obstacle(x, x, x, platform="gpu") is None
    assert "cache" in obstacle(jax.ShapeDtypeStruct((1, 1, 2, 64), jnp.bfloat16), x, x, platform="gpu")
    wide, odd = (jax.ShapeDtypeStruct((1, 128, 2, H), jnp.bfloat16) for H in (136, 96))
    assert obstacle(odd, odd, odd, platform="tpu") is None
    assert "136" in obstacle(wide, wide, wide, platform="tpu")
