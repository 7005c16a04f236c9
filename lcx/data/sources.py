"""Documents from files: text, jsonl, parquet, FASTA, a code tree, or Python's own standard library.

`find_files` resolves a source (path, folder, glob, or "stdlib") to a sorted list of files, `read_documents`
yields their documents in that order. Both are deterministic: names do not depend on where the folder lives.
"""

import contextlib
import dataclasses
import difflib
import glob
import gzip
import json
import os
import sysconfig
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, cast

from lcx import hub
from lcx.errors import UserError

FORMATS = ("text", "jsonl", "parquet", "fasta", "code")
# fmt: off
_BY_SUFFIX = {
    ".jsonl": "jsonl", ".ndjson": "jsonl", ".parquet": "parquet",
    ".fasta": "fasta", ".fa": "fasta", ".fna": "fasta", ".ffn": "fasta", ".faa": "fasta",
    ".txt": "text", ".text": "text",
}
_CODE_SUFFIXES = frozenset((
    ".py", ".pyi", ".c", ".h", ".cc", ".cpp", ".cxx", ".hpp", ".cu", ".cuh", ".java", ".kt", ".scala",
    ".js", ".jsx", ".ts", ".tsx", ".go", ".rs", ".rb", ".php", ".swift", ".jl", ".r", ".m", ".lua", ".pl",
    ".hs", ".ml", ".clj", ".ex", ".erl", ".sh", ".sql", ".md", ".rst", ".tex", ".toml", ".yaml", ".yml",
    ".cmake", ".gin", ".proto", ".vim", ".el",
))
# Tests, and generated tables and data, which would dominate by repetition.
_STDLIB_SKIP = frozenset((
    "test", "tests", "idlelib", "idle_test", "lib2to3", "turtledemo", "ensurepip", "encodings", "pydoc_data",
    "site-packages", "dist-packages", "lib-dynload", "__pycache__", "__phello__",
))
# fmt: on
_STDLIB_SKIP_PREFIXES = ("_sysconfigdata", "config-", "sitecustomize", "usercustomize", "this")


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
class Document:
    """A document, and how many bytes of the source had been read when it was complete."""

    name: str
    text: str
    bytes_read: int


def find_files(source: str | tuple[str, ...], *, format: str | None = None) -> tuple[SourceFile, ...]:
    """Resolves a source to its files, in a fixed order.

    Args:
      source: a file, a folder, a glob ("books/**/*.txt"), "stdlib", or a tuple of these.
      format: one of FORMATS; by default from the file's suffix (also before .gz). Files with an unknown
        suffix are text. A folder without a format is "code" when it holds source code, else all the data
        files below it. With "code" each folder named is one repository, and so one document.

    Raises:
      UserError: nothing matches, or the format is unknown.
    """
    if format is not None and format not in FORMATS:
        raise UserError(
            f"data format {format!r} is unknown; expected one of {', '.join(FORMATS)} (Dataset.format)"
        )
    if not source:
        raise UserError('no data source is given; set Dataset.source to a file, folder, glob or "stdlib"')
    if isinstance(source, tuple | list):
        return tuple(file for one in source for file in find_files(one, format=format))
    if source == "stdlib":
        return _stdlib_files()
    source = os.path.expanduser(str(hub.local(source, kind="dataset")))
    if os.path.isdir(source):
        return _folder_files(source, format)
    paths = [source] if os.path.isfile(source) else sorted(glob.glob(source, recursive=True))
    if not paths:
        raise UserError(f"data source {source!r} matches no file{_similar(source)}; set Dataset.source")
    root = os.path.commonpath([os.path.dirname(os.path.abspath(path)) for path in paths])
    files: list[SourceFile] = []
    for path in paths:
        if os.path.isdir(path):
            if format == "code":  # a glob of repositories; any other glob means the files it matches
                files.extend(_code_files(path, document=os.path.relpath(os.path.abspath(path), root)))
        else:
            files.append(SourceFile(path, _relative(path, root), format or _format_of(path)))
    if not files:
        raise UserError(
            f'data source {source!r} matches only folders; use "{source}/*" for the files in them, or'
            ' Dataset.format="code" for one document per folder'
        )
    return tuple(files)


def _relative(path: str, root: str) -> str:
    return Path(os.path.relpath(os.path.abspath(path), root)).as_posix()


def _format_of(path: str) -> str:
    name = path.lower().removesuffix(".gz")
    return _BY_SUFFIX.get(os.path.splitext(name)[1], "text")


def _similar(source: str) -> str:
    """A hint with the nearest existing name, for a mistyped path."""
    parent, name = os.path.split(os.path.abspath(source))
    if not os.path.isdir(parent):
        return f" (the folder {parent} does not exist)"
    close = difflib.get_close_matches(name, os.listdir(parent), n=1)
    return f" (did you mean {os.path.join(os.path.dirname(source), close[0])!r}?)" if close else ""


