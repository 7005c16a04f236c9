"""From a file or a folder to a tokenizer: which vocabulary file, which class, which special ids."""

import dataclasses
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lcx.data import json_files, sentencepiece_model, tokenizer_build, tokenizer_classes
from lcx.data import tokenizer_settings as settings_of
from lcx.data.tokenizer_classes import GENERIC, PIPELINES
from lcx.data.tokenizer_libraries import FileTokenizer, HuggingFaceTokenizer, SentencePieceTokenizer
from lcx.data.tokenizer_settings import Settings, Token
from lcx.errors import UserError

log = logging.getLogger(__name__)

# Classes of transformers with rules of their own on top of a sentencepiece model.
_WITH_RULES = (
    "AlbertTokenizer BarthezTokenizer BertGenerationTokenizer BigBirdTokenizer CamembertTokenizer CpmTokenizer"
    " DebertaV2Tokenizer FNetTokenizer GPTSw3Tokenizer LasrTokenizer M2M100Tokenizer MBart50Tokenizer MBartTokenizer"
    " MT5Tokenizer MarianTokenizer NllbTokenizer PegasusTokenizer ReformerTokenizer RemBertTokenizer"
    " SeamlessM4TTokenizer SiglipTokenizer T5Tokenizer UdopTokenizer XGLMTokenizer XLMRobertaTokenizer"
    " XLNetTokenizer"
)
_MISTRALS = ("mistral", "mistral3", "voxtral", "ministral", "pixtral")
_UNIGRAM_CLASSES = frozenset(_WITH_RULES.split())


def vocabulary_file(folder: Path) -> Path:
    """The vocabulary of a folder: tokenizer.json, tokenizer.model, one other .model, or vocab.json with merges.txt.

    Raises:
      UserError: there is none, or several.
    """
    try:
        names = sorted(os.listdir(folder))
    except OSError as error:
        raise UserError(
            f"tokenizer folder {str(folder)!r} cannot be read ({error.strerror}): change its permissions"
        ) from error
    for name in ("tokenizer.json", "tokenizer.model"):
        if name in names:
            return folder / name
    models = [name for name in names if name.endswith(".model")]
    if len(models) == 1:
        return folder / models[0]
    if not models and {"vocab.json", "merges.txt"} <= set(names):
        return folder / "vocab.json"
    hint = "no tokenizer.json and no sentencepiece .model"
    if models:
        hint = f"several .model files ({json_files.one_line(', '.join(models))}): name one of them"
    elif "vocab.json" in names:
        hint = (
            "vocab.json but neither tokenizer.json nor merges.txt; make a tokenizer.json with"
            f" AutoTokenizer.from_pretrained({str(folder)!r}).save_pretrained(...)"
        )
    raise UserError(f"tokenizer folder {str(folder)!r} has {hint}; check the tokenizer setting")


def from_file(
    path: Path, *, settings: Settings | None = None, ids: Mapping[str, Any] | None = None
) -> FileTokenizer:
    """The tokenizer of a vocabulary file and of the settings beside it.

    Args:
      settings: those of a record, in place of the ones beside the file.
      ids: bos_id, eos_id and stop_ids of a record.

    Raises:
      UserError: a file is damaged, of an unknown kind, or asks for what is not supported.
    """
    if path.suffix not in (".json", ".model"):
        raise UserError(
            f"tokenizer file {str(path)!r} is neither a tokenizer.json nor a sentencepiece .model"
        )
    path = Path(
        os.path.abspath(path)
    )  # not resolved: in a hub cache the files are links to blobs without names
    found = settings or _settings(path)
    if found is None:
        tokenizer: FileTokenizer = _own_sentencepiece(path)
    else:
        plain = HuggingFaceTokenizer(str(path), settings=found)
        bos_id, eos_id, stops = _special_ids(plain)
        tokenizer = HuggingFaceTokenizer(str(path), bos_id, eos_id, stops, found)
    _ = (
        tokenizer.vocab_size,
        tokenizer.special,
    )  # what cannot be used is refused here, not in the middle of a run
    return tokenizer if ids is None else _with_ids(tokenizer, ids)


def _with_ids(tokenizer: FileTokenizer, ids: Mapping[str, Any]) -> FileTokenizer:
    return dataclasses.replace(tokenizer, **ids)


