"""Shared by all checkpoint readers and writers: the description of a stored tensor, and file access.

Files are read with positional reads, not memory-mapped: mapped pages count as resident memory, so under a memory limit
a mapped checkpoint could use as much as the size of the file.
"""

import collections
import dataclasses
import errno
import io
import math
import os
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any, Protocol

import ml_dtypes
import numpy as np

from lcx import small_files
from lcx.errors import UserError
from lcx.wording import quantity

#: The dtypes that weights are stored in here, by the names of the --dtype setting and of Hugging Face's
#: config.json.
FLOAT_DTYPES: dict[str, np.dtype] = {
    "float32": np.dtype(np.float32),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float16": np.dtype(np.float16),
}

#: Size in bytes above which tensors are read and written in pieces, if their layout allows it.
PIECE_BYTES = 32 << 20


@dataclasses.dataclass(frozen=True)
class TensorInfo:
    """Dtype and shape of one stored tensor; `where` is its file, for error messages."""

    dtype: np.dtype
    shape: tuple[int, ...]
    where: str = ""

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class TensorSource(Protocol):
    """A checkpoint that can be read tensor by tensor."""

    @property
    def tensors(self) -> Mapping[str, TensorInfo]: ...

    @property
    def shared_bytes(self) -> int:
        """Size in bytes of tensors that are stored once but have two names."""
        ...

    def read(self, name: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Rows [start, stop) of the tensor (all of a scalar)."""
        ...


@dataclasses.dataclass(frozen=True)
class Pieces:
    """A file that was split into pieces for upload; their concatenation is the file."""

    paths: tuple[pathlib.Path, ...]

    @property
    def name(self) -> str:
        return self.paths[0].name

    def __str__(self) -> str:
        return f"{self.paths[0]} and {len(self.paths) - 1} more pieces"


@dataclasses.dataclass(frozen=True)
class Region:
    """Bytes start, ..., start + length - 1 of a file, which are a file of their own."""

    path: pathlib.Path
    start: int
    length: int

    @property
    def name(self) -> str:
        return self.path.name

    def __str__(self) -> str:
        return f"{self.path} at byte {self.start}"


File = pathlib.Path | Pieces | Region


class _RegionReader(io.RawIOBase):
    def __init__(self, region: Region):
        self._file = small_files.opened(region.path)  # closed by `close`
        self._region, self._at = region, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = offset + (0, self._at, self._region.length)[whence]
        return self._at

    def readinto(self, buffer) -> int:
        part = memoryview(buffer)[: max(self._region.length - self._at, 0)]
        count = os.preadv(self._file.fileno(), [part], self._region.start + self._at) if part else 0
        self._at += count
        return count

    def close(self) -> None:
        self._file.close()
        super().close()


class _PiecesReader(io.RawIOBase):
    def __init__(self, pieces: Pieces):
        self._files = [small_files.opened(path) for path in pieces.paths]  # closed by `close`
        self._starts = [0]
        for file in self._files:
            self._starts.append(self._starts[-1] + os.fstat(file.fileno()).st_size)
        self._at = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = offset + (0, self._at, self._starts[-1])[whence]
        return self._at

    def readinto(self, buffer) -> int:
        """Reads at most to the end of the current piece. Raw files may return fewer bytes than requested."""
        for file, start, stop in zip(self._files, self._starts, self._starts[1:], strict=False):
            if start <= self._at < stop:
                count = os.preadv(file.fileno(), [memoryview(buffer)[: stop - self._at]], self._at - start)
                self._at += count
                return count
        return 0

    def close(self) -> None:
        for file in self._files:
            file.close()
        super().close()


def open_binary(path: File) -> io.RawIOBase:
    """Opens the file, the pieces as one file, or a region as a file, for unbuffered reading."""
    if isinstance(path, Region):
        return _RegionReader(path)
    return _PiecesReader(path) if isinstance(path, Pieces) else small_files.opened(path)


def identity(path: File) -> tuple[Any, ...]:
    """Differs once the file, or one of its pieces, was written or replaced by another. Raises OSError if it is gone."""
    parts = path.paths if isinstance(path, Pieces) else [path.path if isinstance(path, Region) else path]
    return tuple((s.st_dev, s.st_ino, s.st_size, s.st_mtime_ns) for s in map(os.stat, parts))


def read_array(
    path: File, offset: int, dtype: np.dtype, shape: tuple[int, ...], *, known: tuple[Any, ...]
) -> np.ndarray:
    """Reads the array of this dtype and shape that starts at byte `offset` of the file.

    Args:
      known: the file's `identity` when its header was read: the rest of another file would be taken for this one's.

    Raises:
      UserError: the file was replaced, is too short, or cannot be read.
    """
    array = np.empty(shape, dtype)
    buffer = array.reshape(-1).view(np.uint8).data
    try:
        with open_binary(path) as file:
            if identity(path) != known:
                raise UserError(f"{path}: another process changed the file while it was read: run the command again")
            file.seek(offset)
            done = 0
            while done < len(buffer):
                count = file.readinto(buffer[done:])
                if not count:
                    raise UserError(
                        f"{path}: the file ends at byte {offset + done}, expected data up to byte "
                        f"{offset + len(buffer)}; it is truncated, copy or download it again"
                    )
                done += count
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}") from error
    return array


def row_range(info: TensorInfo, name: str, start: int, stop: int | None) -> tuple[int, int, tuple[int, ...]]:
    """(first byte within the tensor, first row, shape) of rows [start, stop); a scalar has no rows to choose
    from."""
    if not info.shape:
        return 0, 0, ()
    stop = info.shape[0] if stop is None else stop
    if not 0 <= start <= stop <= info.shape[0]:
        raise IndexError(f"rows [{start}, {stop}) of {name} with shape {info.shape}")
    row = math.prod(info.shape[1:]) * info.dtype.itemsize
    return start * row, start, (stop - start, *info.shape[1:])


def write_all(file, data: bytes | np.ndarray) -> None:
    """Writes all bytes to an unbuffered file. A single write() may stop early, at 2 GiB or on a nearly full disk."""
    if isinstance(data, np.ndarray):
        view = np.ascontiguousarray(data).reshape(-1).view(np.uint8).data
    else:
        view = memoryview(data)
    while view:
        count = file.write(view[: 1 << 30])
        if not count:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        view = view[count:]


def split_rows(shape: tuple[int, ...], itemsize: int, max_bytes: int) -> Iterator[tuple[int, int]]:
    """Splits axis 0 into row ranges of at most `max_bytes` each, but at least one row; one range for a scalar."""
    if not shape:
        yield 0, 1
        return
    row = max(1, math.prod(shape[1:]) * itemsize)
    step = max(1, max_bytes // row)
    for start in range(0, shape[0], step):
        yield start, min(start + step, shape[0])


def describe(tensors: Mapping[str, TensorInfo]) -> str:
    """A summary such as '291 tensors, 6,738,415,616 parameters, 13,476,831,232 bytes, bfloat16'."""
    dtypes: collections.Counter[str] = collections.Counter()
    for info in tensors.values():
        dtypes[str(info.dtype)] += math.prod(info.shape)
    parameters = sum(count for name, count in dtypes.items() if name != "bool")  # those are masks
    nbytes = sum(info.nbytes for info in tensors.values())
    names = "/".join(name for name, _ in dtypes.most_common())
    return f"{quantity(len(tensors), 'tensor')}, {quantity(f'{parameters:,}', 'parameter')}, {nbytes:,} bytes, {names}"