def _walk(root: str, skip: frozenset[str] = frozenset(("__pycache__", "node_modules"))) -> Iterator[str]:
    """Files below `root` in path order, without hidden ones and links (a link could leave the folder)."""
    paths = []
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if not name.startswith(".") and name not in skip]
        paths += [os.path.join(folder, name) for name in names if not name.startswith(".")]
    for path in sorted(paths, key=lambda path: Path(path).parts):
        if os.path.isfile(path) and not os.path.islink(path):
            yield path


def _is_code(path: str) -> bool:
    return os.path.splitext(path)[1].lower() in _CODE_SUFFIXES


def _folder_files(folder: str, format: str | None) -> tuple[SourceFile, ...]:
    paths = list(_walk(folder))
    if format is None and any(_is_code(path) and not path.endswith((".md", ".rst")) for path in paths):
        format = "code"
    if format == "code":
        return _code_files(folder, document=os.path.basename(os.path.abspath(folder)))
    known = (".md", ".rst", *_BY_SUFFIX)
    files = tuple(
        SourceFile(path, _relative(path, os.path.abspath(folder)), format or _format_of(path))
        for path in paths
        if format is not None or path.lower().removesuffix(".gz").endswith(known)
    )
    if not files:
        raise UserError(
            f"data folder {folder!r} has no file of a known kind ({', '.join(known)} or source code);"
            f' name the files with a glob such as "{folder}/*", or set Dataset.format'
        )
    return files


def _code_files(folder: str, *, document: str) -> tuple[SourceFile, ...]:
    root = os.path.abspath(folder)
    files = tuple(
        SourceFile(path, f"{document}/{_relative(path, root)}", "code", document=document)
        for path in _walk(folder)
        if _is_code(path)
    )
    if not files:
        raise UserError(f"code folder {folder!r} has no source file of a known kind; check Dataset.source")
    return files


def _stdlib_files() -> tuple[SourceFile, ...]:
    """Each package, and each module at the top level, is one document."""
    root = sysconfig.get_paths()["stdlib"]
    files = []
    for path in _walk(root, skip=_STDLIB_SKIP):
        name = _relative(path, os.path.abspath(root))
        top = name.split("/")[0]
        if path.endswith(".py") and not top.startswith(_STDLIB_SKIP_PREFIXES):
            files.append(SourceFile(path, name, "code", document=top.removesuffix(".py")))
    if not files:
        raise UserError(
            f"no standard library source at {root} (is it zipped?); set Dataset.source to text of your own"
        )
    return tuple(files)


def read_documents(
    files: tuple[SourceFile, ...], *, text_field: str = "text", separator: str | None = None
) -> Iterator[Document]:
    """Yields the documents of `files` in order; empty ones are left out.

    Args:
      text_field: the field of a jsonl line, or the column of a parquet file, that holds the text.
      separator: splits a text file into documents, e.g. "<|endoftext|>"; white space around each is removed.

    Raises:
      UserError: a file that cannot be read as its format; the message names the file and the place in it.
    """
    done = 0
    for group in _groups(files):
        first = group[0]
        sizes = [_size(file) for file in group]
        if first.document:
            documents: Iterator[Document] = _read_code(group, sizes)
        elif first.format == "text":
            documents = _read_text(first, separator)
        elif first.format == "jsonl":
            documents = _read_jsonl(first, text_field)
        elif first.format == "parquet":
            documents = _read_parquet(first, text_field)
        elif first.format == "fasta":
            documents = read_fasta(first)
        else:
            documents = _read_code(group, sizes)
        for document in documents:
            if document.text:
                yield dataclasses.replace(document, bytes_read=done + document.bytes_read)
        done += sum(sizes)


def _groups(files: tuple[SourceFile, ...]) -> Iterator[list[SourceFile]]:
    group: list[SourceFile] = []
    for file in files:
        if group and (not file.document or file.document != group[0].document):
            yield group
            group = []
        group.append(file)
    if group:
        yield group


def _size(file: SourceFile) -> int:
    try:
        return os.path.getsize(file.path)
    except OSError as error:
        raise UserError(f"cannot read {file.path}: {error.strerror}; check Dataset.source") from error


@contextlib.contextmanager
def _open(path: str) -> Iterator[tuple[BinaryIO, BinaryIO]]:
    """(the file on disk, whose tell() is the progress; the stream to read, unpacked when it is .gz)."""
    try:
        with open(path, "rb") as raw:
            if path.lower().endswith(".gz"):
                yield raw, cast(BinaryIO, gzip.GzipFile(fileobj=raw))
            else:
                yield raw, raw
    except EOFError as error:
        raise UserError(
            f"cannot read {path}: the compressed file ends early; copy or download it again"
        ) from error
    except (zlib.error, OSError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"cannot read {path}: {reason}; check the file and Dataset.source") from error


