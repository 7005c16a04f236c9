"""Needles, pairs and associative recall: models that must score 100, models that must not, the published prompts."""

import dataclasses
import json
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from answering import Words, answered_by, copier, silent
from tiny_runs import ROOT, tiny_model

from lcx.data import ByteTokenizer, load_tokenizer, special_tokens
from lcx.errors import UserError
from lcx.evals.key_value import KeyValue
from lcx.evals.needle_grid import NeedleGrid
from lcx.evals.passkey import Passkey
from lcx.evals.recall import Recall
from lcx.evals.support import forced, journal, records
from lcx.evals.support.haystack import Haystack
from lcx.extend import extend_model
from lcx.model import Block, Decoder, Stage, init_params

WORDS, BYTES = Words(), ByteTokenizer()


# ------------------------------------------------------------------------------------------------ induction


class Induction(nn.Module):
    """An induction head by construction: continues the longest stretch that ends like the text and occurred before.

    The residual stream is the token, one-hot. The state holds all ids, and for each of them the length of the stretch
    that ends there and equals the end of the text so far; what followed the longest (of equals the latest) comes next.
    With a `window` only ids at most so many tokens back are visible.
    """

    window: int | None = None

    @nn.compact
    def __call__(self, x, *, positions=None, segment_ids=None, cache=None):
        ids = jnp.argmax(x, -1)
        real = jnp.ones(ids.shape, bool) if segment_ids is None else segment_ids != 0
        state = self.init_cache(x.shape[0], x.shape[1], x.dtype) if cache is None else cache
        out, state = jax.vmap(self._row)(ids, real, state)
        return 100 * jax.nn.one_hot(out, x.shape[-1], dtype=x.dtype), None if cache is None else state

    @nn.nowrap
    def _row(self, ids, real, state):
        def step(state, token):
            token_id, is_real = token
            known, match, count = state["ids"], state["match"], state["count"]
            place = jnp.arange(known.shape[0])
            seen = place < count
            if self.window is not None:
                seen &= (
                    place > count - self.window
                )  # the last W ids, the newest of which is about to be written
            longer = jnp.where(
                known == token_id, jnp.concatenate([jnp.zeros(1, match.dtype), match[:-1]]) + 1, 0
            )
            longer = jnp.where(seen & (place < count), longer, 0)
            known_after = known.at[count].set(token_id)
            follows = place + 1 < count + 1  # what followed is known, if only the newest id itself
            score = jnp.where(follows & (longer > 0), longer * known.shape[0] + place, -1)
            best = jnp.argmax(score)
            guess = jnp.where(score[best] > 0, known_after[best + 1], token_id)
            after = {"ids": known_after, "match": longer, "count": count + 1}
            state = jax.tree.map(lambda new, old: jnp.where(is_real, new, old), after, state)
            return state, guess

        state, out = jax.lax.scan(step, state, (ids, real))
        return out, state

    @nn.nowrap
    def init_cache(self, batch_size, length, dtype):
        zeros = jnp.zeros((batch_size, length), jnp.int32)
        return {"ids": zeros, "match": zeros, "count": jnp.zeros(batch_size, jnp.int32)}


def induction(vocab_size, window=None, context=2048):
    """(model, params) of a decoder that is an induction head: one-hot embedding, no norm that would change it."""
    block = Block(mixer=Induction(window=window, parent=None), mlp=None, parent=None)
    model = Decoder(
        vocab_size=vocab_size,
        hidden_size=vocab_size,
        stages=(Stage((block,)),),
        max_position_embeddings=context,
        tie_word_embeddings=True,
        parent=None,
    )
    params = init_params(model, jax.random.key(0))
    params["embed"]["embedding"] = jnp.eye(vocab_size)
    return model, params


def test_the_induction_head_continues_what_it_has_seen():
    import lcx

    model, params = induction(16)
    text = [1, 2, 3, 4, 5, 9, 2, 3, 7, 8, 1, 2, 3]
    assert int(lcx.logits(model, params, [text])[0, -1].argmax()) == 4  # 1 2 3 is longer than 2 3
    assert lcx.generate(model, params, [text], max_new_tokens=3).tolist() == [[4, 5, 9]]
    model, params = induction(16, window=8)
    assert int(lcx.logits(model, params, [text])[0, -1].argmax()) == 7


