"""The attention operator against torch and against its own definition in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lcx.errors import UserError
from lcx.ops.attention import attention

# B, T, N, K, H, window, segments
CASES = [
    (1, 1, 2, 2, 8, None, False),
    (2, 63, 4, 2, 16, None, True),
    (2, 64, 4, 2, 16, 7, False),
    (1, 65, 4, 1, 8, None, True),
    (1, 100, 6, 3, 24, 31, True),
    (2, 257, 4, 4, 32, None, False),
    (1, 700, 2, 1, 16, 129, True),
    (1, 1100, 2, 2, 8, 1, False),
]


def arrays(B, T, N, K, H, segments, dtype=np.float32):
    rng = np.random.default_rng(T)
    q, k, v, w = (rng.normal(size=(B, T, n, H)).astype(dtype) for n in (N, K, K, N))
    ids = None
    if segments:
        ids = np.sort(rng.integers(1, 4, (B, T)), axis=1).astype(np.int32)
        ids[:, T - T // 5 :] = 0
    return q, k, v, w, ids


def with_gradients(f, q, k, v, w):
    """f(q, k, v) and the gradients of sum(w f(q, k, v))."""

    @jax.jit
    def both(q, k, v, w):
        y, pull = jax.vjp(f, q, k, v)
        return y, *pull(w)

    return both(q, k, v, w)


def numpy_attention(q, k, v, w, ids, window):
    """Outputs and gradients of sum(w * y) by hand, float64, one query at a time."""
    B, T, N, H = q.shape
    q, k, v, w = (x.astype(np.float64) for x in (q, k, v, w))
    group = N // k.shape[2]
    y, dq, dk, dv = np.zeros_like(q), np.zeros_like(q), np.zeros_like(k), np.zeros_like(v)
    for b in range(B):
        for t in range(T):
            if ids is not None and ids[b, t] == 0:
                continue
            seen = np.arange(T) <= t
            if window is not None:
                seen &= np.arange(T) > t - window
            if ids is not None:
                seen &= ids[b] == ids[b, t]
            s = np.flatnonzero(seen)
            for n in range(N):
                keys, values = k[b, s, n // group], v[b, s, n // group]
                p = np.exp(keys @ q[b, t, n] / np.sqrt(H))
                p /= p.sum()
                y[b, t, n] = p @ values
                dp = values @ w[b, t, n]
                ds = p * (dp - p @ dp) / np.sqrt(H)
                dq[b, t, n] = ds @ keys
                np.add.at(dk, (b, s, n // group), ds[:, None] * q[b, t, n])
                np.add.at(dv, (b, s, n // group), p[:, None] * w[b, t, n])
    return y, dq, dk, dv


@pytest.mark.parametrize("implementation", ["reference", "blocks", None])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_values_and_gradients_equal_the_definition(case, implementation):
    B, T, N, K, H, window, segments = case
    q, k, v, w, ids = arrays(B, T, N, K, H, segments)
    expected = numpy_attention(q, k, v, w, ids, window)
    ids = None if ids is None else jnp.array(ids)

    def f(q, k, v):
        return attention(
            q, k, v, q_segment_ids=ids, kv_segment_ids=ids, window=window, implementation=implementation
        )

    for got, want in zip(with_gradients(f, q, k, v, w), expected, strict=True):
        np.testing.assert_allclose(got, want, atol=1e-5, rtol=1e-4)


def test_equals_torch():
    torch = pytest.importorskip("torch", reason="the torch extra is not installed")
    q, k, v, w, _ = arrays(2, 200, 4, 2, 32, False)
    tq, tk, tv = (torch.tensor(x).transpose(1, 2).requires_grad_() for x in (q, k, v))
    y = torch.nn.functional.scaled_dot_product_attention(tq, tk, tv, is_causal=True, enable_gqa=True)
    y.backward(torch.tensor(w).transpose(1, 2))
    for got, want in zip(with_gradients(attention, q, k, v, w), (y, tq.grad, tk.grad, tv.grad), strict=True):
        np.testing.assert_allclose(got, want.detach().transpose(1, 2), atol=2e-5)


def test_bfloat16_stays_near_float64():
    q, k, v, w, ids = arrays(1, 257, 4, 2, 32, True)
    y, *_ = numpy_attention(q, k, v, w, ids, None)
    ids = jnp.array(ids)
    low = (jnp.array(x, jnp.bfloat16) for x in (q, k, v))
    got = attention(*low, q_segment_ids=ids, kv_segment_ids=ids).astype(jnp.float32)
    assert np.linalg.norm(got - y) / np.linalg.norm(y) < 1e-2


def test_no_square_of_the_length_is_held():
    """Forward and backward at T = 4096: the temporaries stay far below one T x T score matrix per head."""
    T, N = 4096, 4
    shape = jax.ShapeDtypeStruct((1, T, N, 32), jnp.float32)

    def temporaries(implementation):
        f = jax.grad(lambda q, k, v: attention(q, k, v, implementation=implementation).sum(), argnums=(0, 1, 2))
        return jax.jit(f).lower(shape, shape, shape).compile().memory_analysis().temp_size_in_bytes

    assert temporaries("blocks") < T * T * 4 / 2
    assert temporaries("reference") > N * T * T * 4


def test_a_named_implementation_works_or_raises():
    q = jnp.ones((1, 4, 3, 8))
    with pytest.raises(UserError, match="expected 'reference' or 'blocks'"):
        attention(q, q, q, implementation="flash9")
    with pytest.raises(UserError, match="multiple of num_kv_heads"):
        attention(q, q[:, :, :2], q[:, :, :2])
