"""Folders with one zarr array per tensor, named like the tensor ("zarr" of Megatron's older checkpoints)."""

import math
import pathlib
import re
from typing import Any

import numpy as np

from lcx.convert.files import folders, tensor_io
from lcx.convert.files.tensor_io import TensorInfo
from lcx.errors import UserError

ARRAY = ".zarray"


class ZarrFolder:
    """The tensors of a folder (a `tensor_io.TensorSource`): those of its folders that hold a `.zarray`.

    Args:
      ignored: a pattern of names that are left out, such as those of optimizer states.

    Raises:
      UserError: at construction, if an array cannot be opened or a chunk of it is missing.
    """

    shared_bytes = 0
    others: tuple[str, ...] = ()  # objects that are no tensors: the extra states of these checkpoints are not read

    def __init__(self, folder: pathlib.Path, ignored: re.Pattern[str]):
        self.path = folder
        self._stores: dict[str, Any] = {}
        self.tensors: dict[str, TensorInfo] = {}
        for entry in sorted(folder.iterdir()):
            if (entry / ARRAY).is_file() and not ignored.fullmatch(entry.name):
                self._add(entry)

    def _add(self, place: pathlib.Path) -> None:
        if not place.resolve().is_relative_to(self.path.resolve()):
            raise UserError(f"{place}: is a link that leads out of the folder; put the array itself there")
        _check_chunks(place)
        store = _opened(place)
        self._stores[place.name] = store
        self.tensors[place.name] = TensorInfo(store.dtype.numpy_dtype, tuple(store.shape), str(place))

    def read(self, name: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        info = self.tensors[name]
        _, first, shape = tensor_io.row_range(info, name, start, stop)
        part = self._stores[name][first : first + shape[0]] if shape else self._stores[name]
        try:
            return np.asarray(part.read().result())
        except (ValueError, OSError) as error:
            raise UserError(f"{info.where}: a chunk is damaged ({_short(error)}); copy the array again") from None

    def held_bytes(self, name: str) -> bytes | None:
        raise KeyError(name)  # there are no others


def _opened(place: pathlib.Path) -> Any:
    from lcx.checkpoint import arrays  # tensorstore, which no other reader of Evo 2 needs

    try:
        return arrays.open_zarr(place)
    except (ValueError, OSError) as error:
        raise UserError(f"{place}: is not a zarr array ({_short(error)}); copy it again") from None


def _check_chunks(place: pathlib.Path) -> None:
    """Raises UserError for a missing chunk: zarr would read it as its fill value."""
    described = folders.read_json(place / ARRAY)
    sizes: tuple[Any, Any] = described.get("shape"), described.get("chunks")
    if not all(isinstance(x, list) and all(type(n) is int and n >= 0 for n in x) for x in sizes):
        raise UserError(f"{place / ARRAY}: has no shape and chunks; copy it again")
    shape, chunks = sizes
    if len(shape) != len(chunks) or 0 in chunks:
        raise UserError(f"{place / ARRAY}: has the shape {shape} in chunks of {chunks}; copy it again")
    counts = [-(-size // chunk) for size, chunk in zip(shape, chunks, strict=True)]
    files = sum(1 for path in place.rglob("*") if path.is_file() and not path.name.startswith("."))
    if files < math.prod(counts):
        raise UserError(f"{place}: has {files} of its {math.prod(counts)} chunks; copy the others too")


def _short(error: Exception) -> str:
    return " ".join(str(error).split())[:160]