def _lines(path: str) -> Iterator[tuple[bytes, int]]:
    """Lines with their line feed, and the position on disk."""
    with _open(path) as (raw, stream):
        for line in stream:
            yield line, raw.tell()


def _read_all(path: str) -> bytes:
    with _open(path) as (_, stream):
        return stream.read()


def _decode(data: bytes, place: str) -> str:
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{place} is not UTF-8 text: byte 0x{data[error.start]:02x} at offset {error.start};"
            " convert it to UTF-8, or take it out of Dataset.source"
        ) from error
    if "\0" in text:
        raise UserError(
            f"{place} is not text: a zero byte at offset {data.index(0)}; take it out of Dataset.source"
        )
    return text


def _read_text(file: SourceFile, separator: str | None) -> Iterator[Document]:
    text = _decode(_read_all(file.path), file.path)
    size = _size(file)
    if not separator:
        yield Document(file.name, text if text.strip() else "", size)
        return
    read = 0
    for number, part in enumerate(text.split(separator)):
        read += len(part) + len(separator)
        yield Document(f"{file.name}#{number}", part.strip(), min(read, size))


def _read_jsonl(file: SourceFile, text_field: str) -> Iterator[Document]:
    for number, (line, position) in enumerate(_lines(file.path), start=1):
        if not line.strip():
            continue
        place = f"{file.path} line {number}"
        try:
            record = json.loads(_decode(line, place))
        except json.JSONDecodeError as error:
            raise UserError(
                f"{place} is not JSON: {error.msg} at column {error.colno}; expected one JSON object a line"
            ) from error
        if not isinstance(record, dict) or text_field not in record:
            found = (
                f"fields {sorted(record)[:8]}" if isinstance(record, dict) else f"a {type(record).__name__}"
            )
            raise UserError(f"{place} has {found}, expected the field {text_field!r}; set Dataset.text_field")
        text = record[text_field]
        if not isinstance(text, str):
            raise UserError(
                f"{place}: field {text_field!r} is a {type(text).__name__}, expected text; set"
                " Dataset.text_field"
            )
        if not text.isascii():  # half of a surrogate pair, which JSON can spell, is in no encoding
            text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        yield Document(f"{file.name}:{number}", text, position)


def _read_parquet(file: SourceFile, text_field: str) -> Iterator[Document]:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as error:
        raise UserError(f"reading {file.path} needs pyarrow: pip install pyarrow") from error
    try:
        with pq.ParquetFile(file.path) as table:
            columns = table.schema_arrow.names
            if text_field not in columns:
                raise UserError(
                    f"{file.path} has columns {columns[:8]}, expected {text_field!r}; set Dataset.text_field"
                )
            kind = table.schema_arrow.field(text_field).type
            if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
                raise UserError(
                    f"{file.path}: column {text_field!r} is {kind}, expected text; set Dataset.text_field"
                )
            number = 0
            rows, size = max(1, table.metadata.num_rows), _size(file)
            for chunk in table.iter_batches(batch_size=256, columns=[text_field]):
                for text in chunk.column(0).to_pylist():
                    yield Document(f"{file.name}:{number}", text or "", size * number // rows)
                    number += 1
    except (pa.ArrowException, OSError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"cannot read {file.path} as parquet: {reason}; the file is damaged or of another kind"
        ) from error


def read_fasta(file: SourceFile) -> Iterator[Document]:
    """One record = one document: the sequence without line breaks, named by the first word of its header.

    Records without a sequence are documents without text.
    """
    name, position = "", 0
    parts: list[str] = []
    started = False
    for number, (line, position) in enumerate(_lines(file.path), start=1):
        text = _decode(line, f"{file.path} line {number}").strip()
        if text.startswith(">"):
            if started:
                yield Document(f"{file.name}:{name}", "".join(parts), position)
            name, parts, started = (text[1:].split() or [str(number)])[0], [], True
        elif text and not started:
            raise UserError(
                f"{file.path} line {number} starts with {text[:20]!r}, expected a FASTA header (>name):"
                " give a FASTA file, or set Dataset.format where this is one"
            )
        else:
            parts.append("".join(text.split()))
    if started:
        yield Document(f"{file.name}:{name}", "".join(parts), position)


def _read_code(files: list[SourceFile], sizes: list[int]) -> Iterator[Document]:
    """All files of one repository as one document, each under a line with its path.

    Files that are not text are skipped.
    """
    parts = []
    for file in files:
        try:
            text = _decode(_read_all(file.path), file.path)
        except UserError:
            continue
        if text.strip():
            parts.append(f"# {file.name}\n{text.rstrip()}\n\n")
    yield Document(files[0].document or files[0].name, "".join(parts), sum(sizes))
