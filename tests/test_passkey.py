"""Passkey: scored with models whose answers are known, prompts that hold the distance that they state."""

import json
import re
import textwrap

import jax
import numpy as np
import pytest
from tiny_runs import tiny_model

from lcx.data import ByteTokenizer, load_tokenizer, special_tokens
from lcx.errors import UserError
from lcx.evals import passkey
from lcx.evals.passkey import Passkey
from lcx.evals.support import answers, intervals
from lcx.model import init_params

BABY = "data/weights/babyllama105/hf"


@pytest.fixture(scope="module")
def tiny():
    model = tiny_model(intermediate_size=48, max_position_embeddings=64)
    return model, init_params(model, jax.random.key(0))


def fake_generate(answer):
    """In place of sampler.generate: `answer(text of the prompt)` as bytes, then EOS."""

    def generate(model, params, tokens, *, max_new_tokens, stop_tokens):
        assert stop_tokens == (257,)
        new = [[*answer(ByteTokenizer().decode(row)).encode()][:max_new_tokens] for row in tokens]
        return np.array([row + [257] * (max_new_tokens - len(row)) for row in new], np.int32)

    return generate


def found_key(text):
    return re.search(r"The pass key is (\d+)\.", text)[1]


def run_passkey(monkeypatch, tiny, answer, **settings):
    monkeypatch.setattr(answers.sampler, "generate", fake_generate(answer))
    return Passkey(context_length=1024, num_distances=8, trials=5, **settings)(*tiny, ByteTokenizer())


def test_passkey_of_a_perfect_copier(monkeypatch, tiny):
    result = run_passkey(monkeypatch, tiny, lambda text: f" {found_key(text)}. Remember it.")
    assert [d["rate"] for d in result["distances"]] == [1.0] * 8
    assert result["k_max"] == result["distances"][-1]["k"] and result["mean_rate"] == 1
    assert result["distances"][0]["wilson_low"] == pytest.approx(intervals.wilson(5, 5)[0])


@pytest.mark.parametrize(
    "answer",
    [
        lambda text: "",  # silent: the key stands in the prompt, which must not count
        lambda text: " 12345",
        lambda text: f" {found_key(text)}0",  # the key is only a part of the number
        lambda text: f" 1 {found_key(text)}",  # not the first integer
        lambda text: f" {found_key(text)[:3]} {found_key(text)[3:]}",
        lambda text: text[-80:],  # repeats the question
        lambda text: text,  # repeats the prompt, from its beginning
    ],
    ids=["silent", "constant", "longer", "second", "broken", "copier", "whole prompt"],
)
def test_passkey_of_models_that_do_not_know(monkeypatch, tiny, answer):
    result = run_passkey(monkeypatch, tiny, answer)
    assert [d["successes"] for d in result["distances"]] == [0] * 8
    assert result["k_max"] == 0 and result["summary"].startswith("k_max 0 of")


def test_a_constant_answer_is_right_where_the_key_is_that_number(monkeypatch, tiny):
    constant = str(Passkey(num_distances=8, trials=5).prompts(ByteTokenizer(), 1024)[3][2].key)
    result = run_passkey(monkeypatch, tiny, lambda text: constant)
    assert [d["successes"] for d in result["distances"]] == [0, 0, 0, 1, 0, 0, 0, 0]


def test_k_max_of_a_model_with_a_short_window(monkeypatch, tiny):
    def answer(text):
        return f" {found_key(text)}" if len(text) < 700 else " 0"

    result = run_passkey(monkeypatch, tiny, answer)
    inside = [d["k"] for d in result["distances"] if d["prompt_tokens"] < 701]
    assert 0 < len(inside) < 8 and result["k_max"] == max(inside)


def test_k_max_stops_at_the_first_distance_below_the_threshold():
    rows = [{"k": k, "successes": s, "trials": 10} for k, s in [(10, 9), (20, 2), (30, 1), (40, 10)]]
    assert passkey.k_max(rows, 0.2) == 20
    assert passkey.k_max(rows, 0.1) == 40
    assert passkey.k_max(rows, 0.95) == 0


