"""Rows in pieces against whole rows: values and gradients of every mixer, packed and padded; memory; settings."""

import contextlib
import dataclasses
import functools
from types import SimpleNamespace

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_mixers import MIXERS, D
from tiny_runs import dataset, tiny_model, write_text

from lcx import lora as lora_lib
from lcx import objectives, pieces
from lcx.errors import UserError
from lcx.mixers.attention import Attention
from lcx.mixers.mamba2 import Mamba2
from lcx.mixers.published_lolcats import PublishedLinearAttention
from lcx.model import Block, Decoder, Mlp, Stage
from lcx.optim import combine, partition
from lcx.pieces import Pieces
from lcx.rope import Rope
from lcx.trainer import Trainer
from lcx.training.settings import check_model

T = 40
DYNAMIC = Rope(rope_type="dynamic", factor=2.0, original_max_position_embeddings=16)
# Every kind of state: a ring, modes and a history of inputs, a recurrent state, caches that grow, and RoPE that depends
# on the length. Every mixer of the battery has its gradient in pieces by itself (test_mixers.py).
NAMES = ("attention_window", "hyena_li", "mamba2", "two_mamba_exp")
EVERY = (*(MIXERS[name] for name in NAMES), Attention(2, 1, 8, rope=DYNAMIC))


def packed(rng) -> dict[str, np.ndarray]:
    """A row of one document, and one of two and padding; the documents end inside a piece and on a border."""
    segments = np.array([[1] * T, [1] * 9 + [2] * 23 + [0] * 8], np.int32)
    return {
        "tokens": rng.integers(0, 50, (2, T), np.int32),
        "labels": rng.integers(0, 50, (2, T), np.int32),
        "positions": np.array([[*range(T)], [*range(9), *range(23), *[0] * 8]], np.int32),
        "segment_ids": segments,
        "loss_weights": (segments != 0).astype(np.float32) * rng.uniform(0.2, 1, (2, T)).astype(np.float32),
    }


BATCH = jax.tree.map(jnp.asarray, packed(np.random.default_rng(0)))


def noisy(model):
    """Parameters away from their symmetric start."""
    params = nn.meta.unbox(jax.jit(model.init)(jax.random.key(0), BATCH["tokens"]))["params"]
    rng = np.random.default_rng(1)
    return jax.tree.map(lambda x: np.asarray(x) + 0.1 * rng.normal(size=x.shape).astype(np.float32), params)


@functools.partial(jax.jit, static_argnums=(0, 1))
def gradient(model, how, params, batch):
    def loss(params):
        total, weight = objectives.next_token(model, {"params": params}, batch, how)
        return total / weight

    return jax.value_and_grad(loss)(params)


def assert_equal(got, want, relative=1e-4):
    np.testing.assert_allclose(got[0], want[0], rtol=1e-6)
    for (path, a), b in zip(
        jax.tree_util.tree_leaves_with_path(got[1]), jax.tree.leaves(want[1]), strict=True
    ):
        atol = 2e-7 + relative * float(np.abs(b).max())
        np.testing.assert_allclose(a, b, atol=atol, err_msg=jax.tree_util.keystr(path))


@pytest.fixture(scope="module")
def every_mixer():
    """One model of these mixers, each twice in depth, its parameters, and the gradient of whole rows."""
    blocks = tuple(Block(mixer, Mlp(24) if i % 3 else None) for i, mixer in enumerate(EVERY))
    model = Decoder(50, D, (Stage(blocks, 2),), 64, tie_word_embeddings=True)
    params = noisy(model)
    return model, params, gradient(model, None, params, BATCH)


def test_gradients_are_those_of_whole_rows(every_mixer, monkeypatch):
    """Pieces that end in a halo, a window and a document, a last one of one token; only every other border is kept."""
    monkeypatch.setattr(pieces, "BORDER_BYTES", 0)
    model, params, want = every_mixer
    assert_equal(gradient(model, Pieces(13), params, BATCH), want)


