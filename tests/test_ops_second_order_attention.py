"""Second-order attention against its definition in float64 numpy: values, gradients, states."""

import functools
import math
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import quick_xla
from attention_checks import lengths_of_loops, pulled, sums_between, with_gradients
from two_mamba_oracle import load, triangular

from lcx.errors import UserError
from lcx.ops import dispatch, second_order_choice, second_order_expand, second_order_rows, tiling
from lcx.ops.second_order_attention import (
    SecondOrderState,
    empty_state,
    second_order_attention,
)
from lcx.planning import flops

# B, T, N, K, H, mean log-decay (None: no decay), documents, normalize
CASES = [
    (2, 1, 2, 1, 8, -0.5, False, True),
    (1, 63, 4, 2, 16, -0.1, True, True),
    (2, 100, 2, 2, 24, None, True, True),
    (1, 257, 2, 1, 16, -0.02, False, False),
    (1, 257, 2, 2, 32, -0.7, True, True),  # most tiles are negligible
    (1, 300, 1, 1, 20, -0.01, True, False),
]
FORMS = [("reference", None), ("xla", "tiles"), ("xla", "states")]


def arrays(case, seed=0):
    B, T, N, K, H, mean, documents, _ = case
    rng = np.random.default_rng([T, seed])
    q, k, v, w = (rng.normal(size=(B, T, n, H)).astype(np.float32) for n in (N, K, K, N))
    a = None if mean is None else (mean * rng.uniform(0, 2, (B, T, N))).astype(np.float32)
    ids = None
    if documents:
        ids = np.sort(rng.integers(1, 4, (B, T)), axis=1).astype(np.int32)
        ids[:, T // 4 : T // 4 + 3] = 0  # padding in the middle, and at the end
        ids[:, T - T // 9 :] = 0
    return q, k, v, a, w, ids


def document_pairs(ids, B, T):
    """Boolean [B, T, T]: query i sees key j."""
    ids = np.ones((B, T), int) if ids is None else ids
    return np.tril(np.ones((T, T), bool)) & (ids[:, :, None] == ids[:, None]) & (ids[:, :, None] != 0)


def by_hand(q, k, v, a, w, ids, normalize):
    """y and the gradients of sum(w y) by q, k, v, a: float64, the formulas written out."""
    (B, T, N, H), group = q.shape, q.shape[2] // k.shape[2]
    q, k, v, w = (x.astype(np.float64) for x in (q, k, v, w))
    real = np.ones((B, T)) if ids is None else ids != 0
    a = np.zeros((B, T, N)) if a is None else a.astype(np.float64) * real[..., None]
    L, seen = np.cumsum(a, 1), document_pairs(ids, B, T)
    y, dq, dk, dv, dL = (
        np.zeros_like(q),
        np.zeros_like(q),
        np.zeros_like(k),
        np.zeros_like(v),
        np.zeros_like(L),
    )
    for b in range(B):
        for n in range(N):
            m = n // group
            s = q[b, :, n] @ k[b, :, m].T / math.sqrt(H)
            M = np.where(seen[b], np.exp(np.where(seen[b], L[b, :, n, None] - L[b, :, n], 0)), 0)
            W = s**2 * M
            total = W.sum(1) if normalize else np.ones(T)
            P = W / np.where(total == 0, 1, total)[:, None]
            y[b, :, n] = P @ v[b, :, m]
            dP = w[b, :, n] @ v[b, :, m].T
            if normalize:
                dP = dP - (P * dP).sum(1, keepdims=True)
            ds = 2 * s * M / np.where(total == 0, 1, total)[:, None] * dP
            dq[b, :, n] = ds @ k[b, :, m] / math.sqrt(H)
            dk[b, :, m] += ds.T @ q[b, :, n] / math.sqrt(H)
            dv[b, :, m] += P.T @ w[b, :, n]
            dL[b, :, n] = (P * dP).sum(1) - (P * dP).sum(0)
    return y, dq, dk, dv, np.cumsum(dL[:, ::-1], 1)[:, ::-1] * real[..., None]


@functools.partial(jax.jit, static_argnames=("implementation", "form"))
def on_arrays(q, k, v, *, log_decay, **settings):
    """One program; the operator takes jax arrays, no numpy ones."""
    return second_order_attention(q, k, v, log_decay=log_decay, **settings)


def close(got, want, tolerance=1e-4):
    """Each array within tolerance of its own largest entry."""
    for g, x in zip(got, want, strict=True):
        assert g.shape == x.shape and np.isfinite(g).all()
        np.testing.assert_allclose(g, x, rtol=tolerance, atol=tolerance * max(np.abs(x).max(), 1e-3))


@pytest.mark.parametrize("implementation, form", FORMS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_values_and_gradients_equal_the_definition(case, implementation, form):
    q, k, v, a, w, ids = arrays(case)
    expected = by_hand(q, k, v, a, w, ids, case[-1])
    settings = {"normalize": case[-1], "implementation": implementation, "form": form}
    settings["segment_ids"] = None if ids is None else jnp.array(ids)
    if a is None:
        got = with_gradients(lambda q, k, v: second_order_attention(q, k, v, **settings)[0], q, k, v, w)
        expected = expected[:4]
    else:
        got = with_gradients(
            lambda q, k, v, a: second_order_attention(q, k, v, log_decay=a, **settings)[0], q, k, v, a, w
        )
    close(got, expected)


def test_a_step_for_each_token_equals_the_definition():
    """Padding, documents, fewer kv heads, and a row that is no square of whole pieces; a state goes in and out."""
    test_values_and_gradients_equal_the_definition(CASES[1], "xla", "recurrent")
    q, k, v, a, _, _ = (x if x is None else jnp.asarray(x) for x in arrays(CASES[0], seed=1))
    first = on_arrays(q, k, v, log_decay=a, form="states")[1]
    (y, after), (expected, state) = (
        on_arrays(*(jnp.repeat(x, 3, axis=1) for x in (q, k, v)), log_decay=jnp.repeat(a, 3, axis=1),
                  initial_state=first, form=form)
        for form in ("recurrent", "states")
    )
    close([y, after.kv, after.k_sum], [expected, state.kv, state.k_sum])
    assert after.segment_ids.tolist() == [1, 1]


def triangle(x):
    """The published feature map: x_m x_n for m <= n, times sqrt 2 where m < n."""
    m, n = np.triu_indices(x.shape[-1])
    return x[..., m] * x[..., n] * np.where(m == n, 1, math.sqrt(2))


def test_the_expansion_is_the_published_one_in_blocks(reference):

    saved = load(reference, "kron")
    got = second_order_expand.expand(jnp.array(saved["x"]))
    np.testing.assert_allclose(triangular(np.array(got), 16), saved["phi"], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("H", [1, 8, 16, 20, 40, 64])
def test_the_expansion_turns_squares_into_products(H):
    x, y = np.random.default_rng(H).normal(size=(2, 5, H))
    got = np.array(second_order_expand.expand(jnp.array(x, jnp.float32)), np.float64)
    assert got.shape[-1] == second_order_expand.expanded_size(H)
    other = np.array(second_order_expand.expand(jnp.array(y, jnp.float32)), np.float64)
    np.testing.assert_allclose(got @ other.T, (x @ y.T) ** 2, rtol=1e-5, atol=1e-5 * H)
    np.testing.assert_allclose(np.sort(np.abs(triangle(x)) ** 2).sum(), (got**2).sum(), rtol=1e-5)


@pytest.mark.parametrize("implementation, form", FORMS[1:])
def test_a_row_in_pieces_equals_the_row(implementation, form):
    """Outputs and gradients; the state carries the gradient to the pieces before."""
    lengths = (40, 217, 1)  # less than a tile, more than one, a single token
    case = (2, sum(lengths), 2, 1, 16, -0.05, True, True)
    q, k, v, a, w, ids = arrays(case)
    ids = np.where(ids == 0, ids, 1)  # one document, padding in it
    expected = by_hand(q, k, v, a, w, ids, True)
    ends = np.cumsum(lengths)[:-1]

    def pieces(q, k, v, a):
        state, ys = empty_state(2, 2, 16), []
        for *xs, i in zip(*(jnp.split(x, ends, axis=1) for x in (q, k, v, a)), np.split(ids, ends, axis=1)):
            y, state = second_order_attention(
                *xs[:3],
                log_decay=xs[3],
                segment_ids=jnp.array(i),
                initial_state=state,
                implementation=implementation,
                form=form,
            )
            ys.append(y)
        return jnp.concatenate(ys, axis=1)

    close(with_gradients(pieces, q, k, v, a, w), expected)


@pytest.mark.parametrize("implementation, form", FORMS)
def test_a_new_document_does_not_see_the_state(implementation, form):
    case = (1, 40, 1, 1, 16, -0.05, False, True)
    q, k, v, a, w, _ = arrays(case)
    run = functools.partial(on_arrays, implementation=implementation, form=form)
    ones = jnp.ones((1, 40), jnp.int32)
    _, state = run(q, k, v, log_decay=a, segment_ids=ones)
    assert state.segment_ids.tolist() == [1]
    ids = jnp.array([[0] * 2 + [2] * 30 + [3] * 8], jnp.int32)
    y, last = run(q, k, v, log_decay=a, segment_ids=ids, initial_state=state)
    alone, alone_last = run(q, k, v, log_decay=a, segment_ids=jnp.where(ids == 3, ids, 0))
    close([y[:, 32:], last.kv, last.k_sum], [alone[:, 32:], alone_last.kv, alone_last.k_sum])
    assert last.segment_ids.tolist() == [3]
    close([y], [by_hand(q, k, v, a, w, np.array(ids), True)[0]])
    # A row of padding hands the state on as it is.
    y, kept = run(q, k, v, log_decay=a, segment_ids=0 * ones, initial_state=state)
    assert not np.any(y)
    close([kept.kv, kept.k_sum], [state.kv, state.k_sum], 1e-6)
    assert kept.segment_ids.tolist() == [1]


@pytest.mark.parametrize("form", ["tiles", "states"])
def test_a_document_changed_changes_no_bit_of_another(form):
    """Values and gradients: nothing is summed over documents, where it would leave rounding errors in the others."""
    case = (1, 300, 2, 1, 8, -0.05, False, True)
    q, k, v, a, w, _ = arrays(case)
    ids = jnp.array(np.repeat([1, 2, 3], (70, 90, 140))[None])
    second = np.array(ids[0] == 2)

    def run(q, k, v, a):
        return second_order_attention(q, k, v, log_decay=a, segment_ids=ids, form=form)[0]

    program = jax.jit(functools.partial(pulled, run))
    before = program(q, k, v, a, w)
    assert not before[-1][:, [0, 70, 160]].any()  # a decay before the first token acts on nothing
    changed = [np.where(second[:, None, None], x[:, ::-1] * 3, x) for x in (q, k, v, w)]
    changed.insert(3, np.where(second[:, None], a / 2, a))
    for old, new in zip(before, program(*changed), strict=True):
        np.testing.assert_array_equal(old[:, ~second], new[:, ~second])


@pytest.mark.parametrize("implementation, form", FORMS)
def test_the_state_is_the_sum_that_it_says(implementation, form):
    q, k, v, a, _, _ = arrays((1, 140, 2, 1, 16, -0.05, False, True))
    _, state = on_arrays(q, k, v, log_decay=a, implementation=implementation, form=form)
    weight = np.exp(np.cumsum(a.astype(np.float64)[:, ::-1], 1)[:, ::-1] - a)
    phi = np.einsum("btp,btn->btnp", triangle(k[:, :, 0].astype(np.float64)) / 16, weight)

    kv = triangular(np.moveaxis(np.array(state.kv), 2, 3), 16)
    close([kv], [np.einsum("btnp,bth->bnhp", phi, v[:, :, 0].astype(np.float64))])
    close([triangular(np.array(state.k_sum), 16)], [phi.sum(1)])
    assert isinstance(state, SecondOrderState) and state.kv.dtype == jnp.float32


@pytest.mark.parametrize("form", ["tiles", "states"])
def test_a_strong_decay_early_leaves_the_later_differences_exact(form):
    """Decays that add up to 6400, then gentle ones: a prefix sum over the row would lose the fourth digit."""
    q, k, v, a, w, _ = arrays((1, 512, 1, 1, 16, -0.01, False, True))
    a[:, :256] = -25.0
    expected = by_hand(q, k, v, a, w, None, True)
    f = functools.partial(on_arrays, form=form)
    close(with_gradients(lambda q, k, v, a: f(q, k, v, log_decay=a)[0], q, k, v, a, w), expected)


@pytest.mark.parametrize("form", ["tiles", "states"])
def test_a_strong_decay_has_a_gradient_without_what_tokens_add_to_themselves(form):
    """Which is 1e5 times what they add to others here, so that a difference of both would keep no digit of it."""
    _, k, v, a, w, _ = arrays((1, 63, 1, 1, 16, -1.0, False, False))
    given, options = (3 * k, k, v, a - 12, w), {"normalize": False, "form": form, "implementation": "xla"}
    got = with_gradients(lambda q, k, v, a: second_order_attention(q, k, v, log_decay=a, **options)[0], *given)
    close(got[4:], by_hand(*given, None, False)[4:], 1e-5)


def test_negligible_tiles_are_not_visited():
    """Poison in keys that are more than exp(SKIP) away must not arrive."""
    T, tile = 512, second_order_rows.TILE
    q, k, v, a, _, _ = arrays((1, T, 1, 1, 16, -0.5, False, True))
    k[:, :tile] = np.nan
    y, _ = on_arrays(q, k, v, log_decay=a, form="tiles")
    assert np.isfinite(y[:, 2 * tile :]).all() and not np.isfinite(y[:, :tile]).any()


@pytest.mark.parametrize("form", ["states", None])
def test_no_temporary_array_is_as_large_as_the_row(form):
    """Forward and backward of 2^17 tokens: y and its gradient lie where two results will, both forms in place."""
    T, H = 2**17, 64
    x, a = jax.ShapeDtypeStruct((1, T, 1, H), jnp.float32), jax.ShapeDtypeStruct((1, T, 1), jnp.float32)

    def loss(q, k, v, a):
        return (second_order_attention(q, k, v, log_decay=a, form=form)[0] * jnp.arange(H)).sum()

    compiled = jax.jit(jax.grad(loss, (0, 1, 2, 3))).lower(x, x, x, a).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < T * H * 4


def test_a_named_form_works_or_raises():
    q = jnp.ones((1, 4, 3, 8))
    with pytest.raises(UserError, match="expected 'tiles', 'states', 'recurrent' or None"):
        second_order_attention(q, q, q, form="chunks")
    with pytest.raises(UserError, match="expected one of"):
        second_order_attention(q, q, q, implementation="flash9")
    with pytest.raises(UserError, match="multiple of num_kv_heads"):
        second_order_attention(q, q[:, :, :2], q[:, :, :2])


@pytest.mark.parametrize("platform, H, states", [("cpu", 16, 2560), ("cpu", 128, 4096), ("gpu", 32, 2048)])
def test_the_form_by_length(monkeypatch, platform, H, states):
    monkeypatch.setattr(dispatch, "platform", lambda: platform)
    chosen = functools.partial(second_order_choice.choose, None, H=H, follows=False)
    assert chosen(states - 1, forgets=False) == chosen(states - 1, forgets=True) == "tiles"
    assert chosen(states, forgets=False) == "states" and chosen(states, forgets=True) == "either"
    after = functools.partial(second_order_choice.choose, None, H=H, follows=True)
    assert after(4095, forgets=True) == after(2**16, forgets=False) == "states"
    assert after(4096, forgets=True) == ("either" if platform == "cpu" else "states")


def test_the_form_by_the_data_does_not_depend_on_the_length():
    """So that a row of twice the length takes the same form, twice the time."""
    slow, fast = jnp.full((1, 16384, 1), -1e-4), jnp.full((1, 16384, 1), -0.1)
    one = jnp.ones((1, 16384), jnp.int32)
    for T in (4096, 8192, 16384):
        short = jax.jit(functools.partial(second_order_choice.short_reach, H=16))
        assert not short(slow[:, :T], one[:, :T]) and short(fast[:, :T], one[:, :T])
        assert short(slow[:, :T], one[:, :T] + jnp.arange(T) // 512)  # documents


def test_twice_the_row_is_twice_the_work():
    """The multiply-adds of a training pass, in whichever form the data choose: no loop is as long as they say."""

    def loss(q, k, v, a):
        return (second_order_attention(q, k, v, log_decay=a)[0] ** 2).sum()

    def work(T):
        x, a = jax.ShapeDtypeStruct((1, T, 1, 64), jnp.float32), jax.ShapeDtypeStruct((1, T, 1), jnp.float32)
        found = flops.count(jax.jit(jax.grad(loss, (0, 1, 2, 3))).trace(x, x, x, a))
        assert not found.loops
        return found.flops

    assert work(8192) == 2 * work(4096) and work(65536) == 16 * work(4096)


def test_the_form_by_the_data_in_pieces_of_the_row(monkeypatch):
    """Both forms in one program; what concerns single tokens in pieces of 64 tokens, of which 520 is no multiple."""
    monkeypatch.setattr(second_order_choice, "LONG", 256)
    monkeypatch.setattr(second_order_choice, "MOST", 128)
    monkeypatch.setattr(tiling, "PIECE", 64 * 2 * 8 * 4)
    run = jax.jit(functools.partial(pulled, lambda *x: second_order_attention(*x[:3], log_decay=x[3])[0]))
    for rate in (-1e-4, -0.3):
        q, k, v, a, w, _ = arrays((1, 520, 2, 1, 8, rate, False, True))
        close(run(q, k, v, a, w), by_hand(q, k, v, a, w, None, True))


def test_the_form_by_the_data_after_a_state(monkeypatch):
    """Pieces of a row in both forms: with a strong decay only the tiles at their ends have to do with the states."""
    monkeypatch.setattr(second_order_choice, "LONG", 256)
    monkeypatch.setattr(second_order_choice, "MOST", 128)
    T, N, H = 790, 2, 8

    def in_pieces(ids, q, k, v, a):
        def piece(state, xs):
            y, state = second_order_attention(*xs[:3], log_decay=xs[3], segment_ids=xs[4], initial_state=state)
            return state, y

        cut = tuple(jnp.moveaxis(x.reshape(1, 2, T // 2, *x.shape[2:]), 1, 0) for x in (q, k, v, a, ids))
        state, ys = jax.lax.scan(piece, empty_state(1, N, H), cut)
        return jnp.moveaxis(ys, 0, 1).reshape(1, T, N, H), state.kv

    def whole(ids, q, k, v, a):
        y, state = second_order_attention(q, k, v, log_decay=a, segment_ids=ids, form="states")
        return y, state.kv

    def program(f):
        def run(ids, w, *xs):
            (y, kv), pull = jax.vjp(functools.partial(f, ids), *xs)
            return y, kv, *pull((w, jnp.cos(jnp.arange(kv.size)).reshape(kv.shape)))

        return jax.jit(run)

    in_pieces, whole = program(in_pieces), program(whole)
    for rate, documents in ((-1e-4, False), (-0.3, False), (-0.3, True), (-0.02, True)):
        q, k, v, a, w, ids = arrays((1, T, N, 1, H, rate, documents, True))
        ids = np.ones((1, T), np.int32) if ids is None else ids
        got = in_pieces(ids, w, q, k, v, a)
        close(got, whole(ids, w, q, k, v, a))
        close(got[:1], by_hand(q, k, v, a, w, ids, True)[:1])


@pytest.mark.parametrize("form", ["tiles", "states"])
def test_all_heads_at_once_as_on_an_accelerator(form, monkeypatch):
    """With decays and documents by which each skips other tiles. A loop has one length: gradients change in place."""
    monkeypatch.setattr(second_order_rows, "dispatch", types.SimpleNamespace(platform=lambda: "gpu"))
    q, k, v, a, w, ids = arrays((2, 520, 2, 1, 8, -0.1, True, True))
    a, ids[0] = a * np.float32([0.05, 5]), 1

    def piece(state, xs):
        y, state = second_order_attention(
            *xs[:3], log_decay=xs[3], segment_ids=xs[4], initial_state=state, form=form
        )
        return state, y

    def f(q, k, v, a):  # two pieces of 260
        cut = [jnp.moveaxis(x.reshape(2, 2, 260, *x.shape[2:]), 1, 0) for x in (q, k, v, a, jnp.array(ids))]
        return jnp.moveaxis(jax.lax.scan(piece, empty_state(2, 2, 8), cut)[1], 0, 1).reshape(w.shape)

    close(with_gradients(f, q, k, v, a, w), by_hand(q, k, v, a, w, ids, True))
    assert lengths_of_loops(jax.make_jaxpr(functools.partial(pulled, f))(q, k, v, a, w).jaxpr) <= {()}


def corner(name):
    """q, k, v, log decay, w, and the documents: what float32 has trouble with."""
    T, H, rng = 140, 8, np.random.default_rng(len(name))
    q, k, v, w = (rng.normal(size=(1, T, 1, H)).astype(np.float32) for _ in range(4))
    a = (-0.05 * rng.uniform(0, 2, (1, T, 1))).astype(np.float32)
    ids = np.sort(rng.integers(1, 4, (1, T)), axis=1).astype(np.int32)
    what, _, size = name.partition(" ")
    if what == "q":
        q *= np.float32(size)
    elif what == "k":
        k *= np.float32(size)
    elif what == "first":  # scores of each document's first token, and some keys of 0
        q[0, np.flatnonzero(np.diff(ids[0], prepend=0))] *= np.float32(size)
        k[:, 20::7] = 0
    elif what == "mixed":
        k *= (10.0 ** rng.uniform(-14, 4, (1, T, 1, 1))).astype(np.float32)
    elif what == "hard":
        a[:, rng.random(T) < 0.1] = float(size)
    elif what == "empty":  # nothing nearer has weight
        a[:, T // 3], k[:, T // 3 :], ids[:] = float(size), 0, 1
    elif what == "skipped":  # nor in a whole tile, which the decay would skip
        a[:], k[:, 5:], ids[:] = -0.9, 0, 1
    elif what == "tiny":
        a[:] = -1e-12
    elif what == "zeros":  # queries and keys without any weight, the last query among them
        q[:, [5, T - 1]], k[:, :3], ids[:] = 0, 0, 1
    return q, k, v, a, w, ids


CORNERS = [
    *("q 1e-3", "q 1e-10", "q 1e-30", "k 1e-15", "k 1e-30", "first 1e-10", "first 1e-30", "mixed"),
    *("hard -50", "hard -1000", "hard -1e5", "hard -inf", "empty -50", "empty -1e5", "empty -inf", "skipped"),
    *("tiny", "zeros", "plain"),
]


def by_logarithms(q, k, v, a, w, ids, normalize):
    """As by_hand, one row and head: weights by their logarithms, gaps of the decay as sums of their own."""
    q, k, v, w = (x[0, :, 0].astype(np.float64) for x in (q, k, v, w))
    a, ids = a[0, :, 0].astype(np.float64), ids[0]
    T, root = len(a), math.sqrt(q.shape[1])
    s, gap = q @ k.T / root, sums_between(a)
    live = np.tril(np.ones((T, T), bool)) & (ids[:, None] == ids) & (s != 0) & (gap > -np.inf)
    size = np.where(live, 2 * np.log(np.abs(np.where(live, s, 1))) + gap, -np.inf)
    top = np.where(live.any(1), size.max(1), 0) if normalize else np.zeros(T)
    W = np.exp(size - top[:, None])
    P = W / np.where(W.sum(1) == 0, 1, W.sum(1))[:, None] if normalize else W
    dP = w @ v.T
    if normalize:
        dP = np.where(live.sum(1, keepdims=True) == 1, 0, dP - (P * dP).sum(1, keepdims=True))
    ds = 2 * P / np.where(live, s, 1) * dP / root
    dL = (P * dP).sum(1) - (P * dP).sum(0)
    grads = ds @ k, ds.T @ q, P.T @ w
    return *(x[None, :, None] for x in (P @ v, *grads)), np.cumsum(dL[::-1])[::-1][None, :, None]


@functools.cache
def on_corners(implementation, form, normalize):
    """y and its gradients, in one program for all corners, compiled as for users: they are about rounding."""
    settings = {"normalize": normalize, "implementation": implementation, "form": form}

    def run(q, k, v, a, w, ids):
        def y(q, k, v, a):
            return second_order_attention(q, k, v, log_decay=a, segment_ids=ids, **settings)[0]

        return pulled(y, q, k, v, a, w)

    return quick_xla.as_for_users()(jax.jit(run))


@pytest.mark.parametrize("name", CORNERS)
@pytest.mark.parametrize("implementation, form", FORMS)
def test_what_float32_cannot_square(implementation, form, name):
    """One program for all: tiny scores, zero keys, hard resets, decays beyond what float32 can hold."""
    x = corner(name)
    got = on_corners(implementation, form, True)(*x)
    for g, want in zip(got, by_logarithms(*x, True), strict=True):
        error = np.abs(np.asarray(g, np.float64) - want).max()
        assert np.isfinite(g).all() and error <= 3e-5 * max(np.abs(want).max(), 1e-30)
    if name == "zeros":
        assert not np.any(got[0][:, [0, 1, 2, 5, 139]])


@pytest.mark.parametrize("name", ["q 1e-3", "hard -1000", "hard -inf", "empty -50", "zeros"])
@pytest.mark.parametrize("implementation, form", FORMS)
def test_corners_without_the_division(implementation, form, name):
    x = corner(name)
    got = on_corners(implementation, form, False)(*x)
    for g, want in zip(got, by_logarithms(*x, False), strict=True):
        assert np.isfinite(g).all()
        np.testing.assert_allclose(g, want, rtol=0, atol=3e-5 * max(np.abs(want).max(), 1e-30))
    if name == "zeros":
        assert not np.any(got[0][:, [0, 1, 2, 5, 139]])


@pytest.mark.parametrize(
    "name", ["q 1e-30", "first 1e-10", "mixed", "hard -1e5", "hard -inf", "empty -50", "plain"]
)
@pytest.mark.parametrize("form", ["tiles", "states"])
def test_corners_in_bfloat16(form, name):
    """Within a few roundings of the largest entry, of what the same rounded inputs give exactly."""
    *low, w = (jnp.array(x, jnp.bfloat16) for x in (*corner(name)[:3], corner(name)[4]))
    a, ids = corner(name)[3], corner(name)[5]
    q, k, v, dy = (np.asarray(x, np.float32) for x in (*low, w))
    got = on_corners("xla", form, True)(*low, a, w, ids)
    for g, want in zip(got, by_logarithms(q, k, v, a, dy, ids, True), strict=True):
        g = np.asarray(g, np.float64)
        assert np.isfinite(g).all() and np.abs(g - want).max() <= 6 * 2**-8 * np.abs(want).max()
        assert name != "plain" or np.linalg.norm(g - want) < 1e-2 * np.linalg.norm(want)
