"""The words of RULER: those of the package wonderwords (MIT), and its file english_words.json if that is given."""

import bisect
import functools
import importlib.resources
import json
import pathlib
from collections.abc import Sequence

from lcx.errors import UserError


@functools.cache
def _words(name: str) -> tuple[str, ...]:
    try:
        assets = importlib.resources.files("wonderwords").joinpath("assets", f"{name}list.txt")
    except ModuleNotFoundError:
        raise UserError(
            "RULER takes its words from the package wonderwords, which is not installed: pip install wonderwords"
        ) from None
    return tuple(line.rstrip() for line in assets.read_text(encoding="utf-8").splitlines())


class Pairs(Sequence[str]):
    """All six million pairs "adjective-noun" in the order of sorted strings, without holding them.

    The pairs of an adjective are a block, with the nouns in order. The blocks of adjectives such as "blue" and
    "blue-eyed" interleave; these few are sorted and held.
    """

    def __init__(self, adjectives: Sequence[str], nouns: Sequence[str]):
        self._nouns = sorted(set(nouns))
        groups: list[list[str]] = []
        for start in sorted(f"{adjective}-" for adjective in set(adjectives)):
            if groups and start.startswith(groups[-1][0]):
                groups[-1].append(start)
            else:
                groups.append([start])
        self._blocks = [
            group[0] if len(group) == 1 else sorted({start + noun for start in group for noun in self._nouns})
            for group in groups
        ]
        sizes = [len(self._nouns) if isinstance(block, str) else len(block) for block in self._blocks]
        self._ends = [sum(sizes[: i + 1]) for i in range(len(sizes))]

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index):
        block = bisect.bisect_right(self._ends, index)
        found = self._blocks[block]
        place = index - (self._ends[block - 1] if block else 0)
        return found + self._nouns[place] if isinstance(found, str) else found[place]


@functools.cache
def pairs() -> Pairs:
    """Keys of needles, such as "capable-radiosonde"."""
    return Pairs(_words("adjective"), _words("noun"))


@functools.cache
def single_words(seed: int) -> tuple[str, ...]:
    """The 8166 words of cwe, in the order that the seed gives them."""
    import random

    words = sorted({*_words("noun"), *_words("adjective"), *_words("verb")})
    random.Random(seed).shuffle(words)
    return tuple(words)


@functools.cache
def english_words(path: str) -> tuple[str, ...]:
    """The values of RULER's english_words.json, an object {number: word}, or of a list of words.

    Raises:
      UserError: it cannot be read, or is no such file.
    """
    place = pathlib.Path(path).expanduser()
    try:
        found = json.loads(place.read_text(encoding="utf-8"))
        words = list(found.values()) if isinstance(found, dict) else found
        if not words or not all(isinstance(word, str) for word in words):
            raise ValueError("no list of words")
    except (OSError, ValueError, AttributeError) as error:
        why = getattr(error, "strerror", None) or str(error)
        raise UserError(
            f"{path}: {why}; expected RULER's english_words.json: change Ruler.english_words"
        ) from None
    return tuple(words)
