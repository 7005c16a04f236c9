"""The decompressed bytes of a file, in pieces or in lines, never more at a time than a limit."""

import codecs
import contextlib
import functools
import gzip
import io
import os
import re
import stat
import zlib
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO, cast

from lcx.buckets import client, is_url
from lcx.data.readers import shown
from lcx.errors import UserError, first_line

PIECE = 1 << 20  # bytes read at a time
_PACKED_PIECE = 2 << 10  # compressed bytes at a time; a zstd block of 4 bytes can hold 128 KiB
# Limits on the size of one document, row or line. The limit of a compressed file depends on its size, as a protection
# against decompression bombs: real text compresses to about a fifth, but 2.6 MB of gzip can contain 2.6 GB.
MOST = 4 << 30
_MOST_UNPACKED = 256 << 20
_MOST_RATIO = 32

_MAGIC = (
    (rb"\x1f\x8b", "gzip", (".gz", ".gzip", ".bgz")),
    (rb"\x28\xb5\x2f\xfd|[\x50-\x5f]\x2a\x4d\x18", "zstd", (".zst", ".zstd")),
    (rb"BZh[1-9](1AY&SY|\x17rE8P)", "bzip2", (".bz2",)),
    (rb"\xfd7zXZ\x00", "xz", (".xz",)),
)
_ENDINGS = {ending: kind for _, kind, endings in _MAGIC for ending in endings}