@pytest.mark.parametrize(("window", "reach"), [(None, 900), (500, 500)])
def test_induction_solves_passkey_and_needles_within_its_window(window, reach):
    model, params = induction(258, window=window, context=900)
    grid = NeedleGrid(lengths=(480, 900), depths=(0.0, 1.0), trials=2)(model, params, BYTES)
    for cell in grid["cells"]:
        near = cell["length"] <= reach or cell["depth"] == 1.0
        assert cell["score"] == (1.0 if near else 0.0), cell
    key = Passkey(context_length=900, num_distances=2, trials=2)(model, params, BYTES)
    assert [d["rate"] for d in key["distances"]] == [1.0, float(reach == 900)]


def test_induction_recalls_all_pairs():
    model, params = induction(64, context=256)
    cells = Recall(lengths=(64, 256), rows=4)(model, params, None)["cells"]
    assert [cell["score"] for cell in cells] == [1, 1]
    model, params = induction(64, window=64, context=256)
    result = Recall(lengths=(64, 256), rows=4, power=1.0)(model, params, None)
    assert result["cells"][0]["score"] == 1 and result["cells"][1]["score"] < 0.5
    near = {one["from"]: one["score"] for one in result["by_distance"]}
    assert all(score == 1 for start, score in near.items() if 2 * start <= 64)
    assert near[64] == near[128] == 0, "beyond its window the head knows nothing, and says so"
    assert sum(one["samples"] for one in result["by_distance"]) == 2 * 4 * 8


def test_the_text_and_the_start_of_the_model_that_retrieves(monkeypatch):
    """Every key keeps its value; the rough head finds most values before any training, and a random start none."""
    monkeypatch.syspath_prepend(ROOT / "scripts")
    import recall_start
    import recall_text

    rng = np.random.default_rng(0)
    for _ in range(50):
        text = recall_text.document(rng, 128)
        pairs = {text[i : i + 2] for i in range(0, 128, 2)} - {"  "}
        assert len(text) == 128 and len({pair[0] for pair in pairs}) == len(pairs)
        assert all("A" <= key <= "P" and "Q" <= value <= "`" for key, value in pairs)
    task = Recall(lengths=(64,), rows=16, filler=32, first_id=65, vocabulary=32, power=1.0)
    model, params = recall_start.started(0)
    assert task(model, params, None)["cells"][0]["score"] > 0.6
    assert task(model, init_params(model, jax.random.key(0)), None)["cells"][0]["score"] < 0.2


def test_fails_unscaled_passes_scaled_on_a_model_that_can(monkeypatch):
    """h2oGPT's test without its models: attention with RoPE that finds most values within its window of 128 tokens, and
    at two to four windows none more than a guess does, until RoPE is scaled."""
    monkeypatch.syspath_prepend(ROOT / "scripts")
    import recall_start

    task = Recall(lengths=(512,), pairs=16, rows=16, filler=32, first_id=65, vocabulary=32, power=1.0)
    model, params = recall_start.started(0)
    found = {}
    for kind in ("default", "linear", "dynamic"):
        scaling = {"rope_type": kind} | ({} if kind == "default" else {"factor": 4.0})
        far = task(extend_model(model, rope_scaling=scaling, context_length=512), params, None)["by_distance"][-1]
        assert (far["from"], far["samples"]) == (256, 113)
        found[kind] = far["low"], far["high"]
    assert found["default"][0] < 1 / 16 and found["default"][1] < 0.12, "a guess among 16 values"
    assert min(found["linear"][0], found["dynamic"][0]) > 0.4


@pytest.mark.parametrize("says", ["nothing", "the last token", "any value"])
def test_recall_of_models_that_do_not_know(monkeypatch, says):
    """A constant and a copy of the query score 0; a guess among the values scores chance."""
    task = Recall(lengths=(64,), rows=64)
    rng = np.random.default_rng(0)

    def guess(model, params, rows, places, **_):
        at = [np.asarray(row)[np.asarray(place) - 1] for row, place in zip(rows, places)]
        values = [rng.integers(33, 65, len(row)) for row in at]
        return {"nothing": [0 * row for row in at], "the last token": at, "any value": values}[says]

    monkeypatch.setattr(forced, "likeliest", guess)
    cell = task(tiny_model(vocab_size=65), {}, None)["cells"][0]
    chance = 1 / 32 if says == "any value" else 0.0
    assert cell["low"] <= chance <= cell["high"] and (chance > 0 or cell["score"] == 0)


