"""Folders of many conventions: the ids, special tokens and texts of transformers.AutoTokenizer on the same files."""

import importlib
import json
import pathlib
import shutil

import numpy as np
import pytest
from tokenizer_checks import (  # noqa: F401
    ADDED,
    IM_END,
    TEXTS,
    assert_equal,
    folder_of,
    trained_fixture,
    transformers_fixture,
)
from tokenizer_fuzz import sentencepiece_bytes

import lcx
from lcx.data import load_tokenizer, save_tokenizer, special_tokens, tokenizer_names
from lcx.data.tokenizers import encode_all, identity
from lcx.errors import UserError


def adds(data, template, tokens):
    """tokenizer.json with another post-processor."""
    pieces = [
        {"Sequence": {"id": "A", "type_id": 0}}
        if piece == "$A"
        else {"SpecialToken": {"id": piece, "type_id": 0}}
        for piece in template.split()
    ]
    table = {t: {"id": t, "ids": [i], "tokens": [t]} for t, i in tokens.items()}
    return data | {
        "post_processor": {
            "type": "TemplateProcessing",
            "single": pieces,
            "pair": [],
            "special_tokens": table,
        }
    }


STORED = ["<unk>", "<s>", "</s>", "<|im_start|>"]
PADDING = {
    "strategy": "BatchLongest", "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0, "pad_type_id": 0,
    "pad_token": "<img>",
}  # fmt: skip
BOS_EOS = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
# name: (vocabulary, changes of tokenizer.json, files beside it)
FOLDERS = {
    "alone": ("bytes", {}, {}),
    "llama 3": ("bytes", {}, {"tokenizer_config": {"tokenizer_class": "PreTrainedTokenizerFast", **BOS_EOS}}),
    "llama, byte level": (
        "bytes",
        {},
        {"tokenizer_config": {"tokenizer_class": "LlamaTokenizerFast", "add_bos_token": False, **BOS_EOS}},
    ),
    "llama": (
        "spaces",
        {},
        {
            "tokenizer_config": {"tokenizer_class": "LlamaTokenizer", **BOS_EOS},
            "config": {"model_type": "llama"},
        },
    ),
    "llama, legacy": (
        "spaces",
        {},
        {"tokenizer_config": {"tokenizer_class": "LlamaTokenizer", "legacy": True}},
    ),
    "llama, no prefix": (
        "spaces",
        {},
        {"tokenizer_config": {"tokenizer_class": "LlamaTokenizer", "add_prefix_space": False}},
    ),
    "code llama": (
        "spaces",
        {},
        {"tokenizer_config": {"tokenizer_class": "CodeLlamaTokenizer", "fill_token": None}},
    ),
    "mistral": (
        "spaces",
        {},
        {
            "tokenizer_config": {"tokenizer_class": "LlamaTokenizer", **BOS_EOS},
            "config": {"model_type": "mistral"},
        },
    ),
    "phi 3": (
        "spaces",
        {"post_processor": None},
        {
            "tokenizer_config": {
                "tokenizer_class": "LlamaTokenizer",
                "added_tokens_decoder": {"2": {"content": "</s>", **ADDED, "rstrip": True}, "600": IM_END},
                **BOS_EOS,
            },
            "config": {"model_type": "phi3"},
        },
    ),
    "qwen 2": (
        "bytes",
        {"post_processor": None},
        {
            "tokenizer_config": {
                "tokenizer_class": "Qwen2Tokenizer",
                "bos_token": None,
                "eos_token": "<|endoftext|>",
                "pad_token": "<|endoftext|>",
                "additional_special_tokens": ["<|im_start|>", "<|im_end|>"],
            },
            "config": {"model_type": "qwen2", "bos_token_id": 1, "eos_token_id": 2},
        },
    ),
    "qwen 3.5": ("bytes", {"post_processor": None}, {"config": {"model_type": "qwen3_5"}}),
    "gemma": ("spaces", {}, {"tokenizer_config": {"tokenizer_class": "GemmaTokenizer", **BOS_EOS}}),
    "gpt 2": (
        "bytes",
        {},
        {"tokenizer_config": {"tokenizer_class": "GPT2Tokenizer", "add_prefix_space": True}},
    ),
    "gpt neox": ("bytes", {}, {"config": {"model_type": "gpt_neox"}}),
    "cohere": ("bytes", {}, {"tokenizer_config": {"tokenizer_class": "CohereTokenizer", **BOS_EOS}}),
    "roberta": ("bytes", {}, {"tokenizer_config": {"tokenizer_class": "RobertaTokenizer"}}),
    "bart": ("bytes", {}, {"config": {"model_type": "florence2"}}),
    "older files": (
        "bytes",
        {},
        {
            "special_tokens_map": {"bos_token": "<s>", "pad_token": {"content": "<pad>", "lstrip": True}},
            "added_tokens": {"<|im_end|>": 600, "<pad>": 601},
        },
    ),
    "older files, by their own ids": (  # the library numbers the tokens of tokenizer.json anew
        "bytes",
        {"added_tokens": [{"id": 290 + i, "content": t, **ADDED} for i, t in enumerate(["<s>", "<pad>", "[SEP]"])]},
        {
            "tokenizer_config": {"bos_token": {"__type": "AddedToken", "content": "<img>", **ADDED}},
            "added_tokens": {"hi": 289, "<|im_end|>": 291, "[SEP]": 300, "<img>": 301},
        },
    ),
    "older files, names in objects": (
        "spaces",
        {},
        {
            "tokenizer_config": {"bos_token": {"__type": "AddedToken", "content": "<|im_end|>", **ADDED}},
            "special_tokens_map": {"pad_token": {"content": "<pad>", "lstrip": True}},
            "added_tokens": {"<|im_end|>": 600, "<pad>": 601},
        },
    ),
    "named additional tokens": (
        "bytes",
        {},
        {"tokenizer_config": {"additional_special_tokens": {"boi_token": "<img>", "x_token": "hi"}, **BOS_EOS}},
    ),
    "longformer": ("bytes", {}, {"tokenizer_config": {"tokenizer_class": "LongformerTokenizer"}}),
    "phi 3, by its former name": ("spaces", {}, {"tokenizer_config": {"tokenizer_class": "Phi3Tokenizer"}}),
    "split special tokens": (
        "bytes",
        {},
        {
            "tokenizer_config": {
                "tokenizer_class": "TokenizersBackend",
                "split_special_tokens": True,
                **BOS_EOS,
            }
        },
    ),
    "truncation": (
        "bytes",
        {"truncation": {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0}},
        {"tokenizer_config": {"model_max_length": 4, "image_token": "<img>", **BOS_EOS}},
    ),
    "padding": ("bytes", {"padding": PADDING}, {"tokenizer_config": BOS_EOS}),
    "padding, gpt 2": ("bytes", {"padding": PADDING}, {"tokenizer_config": {"tokenizer_class": "GPT2Tokenizer"}}),
    "padding, gpt neox": ("bytes", {"padding": PADDING}, {"config": {"model_type": "gpt_neox"}}),
    "padding, llama": ("spaces", {"padding": PADDING}, {"tokenizer_config": {"tokenizer_class": "LlamaTokenizer"}}),
    "not marked as special": (
        "bytes",
        {"added_tokens": [{"id": i, "content": text, **ADDED, "special": False} for i, text in enumerate(STORED)]},
        {"tokenizer_config": BOS_EOS},
    ),
    "cleans up": ("bytes", {}, {"tokenizer_config": {"clean_up_tokenization_spaces": True, **BOS_EOS}}),
}


