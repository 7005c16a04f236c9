"""A workdir in a bucket: a folder on this machine, copied to the bucket while the run goes on.

Orbax cannot write to S3, and an object in a bucket cannot be appended to, as metrics.jsonl is. So a run writes to a
local folder, and a thread copies what changes: every file but locks and unfinished saves, a checkpoint step only once
it is committed, its commit marker last; what disappears here (steps past the number to keep) is then removed there.

The object `.lcx-writer` names the local folder that wrote last. A run that starts where that folder is continues from
it, even if not everything had been copied; any other run starts from what the bucket holds. While a run writes, it
renews the object, and another one is refused; after one that was killed on another machine, it waits until the object
has not been renewed for minutes. Of runs that find the object free at the same time, the one goes on that
creates `.lcx-writer.N`, N being one more than the number in the object: only one can create it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import json
import logging
import os
import pathlib
import shutil
import socket
import threading
import time
import uuid
from collections.abc import Iterable, Iterator
from typing import Any

from lcx.buckets import client
from lcx.buckets.copies import COMMIT_MARKER, STEP, cache
from lcx.errors import UserError

WRITER = ".lcx-writer"
_INDEX = ".lcx-copied.json"  # in the local folder: its id, and which state of each file has been copied
_EVERY_S = 10  # between two looks for what has changed
_RENEW_S = 60  # between two renewals of the writer's object
_STALE_S = 300  # a writer that has not renewed it for so long has ended
_LOOK_S = 5  # between two looks whether it has been renewed
_SKIP = (".lcx-lock", _INDEX, WRITER)

log = logging.getLogger(__name__)
_opened: list[_Workdir] = []  # by this process


@contextlib.contextmanager
def opened(url: str, every: int = 1) -> Iterator[pathlib.Path]:
    """The local folder of a workdir in a bucket, for as long as a run writes to it.

    Args:
      every: copy the checkpoints of steps that are multiples of it, and the last of the run; the others stay here.

    A bucket that fails in the meantime does not stop the run: a warning says so, and copying is tried again.

    Raises:
      UserError: the bucket cannot be read or written, another process writes there, or at the end not everything
        could be copied (the message names the local folder, which has it all).
    """
    workdir = _Workdir(client.normal(url), every)
    workdir.claim()
    workdir.keep()
    try:
        workdir.fetch()
    except BaseException:  # what is here is not what is there: nothing may be copied
        with contextlib.suppress(UserError):
            workdir.release()
        raise
    _opened.append(workdir)
    try:
        workdir.start()
        yield workdir.folder
    except BaseException:
        with contextlib.suppress(UserError):  # the exception under way matters more; the thread has warned
            workdir.close()
        raise
    finally:
        _opened.remove(workdir)
    workdir.close()


def copy_now() -> None:
    """Copies what is left of the workdirs of this process, which is about to end at once. A failure is a warning."""
    for workdir in _opened:
        try:
            workdir.close()
        except UserError as error:
            log.warning("%s", error)


@dataclasses.dataclass
class _Workdir:
    url: str
    every: int = 1

    def __post_init__(self) -> None:
        self.folder = cache(self.url, "workdirs")
        self._id, self._copied = self._read_index()
        self._there: set[str] = set()  # names in the bucket
        self._token = uuid.uuid4().hex
        self._stop, self._released, self._renewing = threading.Event(), threading.Event(), threading.Lock()
        self._thread: threading.Thread | None = None
        self._failing = False

    # ------------------------------------------------------------------------------------------------- one writer

    def claim(self) -> None:
        """Makes this process the only writer. Raises UserError if there is another one."""
        before = self._writer()
        if before.get("held") and not self._is_own(before) and not _has_ended(before):
            before = self._outlasted(before)
        self._continues = before.get("id") == self._id
        self._since = datetime.datetime.now().astimezone().isoformat(timespec="seconds")
        self._number = _number_of(before) + 1
        while (another := self._created()) and time.time() - another > _STALE_S:
            self._number += 1  # who created that one ended before it could write
        # Its objects are removed only once a later number is in the record: then what was read above is old.
        if another or self._writer() != before:
            raise UserError(
                f"{self.url} is being written by another process, which came first: change --workdir"
            )
        self._renew()

    def keep(self) -> None:
        """Renews the object until `release`, in a thread of its own: a copy may take longer than others wait."""
        threading.Thread(target=self._keep, daemon=True, name="lcx-bucket-writer").start()

    def _keep(self) -> None:
        pause: float = _RENEW_S
        while not self._released.wait(pause):
            pause = _LOOK_S  # soon again after a failure, of which the copies tell the reason
            with contextlib.suppress(Exception):
                self._check_alone()
                with self._renewing:
                    if not self._released.is_set():
                        self._renew()
                pause = _RENEW_S

    def release(self) -> None:
        """Lets another process write. Raises UserError if the bucket cannot be written."""
        self._released.set()
        with self._renewing:  # after this process's last renewal
            self._renew(held=False)

    def _is_own(self, writer: dict[str, Any]) -> bool:
        """Whether it is an earlier run of this process. In containers every process may be number 1."""
        of_this = {"id": self._id, "process": os.getpid(), "host": socket.gethostname()}
        return all(writer.get(key) == value for key, value in of_this.items())

    def _outlasted(self, before: dict[str, Any]) -> dict[str, Any]:
        """What the object holds once its writer has been silent for so long that it must have ended.

        A run that was killed on another machine could not say so, and the job goes on here. One that lives renews the
        object: then this one is refused, as it is at once where the other runs on this machine.
        """
        who = f"{before.get('process')} on {before.get('host')} since {before.get('since')}"
        refusal = UserError(
            f"{self.url} is being written by another process ({who}): wait for it to end, or change --workdir"
        )
        if before.get("host") == socket.gethostname():
            raise refusal
        about = "%s was being written by another process (%s): waiting for up to %d s to see whether it still is"
        log.warning(about, self.url, who, _STALE_S)
        end = time.monotonic() + _STALE_S  # whatever the clocks of the machines say
        while time.monotonic() < end:
            found = self._writer()
            if not found.get("held") or _has_ended(found):
                return found
            if found != before:
                raise refusal
            time.sleep(_LOOK_S)
        return before

    def _created(self) -> float:
        """0 if this process has created the object of its number; when another one has, if one has."""
        url, own = client.join(self.url, f"{WRITER}.{self._number}"), {"time": time.time(), "id": uuid.uuid4().hex}
        try:
            client.write(url, json.dumps(own).encode(), new=True)
        except FileExistsError:
            found = json.loads(client.read(url))  # it may be of this process: of a request whose answer was lost
            return 0.0 if found == own else float(found["time"])
        return 0.0

    def _renew(self, *, held: bool = True) -> None:
        record = {
            **{"id": self._id, "token": self._token, "held": held, "time": time.time(), "since": self._since},
            **{"host": socket.gethostname(), "process": os.getpid(), "number": self._number},
        }
        client.write(client.join(self.url, WRITER), json.dumps(record).encode())

    def _writer(self) -> dict[str, Any]:
        try:
            return json.loads(client.read(client.join(self.url, WRITER)))
        except (FileNotFoundError, ValueError):
            return {}

    # ---------------------------------------------------------------------------------------------- bucket -> here

    def fetch(self) -> None:
        """Brings the local folder to what the bucket holds, unless this folder is what was copied there last."""
        found = client.listing(self.url)
        self._there = {name for name in found if not name.startswith(WRITER)}
        older = found.keys() - self._there - {WRITER, f"{WRITER}.{self._number}"}
        client.remove(self.url, sorted(older))
        if self._continues and self.folder.is_dir():
            log.warning("%s goes on in %s, from where it was copied last", self.url, self.folder)
            return
        if self.folder.is_dir() and any(self._changed()):
            aside = self.folder.with_name(f"{self.folder.name}.{time.time_ns()}")
            self.folder.rename(aside)
            log.warning(
                "%s was continued elsewhere; what had not been copied there is in %s", self.url, aside
            )
        done = {marked[0] for name in self._there if (marked := _committed(name))}
        wanted = [name for name in sorted(self._there) if not (step := STEP.match(name)) or step[0] in done]
        if bad := [name for name in wanted if {"..", ".", ""} & set(name.split("/"))]:
            raise UserError(
                f"{self.url} holds an object named {bad[0]!r}, which would leave its folder: remove it"
            )
        size = sum(found[name].size for name in wanted)
        log.warning("%s is kept in %s (%.1f MB are copied there)", self.url, self.folder, size / 1e6)
        arriving = self.folder.with_name(f"{self.folder.name}.lcx-partial")
        for left in (self.folder, arriving):
            shutil.rmtree(left, ignore_errors=True)
        arriving.mkdir(parents=True)
        client.download(self.url, [(name, arriving / name) for name in wanted])
        arriving.rename(self.folder)
        self._copied = {name: state for name in wanted if (state := self._state(name))}
        self._write_index()

    # ---------------------------------------------------------------------------------------------- here -> bucket

    def start(self) -> None:
        self._thread = threading.Thread(target=self._watch, daemon=True, name="lcx-bucket-workdir")
        self._thread.start()

    def close(self) -> None:
        """Copies what is left. Raises UserError if that fails."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
        try:
            self.push(last=True)
            self.release()
        except UserError as error:
            raise UserError(
                f"not all of the run is in {self.url}: {error}; all of it is in {self.folder}: run the same command "
                "again to copy it"
            ) from error
        finally:
            self._released.set()
        log.warning("all of the run is in %s", self.url)

    def _watch(self) -> None:
        while not self._stop.wait(_EVERY_S):
            try:
                self.push()
                self._failing = False
            except Exception as error:  # nothing that happens here may end the run
                if not self._failing:
                    log.warning("%s is not up to date: %s; the run goes on", self.url, error)
                self._failing = True

    def _check_alone(self) -> None:
        if (found := self._writer()) and found.get("token") != self._token:
            raise UserError(
                f"another process writes there now ({found.get('process')} on {found.get('host')})"
            )

    def push(self, *, last: bool = False) -> None:
        """Copies what has changed, and removes what is gone. Steps come last: the lines before them are there then.

        Args:
          last: copy the newest steps too, whatever their number.
        """
        self._check_alone()
        if not (self.folder / _INDEX).exists():
            raise UserError(
                f"{self.folder}, which the run writes to, was removed: {self.url} stays as it is"
            )
        changed = sorted(self._changed())
        here = _newest(name for name in self._files() if _committed(name))
        due = {step for step in here.values() if last}
        due |= {own[0] for name in changed if (own := STEP.match(name)) and not _number(own[0]) % self.every}
        steps = [name for name in changed if (own := STEP.match(name)) and own[0] in due]
        self._send([name for name in changed if not STEP.match(name)])
        for step in sorted({STEP.match(name)[0] for name in steps}, key=len):  # type: ignore[index]
            files = [name for name in steps if name.startswith(step)]
            marker = f"{step}{COMMIT_MARKER}"
            self._send([name for name in files if name != marker])
            self._send([marker] if marker in files else [])
        # A step that was removed here for newer ones stays there until one of those is copied.
        there = _newest(name for name in self._there if _committed(name))
        held = {step for of, step in there.items() if of in here and _number(here[of]) > _number(step)}
        gone = [name for name in sorted(self._there) if not (self.folder / name).exists()]
        gone = [name for name in gone if not ((own := STEP.match(name)) and own[0] in held)]
        for names in ([n for n in gone if _committed(n)], [n for n in gone if not _committed(n)]):
            client.remove(self.url, names)  # first the markers, so that no half step counts
        self._there -= set(gone)
        for name in gone:
            self._copied.pop(name, None)
        if changed or gone:
            self._write_index()

    def _send(self, names: list[str]) -> None:
        states = {name: state for name in names if (state := self._state(name))}
        client.upload(self.url, [(self.folder / name, name) for name in states])
        self._there |= states.keys()
        self._copied |= states  # the state before the copy: what was added meanwhile is copied the next time

    def _changed(self) -> Iterator[str]:
        """Names of the files that are not in the bucket as they are here."""
        return (name for name in self._files() if self._state(name) != self._copied.get(name))

    def _files(self) -> Iterator[str]:
        """Names of the files that belong into the bucket."""
        for root, folders, files in os.walk(self.folder):
            folders[:] = [name for name in folders if name != "_trash" and not name.endswith("-tmp")]
            for file in files:
                name = (pathlib.Path(root) / file).relative_to(self.folder).as_posix()
                if file in _SKIP or file.endswith((".tmp", ".new", ".lcx-partial")):
                    continue
                step = STEP.match(name)
                if step and not (self.folder / step[0] / COMMIT_MARKER).exists():
                    continue
                yield name

    def _state(self, name: str) -> list[int] | None:
        try:
            status = (self.folder / name).stat()
        except OSError:
            return None
        return [status.st_size, status.st_mtime_ns]

    def _read_index(self) -> tuple[str, dict[str, list[int]]]:
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            index = json.loads((self.folder / _INDEX).read_text())
            return str(index["id"]), dict(index["files"])
        return uuid.uuid4().hex, {}

    def _write_index(self) -> None:
        index = self.folder / _INDEX
        partial = index.with_name(f"{_INDEX}.tmp")
        try:
            partial.write_text(json.dumps({"id": self._id, "files": self._copied}))
            partial.replace(index)
        except OSError as error:  # of a write, it does not name the file
            raise UserError(
                f"{index} of the copy of {self.url} cannot be written ({error.strerror}): make room on that disk"
            ) from error


def _committed(name: str) -> Any:
    """The step (as a match of STEP) whose commit marker this is; None for any other name."""
    found = STEP.match(name)
    return found if found and name == found[0] + COMMIT_MARKER else None


def _number(step: str) -> int:
    return int(step.rstrip("/").rpartition("/")[2])


def _newest(markers: Iterable[str]) -> dict[str, str]:
    """{checkpoints folder: its newest step}, by the commit markers of steps."""
    found: dict[str, str] = {}
    for step in (name.removesuffix(COMMIT_MARKER) for name in markers):
        of = step.rstrip("/").rpartition("/")[0]
        found[of] = max(step, found.get(of, step), key=_number)
    return found


def _number_of(writer: dict[str, Any]) -> int:
    """The number that this writer created; 0 if there is none (of an earlier version, or damaged)."""
    found = writer.get("number")
    return found if isinstance(found, int) else 0


def _has_ended(writer: dict[str, Any]) -> bool:
    if time.time() - float(writer.get("time") or 0) > _STALE_S:
        return True
    if writer.get("host") != socket.gethostname():
        return False
    try:
        os.kill(int(writer["process"]), 0)
    except ProcessLookupError:
        return True
    except (OSError, ValueError, KeyError):
        return False
    return False
