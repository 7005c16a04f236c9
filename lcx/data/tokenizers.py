"""Tokenizers: bytes (built in), Hugging Face `tokenizer.json`, sentencepiece `.model`.

All implement one protocol, import their library only when used, give the same ids as transformers 5, and can copy their
files into a checkpoint so that `load_tokenizer(folder)` restores the same tokenizer.
"""

import dataclasses
import json
import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int

from lcx import hub
from lcx.data import json_files, tokenizer_folders, tokenizer_settings
from lcx.data.special import SpecialTokens, separating_tokens, special_tokens
from lcx.data.tokenizer_libraries import (
    HuggingFaceTokenizer,
    Located,
    SentencePieceTokenizer,
    checksum,
    files_of,
)
from lcx.data.tokenizer_protocol import Tokenizer
from lcx.errors import UserError

__all__ = [
    "RECORD",
    "ByteTokenizer",
    "HuggingFaceTokenizer",
    "SentencePieceTokenizer",
    "SpecialTokens",
    "Tokenizer",
    "check_vocabulary",
    "encode_all",
    "identity",
    "load_tokenizer",
    "save_tokenizer",
    "separating_tokens",
    "special_tokens",
    "tokenizer_from_json",
]

RECORD = "lcx_tokenizer.json"
_CONFIG = "tokenizer_config.json"
_SIDE_FILES = (_CONFIG, "special_tokens_map.json", "added_tokens.json", "chat_template.jinja")
_SIDE_TEMPLATES = "additional_chat_templates/*.jinja"


@dataclasses.dataclass(frozen=True)
class ByteTokenizer:
    """UTF-8 bytes are ids 0 .. 255; the special ids follow. Needs no download, and every text is in the vocabulary.

    BOS, if there is one, is put before every text.

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

    @property
    def special(self) -> SpecialTokens:
        return SpecialTokens(before=() if self.bos_id is None else (self.bos_id,))

    def encode(self, text: str, *, add_special_tokens: bool = False) -> Int[np.ndarray, "tokens"]:
        try:
            ids = np.frombuffer(text.encode(), np.uint8).astype(np.int32)
        except UnicodeEncodeError as error:
            found = f"character {error.start} of a text is an unpaired surrogate"
            raise UserError(f"{found}, which UTF-8 cannot encode: correct the text") from error
        before = self.special.before if add_special_tokens else ()
        return np.concatenate([np.array(before, np.int32), ids])

    def encode_with_offsets(self, texts: Sequence[str]) -> list[Located]:
        located = []
        for text in texts:
            code = np.frombuffer(text.encode("utf-32-le"), np.uint32)
            sizes = 1 + (code >= 1 << 7).astype(int) + (code >= 1 << 11) + (code >= 1 << 16)
            begin = np.repeat(np.arange(len(text)), sizes)
            located.append((self.encode(text), np.stack([begin, begin + 1], 1)))
        return located

    def decode(self, ids: Iterable[int]) -> str:
        values = np.array([i if 0 <= i < 256 else -1 for i in map(int, ids)], np.int64)
        plain = values >= 0
        for special in (self.bos_id, self.eos_id):
            plain &= values != special if special is not None else plain
        return values[plain].astype(np.uint8).tobytes().decode(errors="replace")

    def to_json(self) -> dict[str, Any]:
        return {"kind": "bytes", **dataclasses.asdict(self)}


def encode_all(
    tokenizer: Tokenizer, texts: Sequence[str], *, add_special_tokens: bool = False
) -> list[Int[np.ndarray, "tokens"]]:
    """`encode` of each text, by the tokenizer's `encode_batch` (multithreaded) if it has one."""
    asked = {"add_special_tokens": True} if add_special_tokens else {}
    batch = getattr(tokenizer, "encode_batch", None)
    return batch(texts, **asked) if batch is not None else [tokenizer.encode(text, **asked) for text in texts]


def locate_all(tokenizer: Tokenizer, texts: Sequence[str]) -> list[Located]:
    """The ids of each text with their character offsets. Raises UserError if the tokenizer cannot give offsets."""
    method = getattr(tokenizer, "encode_with_offsets", None)
    if method is None:
        raise UserError(
            f"{type(tokenizer).__name__} has no encode_with_offsets, which a loss on some of the tokens needs;"
            " set Dataset.chat_loss='all'"
        )
    return method(texts)


