"""Documents from files: text, rows of JSON, CSV and Arrow, FASTA, a code tree, or Python's own standard library.

`find_files` resolves a source (path, folder, glob, or "stdlib") to a list of files, `read_documents` yields their
documents in that order. Both are deterministic, and names do not depend on the location of the folder.
"""

import dataclasses
import difflib
import os
import sysconfig
from collections.abc import Iterator, Mapping
from typing import Any

from lcx import hub
from lcx.buckets import is_url
from lcx.data import folders
from lcx.data.chat import COLUMNS, ChatReader
from lcx.data.readers import FORMATS, ROW_FORMATS, Document, SourceFile, code, rows, streams, text
from lcx.data.readers.fasta import read_fasta
from lcx.data.readers.fields import DEFAULT, TextField
from lcx.data.readers.tally import ON_BAD_LINE, Tally
from lcx.errors import UserError

__all__ = [
    "FORMATS",
    "ON_BAD_LINE",
    "Document",
    "SourceFile",
    "Tally",
    "find_files",
    "read_documents",
    "read_fasta",
]

# Tests, and generated tables and data: they are repetitive and would dominate the text.
# fmt: off
_STDLIB_SKIP = frozenset((
    "test", "tests", "idlelib", "idle_test", "lib2to3", "turtledemo", "ensurepip", "encodings", "pydoc_data",
    "site-packages", "dist-packages", "lib-dynload", "__pycache__", "__phello__",
))
# fmt: on
_STDLIB_SKIP_PREFIXES = ("_sysconfigdata", "config-", "sitecustomize", "usercustomize", "this")


def find_files(source: str | tuple[str, ...], *, format: str | None = None) -> tuple[SourceFile, ...]:
    """Resolves a source to its files, in a fixed order.

    Args:
      source: a file, a folder, a glob ("books/**/*.txt"), each of them also in a bucket (gs://, s3://), "stdlib", or a
        tuple of these.
      format: one of FORMATS; by default from the content of each file, else from its extension; all other files are
        text. `lcx.data.folders` decides which files of a folder are read. With "code", each folder in `source` is one
        repository, and becomes one document.

    Raises:
      UserError: nothing matches, the format is unknown or contradicts the content, or a file is of an unsupported
        kind.
    """
    if format is not None and format not in FORMATS:
        raise UserError(
            f"data format {format!r} is unknown; expected one of {', '.join(FORMATS)} (Dataset.format)"
        )
    if not source:
        raise UserError('no data source is given; set Dataset.source to a file, folder, glob or "stdlib"')
    if isinstance(source, tuple | list):
        return tuple(file for one in source for file in find_files(one, format=format))
    if not isinstance(source, str | os.PathLike):
        raise UserError(
            f"Dataset.source is {source!r:.80}, expected a file, folder, glob or a tuple of these"
        )
    if source == "stdlib":
        return _stdlib_files()
    if is_url(source := os.fspath(source)):
        return folders.bucket_files(source, format)
    source = os.path.expanduser(str(hub.local(source, kind="dataset")))
    if os.path.isdir(source):
        return folders.files_of(source, format)
    paths = [source] if os.path.lexists(source) else folders.matches(source)
    if not paths:
        raise UserError(f"data source {source!r} matches no file{_similar(source)}; set Dataset.source")
    root = os.path.commonpath([os.path.dirname(os.path.abspath(path)) for path in paths])
    files: list[SourceFile] = []
    for path in paths:
        if os.path.isdir(path):
            if format == "code":  # each folder is a repository; other formats read only files
                files.extend(folders.code_files(path, document=os.path.relpath(os.path.abspath(path), root)))
        else:
            files.append(folders.source_file(path, folders.relative(path, root), format))
    if not files:
        raise UserError(
            f'data source {source!r} matches only folders; use "{source}/*" for the files in them, or'
            ' Dataset.format="code" for one document per folder'
        )
    return tuple(files)


def _similar(source: str) -> str:
    """A hint with the nearest existing name, for a mistyped path."""
    parent, name = os.path.split(os.path.abspath(source))
    if not os.path.isdir(parent):
        return f" (the folder {parent} does not exist)"
    close = difflib.get_close_matches(name, os.listdir(parent), n=1)
    return f" (did you mean {os.path.join(os.path.dirname(source), close[0])!r}?)" if close else ""


