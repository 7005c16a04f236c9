"""One writer at a time: a lock on what a run or a conversion writes, which a killed process does not leave behind."""

import contextlib
import datetime
import os
import pathlib
import socket
from collections.abc import Iterator
from typing import Any

from lcx.errors import UserError

LOCK = ".lcx-lock"  # in a workdir; beside a destination, with its name before it


@contextlib.contextmanager
def only_writer(path: str | os.PathLike, *, of: str, setting: str) -> Iterator[None]:
    """Holds the lock file `path`, whose folder exists.

    The operating system frees the lock when its process ends, however that happens, so a lock file that is left behind
    means nothing. On a shared folder this holds between hosts where the file system passes `flock` on (NFS version 4,
    Lustre, GPFS do); where there is no `flock` at all, filelock keeps the owner's host and process in the file.

    Args:
      of: names in a message what is written.
      setting: the setting that would change it.

    Raises:
      UserError: another process holds it.
    """

    path = pathlib.Path(path)
    lock = _acquired(path)
    if lock is None:
        raise UserError(
            f"{of} is being written by another process ({_owner(path)}): wait for it to end, or change {setting}"
        )
    try:
        with contextlib.suppress(OSError):  # a full disk: the lock holds all the same
            started = datetime.datetime.now().astimezone().isoformat(timespec="seconds")
            path.write_text(f"process {os.getpid()} on {socket.gethostname()} since {started}\n")
        yield
    finally:
        path.unlink(missing_ok=True)
        lock.release()


def _acquired(path: pathlib.Path) -> Any:
    """The lock that is held, or None.

    An owner that ends removes the file, perhaps just when another process has opened it, whose lock then is on a file
    that has no name any more. So a lock counts when a second one on the same name is refused.
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
    return "it left no name"
