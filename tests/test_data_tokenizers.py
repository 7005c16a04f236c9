"""Tokenizers against the libraries themselves, and the round trip through a folder."""

import json
import shutil

import numpy as np
import pytest

from lcx.data import ByteTokenizer, check_vocabulary, load_tokenizer, save_tokenizer, tokenizer_from_json
from lcx.data.tokenizers import Tokenizer, identity
from lcx.errors import UserError

TEXTS = [
    "Once upon a time, there was a girl named Lily.",
    "  two leading spaces\n\nand lines\t",
    "naïve — “quotes” ☃ 𝄞 日本",
    "",
    "x",
    "ACGTNacgt",
    "a </s> in the text",
]


def test_bytes():
    tokenizer = load_tokenizer("bytes")
    assert isinstance(tokenizer, ByteTokenizer) and isinstance(tokenizer, Tokenizer)
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.vocab_size) == (256, 257, 258)
    for text in TEXTS:
        ids = tokenizer.encode(text)
        assert ids.dtype == np.int32 and ids.tolist() == list(text.encode())
        assert tokenizer.decode(ids) == text
        assert tokenizer.decode([256, *ids, 257, 300, -1]) == text
    assert tokenizer.decode([0xE2, 0x98]) == "\ufffd"  # half of a character

    dna = ByteTokenizer(bos_id=None, eos_id=0, vocab_size=512)
    assert dna.decode([65, 67, 0]) == "AC"
    assert tokenizer_from_json(json.loads(json.dumps(dna.to_json()))) == dna
    with pytest.raises(UserError, match="does not hold id 257; raise vocab_size"):
        ByteTokenizer(vocab_size=256)


@pytest.mark.parametrize("name", ["babyllama105", "stories260K"])
def test_hugging_face_folder_equals_transformers(reference, name):
    transformers = pytest.importorskip("transformers")
    folder = reference / "data" / "weights" / name / "hf"
    ours, theirs = load_tokenizer(folder), transformers.AutoTokenizer.from_pretrained(folder)
    assert isinstance(ours, Tokenizer)
    assert (ours.bos_id, ours.eos_id, ours.vocab_size) == (
        theirs.bos_token_id,
        theirs.eos_token_id,
        len(theirs),
    )
    stories = (
        (reference / "data" / "text" / "tinystories_train_2MiB.txt")
        .read_text()[:20_000]
        .split("<|endoftext|>")
    )
    for text in TEXTS + stories:
        ids = ours.encode(text)
        assert ids.dtype == np.int32
        assert ids.tolist() == theirs.encode(text, add_special_tokens=False)
        expected = theirs.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        assert ours.decode(ids) == expected
    for one, text in zip(ours.encode_batch(stories), stories, strict=True):
        assert np.array_equal(one, ours.encode(text))


def test_vortex_tokenizer_json(reference):
    library = pytest.importorskip("tokenizers")
    path = reference / "data" / "tokenizers" / "vortex" / "tokenizer.json"
    ours, theirs = load_tokenizer(path), library.Tokenizer.from_file(str(path))
    assert ours.bos_id is None and ours.eos_id is None
    assert ours.vocab_size == max(theirs.get_vocab().values()) + 1
    for text in TEXTS:
        assert ours.encode(text).tolist() == theirs.encode(text, add_special_tokens=False).ids
        assert ours.decode(ours.encode(text)) == theirs.decode(ours.encode(text).tolist())


def test_llama2_sentencepiece(reference):
    transformers, sentencepiece = pytest.importorskip("transformers"), pytest.importorskip("sentencepiece")
    folder = reference / "data" / "tokenizers" / "llama2"
    ours, theirs = load_tokenizer(folder), transformers.LlamaTokenizer.from_pretrained(folder)
    library = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    assert (ours.vocab_size, ours.bos_id, ours.eos_id) == (32000, 1, 2)
    novel = (reference / "data" / "text" / "novels" / "Lee_Brown_1884.txt").read_text()[:50_000]
    words = " ".join(novel.split())  # sentencepiece and transformers 5 differ where spaces follow each other
    assert ours.encode(words).tolist() == library.encode(words)
    for text in [*TEXTS, novel, "hi  <s>a</s> b", "<s>hi", " x", "a  b"]:
        ids = ours.encode(text)
        assert ids.tolist() == theirs(text, add_special_tokens=False).input_ids and ids.dtype == np.int32
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)
    assert ours.decode([1, *ours.encode("a b"), 2, 32000, 99999, -1]) == "a b"
    for one, text in zip(ours.encode_batch(TEXTS), TEXTS, strict=True):
        assert np.array_equal(one, ours.encode(text))
    assert load_tokenizer(folder / "tokenizer.model") == ours


