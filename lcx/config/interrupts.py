"""Ctrl-C ends a command within seconds, also while its main thread is inside a compiler."""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Iterator
from types import FrameType
from typing import NoReturn

from lcx import startup

STATUS = 128 + signal.SIGINT  # the exit status of a command that Ctrl-C has ended
_GRACE_S = 2.0
_CLEAN_UP_S = 4.0
_LOSES_EXCEPTIONS = "_xla_gc_callback"  # jax's hook in Python's garbage collector, where one in ten interrupts arrives
_pressed = threading.Event()


def pressed() -> bool:
    """Whether Ctrl-C was pressed in the last `interruptible` block."""
    return _pressed.is_set()


def importing() -> contextlib.AbstractContextManager[None]:
    """For the imports of a command, which must not be left by an exception: extension modules do not survive it.

    There Ctrl-C ends the process immediately (`startup.guard`). Outside of a command this is `interruptible`.
    """
    guarded = signal.getsignal(signal.SIGINT) is startup.interrupted
    return contextlib.nullcontext() if guarded else interruptible()


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """Within the block, Ctrl-C raises KeyboardInterrupt, or ends the process where that is not possible.

    Python runs signal handlers in the main thread alone, which does not get to them before a compilation has ended. A
    second thread receives the signal through a pipe. If the main thread has not reacted after _GRACE_S seconds, has not
    left the block _CLEAN_UP_S seconds later, or if Ctrl-C is pressed again, the second thread prints "interrupted" and
    ends the process with status 130.

    A job that handles signals itself, as a training run does, replaces the handler and the pipe while it runs. Nothing
    changes if Ctrl-C is ignored or handled already, or outside of the main thread.
    """
    previous = signal.getsignal(signal.SIGINT)
    unhandled = previous in (signal.default_int_handler, startup.interrupted)
    if threading.current_thread() is not threading.main_thread() or not unhandled:
        yield
        return
    reacted, late = threading.Event(), threading.Event()
    _pressed.clear()

    def handle(number: int, frame: FrameType | None) -> None:
        _pressed.set()
        if not reacted.is_set():  # at the second, the other thread ends the process
            reacted.set()
            if frame is not None and frame.f_code.co_name == _LOSES_EXCEPTIONS:
                late.set()
            else:
                raise KeyboardInterrupt

    read, write = os.pipe()
    os.set_blocking(write, False)
    signal.signal(signal.SIGINT, handle)
    before = signal.set_wakeup_fd(write, warn_on_full_buffer=False)
    threading.Thread(target=_watch, args=(read, reacted, late), name="lcx-interrupts", daemon=True).start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(before)
        signal.signal(signal.SIGINT, previous)
        os.close(write)  # ends the thread, which closes the other end


def _raise_in_main_thread() -> None:
    main, error = threading.main_thread().ident, ctypes.py_object(KeyboardInterrupt)
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(main or 0), error)


def leave_interrupted() -> NoReturn:
    """Ends the process after Ctrl-C, with its line and status."""
    with contextlib.suppress(OSError, ValueError):
        print("interrupted", file=sys.stderr)
    leave(STATUS)


def leave(status: int) -> NoReturn:
    """Ends the process without waiting for its other threads, which may be busy with work that nobody wants now."""
    with contextlib.suppress(OSError, ValueError):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(status)


def _watch(pipe: int, reacted: threading.Event, late: threading.Event) -> None:
    """Ends the process if the block is not left in time after Ctrl-C, or at the second Ctrl-C.

    The main thread may be unable to react, or react in vain: code that C calls back may lose the exception.
    """
    presses, left = 0, None
    while select.select([pipe], [], [], left)[0]:
        number = os.read(pipe, 1)
        if not number:
            os.close(pipe)
            return
        if number[0] == signal.SIGINT:
            presses += 1
            if presses > 1 or not reacted.wait(_GRACE_S):
                break
            left = _CLEAN_UP_S
            if late.is_set():
                late.clear()
                time.sleep(0.05)
                _raise_in_main_thread()
    os.write(2, b"interrupted\n")
    leave(STATUS)