def _stdlib_files() -> tuple[SourceFile, ...]:
    """Each package, and each module at the top level, is one document."""
    root = sysconfig.get_paths()["stdlib"]
    files = []
    for path in folders.walk(root, skip=_STDLIB_SKIP, follow=False):
        name = folders.relative(path, os.path.abspath(root))
        top = name.split("/")[0]
        if path.endswith(".py") and not top.startswith(_STDLIB_SKIP_PREFIXES):
            files.append(SourceFile(path, name, "code", document=top.removesuffix(".py")))
    if not files:
        raise UserError(
            f"no standard library source at {root} (is it zipped?); set Dataset.source to text of your own"
        )
    return tuple(files)


def read_documents(
    files: tuple[SourceFile, ...],
    *,
    text_field: str = DEFAULT,
    separator: str | None = None,
    chat: ChatReader | None = None,
    tally: Tally | None = None,
) -> Iterator[Document]:
    """Yields the documents of `files` in order; those that are null, empty or only white space are skipped.

    Args:
      text_field: the field of a JSON object, or the column of a table, that holds the text.
      separator: splits a text file into documents, e.g. "<|endoftext|>"; white space around each is removed.
      chat: renders rows that are conversations; None reads every row as text.
      tally: counts what is skipped, and decides whether a row that cannot be read is an error.

    Raises:
      UserError: a file cannot be read as its format; the message gives the file and the position in it.
    """
    tally = tally or Tally()
    done = 0
    for group in _groups(files):
        read = 0
        for document in _documents(group, text_field, separator, chat, tally):
            read += 1
            if not document.text or document.text.isspace():
                tally.empty += 1
                continue
            yield dataclasses.replace(document, bytes_read=done + document.bytes_read)
        tally.empty_files += not read
        done += sum(streams.size(file.path) for file in group)
    formats = {file.format for file in files}
    if separator is not None and "text" not in formats:
        tally.remark("Dataset.separator has no effect: no file is plain text")
    if text_field != DEFAULT and not formats & {*ROW_FORMATS}:
        tally.remark("Dataset.text_field has no effect: no file has rows")


def _documents(
    group: list[SourceFile], text_field: str, separator: str | None, chat: ChatReader | None, tally: Tally
) -> Iterator[Document]:
    """The documents of one file, or of the files that form one document."""
    first = group[0]
    if chat is not None and chat.wanted and first.format not in ROW_FORMATS:
        raise UserError(
            f"{first.path} is read as {first.format!r}, which holds no conversations: set Dataset.chat to None, or "
            f"Dataset.format to one of {', '.join(ROW_FORMATS)}"
        )
    if first.document or first.format == "code":
        return code.read(group, tally)
    if first.format == "fasta":
        return read_fasta(first)
    if first.format in ROW_FORMATS:
        return _read_rows(first, text_field, chat, tally)
    return text.read(first, separator, tally)


def _read_rows(
    file: SourceFile, text_field: str, chat: ChatReader | None, tally: Tally
) -> Iterator[Document]:
    field = TextField(file.path, text_field, tally)

    def columns(names: Mapping[str, bool]) -> tuple[str, ...]:
        if chat is None or not chat.finds_column(names):
            return field.columns(names)
        return tuple(name for name in names if name in (*COLUMNS, text_field))

    def is_row(record: Mapping[str, Any]) -> bool:
        return field.holds(record) or (chat is not None and chat.is_row(record))

    for row in rows.read(file, tally, columns=columns, is_row=is_row):
        try:
            if chat is not None and chat.finds(row.record, text_field, row.place):
                rendered = chat.render(row.record, row.place)
                yield Document(row.name, rendered.text, row.bytes_read, rendered)
            else:
                yield Document(row.name, field.text(row), row.bytes_read)
        except UserError as error:
            tally.bad_row(error)


def _groups(files: tuple[SourceFile, ...]) -> Iterator[list[SourceFile]]:
    group: list[SourceFile] = []
    for file in files:
        if group and (not file.document or file.document != group[0].document):
            yield group
            group = []
        group.append(file)
    if group:
        yield group
