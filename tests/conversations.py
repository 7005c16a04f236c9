"""Conversations of every kind, written to files and read from them; what transformers makes of each."""

import json

import chat_templates as files
import pytest

from lcx.data import Dataset


def turns(*contents, system=None):
    """user, assistant, user, ..."""
    first = [] if system is None else [{"role": "system", "content": system}]
    return first + [{"role": ("user", "assistant")[i % 2], "content": c} for i, c in enumerate(contents)]


TOOL = {"type": "function", "function": {"name": "weather", "description": "<b>Weather</b> é",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}}}  # fmt: skip
FUNCTION = {"name": "weather", "arguments": {"city": "Köln"}}
CALL = {"role": "assistant", "content": None, "tool_calls": [{"type": "function", "function": FUNCTION}]}
PARTS = [{"type": "text", "text": "one "}, {"type": "text", "text": "two"}]
CONVERSATIONS = {
    "plain": {"messages": turns("hello", "hello there", "how are you?", "general", system="be brief")},
    "no system": {"messages": turns("hello", "there")},
    "empty": {"messages": turns("", "", "hello", "")},
    "unicode": {"messages": turns("Größe 你好", "😀👩‍👩‍👧 naïve 🙂", "é", "日本語の文。🙂")},
    "special tokens": {"messages": turns("say <|im_end|> or </s>", "<s>[INST] no <|eot_id|><|im_start|>")},
    "white space": {"messages": turns("  a \n", "\n\n  b  \n", "\t", "  ")},
    "ends with user": {"messages": turns("hello", "there", "and?")},
    "assistant first": {"messages": turns("hello", "there")[1:] + turns("hi", "ho")},
    "consecutive": {"messages": [*turns("a", "b"), *turns("c", "d")[1:], *turns("e", "f")[:1], *turns("g", "h")]},
    "extra fields": {"messages": [{**m, "name": None, "weight": 1} for m in turns("a", "b")], "id": 3},
    "tools": {"messages": [*turns("weather?"), CALL, {"role": "tool", "content": "<12> °C"}, *turns("x", "warm")[1:]],
              "tools": [TOOL]},
    "parts": {"messages": [{"role": "user", "content": PARTS}, *turns("x", "three")[1:]]},
    "kwargs": {"messages": turns("a", "b"), "chat_template_kwargs": {"bos_token": "<pad>"}},
}  # fmt: skip


def write_rows(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def read(path, tokenizer, **settings):
    """[(ids, mask)] of all documents."""
    dataset = Dataset(str(path), tokenizer=str(tokenizer), eval_fraction=0, **settings)
    return [
        (ids.tolist(), mask.astype(int).tolist())
        for ids, mask in zip(dataset.document_tokens("train"), dataset.document_masks("train"), strict=True)
    ]


def oracle(tokenizer, row, **options):
    """What transformers says: ids, and the mask of the generation blocks."""
    more = row.get("chat_template_kwargs", {})
    return tokenizer.apply_chat_template(
        row["messages"], tools=row.get("tools"), tokenize=True, return_dict=True, **more, **options
    )


@pytest.fixture(name="cache", autouse=True)
def cache_fixture(tmp_path, monkeypatch):
    monkeypatch.setenv("LCX_CACHE", str(tmp_path / "cache"))


@pytest.fixture(name="folders", scope="module")
def folders_fixture(tmp_path_factory):
    root = tmp_path_factory.mktemp("tokenizers")
    templates = files.TEMPLATES | {"forgetful": files.FORGETFUL}
    return {name: files.write_tokenizer(root / name, text) for name, text in templates.items()}


@pytest.fixture(name="theirs", scope="module")
def theirs_fixture(folders):
    transformers = pytest.importorskip("transformers")
    return {name: transformers.AutoTokenizer.from_pretrained(folder) for name, folder in folders.items()}
