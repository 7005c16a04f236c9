"""Damaged and hostile tokenizer files: a tokenizer, or one line that says what is wrong; never anything else."""

import json
import os
import random
import time

import pytest
import tokenizer_fuzz
from tokenizer_fuzz import outcome, sentencepiece_bytes, small_tokenizer

import lcx
from lcx.data import (
    ByteTokenizer,
    check_vocabulary,
    json_files,
    load_tokenizer,
    save_tokenizer,
    tokenizer_from_json,
)
from lcx.errors import UserError


@pytest.fixture
def folder(tmp_path):
    pytest.importorskip("tokenizers")
    small_tokenizer(tmp_path)
    return tmp_path


def refusal(path):
    with pytest.raises(UserError) as caught:
        load_tokenizer(path)
    line = str(caught.value)
    assert "\n" not in line and len(line) < 1000
    return line


@pytest.mark.parametrize("part", range(4))
def test_damage_of_every_kind(tmp_path, part):
    pytest.importorskip("tokenizers")
    found = set()
    for case in range(60):
        rng = random.Random(f"{part}/{case}")
        folder = tmp_path / str(case)
        folder.mkdir()
        tokenizer_fuzz.one_case(folder, rng)
        found.add(outcome(folder) == "read")
    assert found == {True, False}


JSON_FILES = ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"]
JSON_FILES += ["generation_config.json", "config.json", "lcx_tokenizer.json"]


@pytest.mark.parametrize("name", JSON_FILES)
@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"[" * 100_000 + b"]" * 100_000, "nested too deeply|is not a readable tokenizer"),
        (b"\xff\xfe{}", "not UTF-8|is not a readable tokenizer"),
        (b"[1, 2]", "expected a JSON object|is not a readable tokenizer"),
        (b'{"a": 1', "not readable JSON|is not a readable tokenizer"),
        (b"1" * 5000, "not readable JSON|expected a JSON object|is not a readable tokenizer"),
    ],
)
def test_what_is_no_json_object(folder, name, content, said):
    (folder / name).write_bytes(content)
    line = refusal(folder)
    assert str(folder / name) in line
    assert any(part in line for part in said.split("|"))


@pytest.mark.parametrize(
    ("name", "key", "value", "said"),
    [
        ("tokenizer_config", "bos_token", 7, "bos_token is 7, expected a token"),
        ("tokenizer_config", "bos_token", {"content": 7}, "bos_token is a dict, expected a token"),
        ("tokenizer_config", "tokenizer_class", ["x"], "tokenizer_class is a list, expected a string"),
        ("tokenizer_config", "add_bos_token", "no", "add_bos_token is 'no', expected true or false"),
        ("tokenizer_config", "added_tokens_decoder", {"-1": {"content": "x"}}, "expected token ids as keys"),
        (
            "tokenizer_config",
            "added_tokens_decoder",
            {str(2**40): {"content": "x"}},
            "expected token ids as keys",
        ),
        ("tokenizer_config", "bos_token", "\ud800", "expected a token"),
        ("added_tokens", "<new>", 2**40, "expected a token id"),
        ("added_tokens", "<new>", -1, "expected a token id"),
        ("special_tokens_map", "eos_token", [1], "expected a token"),
        ("generation_config", "eos_token_id", "2", "expected a token id"),
        ("generation_config", "eos_token_id", [2, float("nan")], "expected a token id"),
        ("config", "tokenizer_class", 3, "tokenizer_class is 3, expected a string"),
    ],
)
def test_values_of_the_wrong_type(folder, name, key, value, said):
    path = folder / f"{name}.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    if name == "config":
        (folder / "tokenizer_config.json").unlink()
    if name == "tokenizer_config":
        (folder / "special_tokens_map.json").unlink()
    assert said in refusal(folder) and str(path) in refusal(folder)


def change_vocabulary(folder, change):
    path = folder / "tokenizer.json"
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


