"""Rows that begin alike: what they share is read once, and the answers are those of whole rows."""

import jax
import numpy as np
import pytest
from tiny_runs import tiny_model

from lcx.data import ByteTokenizer
from lcx.evals.needle_grid import NeedleGrid
from lcx.evals.support import beginnings, forced
from lcx.llama import llama
from lcx.model import init_params
from lcx.rope import Rope


def tree_of_rows():
    """Rows that leave a common text at different places, by twos and threes, one row alone, and two that are equal."""
    rng = np.random.default_rng(0)
    text = rng.integers(1, 200, 250)
    rows, places = [], []
    for at, count in ((0, 1), (40, 3), (90, 2), (91, 2), (200, 3), (230, 2)):
        for _ in range(count):
            end = int(rng.integers(235, 256))
            rows.append([*text[:at].tolist(), *rng.integers(1, 200, end - at).tolist()])
            places.append([end - 3, end - 1])
    order = rng.permutation(len(rows) + 1)
    rows, places = [*rows, rows[3]], [*places, places[3]]
    return [rows[i] for i in order], [places[i] for i in order]


@pytest.fixture
def counted(monkeypatch):
    """The tokens that each program of a piece has read."""
    read = {"one": 0, "all": 0}
    one, several = beginnings._piece, beginnings._piece_of_all

    def piece(model, params, state, tokens, segment_ids):
        read["one"] += tokens.size
        return one(model, params, state, tokens, segment_ids)

    def piece_of_all(model, params, state, x, tokens, segment_ids, before):
        read["all"] += tokens.size
        return several(model, params, state, x, tokens, segment_ids, before)

    monkeypatch.setattr(beginnings, "_piece", piece)
    monkeypatch.setattr(beginnings, "_piece_of_all", piece_of_all)
    return read


def test_answers_are_those_of_whole_rows(monkeypatch, counted):
    sizes = {"vocab_size": 200, "hidden_size": 32, "intermediate_size": 48, "num_layers": 2, "num_heads": 2}
    model = llama(**sizes, max_position_embeddings=256, layer_windows=(40, None))
    params = jax.tree.map(lambda x: 3 * x, init_params(model, jax.random.key(0)))
    rows, places = tree_of_rows()
    whole = forced.log_likelihoods(model, params, rows, places, tokens_per_batch=1024)
    ids = forced.likeliest(model, params, rows, places, tokens_per_batch=1024)
    assert counted == {"one": 0, "all": 0}, "a small model does not save what three programs cost"
    monkeypatch.setattr(beginnings, "WORTH", 1)
    found = forced.log_likelihoods(model, params, rows, places, tokens_per_batch=1024)
    assert counted["one"] > 0 and [right for _, right in found] == [right for _, right in whole]
    np.testing.assert_allclose([p for p, _ in found], [p for p, _ in whole], rtol=2e-5)
    assert max(-p for p, _ in whole) > 5, "another row's answers would show"
    for a, b in zip(ids, forced.likeliest(model, params, rows, places, tokens_per_batch=1024), strict=True):
        assert a.tolist() == b.tolist()


def test_the_plan_shares_all_that_can_be_shared():
    rows, places = tree_of_rows()
    found = beginnings.plan(rows, places, 256, 1)
    step = 32
    assert found.step == step and sorted(i for group in found.groups for i in group.rows) == list(range(14))
    for group in found.groups:
        texts = [tuple(rows[i][: group.shared * step]) for i in group.rows]
        assert len(set(texts)) == 1 and group.shared * step < min(places[i][0] for i in group.rows)
    # Every beginning that several rows have is read once, and all else once for each row.
    beginnings_of = {tuple(rows[i][: k * step]) for g in found.groups for i in g.rows for k in range(1, g.shared + 1)}
    rest = sum(8 - group.shared for group in found.groups for _ in group.rows)
    assert found.saved == (8 * 14 - rest - len(beginnings_of)) * step > 0
    assert {group.shared for group in found.groups} >= {0, 1, 2, 6}
    alone = beginnings.plan([[1, 2, 3]], [[2]], 128, 9)
    assert alone.saved == 0 and alone.groups == [([0], 0)]


def test_a_grid_reads_its_haystack_once(monkeypatch, counted):
    """A depth is read from where its needle is; the cells do not change."""
    model = tiny_model(max_position_embeddings=1500)
    params = init_params(model, jax.random.key(1))
    depths = (0.0, 0.25, 0.5, 0.75, 1.0)
    grid = NeedleGrid(lengths=(1500,), depths=depths, trials=3, tokens_per_batch=6000)
    before = grid(model, params, ByteTokenizer())["cells"]
    monkeypatch.setattr(beginnings, "WORTH", 1)
    after = grid(model, params, ByteTokenizer())["cells"]
    assert after == before
    assert 0.5 < (counted["one"] + counted["all"]) / (15 * 1500) < 0.8, counted


def test_a_rotation_that_depends_on_the_length_is_not_shared(monkeypatch):
    monkeypatch.setattr(beginnings, "WORTH", 0)
    rows, places = tree_of_rows()
    for kind, worth in (("yarn", True), ("dynamic", False)):
        model = llama(
            vocab_size=200, hidden_size=32, intermediate_size=48, num_layers=1, num_heads=2,
            max_position_embeddings=256, rope=Rope(rope_type=kind, factor=4.0, original_max_position_embeddings=64),
        )  # fmt: skip
        found = beginnings.worthwhile(model, {}, rows, places, 256, 1)
        assert (found == beginnings.plan(rows, places, 256, 1)) if worth else found is None


def test_states_that_need_more_memory_than_the_weights_are_not_kept(monkeypatch):
    monkeypatch.setattr(beginnings, "WORTH", 0)
    rows, places = tree_of_rows()
    given = tiny_model(max_position_embeddings=256), {}, rows, places, 256, 4
    assert beginnings.worthwhile(*given) is not None
    # 8 pieces and the empty state, and 3 rows before and after a piece; keys and values of 2 layers, 2 heads of 8.
    monkeypatch.setattr(beginnings, "STATES", 15 * 256 * 2 * 2 * 2 * 8 * 4)
    assert beginnings.worthwhile(*given) is None, "segment ids take some more"
    monkeypatch.setattr(beginnings, "STATES", 15 * 256 * (2 * 2 * 2 * 8 * 4 + 2 * 4) + 15 * 100)
    assert beginnings.worthwhile(*given) is not None
