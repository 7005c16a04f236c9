"""Quality checks of long documents: minimum length, repetition, truncation.

`python -m lcx.data --source=PATH` reports them for files of one's own.
"""

import collections
import dataclasses
from collections.abc import Iterable

import numpy as np
from jaxtyping import Int

from lcx.data.tokenizers import Tokenizer
from lcx.errors import UserError

KINDS = ("too short", "repetitive", "truncated")
_SHOWN = 10
_LAST_TOKENS = 20
_SENTENCE_ENDS = (".", "!", "?", "\n")


@dataclasses.dataclass(frozen=True)
class Issue:
    """One problem of one document."""

    document: str
    kind: str
    detail: str

    def __str__(self) -> str:
        return f"{self.document}: {self.kind} ({self.detail})"


@dataclasses.dataclass(frozen=True)
class Report:
    """The outcome: how many documents have each problem, and the first ten problems."""

    num_documents: int
    num_flagged: int
    counts: dict[str, int]
    issues: tuple[Issue, ...]

    @property
    def ok(self) -> bool:
        return self.num_flagged == 0

    def __str__(self) -> str:
        counts = ", ".join(f"{self.counts[kind]} {kind}" for kind in KINDS)
        lines = [f"{self.num_documents} documents, {self.num_flagged} with a problem: {counts}"]
        return "\n".join(lines + [f"  {issue}" for issue in self.issues])


def repetition(tokens: Int[np.ndarray, "tokens"], *, window: int = 50) -> float:
    """The largest share of equal positions between two neighbouring windows, over all places in the document.

    max over i of mean(tokens[i : i + w] == tokens[i + w : i + 2 w]), in linear time by a running sum of the
    comparison of the document with itself shifted by w; 0 for a document shorter than two windows.
    """
    tokens = np.asarray(tokens)
    if len(tokens) < 2 * window:
        return 0.0
    equal = np.cumsum(tokens[:-window] == tokens[window:])
    sums = equal[window - 1 :].copy()
    sums[1:] -= equal[:-window]
    return float(sums.max()) / window


def is_truncated(tokens: Int[np.ndarray, "tokens"], *, tokenizer: Tokenizer) -> bool:
    """Whether a whole document ends in the middle: its last 20 tokens do not end in . ! ? or a line feed."""
    return not tokenizer.decode(tokens[-_LAST_TOKENS:]).endswith(_SENTENCE_ENDS)


def check_documents(
    documents: Iterable[tuple[str, Int[np.ndarray, "tokens"]]],
    *,
    tokenizer: Tokenizer,
    min_length: int = 8192,
    window: int = 50,
    threshold: float = 0.8,
) -> Report:
    """Checks (name, tokens) pairs.

    Args:
      min_length: tokens below which a document is too short.
      window, threshold: a document is repetitive when more than this share of two neighbouring windows is
        equal.
    """
    if window < 1:
        raise UserError(f"window={window} is not a number of tokens; expected at least 1")
    counts: collections.Counter[str] = collections.Counter({kind: 0 for kind in KINDS})
    shown: list[Issue] = []
    total = flagged = 0
    for name, tokens in documents:
        issues = []
        if len(tokens) < min_length:
            issues.append(Issue(name, "too short", f"{len(tokens)} tokens, expected at least {min_length}"))
        share = repetition(tokens, window=window)
        if share > threshold:
            issues.append(Issue(name, "repetitive", f"{share:.0%} of {window} tokens come again at once"))
        if is_truncated(tokens, tokenizer=tokenizer):
            end = tokenizer.decode(tokens[-_LAST_TOKENS:])
            issues.append(Issue(name, "truncated", f"ends in {end!r}"))
        counts.update(issue.kind for issue in issues)
        shown += issues[: _SHOWN - len(shown)]
        total += 1
        flagged += bool(issues)
    return Report(total, flagged, dict(counts), tuple(shown))
