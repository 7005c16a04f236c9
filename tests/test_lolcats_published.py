"""The layer with `published_quirks` against the published one, at every length and through its cache; feature maps and
mixing of both layers against float64."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from test_linear_attention_mixer import layer, load

from lcx.mixers.linear_attention import FeatureMap, LinearAttention
from lcx.ops import published_lolcats
from lcx.ops.linear_attention import Window

LENGTHS = (32, 27, 16, 13, 8, 6, 1)
LAYERS = {"layer_hedgehog_linear": None, "layer_hybrid_sw": "sliding", "layer_hybrid_tk": "terraced"}
TOLERANCE = 2e-5  # of the largest number


@pytest.fixture(params=LAYERS)
def published(request, reference):
    """(the file, the mixer, its parameters, the kind of its window)"""
    file, kind = load(reference, request.param), LAYERS[request.param]
    mixer, params = layer(file, kind)
    return file, mixer.clone(published_quirks=True, parent=None), params, kind


def assert_near(got, want, message="", least=1e-6):
    bound = max(TOLERANCE * np.abs(want).max(), least)
    np.testing.assert_allclose(got, want, rtol=0, atol=bound, err_msg=message)


def lengths(kind):
    """Those that are special: to the sliding window, and to none, all are alike."""
    return LENGTHS if kind == "terraced" else (27, 1)


def by_time(x):
    """[B, N, T, H] <-> [B, T, N, H]."""
    return jnp.asarray(np.swapaxes(np.asarray(x), 1, 2))


# --------------------------------------------------------------------------------------------- the published files


def test_masks(reference):
    for name, want in load(reference, "masks").items():
        kind, window, queries, _ = name.split("/")[0].split("_")
        near, far = published_lolcats.masks(
            {"tk": "terraced", "sw": "sliding"}[kind], int(window[1:]), int(queries[1:])
        )
        np.testing.assert_array_equal(near if name.endswith("window") else far, want != 0, err_msg=name)


def test_outputs(published):
    file, mixer, params, kind = published
    run = jax.jit(mixer.apply)
    for T in lengths(kind):
        y, _ = run({"params": params}, jnp.array(file[f"T{T}/hidden_states"]))
        assert_near(y, file[f"T{T}/infer/out"], f"T {T}")


def test_heads_and_weights_of_pairs(published):
    file, mixer, params, kind = published
    gamma = jax.nn.sigmoid(params["window_factors"]) if kind else None
    run = jax.jit(published_lolcats.transfer)
    for T in lengths(kind):
        q, k, v, fq, fk = (by_time(file[f"T{T}/{name}"]) for name in ("q", "k", "v", "f_q", "f_k"))
        window = Window(kind, mixer.window, q, k, gamma) if kind else None
        y, weights = run(fq, fk, v, window=window)
        assert_near(by_time(y), file[f"T{T}/train/y_pred"], f"T {T}")
        assert_near(weights, file[f"T{T}/train/a_pred"], f"T {T}")


def test_transfer_losses_and_gradients(published):
    """Of the whole layer; what it passes on is the softmax attention's output."""
    file, mixer, params, kind = published
    mixer = mixer.clone(transfer=("outputs", "maps"), parent=None)
    learned = {name: x for name, x in params.items() if "feature_map" in name or name == "window_factors"}

    @jax.jit
    def run(learned, x):
        def losses(learned):
            (out, _), sown = mixer.apply({"params": params | learned}, x, mutable="losses")
            found = sown["losses"]
            means = [jnp.mean(found[name][0]) for name in ("outputs", "maps")]
            return jnp.array([1000.0 * means[0], means[1]]), out

        return *losses(learned), jax.jacrev(losses, has_aux=True)(learned)[0]

    # Blocks counted from the end; no linear part; every key twice.
    for T in (27, 13, 6) if kind == "terraced" else (27,):
        (mse, maps), out, grads = run(learned, jnp.array(file[f"T{T}/hidden_states"]))
        assert_near(out, file[f"T{T}/train/out"], f"T {T}")
        for xent in (0, 1):
            at = f"T{T}/xent{xent}_mse1000"
            np.testing.assert_allclose(mse + xent * maps, file[f"{at}/loss"], rtol=TOLERANCE, atol=1e-6)
            found = {f"feature_map_{n}.mlp.layer": grads[f"feature_map_{n}"]["layer"] for n in "qk"}
            if kind:
                found["window_factors"] = grads["window_factors"].reshape(2, 1, -1, 1, 1)
            for name, grad in found.items():
                assert_near(grad[0] + xent * grad[1], file[f"{at}/grad/{name}"], f"{at} {name}", least=1e-5)


