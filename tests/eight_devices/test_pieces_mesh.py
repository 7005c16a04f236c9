"""Rows in pieces over a mesh: the gradient of one device, with recurrent states and with keys and values.

Rows that continue others (Trainer.stateful) also leave the state of one device.
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lcx import model as model_lib
from lcx import objectives, sharding
from lcx.block import Block
from lcx.mixers import latent_attention
from lcx.mixers.attention import Attention
from lcx.mixers.latent_attention import LatentAttention
from lcx.mixers.mamba2 import Mamba2
from lcx.mixers.two_mamba import TwoMamba
from lcx.mlps.gated import GatedMlp
from lcx.model import Decoder, Stage
from lcx.ops import attention_parts
from lcx.pieces import Pieces
from lcx.planning.program import parse
from lcx.training import row_state

T = 24
BLOCKS = (
    Block(Mamba2(num_heads=4, head_dim=8, state_dim=8), None),
    Block(Attention(4, 2, 8, window=11), GatedMlp(32)),
)
MODEL = Decoder(64, 32, (Stage(BLOCKS, 2),), T)
PIECES = Pieces(8)


@functools.cache
def start(model, mesh=None):
    """The parameters at the start, made on one device, which compiles faster than on a mesh, and moved there."""
    if mesh is None:
        return jax.tree.map(np.asarray, model_lib.init_params(model, jax.random.key(0)))
    like = model_lib.abstract_params(model, mesh=mesh)
    return jax.tree.map(lambda x, leaf: jax.device_put(x, leaf.sharding), start(model), like)


def gradient(params, batch, state=None, how=PIECES):
    """((loss, the state after the rows or None), gradient)."""

    def loss(params):
        given = objectives.next_token(MODEL, {"params": params}, batch, how, state)
        return (given[0], None) if state is None else (given[0][0], given[1])

    return jax.jit(jax.value_and_grad(loss, has_aux=True))(params)


@pytest.fixture(scope="module")
def rows():
    rng = np.random.default_rng(0)
    segments = np.repeat([[1] * T, [1] * 11 + [2] * 9 + [0] * 4], 2, axis=0).astype(np.int32)
    return {
        "tokens": rng.integers(0, 64, (4, T), np.int32),
        "labels": rng.integers(0, 64, (4, T), np.int32),
        "positions": np.where(segments == 2, np.arange(T) - 11, np.arange(T)).astype(np.int32),
        "segment_ids": segments,
        "loss_weights": (segments != 0).astype(np.float32),
    }


def state_before():
    """A state whose document the first rows continue."""
    rng, like = np.random.default_rng(1), MODEL.init_cache(4, 1 << 20)
    return jax.tree.map(
        lambda x: (
            rng.normal(0, 0.3, x.shape).astype(x.dtype)
            if np.issubdtype(x.dtype, np.floating)
            else np.ones(x.shape, x.dtype)
        ),
        like,
    )


@pytest.mark.parametrize(
    ("sizes", "continues"),
    [({"fsdp": 2, "tensor": 2, "data": 2}, False), ({"fsdp": 2, "context": 4}, True)],
    ids=str,
)
def test_gradients_are_those_of_one_device(rows, sizes, continues):
    """Over `context` a piece of 8 tokens lies on 4 devices, fewer on each than the window.

    One device takes whole rows, which compiles faster; only states that continue are compared with its pieces.
    """
    before = state_before() if continues else None
    params = start(MODEL)
    want = gradient(params, jax.tree.map(jax.numpy.asarray, rows), before, how=PIECES if continues else None)
    mesh = sharding.make_mesh(**sizes)
    with jax.set_mesh(mesh):
        params = start(MODEL, mesh)
        if continues:
            like = row_state.abstract(MODEL, 4, mesh)[row_state.ITEM]
            before = jax.tree.map(lambda x, leaf: jax.device_put(x, leaf.sharding), before, like)
        got = gradient(params, sharding.shard_batch(rows, mesh), before)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5 * (1 + np.abs(b).max()))


def test_keys_and_values_of_earlier_pieces_are_divided_over_rows_and_heads(rows):
    """Of softmax attention and 2Mamba-E, with their gradients: a device never holds those of all rows or heads."""
    blocks = Block(Attention(4, 4, 6), GatedMlp(32)), Block(TwoMamba(4, 6, score="exp", conv_width=2), None)
    model = Decoder(64, 32, (Stage(blocks, 2),), T)

    def gradient(params, batch, how):
        def loss(params):
            return objectives.next_token(model, {"params": params}, batch, how)[0]

        return jax.value_and_grad(loss)(params)

    want = jax.jit(gradient, static_argnums=2)(start(model), rows, None)
    mesh = sharding.make_mesh(fsdp=2, context=4)
    with jax.set_mesh(mesh):
        arguments = start(model, mesh), sharding.shard_batch(rows, mesh)
        compiled = jax.jit(gradient, static_argnums=2).lower(*arguments, Pieces(12)).compile()  # more than kv_cache.FEW
        got = compiled(*arguments)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5 * (1 + np.abs(b).max()))
    arrays = {array.shape for run in parse(compiled.as_text()).runs() for array in run.instruction.results}
    slots = {shape for shape in arrays if T in shape and 6 in shape}
    assert max(map(np.prod, slots)) == 2 * 2 * 1 * T * 6  # two layers, two of four rows, one of four heads


@pytest.mark.parametrize(("heads", "own"), [(4, (12, 1)), (3, (2, 3))])
def test_the_work_with_a_long_cache_of_latents_is_divided(rows, heads, own, monkeypatch):
    """By heads where these divide over `context`, else by blocks of queries: `own` tokens and heads at a time."""
    shapes = set()

    def attend(q, *args, **options):
        shapes.add(q.shape)
        return attention_parts.attention_in_parts(q, *args, **options)

    monkeypatch.setattr(latent_attention, "attention_in_parts", attend)
    monkeypatch.setattr(attention_parts, "SLOTS", 8)
    mixer = LatentAttention(heads, 10, 5, 4, 7)
    x = np.random.default_rng(2).normal(size=(4, T, 32)).astype(np.float32)
    params = nn.meta.unbox(jax.jit(mixer.init)(jax.random.key(0), x[:, :2]))["params"]

    def run(params, x, *edges):
        packed = {name: jnp.asarray(rows[name]) for name in ("positions", "segment_ids")}

        def loss(params, x):
            ys, cache = [], mixer.init_cache(4, T, x.dtype) if edges else None
            for first, last in zip((0, *edges), (*edges, T), strict=True):
                here = {name: value[:, first:last] for name, value in packed.items()}
                y, cache = mixer.apply({"params": params}, x[:, first:last], **here, cache=cache)
                ys.append(y)
            y = jnp.where(packed["segment_ids"][..., None] != 0, jnp.concatenate(ys, axis=1), 0)
            return jnp.sum(jnp.sin(y)), y

        return jax.value_and_grad(loss, (0, 1), has_aux=True)(params, x)

    run = jax.jit(run, static_argnums=(2,))
    want = run(params, x)
    with jax.set_mesh(sharding.make_mesh(fsdp=2, context=4)):
        got = run(params, x, 12)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5 * (1 + np.abs(b).max()))
    assert shapes == {(2, *own, 5 + 4)}
