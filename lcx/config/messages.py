"""Warnings of the library on a terminal: plain lines, without Python's "WARNING:lcx.module:" in front."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator

LOGGER = "lcx"


@contextlib.contextmanager
def plain_warnings() -> Iterator[None]:
    """Within the block, lcx's warnings are printed as they are, whatever other packages do to Python's root logger.

    Nothing changes if logging has been set up already: the lines then go where that sends them.
    """
    logger = logging.getLogger(LOGGER)
    if logging.root.handlers or logger.handlers:
        yield
        return
    handler = logging.StreamHandler()
    handler.setLevel(logging.WARNING)
    logger.addHandler(handler)
    logger.propagate = False
    try:
        yield
    finally:
        logger.propagate = True
        logger.removeHandler(handler)
