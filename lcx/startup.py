"""Ctrl-C while a command is still importing: one line instead of a traceback from the middle of an import."""

import contextlib
import os
import signal
import sys


def guard() -> None:
    """In `python -m lcx.<command>`, lets Ctrl-C end the process with "interrupted" and status 130.

    `config.run` replaces the handler once everything is imported and the work begins. Nothing changes where another
    program imports lcx, or where Ctrl-C is ignored or handled already.
    """
    flags = sys.orig_argv
    module = flags[flags.index("-m") + 1 : flags.index("-m") + 2] if "-m" in flags else []
    # Python sets sys.argv[0] to "-m" while it looks for the module of the command, which imports lcx.
    if sys.argv[:1] == ["-m"] and module and module[0].startswith("lcx."):
        if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            signal.signal(signal.SIGINT, interrupted)


def interrupted(number: int, frame: object) -> None:
    with contextlib.suppress(OSError, ValueError, RuntimeError):
        sys.stdout.flush()
    os.write(2, b"interrupted\n")
    os._exit(128 + number)
