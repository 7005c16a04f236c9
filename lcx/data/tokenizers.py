"""Tokenizers: bytes (built in), Hugging Face `tokenizer.json`, sentencepiece `.model`.

All three follow one protocol, load their library only when used, and can copy their files into a checkpoint
so that `load_tokenizer(folder)` gives the same tokenizer back.
"""

import dataclasses
import functools
import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Int

from lcx import hub
from lcx.errors import UserError

RECORD = "lcx_tokenizer.json"
_SIDE_FILES = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja")


@runtime_checkable
class Tokenizer(Protocol):
    """What the library needs of a tokenizer; bos_id and eos_id are None where there is none."""

    @property
    def vocab_size(self) -> int: ...

    @property
    def bos_id(self) -> int | None: ...

    @property
    def eos_id(self) -> int | None: ...

    def encode(self, text: str) -> Int[np.ndarray, "tokens"]:
        """The ids of `text` as int32, without BOS or EOS."""

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`; special ids and ids outside the vocabulary give nothing."""

    def to_json(self) -> dict[str, Any]:
        """A JSON object that identifies the tokenizer; see `identity` and `tokenizer_from_json`."""


@dataclasses.dataclass(frozen=True)
class ByteTokenizer:
    """UTF-8 bytes are ids 0 .. 255; the special ids follow. Nothing to download, nothing out of vocabulary.

    For byte-level DNA models with another convention: `ByteTokenizer(bos_id=None, eos_id=0, vocab_size=512)`.
    """

    bos_id: int | None = 256
    eos_id: int | None = 257
    vocab_size: int = 258

    def __post_init__(self):
        top = max(255, *(-1 if i is None else i for i in (self.bos_id, self.eos_id)))
        if self.vocab_size <= top:
            raise UserError(
                f"ByteTokenizer.vocab_size={self.vocab_size} does not hold id {top}; raise vocab_size"
            )

    @property
    def stop_ids(self) -> tuple[int, ...]:
        return () if self.eos_id is None else (self.eos_id,)

    def encode(self, text: str) -> Int[np.ndarray, "tokens"]:
        return np.frombuffer(text.encode(), np.uint8).astype(np.int32)

    def decode(self, ids: Iterable[int]) -> str:
        values = np.asarray(list(ids), np.int64)
        plain = (values >= 0) & (values < 256)
        for special in (self.bos_id, self.eos_id):
            plain &= values != special if special is not None else plain
        return values[plain].astype(np.uint8).tobytes().decode(errors="replace")

    def to_json(self) -> dict[str, Any]:
        return {"kind": "bytes", **dataclasses.asdict(self)}


@dataclasses.dataclass(frozen=True)
class HuggingFaceTokenizer:
    """A `tokenizer.json`. Text that spells a special token becomes that token, as in transformers."""

    path: str
    bos_id: int | None = None
    eos_id: int | None = None
    stop_ids: tuple[int, ...] = ()

    @functools.cached_property
    def _library(self) -> Any:
        return _load_hugging_face(self.path)

    @functools.cached_property
    def vocab_size(self) -> int:
        return max(self._library.get_vocab(with_added_tokens=True).values()) + 1

    def encode(self, text: str) -> Int[np.ndarray, "tokens"]:
        return np.array(self._library.encode(text, add_special_tokens=False).ids, np.int32)

    def encode_batch(self, texts: Sequence[str]) -> list[Int[np.ndarray, "tokens"]]:
        encodings = self._library.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array(encoding.ids, np.int32) for encoding in encodings]

    def decode(self, ids: Iterable[int]) -> str:
        known = [i for i in map(int, ids) if 0 <= i < self.vocab_size]
        return self._library.decode(known, skip_special_tokens=True)

    def to_json(self) -> dict[str, Any]:
        return _file_json("hugging_face", self)


@dataclasses.dataclass(frozen=True)
class SentencePieceTokenizer:
    """A sentencepiece `.model` (Llama 1 and 2, Mistral 7B v0.1, ...)."""

    path: str
    bos_id: int | None = None
    eos_id: int | None = None
    stop_ids: tuple[int, ...] = ()

    @functools.cached_property
    def _library(self) -> Any:
        return _load_sentencepiece(self.path)

    @functools.cached_property
    def vocab_size(self) -> int:
        return self._library.vocab_size()

    def encode(self, text: str) -> Int[np.ndarray, "tokens"]:
        return np.array(self._library.encode(text), np.int32)

    def encode_batch(self, texts: Sequence[str]) -> list[Int[np.ndarray, "tokens"]]:
        return [np.array(ids, np.int32) for ids in self._library.encode(list(texts))]

    def decode(self, ids: Iterable[int]) -> str:
        return self._library.decode([i for i in map(int, ids) if 0 <= i < self.vocab_size])

    def to_json(self) -> dict[str, Any]:
        return _file_json("sentencepiece", self)


def _file_json(kind: str, tokenizer: HuggingFaceTokenizer | SentencePieceTokenizer) -> dict[str, Any]:
    return {
        "kind": kind,
        "path": tokenizer.path,
        "sha256": hashlib.sha256(Path(tokenizer.path).read_bytes()).hexdigest(),
        "bos_id": tokenizer.bos_id,
        "eos_id": tokenizer.eos_id,
        "stop_ids": list(tokenizer.stop_ids),
        "vocab_size": tokenizer.vocab_size,
    }


def encode_all(tokenizer: Tokenizer, texts: Sequence[str]) -> list[Int[np.ndarray, "tokens"]]:
    """`encode` of each text, through the tokenizer's `encode_batch` (several threads) where it has one."""
    batch = getattr(tokenizer, "encode_batch", None)
    return batch(texts) if batch is not None else [tokenizer.encode(text) for text in texts]


def identity(tokenizer: Tokenizer) -> dict[str, Any]:
    """`to_json` without the place of the file and the stop ids, which do not change what encoding gives."""
    return {key: value for key, value in tokenizer.to_json().items() if key not in ("path", "stop_ids")}


def _load_hugging_face(path: str) -> Any:
    try:
        from tokenizers import Tokenizer as Library
    except ImportError as error:
        raise UserError(f"reading {path} needs the tokenizers package: pip install tokenizers") from error
    try:
        return Library.from_file(path)
    except Exception as error:  # the library raises bare Exception
        raise UserError(
            f"{path} is not a readable tokenizer.json ({error}); check the tokenizer setting"
        ) from error


def _load_sentencepiece(path: str) -> Any:
    try:
        import sentencepiece
    except ImportError as error:
        raise UserError(
            f"reading {path} needs the sentencepiece package: pip install sentencepiece"
        ) from error
    try:
        return sentencepiece.SentencePieceProcessor(model_file=path)
    except (RuntimeError, OSError) as error:
        raise UserError(
            f"{path} is not a readable sentencepiece model; check the tokenizer setting"
        ) from error


def load_tokenizer(path: str | os.PathLike | Tokenizer) -> Tokenizer:
    """Loads a tokenizer.

    Args:
      path: "bytes"; a `tokenizer.json`; a sentencepiece `.model`; a folder that holds either (or one written
        by `save_tokenizer`); or a tokenizer, which is returned as it is.

    BOS and EOS come from `tokenizer_config.json`, else `generation_config.json` or `config.json` beside the
    file; for sentencepiece from the model itself.

    Raises:
      UserError: there is no tokenizer, or it is damaged.
    """
    if not isinstance(path, str | os.PathLike):
        return path
    if path == "bytes":
        return ByteTokenizer()
    place = Path(hub.local(path, kind="tokenizer")).expanduser()
    if place.is_file():
        return _from_file(place)
    if not place.is_dir():
        raise UserError(
            f'tokenizer {str(path)!r} does not exist; expected "bytes", a tokenizer.json, a sentencepiece'
            " .model, or a folder with one of them"
        )
    if (place / RECORD).is_file():
        return tokenizer_from_json(_read_json(place / RECORD), folder=place)
    for name in ("tokenizer.json", "tokenizer.model"):
        if (place / name).is_file():
            return _from_file(place / name)
    models = sorted(place.glob("*.model"))
    if len(models) == 1:
        return _from_file(models[0])
    hint = "no tokenizer.json and no sentencepiece .model"
    if models:
        hint = f"several .model files ({', '.join(model.name for model in models)}): name one of them"
    elif (place / "vocab.json").is_file():
        hint = (
            "vocab.json but no tokenizer.json; make one with"
            f" AutoTokenizer.from_pretrained({str(place)!r}).save_pretrained(...)"
        )
    raise UserError(f"tokenizer folder {str(path)!r} has {hint}; check the tokenizer setting")


def _from_file(path: Path) -> Tokenizer:
    if path.suffix == ".json":
        return _from_tokenizer_json(path)
    if path.suffix == ".model":
        plain = SentencePieceTokenizer(str(path.resolve()))
        bos, eos = plain._library.bos_id(), plain._library.eos_id()
        bos_id, eos_id = (bos if bos >= 0 else None), (eos if eos >= 0 else None)
        stop_ids = _stop_ids(path.parent, eos_id)
        return dataclasses.replace(plain, bos_id=bos_id, eos_id=eos_id, stop_ids=stop_ids)
    raise UserError(f"tokenizer file {str(path)!r} is neither a tokenizer.json nor a sentencepiece .model")


def _from_tokenizer_json(path: Path) -> Tokenizer:
    plain = HuggingFaceTokenizer(str(path.resolve()))
    library = plain._library
    config = _read_json(path.parent / "tokenizer_config.json")
    ids: dict[str, int | None] = {}
    for name in ("bos", "eos"):
        token = config.get(f"{name}_token")
        token = token.get("content") if isinstance(token, dict) else token
        found = library.token_to_id(token) if token else None
        if found is None and f"{name}_token" not in config:
            found = next(iter(_config_ids(path.parent, f"{name}_token_id")), None)
        ids[name] = found
    stop_ids = _stop_ids(path.parent, ids["eos"])
    return dataclasses.replace(plain, bos_id=ids["bos"], eos_id=ids["eos"], stop_ids=stop_ids)


def _config_ids(folder: Path, key: str) -> list[int]:
    """The id or ids that generation_config.json or config.json gives for `key`."""
    for name in ("generation_config.json", "config.json"):
        value = _read_json(folder / name).get(key)
        if value is not None:
            return list(value) if isinstance(value, list) else [int(value)]
    return []


def _stop_ids(folder: Path, eos_id: int | None) -> tuple[int, ...]:
    """EOS, and the further ids that end a generation (Llama 3 has three)."""
    known = [] if eos_id is None else [eos_id]
    return tuple(dict.fromkeys(known + _config_ids(folder, "eos_token_id")))


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise UserError(f"{path} is not readable JSON ({error}); restore the file") from error
    return data if isinstance(data, dict) else {}


def save_tokenizer(tokenizer: Tokenizer, folder: str | os.PathLike) -> None:
    """Copies a tokenizer's files into `folder`, so that `load_tokenizer(folder)` gives the same tokenizer.

    A tokenizer.json keeps its name and a sentencepiece model becomes tokenizer.model, so that other libraries
    find them too; `lcx_tokenizer.json`, written last, records the kind, the special ids and the checksum.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    record = tokenizer.to_json()
    path = record.pop("path", None)
    if path is not None:
        name = "tokenizer.json" if record["kind"] == "hugging_face" else "tokenizer.model"
        record["file"] = name
        for source, target in [
            (Path(path), name),
            *((Path(path).parent / side, side) for side in _SIDE_FILES),
        ]:
            if source.is_file() and source.resolve() != (folder / target).resolve():
                _copy(source, folder / target)
    partial = folder / f"{RECORD}.partial"
    partial.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    os.replace(partial, folder / RECORD)


def _copy(source: Path, target: Path) -> None:
    partial = target.with_name(target.name + ".partial")
    shutil.copyfile(source, partial)
    os.replace(partial, target)


def tokenizer_from_json(data: dict[str, Any], *, folder: str | os.PathLike | None = None) -> Tokenizer:
    """The tokenizer that `to_json` or `save_tokenizer` described.

    Its file is looked for in `folder` first, then where it was; one with another checksum is refused, since
    it would silently give other ids.
    """
    kind = data.get("kind")
    if kind == "bytes":
        return ByteTokenizer(data["bos_id"], data["eos_id"], data["vocab_size"])
    classes: dict[str, type[HuggingFaceTokenizer] | type[SentencePieceTokenizer]] = {
        "hugging_face": HuggingFaceTokenizer,
        "sentencepiece": SentencePieceTokenizer,
    }
    if not isinstance(kind, str) or kind not in classes:
        raise UserError(f"tokenizer kind {kind!r} is unknown; expected bytes, {', '.join(classes)}")
    name = data.get("file") or ("tokenizer.json" if kind == "hugging_face" else "tokenizer.model")
    places = ([Path(folder) / name] if folder is not None else []) + [Path(data.get("path") or name)]
    for place in places:
        if place.is_file():
            if hashlib.sha256(place.read_bytes()).hexdigest() != data["sha256"]:
                raise UserError(
                    f"tokenizer file {place} is not the one that was saved (its checksum differs); restore it"
                )
            special = {
                "bos_id": data["bos_id"],
                "eos_id": data["eos_id"],
                "stop_ids": tuple(data["stop_ids"]),
            }
            return classes[kind](str(place.resolve()), **special)
    raise UserError(f"tokenizer file {places[0]} does not exist; copy the tokenizer beside the checkpoint")


def check_vocabulary(tokenizer: Tokenizer, vocab_size: int) -> None:
    """Raises UserError when the tokenizer has more ids than a model with `vocab_size` embeddings."""
    if tokenizer.vocab_size > vocab_size:
        raise UserError(
            f"the tokenizer has {tokenizer.vocab_size} ids but the model's vocab_size is {vocab_size};"
            " use the model's own tokenizer, or set vocab_size to at least the tokenizer's"
        )