def test_all_borders_kept(monkeypatch):
    """The usual case: the states at all borders fit, and nothing is recomputed twice. They may wait on the host."""
    model = small(MIXERS["hyena_se"])
    params = noisy(model)
    want = gradient(model, None, params, BATCH)
    assert_equal(gradient(model, Pieces(16), params, BATCH), want)
    monkeypatch.setattr(pieces, "dispatch", SimpleNamespace(platform=lambda: "tpu"))  # what "host" does elsewhere
    monkeypatch.setattr(pieces, "BORDER_BYTES", 0)
    how = Pieces(16, borders="host")
    assert "<host>[3," in str(gradient.trace(model, how, params, BATCH).jaxpr), "all three, none recomputed"
    assert_equal(gradient(model, how, params, BATCH), want)


def small(mixer):
    return Decoder(50, D, (Stage((Block(mixer, Mlp(24)),), 2),), 64)


def test_stop_cuts_the_gradient_at_the_borders():
    """As if each piece's state were data: against a loop over pieces with stop_gradient."""
    model, L = small(MIXERS["mamba2"]), 20
    params = noisy(model)

    def loss(params):
        total, state = 0.0, model.init_cache(2, T)
        for start in range(0, T, L):
            part = {name: x[:, start : start + L] for name, x in BATCH.items()}
            (value, _), state = objectives._next_token(
                model, {"params": params}, jax.lax.stop_gradient(state), part
            )
            total += value
        return total / BATCH["loss_weights"].sum()

    want = jax.jit(jax.value_and_grad(loss))(params)
    assert_equal(gradient(model, Pieces(L, carry="stop"), params, BATCH), want)
    exact = gradient(model, None, params, BATCH)[1]["stages_0"]["block_0"]["mixer"]["A_log"]
    assert np.abs(exact - want[1]["stages_0"]["block_0"]["mixer"]["A_log"]).max() > 1e-6


def test_only_what_trains_gets_a_gradient():
    """With LoRA the program computes no gradient of a frozen matrix: it has fewer FLOPs than with all gradients."""
    model = tiny_model()
    params = jax.eval_shape(lambda: nn.meta.unbox(model.init(jax.random.key(0), BATCH["tokens"]))["params"])
    pairs = jax.eval_shape(lambda: lora_lib.LoRA(rank=2).init(jax.random.key(0), model))

    def flops(moving, still):
        def loss(moving):
            return objectives.next_token(model, combine(moving, still), BATCH, Pieces(16))[0]

        return jax.jit(jax.grad(loss)).lower(moving).cost_analysis()["flops"]

    weights = {"params": params, "lora": pairs}
    trains = {name: jax.tree.map(lambda _, yes=name == "lora": yes, weights[name]) for name in weights}
    moving, still = partition(weights, trains)
    still = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), still)
    assert flops(moving, still) < 0.8 * flops(weights, jax.tree.map(lambda _: None, weights))


def test_memory_does_not_grow_with_the_row():
    """Compiled temporary memory of a recurrent model's gradient, in bytes: 8 times the tokens, less than 1.2 times."""
    model = small(Mamba2(num_heads=2, head_dim=16, state_dim=16))
    params = jax.eval_shape(lambda: nn.meta.unbox(model.init(jax.random.key(0), BATCH["tokens"]))["params"])

    def temporary(tokens, how):
        batch = {name: jax.ShapeDtypeStruct((1, tokens), x.dtype) for name, x in BATCH.items()}
        compiled = gradient.lower(model, how, params, batch).compile()
        ints = sum(4 * tokens for _ in batch)  # the batch itself, cut into pieces
        return compiled.memory_analysis().temp_size_in_bytes - ints

    short, long = (temporary(tokens, Pieces(256)) for tokens in (512, 4096))
    assert long < 1.2 * short
    assert temporary(4096, None) > 3 * long  # whole rows do grow


def test_a_layer_needs_its_keys_and_values_and_one_gradient_of_them():
    """Compiled temporary memory by the number of layers: twice their keys and values, and what a piece needs."""
    tokens, kv_bytes = 8192, 2 * 8192 * 8 * 4

    def temporary(layers):
        stage = Stage((Block(Attention(1, 1, 8), None),), layers)
        model = Decoder(50, 8, (stage,), tokens, tie_word_embeddings=True, remat="full")
        params = jax.eval_shape(lambda: nn.meta.unbox(model.init(jax.random.key(0), BATCH["tokens"]))["params"])
        batch = {name: jax.ShapeDtypeStruct((1, tokens), x.dtype) for name, x in BATCH.items()}
        return gradient.lower(model, Pieces(16), params, batch).compile().memory_analysis().temp_size_in_bytes

    assert 1.9 < (temporary(12) - temporary(2)) / 10 / kv_bytes < 2.2


