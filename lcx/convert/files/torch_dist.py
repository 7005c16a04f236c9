"""Folders of torch.distributed.checkpoint ("torch_dist" of Megatron), read without executing anything in them.

    .metadata        a pickle: each tensor's dtype, shape and chunks, and where the chunks lie
    __RANK_N.distcp  chunks one after the other, each a tensor (or another object) as torch.save writes it

torch's own reader unpickles `.metadata` without restriction. Here its classes are admitted by name and replaced by
records that hold what was stored; anything else is refused.
"""

import dataclasses
import io
import math
import os
import pathlib
import pickle
import re
from typing import Any, TypeGuard

import numpy as np

from lcx import small_files
from lcx.convert.files import folders, tensor_io
from lcx.convert.files.tensor_io import Region, TensorInfo
from lcx.convert.files.torch_bin import TorchFile, held_bytes, numpy_dtype
from lcx.errors import UserError
from lcx.rope_fields import shown

METADATA = ".metadata"
_MAX_METADATA_BYTES, _MAX_CHUNKS, _MAX_BYTES_ITEM = 256 << 20, 4096, 16 << 20
_RECORDS = re.compile(r"(torch\.distributed\.checkpoint|megatron|nemo|pathlib)(\..*)?")


class _Record:
    """In the place of an object of an admitted class: holds its state, and does nothing."""

    state: Any = None

    def __new__(cls, *args, **kwargs):
        return super().__new__(cls)

    def __init__(self, *args, **kwargs):
        pass

    def __setstate__(self, state):
        self.state = state

    def field(self, name: str) -> Any:
        return self.state.get(name) if isinstance(self.state, dict) else None


def _member(of: Any, name: Any) -> Any:
    """In the place of `getattr`, by which Python 3.11.0 to 3.11.3 pickle members of enumerations. Looks nothing up."""
    if not (isinstance(of, type) and issubclass(of, _Record)):
        raise pickle.UnpicklingError("it asks for builtins.getattr")
    return of()


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        import torch

        if (module, name) == ("torch", "Size"):
            return tuple
        if (module, name) == ("collections", "OrderedDict"):
            return dict
        if module == "torch" and isinstance(found := getattr(torch, name, None), torch.dtype):
            return found
        if _RECORDS.fullmatch(module):
            return type(name, (_Record,), {})
        if (module, name) == ("torch.serialization", "_get_layout"):
            return _Record
        if (module, name) == ("builtins", "getattr"):
            return _member
        raise pickle.UnpicklingError(f"it asks for {module}.{name}")


