"""Random access to files compressed by bgzip (.gz, .bgz): gzip in independent blocks of at most 64 KiB.

Each block is a complete gzip member whose header states the block's compressed size (the extra field "BC" of the SAM
specification, section 4.1), so the blocks can be listed without decompressing anything.
"""

import bisect
import io
import struct
import zlib
from typing import BinaryIO

_HEAD_BYTES = 18  # up to and including the size of the block
_KEPT = 16  # decompressed blocks


class BgzfFile(io.RawIOBase):
    """The decompressed bytes of a bgzip file, readable from any position.

    Raises:
      EOFError: at construction, if the last block is incomplete.
      zlib.error: while reading, if a block is damaged.
    """

    def __init__(self, raw: BinaryIO):
        self._raw, self._at = raw, 0
        self._places, self._starts, self._size = _blocks(raw)
        self._cache: dict[int, bytes] = {}

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        self._at = max(0, base + offset)
        return self._at

    def readinto(self, buffer) -> int:
        if self._at >= self._size:
            return 0
        number = bisect.bisect_right(self._starts, self._at) - 1
        data = self._block(number)[self._at - self._starts[number] :][: len(buffer)]
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)

    def _block(self, number: int) -> bytes:
        if number not in self._cache:
            if len(self._cache) >= _KEPT:
                self._cache.pop(next(iter(self._cache)))
            offset, size = self._places[number]
            self._raw.seek(offset)
            self._cache[number] = zlib.decompress(self._raw.read(size), wbits=31)
        return self._cache[number]


def is_bgzf(head: bytes) -> bool:
    """Whether a file that starts with these bytes (at least _HEAD_BYTES) is compressed in blocks."""
    return len(head) >= _HEAD_BYTES and head[:4] == b"\x1f\x8b\x08\x04" and head[12:16] == b"BC\x02\x00"


def _blocks(raw: BinaryIO) -> tuple[list[tuple[int, int]], list[int], int]:
    """((offset, compressed size) of each block that is not empty, where it starts decompressed, the total size)."""
    places, starts, offset, total = [], [], 0, 0
    end = raw.seek(0, io.SEEK_END)
    while offset < end:
        raw.seek(offset)
        size = _block_size(raw.read(_HEAD_BYTES))
        if offset + size > end:
            raise EOFError
        raw.seek(offset + size - 4)
        (unpacked,) = struct.unpack("<I", raw.read(4))
        if unpacked:
            places.append((offset, size))
            starts.append(total)
        offset, total = offset + size, total + unpacked
    return places, starts, total


def _block_size(head: bytes) -> int:
    if not is_bgzf(head):
        if len(head) < _HEAD_BYTES:
            raise EOFError
        raise zlib.error("a block is not one of bgzip")
    return struct.unpack("<H", head[16:18])[0] + 1