def states_of(state, kind):
    """name in the files -> array."""
    held = state.held
    if kind is None:
        return {"kv_state": state.kv, "k_state": state.k_sum[:, :, None]}
    used, repeats = int(held.used[0]), state.kv.shape[1] // held.k.shape[2]
    caches = {
        f"{name}_cache": np.repeat(by_time(x)[:, :, -used:], repeats, axis=1)
        for name, x in (("k", held.k), ("v", held.v))
    }
    return caches | {
        "decode_kv": state.kv,
        "decode_k": state.k_sum[:, :, None],
        "kv_state": held.all_kv,
        "k_state": held.all_k_sum[:, :, None],
    }


def test_prefill_and_decode(published):
    file, mixer, params, kind = published
    run = jax.jit(mixer.apply)
    for start in (5, 8, 13, 16, 20, 27) if kind == "terraced" else (5, 20):
        at = f"cache_prefill{start}"
        x = file[f"{at}/hidden_states"]
        y, cache = run({"params": params}, x[:, :start], cache=mixer.init_cache(2, 40, jnp.float32))
        ys, filled = [y], states_of(cache["state"], kind)
        for t in range(start, x.shape[1]):
            y, cache = run({"params": params}, x[:, t : t + 1], cache=cache)
            ys.append(y)
        assert_near(np.concatenate(ys, axis=1), file[f"{at}/out"], at)
        for when, states in (("prefill", filled), ("decode", states_of(cache["state"], kind))):
            names = [name for name in states if f"{at}/after_{when}/{name}" in file]
            assert len(names) >= (2 if kind is None else 4)
            for name in names:
                want = file[f"{at}/after_{when}/{name}"]
                assert states[name].shape == want.shape
                assert_near(states[name], want, f"{at} {when} {name}")


# ------------------------------------------------------------------------------- what the files do not have: float64


def hybrid_oracle(q, k, v, fq, fk, gamma, linear, near, far, kv=0.0, k_sum=0.0):
    """[N, T, ...] float64: eq. 7 of the paper, pair by pair."""
    scores = torch.einsum("nth,nsh->nts", q, k) / q.shape[-1] ** 0.5
    top = scores.masked_fill(~near, -1e8).amax(-1, keepdim=True)
    soft = gamma[:, None, None] * torch.where(near, (scores - top).exp(), 0)
    weights = soft + linear[:, None, None] * torch.einsum("ntp,nsp->nts", fq, fk) * far
    num = weights @ v + linear[:, None, None] * (fq @ kv if torch.is_tensor(kv) else 0.0)
    norm = weights.sum(-1) + linear[:, None] * ((fq * k_sum).sum(-1) if torch.is_tensor(k_sum) else 0.0)
    return num / norm[..., None]


def draws(T, N=3, P=5, H=4, seed=0):
    rng = np.random.default_rng(seed)
    q, k, v = (rng.normal(size=(N, T, H)) for _ in range(3))
    fq, fk = (rng.uniform(0.1, 1, (N, T, P)) for _ in range(2))
    return [torch.tensor(x) for x in (q, k, v, fq, fk)], torch.tensor(rng.uniform(0.1, 0.9, N))


