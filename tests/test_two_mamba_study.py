"""The comparison of the 2Mamba paper's mixers: the rows of recall, and what is told of the runs that are there."""

import json
import pathlib

import numpy as np
import pytest

ROOT = pathlib.Path(__file__).parent.parent


@pytest.fixture
def study(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import two_mamba_study

    return two_mamba_study


def test_the_assistant_says_the_values_and_nothing_else(study, tmp_path, monkeypatch):
    monkeypatch.setattr(study, "ROWS", 20)
    study.recall(tmp_path)
    rows = [json.loads(line)["messages"] for line in (tmp_path / "recall.jsonl").read_text().splitlines()]
    assert len(rows) == 20 * len(study.PAIRS)
    for turns in rows:
        text = "".join(turn["content"] for turn in turns)
        said = [turn["content"] for turn in turns if turn["role"] == "assistant"]
        pairs = dict(zip(text[0 : 2 * len(said) : 2], text[1 : 2 * len(said) : 2], strict=True))
        asked = [turn["content"][-1] for turn in turns if turn["role"] == "user"][: len(said)]
        assert len(text) == study.LENGTH and len(pairs) == len(said) in study.PAIRS
        assert said == [pairs[key] for key in asked]


def test_only_runs_that_are_done_count(study, tmp_path):
    for seed, loss in (("0", 2.0), ("1", 2.2), ("2", 9.0)):
        folder = tmp_path / "text" / f"softmax_{seed}"
        folder.mkdir(parents=True)
        lines = [{"step": 10, "tokens": 64.0, "loss": 3.0}, {"step": 10, "eval_loss": 3.0}]
        lines += [{"step": 20, "eval_loss": loss}]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        if seed != "2":
            (folder / "done").touch()
    result = study.table(tmp_path, ["0", "1", "2"])
    softmax = result["models"]["softmax"]
    assert softmax["runs"] == {"0": [(640, 3.0), (1280, 2.0)], "1": [(640, 3.0), (1280, 2.2)]}
    np.testing.assert_allclose([softmax["loss_mean"], softmax["loss_sd"]], [2.1, 0.1 * 2**0.5])
    assert result["models"]["linear"]["loss_mean"] is None
    assert "2.100 +- 0.141" in study.told(result)
    study.pictures(tmp_path, result)
    assert all((tmp_path / f"{name}.svg").stat().st_size for name in ("loss_by_tokens", "throughput"))
