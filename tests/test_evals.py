"""The evaluations against computations written from their definitions, and against transformers on real weights."""

import dataclasses
import json
import math
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import quick_xla
from tiny_runs import tiny_model

import lcx
from lcx.checkpoint import Checkpointer, model_json
from lcx.data import ByteTokenizer, Dataset
from lcx.errors import UserError
from lcx.evals import loss_by_position
from lcx.evals.loss_by_position import LossByPosition
from lcx.evals.passkey import Passkey
from lcx.evals.perplexity import Perplexity
from lcx.evals.sequence_likelihood import SequenceLikelihood
from lcx.evals.support import documents, reach, scoring, windows
from lcx.evals.support.model_facts import facts
from lcx.evaluator import evaluate
from lcx.extend import extend_model
from lcx.model import init_params, llama
from lcx.rope import Rope

WINDOW = 64
TEXTS = ["a", "the quick brown fox " * 5, "é" * 32, "0123456789abcdef" * 3, "lazy dogs jump over " * 9, "zz"]


@pytest.fixture(scope="module")
def tiny():
    model = tiny_model(intermediate_size=48, max_position_embeddings=WINDOW)
    # Away from uniform, and no further: three times the weights, and float32 logits of one row differ by 4e-4 between
    # two batch sizes on some processors.
    params = jax.tree.map(lambda x: x * 1.25, init_params(model, jax.random.key(0)))
    return model, params


