"""Files with one number per token, written once, with a checksum for every block."""

import os
import zlib
from pathlib import Path
from typing import BinaryIO

import numpy as np

from lcx.errors import UserError

_BLOCK = 4 << 20  # bytes per checksum
_CHECKED_BLOCKS = 64  # number checked on opening: all of a small file, a sample of a large one


class TokenWriter:
    """Appends arrays with one number per token (an id, or 1 for a loss) to a file, with a checksum per block."""

    def __init__(self, stream: BinaryIO, dtype: str):
        self.stream, self.dtype = stream, dtype
        self.checksums: list[int] = []
        self.max_value = 0
        self._buffer = bytearray()

    def append(self, values: np.ndarray) -> None:
        top, low = int(values.max()), int(values.min())
        if top > np.iinfo(self.dtype).max or low < 0:
            raise UserError(
                f"the tokenizer gave ids {low} .. {top}, outside of its vocab_size; check the tokenizer"
            )
        self.max_value = max(self.max_value, top)
        self._buffer += values.astype(self.dtype).tobytes()
        while len(self._buffer) >= _BLOCK:
            self._flush(_BLOCK)

    def _flush(self, size: int) -> None:
        block = bytes(self._buffer[:size])
        del self._buffer[:size]
        self.checksums.append(zlib.crc32(block))
        self.stream.write(block)

    def finish(self) -> None:
        if self._buffer:
            self._flush(len(self._buffer))
        self.stream.flush()
        os.fsync(self.stream.fileno())


class MaskWriter:
    """Writes the loss mask. The file is created at the first token without a loss, because most stores have none."""

    def __init__(self, path: Path):
        self._path = path
        self._ones = 0  # number of tokens before the file is created, all with a loss
        self._writer: TokenWriter | None = None

    def append(self, mask: np.ndarray) -> None:
        if self._writer is None:
            if mask.all():
                self._ones += len(mask)
                return
            self._writer = TokenWriter(open(self._path, "wb"), "u1")  # noqa: SIM115
            for start in range(0, self._ones, _BLOCK):
                self._writer.append(np.ones(min(_BLOCK, self._ones - start), np.uint8))
        self._writer.append(mask)

    def finish(self) -> list[int] | None:
        """The checksums of the file; None if there is no file."""
        if self._writer is None:
            return None
        self._writer.finish()
        self._writer.stream.close()
        return self._writer.checksums


def blocks_match(path: Path, checksums: list[int]) -> bool:
    """Checks every block of a small file, and evenly spaced ones (including both ends) of a large one."""
    chosen = np.unique(np.linspace(0, len(checksums) - 1, min(len(checksums), _CHECKED_BLOCKS)).astype(int))
    with open(path, "rb") as stream:
        for block in chosen.tolist():
            stream.seek(block * _BLOCK)
            if zlib.crc32(stream.read(_BLOCK)) != checksums[block]:
                return False
    return True
