"""niah_*: sentences with a key and a value, hidden in a haystack; the question asks for the values of some keys."""

import dataclasses
import functools
import itertools
import random
import re
from collections.abc import Sequence

from lcx.evals.support.ruler import vocabulary
from lcx.evals.support.ruler.fitting import Draft
from lcx.evals.support.ruler.lengths import Lengths

NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
_NEEDLE = "One of the special magic {kind} for"  # key is: value.
_TASK = (
    "Some special magic {kind} are hidden within the following text. Make sure to memorize it. I will quiz you about"
    " the {kind} afterwards."
)
_QUESTION = "\nWhat are all the special magic {kind} for {query} mentioned in the provided text?"
_ANSWER = " The special magic {kind} for {query} mentioned in the provided text are"
_DEPTHS = [round(i * 100 / 39) for i in range(40)]  # percent
_SIZES = 4  # haystacks of essays that are held: a sample that is too long is tried again with fewer words
_SENTENCE_END = re.compile(r"[.!?][\"'”’)\]]* ")


@dataclasses.dataclass(frozen=True)
class Needles:
    """The settings of a niah task.

    Attributes:
      haystack: "noise", "needle" (other needles) or "essay".
      key_kind, value_kind: "words", "numbers" or "uuids".
      keys, values, queries: the number of keys, of values of each key, and of keys that are asked for.
    """

    haystack: str
    key_kind: str = "words"
    value_kind: str = "numbers"
    keys: int = 1
    values: int = 1
    queries: int = 1

    answer_tokens = 128

    @property
    def count(self) -> int:
        return max(self.keys, self.queries) * self.values

    def step(self, length: int) -> int:
        """The units of the haystack by which RULER searches: sentences, or words of an essay."""
        if self.haystack == "essay":
            return 500
        return 25 if length >= 4096 else 5

    def texts(self, query: str) -> tuple[str, str, str]:
        """(task, question, start of the answer); in the singular where one value is asked for."""
        kind, found = self.value_kind, [_TASK, _QUESTION, _ANSWER]
        if self.queries * self.values == 1:
            found = [t.replace("Some", "A").replace("are all", "is").replace("are", "is") for t in found]
            kind = kind[:-1]
        task, question, answer = (text.format(kind=kind, query=query) for text in found)
        return task, question, answer


