"""What a model has answered so far, kept on disk, so that an interrupted evaluation goes on where it stopped.

Each line of the file is one answer, under a key made of everything that determines it. The first line identifies the
weights and the versions; if they are others, the old answers do not count and the file starts again.
"""

import contextlib
import contextvars
import hashlib
import json
import os
import pathlib
from collections.abc import Iterator
from typing import Any

import jax

_current: contextvars.ContextVar["Journal | None"] = contextvars.ContextVar("journal", default=None)


class Journal:
    """Answers by key, in a file of JSON lines. A line that a kill has cut short is dropped."""

    def __init__(self, path: str | os.PathLike, identity: Any):
        self._path, self._known = pathlib.Path(path), {}
        self._identity = json.dumps({"of": identity}, sort_keys=True)
        self.reused = 0
        lines = self._read()
        if lines[:1] == [self._identity]:
            for line in lines[1:]:
                with contextlib.suppress(ValueError, TypeError, KeyError):
                    entry = json.loads(line)
                    self._known[entry["key"]] = entry["value"]
        # Written anew, without damaged lines: what follows a line without its end would be damaged, too.
        self._path.parent.mkdir(parents=True, exist_ok=True)
        partial = self._path.with_name(f"{self._path.name}.partial")
        kept = [json.dumps({"key": key, "value": value}) for key, value in self._known.items()]
        partial.write_text("\n".join([self._identity, *kept]) + "\n", encoding="utf-8")
        os.replace(partial, self._path)
        self._file = open(self._path, "a", encoding="utf-8")  # noqa: SIM115 (closed by `close`)

    def _read(self) -> list[str]:
        try:
            return self._path.read_text(encoding="utf-8", errors="replace").splitlines()
        except FileNotFoundError:
            return []

    def get(self, key: str) -> Any:
        """The value under a key, or None."""
        value = self._known.get(key)
        self.reused += value is not None
        return value

    def put(self, key: str, value: Any) -> None:
        """Keeps a value, which is JSON; it is in the file when this returns."""
        self._known[key] = value
        self._file.write(json.dumps({"key": key, "value": value}) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


@contextlib.contextmanager
def keeping(path: str | os.PathLike | None, identity: Any) -> Iterator[Journal | None]:
    """Within the context, `current` is a journal in this file.

    With several processes, or without a path, there is none: they would have to agree on what is known.
    """
    if path is None or jax.process_count() > 1:
        yield None
        return
    journal = Journal(path, identity)
    token = _current.set(journal)
    try:
        yield journal
    finally:
        _current.reset(token)
        journal.close()


def current() -> Journal | None:
    """The journal of the evaluation that is running, or None."""
    return _current.get()


def key_of(*parts: Any) -> str:
    """A key from bytes, and from values that are JSON."""
    digest = hashlib.sha256()
    for part in parts:
        data = part if isinstance(part, bytes) else json.dumps(part, sort_keys=True).encode()
        digest.update(len(data).to_bytes(8, "little") + data)
    return digest.hexdigest()[:32]
