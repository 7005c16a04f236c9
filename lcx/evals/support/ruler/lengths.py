"""Numbers of tokens of long texts that consist of pieces which occur again and again."""

from collections.abc import Iterable, Sequence

from lcx.data import Tokenizer
from lcx.data.tokenizers import encode_all

_BEFORE = "again."  # what stands before a piece when it is counted
_ALIKE = 2000
_MOST = 1 << 20  # cached pieces; then the cache starts again


class Lengths:
    """Counts tokens with a tokenizer, without the special tokens that it puts around a text.

    The tokens of a text are the sum over its pieces if no token spans the border of two pieces. For tokenizers that
    split a text at spaces first, which is nearly all, this holds for pieces that start with a space or a line break.
    `fitting.Measure` does not rely on it: it compares such sums with the whole text.
    """

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._before = self.whole(_BEFORE)
        self._pieces: dict[str, int] = {}
        self._alike: dict[str, tuple[int, int | None]] = {}
        self._compounds, self._apart = 0, True

    def whole(self, text: str) -> int:
        """The tokens of a text."""
        return len(self._tokenizer.encode(text))

    def piece(self, text: str) -> int:
        """The tokens that a piece adds to a text that it continues."""
        return self.pieces([text])[0]

    def pieces(self, texts: Sequence[str]) -> list[int]:
        """`piece` of each text; those not seen before are encoded together."""
        known = self._pieces
        if len(known) > _MOST:
            known.clear()
        new = list({text for text in texts if text not in known})
        if new:
            counts = encode_all(self._tokenizer, [_BEFORE + text for text in new])
            known.update(zip(new, (len(ids) - self._before for ids in counts), strict=True))
        return [known[text] for text in texts]

    def alike(self, kind: str, texts: Sequence[str]) -> int:
        """The tokens of pieces that differ in nothing but their digits, all of them together.

        If the first thousands of a kind had equally many tokens, as with tokenizers that split digits, others are
        taken to have as many, too.
        """
        seen, each = self._alike.get(kind, (0, None))
        if seen >= _ALIKE and each is not None:
            return each * len(texts)
        counts = self.pieces(texts)
        different = len({*counts, *([each] if seen else [])}) > 1 or (seen > 0 and each is None)
        self._alike[kind] = seen + len(texts), None if different or not counts else counts[0]
        return sum(counts)

    def compounds(self, words: Sequence[str]) -> int:
        """The tokens of words such as "capable-radiosonde", each after a space, all of them together.

        A word hardly ever comes again, its two sides do. If no token spanned both sides of the first hyphen in
        thousands of words, the sides of others are counted by themselves.
        """
        sides = [word.partition("-") for word in words] if self._apart else []
        apart = self.total(f" {first}-" for first, _, _ in sides)
        apart += self.total(f"-{rest}" for _, _, rest in sides) - len(sides) * self.piece("-")
        if self._apart and self._compounds >= _ALIKE:
            return apart
        whole = self.total(f" {word}" for word in words)
        self._compounds, self._apart = self._compounds + len(words), self._apart and apart == whole
        return whole

    def total(self, texts: Iterable[str]) -> int:
        """The tokens of several pieces together."""
        return sum(self.pieces(list(texts)))