def test_forced_answers_are_greedy_answers():
    """One forward pass says what a generation would have said, token for token, for a model that errs."""
    import lcx

    model = tiny_model(max_position_embeddings=128)
    params = init_params(model, jax.random.key(3))
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, 250, n).tolist() for n in (20, 33, 60)]
    greedy = lcx.generate(model, params, prompts, max_new_tokens=5).tolist()
    wrong = [row[:3] + [(row[3] + 1) % 250] + row[4:] for row in greedy]
    for new, right in ((greedy, 5), (wrong, 3)):
        rows = [prompt + list(answer) for prompt, answer in zip(prompts, new)]
        places = [list(range(len(prompt), len(row))) for prompt, row in zip(prompts, rows)]
        found = forced.likeliest(model, params, rows, places, tokens_per_batch=256)
        for ids, row, place in zip(found, rows, places):
            assert (ids[:right] == np.array(row)[place][:right]).all()
            assert right == 5 or ids[3] != row[place[3]]


# ------------------------------------------------------------------------------------------------ known answers


@pytest.fixture(scope="module")
def tiny():
    return tiny_model(vocab_size=WORDS.vocab_size, max_position_embeddings=64), {}


def numbers_of(text):
    """Answers questions about the magic numbers of cities."""
    asked = (re.findall(r"special magic (\w+) number\?|magic numbers of ([\w, ]+)\?", text) or [("", "")])[-1]
    said = dict(re.findall(r"special magic (\w+) number is: (\d+)\.", text))
    return " " + ", ".join(said.get(city, "0") for city in (asked[0] or asked[1]).split(", "))


@pytest.mark.parametrize("settings", [{}, {"needles": 4, "distractors": 5}], ids=["single", "multi"])
def test_needles_are_found_by_who_knows(monkeypatch, tiny, settings):
    grid = NeedleGrid(lengths=(600, 2000), depths=(0.0, 0.5, 1.0), trials=3, forced=False, **settings)
    known = answered_by(monkeypatch, numbers_of, WORDS)
    result = grid(*tiny, WORDS)
    assert [cell["score"] for cell in result["cells"]] == [1.0] * 6
    assert {cell["length"]: cell["samples"] for cell in result["cells"]} == {600: 3, 2000: 3}
    for length, rows in ((600, known.prompts[-9:]), (2000, known.prompts[:9])):
        assert all(0.9 * length < len(row) < length for row in rows), "filled, with room for the answer"
    for solve in (
        silent,
        copier,
        lambda text: f" 0 {numbers_of(text)}",
    ):  # the last has the number, not first
        answered_by(monkeypatch, solve, WORDS)
        scores = [cell["score"] for cell in grid(*tiny, WORDS)["cells"]]
        assert max(scores) == (0.75 if "0 " in solve("") and settings else 0)


def test_needles_without_generation_of_models_that_do_not_know(monkeypatch, tiny):
    """The likeliest tokens are none, a copy of the token before, or those of another needle: no cell counts any."""
    grid = NeedleGrid(lengths=(600,), depths=(0.0, 1.0), trials=3)
    assert grid.forced

    def likeliest(says):
        def found(model, params, rows, places, **_):
            right = [np.asarray(row)[np.asarray(place)] for row, place in zip(rows, places)]
            before = [np.asarray(row)[np.asarray(place) - 1] for row, place in zip(rows, places)]
            others = [*right[1:], right[0]]  # numbers of the same length, of other trials
            return {"right": right, "nothing": [0 * x for x in right], "copy": before, "others": others}[says]

        return found

    for says, score in (("right", 1), ("nothing", 0), ("copy", 0), ("others", 0)):
        monkeypatch.setattr(forced, "likeliest", likeliest(says))
        assert [cell["score"] for cell in grid(*tiny, WORDS)["cells"]] == [score] * 2, says


