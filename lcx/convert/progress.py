"""Progress of a conversion: a bar on a terminal, plain lines otherwise."""

import sys
import time
from types import TracebackType
from typing import Any, Self

_SECONDS_BETWEEN_LINES = 5.0


class Progress:
    """Context manager that reports progress in bytes on stderr."""

    def __init__(self, label: str, total_bytes: int):
        self._label, self._total = label, max(1, total_bytes)
        self._done, self._start, self._said = 0, time.monotonic(), time.monotonic()
        self._bar: Any = None

    def __enter__(self) -> Self:
        if sys.stderr.isatty():
            import tqdm

            self._bar = tqdm.tqdm(total=self._total, desc=self._label, unit="B", unit_scale=True)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.close()
        elif kind is None:
            self._say()

    def add(self, nbytes: int) -> None:
        self._done += nbytes
        if self._bar is not None:
            self._bar.update(nbytes)
        elif time.monotonic() - self._said > _SECONDS_BETWEEN_LINES:
            self._say()

    def _say(self) -> None:
        self._said = time.monotonic()
        megabytes, seconds = self._done / 1e6, self._said - self._start
        rate = f", {_digits(megabytes / seconds)} MB/s" if self._done and seconds > 0 else ""
        digits = 0 if self._total >= 1e6 else 2
        percent = f"{100 * self._done / self._total:.0f}%"
        print(
            f"{self._label}: {megabytes:.{digits}f} of {self._total / 1e6:.{digits}f} MB ({percent}{rate})",
            file=sys.stderr,
            flush=True,
        )


def _digits(number: float) -> str:
    """Three digits, or all before the point."""
    return f"{number:.0f}" if number >= 100 else f"{number:.3g}"
