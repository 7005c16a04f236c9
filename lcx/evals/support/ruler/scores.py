"""RULER's scores: matches of strings, averages over tasks and lengths, effective length."""

import re
from collections.abc import Mapping, Sequence

THRESHOLD = 85.6  # the average of Llama 2 7B (chat) at 4K tokens
_CONTROL = re.compile(r"[\x00-\x1f]")


def cleaned(prediction: str) -> str:
    """A prediction as RULER compares it: control characters are line breaks, no white space at the ends."""
    return _CONTROL.sub("\n", prediction.strip()).strip()


def match_all(prediction: str, references: Sequence[str]) -> float:
    """The share of the references that occur in the prediction, regardless of case, in [0, 1]."""
    found = cleaned(prediction).lower()
    return sum(reference.lower() in found for reference in references) / len(references)


def match_part(prediction: str, references: Sequence[str]) -> float:
    """1 if any reference occurs in the prediction, regardless of case, else 0; RULER's score of QA."""
    found = cleaned(prediction).lower()
    return float(any(reference.lower() in found for reference in references))


def averages(scores: Mapping[str, Mapping[int, float]]) -> dict[int, float]:
    """{length: mean over tasks} of {task: {length: score}}; only lengths that all tasks have.

    Each task counts the same, whatever the number of its samples.
    """
    lengths = sorted(set.intersection(*(set(of_task) for of_task in scores.values()))) if scores else []
    return {length: sum(of_task[length] for of_task in scores.values()) / len(scores) for length in lengths}


def weighted(by_length: Mapping[int, float], *, increasing: bool) -> float:
    """RULER's wAvg: lengths weighted 1, 2, 3, ... from the shortest (increasing) or from the longest."""
    lengths = sorted(by_length, reverse=not increasing)
    weights = range(1, len(lengths) + 1)
    return sum(w * by_length[length] for w, length in zip(weights, lengths)) / sum(weights)


def effective_length(by_length: Mapping[int, float], threshold: float = THRESHOLD) -> int | None:
    """The largest length whose average reaches the threshold; None if none does."""
    return max((length for length, score in by_length.items() if score >= threshold), default=None)
