"""Finds how large a haystack fits a number of tokens, and makes samples of that size."""

import dataclasses
from collections.abc import Callable

from lcx.errors import UserError
from lcx.evals.support.ruler.lengths import Lengths

_CONFIRMED, _AGAIN = 2, 100  # drafts whose tokens are also counted whole: the first ones, and every so many
_TRIES = 20  # draws of the smallest haystack before a length counts as too short


@dataclasses.dataclass(frozen=True)
class Draft:
    """A sample that may be too long.

    Attributes:
      text: the prompt with the start of the answer.
      answer: that start.
      outputs: the expected answers.
      tokens: the sum of the tokens of its pieces, see `Lengths`.
    """

    text: str
    answer: str
    outputs: list[str]
    tokens: int


@dataclasses.dataclass(frozen=True)
class Budget:
    """What a sample may take.

    Attributes:
      length: tokens of the prompt and of the answer together.
      answer: tokens that will be generated, and others that the draft does not count.
      task: for messages.
    """

    length: int
    answer: int
    task: str


class Measure:
    """The tokens of the drafts of a task: the sum over their pieces, as long as that is right.

    Some drafts are counted whole. Once the sum differs from that, every later draft is counted whole, which is slower.
    """

    def __init__(self, lengths: Lengths):
        self._lengths, self._seen, self._additive = lengths, 0, True

    def __call__(self, draft: Draft) -> int:
        self._seen += 1
        if self._additive and self._seen > _CONFIRMED and self._seen % _AGAIN:
            return draft.tokens
        found = self._lengths.whole(draft.text)
        self._additive = self._additive and found == draft.tokens
        return found


def largest(
    make: Callable[[int], Draft],
    measure: Measure,
    budget: Budget,
    *,
    step: int,
    probe: int,
    estimate: Callable[[float], int] | None = None,
) -> int:
    """The largest size of a haystack that fits the budget, by binary search; `step` if none does.

    This is the search of RULER, including the draft of `probe` units from which it estimates where to search: each
    draft draws random numbers, so that other searches would give other samples.

    Args:
      make: a draft of so many units.
      estimate: the size to search up to, from the tokens of a unit; None: 3 times what would fill the length.
    """
    per_unit = measure(make(probe)) / probe
    most = int(budget.length / per_unit * 3) if estimate is None else estimate(per_unit)
    low, high, best = step, max(most, 2 * step), None
    while low <= high:
        middle = (low + high) // 2
        if measure(make(middle)) + budget.answer <= budget.length:
            best, low = middle, middle + 1
        else:
            high = middle - 1
    return step if best is None else best


def fitted(
    make: Callable[[int], Draft], measure: Measure, budget: Budget, *, size: int, step: int, least: int
) -> tuple[Draft, int]:
    """(a draft that fits the budget, its tokens): of `size` units, or of `step` fewer until it fits.

    Below `step` units the haystack shrinks unit by unit, down to `least`; the published code never ends there.

    Raises:
      UserError: the smallest haystack is too long.
    """
    tries, found = 0, 0
    while True:
        draft = make(size)
        found = measure(draft)
        if found + budget.answer <= budget.length:
            return draft, found
        if size > step:
            size = max(size - step, least)
        elif size > least:
            size -= 1
        else:
            tries += 1
            if tries >= _TRIES:
                break
    needed = found + budget.answer
    raise UserError(
        f"RULER {budget.task}: {budget.length} tokens are too short for it: its shortest prompt and {budget.answer}"
        f" generated tokens are {needed} together; raise Ruler.lengths, or leave the task out of Ruler.tasks"
    )