@pytest.mark.parametrize("name", FOLDERS)
def test_folders_equal_auto_tokenizer(transformers, trained, tmp_path, name):
    vocabulary, changes, files = FOLDERS[name]
    data = trained[vocabulary] | changes
    folder = folder_of(tmp_path / "model", {"tokenizer": data, **files})
    ours, theirs = lcx.load_tokenizer(folder), transformers.AutoTokenizer.from_pretrained(folder)
    assert_equal(ours, theirs)
    save_tokenizer(ours, tmp_path / "saved")  # config.json, which may decide the class, is not copied
    again = lcx.load_tokenizer(tmp_path / "saved")
    assert identity(again) == identity(ours) and again.special == ours.special
    assert [again.encode(text).tolist() for text in TEXTS] == [ours.encode(text).tolist() for text in TEXTS]


@pytest.mark.parametrize("template", ["<s> $A </s>", "$A </s>", "<s> </s> $A", "$A"])
def test_special_tokens_are_those_of_the_post_processor(transformers, trained, tmp_path, template):
    data = adds(trained["bytes"], template, {"<s>": 1, "</s>": 2})
    files = {"tokenizer_config": BOS_EOS, "config": {"bos_token_id": 1, "eos_token_id": 2}}
    folder = folder_of(tmp_path / "model", {"tokenizer": data, **files})
    ours = load_tokenizer(folder)
    assert_equal(ours, transformers.AutoTokenizer.from_pretrained(folder))
    ids = {"<s>": 1, "</s>": 2}
    before, _, after = template.partition("$A")
    assert special_tokens(ours).before == tuple(ids[t] for t in before.split())
    assert special_tokens(ours).after == tuple(ids[t] for t in after.split())
    assert special_tokens(ours, add_bos=True, add_eos=True).before.count(1) == 1
    assert special_tokens(ours, add_bos=False, add_eos=False).ids == ()