def test_vocabularies_that_cannot_be_used(folder):
    whole = (folder / "tokenizer.json").read_text()

    def line(change):
        (folder / "tokenizer.json").write_text(whole)
        change_vocabulary(folder, change)
        return refusal(folder)

    def empty(data):
        data["model"] |= {"vocab": {}, "merges": []}
        data |= {"added_tokens": [], "post_processor": None}

    for name in ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"):
        os.rename(folder / name, folder / f"{name}.away")
    assert "is empty, expected ids from 0 to" in line(empty)
    assert "has ids up to 4294967295" in line(lambda data: data["model"]["vocab"].update(huge=2**32 - 1))
    assert "not a readable tokenizer" in line(lambda data: data["model"]["vocab"].update(huge=2**32))
    assert "not a readable tokenizer" in line(lambda data: data["model"]["vocab"].update(low=-1))

    def unknown_id(data):
        data["post_processor"]["special_tokens"]["<s>"]["ids"] = [5000]

    assert "it adds id 5000, which the vocabulary does not have" in line(unknown_id)

    def twice(data):
        data["post_processor"]["single"] *= 2

    assert "it does more than add tokens around a text" in line(twice)


def test_a_panic_of_the_library_is_one_line(folder, capfd):
    """pyo3's PanicException is no Exception, and Rust writes a report of its own on stderr."""
    panics = {"type": "Precompiled", "precompiled_charsmap": "AAAA"}
    change_vocabulary(folder, lambda data: data.update(normalizer=panics))
    assert "is not a readable tokenizer (PanicException" in refusal(folder)
    assert "panicked" not in capfd.readouterr().err


def test_files_that_are_no_files(folder):
    (folder / "tokenizer_config.json").unlink()
    (folder / "tokenizer_config.json").mkdir()
    assert "tokenizer_config.json is not a regular file" in refusal(folder)
    (folder / "tokenizer_config.json").rmdir()
    os.mkfifo(folder / "tokenizer_config.json")
    start = time.monotonic()
    assert "tokenizer_config.json is not a regular file" in refusal(folder)
    assert time.monotonic() - start < 60  # it is not waited for a writer
    (folder / "tokenizer_config.json").unlink()
    (folder / "tokenizer_config.json").symlink_to("nowhere")
    assert "is a link to a file that does not exist" in refusal(folder)
    (folder / "tokenizer_config.json").unlink()
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer.json").mkdir()
    assert "tokenizer.json is not a regular file" in refusal(folder)
    assert "is neither a file nor a folder" in refusal("/dev/null")
    for target, said in (("/dev/null", "is not a regular file"), ("config.json", "cannot be read")):
        (folder / "config.json").unlink()
        (folder / "config.json").symlink_to(target)
        with pytest.raises(UserError, match=f"config.json {said}"):
            lcx.load_tokenizer(folder)
    assert "does not exist" in refusal("a\0b")
    assert "cannot be read" in refusal("x" * 5000) or "does not exist" in refusal("x" * 5000)


def test_too_large_a_file_is_not_read(folder):
    with open(folder / "tokenizer_config.json", "wb") as stream:
        stream.truncate(json_files.MAX_BYTES + 1)
    assert f"expected at most {json_files.MAX_BYTES:,}" in refusal(folder)


def test_a_key_that_occurs_twice_is_said(folder, caplog):
    (folder / "tokenizer_config.json").write_text('{"bos_token": "</s>", "bos_token": "<s>"}')
    assert load_tokenizer(folder).bos_id == 1
    assert "the key 'bos_token' occurs more than once; the last value is used" in caplog.text


@pytest.mark.parametrize("name", ["../other/tokenizer.json", "/etc/passwd", "..", "a/b", "a\\..\\b/c"])
def test_a_record_names_a_file_in_its_own_folder(folder, tmp_path, name):
    saved = tmp_path / "saved"
    save_tokenizer(load_tokenizer(folder), saved)
    record = json.loads((saved / "lcx_tokenizer.json").read_text())
    (saved / "lcx_tokenizer.json").write_text(json.dumps(record | {"file": name}))
    assert "expected one in the same folder" in refusal(saved)


