"""The needle test of the 2Mamba paper: which prompts, in which order, and what counts as found."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from test_retrieval import induction

from lcx.data import ByteTokenizer
from lcx.errors import UserError
from lcx.evals.published_needle import COLUMNS, PublishedNeedle
from lcx.evals.support import grids

BYTES = ByteTokenizer()


def data_set(folder, count=60):
    """Files like those of the data set, with five of its lengths, one other, and one that is left out."""
    lengths = [1024, 2048, 32768, 4096, 8192, 16384, 5000]
    rows = [(f"prompt {i} ", 1 + i, lengths[i % 7], i % 21 * 5) for i in range(count)]
    for name, part in (("0.parquet", rows[: count // 2]), ("1.parquet", rows[count // 2 :])):
        columns = {key: [row[j] for row in part] for j, key in enumerate(COLUMNS)}
        pa.parquet.write_table(pa.table(columns | {"id": list(range(len(part)))}), folder / name)
    return rows


def test_the_prompts_of_the_data_set_are_those_of_the_published_script(tmp_path):
    rows = data_set(tmp_path)
    np.random.seed(420)
    order = np.arange(len(rows))
    np.random.shuffle(order)
    expected = [rows[i] for i in order if rows[i][2] < 32768][:40]
    assert 5000 in {row[2] for row in expected}
    found = PublishedNeedle(file=str(tmp_path), samples=40).rows()
    assert [(row.prompt, row.answer, row.length, row.depth) for row in found] == [
        (prompt, str(answer), length, depth / 100) for prompt, answer, length, depth in expected
    ]


@pytest.mark.parametrize(
    ("new", "found"),
    [
        ("1234. Reme", True),
        ("1234 and m", True),
        ("12345 and ", False),
        (" 1234 and ", False),  # the first word is empty
        ("is 1234 an", False),
        ("1234", False),  # the text ended early: the window begins with words of the prompt
    ],
)
def test_the_first_word_of_the_last_tokens_must_be_the_key(new, found):
    prompt = BYTES.encode("... What is the pass key? The pass key is ").tolist()
    assert PublishedNeedle().right(BYTES, prompt, BYTES.encode(new).tolist(), "1234") is found


def hidden(key, haystack, percent):
    """The text with its needle, as the published generator walks back to a full stop."""
    needle = f"The pass key is {key}. Remember it. {key} is the pass key. "
    if percent == 100:
        return haystack[: len(haystack) - len(needle)] + needle
    at = int(len(haystack) * percent / 100)
    while at > 0 and haystack[at] != ".":
        at -= 1
    return haystack[:at] + needle + haystack[at:]


@pytest.mark.parametrize("lengths", [None, (1000, 4097)])
def test_prompts_of_its_own_have_the_published_form(lengths):
    rows = PublishedNeedle(samples=210, lengths=lengths).rows()
    assert len(rows) == 210 and len({(row.length, row.depth) for row in rows}) == 21 * len(lengths or range(5))
    noise = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again. "
    for row in rows:
        assert 1 <= int(row.answer) < 10_000
        text = hidden(row.answer, (noise * 200)[: row.length], round(100 * row.depth))
        start, end = "the important information there. ", " \n\nWhat is the pass key? The pass key is "
        assert row.prompt.endswith(start + text + end), (row.length, row.depth)


def test_a_model_that_remembers_finds_them_and_one_that_forgets_does_not():
    near, far = {}, {}
    for found, window in ((far, None), (near, 300)):
        model, params = induction(258, window=window)
        result = PublishedNeedle(lengths=(128, 1024), samples=42)(model, params, BYTES)
        found |= result["table"]
        assert "a haystack of our own" in result["definition"] and len(result["notes"]) == 1
    assert far == {"128": 100.0, "1024": 100.0}
    assert near["128"] == 100.0 and near["1024"] < 30


def test_the_heat_map_is_that_of_the_results():
    """Cells in any order, and of other lengths in each model: a row for each model, columns by length."""
    from matplotlib.figure import Figure

    def of(*cells):
        return {"cells": [grids.cell(scores, length=length, depth=depth) for length, depth, scores in cells]}

    first = of((8192, 0.5, [0, 1]), (1024, 0.5, [1, 1, 1]), (1024, 0.0, [0]))
    axes = Figure().subplots()
    PublishedNeedle().plot(axes, {"one": first, "other": of((4096, 1.0, [0, 0, 1, 0]))})
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["1024", "4096", "8K"]
    assert [tick.get_text() for tick in axes.get_yticklabels()] == ["one", "other"]
    np.testing.assert_array_equal(axes.images[0].get_array().filled(-1), [[0.75, -1, 0.5], [-1, 0.25, -1]])
    assert [text.get_text() for text in axes.texts] == ["75", "50", "25"]
    axes = Figure().subplots()
    PublishedNeedle().plot(axes, {"one": first})
    np.testing.assert_array_equal(axes.images[0].get_array().filled(-1), [[0, -1], [1, 0.5]])  # by depth, then length


@pytest.mark.parametrize("answer", ["", "The grass is green", "What is the pass key?"])
def test_models_that_do_not_know_find_nothing(monkeypatch, answer):
    def generate(model, params, tokens, *, max_new_tokens, **_):
        new = list(answer.encode())[:max_new_tokens]
        return np.array([new + [257] * (max_new_tokens - len(new))] * len(tokens), np.int32)

    monkeypatch.setattr("lcx.evals.support.answers.sampler.generate", generate)
    model, params = induction(258)
    assert PublishedNeedle(lengths=(128, 1024), samples=10)(model, params, BYTES)["table"] == {"128": 0, "1024": 0}


def test_a_file_that_is_not_the_data_set_is_refused(tmp_path):
    with pytest.raises(UserError, match="has no parquet files"):
        PublishedNeedle(file=str(tmp_path)).rows()
    pa.parquet.write_table(pa.table({"text": ["a"]}), tmp_path / "a.parquet")
    with pytest.raises(UserError, match="not the parquet file of the data set"):
        PublishedNeedle(file=str(tmp_path / "a.parquet")).rows()
    (tmp_path / "a.parquet").unlink()
    data_set(tmp_path)
    with pytest.raises(UserError, match="has context_length 1024, 2048, 4096"):
        PublishedNeedle(file=str(tmp_path), lengths=(1000,)).rows()
    pa.parquet.write_table(pa.table(dict.fromkeys(COLUMNS, ["32768"])), tmp_path / "0.parquet")
    with pytest.raises(UserError, match="has context_length 32768, expected some below 32768"):
        PublishedNeedle(file=str(tmp_path / "0.parquet")).rows()
    with pytest.raises(UserError, match="PublishedNeedle.lengths is"):
        PublishedNeedle(lengths=())
