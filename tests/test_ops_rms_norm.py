"""RMSNorm against its definition in float64: values and gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lcx.ops.rms_norm import rms_norm


@pytest.mark.parametrize("shape", [(5,), (2, 3, 7), (1, 130, 4, 16)])
@pytest.mark.parametrize("dtype, tolerance", [(jnp.float32, 2e-6), (jnp.bfloat16, 1e-2)])
def test_values_and_gradients_equal_the_definition(shape, dtype, tolerance):
    rng = np.random.default_rng(len(shape))
    x, dy = (jnp.asarray(rng.normal(size=shape), dtype) for _ in range(2))
    scale, eps = jnp.asarray(rng.normal(size=shape[-1]), jnp.float32), 1e-2

    @jax.jit
    def ours(x, scale, dy):
        y, pull = jax.vjp(lambda x, scale: rms_norm(x, scale, eps), x, scale)
        return y, *pull(dy)

    X, S, G = (np.asarray(array, np.float64) for array in (x, scale.astype(dtype), dy))
    rate = (np.mean(X**2, axis=-1, keepdims=True) + eps) ** -0.5
    # The Jacobian of x / r: rate (1 - x x^T rate^2 / D).
    g = G * S
    dx = rate * g - X * rate**3 * np.sum(g * X, axis=-1, keepdims=True) / shape[-1]
    d_scale = (G * X * rate).reshape(-1, shape[-1]).sum(0)
    found = ours(x, scale, dy)
    assert [array.dtype for array in found] == [dtype, dtype, jnp.float32]
    for got, want in zip(found, (X * rate * S, dx, d_scale), strict=True):
        np.testing.assert_allclose(np.asarray(got, np.float64), want, atol=tolerance * np.abs(want).max())


def test_an_empty_token_has_no_gradient_that_is_not_finite():
    grads = jax.grad(lambda x, scale: jnp.sum(rms_norm(x, scale, 1e-6)), (0, 1))(jnp.zeros((2, 4)), jnp.ones(4))
    assert all(np.isfinite(grad).all() for grad in grads)
