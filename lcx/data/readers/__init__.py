"""Readers of data files, one file a format; `lcx.data.sources.read_documents` joins them.

A file of rows (JSON lines, JSON, CSV, Arrow, parquet) is read in two steps: `rows.read` yields each `Row` with its
record, and `fields.TextField` takes the text out of a record. Text, code and FASTA files yield documents directly. A
row that cannot be read goes to `Tally.bad_row`, which raises or counts it, as `Dataset.on_bad_line` says.
"""

import dataclasses
from typing import Any

FORMATS = ("text", "jsonl", "json", "csv", "tsv", "parquet", "arrow", "fasta", "code")
ROW_FORMATS = ("jsonl", "json", "csv", "tsv", "parquet", "arrow")


@dataclasses.dataclass(frozen=True)
class SourceFile:
    """One file of a source.

    Attributes:
      path: where it is on this machine.
      name: how documents and fingerprints call it; relative to the source, so the same on every machine.
      format: one of FORMATS.
      document: files with the same value form one document together ("" = the file is split by its format).
    """

    path: str
    name: str
    format: str
    document: str = ""


@dataclasses.dataclass(frozen=True)
class Rendered:
    """A conversation as text.

    Attributes:
      spans: character ranges with a loss; None for all of it.
      marked: whether the template's own generation blocks are the spans.
    """

    text: str
    spans: tuple[tuple[int, int], ...] | None
    marked: bool = False


@dataclasses.dataclass(frozen=True)
class Document:
    """A document, and how many bytes of the source had been read when it was complete.

    `chat` is set for a conversation: its text is what the chat template wrote, special tokens included.
    """

    name: str
    text: str
    bytes_read: int
    chat: Rendered | None = None


@dataclasses.dataclass(frozen=True)
class Row:
    """One row of a file of rows.

    Attributes:
      place: where it is, for messages: the path, and the line or the number of the row.
      name: how its document is called.
      record: its fields. Of a table only the columns that were asked for; of JSON all of them.
      bytes_read: how many bytes of the file had been read when the row was complete.
    """

    place: str
    name: str
    record: dict[str, Any]
    bytes_read: int


def shown(path: str) -> str:
    """A path for a message of one line: quoted where it holds a line break or the like."""
    return path if path.isprintable() else repr(path)