@pytest.mark.parametrize(
    "name", ["bytes", "data/tokenizers/llama2/tokenizer.model", "data/tokenizers/vortex", BABY]
)
@pytest.mark.parametrize("full_length", [False, True])
def test_prompts_hold_the_distance_that_they_state(name, full_length, request):
    tokenizer = load_tokenizer(name if name == "bytes" else request.getfixturevalue("reference") / name)
    context = 1200
    rows = Passkey(num_distances=10, trials=3, full_length=full_length).prompts(tokenizer, context)
    assert len(rows) == 10 and all(len(row) == 3 for row in rows)
    sentence = max(len(tokenizer.encode(text)) for text in passkey.FILLER) + 4
    for row in rows:
        for prompt in row:
            assert len(prompt.tokens) + 10 <= context
            before = special_tokens(tokenizer).before
            assert tuple(prompt.tokens[: len(before)]) == before
            tail = tokenizer.decode(prompt.tokens[-prompt.distance :])
            assert tail.lstrip().startswith("is the pass key.") and str(prompt.key) not in tail
            assert tail.endswith("The pass key is")
            body = tokenizer.decode(prompt.tokens[: -prompt.distance])
            assert body.endswith(str(prompt.key))
            if full_length:
                assert len(prompt.tokens) + 10 > context - 3 * sentence
    longest = rows[-1][0].distance
    for i, row in enumerate(rows):
        assert abs(row[0].distance - longest * (i + 1) / 10) <= 2 * sentence or row[0].distance < sentence * 6
    assert longest > context - 10 - 2 * sentence - len(tokenizer.encode(passkey.TASK)) - 60
    keys = [prompt.key for row in rows for prompt in row]
    assert len(set(keys)) > 25 and all(10_000 <= key <= 99_999 for key in keys)


def test_the_prompt_in_words():
    prompt = passkey._build(ByteTokenizer(), 71432, after=6, before=2)
    assert ByteTokenizer().decode(prompt.tokens) == textwrap.dedent(
        """\
        There is an important info hidden inside a lot of irrelevant text. Find it and memorize them. I will quiz you \
about the important information there.
        The grass is green. The sky is blue.
        The pass key is 71432. Remember it. 71432 is the pass key.
        The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again. The grass is green.
        What is the pass key? The pass key is"""
    )


def test_prompts_are_built_in_linear_time():
    class Counting(ByteTokenizer):
        def encode(self, text):
            encoded.append(len(text))
            return super().encode(text)

    for context in (2_000, 20_000):
        encoded: list[int] = []
        rows = Passkey(num_distances=4, trials=1).prompts(Counting(), context)
        assert sum(encoded) < 6 * sum(len(row[0].tokens) for row in rows) + 10_000


def test_a_window_too_short_for_any_prompt_is_left(monkeypatch, tiny):
    """By default the distances then go beyond the window, and the result says so."""
    monkeypatch.setattr(answers.sampler, "generate", fake_generate(lambda text: found_key(text)))
    result = Passkey(num_distances=2, trials=2)(*tiny, ByteTokenizer())
    assert result["context_length"] == 256 and result["mean_rate"] == 1, "128 are too few"
    assert "does not fit the model's window of 64 tokens: measured up to 256" in result["notes"][0]
    assert Passkey(num_distances=2, trials=2, context_length=256)(*tiny, ByteTokenizer())["notes"] == []


def test_a_context_too_short_for_any_prompt(tiny):
    with pytest.raises(UserError, match="context of 64 tokens is too short, expected at least 2"):
        Passkey(context_length=64)(*tiny, ByteTokenizer())
    with pytest.raises(UserError, match="needs a tokenizer"):
        Passkey()(*tiny, None)


def test_batches_take_every_prompt_once_and_few_shapes():
    lengths = [100 + 30 * (i // 10) + i % 3 for i in range(320)]
    found = answers.batches(lengths, 16)
    assert sorted(i for batch in found for i in batch) == list(range(320))
    assert max(map(len, found)) <= 16
    longest = {-(-max(lengths[i] for i in batch) // 32) for batch in found}
    assert len(longest) <= 10
    assert answers.batches([5, 4], 16) == [[0, 1]]


def test_passkey_with_the_real_sampler(tiny):
    """A random model, end to end: runs, knows nothing, and says so."""
    result = Passkey(context_length=400, num_distances=2, trials=2, batch_size=3)(*tiny, ByteTokenizer())
    assert result["k_max"] == 0 and len(result["distances"]) == 2
    json.dumps(result)
