"""Result files that grow while a job runs, and that the same job continues after it was stopped or killed.

    with GrowingFiles(("scores.tsv", "scores.vcf"), settings={...}) as files:
        for step in range(files.done, steps):
            files.append(texts_of(step), done=step + 1)

While it runs, the results are in scores.tsv.partial and scores.vcf.partial, and scores.tsv.progress says how much of
them is complete. At the end they are renamed. A job with the same settings continues at `done`.
"""

import contextlib
import json
import logging
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, BinaryIO, Self

from lcx import paths
from lcx.errors import UserError
from lcx.locks import LOCK

log = logging.getLogger(__name__)


class GrowingFiles:
    """Context manager for text files that grow together.

    Args:
      files: the final paths; their folders are created.
      settings: whatever decides the contents of the files, as JSON; files of other settings are not continued.
      setting: the flag that names the files, for messages.
      overwrite: whether finished files, and unfinished ones of other settings, are replaced.
      resume: whether unfinished files are continued; otherwise they are replaced.

    Attributes:
      done: how many steps an earlier run has completed.

    Raises:
      UserError: a file exists, is being written by another process, or belongs to a run of other settings.
    """

    def __init__(
        self,
        files: Sequence[str],
        *,
        settings: Mapping[str, Any],
        setting: str = "--output",
        overwrite: bool = False,
        resume: bool = True,
    ):
        self._paths = [paths.destination_file(file, setting) for file in files]
        self._settings = json.loads(json.dumps(settings))
        self._setting, self._overwrite, self._resume = setting, overwrite, resume
        self._state = self._paths[0].with_name(f"{self._paths[0].name}.progress")
        self._stack = contextlib.ExitStack()
        self._streams: list[BinaryIO] = []
        self.done = 0

    def __enter__(self) -> Self:
        with contextlib.ExitStack() as undo:
            undo.push(self._stack)
            for path in self._paths:
                lock = f"{path.name}{LOCK}"
                self._stack.enter_context(paths.claimed(path.parent, self._setting, lock=lock, of=str(path)))
                paths.refuse_device(path, self._setting)
                if path.is_dir() or (path.exists() and not self._overwrite):
                    what = "a folder" if path.is_dir() else "there already"
                    raise UserError(f"{path} is {what}: choose another {self._setting}, or set --overwrite")
            sizes = self._continued()
            for path, size in zip(self._paths, sizes, strict=True):
                stream = self._stack.enter_context(open(_partial(path), "r+b" if self.done else "wb"))
                stream.truncate(size)
                stream.seek(size)
                self._streams.append(stream)
            undo.pop_all()
        return self

    def __exit__(self, kind, value, traceback) -> None:
        if kind is not None and not self.done:  # nothing to continue: a mistake in the input, most likely
            for path in (*map(_partial, self._paths), self._state):
                path.unlink(missing_ok=True)
        self._stack.__exit__(kind, value, traceback)  # removes folders that it made and that are empty after a mistake

    def append(self, texts: Sequence[str], *, done: int) -> None:
        """Adds a text to each file; from then on, an interrupted job continues after `done` steps."""
        for stream, text in zip(self._streams, texts, strict=True):
            stream.write(text.encode("utf-8", "surrogateescape"))
            stream.flush()
            os.fsync(stream.fileno())
        state = {"done": done, "bytes": [stream.tell() for stream in self._streams], "settings": self._settings}
        new = self._state.with_name(f"{self._state.name}.new")
        new.write_text(json.dumps(state), "utf-8")
        os.replace(new, self._state)
        self.done = done

    def finish(self) -> None:
        """Renames the files to their final names."""
        for stream, path in zip(self._streams, self._paths, strict=True):
            stream.close()
            os.replace(_partial(path), path)
        self._state.unlink(missing_ok=True)

    def _continued(self) -> list[int]:
        """Sets `done`; the sizes in bytes of the parts of the files that are complete."""
        nothing = [0] * len(self._paths)
        if not self._resume:
            return nothing
        try:
            state = json.loads(self._state.read_text("utf-8"))
            done, sizes, settings = int(state["done"]), list(map(int, state["bytes"])), state["settings"]
        except FileNotFoundError:
            return nothing
        except (OSError, ValueError, KeyError, TypeError):
            log.warning("%s cannot be read: starting from the beginning", self._state)
            return nothing
        different = [name for name in {*settings, *self._settings} if settings.get(name) != self._settings.get(name)]
        whole = len(sizes) == len(self._paths) and all(
            _partial(path).is_file() and _partial(path).stat().st_size >= size
            for path, size in zip(self._paths, sizes, strict=True)
        )
        if different and not self._overwrite:
            name = sorted(different)[0]
            raise UserError(
                f"{_partial(self._paths[0])} is of a run with {name} {settings.get(name)!r}, and here it is "
                f"{self._settings.get(name)!r}: choose another {self._setting}, or set --overwrite"
            )
        if different or not whole:
            return nothing
        self.done = done
        return sizes


def _partial(path: pathlib.Path) -> pathlib.Path:
    return path.with_name(f"{path.name}.partial")


def file_identity(path: str) -> list[Any]:
    """What tells a file from a later version of it, for the settings of a job: its path, size and time."""
    path = os.path.abspath(os.path.expanduser(path))
    status = os.stat(path)
    return [path, status.st_size, status.st_mtime_ns]
