"""Packed rows, document by document or class by class, through kernels that know one document a row."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas import fir_conv as fir_kernels
from kernels_pallas import long_conv as long_kernels
from lcx.ops import dispatch, packed_conv
from lcx.ops.fir_conv import fir_conv, reference
from lcx.ops.long_conv import long_conv
from lcx.ops.long_conv import reference as long_reference

D, T = 8, 150


def row(*runs):
    """(id, tokens), ... and padding to T."""
    ids = np.concatenate([np.full(tokens, i) for i, tokens in runs])
    return np.pad(ids, (0, T - len(ids)))


ONE = np.stack([row((1, T)), row((0, 20), (7, 100))])
LONG = np.stack([row((1, 40), (2, 50), (3, 60)), row((4, 60), (0, 9), (4, 11), (5, 45))])
SHORT = np.stack([row(*((i, 7) for i in range(1, 20))), row((3, 140), (9, 1), (3, 5))])


def inputs(taps, G, seed=0):
    rng = np.random.default_rng(seed)
    signals = tuple(jnp.asarray(rng.normal(size=(2, D, T)), jnp.float32) for _ in range(3))
    weights = (
        jnp.asarray(rng.normal(size=(G, taps)) / taps**0.5, jnp.float32),
        jnp.asarray(rng.normal(size=D)),
    )
    return (
        signals,
        jax.tree.map(lambda x: x.astype(jnp.float32), weights),
        jnp.asarray(rng.normal(size=(2, D, T))),
    )


def same(one, other, signals, weights, dy):
    def both(fn):
        def run(signals, weights):
            y, pull = jax.vjp(fn, signals, weights)
            return y, pull(dy.astype(y.dtype))

        return jax.jit(run)(signals, weights)

    for x, y in zip(jax.tree.leaves(both(one)), jax.tree.leaves(both(other)), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-4 * float(np.abs(y).max()))


def define(ids):
    return lambda signals, weights: reference(*signals, *weights, jnp.asarray(ids))


@pytest.mark.parametrize(
    "ids, taps, passes", [(ONE, 40, 1), (ONE, T, 1), (LONG, 40, 2), (LONG, T, 3), (SHORT, 8, 3)]
)
def test_in_so_many_passes(ids, taps, passes):
    """With that many allowed the other form is not used, with one less nothing but it."""
    signals, weights, dy = inputs(taps, 4)

    def run(signals, weights, *, most, spoil):
        one, many = (lambda y, i=i: jnp.nan * y if i == spoil else y for i in range(2))

        def kernel(signals, weights):
            return one(reference(*signals, *weights, None))

        def otherwise(signals, weights, ids):
            return many(reference(*signals, *weights, ids))

        return packed_conv.by_document(
            kernel, signals, weights, jnp.asarray(ids), taps=taps, otherwise=otherwise, most=most
        )

    for most, spoil in ((passes, 1), (passes - 1, 0)):
        same(functools.partial(run, most=most, spoil=spoil), define(ids), signals, weights, dy)


@pytest.mark.parametrize("platform", ["gpu", "tpu"])
@pytest.mark.parametrize("ids", [LONG, SHORT], ids=["long", "short"])
def test_the_operators_run_their_kernels(monkeypatch, platform, ids):
    monkeypatch.setattr(dispatch, "platform", lambda: platform)
    monkeypatch.setattr(long_kernels, "vmem_mib", lambda: 128)
    for module, name in ((fir_kernels, "fir_conv"), (long_kernels, "long_conv")):
        monkeypatch.setattr(module, name, functools.partial(getattr(module, name), interpret=True))
    ids = jnp.asarray(ids)

    def fir(signals, weights):
        return fir_conv(*signals, weights[0], skip=weights[1], segment_ids=ids)[0]

    def whole(signals, weights):
        return long_conv(*signals, weights[0], skip=weights[1], segment_ids=ids)

    signals, weights, dy = inputs(40, 1)
    same(fir, define(ids), signals, weights, dy)
    signals, weights, dy = inputs(T, D)
    same(whole, lambda signals, weights: long_reference(*signals, *weights, ids), signals, weights, dy)
