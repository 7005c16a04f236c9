"""Nucleotide sequences in evaluations: FASTA records, regions of them, reverse complements."""

import bisect
import contextlib
from collections.abc import Mapping, Sequence

from lcx.data.readers import streams
from lcx.data.readers.fasta_index import Contig, IndexedFasta
from lcx.data.sources import find_files
from lcx.errors import UserError, naming
from lcx.wording import quantity

_PLAIN = frozenset("ACGTacgt")
_BED_REMARKS = ("#", "track", "browser")


def named(owner: str) -> contextlib.AbstractContextManager[None]:
    """Context in which error messages name the setting `owner` instead of Dataset.source, and no other of Dataset."""
    return naming({"Dataset.source": owner, "Dataset.format": None, "Dataset.separator": None})


def check_files(path: str, *, owner: str) -> None:
    """Raises UserError if there is no file. `read` also checks what the files hold."""
    with named(owner):
        find_files(path, format="fasta")


def records(path: str, *, owner: str) -> list[tuple[str, Contig]]:
    """(file:record, its sequence) of every record of FASTA files, including empty ones. Sequences are read when sliced.

    Args:
      path: a file, a glob or a folder; files may be compressed.
      owner: the setting that the path comes from, for messages.

    Raises:
      UserError: there is no file, it is not FASTA, or two records of one file have the same name.
    """
    return [(f"{file}:{name}", contig) for file, name, contig in _records(path, owner)]


def read_contigs(path: str, *, owner: str) -> dict[str, Contig]:
    """{record name: its sequence}; the name is the first word of the record's header.

    Raises:
      UserError: as in `records`, or two files have a record of the same name.
    """
    found: dict[str, Contig] = {}
    where: dict[str, str] = {}
    for file, name, contig in _records(path, owner):
        if name in found:
            raise UserError(
                f"{path} has two records named {name!r}, in {where[name]} and {file}: keep one of them ({owner})"
            )
        found[name], where[name] = contig, file
    return found


def _records(path: str, owner: str) -> list[tuple[str, str, Contig]]:
    with named(owner):
        files = find_files(path, format="fasta")
        found = [
            (file.name, name, contig) for file in files for name, contig in IndexedFasta(file).contigs.items()
        ]
    if not found:
        raise UserError(f"{path} holds no FASTA record: change {owner}")
    return found


def ambiguous(sequence: str) -> int:
    """The number of letters other than A, C, G and T."""
    return len(sequence) - sum(map(sequence.count, _PLAIN))


def foreign(names: Sequence[str], count: int) -> list[str]:
    """A remark on sequences that are hardly DNA, such as proteins, of which a model of DNA knows nothing; or none.

    Args:
      names: of those sequences.
      count: of all sequences.
    """
    if not names:
        return []
    of = f"{len(names)} of {quantity(count, 'sequence')}, the first {names[0]!r:.60}"
    return [f"letters other than A, C, G and T are most of {of}: expected DNA"]


class Regions:
    """The regions of a BED file: lines with a record's name, a start counted from 0, and an end that is excluded.

    Attributes:
      of: {record: [(start, end, name)], sorted}; the name is the fourth column, or "record:start-end".

    Raises:
      UserError: the file cannot be read, holds no region, or a line is not BED.
    """

    def __init__(self, path: str, *, owner: str):
        self.path, self.owner = path, owner
        self.of: dict[str, list[tuple[int, int, str]]] = {}
        with named(owner):
            for number, (line, _) in enumerate(streams.lines(path), start=1):
                text = streams.decode(line, f"{path}, line {number}").strip()
                if text and not text.startswith(_BED_REMARKS):
                    self._add(text.split("\t") if "\t" in text else text.split(), number)
        if not self.of:
            raise UserError(f"{path} holds no region: change {owner}")
        self._reach = {}  # of each region, the largest end of all regions up to it
        for name, found in self.of.items():
            found.sort()
            ends = [found[0][1]]
            for _, end, _ in found[1:]:
                ends.append(max(ends[-1], end))
            self._reach[name] = ends

    def _add(self, cells: list[str], number: int) -> None:
        whole = len(cells) >= 3 and all(cell.isascii() and cell.isdecimal() for cell in cells[1:3])
        if not whole or int(cells[1]) > int(cells[2]):
            raise UserError(
                f"{self.path}, line {number}: {str(cells)[:200]}, expected a record, a start from 0 and an end: "
                f"correct it, or change {self.owner}"
            )
        start, end = int(cells[1]), int(cells[2])
        name = cells[3] if len(cells) > 3 and cells[3] not in ("", ".") else f"{cells[0]}:{start}-{end}"
        self.of.setdefault(cells[0], []).append((start, end, name))

    def covers(self, record: str, at: int) -> bool:
        """Whether the letter `at`, counted from 0, lies in a region."""
        i = bisect.bisect_right(self.of.get(record, []), at, key=lambda region: region[0]) - 1
        return i >= 0 and self._reach[record][i] > at

    def check(self, contigs: Mapping[str, Contig]) -> None:
        """Raises UserError for a region that does not lie in these sequences."""
        for record, found in self.of.items():
            length = len(contigs[record]) if record in contigs else 0
            if record not in contigs or max(end for _, end, _ in found) > length:
                what = f"has {length} letters" if record in contigs else "is no record of the sequences"
                raise UserError(f"{self.path} has a region of {record!r}, which {what}: change {self.owner}")
