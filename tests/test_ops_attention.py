"""The attention operator against torch and against its own definition in float64."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import quick_xla
from attention_checks import lengths_of_loops, pulled, sums_between, with_gradients

from kernels_pallas import aot
from lcx.errors import UserError
from lcx.ops import attention_tiles, attention_vendors, dispatch
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


def numpy_attention(q, k, v, w, ids, window, a=None):
    """Outputs and gradients of sum(w * y) by hand, float64, one query at a time; with a decay, its gradient last."""
    B, T, N, H = q.shape
    q, k, v, w = (x.astype(np.float64) for x in (q, k, v, w))
    group = N // k.shape[2]
    y, dq, dk, dv = np.zeros_like(q), np.zeros_like(q), np.zeros_like(k), np.zeros_like(v)
    real = np.ones((B, T, 1)) if ids is None else (ids != 0)[..., None]
    rate = np.zeros((B, T, N)) if a is None else a.astype(np.float64) * real
    total, da = np.cumsum(rate, axis=1), np.zeros((B, T, N))
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
                p = keys @ q[b, t, n] / np.sqrt(H) + total[b, t, n] - total[b, s, n]
                p = np.exp(p - p.max())
                p /= p.sum()
                y[b, t, n] = p @ values
                dp = values @ w[b, t, n]
                ds = p * (dp - p @ dp) / np.sqrt(H)
                dq[b, t, n] = ds @ keys
                np.add.at(dk, (b, s, n // group), ds[:, None] * q[b, t, n])
                np.add.at(dv, (b, s, n // group), p[:, None] * w[b, t, n])
                da[b, t, n] += ds.sum() * np.sqrt(H)
                da[b, s, n] -= ds * np.sqrt(H)
    da = np.cumsum(da[:, ::-1], axis=1)[:, ::-1] * real
    return (y, dq, dk, dv) if a is None else (y, dq, dk, dv, da)


@pytest.mark.parametrize("implementation", ["reference", "xla"])
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


@pytest.mark.parametrize(
    "case, tiles",
    [((2, 100, 4, 2, 8, 70, True), [(16, 4), (16, 2)]), ((1, 96, 2, 2, 8, None, True), [(32, 2), (16, 2)])],
    ids=str,
)
def test_tiles_that_several_cores_share(case, tiles, monkeypatch):
    """`tiles`: the width and the number of heads at once, forward and backward."""
    monkeypatch.setattr(attention_tiles, "WIDE", 16)
    monkeypatch.setattr(attention_tiles, "SCORES", 2048)
    monkeypatch.setattr(dispatch, "shares_cores", lambda: True)
    B, T, N, K, _, window, _ = case
    sizes = {"heads": B * K, "group": N // K, "decays": False}
    plan = attention_tiles.Plan.of(T, T, **sizes, window=window, masked=True)
    assert [(p.cols, p.heads) for p in (plan, plan.backward(B * K, N // K))] == tiles
    test_values_and_gradients_equal_the_definition(case, "xla")


def test_tiles_of_other_documents_and_chunks_are_left_out():
    """From the furthest tile with a visible pair: documents, and chunks of two tiles, which have two ids in turn."""
    T, places = 768, np.arange(768)
    plan = attention_tiles.Plan(64, 128, 1, None, True)
    documents = np.stack([1 + (places >= 300), 1 + (places >= 400) + (places >= 500)])
    documents[:, 700:] = 0
    for ids, window in ((documents, None), (2 + places[None] // 256 % 2, 256)):
        plan = dataclasses.replace(plan, window=window)
        visited = jax.jit(functools.partial(visits, plan))(jnp.array(ids, jnp.int32))
        seen = (ids[:, :, None] == ids[:, None]) & (ids != 0)[:, :, None] & (places[:, None] >= places)
        seen &= places[:, None] - places < (window or T)
        tiles = seen.any(0).reshape(T // 64, 64, T // 128, 128).any((1, 3))
        last = np.arange(T // 64) // 2
        np.testing.assert_array_equal(visited, np.where(tiles.any(1), last + 1 - tiles.argmax(1), 0))


def visits(plan, ids):
    """The number of tiles for each block of queries."""
    documents = attention_tiles.Documents.of(ids, plan.cols)
    return jnp.stack([
        plan.over_tiles(places, ids.shape[1], lambda start, n, whole: n + 1, 0, documents=documents)
        for places in map(attention_tiles.FIRST.of_block, jnp.arange(0, ids.shape[1], plan.rows))
    ])  # fmt: skip


@pytest.mark.parametrize("implementation", ["reference", "xla"])
@pytest.mark.parametrize("case", [CASES[i] for i in (0, 1, 4, 5)], ids=str)
def test_decay_values_and_gradients_equal_the_definition(case, implementation):
    B, T, N, K, H, window, segments = case
    q, k, v, w, ids = arrays(B, T, N, K, H, segments)
    if segments:
        ids[:, T // 4 : T // 4 + 3] = 0  # padding inside a document does not decay
    a = np.random.default_rng(T + 1).uniform(-0.3, 0, (B, T, N)).astype(np.float32)
    expected = numpy_attention(q, k, v, w, ids, window, a)
    settings = {"window": window, "implementation": implementation}
    settings |= dict.fromkeys(("q_segment_ids", "kv_segment_ids"), None if ids is None else jnp.array(ids))

    def f(q, k, v, a):
        return attention(q, k, v, log_decay=a, **settings)

    for got, want in zip(with_gradients(f, q, k, v, a, w), expected, strict=True):
        np.testing.assert_allclose(got, want, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("T", [1, 5, 30, 91])
def test_decay_against_a_cache_equals_the_whole_row(T):
    """Queries that begin at another place in every row, in the middle of a tile of keys."""
    S, length, offset = 400, 301, np.array([301 - T, 170])
    q, k, v, w, _ = arrays(2, S, 4, 2, 16, False)
    a = np.random.default_rng(1).uniform(-0.3, 0, (2, S, 4)).astype(np.float32)
    whole = numpy_attention(q, k, v, w, None, None, a)[0]
    cached = (np.arange(S) < length).astype(np.int32)[None].repeat(2, axis=0)
    own = offset[:, None] + np.arange(T)
    got = jax.jit(attention)(
        *(np.take_along_axis(q, own[:, :, None, None], axis=1), k, v),
        log_decay=a,
        q_segment_ids=np.ones((2, T), np.int32),
        kv_segment_ids=cached,
        q_offset=offset,
    )
    np.testing.assert_allclose(
        got, np.take_along_axis(whole, own[:, :, None, None], axis=1), atol=1e-5, rtol=1e-4
    )


@pytest.mark.parametrize("window", [None, 150])
def test_all_heads_at_once_read_a_cache_as_one_does(window, monkeypatch):
    """As on accelerators, with rows at other places. The loop over tiles has one length: gradients change in place."""
    monkeypatch.setattr(dispatch, "platform", lambda: "gpu")
    S, T, offset = 400, 70, np.array([231, 170])
    q, k, v, w, _ = arrays(2, S, 4, 2, 16, False)
    own = (offset[:, None] + np.arange(T))[:, :, None, None]
    some = np.zeros_like(w)
    np.put_along_axis(some, own, np.take_along_axis(w, own, axis=1), axis=1)
    y, dq, dk, dv = numpy_attention(q, k, v, some, None, window)

    def f(q, k, v):
        ids = jnp.ones((2, T), jnp.int32), jnp.ones((2, S), jnp.int32)
        return attention_tiles.tiled(q, k, v, *ids, jnp.array(offset), None, window=window, scale=0.25)[0]

    own_q, own_w, y, dq = (np.take_along_axis(x, own, axis=1) for x in (q, w, y, dq))
    for got, want in zip(with_gradients(f, own_q, k, v, own_w), (y, dq, dk, dv), strict=True):
        np.testing.assert_allclose(got, want, atol=1e-5, rtol=1e-4)
    program = jax.make_jaxpr(jax.vjp(f, own_q, k, v)[1])(own_w)
    assert lengths_of_loops(program.jaxpr) == {()}, "a loop of several lengths, which copies what it carries"


def test_a_strong_decay_early_leaves_the_later_differences_exact():
    """Decays that add up to 1e6, then gentle ones: a prefix sum over the row would be off by 0.06."""
    q, k, v, w, _ = arrays(1, 512, 1, 1, 16, False)
    a = np.full((1, 512, 1), -0.01, np.float32)
    a[:, :256] = -4000
    expected = numpy_attention(q, k, v, w, None, None, a)
    got = with_gradients(lambda q, k, v, a: attention(q, k, v, log_decay=a), q, k, v, a, w)
    for g, want in zip(got, expected, strict=True):
        np.testing.assert_allclose(g, want, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    "case", [(1, 100, 4, 2, 128, None, True), (1, 300, 2, 2, 64, 130, False), (1, 390, 2, 1, 32, None, False)], ids=str
)
def test_splash_in_an_interpreter_equals_the_definition(case, monkeypatch):
    """How its arrays, heads, windows and segments are passed; the kernel is JAX's. Two cases have several blocks."""
    B, T, N, K, H, window, segments = case
    monkeypatch.setattr(attention_vendors, "BLOCK", 512 if segments else 128)
    q, k, v, w, ids = arrays(B, T, N, K, H, segments)
    expected = numpy_attention(q, k, v, w, ids, window)
    ids = None if ids is None else jnp.array(ids)

    def f(q, k, v):
        return attention_vendors.splash(q, k, v, ids, window=window, scale=H**-0.5, interpret=True)

    for got, want in zip(with_gradients(f, q, k, v, w), expected, strict=True):
        np.testing.assert_allclose(got, want, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("H, window, segments", [(64, None, True), (128, 1024, False)])
def test_splash_compiles_for_a_tpu(H, window, segments):
    """Forward and backward on v5e, chosen by itself; scores never leave the kernel."""
    if missing := aot.available("tpu"):
        pytest.skip(missing)
    T, x = 4096, jax.ShapeDtypeStruct((1, 4096, 4, H), jnp.bfloat16)
    kv, ids = jax.ShapeDtypeStruct((1, T, 2, H), jnp.bfloat16), jax.ShapeDtypeStruct((1, T), jnp.int32)

    def loss(q, k, v, ids):
        ids = ids if segments else None
        y = attention(q, k, v, q_segment_ids=ids, kv_segment_ids=ids, window=window)
        return y.astype(jnp.float32).sum()

    report = aot.compile_tpu(jax.grad(loss, (0, 1, 2)), x, kv, kv, ids, chip="v5e")
    assert len(report.kernels) == 3, report  # forward; dq; dk and dv
    assert report.temp_bytes < T * T * 2


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
        f = jax.grad(
            lambda q, k, v: attention(q, k, v, implementation=implementation).sum(), argnums=(0, 1, 2)
        )
        return jax.jit(f).lower(shape, shape, shape).compile().memory_analysis().temp_size_in_bytes

    assert temporaries("xla") < T * T * 4 / 2
    assert temporaries("reference") > N * T * T * 4


def test_a_named_implementation_works_or_raises():
    q = jnp.ones((1, 4, 3, 8))
    with pytest.raises(
        UserError, match="expected one of 'cudnn', 'splash', 'triton', 'tpu', 'xla', 'reference'"
    ):
        attention(q, q, q, implementation="flash9")
    with pytest.raises(UserError, match="'cudnn': needs a gpu, found cpu"):
        attention(q, q, q, implementation="cudnn")
    with pytest.raises(UserError, match="multiple of num_kv_heads"):
        attention(q, q[:, :, :2], q[:, :, :2])


@pytest.mark.parametrize("window", [None, 1, 130, 384])
def test_splash_masks_are_those_that_jax_finds_position_by_position(window):
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask_info as info

    T, blocks = 1024, (128, 128)
    jax_mask = masks.CausalMask((T, T)) if window is None else masks.LocalMask((T, T), (window - 1, 0), 0)
    own_mask = attention_vendors._mask(T, window)
    for process in (info.process_mask, info.process_mask_dkv):
        found, wanted = (process(masks.MultiHeadMask([mask] * 2), blocks)[0] for mask in (own_mask, jax_mask))
        for mine, theirs in zip(found, wanted, strict=True):
            np.testing.assert_array_equal(mine, theirs)


@pytest.mark.parametrize(
    ("T", "window", "block"),
    [(300, None, 384), (1 << 18, None, 512), (1 << 19, None, 1024), (1 << 20, None, None), (1 << 20, 4096, 512)],
)
def test_splash_is_left_where_its_table_exceeds_scalar_memory(monkeypatch, T, window, block):
    """At a million tokens 8 MiB would be needed of 1 MiB: the compiler refused that, after a long search for blocks."""
    monkeypatch.setattr(dispatch, "platform", lambda: "tpu")
    x = jnp.zeros((1, T, 1, 1), jnp.bfloat16)
    assert attention_vendors._block(x, window) == block
    obstacle = attention_vendors.splash_obstacle(x, x, window=window, cached=False, decays=False)
    assert obstacle is None if block else "table of blocks" in obstacle


@pytest.mark.parametrize(
    "change, reason",
    [
        ({}, None),
        ({"dtype": jnp.float32}, "bfloat16 and float16"),
        ({"H": 20}, "multiples of 8"),
        ({"segmented": True}, "packed segments"),
        ({"cached": True}, "a cache of keys"),
        ({"decays": True}, "log_decay"),
    ],
    ids=str,
)
def test_cudnn_says_what_it_does_not_cover(monkeypatch, change, reason):
    settings = {"dtype": jnp.bfloat16, "H": 64, "segmented": False, "cached": False, "decays": False} | change
    x = jnp.ones((1, 8, 2, settings.pop("H")), settings.pop("dtype"))
    monkeypatch.setattr(dispatch, "platform", lambda: "gpu")
    obstacle = attention_vendors.cudnn_obstacle(x, x, **settings)
    assert obstacle is None if reason is None else reason in obstacle


@functools.cache
def on_hard_decays(form):
    """y and its gradients, in one program for all sizes, compiled as for users: they are about rounding."""
    from kernels_pallas.attention import attention as kernel

    def run(q, k, v, a, w, ids):
        def y(q, k, v, a):
            if form in ("gpu", "tpu"):
                runs = jnp.cumsum(jnp.diff(ids, axis=1, prepend=0) != 0, axis=1, dtype=jnp.int32)
                return kernel(q, k, v, log_decay=a, runs=runs, platform=form, interpret=True)
            segments = {"q_segment_ids": ids, "kv_segment_ids": ids}
            return attention(q, k, v, log_decay=a, implementation=form, **segments)

        return pulled(y, q, k, v, a, w)

    return quick_xla.as_for_users()(jax.jit(run))


@pytest.mark.parametrize("size", [-50, -1000, -1e5, -np.inf])
@pytest.mark.parametrize("form", ["reference", "xla", "gpu", "tpu"])
def test_hard_decays_are_exact(form, size):
    """Values and gradients, each gap of the decay a sum of its own, in float64; scores of up to 30."""
    T, H, rng = 100, 8, np.random.default_rng(0)
    q, k, v, w = (rng.normal(size=(1, T, 1, H)).astype(np.float32) * s for s in (3, 3, 1, 1))
    a = (-0.1 * rng.random((1, T, 1))).astype(np.float32)
    a[:, rng.random(T) < 0.1] = size
    ids = np.sort(rng.integers(1, 4, (1, T)), axis=1).astype(np.int32)
    got = on_hard_decays(form)(q, k, v, a, w, ids)
    q, k, v, w, a, ids = (x[0].astype(np.float64).squeeze() for x in (q, k, v, w, a, ids))
    s = q @ k.T / np.sqrt(H) + sums_between(a)
    s = np.where(np.tril(np.ones((T, T), bool)) & (ids[:, None] == ids), s, -np.inf)
    p = np.exp(s - s.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    ds = p * (w @ v.T - (w * (p @ v)).sum(1, keepdims=True))
    da = np.cumsum((ds.sum(1) - ds.sum(0))[::-1])[::-1]
    want = p @ v, ds @ k / np.sqrt(H), ds.T @ q / np.sqrt(H), p.T @ w, da
    for g, x in zip(got, want, strict=True):
        np.testing.assert_allclose(np.squeeze(g), x, rtol=0, atol=3e-5 * np.abs(x).max())


@pytest.mark.parametrize("form", ["reference", "xla", "gpu", "tpu"])
def test_a_document_changed_changes_no_bit_of_another(form):
    """With decays, values and gradients: no sum reaches into another document, where it would change the rounding."""
    T, H, rng = 100, 8, np.random.default_rng(1)
    q, k, v, w = (rng.normal(size=(1, T, 1, H)).astype(np.float32) for _ in range(4))
    a = (-0.1 * rng.random((1, T, 1))).astype(np.float32)
    ids = np.repeat([1, 2, 0, 3], (20, 33, 2, 45)).astype(np.int32)[None]
    second, program = ids[0] == 2, on_hard_decays(form)
    before = program(q, k, v, a, w, ids)
    changed = [np.where(second[:, None, None], x[:, ::-1] * 3, x) for x in (q, k, v, w)]
    changed.insert(3, np.where(second[:, None], a * 7, a))
    for old, new in zip(before, program(*changed, ids), strict=True):
        np.testing.assert_array_equal(old[:, ~second], new[:, ~second])
