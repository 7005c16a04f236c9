"""Filler of a wanted number of tokens with sentences hidden in it, from a text of the user or from noise."""

import pathlib
import re
from collections.abc import Sequence

from lcx.data import Tokenizer
from lcx.errors import UserError

NOISE = (
    "The grass is green.", "The sky is blue.", "The sun is yellow.", "Here we go.", "There and back again."
)  # fmt: skip
_END = re.compile(r"(?<=[.!?])[\"'”’)\]]*\s+")


class Haystack:
    """Sentences in order, from the beginning again when they end.

    Args:
      path: a text file; None: noise.
      owner: the setting that names the file, for messages.

    Raises:
      UserError: the file cannot be read, or holds no text.
    """

    def __init__(self, tokenizer: Tokenizer, path: str | None, *, owner: str):
        self._tokenizer, self._sentences = tokenizer, list(NOISE)
        if path is not None:
            try:
                text = pathlib.Path(path).expanduser().read_text(encoding="utf-8-sig")
            except (OSError, UnicodeDecodeError) as error:
                why = getattr(error, "strerror", None) or str(error)
                raise UserError(f"{path}: {why}; expected a text file: change {owner}") from None
            self._sentences = [sentence for sentence in _END.split(" ".join(text.split())) if sentence]
            if not self._sentences:
                raise UserError(f"{path} holds no text: change {owner}")
        counts = [len(tokenizer.encode(f"a. {sentence}")) for sentence in self._sentences]
        self._tokens = [max(1, count - len(tokenizer.encode("a."))) for count in counts]

    def filled(
        self, room: int, *, hidden: Sequence[tuple[float, str]], before: str = "", after: str = ""
    ) -> tuple[str, int] | None:
        """(before + haystack + after, its tokens): as long as `room` tokens allow; None if nothing fits.

        Args:
          hidden: (depth in [0, 1], text): each text is inserted at the end of the sentence there.
        """
        outer = len(self._tokenizer.encode(before + "".join(text for _, text in hidden) + after))
        count, total = 0, outer
        while total + self._tokens[count % len(self._tokens)] <= room:
            total += self._tokens[count % len(self._tokens)]
            count += 1
        while count >= 0:
            text = before + self._text(count, hidden) + after
            tokens = len(self._tokenizer.encode(text))
            if tokens <= room:
                return text, tokens
            count -= max(1, (tokens - room) * max(count, 1) // (2 * tokens))
        return None

    def _text(self, count: int, hidden: Sequence[tuple[float, str]]) -> str:
        places: dict[int, list[str]] = {}
        for depth, text in hidden:
            places.setdefault(self._sentence_at(depth, count), []).append(text)
        out = places.get(0, [])[:]
        for i in range(count):
            out.append((" " if i or out else "") + self._sentences[i % len(self._sentences)])
            out += places.get(i + 1, [])
        return "".join(out)

    def _sentence_at(self, depth: float, count: int) -> int:
        """After how many of `count` sentences this share of their tokens has passed."""
        size = len(self._tokens)
        total = sum(self._tokens) * (count // size) + sum(self._tokens[: count % size])
        passed, i = 0, 0
        while i < count and passed < depth * total - 0.5:
            passed += self._tokens[i % size]
            i += 1
        return i
