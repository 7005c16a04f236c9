"""The linear attention kernels, emulated on a CPU, against the sum over pairs in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_checks import assert_no_bit_differs, changed

from kernels_pallas import backends
from kernels_pallas.linear_attention import linear_attention, obstacle

EPS = 1e-3
MOSAIC = pytest.param(
    "mosaic", marks=pytest.mark.skipif(bool(backends.missing("mosaic")), reason="jax < 0.11")
)


def definition(q, k, v, a, kv, z, *, runs, normalize):
    """y, S, z by the formulas, all pairs at once."""
    N, T = kv.shape[1], q.shape[1]
    q, k, v, a = (jnp.repeat(x, N // x.shape[2], axis=2) for x in (q, k, v, a))
    total = jnp.cumsum(a, axis=1).swapaxes(1, 2)
    place = jnp.arange(T)
    seen = ((place[:, None] >= place) & (runs[:, :, None] == runs[:, None]))[:, None]
    decay = jnp.where(seen, jnp.exp(jnp.where(seen, total[..., :, None] - total[..., None, :], 0)), 0)
    weights = jnp.einsum("btnp,bsnp->bnts", q, k) * decay
    entering = jnp.where((runs == 0)[:, None], jnp.exp(total), 0)
    y = jnp.einsum("bnts,bsnh->btnh", weights, v) + jnp.einsum("bnt,btnp,bnph->btnh", entering, q, kv)
    if normalize:
        norm = jnp.sum(weights, -1) + jnp.einsum("bnt,btnp,bnp->bnt", entering, q, z)
        y = y / (norm + EPS).swapaxes(1, 2)[..., None]
    last, carried = decay[:, :, -1], entering[:, :, -1]
    kv = carried[..., None, None] * kv + jnp.einsum("bns,bsnp,bsnh->bnph", last, k, v)
    return y, kv, carried[..., None] * z + jnp.einsum("bns,bsnp->bnp", last, k)


def case(T, *, B=2, N=2, heads=(2, 2, 2), P=16, H=32, runs=False, dtype="float32", seed=0):
    """Float64 inputs that `dtype` holds exactly, the runs, and weights for the cotangents."""
    rng = np.random.default_rng(seed)

    def normal(*shape):
        return rng.standard_normal(shape).astype(jnp.dtype(dtype)).astype(np.float64)

    q, k = (np.abs(normal(B, T, n, P)) for n in heads[:2])
    v, a = normal(B, T, heads[2], H), -np.exp(rng.standard_normal((B, T, N)) - 2).astype(np.float32)
    arrays = (q, k, v, a.astype(np.float64), normal(B, N, P, H), np.abs(normal(B, N, P)))
    documents = np.sort(rng.integers(0, 4, (B, T)), axis=1) if runs else np.zeros((B, T), int)
    weights = normal(B, T, N, H), normal(B, N, P, H), normal(B, N, P)
    return arrays, documents, weights


def both(fn, weights, kind, *arrays):
    """What fn returns, and the gradients of the sum of `weights` times it."""
    results, pull = jax.vjp(fn, *(x.astype(kind) for x in arrays))
    return *results, *pull(tuple(w.astype(x.dtype) for w, x in zip(weights, results)))


@functools.cache
def oracle(T, *, decay, normalize, runs, dtype, **shape):
    """Inputs, runs, weights of the cotangents; results and gradients by the definition. One for both platforms."""
    arrays, documents, weights = case(T, runs=runs, dtype=dtype, **shape)
    if not decay:
        arrays = (*arrays[:3], np.zeros_like(arrays[3]), *arrays[4:])
    weights = weights if normalize else weights[:2]

    def theirs(*arrays):
        return definition(*arrays, runs=jnp.asarray(documents), normalize=normalize)[: len(weights)]

    with jax.enable_x64(True):
        expected = jax.jit(functools.partial(both, theirs, weights, "float64"))(*arrays)
    return arrays, documents, weights, [np.asarray(x) for x in expected]


def check(platform, T, *, decay=True, normalize=False, runs=False, dtype="float32", **shape):
    arrays, documents, weights, expected = oracle(
        T, decay=decay, normalize=normalize, runs=runs, dtype=dtype, **shape
    )

    def ours(q, k, v, a, kv, z):
        q, k, v = (x.astype(dtype) for x in (q, k, v))
        y, (kv, z) = linear_attention(
            q,
            k,
            v,
            log_decay=a if decay else None,
            normalize=normalize,
            eps=EPS,
            runs=jnp.asarray(documents, jnp.int32) if runs else None,
            initial_state=(kv, z if normalize else None),
            platform=platform,
            interpret=True,
        )
        return (y, kv, z) if normalize else (y, kv)

    program = jax.jit(functools.partial(both, ours, weights, "float32"))
    found = program(*arrays)
    if runs and decay:  # no bit of a document depends on another one
        mine, named = documents == 1, (0, *range(len(weights), len(weights) + 4))
        after = program(*changed(mine, *arrays[:4]), *arrays[4:])
        assert_no_bit_differs([found[i] for i in named], [after[i] for i in named], ~mine)
    tolerance = 1e-2 if dtype == "bfloat16" else 1e-5
    names = [*("y", "kv", "z")[: len(weights)], *("dq", "dk", "dv", "da", "dkv", "dz")]
    for name, x, y in zip(names, found, expected, strict=True):
        if (name == "da" and not decay) or (name == "dz" and not normalize):
            continue
        assert np.abs(np.asarray(x, np.float64) - y).max() <= tolerance * np.abs(y).max(), name


@pytest.mark.parametrize("platform", ["gpu", "tpu", MOSAIC])
class TestOneKernelFourTimes:
    def test_a_single_token(self, platform):
        check(platform, 1)

    def test_without_decay(self, platform):
        check(platform, 63, decay=False, normalize=True, heads=(1, 2, 1))

    def test_everything(self, platform):
        check(platform, 100, normalize=True, runs=True, heads=(2, 1, 2))

    def test_several_chunks(self, platform):
        check(platform, 257, heads=(1, 1, 2), P=32, H=16)

    def test_documents_without_decay(self, platform):
        check(platform, 257, decay=False, runs=True)

    def test_bfloat16(self, platform):
        check(platform, 257, normalize=True, runs=True, dtype="bfloat16")
        check(platform, 300, heads=(2, 2, 1), dtype="bfloat16")


@pytest.mark.parametrize(("platform", "dtype"), [("gpu", "bfloat16"), ("tpu", "float32")])
def test_several_spans(platform, dtype):
    """More than one stored state, by whose edges the decay's gradient is set right."""
    check(platform, 1100, B=1, dtype=dtype)


