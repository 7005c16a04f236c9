"""The progress of a long computation: a bar on a terminal, elsewhere a line from time to time with the time left."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from lcx.multihost import channel
from lcx.wording import counted, duration

SECONDS_BETWEEN_LINES = 30.0


@contextmanager
def progress(label: str | None, total: int | None, unit: str, *, initial: int = 0) -> Iterator[Any]:
    """Yields an object whose `update(number)` adds to what is done.

    Args:
      label: what is computed; None: nothing is shown.
      total: how much there is to do; None: unknown.
      unit: of it, in the plural: "tokens".
      initial: how much was done before.
    """
    if channel.index() > 0:  # of several processes, the first shows it
        label = None
    if label is None or not sys.stderr.isatty():
        yield _Lines(label, total, unit, initial)
        return
    from tqdm import tqdm

    # It appears at once, since the first update waits for a compilation, and goes when the result is printed.
    with tqdm(
        total=total, initial=initial, desc=label, unit=f" {unit}", unit_scale=True, leave=False, dynamic_ncols=True
    ) as bar:
        yield bar


class _Lines:
    """Prints `perplexity with window 1024: 23% of 262 thousand tokens, 1m40s left`."""

    def __init__(self, label: str | None, total: int | None, unit: str, initial: int):
        self._label, self._total, self._unit = label, total, unit
        self._done = initial
        self._said = time.monotonic()
        self._first: tuple[int, float] | None = None  # what was done when, after the first update: that compiles

    def update(self, number: int) -> None:
        self._done += number
        now = time.monotonic()
        done_at_first, first = self._first = self._first or (self._done, now)
        if self._label is None or now - self._said < SECONDS_BETWEEN_LINES or self._done == self._total:
            return
        self._said = now
        if not self._total:
            print(f"{self._label}: {counted(self._done)} {self._unit}", file=sys.stderr, flush=True)
            return
        rate = (self._done - done_at_first) / (now - first) if now > first else 0.0
        left = f", {duration((self._total - self._done) / rate)} left" if rate else ""
        done = f"{self._done / self._total:.0%} of {counted(self._total)} {self._unit}"
        print(f"{self._label}: {done}{left}", file=sys.stderr, flush=True)
