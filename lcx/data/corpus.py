"""A tokenised source with its documents divided into a training and an evaluation split."""

import dataclasses
import fnmatch
from collections.abc import Iterator, Sequence

import numpy as np
from jaxtyping import Bool, Int

from lcx.data.notices import say_once
from lcx.data.store import TokenStore
from lcx.errors import UserError
from lcx.wording import quantity

SPLITS = ("train", "eval")
Scored = tuple[np.ndarray, np.ndarray]  # the ids of a document, and the mask of those with a loss
SPLIT_RULES = ("hash", "tail")


@dataclasses.dataclass(frozen=True)
class DocumentRanges:
    """Ranges of a token store, one per document; `number` is the document's number in the store."""

    starts: Int[np.ndarray, "documents"]
    lengths: Int[np.ndarray, "documents"]
    number: Int[np.ndarray, "documents"]

    def __len__(self) -> int:
        return len(self.starts)

    @property
    def num_tokens(self) -> int:
        return int(self.lengths.sum())

    def take(self, which: np.ndarray) -> "DocumentRanges":
        """The documents selected by an array of indices (in its order) or by a mask."""
        return DocumentRanges(self.starts[which], self.lengths[which], self.number[which])


@dataclasses.dataclass(frozen=True)
class Corpus:
    """The store of one data set and its two splits, which share no document (nor an exact copy of one).

    Attributes:
      copies: number of training documents that were dropped because a copy of them is held out.
      source: where the documents come from, for messages.
    """

    store: TokenStore
    train: DocumentRanges
    eval: DocumentRanges
    copies: int = 0
    source: str = "the data"

    def split(self, name: str) -> DocumentRanges:
        """Raises UserError for a split that does not exist."""
        if name not in SPLITS:
            raise UserError(f"split {name!r} does not exist; expected one of {', '.join(SPLITS)}")
        return self.train if name == "train" else self.eval

    def document_tokens(self, split: str) -> Iterator[Int[np.ndarray, "tokens"]]:
        """The int32 tokens of each document of a split, in the order of the source."""
        documents = self.split(split)
        for start, length in zip(documents.starts.tolist(), documents.lengths.tolist(), strict=True):
            yield self.store.tokens[start : start + length].astype(np.int32)

    def document_masks(self, split: str) -> Iterator[Bool[np.ndarray, "tokens"]]:
        """Which tokens of each document have a loss, in the same order."""
        documents, mask = self.split(split), self.store.loss_mask
        for start, length in zip(documents.starts.tolist(), documents.lengths.tolist(), strict=True):
            yield np.ones(length, bool) if mask is None else mask[start : start + length].astype(bool)

    def remarks(self) -> list[str]:
        """What a run reports about its data when it starts, one line per remark."""
        lines, store = [], self.store
        if store.conversations:
            share = 1.0 if store.loss_tokens is None else store.loss_tokens / store.num_tokens
            lines.append(
                f"{self.source}: {quantity(store.conversations, 'conversation')} of"
                f" {quantity(store.num_documents, 'document')};"
                f" loss on {share:.1%} of {quantity(store.num_tokens, 'token')}; a conversation has no special tokens"
                " but its template's"
            )
        if self.copies:
            lines.append(
                f"{self.source}: {quantity(self.copies, 'training document')} left out:"
                " held-out documents have the same text"
            )
        return lines

    def document_names(self, split: str) -> list[str]:
        """The name of each document of a split, in the same order."""
        return [self.store.names[number] for number in self.split(split).number.tolist()]

    def hashes(self, split: str) -> np.ndarray:
        """The hash of the text of each document of a split."""
        return np.asarray(self.store.hashes)[self.split(split).number]


def without_copies(corpus: Corpus, others: Sequence[Corpus]) -> Corpus:
    """`corpus` without the training documents whose text is in the evaluation split of one of `others`."""
    held_out = [other.hashes("eval") for other in others]
    if not held_out:
        return corpus
    copies = np.isin(corpus.hashes("train"), np.concatenate(held_out))
    train = corpus.train.take(~copies)
    if len(corpus.train) and not len(train):
        raise UserError(
            f"all {len(copies)} training documents of {corpus.source} are copies of documents that another part of the"
            " Mixture holds out; set Dataset.eval_fraction=0 in that part, or remove this one"
        )
    if len(train) < len(copies) / 2:
        say_once(
            f"{int(copies.sum())} of {len(copies)} training documents of {corpus.source} are left out: another part of"
            " the Mixture holds out copies of them (Dataset.eval_fraction)"
        )
    return dataclasses.replace(corpus, train=train, copies=corpus.copies + int(copies.sum()))


