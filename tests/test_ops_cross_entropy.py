"""The loss that never holds the logits, against torch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lcx.errors import UserError
from lcx.ops import cross_entropy as module
from lcx.ops.cross_entropy import LogitTransform, cross_entropy, token_nll

torch = pytest.importorskip("torch", reason="the torch extra is not installed")


def arrays(B, T, D, V):
    rng = np.random.default_rng(T)
    x, head = rng.normal(size=(B, T, D)), rng.normal(size=(V, D))
    labels, weights = rng.integers(0, V, (B, T)), rng.integers(0, 3, (B, T)) / 2
    return x.astype("f"), head.astype("f"), labels.astype(np.int32), weights.astype("f")


PLAIN, CAPPED = LogitTransform(), LogitTransform(multiplier=0.3, softcap=2.0)
SHAPES = [(1, 1, 8, 5), (2, 63, 16, 97), (3, 100, 32, 1000), (2, 257, 8, 258)]
CASES = [
    *((shape, 1 << 23, "reference", PLAIN) for shape in SHAPES),  # which has no chunks
    *((shape, chunk, None, PLAIN) for shape in SHAPES for chunk in (1 << 10, 1 << 23)),
    *((SHAPES[1], chunk, "chunked", CAPPED) for chunk in (1 << 10, 1 << 23)),
    (SHAPES[1], 1 << 23, "reference", CAPPED),
]


@pytest.mark.parametrize(("shape", "chunk", "implementation", "transform"), CASES, ids=str)
def test_values_and_gradients_equal_torch(shape, chunk, implementation, transform, monkeypatch):
    monkeypatch.setattr(module, "CHUNK_LOGITS", chunk)
    x, head, labels, weights = arrays(*shape)
    tx, th = (torch.tensor(a, dtype=torch.float64, requires_grad=True) for a in (x, head))
    logits = transform.multiplier * (tx @ th.T).flatten(0, 1)
    if transform.softcap is not None:
        logits = transform.softcap * torch.tanh(logits / transform.softcap)
    nll = torch.nn.functional.cross_entropy(logits, torch.tensor(labels).long().flatten(), reduction="none")
    expected = (nll * torch.tensor(weights).flatten()).sum()
    (3 * expected).backward()

    def f(x, head):
        loss = 3 * cross_entropy(x, head, labels, weights, transform=transform, implementation=implementation)
        return loss, token_nll(x, head, labels, transform=transform)

    labels, weights = jnp.array(labels), jnp.array(weights)
    (loss, found), (dx, dhead) = jax.jit(jax.value_and_grad(f, argnums=(0, 1), has_aux=True))(x, head)
    np.testing.assert_allclose(loss, 3 * expected.item(), rtol=1e-6)
    np.testing.assert_allclose(dx, tx.grad, atol=2e-5)
    np.testing.assert_allclose(dhead, th.grad, atol=1e-4, rtol=1e-5)
    np.testing.assert_allclose(found.flatten(), nll.detach(), rtol=1e-5, atol=1e-5)


def test_bfloat16_equals_float32_arithmetic_on_the_same_numbers(monkeypatch):
    """Gradients are rounded: d = softmax - onehot to bfloat16 before the products, dx and dW after them."""
    monkeypatch.setattr(module, "CHUNK_LOGITS", 1 << 13)
    x, head, labels, weights = arrays(*SHAPES[1])
    x, head = jnp.asarray(x, jnp.bfloat16), jnp.asarray(head, jnp.bfloat16)
    labels, weights = jnp.asarray(labels), jnp.asarray(weights)
    wide = x.astype(jnp.float32), head.astype(jnp.float32)
    program = jax.jit(jax.value_and_grad(lambda x, head: cross_entropy(x, head, labels, weights), (0, 1)))
    (loss, gradients), (expected, exact) = program(x, head), program(*wide)
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    for found, true in zip(gradients, exact, strict=True):
        assert found.dtype == jnp.bfloat16
        np.testing.assert_allclose(found.astype(jnp.float32), true, rtol=2.0**-7, atol=2.0**-7 * np.abs(true).max())


def test_logits_of_the_batch_are_never_held():
    B, T, D, V = 1, 4096, 64, 32768
    x, head = jax.ShapeDtypeStruct((B, T, D), jnp.float32), jax.ShapeDtypeStruct((V, D), jnp.float32)
    labels, weights = (jax.ShapeDtypeStruct((B, T), d) for d in (jnp.int32, jnp.float32))

    def temporaries(implementation):
        f = jax.grad(
            lambda x, head, *rest: cross_entropy(x, head, *rest, implementation=implementation),
            argnums=(0, 1),
        )
        return jax.jit(f).lower(x, head, labels, weights).compile().memory_analysis().temp_size_in_bytes

    assert temporaries("chunked") < B * T * V * 4 / 4
    assert temporaries("reference") > B * T * V * 4


def test_extreme_logits_stay_finite():
    x = jnp.full((1, 3, 4), 100.0)
    head = jnp.array([[100.0] * 4, [-100.0] * 4])
    nll = token_nll(x, head, jnp.array([[0, 1, 0]], jnp.int32))
    np.testing.assert_allclose(nll, [[0.0, 80000.0, 0.0]])


def test_unknown_implementation():
    x, head, labels, weights = map(jnp.array, arrays(1, 2, 4, 3))
    with pytest.raises(UserError, match="expected 'reference' or 'chunked'"):
        cross_entropy(x, head, labels, weights, implementation="fused")


@pytest.mark.parametrize(
    ("head", "tokens"),
    [((128256, 4096), 1024), ((32000, 1024), 512), ((32000, 256), 262), ((512, 64), 16384), ((2**24, 64), 32)],
)
def test_a_chunk_is_large_enough_to_pay_for_reading_the_head(head, tokens):
    assert module.chunk_tokens(1 << 20, *head) == tokens
    assert module.chunk_tokens(7, *head) == 7