@pytest.mark.parametrize(
    "place", ["weights/babyllama105/hf", "tokenizers/llama2", "tokenizers/vortex", "bytes"]
)
def test_saved_beside_a_checkpoint_and_loaded_again(reference, tmp_path, place):
    tokenizer = load_tokenizer(place if place == "bytes" else reference / "data" / place)
    save_tokenizer(tokenizer, tmp_path / "step")
    save_tokenizer(tokenizer, tmp_path / "step")
    shutil.move(tmp_path / "step", tmp_path / "moved")
    again = load_tokenizer(tmp_path / "moved")
    assert identity(again) == identity(tokenizer)
    for text in TEXTS:
        assert np.array_equal(again.encode(text), tokenizer.encode(text))
    save_tokenizer(again, tmp_path / "moved")  # onto itself
    assert identity(load_tokenizer(tmp_path / "moved")) == identity(tokenizer)
    described = json.loads(json.dumps(tokenizer.to_json()))
    assert identity(tokenizer_from_json(described)) == identity(tokenizer)
    assert not list((tmp_path / "moved").glob("*.partial"))


def test_other_libraries_find_the_saved_files(reference, tmp_path):
    transformers = pytest.importorskip("transformers")
    tokenizer = load_tokenizer(reference / "data" / "weights" / "stories260K" / "hf")
    save_tokenizer(tokenizer, tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert theirs.encode(TEXTS[0], add_special_tokens=False) == tokenizer.encode(TEXTS[0]).tolist()
    assert theirs.bos_token_id == tokenizer.bos_id


def minimal_tokenizer_json(folder):
    tokenizers = pytest.importorskip("tokenizers")
    model = tokenizers.models.WordLevel(
        {"<unk>": 0, "<s>": 1, "</s>": 2, "<e>": 3, "hi": 4}, unk_token="<unk>"
    )
    library = tokenizers.Tokenizer(model)
    library.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    library.add_special_tokens(["<unk>", "<s>", "</s>", "<e>"])
    library.save(str(folder / "tokenizer.json"))


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, (None, None, ())),
        ({"tokenizer_config": {"bos_token": "<s>", "eos_token": {"content": "<e>"}}}, (1, 3, (3,))),
        ({"config": {"bos_token_id": 1, "eos_token_id": 2}}, (None, 2, (2,))),  # BOS is the tokenizer's alone
        ({"generation_config": {"eos_token_id": [3, 2]}, "config": {"eos_token_id": 2}}, (None, 3, (3, 2))),
        (
            {"tokenizer_config": {"eos_token": "</s>"}, "generation_config": {"eos_token_id": [3, 2]}},
            (None, 2, (2, 3)),
        ),
        # An explicit null means "none", whatever the model's configuration says.
        (
            {"tokenizer_config": {"bos_token": None, "eos_token": "<e>"}, "config": {"bos_token_id": 1}},
            (None, 3, (3,)),
        ),
    ],
)
def test_special_ids_come_from_the_configs(tmp_path, files, expected):
    minimal_tokenizer_json(tmp_path)
    for name, content in files.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    tokenizer = load_tokenizer(tmp_path)
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.stop_ids) == expected
    assert tokenizer.encode("hi hi").tolist() == [4, 4]


def test_what_is_not_a_tokenizer(tmp_path):
    def fails(path, match):
        with pytest.raises(UserError, match=match) as caught:
            load_tokenizer(path)
        assert "\n" not in str(caught.value)

    fails(tmp_path / "typo", 'does not exist; expected "bytes"')
    fails(tmp_path, "no tokenizer.json and no sentencepiece .model")
    (tmp_path / "vocab.json").write_text("{}")
    fails(tmp_path, "vocab.json but no tokenizer.json and no sentencepiece .model; make")
    (tmp_path / "tokenizer.json").write_text('{"version": "1.0", "trunc')
    fails(tmp_path, "not a readable tokenizer")
    (tmp_path / "x.bin").write_text("x")
    fails(tmp_path / "x.bin", "neither a tokenizer.json nor")
    models = tmp_path / "models"
    models.mkdir()
    (models / "a.model").write_text("x")
    fails(models, "not a readable sentencepiece model")
    (models / "b.model").write_text("x")
    fails(models, "several .model files .a.model, b.model.")


def test_a_changed_file_beside_a_checkpoint_is_refused(tmp_path):
    minimal_tokenizer_json(tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    save_tokenizer(tokenizer, tmp_path / "step")
    described = tokenizer.to_json()
    file = tmp_path / "step" / "tokenizer.json"
    file.write_text(file.read_text().replace('"hi"', '"ho"'))
    with pytest.raises(UserError, match="its checksum differs"):
        load_tokenizer(tmp_path / "step")
    file.unlink()
    with pytest.raises(UserError, match="does not exist; copy the tokenizer"):
        load_tokenizer(tmp_path / "step")
    assert tokenizer_from_json(described, folder=tmp_path / "step") == tokenizer  # still where it was
    with pytest.raises(UserError, match="kind 'words' is unknown"):
        tokenizer_from_json({"kind": "words"})


def test_vocabulary_of_tokenizer_and_model():
    check_vocabulary(ByteTokenizer(), 258)
    check_vocabulary(ByteTokenizer(), 512)
    with pytest.raises(UserError, match="258 ids but the model's vocab_size is 257"):
        check_vocabulary(ByteTokenizer(), 257)
