"""RULER: samples of the published generator, every known flaw of such tools, models that must score 100."""

import itertools
import json
import random

import numpy as np
import pytest
from answering import Words, answered_by, copier, ruler, silent
from tiny_runs import tiny_model

from lcx.data import ByteTokenizer, load_tokenizer
from lcx.errors import UserError
from lcx.evals.ruler import Ruler
from lcx.evals.support import journal
from lcx.evals.support.ruler import published, scores, vocabulary
from lcx.evals.support.ruler.lengths import Lengths

pytest.importorskip("wonderwords")
BYTES, WORDS = ByteTokenizer(), Words()
ESSAY = " ".join(
    f"In the year {i} Mr Smith sold {i * 7} pots of paint. Was it much? It was!" for i in range(900)
)


@pytest.fixture(scope="module")
def tiny():
    return tiny_model(vocab_size=WORDS.vocab_size, max_position_embeddings=64), {}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Questions in the layouts of SQuAD and HotpotQA, an essay; (paths, all questions with their answers)."""
    folder = tmp_path_factory.mktemp("ruler")
    paragraphs = [
        {
            "context": f"The town of A{a}P{p} has a bridge from {1700 + 10 * a + p}. It is made of stone.",
            "qas": [
                {
                    "question": f"From when is the bridge of A{a}P{p}?",
                    "answers": [{"text": f"{1700 + 10 * a + p}"}, {"text": f"from {1700 + 10 * a + p}"}],
                    **({"is_impossible": False} if a else {}),  # version 1.1 does not have the field
                },
                {"question": "Is there a lake?", "answers": [], "is_impossible": True},
            ],
        }
        for a, p in itertools.product(range(6), range(5))
    ]
    articles = [{"paragraphs": paragraphs[5 * a : 5 * a + 5]} for a in range(6)]
    (folder / "squad.json").write_text(json.dumps({"data": articles}))
    hotpot = [
        {
            "question": f"Where was the author of book {i} born?",
            "answer": f"town {i}",
            "context": [
                [f"Book {i}", [f"It is by writer {i}."]],
                [f"Writer {i}", [f"Born in town {i}.", " A man."]],
            ],
        }
        for i in range(20)
    ]
    (folder / "hotpot.json").write_text(json.dumps(hotpot))
    (folder / "essay.txt").write_text(ESSAY)
    golds = [(q["question"], [a["text"] for a in q["answers"]]) for p in paragraphs for q in p["qas"]]
    golds += [(one["question"], [one["answer"]]) for one in hotpot]
    paths = {name: str(folder / f"{name}.json") for name in ("squad",)}
    return {**paths, "hotpotqa": str(folder / "hotpot.json"), "essays": str(folder / "essay.txt")}, golds


def material(files):
    return published.Material(ESSAY, files[0]["squad"], files[0]["hotpotqa"])


@pytest.mark.parametrize("name", ["niah_single_1", "vt"])
def test_samples_of_the_published_generator(reference, name):
    folder = reference / "reference" / "ruler"
    tokenizer = load_tokenizer(folder / "word_tokenizer")
    lines = (folder / "L4096" / name / "validation.jsonl").read_text().splitlines()
    made = published.samples(name, tokenizer=tokenizer, length=4096, count=len(lines))
    for line, sample in zip(lines, made, strict=True):
        expected = json.loads(line)
        found = sample.to_json()
        for field in ("input", "outputs", "answer_prefix", "length", "length_w_model_temp"):
            assert found[field] == expected[field], field
        if "token_position_answer" in expected:  # and with it `index`, which RULER overwrites
            place = found["input"].index(expected["outputs"][0])
            assert place == expected["index"]
            assert len(tokenizer.encode(found["input"][:place])) == expected["token_position_answer"]


@pytest.mark.parametrize("length", [1536, 4096])
@pytest.mark.parametrize("name", published.TASKS)
def test_every_sample_fits_and_is_filled(files, name, length):
    """Prompt, answer and special tokens fit; what is counted in pieces is what the tokenizer gives for the whole."""
    made = list(
        published.samples(
            name, tokenizer=WORDS, length=length, count=3, material=material(files), reserved=1, seed=7
        )
    )
    for sample in made:
        whole = len(WORDS.encode(sample.input + sample.answer_prefix)) + published.TASKS[name].answer_tokens
        assert sample.length == whole < length
    assert len({sample.input for sample in made}) == 3
    # RULER shrinks a sample that is too long by 500 words of an essay, or by 10 documents.
    coarse = name.startswith("qa") or name in published.ESSAY
    assert max(sample.length for sample in made) > length * (0.3 if coarse else 0.9)


@pytest.mark.parametrize(
    "name", ["niah_single_1", "niah_multikey_3", "vt", "cwe", "fwe", "qa_1", "niah_multiquery"]
)
def test_short_lengths_end_with_an_error(files, name):
    """The published loops never end there (lm-evaluation-harness 2963, RULER with a tokenizer of bytes)."""
    with pytest.raises(UserError, match=rf"RULER {name}: 200 tokens are too short"):
        next(published.samples(name, tokenizer=BYTES, length=200, count=9, material=material(files)))
    for length in range(600, 2200, 400):  # between too short and long enough: either a sample or the error
        try:
            made = published.samples(name, tokenizer=BYTES, length=length, count=2, material=material(files))
            assert all(sample.length <= length for sample in made)
        except UserError as error:
            assert "too short" in str(error)


def test_a_tokenizer_that_joins_words_is_counted_whole():
    class Joined(ByteTokenizer):
        """Drops spaces after a full stop: tokens of pieces do not add up."""

        def encode(self, text, *, add_special_tokens=False):
            return super().encode(text.replace(".\nOne", "One").replace(". ", "."))

    made = list(published.samples("niah_single_1", tokenizer=Joined(), length=3000, count=5))
    for sample in made:
        assert sample.length == len(Joined().encode(sample.input + sample.answer_prefix)) + 128 <= 3000


def test_sides_of_words_are_counted_apart_unless_a_token_spans_both():
    class Joined(ByteTokenizer):
        def encode(self, text, *, add_special_tokens=False):
            return super().encode(text.replace("e-b", "@"))

    words = [random.Random(i).choice(vocabulary.pairs()) for i in range(2500)]
    for tokenizer, joins in ((ByteTokenizer(), False), (Joined(), True)):
        counted = Lengths(tokenizer)
        before = counted.whole("again.")
        for some in (words[:2200], words[2200:], []):
            expected = sum(counted.whole(f"again. {word}") - before for word in some)
            assert counted.compounds(some) == expected
        known = len(counted._pieces)
        counted.compounds([f"blue-b{i}" for i in range(9)])
        assert (" blue-b8" in counted._pieces) is joins and len(counted._pieces) > known


def test_a_tokenizer_without_tokens_ends_with_an_error():
    class Empty(ByteTokenizer):
        def encode(self, text, *, add_special_tokens=False):
            return np.zeros(0, np.int32)

    with pytest.raises(UserError, match="no token for a text"):
        next(published.samples("fwe", tokenizer=Empty(), length=4096))


def test_pairs_are_the_sorted_pairs():
    pairs = vocabulary.Pairs(["blue", "blue-eyed", "a", "green"], ["eye", "eyed-x", "fox", "ATM", "zoo"])
    names = [
        f"{a}-{n}"
        for a in ("blue", "blue-eyed", "a", "green")
        for n in ("eye", "eyed-x", "fox", "ATM", "zoo")
    ]
    assert list(pairs) == sorted(set(names))
    assert len(vocabulary.pairs()) == 6171620
    assert random.Random(1).choice(vocabulary.pairs()).count("-") >= 1


def test_common_words_fill_lengths_beyond_the_word_list(tmp_path, monkeypatch):
    """Other tools stop at the words of wonderwords, and their longest lists are shorter than the length."""
    monkeypatch.setattr(vocabulary, "single_words", lambda seed: tuple(f"word{i}" for i in range(100)))
    made = next(published.samples("cwe", tokenizer=WORDS, length=5000))
    assert 0.9 * 5000 < made.length <= 5000
    (tmp_path / "words.json").write_text(json.dumps({str(i): f"english{i}" for i in range(9000)}))
    own = published.Material(english_words=str(tmp_path / "words.json"))
    assert "english" in next(published.samples("cwe", tokenizer=WORDS, length=5000, material=own)).input
    bad = published.Material(english_words=str(tmp_path / "nothing.json"))
    with pytest.raises(UserError, match=r"nothing.json: .*change Ruler.english_words"):
        next(published.samples("cwe", tokenizer=WORDS, length=5000, material=bad))


def test_the_model_template_counts_and_surrounds_the_prompt():
    plain = next(published.samples("vt", tokenizer=BYTES, length=3000))
    made = next(
        published.samples("vt", tokenizer=BYTES, length=3000, model_template="[INST] {task_template} [/INST]")
    )
    assert made.input.startswith("[INST] Memorize") and made.input.endswith("in the text above. [/INST]")
    assert made.answer_prefix.endswith("they are: ") and plain.answer_prefix.endswith("they are: ")
    assert made.length == len(BYTES.encode(made.input + made.answer_prefix)) + 30 <= 3000
    with pytest.raises(UserError, match="task_template"):
        next(published.samples("vt", tokenizer=BYTES, length=3000, model_template="[INST]"))


def test_scores():
    assert scores.match_all(" The numbers are 12\x00AB.", ["12", "ab", "99"]) == pytest.approx(2 / 3)
    assert scores.match_part("nothing but Paris", ["London", "paris"]) == 1.0  # the average would be 0.5
    assert scores.match_all("", ["1"]) == 0 == scores.match_part("", ["1"])
    published = {
        4096: 96.6,
        8192: 96.3,
        16384: 95.2,
        32768: 93.2,
        65536: 87.0,
        131072: 81.2,
    }  # GPT-4-1106, table 3
    assert scores.weighted(published, increasing=True) == pytest.approx(89.0, abs=0.05)
    assert scores.weighted(published, increasing=False) == pytest.approx(94.1, abs=0.05)
    assert scores.effective_length(published) == 65536 and scores.effective_length({4096: 85.5}) is None
    # Over tasks, whatever the number of samples; a length that one task lacks has no average.
    assert scores.averages({"a": {1: 100.0, 2: 50.0}, "b": {1: 0.0}}) == {1: 50.0}


def evaluated(tiny, files, **settings):
    return Ruler(samples=3, **{**files[0], **settings})(*tiny, WORDS)


def test_a_model_that_knows_scores_100_in_all_13_tasks(monkeypatch, tiny, files):
    known = answered_by(monkeypatch, ruler(files[1]), WORDS)
    result = evaluated(tiny, files, lengths=(2048, 4096))
    assert {cell["task"] for cell in result["cells"]} == set(published.TASKS)
    assert [cell["score"] for cell in result["cells"]] == [1.0] * 26
    assert result["averages"] == {"2048": 100, "4096": 100} and result["effective_length"] == 4096
    assert max(map(len, known.prompts)) <= 4096 - 30, "the generated tokens have room"
    assert all(row[0] == WORDS.bos_id for row in known.prompts)


@pytest.mark.parametrize(
    "solve", [silent, copier, lambda text: "unknown 12 VAR"], ids=["silent", "copier", "constant"]
)
def test_models_that_do_not_know_score_0(monkeypatch, tiny, files, solve):
    answered_by(monkeypatch, solve, WORDS)
    result = evaluated(tiny, files, lengths=(2048,))
    assert [cell["score"] for cell in result["cells"]] == [0] * 13
    assert result["effective_length"] is None and "below 2048" in result["summary"]


def test_a_window_shows(monkeypatch, tiny, files):
    """100 where the window holds the prompt; beyond it what lies in the window, which for needles is its share."""
    answered_by(monkeypatch, ruler(files[1]), WORDS, window=2048)
    single = Ruler(tasks=("niah_multikey_2",), lengths=(2048, 8192), samples=40)(*tiny, WORDS)
    inside, beyond = (cell["score"] for cell in single["cells"])
    assert inside == 1 and abs(beyond - 2048 / 8192) < 0.2
    assert single["effective_length"] == 2048
    assert single["cells"][1]["low"] < 0.25 < single["cells"][1]["high"]
    every = evaluated(tiny, files, lengths=(2048, 8192))["cells"]
    assert {cell["score"] for cell in every if cell["length"] == 2048} == {1.0}
    beyond = {cell["task"]: cell["score"] for cell in every if cell["length"] == 8192}
    # Frequent words occur up to the end, and all documents of the two small files fit into the window.
    assert all(score < 1 for task, score in beyond.items() if task not in ("cwe", "fwe", "qa_1", "qa_2")), beyond


def test_answers_are_kept(monkeypatch, tiny, tmp_path, files):
    known = answered_by(monkeypatch, ruler(files[1]), WORDS)
    settings = {"tasks": ("niah_single_1", "vt"), "lengths": (2048,)}
    with journal.keeping(tmp_path / "kept.jsonl", "model a"):
        first = evaluated(tiny, files, **settings)
    lines = (tmp_path / "kept.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "kept.jsonl").write_text("".join(lines[:-1]) + lines[-1][:20])  # cut by a kill
    asked = len(known.prompts)
    with journal.keeping(tmp_path / "kept.jsonl", "model a"):
        assert evaluated(tiny, files, **settings) == first
    assert {tuple(row) for row in known.prompts[asked:]} == {tuple(known.prompts[asked])}, (
        "one answer was lost"
    )
    asked = len(known.prompts)
    with journal.keeping(tmp_path / "kept.jsonl", "model b"):
        evaluated(tiny, files, **settings)
    assert len({tuple(row) for row in known.prompts[asked:]}) == 6, "another model's answers do not count"


def test_what_cannot_be(tiny, files):
    with pytest.raises(UserError, match="niah_single_9"):
        Ruler(tasks=("niah_single_9",))
    with pytest.raises(UserError, match="none twice"):
        Ruler(lengths=(4096, 4096))
    with pytest.raises(UserError, match=r"set Ruler\.essays"):
        Ruler(tasks=("niah_single_2",), lengths=(4096,))(*tiny, WORDS)
    with pytest.raises(UserError, match=r"set Ruler\.squad"):
        Ruler(tasks=("qa_1",), lengths=(4096,))(*tiny, WORDS)
    with pytest.raises(UserError, match="not in the layout of hotpotqa"):
        Ruler(tasks=("qa_2",), hotpotqa=files[0]["squad"], lengths=(4096,))(*tiny, WORDS)
    with pytest.raises(UserError, match="holds 30 questions, expected 50"):
        Ruler(tasks=("qa_1",), squad=files[0]["squad"], lengths=(4096,))(*tiny, WORDS)
    with pytest.raises(UserError, match="tokenizer"):
        Ruler()(*tiny, None)


def test_default_lengths(monkeypatch, tiny, files):
    answered_by(monkeypatch, ruler(files[1]), WORDS)
    model = tiny[0].clone(parent=None, max_position_embeddings=1024)
    result = Ruler(samples=1)(model, tiny[1], WORDS)
    assert {cell["length"] for cell in result["cells"]} == {512, 1024, 2048}
    assert any("do not fit: " in note for note in result["notes"])  # vt in 512 bytes
    assert np.isfinite(list(result["averages"].values())).all()
    assert Ruler()._lengths(model.clone(parent=None, max_position_embeddings=40000))[0] == (
        4096,
        8192,
        16384,
        32768,
    )
