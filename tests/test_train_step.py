"""The gradient of one step against torch; accumulation, remat and bfloat16 against the plain step."""

import textwrap

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tiny_runs import dataset, tiny_hf_config, tiny_model

import lcx
from lcx import model as model_lib
from lcx import objectives, sharding
from lcx.data import packing
from lcx.errors import UserError
from lcx.layers import Linear
from lcx.linearize import Linearize
from lcx.lora import LoRA
from lcx.mlps import tiles
from lcx.optim import AdamW, leaf_paths, partition
from lcx.training import step as train_step

ROWS, T = 8, 32
LEAVES = ("q_proj", "k_proj", "v_proj", "o_proj")
NORMS = ("mixer_norm/scale", "mlp_norm/scale")


@pytest.fixture(scope="module")
def batch(tmp_path_factory):
    """Packed rows of real text with several documents and padding; half of the rows keep few of their targets."""
    folder = tmp_path_factory.mktemp("text")
    (folder / "text").mkdir()
    sentences = textwrap.dedent(textwrap.__doc__ + textwrap.wrap.__doc__).split()
    for i in range(60):  # of 8 to 40 bytes: several to a row, or one that is cut
        words = sentences[i % 40 : i % 40 + 1 + i % 7]
        (folder / "text" / f"{i}.txt").write_text(f"{i} {' '.join(words)}")
    with dataset(folder, packing="first_fit").batches("train", global_batch_size=ROWS, seq_len=T) as batches:
        batch = {key: np.array(value) for key, value in next(batches).items()}
    batch["loss_weights"][1::2, 5:] = 0
    assert len(np.unique(batch["segment_ids"])) > 2 and (batch["segment_ids"] == 0).any()
    weights = batch["loss_weights"].reshape(ROWS // 4, 4, -1).sum((0, 2))
    assert weights.max() > 2 * weights.min() > 0  # micro-batches of four would weigh differently
    return batch


@pytest.fixture(scope="module")
def params():
    """Far from the symmetric start: norms and biases that matter."""
    params = model_lib.init_params(tiny_model(), jax.random.key(0))
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda x: x + 0.1 * rng.normal(size=x.shape).astype(np.float32), params)


def recording() -> optax.GradientTransformation:
    """Moves nothing; its state is the last gradient."""
    return optax.GradientTransformation(lambda p: p, lambda g, _, p: (jax.tree.map(jnp.zeros_like, g), g))


def one_step(model, params, batch, *, accumulation=1, lora=None, trains=None):
    """(gradient, metrics, new state) of one step of the trainer."""
    mesh = sharding.make_mesh(fsdp=1, devices=jax.devices()[:1])
    trains = None if trains is None else {"params": trains}
    weights = {"params": params} | ({} if lora is None else {"lora": lora})
    with jax.set_mesh(mesh):
        weights = jax.device_put(weights, sharding.replicated(mesh))
        shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), weights)
        abstract = train_step.abstract_state(shapes, recording(), mesh, trains)
        step = train_step.make_step(
            model,
            recording(),
            objectives.next_token,
            optax.constant_schedule(1.0),
            accumulation=accumulation,
            abstract=abstract,
            trains=trains,
        )
        # the step reuses the buffers it is given
        state = jax.tree.map(jnp.array, {**weights, "opt_state": train_step.moving(weights, trains)})
        state, metrics = step(state, sharding.shard_batch(batch, mesh), np.int32(0))
    gradient = state["opt_state"]["params" if lora is None else "lora"]
    return gradient, {key: float(value) for key, value in metrics.items()}, state


@pytest.fixture(scope="module")
def plain(params, batch):
    return one_step(tiny_model(), params, batch)


def relative_errors(got, expected) -> dict[str, float]:
    """Of every leaf: the largest difference over the largest value."""
    pairs = zip(leaf_paths(expected), jax.tree.leaves(got), jax.tree.leaves(expected), strict=True)
    return {path: float(np.abs(x - y).max() / np.abs(y).max()) for path, x, y in pairs}


def assert_close(got, expected, tolerance):
    errors = relative_errors(got, expected)
    assert max(errors.values()) < tolerance, errors


# --- against torch


def torch_model(params):
    """transformers' Llama with these weights, written through a checkpoint folder by nobody but this function."""
    import torch
    import transformers

    config = tiny_hf_config(
        max_position_embeddings=T, rms_norm_eps=1e-5, attn_implementation="eager", tie_word_embeddings=False
    )
    model = transformers.LlamaForCausalLM(config)
    tensors = {name: torch.tensor(np.array(x)) for name, x in torch_names(params).items()}
    model.load_state_dict(tensors, strict=True)
    return model


