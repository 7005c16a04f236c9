"""The kernels of linear attention with a softmax window, emulated on a CPU, against the sum over pairs in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas.windowed_linear_attention import obstacle, tiles, windowed_linear_attention
from lcx.errors import UserError
from lcx.ops import dispatch
from lcx.ops.linear_attention import Window, linear_attention

EPS = 0.1  # at 0 the gradient of a token that sees only itself vanishes, and what is left is rounding
NAMES = ("q", "k", "v", "wq", "wk", "gamma", "S", "z")


def places(kind, size, documents):
    """nearest and oldest of every token by the words of the definition; documents [B, T], 0: the state's."""
    nearest, oldest = np.zeros(documents.shape, int), np.zeros(documents.shape, int)
    for b, row in enumerate(documents):
        for t, document in enumerate(row):
            first = int(np.argmax(row == document))
            block = first + (t - first) // size * size
            begin = t - size + 1 if kind == "sliding" else block - size
            nearest[b, t], oldest[b, t] = max(begin, first), -1 if document == 0 else first
    return nearest, oldest


def definition(q, k, v, wq, wk, gamma, S, z, *, nearest, oldest):
    """y by the formula, all pairs at once."""
    N, T = S.shape[1], q.shape[1]
    q, k, v, wq, wk = (jnp.repeat(x, N // x.shape[2], axis=2) for x in (q, k, v, wq, wk))
    place = jnp.arange(T)
    near = ((place >= nearest[..., None]) & (place <= place[:, None]))[:, None]
    far = ((place >= oldest[..., None]) & (place < nearest[..., None]))[:, None]
    s = jnp.where(near, jnp.einsum("btnh,bsnh->bnts", wq, wk) / wq.shape[-1] ** 0.5, -jnp.inf)
    soft = jnp.exp(s - jnp.max(s, axis=-1, keepdims=True)) * gamma[:, None, None]
    weights = soft + jnp.where(far, jnp.einsum("btnp,bsnp->bnts", q, k), 0)
    into = q * (oldest < 0)[..., None, None]
    num = jnp.einsum("bnts,bsnh->btnh", weights, v) + jnp.einsum("btnp,bnph->btnh", into, S)
    norm = jnp.sum(weights, axis=-1).swapaxes(1, 2) + jnp.einsum("btnp,bnp->btn", into, z) + EPS
    return num / norm[..., None]


def case(T, *, B, N, heads, P, H, documents, dtype, seed=0):
    """Float64 inputs that `dtype` holds exactly, the documents, and the cotangent."""
    rng = np.random.default_rng(seed)

    def normal(*shape):
        return rng.standard_normal(shape).astype(jnp.dtype(dtype)).astype(np.float64)

    q, k = (np.abs(normal(B, T, n, P)) / P for n in heads[:2])
    v, wq, wk = normal(B, T, heads[2], H), normal(B, T, N, H), normal(B, T, heads[3], H)
    if dtype == "bfloat16":
        q, k = (x.astype(jnp.dtype(dtype)).astype(np.float64) for x in (q, k))
    arrays = (q, k, v, wq, wk, rng.uniform(0.2, 1, N), normal(B, N, P, H) / P, np.abs(normal(B, N, P)) / P)
    runs = np.sort(rng.integers(0, 4, (B, T)), axis=1) if documents else np.zeros((B, T), int)
    return arrays, runs, normal(B, T, N, H)


@functools.cache
def oracle(T, kind, size, *, B, N, heads, documents, dtype):
    """Inputs, what each token sees, the cotangent; y and gradients by the definition, and their sizes."""
    arrays, runs, dy = case(T, B=B, N=N, heads=heads, P=16, H=32, documents=documents, dtype=dtype)
    if not documents:
        arrays = (*arrays[:6], *(np.zeros_like(x) for x in arrays[6:]))
    nearest, oldest = places(kind, size, runs)

    def both(*arrays):
        y, pull = jax.vjp(functools.partial(definition, nearest=nearest, oldest=oldest), *arrays)
        return y, *pull(jnp.asarray(dy))

    with jax.enable_x64(True):
        expected = dict(zip(("y", *NAMES), map(np.asarray, jax.jit(both)(*arrays)), strict=True))
    sizes = {name: np.abs(x).max() for name, x in expected.items()}
    return arrays, (nearest, oldest), dy, expected, sizes


def check(platform, T, kind, size, *, B=1, N=1, heads=(1, 1, 1, 1), documents=False, dtype="float32"):
    """Values and gradients; with documents the first is that of an entering state, without there is none."""
    shape = {"B": B, "N": N, "heads": heads, "documents": documents, "dtype": dtype}
    arrays, (nearest, oldest), dy, expected, sizes = oracle(T, kind, size, **shape)

    def ours(q, k, v, wq, wk, gamma, S, z):
        marks = {"nearest": jnp.asarray(nearest), "oldest": jnp.asarray(oldest), "initial_state": (S, z)}
        options = {"kind": kind, "size": size, "eps": EPS, "platform": platform, "interpret": True}
        q, k, v, wq, wk = (x.astype(dtype) for x in (q, k, v, wq, wk))
        return windowed_linear_attention(q, k, v, wq, wk, gamma, **options, **(marks if documents else {}))

    def both(*arrays):
        y, pull = jax.vjp(ours, *(x.astype("float32") for x in arrays))
        return y, *pull(dy.astype(y.dtype))

    found = dict(zip(("y", *NAMES), jax.jit(both)(*arrays), strict=True))
    tolerance = 1e-2 if dtype == "bfloat16" else 1e-5
    for name in ("y", *(NAMES if documents else NAMES[:6])):
        error = np.abs(np.asarray(found[name], np.float64) - expected[name]).max()
        assert error <= tolerance * sizes[name], f"{name}: {error / sizes[name]:.1e}"


@pytest.mark.parametrize("platform", ["gpu", "tpu"])
class TestOneRecurrenceFourTimes:
    def test_a_single_token(self, platform):
        check(platform, 1, "sliding", 4)

    def test_blocks_that_begin_anywhere_in_a_chunk(self, platform):
        check(platform, 63, "terraced", 24)

    def test_documents_and_a_state(self, platform):
        check(platform, 257, "sliding", 20, N=2, heads=(2, 1, 1, 2), documents=True)

    def test_bfloat16(self, platform):
        check(platform, 100, "terraced", 8, N=2, heads=(1, 2, 2, 1), documents=True, dtype="bfloat16")


def test_pieces_at_once():
    check("gpu", 2100, "sliding", 64, documents=True, dtype="bfloat16")


@pytest.mark.parametrize("kind", ["sliding", "terraced"])
@pytest.mark.parametrize("size, C", [(1, 16), (16, 16), (24, 16), (64, 64), (64, 128), (128, 64)])
@pytest.mark.parametrize("aligned", [True, False])
def test_tiles_hold_every_window(kind, size, C, aligned):
    """Query by query: where its nearest key lies, and the far one before it."""
    near, far = set(), set()
    for begin in range(0, C * size, C) if aligned else range(size):
        for place in range(C):
            back = (begin + place) % size + size if kind == "terraced" else size - 1
            near.add(-((place - back) // C))
            far.add(-((place - back - 1) // C))
    assert tiles(kind, size, C, aligned=aligned) == (max(2, max(near) + 1), max(0, min(far)))


def test_what_the_kernels_do_not_take():
    def why(P=64, H=64, dtype="bfloat16", size=64, platform="gpu", kind="terraced"):
        q, v = (jax.ShapeDtypeStruct((1, 8, 1, d), dtype) for d in (P, H))
        return obstacle(q, q, v, v, kind=kind, size=size, platform=platform)

    assert why() is None
    assert "96 features" in why(P=96)
    assert "float16" in why(dtype="float16")
    assert "registers" in why(P=128, dtype="float32")
    assert why(P=128, dtype="float32", platform="tpu") is None
    assert "9 tiles of 64" in why(size=512)


def test_the_operator_runs_the_kernel(monkeypatch):
    """On a GPU; here interpreted. Documents, padding anywhere, a second prefill after the first."""
    kernels = pytest.importorskip("kernels_pallas.windowed_linear_attention")
    monkeypatch.setattr(dispatch, "platform", lambda: "gpu")
    interpreted = functools.partial(kernels.windowed_linear_attention, interpret=True)
    monkeypatch.setattr(kernels, "windowed_linear_attention", interpreted)
    rng = np.random.default_rng(0)
    q, k = (jnp.asarray(np.abs(rng.normal(size=(1, 70, 2, 16))), jnp.float32) for _ in range(2))
    v, wq, wk = (jnp.asarray(rng.normal(size=(1, 70, n, 16)), jnp.float32) for n in (1, 2, 1))
    ids, gamma = jnp.array([[1] * 30 + [0] * 3 + [1] * 7 + [2] * 20 + [0] * 10]), jnp.array([0.3, 0.8])

    def run(q, k, v, wq, wk, ids, *, implementation):
        results, state = [], None
        for part in (slice(0, 36), slice(36, 70)):
            results.append(
                linear_attention(
                    *(x[:, part] for x in (q, k, v)),
                    normalize=True,
                    window=Window("terraced", 8, wq[:, part], wk[:, part], gamma),
                    segment_ids=ids[:, part],
                    initial_state=state,
                    implementation=implementation,
                )
            )
            state = results[-1][1]
        return results

    got, want = (jax.jit(functools.partial(run, implementation=form)) for form in (None, "reference"))
    arrays = q, k, v, wq, wk, ids
    for x, y in zip(jax.tree.leaves(got(*arrays)), jax.tree.leaves(want(*arrays)), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5)
    with pytest.raises(UserError, match="one token"):
        window = Window("terraced", 8, wq[:, :1], wk[:, :1], gamma)
        linear_attention(q[:, :1], k[:, :1], v[:, :1], window=window, implementation="triton")