SENTENCEPIECE = [
    {"tokenizer_class": "LlamaTokenizer"},
    {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True, "add_eos_token": True, "legacy": True},
    {
        "tokenizer_class": "LlamaTokenizerFast",
        "add_bos_token": True,
        "legacy": False,
        "add_prefix_space": False,
    },
    {
        "tokenizer_class": "LlamaTokenizer",
        "add_bos_token": True,
        "added_tokens_decoder": {"1": {"content": "<s>", **ADDED}, "300": IM_END},
        "additional_special_tokens": ["<|im_end|>"],
    },
    {"tokenizer_class": "CodeLlamaTokenizer", "fill_token": None},
    {"tokenizer_class": "GemmaTokenizer", "bos_token": "<s>", "eos_token": "</s>"},
    {"tokenizer_class": "PreTrainedTokenizerFast", "add_bos_token": True},
    {"bos_token": "<s>"},
]


@pytest.mark.parametrize("config", SENTENCEPIECE)
@pytest.mark.parametrize("older", [False, True])
def test_sentencepiece_folders_equal_auto_tokenizer(transformers, tmp_path, config, older):
    pytest.importorskip("sentencepiece")
    files = {"tokenizer.model": sentencepiece_bytes(), "tokenizer_config": config}
    if older:
        files |= {"special_tokens_map": {"pad_token": "</s>"}, "added_tokens": {"<|im_end|>": 280}}
    folder = folder_of(tmp_path / "model", files)
    ours = load_tokenizer(folder)
    assert_equal(ours, transformers.AutoTokenizer.from_pretrained(folder))
    save_tokenizer(ours, tmp_path / "saved")
    again = load_tokenizer(tmp_path / "saved")
    assert identity(again) == identity(ours) and again.special == ours.special
    assert again.encode(TEXTS[5]).tolist() == ours.encode(TEXTS[5]).tolist()


def test_a_sentencepiece_model_alone(transformers, tmp_path, caplog):
    """With no file of transformers beside it, as its own settings say: as LlamaTokenizer, or by sentencepiece."""
    library = pytest.importorskip("sentencepiece")
    llama = folder_of(tmp_path / "llama", {"tokenizer.model": sentencepiece_bytes()})
    ours = load_tokenizer(llama)
    assert_equal(ours, transformers.LlamaTokenizer.from_pretrained(llama))
    assert "no tokenizer_config.json names a class, so it is read like LlamaTokenizer" in caplog.text
    save_tokenizer(ours, tmp_path / "saved")  # which names the class, for other libraries too
    saved = transformers.AutoTokenizer.from_pretrained(tmp_path / "saved")
    assert_equal(load_tokenizer(tmp_path / "saved"), saved)
    other = folder_of(tmp_path / "unigram", {"spiece.model": sentencepiece_bytes(kind=1)})
    ours = load_tokenizer(other)
    theirs = library.SentencePieceProcessor(model_file=str(other / "spiece.model"))
    assert [ours.encode(text).tolist() for text in TEXTS] == theirs.encode(TEXTS)
    assert special_tokens(ours).ids == () and (ours.bos_id, ours.eos_id) == (1, 2)


def test_llama2_folder_equals_transformers(transformers, reference, tmp_path):
    """The published model, through a hub's cache of links."""
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "0f"
    folder_of(blobs, {})
    snapshot.mkdir(parents=True)
    shutil.copyfile(reference / "data" / "tokenizers" / "llama2" / "tokenizer.model", blobs / "0123")
    (blobs / "4567").write_text(json.dumps({"tokenizer_class": "LlamaTokenizer", "add_bos_token": True}))
    (snapshot / "tokenizer.model").symlink_to("../../blobs/0123")
    (snapshot / "tokenizer_config.json").symlink_to("../../blobs/4567")
    assert_equal(load_tokenizer(snapshot), transformers.AutoTokenizer.from_pretrained(snapshot))


