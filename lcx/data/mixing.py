"""The groups of rows that batches are drawn from, and their weights: parts of a mixture, long and short documents."""

import dataclasses
from typing import Protocol

import numpy as np

from lcx.data import order, packing
from lcx.data.corpus import Corpus, DocumentRanges
from lcx.data.notices import say_once
from lcx.data.store import TokenStore
from lcx.errors import UserError


@dataclasses.dataclass(frozen=True)
class BatchSpec:
    """Which rows of a split a process reads, and in what batches.

    The batches are one sequence of rows, independent of the number of processes: batch k is rows k * global_batch_size
    .. (k + 1) * global_batch_size, and process i of n holds the i-th of n equal blocks.

    Attributes:
      split: "train" or "eval".
      global_batch_size: rows of a batch over all processes.
      seq_len: tokens of a row (T).
      seed: decides the order of documents and rows, nothing else.
      start: rows to skip, as `BatchIterator.state()["next_index"]` counts them.
      shuffle: whether to shuffle; None: only in training.
      repeat: endless, in a different order every epoch; None: only in training. Without it every row occurs once,
        weights and long_fraction do not apply, and the last batch is filled up with rows of weight 0.
      vocab_size: the model's vocabulary size, to refuse ids outside of it.
      num_threads: threads that prefetch batches; 0 prepares each batch when it is requested.
      streams: row i of a batch continues where row i of the batch before ended (lcx/data/streams.py); for training.
      num_workers: worker processes; on few cores they cost more time than they save, and they outlive a killed run.

    Raises:
      UserError: sizes below 1, or a batch that does not divide over the processes.
    """

    split: str
    global_batch_size: int
    seq_len: int
    seed: int = 0
    process_index: int = 0
    process_count: int = 1
    start: int = 0
    shuffle: bool | None = None
    repeat: bool | None = None
    vocab_size: int | None = None
    num_threads: int = 1
    num_workers: int = 0
    streams: bool = False

    def __post_init__(self):
        for name in ("global_batch_size", "seq_len", "process_count"):
            if getattr(self, name) < 1:
                raise UserError(f"{name}={getattr(self, name)} is too small; expected at least 1")
        if self.start < 0:
            raise UserError(f"start={self.start} is negative; expected a number of rows")
        if self.global_batch_size % self.process_count:
            raise UserError(
                f"global_batch_size={self.global_batch_size} does not divide over {self.process_count} processes;"
                " make it a multiple of their number"
            )
        if not 0 <= self.process_index < self.process_count:
            raise UserError(
                f"process_index={self.process_index} is not one of {self.process_count} processes"
            )

    @property
    def shuffles(self) -> bool:
        return self.split == "train" if self.shuffle is None else self.shuffle

    @property
    def repeats(self) -> bool:
        return self.split == "train" if self.repeat is None else self.repeat

    @property
    def local_batch_size(self) -> int:
        return self.global_batch_size // self.process_count


class RowSettings(Protocol):
    """The settings of a `lcx.data.Dataset` that decide what its rows hold, once its documents are tokenised."""

    @property
    def source(self) -> str | tuple[str, ...]: ...
    @property
    def packing(self) -> str: ...
    @property
    def document_mask(self) -> bool: ...
    @property
    def eval_fraction(self) -> float: ...
    @property
    def split(self) -> str: ...
    @property
    def eval_documents(self) -> tuple[str, ...]: ...
    @property
    def min_length(self) -> int: ...
    @property
    def long_fraction(self) -> float | None: ...
    @property
    def long_length(self) -> int | None: ...
    def without_effect(self, corpus: Corpus) -> list[str]: ...


@dataclasses.dataclass(frozen=True)
class Part:
    """A data set of a mixture, opened."""

    dataset: RowSettings
    weight: float
    corpus: Corpus


@dataclasses.dataclass(frozen=True)
class Group:
    """Rows that share one sampling weight: those of a data set, or of its long or its short documents.

    Attributes:
      documents, tokens: how many the rows contain, each document counted once.
      weight: the share of the rows of a batch, relative to the other groups.
      kind: "all", "long" or "short".
    """

    store: TokenStore
    plan: packing.Plan
    documents: int
    tokens: int
    weight: float
    document_mask: bool
    kind: str


