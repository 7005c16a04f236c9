"""Streaming text: whole characters only, nothing lost; prompts from files; the tokenizer of a checkpoint."""

import sys
import threading

import numpy as np
import pytest

import lcx
from lcx import terminal
from lcx.checkpoint import Checkpointer
from lcx.data import ByteTokenizer, load_tokenizer
from lcx.errors import UserError
from lcx.terminal import stream_text

TEXTS = [
    "Once upon a time, there was a cat.",
    "Grüße aus Łódź — 東京 is 東京, \N{GRINNING FACE}\N{FAMILY} and \N{GRINNING FACE}.",
    "  two spaces, then\n\n\tlines\r\nand a tail  ",
    "e\N{COMBINING ACUTE ACCENT} \N{ZERO WIDTH JOINER} 0\N{COMBINING ENCLOSING KEYCAP}",
]


def tokenizers(reference):
    folder = reference / "data/tokenizers"
    files = (folder / "llama2/tokenizer.model", folder / "vortex/tokenizer.json")
    return [ByteTokenizer(), *map(load_tokenizer, files)]


def pieces(tokenizer, ids, prompt=()):
    return list(terminal.whole_characters(tokenizer, iter(ids), prompt=prompt))


@pytest.mark.parametrize("text", TEXTS)
def test_pieces_are_the_text(text, reference):
    for tokenizer in tokenizers(reference):
        ids = tokenizer.encode(text).tolist()
        found = pieces(tokenizer, ids)
        assert "".join(found) == tokenizer.decode(ids)
        assert len(found) > len(text) / 6 and "\ufffd" not in "".join(found)


@pytest.mark.parametrize("text", TEXTS)
def test_pieces_continue_a_prompt(text, reference):
    """Cut between any two characters: the space of a first word stays, whatever the prompt ends with."""
    for tokenizer in tokenizers(reference):
        ids, cuts = tokenizer.encode(text).tolist(), 0
        for cut in range(1, len(ids)):
            before = tokenizer.decode(ids[:cut])
            if "\ufffd" not in before:
                assert before + "".join(pieces(tokenizer, ids[cut:], prompt=ids[:cut])) == tokenizer.decode(ids)
                cuts += 1
        assert cuts > 5


def test_half_a_character_waits():
    tokenizer = ByteTokenizer()
    ids = tokenizer.encode("a\N{GRINNING FACE}b").tolist()
    assert pieces(tokenizer, ids) == ["a", "\N{GRINNING FACE}", "b"]
    assert pieces(tokenizer, ids[:4]) == ["a", "\ufffd"]  # cut off by the end
    assert "".join(pieces(tokenizer, [0x80] * 100)) == "\ufffd" * 100
    assert len(pieces(tokenizer, [0x80] * 100)) > 1  # bytes that never become text are not held for ever
    assert pieces(tokenizer, [tokenizer.bos_id, 104, tokenizer.eos_id, 105]) == ["h", "i"]  # special ids are silent


def test_pieces_come_at_once():
    def ids():
        for byte in b"abc":
            produced.append(byte)
            yield byte

    produced: list[int] = []
    for piece in terminal.whole_characters(ByteTokenizer(), ids()):
        assert piece == chr(produced[-1])


def test_prompt_text(tmp_path):
    path = tmp_path / "prompt.txt"
    path.write_text("first\nsecond ü\n\n", encoding="utf-8")
    assert terminal.prompt_text(f"@{path}") == "first\nsecond ü\n"
    assert terminal.prompt_text("me@home\n") == "me@home\n"
    assert terminal.prompt_text("@@home") == "@home"
    assert terminal.prompt_text("") == ""
    path.write_bytes(b"ok \xff")
    with pytest.raises(UserError, match="invalid start byte at byte 3, expected UTF-8"):
        terminal.prompt_text(f"@{path}")
    with pytest.raises(UserError, match="No such file"):
        terminal.prompt_text(f"@{tmp_path / 'nothing'}")
    with pytest.raises(UserError, match="Is a directory"):
        terminal.prompt_text(f"@{tmp_path}")


@pytest.fixture
def stories(reference):
    return reference / "data/weights/stories260K"


def published(stories):
    return (stories / "stories260K.md").read_text().split("-t 0.0\n")[1].split("\n```")[0]