@dataclasses.dataclass(frozen=True)
class _Chunk:
    """A part of a tensor: its first element, its sizes, and the bytes that hold it."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    region: Region


class TorchDist:
    """The tensors of a folder (a `tensor_io.TensorSource`).

    Args:
      ignored: a pattern of names that are left out, such as those of optimizer states.

    Attributes:
      others: names of stored objects that are no tensors; `held_bytes` reads those that hold bytes.

    Raises:
      UserError: at construction, if the metadata is damaged or asks for code, or if chunks are missing, overlap or lie
        outside their files.
    """

    shared_bytes = 0

    def __init__(self, folder: pathlib.Path, ignored: re.Pattern[str]):
        self.path = folder / METADATA
        state, self._places = _metadata(self.path)
        self._folder, self._sizes = folder, dict[str, int]()
        self._others: dict[str, Region] = {}
        self._chunks: dict[str, list[_Chunk]] = {}
        self.tensors: dict[str, TensorInfo] = {}
        for name, entry in state.items():
            if not isinstance(name, str) or not isinstance(entry, _Record):
                raise UserError(f"{self.path}: has an entry {shown(name)}, expected named tensors")
            if ignored.fullmatch(name):
                continue
            if type(entry).__name__ == "TensorStorageMetadata":
                self._add(name, entry)
            elif region := self._region(name, None):
                self._others[name] = region
        self.others = list(self._others)
        self._open: dict[Region, TorchFile] = {}

    def _region(self, name: str, offsets: tuple[int, ...] | None) -> Region | None:
        """Where an object or a chunk lies; None if the metadata does not say."""
        if (name, offsets) not in self._places:
            return None
        file, start, length = self._places[name, offsets]
        path = folders.inside(self._folder, file)
        size = self._sizes.setdefault(file, os.path.getsize(path))
        if not _counts((start, length)) or start + length > size:
            raise UserError(
                f"{path}: has {size} bytes, and the metadata names bytes {start} to {start}+{length} of it; it is "
                "truncated, copy it again"
            )
        return Region(path, start, length)

    def _add(self, name: str, entry: _Record) -> None:
        shape, properties, listed = (entry.field(part) for part in ("size", "properties", "chunks"))
        state = properties.state if isinstance(properties, _Record) else None
        dtype = state[0] if isinstance(state, tuple) and state else None
        if not _counts(shape) or not _is_dtype(dtype) or not isinstance(listed, list):
            raise UserError(f"{self.path}: {shown(name)} has no shape and dtype; copy the folder again")
        info = TensorInfo(numpy_dtype(self.path, name, dtype), shape, str(self.path))
        chunks, parts = list[_Chunk](), ("offsets", "sizes")
        for one in listed:
            offsets, sizes = (one.field(part) if isinstance(one, _Record) else None for part in parts)
            if not _counts(offsets) or not _counts(sizes) or not len(offsets) == len(sizes) == len(shape):
                raise UserError(f"{self.path}: a chunk of {shown(name)} has no place; copy the folder again")
            if (region := self._region(name, offsets)) is None:
                raise UserError(f"{self.path}: the chunk of {shown(name)} at {offsets} is stored nowhere; copy it too")
            chunks.append(_Chunk(offsets, sizes, region))
        self._check(name, info, chunks)
        self._chunks[name], self.tensors[name] = chunks, info

    def _check(self, name: str, info: TensorInfo, chunks: list[_Chunk]) -> None:
        """Raises UserError unless the chunks fill the tensor, each element once."""
        if len(chunks) > _MAX_CHUNKS:
            raise UserError(f"{self.path}: {shown(name)} has {len(chunks)} chunks, expected at most {_MAX_CHUNKS}")
        starts = np.array([chunk.offsets for chunk in chunks], np.int64).reshape(len(chunks), -1)
        stops = starts + np.array([chunk.sizes for chunk in chunks], np.int64).reshape(len(chunks), -1)
        apart = (starts[:, None] >= stops[None]) | (stops[:, None] <= starts[None])
        overlap = ~apart.any(axis=2) & ~np.eye(len(chunks), dtype=bool)
        filled = sum(math.prod(chunk.sizes) for chunk in chunks)
        if filled != math.prod(info.shape) or overlap.any() or (stops > np.array(info.shape, np.int64)).any():
            raise UserError(
                f"{self.path}: the {len(chunks)} chunks of {shown(name)} hold {filled} of its {math.prod(info.shape)} "
                f"numbers ({info.shape}), or overlap; a chunk is missing, copy the folder again"
            )
        for chunk in chunks:
            if math.prod(chunk.sizes) * info.dtype.itemsize > (size := chunk.region.length):
                raise UserError(f"{self.path}: a chunk of {shown(name)} needs more than its {size} bytes")

    def read(self, name: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        info = self.tensors[name]
        _, first, shape = tensor_io.row_range(info, name, start, stop)
        out = np.empty(shape, info.dtype)
        if not shape:
            return self._chunk(name, self._chunks[name][0]).read("")
        for chunk in self._chunks[name]:
            low, high = max(first, chunk.offsets[0]), min(first + shape[0], chunk.offsets[0] + chunk.sizes[0])
            if low < high:
                rows = self._chunk(name, chunk).read("", low - chunk.offsets[0], high - chunk.offsets[0])
                rest = (slice(at, at + size) for at, size in zip(chunk.offsets[1:], chunk.sizes[1:], strict=True))
                out[(slice(low - first, high - first), *rest)] = rows
        return out

    def _chunk(self, name: str, chunk: _Chunk) -> TorchFile:
        if chunk.region not in self._open:
            file = TorchFile(chunk.region)
            found = file.tensors.get("")
            if found is None or (found.shape, found.dtype) != (chunk.sizes, self.tensors[name].dtype):
                what = "no tensor" if found is None else f"{found.shape} {found.dtype}"
                raise UserError(
                    f"{chunk.region}: is {what}, and {shown(name)} expects {chunk.sizes} {self.tensors[name].dtype} "
                    "there; the files are not of one checkpoint, copy them again"
                )
            self._open[chunk.region] = file
        return self._open[chunk.region]

    def held_bytes(self, name: str) -> bytes | None:
        """The bytes in an object of `others`; None if it holds none. Raises UserError as `TorchFile` does."""
        region = self._others[name]
        if region.length > _MAX_BYTES_ITEM:
            raise UserError(f"{region}: {shown(name)} has {region.length} bytes, expected at most {_MAX_BYTES_ITEM}")
        return held_bytes(region)


def _metadata(path: pathlib.Path) -> tuple[dict[Any, Any], dict[Any, tuple[Any, Any, Any]]]:
    """({name: record of a tensor or object}, {(name, offsets): (file, first byte, bytes)}) in a `.metadata`."""
    folders.inside(path.parent, path.name)
    data = _contents(path)
    try:
        top = _Unpickler(io.BytesIO(data)).load()
        state, storage = top.field("state_dict_metadata"), top.field("storage_data")
        places = {}
        for key, value in storage.items():
            if value.field("transform_descriptors"):
                raise UserError(f"{path}: its chunks are compressed, expected plain ones: save it without extensions")
            at = key.field("offset")
            index = key.field("fqn"), at if at is None else tuple(at)
            places[index] = tuple(value.field(part) for part in ("relative_path", "offset", "length"))
        if not isinstance(state, dict):
            raise ValueError("no state_dict_metadata")
    except UserError:
        raise
    except Exception as error:  # an unpickler raises a dozen kinds of error on damage, MemoryError for a false length
        reason = " ".join(str(error).split())[:120] or type(error).__name__
        raise UserError(
            f"{path}: is not the metadata of a distributed checkpoint that can be read safely, and nothing in it was "
            f"executed ({reason}); copy it again"
        ) from error
    return state, places


def _contents(path: pathlib.Path) -> bytes:
    try:
        return small_files.read_bytes(path, max_bytes=_MAX_METADATA_BYTES)
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}") from error


def _counts(values: Any) -> TypeGuard[tuple[int, ...]]:
    """Whether it is a tuple of whole numbers that sizes or places can be."""
    return isinstance(values, tuple) and all(type(x) is int and 0 <= x < 1 << 48 for x in values)


def _is_dtype(value: Any) -> bool:
    import torch

    return isinstance(value, torch.dtype)
