"""Packing plans: nothing lost, nothing mixed, every target counted as promised. Oracles are written token by token."""

import numpy as np
import pytest

from lcx.data import packing
from lcx.errors import UserError

PLANS = {
    "concat": packing.plan_concat,
    "first_fit": packing.plan_first_fit,
    "windows": packing.plan_windows,
}


def corpus(lengths):
    """Documents of distinct tokens, so that every token names its document and its place."""
    lengths = np.asarray(lengths)
    starts = np.cumsum(lengths) - lengths
    return np.arange(lengths.sum(), dtype=np.int32) + 7, starts, lengths


def random_lengths(seed, count, *, seq_len):
    """Lengths 1 .. 1000 with every length around the row among them."""
    rng = np.random.default_rng(seed)
    edges = [max(1, k * seq_len + d) for k in (1, 2, 3) for d in (-1, 0, 1, 2)]
    return rng.permutation(np.concatenate([rng.integers(1, 1001, count), [1, 1, 2, *edges]]))


def segments(batch):
    """(tokens, labels, weights) of each segment of a batch."""
    for row in range(len(batch["tokens"])):
        ids = batch["segment_ids"][row]
        for number in range(1, ids.max() + 1):
            where = np.flatnonzero(ids == number)
            assert (np.diff(where) == 1).all()
            yield tuple(batch[key][row, where] for key in ("tokens", "labels", "loss_weights"))


def all_rows(plan, tokens, **options):
    return packing.assemble(plan, tokens, np.arange(plan.num_rows), **options)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("seq_len", [1, 2, 7, 64, 255, 1024])
@pytest.mark.parametrize("kind", ["concat", "first_fit"])
def test_every_token_is_an_input_once_and_a_target_once(kind, seq_len, seed):
    tokens, starts, lengths = corpus(random_lengths(seed, 60, seq_len=seq_len))
    order = np.random.default_rng(seed).permutation(len(lengths))
    batch = all_rows(PLANS[kind](starts[order], lengths[order], seq_len=seq_len), tokens)
    packing.check_batch(batch)

    inputs = batch["tokens"][batch["segment_ids"] > 0]
    assert np.array_equal(np.sort(inputs), tokens)
    targets = batch["labels"][batch["loss_weights"] > 0]
    first_of_documents = tokens[starts]
    assert np.array_equal(np.sort(targets), np.setdiff1d(tokens, first_of_documents))

    # Put the pieces together again: a piece that does not begin a document goes after the piece that ends just before.
    pieces = sorted((segment[0] for segment in segments(batch)), key=lambda piece: piece[0])
    rebuilt, begins = [], set(first_of_documents.tolist())
    for piece in pieces:
        if piece[0] in begins:
            rebuilt.append(piece)
        else:
            rebuilt[-1] = np.concatenate([rebuilt[-1], piece])
    expected = [tokens[a : a + n] for a, n in zip(starts, lengths, strict=True)]
    assert [r.tolist() for r in rebuilt] == [e.tolist() for e in expected]


@pytest.mark.parametrize("kind", PLANS)
def test_labels_follow_inputs_inside_one_document(kind):
    tokens, starts, lengths = corpus(random_lengths(5, 80, seq_len=64))
    owner = np.repeat(np.arange(len(lengths)), lengths)
    batch = all_rows(PLANS[kind](starts, lengths, seq_len=64), tokens)
    for inputs, labels, weights in segments(batch):
        scored = weights > 0
        assert (labels[scored] == inputs[scored] + 1).all()
        assert (owner[labels[scored] - 7] == owner[inputs[scored] - 7]).all()
        assert len(np.unique(owner[inputs - 7])) == 1  # a segment never holds two documents
    assert not batch["loss_weights"][batch["segment_ids"] == 0].any()


def naive_concat(documents, seq_len):
    """The definition of concat packing, one token at a time."""
    stream = [(t, d, i) for d, doc in enumerate(documents) for i, t in enumerate(doc)]
    rows = []
    for begin in range(0, len(stream), seq_len):
        row = stream[begin : begin + seq_len + 1]
        out = {key: [0] * seq_len for key in ("tokens", "labels", "segment_ids", "positions", "loss_weights")}
        segment, position = 0, 0
        for slot, (token, document, _) in enumerate(row[:seq_len]):
            new = slot == 0 or row[slot - 1][1] != document
            segment, position = (segment + 1, 0) if new else (segment, position + 1)
            out["tokens"][slot], out["segment_ids"][slot], out["positions"][slot] = token, segment, position
            if slot + 1 < len(row):
                follows = row[slot + 1][1] == document
                out["loss_weights"][slot] = float(follows)
                # The label past the end of the row is only looked up where it counts.
                out["labels"][slot] = row[slot + 1][0] if follows or slot + 1 < seq_len else 0
        rows.append(out)
    return {key: np.array([row[key] for row in rows]) for key in rows[0]}


