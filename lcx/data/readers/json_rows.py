"""Rows of JSON: one object per line, an array of objects, or consecutive objects."""

import collections
import json
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from lcx.data.readers import Row, SourceFile, shown, streams
from lcx.data.readers.tally import Tally
from lcx.errors import UserError

_PIECE = 64 << 10  # characters to read, at least, before a value is parsed
_CHAT = ("messages", "conversations", "conversation")  # lists of objects that form one row
_HALF = re.compile(r"\\u[dD][89a-fA-F]")  # the JSON escape of a surrogate
_SURROGATE = re.compile("[\ud800-\udfff]")
_SPACE = re.compile(r"[ \t\r\n]*")


def read_lines(file: SourceFile, tally: Tally) -> Iterator[Row]:
    """Yields one row per line; the name of a row ends in the number of its line."""
    decoder = _decoder(file, tally)
    for number, (line, position) in enumerate(streams.lines(file.path), start=1):
        if not line.strip():
            continue
        place = f"{shown(file.path)} line {number}"
        try:
            text = streams.decode(line, place)
            if not text.strip():  # a byte order mark alone
                continue
            record = _checked(_repaired(_loads(text, place, decoder), text, place, tally), place)
        except UserError as error:
            tally.bad_row(error)
            continue
        yield Row(place, f"{file.name}:{number}", record, position)


