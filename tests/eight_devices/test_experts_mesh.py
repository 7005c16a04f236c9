"""Experts with pairs of LoRA, attention sinks and rings on many devices: the loss and gradients of one device."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from collectives import collectives

from lcx import sharding
from lcx.block import Block
from lcx.lora import LoRA
from lcx.mixers.attention import Attention
from lcx.mlps.experts import ExpertsMlp
from lcx.model import Decoder, Stage, abstract_params
from lcx.ops import routing
from lcx.planning import flops
from lcx.sharding import MeshShape

E, F, K, D, B, T = 6, 48, 2, 32, 8, 24
MIXER = Attention(4, 2, 8, window=9, sinks=True, softcap=2.0, parent=None)
GROUPS = dict(choice_bias=True, num_groups=3, num_chosen_groups=2)
MLP = ExpertsMlp(
    E, K, F, gating="chosen", bias=True, clamp=1.0, shared_size=16, expert_scale=True, gate_inputs=True, **GROUPS,
    parent=None,
)
MODEL = Decoder(64, D, (Stage((Block(MIXER, MLP, parent=None),), 1),), 64, parent=None)
TOKENS = np.random.default_rng(0).integers(0, 64, (B, T), np.int32)
HIDDEN = np.random.default_rng(0).normal(size=(B, T, D)).astype(np.float32)


def variables_of_model(mesh=None):
    pairs = LoRA(rank=2, targets="/mlp/.*_proj").abstract(MODEL, mesh=mesh)
    return {"params": abstract_params(MODEL, mesh=mesh), "lora": pairs}


def variables_of_mlp(mesh=None):
    boxed = jax.eval_shape(MLP.init, jax.random.key(0), HIDDEN)
    shapes = nn.meta.unbox(boxed)
    if mesh is None:
        return shapes
    places = sharding.tree_shardings(boxed, mesh)
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, places)


def gradient_of_model(variables, tokens):
    def loss(variables):
        logits = MODEL.apply(variables, tokens)
        return -jnp.mean(jnp.take_along_axis(jax.nn.log_softmax(logits[:, :-1]), tokens[:, 1:, None], -1))

    return jax.value_and_grad(loss)(variables)


def gradient_of_mlp(variables, x):
    return jax.value_and_grad(lambda v, x: jnp.mean(jnp.sin(MLP.apply(v, x))), argnums=(0, 1))(variables, x)


PARTS = {
    "model": (variables_of_model, gradient_of_model, TOKENS),
    "mlp": (variables_of_mlp, gradient_of_mlp, HIDDEN),
}


@functools.cache
def on_one_device(part):
    shapes, gradient, x = PARTS[part]
    rng = np.random.default_rng(1)
    values = jax.tree.map(lambda s: (0.3 * rng.normal(size=s.shape)).astype(np.float32), shapes())
    if part == "mlp":  # most tokens choose the same experts
        values["params"]["router"]["bias"] = np.array([5, 4, 4, 0, 0, 0], np.float32)
    return values, jax.jit(gradient)(values, x)


@pytest.mark.parametrize(
    ("part", "shape", "split"),
    [
        ("model", dict(data=2, fsdp=2, tensor=2), "experts"),
        ("mlp", dict(fsdp=1, tensor=2), "experts, of which one device has most"),
        ("mlp", dict(fsdp=1, context=2, tensor=4), "width of experts"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_equal_to_one_device(part, shape, split):
    values, want = on_one_device(part)
    variables, gradient, x = PARTS[part]
    sizes = MeshShape(**shape)
    mesh = sizes.build(jax.devices()[: sizes.data * sizes.fsdp * sizes.context * sizes.tensor])
    with jax.set_mesh(mesh):
        placed = jax.tree.map(lambda x, like: jax.device_put(x, like.sharding), values, variables(mesh))
        rows = sharding.NamedSharding(mesh, sharding.PartitionSpec(sharding.BATCH_AXES, "context"))
        x = jax.device_put(x, rows)
        compiled = jax.jit(gradient).lower(placed, x).compile()
        got = compiled(placed, x)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5 * max(float(np.abs(b).max()), 1))
    if part == "mlp":
        text = compiled.as_text()
        assert f"[{B * T * K // sizes.context},{F}]" not in text  # no device has room for the pairs of all
        sent = [(c.kind, shape) for c in collectives(text) if c.devices > 1 for shape in c.shapes]
        # The outputs of the experts and of the shared one; the gradients of their inputs (twice of the shared one).
        assert [kind for kind, shape in sent if np.prod(shape) * sizes.context == B * T * D] == ["all-reduce"] * 5
        assert {kind for kind, _ in sent} == {"all-reduce"}


def test_products_fall_with_the_devices():
    """Over all devices they are those of one device: with experts split, and what the parts leave room for."""
    mlp = MLP.clone(bias=False, implementation="ragged", parent=None)
    boxed = jax.eval_shape(mlp.init, jax.random.key(0), HIDDEN)

    def counted(tensor):
        with jax.set_mesh(MeshShape(fsdp=1, tensor=tensor).build(jax.devices()[:tensor])):
            traced = jax.jit(jax.grad(lambda v: mlp.apply(v, jnp.asarray(HIDDEN)).sum())).trace(nn.meta.unbox(boxed))
        return flops.count(traced).flops

    whole, experts, width = counted(1), counted(2), counted(4)
    assert whole < experts <= routing.SLACK * whole and width == whole
