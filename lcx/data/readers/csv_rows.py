"""Rows of a table with a header: CSV and TSV, as Python's csv module reads them."""

import csv
import re
from collections.abc import Callable, Iterator, Mapping, Sequence

from lcx.data.readers import Row, SourceFile, shown, streams
from lcx.data.readers.tally import Tally
from lcx.errors import UserError

DELIMITERS = {"csv": ",", "tsv": "\t"}
_UNDECODED = re.compile("[\udc80-\udcff]")  # how "surrogateescape" writes a byte that is not UTF-8

Columns = Callable[[Mapping[str, bool]], Sequence[str]]


def read(file: SourceFile, tally: Tally, *, columns: Columns) -> Iterator[Row]:
    """Yields the rows; the name of a row ends in the number of the line where it begins.

    Args:
      columns: a function from {column: whether it contains text} to the columns to keep.
    """
    csv.field_size_limit(2**31 - 1)  # the default, 128 KiB, is less than a long document
    lines = _Lines(file.path)
    reader = csv.reader(lines, delimiter=_delimiter(file), strict=True)
    header = next(_cells(file, lines, reader, tally=None), None)
    if header is None:
        return
    names = [name.strip() for name in header[1]]
    kept = {name: names.index(name) for name in columns(_text_columns(file, names))}
    for name in kept:
        if names.count(name) > 1:
            raise UserError(
                f"{shown(file.path)} has {names.count(name)} columns {name!r}; rename all but one"
            )
    for number, cells in _cells(file, lines, reader, tally=tally):
        place = f"{shown(file.path)} line {number}"
        if len(cells) != len(names):
            tally.bad_row(
                UserError(
                    f"{place} has {len(cells)} cells, the header {len(names)}; correct the line"
                    " (Dataset.on_bad_line='skip' leaves such lines out)"
                )
            )
            continue
        record = {name: cells[i] for name, i in kept.items()}
        yield Row(place, f"{file.name}:{number}", record, lines.position)


def _delimiter(file: SourceFile) -> str:
    """The format's, but a semicolon for a csv file whose header has semicolons and no comma: spreadsheets write such
    files in countries with a decimal comma.
    """
    header, _ = next(streams.lines(file.path), (b"", 0))
    spreadsheet = file.format == "csv" and b";" in header and b"," not in header
    return ";" if spreadsheet else DELIMITERS[file.format]


def _text_columns(file: SourceFile, names: list[str]) -> dict[str, bool]:
    other = "\t" if file.format == "csv" else ","
    if len(names) == 1 and other in names[0]:
        raise UserError(
            f"{shown(file.path)}: the header {names[0][:80]!r} is one {file.format} column; set Dataset.format to"
            f" {'tsv' if other == chr(9) else 'csv'!r} if its cells are separated otherwise"
        )
    return dict.fromkeys(names, True)


def _cells(
    file: SourceFile, lines: "_Lines", reader: Iterator[list[str]], *, tally: Tally | None
) -> Iterator[tuple[int, list[str]]]:
    """(line, cells) of every row that is not empty. With `tally` None, for the header, errors are raised."""
    while True:
        lines.begin_row()
        number = lines.number + 1
        place = f"{shown(file.path)} line {number}"
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            if "unexpected end" in str(error):  # an open quote made the rest of the file one cell
                raise UserError(f"{place}: a quote is opened there and never closed; correct it") from error
            problem = f"{place} is not a {file.format} row: {error}"
        else:
            if not cells:
                continue
            problem = _undecoded(place, cells)
            if not problem:
                yield number, cells
                continue
        error_ = UserError(f"{problem}; correct the line (Dataset.on_bad_line='skip' leaves such lines out)")
        if tally is None:
            raise error_
        tally.bad_row(error_)


def _undecoded(place: str, cells: list[str]) -> str:
    """Why a row cannot be read as text, or "" if it can."""
    for cell in cells:
        if found := None if cell.isascii() else _UNDECODED.search(cell):
            return f"{place} is not UTF-8 text: byte 0x{ord(found[0]) - 0xDC00:02x}"
        if "\0" in cell:
            return f"{place} is not text: a zero byte"
    return ""


class _Lines:
    """The lines of a file for the csv module; counts them, and limits the size of a row."""

    def __init__(self, path: str):
        self._path, self._lines = path, streams.lines(path)
        # The csv module holds a row as 4 bytes a letter, which a small compressed file must not turn into a gigabyte.
        self._limit = streams.most(path) // (4 if streams.is_packed(path) else 1)
        self._size = 0
        self.number = self.position = 0

    def begin_row(self) -> None:
        self._size = 0

    def __iter__(self) -> "_Lines":
        return self

    def __next__(self) -> str:
        line, self.position = next(self._lines)
        self.number += 1
        self._size += len(line)
        if self._size > self._limit:
            raise streams.too_long(self._path, "a row", self._limit)
        if self.number == 1:
            line = line.removeprefix(b"\xef\xbb\xbf")
        return line.decode("utf-8", "surrogateescape")
