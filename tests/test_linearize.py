"""Linearizing a pretrained model: what moves, what trains, what attention transfer minimises."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lcx
from lcx import linearize, objectives
from lcx import model as model_lib
from lcx.errors import UserError
from lcx.linearize import Linearize, ablated
from lcx.lora import LoRA
from lcx.mixers.attention import Attention
from lcx.mixers.linear_attention import LinearAttention
from lcx.model import llama
from lcx.ops.attention_maps import cross_entropy_of_maps
from lcx.ops.linear_attention import Window
from lcx.optim import AdamW, leaf_paths
from tests.tiny_runs import dataset, tiny_trainer, write_text

SETTINGS = Linearize(window=8, feature_dim=6, feature_init="identity")
SIZES = {
    "vocab_size": 61,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_heads": 4,
    "num_kv_heads": 2,
    "head_dim": 6,
    "max_position_embeddings": 64,
}


@functools.cache
def softmax(windows=(None, None, 16, None)):
    model = llama(**SIZES, num_layers=len(windows), layer_windows=windows, qk_norm=True)
    params = model_lib.init_params(model, jax.random.key(0))
    rng = np.random.default_rng(0)
    return model, jax.tree.map(lambda x: x + 0.1 * rng.normal(size=x.shape).astype(np.float32), params)


def batch(T=33, rows=3, seed=1):
    """Two documents in a row, and padding."""
    rng = np.random.default_rng(seed)
    segment_ids = np.repeat([[1] * 13 + [2] * (T - 16) + [0] * 3], rows, axis=0)
    positions = np.concatenate([np.arange(13), np.arange(T - 16), np.zeros(3, int)])[None].repeat(
        rows, axis=0
    )
    tokens, labels = rng.integers(0, 61, (2, rows, T))
    weights = (segment_ids > 0).astype(np.float32)
    arrays = {"tokens": tokens, "labels": labels, "segment_ids": segment_ids, "positions": positions}
    return {
        **{name: jnp.asarray(x, jnp.int32) for name, x in arrays.items()},
        "loss_weights": jnp.asarray(weights),
    }


@functools.partial(jax.jit, static_argnums=0, static_argnames="method")
def apply(module, params, x, method=None, **masks):
    """The first of what the module returns."""
    return module.apply({"params": params}, x, method=method, **masks)[0]


def masks_of(inputs):
    return {name: inputs[name] for name in ("positions", "segment_ids")}


def hidden(model, params, inputs):
    return apply(model, params, inputs["tokens"], method="hidden", **masks_of(inputs))


def test_every_weight_keeps_its_layer():
    model, params = softmax()
    new, moved = Linearize(window=8, feature_dim=6, keep_softmax=(1,))(model, params, jax.random.key(1))
    kinds = [type(layer.block.mixer) for layer in model_lib.layers(new)]
    assert kinds == [LinearAttention, Attention, LinearAttention, LinearAttention]
    assert [
        layer.block.mixer.softmax_window
        for layer in model_lib.layers(new)
        if layer.block.mixer is not None and isinstance(layer.block.mixer, LinearAttention)
    ] == [None, 16, None]
    flat = dict(zip(leaf_paths(params), jax.tree.leaves(params), strict=True))
    laid = dict(zip(leaf_paths(moved), jax.tree.leaves(moved), strict=True))
    compared = 0
    for before, after in zip(model_lib.layers(model), model_lib.layers(new), strict=True):
        for path, x in flat.items():
            if path.startswith(f"{before.path}/"):
                there = laid[after.path + path.removeprefix(before.path)]
                assert np.array_equal(x[before.repeat], there[after.repeat]), path
                compared += 1
    assert compared == 4 * 11
    for name in ("embed/embedding", "final_norm/scale", "lm_head/embedding"):
        assert laid[name] is flat[name]
    fresh = [path for path in laid if "feature_map" in path or "window_factors" in path]
    assert sum(laid[path].shape[0] for path in fresh) == 3 * 3  # q, k and factors of three layers
    assert jax.tree.structure(moved) == jax.tree.structure(model_lib.abstract_params(new))


def test_weights_that_stay_are_not_copied():
    model, params = softmax((None, None))
    _, moved = SETTINGS(model, params, jax.random.key(1))
    kernel = ("stages_0", "block_0", "mixer", "q_proj", "kernel")
    assert functools.reduce(lambda tree, name: tree[name], kernel, moved) is functools.reduce(
        lambda tree, name: tree[name], kernel, params
    )


def test_the_model_that_learns_computes_what_the_softmax_model_does():
    model, params = softmax()
    new, moved = SETTINGS(model, params, jax.random.key(1))
    inputs = batch()

    def teach(mixer):
        return mixer.clone(transfer=("outputs", "maps"), parent=None)

    np.testing.assert_allclose(
        hidden(model_lib.map_mixers(new, teach), moved, inputs), hidden(model, params, inputs), atol=2e-6
    )
    assert np.abs(hidden(new, moved, inputs) - hidden(model, params, inputs)).max() > 1e-2


@functools.partial(jax.jit, static_argnums=0)
def layer_of(part, params, x, masks):
    return part.apply({"params": params}, x, **masks)


def layer_inputs(model, params, inputs):
    """What every mixer gets in the softmax model: its layers one after the other."""
    x = jnp.take(params["embed"]["embedding"], inputs["tokens"], axis=0)
    for number in range(model.num_layers):
        part = model_lib.part(model, number, number + 1)
        own = linearize.relaid(model, params, part, fresh={}, layers=[number])
        scale = own["stages_0"]["block_0"]["mixer_norm"]["scale"][0]
        yield x / jnp.sqrt(jnp.mean(x**2, axis=-1, keepdims=True) + model.norm_eps) * scale
        x = layer_of(part, own, x, masks_of(inputs))


@functools.partial(jax.jit, static_argnums=0)
def transfer(model, params, inputs):
    return objectives.attention_transfer(model, {"params": params}, inputs)


def test_the_loss_is_the_mean_over_layers_of_the_squared_error():
    """Layer by layer, out of the whole model, against the sums written out."""
    model, params = softmax()
    new, moved = SETTINGS(model, params, jax.random.key(1))
    inputs = batch()
    loss, weight = transfer(new, moved, inputs)
    real = np.asarray(inputs["segment_ids"] != 0)
    assert weight == real.sum()
    errors = []
    for layer, x in zip(model_lib.layers(new), layer_inputs(model, params, inputs), strict=True):
        tree = functools.reduce(lambda tree, name: tree[name], layer.path.split("/"), moved)["mixer"]
        tree = jax.tree.map(lambda leaf, row=layer.repeat: leaf[row], tree)
        eye = np.eye(24, dtype=np.float32).reshape(4, 6, 24)  # the heads' outputs, as they are
        tree = {**tree, "o_proj": {"kernel": eye}}
        settings = {name: getattr(layer.block.mixer, name) for name in linearize._SHARED}
        teacher = Attention(**settings, window=layer.block.mixer.softmax_window)
        student, wanted = (
            apply(mixer, tree, x, **masks_of(inputs)) for mixer in (layer.block.mixer, teacher)
        )
        errors.append(np.square(np.float64(student) - np.float64(wanted)).mean(-1)[real].sum())
    np.testing.assert_allclose(loss, 1000 * np.mean(errors), rtol=1e-5)


def test_layers_learn_apart_and_only_what_is_new():
    """The gradient of a layer's maps does not see the other layers; pretrained weights have none to give."""
    model, params = softmax((None, None))
    new, moved = SETTINGS(model, params, jax.random.key(1))
    inputs = batch()
    trainable = "feature_map_|window_factors"
    chosen = [
        path for path in leaf_paths({"params": moved}) if "feature_map_" in path or "window_factors" in path
    ]
    trains = AdamW(trainable=trainable).trains({"params": moved})
    assert [
        p for p, yes in zip(leaf_paths({"params": moved}), jax.tree.leaves(trains), strict=True) if yes
    ] == chosen
    gradient = jax.jit(jax.grad(lambda p: transfer(new, p, inputs)[0]))
    maps = gradient(moved)["stages_0"]["block_0"]["mixer"]
    # another second layer
    other = jax.tree.map(lambda x: x.at[1].multiply(1.3) if x.shape[:1] == (2,) else x, moved)
    again = gradient(other)["stages_0"]["block_0"]["mixer"]
    for name in ("feature_map_q", "feature_map_k"):
        assert np.abs(maps[name]["layer"]).max() > 0
        np.testing.assert_allclose(maps[name]["layer"][0], again[name]["layer"][0], rtol=1e-5, atol=1e-6)
        assert np.abs(maps[name]["layer"][1] - again[name]["layer"][1]).max() > 1e-3