attend = jax.jit(published_lolcats.attend, static_argnames="affine")


def ours(*arrays):
    return [by_time(x.detach().numpy().astype(np.float32)[None]) for x in arrays]


def test_prefill_after_prefill_loses_keys_as_published():
    """Three pieces of 16 under a window of 8, then a token: decoding has 24 of the 40 older keys."""
    (q, k, v, fq, fk), gamma = draws(49)
    size, ones = 8, torch.ones(3, dtype=torch.float64)
    (Q, K, V, FQ, FK), scale = ours(q, k, v, fq, fk), jnp.array(gamma.numpy(), jnp.float32)
    options = {"batch": 1, "heads": 3, "kv_heads": 3, "features": 5, "head_dim": 4}
    state = published_lolcats.empty_state(**options, window=size, dtype=jnp.float32)
    near, far = (torch.tensor(mask) for mask in published_lolcats.masks("terraced", size, 16))
    for start in (0, 16, 32):
        at, old = slice(start, start + 16), slice(0, start)
        window = Window("terraced", size, Q[:, at], K[:, at], scale)
        y, state = attend(FQ[:, at], FK[:, at], V[:, at], window=window, state=state)
        before = fk[:, old].mT @ v[:, old], fk[:, old].sum(1, keepdim=True)
        pieces = (x[:, at] for x in (q, k, v, fq, fk))
        assert_near(by_time(y)[0], hybrid_oracle(*pieces, gamma, ones, near, far, *before).numpy())
    window = Window("terraced", size, Q[:, 48:], K[:, 48:], scale)
    y, _ = attend(FQ[:, 48:], FK[:, 48:], V[:, 48:], window=window, state=state)
    seen = [
        *range(8),
        *range(16, 24),
        *range(32, 49),
    ]  # of each piece what had left its window; the last window
    near = torch.tensor([[j > 48 - size for j in seen]])
    want = hybrid_oracle(q[:, 48:], k[:, seen], v[:, seen], fq[:, 48:], fk[:, seen], gamma, ones, near, ~near)
    assert_near(by_time(y)[0], want.numpy())


def test_without_a_window_a_prefill_forgets_and_padding_counts_only_there():
    rng = np.random.default_rng(0)
    fq, fk, v = (jnp.array(rng.uniform(0.1, 1, (2, 6, 3, n)), jnp.float32) for n in (5, 5, 4))
    options = {"batch": 2, "heads": 3, "kv_heads": 3, "features": 5, "head_dim": 4}
    state = published_lolcats.empty_state(**options, window=None, dtype=jnp.float32)
    ids = jnp.array([[1] * 6, [0, 0, 1, 1, 2, 2]])
    alone, _ = attend(fq, fk, v, window=None, segment_ids=ids)
    tail, _ = attend(fq[1:, 2:], fk[1:, 2:], v[1:, 2:], window=None)
    np.testing.assert_allclose(
        alone[1:, 2:], tail, rtol=1e-5
    )  # padding is left out, documents are not told apart
    _, state = attend(fq, fk, v, window=None, segment_ids=ids, state=state)
    again, state = attend(fq, fk, v, window=None, segment_ids=ids, state=state)
    np.testing.assert_allclose(again, alone, rtol=1e-6)
    step, _ = attend(fq[:, :1], fk[:, :1], v[:, :1], window=None, state=state)
    keys = jnp.concatenate([fk * (ids != 0)[..., None, None]] * 2 + [fk[:, :1]], axis=1)
    weights = jnp.einsum("bnp,bsnp->bsn", fq[:, 0], keys)
    values = jnp.concatenate([v, v, v[:, :1]], axis=1)
    want = jnp.einsum("bsn,bsnh->bnh", weights, values) / jnp.sum(weights, axis=1)[..., None]
    np.testing.assert_allclose(step[:, 0], want, rtol=1e-5)


