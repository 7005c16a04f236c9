"""A tokenizer's settings from the configuration files next to its vocabulary, merged as in transformers 5.

tokenizer_config.json has precedence; special_tokens_map.json and added_tokens.json (of older versions) supply what it
does not set, and config.json may name the class.
"""

import dataclasses
import re
from collections.abc import Mapping, Set
from pathlib import Path
from typing import Any

from lcx.data import json_files
from lcx.errors import UserError

NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")
_OPTIONS = (
    "add_bos_token",
    "add_eos_token",
    "add_prefix_space",
    "legacy",
    "split_special_tokens",
    "clean_up_tokenization_spaces",
    "clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output",
    "fix_mistral_regex",
    "do_lower_case",
    "strip_accents",
    "tokenize_chinese_chars",
)
_MISTRALS = (None, "mistral", "mistral3", "voxtral", "ministral", "pixtral")
_BEFORE_5 = re.compile(r"[0-4]\b|5(\.0)*\.?(dev|a|b|rc)")
_MAX_TOKENS = 1 << 20


@dataclasses.dataclass(frozen=True)
class Token:
    """A token that is matched in the text before the vocabulary is applied, with the flags of `tokenizers.AddedToken`.

    `normalized` None means the default of that library, `not special`.
    """

    content: str
    single_word: bool = False
    lstrip: bool = False
    rstrip: bool = False
    normalized: bool | None = None
    special: bool = False


@dataclasses.dataclass(frozen=True)
class Settings:
    """Everything outside the vocabulary file that affects the ids.

    Attributes:
      tokenizer_class: as resolved from the folder, see `tokenizer_classes.resolve`.
      named: special tokens with a role, e.g. ("bos_token", Token("<s>")); None if the folder disables it.
      extra: additional special tokens; None if the folder does not list any.
      added: tokens and their ids in the order of their file, in addition to those in tokenizer.json.
      replaces_added: `added` replaces those in tokenizer.json, for a class that sets up its own pipeline.
      options: (name, value) of the settings that are true, false or null.
    """

    tokenizer_class: str
    named: tuple[tuple[str, Token | None], ...] = ()
    extra: tuple[Token, ...] | None = None
    added: tuple[tuple[int, Token], ...] = ()
    replaces_added: bool = False
    options: tuple[tuple[str, bool], ...] = ()

    def option(self, name: str) -> bool | None:
        return dict(self.options).get(name)

    def to_json(self) -> dict[str, Any]:
        return {
            "tokenizer_class": self.tokenizer_class,
            "named": {key: token and _token_json(token) for key, token in self.named},
            "extra": None if self.extra is None else [_token_json(token) for token in self.extra],
            "added": [[i, _token_json(token)] for i, token in self.added],
            "replaces_added": self.replaces_added,
            "options": dict(self.options),
        }


def from_json(data: Any, path: Path | str) -> Settings:
    """The settings that `to_json` wrote. Raises UserError for anything else."""
    if not isinstance(data, dict):
        raise json_files.wrong(path, "settings", data, "an object")
    extra, added = (_list(data, key, path) for key in ("extra", "added"))
    pairs = []
    for pair in added or ():
        if not isinstance(pair, list) or len(pair) != 2:
            raise json_files.wrong(path, "settings.added", pair, "pairs of an id and a token")
        pairs.append((json_files.token_id(pair[0], "settings.added", path), _token(pair[1], "added", path)))
    return Settings(
        tokenizer_class=json_files.text(data, "tokenizer_class", path) or "",
        named=tuple(
            (key, None if value is None else _token(value, key, path))
            for key, value in _object(data, "named", path).items()
        ),
        extra=None if extra is None else tuple(_token(value, "extra", path) for value in extra),
        added=tuple(pairs),
        replaces_added=bool(json_files.boolean(data, "replaces_added", path)),
        options=_options(_object(data, "options", path), path),
    )


def to_config(settings: Settings) -> dict[str, Any]:
    """The content of a tokenizer_config.json with everything that affects the ids, for a folder that has none."""
    named = {}
    for key, token in settings.named:
        flags = {} if token is None else {k: v for k, v in dataclasses.asdict(token).items() if v is not None}
        named[key] = {"__type": "AddedToken", **flags} if flags else None
    return {"tokenizer_class": settings.tokenizer_class, **named, **dict(settings.options)}