def check_regular(path: str) -> os.stat_result:
    """The status of a regular file or of a link to one.

    Raises:
      UserError: it does not exist, or must not be opened, like a pipe or a device.
    """
    try:
        status = os.stat(os.path.expanduser(path))
    except (OSError, ValueError) as error:
        if os.path.islink(path):
            reason = f"it is a link to {shown(os.readlink(path))}, which leads to no file"
        else:
            reason = getattr(error, "strerror", None) or str(error)
        raise UserError(f"cannot read {shown(path)}: {reason}; check Dataset.source") from error
    if not stat.S_ISREG(status.st_mode):
        kinds = {stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket", stat.S_IFDIR: "a folder"}
        kind = kinds.get(stat.S_IFMT(status.st_mode), "a device")
        raise UserError(
            f"cannot read {shown(path)}: it is {kind}, expected a regular file (data is read more than once);"
            " write it to a file, or check Dataset.source"
        )
    return status


@functools.lru_cache(maxsize=1 << 16)
def _object(url: str) -> client.Stat:
    about = client.stat(url)
    if about is None:
        raise UserError(f"cannot read {shown(url)}: there is no such object; check Dataset.source")
    return about


def size(path: str) -> int:
    """Bytes of a regular file or of an object in a bucket. Raises UserError as `check_regular` does."""
    return _object(path).size if is_url(path) else check_regular(path).st_size


def version(url: str) -> str:
    """A text that changes whenever the content of an object in a bucket does."""
    return _object(url).version


def open_raw(path: str) -> BinaryIO:
    """The bytes of a file or of an object in a bucket, of which only a block at a time is read."""
    if not size(path):  # reading some of the kernel's files, which have no size, would wait (/proc/kmsg)
        return io.BytesIO()
    return client.opened(path, _object(path)) if is_url(path) else open(os.path.expanduser(path), "rb")


def packing_of_name(path: str) -> str | None:
    """The compression by the extension of a path; None if there is none."""
    return _ENDINGS.get(os.path.splitext(path.lower())[1])


def plain_name(path: str) -> str:
    """A name in lower case, without the extension of a compression."""
    return os.path.splitext(path.lower())[0] if packing_of_name(path) else path.lower()


def packing_of_content(head: bytes) -> str | None:
    """The compression by the first bytes of a file; None if it is not compressed."""
    return next((kind for magic, kind, _ in _MAGIC if re.match(magic, head)), None)


@contextlib.contextmanager
def opened(path: str) -> Iterator[tuple[BinaryIO, BinaryIO]]:
    """(the file on disk, whose tell() is the progress; the stream to read, decompressed if necessary)."""
    size(path)
    try:
        with open_raw(path) as raw:
            yield raw, _unpacked(path, raw)
    except EOFError as error:
        raise UserError(
            f"cannot read {shown(path)}: the compressed file ends early; copy or download it again"
        ) from error
    except _damage() as error:
        reason = getattr(error, "strerror", None) or first_line(error)
        raise UserError(f"cannot read {shown(path)}: {reason}; check the file and Dataset.source") from error


def _damage() -> tuple[type[BaseException], ...]:
    """The exceptions of the compression libraries for damaged files; only of libraries imported so far."""
    import sys

    found: list[type[BaseException]] = [OSError, zlib.error]
    for module, name in (("lzma", "LZMAError"), ("zstandard", "ZstdError")):
        if module in sys.modules:
            found.append(getattr(sys.modules[module], name))
    return tuple(found)


def _unpacked(path: str, raw: BinaryIO) -> BinaryIO:
    head = raw.read(16)
    raw.seek(0)
    kind, named = packing_of_content(head), packing_of_name(path)
    if named and head and kind != named:
        article = "Not a gzipped file" if named == "gzip" else f"not a {named} file"
        raise UserError(
            f"cannot read {shown(path)}: {article} although its name says so (it begins with {head[:4]!r});"
            " rename it, or download it again"
        )
    if kind is None:
        return raw
    if kind == "gzip":
        return cast(BinaryIO, gzip.GzipFile(fileobj=raw))
    return cast(BinaryIO, io.BufferedReader(_Unpacker(raw, _decoder(kind, path)), PIECE))


def _decoder(kind: str, path: str) -> Callable[[], Any]:
    try:
        if kind == "bzip2":
            import bz2

            return bz2.BZ2Decompressor
        if kind == "xz":
            import lzma

            return lzma.LZMADecompressor
        import zstandard
    except ImportError as error:
        raise UserError(f"reading {shown(path)} needs the package {error.name}: pip install it") from error

    class Zstd:
        """zstandard's decompressor with the interface of bz2's; only the size of its input limits its output."""

        needs_input = True

        def __init__(self) -> None:
            self._one = zstandard.ZstdDecompressor(max_window_size=2**31).decompressobj()  # --long=31

        def decompress(self, data: bytes, max_length: int) -> bytes:
            return self._one.decompress(data)

        eof = property(lambda self: self._one.eof)
        unused_data = property(lambda self: self._one.unused_data)

    return Zstd


class _Unpacker(io.RawIOBase):
    """All streams of a compressed file, one after the other; raises EOFError if the last one is incomplete.

    The libraries' own file objects end silently at a truncated zstd frame, or after the first bzip2 or xz stream.
    """

    def __init__(self, raw: BinaryIO, new: Callable[[], Any]):
        self._raw, self._new = raw, new
        self._decoder: Any = None
        self._input = b""
        self._output = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._output:
            if not self._step():
                return 0
        size = min(len(buffer), len(self._output))
        buffer[:size], self._output = self._output[:size], self._output[size:]
        return size

    def _step(self) -> bool:
        """Decompresses the next piece; False at the end of the file."""
        if self._decoder is None:
            self._input = (self._input or self._raw.read(_PACKED_PIECE)).lstrip(b"\0")  # zero padding
            if not self._input:
                return len(self._raw.peek(1)) > 0  # type: ignore[attr-defined]
            self._decoder = self._new()
        elif not self._input and self._decoder.needs_input:
            self._input = self._raw.read(_PACKED_PIECE)
            if not self._input:
                raise EOFError
        self._output = memoryview(self._decoder.decompress(self._input, PIECE))
        self._input = b""
        if self._decoder.eof:
            self._input, self._decoder = self._decoder.unused_data, None
        return True


def is_packed(path: str) -> bool:
    """Whether the file is compressed."""
    with opened(path) as (raw, stream):
        return stream is not raw


def most(path: str) -> int:
    """The largest number of bytes that one document, row or line of this file may have."""
    return min(MOST, max(_MOST_UNPACKED, _MOST_RATIO * size(path))) if is_packed(path) else MOST


def too_long(path: str, what: str, limit: int) -> UserError:
    return UserError(
        f"{shown(path)}: {what} has more than {limit >> 20} MiB of text, the limit on what is held in memory at a time;"
        " split it (for text files Dataset.separator does), or unpack the file"
    )


def head(path: str, size: int) -> bytes:
    """The first bytes of the decompressed file; fewer if it is shorter or ends early."""
    parts = []
    with opened(path) as (_, stream):
        while size > 0:
            try:
                part = stream.read(min(size, 1 << 16))
            except EOFError:
                break
            if not part:
                break
            parts.append(part)
            size -= len(part)
    return b"".join(parts)


def pieces(path: str) -> Iterator[tuple[bytes, int]]:
    """(piece of the decompressed bytes, position on disk)."""
    with opened(path) as (raw, stream):
        while data := stream.read(PIECE):
            yield data, raw.tell()


def texts(path: str) -> Iterator[tuple[str, int]]:
    """The text in pieces without a byte order mark, and the position on disk.

    Raises:
      UserError: it is not UTF-8, or contains a zero byte.
    """
    decoder = codecs.getincrementaldecoder("utf-8-sig")()
    before = position = 0
    for data, position in pieces(path):
        waiting = len(decoder.getstate()[0])
        try:
            text = decoder.decode(data)
        except UnicodeDecodeError as error:
            raise not_text(shown(path), error, before - waiting) from error
        yield _without_zeros(text, shown(path), data, before), position
        before += len(data)
    try:
        decoder.decode(b"", final=True)
    except UnicodeDecodeError as error:
        raise not_text(shown(path), error, before - len(error.object)) from error


def lines(path: str) -> Iterator[tuple[bytes, int]]:
    """Lines with their ends (LF, CR LF or CR), and the position on disk.

    Raises:
      UserError: a line is longer than the limit.
    """
    limit, position = most(path), 0
    waiting: list[bytes] = []
    for data, position in pieces(path):
        if waiting and waiting[-1].endswith(b"\r"):  # its line feed may begin the next piece
            data = waiting.pop() + data
        found = data.splitlines(keepends=True)
        complete = len(found) if found[-1].endswith(b"\n") else len(found) - 1
        for line in found[:complete]:
            yield b"".join([*waiting, line]), position
            waiting = []
        waiting += found[complete:]
        if sum(map(len, waiting)) > limit:
            raise too_long(path, "a line", limit)
    if waiting:
        yield b"".join(waiting), position


def decode(data: bytes, place: str) -> str:
    """UTF-8 text, without a byte order mark."""
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise not_text(place, error, 0) from error
    return _without_zeros(text, place, data, 0)


def not_text(place: str, error: UnicodeDecodeError, before: int) -> UserError:
    return UserError(
        f"{place} is not UTF-8 text: byte 0x{error.object[error.start]:02x} at offset {before + error.start};"
        " convert it to UTF-8, or take it out of Dataset.source"
    )


def _without_zeros(text: str, place: str, data: bytes, before: int) -> str:
    if "\0" in text:
        raise UserError(
            f"{place} is not text: a zero byte at offset {before + data.index(0)}; take it out of Dataset.source"
        )
    return text
