"""`python -m lcx.serve`: a started process, the shape of its answers, the key/value test over HTTP, wrong requests."""

import contextlib
import dataclasses
import http.client
import json
import re
import signal
import socket
import subprocess
import sys
import threading

import jax
import numpy as np
import pytest
from answering import Known, Words
from doc_world import write_tokenizer
from test_retrieval import induction, value_of
from tiny_runs import tiny_model

import lcx
from lcx.data import ByteTokenizer
from lcx.errors import UserError
from lcx.evals.key_value import KeyValue
from lcx.model import init_params
from lcx.serving import completions
from lcx.serving import server as serving
from lcx.serving.completions import Completer
from lcx.serving.request import parsed

SERVE = """
import runpy, signal
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell lets its background jobs ignore it
runpy.run_module("lcx.serve", run_name="__main__")
"""
BYTES = ByteTokenizer(bos_id=None, eos_id=None, vocab_size=256)


@contextlib.contextmanager
def served(model, params, tokenizer, name="m"):
    """The port of a server in this process."""
    with serving._bound("127.0.0.1", 0) as server:
        server.completer = Completer(model, params, tokenizer, name)
        server.server_activate()
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        try:
            yield server.server_address[1]
        finally:
            server.shutdown()
            thread.join()


def ask(port, body=None, *, path="/v1/completions", method=None, headers=None):
    """(status, answer) of one request; `body` is bytes or becomes JSON."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
    data = body if isinstance(body, bytes | None) else json.dumps(body).encode()
    connection.request(method or ("GET" if body is None else "POST"), path, data, headers or {})
    answer = connection.getresponse()
    return answer.status, json.loads(answer.read())


@pytest.fixture(scope="module")
def port():
    """Of a server of an induction head: it goes on as the prompt went on before."""
    with served(*induction(256, context=64), BYTES, name="induction") as port:
        yield port


def test_a_started_process_answers_like_the_library(tmp_path):
    model = tiny_model(max_position_embeddings=64)
    params = init_params(model, jax.random.key(0))
    lcx.save(tmp_path / "model", model, params, format="hf")
    write_tokenizer(tmp_path / "model")
    tokenizer = lcx.load_tokenizer(tmp_path / "model")
    command = [sys.executable, "-c", SERVE, f"--checkpoint={tmp_path}/model", "--port=0", "--name=tiny"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stderr is not None
        line = next((line for line in process.stderr if "serving" in line), "")
        found = re.fullmatch(r"serving tiny at http://127\.0\.0\.1:(\d+)/v1\n", line)
        assert found, line
        status, answer = ask(
            int(found[1]), {"prompt": "ab", "max_tokens": 6, "temperature": 0, "model": "tiny"}
        )
        assert status == 200 and answer["usage"]["completion_tokens"] <= 6
        expected = lcx.generate_text(model, params, tokenizer, "ab", max_new_tokens=6)
        assert answer["choices"][0]["text"] == expected
        line = process.stderr.readline()
        assert line.startswith("127.0.0.1 POST /v1/completions 200 "), line
    finally:
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 130


def test_values_over_http(monkeypatch):
    """The key/value test of a server: a model that knows finds all values, one with a window those within it."""
    words = Words()
    model = tiny_model(vocab_size=words.vocab_size, max_position_embeddings=4000)
    for window, far in ((None, 1.0), (900, 0.0)):
        known = Known(value_of, words, window=window)
        monkeypatch.setattr(
            "lcx.serving.completions.sampler.stream",
            lambda *args, known=known, **given: iter(known(*args, **given).T),
        )
        with served(model, {}, words) as port:
            url = f"http://127.0.0.1:{port}/v1"
            task = KeyValue(
                lengths=(2000,), positions=(0.0, 1.0), trials=3, max_new_tokens=60, batch_size=2, server=url
            )
            result = task(model, None, words)
        assert [cell["score"] for cell in result["cells"]] == [far, 1.0]
        assert result["notes"] == [f"answered by m at {url}, not by the checkpoint"]
        trials, _ = task.made(model, words)
        assert known.prompts == [[words.bos_id, *words.encode(trial.prompt).tolist()] for trial in trials]


def test_a_server_that_is_not_one(port):
    task = KeyValue(lengths=(60,), trials=1, max_new_tokens=4)
    model = tiny_model(vocab_size=256)
    for url, found in (
        ("ftp://127.0.0.1/v1", "expected a URL such as"),
        ("http://127.0.0.1:1/v1", "start the server"),
        (f"http://127.0.0.1:{port}/v2", "there is nothing at '/v2/models'"),
    ):
        with pytest.raises(UserError, match=rf"{re.escape(found)}.*change KeyValue.server"):
            dataclasses.replace(task, server=url)(model, None, BYTES)
    with pytest.raises(UserError, match="no effect on a server"):
        KeyValue(server="http://a/v1", add_bos=True)
    with pytest.raises(UserError, match="set KeyValue.server"):
        KeyValue(server_model="m")


def test_stops_copies_and_probabilities(port):
    """An induction head goes on as the text went on before, so every answer is known."""
    base = {"prompt": "abcdefgabc", "max_tokens": 4, "temperature": 0}
    assert text(port, **base) == "defg"
    assert text(port, **base, stop=["x", "f"]) == "de"
    assert text(port, **base, stop="de", echo=True) == "abcdefgabc"
    assert text(port, **{**base, "prompt": list(b"abcdefgabc")}) == "defg"
    answer = ask(port, {**base, "prompt": ["abcdeab", "xyzx"], "max_tokens": 2, "n": 2})[1]
    assert [choice["text"] for choice in answer["choices"]] == ["cd", "cd", "yz", "yz"]
    assert answer["usage"] == {"prompt_tokens": 11, "completion_tokens": 8, "total_tokens": 19}
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2, 3]
    whole = ask(port, {**base, "max_tokens": 0, "echo": True, "logprobs": 2})[1]["choices"][0]
    assert whole["text"] == base["prompt"] and whole["finish_reason"] == "length"
    logprobs = whole["logprobs"]
    assert logprobs["tokens"] == list("abcdefgabc") and logprobs["text_offset"] == list(range(10))
    scores = logprobs["token_logprobs"]
    assert scores[0] is None and min(scores[-2:]) > -1e-3 > max(scores[1:-2]), "only b and c could be known"
    assert next(iter(logprobs["top_logprobs"][-1])) == "c" and len(logprobs["top_logprobs"][-1]) == 2
    new = ask(port, {**base, "logprobs": 0})[1]["choices"][0]["logprobs"]
    assert new["text_offset"] == [10, 11, 12, 13]
    assert (
        new["tokens"] == list("defg") and min(new["token_logprobs"]) > -1e-3 and new["top_logprobs"] is None
    )


def text(port, **body):
    status, answer = ask(port, body)
    assert status == 200, answer
    return answer["choices"][0]["text"]


def test_probabilities_are_those_of_a_forward_pass():
    model = tiny_model(vocab_size=64)
    params = init_params(model, jax.random.key(1))
    tokens = np.random.default_rng(0).integers(0, 64, 20).tolist()
    own, ids, values = completions.likelihoods(model, params, tokens, 3)
    logits = np.asarray(lcx.logits(model, params, [tokens])[0], np.float64)
    logp = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    np.testing.assert_allclose(own[1:], logp[np.arange(19), tokens[1:]], atol=1e-5)
    order = np.argsort(-logp[:-1], -1)[:, :3]
    np.testing.assert_array_equal(ids[1:], order)
    np.testing.assert_allclose(values[1:], np.take_along_axis(logp[:-1], order, -1), atol=1e-5)


@pytest.mark.parametrize(
    ("body", "status", "found"),
    [
        (b"nope", 400, "not JSON"),
        (b"[" * 100000, 400, "not JSON"),
        (b"\xff", 400, "not JSON"),
        ([], 400, "the request is a list"),
        ({}, 400, "prompt is missing"),
        ({"prompt": []}, 400, "prompt is missing"),
        ({"prompt": [[], []]}, 400, "a prompt is a list"),
        ({"prompt": [1, -2]}, 400, "a prompt is a number"),
        ({"prompt": [1, 256]}, 400, "token id 256 is outside the vocabulary"),
        ({"prompt": ""}, 400, "the prompt is empty"),
        ({"prompt": "\ud800"}, 400, "unpaired surrogate"),
        ({"prompt": "a", "max_tokens": 400}, 400, "more than the window of 64"),
        ({"prompt": "a", "max_tokens": 0}, 400, "max_tokens is 0"),
        ({"prompt": "a", "max_tokens": 1.5}, 400, "max_tokens is 1.5"),
        ({"prompt": "a", "temperature": -1}, 400, "temperature is -1"),
        (b'{"prompt": "a", "temperature": NaN}', 400, "temperature is a number out of range"),
        ({"prompt": "a", "top_p": 0}, 400, "top_p is 0"),
        ({"prompt": "a", "seed": 2**40}, 400, "seed is"),
        ({"prompt": "a", "n": 100}, 400, "n is 100"),
        ({"prompt": ["a"] * 40, "n": 2}, 400, "40 prompts with n 2"),
        ({"prompt": "a", "stop": [""]}, 400, "stop is no text"),
        ({"prompt": "a", "echo": 1}, 400, "echo is a number"),
        ({"prompt": "a", "logprobs": 99}, 400, "logprobs is 99"),
        ({"prompt": "a", "stream": True}, 400, "stream is not supported"),
        ({"prompt": "a", "logit_bias": {"3": 1}}, 400, "logit_bias is not supported"),
        ({"prompt": "a", "max_new_tokens": 3}, 400, "'max_new_tokens' is no field"),
        ({"prompt": "a", "best_of": 2}, 400, "best_of is 2"),
        ({"prompt": "a", "model": "other"}, 404, "there is no model 'other'"),
    ],
)
def test_requests_that_cannot_be(port, body, status, found):
    got, answer = ask(port, body)
    assert got == status and found in answer["error"]["message"] and "\n" not in answer["error"]["message"]
    assert answer["error"].keys() == {"message", "type", "param", "code"}


def test_wrong_paths_and_bodies(port, capfd):
    assert ask(port, path="/health") == (200, {"status": "ok"})
    assert ask(port, path="/v1/models/induction")[1]["id"] == "induction"
    assert ask(port, path="/v1/completions")[0] == 405
    assert ask(port, {}, path="/v1/chat/completions")[0] == 404
    assert ask(port, b"x", method="DELETE")[0] == 501
    for line in (
        b"GET /\x1b[31m HTTP/1.1\r\nConnection: close\r\n\r\n",
        b"nonsense\r\n\r\n",
        b"\x1b[31m / HTTP/9.9\r\n\r\n",
    ):
        with socket.create_connection(("127.0.0.1", port), 30) as raw:
            raw.sendall(line)
            assert b'{"error": {"message"' in raw.makefile("rb").read()
    assert ask(port, b"", headers={"Content-Length": "999999999999"})[0] == 413
    assert ask(port, b"", headers={"Transfer-Encoding": "chunked"})[0] == 411
    with socket.create_connection(("127.0.0.1", port)) as broken:
        broken.sendall(b"POST /v1/completions HTTP/1.1\r\nContent-Length: 90\r\n\r\nshort")
    assert ask(port, path="/health")[0] == 200, "the server goes on"
    assert "\x1b" not in capfd.readouterr().err


def test_a_port_in_use_and_a_fault(port, monkeypatch):
    with pytest.raises(UserError, match=f"127.0.0.1:{port}: .*change --host or --port"):
        serving._bound("127.0.0.1", port)
    with pytest.raises(UserError, match="--port is 70000"):
        serving.serve(checkpoint="x", port=70000)
    monkeypatch.setattr(Completer, "complete", lambda self, rows, request: 1 / 0)
    status, answer = ask(port, {"prompt": "a"})
    assert status == 500 and "ZeroDivisionError" in answer["error"]["message"]


def test_defaults_are_those_of_the_published_interface():
    request = parsed({"prompt": "a", "user": "me", "seed": None, "frequency_penalty": 0, "stream": False})
    assert (request.max_tokens, request.temperature, request.top_p, request.n) == (16, 1.0, 1.0, 1)
