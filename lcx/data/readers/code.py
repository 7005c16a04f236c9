"""A code repository: all its files as one document, each under a line with its path."""

from collections.abc import Iterator, Sequence

from lcx.data.readers import Document, SourceFile, shown, streams
from lcx.data.readers.tally import Tally
from lcx.errors import UserError


def read(files: Sequence[SourceFile], tally: Tally) -> Iterator[Document]:
    """Yields one document; files that are not text are skipped and counted."""
    parts, size, left_out = [], 0, []
    for file in files:
        limit = streams.most(file.path)
        data = streams.head(file.path, limit + 1)
        size += len(data)
        if size > limit:
            raise streams.too_long(file.path, f"the repository {files[0].document!r}", limit)
        try:
            text = streams.decode(data, shown(file.path))
        except UserError:
            left_out.append(file.name)
            continue
        if text.strip():
            parts.append(f"# {file.name}\n{text.rstrip()}\n\n")
    if left_out:
        tally.remark(
            f"{len(left_out)} source files are not UTF-8 text and were skipped: {', '.join(left_out[:3])}, ..."
        )
    yield Document(files[0].document or files[0].name, "".join(parts), sum(map(_size, files)))


def _size(file: SourceFile) -> int:
    return streams.size(file.path)