@pytest.mark.parametrize("seq_len", [1, 3, 16])
def test_concat_equals_its_definition(seq_len):
    tokens, starts, lengths = corpus([5, 1, 16, 17, 3, 32, 2, 40])
    batch = all_rows(packing.plan_concat(starts, lengths, seq_len=seq_len), tokens)
    expected = naive_concat([tokens[a : a + n] for a, n in zip(starts, lengths, strict=True)], seq_len)
    for key, value in expected.items():
        np.testing.assert_array_equal(batch[key], value, err_msg=key)


def test_first_fit_is_first_fit_and_keeps_documents_whole():
    rng = np.random.default_rng(0)
    items = rng.integers(1, 101, 500).tolist()
    room, expected = [], []
    for item in items:
        place = next((i for i, free in enumerate(room) if free >= item), None)
        if place is None:
            place = len(room)
            room.append(100)
        room[place] -= item
        expected.append(place)
    assert packing.first_fit(items, capacity=100).tolist() == expected

    tokens, starts, lengths = corpus(items)
    pieces = [
        segment[0]
        for segment in segments(all_rows(packing.plan_first_fit(starts, lengths, seq_len=100), tokens))
    ]
    assert sorted(len(piece) for piece in pieces) == sorted(items)  # none was cut


@pytest.mark.parametrize("seq_len", [1, 2, 3, 8, 9])
def test_windows_against_the_definition(seq_len):
    stride = max(1, seq_len // 2)
    for length in range(seq_len, 5 * seq_len + 4):
        tokens, starts, lengths = corpus([length])
        plan = packing.plan_windows(starts, lengths, seq_len=seq_len)
        begins = list(range(0, max(1, length - seq_len), stride))  # every window of T + 1 tokens that fits
        if length > seq_len and begins[-1] + seq_len + 1 < length:
            begins.append(length - seq_len - 1)  # the tail, aligned to the right
        assert plan.piece_start.tolist() == begins, length
        batch = all_rows(plan, tokens)
        targets = batch["labels"][batch["loss_weights"] > 0]
        assert set(targets.tolist()) == set(tokens[1:].tolist()), "a lost tail"
        assert len(set(begins)) == len(begins), "the same window twice"


@pytest.mark.parametrize("extra", [0, 1])
def test_a_document_as_long_as_the_window_gives_one_window(extra):
    """The published range(0, len - T, T // 2) is empty when len == T."""
    tokens, starts, lengths = corpus([64 + extra])
    batch = all_rows(packing.plan_windows(starts, lengths, seq_len=64), tokens)
    assert batch["tokens"].tolist() == [tokens[:64].tolist()]
    assert batch["loss_weights"].sum() == 63 + extra


def test_windows_scored_once_count_each_target_once():
    tokens, starts, lengths = corpus(random_lengths(3, 40, seq_len=50))
    twice = all_rows(packing.plan_windows(starts, lengths, seq_len=50), tokens)
    once = all_rows(packing.plan_windows(starts, lengths, seq_len=50, score_once=True), tokens)
    scored = once["labels"][once["loss_weights"] > 0]
    assert np.array_equal(np.sort(scored), np.setdiff1d(tokens, tokens[starts]))
    assert np.array_equal(twice["tokens"], once["tokens"])
    assert 1.6 < twice["loss_weights"].sum() / once["loss_weights"].sum() < 2.0


@pytest.mark.parametrize("kind", PLANS)
@pytest.mark.parametrize("document_mask", [True, False])
def test_num_targets_counts_the_weights(kind, document_mask):
    tokens, starts, lengths = corpus(random_lengths(4, 70, seq_len=32))
    options = {"joined": True} if kind != "first_fit" and not document_mask else {}
    plan = PLANS[kind](starts, lengths, seq_len=32, **options)
    batch = all_rows(plan, tokens, document_mask=document_mask)
    of_rows = batch["loss_weights"].sum(axis=1)
    np.testing.assert_array_equal(plan.row_targets(document_mask=document_mask), of_rows)
    mask = np.ones(len(tokens), np.int8)
    np.testing.assert_array_equal(plan.row_targets(document_mask=document_mask, loss_mask=mask), of_rows)
    assert plan.num_inputs == (batch["segment_ids"] > 0).sum()


def test_without_document_mask_the_stream_is_one_text():
    """As YaRN trained: every token but the first is a target, positions run through each row."""
    tokens, starts, lengths = corpus([3, 10, 1, 30, 8])
    batch = all_rows(
        packing.plan_concat(starts, lengths, seq_len=10, joined=True), tokens, document_mask=False
    )
    packing.check_batch(batch, document_mask=False)
    assert np.array_equal(batch["labels"][batch["loss_weights"] > 0], tokens[1:])
    real = batch["segment_ids"] > 0
    assert (batch["segment_ids"][real] == 1).all() and real.sum() == 52
    assert np.array_equal(batch["positions"], np.where(real, np.arange(10), 0))


def test_padding_rows_and_repeated_rows():
    tokens, starts, lengths = corpus([5, 9, 30])
    plan = packing.plan_concat(starts, lengths, seq_len=8)
    batch = packing.assemble(plan, tokens, np.array([-1, 2, 0, 2, -1]))
    alone = packing.assemble(plan, tokens, np.array([2]))
    for key, value in batch.items():
        assert not value[[0, 4]].any()
        assert np.array_equal(value[1], alone[key][0]) and np.array_equal(value[3], alone[key][0])
    assert not packing.assemble(plan, tokens, np.array([-1, -1]))["loss_weights"].any()


def test_empty_documents_and_no_documents():
    tokens, starts, lengths = corpus([0, 4, 0, 3, 0])
    for plan in PLANS.values():
        batch = all_rows(plan(starts, lengths, seq_len=4), tokens)
        assert set(batch["tokens"][batch["segment_ids"] > 0].tolist()) >= set(tokens[:-1].tolist())
        assert plan(starts[:0], lengths[:0], seq_len=4).num_rows == 0


def test_segments_equal_documents_run_alone(reference):
    """The layout of the published packing sample: the same positions, and the same number of scored labels."""
    folder = reference / "reference" / "packing"
    published = np.load(folder / "arrays.npz")
    lengths = np.array([50, 100, 106])
    tokens = published["input_ids"][0].astype(np.int32)
    batch = all_rows(packing.plan_concat(np.cumsum(lengths) - lengths, lengths, seq_len=256), tokens)
    np.testing.assert_array_equal(batch["tokens"], published["input_ids"])
    np.testing.assert_array_equal(batch["positions"], published["position_ids"])
    same = published["segment_ids"][:, :, None] == published["segment_ids"][:, None, :]
    ours = batch["segment_ids"][:, :, None] == batch["segment_ids"][:, None, :]
    np.testing.assert_array_equal(ours, same)
    assert batch["loss_weights"].sum() == 253


def spoil(batch, key, row, slot, value):
    spoiled = {k: v.copy() for k, v in batch.items()}
    spoiled[key][row, slot] = value
    return spoiled


def test_check_batch_finds_each_kind_of_damage():
    tokens, starts, lengths = corpus([5, 9, 7])
    batch = all_rows(packing.plan_concat(starts, lengths, seq_len=8), tokens)
    packing.check_batch(batch, vocab_size=100)
    assert (batch["segment_ids"][2] == 0).any()
    damage = [
        ("tokens", 1, 2, 100, "outside"),
        ("tokens", 1, 2, -1, "outside"),
        ("labels", 0, 1, 5, "shifted"),
        ("segment_ids", 0, 2, 0, "padding before"),
        ("segment_ids", 1, 7, 4, "count 1, 2, 3"),
        ("segment_ids", 1, slice(None), 2, "first segment"),
        ("positions", 0, 2, 5, "step by one"),
        ("positions", 0, slice(5, 8), np.arange(3, 6), "segment whose positions"),
        ("positions", 0, slice(0, 5), np.arange(1, 6), "row whose positions"),
        ("loss_weights", 0, 4, 1.0, "another document"),
        ("loss_weights", 2, 7, 1.0, "padding with a loss weight"),
        ("loss_weights", 0, 1, np.nan, "finite"),
        ("loss_weights", 0, 1, -1.0, "negative"),
    ]
    for key, row, slot, value, message in damage:
        with pytest.raises(UserError, match=message):
            packing.check_batch(spoil(batch, key, row, slot, value), vocab_size=100)
    with pytest.raises(UserError, match="int64"):
        packing.check_batch({**batch, "tokens": batch["tokens"].astype(np.int64)})
    with pytest.raises(UserError, match="labels"):
        packing.check_batch({**batch, "labels": batch["labels"][:, :4]})


@pytest.mark.parametrize("seq_len", [64, 256])
def test_padded_rows_are_those_of_the_published_2mamba_trainer(reference, seq_len):
    """One document in a row, cut or padded, with EOS as the label of its last token."""
    with np.load(reference / "reference" / "two_mamba" / "prepare_data.npz") as file:
        whole, saved = (
            {key: file[f"maxlen{n}/{key}"] for key in ("input_ids", "attention_mask", "labels_loss")}
            for n in (256, seq_len)
        )
    documents = [
        np.append(ids[mask], 2) for ids, mask in zip(whole["input_ids"], whole["attention_mask"], strict=True)
    ]
    assert max(map(len, documents)) <= whole["input_ids"].shape[1]  # there, nothing was cut
    lengths = np.array([len(document) for document in documents])
    starts = np.cumsum(lengths) - lengths
    plan = packing.plan_padded(starts, lengths, seq_len=seq_len)
    batch = all_rows(plan, np.concatenate(documents))
    packing.check_batch(batch)
    width = saved["input_ids"].shape[1]
    scored = batch["loss_weights"][:, :width] > 0
    assert np.array_equal(scored, saved["labels_loss"] != -100)
    assert np.array_equal(batch["labels"][:, :width][scored], saved["labels_loss"][scored])
    real = saved["attention_mask"]
    assert np.array_equal(batch["tokens"][:, :width][real], saved["input_ids"][real])
    assert (batch["segment_ids"] <= 1).all() and not batch["loss_weights"][:, width:].any()
