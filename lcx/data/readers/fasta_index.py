"""Random access to the records of a FASTA file of any size, without loading a record.

The index is that of `samtools faidx` (FILE.fai) where it exists and fits the file. Otherwise one pass over the file
notes where each stretch of at most 64 KiB of sequence lies: about 1.5 MB of index for a human genome. Files compressed
by bgzip are read in place. Other compressed files are unpacked once, into a temporary file.
"""

import bisect
import collections
import dataclasses
import io
import logging
import os
import re
import tempfile
from typing import BinaryIO, cast

from lcx.data.readers import SourceFile, shown, streams
from lcx.data.readers.bgzf import BgzfFile, is_bgzf
from lcx.data.readers.fasta import name_of, no_header
from lcx.errors import UserError

log = logging.getLogger(__name__)

_STRETCH = 1 << 16
_KEPT = 32  # decoded stretches, over all records of a file
_SPACE = b" \t\r\n\v\f"
_SPECIAL = re.compile(rb"[\r\n][ \t]*([>;])")
_LINE_END = re.compile(rb"[\r\n]")
_LONGEST_HEADER = 1 << 20
_BOM = b"\xef\xbb\xbf"


@dataclasses.dataclass
class _Stretches:
    """Where the sequence of one record lies: stretch i begins with letter letters[i], at byte offsets[i]."""

    letters: list[int] = dataclasses.field(default_factory=list)
    offsets: list[int] = dataclasses.field(default_factory=list)
    sizes: list[int] = dataclasses.field(default_factory=list)
    length: int = 0

    def add(self, offset: int, data: bytes) -> None:
        count = len(data.translate(None, _SPACE))
        if count:
            self.letters.append(self.length)
            self.offsets.append(offset)
            self.sizes.append(len(data))
            self.length += count


@dataclasses.dataclass(frozen=True)
class _Lines:
    """One line of FILE.fai: all lines but the last have `letters` letters and take `width` bytes."""

    length: int
    offset: int
    letters: int
    width: int

    def byte_of(self, letter: int) -> int:
        return self.offset + letter // self.letters * self.width + letter % self.letters if self.letters else 0


class Contig:
    """The sequence of one record, read when it is sliced: contig[100:200] is a str of 100 letters."""

    def __init__(self, fasta: "IndexedFasta", name: str, where: _Stretches | _Lines):
        self._fasta, self.name, self._where = fasta, name, where

    def __len__(self) -> int:
        return self._where.length

    def __getitem__(self, part: slice) -> str:
        start, stop, step = part.indices(len(self))
        assert step == 1, "a contig is read in its own direction"
        if stop <= start:
            return ""
        if isinstance(self._where, _Lines):
            first, last = self._where.byte_of(start), self._where.byte_of(stop - 1) + 1
            return self._fasta.letters(first, last - first, self.name)
        i = bisect.bisect_right(self._where.letters, start) - 1
        begin, parts, have = self._where.letters[i], [], 0
        while have < stop - begin:
            parts.append(self._fasta.letters(self._where.offsets[i], self._where.sizes[i], self.name))
            have += len(parts[-1])
            i += 1
        return "".join(parts)[start - begin : stop - begin]


class IndexedFasta:
    """A FASTA file whose records are read in parts.

    Attributes:
      contigs: {the first word of a record's header: its sequence}, in the order of the file.

    Raises:
      UserError: it is not a FASTA file, or two records have the same name.
    """

    def __init__(self, file: SourceFile):
        self.path = file.path
        try:
            self._stream = _seekable(file.path)
        except EOFError:
            raise UserError(
                f"cannot read {shown(file.path)}: the compressed file ends early; copy or download it again"
            ) from None
        self._kept: collections.OrderedDict[tuple[int, int], str] = collections.OrderedDict()
        found = _from_fai(file.path, self._stream)
        if found is None:
            found = _scanned(file.path, self._stream)
        self.contigs = {name: Contig(self, name, where) for name, where in found.items()}

    def letters(self, offset: int, size: int, name: str) -> str:
        """The letters within some bytes of the file."""
        key = offset, size
        if key in self._kept:
            self._kept.move_to_end(key)
            return self._kept[key]
        self._stream.seek(offset)
        data = _read(self.path, self._stream, size).translate(None, _SPACE)
        if not data.isascii() or b">" in data:
            raise UserError(
                f"{shown(self.path)}: record {name!r} holds {_odd(data)!r} in its sequence, expected letters: "
                "correct the file"
            )
        text = data.decode("ascii")
        if size <= _STRETCH:
            self._kept[key] = text
            while len(self._kept) > _KEPT:
                self._kept.popitem(last=False)
        return text


def _odd(data: bytes) -> str:
    return next(chr(byte) for byte in data if byte > 127 or byte == ord(">"))


def _read(path: str, stream: BinaryIO, size: int) -> bytes:
    import zlib

    try:
        return stream.read(size)
    except (EOFError, OSError, zlib.error) as error:
        raise UserError(f"cannot read {shown(path)}: {error}; copy or download it again") from error


def _seekable(path: str) -> BinaryIO:
    """The decompressed file as a stream with random access."""
    packed = streams.is_packed(path)
    raw = open(path, "rb")  # noqa: SIM115 (closed with the stream, when the contigs are no longer used)
    if not packed:
        return raw
    if is_bgzf(raw.read(18)):
        return cast(BinaryIO, io.BufferedReader(BgzfFile(raw), 2 * _STRETCH))
    raw.close()
    log.info(
        "%s is unpacked into a temporary file, because its compression allows no random access (bgzip's does)", path
    )
    unpacked = tempfile.TemporaryFile(prefix="lcx-fasta-")  # noqa: SIM115
    for data, _ in streams.pieces(path):
        unpacked.write(data)
    return cast(BinaryIO, unpacked)


