"""Rows that continue those of the batch before: which tokens they hold, losses of long rows, gradients, resuming."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
from test_mixers import MIXERS, D
from test_pieces import assert_equal, noisy
from tiny_runs import dataset, losses, saved, tiny_model, write_text

from lcx import objectives
from lcx.data import packing
from lcx.data.streams import streams_of
from lcx.errors import UserError
from lcx.model import Block, Decoder, Mlp, Stage
from lcx.pieces import Pieces
from lcx.rope import Rope
from lcx.trainer import Trainer
from lcx.training import row_state

LENGTHS = (3, 30, 1, 8, 8, 41, 5, 16, 2)  # within a row, over several, ending at the end of one
T = 8


def epoch_of(streams, plan, tokens, epoch: int) -> dict[str, np.ndarray]:
    """{field: [streams, tokens of a stream]} of one epoch, read batch by batch."""
    parts = []
    for step in range(streams.length):
        begin = (epoch * streams.length + step) * streams.count
        found = np.array([streams.row(begin + i, 0) for i in range(streams.count)])
        of, rows = np.divmod(found, streams.num_rows)
        batch = streams.continued(packing.assemble(plan, tokens, rows), rows, of)
        packing.check_batch(batch, streams=True)
        parts.append(batch)
    return {name: np.concatenate([part[name] for part in parts], axis=1) for name in parts[0]}


@pytest.mark.parametrize("count", [1, 2, 5])
def test_streams_hold_the_documents_end_to_end(count):
    lengths = np.array(LENGTHS)
    tokens, starts = np.arange(1000, 1000 + lengths.sum()), np.cumsum(lengths) - lengths
    plan = packing.plan_concat(starts, lengths, seq_len=T)
    streams = streams_of(plan, count)
    document = np.repeat(np.arange(len(lengths)), lengths) + 1
    place = np.concatenate([np.arange(n) for n in lengths])
    begins = np.arange(count) * streams.length * T
    shown = [np.arange(begin, min(begin + streams.length * T, lengths.sum())) for begin in begins]
    for epoch in (0, 1):
        found = epoch_of(streams, plan, tokens, epoch)
        for i, where in enumerate(shown):
            real = slice(0, len(where))
            np.testing.assert_array_equal(found["tokens"][i, real], tokens[where])
            np.testing.assert_array_equal(found["positions"][i, real], place[where])
            np.testing.assert_array_equal(found["segment_ids"][i, real], document[where] + epoch * len(lengths))
            np.testing.assert_array_equal(found["segment_ids"][i, len(where) :], 0)
            ends = place[where] + 1 == lengths[document[where] - 1]
            np.testing.assert_array_equal(found["loss_weights"][i, real], np.where(ends, 0, 1))
    assert streams.rows_left_out == plan.num_rows - count * streams.length < count


NAMES = ("mamba2", "attention_window", "hyena_li")  # kinds of state, histories of convolutions with them


@functools.partial(jax.jit, static_argnums=(0, 1))
def summed(model, how, params, state, batch):
    """(the loss, the state after)"""
    given = objectives.next_token(model, {"params": params}, batch, how, state)
    (loss, _), after = given if state is not None else (given, None)
    return loss, after


@functools.partial(jax.jit, static_argnums=(0, 1))
def sums_and_gradient(model, how, params, state, batch):
    (loss, after), gradient = jax.value_and_grad(
        lambda params: summed.__wrapped__(model, how, params, state, batch), has_aux=True
    )(params)
    return (loss, gradient), after


def test_rows_one_after_the_other_are_one_long_row():
    """Losses and gradients: those of the long row whose gradients stop where rows end."""
    model = Decoder(50, D, (Stage(tuple(Block(MIXERS[name], Mlp(24)) for name in NAMES)),), 64)
    rng, (B, rows, L) = np.random.default_rng(0), (2, 3, 16)
    lengths = np.array([20, 5, 40, 31])  # a document over two rows, one within a row, one over four
    plan = packing.plan_concat(np.cumsum(lengths) - lengths, lengths, seq_len=L)
    streams = streams_of(plan, B)
    found = [np.array([streams.row(step * B + i, 0) for i in range(B)]) for step in range(rows)]
    tokens = rng.integers(0, 50, lengths.sum())
    batches = [streams.continued(packing.assemble(plan, tokens, at), at, np.zeros(B, int)) for at in found]
    params = noisy(model)
    long = {name: np.concatenate([batch[name] for batch in batches], axis=1) for name in batches[0]}
    want, _ = sums_and_gradient(model, Pieces(L, carry="stop"), params, None, long)
    fresh = model.init_cache(B, row_state._LONG)
    state, loss, gradient = fresh, 0.0, jax.tree.map(np.zeros_like, params)
    for batch in batches:
        (one, of_row), state = sums_and_gradient(model, Pieces(8), params, state, batch)
        loss, gradient = loss + one, jax.tree.map(np.add, gradient, of_row)
    assert_equal((loss, gradient), want)
    state, losses = fresh, []
    for batch in batches:  # in one piece: what differs is the forward pass
        one, state = summed(model, None, params, state, batch)
        losses.append(one)
    np.testing.assert_allclose(sum(losses), want[0], rtol=1e-6)
    alone = sum(summed(model, None, params, fresh, batch)[0] for batch in batches)
    assert abs(alone - want[0]) > 1e-2, "the state matters"


@pytest.fixture(scope="module")
def trainer(tmp_path_factory) -> Trainer:
    folder = tmp_path_factory.mktemp("stateful")
    write_text(folder)
    blocks = (Block(MIXERS["mamba2"], Mlp(24)),)
    return Trainer(
        data=dataset(folder),
        steps=6,
        batch_size=4,
        seq_len=32,
        model=Decoder(258, D, (Stage(blocks, 2),), 32),
        stateful=True,
        piece_length=16,
        log_every=1,
        checkpoint_every=3,
    )


def test_a_run_resumes_bit_for_bit(trainer, tmp_path, capfd):
    whole, halves = str(tmp_path / "whole"), str(tmp_path / "halves")
    trainer.run(whole)
    assert "streams: every row of a batch continues that of the batch before, " in capfd.readouterr().err
    dataclasses.replace(trainer, stop_at=3).run(halves)
    trainer.run(halves)
    assert losses(halves) == losses(whole)
    (_, arrays, _), (_, again, _) = saved(whole), saved(halves)
    left = [x for name, x in arrays.items() if "row_state" in name and "ssm" in name and x.dtype == np.float32]
    assert any(np.abs(x).max() > 0 for x in left), list(arrays)
    for name, value in arrays.items():
        np.testing.assert_array_equal(again[name], value, err_msg=name)
    for change, message in [
        ({"batch_size": 8}, "started with Trainer.batch_size = 4, found 8"),
        ({"stateful": False}, "started with Trainer.stateful = True, found the default"),
    ]:
        with pytest.raises(UserError, match=message):
            dataclasses.replace(trainer, **change).run(halves)


def test_what_cannot_continue_is_refused(trainer, tmp_path):
    rope = Rope(rope_type="dynamic", factor=2.0, original_max_position_embeddings=16)
    dynamic = {"rope": rope, "layer_windows": (8, 8)}
    for settings, message in [
        ({"accumulation": 2}, "Trainer.accumulation is 2 with Trainer.stateful, expected 1"),
        ({"piece_length": 12}, "seq_len 32 is not a multiple of Trainer.piece_length 12"),
        ({"objective": objectives.attention_transfer, "piece_length": None}, "has no argument `state`"),
        ({"model": tiny_model()}, "keeps the keys and values of all earlier tokens: give it a window"),
        ({"model": tiny_model(**dynamic)}, "rope_type 'dynamic' in Attention, which rotates by angles that depend on"),
        ({"data": dataclasses.replace(trainer.data, packing="first_fit")}, "with Dataset.packing='first_fit'"),
        ({"data": dataclasses.replace(trainer.data, document_mask=False)}, "with Dataset.document_mask=False"),
    ]:
        with pytest.raises(UserError, match=message):
            dataclasses.replace(trainer, **settings).run(str(tmp_path / "run"))
