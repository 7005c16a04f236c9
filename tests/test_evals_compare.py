"""Several checkpoints in one command: side by side, resumed, in one report, with differences and costs."""

import functools
import json

import jax
import numpy as np
import pytest
from tiny_runs import tiny_model

import lcx
from lcx import evaluate, evaluator
from lcx.convert.core import model_source
from lcx.data import ByteTokenizer, Dataset
from lcx.data.tokenizers import save_tokenizer
from lcx.errors import UserError
from lcx.evals.cost import Cost
from lcx.evals.key_value import KeyValue
from lcx.evals.long_ppl import LongPPL
from lcx.evals.needle_grid import NeedleGrid
from lcx.evals.passkey import Passkey
from lcx.evals.perplexity import Perplexity
from lcx.evals.recall import Recall
from lcx.evals.ruler import Ruler
from lcx.evals.sequence_likelihood import SequenceLikelihood
from lcx.evals.support import journal, scoring, texts
from lcx.evals.support import settings as settings_of
from lcx.evals.support.intervals import paired_difference
from lcx.evals.variant_effects import VariantEffects
from lcx.model import init_params


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Folders of two models that differ in their weights, and a text."""
    folder = tmp_path_factory.mktemp("models")
    model = tiny_model(max_position_embeddings=64)
    for seed, name in enumerate(("first", "second")):
        lcx.save(str(folder / name), model, init_params(model, jax.random.key(seed)), format="hf")
        save_tokenizer(ByteTokenizer(), folder / name)
    (folder / "a.txt").write_text("Once upon a time there was a small model. " * 20)
    (folder / "b.txt").write_text("It read and read, and it never forgot a word. " * 20)
    return folder


def settings(models, out):
    evals = (Perplexity(max_tokens=1200, windows=(32, 64), stride=16), Recall(lengths=(32,), pairs=4, rows=6))
    return {
        "checkpoint": (str(models / "first"), str(models / "second")),
        "output": str(out),
        "evals": evals,
        "dataset": Dataset(str(models / "*.txt"), eval_fraction=1.0),
    }


def test_several_checkpoints_side_by_side(models, tmp_path, capsys, monkeypatch):
    results = evaluator.evaluate(**settings(models, tmp_path / "out"))
    assert list(results["models"]) == ["first", "second"]
    page = (tmp_path / "out" / "report.html").read_text()
    assert "2 models are compared by recall and perplexity: “first” recalls" in page
    assert "Differences" in page and "nats per byte" in page
    assert sorted(path.parent.name for path in (tmp_path / "out").glob("*/results.json")) == [
        "1_first",
        "2_second",
    ]
    capsys.readouterr()
    monkeypatch.setattr(scoring, "_scored", None)  # nothing is computed again
    again = evaluator.evaluate(**settings(models, tmp_path / "out"))
    err = capsys.readouterr().err
    assert err.count("recall: 6 answers were kept") == 2 and "perplexity: " in err
    for name, run in results["models"].items():
        for task in ("perplexity", "recall"):
            kept, new = (dict(one["evaluations"][task]) for one in (again["models"][name], run))
            assert kept.pop("seconds") >= 0 and new.pop("seconds") > 0 and kept == new


def test_one_checkpoint_that_fails_costs_no_other(models, tmp_path):
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "config.json").write_text("{")
    (tmp_path / "damaged" / "model.safetensors").touch()
    given = settings(models, tmp_path / "out") | {
        "checkpoint": (str(tmp_path / "damaged"), str(models / "second"))
    }
    with pytest.raises(UserError, match="1 of 2 checkpoints failed: .*damaged"):
        evaluator.evaluate(**given)
    assert "second" in (tmp_path / "out" / "report.html").read_text()


def test_a_checkpoint_that_is_missing_or_given_twice_is_refused_before_the_others(models, tmp_path):
    first = str(models / "first")
    for other, found in (("/nowhere", "no checkpoint at /nowhere"), (f"{models}/second/../first/", "given twice")):
        with pytest.raises(UserError, match=found):
            evaluator.evaluate(**settings(models, tmp_path / "out") | {"checkpoint": (first, other)})
    run = tmp_path / "run"
    lcx.save(run, *lcx.load(first), format="lcx")
    (step,) = (run / "checkpoints").iterdir()
    for other in (step, run / "checkpoints"):
        with pytest.raises(UserError, match=f"^{run} and {other} are the same weights, given twice"):
            evaluator.evaluate(**settings(models, tmp_path / "out") | {"checkpoint": (str(run), str(other))})
    assert not (tmp_path / "out").exists()


def test_a_text_is_a_path(models, tmp_path):
    """--dataset is all of a text, read with the tokenizer of the checkpoint, and messages name it."""
    given = settings(models, tmp_path / "out") | {"checkpoint": str(models / "first")}
    by_path = evaluator.evaluate(**given | {"dataset": str(models / "*.txt")})
    assert by_path["evaluations"]["perplexity"]["windows"][0]["tokens"] == 1198  # of 1200 in two documents
    assert f"the first 1200 tokens of {models}/*.txt;" in by_path["evaluations"]["perplexity"]["definition"]
    (models / "broken").write_bytes(b"\xff\xff")
    for path, found in (("/nowhere", "'/nowhere' matches no file; set --dataset$"), (f"{models}/broken", "--dataset")):
        with pytest.raises(UserError, match=found):
            evaluator.evaluate(**given | {"dataset": path})
    (models / "first" / "lcx_tokenizer.json").rename(tmp_path / "kept")
    with pytest.raises(UserError, match="--dataset is read with the tokenizer of the checkpoint: .*no tokenizer"):
        evaluator.evaluate(**given | {"dataset": str(models / "*.txt")})
    (tmp_path / "kept").rename(models / "first" / "lcx_tokenizer.json")


@pytest.mark.parametrize(
    ("evaluation", "says"),
    [
        (Passkey(context_length=100), "Passkey: a context of 100 tokens is too short, expected at least"),
        (NeedleGrid(lengths=(2000, 20)), "NeedleGrid: 20 tokens are too short for the question"),
        (KeyValue(lengths=(2000, 20)), "KeyValue: 20 tokens are too short for two pairs"),
        (Ruler(lengths=(2000, 64), tasks=("vt",)), "RULER vt: 63 tokens are too short for it"),
        (Recall(lengths=(64, 8), pairs=4), "Recall: rows of 8 tokens are too short for 4 pairs"),
        (LongPPL(short=64, stride=8), "LongPPL.short is 64, expected less than the length of 64"),
        (LongPPL(length=5000, short=2000), "LongPPL: no document of .* has more than 2000 tokens"),
        (Perplexity(split="train"), "split 'train' of .* holds no text"),
        (SequenceLikelihood("b.fa", tag="x" * 80), "the tag has 81 tokens and the window 64"),
        (VariantEffects("a.fa", "v.tsv", annotated="v.vcf"), "v.tsv is a table, expected a VCF file to annotate"),
        (VariantEffects("a.fa", "v.tsv", strict=True), "1 of 1 variants of v.tsv cannot be scored"),
    ],
)
def test_what_cannot_work_is_refused_before_weights_are_read(evaluation, says, models, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, text in (("a.fa", ">r\nACGT\n"), ("b.fa", ">r\nAC\n"), ("v.tsv", "chrom\tpos\tref\talt\nr\t1\tC\tG\n")):
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(model_source, "load", None)
    given = settings(models, tmp_path / "out") | {"checkpoint": str(models / "first"), "evals": (evaluation,)}
    with pytest.raises(UserError, match=says):
        evaluator.evaluate(**given)
    assert not (tmp_path / "out").exists()


def test_a_suite_leaves_out_what_does_not_fit_the_window(models, monkeypatch):
    model, tokenizer = tiny_model(max_position_embeddings=64), ByteTokenizer()
    check = functools.partial(settings_of.check_model, model=model, tokenizer=tokenizer, label="m")
    evals = (KeyValue(), Recall(pairs=4))
    left_out = check(evals, optional={"key_value", "recall"})
    assert left_out.keys() == {"key_value"} and "too short for two pairs" in left_out["key_value"]
    for refused, optional in ((evals, {"recall"}), (evals[:1], {"key_value"})):  # set by the user; nothing is left
        with pytest.raises(UserError, match="too short for two pairs"):
            check(refused, optional=optional)


def test_suites(models, tmp_path, capsys, monkeypatch):
    first = str(models / "first")
    with pytest.raises(UserError, match="suite is 'longer', expected one of short, retrieval, ruler, long"):
        evaluator.evaluate(checkpoint=first, output=str(tmp_path / "out"), suite="longer")
    with pytest.raises(UserError, match="given twice"):
        evaluator.evaluate(checkpoint=(first, first), output=str(tmp_path / "out"))
    with pytest.raises(UserError, match="one name, 'a', for 2 checkpoints"):
        evaluator.evaluate(checkpoint=(first, "b"), name="a", output=str(tmp_path / "out"))
    tasks = (
        Perplexity(),
        Recall(lengths=(32,), pairs=4, rows=4),
        Cost(lengths=(16,), new_tokens=3, repeats=1),
    )
    monkeypatch.setitem(evaluator.SUITES, "short", tasks)
    monkeypatch.setattr(texts, "recorded", lambda *_: None)
    results = evaluator.evaluate(checkpoint=(first,), output=str(tmp_path / "out"), suite="short")
    assert (
        list(results["evaluations"]) == ["recall", "cost"]
        and "perplexity is left out" in capsys.readouterr().err
    )
    assert json.loads((tmp_path / "out" / "results.json").read_text())["skipped"].keys() == {"perplexity"}
    cost = results["evaluations"]["cost"]["lengths"][0]
    # Keys and values of 2 layers, 2 heads of 8 numbers, in float32, and what else the cache holds.
    model = tiny_model(max_position_embeddings=64)
    cache = jax.eval_shape(lambda: model.init_cache(1, 19))
    assert cost["state_bytes"] == sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(cache))
    assert cost["tokens_per_second"] > 0 and cost["peak_bytes"] > 1 << 20


def test_settings_of_a_suite(models, tmp_path, capfd):
    """The command lists the same evaluations as the function, and --gin sets their parameters."""
    for suite, evals in evaluator.SUITES.items():
        assert evaluate.SUITES[suite] == ",".join(one.name for one in evals)
    flags = ("--suite=retrieval", "--gin.Passkey.trials=0", "--gin.NeedleGrid.trials=3")
    assert evaluate.main([f"--checkpoint={models / 'first'}", f"--output={tmp_path / 'out'}", *flags]) == 2
    err = capfd.readouterr().err
    assert "trials is 0, expected at least 1" in err and "no effect" not in err


def test_losses_are_kept_row_by_row(tmp_path):
    model = tiny_model(max_position_embeddings=64)
    params = init_params(model, jax.random.key(0))
    tokens = np.random.default_rng(0).integers(0, 250, (7, 24)).astype(np.int32)
    whole = scoring.score(model, params, tokens, tokens, tokens_per_batch=48)
    with journal.keeping(tmp_path / "kept.jsonl", "a"):
        scoring.score(model, params, tokens[:5], tokens[:5], tokens_per_batch=48)
    with journal.keeping(tmp_path / "kept.jsonl", "a") as kept:
        assert np.array_equal(scoring.score(model, params, tokens, tokens, tokens_per_batch=48), whole)
        assert kept.reused == 5


def test_batches_are_equal():
    sizes = {(66, 16): 14, (64, 16): 16, (17, 16): 9, (3, 16): 3, (5, 0): 1, (0, 16): 1}
    assert {case: scoring.even(*case) for case in sizes} == sizes


def test_paired_differences():
    """Samples that are hard for both models do not widen the interval; the interval covers the truth."""
    rng = np.random.default_rng(0)
    hard = rng.normal(0, 10, 400)
    a, b = hard + rng.normal(0, 0.1, 400), hard + 0.05 + rng.normal(0, 0.1, 400)
    gap, low, high = paired_difference(a, b)
    assert gap == pytest.approx(np.mean(b - a)) and 0 < low < gap < high < 0.08
    covered = 0
    for trial in range(100):
        x = rng.normal(0, 1, 60)
        _, low, high = paired_difference(x, x + rng.normal(0.3, 1, 60), seed=trial, draws=400)
        covered += low <= 0.3 <= high
    assert 86 <= covered <= 100
    assert (
        paired_difference(np.array([2.0, 9.0]), np.array([4.0, 9.0]), weights=np.array([1.0, 3.0]))[0] == 0.5
    )
