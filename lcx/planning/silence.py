"""Silence for compilers of devices that this machine does not have: they log that it does not."""

import contextlib
import ctypes
import os
import re
import signal
import tempfile
from collections.abc import Iterator
from typing import Any

_ERROR = 2  # the exit status after a wrong setting
_FATAL = re.compile(r"^F\d{4} .*?\] (.*)", re.MULTILINE)  # how a failed check of the C++ libraries is logged


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """What libraries write to file descriptor 2 inside is dropped. Errors reach Python as exceptions.

    A compiler that aborts the process, as libtpu does for a slice that is too large for it, leaves one line.
    """
    kept = os.dup(2)
    with tempfile.TemporaryFile() as said, _aborting(said.fileno(), kept):
        try:
            os.dup2(said.fileno(), 2)
            yield
        finally:
            os.dup2(kept, 2)
            os.close(kept)


@contextlib.contextmanager
def _aborting(said: int, kept: int) -> Iterator[None]:
    """Within the block, SIGABRT ends the process with one line. Python's own handlers would wait for the compiler."""

    def end(number: int) -> None:
        text = os.pread(said, 1 << 20, 0).decode(errors="replace")
        os.write(kept, f"error: {reason(text)}\n".encode())
        os._exit(_ERROR)

    handler = ctypes.CFUNCTYPE(None, ctypes.c_int)(end)
    set_handler: Any = ctypes.CDLL(None).signal
    set_handler.restype, set_handler.argtypes = ctypes.c_void_p, [ctypes.c_int, ctypes.c_void_p]
    before = set_handler(int(signal.SIGABRT), ctypes.cast(handler, ctypes.c_void_p))
    try:
        yield
    finally:
        set_handler(int(signal.SIGABRT), before)


def reason(log: str) -> str:
    """Why a compiler has aborted, by what it wrote before."""
    found = _FATAL.search(log)
    last = found[1] if found else next(iter(log.strip().splitlines()[-1:]), "it gives no reason")
    return f"the compiler for these devices has aborted ({last[:300]}): choose another --topology or MeshShape"
