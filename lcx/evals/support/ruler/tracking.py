"""vt: a chain of variable assignments, hidden in noise; the question asks for all variables with the first value."""

import dataclasses
import random
import string

import numpy as np

from lcx.errors import UserError
from lcx.evals.support.ruler.fitting import Budget, Draft, Measure, fitted, largest
from lcx.evals.support.ruler.lengths import Lengths
from lcx.evals.support.ruler.needles import NOISE

_TASK = "Memorize and track the chain(s) of variable assignment hidden in the following text."
_QUESTION = "\nQuestion: Find all variables that are assigned the value {value} in the text above."
_ANSWER = (
    " Answer: According to the chain(s) of variable assignment in the text above, {count} variables are assigned the"
    " value {value}, they are: "
)
_EXAMPLE_TOKENS, _EXAMPLE_STEP, _EXAMPLE_VALUE = 500, 5, "12345"


@dataclasses.dataclass(frozen=True)
class Tracking:
    """The settings of variable tracking."""

    chains: int = 1
    hops: int = 4

    answer_tokens = 30

    def step(self, length: int) -> int:
        return 10 if length >= 4096 else 5


class TrackingDrafts:
    """Drafts of vt by the lines of noise. Each begins with a solved example, whose names are new in every draft.

    The example is part of the task: without it, or with the space at the end of the answer's start removed, models
    score far lower than published.
    """

    def __init__(
        self, task: Tracking, lengths: Lengths, *, seed: int, frame: tuple[str, str], budget: Budget
    ):
        self._task, self._lengths, self._frame, self._budget = task, lengths, frame, budget
        self._random, self._numbers = random.Random(seed), np.random.RandomState(seed)
        self._example, self._example_names = self._solved_example()

    @property
    def example_tokens(self) -> int:
        """The tokens of the example, as RULER adds them in its search."""
        return self._lengths.whole(self._example)

    def searched(self, size: int) -> Draft:
        """The draft of RULER's search, which has no example."""
        before, after = self._frame
        rest = self._chain(size, letters=5, after=after)
        tokens = self._lengths.whole(before + _TASK) + rest.tokens
        return Draft(before + _TASK + rest.text, rest.answer, rest.outputs, tokens)

    def __call__(self, size: int) -> Draft:
        before, after = self._frame
        rest = self._chain(size, letters=5, after=after)
        start = before + self._renamed_example()  # has other names every time: encoded anew
        tokens = self._lengths.whole(start) + self._lengths.piece("\n" + _TASK) + rest.tokens
        return Draft(f"{start}\n{_TASK}{rest.text}", rest.answer, rest.outputs, tokens)

    def _chain(self, size: int, *, letters: int, after: str = "") -> Draft:
        """Everything after the task's first sentence."""
        task, rng = self._task, self._random
        names = self._names((task.hops + 1) * task.chains, letters)
        chains = [names[i : i + task.hops + 1] for i in range(0, len(names), task.hops + 1)]
        example = letters != 5
        values = [_EXAMPLE_VALUE if example else str(self._numbers.randint(10000, 99999)) for _ in chains]
        lines = [NOISE] * size
        tokens = size * self._lengths.piece(f"\n{NOISE}") + self._lengths.piece("\n")
        for chain, value in zip(chains, values, strict=True):
            said = [f"VAR {chain[0]} = {value}"]
            said += [f"VAR {new} = VAR {old} " for old, new in zip(chain[:-1], chain[1:], strict=True)]
            for i, place in enumerate(sorted(rng.sample(range(len(lines)), len(said)))):
                lines.insert(place + i, said[i])
            # With what follows, because their last space may be one token with the line break after it.
            tokens += self._lengths.total(f"\n{line}\nThe" for line in said) - len(
                said
            ) * self._lengths.piece("\nThe")
        answer = _ANSWER.format(value=values[0], count=task.hops + 1)
        end = _QUESTION.format(value=values[0]) + after + answer
        text = "\n\n" + "\n".join(lines) + end
        return Draft(text, answer, names[: task.hops + 1], tokens + self._lengths.piece(end))

    def _names(self, count: int, letters: int) -> list[str]:
        names = ["".join(self._random.choices(string.ascii_uppercase, k=letters)) for _ in range(count)]
        while (
            len(set(names)) < count or "VAR" in names
        ):  # the published code makes broken chains of equal names
            names = list(dict.fromkeys(name for name in names if name != "VAR"))
            names.append("".join(self._random.choices(string.ascii_uppercase, k=letters)))
        return names

    def _solved_example(self) -> tuple[str, list[str]]:
        """(an example with its answer, the names in it): as many lines as fit 500 tokens."""

        def make(size: int) -> Draft:
            rest = self._chain(size, letters=3)
            return dataclasses.replace(
                rest, text=_TASK + rest.text, tokens=self._lengths.whole(_TASK) + rest.tokens
            )

        budget = Budget(_EXAMPLE_TOKENS, 0, self._budget.task)
        measure = Measure(self._lengths)
        size = largest(make, measure, budget, step=_EXAMPLE_STEP, probe=_EXAMPLE_STEP)
        least = self._task.hops + 1
        try:
            draft, _ = fitted(make, measure, budget, size=size, step=_EXAMPLE_STEP, least=least)
        except UserError:  # a tokenizer of bytes or characters: the shortest example is longer than RULER's
            draft = make(least)
        return f"{draft.text} {' '.join(draft.outputs)}\n", draft.outputs

    def _renamed_example(self) -> str:
        text, names = self._example, list(self._example_names)
        for i, name in enumerate(names):
            while True:
                new = "".join(self._random.choices(string.ascii_uppercase, k=len(name)))
                if new not in names[i:] and new != "VAR":  # would be replaced again, or break every line
                    break
            text = text.replace(name, new)
        return text.replace(_EXAMPLE_VALUE, str(self._numbers.randint(10000, 99999)))
