"""Which labels of a genome count, and how much, against a scan of the letters in Python."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lcx import objectives
from lcx.model import init_params, llama

ROWS = [
    "ACGTnnacGG@ACG#T",
    "AC|d__Bacteria;p__X|ACgt|o__Y|TTT",
    "acteria;p__Firmicutes;|ACGTac",  # the row begins inside a tag
    "ACGT|d__Arch",  # and ends inside one
    "GATTACA",
]


def weights_of(text):
    """A regular expression per rule, on the text of one document."""
    weights = np.array([0.1 if letter.islower() else 1.0 for letter in text])
    if re.match(r"[^|]*[^ACGTNacgtn@#|][^|]*\|", text):
        text = "|" + text[1:]  # the part of a tag, opened at the first letter
        weights[0] = 0
    for tag in re.finditer(r"\|[^|]*(\||$)", text):
        weights[tag.start() : tag.end()] = 0
    for sign in re.finditer("[@#]", text):
        weights[sign.start()] = 0
    return weights


@pytest.mark.parametrize("block", [None, 1, 5, 16])  # tokens read at once: tags cross their borders
@pytest.mark.parametrize("packed", [False, True])
def test_nucleotides_weigh_as_published(monkeypatch, packed, block):
    if block is not None:
        monkeypatch.setattr(objectives, "_TAG_BLOCK", block)
    seen = {}
    monkeypatch.setattr(objectives, "_next_token", lambda *args: (seen.update(args[-1]), None))
    texts = ["".join(ROWS)] if packed else ROWS
    width = max(map(len, texts)) + 3
    labels = np.array([list(text.encode().ljust(width, b"\0")) for text in texts], np.int32)
    segments = np.array([[1] * len(text) + [0] * (width - len(text)) for text in texts], np.int32)
    if packed:
        segments[0, : len(texts[0])] = np.repeat(np.arange(1, 6), [len(row) for row in ROWS])
    batch = {
        "tokens": jnp.asarray(np.roll(labels, 1, axis=1)),
        "labels": jnp.asarray(labels),
        "segment_ids": jnp.asarray(segments),
        "loss_weights": jnp.asarray(segments != 0, jnp.float32),
    }
    got = objectives.nucleotides(None, None, batch) or seen
    expected = [weights_of(row) for row in ROWS]
    expected = [np.concatenate(expected)] if packed else expected
    for row, text, weights in zip(got["loss_weights"], texts, expected, strict=True):
        np.testing.assert_allclose(row[: len(text)], weights, err_msg=text)
        assert not np.any(row[len(text) :])
    upper = np.array([list(text.upper().encode().ljust(width, b"\0")) for text in texts])
    np.testing.assert_array_equal(got["labels"], upper)
    np.testing.assert_array_equal(got["tokens"], np.roll(upper, 1, axis=1))


def test_repeats_count_a_tenth_in_the_loss():
    """One lower-case label among four: the mean is (three + 0.1 of one) / 3.1."""
    model = llama(
        vocab_size=512,
        hidden_size=32,
        intermediate_size=32,
        num_layers=1,
        num_heads=2,
        max_position_embeddings=8,
    )
    params = init_params(model, jax.random.key(0))
    ids = jnp.array([list(b"ACgTA")])
    upper = jnp.array([list(b"ACGTA")])
    batch = {"tokens": ids[:, :-1], "labels": ids[:, 1:], "positions": None, "loss_weights": jnp.ones((1, 4))}
    batch["segment_ids"] = jnp.ones((1, 4), jnp.int32)
    total, weight = jax.jit(lambda params: objectives.nucleotides(model, {"params": params}, batch))(params)
    logits = jax.jit(lambda params: model.apply({"params": params}, upper[:, :-1]))(params)
    logp = jax.nn.log_softmax(logits)[0]
    nll = -logp[jnp.arange(4), upper[0, 1:]]
    assert float(weight) == pytest.approx(3.1)
    assert float(total) == pytest.approx(float(nll @ jnp.array([1.0, 0.1, 1.0, 1.0])), rel=1e-5)


class Sown:
    """Stands for a linearized model: what its modules sow in one layer, for three tokens."""

    stages = ()

    def clone(self, **_):
        return self

    def apply(self, *_, **__):
        mixer = {"outputs": (2.0 * jnp.ones((1, 1, 3)),)}
        mlp = {"outputs": (9.0 * jnp.ones((1, 1, 3)),), "balance": (jnp.ones(1),)}
        return None, {"losses": {"stages_0": {"block_0": {"mixer": mixer, "mlp": mlp}}}}


def test_attention_transfer_counts_what_mixers_sow_alone():
    """Whatever an MLP calls its losses: nothing that trains here reaches them."""
    ids = jnp.ones((1, 3), jnp.int32)
    batch = {"residual": jnp.zeros((1, 3, 4)), "positions": ids, "segment_ids": ids}
    total, weight = objectives.attention_transfer(Sown(), {}, batch)
    assert (float(total), float(weight)) == (1000 * 2 * 3, 3)