def test_a_run_in_pieces_is_the_run_in_whole_rows(tmp_path, capfd):
    """Two steps of a trainer with accumulation, the held-out loss, and the line at the start."""
    write_text(tmp_path)
    trainer = Trainer(
        data=dataset(tmp_path),
        steps=2,
        batch_size=4,
        seq_len=32,
        model=tiny_model(),
        accumulation=2,
        log_every=1,
    )
    whole = trainer.run(str(tmp_path / "whole"))
    cut = dataclasses.replace(trainer, piece_length=12, borders="host").run(str(tmp_path / "cut"))
    told = capfd.readouterr().err
    assert "pieces: every row in 3 of 12 tokens, exact gradients\n" in told
    assert "Trainer.borders 'host' has no effect: CPUs" in told
    for a, b in zip(
        jax.tree.leaves(cut.state["params"]), jax.tree.leaves(whole.state["params"]), strict=True
    ):
        np.testing.assert_allclose(a, b, atol=2e-5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"piece_length": 0}, "piece_length is 0, expected at least 1"),
        ({"piece_length": 8, "carry": "half"}, "carry is 'half', expected one of exact, stop"),
        ({"piece_length": 8, "borders": "disk"}, "borders is 'disk', expected one of device, host"),
        ({"borders": "host"}, "borders is 'host' without pieces: set Trainer.piece_length"),
        ({"carry": "stop"}, "carry is 'stop' without pieces: set Trainer.piece_length"),
        ({"piece_length": 8, "objective": objectives.attention_transfer}, "needs whole rows"),
    ],
)
def test_settings_are_refused(tmp_path, settings, message):
    with pytest.raises(UserError, match=message):
        Trainer(data=dataset(tmp_path), steps=1, batch_size=1, seq_len=32, model=tiny_model(), **settings)


class WithoutCache(nn.Module):
    """A user's mixer that has no state."""

    @nn.compact
    def __call__(self, x, *, positions=None, segment_ids=None, cache=None):
        return nn.Dense(x.shape[-1])(x), cache


class OverContext:
    """A mesh that shares every row; only its sizes matter."""

    shape = {"data": 1, "fsdp": 1, "context": 4, "tensor": 1}


@pytest.mark.parametrize(
    ("mixer", "settings", "message"),
    [
        (PublishedLinearAttention(4, 2, 8, window=4), {"piece_length": 8}, "reads its text in one piece"),
        (WithoutCache(), {"piece_length": 8}, "WithoutCache has no method init_cache.*Trainer.piece_length = None"),
        (Attention(4, 2, 8, over_context="halo"), {}, "over_context 'halo': expected a window"),
        (Attention(6, 3, 8, over_context="heads"), {}, "6 query heads and 3 kv heads do not divide over 4 devices"),
        (Attention(4, 2, 8, over_context="ring", implementation="reference"), {}, "a ring is computed by 'xla'"),
        (Attention(6, 3, 8, over_context="heads"), {"piece_length": 8}, None),  # a cache's keys are gathered
    ],
)
def test_what_does_not_go_with_a_model_is_refused_before_it_has_weights(tmp_path, mixer, settings, message):
    model = small(mixer)
    trainer = Trainer(data=dataset(tmp_path), steps=1, batch_size=1, seq_len=32, model=model, **settings)
    with pytest.raises(UserError, match=message) if message else contextlib.nullcontext():
        check_model(trainer, model, OverContext())


def test_a_run_is_refused_before_it_has_weights(tmp_path, monkeypatch):
    write_text(tmp_path)
    monkeypatch.setattr("lcx.model.init_params", lambda *_, **__: pytest.fail("weights were made"))
    model = Decoder(258, D, small(WithoutCache()).stages, 64)
    with pytest.raises(UserError, match="no method init_cache"):
        Trainer(data=dataset(tmp_path), steps=1, batch_size=1, seq_len=32, model=model, piece_length=8).run(
            str(tmp_path / "run")
        )
