"""Ctrl-C ends a command within seconds, also while its main thread is inside a compiler."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator
from types import FrameType
from typing import NoReturn

STATUS = 128 + signal.SIGINT  # the exit status of a command that Ctrl-C has ended
_GRACE_S = 2.0


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """Within the block, Ctrl-C raises KeyboardInterrupt, or ends the process where that is not possible.

    Python runs signal handlers in the main thread alone, which does not get to them before a compilation has ended. A
    second thread receives the signal through a pipe. If the main thread has not reacted after _GRACE_S seconds, or if
    Ctrl-C is pressed again, the second thread prints "interrupted" and ends the process with status 130.

    A job that handles signals itself, as a training run does, replaces the handler and the pipe while it runs. Nothing
    changes if Ctrl-C is ignored or handled already, or outside of the main thread.
    """
    previous = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or previous is not signal.default_int_handler:
        yield
        return
    reacted = threading.Event()

    def handle(number: int, frame: FrameType | None) -> None:
        if not reacted.is_set():  # at the second, the other thread ends the process
            reacted.set()
            raise KeyboardInterrupt

    read, write = os.pipe()
    os.set_blocking(write, False)
    signal.signal(signal.SIGINT, handle)
    before = signal.set_wakeup_fd(write, warn_on_full_buffer=False)
    threading.Thread(target=_watch, args=(read, reacted), name="lcx-interrupts", daemon=True).start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(before)
        signal.signal(signal.SIGINT, previous)
        os.close(write)  # ends the thread, which closes the other end


def leave(status: int) -> NoReturn:
    """Ends the process without waiting for its other threads, which may be busy with work that nobody wants now."""
    with contextlib.suppress(OSError, ValueError):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(status)


def _watch(pipe: int, reacted: threading.Event) -> None:
    presses = 0
    while number := os.read(pipe, 1):
        if number[0] == signal.SIGINT:
            presses += 1
            if presses > 1 or not reacted.wait(_GRACE_S):
                os.write(2, b"interrupted\n")
                leave(STATUS)
    os.close(pipe)
