"""Records of FASTA files: all of them in order, or any part of any record without reading the others.

A line that starts with ">" begins a record; one that starts with ";" is a remark and is skipped. Lines end with LF,
CR LF or CR. Headers may be UTF-8 or Latin-1; sequences are ASCII.
"""

from collections.abc import Iterator

from lcx.data.readers import Document, SourceFile, shown, streams
from lcx.errors import UserError

_JOINED = 1 << 14  # lines kept before joining: a string of 60 letters takes twice its length in memory


def read_fasta(file: SourceFile) -> Iterator[Document]:
    """Yields one document per record: the sequence without line breaks, named by the first word of its header.

    Records without a sequence are empty documents.

    Raises:
      UserError: the file does not begin with a header, or is not text.
    """
    name, position, size = "", 0, 0
    blocks, parts = [""], [""]
    started, limit = False, streams.most(file.path)
    for number, (line, position) in enumerate(streams.lines(file.path), start=1):
        begins = line.removeprefix(b"\xef\xbb\xbf").lstrip()[:1]
        if begins == b">":
            if started:
                yield Document(f"{file.name}:{name}", "".join([*blocks, *parts]), position)
            name, size, started = name_of(line, str(number)), 0, True
            blocks, parts = [], []
            continue
        if begins in (b";", b""):
            continue
        text = streams.decode(line, f"{shown(file.path)} line {number}").strip()
        if not started:
            raise no_header(file.path, number, text)
        parts.append("".join(text.split()))
        size += len(text)
        if size > limit:
            raise streams.too_long(file.path, f"record {name!r}", limit)
        if len(parts) > _JOINED:
            blocks, parts = [*blocks, "".join(parts)], []
    if started:
        yield Document(f"{file.name}:{name}", "".join([*blocks, *parts]), position)


def name_of(header: bytes, otherwise: str) -> str:
    """The first word of a header line; `otherwise` if it has none."""
    words = header.removeprefix(b"\xef\xbb\xbf").strip().removeprefix(b">").split(maxsplit=1)
    if not words:
        return otherwise
    try:
        return words[0].decode("utf-8")
    except UnicodeDecodeError:
        return words[0].decode("latin-1")


def no_header(path: str, number: int, text: str) -> UserError:
    return UserError(
        f"{shown(path)} line {number} starts with {text[:20]!r}, expected a FASTA header (>name):"
        " give a FASTA file, or set Dataset.format if it has another format"
    )