def test_gpt2_of_two_files(transformers, reference, tmp_path):
    source = reference / "data" / "tokenizers" / "gpt2"
    for name in ("vocab.json", "merges.txt"):
        shutil.copyfile(source / name, tmp_path / name)
    alone = load_tokenizer(tmp_path)
    assert_equal(alone, transformers.GPT2Tokenizer.from_pretrained(tmp_path))
    folder_of(tmp_path, {"tokenizer_config": {"tokenizer_class": "GPT2Tokenizer", "add_bos_token": True}})
    ours = load_tokenizer(tmp_path)
    assert_equal(ours, transformers.AutoTokenizer.from_pretrained(tmp_path))
    assert special_tokens(ours).before == (50256,)
    save_tokenizer(ours, tmp_path / "saved")
    assert identity(load_tokenizer(tmp_path / "saved")) == identity(ours)
    folder_of(tmp_path, {"tokenizer_config": {"tokenizer_class": "GemmaTokenizer"}})
    with pytest.raises(
        UserError, match="tokenizer_class GemmaTokenizer, which does not read vocab.json: correct"
    ):
        load_tokenizer(tmp_path)
    (tmp_path / "saved" / "merges.txt").write_text("#version: 0.2\n")
    with pytest.raises(UserError, match="its checksum differs"):
        load_tokenizer(tmp_path / "saved")


def test_classes_are_those_of_transformers(transformers):
    """The tables hold every model type and every class of transformers with rules of its own."""
    auto = transformers.models.auto.tokenization_auto
    types = {kind: (name or "").removesuffix("Fast") for kind, name in auto.TOKENIZER_MAPPING_NAMES.items()}
    types |= {kind: "TokenizersBackend" for kind, name in types.items() if name == "MistralCommonBackend"}
    assert {kind: name for kind, name in types.items() if name} == tokenizer_names.REGISTERED
    assert auto.MODELS_WITH_INCORRECT_HUB_TOKENIZER_CLASS == tokenizer_names.OVERRULED
    known = tokenizer_names.REBUILT | tokenizer_names.PYTHON
    for name in {
        n.removesuffix("Fast") for n in dir(transformers) if n.endswith(("Tokenizer", "TokenizerFast"))
    }:
        found = auto.tokenizer_class_from_name(name) or auto.tokenizer_class_from_name(f"{name}Fast")
        if (
            issubclass(found, transformers.PreTrainedTokenizerBase)
            and name not in tokenizer_names.GENERIC_NAMES
        ):
            assert name in known or issubclass(found, getattr(transformers, tokenizer_names.ALIASES[name])), (
                name
            )
    slow = importlib.import_module("transformers.convert_slow_tokenizer")  # a function has the same name there
    for name in slow.SLOW_TO_FAST_CONVERTERS:  # names that dir() does not list
        found = auto.tokenizer_class_from_name(name)
        if found is not None and found.__name__ != name and found.__name__ in known:
            assert tokenizer_names.ALIASES[name] == found.__name__, name
    for kind in set(types) - set(transformers.models.auto.configuration_auto.CONFIG_MAPPING_NAMES):
        assert tokenizer_names.resolve(None, kind, byte_level=False) == "TokenizersBackend"


# ------------------------------------------------------------------------------------------------ what is refused

