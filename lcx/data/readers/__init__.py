"""Readers of data files, one module per format; `lcx.data.sources.read_documents` combines them.

A file of rows (JSON lines, JSON, CSV, Arrow, parquet) is read in two steps: `rows.read` yields each `Row` with its
record, and `fields.TextField` extracts the text from a record. Text, code and FASTA files yield documents directly. A
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
      path: its path on this machine.
      name: its name in documents and fingerprints; relative to the source, so the same on every machine.
      format: one of FORMATS.
      document: files with the same value form one document; "" means that the format divides the file into documents.
    """

    path: str
    name: str
    format: str
    document: str = ""


@dataclasses.dataclass(frozen=True)
class Rendered:
    """A conversation as text.

    Attributes:
      spans: character ranges with a loss; None for the whole text.
      marked: whether the spans are the template's own generation blocks.
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
      place: its position for messages: the path, and the line or the number of the row.
      name: the name of its document.
      record: its fields; for a table only the requested columns, for JSON all of them.
      bytes_read: how many bytes of the file had been read when the row was complete.
    """

    place: str
    name: str
    record: dict[str, Any]
    bytes_read: int


def shown(path: str) -> str:
    """A path for a message of one line: quoted if it contains line breaks or other control characters."""
    return path if path.isprintable() else repr(path)
