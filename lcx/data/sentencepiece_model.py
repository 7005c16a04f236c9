"""Reads sentencepiece models, as far as tokenizers need them, and computes their merges.

A `.model` file is a protocol buffer (sentencepiece_model.proto) with the pieces, their scores and types, and the
settings of the trainer and the normalizer. Reading it here needs neither sentencepiece nor protobuf, and a damaged file
gives a one-line error.
"""

import dataclasses
import re
import struct
from collections.abc import Iterator
from pathlib import Path

from lcx.data import json_files
from lcx.errors import UserError

UNIGRAM, BPE = 1, 2
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
_TIKTOKEN = re.compile(rb"[A-Za-z0-9+/]{1,9999}={0,2} \d{1,7}\r?\n")  # base64 of a token, and its rank
_MAX_BYTES = 256 << 20
_MAX_PIECES = 1 << 22
_MAX_SPLITS = 1 << 28  # total characters of all splits of all pieces into two: the cost of finding the merges


@dataclasses.dataclass(frozen=True)
class Piece:
    text: str
    score: float = 0.0
    kind: int = NORMAL


@dataclasses.dataclass(frozen=True)
class Model:
    """A sentencepiece model; the names and defaults of the settings are those of the format.

    Attributes:
      charsmap: the precompiled normalization table; empty if there is none.
    """

    pieces: tuple[Piece, ...]
    model_type: int = UNIGRAM
    byte_fallback: bool = False
    unk_id: int = 0
    bos_id: int = 1
    eos_id: int = 2
    unk_piece: str = "<unk>"
    bos_piece: str = "<s>"
    eos_piece: str = "</s>"
    charsmap: bytes = b""
    add_dummy_prefix: bool = True
    remove_extra_whitespaces: bool = True
    escape_whitespaces: bool = True

    @property
    def is_like_llama(self) -> bool:
        """Whether the model is BPE without normalization, which is what LlamaTokenizer of transformers computes."""
        plain = not self.charsmap and not self.remove_extra_whitespaces and self.escape_whitespaces
        return self.model_type == BPE and plain


_TRAINER = {
    3: "model_type",
    35: "byte_fallback",
    40: "unk_id",
    41: "bos_id",
    42: "eos_id",
    45: "unk_piece",
    46: "bos_piece",
    47: "eos_piece",
}
_NORMALIZER = {
    2: "charsmap",
    3: "add_dummy_prefix",
    4: "remove_extra_whitespaces",
    5: "escape_whitespaces",
}


def read(path: Path) -> Model:
    """Reads a `.model` file.

    Raises:
      UserError: the file is not a sentencepiece model, is damaged, or is empty.
    """
    data = json_files.read_bytes(path, max_bytes=_MAX_BYTES)
    if data is None:
        raise UserError(f"tokenizer file {path} does not exist; check the tokenizer setting")
    if _TIKTOKEN.match(data):
        raise UserError(
            f"{path} is a tiktoken model, which holds neither the special tokens nor the pattern that splits a text:"
            " use the tokenizer.json of the same model in the format of Hugging Face"
        )
    try:
        return _parse(data)
    except (ValueError, IndexError, struct.error, OverflowError) as error:
        raise UserError(
            f"{path} is not a readable sentencepiece model ({json_files.one_line(error)}); check the tokenizer"
            " setting"
        ) from error


def _parse(data: bytes) -> Model:
    pieces: list[Piece] = []
    settings: dict[str, int | bytes] = {}
    for number, value in _fields(data):
        if number == 1:
            pieces.append(_piece(_bytes(value)))
            if len(pieces) > _MAX_PIECES:
                raise ValueError(f"more than {_MAX_PIECES} pieces")
        elif number in (2, 3):
            names = _TRAINER if number == 2 else _NORMALIZER
            settings |= {names[n]: v for n, v in _fields(_bytes(value)) if n in names}
    if not pieces:
        raise ValueError("it has no pieces")
    if sum(len(piece.text) ** 2 for piece in pieces) > _MAX_SPLITS:
        raise ValueError("its pieces are too long")
    return Model(tuple(pieces), **_typed(settings))


def _typed(settings: dict[str, int | bytes]) -> dict:
    kinds = {field.name: type(field.default) for field in dataclasses.fields(Model)}
    values: dict = {}
    for name, value in settings.items():
        if kinds[name] in (str, bytes):
            raw = _bytes(value)
            values[name] = raw.decode() if kinds[name] is str else raw
        elif not isinstance(value, int):
            raise ValueError(f"{name} is not a number")
        else:
            signed = value - (1 << 64) if value >= 1 << 63 else value
            values[name] = bool(value) if kinds[name] is bool else signed
    return values


def _piece(data: bytes) -> Piece:
    text, score, kind = "", 0.0, NORMAL
    for number, value in _fields(data):
        if number == 1:
            text = _bytes(value).decode()
        elif number == 2:
            (score,) = struct.unpack("<f", _bytes(value))
        elif number == 3 and isinstance(value, int):
            kind = value
    if score != score or not NORMAL <= kind <= BYTE:
        raise ValueError(f"piece {text[:20]!r} has score {score} and type {kind}")
    return Piece(text, score, kind)


def _bytes(value: int | bytes) -> bytes:
    if not isinstance(value, bytes):
        raise ValueError("a number where text is expected")
    return value


def _fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """(number, value) of each field; the value is an integer for varints, bytes for other types."""
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        number, wire = key >> 3, key & 7
        if wire == 0:
            value, at = _varint(data, at)
            yield number, value
            continue
        if wire == 2:
            size, at = _varint(data, at)
        elif wire in (1, 5):
            size = 8 if wire == 1 else 4
        else:
            raise ValueError(f"wire type {wire} at byte {at}")
        if number == 0 or at + size > len(data):
            raise ValueError(f"a field of {size} bytes at byte {at} of {len(data)}")
        yield number, data[at : at + size]
        at += size


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        at += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value & ((1 << 64) - 1), at
        shift += 7
        if shift > 63:
            raise ValueError(f"a number without end at byte {at}")


def merges_of(vocab: dict[str, int]) -> list[tuple[str, str]]:
    """The merges of a BPE vocabulary: every split of a piece into two other pieces, ordered by the ids.

    The order is that of `generate_merges` of transformers; it agrees with sentencepiece's scores, which are minus the
    id.
    """
    merges: list[tuple[int, int, int, int, int, str, str]] = []
    for piece, rank in vocab.items():
        for cut in range(1, len(piece)):
            left, right = piece[:cut], piece[cut:]
            if left in vocab and right in vocab:
                merges.append((rank, len(left), len(right), vocab[left], vocab[right], left, right))
    merges.sort()
    return [(left, right) for *_, left, right in merges]