def test_stream_text_prints_the_published_text(stories, capsys, monkeypatch):
    monkeypatch.setattr(terminal, "_PATIENCE_S", 1e6)
    stream_text(checkpoint=str(stories / "hf"), prompt="")
    out, err = capsys.readouterr()
    assert out == published(stories) + "\n"
    said, speed = err.splitlines()
    assert said == "BOS before each prompt: yes; EOS after: no"
    assert speed.startswith("256 tokens; prompt of 1 and first token") and speed.endswith("tokens/s")


def test_stream_text_continues_a_prompt(stories, capsys, tmp_path):
    start, rest = published(stories)[:66], published(stories)[66:]
    (tmp_path / "prompt").write_text(start + "\n")
    for prompt in (start, f"@{tmp_path / 'prompt'}"):
        stream_text(checkpoint=str(stories / "hf"), prompt=prompt, max_new_tokens=60)
        out = capsys.readouterr().out.removesuffix("\n")
        assert len(out) > 100 and rest.startswith(out)


@pytest.mark.parametrize("patience, said", [(0.0, 1), (1e6, 0)])
def test_a_wait_for_the_first_token_is_explained(capsys, monkeypatch, patience, said):
    """Once, and only before the first token."""
    monkeypatch.setattr(terminal, "_PATIENCE_S", patience)
    done = threading.Event()
    monkeypatch.setattr(terminal, "_say", lambda line: (print(line, file=sys.stderr), done.set()))

    def ids():
        assert done.wait(60.0) if said else not done.is_set()
        yield from b"ab"

    terminal.show(ByteTokenizer(), ids())
    out, err = capsys.readouterr()
    assert out == "ab\n" and err.count("compiling the program for this prompt") == said


def test_text_in_text_out(stories):
    """Two prompts at once, each with what was published after it."""
    model, params = lcx.load(stories / "hf")
    tokenizer = lcx.load_tokenizer(stories / "hf")
    text = published(stories)
    found = lcx.generate_text(model, params, tokenizer, [text[:66], ""], max_new_tokens=60)
    assert all(len(one) > 100 for one in found)
    assert text[66:].startswith(found[0]) and text.startswith(found[1])
    assert lcx.generate_text(model, params, tokenizer, text[:66], max_new_tokens=60) == found[0]
    with pytest.raises(UserError, match="the prompt is a int, expected text; lcx.generate takes tokens"):
        lcx.generate_text(model, params, tokenizer, [3])
    for prompt in ("Once", ["Once"]):
        with pytest.raises(UserError, match="tokens is text, expected token ids: use lcx.generate_text"):
            lcx.generate(model, params, prompt, max_new_tokens=4)


def test_stream_text_from_lcx_checkpoints(stories, capsys, tmp_path):
    """Converted: the tokenizer's files lie in the workdir."""
    model, params = lcx.load(stories / "hf")
    lcx.save(tmp_path / "run", model, params, format="lcx", like=stories / "hf")
    for path in (tmp_path / "run", tmp_path / "run/checkpoints", tmp_path / "run/checkpoints/0"):
        assert terminal.tokenizer_of(str(path)).decode([403, 407]) == "Once upon"
    stream_text(checkpoint=str(tmp_path / "run"), prompt="", max_new_tokens=20)
    assert published(stories).startswith(capsys.readouterr().out.removesuffix("\n"))


def test_tokenizer_of_a_training_run(stories, tmp_path):
    """Trained: the checkpoint says which tokenizer it was."""
    for tokenizer in (ByteTokenizer(), load_tokenizer(stories / "hf")):
        folder = tmp_path / type(tokenizer).__name__ / "checkpoints"
        with Checkpointer(folder) as checkpointer:
            items = {"params": {"x": np.zeros(2, np.float32)}}
            checkpointer.save(7, items, json={"meta": {"tokenizer": tokenizer.to_json()}}, wait=True)
        found = lcx.load_tokenizer(folder.parent)
        assert found.to_json() == tokenizer.to_json()


def test_stream_text_refuses_bad_input(stories, tmp_path):
    checkpoint = str(stories / "hf")
    for changes, message in (
        (dict(temperature=-1.0), "temperature is -1.0"),
        (dict(max_new_tokens=0), "max_new_tokens is 0"),
        (dict(checkpoint=str(tmp_path)), "no checkpoint"),
        (dict(context_length=4096), "rope_scaling"),
    ):
        with pytest.raises(UserError, match=message):
            stream_text(**dict(checkpoint=checkpoint, prompt="Once") | changes)