def read(
    folder: Path,
    tokenizer_class: str,
    config: Mapping[str, Any],
    model_config: Mapping[str, Any],
    *,
    of_model: bool = False,
) -> Settings:
    """The settings in a folder, given the class that was determined for it.

    Args:
      config: its tokenizer_config.json.
      model_config: its config.json.
      of_model: whether the vocabulary is a sentencepiece model.

    Raises:
      UserError: a file is damaged, or a value has the wrong type.
    """
    path = folder / "tokenizer_config.json"
    named = _named(config, path)
    extra = _extra(config, named, path)
    replaces = config.get("added_tokens_decoder") is not None
    if replaces:
        added = _decoder(_object(config, "added_tokens_decoder", path), path)
    else:
        map_path = folder / "special_tokens_map.json"
        mapped = json_files.read_object(map_path)
        named |= _named(mapped, map_path, special=True)
        from_map = _extra(mapped, named, map_path)
        if extra is None and "extra_special_tokens" in mapped:
            extra = from_map
        added = _older_added(folder / "added_tokens.json", _written_special(config, mapped))
        if not of_model:  # a sentencepiece model marks such tokens itself
            extra = from_map if extra is None else extra
    options = dict(_options(config, path))
    if "add_bos_token" in config:  # null is false, also where the class adds BOS by default
        options.setdefault("add_bos_token", False)
    if not _has_mistral_pattern(folder, model_config):
        options.pop("fix_mistral_regex", None)
    ordered = [key for key in NAMED if key in named] + [key for key in named if key not in NAMED]
    return Settings(
        tokenizer_class=tokenizer_class,
        named=tuple((key, named[key]) for key in ordered),
        extra=extra,
        added=added,
        replaces_added=replaces,
        options=tuple(options.items()),
    )


def _has_mistral_pattern(folder: Path, model_config: Mapping[str, Any]) -> bool:
    """Whether fix_mistral_regex applies to a folder: a Mistral model saved by transformers before 5."""
    version = model_config.get("transformers_version")
    older = not version or bool(_BEFORE_5.match(str(version)))
    kind = model_config.get("model_type")
    return older and kind in _MISTRALS and (folder / "config.json").is_file()


def stop_ids(folder: Path) -> tuple[int, ...]:
    """The ids that end a generation, from generation_config.json, else config.json; Llama 3 has three."""
    for name in ("generation_config.json", "config.json"):
        value = json_files.read_object(folder / name).get("eos_token_id")
        if value is not None:
            values = value if isinstance(value, list) else [value]
            if len(values) > 1000:
                raise json_files.wrong(folder / name, "eos_token_id", value, "at most 1000 token ids")
            return tuple(json_files.token_id(i, "eos_token_id", folder / name) for i in values)
    return ()


def _named(data: Mapping[str, Any], path: Path, *, special: bool = False) -> dict[str, Token | None]:
    """The tokens under keys that end in _token: standard roles and those specific to a model (image_token)."""
    named: dict[str, Token | None] = {}
    for key, value in data.items():
        if key in NAMED or key.endswith("_token") and value is None:
            named[key] = None if value is None else _token(value, key, path, special=special)
        elif key.endswith("_token") and (isinstance(value, str) or _is_added_token(value, special)):
            named[key] = _token(value, key, path, special=special)
    return named


def _is_added_token(value: Any, in_map: bool) -> bool:
    return isinstance(value, dict) and (in_map or value.get("__type") == "AddedToken")


def _extra(data: Mapping[str, Any], named: dict[str, Token | None], path: Path) -> tuple[Token, ...] | None:
    """The list of additional special tokens; if it is an object, its tokens have names and go into `named`."""
    key, older = "extra_special_tokens", "additional_special_tokens"
    if not data.get(key) and older in data:
        key = older
    if isinstance(data.get(key), dict):
        named |= {name: _token(value, name, path) for name, value in data[key].items()}
        if key == older:
            return None
        key = older
    values = _list(data, key, path)
    return None if values is None else tuple(_token(value, key, path) for value in values)