# ------------------------------------------------------------------------------------------------- FILE.fai


def _from_fai(path: str, stream: BinaryIO) -> dict[str, _Stretches | _Lines] | None:
    """The records by FILE.fai; None if there is none, or if it does not fit the file (which is logged)."""
    place = f"{path}.fai"
    if not os.path.isfile(place):
        return None
    found: dict[str, _Stretches | _Lines] = {}
    end = stream.seek(0, io.SEEK_END)
    try:
        with open(place, encoding="latin-1") as file:
            for line in file:
                name, *numbers = line.rstrip("\r\n").split("\t")[:5]
                lines = _Lines(*map(int, numbers))
                name = name_of(name.encode("latin-1"), name)
                if name in found or not _fits(stream, name, lines, end):
                    raise ValueError
                found[name] = lines
    except (OSError, ValueError, TypeError):
        found = {}
    if not found or not _is_last(stream, found, end):
        log.warning("%s does not fit %s (is it older?) and is not used: run samtools faidx again", place, path)
        return None
    return found


def _fits(stream: BinaryIO, name: str, lines: _Lines, end: int) -> bool:
    """Whether this record's header ends where the index says, and the record where its last line ends."""
    if lines.length == 0:
        return True
    if not 0 < lines.letters < lines.width or lines.offset < 2:
        return False
    last = lines.byte_of(lines.length - 1)
    stream.seek(max(0, lines.offset - 4096))
    before = stream.read(min(4096, lines.offset))
    header = before.rstrip(b"\r\n")
    header = header[max(header.rfind(b"\n"), header.rfind(b"\r")) + 1 :]
    if not before.endswith((b"\n", b"\r")) or (header.startswith(b">") and name_of(header, "") != name):
        return False
    if lines.length > lines.letters:  # the end of the first line
        stream.seek(lines.offset + lines.letters - 1)
        end_of_line = stream.read(1 + lines.width - lines.letters)
        if not end_of_line[:1].isalpha() or end_of_line[1:] not in (b"\n", b"\r\n", b"\r"):
            return False
    stream.seek(last)
    after = stream.read(1 + 64)
    return last < end and after[:1].isalpha() and after[1:].lstrip(_SPACE)[:1] in (b"", b">") and after[1:2] in (
        b"", b"\r", b"\n"
    )  # fmt: skip


def _is_last(stream: BinaryIO, found: dict[str, _Stretches | _Lines], end: int) -> bool:
    """Whether nothing follows the last record of the index."""
    ends = [lines.byte_of(lines.length - 1) for lines in found.values() if isinstance(lines, _Lines) and lines.length]
    stream.seek(max(ends, default=0) + 1)
    return bool(ends) and not stream.read(4096).translate(None, _SPACE)


# ------------------------------------------------------------------------------------------------- one pass


class _Scan:
    """The state of a pass over a file, in pieces of any size."""

    def __init__(self, path: str):
        self.path = path
        self.found: dict[str, _Stretches] = {}
        self.remarks = 0
        self._current: _Stretches | None = None
        self._line: bytes | None = None  # the header or remark that is being read
        self._lines = 1

    def piece(self, offset: int, before: bytes, data: bytes) -> None:
        """Reads a piece; `before` is the byte before it, a line break at the start of the file."""
        at, text = 0, before + data  # text[at] is data[at - 1]
        while True:
            if self._line is not None:
                end = _LINE_END.search(text, max(at, 1))
                self._line += text[max(at, 1) : end.start() if end else None]
                if len(self._line) > _LONGEST_HEADER:
                    raise UserError(f"{shown(self.path)}: a header has more than 1 MiB: correct the file")
                if end is None:
                    return
                self._finish_line()
                at = end.start()
            special = _SPECIAL.search(text, at)
            self._sequence(offset, text, max(at, 1), special.start(1) if special else len(text))
            if special is None:
                return
            self._line, at = b"", special.start(1)

    def _sequence(self, offset: int, text: bytes, start: int, stop: int) -> None:
        data = text[start:stop]
        if self._current is not None:
            self._current.add(offset + start - 1, data)
        elif data.translate(None, _SPACE):
            raise no_header(self.path, 1, data.strip()[:40].decode("latin-1"))

    def _finish_line(self) -> None:
        line, self._line = self._line or b"", None
        if line.startswith(b";"):
            self.remarks += 1
            return
        name = name_of(line, str(len(self.found) + 1))
        if name in self.found:
            raise UserError(f"{shown(self.path)} has 2 records named {name!r}: rename one of them")
        self._current = self.found[name] = _Stretches()

    def end(self) -> None:
        if self._line is not None:
            self._finish_line()


def _scanned(path: str, stream: BinaryIO) -> dict[str, _Stretches | _Lines]:
    scan, before = _Scan(path), b"\n"
    stream.seek(0)
    offset = len(_BOM) if _read(path, stream, len(_BOM)) == _BOM else 0
    stream.seek(offset)
    while data := _read(path, stream, _STRETCH):
        if b"\0" in data:
            raise UserError(f"{shown(path)} is not text: it has a zero byte at offset {offset + data.index(0)}")
        scan.piece(offset, before, data)
        offset, before = offset + len(data), data[-1:]
    scan.end()
    if scan.remarks:
        log.info("%s: %d lines that start with ; are remarks and are skipped", path, scan.remarks)
    return dict(scan.found)