def identity(tokenizer: Tokenizer) -> dict[str, Any]:
    """`to_json` without the path of the file and the stop ids, which do not affect encoding."""
    return {
        key: value for key, value in tokenizer.to_json().items() if key not in ("path", "file", "stop_ids")
    }


def load_tokenizer(path: str | os.PathLike | Tokenizer) -> Tokenizer:
    """Loads a tokenizer, with the ids that transformers.AutoTokenizer gives for the same files.

    Args:
      path: "bytes"; a `tokenizer.json`; a sentencepiece `.model`; a folder that holds one of them, or vocab.json with
        merges.txt (or one written by `save_tokenizer`); or a tokenizer, which is returned unchanged.

    The special tokens, and those put before and after a text, come from the file and from tokenizer_config.json. Only
    EOS and the ids that end a generation may come from `generation_config.json` or `config.json` in the same folder. A
    sentencepiece model without a tokenizer_config.json or config.json next to it is read according to its own settings:
    either like LlamaTokenizer, with a space before the text if the model adds one (AutoTokenizer omits this space), or
    by the sentencepiece library.

    Raises:
      UserError: there is no tokenizer, or it is damaged.
    """
    if not isinstance(path, str | os.PathLike):
        return path
    if path == "bytes":
        return ByteTokenizer()
    try:
        place = Path(hub.local(path, kind="tokenizer")).expanduser()
        is_file, is_folder = place.is_file(), place.is_dir()
        is_other = not is_file and not is_folder and os.path.lexists(place)
    except (OSError, ValueError, RuntimeError) as error:
        reason = getattr(error, "strerror", None) or error
        found = f"tokenizer {json_files.one_line(repr(str(path)))} cannot be read ({reason})"
        raise UserError(f"{found}; check the tokenizer setting") from error
    if is_file:
        return tokenizer_folders.from_file(place)
    if not is_folder:
        found = "is neither a file nor a folder" if is_other else "does not exist"
        raise UserError(
            f'tokenizer {str(path)!r} {found}; expected "bytes", a tokenizer.json, a sentencepiece'
            " .model, or a folder with one of them"
        )
    record = json_files.read_object(place / RECORD)
    if record:  # a folder written by `save_tokenizer`: the vocabulary file is next to the record
        return tokenizer_from_json({**record, "path": None}, folder=place)
    return tokenizer_folders.from_file(tokenizer_folders.vocabulary_file(place))


