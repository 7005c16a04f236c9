"""The longest rows of a run that fit its devices, by bisection over real compilations."""

import dataclasses
from collections.abc import Callable

from lcx.trainer import Trainer

_GRAIN = 16  # the result is within a sixteenth of the longest


def with_length(trainer: Trainer, seq_len: int) -> Trainer:
    """The run with rows of another length, and the context window of its model if that is the length of its rows."""
    same = trainer.context_length == trainer.seq_len
    return dataclasses.replace(
        trainer, seq_len=seq_len, context_length=seq_len if same else trainer.context_length
    )


def longest(peak: Callable[[int], int], memory: int, *, start: int, unit: int, tries: int = 12) -> int:
    """The largest multiple of `unit` at which `peak` is within `memory`, to a sixteenth; 0 if not even one fits.

    Memory is nearly a straight line over the length, so that the next guess is where the line of the last two meets the
    limit; a guess that does not halve the interval is replaced by its middle.

    Args:
      peak: seq_len -> bytes.
      start: the length to try first.
      tries: how many lengths to try at most.
    """
    low, high, known = 0, 0, dict[int, int]()
    guess = max(start // unit, 1)
    for _ in range(tries):
        known[guess] = peak(guess * unit)
        if known[guess] <= memory:
            low = max(low, guess)
        else:
            high = min(high, guess) if high else guess
        if high and high - low <= max(1, high // _GRAIN):
            break
        guess = _next(known, memory, low, high)
    return low * unit


def _next(known: dict[int, int], memory: int, low: int, high: int) -> int:
    if len(known) > 1:
        (a, b) = sorted(known)[-2:] if not high else (max(low, min(known)), high)
        if a != b and a in known and known[b] > known[a]:
            meets = int(a + (memory - known[a]) * (b - a) / (known[b] - known[a]))
            step = max(1, (high or meets) // (2 * _GRAIN))
            if not high:
                return max(low + 1, min(meets + step, 64 * low))
            # One side of the crossing, then the other: both ends of the interval close in.
            near = meets - step if high - low > 4 * step and low == min(known) else meets
            if low < near < high:
                return near
    return (low + high) // 2 if high else 2 * low
