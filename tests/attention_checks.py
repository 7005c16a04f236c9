"""Decays and documents of the attention tests, and the comparison of values and gradients with float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import jaxprs_in_params

NAMES = ["y", "dq", "dk", "dv", "da"]


def decay_and_runs(rng, B, T, N, mean, documents):
    """log_decay [B, T, N] of this mean (None: no decay; "resets": hardly any or e^-95), document indices or None."""
    a = None if mean is None else rng.uniform(0, 2, (B, T, N))
    if a is not None:
        a = jnp.asarray(np.where(a < 0.6, -95, -0.02 * a) if mean == "resets" else mean * a, jnp.float32)
    runs = jnp.asarray(np.cumsum(rng.random((B, T)) < 0.03, axis=1), jnp.int32) if documents else None
    return a, runs


def check(found, expected, dtype, limit):
    """y and the gradients of NAMES: their dtypes, and their errors relative to the largest value, at least 1."""
    for name, x, right in zip(NAMES, found, expected, strict=True):
        if x is None:
            continue
        assert x.dtype == (jnp.float32 if name == "da" else dtype)
        error = np.abs(np.asarray(x, np.float64) - right).max() / max(1, np.abs(right).max())
        assert error < limit, f"{name}: {error:.1e}"


def changed(mine, *xs):
    """Arrays [B, T, ...] in which the tokens `mine` [B, T] have other numbers, decays strong ones."""
    place = [mine.reshape(*mine.shape, *(1,) * (x.ndim - 2)) for x in xs]
    return [np.where(at, 40 * np.asarray(x, np.float32)[:, ::-1], x).astype(x.dtype) for at, x in zip(place, xs)]


def assert_no_bit_differs(before, after, where):
    """Results [B, T, ...] of two runs are the same at these tokens [B, T], and differ elsewhere."""
    for name, old, new in zip(NAMES, before, after, strict=True):
        differs = (np.asarray(old) != np.asarray(new)).reshape(*where.shape, -1).any(axis=2)
        assert not differs[where].any() and differs[~where].any(), name


def with_gradients(f, *xs):
    """f(*xs[:-1]) and the gradients of sum(xs[-1] * f), as one program."""

    return jax.jit(functools.partial(pulled, f))(*xs)


def pulled(f, *xs):
    """As with_gradients, to be compiled by the caller: once for arrays of the same shapes."""
    y, pull = jax.vjp(f, *xs[:-1])
    return y, *pull(xs[-1])


def lengths_of_loops(program):
    """The shapes of what says whether a loop goes on, of all loops in a jaxpr: () unless a vmap gave it several
    lengths. Then XLA copies in every step what it carries."""
    shapes = set()
    for equation in program.eqns:
        if equation.primitive.name == "while":
            shapes.add(equation.params["cond_jaxpr"].out_avals[0].shape)
        shapes.update(*map(lengths_of_loops, jaxprs_in_params(equation.params)))
    return shapes


def sums_between(a):
    """[T, T]: the sum of a [T] after j up to i, each added up by itself, so that none is a difference of large sums."""
    sums = np.zeros((len(a), len(a)))
    for j in range(len(a)):
        sums[j + 1 :, j] = np.cumsum(a[j + 1 :])
    return sums