@dataclasses.dataclass(frozen=True)
class _Candidate:
    """Documents that are not yet laid out in rows; groups with the same `pool` share one long_fraction."""

    part: int
    dataset: RowSettings
    corpus: Corpus
    documents: DocumentRanges
    weight: float
    kind: str = "all"
    pool: int | None = None
    long_fraction: float = 1.0
    long_length: int = 0


def make_groups(
    parts: tuple[Part, ...], spec: BatchSpec, *, long_fraction: float | None, long_length: int | None
) -> tuple[Group, ...]:
    """The non-empty groups of a split.

    long_fraction applies only if rows are drawn by weight (endless training): over all parts if it is set here, else
    within each data set that sets it.
    """
    candidates: list[_Candidate] = []
    for number, part in enumerate(parts):
        dataset, corpus, pool = part.dataset, part.corpus, -1
        fraction, length = long_fraction, long_length
        if fraction is None:
            fraction, length, pool = dataset.long_fraction, dataset.long_length, number
        whole = _Candidate(number, dataset, corpus, corpus.split(spec.split), part.weight)
        if fraction is None or not (spec.repeats and spec.split == "train"):
            candidates.append(whole)
        else:
            candidates += _long_and_short(whole, pool, fraction, length or spec.seq_len)
    candidates = [one for one in candidates if len(one.documents)]
    return tuple(
        Group(
            store=one.corpus.store,
            plan=_plan(one.dataset, one.documents, spec, number),
            documents=len(one.documents),
            tokens=one.documents.num_tokens,
            weight=share,
            document_mask=one.dataset.document_mask,
            kind=one.kind,
        )
        for number, one in enumerate(candidates)
        if (share := _share(one, candidates)) > 0
    )


def _long_and_short(whole: _Candidate, pool: int, fraction: float, length: int) -> list[_Candidate]:
    is_long = whole.documents.lengths >= length
    return [
        dataclasses.replace(
            whole,
            documents=whole.documents.take(mask),
            kind=kind,
            pool=pool,
            long_fraction=fraction,
            long_length=length,
        )
        for kind, mask in (("long", is_long), ("short", ~is_long))
    ]


def _share(one: _Candidate, candidates: list[_Candidate]) -> float:
    """The weight of a group.

    In each pool, the long groups together get long_fraction and the short ones the rest. Without short
    documents all rows are long; without long documents the fraction cannot be met, which is an error.
    """
    if one.pool is None:
        return one.weight
    pool = [other for other in candidates if other.pool == one.pool]
    kinds = {other.kind for other in pool}
    if "long" not in kinds:
        longest = max(int(other.documents.lengths.max()) for other in pool)
        raise UserError(
            f"long_fraction={one.long_fraction} but no training document has {one.long_length} tokens (the"
            " longest"
            f" has {longest}); lower long_length or seq_len, add long documents, or unset long_fraction"
        )
    if "short" not in kinds and one.long_fraction < 1:
        say_once(
            f"long_fraction={one.long_fraction} has no effect: all training documents have at least"
            f" {one.long_length} tokens; raise long_length"
        )
    fraction = one.long_fraction if one.kind == "long" else 1 - one.long_fraction
    side = fraction if len(kinds) == 2 else 1.0
    whole = sum({other.part: other.weight for other in pool}.values())
    return side * whole * one.weight / sum(other.weight for other in pool if other.kind == one.kind)


def _plan(dataset: RowSettings, documents: DocumentRanges, spec: BatchSpec, number: int) -> packing.Plan:
    if spec.shuffles:  # so that documents adjacent in the source do not always share a row
        seed = order.derive(spec.seed, "documents", number)
        documents = documents.take(order.permutation(len(documents), seed=seed))
    starts, lengths = documents.starts, documents.lengths
    joined = not dataset.document_mask
    if dataset.packing == "first_fit":
        return packing.plan_first_fit(starts, lengths, seq_len=spec.seq_len)
    if dataset.packing == "padded":
        if left_out := int(np.maximum(lengths - spec.seq_len - 1, 0).sum()):
            say_once(
                f"packing 'padded' leaves out {left_out} of {int(lengths.sum())} tokens ({spec.split}), those of long"
                f" documents beyond seq_len={spec.seq_len}"
            )
        return packing.plan_padded(starts, lengths, seq_len=spec.seq_len)
    if dataset.packing == "concat":
        return packing.plan_concat(starts, lengths, seq_len=spec.seq_len, joined=joined)
    once = spec.split == "eval"
    return packing.plan_windows(starts, lengths, seq_len=spec.seq_len, score_once=once, joined=joined)
