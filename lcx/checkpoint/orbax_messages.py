"""What Orbax prints that is of no use to a user."""

import functools
import logging
import sys
import traceback
from typing import Any


@functools.cache
def hush() -> None:
    """Suppresses Orbax's tracebacks on the terminal, once per process; lcx reports each failure in one line.

    After a failed read or write, Orbax's background threads log pages of tensorstore configuration, abandon
    coroutines and tasks together with their exceptions, and call back into closed event loops. Only these
    messages are suppressed.
    """
    logging.getLogger("absl").addFilter(lambda record: "/orbax/" not in record.pathname)
    logging.getLogger("asyncio").addFilter(lambda record: not _raised_in_orbax(record.exc_info))
    show = sys.unraisablehook

    def unraisablehook(event: Any) -> None:
        code = getattr(event.object, "cr_code", None)
        of_orbax = code is not None and "/orbax/" in code.co_filename
        late_callback = event.object is None and str(event.exc_value) == "Event loop is closed"
        if not (of_orbax or late_callback):
            show(event)

    sys.unraisablehook = unraisablehook


def _raised_in_orbax(exc_info: Any) -> bool:
    frames = traceback.extract_tb(exc_info[2]) if exc_info else []
    return any("/orbax/" in frame.filename for frame in frames)
