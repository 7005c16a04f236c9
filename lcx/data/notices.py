"""Messages about how data is read, each logged once per process."""

import functools
import logging

from lcx.errors import as_read

log = logging.getLogger(__name__)


@functools.cache
def say_once(line: str) -> None:
    """Logs a line as a warning, so that it is visible by default; repeated lines are dropped."""
    log.warning("%s", as_read(line))
