"""A lock that lets only one process write to a workdir or destination, and that does not outlive a killed process."""

import contextlib
import datetime
import os
import pathlib
import socket
from collections.abc import Iterator
from typing import Any

from lcx.errors import UserError

LOCK = ".lcx-lock"  # inside a workdir


def beside(folder: pathlib.Path) -> pathlib.Path:
    """The lock of a process that replaces the whole folder, .NAME.lcx-lock next to it."""
    return folder.with_name(f".{folder.name}{LOCK}")


@contextlib.contextmanager
def only_writer(path: str | os.PathLike, *, of: str, setting: str) -> Iterator[None]:
    """Context manager that holds a lock while something is written.

    The operating system releases the lock when the process ends for any reason, so a leftover lock file does no harm.
    On a shared folder the lock also works between hosts if the file system supports `flock` across them (NFS version 4,
    Lustre and GPFS do). If there is no `flock` at all, filelock stores the owner's host and process id in the file.

    Args:
      path: the lock file; its folder must exist.
      of: for the message: what is written.
      setting: for the message: the setting that would choose another place.

    Raises:
      UserError: another process holds the lock.
      OSError: no file can be made there.
    """
    path = pathlib.Path(path)
    lock = _acquired(path)
    if lock is None:
        if not path.exists():  # nobody holds it: it cannot be made
            path.open("a").close()
        raise _taken(path, of, setting)
    try:
        with contextlib.suppress(OSError):  # the text is only informative; on a full disk the lock still holds
            started = datetime.datetime.now().astimezone().isoformat(timespec="seconds")
            path.write_text(f"process {os.getpid()} on {socket.gethostname()} since {started}\n")
        yield
    finally:
        path.unlink(missing_ok=True)
        lock.release()


def refuse_held(path: pathlib.Path, *, of: str, setting: str) -> None:
    """Raises UserError if another process holds this lock, which the caller does not take.

    Who writes into a folder and who replaces it take different locks. Each takes its own first and then looks at the
    other's, so that never both go on.
    """
    if not path.exists():
        return
    lock = _acquired(path)
    if lock is None:
        raise _taken(path, of, setting)
    lock.release()


def _taken(path: pathlib.Path, of: str, setting: str) -> UserError:
    return UserError(
        f"{of} is being written by another process ({_owner(path)}): wait for it to end, or change {setting}"
    )


def _acquired(path: pathlib.Path) -> Any:
    """The acquired lock, or None if another process holds it.

    An owner that ends deletes the lock file. If another process has just opened that file, it then locks a file that no
    longer has a name, and a third process could lock a new file at the same path. To rule this out, a second attempt
    to lock the path must fail: only then is the first lock on the file that is really there.
    """
    import filelock

    held = None
    while True:
        following = filelock.FileLock(path, timeout=0)
        try:
            following.acquire()
        except filelock.Timeout:
            return held
        if held is not None:
            held.release()
        held = following


def _owner(path: pathlib.Path) -> str:
    with contextlib.suppress(OSError, UnicodeDecodeError):
        lines = path.read_text().splitlines()
        if lines and lines[0].startswith("process "):
            return lines[0]
    return "its id is unknown"
