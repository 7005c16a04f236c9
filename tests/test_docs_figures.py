"""The speeds in README.md and docs/ are those of benchmarks/results, and of machines with nothing else running."""

import json
import re
import sys

import pytest
from doc_pages import ROOT

sys.path.insert(0, str(ROOT / "scripts"))
import docs_figures

SPEED = re.compile(r"\d[\d,.]*\s?(tokens/s|ms\b|GFLOP/s|GB/s)|\d\.\d+x|\btimes as fast")


@pytest.mark.parametrize("path", docs_figures.pages(), ids=lambda path: path.name)
def test_pages_say_what_the_files_say(path):
    text = path.read_text()
    assert docs_figures.page(text) == text, "run: python scripts/docs_figures.py"
    prose = re.sub(r"^```.*?^```$", "", docs_figures.MARK.sub("", text), flags=re.DOTALL | re.MULTILINE)
    said = [line for line in prose.splitlines() if SPEED.search(line)]
    assert not said, "speeds outside of the marks of scripts/docs_figures.py, which nothing keeps true"


def test_every_figure_is_on_a_page():
    marks = {m[2] for path in docs_figures.pages() for m in docs_figures.MARK.finditer(path.read_text())}
    assert marks == set(docs_figures.FIGURES)


@pytest.mark.parametrize(
    "records", [[], [True, False], [None], ["yes"]], ids=["none", "one", "unknown", "text"]
)
def test_a_busy_machine_is_not_quoted(tmp_path, records):
    """A file without a record, or with one record of a busy machine in it, stands for nothing."""
    name = "decoding_line"
    row = {"length": 9, "tokens_per_second": {"linear": 77.0}, "cache_bytes": {"linear": 1, "softmax": 1}}
    result = {"decoding": [row], "parts": [{"quiet": value} for value in records]}
    path = tmp_path / docs_figures.FIGURES[name].file
    path.write_text(json.dumps(result))
    assert "77" not in docs_figures.text(name, tmp_path) and "not measured" in docs_figures.text(
        name, tmp_path
    )
    path.write_text(
        json.dumps(result | {"parts": [{"quiet": True, "watch": {"busiest_others": {"quiet": 0.1}}}]})
    )
    assert "linear 77" in docs_figures.text(name, tmp_path)
    path.unlink()
    assert "not measured" in docs_figures.text(name, tmp_path)


def test_the_cost_of_evaluations():
    from evaluation_figure import evaluation

    row = {"evaluation": "needle grid", "us_per_token": 130.0, "plain_us_per_token": 100.0}
    row["over_plain"] = {"median": 1.3, "min": 1.2, "max": 1.4}
    made = {"machine": {"cpu": "a CPU", "commit": "abc"}, "created": "2026-01-01", "versions": {}, "threads": {}}
    made["watch"] = {"other_cpu_seconds": 0.1, "seconds": 9.0}
    text = evaluation({**made, "rows": [row], "length": 1024, "passkey_320_trials_s": 21.4})
    assert "| needle grid | 100 | 130 | 1.30 |" in text and "up to 1024 tokens: 21 s" in text


def test_slower_is_told_as_plainly_as_faster():
    assert docs_figures.ratio(1.1) == "1.10x" and docs_figures.ratio(0.9) == "0.90x (slower)"


def test_a_page_is_written_anew_inside_its_marks(monkeypatch, tmp_path):
    monkeypatch.setitem(
        docs_figures.FIGURES, "x", docs_figures.Figure("x.json", lambda r: r["x"], "c", timed=False)
    )
    (tmp_path / "x.json").write_text('{"x": "new"}')
    old = "a <!-- figure: x -->old<!-- /figure --> b\n<!-- figure: x -->\nold\n<!-- /figure -->\nc"
    new = "a <!-- figure: x -->new<!-- /figure --> b\n<!-- figure: x -->\n\nnew\n\n<!-- /figure -->\nc"
    assert docs_figures.page(old, tmp_path) == new == docs_figures.page(new, tmp_path)
