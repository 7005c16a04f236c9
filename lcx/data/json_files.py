"""Untrusted JSON files, with checks of their size, kind of file, encoding, nesting and types.

Reading such a file gives a value of the requested type or raises a one-line UserError, whatever its content.
"""

import collections
import errno
import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lcx import small_files
from lcx.errors import UserError

log = logging.getLogger(__name__)

MAX_BYTES = 64 << 20
LARGEST_ID = 2**31 - 2  # ids are int32, and a vocabulary's size is its largest id + 1


def read_bytes(path: Path, *, max_bytes: int) -> bytes | None:
    """The bytes of a regular file; None if it does not exist.

    Raises:
      UserError: it is a folder, a pipe, a device or a broken link, cannot be read, or is too large.
    """
    try:
        if not os.path.lexists(path):
            return None
        return small_files.read_bytes(path, max_bytes=max_bytes)
    except (OSError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        if getattr(error, "errno", None) == errno.ENOENT:
            raise UserError(f"{path} is a link to a file that does not exist: restore the file") from error
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{path} cannot be read ({reason}): restore the file or its permissions") from error


def read_object(path: Path, *, max_bytes: int = MAX_BYTES) -> dict[str, Any]:
    """The JSON object in a file; {} if there is no such file.

    If a key occurs twice, the last value is used, as in Python's json module, and a warning names the key.

    Raises:
      UserError: as for `read_bytes`, or the content is not UTF-8, not JSON, nested too deeply, or not an object.
    """
    data = read_bytes(path, max_bytes=max_bytes)
    return {} if data is None else parse_object(data, path)


def parse_object(data: bytes, path: Path | str) -> dict[str, Any]:
    """The JSON object in `data`; `path` is for error messages. Raises UserError as `read_object` does."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            twice = collections.Counter(key for key, _ in pairs).most_common(1)[0][0]
            log.warning("%s: the key %.60r occurs more than once; the last value is used", path, twice)
        return found

    try:
        value = json.loads(data.decode("utf-8-sig"), object_pairs_hook=unique)
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 (byte {error.start}): restore the file") from error
    except RecursionError as error:
        raise UserError(f"{path} is nested too deeply to be read as JSON: restore the file") from error
    except (ValueError, MemoryError) as error:
        raise UserError(f"{path} is not readable JSON ({one_line(error)}); restore the file") from error
    if not isinstance(value, dict):
        raise UserError(f"{path} holds a {type(value).__name__}, expected a JSON object: restore the file")
    return value


def one_line(value: object, *, limit: int = 160) -> str:
    """`value` as text that fits in a message: without line breaks, cut to `limit` characters."""
    text = " ".join(str(value).split())
    return text if len(text) <= limit else text[: limit - 3] + "..."


def text(data: Mapping[str, Any], key: str, path: Path | str) -> str | None:
    """The string at `key`; None if it is absent or null. Raises UserError for another type."""
    value = data.get(key)
    if value is not None and not is_text(value):
        raise wrong(path, key, value, "a string")
    return value


def boolean(data: Mapping[str, Any], key: str, path: Path | str) -> bool | None:
    """True or False at `key`; None if it is absent or null. Raises UserError for another type."""
    value = data.get(key)
    if value is not None and not isinstance(value, bool):
        raise wrong(path, key, value, "true or false")
    return value


def token_id(value: Any, key: str, path: Path | str) -> int:
    """`value` as a token id. Raises UserError if it is not one."""
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= LARGEST_ID:
        raise wrong(path, key, value, f"a token id, an integer from 0 to {LARGEST_ID}")
    return value


def is_text(value: Any) -> bool:
    """Whether `value` is a string that UTF-8 can encode: JSON strings can contain unpaired surrogates."""
    return isinstance(value, str) and not any("\ud800" <= letter <= "\udfff" for letter in value)


def wrong(path: Path | str, key: str, value: Any, expected: str) -> UserError:
    """The error for a value of the wrong type."""
    shown = (
        ascii(value) if isinstance(value, str | int | float | bool | None) else f"a {type(value).__name__}"
    )
    return UserError(f"{path}: {one_line(key, limit=60)} is {one_line(shown, limit=60)}, expected {expected}")
