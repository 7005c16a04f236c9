"""Detects the format of a file from its first bytes, else from its extension."""

import json
import os
import re

from lcx.data.readers import shown, streams
from lcx.data.readers.csv_rows import DELIMITERS
from lcx.errors import UserError

_HEAD = 256 << 10  # bytes read to detect the format
_LINES = 20
_ENOUGH = 512  # bytes to look at if the extension is not one of JSON
# fmt: off
BY_ENDING = {
    ".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "json", ".csv": "csv", ".tsv": "tsv",
    ".parquet": "parquet", ".arrow": "arrow", ".feather": "arrow",
    ".fasta": "fasta", ".fa": "fasta", ".fna": "fasta", ".ffn": "fasta", ".faa": "fasta",
    ".txt": "text", ".text": "text",
}
CODE_ENDINGS = frozenset((
    ".py", ".pyi", ".c", ".h", ".cc", ".cpp", ".cxx", ".hpp", ".cu", ".cuh", ".java", ".kt", ".scala",
    ".js", ".jsx", ".ts", ".tsx", ".go", ".rs", ".rb", ".php", ".swift", ".jl", ".r", ".m", ".lua", ".pl",
    ".hs", ".ml", ".clj", ".ex", ".erl", ".sh", ".sql", ".md", ".rst", ".tex", ".toml", ".yaml", ".yml",
    ".cmake", ".gin", ".proto", ".vim", ".el",
))
_READABLE = ((b"PAR1", "parquet"), (b"ARROW1\0\0", "arrow"), (b"\xff\xff\xff\xff", "arrow"))
_REFUSED = (  # (regular expression, what it is, what to do)
    (rb"PARE[^ -~]", "an encrypted parquet file", "decrypt it"),
    (rb"FEA1[^ -~]", "a Feather file of version 1", "write it again with pyarrow"),
    (rb"\xd0\xcf\x11\xe0", "an old Word or Excel document", "save it as text"),
    (rb"%PDF-", "a PDF", "extract its text first"),
    (rb"\{\\rtf", "a rich text (RTF) document", "save it as text"),
    (rb"PK\x03\x04(?s:.*)word/", "a Word document", "save it as text"),
    (rb"PK\x03\x04(?s:.*)xl/", "an Excel sheet", "save it as CSV"),
    (rb"PK\x03\x04(?s:.*)application/epub", "an e-book (EPUB)", "extract its text first"),
    (rb"PK\x03\x04(?s:.*)opendocument", "an OpenDocument file", "save it as text or CSV"),
    (rb"PK\x03\x04(?s:.*)\.pkl", "a PyTorch checkpoint", "give text"),
    (rb"PK(\x03\x04|\x05\x06)", "a zip archive", "unpack it, or compress with gzip or zstd"),
    (rb"7z\xbc\xaf\x27\x1c", "a 7z archive", "unpack it"),
    (rb"Rar!\x1a", "a RAR archive", "unpack it"),
    (rb"(?s:.{257})ustar", "a tar archive", "unpack it"),
    (rb"\x04\x22\x4d\x18", "compressed by lz4", "unpack it, or use gzip or zstd"),
    (rb"\xff\x06\0\0sNaPpY", "compressed by snappy", "unpack it, or use gzip or zstd"),
    (rb"\x1f\x9d", "compressed by compress (.Z)", "unpack it, or use gzip or zstd"),
    (rb"\x80[\x02-\x05]", "a pickle, which could run code", "export the texts as JSON lines"),
    (rb"SQLite format 3\0", "an SQLite database", "export the texts as JSON lines"),
    (rb"\x89HDF\r\n", "an HDF5 file", "export the texts as JSON lines"),
    (rb"\x93NUMPY", "a numpy array", "give the texts, not arrays"),
    (rb"Obj\x01", "an Avro file", "export the texts as JSON lines or parquet"),
    (rb"ORC[^ -~\s]", "an ORC file", "export the texts as JSON lines or parquet"),
    (rb"\x89PNG|\xff\xd8\xff|GIF8[79]a", "an image", "give text"),
    (rb"\x7fELF", "a program", "give text"),
    (rb"\xff\xfe\0\0|\0\0\xfe\xff", "UTF-32 text", "convert it: iconv -f UTF-32 -t UTF-8"),
    (rb"\xff\xfe|\xfe\xff", "UTF-16 text", "convert it: iconv -f UTF-16 -t UTF-8"),
    (rb"version https://git-lfs\.github\.com/spec/\S+\s+oid sha256:", "a Git LFS pointer, not the data",
     "fetch the data: git lfs pull"),
)
# fmt: on
_OBJECT = re.compile(r'\s*\{\s*(\}|"(?:[^"\\]|\\.)*"\s*:)')  # the start of a JSON object


