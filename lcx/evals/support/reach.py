"""Lengths beyond a model's window, so that an evaluation shows where a model stops reading, not only where it works."""

import dataclasses

BEYOND = 4  # times the window, where the text, the memory and the time allow it


@dataclasses.dataclass(frozen=True)
class Reach:
    """The longest length that an evaluation measures by default.

    Attributes:
      length: in tokens: a model's window, or 2 or 4 times as much.
      note: a sentence that says so, and what limits it.
    """

    length: int
    note: str


def beyond(window: int, *, unit: str, limits: dict[str, int]) -> Reach:
    """The longest of 4, 2 and 1 times a window that no limit forbids.

    Args:
      window: of the model, in tokens. It is measured whatever the limits are.
      unit: what has this length, as in "rows".
      limits: the largest allowed length in tokens, by the reason for it, which completes the sentence "limited by ...".
    """
    factor = BEYOND
    while factor > 1 and any(factor * window > limit for limit in limits.values()):
        factor //= 2
    length = factor * window
    if factor == BEYOND:
        return Reach(
            length, f"{unit} of up to {length} tokens, {factor} times the model's window of {window}"
        )
    why = min(limits, key=lambda reason: limits[reason])
    text = f"{unit} of up to {length} tokens, twice the model's window of {window}"
    if factor == 1:
        text = f"{unit} of up to {window} tokens, the model's window: what it does beyond is not measured"
    return Reach(length, f"{text}; limited by {why}")
