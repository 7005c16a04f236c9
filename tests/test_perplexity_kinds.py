"""Published definitions of perplexity, and LongPPL, against loops written from the published scripts."""

import math

import jax
import numpy as np
import pytest
from test_retrieval import induction
from tiny_runs import tiny_model

import lcx
from lcx.data import ByteTokenizer, Dataset
from lcx.errors import UserError
from lcx.evals.long_ppl import LongPPL
from lcx.evals.loss_by_position import LossByPosition
from lcx.evals.perplexity import Perplexity
from lcx.model import init_params

BOS = 256


@pytest.fixture(scope="module")
def tiny():
    model = tiny_model(max_position_embeddings=64)
    params = init_params(model, jax.random.key(1))
    return model, jax.tree.map(lambda x: x * (1 + 0.5 * np.sin(np.arange(x.size)).reshape(x.shape)), params)


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("texts")
    for i, text in enumerate(
        ("A dog sat by the old mill and barked. " * 4, "zz 17 zz", "Rain fell on rain. " * 5)
    ):
        (folder / f"{i}.txt").write_text(text)
    return Dataset(str(folder), eval_fraction=1.0)


def losses(model, params, inputs):
    """-log p of each token of a row but the first."""
    padded = [*inputs, *[0] * (96 - len(inputs))]  # one shape; the model is causal
    logits = np.asarray(lcx.logits(model, params, [padded])[0], np.float64)[: len(inputs)]
    logits -= logits.max(-1, keepdims=True)
    logp = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    return -logp[np.arange(len(inputs) - 1), np.asarray(inputs[1:])]


def documents(texts):
    return [one[1:].tolist() if one[0] == BOS else one.tolist() for one in texts.document_tokens("eval")]


def yarn(model, params, texts, W, S):
    """The loop of compute_perplexity in the repository of YaRN, with a start token."""
    means = []
    for ids in documents(texts):
        end_before = 0
        for begin in range(0, len(ids), S):
            end = min(begin + W - 1, len(ids))
            new = end - end_before
            means.append(losses(model, params, [BOS, *ids[begin:end]])[-new:].mean())
            end_before = end
            if end == len(ids):
                break
    return math.exp(np.mean(means))


def longlora(model, params, texts, W, S):
    """Every window of W inputs scores all W targets; the mean over windows."""
    means = []
    for ids in ([BOS, *one] for one in documents(texts)):
        for begin in range(0, max(1, len(ids) - W), S):
            means.append(losses(model, params, ids[begin : begin + W + 1]).mean())
    return math.exp(np.mean(means))


@pytest.mark.parametrize(("kind", "oracle"), [("yarn", yarn), ("longlora", longlora)])
@pytest.mark.parametrize(("W", "S"), [(32, 8), (48, 20), (64, 63)])
def test_published_scripts(tiny, texts, kind, oracle, W, S):
    result = Perplexity(texts, kind=kind, windows=(W,), stride=S)(*tiny, ByteTokenizer(bos_id=BOS))
    assert result["windows"][0]["perplexity"] == pytest.approx(oracle(*tiny, texts, W, S), rel=2e-5)
    assert kind.replace("longlora", "LongLoRA").replace("yarn", "YaRN") in result["definition"]


def test_the_definitions_differ_and_say_so(tiny, texts):
    found = {
        kind: Perplexity(texts, kind=kind, windows=(32,), stride=8)(*tiny, ByteTokenizer())
        for kind in ("press", "non_overlapping", "yarn", "longlora")
    }
    values = [result["windows"][0]["perplexity"] for result in found.values()]
    assert len({round(value, 6) for value in values}) == 4
    assert len({result["definition"] for result in found.values()}) == 4
    assert found["non_overlapping"]["windows"][0]["stride"] == 31
    with pytest.raises(UserError, match="Perplexity.kind is 'best'"):
        Perplexity(kind="best")
    with pytest.raises(UserError, match="the tokenizer has none"):
        Perplexity(texts, kind="yarn", windows=(32,), stride=8)(*tiny, ByteTokenizer(bos_id=None))