def divide(
    store: TokenStore,
    *,
    eval_fraction: float,
    rule: str,
    eval_documents: Sequence[str] = (),
    min_length: int = 0,
    source: str = "the data",
) -> Corpus:
    """Divides the documents of a store.

    Args:
      eval_fraction: 0 puts everything in the training split, 1 everything in the evaluation split; in
        between, each split gets at least one document (by "hash": one distinct text) if there are at least two.
      rule: "hash" decides by a hash of the text, so a document stays in its split when others are added, and
        copies are always in the same split; "tail" takes the last documents of the source (0.2 trains on the first
        80%).
      eval_documents: names of the documents of the evaluation split, instead of a share and a rule (`Dataset`).
      min_length: documents with fewer tokens are in neither split.
      source: where the documents come from, for messages.

    A source with a single document (a text file, a genome) is cut: its tail is the evaluation split. Training documents
    whose text also occurs in the evaluation split are dropped and counted.

    Raises:
      UserError: no document is long enough or has a name of `eval_documents`, or a split would be empty.
    """
    starts, lengths = np.asarray(store.offsets[:-1]), np.diff(store.offsets)
    everything = DocumentRanges(starts, lengths, np.arange(len(starts)))
    documents = everything.take(lengths >= min_length)
    if not len(documents):
        raise UserError(
            f"all {store.num_documents} documents are shorter than Dataset.min_length={min_length} tokens;"
            " lower it"
        )
    hashes = np.asarray(store.hashes)[documents.number]
    if eval_documents:
        names = store.names  # reads a file
        held_out = _by_name([names[number] for number in documents.number.tolist()], eval_documents, source)
        found = _divided(store, documents, held_out, hashes, source)
        if not len(found.train):
            raise UserError(
                f"all {quantity(found.copies, 'training document')} of {source} are copies of those that"
                " Dataset.eval_documents holds out, so none is left to train on: remove the copies, or name others"
            )
        return found
    nothing = documents.take(np.zeros(0, int))
    if eval_fraction <= 0:
        return Corpus(store, documents, nothing, source=source)
    if eval_fraction >= 1:
        return Corpus(store, nothing, documents, source=source)
    if len(documents) == 1:
        return Corpus(store, *_cut(documents, eval_fraction), source=source)
    held_out = (
        _by_hash(hashes, eval_fraction) if rule == "hash" else _by_position(len(documents), eval_fraction)
    )
    found = _divided(store, documents, held_out, hashes, source)
    _check_copies(source, hashes, len(found.train), eval_fraction)
    return found


def _divided(
    store: TokenStore, documents: DocumentRanges, held_out: np.ndarray, hashes: np.ndarray, source: str
) -> Corpus:
    """The documents of the mask `held_out` against the others, apart from copies of held-out documents."""
    copies = ~held_out & np.isin(hashes, hashes[held_out])
    train = documents.take(~held_out & ~copies)
    return Corpus(store, train, documents.take(held_out), int(copies.sum()), source)


def _check_copies(source: str, hashes: np.ndarray, left: int, eval_fraction: float) -> None:
    """Copies stay in one split, so a source with many copies cannot be split as requested: an error or a warning."""
    count, distinct = len(hashes), len(np.unique(hashes))
    if distinct == count:
        return
    found = (
        f"only {distinct} of the {count} documents of {source} are distinct"
        if distinct > 1
        else (f"all {count} documents of {source} are identical")
    )
    advice = "remove the copies, or set Dataset.eval_fraction (0: all train, 1: all eval)"
    if distinct == 1 or not left:
        raise UserError(f"{found}, and copies are never divided: one split would be empty; {advice}")
    if left < (1 - eval_fraction) * count / 2:
        say_once(
            f"{found}, and copies are never divided: {left} are left to train on; {advice} or Dataset.split"
        )


def _cut(documents: DocumentRanges, eval_fraction: float) -> tuple[DocumentRanges, DocumentRanges]:
    length = int(documents.lengths[0])
    tail = min(max(1, round(length * eval_fraction)), length - 1)
    head = dataclasses.replace(documents, lengths=documents.lengths - tail)
    rest = dataclasses.replace(documents, starts=documents.starts + length - tail, lengths=np.array([tail]))
    return (head, rest) if length > 1 else (documents, documents.take(np.zeros(0, int)))


def _by_hash(hashes: np.ndarray, eval_fraction: float) -> np.ndarray:
    held_out = hashes < np.uint64(min(int(eval_fraction * 2.0**64), 2**64 - 1))
    distinct = np.unique(hashes)
    if len(distinct) > 1:  # with few documents, one split may be empty by chance
        held_out |= hashes == distinct[0]
        held_out &= hashes != distinct[-1]
    return held_out


def _by_position(count: int, eval_fraction: float) -> np.ndarray:
    tail = min(max(1, round(count * eval_fraction)), count - 1)
    return np.arange(count) >= count - tail


def _by_name(names: Sequence[str], wanted: Sequence[str], source: str) -> np.ndarray:
    """Mask of the documents that match a pattern of `wanted`, with or without the file in front ("genome.fa:chr20")."""
    held_out = np.zeros(len(names), bool)
    for pattern in wanted:
        found = [any(fnmatch.fnmatchcase(one, pattern) for one in (name, name.partition(":")[2])) for name in names]
        if not any(found):
            raise UserError(
                f"Dataset.eval_documents names {pattern!r}, but no document of {source} is called so: expected names"
                f" such as {', '.join(names[:3])}"
            )
        held_out |= found
    if held_out.all():
        raise UserError(
            f"Dataset.eval_documents holds out all {quantity(len(names), 'document')} of {source}, so none is left to"
            " train on: name fewer"
        )
    return held_out
