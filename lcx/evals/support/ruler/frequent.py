"""cwe and fwe: which words occur most often in a long list, and in a text of made-up words."""

import dataclasses
import functools
import random
import string

import numpy as np

from lcx.evals.support.ruler import vocabulary
from lcx.evals.support.ruler.fitting import Draft
from lcx.evals.support.ruler.lengths import Lengths

_CWE_TASK = (
    "Below is a numbered list of words. In these words, some appear more often than others. Memorize the ones that"
    " appear most often."
)
_CWE_QUESTION = "\nQuestion: What are the 10 most common words in the above list?"
_CWE_ANSWER = " Answer: The top 10 words that appear most often in the list are:"
_FWE_TASK = (
    "Read the following coded text and track the frequency of each coded word. Find the three most frequently appeared"
    " coded words."
)
_FWE_QUESTION = (
    "\nQuestion: Do not provide any explanation. Please ignore the dots '....'. What are the three most frequently"
    " appeared words in the above coded text?"
)
_FWE_ANSWER = " Answer: According to the coded text above, the three most frequently appeared words are:"
_SHORT = 4096  # below it, the lists of cwe repeat their words less often


@dataclasses.dataclass(frozen=True)
class CommonWords:
    """The settings of common words extraction: how often common and other words occur, and how many are common."""

    common_repeats: int = 30
    other_repeats: int = 3
    common: int = 10

    answer_tokens = 120

    def step(self, length: int) -> int:
        return 10


class CommonWordsDrafts:
    """Drafts of cwe by the number of different words, each after a solved example.

    Attributes:
      beyond: whether a draft needed more words than there are.
    """

    def __init__(
        self,
        task: CommonWords,
        lengths: Lengths,
        *,
        seed: int,
        frame: tuple[str, str],
        length: int,
        english_words: str | None,
    ):
        self._task, self._lengths, self._seed, self._frame = task, lengths, seed, frame
        self._random, self._short = random.Random(seed), length < _SHORT
        self._file, self.beyond = english_words, False

    def __call__(self, size: int) -> Draft:
        task = self._task
        example, repeats = (20, (3, 1)), (6, 1)
        if not self._short:
            example, repeats = (40, (10, 3)), (task.common_repeats, task.other_repeats)
        shown, common_shown, tokens = self._list(example[0], *example[1])
        listed, common, more = self._list(size, *repeats)
        before, after = self._frame
        solved = " " + " ".join(f"{i + 1}. {word}" for i, word in enumerate(common_shown))
        middle = f"{_CWE_QUESTION}{_CWE_ANSWER}{solved}\n{_CWE_TASK}"
        end = f"{_CWE_QUESTION}{after}{_CWE_ANSWER}"
        tokens += more + self._lengths.whole(before + _CWE_TASK) + self._lengths.piece(end)
        tokens += self._lengths.piece(f"{_CWE_QUESTION}{_CWE_ANSWER}") + self._lengths.piece(f"\n{_CWE_TASK}")
        tokens += self._lengths.total(f" {word}" for word in solved.split())
        return Draft(f"{before}{_CWE_TASK}{shown}{middle}{listed}{end}", _CWE_ANSWER, common, tokens)

    def _list(self, size: int, common_repeats: int, other_repeats: int) -> tuple[str, list[str], int]:
        """(a shuffled numbered list after a line break, its common words, its tokens)."""
        words = self._random.sample(self._pool(size), size)
        common, others = words[: self._task.common], words[self._task.common :]
        entries = common * common_repeats + others * other_repeats
        order = _shuffled(len(entries), self._seed)
        entries = [entries[i] for i in order]
        counts = dict(zip(words, self._lengths.pieces([f" {word}" for word in words]), strict=True))
        tokens = common_repeats * sum(counts[word] for word in common)
        tokens += other_repeats * sum(counts[word] for word in others)
        text = "\n" + " ".join([f"{i}. {word}" for i, word in enumerate(entries, start=1)])
        return text, common, tokens + self._numbers(len(entries))

    def _numbers(self, count: int) -> int:
        """The tokens of the numbers of a list: of a line break and "1.", then of " 2.", " 3.", ..."""
        return self._lengths.piece("\n1.") + _number_tokens(self._lengths, count)

    def _pool(self, size: int) -> tuple[str, ...]:
        words = vocabulary.single_words(self._seed)
        if size <= len(words):
            return words
        self.beyond = True
        if self._file is not None:
            return vocabulary.english_words(self._file)
        return words + _paired(size - len(words))


@functools.lru_cache(maxsize=8)
def _paired(count: int) -> tuple[str, ...]:
    """So many adjective-noun pairs, spread over all of them."""
    pairs = vocabulary.pairs()
    return tuple(pairs[i * (len(pairs) // count)] for i in range(count))


@functools.lru_cache(maxsize=8)
def _shuffled(count: int, seed: int) -> list[int]:
    """The order in which random.Random(seed).shuffle puts a list of this length; the same for every sample."""
    order = list(range(count))
    random.Random(seed).shuffle(order)
    return order


@functools.lru_cache(maxsize=64)
def _number_tokens(lengths: Lengths, count: int) -> int:
    return lengths.total(f" {i}." for i in range(2, count + 1))


@dataclasses.dataclass(frozen=True)
class FrequentWords:
    """The settings of frequent words extraction: the exponent of the frequencies, and the letters of a word."""

    alpha: float = 2.0
    letters: int = 6

    answer_tokens = 50

    def step(self, length: int) -> int:
        return max(1, length // 32)


class FrequentWordsDrafts:
    """Drafts of fwe by the number of words, whose frequencies fall as rank ** -alpha; rank 1 is shown as dots."""

    def __init__(
        self, task: FrequentWords, lengths: Lengths, *, seed: int, frame: tuple[str, str], length: int
    ):
        self._task, self._lengths, self._seed, self._frame = task, lengths, seed, frame
        self._random, self._size = random.Random(seed), max(4, length // 50)
        self._vocabulary = self.new_vocabulary()

    def new_vocabulary(self) -> list[str]:
        """New made-up words, by rank; drafts use them from now on."""
        words = [self._word() for _ in range(self._size)]
        while len(set(words)) < self._size:
            words.append(self._word())
        words = sorted(set(words))
        order = _shuffled(len(words), self._seed)
        self._vocabulary = [words[i] for i in order]
        self._vocabulary[0] = "..."
        return self._vocabulary

    def __call__(self, size: int) -> Draft:
        from scipy.special import zeta

        words, alpha = self._vocabulary, self._task.alpha
        counts = (size * (np.arange(1, len(words) + 1) ** -alpha) / zeta(alpha)).astype(int)
        used = int(np.count_nonzero(counts))
        repeated = [word for word, count in zip(words[:used], counts[:used]) for _ in range(count)]
        shown = [repeated[i] for i in _shuffled(len(repeated), self._seed)]
        before, after = self._frame
        end = f"{_FWE_QUESTION}{after}{_FWE_ANSWER}"
        each = self._lengths.pieces([f" {word}" for word in words[:used]])
        tokens = sum(n * int(count) for n, count in zip(each, counts[:used]))
        tokens += self._lengths.whole(before + _FWE_TASK) + self._lengths.piece(end)
        return Draft(f"{before}{_FWE_TASK} {' '.join(shown)}{end}", _FWE_ANSWER, words[1:4], tokens)

    def _word(self) -> str:
        return "".join(self._random.choices(string.ascii_lowercase, k=self._task.letters))
