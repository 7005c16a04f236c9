"""Linear attention, its windows and its states against the sums they stand for, in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import quick_xla
import torch
from attention_checks import sums_between

import lcx.ops.linear_attention as operator
from kernels_pallas import backends
from lcx.errors import UserError
from lcx.ops import dispatch, fir_conv
from lcx.ops.linear_attention import LinearState, Window, linear_attention

B, P, H, D = 2, 5, 3, 4  # D: head dim of the window's q and k

# T, heads of (q, k, v, decay or the window's keys), decay | (kind, size), normalize, segments, state, chunk
CASES = {
    "one token": (1, (4, 4, 2, 1), "decay", True, False, True, None),
    "pure": (63, (2, 2, 2, 0), None, True, False, False, None),
    "grouped values": (100, (4, 4, 2, 0), None, True, True, True, 16),
    "unnormalized": (257, (4, 2, 4, 0), None, False, True, False, None),
    "ssd": (100, (1, 1, 4, 4), "decay", False, True, True, 16),
    "decay, normalized": (63, (4, 2, 1, 1), "decay", True, True, True, 16),
    "decay, long": (257, (2, 2, 2, 2), "decay", False, False, False, None),
    "heads that share no group": (37, (6, 2, 3, 6), "decay", True, False, False, 8),
    "sliding": (100, (4, 4, 2, 2), ("sliding", 7), True, True, False, None),
    "sliding, small chunk": (63, (4, 2, 1, 2), ("sliding", 9), True, False, False, 4),
    "sliding, one token": (1, (2, 2, 1, 1), ("sliding", 4), True, False, False, None),
    "sliding, all keys": (37, (2, 2, 2, 2), ("sliding", 64), True, False, False, 8),
    "terraced": (100, (4, 4, 2, 2), ("terraced", 16), True, True, False, None),
    "terraced, aligned": (64, (4, 4, 2, 2), ("terraced", 8), True, False, False, 8),
    "terraced, long": (257, (2, 1, 2, 1), ("terraced", 33), True, True, False, None),
    "terraced, of one": (37, (2, 2, 2, 1), ("terraced", 1), True, True, False, 8),
}


def arrays(T, heads, option, normalize, segments, state):
    rng = np.random.default_rng(T)
    N = max(heads[:3])
    x = {name: np.abs(rng.normal(size=(B, T, n, P))) for name, n in zip("qk", heads, strict=False)}
    x["v"] = rng.normal(size=(B, T, heads[2], H))
    if option == "decay":
        x["a"] = -np.exp(rng.normal(size=(B, T, heads[3])))
    elif option:
        x["wq"], x["wk"] = 2 * rng.normal(size=(B, T, N, D)), 2 * rng.normal(size=(B, T, heads[3], D))
        x["gamma"] = rng.uniform(0.1, 0.9, N)
    if state:
        x["kv"] = rng.normal(size=(B, N, P, H))
        if normalize:
            x["k_sum"] = np.abs(rng.normal(size=(B, N, P)))
    ids = None
    if segments:
        ids = np.sort(rng.integers(1, 4, (B, T)), axis=1).astype(np.int32)
        ids[:, T - T // 6 :] = ids[:, T // 3 : T // 3 + 2] = ids[1, :3] = (
            0  # at the end, within a document, in front
        )
    return x, ids


def pair_masks(ids, T, option):
    """[B, T, T] numbers: 1 where i sees j by softmax, 1 where it sees it linearly; [B, T]: it sees the state (id 1)."""
    near, far, state = np.zeros((B, T, T)), np.zeros((B, T, T)), np.zeros((B, T))
    for b in range(B):
        row = np.ones(T, int) if ids is None else ids[b]
        for i in np.flatnonzero(row):
            seen = [j for j in range(i + 1) if row[j] == row[i]]
            state[b, i] = row[i] == 1
            kind, size = (None, 1) if option in (None, "decay") else option
            at = len(seen) - 1
            first = {None: len(seen), "sliding": at - size + 1, "terraced": (at // size - 1) * size}[kind]
            far[b, i, seen[: max(first, 0)]] = 1
            near[b, i, seen[max(first, 0) :]] = 1
    return near, far, state


def definition(x, masks, normalize):
    """y [B, T, N, H], all in float64 by torch, every pair at once."""
    near, far, from_state = (torch.tensor(m)[:, None] for m in masks)
    N, T = max(v.shape[2] for name, v in x.items() if name in ("q", "k", "v", "a")), x["q"].shape[1]
    heads = {n: x[n].repeat_interleave(N // x[n].shape[2], 2) for n in ("q", "k", "v", "a", "wk") if n in x}
    q, k, v = (heads[name] for name in "qkv")
    a = heads.get("a", torch.zeros(B, T, N, dtype=v.dtype))
    real = (near + far).amax((1, 3)) > 0
    total = torch.where(real[..., None], a, 0).cumsum(1).transpose(1, 2)
    gaps = (total[..., None] - total[:, :, None]).clamp(max=0)
    weights = torch.einsum("btnp,bsnp->bnts", q, k) * far * gaps.exp()
    if "wq" in x:
        s = torch.einsum("btnh,bsnh->bnts", x["wq"], heads["wk"]) / np.sqrt(D)
        s = s.masked_fill(near == 0, -1e30)
        weights = weights + x["gamma"][:, None, None] * near * (s - s.amax(-1, keepdim=True)).exp()
    into = from_state * total.exp()
    num, den = torch.einsum("bnts,bsnh->btnh", weights, v), weights.sum(-1)
    if "kv" in x:
        num = num + torch.einsum("bnt,btnp,bnph->btnh", into, q, x["kv"])
    if "k_sum" in x:
        den = den + torch.einsum("bnt,btnp,bnp->bnt", into, q, x["k_sum"])
    return num / den.masked_fill(den == 0, 1).transpose(1, 2)[..., None] if normalize else num


def ours(x, ids, option, normalize, chunk, form, cuts=()):
    """y of the operator, in as many calls as there are pieces, and the last state."""
    T = x["q"].shape[1]
    state = None
    if "kv" in x:
        state = LinearState(x["kv"], x.get("k_sum"), jnp.ones((B,), jnp.int32))
    ys = []
    for start, end in zip((0, *cuts), (*cuts, T), strict=True):
        cut = {name: value[:, start:end] for name, value in x.items() if name not in ("gamma", "kv", "k_sum")}
        window = None
        if "wq" in x:
            window = Window(*option, cut["wq"], cut["wk"], x["gamma"])
        y, state = linear_attention(
            cut["q"], cut["k"], cut["v"], log_decay=cut.get("a"), normalize=normalize, window=window,
            segment_ids=None if ids is None else jnp.array(ids[:, start:end]), initial_state=state,
            chunk_size=chunk, implementation=form,
        )  # fmt: skip
        ys.append(y)
    return jnp.concatenate(ys, axis=1), state


def with_gradients(f, x):
    """f(x) and the gradients of sum(w f(x)) for a fixed w."""

    def loss(x):
        y = f(x)
        return jnp.sum(y * jnp.cos(jnp.arange(y.size, dtype=y.dtype)).reshape(y.shape)), y

    grads, y = jax.jit(jax.grad(loss, has_aux=True))(x)
    return {"y": y, **grads}


def assert_close(got, want, tolerance):
    assert got.keys() == want.keys()
    for name, value in want.items():
        error = np.abs(np.asarray(got[name], np.float64) - value).max() / max(np.abs(value).max(), 0.1)
        assert error < tolerance, (name, error)


@functools.cache
def expected(name):
    T, heads, option, normalize, segments, state, chunk = CASES[name]
    x, ids = arrays(T, heads, option, normalize, segments, state)
    inputs = {name: torch.tensor(value, requires_grad=True) for name, value in x.items()}
    y = definition(inputs, pair_masks(ids, T, option), normalize)
    (y * torch.arange(y.numel()).to(y.dtype).cos().reshape(y.shape)).sum().backward()
    want = {"y": y.detach().numpy(), **{name: value.grad.numpy() for name, value in inputs.items()}}
    return x, ids, option, normalize, chunk, want


@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients_equal_the_definition(name):
    x, ids, option, normalize, chunk, want = expected(name)
    x = {name: jnp.array(value, jnp.float32) for name, value in x.items()}
    assert_close(with_gradients(lambda x: ours(x, ids, option, normalize, chunk, "xla")[0], x), want, 1e-4)


@pytest.mark.parametrize(
    "name", ["grouped values", "decay, normalized", "unnormalized", "sliding", "terraced"]
)
def test_the_reference_equals_the_definition(name):
    x, ids, option, normalize, chunk, want = expected(name)
    x = {name: jnp.array(value, jnp.float32) for name, value in x.items()}
    y = jax.jit(lambda x: ours(x, ids, option, normalize, chunk, "reference")[0])(x)
    assert_close({"y": y}, {"y": want["y"]}, 1e-4)


@pytest.mark.parametrize(
    "name", ["decay, normalized", "sliding", "sliding, all keys", "terraced", "terraced, aligned"]
)
@pytest.mark.parametrize("form", ["xla", "reference"])
def test_in_pieces_equals_the_definition(name, form):
    """Also the gradients through the states, and a last piece of one token."""
    x, ids, option, normalize, chunk, want = expected(name)
    T = x["q"].shape[1]
    x = {name: jnp.array(value, jnp.float32) for name, value in x.items()}
    cuts = (T // 2, T - 1)

    def run(x):
        return ours(x, ids, option, normalize, chunk, form, cuts)[0]

    if form == "reference":
        got, want = {"y": jax.jit(run)(x)}, {"y": want["y"]}
    else:
        got = with_gradients(run, x)
    assert_close(got, want, 1e-4)


@pytest.mark.parametrize("name", ["ssd", "decay, normalized", "grouped values", "sliding", "terraced"])
def test_bfloat16_stays_near_float64(name):
    x, ids, option, normalize, chunk, want = expected(name)
    low = {name: value.ndim == 4 and name != "kv" for name, value in x.items()}
    x = {name: jnp.array(value, jnp.bfloat16 if low[name] else jnp.float32) for name, value in x.items()}
    y, _ = jax.jit(lambda x: ours(x, ids, option, normalize, chunk, None))(x)
    assert y.dtype == jnp.bfloat16
    assert np.linalg.norm(y.astype(jnp.float32) - want["y"]) / np.linalg.norm(want["y"]) < 1e-2


def test_a_long_decay_keeps_its_accuracy():
    """Far into a row the sum of the decays is large, and its float32 rounding no small number."""
    T, rng = 4096, np.random.default_rng(0)
    q, k, v = (np.abs(rng.normal(size=(1, T, 1, 2))) for _ in range(3))
    a = -np.full((1, T, 1), 30.0)
    a[:, -8:] = -1e-3
    y, _ = linear_attention(
        *(jnp.array(x, jnp.float32) for x in (q, k, v)), log_decay=jnp.array(a, jnp.float32)
    )
    weights = [np.exp(a[0, j + 1 :, 0].sum()) * (q[0, -1, 0] @ k[0, j, 0]) for j in range(T)]
    np.testing.assert_allclose(y[0, -1, 0], np.array(weights) @ v[0, :, 0], rtol=2e-6)


def test_a_document_changed_changes_no_bit_of_another():
    """Decays are summed within chunks of 16 tokens, which hold several documents: over each of them alone."""
    T, heads, option, normalize, _, state, chunk = CASES["ssd"]
    x, ids = arrays(T, heads, option, normalize, True, state)
    x = {name: np.float32(value) for name, value in x.items()}
    mine = (ids == 2)[..., None]
    moved = {name: np.where(mine if value.ndim == 3 else mine[..., None], 1.5 * value, value)
             for name, value in x.items() if name != "kv"} | {"kv": x["kv"]}  # fmt: skip

    @jax.jit
    def run(x):
        return with_gradients(lambda x: ours(x, ids, option, normalize, chunk, "xla")[0], x)

    before, after = jax.device_get((run(x), run(moved)))
    for name in ("y", "q", "k", "v", "a"):
        changed = (before[name] != after[name]).reshape(B, T, -1).any(axis=2)
        assert not changed[ids != 2].any() and changed[ids == 2].any(), name


@pytest.mark.parametrize("kind", [None, "sliding", "terraced"])
def test_work_and_memory_grow_with_the_length_alone(kind):
    """Forward and backward: four times the tokens, four times the temporaries and the operations."""

    def cost(T):
        def loss(q, wq, gamma):
            window = None if kind is None else Window(kind, 32, wq, wq, gamma)
            return jnp.sum(linear_attention(q, q, wq, normalize=True, window=window)[0])

        shapes = ((1, T, 2, 16), (1, T, 2, 16), (2,))
        shapes = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
        program = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(*shapes).compile()
        return program.memory_analysis().temp_size_in_bytes, program.cost_analysis()["flops"]

    (small, few), (large, many) = cost(1024), cost(4096)
    assert large < 4.2 * small and many < 4.2 * few


def test_a_kernel_gets_documents_as_runs(monkeypatch):
    """On a GPU the operator's result is the kernel's; here interpreted."""
    kernels = pytest.importorskip("kernels_pallas.linear_attention")
    monkeypatch.setattr(dispatch, "platform", lambda: "gpu")
    monkeypatch.setattr(
        kernels, "linear_attention", functools.partial(kernels.linear_attention, interpret=True)
    )
    rng = np.random.default_rng(0)
    q, k, v = (jnp.array(np.abs(rng.normal(size=(1, 70, 1, 16))), jnp.float32) for _ in range(3))
    a = -jnp.abs(v[..., 0])
    ids = jnp.array([[1] * 30 + [0] * 3 + [1] * 7 + [2] * 20 + [0] * 10])
    state = LinearState(jnp.ones((1, 1, 16, 16)), jnp.ones((1, 1, 16)), jnp.ones((1,), jnp.int32))
    options = {"log_decay": a, "normalize": True, "segment_ids": ids, "initial_state": state}
    got, want = (
        jax.jit(functools.partial(linear_attention, implementation=form, **options))(q, k, v)
        for form in (None, "reference")
    )
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5)
    with pytest.raises(UserError, match="one token"):
        linear_attention(q[:, :1], k[:, :1], v[:, :1], implementation="triton")


@pytest.mark.parametrize(
    ("triton", "jax_version", "device", "chosen"),
    [
        (True, (0, 12, 0), "NVIDIA H100 80GB HBM3", "triton"),
        (False, (0, 12, 0), "NVIDIA H100 80GB HBM3", "mosaic"),
        (False, (0, 12, 0), "NVIDIA GH200 480GB", "mosaic"),
        (False, (0, 12, 0), "NVIDIA B200", "xla"),
        (False, (0, 10, 2), "NVIDIA H200", "xla"),
    ],
)
def test_mosaic_is_chosen_where_triton_is_missing(monkeypatch, triton, jax_version, device, chosen):
    monkeypatch.setattr(dispatch, "platform", lambda: "gpu")
    monkeypatch.setattr(dispatch, "_device_kind", lambda: device)
    monkeypatch.setattr(backends.jax, "__version_info__", jax_version)
    if not triton:
        monkeypatch.setattr(backends, "triton", None)
    q, v, h = jnp.ones((1, 64, 2, 64)), jnp.ones((1, 16, 64)), jnp.ones((2, 128))
    forms = [{**operator._kernel_obstacles(q, q, q, None), "xla": None}, fir_conv._forms(v, h, False)]
    assert [next(name for name, found in form.items() if found is None) for form in forms] == [chosen] * 2
    if chosen == "xla":
        with pytest.raises(UserError, match="needs jax >= 0.11|needs a Hopper GPU"):
            dispatch.choose("linear_attention", "mosaic", forms[0])


def test_mistakes_are_named():
    x, gamma = jnp.ones((1, 4, 3, 2)), jnp.ones(3)
    with pytest.raises(UserError, match="expected divisors"):
        linear_attention(x, x[:, :, :2], x)
    with pytest.raises(UserError, match="expected one of sliding, terraced"):
        linear_attention(x, x, x, window=Window("round", 4, x, x, gamma))
    with pytest.raises(UserError, match="expected one of them"):
        linear_attention(x, x, x, log_decay=-x[..., 0], window=Window("sliding", 4, x, x, gamma))
    with pytest.raises(UserError, match="needs a gpu"):
        linear_attention(x, x, x, implementation="triton")


def hard(kind, T=100):
    """q, k, v, log decay and w [T, ...], float32, with documents."""
    rng = np.random.default_rng(len(kind))
    q, k, v, w = (rng.normal(size=(T, 4)).astype(np.float32) for _ in range(4))
    q, k, a = np.abs(q), np.abs(k), (-0.1 * rng.random(T)).astype(np.float32)
    what, _, size = kind.partition(" ")
    if what == "often":
        a[rng.random(T) < 0.2] = float(size)
    elif what == "empty":  # nothing nearer has weight
        a[T // 2], k[T // 2 :] = float(size), 0
    elif what == "mixed":
        a = -(10.0 ** rng.uniform(-6, 4, T)).astype(np.float32)
    elif what == "tiny":
        a[:], q, k = -1e-12, q * np.float32(1e-15), k * np.float32(1e-15)
    return q, k, v, a, w, np.sort(rng.integers(1, 4, T)).astype(np.int32)


def by_pairs(q, k, v, a, w, ids, eps):
    """y and the gradients of sum(w y), float64; each gap of the decay is a sum of its own. eps None: not divided."""
    q, k, v, a, w = (x.astype(np.float64) for x in (q, k, v, a, w))
    T = len(a)
    gap = sums_between(a)
    decay = np.where(np.tril(np.ones((T, T), bool)) & (ids[:, None] == ids), np.exp(gap), 0)
    W = (q @ k.T) * decay
    den = np.ones((T, 1)) if eps is None else W.sum(1, keepdims=True) + eps
    y = W @ v / den
    dW = (w @ v.T - (0 if eps is None else (w * y).sum(1, keepdims=True))) / den
    dL = (W * dW).sum(1) - (W * dW).sum(0)
    return y, (dW * decay) @ k, (dW * decay).T @ q, (W / den).T @ w, np.cumsum(dL[::-1])[::-1]


HARD = ["often -50", "often -1000", "often -1e5", "often -inf", "empty -1000", "empty -inf", "mixed", "tiny"]


@functools.cache
def on_hard(form, normalize):
    """y and its gradients, in one program for all kinds, compiled as for users: they are about rounding."""
    eps, platform = 1e-12, {"gpu": "gpu", "tpu": "tpu"}.get(form)

    def run(q, k, v, a, w, ids):
        q, k, v, w = (jnp.pad(x, ((0, 0), (0, 12 if platform else 0)))[None, :, None] for x in (q, k, v, w))
        options = {"normalize": normalize, "eps": eps}

        def y(q, k, v, a):
            if platform:
                kernels = pytest.importorskip("kernels_pallas.linear_attention")
                runs = jnp.cumsum(jnp.diff(ids, prepend=0) != 0, dtype=jnp.int32)[None]
                options.update(platform=platform, interpret=True)
                return kernels.linear_attention(q, k, v, log_decay=a, runs=runs, **options)[0]
            options.update(implementation=form)
            return linear_attention(q, k, v, log_decay=a, segment_ids=ids[None], **options)[0]

        y, pull = jax.vjp(y, q, k, v, a[None, :, None])
        y, dq, dk, dv, da = (x[0, :, 0] for x in (y, *pull(w)))
        return *(x[:, :4] for x in (y, dq, dk, dv)), da

    return quick_xla.as_for_users()(jax.jit(run))


@pytest.mark.parametrize(
    "form, normalize",
    [("reference", True), ("xla", True), ("xla", False), ("gpu", True), ("tpu", False)],
)
@pytest.mark.parametrize("kind", HARD)
def test_hard_decays_are_exact(kind, form, normalize):
    """Values and gradients of every form, and no gradient by a reset."""
    x = hard(kind)
    got = on_hard(form, normalize)(*x)
    for g, want in zip(got, by_pairs(*x, 1e-12 if normalize else None), strict=True):
        assert np.isfinite(g).all()
        np.testing.assert_allclose(g, want, rtol=0, atol=3e-5 * np.abs(want).max())
    assert not np.any(got[-1][np.isneginf(x[3])])


@pytest.mark.parametrize("kind", ["often -1000", "often -inf", "empty -1000", "mixed", "tiny"])
def test_hard_decays_in_bfloat16(kind):
    """Within a few roundings of the largest entry, of what the same rounded inputs give exactly."""
    q, k, v, a, w, ids = hard(kind)
    low = [jnp.array(x, jnp.bfloat16) for x in (q, k, v, w)]
    q, k, v, w = (np.asarray(x, np.float32) for x in low)
    got = on_hard("xla", True)(*low[:3], a, low[3], ids)
    for g, want in zip(got, by_pairs(q, k, v, a, w, ids, 1e-12), strict=True):
        g = np.asarray(g, np.float64)
        assert np.isfinite(g).all() and np.abs(g - want).max() <= 6 * 2**-8 * np.abs(want).max()


@pytest.mark.parametrize(
    ("form", "dtype", "normalize", "most"),
    [
        ("xla", jnp.float32, False, 1e-5),
        ("xla", jnp.bfloat16, True, 5e-3),
        ("gpu", jnp.bfloat16, True, 5e-3),
        ("tpu", jnp.bfloat16, False, 5e-3),
    ],
)
def test_a_strong_decay_has_its_gradient(form, dtype, normalize, most):
    """That of a factor of all decays, to which what a token adds to itself, much more than the others, adds nothing."""
    q, k, v, a, w, ids = hard("mixed")
    a = -10 * np.logaddexp(0, np.random.default_rng(1).normal(size=a.shape)).astype(np.float32)
    low = [jnp.array(x, dtype) for x in (q, k, v, w)]
    got = on_hard(form, normalize)(*low[:3], a, low[3], ids)[-1]
    q, k, v, w = (np.asarray(x, np.float32) for x in low)
    want = a * by_pairs(q, k, v, a, w, ids, 1e-12 if normalize else None)[-1]
    assert abs(np.sum(a * np.asarray(got, np.float64) - want)) <= most * np.abs(want).sum()
