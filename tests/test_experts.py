"""The mixture of experts: equal to a loop over experts in value and gradient, with every gating."""

import flax.linen
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from lcx.errors import UserError
from lcx.llama import llama
from lcx.lora import LoRA, merge, statement
from lcx.mlps.experts import ExpertsMlp
from lcx.model import flops_per_token, num_params
from lcx.ops.grouped_matmul import grouped_matmul

D, F, E, K = 12, 20, 5, 2
X = np.random.default_rng(0).normal(size=(2, 50, D)).astype(np.float32)


def looped(mlp: ExpertsMlp, params, x):
    """Every expert applied to every token, from the formula."""
    p = jax.tree.map(lambda leaf: leaf, params)
    logits = x @ p["router"]["kernel"] + (p["router"]["bias"] if mlp.bias else 0)
    best = jnp.sort(logits, axis=-1)[..., -mlp.num_chosen][..., None]
    kept = logits >= best
    probabilities = jax.nn.softmax(logits, axis=-1) * kept
    gates = probabilities if mlp.gating == "softmax" else probabilities / probabilities.sum(-1, keepdims=True)
    y = 0
    for e in range(mlp.num_experts):
        gate, up = (
            x @ p[f"{n}_kernel"][e] + (p[f"{n}_bias"][e] if mlp.bias else 0) for n in ("gate_proj", "up_proj")
        )
        if mlp.clamp is None:
            z = jax.nn.silu(gate) * up
        else:
            gate = jnp.minimum(gate, mlp.clamp)
            z = gate * jax.nn.sigmoid(1.702 * gate) * (jnp.clip(up, -mlp.clamp, mlp.clamp) + 1)
        y += gates[..., e : e + 1] * (
            z @ p["down_proj_kernel"][e] + (p["down_proj_bias"][e] if mlp.bias else 0)
        )
    if mlp.shared_size is not None:
        kernels = [p["shared_expert"][n]["kernel"] for n in ("gate_proj", "up_proj", "down_proj")]
        shared = (jax.nn.silu(x @ kernels[0]) * (x @ kernels[1])) @ kernels[2]
        y += jax.nn.sigmoid(x @ p["shared_gate"]["kernel"]) * shared
    return y


@pytest.mark.parametrize(
    "settings",
    [
        dict(gating="softmax", shared_size=7),
        dict(gating="normalised", num_experts=9),
        dict(gating="chosen", bias=True, clamp=0.7),
    ],
    ids=lambda settings: settings["gating"],
)
def test_equal_to_the_loop_over_experts(settings):
    mlp = ExpertsMlp(**dict(num_experts=E, num_chosen=K, intermediate_size=F) | settings, parent=None)
    shapes = jax.eval_shape(mlp.init, jax.random.key(0), X)["params"]
    rng = np.random.default_rng(1)
    params = jax.tree.map(
        lambda leaf: 0.5 * rng.normal(size=leaf.shape).astype(np.float32), flax.linen.meta.unbox(shapes)
    )

    def value(fn):
        return jax.jit(jax.value_and_grad(lambda p, x: jnp.sum(jnp.sin(fn(p, x))), argnums=(0, 1)))

    found = value(lambda p, x: mlp.apply({"params": p}, x))(params, X)
    expected = value(lambda p, x: looped(mlp, p, x))(params, X)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5 * max(np.abs(b).max(), 1))


@pytest.mark.parametrize(
    ("implementation", "sizes", "rows"),
    [("tiles", [0, 1, 64, 0, 70, 3], 150), ("ragged", [0, 1, 64, 0, 70, 3], 150), ("tiles", [3, 300], 512)],
)
def test_grouped_matmul(implementation, sizes, rows):
    """Groups of 0, 1, a tile and many rows, and rows of no group; the larger tiles of larger groups."""
    sizes, rng = np.array(sizes), np.random.default_rng(0)
    x = rng.normal(size=(rows, 6)).astype(np.float32)
    w = rng.normal(size=(len(sizes), 6, 4)).astype(np.float32)

    def value(name):
        def f(x, w):
            return jnp.sum(jnp.cos(grouped_matmul(x, w, jnp.asarray(sizes), implementation=name)))

        return jax.jit(jax.value_and_grad(f, argnums=(0, 1)))(x, w)

    for a, b in zip(jax.tree.leaves(value(implementation)), jax.tree.leaves(value("reference")), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6 * max(np.abs(b).max(), 10))


