"""From a file or a folder to a tokenizer: which vocabulary file, which class, which special ids."""

import dataclasses
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lcx.data import json_files, sentencepiece_model, tokenizer_build, tokenizer_names
from lcx.data import tokenizer_settings as settings_of
from lcx.data.tokenizer_classes import OF_SENTENCEPIECE, OF_TWO_FILES, PIPELINES
from lcx.data.tokenizer_libraries import FileTokenizer, HuggingFaceTokenizer, SentencePieceTokenizer
from lcx.data.tokenizer_names import GENERIC
from lcx.data.tokenizer_settings import Settings, Token
from lcx.errors import UserError

log = logging.getLogger(__name__)

_OTHERS = ("vocab.json", "vocab.txt", "merges.txt", "tekken.json")  # vocabularies in other formats
_HUGGING_FACE_FILES = ("tokenizer_config.json", "config.json")


def vocabulary_file(folder: Path) -> Path:
    """The vocabulary of a folder: tokenizer.json, tokenizer.model, one other .model, or vocab.json with merges.txt.

    Raises:
      UserError: there is none, or there are several.
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
    if "checkpoints" in names:
        hint += " (an lcx workdir whose tokenizer is not a file: name that one, such as 'bytes')"
    if models:
        hint = f"several .model files ({json_files.one_line(', '.join(models))}): name one of them"
    elif others := [name for name in names if name in _OTHERS or name.endswith(".tiktoken")]:
        hint = (
            f"{json_files.one_line(', '.join(others))} but no tokenizer.json and no sentencepiece .model; make a"
            f" tokenizer.json with AutoTokenizer.from_pretrained({str(folder)!r}).save_pretrained(...)"
        )
    raise UserError(f"tokenizer folder {str(folder)!r} has {hint}; check the tokenizer setting")


def from_file(
    path: Path, *, settings: Settings | None = None, ids: Mapping[str, Any] | None = None
) -> FileTokenizer:
    """The tokenizer of a vocabulary file, with the settings in the same folder.

    Args:
      settings: recorded settings, which replace those in the folder.
      ids: recorded bos_id, eos_id and stop_ids.

    Raises:
      UserError: a file is damaged or of an unknown kind, or requires something that is not supported.
    """
    if path.suffix not in (".json", ".model"):
        raise UserError(
            f"tokenizer file {str(path)!r} is neither a tokenizer.json nor a sentencepiece .model"
        )
    path = Path(
        os.path.abspath(path)
    )  # links are not resolved: in a hub cache they lead to blobs, which have no file names
    of_record = ids is not None and path.suffix == ".model"  # then read by the sentencepiece library
    found = settings or (None if of_record else _settings(path))
    if found is None:
        tokenizer: FileTokenizer = _own_sentencepiece(path)
    else:
        plain = HuggingFaceTokenizer(str(path), settings=found)
        bos_id, eos_id, stops = _special_ids(plain)
        tokenizer = HuggingFaceTokenizer(str(path), bos_id, eos_id, stops, found)
    _ = (
        tokenizer.vocab_size,
        tokenizer.special,
    )  # computed here so that an unusable tokenizer is refused now, not in the middle of a run
    return tokenizer if ids is None else _with_ids(tokenizer, ids)


def _with_ids(tokenizer: FileTokenizer, ids: Mapping[str, Any]) -> FileTokenizer:
    return dataclasses.replace(tokenizer, **ids)


def _settings(path: Path) -> Settings | None:
    """The settings for a vocabulary file; None if the sentencepiece library has to read it."""
    folder = path.parent
    config, model_config = settings_of.config_of(folder)
    of_model = path.suffix == ".model"
    if of_model and not any((folder / name).is_file() for name in _HUGGING_FACE_FILES):
        return _of_model_alone(path)
    name = _class_of(path, config, model_config)
    if of_model and path.name != "tokenizer.model":  # AutoTokenizer finds no other name
        if name == GENERIC:
            return _of_model_alone(path)
        raise UserError(f"{path} is for tokenizer_class {name}, which reads tokenizer.model: rename the file")
    if path.name == "vocab.json" and name == GENERIC:
        name = "GPT2Tokenizer"
    if name in PIPELINES:
        return settings_of.read(folder, name, config, model_config, of_model=of_model)
    read = settings_of.read(folder, GENERIC, config, model_config, of_model=of_model)
    if not of_model:
        return read
    own = dict(tokenizer_build.model_tokens(sentencepiece_model.read(path)))
    return dataclasses.replace(read, named=tuple((own | dict(read.named)).items()))


def _class_of(path: Path, config: Mapping[str, Any], model_config: Mapping[str, Any]) -> str:
    """The name of a class in `PIPELINES`, or of the generic class.

    Raises:
      UserError: the folder's class has its own rules, which are not supported.
    """
    folder = path.parent
    name = tokenizer_names.declared(folder, config, model_config)
    byte_level = False
    if path.name == "tokenizer.json" and name == "LlamaTokenizer":
        data = json_files.read_bytes(path, max_bytes=tokenizer_build.MAX_BYTES) or b""
        byte_level = b'"ByteLevel"' in data
    code = config.get("auto_map")
    has_code = bool(code.get("AutoTokenizer") if isinstance(code, dict) else code)
    found = tokenizer_names.resolve(
        name, model_config.get("model_type"), byte_level=byte_level, has_code=has_code
    )
    if found is None:
        raise UserError(
            f"{folder / 'tokenizer_config.json'} names Python code of its own (auto_map), which is never run: remove"
            f" auto_map if {path.name} is the whole tokenizer, or use a tokenizer.json of the same model"
        )
    if found in tokenizer_names.PYTHON:
        raise UserError(
            f"{folder} is for tokenizer_class {found}, whose rules are Python code of transformers that no"
            f" tokenizer.json holds; if {path.name} is the whole tokenizer, set tokenizer_class to 'TokenizersBackend'"
            " in tokenizer_config.json"
        )
    if found in tokenizer_names.REBUILT and found not in PIPELINES:
        raise UserError(
            f"{folder} is for tokenizer_class {found}, whose own rules are not supported: save it with"
            f" AutoTokenizer.from_pretrained({str(folder)!r}).save_pretrained(NEW), then set tokenizer_class to"
            " 'TokenizersBackend' in NEW/tokenizer_config.json"
        )
    readers = {".model": OF_SENTENCEPIECE, "vocab.json": OF_TWO_FILES}
    of_file = readers.get(".model" if path.suffix == ".model" else path.name)
    if of_file is not None and found in PIPELINES and found not in of_file:
        raise UserError(
            f"{folder} is for tokenizer_class {found}, which does not read {path.name}: correct tokenizer_class, or use"
            " a tokenizer.json of the same model"
        )
    if found not in PIPELINES and found != GENERIC:
        name = json_files.one_line(found, limit=80)
        log.warning("%s: tokenizer_class %s is not known, %s is read as it is", folder, name, path.name)
        return GENERIC
    return found


def _of_model_alone(path: Path) -> Settings | None:
    """The settings for a sentencepiece model without transformers' files; see `load_tokenizer`."""
    model = sentencepiece_model.read(path)
    if not model.is_like_llama:
        return None
    log.warning(
        "%s: no tokenizer_config.json names a class, so it is read like LlamaTokenizer (AutoTokenizer would omit"
        " the space before a text)",
        path,
    )
    read = settings_of.read(path.parent, "LlamaTokenizer", {}, {}, of_model=True)
    own: dict[str, Token | None] = dict(tokenizer_build.model_tokens(model))
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
    """(BOS, EOS, the ids that end a generation). If the tokenizer has no EOS, the model's configuration gives it."""
    library, folder = tokenizer._library, Path(tokenizer.path).parent
    named = tokenizer_build.named_tokens(tokenizer.settings)
    ids = {}
    for key in ("bos_token", "eos_token"):
        token = named.get(key)
        ids[key] = library.token_to_id(token.content) if token is not None and token.content else None
    stops = settings_of.stop_ids(folder)
    if "eos_token" not in named:
        ids["eos_token"] = next((i for i in stops if library.id_to_token(i) is not None), None)
    return ids["bos_token"], ids["eos_token"], _unique(ids["eos_token"], stops)


def _unique(eos_id: int | None, stops: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(dict.fromkeys(([] if eos_id is None else [eos_id]) + list(stops)))