REFUSED = {
    "rules of its own": (
        {"tokenizer_config": {"tokenizer_class": "AlbertTokenizerFast"}},
        "AlbertTokenizer, whose own rules are not supported: save it with AutoTokenizer",
    ),
    "by its model type": (
        {"config": {"model_type": "xglm"}},
        "tokenizer_class XGLMTokenizer, whose own rules",
    ),
    "Python code": (
        {"tokenizer_config": {"tokenizer_class": "ByT5Tokenizer"}},
        "ByT5Tokenizer, whose rules are Python code of transformers that no tokenizer.json holds; if",
    ),
    "code of the folder": (
        {
            "tokenizer_config": {
                "tokenizer_class": "TikTokenTokenizer",
                "auto_map": {"AutoTokenizer": ["a.A", None]},
            }
        },
        "Python code of its own .auto_map., which is never run: remove auto_map if tokenizer.json is the whole",
    ),
    "files for each version": (
        {"tokenizer_config": {"fast_tokenizer_files": ["tokenizer.4.0.0.json"]}},
        "fast_tokenizer_files, .* is not supported: remove the key",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_read_as_transformers_reads_it_is_refused(trained, tmp_path, name):
    files, said = REFUSED[name]
    with pytest.raises(UserError, match=said):
        load_tokenizer(folder_of(tmp_path, {"tokenizer": trained["spaces"], **files}))


def word_pieces(**options):
    """tokenizer.json and tokenizer_config.json of a WordPiece vocabulary, without a pipeline."""
    library = pytest.importorskip("tokenizers")
    vocabulary = [*"ab,.ée'日", "##b", "hi", "[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    model = library.models.WordPiece({token: i for i, token in enumerate(vocabulary)}, unk_token="[UNK]")
    plain = json.loads(library.Tokenizer(model).to_str())
    return {"tokenizer": plain, "tokenizer_config": {"unk_token": "[UNK]", **options}}


BERTS = [
    {"tokenizer_class": "BertTokenizer"},
    {"tokenizer_class": "DistilBertTokenizerFast", "do_lower_case": False, "strip_accents": True},
    {
        "tokenizer_class": "BertTokenizer",
        "tokenize_chinese_chars": False,
        "clean_up_tokenization_spaces": True,
    },
]


@pytest.mark.parametrize("options", BERTS)
def test_word_pieces_equal_auto_tokenizer(transformers, tmp_path, options):
    folder = folder_of(tmp_path, word_pieces(**options))
    assert_equal(load_tokenizer(folder), transformers.AutoTokenizer.from_pretrained(folder))


def test_the_way_out_of_a_refused_class(transformers, tmp_path):
    """What the message says to do gives the ids of the class."""
    folder = folder_of(tmp_path / "funnel", word_pieces(tokenizer_class="FunnelTokenizer"))
    with pytest.raises(UserError, match="then set tokenizer_class to 'TokenizersBackend' in NEW"):
        load_tokenizer(folder)
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    theirs.save_pretrained(tmp_path / "new")
    config = json.loads((tmp_path / "new" / "tokenizer_config.json").read_text())
    folder_of(tmp_path / "new", {"tokenizer_config": config | {"tokenizer_class": "TokenizersBackend"}})
    assert_equal(load_tokenizer(tmp_path / "new"), theirs)


def test_a_text_that_codellama_reorders_is_refused(trained, tmp_path):
    config = {"tokenizer_class": "CodeLlamaTokenizer"}
    ours = load_tokenizer(folder_of(tmp_path, {"tokenizer": trained["spaces"], "tokenizer_config": config}))
    assert ours.encode("hi").size
    ways = (
        ours.encode,
        lambda text: encode_all(ours, ["hi", text]),
        lambda text: ours.encode_with_offsets([text]),
    )
    for way in ways:
        with pytest.raises(UserError, match="a text holds <FILL_ME>, .* or set fill_token to null in"):
            way("def f():<FILL_ME>return 1")


def test_the_pattern_of_older_mistral_folders(transformers, trained, tmp_path):
    """fix_mistral_regex replaces the pattern, in folders of the versions and model types that it is for."""
    model = trained["bytes"]["model"]
    words = {f"<{i}>": 600 + i for i in range(100_000)}
    data = trained["bytes"] | {"model": model | {"vocab": model["vocab"] | words}}
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "fix_mistral_regex": True}
    ids = []
    folder_of(tmp_path, {"tokenizer": data, "tokenizer_config": config})
    for version in ("5.0.0", "4.57.0"):
        folder_of(tmp_path, {"config": {"model_type": "mistral3", "transformers_version": version}})
        ours = load_tokenizer(tmp_path)
        ids.append(ours.encode("don't I'LL 12345").tolist())
    assert ids[0] != ids[1]
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for text in TEXTS:
        assert ours.encode(text).tolist() == theirs(text, add_special_tokens=False).input_ids


# ------------------------------------------------------------------------------------------------ the shared cases

CASES = {
    "plain": ([75, 76], 7322, 1, 2),
    "stored_truncation": ([75, 76], 7322, 1, 2),
    "no_bos_key": ([75, 76], 7322, None, 2),
    "adds_bos": ([1, 75, 76], 7323, 1, 2),
    "eos_only": ([75, 76], 7322, None, 2),
}


@pytest.mark.parametrize("name", CASES)
def test_cases(reference, transformers, name):
    folder = reference / "cases" / "tokenizers" / name
    text = (reference / "cases" / "tokenizers" / "text.txt").read_text()
    ours, theirs = lcx.load_tokenizer(str(folder)), transformers.AutoTokenizer.from_pretrained(folder)
    ids, count, bos, eos = CASES[name]
    assert ours.encode("hi", add_special_tokens=True).tolist() == ids
    assert ours.encode("hi").tolist() == [75, 76]
    whole = ours.encode(text, add_special_tokens=True)
    assert len(whole) == count and np.array_equal(whole, theirs(text).input_ids)
    assert (ours.bos_id, ours.eos_id) == (bos, eos)
    assert_equal(ours, theirs)


def test_tokens_of_a_text_do_not_depend_on_where_it_is_read(reference, tmp_path, monkeypatch):
    monkeypatch.chdir(reference / "cases" / "tokenizers")
    relative = load_tokenizer(pathlib.Path("adds_bos"))
    assert relative.special.before == (1,)
    monkeypatch.chdir(tmp_path)
    assert relative.encode("hi").tolist() == [75, 76]