def save_tokenizer(tokenizer: Tokenizer, folder: str | os.PathLike) -> None:
    """Copies a tokenizer's files into `folder`, so that `load_tokenizer(folder)` gives the same tokenizer.

    The files keep their names, except that a sentencepiece model becomes tokenizer.model, so that other libraries find
    them too. If there was no tokenizer_config.json, one that names the class is written. `lcx_tokenizer.json`, written
    last, records the kind, the settings, the special ids and the checksum.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    record = tokenizer.to_json()
    path = record.pop("path", None)
    if path is not None:
        source, name = Path(path), record["file"]
        sides = (
            *_SIDE_FILES,
            *(str(file.relative_to(source.parent)) for file in source.parent.glob(_SIDE_TEMPLATES)),
        )
        targets = dict(zip(files_of(source), files_of(folder / name), strict=True))
        targets |= {source.parent / side: folder / side for side in sides}
        for file, target in targets.items():
            if file.is_file() and file.resolve() != target.resolve():
                target.parent.mkdir(exist_ok=True)
                _copy(file, target)
    if isinstance(tokenizer, HuggingFaceTokenizer) and not (folder / _CONFIG).exists():
        _write_json(folder / _CONFIG, tokenizer_settings.to_config(tokenizer.settings))
    _write_json(folder / RECORD, record)


def _write_json(path: Path, data: dict[str, Any]) -> None:
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    os.replace(partial, path)


def _copy(source: Path, target: Path) -> None:
    partial = target.with_name(target.name + ".partial")
    shutil.copyfile(source, partial)
    os.replace(partial, target)


def tokenizer_from_json(data: Mapping[str, Any], *, folder: str | os.PathLike | None = None) -> Tokenizer:
    """The tokenizer of a record written by `to_json` or `save_tokenizer`.

    Its file is looked up in `folder` first, then at its recorded path. A file with another checksum is refused, because
    it could silently give different ids.

    Raises:
      UserError: the record is damaged or names a file outside its folder, or the file is missing or has changed.
    """
    where = "the tokenizer's record" if folder is None else Path(folder) / RECORD
    kind = json_files.text(data, "kind", where)
    if kind == "bytes":
        size = data.get("vocab_size", ByteTokenizer.vocab_size)
        if not isinstance(size, int) or isinstance(size, bool) or not 0 < size <= json_files.LARGEST_ID + 1:
            raise json_files.wrong(where, "vocab_size", size, "a number of ids")
        return ByteTokenizer(_id(data, "bos_id", where), _id(data, "eos_id", where), size)
    if kind not in ("hugging_face", "sentencepiece"):
        raise UserError(
            f"tokenizer kind {json_files.one_line(kind, limit=40)!r} is unknown; expected bytes, hugging_face,"
            " sentencepiece"
        )
    name = json_files.text(data, "file", where) or (
        "tokenizer.json" if kind == "hugging_face" else "tokenizer.model"
    )
    if Path(name).name != name or name in ("", ".", ".."):
        raise UserError(
            f"{where} names the file {json_files.one_line(name, limit=80)!r}, expected one in the same folder: correct"
            " the record"
        )
    path = _recorded_file(data, name, folder, where)
    if checksum(path) != json_files.text(data, "sha256", where):
        raise UserError(
            f"tokenizer file {path} is not the one that was saved (its checksum differs); restore it"
        )
    settings = data.get("settings")
    stops = data.get("stop_ids") or []
    if not isinstance(stops, list):
        raise json_files.wrong(where, "stop_ids", stops, "a list of ids")
    ids = {
        "bos_id": _id(data, "bos_id", where),
        "eos_id": _id(data, "eos_id", where),
        "stop_ids": tuple(json_files.token_id(i, "stop_ids", where) for i in stops),
    }
    read = None if settings is None else tokenizer_settings.from_json(settings, where)
    return tokenizer_folders.from_file(path, settings=read, ids=ids)


def _recorded_file(
    data: Mapping[str, Any], name: str, folder: str | os.PathLike | None, where: str | Path
) -> Path:
    """The file of a record: in the record's folder, else at the path where it was when it was recorded."""
    if folder is not None:
        beside = Path(folder) / name
        if os.path.lexists(beside):
            _check_inside(beside, Path(folder))
            return beside
    former = json_files.text(data, "path", where)
    old = Path(former or "")
    if (
        former and old.suffix in (".json", ".model") and old.is_file()
    ):  # the caller compares the checksum, so a different file is refused
        return old
    missing = Path(folder) / name if folder is not None else Path(former or name)
    raise UserError(
        f"tokenizer file {json_files.one_line(missing)} does not exist; copy the tokenizer next to the checkpoint"
    )


def _check_inside(path: Path, folder: Path) -> None:
    """Allows links to other files of the folder and, as in a hub cache, to blobs next to the snapshots."""
    real, home = path.resolve(), folder.resolve()
    blobs = home.parent.parent / "blobs" if home.parent.name == "snapshots" else home
    if not real.is_relative_to(home) and not real.is_relative_to(blobs):
        raise UserError(
            f"tokenizer file {path} is a link out of its folder: put the file itself there, next to {RECORD}"
        )


def _id(data: Mapping[str, Any], key: str, where: str | Path) -> int | None:
    return None if data.get(key) is None else json_files.token_id(data[key], key, where)


def check_vocabulary(tokenizer: Tokenizer, vocab_size: int) -> None:
    """Raises UserError if the tokenizer has more ids than the model has embeddings (`vocab_size`)."""
    if tokenizer.vocab_size > vocab_size:
        raise UserError(
            f"the tokenizer has {tokenizer.vocab_size} ids but the model's vocab_size is {vocab_size};"
            " use the model's own tokenizer, or set vocab_size to at least the tokenizer's"
        )