class NeedleDrafts:
    """Drafts of a niah task by the size of their haystack, all from one stream of random numbers."""

    def __init__(
        self, task: Needles, lengths: Lengths, *, seed: int, frame: tuple[str, str], essay: str | None = None
    ):
        self._task, self._lengths, self._seed, self._frame = task, lengths, seed, frame
        self._random = random.Random(seed)
        self._words = _words_of(essay) if essay and task.haystack == "essay" else ()
        self._first: dict[int, tuple[list[str], list[int]]] = {}

    def __call__(self, size: int) -> Draft:
        task = self._task
        keys: list[str] = []
        values: list[list[str]] = []
        for _ in range(max(task.keys, task.queries)):
            keys.append(self._drawn(task.key_kind))
            values.append([self._drawn(task.value_kind) for _ in range(task.values)])
        needles = [(key, value) for key, own in zip(keys, values, strict=True) for value in own]
        random.Random(self._seed).shuffle(needles)
        context, tokens = (self._essay if task.haystack == "essay" else self._lines)(size, needles)
        asked = self._random.sample(range(len(keys)), task.queries)
        queries = [keys[i] for i in asked]
        query = f"{', '.join(queries[:-1])}, and {queries[-1]}" if len(queries) > 1 else queries[0]
        head, question, answer = task.texts(query)
        before, after = self._frame
        gap = " " if context.endswith(" ") else ""
        tokens += self._lengths.whole(before + head) + self._lengths.piece(gap + question + after + answer)
        outputs = [value for i in asked for value in values[i]]
        return Draft(f"{before}{head}{context}{question}{after}{answer}", answer, outputs, tokens)

    def _drawn(self, kind: str) -> str:
        if kind == "numbers":
            return str(10**6 + self._below(9 * 10**6))
        if kind == "words":
            pairs = vocabulary.pairs()
            return pairs[self._below(len(pairs))]
        bits = self._random.getrandbits(128) & ~(0xF << 76 | 0x3 << 62)  # uuid.UUID does the same four times slower
        digits = f"{bits | 0x4 << 76 | 0x2 << 62:032x}"
        return f"{digits[:8]}-{digits[8:12]}-{digits[12:16]}-{digits[16:20]}-{digits[20:]}"

    def _below(self, n: int) -> int:
        """What random.randrange(n) gives, with which randint and choice draw, without its checks."""
        bits, draw = n.bit_length(), self._random.getrandbits
        while (found := draw(bits)) >= n:
            pass
        return found

    def _lines(self, size: int, needles: Sequence[tuple[str, str]]) -> tuple[str, int]:
        """(the context, its tokens): the haystack and the needles, each after a line break."""
        if self._task.haystack == "noise":
            lines, tokens = [NOISE] * size, size * self._lengths.piece(f"\n{NOISE}")
        else:
            kinds = self._task.key_kind, self._task.value_kind
            lines, tokens = self._said([tuple(map(self._drawn, kinds)) for _ in range(size)])
        hidden, more = self._said(needles)
        places = sorted(self._random.sample(range(size), len(needles)), reverse=True)
        for place, needle in zip(places, hidden, strict=True):
            lines.insert(place, needle)
        return "\n" + "\n".join(lines), tokens + more

    def _said(self, needles: Sequence[tuple[str, ...]]) -> tuple[list[str], int]:
        """(a sentence for each key and value, their tokens in lines); cut such that the same pieces come again."""
        start = _NEEDLE.format(kind=self._task.value_kind)
        tokens = len(needles) * (self._lengths.piece(f"\n{start}") + self._lengths.piece(" is:"))
        keys = [key for key, _ in needles]
        words = self._task.key_kind == "words"
        tokens += self._lengths.compounds(keys) if words else self._lengths.total(f" {key}" for key in keys)
        values = [f" {value}." for _, value in needles]
        numbers = self._task.value_kind == "numbers"
        tokens += self._lengths.alike("numbers", values) if numbers else self._lengths.total(values)
        return [f"{start} {key} is: {value}." for key, value in needles], tokens

    def _essay(self, size: int, needles: Sequence[tuple[str, str]]) -> tuple[str, int]:
        """(the context, its tokens): needles between the sentences of the first `size` words of the essays.

        A space at the end of the context does not count, because it may be one token with the line break after it.
        """
        sentences, ends = self._first_words(size)
        hidden, _ = self._said(needles)
        depths = self._random.sample(_DEPTHS, len(needles))
        places = [0, *sorted(int(len(sentences) * (depth / 100)) for depth in depths), len(sentences)]
        parts: list[str] = []
        tokens, gap = 0, "\n"
        for first, last, needle in zip(places[:-1], places[1:], [*hidden, None], strict=True):
            parts.append(" ".join(sentences[first:last]))
            if first < last:
                tokens += self._lengths.piece(gap + sentences[first]) + ends[last] - ends[first + 1]
                gap = " "
            else:
                gap += " "  # the published code joins the empty stretch with a space, too
            if needle is not None:
                parts.append(needle)
                tokens, gap = tokens + self._lengths.piece(gap + needle), " "
        return "\n" + " ".join(parts), tokens

    def _first_words(self, size: int) -> tuple[list[str], list[int]]:
        """(the sentences of the first words, the tokens of the first 0, 1, 2, ... sentences, each after a space)."""
        if size not in self._first:
            if len(self._first) >= _SIZES:
                self._first.clear()
            words = itertools.islice(itertools.cycle(self._words), size)
            text = " ".join(words)
            starts = [0, *(match.end() for match in _SENTENCE_END.finditer(text)), len(text) + 1]
            sentences = [text[a : b - 1] for a, b in zip(starts[:-1], starts[1:], strict=True) if a < b - 1]
            counts = self._lengths.pieces([f" {sentence}" for sentence in sentences])
            self._first[size] = sentences, [0, *itertools.accumulate(counts)]
        return self._first[size]


@functools.lru_cache(maxsize=2)
def _words_of(essay: str) -> tuple[str, ...]:
    return tuple(re.sub(r"\s+", " ", essay.strip()).split(" "))