def by_name(path: str) -> str:
    """The format of the extension; "text" if it is unknown."""
    return BY_ENDING.get(os.path.splitext(streams.plain_name(path))[1], "text")


def is_code(path: str) -> bool:
    """Whether the extension is one of source code or its documentation."""
    return os.path.splitext(path)[1].lower() in CODE_ENDINGS


def format_of(path: str, *, named: str | None = None, wanted: str | None = None) -> str:
    """The format of a file, one of FORMATS.

    Args:
      named: a path with the extension that counts, if `path` itself has none.
      wanted: the format that the user requests (`Dataset.format`); the content may not contradict it.

    Raises:
      UserError: the file cannot be read, is of an unsupported kind, or does not have the requested format.
    """
    expected = wanted or by_name(named or path)
    plain = wanted in ("text", "code") or expected == "fasta" or is_code(named or path)
    head = streams.head(path, _ENOUGH if plain else _HEAD)
    found = _table_format(path, head, expected)
    if found is not None and wanted not in (None, found):
        raise UserError(
            f"{shown(path)} is {found}, expected {wanted} (Dataset.format={wanted!r}; leave it out, or correct it)"
        )
    if found is None and not plain and wanted in (None, "json", "jsonl"):
        found = json_format(head, expected)
        if wanted == "jsonl" and found == "json" and head.lstrip().startswith(b"["):
            raise UserError(
                f"{shown(path)} is a JSON array, but Dataset.format='jsonl'; leave it out, or set it to 'json'"
            )
    return found if found is not None and wanted != "jsonl" else expected


def _table_format(path: str, head: bytes, expected: str) -> str | None:
    """parquet or arrow, by the first bytes; None for files that may be text."""
    found = next((kind for magic, kind in _READABLE if head.startswith(magic)), None)
    if found is not None and streams.is_packed(path):
        raise UserError(
            f"cannot read {shown(path)}: it is compressed {found}, which needs random access; decompress it"
        )
    if found is None and streams.packing_of_content(head):
        raise UserError(f"cannot read {shown(path)}: it is compressed twice; unpack it once")
    for magic, kind, advice in _REFUSED if found is None else ():
        if re.match(magic, head):
            raise UserError(f"cannot read {shown(path)}: it is {kind}; {advice}")
    if found is None and expected in ("parquet", "arrow"):
        begins = f"it begins with {head[:8]!r}" if head else "it is empty"
        raise UserError(
            f"cannot read {shown(path)} as {expected}: {begins}; the file is damaged or of another kind"
            " (Dataset.format)"
        )
    return found


def json_format(head: bytes, expected: str) -> str | None:
    """jsonl for one object per line, json for other JSON, None if it is not JSON.

    Args:
      head: the first bytes of a file.
      expected: the format by the name of the file. If that is not JSON, the content must clearly be objects, because a
        text may also begin with a bracket.
    """
    text = head.decode("utf-8-sig", "replace").lstrip()
    cut = len(head) >= _HEAD
    first, *following = [line for line in re.split(r"[\r\n]+", text) if line.strip()] or [""]
    whole = _value(first)
    if expected not in DELIMITERS and not isinstance(whole, dict):  # the first line alone may be damaged
        objects = sum(isinstance(_value(line), dict) for line in following[:_LINES])
        if objects > max(1, len(following[:_LINES]) // 2):
            return "jsonl"
    if not text.startswith(("{", "[")):
        return None
    if expected not in ("json", "jsonl"):
        if isinstance(whole, dict) and following:
            return "jsonl" if _OBJECT.match(following[0]) or (cut and len(following) == 1) else None
        return "json" if _holds_objects(text, cut) else None
    if isinstance(whole, dict):
        return (
            "jsonl" if following or expected == "jsonl" else "json"
        )  # a single object may contain the rows in a list
    if text.startswith("["):
        return "json" if whole is None or _OBJECT.match(text[1:]) else expected
    split = first.rstrip().endswith(("{", "[", ",", ":"))  # an object over several lines
    if expected == "jsonl":
        return "json" if split else "jsonl"
    return "jsonl" if following and not split and isinstance(_value(following[0]), dict) else "json"


def _value(line: str) -> object:
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return None


def _holds_objects(text: str, cut: bool) -> bool:
    """Whether a text, possibly truncated, is an array of JSON objects, or one or more objects."""
    if not _OBJECT.match(text.removeprefix("[")):
        return False
    try:
        json.loads(text)
    except json.JSONDecodeError as error:
        if error.msg == "Extra data":  # several objects, each over several lines
            return text.startswith("{") and _OBJECT.match(text, error.pos) is not None
        return cut and (error.msg.startswith("Unterminated") or error.pos >= len(text) - 16)
    except (ValueError, RecursionError):
        return False
    return True