def torch_features(z, activation, full_space):
    if activation == "softmax_dim":
        maps = [z.softmax(-1), (-z).softmax(-1)]
    elif activation == "exp_dim":
        maps = [(z - z.amax(-1, keepdim=True)).exp(), (z.amin(-1, keepdim=True) - z).exp()]
    else:
        maps, full_space = [z.relu() if activation == "relu" else 1 + torch.nn.functional.elu(z)], False
    return torch.cat(maps[: 1 + full_space], -1).clamp(min=1e-12)


def torch_map(x, p, settings):
    """phi(x) of [B, T, N, H], from parameters as the mixer names them."""
    if "adapter" in settings:
        z = (torch.einsum("btnh,nhf->btnf", x, p["layer_0"]) + p["bias_0"]).relu()
        z = x + (torch.einsum("btnh,nhf->btnf", z, p["layer_1"]) + p["bias_1"])
    else:
        z = torch.einsum("btnh,nhf->btnf", x, p["layer"])
        z = z + p["bias"][:, None] if "bias" in p else z
        z = z + x if settings.get("skip") else z
    return torch_features(z, settings.get("activation", "softmax_dim"), settings.get("full_space", True))


VARIANTS = {
    "hedgehog": {},
    "hedgehog_half": {"full_space": False},
    "exp": {"activation": "exp_dim"},
    "exp_half_bias": {"activation": "exp_dim", "full_space": False, "bias": True},
    "t2r": {"activation": "relu", "bias": True},
    "elu": {"activation": "pos_elu"},
    "skip": {"skip": True, "bias": True},
    "adapter": {"adapter": 5},
    "adapter_elu": {"adapter": 3, "activation": "pos_elu"},
}


@pytest.mark.parametrize("settings", VARIANTS.values(), ids=VARIANTS)
def test_feature_maps_and_their_gradients(settings):
    N, H, F = 3, 4, 4 if {"skip", "adapter"} & set(settings) else 6
    rng = np.random.default_rng(0)
    x, weights = rng.normal(size=(2, 7, N, H)), rng.normal(size=(2, 7, N, 2 * F))
    made = FeatureMap(N, H, F, **settings)
    shapes = jax.eval_shape(made.init, jax.random.key(0), jnp.zeros((1, 1, N, H)))["params"]
    params = {name: rng.normal(size=box.value.shape) for name, box in shapes.items()}

    def loss(params, x, published):
        y = made.clone(published=published).apply({"params": params}, x)
        return jnp.sum(y * weights[..., : y.shape[-1]].astype(np.float32)), y

    tensors = {name: torch.tensor(p, requires_grad=True) for name, p in params.items()}
    at = torch.tensor(x, requires_grad=True)
    want = torch_map(at, tensors, settings)
    (want * torch.tensor(weights)[..., : want.shape[-1]]).sum().backward()
    arrays = jax.tree.map(lambda p: jnp.array(p, jnp.float32), (params, x))
    for published in (False, True):
        run = jax.jit(jax.grad(loss, (0, 1), has_aux=True), static_argnums=2)
        (grads, dx), y = run(*arrays, published)
        assert_near(y, want.detach().numpy())
        assert_near(dx, at.grad.numpy())
        for name, grad in grads.items():
            assert_near(grad, tensors[name].grad.numpy(), name)