def _decoder(data: Mapping[str, Any], path: Path) -> tuple[tuple[int, Token], ...]:
    pairs = []
    for key, value in data.items():
        if not key.isdecimal() or not key.isascii() or len(key) > 10:
            raise json_files.wrong(path, "added_tokens_decoder", key, "token ids as keys")
        number = json_files.token_id(int(key), "added_tokens_decoder", path)
        pairs.append((number, _token(value, "added_tokens_decoder", path, plain=False)))
    return tuple(pairs)


def _written_special(config: Mapping[str, Any], mapped: Mapping[str, Any]) -> set[str]:
    """The contents of special tokens; as in transformers, an object counts only in special_tokens_map.json."""
    values = [mapped[key] if key in mapped else config.get(key) for key in NAMED]
    objects = [mapped[key] for key in NAMED if isinstance(mapped.get(key), dict)]
    listed = config.get("extra_special_tokens") or config.get("additional_special_tokens")
    values += listed if isinstance(listed, list) else []
    listed = mapped.get("extra_special_tokens")
    for value in listed if isinstance(listed, list) else []:
        (objects if isinstance(value, dict) else values).append(value)
    return {text for text in (*values, *(value.get("content") for value in objects)) if isinstance(text, str)}


def _older_added(path: Path, special: Set[str]) -> tuple[tuple[int, Token], ...]:
    """added_tokens.json: {content: id}."""
    pairs = []
    for content, number in json_files.read_object(path).items():
        if not json_files.is_text(content):
            raise json_files.wrong(path, "a key", content, "text that UTF-8 can express")
        token = Token(content, normalized=content not in special, special=content in special)
        pairs.append((json_files.token_id(number, content, path), token))
    return tuple(pairs)


def _token(
    value: Any, key: str, path: Path | str, *, special: bool | None = None, plain: bool = True
) -> Token:
    """A token from a string, which is special, or from an object with the fields of an added token."""
    if plain and json_files.is_text(value):
        return Token(value, special=True)
    return token_of_object(value, key, path, special=special)


def token_of_object(value: Any, key: str, path: Path | str, *, special: bool | None = None) -> Token:
    """A token from an object with the fields of `tokenizers.AddedToken`; other fields are ignored, as it does."""
    if not isinstance(value, dict) or not json_files.is_text(value.get("content")):
        raise json_files.wrong(path, key, value, "a token, a string or an object with its content")
    flags: dict[str, Any] = {}
    for flag in _FLAGS:
        found = json_files.boolean(value, flag, path)
        if found is not None:
            flags[flag] = found
    return Token(value["content"], **(flags | ({"special": True} if special else {})))


def _token_json(token: Token) -> dict[str, Any] | str:
    if token == Token(token.content, special=True):
        return token.content
    return {key: value for key, value in dataclasses.asdict(token).items() if value or key == "normalized"}


def _options(data: Mapping[str, Any], path: Path | str) -> tuple[tuple[str, bool], ...]:
    found = ((name, json_files.boolean(data, name, path)) for name in _OPTIONS)
    return tuple((name, value) for name, value in found if value is not None)


def _object(data: Mapping[str, Any], key: str, path: Path | str) -> dict[str, Any]:
    value = data.get(key)
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise json_files.wrong(path, key, value, "an object")
    return value


def _list(data: Mapping[str, Any], key: str, path: Path | str) -> list[Any] | None:
    value = data.get(key)
    if value is None:
        return None
    if not isinstance(value, list) or len(value) > _MAX_TOKENS:
        raise json_files.wrong(path, key, value, "a list")
    return value


def config_of(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """(tokenizer_config.json, config.json), each {} if the file does not exist.

    Raises:
      UserError: one is damaged, or refers to a tokenizer file other than tokenizer.json.
    """
    config = json_files.read_object(folder / "tokenizer_config.json")
    if config.get("fast_tokenizer_files"):
        raise UserError(
            f"{folder / 'tokenizer_config.json'} has fast_tokenizer_files, one file for each version of transformers,"
            " which is not supported: remove the key, so that tokenizer.json is read"
        )
    return config, json_files.read_object(folder / "config.json")
