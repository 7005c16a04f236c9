"""The layout of a checkpoints folder, read without Orbax and without reading any array.

A checkpoints folder holds one folder per step, named by its number. A step holds one folder per item: trees
of arrays (`params`, `opt_state`, ...), JSON documents (`meta`, `data`, ...) and the JSON item
`fingerprints`, which records the shape, dtype and fingerprint of every array and the checksum of every JSON item.
A step is valid only once its commit marker exists, which a save writes last.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import logging
import re
import shutil
import zlib
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
from etils import epath

from lcx.errors import UserError

COMMIT_MARKER = "commit_success.txt"
RECORD_ITEM = "fingerprints"

_log = logging.getLogger("lcx.checkpoint")
_known_damage: dict[tuple[str, int], str] = {}  # (step folder, time of its commit) -> what is damaged


class Damaged(Exception):
    """A step is damaged or incomplete and cannot be used; the message gives the reason in a few words."""


class DamagedStep(UserError):
    """A step that was asked for, or is being read, is damaged. `find_step` passes over it from now on."""

    def __init__(self, step_dir: Any, what: str):
        if epath.Path(step_dir).exists():
            said = f"checkpoint {step_dir} is damaged: {what}; use another step"
        else:
            said = (
                f"checkpoint {step_dir} is gone: the run that writes there has deleted it meanwhile; repeat the "
                "command, or raise Trainer.keep_checkpoints"
            )
        super().__init__(said)
        self.step_dir = epath.Path(step_dir).resolve()
        remember_damage(step_dir, what)


@dataclasses.dataclass(frozen=True)
class Entry:
    """What a checkpoint should hold at one key of an item.

    Attributes:
      key_impl: the PRNG implementation, if the array is the data of a typed key; else None.
    """

    shape: tuple[int, ...]
    dtype: str
    fingerprint: int
    key_impl: str | None = None


@dataclasses.dataclass(frozen=True)
class Record:
    """What a checkpoint should hold.

    Attributes:
      arrays: {item: {key: Entry}}, for items that are trees of arrays.
      json: {item: CRC-32 of the document}, for items that are JSON.
    """

    arrays: dict[str, dict[str, Entry]]
    json: dict[str, int]

    def to_json(self) -> dict[str, Any]:
        body = {
            "format": 1,
            "arrays": {
                item: {key: dataclasses.asdict(entry) for key, entry in entries.items()}
                for item, entries in self.arrays.items()
            },
            "json": self.json,
        }
        return body | {"checksum": checksum(body)}

    @classmethod
    def from_json(cls, document: dict[str, Any]) -> Record:
        """The inverse of to_json. Raises ValueError if the document does not match its checksum."""
        body = {name: value for name, value in document.items() if name != "checksum"}
        if document.get("checksum") != checksum(body) or body.get("format") != 1:
            raise ValueError("the record of fingerprints does not match its own checksum")
        arrays = {
            item: {key: Entry(**(entry | {"shape": tuple(entry["shape"])})) for key, entry in entries.items()}
            for item, entries in body["arrays"].items()
        }
        return cls(arrays=arrays, json=body["json"])


def checksum(document: Any) -> int:
    """CRC-32 of a JSON document in a canonical form, so that writing and reading it back does not change the value."""
    return zlib.crc32(json.dumps(document, sort_keys=True, separators=(",", ":")).encode())


def committed_steps(directory: Any) -> list[int]:
    """Steps on disk that carry the commit marker, oldest first; empty when the folder does not exist."""
    return sorted(step for step, done in step_folders(epath.Path(directory)) if done)


def step_folders(directory: epath.Path) -> Iterator[tuple[int, bool]]:
    """(step, whether it is committed) of every step folder, in no particular order."""
    if directory.is_dir():
        for child in directory.iterdir():
            if child.name.isdecimal() and str(int(child.name)) == child.name:
                yield int(child.name), (child / COMMIT_MARKER).exists()


def find_step(path: Any) -> tuple[epath.Path, int]:
    """(checkpoints folder, step) for a path that is a workdir, a checkpoints folder or one step folder.

    The step is the newest usable one, or `path` itself if it is a step folder (then `path.name == str(step)`). A step
    is usable if its JSON documents are intact and no array of it was found damaged before (`remember_damage`); a step
    that is passed over is named in a warning.

    Raises:
      UserError: anything else is at `path`, or no step is usable. The message says what was found.
    """
    given = epath.Path(path).expanduser().resolve()
    if not given.is_dir():
        raise UserError(
            f"no checkpoint at {path}: {'a file' if given.exists() else 'nothing'} is there; expected a workdir, "
            "its checkpoints folder or one step folder"
        )
    if given.name.isdecimal() and (given / COMMIT_MARKER).exists():
        return given.parent, int(given.name)
    directory = given / "checkpoints" if (given / "checkpoints").is_dir() else given
    if steps := committed_steps(directory):
        return directory, _newest_usable(directory, steps)
    if (given / COMMIT_MARKER).exists() and (given / RECORD_ITEM).is_dir():
        raise UserError(
            f"{path} is a step folder under another name; rename it to its step number, such as 1000"
        )
    unfinished = sorted(step for step, _ in step_folders(directory))
    if unfinished or (given / RECORD_ITEM).is_dir():
        what = f"only unfinished saves ({few(unfinished)})" if unfinished else "a save that never finished"
        raise UserError(f"no checkpoint at {path}: it holds {what}; pass a folder with a committed step")
    raise UserError(
        f"no checkpoint at {path}: found no step folders; expected a workdir, its checkpoints folder or one step folder"
    )


def remember_damage(step_dir: Any, what: str) -> None:
    """Lets `find_step` pass over this step for the rest of the process, unless the step is written again."""
    step_dir = epath.Path(step_dir)
    _known_damage[_identity(step_dir)] = f"step {step_dir.name}: {what}"


def say_damage(directory: Any, bad: Iterable[str], step: int) -> None:
    """Logs once that the steps in `bad` ("step 8: what is damaged") are passed over and `step` is used."""
    _warn_once(f"damaged checkpoint in {directory} ({'; '.join(bad)}); using step {step}")


def nothing_usable(directory: Any, bad: Iterable[str]) -> UserError:
    return UserError(f"no usable checkpoint in {directory}: {'; '.join(bad)}; restore files from a backup")


def _newest_usable(directory: epath.Path, steps: list[int]) -> int:
    bad: list[str] = []
    for step in reversed(steps):
        step_dir = directory / str(step)
        try:
            record = load_record(step_dir)
            for name in record.json:
                load_json(step_dir, name, record)
            what = _known_damage.get(_identity(step_dir))
        except Damaged as damage:
            what = f"step {step}: {damage}"
        if what is None:
            if bad:
                say_damage(directory, bad, step)
            return step
        bad.append(what)
    if (now := committed_steps(directory)) and not {*now} & {*steps}:  # the run that writes here has replaced them
        return _newest_usable(directory, now)
    raise nothing_usable(directory, bad)


def _identity(step_dir: epath.Path) -> tuple[str, int]:
    marker = step_dir / COMMIT_MARKER
    return str(step_dir.resolve()), int(marker.stat().mtime * 1e6) if marker.exists() else 0


@functools.cache
def _warn_once(line: str) -> None:
    _log.warning("%s", line)


def read_record(step_dir: Any) -> Record:
    """The record of what a step holds. Raises DamagedStep if the step was not written by lcx or is damaged."""
    try:
        return load_record(epath.Path(step_dir))
    except Damaged as bad:
        raise DamagedStep(step_dir, str(bad)) from None


def read_json(step_dir: Any, name: str) -> dict[str, Any]:
    """A JSON item of one step folder, verified. Raises UserError if it is missing, DamagedStep if it is damaged."""
    record = read_record(step_dir)
    if name not in record.json:
        raise UserError(f"checkpoint {step_dir} has no item {name!r}; found {few(sorted(record.json))}")
    try:
        return load_json(epath.Path(step_dir), name, record)
    except Damaged as bad:
        raise DamagedStep(step_dir, str(bad)) from None


def metadata(path: Any) -> dict[str, Any]:
    """{item: nested dict of jax.ShapeDtypeStruct} of the newest (or named) step, without reading any array.

    `path` is whatever `find_step` accepts. Typed PRNG keys appear as their uint32 key data.
    """
    import jax
    import jax.numpy as jnp
    from flax.traverse_util import unflatten_dict

    directory, step = find_step(path)
    record = read_record(directory / str(step))
    return {
        item: unflatten_dict(
            {key: jax.ShapeDtypeStruct(e.shape, jnp.dtype(e.dtype)) for key, e in entries.items()}, sep="/"
        )
        for item, entries in record.arrays.items()
    }


def load_record(step_dir: epath.Path) -> Record:
    try:
        return Record.from_json(json.loads((step_dir / RECORD_ITEM / "metadata").read_text()))
    except FileNotFoundError:
        raise Damaged(
            "it has no record of fingerprints (not written by lcx, or files were deleted)"
        ) from None
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        raise Damaged(f"the record of fingerprints is unreadable ({brief(error)})") from None


def load_json(step_dir: epath.Path, name: str, record: Record) -> dict[str, Any]:
    try:
        document = json.loads((step_dir / name / "metadata").read_text())
    except (ValueError, OSError) as error:
        raise Damaged(f"{name} is unreadable ({brief(error)})") from None
    if checksum(document) != record.json[name]:
        raise Damaged(f"{name} does not match its checksum")
    return document


def few(names: Iterable[Any], limit: int = 3) -> str:
    """The first names and how many more there are, for a one-line message."""
    names = [str(name) for name in names]
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more if names else "none"


def brief(error: BaseException) -> str:
    """An exception as one short line, without the kilobytes of detail that tensorstore and jax append."""
    text = " ".join(str(error).split())
    for tail in (
        " See full TensorStore details",
        " [tensorstore_spec",
        " [source locations",
        " This usually happens",
    ):
        text = text.split(tail)[0]
    return f"{type(error).__name__}: {text}"[:200] if text else type(error).__name__


def why_unreadable(what: str, error: BaseException) -> str:
    """Why an item cannot be read, in the same words from every reader: which of its arrays fails first is chance."""
    for cause in (error, error.__cause__):
        if code := re.match(r"[A-Z]+(_[A-Z]+)*(?=: )", str(cause)):  # of tensorstore
            return f"{what} is unreadable ({code[0]} in its files)"
    return f"{what} is unreadable ({brief(error)})"


def why_not_written(error: BaseException, directory: Any, num_bytes: int) -> str:
    """Why a write of num_bytes failed, and how much space the disk has left."""
    causes = [error]
    while (before := causes[-1].__cause__ or causes[-1].__context__) is not None:
        causes.append(before)
    # The process that failed also reports the barrier that it then missed; the actual reason is an earlier cause.
    reason = brief(next((cause for cause in causes if "Barrier timed out" not in str(cause)), error))
    if any(sign in str(cause) for cause in causes for sign in ("No space left", "Disk quota")):
        reason = f"no space left on the disk of {directory}"
    try:
        free = f", {size_text(shutil.disk_usage(directory).free)} are free"
    except OSError:
        free = ""  # not a local disk
    return f"{reason} (it needs up to {size_text(num_bytes)}{free})"


def size_text(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:.2f} GB" if num_bytes >= 1e8 else f"{num_bytes / 1e6:.1f} MB"


def plain(document: Any) -> Any:
    """The document as it will be read back: numpy scalars become numbers. Raises TypeError for other objects."""
    return json.loads(json.dumps(document, default=_number))


def _number(x: Any) -> Any:
    if isinstance(x, np.generic):
        return x.item()
    raise TypeError(f"cannot write a {type(x).__name__} as json")
