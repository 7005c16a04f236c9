"""The convolutions' kernels, interpreted on a CPU, against the formulas in float64: values and every gradient."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas import backends
from kernels_pallas.fir_conv import fir_conv, obstacle
from kernels_pallas.short_conv import short_conv

PLATFORMS = ["gpu", "tpu"]
MOSAIC = pytest.mark.skipif(bool(backends.missing("mosaic")), reason="jax < 0.11")
NAMES = ["x1", "x2", "v", "h", "skip", "bias", "before"]


def oracle(a, dy, runs=None):
    """y and {name: gradient of sum(dy y)}, by hand in float64; a: {name: array or None}, runs [B, K-1 + T]."""
    a = {name: None if x is None else np.asarray(x, np.float64) for name, x in a.items()}
    dy = np.asarray(dy, np.float64)
    (B, D, T), (G, K) = a["v"].shape, a["h"].shape
    taps = np.repeat(a["h"], D // G, axis=0)
    u = a["v"] if a["x2"] is None else a["x2"] * a["v"]
    before = np.zeros((B, D, K - 1)) if a["before"] is None else a["before"]
    whole = np.concatenate([before, u], axis=2)
    runs = np.zeros((B, K - 1 + T), int) if runs is None else np.asarray(runs)
    shown = (runs[:, K - 1 :] >= 0)[:, None]
    skip = np.zeros(D) if a["skip"] is None else a["skip"]
    bias = np.zeros(D) if a["bias"] is None else a["bias"]
    z = (skip[:, None] * u + bias[:, None]) * shown
    g = (dy if a["x1"] is None else dy * a["x1"]) * shown
    d_whole, d_taps = np.zeros_like(whole), np.zeros((D, K))
    for k in range(K):
        place = slice(K - 1 - k, K - 1 - k + T)
        same = (runs[:, place] == runs[:, K - 1 :])[:, None] * shown
        z += taps[:, k, None] * whole[:, :, place] * same
        d_whole[:, :, place] += taps[:, k, None] * g * same
        d_taps[:, k] = np.sum(g * whole[:, :, place] * same, axis=(0, 2))
    du = d_whole[:, :, K - 1 :] + skip[:, None] * g
    gradients = {
        "x1": dy * z,
        "x2": du * a["v"],
        "v": du if a["x2"] is None else du * a["x2"],
        "h": d_taps.reshape(G, D // G, K).sum(axis=1),
        "skip": np.sum(g * u, axis=(0, 2)),
        "bias": np.sum(g, axis=(0, 2)),
        "before": d_whole[:, :, : K - 1],
    }
    return z if a["x1"] is None else a["x1"] * z, {n: x for n, x in gradients.items() if a[n] is not None}


def arrays(B, D, T, G, K, *, gates=True, skip=False, bias=False, before=False, dtype=jnp.float32):
    rng = np.random.default_rng(T + K)

    def normal(*shape):
        return rng.normal(size=shape).astype(dtype)

    a = {name: normal(B, D, T) if gates or name == "v" else None for name in ("x1", "x2", "v")}
    a["h"] = rng.normal(size=(G, K)).astype(np.float32)
    a["skip"] = rng.normal(size=D).astype(np.float32) if skip else None
    a["bias"] = rng.normal(size=D).astype(np.float32) if bias else None
    a["before"] = normal(B, D, K - 1) if before else None
    return a, normal(B, D, T)


def check(kernel, a, dy, runs=None):
    """kernel({name: array}) -> (y, last inputs); relative errors in norm, 1e-4 for float32 and 1e-2 for bfloat16."""

    @jax.jit
    def both(a, dy):
        (y, last), pull = jax.vjp(kernel, a)
        return y, last, pull((dy, jnp.zeros_like(last)))[0]

    y, last, gradients = both(a, dy)
    want_y, want = oracle(a, dy, runs)
    limit = 1e-2 if dy.dtype == jnp.bfloat16 else 1e-4
    for name, got, expected in [("y", y, want_y)] + [(n, gradients[n], want[n]) for n in want]:
        assert got.shape == expected.shape, name
        error = np.linalg.norm(np.asarray(got, np.float64) - expected)
        assert error <= limit * np.linalg.norm(expected) + 1e-30, (name, error / np.linalg.norm(expected))
    u = a["v"] if a["x2"] is None else a["x2"] * a["v"]
    K, before = a["h"].shape[1], a["before"]
    whole = np.concatenate(
        [np.zeros((*u.shape[:2], K - 1), u.dtype) if before is None else before, u], axis=2
    )
    np.testing.assert_array_equal(last, whole[:, :, whole.shape[2] - (K - 1) :])


def fir(a, *, platform, **more):
    return fir_conv(
        a["x1"],
        a["x2"],
        a["v"],
        a["h"],
        skip=a["skip"],
        initial_inputs=a["before"],
        platform=platform,
        interpret=True,
        **more,
    )


# B, D, T, G, K and what comes with it: one channel a group, groups that fill a tile, 12 channels, odd and short rows,
# pieces of one lane's time, three and five blocks of taps.
FIR_CASES = [
    ((2, 12, 100, 3, 100), dict(skip=True, before=True)),
    ((1, 4, 257, 4, 128), dict(skip=True)),
    ((1, 16, 300, 1, 256), dict(before=True)),
    ((2, 6, 1, 3, 65), dict(before=True)),
    ((3, 3, 63, 1, 9), dict(gates=False, skip=True)),
    ((2, 6, 40, 3, 7), dict(skip=True, before=True)),
]


@pytest.mark.parametrize("platform", PLATFORMS)
@pytest.mark.parametrize(("shape", "options"), FIR_CASES, ids=str)
def test_fir_conv_equals_the_formula(shape, options, platform):
    check(functools.partial(fir, platform=platform), *arrays(*shape, **options))


@MOSAIC
@pytest.mark.parametrize(("shape", "options"), [c for c in FIR_CASES if 8 < c[0][4] <= 128], ids=str)
def test_fir_conv_through_mosaic_equals_the_formula(shape, options):
    check(functools.partial(fir, platform="mosaic"), *arrays(*shape, **options))


@MOSAIC
def test_fir_conv_through_mosaic_in_bfloat16():
    """Boxes of 8, of 64 and of channels that must be padded; pieces of time; rows as they are and padded ones."""
    for shape in ((1, 16, 1024, 2, 128), (1, 64, 128, 1, 128), (2, 24, 200, 2, 128)):
        a, dy = arrays(*shape, skip=True, before=True, dtype=jnp.bfloat16)
        check(functools.partial(fir, platform="mosaic"), a, dy)


@pytest.mark.parametrize("platform", PLATFORMS)
@pytest.mark.parametrize("K", [7, 128])
def test_fir_conv_in_bfloat16(K, platform):
    a, dy = arrays(1, 16, 200, 2, K, skip=True, before=True, dtype=jnp.bfloat16)
    check(functools.partial(fir, platform=platform), a, dy)


def short(a, *, platform, **more):
    return short_conv(
        a["v"],
        a["h"],
        bias=a["bias"],
        initial_inputs=a["before"],
        platform=platform,
        interpret=True,
        **more,
    )


@pytest.mark.parametrize("platform", PLATFORMS)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize(
    ("shape", "options"),
    [
        ((2, 6, 100, 6, 3), dict(bias=True)),
        ((1, 20, 257, 20, 2), dict(before=True)),
        ((2, 17, 1, 17, 4), dict(before=True, bias=True)),
    ],
    ids=str,
)
def test_short_conv_equals_the_formula(shape, options, dtype, platform):
    check(functools.partial(short, platform=platform), *arrays(*shape, gates=False, dtype=dtype, **options))


@pytest.mark.parametrize("platform", PLATFORMS)
@pytest.mark.parametrize("kernel", [short, fir])
def test_documents_are_apart(kernel, platform):
    """A document that goes on from the state, others, padding within and after: taps, gradients and zeros."""
    B, D, T, K = 2, 5, 600, 4
    a, dy = arrays(B, D, T, D, K, gates=kernel is fir, bias=kernel is short, skip=kernel is fir, before=True)
    rng = np.random.default_rng(1)
    runs = np.sort(rng.integers(0, 9, (B, T)), axis=1).astype(np.int32)
    runs[:, 40:43], runs[0, 590:], runs[1, :2] = -1, -1, 1
    first = np.array([[-1, 0, 0], [-1, -1, -1]], np.int32)
    run = functools.partial(
        kernel, platform=platform, runs=jnp.asarray(runs), initial_runs=jnp.asarray(first)
    )
    check(run, a, dy, np.concatenate([first, runs], axis=1))


def test_what_is_not_covered_says_why():
    v, h = jnp.zeros((1, 1001, 8)), jnp.zeros((1, 100))
    assert "1001 channels" in obstacle(v, h, platform="tpu")
    assert obstacle(v, h, platform="gpu") is None
    assert "257 taps" in obstacle(v, jnp.zeros((1, 257)), platform="gpu")
    few = obstacle(v, jnp.zeros((1, 8)), platform="mosaic")
    assert few == backends.missing("mosaic") or "8 taps, expected 9 to 128" in few
    with pytest.raises(ValueError, match="segments with more than 8 taps"):
        fir_conv(None, None, v, h, runs=jnp.zeros((1, 8), jnp.int32), platform="gpu")
