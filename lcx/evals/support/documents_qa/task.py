"""A task of LongBench."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Task:
    """A task: its prompt with {context} and {input}, the tokens of an answer, its score.

    With `first_line`, only the first line of an answer counts.
    """

    prompt: str
    answer_tokens: int
    metric: str
    first_line: bool = False
