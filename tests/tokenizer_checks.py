"""Tiny tokenizers written in many conventions, and the comparison of ours with those of transformers."""

import json

import pytest

from lcx.data import special_tokens
from lcx.data.chat_templates import chat_templates
from lcx.data.tokenizers import encode_all

TEXTS = [
    "",
    "hi",
    " hi",
    "  two  spaces ",
    "<s>hi",
    "hi  <s>a</s> b",
    "</s>",
    " <s> x<|im_start|>user\nq<|im_end|>",
    "a\r\nb\n\n c\t",
    "naïve — ☃ 𝄞 日本 e\u0301",
    "nul\x00l",
    "12345 6 7.89 don't I'LL",
    "<unk><pad><|endoftext|><img>",
    "▁under\u00a0nbsp",
    " " * 37 + "a" + "ab " * 2000,
]
ADDED = {"lstrip": False, "rstrip": False, "single_word": False, "normalized": False, "special": True}
IM_END = {"content": "<|im_end|>", **ADDED}


@pytest.fixture(name="transformers", scope="module")
def transformers_fixture():
    library = pytest.importorskip("transformers")
    library.logging.set_verbosity_error()
    return library


@pytest.fixture(name="trained", scope="module")
def trained_fixture(tmp_path_factory):
    """A byte-level BPE and a Metaspace BPE with byte fallback, both tiny, with a template that adds BOS."""
    library = pytest.importorskip("tokenizers")
    from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

    corpus = [
        "the hinder  hill hit him  ",
        "don't I'LL 123 naïve",
        "aab abab hi a b user\nq",
        "x y z -- 7.89",
    ] * 3
    special = ["<unk>", "<s>", "</s>", "<|im_start|>"]
    out = {}
    for name in ("bytes", "spaces"):
        if name == "bytes":
            made = library.Tokenizer(models.BPE())
            made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
            made.decoder = decoders.ByteLevel()
            alphabet = pre_tokenizers.ByteLevel.alphabet()
            extra = special
        else:
            made = library.Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
            made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
            made.decoder = decoders.Sequence(
                [
                    decoders.Replace("▁", " "),
                    decoders.ByteFallback(),
                    decoders.Fuse(),
                    decoders.Strip(" ", 1, 0),
                ]
            )
            alphabet, extra = ["▁"], [*special, *(f"<0x{i:02X}>" for i in range(256))]
        made.train_from_iterator(
            corpus, trainers.BpeTrainer(vocab_size=600, special_tokens=extra, initial_alphabet=alphabet)
        )
        made.post_processor = processors.TemplateProcessing(
            single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)]
        )
        data = json.loads(made.to_str())
        data["added_tokens"] = [t for t in data["added_tokens"] if not t["content"].startswith("<0x")]
        out[name] = data
    return out


def folder_of(path, files):
    """Writes JSON files and, for other types, bytes."""
    path.mkdir(exist_ok=True)
    for name, content in files.items():
        if isinstance(content, bytes):
            (path / name).write_bytes(content)
        else:
            (path / f"{name}.json").write_text(json.dumps(content))
    return path


def assert_equal(ours, theirs):
    """The same ids with and without special tokens, one by one and in a batch, text back, tokens for chat templates."""
    special = special_tokens(ours)
    for text in TEXTS:
        plain = list(theirs(text, add_special_tokens=False).input_ids)
        whole = list(theirs(text).input_ids)
        assert ours.encode(text).tolist() == plain, text
        assert ours.encode(text, add_special_tokens=True).tolist() == whole, text
        assert [*special.before, *plain, *special.after] == whole
        assert ours.decode(whole) == theirs.decode(whole, skip_special_tokens=True), text
    for asked in (False, True):
        many = encode_all(ours, TEXTS, add_special_tokens=asked)
        assert [ids.tolist() for ids in many] == [
            list(theirs(text, add_special_tokens=asked).input_ids) for text in TEXTS
        ]
    assert dict(chat_templates(ours).special_tokens) == theirs.special_tokens_map
    assert ours.bos_id == theirs.bos_token_id
    assert theirs.eos_token_id in (None, ours.eos_id)
    assert ours.vocab_size == max(theirs.get_vocab().values()) + 1