def test_the_depth_of_a_needle(tmp_path):
    (tmp_path / "book.txt").write_text(" ".join(f"This is sentence {i}." for i in range(50)))
    for path in (None, str(tmp_path / "book.txt")):
        hay = Haystack(WORDS, path, owner="NeedleGrid.text")
        for depth in (0.0, 0.3, 1.0):
            text, tokens = hay.filled(500, hidden=[(depth, "\nNEEDLE.\n")], before="Book: ", after="END")
            assert tokens == len(WORDS.encode(text)) and 480 < tokens <= 500
            before = text.removeprefix("Book: ").partition("\nNEEDLE.\n")[0]
            assert abs(len(before) / (len(text) - 18) - depth) < 0.03
            assert not before or before[-1] in ".!?"
        assert hay.filled(3, hidden=[(0.5, "\nNEEDLE.\n")]) is None
    with pytest.raises(UserError, match="change NeedleGrid.text"):
        Haystack(WORDS, str(tmp_path / "nothing.txt"), owner="NeedleGrid.text")


def value_of(text):
    key = re.findall(r"(?:of the key '|Key: \"?)([0-9a-f-]+)", text)[-1]
    found = re.findall(rf"['\"]{key}['\"](?: =|:) ['\"]([0-9a-f-]+)['\"]", text)
    return f" It is {found[0]}." if found else "unknown"


@pytest.mark.parametrize("form", records.FORMS)
def test_values_are_found_by_who_knows(monkeypatch, tiny, form):
    task = KeyValue(form=form, lengths=(1000, 3000), trials=4, max_new_tokens=60)
    known = answered_by(monkeypatch, value_of, WORDS)
    result = task(*tiny, WORDS)
    assert [cell["score"] for cell in result["cells"]] == [1.0] * 6
    assert all(0.9 * 3000 < len(row) <= 3000 - 60 for row in known.prompts[:12])
    answered_by(monkeypatch, value_of, WORDS, window=1000)
    scores = {(c["length"], c["position"]): c["score"] for c in task(*tiny, WORDS)["cells"]}
    assert scores[1000, 0.2] == scores[3000, 0.8] == 1 and scores[3000, 0.2] == scores[3000, 0.5] == 0
    for solve in (silent, lambda text: text[-120:]):
        answered_by(monkeypatch, solve, WORDS)
        assert not any(cell["score"] for cell in task(*tiny, WORDS)["cells"])


def test_values_do_not_collide():
    pairs = records.distinct(records.FORMS["uuid"], 3000, np.random.default_rng(0))
    assert len({key for key, _ in pairs}) == len({value for _, value in pairs}) == 3000
    few = dataclasses.replace(
        records.FORMS["uuid"], pair=lambda rng: (str(rng.integers(9)), str(rng.integers(9)))
    )
    with pytest.raises(UserError, match="no 10 different values"):
        records.distinct(few, 10, np.random.default_rng(0))


def test_fails_unscaled_passes_scaled(monkeypatch, tiny):
    """h2oGPT's test: beyond its window a model finds nothing, with scaling it does."""
    task = KeyValue(lengths=(2000,), positions=(0.2,), trials=3)
    for window, score in ((900, 0), (None, 1)):
        answered_by(monkeypatch, value_of, WORDS, window=window)
        assert task(*tiny, WORDS)["cells"][0]["score"] == score


def test_records_of_lost_in_the_middle(monkeypatch, tiny, reference):
    path = str(reference / "data" / "eval" / "kv-retrieval-75_keys.jsonl.gz")
    task = KeyValue(form="json", file=path, positions=(0.0, 0.5, 1.0), trials=5)
    trials, _ = task.made(tiny[0], WORDS)
    first = records.read(path)[0]
    assert len(first.pairs) == 75 and trials[0].value == first.value
    assert trials[0].prompt.startswith(
        "Extract the value corresponding to the specified key in the JSON object below.\n\nJSON data:\n"
        f'{{"{first.key}": "{first.value}",\n "'
    )
    assert trials[0].prompt.endswith(f'"}}\n\nKey: "{first.key}"\nCorresponding value:')
    data = trials[5].prompt.partition("JSON data:\n")[2].partition("\n\nKey")[0]
    assert list(json.loads(data)).index(first.key) == 37 and len(json.loads(data)) == 75
    answered_by(monkeypatch, value_of, WORDS)
    assert [cell["score"] for cell in task(*tiny, WORDS)["cells"]] == [1.0] * 3


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("{}", "line 1: KeyError"),
        ("[", "line 1: JSONDecodeError"),
        ('{"ordered_kv_records": [["a", "b"]], "key": "c", "value": "d"}', "not among its records"),
        ('{"ordered_kv_records": [["a"]], "key": "c", "value": "d"}', "line 1: ValueError"),
        ("", "holds no record"),
    ],
)
def test_files_that_are_no_records(tmp_path, line, found):
    (tmp_path / "kv.jsonl").write_text(line)
    with pytest.raises(UserError, match=rf"{found}.*change KeyValue.file"):
        records.read(str(tmp_path / "kv.jsonl"))