@pytest.mark.parametrize("settings", VARIANTS.values(), ids=VARIANTS)
def test_features_under_bfloat16_are_rounded_step_by_step_as_published(settings):
    """To the bit but for ties of the matrix product's order; the plain map, rounded once, is not."""
    N, H, F = 3, 4, 4 if {"skip", "adapter"} & set(settings) else 6
    rng = np.random.default_rng(1)
    made = FeatureMap(N, H, F, published=True, **settings)
    shapes = jax.eval_shape(made.init, jax.random.key(0), jnp.zeros((1, 1, N, H)))["params"]
    params = {name: rng.normal(size=box.value.shape).astype(np.float32) for name, box in shapes.items()}
    x = rng.normal(size=(2, 50, N, H)).astype(np.float32)
    want = torch_map(
        torch.tensor(x).bfloat16(), {n: torch.tensor(p).bfloat16() for n, p in params.items()}, settings
    )
    want = want.float().numpy()

    def share_equal(made):
        got = jax.jit(made.apply)({"params": jax.tree.map(jnp.array, params)}, jnp.array(x, jnp.bfloat16))
        np.testing.assert_allclose(got.astype(jnp.float32), want, rtol=0.05, atol=0.05)
        return np.mean(got.astype(jnp.float32) == want)

    assert share_equal(made) > 0.99
    assert share_equal(made.clone(published=False)) < share_equal(made)