def torch_names(params):
    """lcx tree -> transformers' names and layouts (out, in)."""
    block = params["stages_0"]["block_0"]
    named = {
        "model.embed_tokens.weight": params["embed"]["embedding"],
        "model.norm.weight": params["final_norm"]["scale"],
        "lm_head.weight": params["lm_head"]["embedding"],
    }
    for layer in range(2):
        prefix = f"model.layers.{layer}"
        named[f"{prefix}.input_layernorm.weight"] = block["mixer_norm"]["scale"][layer]
        named[f"{prefix}.post_attention_layernorm.weight"] = block["mlp_norm"]["scale"][layer]
        for name in LEAVES:
            kernel = np.asarray(block["mixer"][name]["kernel"][layer])
            matrix = kernel.reshape(-1, 32) if name == "o_proj" else kernel.reshape(32, -1)
            named[f"{prefix}.self_attn.{name}.weight"] = matrix.T
        for name in ("gate_proj", "up_proj", "down_proj"):
            named[f"{prefix}.mlp.{name}.weight"] = np.asarray(block["mlp"][name]["kernel"][layer]).T
    return named


def test_the_gradient_is_that_of_torch(params, batch, plain):
    """Token-weighted mean over a packed batch, documents kept apart by a 4-D mask."""
    import torch

    model = torch_model(params)
    at = {key: torch.tensor(value) for key, value in batch.items()}
    segments = at["segment_ids"]
    seen = (segments[:, :, None] == segments[:, None, :]) & (segments != 0)[:, None]
    seen &= torch.ones(T, T, dtype=torch.bool).tril()
    mask = torch.where(seen, 0.0, torch.finfo(torch.float32).min)[:, None]
    logits = model(
        input_ids=at["tokens"].long(),
        position_ids=at["positions"].long(),
        attention_mask=mask,
        use_cache=False,
    ).logits
    nll = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), at["labels"].long().flatten(), reduction="none"
    )
    weights = at["loss_weights"].flatten()
    loss = (nll * weights).sum() / weights.sum()
    loss.backward()

    gradient, metrics, _ = plain
    assert metrics["loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert metrics["tokens"] == weights.sum().item()
    expected = {name: p.grad.numpy() for name, p in model.named_parameters()}
    assert expected.keys() == torch_names(gradient).keys()
    for name, g in torch_names(gradient).items():
        scale = np.abs(expected[name]).max()
        assert scale > 1e-5
        np.testing.assert_allclose(g, expected[name], rtol=0, atol=2e-5 * scale, err_msg=name)
    norm = np.sqrt(sum((g.astype(np.float64) ** 2).sum() for g in expected.values()))
    assert metrics["grad_norm"] == pytest.approx(norm, rel=1e-5)


# --- what must not change it


@pytest.mark.parametrize("accumulation", [2, 4])
def test_accumulation_changes_nothing(params, batch, plain, accumulation):
    """Sums over micro-batches, one division. The order of the sums differs, so the last bits of float32 may."""
    gradient, metrics, _ = one_step(tiny_model(), params, batch, accumulation=accumulation)
    assert metrics == pytest.approx(plain[1], rel=1e-5)
    assert_close(gradient, plain[0], 1e-5)


@pytest.mark.parametrize("remat", ["dots", "full"])
def test_remat_changes_nothing(params, batch, plain, remat):
    gradient, metrics, _ = one_step(tiny_model(remat=remat), params, batch)
    assert metrics["loss"] == pytest.approx(plain[1]["loss"], rel=1e-6)
    assert_close(gradient, plain[0], 1e-5)


def test_bfloat16_computes_on_float32_masters(params, batch, plain):
    gradient, metrics, state = one_step(tiny_model(dtype="bfloat16"), params, batch)
    assert {x.dtype for x in jax.tree.leaves((gradient, state["params"]))} == {jnp.dtype("float32")}
    difference = abs(metrics["loss"] - plain[1]["loss"])
    assert 0 < difference < 0.01  # 8 bits of mantissa, and it was really bfloat16
    errors = relative_errors(gradient, plain[0])
    assert 1e-4 < max(errors.values()) < 0.1, errors


def test_rows_without_targets(params, batch):
    nothing = {**batch, "loss_weights": np.zeros_like(batch["loss_weights"])}
    gradient, metrics, _ = one_step(tiny_model(), params, nothing)
    assert metrics["loss"] == metrics["grad_norm"] == metrics["tokens"] == 0
    assert not any(np.any(g) for g in jax.tree.leaves(gradient))


def test_only_what_trains_has_a_gradient(params, batch, plain):
    trains = AdamW(trainable="stages_0.*(q_proj|norm)").trains(params)
    gradient, metrics, state = one_step(tiny_model(), params, batch, trains=trains)
    expected, _ = partition(plain[0], trains)
    assert leaf_paths(gradient) == [f"stages_0/block_0/{name}" for name in ("mixer/q_proj/kernel", *NORMS)]
    assert_close(gradient, expected, 1e-6)
    norm = np.sqrt(sum((np.asarray(e, np.float64) ** 2).sum() for e in jax.tree.leaves(expected)))
    assert metrics["grad_norm"] == pytest.approx(norm, rel=1e-5)
    for x, y in zip(jax.tree.leaves(state["params"]), jax.tree.leaves(params), strict=True):
        assert np.array_equal(x, y)


def test_lora_moves_pairs_only(params, batch, plain):
    """With b = 0 the loss is the plain one, and the gradient of b is scale * a^T (gradient of the kernel)."""
    lora = LoRA(rank=2, alpha=6.0, targets="q_proj").init(jax.random.key(1), tiny_model())
    gradient, metrics, state = one_step(tiny_model(), params, batch, lora=lora)
    assert metrics["loss"] == pytest.approx(plain[1]["loss"], rel=1e-6)
    pair = lora["stages_0"]["block_0"]["mixer"]["q_proj"]
    got = gradient["stages_0"]["block_0"]["mixer"]["q_proj"]
    kernel = plain[0]["stages_0"]["block_0"]["mixer"]["q_proj"]["kernel"]
    np.testing.assert_allclose(got["b"], 3 * np.einsum("ldr,ldnh->lrnh", pair["a"], kernel), atol=1e-6)
    assert not np.any(got["a"]) and not np.any(got["scale"])
    for x, y in zip(jax.tree.leaves(state["params"]), jax.tree.leaves(params), strict=True):
        assert np.array_equal(x, y)


def test_the_loss_is_that_of_the_public_logits(params, batch, plain):
    logits = lcx.logits(
        tiny_model(),
        params,
        batch["tokens"],
        positions=batch["positions"],
        segment_ids=batch["segment_ids"],
    )
    nll = -np.take_along_axis(np.asarray(jax.nn.log_softmax(logits)), batch["labels"][..., None], -1)[..., 0]
    weights = batch["loss_weights"]
    assert plain[1]["loss"] == pytest.approx((nll * weights).sum() / weights.sum(), rel=1e-5)


# --- losses that modules sow


class Sowing(nn.Module):
    """An MLP with a loss for every token, and one of its weights."""

    shape: tuple[int, ...] | None = None
    name_of_loss: str = "activity"

    @nn.compact
    def __call__(self, x):
        linear = Linear((x.shape[-1],), (x.shape[-1],), ("embed", "mlp"), name="up_proj")
        y = linear(x)
        self.sow("losses", self.name_of_loss, 0.1 * jnp.mean(jnp.square(y), axis=-1))
        self.sow(
            "losses", "size", 0.01 * jnp.sum(jnp.square(nn.meta.unbox(linear.variables["params"]["kernel"])))
        )
        return y


def sowing_model(remat="none", **settings):
    model = tiny_model(remat=remat)
    (stage,) = model.stages
    blocks = tuple(b.clone(mlp=Sowing(**settings, parent=None), parent=None) for b in stage.pattern)
    return model.clone(stages=(model_lib.Stage(blocks, stage.repeat),), parent=None)


def written_out(model, variables, batch):
    """(nll, activity, size), each a mean over the tokens that count."""
    places = {name: batch[name] for name in ("positions", "segment_ids")}
    logits, sown = model.apply(variables, batch["tokens"], **places, mutable="losses")
    weights = batch["loss_weights"]
    nll = -jnp.take_along_axis(jax.nn.log_softmax(logits), batch["labels"][..., None], axis=-1)[..., 0]
    mlp = sown["losses"]["stages_0"]["block_0"]["mlp"]
    activity = jnp.sum(mlp["activity"][0], axis=0)  # over layers
    return (
        jnp.sum(nll * weights) / weights.sum(),
        jnp.sum(activity * weights) / weights.sum(),
        mlp["size"][0].sum(),
    )


@pytest.fixture(scope="module")
def sowing(batch):
    model = sowing_model()
    params = model_lib.init_params(model, jax.random.key(0))
    lora = LoRA(rank=2, targets="up_proj").init(jax.random.key(1), model)
    lora = jax.tree.map(lambda x: x + 0.1, lora)

    def loss(weights):
        parts = written_out(model, weights, batch)
        return sum(parts), parts

    variables = {"params": params, "lora": lora}
    alone = jax.jit(jax.grad(lambda p: loss({"params": p}), has_aux=True))(params)
    return params, lora, alone, jax.jit(jax.grad(loss, has_aux=True))(variables)


@pytest.mark.parametrize(("accumulation", "remat"), [(1, "none"), (2, "host"), (4, "dots")])
def test_what_modules_sow_is_in_the_loss(monkeypatch, batch, sowing, accumulation, remat):
    monkeypatch.setattr(tiles, "TILE", batch["tokens"].shape[1] // 2)
    params, _, (gradient, parts), _ = sowing
    got, metrics, _ = one_step(sowing_model(remat), params, batch, accumulation=accumulation)
    assert_close(got, gradient, 2e-5)
    np.testing.assert_allclose(metrics["loss"], sum(parts), rtol=1e-6)
    np.testing.assert_allclose([metrics["activity"], metrics["size"]], parts[1:], rtol=1e-6)
    assert min(metrics["activity"], metrics["size"]) > 1e-2


def test_what_modules_sow_reaches_the_pairs(batch, sowing):
    params, lora, _, (gradient, parts) = sowing
    got, metrics, _ = one_step(sowing_model(), params, batch, lora=lora, accumulation=2)
    np.testing.assert_allclose(metrics["loss"], sum(parts), rtol=1e-6)
    wanted = jax.tree_util.tree_map_with_path(
        lambda path, x: 0 * x if path[-1].key == "scale" else x, gradient["lora"]
    )
    for g, want in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(g, want, atol=2e-5 * max(1e-2, np.abs(want).max()))


def test_losses_that_cannot_be_added(batch, sowing):
    class PerRow(nn.Module):
        @nn.compact
        def __call__(self, x):
            self.sow("losses", "rows", jnp.ones(x.shape[0]))
            return x

    (stage,) = tiny_model().stages
    per_row = stage.pattern[0].clone(mlp=PerRow(parent=None), parent=None)
    model = tiny_model().clone(stages=(model_lib.Stage((per_row,)),), parent=None)
    variables = {"params": model_lib.init_params(model, jax.random.key(0))}
    batch = jax.tree.map(jnp.asarray, batch)
    with pytest.raises(
        UserError, match=r"sows 'rows' of shape \(8,\) in `losses`, expected \(\) or one loss per token"
    ):
        objectives.next_token(model, variables, batch)
    with pytest.raises(UserError, match="sows 'loss' in `losses`, which is the name of another metric"):
        objectives.next_token(sowing_model(name_of_loss="loss"), {"params": sowing[0]}, batch)


@pytest.mark.parametrize("kind", ["plain", "sowing", "transfer"])
def test_the_held_out_sums_do_not_depend_on_accumulation(params, batch, sowing, kind):
    model, objective = tiny_model(), objectives.next_token
    if kind == "sowing":
        model, params = sowing_model(), sowing[0]
    if kind == "transfer":
        model, params = Linearize(window=4, feature_dim=8)(model, params, jax.random.key(0))
        objective = objectives.attention_transfer
    found = {
        count: train_step.make_sums(model, objective, count)({"params": params}, batch) for count in (1, 2, 4)
    }
    for loss, weight in found.values():
        assert weight == found[1][1]
        np.testing.assert_allclose(loss, found[1][0], rtol=1e-6)
    if kind == "sowing":  # what is sown is minimised, and no part of the held-out loss
        np.testing.assert_allclose(found[4][0] / found[4][1], sowing[2][1][0], rtol=1e-6)


def test_a_step_is_compiled_before_its_batch_exists(caplog):
    """...and not again when the batch comes."""
    mesh = sharding.make_mesh(fsdp=1, devices=jax.devices()[:1])
    step = jax.jit(lambda state, batch, number: (state, {name: x.sum() + number for name, x in batch.items()}))
    state = jax.device_put({"params": np.ones(3, np.float32)}, sharding.replicated(mesh))
    padding = packing.empty_batch(2, 8)

    def compiled_by(call):
        caplog.clear()
        with jax.set_mesh(mesh), jax.log_compiles():
            call()
        return "Compiling jit(<lambda>)" in caplog.text

    assert compiled_by(lambda: train_step.compile_first(step, state, sharding.abstract_batch(padding, mesh)))
    filled = {name: x + 1 for name, x in padding.items()}
    assert not compiled_by(lambda: step(state, sharding.shard_batch(filled, mesh), np.int32(3)))
    longer = packing.empty_batch(2, 9)
    assert compiled_by(lambda: step(state, sharding.shard_batch(longer, mesh), np.int32(3)))
