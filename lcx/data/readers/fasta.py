"""Records of FASTA files."""

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
        text = streams.decode(line, f"{shown(file.path)} line {number}").strip()
        if text.startswith(">"):
            if started:
                yield Document(f"{file.name}:{name}", "".join([*blocks, *parts]), position)
            name, size, started = (text[1:].split() or [str(number)])[0], 0, True
            blocks, parts = [], []
        elif text and not started:
            raise UserError(
                f"{shown(file.path)} line {number} starts with {text[:20]!r}, expected a FASTA header (>name):"
                " give a FASTA file, or set Dataset.format if it has another format"
            )
        else:
            parts.append("".join(text.split()))
            size += len(text)
            if size > limit:
                raise streams.too_long(file.path, f"record {name!r}", limit)
            if len(parts) > _JOINED:
                blocks, parts = [*blocks, "".join(parts)], []
    if started:
        yield Document(f"{file.name}:{name}", "".join([*blocks, *parts]), position)