@pytest.mark.parametrize("kind", [None, "sliding", "terraced"])
def test_a_layer_under_bfloat16_rounds_as_published(kind, reference):
    """The published steps in torch's bfloat16. The plain layer, more exact, is further away from them."""
    file = load(reference, "layer_hedgehog_linear" if kind is None else "layer_hybrid_tk")
    mixer, params = layer(file, kind)
    x, T, N, H = file["T27/hidden_states"], 27, 4, 16
    w = {
        name.removeprefix("w/"): torch.tensor(p).bfloat16()
        for name, p in file.items()
        if name.startswith("w/")
    }
    at = torch.tensor(x).bfloat16()
    q, k, v = (
        (at @ w[f"{n}_proj.weight"].T).view(2, T, -1, H).repeat_interleave(1 if n == "q" else 2, 2)
        for n in "qkv"
    )
    inverse = torch.tensor(10000.0 ** (-np.arange(0, H, 2) / H)).float()
    angle = (torch.arange(T)[:, None] * torch.cat([inverse, inverse]))[:, None]
    cos, sin = angle.cos().bfloat16(), angle.sin().bfloat16()
    q, k = (a * cos + torch.cat([-a[..., H // 2 :], a[..., : H // 2]], -1) * sin for a in (q, k))
    fq, fk = (torch_map(a, {"layer": w[f"feature_map_{n}.mlp.layer"]}, {}) for n, a in (("q", q), ("k", k)))
    if kind is None:
        pairs = torch.einsum("btnp,bsnp->bnts", fq.float(), fk.float()).tril()
        num = torch.einsum("bnts,bsnh->btnh", pairs, v.float()).bfloat16()
        y = num / (torch.einsum("btnp,btnp->btn", fq, fk.float().cumsum(1).bfloat16()) + 1e-12)[..., None]
    else:
        near, far = (torch.tensor(mask) for mask in published_lolcats.masks(kind, 8, T))
        gamma = w["window_factors"].sigmoid().float().view(-1)
        rows = [[a[b].transpose(0, 1).float() for a in (q, k, v, fq, fk)] for b in (0, 1)]
        y = torch.stack(
            [hybrid_oracle(*row, gamma, torch.ones(N), near, far).transpose(0, 1) for row in rows]
        )
    want = (y.bfloat16().reshape(2, T, -1) @ w["o_proj.weight"].T).float().numpy()
    narrow = jax.tree.map(lambda p: p.astype(jnp.bfloat16), params)

    def distance(mixer):
        y, _ = jax.jit(mixer.apply)({"params": narrow}, jnp.array(x, jnp.bfloat16))
        return np.abs(y.astype(jnp.float32) - want).max() / np.abs(want).max()

    found = distance(mixer.clone(published_quirks=True, parent=None))
    assert found < 4e-3  # a unit in the last place
    if kind != "terraced":  # 27 is no multiple of the window
        assert found < distance(mixer)


@pytest.mark.parametrize("kind", ["sliding", "terraced"])
@pytest.mark.parametrize("affine", [False, True])
def test_mixing_and_its_gradients(kind, affine):
    """Both layers, of 3 heads over 24 tokens of 2 windows and more, gamma learned, against pairs in float64."""
    T, N, H, F, size = 24, 3, 4, 6, 8
    rng = np.random.default_rng(2)
    params = {f"{n}_proj": {"kernel": rng.normal(size=(12, N, H)) / 3} for n in "qkv"}
    params["o_proj"] = {"kernel": rng.normal(size=(N, H, 12)) / 3}
    params |= {f"feature_map_{n}": {"layer": rng.normal(size=(N, H, F))} for n in "qk"}
    params["window_factors"] = rng.normal(size=N)
    x = rng.normal(size=(1, T, 12))
    tensors = jax.tree.map(lambda p: torch.tensor(p, requires_grad=True), params)
    at = torch.tensor(x[0])
    inverse = torch.tensor(10000.0 ** (-np.arange(0, H, 2) / H))
    angle = torch.arange(T)[:, None] * torch.cat([inverse, inverse])

    def turned(a):
        half = torch.cat([-a[..., H // 2 :], a[..., : H // 2]], -1)
        return a * angle.cos() + half * angle.sin()

    q, k, v = (torch.einsum("td,dnh->nth", at, tensors[f"{n}_proj"]["kernel"]) for n in "qkv")
    q, k = turned(q), turned(k)
    fq, fk = (
        torch_features(
            torch.einsum("nth,nhf->ntf", a, tensors[f"feature_map_{n}"]["layer"]), "softmax_dim", True
        )
        for n, a in (("q", q), ("k", k))
    )
    gamma = tensors["window_factors"].sigmoid()
    linear = 1 - gamma if affine else torch.ones_like(gamma)
    i, j = torch.arange(T)[:, None], torch.arange(T)
    near = (j <= i) & (i - j < size if kind == "sliding" else j // size >= i // size - 1)
    y = hybrid_oracle(q, k, v, fq, fk, gamma, linear, near, (j <= i) & ~near)
    want = torch.einsum("nth,nhd->td", y, tensors["o_proj"]["kernel"])
    want.square().sum().backward()
    arrays = jax.tree.map(lambda p: jnp.array(p, jnp.float32), params)
    for quirks in (False, True):
        mixer = LinearAttention(
            N, N, H, window=size, window_kind=kind, feature_dim=F, affine=affine, published_quirks=quirks
        )
        run = functools.partial(mixer.apply, mutable=False)

        def loss(params, run=run):
            y, _ = run({"params": params}, jnp.array(x, jnp.float32))
            return jnp.sum(jnp.square(y)), y

        (_, found), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(arrays)
        assert_near(found[0], want.detach().numpy())
        jax.tree.map(lambda g, t: assert_near(g, t.grad.numpy()), grads, tensors)


def test_tied_maps_share_parameters_and_add_up_their_gradients():
    tied = LinearAttention(
        4, 2, 8, window=None, feature_dim=6, feature_map="pos_elu", tied=True, published_quirks=True
    )
    apart = tied.clone(tied=False, parent=None)
    x = jax.random.normal(jax.random.key(0), (2, 17, 16))
    shapes = nn.meta.unbox(jax.eval_shape(tied.init, jax.random.key(1), x))["params"]
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda p: jnp.array(rng.normal(size=p.shape) / 3, jnp.float32), shapes)
    assert "feature_map_k" not in params
    both = params | {"feature_map_k": params["feature_map_q"]}

    def value(mixer):
        return jax.jit(jax.value_and_grad(lambda p: jnp.sum(jnp.square(mixer.apply({"params": p}, x)[0]))))

    (a, ga), (b, gb) = value(tied)(params), value(apart)(both)
    np.testing.assert_allclose(a, b, rtol=1e-6)
    for name, grad in ga["feature_map_q"].items():
        assert_near(grad, gb["feature_map_q"][name] + gb["feature_map_k"][name])
