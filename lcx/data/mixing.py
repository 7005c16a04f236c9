"""Which rows a request draws from, and with what weight: the parts of a mixture, long and short documents."""

import dataclasses
from typing import TYPE_CHECKING

from lcx.data import order, packing
from lcx.data.corpus import Corpus, Documents
from lcx.data.store import TokenStore
from lcx.errors import UserError

if TYPE_CHECKING:
    from lcx.data.dataset import Dataset, Mixture


@dataclasses.dataclass(frozen=True)
class Request:
    """The arguments of `Mixture.batches`, with the defaults resolved."""

    split: str
    global_batch_size: int
    seq_len: int
    seed: int
    process_index: int
    process_count: int
    shuffle: bool
    repeat: bool
    vocab_size: int | None
    num_threads: int
    num_workers: int

    def __post_init__(self):
        for name in ("global_batch_size", "seq_len", "process_count"):
            if getattr(self, name) < 1:
                raise UserError(f"{name}={getattr(self, name)} is too small; expected at least 1")
        if self.global_batch_size % self.process_count:
            raise UserError(
                f"global_batch_size={self.global_batch_size} does not divide over {self.process_count}"
                " processes;"
                " make it a multiple of their number"
            )
        if not 0 <= self.process_index < self.process_count:
            raise UserError(
                f"process_index={self.process_index} is not one of {self.process_count} processes"
            )

    @property
    def local_batch_size(self) -> int:
        return self.global_batch_size // self.process_count


@dataclasses.dataclass(frozen=True)
class Group:
    """Rows that are drawn from with one weight: a data set, or its long or its short documents.

    Attributes:
      documents, tokens: what the rows hold, each document counted once.
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
    """Documents before they are planned; `pool` names the groups that share one long_fraction."""

    part: int
    dataset: "Dataset"
    corpus: Corpus
    documents: Documents
    weight: float
    kind: str = "all"
    pool: int | None = None
    long_fraction: float = 1.0
    long_length: int = 0


def make_groups(mixture: "Mixture", opened: tuple[Corpus, ...], request: Request) -> tuple[Group, ...]:
    """The groups of a request that have documents.

    long_fraction applies where rows are drawn by weight (endless training), over the mixture where it is set
    there, else within each data set that sets it.
    """
    candidates: list[_Candidate] = []
    for number, ((dataset, weight), corpus) in enumerate(zip(mixture.parts, opened, strict=True)):
        whole = _Candidate(number, dataset, corpus, corpus.split(request.split), weight)
        owner = dataset if mixture.long_fraction is None else mixture
        if owner.long_fraction is None or not (request.repeat and request.split == "train"):
            candidates.append(whole)
        else:
            pool = number if owner is dataset else -1
            length = owner.long_length or request.seq_len
            candidates += _long_and_short(whole, pool, owner.long_fraction, length)
    candidates = [one for one in candidates if len(one.documents)]
    return tuple(
        Group(
            store=one.corpus.store,
            plan=_plan(one.dataset, one.documents, request, number),
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

    In each pool the long groups together get long_fraction and the short ones the rest. Without short
    documents all rows are long; without long documents the fraction cannot be met at all, which is an error.
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
    fraction = one.long_fraction if one.kind == "long" else 1 - one.long_fraction
    side = fraction if len(kinds) == 2 else 1.0
    whole = sum({other.part: other.weight for other in pool}.values())
    return side * whole * one.weight / sum(other.weight for other in pool if other.kind == one.kind)


def _plan(dataset: "Dataset", documents: Documents, request: Request, number: int) -> packing.Plan:
    if request.shuffle:  # so that neighbours in the source are not always neighbours in a row
        seed = order.derive(request.seed, "documents", number)
        documents = documents.take(order.permutation(len(documents), seed=seed))
    starts, lengths = documents.starts, documents.lengths
    joined = not dataset.document_mask
    if dataset.packing == "first_fit":
        return packing.plan_first_fit(starts, lengths, seq_len=request.seq_len)
    if dataset.packing == "concat":
        return packing.plan_concat(starts, lengths, seq_len=request.seq_len, joined=joined)
    once = request.split == "eval"
    return packing.plan_windows(starts, lengths, seq_len=request.seq_len, score_once=once, joined=joined)