def test_long_ppl_token_by_token(tiny, texts):
    length, short, stride = 90, 24, 8
    task = LongPPL(texts, length=length, short=short, stride=stride, alpha=0.002, beta=-6.0)
    result = task(*tiny, ByteTokenizer())
    total, count = 0.0, 0
    parts = [
        [BOS, *one][start : start + length] for one in documents(texts) for start in range(0, 400, length)
    ]
    for ids in parts:
        if len(ids) <= short:
            continue
        long = losses(*tiny, ids)
        for i in range(short, len(ids) - 1):  # the label ids[i + 1]
            blocks = [s for s in range(stride, len(ids) - 1, stride) if s + short - stride <= i < s + short]
            brief = losses(*tiny, ids[blocks[0] : i + 2])[-1]
            if brief - long[i] > 0.002 and -long[i] > -6.0:
                total, count = total + long[i], count + 1
    assert 5 < count == result["table"]["key tokens"]
    assert result["long_ppl"] == pytest.approx(math.exp(total / count), rel=1e-4)
    assert sum("key token at" in note for note in result["notes"]) == min(12, count)


def test_key_tokens_are_those_that_only_the_long_context_tells(tmp_path):
    """For an induction head the key tokens are the word that it read long ago; a short window knows none."""
    (tmp_path / "a.txt").write_text(
        "The secret is QXJW7. " + "abcdefgh ijklmnop " * 9 + "The secret is QXJW7."
    )
    data = Dataset(str(tmp_path / "a.txt"), eval_fraction=1.0)
    task = LongPPL(data, length=256, short=64, stride=16)
    result = task(*induction(258), ByteTokenizer())
    shown = [note for note in result["notes"] if "→" in note]
    # After "T" or "Th" both contexts guess; what follows is known to the long one alone.
    assert result["table"]["key tokens"] >= len("secret is QXJW7.") and result["long_ppl"] == pytest.approx(
        1, abs=1e-3
    )
    assert any("“X”" in note or "“J”" in note for note in shown)
    blind = task(*induction(258, window=64), ByteTokenizer())
    assert blind["long_ppl"] is None and "not defined" in blind["summary"] + task.finding({"a": blind})
    assert task.finding({"a": result}).startswith("LongPPL is")


def test_losses_of_a_model_with_perfect_memory(tmp_path):
    """A text of letters drawn at random, then the same again and again: who remembers 150 tokens loses nothing there,
    who sees only the last 100 has the losses of the first time everywhere."""
    rng = np.random.default_rng(0)
    once = "".join(chr(c) for _ in range(2) for c in rng.permutation(np.arange(33, 127))[:75])
    (tmp_path / "a.txt").write_text(once * 4)
    data = Dataset(str(tmp_path / "a.txt"), eval_fraction=1.0)
    by_position = LossByPosition(data, lengths=(512,), first_bucket=128, max_tokens=512)
    perplexity = Perplexity(data, windows=(96, 400), stride=32)
    for window in (None, 100):
        model = induction(258, window=window)
        first, _, last = (one["nll"] for one in by_position(*model, ByteTokenizer())["lengths"][0]["buckets"])
        near, far = (one["nll"] for one in perplexity(*model, ByteTokenizer())["windows"])
        assert first > 10 and near > 10, "nobody knows what comes for the first time"
        assert (last < 1e-3 and far < 0.35 * near) if window is None else (last > 10 and far > 10)


@pytest.mark.parametrize(
    ("settings", "found"),
    [
        ({"short": 1}, "LongPPL.short is 1"),
        ({"short": 8, "stride": 8}, "stride 8"),
        ({"length": 0}, "LongPPL.length"),
    ],
)
def test_settings_that_cannot_be(settings, found):
    with pytest.raises(UserError, match=found):
        LongPPL(**settings)


def test_documents_must_be_longer_than_the_short_context(tiny, texts):
    with pytest.raises(UserError, match="no document of .* has more than 500 tokens"):
        LongPPL(texts, length=2000, short=500)(*tiny, ByteTokenizer())
    with pytest.raises(UserError, match="less than the length"):
        LongPPL(texts, length=100, short=100)(*tiny, ByteTokenizer())
