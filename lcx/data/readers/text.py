"""Documents of text files: the whole file, or its parts between separators."""

from collections.abc import Iterator

from lcx.data.readers import Document, SourceFile, streams
from lcx.data.readers.tally import Tally


def read(file: SourceFile, separator: str | None, tally: Tally) -> Iterator[Document]:
    """Yields the whole text, or the parts of `text.split(separator)` without surrounding white space.

    The text after the last separator is a document only if it is not empty.
    """
    if not separator:
        yield Document(file.name, _whole(file.path), streams.size(file.path))
        return
    waiting, number = None, -1
    for number, (part, position) in enumerate(_split(file.path, separator)):
        if waiting is not None:
            yield waiting
        waiting = Document(f"{file.name}#{number}", part.strip(), position)
    if waiting is not None and (waiting.text or not number):
        yield waiting
    if not number:
        tally.remark(
            f"the separator {separator!r} is not in {file.name}, which is one document (Dataset.separator)"
        )


def _whole(path: str) -> str:
    limit, size, parts = streams.most(path), 0, []
    for text, _ in streams.texts(path):
        parts.append(text)
        size += len(text)
        if size > limit:
            raise streams.too_long(path, "the one document in it", limit)
    return "".join(parts)


def _split(path: str, separator: str) -> Iterator[tuple[str, int]]:
    """(part, position on disk); at most one part is in memory at a time."""
    limit, position = streams.most(path), 0
    waiting: list[str] = []  # pieces of the current part; the last one may end inside a separator
    size = 0
    for text, position in streams.texts(path):
        if waiting:
            text = waiting.pop() + text
        *complete, rest = text.split(separator)
        for part in complete:
            yield "".join([*waiting, part]), position
            waiting, size = [], 0
        keep = min(len(rest), len(separator) - 1)
        waiting += [rest[: len(rest) - keep], rest[len(rest) - keep :]]
        size += len(text)
        if size > limit:
            raise streams.too_long(path, f"a part between {separator!r}", limit)
    yield "".join(waiting), position
