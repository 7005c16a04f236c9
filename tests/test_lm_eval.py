"""The adapter for lm-evaluation-harness against its own hf model on the same folder."""

import json
import sys
import types

import pytest

from lcx import harness
from lcx import lm_eval as verb
from lcx.errors import UserError

pytest.importorskip("lm_eval")
pytest.importorskip("torch")
STORIES = "data/weights/stories260K/hf"


@pytest.fixture(scope="module")
def both(reference):
    """(lcx's model, lm_eval's own) of a really trained Llama."""
    from lm_eval.models.huggingface import HFLM

    folder = str(reference / STORIES)
    return harness.model_class()(checkpoint=folder, max_length=128), HFLM(
        pretrained=folder, max_length=128, batch_size=4, device="cpu", dtype="float32"
    )


def asked(*arguments):
    from lm_eval.api.instance import Instance

    kind = "loglikelihood" if len(arguments[0]) == 2 and isinstance(arguments[0][1], str) else "other"
    return [Instance(request_type=kind, doc={}, arguments=one, idx=i) for i, one in enumerate(arguments)]


def test_log_likelihoods_are_those_of_the_hf_model(both):
    requests = asked(
        ("Once upon a time, there was a little", " girl named Lily."),
        ("Once upon a time, there was a little", " zebra"),
        ("One day, Tom ", "went to the park"),
        ("", "The sun was bright."),
        ("The dog ran. " * 60, "The dog ran."),  # longer than max_length
    )
    ours, theirs = (model.loglikelihood(requests, disable_tqdm=True) for model in both)
    for (value, greedy), (expected, expected_greedy) in zip(ours, theirs, strict=True):
        assert value == pytest.approx(expected, abs=1e-4, rel=1e-5) and greedy == expected_greedy


def test_rolling_and_generation_are_those_of_the_hf_model(both):
    texts = asked(("Once upon a time there was a cat. It was big. " * 12,), ("The end.",))
    ours, theirs = (model.loglikelihood_rolling(texts, disable_tqdm=True) for model in both)
    assert ours == pytest.approx(theirs, rel=1e-5)
    settings = {"until": ["."], "max_gen_toks": 24, "do_sample": False}
    prompts = asked(("Once upon a time,", settings), ("Lily and Tom went to the", settings))
    ours, theirs = (model.generate_until(prompts, disable_tqdm=True) for model in both)
    assert ours == theirs and "." not in "".join(ours)


def test_a_local_task_by_the_command(reference, tmp_path, capsys, monkeypatch):
    rows = [
        {"text": "Once upon a time, there was a little", "good": " girl", "bad": " xylophone"},
        {"text": "The sun was", "good": " bright", "bad": " qqq"},
    ]
    (tmp_path / "rows.json").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "local.yaml").write_text(
        f"""
task: local_choice
dataset_path: json
dataset_kwargs: {{data_files: {{test: "{tmp_path}/rows.json"}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{text}}}}"
doc_to_choice: ["{{{{good}}}}", "{{{{bad}}}}"]
doc_to_target: 0
metric_list: [{{metric: acc}}]
"""
    )
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    arguments = [
        "--model",
        "lcx",
        "--model_args",
        f"checkpoint={reference / STORIES}",
        "--tasks",
        "local_choice",
    ]
    assert verb.main([*arguments, "--include_path", str(tmp_path)]) == 0
    assert "local_choice" in capsys.readouterr().out


def test_what_cannot_be(both, monkeypatch):
    from lm_eval.api import registry

    with pytest.raises(UserError, match="set --model_args checkpoint=PATH"):
        harness.model_class()()
    with pytest.raises(UserError, match="leaves no room"):
        both[0].generate_until([types.SimpleNamespace(args=("a", {"max_gen_toks": 128}))])
    with pytest.raises(UserError, match="longer than max_length"):
        both[0]._loglikelihood_tokens([(None, [1], [5] * 200)])
    with pytest.raises(UserError, match="--model_args has 'checkpont', which is unknown; did you mean checkpoint?"):
        harness.model_class()(checkpont="x")
    monkeypatch.setattr("lm_eval.__main__.cli_evaluate", lambda: registry.get_model("nope"))
    monkeypatch.setattr(sys, "argv", [])
    with pytest.raises(UserError, match="lm_eval refuses this: Attempted to load model 'nope'"):
        harness.run([])
    monkeypatch.setattr("lm_eval.__main__.cli_evaluate", lambda: int("a bug"))
    with pytest.raises(ValueError, match="a bug") as bug:
        harness.run([])
    assert not isinstance(bug.value, UserError)
    monkeypatch.setattr(harness, "run", lambda argv: (_ for _ in ()).throw(UserError("no")))
    assert verb.main([]) == 2
