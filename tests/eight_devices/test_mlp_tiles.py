"""MLPs in tiles where the tokens of a row lie on several devices: each device walks through its own."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from lcx import sharding
from lcx.mlps import tiles
from lcx.mlps.gated import GatedMlp

D = 8


@pytest.mark.parametrize("T", [96, 92])  # tiles of 12 tokens on each of 4 devices; 92 / 4 divides into none
def test_the_same_and_nothing_is_sent(monkeypatch, T):
    monkeypatch.setattr(tiles, "TILE", 12)
    mlp, x = GatedMlp(16), jax.random.normal(jax.random.key(1), (2, T, D))
    params = mlp.init(jax.random.key(0), x)

    def loss(params, x, tiled):
        bound = mlp.bind(params)
        return jnp.sum(jnp.sin(tiles.in_tiles(bound, x) if tiled else bound(x)))

    expected = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)), static_argnums=2)(params, x, False)
    mesh = sharding.MeshShape(data=1, fsdp=2, context=4, tensor=1).build()
    with jax.set_mesh(mesh):
        whole = jax.device_put(params, jax.NamedSharding(mesh, P()))
        rows = jax.device_put(x, jax.NamedSharding(mesh, P("fsdp", "context")))
        step = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)), static_argnums=2).lower(whole, rows, True).compile()
        found = step(whole, rows)
    text = step.as_text()
    assert ("while(" in text) == (T == 96)
    assert not any(kind in text for kind in ("all-gather(", "all-to-all(", "collective-permute("))
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