def test_cost_counts_the_experts_that_a_token_uses():
    sizes = dict(vocab_size=11, hidden_size=D, intermediate_size=F * K, num_layers=2, num_heads=2)
    dense = llama(**sizes, max_position_embeddings=8)
    (stage,) = dense.stages
    mlp = ExpertsMlp(num_experts=64, num_chosen=K, intermediate_size=F, parent=None)
    sparse = dense.clone(
        stages=(type(stage)((stage.pattern[0].clone(mlp=mlp, parent=None),), 2),), parent=None
    )
    assert num_params(sparse) > 10 * num_params(dense)
    assert flops_per_token(sparse, 8) == flops_per_token(dense, 8) + 6 * 2 * D * 64  # the router
    pairs = LoRA(rank=2, targets="/mlp/.*_proj").abstract(sparse)
    line = "on 384 matrices: ExpertsMlp gate_proj 128, up_proj 128, down_proj 128;"
    assert f"{line} {384 * 2 * (D + F) / 1000:.3g} thousand parameters" in statement(sparse, pairs)


def test_a_pair_of_each_expert_is_the_merged_weights():
    mlp, rng = ExpertsMlp(E, K, F, parent=None), np.random.default_rng(2)
    params = flax.linen.meta.unbox(jax.jit(mlp.init)(jax.random.key(0), X)["params"])
    sides = {"gate_proj": (D, F), "down_proj": (F, D)}
    lora = {
        name: {
            "a": rng.normal(size=(E, n, 3)).astype(np.float32),
            "b": rng.normal(size=(E, 3, m)).astype(np.float32),
            "scale": np.float32(0.3),
        }
        for name, (n, m) in sides.items()
    }
    found = jax.jit(mlp.apply)({"params": params, "lora": lora}, X)
    one_layer = [jax.tree.map(lambda x: jnp.asarray(x)[None], tree) for tree in (params, lora)]
    merged = jax.tree.map(lambda x: x[0], merge(*one_layer))
    np.testing.assert_allclose(found, jax.jit(mlp.apply)({"params": merged}, X), atol=3e-5)
    assert not np.allclose(merged["down_proj_kernel"], params["down_proj_kernel"])


def test_load_balance_loss_as_published():
    """1 with uniform routing, at most E; padding does not count (transformers' load_balancing_loss_func)."""
    mlp = ExpertsMlp(E, K, F, aux_loss_weight=0.5, parent=None)
    x = jnp.asarray(X)
    params = mlp.init(jax.random.key(0), x)["params"]
    segments = np.ones((2, 50), np.int32)
    segments[1, 30:] = 0
    _, sown = mlp.apply({"params": params}, x, segment_ids=jnp.asarray(segments), mutable="losses")
    kernel = np.asarray(params["router"]["kernel"].unbox())
    logits = torch.tensor(X.reshape(-1, D) @ kernel)
    expected = load_balancing_loss_func((logits,), E, K, torch.tensor((segments != 0).astype(int)))
    np.testing.assert_allclose(sown["losses"]["load_balance"][0], 0.5 * float(expected), rtol=1e-5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(num_chosen=6), "expected at most num_experts = 5"),
        (dict(gating="top"), "expected one of softmax"),
    ],
)
def test_settings_that_mean_nothing(settings, message):
    with pytest.raises(UserError, match=message):
        ExpertsMlp(**dict(num_experts=E, num_chosen=K, intermediate_size=F) | settings, parent=None).check()
