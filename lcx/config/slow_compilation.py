"""Keeps XLA's alarm about a slow compilation off the screen.

XLA writes it to its own log as an error, two minutes after the start of a compilation and again at the end of that
compilation, with the advice to file a bug; no flag of XLA turns it off. A compilation of minutes is no fault of a large
model, and the commands say themselves when they compile.
"""

from __future__ import annotations

import functools
import os
import sys
import threading
from typing import Any

_AFTER_S = 100.0  # before the alarm, which XLA raises after 120 s
_FATAL = 3  # of absl's log: what ends the process is still written


def hide_alarm() -> None:
    """From now on, XLA logs no errors from _AFTER_S seconds after the start of a compilation until its end.

    A compilation that fails raises an exception in any case. Nothing changes before jax is imported, where the user has
    set TF_CPP_MIN_LOG_LEVEL to another value than jax's own, or with a jax that has other names for these functions.
    """
    if "jax" not in sys.modules or os.environ.get("TF_CPP_MIN_LOG_LEVEL") != "1":
        return
    try:
        from jax._src import compiler
        from jax._src.lib import utils

        compile_, set_level = compiler.compile_or_get_cached, utils.absl_set_min_log_level
    except (ImportError, AttributeError):
        return
    if getattr(compile_, "hides_alarm", False):
        return

    @functools.wraps(compile_)
    def quiet(*args: Any, **settings: Any) -> Any:
        hidden = threading.Event()

        def hide() -> None:
            hidden.set()
            set_level(_FATAL)

        timer = threading.Timer(_AFTER_S, hide)
        timer.daemon = True
        timer.start()
        try:
            return compile_(*args, **settings)
        finally:
            timer.cancel()
            if hidden.is_set():
                set_level(1)

    quiet.hides_alarm = True  # type: ignore[attr-defined]
    compiler.compile_or_get_cached = quiet
