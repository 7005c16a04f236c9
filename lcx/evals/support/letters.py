"""Views of nucleotide sequences that are read in parts."""

import dataclasses
from typing import Protocol

from lcx.data.nucleotides import reverse_complement
from lcx.evals.support import dna

_PART = 1 << 20
_NUCLEOTIDES = frozenset("ACGTURYSWKMBDHVN-")
_LOOKED_AT = 2000


class Letters(Protocol):
    """A text that is read in parts: a str, a record of a FASTA file (readers.fasta_index.Contig), or a view of one."""

    def __len__(self) -> int: ...

    def __getitem__(self, part: slice) -> str: ...


@dataclasses.dataclass(frozen=True)
class Part:
    """The letters start, ..., stop - 1 of a sequence."""

    whole: Letters
    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start

    def __getitem__(self, part: slice) -> str:
        start, stop, _ = part.indices(len(self))
        return self.whole[self.start + start : self.start + max(start, stop)]


@dataclasses.dataclass(frozen=True)
class ReverseComplement:
    """The other strand of a sequence."""

    of: Letters

    def __len__(self) -> int:
        return len(self.of)

    def __getitem__(self, part: slice) -> str:
        start, stop, _ = part.indices(len(self))
        return reverse_complement(self.of[len(self) - max(start, stop) : len(self) - start])


def counts(text: Letters) -> dict[str, int]:
    """How many letters are ambiguous (not A, C, G or T), and how many lower-case (soft-masked repeats)."""
    found = {"ambiguous": 0, "lower_case": 0}
    for start in range(0, len(text), _PART):
        part = text[start : start + _PART]
        found["ambiguous"] += dna.ambiguous(part)
        found["lower_case"] += len(part) - len(part.translate(_WITHOUT_LOWER_CASE))
    return found


def is_foreign(sequence: Letters) -> bool:
    """Whether a sequence is hardly DNA, by those letters in its middle that stand for no nucleotides at all.

    N does, and whole regions of a genome may consist of it.
    """
    middle = len(sequence) // 2
    part = sequence[max(0, middle - _LOOKED_AT) : middle + _LOOKED_AT].upper()
    return 10 * sum(map(part.count, set(part) - _NUCLEOTIDES)) > len(part)


_WITHOUT_LOWER_CASE = {code: None for code in range(ord("a"), ord("z") + 1)}