@pytest.fixture
def dataset(tmp_path):
    (tmp_path / "text.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in TEXTS))
    return Dataset(str(tmp_path / "text.jsonl"), eval_fraction=1.0, cache_dir=str(tmp_path / "cache"))


def tokens_of(texts=TEXTS):
    return [np.array([256, *text.encode()], np.int32) for text in texts]


def numpy_nll(model, params, tokens):
    """-log p of tokens[1:], each from all tokens before it; logits of the model, the rest in float64."""
    padded = np.pad(tokens, (0, -len(tokens) % 64))  # on the right, where causal attention does not see it
    logits = np.asarray(lcx.logits(model, params, padded[None]), np.float64)[0, : len(tokens) - 1]
    top = logits.max(-1, keepdims=True)
    lse = top[:, 0] + np.log(np.exp(logits - top).sum(-1))
    return lse - logits[np.arange(len(tokens) - 1), tokens[1:]]


# ------------------------------------------------------------------------------------------------ scoring


@pytest.mark.parametrize(("tokens_per_batch", "long"), [(1, 100), (90, 100), (10_000, 100), (13, 20)])
def test_score_is_the_nll_of_the_logits(tiny, monkeypatch, tokens_per_batch, long):
    """Rows in batches, and (the last case) in pieces that do not divide them."""
    monkeypatch.setattr(scoring, "LONG", long)
    model, params = tiny
    rows = np.random.default_rng(0).integers(0, 258, (5, 46)).astype(np.int32)
    got = scoring.score(model, params, rows[:, :-1], rows[:, 1:], tokens_per_batch=tokens_per_batch)
    assert got.shape == (5, 45) and got.dtype == np.float32
    expected = np.stack([numpy_nll(model, params, row) for row in rows])
    np.testing.assert_allclose(got, expected, rtol=2e-5, atol=2e-5)


def test_score_computes_in_the_dtype_of_the_model(tiny):
    model, params = tiny
    rows = np.random.default_rng(1).integers(0, 258, (2, 33)).astype(np.int32)
    half = model.clone(dtype="bfloat16", parent=None)
    got = scoring.score(half, params, rows[:, :-1], rows[:, 1:])
    np.testing.assert_allclose(got, [numpy_nll(half, params, row) for row in rows], rtol=1e-4, atol=1e-3)
    assert np.abs(got - [numpy_nll(model, params, row) for row in rows]).max() > 0.01


def test_score_compiles_once_for_all_batches(tiny):
    model, params = tiny
    rows = np.zeros((7, 21), np.int32)
    before = scoring._score._cache_size()
    scoring.score(model, params, rows, rows, tokens_per_batch=42)  # 4 batches, the last half full
    assert scoring._score._cache_size() == before + 1


MESH = """
import jax, numpy as np
from lcx import sharding
from lcx.data import ByteTokenizer, Dataset
from lcx.evals import scoring
from lcx.evals.loss_by_position import LossByPosition
from lcx.evals.passkey import Passkey
from lcx.model import init_params, llama

model = llama(vocab_size=258, hidden_size=32, intermediate_size=48, num_layers=1, num_heads=4, num_kv_heads=2,
              max_position_embeddings=330)
rows = np.random.default_rng(0).integers(0, 258, (5, 44)).astype(np.int32)
alone = jax.tree.map(np.asarray, init_params(model, jax.random.key(0)))
expected = scoring.score(model, alone, rows[:, :-1], rows[:, 1:])  # rows and tokens that no axis divides
mesh = sharding.make_mesh(data=1, fsdp=2, context=2, tensor=2)
params = init_params(model, jax.random.key(0), mesh=mesh)
assert scoring.mesh_of(params) == mesh
got = scoring.score(model, params, rows[:, :-1], rows[:, 1:], tokens_per_batch=100)
np.testing.assert_allclose(got, expected, rtol=2e-5, atol=2e-5)
scoring.LONG = 20  # rows in pieces
got = scoring.score(model, params, rows[:, :-1], rows[:, 1:], tokens_per_batch=13)
np.testing.assert_allclose(got, expected, rtol=2e-5, atol=2e-5)
task = Passkey(num_distances=1, trials=2, batch_size=2, max_new_tokens=3)
here, there = (task(model, p, ByteTokenizer()) for p in (alone, params))
assert [d["example"] for d in here["distances"]] == [d["example"] for d in there["distances"]]
print("same on every mesh")
"""


def test_a_mesh_changes_nothing():
    env = os.environ | {
        "XLA_FLAGS": quick_xla.flags("--xla_force_host_platform_device_count=8"),
        "NPROC": "32",
    }
    env["PYTHONPATH"] = str(pathlib.Path(lcx.__file__).parent.parent)
    run = subprocess.run([sys.executable, "-c", MESH], env=env, capture_output=True, text=True)
    assert "same on every mesh" in run.stdout, run.stderr[-3000:]


# ------------------------------------------------------------------------------------------------ perplexity


def slow_sliding_nll(model, params, document, W, S):
    """Token by token, from the definition: target t belongs to the first window that holds it."""
    T, scored, context = len(document), {}, {}
    for t in range(1, T):
        b = next(b for b in range(0, T, S) if min(b + W, T) > t)
        scored[t] = numpy_nll(model, params, document[b : t + 1])[-1]
        context[t] = t - b
    return scored, context


@pytest.mark.parametrize(("W", "S"), [(16, 8), (16, 5), (WINDOW, 30)])
def test_sliding_window_token_by_token(tiny, dataset, W, S):
    model, params = tiny
    dataset = dataclasses.replace(dataset, min_length=0)
    result = Perplexity(dataset=dataset, windows=(W,), stride=S, max_tokens=150)(
        model, params, ByteTokenizer()
    )
    documents, left = [], 150
    for document in tokens_of():
        documents += [document[:left]] if left else []
        left -= len(documents[-1]) if left else 0
    nll, contexts = [], []
    for document in documents:
        scored, context = slow_sliding_nll(model, params, document, W, S)
        nll += scored.values()
        contexts += [context[t] for t in scored if t >= W]
    (entry,) = result["windows"]
    assert entry["tokens"] == len(nll) == sum(len(d) - 1 for d in documents)
    assert entry["nll"] == pytest.approx(np.mean(nll), rel=1e-5)
    assert entry["perplexity"] == pytest.approx(math.exp(np.mean(nll)), rel=1e-4)
    assert (
        min(contexts, default=W - S) >= W - S and max(contexts, default=0) <= W - 1
    )  # as the definition says
    assert "Press et al." in result["definition"] and f"stride {S}" in result["definition"]
    assert "scored after BOS" in result["definition"]


def test_without_bos_the_first_token_is_not_scored(tiny, dataset):
    model, params = tiny
    dataset = dataclasses.replace(dataset, add_bos=False)
    result = Perplexity(dataset=dataset, windows=(32,), stride=16)(model, params, ByteTokenizer())
    assert result["windows"][0]["tokens"] == sum(len(text.encode()) - 1 for text in TEXTS)
    assert "not scored (no BOS" in result["definition"]


@pytest.mark.parametrize("stride", [1, 3, 7, 8, 15])
def test_windows_score_every_target_once(stride):
    lengths = [1, 2, 15, 16, 17, 24, 31, 32, 100, 0]
    rows = windows.window_rows(lengths, window=16, stride=stride)
    targets = [(d, t) for d, _, end, first in rows.tolist() for t in range(first, end)]
    assert sorted(targets) == [(d, t) for d, length in enumerate(lengths) for t in range(1, length)]
    assert all(begin < first and end - begin <= 16 for _, begin, end, first in rows.tolist())


def test_windows_without_overlap(tiny, dataset):
    model, params = tiny
    result = Perplexity(dataset=dataset, windows=(17,), stride=None)(model, params, ByteTokenizer())
    nll = []
    for document in tokens_of():
        for b in range(0, len(document) - 1, 16):  # 16 targets each, the first from one token
            nll += numpy_nll(model, params, document[b : b + 17]).tolist()
    assert result["windows"][0]["nll"] == pytest.approx(np.mean(nll), rel=1e-5)
    assert "non-overlapping" in result["definition"]


def test_uniform_model_has_the_perplexity_of_its_vocabulary(tiny, dataset):
    model, params = tiny
    uniform = {**params, "lm_head": jax.tree.map(jnp.zeros_like, params["lm_head"])}
    result = Perplexity(dataset=dataset)(model, uniform, ByteTokenizer())
    assert [entry["window"] for entry in result["windows"]] == [WINDOW // 4, WINDOW, 2 * WINDOW]
    assert result["notes"][0].endswith(
        "twice the model's window of 64; limited by the longest document, 181 tokens"
    )
    assert result["windows"][1]["perplexity"] == pytest.approx(258, rel=1e-5)
    assert result["windows"][1]["stride"] == WINDOW // 2  # 256 leaves no overlap in a window of 64
    by_position = LossByPosition(dataset=dataset)(model, uniform, ByteTokenizer())["lengths"][0]
    assert by_position["nll"] == pytest.approx(math.log(258), rel=1e-6)
    assert by_position["standard_error"] == pytest.approx(0, abs=1e-6)
    assert by_position["nll_per_byte"] > by_position["nll"]  # BOS is a token without bytes


@pytest.mark.parametrize(
    ("limits", "length", "note"),
    [
        ({"a": 1024, "b": 5000}, 1024, "rows of up to 1024 tokens, 4 times the model's window of 256"),
        (
            {"a": 1023, "b": 5000},
            512,
            "rows of up to 512 tokens, twice the model's window of 256; limited by a",
        ),
        (
            {"a": 700, "b": 600},
            512,
            "rows of up to 512 tokens, twice the model's window of 256; limited by b",
        ),
        ({"a": 10, "b": 600}, 256, "the model's window: what it does beyond is not measured; limited by a"),
    ],
)
def test_lengths_beyond_the_window(limits, length, note):
    found = reach.beyond(256, unit="rows", limits=limits)
    assert found.length == length and note in found.note


def test_default_lengths_go_beyond_the_window(tiny):
    model, _ = tiny
    long = documents.Documents([np.zeros(4096, np.int32)], ByteTokenizer(), "", [np.ones(4096, bool)])
    assert LossByPosition()._lengths(model, long)[0] == (4 * WINDOW,)
    assert LossByPosition(tokens_per_batch=200)._lengths(model, long)[0] == (2 * WINDOW,)
    assert LossByPosition(lengths=(9,))._lengths(model, long) == ((9,), [])
    dynamic = extend_model(
        model, {"rope_type": "dynamic", "factor": 2.0}, None
    )  # its frequencies vary with the row
    window = dynamic.max_position_embeddings
    assert LossByPosition()._lengths(dynamic, long)[0] == (window, 4 * window)
    assert Perplexity()._windows(model, long)[0] == (WINDOW // 4, WINDOW, 4 * WINDOW)
    assert Perplexity(stride=1)._windows(model, long)[0] == (WINDOW // 4, WINDOW, 4 * WINDOW)  # 2^20 tokens
    assert Perplexity(stride=1, windows=(64,))._windows(model, long) == ((64,), [])
    longer = dataclasses.replace(long, tokens=long.tokens * 2, masks=long.masks * 2)
    windows, (note,) = Perplexity(stride=1)._windows(model, longer)
    assert (
        windows == (WINDOW // 4, WINDOW, 2 * WINDOW) and "limited by the time: at most 1048576 tokens" in note
    )


def test_perplexity_error_bars_take_documents_as_independent(tiny, dataset):
    model, params = tiny
    entry = Perplexity(dataset=dataset, windows=(400,), stride=100)(model, params, ByteTokenizer())[
        "windows"
    ][0]
    per_document = [numpy_nll(model, params, document) for document in tokens_of()]
    n, mean, total = len(per_document), np.mean(np.concatenate(per_document)), sum(map(len, per_document))
    squares = sum((nll.sum() - mean * len(nll)) ** 2 for nll in per_document)
    assert entry["standard_error"] == pytest.approx(math.sqrt(n / (n - 1) * squares) / total, rel=1e-4)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: (), "evals is empty"),
        (lambda: (Passkey,), r"evaluate.evals has the class Passkey, expected an instance: write Passkey\(\)"),
        (lambda: (Perplexity(max_document_length=1),), "Perplexity.max_document_length is 1, expected at least 2"),
        (lambda: (Perplexity(name=""),), "Perplexity.name is ''"),
        (lambda: (Perplexity(), Perplexity(stride=3)), "two evaluations are named 'perplexity'"),
        (lambda: (Perplexity(split="test"),), "Perplexity.split is 'test', expected one of train, eval"),
        (lambda: (LossByPosition(max_tokens=1),), "LossByPosition.max_tokens is 1, expected at least 2"),
        (lambda: (LossByPosition(tokens_per_batch=0),), "LossByPosition.tokens_per_batch is 0"),
        (lambda: (Passkey(digits=100),), "Passkey.digits is 100, expected at most 18"),
        (lambda: (Passkey(seed=-1),), "Passkey.seed is -1"),
        (lambda: (SequenceLikelihood("/nowhere.fa"),), "matches no file; set SequenceLikelihood.sequences"),
    ],
)
def test_settings_are_checked_before_the_model_is_loaded(make, says, tmp_path):
    with pytest.raises(UserError, match=says):
        evaluate(checkpoint="/nowhere", output=str(tmp_path / "out"), evals=make())
    assert not (tmp_path / "out").exists()


def test_rows_beyond_the_text_cost_no_memory(tiny, dataset):
    """A row of 10^9 tokens is not padded to its length; the positions that the text has are measured."""
    model, params = tiny
    result = LossByPosition(dataset=dataset, lengths=(10**9, 10**9), max_tokens=256)(model, params, ByteTokenizer())
    (entry,) = result["lengths"]
    assert entry["tokens"] == 256 and entry["buckets"][-1]["nll"] is None
    assert result["notes"] == [
        "rows of 1000000000 tokens: only 256 tokens were read, so positions beyond are not measured "
        "(LossByPosition.max_tokens)"
    ]


def test_settings_that_cannot_be(tiny, dataset):
    model, params = tiny
    with pytest.raises(UserError, match="leaves no overlap"):
        Perplexity(dataset=dataset, windows=(128, 32), stride=32)(model, params, ByteTokenizer())
    with pytest.raises(UserError, match="no text.*LossByPosition.dataset"):
        LossByPosition()(model, params, ByteTokenizer())
    with pytest.raises(UserError, match="vocab_size"):
        LossByPosition(dataset=dataset)(model, params, ByteTokenizer(vocab_size=300))
    with pytest.raises(UserError, match="holds no text"):
        LossByPosition(dataset=dataset, split="train")(model, params, ByteTokenizer())


# ------------------------------------------------------------------------------------------------ loss by position


def test_buckets_double():
    assert loss_by_position.doubling(1024, 128) == [(0, 128), (128, 256), (256, 512), (512, 1024)]
    assert loss_by_position.doubling(700, 128)[-1] == (512, 700)
    assert loss_by_position.doubling(100, 128) == [(0, 100)]
    fine = loss_by_position.doubling(1000, 8, 4)
    assert fine[0] == (0, 8) and fine[-1][1] == 1000
    assert all(a[1] == b[0] and b[1] > b[0] for a, b in zip(fine, fine[1:], strict=False))


@pytest.mark.parametrize("starts", [True, False])
def test_buckets_of_whole_rows(tiny, dataset, starts):
    model, params = tiny
    task = LossByPosition(
        dataset=dataset, lengths=(50,), first_bucket=10, max_tokens=170, score_document_starts=starts
    )
    result = task(model, params, ByteTokenizer())
    stream = np.concatenate(tokens_of())[:171]
    buckets: dict[tuple[int, int], list[float]] = {(0, 10): [], (10, 20): [], (20, 40): [], (40, 50): []}
    for b in range(0, 170, 50):
        row = stream[b : b + 51]
        for p, nll in enumerate(numpy_nll(model, params, row)):
            if starts or row[p + 1] != 256:
                next(v for (start, end), v in buckets.items() if start <= p < end).append(nll)
    (entry,) = result["lengths"]
    assert entry["rows"] == 4
    for bucket, (edges, values) in zip(entry["buckets"], buckets.items(), strict=True):
        assert (bucket["start"], bucket["end"]) == edges and bucket["tokens"] == len(values)
        assert bucket["nll"] == pytest.approx(np.mean(values), rel=1e-5)
    assert entry["tokens"] == sum(map(len, buckets.values()))
    assert result["table"]["10-20"] == entry["buckets"][1]["nll"]


def test_document_mask_is_each_document_alone(tiny, dataset):
    model, params = tiny
    result = LossByPosition(dataset=dataset, lengths=(1000,), first_bucket=10, document_mask=True)(
        model, params, ByteTokenizer()
    )
    (entry,) = result["lengths"]
    alone = [numpy_nll(model, params, document) for document in tokens_of()]
    for bucket in entry["buckets"]:
        values = np.concatenate([nll[bucket["start"] : bucket["end"]] for nll in alone])
        assert bucket["tokens"] == len(values)
        assert bucket["nll"] == (pytest.approx(np.mean(values), rel=1e-5) if len(values) else None)


def test_several_lengths(tiny, dataset):
    model, params = tiny
    result = LossByPosition(dataset=dataset, lengths=(16, 48))(model, params, ByteTokenizer())
    assert [entry["length"] for entry in result["lengths"]] == [16, 48]
    assert list(result["table"]) == ["0-48"]  # the longest


# ------------------------------------------------------------------------------------------------ facts


def test_facts_of_a_scaled_model():
    rope = Rope(rope_type="yarn", factor=4.0, original_max_position_embeddings=256)
    sizes = dict(vocab_size=9, hidden_size=8, intermediate_size=8, num_layers=1, num_heads=1)
    found = facts(llama(**sizes, max_position_embeddings=1024, rope=rope))
    assert (found["window"], found["original_window"], found["rope"], found["rope_type"]) == (
        1024,
        256,
        "yarn x4",
        "yarn",
    )
    plain = facts(llama(**sizes, max_position_embeddings=256))
    assert (plain["window"], plain["original_window"], plain["rope"]) == (256, 256, "default")


# ------------------------------------------------------------------------------------------------ evaluator


@dataclasses.dataclass(frozen=True)
class Broken:
    """An evaluation that fails."""

    error: type[BaseException] = ZeroDivisionError
    name: str = "broken"

    def __call__(self, model, params, tokenizer):
        raise self.error("by zero")

    def plot(self, axes, results):
        raise AssertionError


@pytest.fixture
def checkpoint(tiny, dataset, tmp_path):
    model, params = tiny
    meta = {
        "model": model_json.to_json(model),
        "tokenizer": ByteTokenizer().to_json(),
        "data": model_json.to_json(dataset),
    }
    with Checkpointer(tmp_path / "run" / "checkpoints") as checkpointer:
        checkpointer.save(3, {"params": params}, json={"meta": meta, "data": {}}, wait=True)
    return str(tmp_path / "run")


def read(folder):
    return json.loads((pathlib.Path(folder) / "results.json").read_text())


def test_evaluate_a_checkpoint_on_what_it_was_trained_on(checkpoint, tiny, dataset, tmp_path, capsys):
    returned = evaluate(checkpoint=checkpoint, output=str(tmp_path / "out"))
    results = read(tmp_path / "out")
    assert results["name"] == "run" and results["checkpoint"] == checkpoint and not results["errors"]
    assert (
        results["model"]["window"] == WINDOW
        and model_json.from_json(results["model"]["description"]) == tiny[0]
    )
    assert {"jax", "lcx", "python"} <= set(results["versions"]) and results["machine"]["device"]
    for name, task in (("loss_by_position", LossByPosition), ("perplexity", Perplexity)):
        entry = results["evaluations"][name]
        expected = json.loads(json.dumps(task(dataset=dataset)(*tiny, ByteTokenizer())))
        assert {key: entry[key] for key in expected} == expected
        assert model_json.from_json(entry["evaluation"]) == task(dataset=dataset) and entry["seconds"] > 0
        assert (tmp_path / "out" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    assert returned["evaluations"]["perplexity"]["windows"] == results["evaluations"]["perplexity"]["windows"]
    assert (tmp_path / "out" / "report.html").is_file()
    assert "perplexity:" in (told := capsys.readouterr()).err and not told.out
    evaluate(checkpoint=checkpoint, output=str(tmp_path / "out"), evals=(Perplexity(),), name="again")
    assert json.loads((tmp_path / "out" / "results.previous.json").read_text())["name"] == "run"
    assert read(tmp_path / "out")["name"] == "again"
    (tmp_path / "compared").mkdir()
    (tmp_path / "compared" / "report.html").write_text("of several models")
    with pytest.raises(UserError, match="compared holds the report of something else"):
        evaluate(checkpoint=checkpoint, output=str(tmp_path / "compared"))


def test_one_evaluation_that_fails_costs_no_other(checkpoint, tmp_path):
    with pytest.raises(
        UserError, match=r"2 of 3 evaluations failed: broken: ZeroDivisionError: by zero; worse: .*others"
    ):
        evals = (Broken(), Perplexity(windows=(32,), stride=16), Broken(UserError, "worse"))
        evaluate(checkpoint=checkpoint, output=str(tmp_path / "out"), evals=evals)
    results = read(tmp_path / "out")
    assert list(results["evaluations"]) == ["perplexity"]
    assert results["errors"] == {"broken": "ZeroDivisionError: by zero", "worse": "by zero"}
    assert "by zero" in (tmp_path / "out" / "report.html").read_text()


def test_an_interruption_keeps_what_is_done(checkpoint, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        evals = (Perplexity(windows=(32,), stride=16), Broken(KeyboardInterrupt))
        evaluate(checkpoint=checkpoint, output=str(tmp_path / "out"), evals=evals)
    assert list(read(tmp_path / "out")["evaluations"]) == ["perplexity"]


def test_evaluate_with_another_rope_and_text(checkpoint, tiny, dataset, tmp_path):
    (tmp_path / "other.txt").write_text("something else " * 40)
    other = Dataset(str(tmp_path / "other.txt"), eval_fraction=1.0, cache_dir=dataset.cache_dir)
    results = evaluate(
        checkpoint=checkpoint,
        output=str(tmp_path / "out"),
        rope_scaling={"rope_type": "yarn", "factor": 4.0},
        evals=(LossByPosition(), Perplexity(dataset=dataset)),
        dataset=other,
    )
    assert results["name"] == "run, yarn x4" and results["model"]["rope"] == "yarn x4"
    assert results["evaluations"]["loss_by_position"]["lengths"][0]["length"] == 4 * WINDOW
    assert "other.txt" in results["evaluations"]["loss_by_position"]["definition"]
    assert "text.jsonl" in results["evaluations"]["perplexity"]["definition"]


def test_bad_input_is_one_line(checkpoint, tmp_path, tiny):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write to .*change --output"):
        evaluate(checkpoint=checkpoint, output=str(tmp_path / "file" / "out"))
    with pytest.raises(UserError, match="no checkpoint at .*nowhere"):
        evaluate(checkpoint=str(tmp_path / "nowhere"), output=str(tmp_path / "out"))
    lcx.save(tmp_path / "bare", *tiny, format="hf")
    with pytest.raises(UserError, match="no text for loss_by_position.*set --dataset"):
        evaluate(checkpoint=str(tmp_path / "bare"), output=str(tmp_path / "out"), evals=(LossByPosition(),))