def _settings(path: Path) -> Settings | None:
    """The settings for a vocabulary file; None for a sentencepiece model that its own library has to read."""
    folder = path.parent
    config, model_config = settings_of.config_of(folder)
    name = tokenizer_classes.declared(folder, config, model_config)
    if path.suffix == ".model":
        return _sentencepiece_settings(path, name, config)
    byte_level = False
    if path.name != "vocab.json" and name == "LlamaTokenizer":
        data = json_files.read_bytes(path, max_bytes=tokenizer_build.MAX_BYTES) or b""
        byte_level = b'"ByteLevel"' in data
    model_type = model_config.get("model_type")
    name = tokenizer_classes.resolve(name, model_type, byte_level=byte_level, has_code="auto_map" in config)
    _refuse_mistral_fix(folder, config, model_config)
    if path.name == "vocab.json" and name == GENERIC:
        name = "GPT2Tokenizer"
    if name not in PIPELINES and name != GENERIC:
        log.warning(
            "%s: tokenizer_class %s is read as %s says, without what the class itself does", folder, name, path.name
        )
        name = GENERIC
    return settings_of.read(folder, name, config)


def _refuse_mistral_fix(folder: Path, config: Mapping[str, Any], model_config: Mapping[str, Any]) -> None:
    """transformers replaces the pattern of some older Mistral tokenizers where the folder asks for it."""
    kind, version = model_config.get("model_type"), str(model_config.get("transformers_version") or "0")
    if kind in _MISTRALS and config.get("fix_mistral_regex") is True and version.partition(".")[0] in "01234":
        raise UserError(
            f"{folder / 'tokenizer_config.json'} has fix_mistral_regex, which is not supported: apply it with"
            f" AutoTokenizer.from_pretrained({str(folder)!r}, fix_mistral_regex=True).save_pretrained(...)"
        )


def _sentencepiece_settings(path: Path, name: str | None, config: Mapping[str, Any]) -> Settings | None:
    """The class that the folder names counts; where it names none, the model itself says what it is."""
    if name in _UNIGRAM_CLASSES:
        raise UserError(
            f"{path} is for tokenizer_class {name}, which needs a tokenizer.json: make one with"
            f" AutoTokenizer.from_pretrained({str(path.parent)!r}).save_pretrained(...)"
        )
    if name in PIPELINES:
        return settings_of.read(path.parent, name, config, of_model=True)
    model = sentencepiece_model.read(path)
    own: dict[str, Token | None] = dict(tokenizer_build.model_tokens(model))
    if name in tokenizer_classes.GENERIC_NAMES:
        read = settings_of.read(path.parent, GENERIC, config, of_model=True)
        return dataclasses.replace(read, named=tuple((own | dict(read.named)).items()))
    if name is not None:
        log.warning("%s: tokenizer_class %s is not known, its model is read as it is", path.parent, name)
    if not model.is_like_llama:
        return None
    read = settings_of.read(path.parent, "LlamaTokenizer", config, of_model=True)
    own = {key: own.get(key) for key in ("bos_token", "eos_token", "unk_token")}
    options = {"add_prefix_space": model.add_dummy_prefix} | dict(read.options)
    return dataclasses.replace(
        read, named=tuple((own | dict(read.named)).items()), options=tuple(options.items())
    )


def _own_sentencepiece(path: Path) -> SentencePieceTokenizer:
    plain = SentencePieceTokenizer(str(path))
    bos, eos = plain._library.bos_id(), plain._library.eos_id()
    bos_id, eos_id = (bos if bos >= 0 else None), (eos if eos >= 0 else None)
    stops = settings_of.stop_ids(path.parent)
    return SentencePieceTokenizer(str(path), bos_id, eos_id, _unique(eos_id, stops))


def _special_ids(tokenizer: HuggingFaceTokenizer) -> tuple[int | None, int | None, tuple[int, ...]]:
    """(BOS, EOS, the ids that end a generation). The model's configuration names EOS where the tokenizer does not."""
    library, folder = tokenizer._library, Path(tokenizer.path).parent
    named = tokenizer_build.named_tokens(tokenizer.settings)
    ids = {}
    for key in ("bos_token", "eos_token"):
        token = named.get(key)
        ids[key] = None if token is None else library.token_to_id(token.content)
    stops = settings_of.stop_ids(folder)
    if "eos_token" not in named:
        ids["eos_token"] = next((i for i in stops if library.id_to_token(i) is not None), None)
    return ids["bos_token"], ids["eos_token"], _unique(ids["eos_token"], stops)


def _unique(eos_id: int | None, stops: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(dict.fromkeys(([] if eos_id is None else [eos_id]) + list(stops)))
