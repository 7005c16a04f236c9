"""Experts, attention sinks and rings on eight devices: the loss and gradients of one device."""

import jax
import jax.numpy as jnp
import numpy as np

from lcx import sharding
from lcx.block import Block
from lcx.mixers.attention import Attention
from lcx.mlps.experts import ExpertsMlp
from lcx.model import Decoder, Stage, abstract_params, init_params
from lcx.sharding import MeshShape

MIXER = Attention(4, 2, 8, window=9, sinks=True, softcap=2.0, parent=None)
MLP = ExpertsMlp(8, 2, 16, gating="chosen", bias=True, clamp=1.0, shared_size=16, parent=None)
MODEL = Decoder(64, 32, (Stage((Block(MIXER, MLP, parent=None),), 1),), 64, parent=None)
TOKENS = np.random.default_rng(0).integers(0, 64, (8, 24), np.int32)


def gradient(params, tokens):
    def loss(params):
        logits = MODEL.apply({"params": params}, tokens)
        return -jnp.mean(jnp.take_along_axis(jax.nn.log_softmax(logits[:, :-1]), tokens[:, 1:, None], -1))

    return jax.value_and_grad(loss)(params)


def test_equal_to_one_device():
    params = jax.device_get(init_params(MODEL, jax.random.key(0)))
    want = jax.jit(gradient)(params, TOKENS)
    mesh = MeshShape(data=2, fsdp=2, tensor=2).build()
    with jax.set_mesh(mesh):
        abstract = abstract_params(MODEL, mesh=mesh)
        spread = jax.tree.map(lambda x, like: jax.device_put(x, like.sharding), params, abstract)
        rows = jax.device_put(
            TOKENS, sharding.NamedSharding(mesh, sharding.PartitionSpec(sharding.BATCH_AXES))
        )
        got = jax.jit(gradient)(spread, rows)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5 * max(float(np.abs(b).max()), 1))
