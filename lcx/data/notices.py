"""What a user should know about how data is read, said once by a process."""

import functools
import logging

log = logging.getLogger(__name__)


@functools.cache
def say_once(line: str) -> None:
    """Logs a line as a warning, which is seen without any setting; the same line again is not."""
    log.warning("%s", line)
