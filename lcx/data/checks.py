"""Quality checks of long documents: minimum length, repetition, truncation.

`python -m lcx.data --source=PATH` runs them on any files.
"""

import collections
import dataclasses
import re
import unicodedata
from collections.abc import Iterable

import numpy as np
from jaxtyping import Int

from lcx.data import markers
from lcx.data.tokenizers import Tokenizer
from lcx.errors import UserError
from lcx.wording import quantity

_SEQUENCE = re.compile(r"[A-Za-z*-]{16,}")  # letters without a space
KINDS = ("too short", "repetitive", "truncated")
_SHOWN = 10
_LAST_TOKENS = 20
# Full stops: Latin, CJK, Arabic, Urdu, Devanagari, Armenian, Ethiopic, Khmer, Burmese, Tibetan.
_STOPS = (
    ".!?\u2026\u203c\u2047\u2048\u2049\u3002\uff0e\uff01\uff1f\uff61"
    "\u061f\u06d4\u0964\u0965\u0589\u1362\u1367\u17d4\u17d5\u104b\u0f0d\u0f0e"
)
# What may follow a full stop, beside closing quotes and brackets: quotes that also open, Markdown's marks of emphasis
# and code, the mark of a footnote, a dash after what a speaker breaks off, a tag of HTML, a marker of the end.
_CLOSERS = "\"'>*_~`\\\u201e\u201c\u2018\u2e42\uff02\uff07\u2013\u2014"
_CLOSING = ("Pe", "Pf", "Pi", "Cc", "Cf", "Zs")  # categories; with control, invisible and space characters
_LAST = 400  # characters in which the stop is looked for: to search a whole book would take longer than to read it
_NOTES = "\u00b9\u00b2\u00b3\u2070\u2074\u2075\u2076\u2077\u2078\u2079\u2020\u2021"
_TAIL = re.compile(r"(?:\[[0-9]{1,3}\]|</?[A-Za-z][A-Za-z0-9]{0,9} ?/?>|&(?:quot|rdquo|rsquo|raquo|nbsp);)\Z")
_FENCES = ("```", "~~~")


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
    """The result: how many documents have each problem, and the first ten problems.

    `markers`: (end-of-document marker, number of texts that contain it).
    """

    num_documents: int
    num_flagged: int
    counts: dict[str, int]
    issues: tuple[Issue, ...]
    markers: tuple[tuple[str, int], ...] = ()

    @property
    def ok(self) -> bool:
        return self.num_flagged == 0 and not self.markers

    def __str__(self) -> str:
        counts = ", ".join(f"{self.counts[kind]} {kind}" for kind in KINDS)
        lines = [f"{quantity(self.num_documents, 'document')}, {self.num_flagged} with a problem: {counts}"]
        lines += [f"  {issue}" for issue in self.issues]
        if self.markers:
            lines.append(markers.sentence(dict(self.markers), "the source"))
        return "\n".join(lines)


def repetition(tokens: Int[np.ndarray, "tokens"], *, window: int = 50) -> float:
    """The largest share of equal tokens between two adjacent windows, over all positions in the document.

    max over i of mean(tokens[i : i + w] == tokens[i + w : i + 2 w]), computed in linear time as a running sum over the
    comparison of the document with itself shifted by w. 0 for a document shorter than two windows.
    """
    tokens = np.asarray(tokens)
    if len(tokens) < 2 * window:
        return 0.0
    equal = np.cumsum(tokens[:-window] == tokens[window:])
    # Differences of the running sum are the numbers of equal tokens in each pair of windows.
    sums = equal[window - 1 :].copy()
    sums[1:] -= equal[:-window]
    return float(sums.max()) / window


def is_truncated(tokens: Int[np.ndarray, "tokens"], *, tokenizer: Tokenizer) -> bool:
    """Whether a whole document seems to be cut off, judged by its last 20 tokens.

    A complete document ends with a line feed, with the fence of a code block, or with a full stop of any script,
    optionally followed by closing quotes, brackets and marks of emphasis. A sequence of nucleotides or amino acids has
    no such end, and does not seem to be cut off.
    """
    end = tokenizer.decode(tokens[-_LAST_TOKENS:])
    return not ends_well(end) and not _SEQUENCE.fullmatch(end)


def ends_well(text: str) -> bool:
    """Whether a text ends with a complete sentence, line or code block."""
    if text.endswith("\n"):
        return True
    text = text.rstrip()
    if text.rpartition("\n")[2].strip() in _FENCES:
        return True
    return _without_closers(text[-_LAST:]).endswith(tuple(_STOPS))


def _without_closers(text: str) -> str:
    while text:
        if found := _TAIL.search(text) or markers.MARKER_AT_END.search(text):
            text = text[: found.start()]
        elif text[-1] in _CLOSERS + _NOTES or unicodedata.category(text[-1]) in _CLOSING:
            text = text[:-1]
        else:
            break
    return text


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
      min_length: a document with fewer tokens is too short.
      window, threshold: a document is repetitive if two adjacent windows of `window` tokens agree in more than this
        share of positions.
    """
    if window < 1:
        raise UserError(f"window={window} is not a number of tokens; expected at least 1")
    counts: collections.Counter[str] = collections.Counter({kind: 0 for kind in KINDS})
    shown: list[Issue] = []
    total = flagged = 0
    for name, tokens in documents:
        issues = []
        if len(tokens) < min_length:
            issues.append(Issue(name, "too short", f"{quantity(len(tokens), 'token')}, expected at least {min_length}"))
        share = repetition(tokens, window=window)
        if share > threshold:
            detail = f"{share:.0%} of {window} tokens equal the {window} before them"
            issues.append(Issue(name, "repetitive", detail))
        if is_truncated(tokens, tokenizer=tokenizer):
            end = tokenizer.decode(tokens[-_LAST_TOKENS:])
            issues.append(Issue(name, "truncated", f"ends in {end!r}"))
        counts.update(issue.kind for issue in issues)
        shown += issues[: _SHOWN - len(shown)]
        total += 1
        flagged += bool(issues)
    return Report(total, flagged, dict(counts), tuple(shown))
