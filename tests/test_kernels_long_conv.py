"""The kernels of the long convolution, interpreted, against the formula in float64 by numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas import dft, long_conv_gpu, long_conv_tpu
from kernels_pallas.long_conv import long_conv, obstacle

NAMES = ("x1", "x2", "v", "h", "skip")

# B, D, T, S, arrays that are None, dtype
CASES = [
    (1, 2, 63, 63, ("x1", "x2", "skip"), "float32"),
    (3, 9, 100, 100, ("x2",), "float32"),
    (2, 3, 257, 300, (), "float32"),
    (3, 2, 600, 600, (), "bfloat16"),
    (1, 2, 2500, 2500, ("x1",), "bfloat16"),
]


def arrays(B, D, T, S, missing, dtype):
    rng = np.random.default_rng(T)
    values = [rng.normal(size=(B, D, T)) for _ in range(3)]
    values += [rng.normal(size=(D, S)) * np.exp(-np.arange(S) / 40), rng.normal(size=D)]
    types = [dtype] * 3 + ["float32"] * 2
    inputs = {n: x.astype(jnp.dtype(t)) for n, x, t in zip(NAMES, values, types) if n not in missing}
    return inputs, rng.normal(size=(B, D, T)).astype(jnp.dtype(dtype))


def wanted(inputs, dy):
    """y and the gradients of sum(y dy) by transforms of 2 T points in float64."""
    x = {name: np.asarray(value, np.float64) for name, value in inputs.items()}
    dy = np.asarray(dy, np.float64)
    T = dy.shape[2]
    x1, x2, v = x.get("x1", 1.0), x.get("x2", 1.0), x["v"]
    h = x["h"][:, :T].copy()
    h[:, 0] += x.get("skip", 0.0)

    def pairwise(a, b, conj):
        A, B = np.fft.rfft(a, 2 * T), np.fft.rfft(b, 2 * T)
        return np.fft.irfft((np.conj(A) if conj else A) * B, 2 * T)[..., :T]

    u, g = x2 * v, x1 * dy
    y, du, dh = pairwise(h, u, False), pairwise(h, g, True), pairwise(u, g, True).sum(axis=0)
    unused = np.zeros((dh.shape[0], x["h"].shape[1] - T))
    gradients = {
        "x1": dy * y,
        "x2": du * v,
        "v": du * x2,
        "h": np.concatenate([dh, unused], axis=1),
        "skip": dh[:, 0],
    }
    return x1 * y, {name: gradients[name] for name in inputs}


def off(found, expected):
    return np.linalg.norm(np.asarray(found, np.float64) - expected) / np.linalg.norm(expected)


def runner(platform):
    """(inputs, dy) -> y and the gradients of sum(y dy)."""

    def f(inputs):
        given = {name: inputs.get(name) for name in NAMES}
        skip = given.pop("skip")
        return long_conv(**given, skip=skip, platform=platform, interpret=True)

    @jax.jit
    def run(inputs, dy):
        y, pull = jax.vjp(f, inputs)
        return y, *pull(dy)

    return run


def check(case, platform):
    inputs, dy = arrays(*case)
    run = runner(platform)
    y, gradients = run(inputs, dy)
    expected, expected_gradients = wanted(inputs, dy)
    tolerance = 1e-4 if case[-1] == "float32" else 1e-2
    assert y.dtype == case[-1] and off(y, expected) < tolerance
    for name, gradient in gradients.items():
        assert gradient.dtype == inputs[name].dtype
        assert off(gradient, expected_gradients[name]) < tolerance, name
    return run, inputs, dy, gradients


@pytest.mark.parametrize("platform", ["tpu", "gpu"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_values_and_gradients(case, platform):
    run, inputs, dy, gradients = check(case, platform)
    # No range is lost on the way: gradients as small as those of a mean over many tokens are as exact.
    _, small = run(inputs, dy * np.asarray(2.0**-40, dy.dtype))
    for name, gradient in small.items():
        np.testing.assert_array_equal(np.asarray(gradient, np.float64) * 2.0**40, gradients[name])


def test_tpu_rows_of_256_lanes(monkeypatch):
    """As from 64K tokens on."""
    monkeypatch.setattr(long_conv_tpu, "plan", lambda length: dft.Plan(32, 256, 16))
    check((3, 2, 600, 600, (), "float32"), "tpu")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_gpu_stages(dtype, monkeypatch):
    """As above 4096 points, with several tiles and several items for a program, which has one scratch."""
    sizes = long_conv_gpu.Tiles(k1=16, n2=16, depth=16, row=16, k2=16, n1=16, warps=4, stages=1, programs=2)
    monkeypatch.setattr(long_conv_gpu, "tiles", lambda *_: sizes)
    check((3, 3, 450, 450, (), dtype), "gpu")


@pytest.mark.parametrize("plan", [dft.Plan(32, 16, 16), dft.Plan(96, 128, 48)], ids=str)
@pytest.mark.parametrize("by_matmul", [True, False])
def test_spectrum_and_back(plan, by_matmul):
    T, tolerance = plan.rows * plan.n2 - 5, 2e-5 if by_matmul else 1e-6
    h = np.random.default_rng(0).normal(size=(2, T))
    H = jax.jit(lambda h: dft.spectrum(h, plan, by_matmul=by_matmul))(h)
    expected = np.fft.fft(h, plan.n).reshape(2, plan.n2, plan.n1).swapaxes(1, 2) / plan.n
    assert off(H, np.stack([expected.real, expected.imag], axis=1)) < tolerance
    back = jax.jit(lambda H: dft.taps(H, plan, T, by_matmul=by_matmul))(H * plan.n)
    assert back.shape == h.shape and off(back, h) < tolerance


@pytest.mark.parametrize("kernels", [long_conv_tpu, long_conv_gpu])
def test_plans_have_room(kernels):
    for T in (1, 63, 256, 257, 2048, 2049, 5000, 65535, 65536):
        plan = kernels.plan(T)
        assert plan.rows * plan.n2 >= T and 2 * plan.rows <= plan.n1, "what wraps around would reach a token"


def test_what_does_not_fit_is_refused():
    assert obstacle((2, 8, 8192), jnp.bfloat16, "tpu") is None
    assert obstacle((2, 8, 8192), jnp.float32, "gpu") is None
    assert "float16" in obstacle((2, 8, 8192), jnp.float16, "gpu")
    assert "VMEM" in obstacle((2, 8, 1 << 20), jnp.bfloat16, "tpu")
    assert "1048576" in obstacle((2, 8, 1 << 20), jnp.bfloat16, "gpu")
