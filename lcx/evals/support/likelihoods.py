"""Log-likelihoods of nucleotide sequences of any length, in bounded memory."""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Float, Int

from lcx.data import ByteTokenizer, Tokenizer, check_vocabulary, special_tokens
from lcx.errors import UserError
from lcx.evals.support import scoring
from lcx.evals.support.letters import Letters
from lcx.evals.support.windows import window_rows
from lcx.model import Decoder
from lcx.ops.cross_entropy import token_nll

_WIDTH_STEP = 128
_BATCHES = 8  # scored together, so that rows of similar lengths share batches
_LETTERS = "ACGTACGTNNacgt"  # tokens of several letters would show
Measure = Callable[..., jax.Array]


@dataclasses.dataclass(frozen=True)
class Scorer:
    """A model, and how it scores sequences.

    Attributes:
      window: tokens per forward pass.
      tag: text before every window that is not scored itself, such as "|d__Bacteria;...|".
      description: label of progress bars; None: there are none.

    Raises:
      UserError: there is no tokenizer, its vocabulary is larger than the model's, or the tag fills the window.
    """

    model: Decoder
    params: Any
    tokenizer: Tokenizer | None
    window: int
    tokens_per_batch: int = scoring.TOKENS_PER_BATCH
    tag: str = ""
    description: str | None = "scoring"

    def __post_init__(self):
        if self.tokenizer is None:
            raise UserError(
                "the checkpoint has no tokenizer: DNA needs a byte tokenizer, save the model with one"
            )
        check_vocabulary(self.tokenizer, self.model.vocab_size)
        if (count := len(self.encode(_LETTERS))) != len(_LETTERS):
            raise UserError(
                f"the tokenizer has {count} tokens for {_LETTERS}, expected one for each letter: DNA needs a model of "
                "bytes or letters, choose another checkpoint"
            )
        if self.room < 2:
            raise UserError(
                f"the tag has {len(self.head)} tokens and the window {self.window}: raise the setting window"
            )

    def encode(self, text: str) -> Int[np.ndarray, " T"]:
        assert self.tokenizer is not None
        return np.asarray(self.tokenizer.encode(text), np.int32)

    @property
    def head(self) -> Int[np.ndarray, " H"]:
        """The tokens before a sequence, which are not scored: BOS if the tokenizer adds it, and the tag."""
        assert self.tokenizer is not None
        before = np.array(special_tokens(self.tokenizer).before, np.int32)
        return np.concatenate([before, self.encode(self.tag)]) if self.tag else before

    @property
    def room(self) -> int:
        """How many letters fit into a window."""
        return self.window - len(self.head)

    def rows(
        self,
        rows: Sequence[Int[np.ndarray, " T"]],
        *,
        measure: Measure = token_nll,
        width_of: int | None = None,
    ) -> list[Float[np.ndarray, "scored *measured"]]:
        """Of each row, log p in nats of every token but the first, or what `measure` computes (`scoring.score`).

        Rows have at most `window` tokens. Equal rows are scored once; rows of similar lengths share batches.
        """
        unique: dict[bytes, int] = {}
        which = [unique.setdefault(row.tobytes(), len(unique)) for row in rows]
        tokens: list[np.ndarray] = [np.frombuffer(key, np.int32) for key in unique]
        found: list[Any] = [None] * len(tokens)
        widths = np.array([_width(len(row), self.window) for row in tokens])
        for width in np.unique(widths):
            chosen = np.flatnonzero(widths == width)
            ids, labels = (np.zeros((self._padded(len(chosen), int(width)), width), np.int32) for _ in range(2))
            for i, number in enumerate(chosen):
                row = tokens[number]
                ids[i, : len(row)], labels[i, : len(row) - 1] = row, row[1:]
            values = scoring.score(
                self.model,
                self.params,
                ids,
                labels,
                tokens_per_batch=self.tokens_per_batch,
                description=None if self.description is None else f"{self.description}, {width} wide",
                measure=measure,
                width_of=width_of,
                kept=False,
            )
            for number, value in zip(chosen, values[: len(chosen)], strict=True):
                kept = value[: max(len(tokens[number]) - 1, 0)]
                found[number] = -kept if width_of is None else kept
        return [found[number] for number in which]

    def _padded(self, rows: int, width: int) -> int:
        """The number of rows of a batch that is not full: a power of two, so that few programs are compiled."""
        full = max(1, self.tokens_per_batch // width)
        return rows if rows >= full else min(full, 1 << (rows - 1).bit_length())

    def sequences(
        self,
        sequences: Sequence[Letters],
        *,
        stride: int,
        change: Callable[[str], str] = str,
        measure: Measure = token_nll,
        width_of: int | None = None,
    ) -> Iterator[tuple[int, int, Float[np.ndarray, "scored *measured"]]]:
        """Yields (number of the sequence, its first token here, log p of this and the following tokens), in order.

        A sequence longer than a window is scored with windows that start `stride` tokens apart, each token once, in the
        first window that contains it. Without BOS and tag the first token has no context and is not scored. Memory
        does not grow with the sequences.

        Args:
          change: applied to each part of a sequence before it is encoded.
        """
        waiting: list[tuple[int, int, int, np.ndarray]] = []
        size = 0
        for number, sequence in enumerate(sequences):
            for start, skipped, row in self._windows(sequence, stride, change):
                waiting.append((number, start, skipped, row))
                size += len(row)
                if size >= _BATCHES * self.tokens_per_batch:
                    yield from self._scored(waiting, measure, width_of)
                    waiting, size = [], 0
        yield from self._scored(waiting, measure, width_of)

    def _scored(self, waiting, measure: Measure, width_of: int | None):
        values = self.rows([row for *_, row in waiting], measure=measure, width_of=width_of)
        for (number, start, skipped, _), value in zip(waiting, values, strict=True):
            yield number, start, value[skipped:]

    def _windows(
        self, sequence: Letters, stride: int, change: Callable[[str], str]
    ) -> Iterator[tuple[int, int, np.ndarray]]:
        """(first scored token of the sequence, scores to skip, tokens) of every window that scores something."""
        head = self.head
        again = len(self.encode(self.tag)) if self.tag else 0  # the tag is before later windows, too; BOS is not
        tokens = _Tokens(self, sequence, change)
        total, reach = len(head) + len(tokens), self.window - again
        for _, begin, end, first in window_rows([total], window=reach, stride=min(stride, reach - 1)):
            if 0 < begin < len(head):
                raise UserError(
                    f"the stride is {stride}, expected at least the tag's {len(head)} tokens: raise the setting stride"
                )
            before = head if begin == 0 else head[len(head) - again :]
            at = max(begin - len(head), 0)
            start = max(first, len(head), 1) - len(head)
            if start < end - len(head):
                row = np.concatenate([before, tokens.between(at, end - len(head))])
                yield start, len(before) + start - at - 1, row


class _Tokens:
    """The tokens of a text. A byte is a token of a byte tokenizer, so parts of it are encoded as they are needed."""

    def __init__(self, scorer: Scorer, text: Letters, change: Callable[[str], str]):
        self._scorer, self._text, self._change = scorer, text, change
        whole = not isinstance(scorer.tokenizer, ByteTokenizer)
        self._all = scorer.encode(change(text[0 : len(text)])) if whole else None

    def __len__(self) -> int:
        return len(self._text) if self._all is None else len(self._all)

    def between(self, start: int, stop: int) -> Int[np.ndarray, " T"]:
        if self._all is not None:
            return self._all[start:stop]
        return self._scorer.encode(self._change(self._text[start:stop]))


def _width(length: int, window: int) -> int:
    """The padded width of a row: powers of two from 128, so that few programs are compiled for many lengths."""
    width = _WIDTH_STEP
    while width < length:
        width *= 2
    return max(min(width, window), length)