def _decoder(file: SourceFile, tally: Tally) -> json.JSONDecoder:
    """A decoder that reports keys that occur twice in an object; their last value is used, as in Python."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            key = collections.Counter(key for key, _ in pairs).most_common(1)[0][0]
            tally.remark(
                f"{file.name} has an object in which the key {key!r:.60} occurs twice; the last value is used"
            )
        return found

    return json.JSONDecoder(object_pairs_hook=unique)


def _fault(error: json.JSONDecodeError) -> str:
    return error.msg.removesuffix(" at")  # some messages end where json itself adds the place


def _loads(text: str, place: str, decoder: json.JSONDecoder) -> Any:
    try:
        return decoder.decode(text)
    except json.JSONDecodeError as error:
        raise UserError(
            f"{place} is not JSON: {_fault(error)} at column {error.colno}; expected one JSON object per line"
            " (Dataset.on_bad_line='skip' leaves such lines out)"
        ) from error
    except (ValueError, RecursionError) as error:
        raise _beyond(place, error) from error


def _repaired(value: Any, text: str, place: str, tally: Tally) -> Any:
    """A value with unpaired surrogates, which JSON can contain but UTF-8 cannot encode, replaced by U+FFFD."""
    if not _HALF.search(text):
        return value
    try:
        repaired = _without_halves(value)
    except RecursionError as error:
        raise _beyond(place, error) from error
    tally.replaced += repaired != value
    return repaired


def _without_halves(value: Any) -> Any:
    if isinstance(value, str):
        return _SURROGATE.sub("\ufffd", value)
    if isinstance(value, list):
        return [_without_halves(one) for one in value]
    if isinstance(value, dict):
        return {_without_halves(name): _without_halves(one) for name, one in value.items()}
    return value


def _beyond(place: str, error: Exception) -> UserError:
    reason = "nested too deeply" if isinstance(error, RecursionError) else str(error).partition(";")[0]
    return UserError(f"{place} is JSON that cannot be read: {reason}; take it out of Dataset.source")


def _checked(record: Any, place: str) -> dict[str, Any]:
    if not isinstance(record, dict):
        raise UserError(
            f"{place} has a {type(record).__name__}, expected a JSON object with the text in a field"
            " (Dataset.text_field)"
        )
    return record


def read_values(
    file: SourceFile, tally: Tally, *, is_row: Callable[[Mapping[str, Any]], bool]
) -> Iterator[Row]:
    """Yields the rows of arrays of objects and of single objects; the name of a row ends in its number.

    Args:
      is_row: whether an object is a row. An object that is not, and contains exactly one list of objects, such as
        {"version": 1, "data": [...]}, gives the objects of that list as rows.

    An array is parsed element by element, so only one element is in memory at a time.
    """
    number = 0
    for place, value, text, position in _values(file.path, _decoder(file, tally)):
        try:
            records = _rows_of(_checked(_repaired(value, text, place, tally), place), is_row)
        except UserError as error:
            tally.bad_row(error)
            records = []
        for record in records:
            yield Row(f"{place}, row {number}", f"{file.name}:{number}", record, position)
            number += 1


def _rows_of(value: dict[str, Any], is_row: Callable[[Mapping[str, Any]], bool]) -> list[dict[str, Any]]:
    lists = [
        v
        for k, v in value.items()
        if k not in _CHAT and isinstance(v, list) and v and all(isinstance(one, dict) for one in v)
    ]
    return [value] if len(lists) != 1 or any(k in value for k in _CHAT) or is_row(value) else lists[0]


def _values(path: str, decoder: json.JSONDecoder) -> Iterator[tuple[str, Any, str, int]]:
    """(place, value, its JSON, position on disk) of each array element, and of each value outside of arrays."""
    scanner = _Scanner(path, decoder)
    while scanner.peek():
        if scanner.peek() != "[":
            yield scanner.value()
            continue
        scanner.take("[")
        if scanner.peek() == "]":
            scanner.take("]")
            continue
        while True:
            yield scanner.value()
            if scanner.peek() == "]":
                break
            scanner.take(",")
        scanner.take("]")


class _Scanner:
    """Parses JSON values from a text that is read in pieces."""

    def __init__(self, path: str, decoder: json.JSONDecoder):
        self._path, self._pieces = path, streams.texts(path)
        self._limit = streams.most(path)
        self._text, self._at, self._line, self._position = "", 0, 1, 0
        self._ended = False
        self._decoder = decoder

    def peek(self) -> str:
        """The next character that is not white space; "" at the end."""
        while True:
            end = _SPACE.match(self._text, self._at).end()
            self._line += self._text.count("\n", self._at, end)
            self._at = end
            if end < len(self._text):
                return self._text[end]
            if not self._read(_PIECE):
                return ""

    def take(self, expected: str) -> None:
        found = self.peek()
        if found != expected:
            end = "the file ends" if not found else f"there is {found!r}"
            raise UserError(
                f"{shown(self._path)} line {self._line} is not JSON: {end} where {expected!r} is expected; correct it"
            )
        self._at += 1

    def value(self) -> tuple[str, Any, str, int]:
        self.peek()
        place = f"{shown(self._path)} line {self._line}"
        while True:
            try:
                value, end = self._decoder.raw_decode(self._text, self._at)
            except json.JSONDecodeError as error:
                line = self._line + self._text.count("\n", self._at, error.pos)
                incomplete = error.msg.startswith("Unterminated") or error.pos >= len(self._text) - 16
                if incomplete and self._read(len(self._text) - self._at):
                    continue
                raise UserError(
                    f"{shown(self._path)} line {line} is not JSON: {_fault(error)}; correct it"
                    " (on_bad_line='skip' needs one object per line)"
                ) from error
            except (ValueError, RecursionError) as error:
                raise _beyond(place, error) from error
            if end == len(self._text) and not isinstance(value, dict | list) and self._read(_PIECE):
                continue  # the number may continue in the next piece
            text, self._at = self._text[self._at : end], end
            self._line += text.count("\n")
            return place, value, text, self._position

    def _read(self, wanted: int) -> bool:
        """Reads at least `wanted` more characters, or the rest of the file; False at the end."""
        parts, size = [self._text[self._at :]], 0
        while size < max(wanted, _PIECE) and not self._ended:
            text, self._position = next(self._pieces, ("", self._position))
            self._ended = not text
            parts.append(text)
            size += len(text)
        self._text, self._at = "".join(parts), 0
        if len(self._text) > self._limit:
            raise streams.too_long(self._path, "a JSON value", self._limit)
        return size > 0