def test_a_record_does_not_lead_out_of_its_folder(folder, tmp_path):
    saved = tmp_path / "saved"
    save_tokenizer(load_tokenizer(folder), saved)
    (saved / "tokenizer.json").unlink()
    record = json.loads((saved / "lcx_tokenizer.json").read_text())
    elsewhere = record | {"path": str(folder / "tokenizer.json")}
    (saved / "lcx_tokenizer.json").write_text(json.dumps(elsewhere))
    assert "does not exist; copy the tokenizer next to the checkpoint" in refusal(saved)
    (saved / "tokenizer.json").symlink_to(folder / "tokenizer.json")
    assert "is a link out of its folder" in refusal(saved)
    # A training run's own record may say where its tokenizer was, and then the checksum must be the same.
    assert (
        tokenizer_from_json(elsewhere).encode("hi").tolist() == load_tokenizer(folder).encode("hi").tolist()
    )
    with pytest.raises(UserError, match="its checksum differs"):
        tokenizer_from_json(elsewhere | {"sha256": "0" * 64})


def test_records_of_before_still_load(folder, tmp_path):
    """They have no settings: those beside the file count, and the special ids of the record."""
    saved = tmp_path / "saved"
    now = load_tokenizer(folder)
    save_tokenizer(now, saved)
    record = json.loads((saved / "lcx_tokenizer.json").read_text())
    del record["settings"]
    (saved / "lcx_tokenizer.json").write_text(json.dumps(record | {"bos_id": None}))
    old = load_tokenizer(saved)
    assert old.bos_id is None and old.eos_id == now.eos_id and old.stop_ids == now.stop_ids
    assert old.encode("hi </s>").tolist() == now.encode("hi </s>").tolist()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"kind": 3}, "kind is 3, expected a string"),
        ({"vocab_size": "x"}, "vocab_size is 'x', expected a number of ids"),
        ({"vocab_size": 2**70}, "expected a number of ids"),
        ({"bos_id": -1}, "bos_id is -1, expected a token id"),
        ({"eos_id": 300}, "does not hold id 300"),
    ],
)
def test_a_damaged_record_of_bytes(tmp_path, change, said):
    (tmp_path / "lcx_tokenizer.json").write_text(json.dumps(ByteTokenizer().to_json() | change))
    assert said in refusal(tmp_path)


def test_damaged_sentencepiece_models(tmp_path):
    pytest.importorskip("tokenizers")
    whole = sentencepiece_bytes()
    path = tmp_path / "tokenizer.model"
    for data in (b"", b"\n", whole[:1000], b"x" * 100, b"\xff" * 50, whole + b"\x0a\xff\xff\xff\xff\x7f"):
        path.write_bytes(data)
        assert "is not a readable sentencepiece model" in refusal(tmp_path)
    path.write_bytes(b"IQ== 0\nIg== 1\n")
    assert "is a tiktoken model, which holds" in refusal(tmp_path)


def test_text_that_is_no_text(folder):
    for tokenizer in (ByteTokenizer(), load_tokenizer(folder)):
        with pytest.raises(UserError) as caught:
            tokenizer.encode("half of a pair: \ud800")
        assert "\n" not in str(caught.value)
        assert tokenizer.decode([-1, 2**31, 2**70, 10**6]) == ""


def test_unknown_text_without_an_unknown_token(tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    library = tokenizers.Tokenizer(tokenizers.models.WordLevel({"hi": 0}, unk_token="<unk>"))
    library.save(str(tmp_path / "tokenizer.json"))
    tokenizer = lcx.load_tokenizer(tmp_path)
    assert tokenizer.encode("hi").tolist() == [0]
    with pytest.raises(UserError, match="cannot encode a text of 2 characters"):
        tokenizer.encode("ho")
    with pytest.raises(UserError, match="cannot encode one of 2 texts"):
        tokenizer.encode_batch(["hi", "ho"])


def test_an_id_beyond_the_model_is_refused_without_memory(folder):
    (folder / "added_tokens.json").unlink()
    change_vocabulary(folder, lambda data: data["model"]["vocab"].update(far=2**31 - 2))
    with pytest.raises(UserError, match="2147483647 ids but the model's vocab_size is 512"):
        check_vocabulary(load_tokenizer(folder), 512)
