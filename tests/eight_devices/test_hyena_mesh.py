"""Hyena on several devices: whole channels lie together, so a model moves between meshes by its sharding alone."""

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


@pytest.mark.parametrize("mesh_name", MESHES)
@pytest.mark.parametrize("name", MIXERS)
def test_outputs_gradients_and_decode_are_those_of_one_device(name, mesh_name):
    mixer = MIXERS[name]
    x = jax.random.normal(jax.random.key(0), (4, T, C))
    ids = jnp.array(np.repeat([1, 2, 0], [60, 30, 10])[None].repeat(4, axis=0), jnp.int32)
    boxed = jax.jit(mixer.init)(jax.random.key(1), x)["params"]
    params = jax.tree.map(
        lambda w: w + 0.1 * jax.random.normal(jax.random.key(2), w.shape), nn.meta.unbox(boxed)
    )
    expected = jax.jit(gradients, static_argnums=0)(mixer, params, x, ids)

    def two_pieces(params, x):
        y, cache = mixer.apply({"params": params}, x[:, :-1], cache=mixer.init_cache(4, T, jnp.float32))
        return mixer.apply({"params": params}, x[:, -1:], cache=cache)[0]

    last = jax.jit(two_pieces)(params, x)
    mesh = sharding.make_mesh(**MESHES[mesh_name])
    with jax.set_mesh(mesh):
        placed = jax.device_put(params, sharding.tree_shardings(boxed, mesh))
        found = jax.jit(gradients, static_argnums=0)(mixer, placed, x, ids)
        found_last = jax.jit(two_pieces)(placed, x)
    for a, b in zip(jax.tree.leaves((found, found_last)), jax.tree.leaves((expected, last)), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5 * max(1, np.abs(b).max()))
    parts = mesh.shape["tensor"]
    shard = placed["featurizer"].addressable_shards[0].data
    assert shard.shape == (C // parts, 3, 3)  # every role of a channel on one device
