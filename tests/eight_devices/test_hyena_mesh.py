"""Hyena on several devices: whole channels lie together, so a model moves between meshes by its sharding alone."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lcx import sharding
from lcx.mixers.hyena import HyenaLI, HyenaMR, HyenaSE

C, T = 64, 100
MIXERS = {
    "se": HyenaSE(num_channels=C, num_groups=8),
    "mr": HyenaMR(num_channels=C, num_groups=8),
    "li": HyenaLI(num_channels=C),
}
MESHES = {
    "tensor8": dict(tensor=8),
    "data2_fsdp2_tensor2": dict(data=2, fsdp=2, tensor=2),
}


def gradients(mixer, params, x, ids):
    def loss(params, x):
        y, _ = mixer.apply({"params": params}, x, segment_ids=ids)
        return jnp.sum(jnp.sin(y)), y

    (_, y), grads = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(params, x)
    return y, grads


def two_pieces(mixer, params, x):
    y, cache = mixer.apply({"params": params}, x[:, :-1], cache=mixer.init_cache(4, T, jnp.float32))
    return mixer.apply({"params": params}, x[:, -1:], cache=cache)[0]


X = np.random.default_rng(0).normal(size=(4, T, C)).astype(np.float32)
IDS = np.repeat([1, 2, 0], [60, 30, 10])[None].repeat(4, axis=0).astype(np.int32)


@functools.partial(jax.jit, static_argnums=0)
def everything(mixer, params, x, ids):
    """(outputs and gradients of packed rows, the last token after the others)."""
    return gradients(mixer, params, x, ids), two_pieces(mixer, params, x)


@functools.cache
def on_one_device(name):
    """The parameters, boxed and noisy, and what one device makes of them."""
    mixer = MIXERS[name]
    boxed = jax.jit(mixer.init)(jax.random.key(1), X)["params"]
    rng = np.random.default_rng(2)
    params = jax.tree.map(
        lambda w: np.asarray(w) + 0.1 * rng.normal(size=w.shape).astype(np.float32), nn.meta.unbox(boxed)
    )
    return boxed, params, everything(mixer, params, X, IDS)


@pytest.mark.parametrize("mesh_name", MESHES)
@pytest.mark.parametrize("name", MIXERS)
def test_outputs_gradients_and_decode_are_those_of_one_device(name, mesh_name):
    boxed, params, expected = on_one_device(name)
    mesh = sharding.make_mesh(**MESHES[mesh_name])
    with jax.set_mesh(mesh):
        placed = jax.device_put(params, sharding.tree_shardings(boxed, mesh))
        found = everything(MIXERS[name], placed, X, IDS)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5 * max(1, np.abs(b).max()))
    parts = mesh.shape["tensor"]
    shard = placed["featurizer"].addressable_shards[0].data
    assert shard.shape == (C // parts, 3, 3)  # every role of a channel on one device