def test_prompts_of_a_sentencepiece_model_count(reference):
    tokenizer = load_tokenizer(reference / "data" / "tokenizers" / "llama2")
    model = tiny_model(vocab_size=32000, max_position_embeddings=64)
    for task in (KeyValue(lengths=(2000,), trials=2), KeyValue(form="helmet", lengths=(2000,), trials=2)):
        for trial in task.made(model, tokenizer)[0]:
            assert 1900 < trial.tokens <= 2000
            assert (
                trial.tokens
                == len(special_tokens(tokenizer).before)
                + len(tokenizer.encode(trial.prompt))
                + task._new_tokens
            )


def test_recall_rows():
    tokens, places = Recall(pairs=6, rows=20, power=0.5).made(96, 65)
    for row, place in zip(tokens, places):
        said = dict(zip(row[:12:2], row[1:12:2]))
        assert len(said) == 6 and max(said) <= 32 < min(said.values())
        assert [row[p] for p in place] == [said[row[p - 1]] for p in place]
        assert (row[12:] != 0).sum() == 12 and len(set(place.tolist())) == 6
    assert len({tuple(row) for row in tokens.tolist()}) == 20
    # A small exponent puts the queries soon after the pairs.
    early, even = (Recall(pairs=6, rows=50, power=p).made(512, 65)[1].mean() for p in (0.01, 1.0))
    assert early < 0.7 * even


def test_kept_answers_without_generation(tmp_path, monkeypatch):
    model, params = induction(64, context=128)
    task = Recall(lengths=(64,), rows=4)
    with journal.keeping(tmp_path / "kept.jsonl", "a"):
        first = task(model, params, None)
    monkeypatch.setattr(forced, "_batch", None)
    with journal.keeping(tmp_path / "kept.jsonl", "a") as kept:
        assert task(model, params, None) == first and kept.reused == 4


@pytest.mark.parametrize(
    ("make", "found"),
    [
        (lambda: NeedleGrid(depths=(2.0,)), "NeedleGrid.depths"),
        (lambda: NeedleGrid(needles=9, distractors=9), "at most 12 together"),
        (lambda: NeedleGrid(needles=0), "NeedleGrid.needles is 0"),
        (lambda: KeyValue(form="xml"), "KeyValue.form is 'xml'"),
        (lambda: KeyValue(file="x"), "set KeyValue.form"),
        (lambda: KeyValue(form="json", file="x", lengths=(9,)), "no effect"),
        (lambda: KeyValue(model_template="[INST]"), "task_template"),
        (lambda: KeyValue(positions=()), "KeyValue.positions"),
        (lambda: Recall(power=0), "Recall.power"),
        (lambda: Recall().made(20, 258), "rows of 20 tokens are too short"),
        (lambda: Recall(vocabulary=300).made(64, 258), "lower Recall.vocabulary"),
        (lambda: Recall().made(64, 10), "give 4 keys"),
    ],
)
def test_settings_that_cannot_be(make, found):
    with pytest.raises(UserError, match=found):
        make()


def test_lengths_that_are_too_short(tiny):
    with pytest.raises(UserError, match="30 tokens are too short"):
        NeedleGrid(lengths=(30,))(*tiny, WORDS)
    with pytest.raises(UserError, match="100 tokens are too short"):
        KeyValue(lengths=(100,))(*tiny, WORDS)