@pytest.mark.parametrize("kind", [None, "sliding", "terraced"])
@pytest.mark.parametrize("T", [1, 37, 130])
def test_cross_entropy_of_maps(kind, T):
    """Against the sums written out in float64, with documents and padding; memory is no T x T."""
    rng = np.random.default_rng(T)
    B, N, H, P, w = 2, 3, 4, 5, 8
    q, k = rng.normal(size=(2, B, T, N, H)).astype(np.float32)
    fq, fk = rng.uniform(size=(2, B, T, N, P)).astype(np.float32)
    gamma = rng.uniform(size=N).astype(np.float32)
    ids = np.ones((B, T), np.int32)
    ids[1, T // 3 :], ids[1, T - T // 5 :] = 2, 0
    window = None if kind is None else Window(kind, w, jnp.asarray(q), jnp.asarray(k), jnp.asarray(gamma))
    run = functools.partial(cross_entropy_of_maps, segment_ids=jnp.asarray(ids), softmax_window=20)
    heads = jnp.asarray(q), jnp.asarray(k)

    def summed(*features):
        found = run(*heads, *features, window=window)
        return found.sum(), found

    total = jax.jit(jax.value_and_grad(summed, argnums=(0, 1), has_aux=True))
    (_, got), grads = total(fq, fk)
    expected = np.zeros((B, T))
    for b in range(B):
        for i in range(T):
            if ids[b, i] == 0:
                continue
            first = int(np.argmax(ids[b] == ids[b, i]))
            seen = np.arange(first, i + 1)
            own = i - first
            near = {None: i + 1, "sliding": i - w + 1, "terraced": first + (own // w - 1) * w}[kind]
            for n in range(N):
                s = np.float64(q[b, i, n]) @ np.float64(k[b, seen, n]).T / np.sqrt(H)
                a = np.where(seen > i - 20, np.exp(s - s[seen > i - 20].max()), 0)
                a /= a.sum()
                inside = seen >= near
                c = np.where(inside, 0, np.float64(fq[b, i, n]) @ np.float64(fk[b, seen, n]).T)
                if inside.any():
                    c = c + inside * gamma[n] * np.exp(s - s[inside].max())
                expected[b, i] -= (a * np.log(c / c.sum())).sum() / N
    np.testing.assert_allclose(got, expected, rtol=2e-5, atol=2e-5)
    for argument, x in enumerate((fq, fk)):
        direction = rng.normal(size=x.shape).astype(np.float32) * (x > 0.05)
        ends = [[fq, fk], [fq, fk]]
        ends[0][argument], ends[1][argument] = x + 1e-2 * direction, x - 1e-2 * direction
        slope = (float(total(*ends[0])[0][0]) - float(total(*ends[1])[0][0])) / 2e-2
        np.testing.assert_allclose(np.sum(grads[argument] * direction), slope, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        (
            {"window": 64},
            "Linearize.window 64 holds the model's whole context of 64 tokens.*set a smaller window",
        ),
        ({"keep_softmax": (4,)}, "keep_softmax has layer 4, expected 0 to 3"),
        ({"keep_softmax": (0, 1, 2, 3)}, "nothing to linearize"),
        ({"feature_map": "relux"}, "feature_map 'relux': expected one of softmax_dim"),
        ({"window_kind": "slid"}, "window_kind 'slid': expected one of"),
        ({"window": 32}, "Linearize.window 32 holds the model's whole context of 64 tokens"),
        (
            {"feature_dim": 8, "feature_init": "identity"},
            "Linearize.feature_dim 8 .*head size 6.*lower feature_dim",
        ),
        ({"window": None, "affine": True}, "Linearize.affine True has no effect with window = None"),
        ({"adapter": 4, "feature_bias": True}, "Linearize.feature_bias True has no effect with an adapter"),
        ({"skip": True, "feature_dim": 8}, "feature_dim 8 with skip or adapter: expected head_dim 6"),
    ],
)
def test_settings_that_cannot_be(settings, says):
    with pytest.raises(UserError, match=says) as caught:
        Linearize(**{"window": 8, "feature_dim": 6, **settings}).model(softmax()[0])
    assert "\n" not in str(caught.value)


def test_linearizing_again_is_refused_or_said(caplog):
    half = Linearize(window=8, feature_dim=6, keep_softmax=(0, 1)).model(softmax()[0])
    with pytest.raises(
        UserError, match="keep_softmax has layer 2, whose mixer is LinearAttention, expected softmax"
    ):
        Linearize(window=8, keep_softmax=(2,)).model(half)
    whole = Linearize(window=8, feature_dim=6).model(half)
    assert linearize.linear_layers(whole) == [0, 1, 2, 3]
    assert "layers [2, 3] are already linear" in caplog.text
    with pytest.raises(UserError, match="the model is already linear; remove Trainer.linearize"):
        SETTINGS.model(whole)


def test_a_second_stage_expects_a_linear_model(text, tmp_path):
    short = {"steps": 1, "optimizer": AdamW(learning_rate=1e-2)}
    base = tiny_trainer(text, **short)
    params = model_lib.init_params(base.model, jax.random.key(0))
    lcx.save(tmp_path / "base", base.model, params, format="lcx")
    settings = short | {"init_from": str(tmp_path / "base"), "lora": LoRA(rank=2), "expects_linear": True}
    with pytest.raises(
        UserError, match="has no linear attention, expected a linearized model: run stage 1"
    ) as caught:
        tiny_trainer(text, **settings).check(str(tmp_path / "lora"))
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="has no linear attention"):
        tiny_trainer(text, **settings).run(str(tmp_path / "lora"))
    hybrid = Linearize(window=8, feature_dim=8, keep_softmax=(1,))
    tiny_trainer(text, **settings, linearize=hybrid).check(str(tmp_path / "linear"))
    with pytest.raises(UserError, match="seq_len 16 is not beyond the 16 keys .* nothing would be linear"):
        tiny_trainer(text, **settings, linearize=hybrid, seq_len=16).check(str(tmp_path / "short"))
    lcx.save(tmp_path / "linear", *hybrid(base.model, params, jax.random.key(1)), format="lcx")
    again = {**settings, "init_from": str(tmp_path / "linear")}
    tiny_trainer(text, **again).check(str(tmp_path / "again"))
    with pytest.raises(
        UserError, match="seq_len 16 is not beyond the 16 keys that a terraced window of 8 holds"
    ):
        tiny_trainer(text, **again, seq_len=16).check(str(tmp_path / "again"))
    with pytest.raises(UserError, match="expects_linear.* change a pretrained model"):
        dataclasses.replace(base, expects_linear=True)


def test_transfer_without_linear_attention_is_refused():
    model, params = softmax()
    with pytest.raises(UserError, match="no linear attention; set Trainer.linearize"):
        objectives.attention_transfer(model, {"params": params}, batch())
    new, moved = SETTINGS(model, params, jax.random.key(1))
    with pytest.raises(
        UserError,
        match="seq_len 16 is not beyond the 16 keys that a terraced window of 8 holds.*Linearize.window",
    ):
        objectives.attention_transfer(
            new, {"params": moved}, {name: x[:, :16] for name, x in batch().items()}
        )
    with pytest.raises(UserError, match="expected one above 0"):
        objectives.attention_transfer(new, {"params": moved}, batch(), output_weight=0.0)


def test_one_part_alone():
    """The window alone is softmax attention over it; the linear part alone counts every key."""
    model, params = softmax((None, None))
    sliding = dataclasses.replace(SETTINGS, window_kind="sliding")
    new, moved = sliding(model, params, jax.random.key(1))
    inputs = batch()
    window = model_lib.map_mixers(model, lambda mixer: mixer.clone(window=8, parent=None))
    np.testing.assert_allclose(
        hidden(ablated(new, "window"), moved, inputs), hidden(window, params, inputs), atol=3e-6
    )
    pure, _ = dataclasses.replace(SETTINGS, window=None)(model, params, jax.random.key(1))
    np.testing.assert_allclose(
        hidden(ablated(new, "linear"), moved, inputs), hidden(pure, moved, inputs), atol=1e-6
    )
    for part, of in (("window", model), ("half", new)):
        with pytest.raises(UserError, match="only_part"):
            ablated(of, part)


# --- as runs


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    write_text(folder)
    return folder


def test_both_stages_are_runs(text, tmp_path):
    """Transfer, stop, go on; LoRA on top; the checkpoints load as what evaluations should see: the linear model."""
    unmeasured = dataset(text, eval_fraction=0.0)  # one program less
    tiny_trainer(text, steps=12, data=unmeasured).run(str(tmp_path / "base"))
    settings = Linearize(window=8, feature_dim=8, feature_init="identity")
    transfer = dataclasses.replace(
        tiny_trainer(text, init_from=str(tmp_path / "base"), steps=12),
        linearize=settings,
        objective=objectives.attention_transfer,
        optimizer=AdamW(
            learning_rate=1e-2, schedule="plateau", warmup_steps=0, trainable="feature_map_|window_factors"
        ),
        eval_every=4,
    )
    dataclasses.replace(transfer, stop_at=6).run(str(tmp_path / "transfer"))
    run = transfer.run(str(tmp_path / "transfer"))
    model, params = lcx.load(tmp_path / "transfer")
    assert all(isinstance(layer.block.mixer, LinearAttention) for layer in model_lib.layers(model))
    assert model == run.model and not model.stages[0].pattern[0].mixer.transfer
    _, start = lcx.load(tmp_path / "base")
    for name in ("q_proj", "o_proj"):
        kernels = [tree["stages_0"]["block_0"]["mixer"][name]["kernel"] for tree in (params, start)]
        assert np.asarray(kernels[0]).tobytes() == np.asarray(kernels[1]).tobytes()
    losses = [held_out(transfer, tree, model) for tree in (start_of(settings, tmp_path), params)]
    assert losses[1] < 0.9 * losses[0]
    other = dataclasses.replace(transfer, linearize=dataclasses.replace(settings, window=4))
    with pytest.raises(UserError, match="Trainer.linearize.window = 8, found 4"):
        other.run(str(tmp_path / "transfer"))
    lora = tiny_trainer(
        text,
        init_from=str(tmp_path / "transfer"),
        steps=8,
        lora=LoRA(rank=2, beside="window_factors"),
        data=unmeasured,
    )
    run = lora.run(str(tmp_path / "lora"))
    moved = [
        path
        for path, x, y in zip(
            leaf_paths(params), jax.tree.leaves(params), jax.tree.leaves(run.state["params"]), strict=True
        )
        if np.asarray(x).tobytes() != np.asarray(y).tobytes()
    ]
    assert moved == ["stages_0/block_0/mixer/window_factors"]
    assert np.isfinite(
        np.asarray(lcx.logits(*lcx.load(tmp_path / "lora"), jnp.ones((1, 40), jnp.int32)))
    ).all()


def start_of(settings, tmp_path):
    return settings(*lcx.load(tmp_path / "base"), jax.random.key(0))[1]


def held_out(trainer, params, model):
    mesh = trainer.mesh.build()
    with jax.set_mesh(mesh):
        return trainer.held_out_loss(model, {"params": params}, mesh)