@pytest.mark.parametrize("decay", [False, True])
def test_pieces_at_once(decay):
    check("gpu", 2100, B=1, decay=decay, normalize=decay, runs=True)


@pytest.mark.skipif(bool(backends.missing("mosaic")), reason="jax < 0.11")
def test_spans_and_pieces_through_mosaic():
    check("mosaic", 2100, B=1, N=1, heads=(1, 1, 1), P=64, H=64, dtype="bfloat16")


@pytest.mark.parametrize("platform", ["gpu", "tpu", MOSAIC])
def test_fast_decay_forgets_without_overflow(platform):
    arrays, _, _ = case(130)
    q, k, v, a, kv, z = (jnp.asarray(x, jnp.float32) for x in arrays)
    run = functools.partial(linear_attention, log_decay=1e4 * a - 1e4, platform=platform, interpret=True)
    y, (state, _) = jax.jit(lambda *x, run=run: run(*x, initial_state=(kv, None)))(q, k, v)
    own = jnp.sum(q * k, axis=-1, keepdims=True) * v
    np.testing.assert_allclose(y, own, rtol=1e-5, atol=1e-4)
    np.testing.assert_allclose(state, k[:, -1, ..., None] * v[:, -1, :, None], rtol=1e-5, atol=1e-5)


@pytest.mark.skipif(not backends.missing("mosaic"), reason="jax >= 0.11")
def test_mosaic_is_refused_where_jax_is_too_old():
    q = jnp.zeros((1, 8, 1, 64), jnp.bfloat16)
    with pytest.raises(ValueError, match=r"needs jax >= 0\.11, found 0\."):
        linear_attention(q, q, q, platform="mosaic")


def test_what_the_kernels_do_not_take():
    def structs(P, H, dtype="bfloat16"):
        return (jax.ShapeDtypeStruct((1, 8, 1, d), dtype) for d in (P, P, H))

    assert obstacle(*structs(64, 128), platform="gpu") is None
    assert "96 features" in obstacle(*structs(96, 64), platform="tpu")
    assert "float16" in obstacle(*structs(64, 64, "float16"), platform="gpu")
    assert "registers" in obstacle(*structs(64, 128, "float32"), platform="gpu")
    assert obstacle(*structs(64, 128, "float32"), platform="tpu") is None
