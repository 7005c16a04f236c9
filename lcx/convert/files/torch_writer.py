"""Writes PyTorch checkpoint files piece by piece: torch writes the headers, then the data follows in any order."""

import collections
import math
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from lcx.convert.files import tensor_io
from lcx.convert.files.tensor_io import TensorInfo
from lcx.errors import UserError


class TorchWriter:
    """A file that is created with space for all tensors, which `write` then fills.

    Args:
      path: the file, which must not exist yet.
      tensors: name -> dtype and shape.
      under: the key under which the dict of tensors is stored ("module"); None stores the dict itself.
      nested: whether the names "3.step" stand for dicts in a dict, {3: {"step": ...}}, as in an optimizer's state; only
        with `under`.
      beside: plain values to store next to the dict of tensors; only with `under`.
    """

    def __init__(
        self,
        path: pathlib.Path,
        tensors: Mapping[str, TensorInfo],
        *,
        under: str | None = None,
        nested: bool = False,
        beside: Mapping[str, Any] | None = None,
    ):
        self._path, self._tensors = path, dict(tensors)
        self._offsets = _make(path, tensors, under, nested, dict(beside or {}))
        self._left = sum(info.nbytes for info in tensors.values())
        self._file = open(path, "r+b", buffering=0)  # noqa: SIM115 (see close)

    def write(self, name: str, row: int, rows: np.ndarray) -> None:
        """Writes rows of a tensor, starting at row `row` (a scalar is written whole)."""
        info = self._tensors[name]
        assert rows.dtype == info.dtype and rows.shape[1:] == info.shape[1:], name
        self._file.seek(self._offsets[name] + row * math.prod(info.shape[1:]) * info.dtype.itemsize)
        tensor_io.write_all(self._file, rows)
        self._left -= rows.nbytes

    def finish(self) -> None:
        """Syncs the file to disk. Raises UserError if not all bytes were written."""
        if self._left:
            raise UserError(f"{self._path}: {self._left} bytes were never written")
        os.fsync(self._file.fileno())
        self.close()

    def close(self) -> None:
        self._file.close()


def _make(
    path: pathlib.Path,
    tensors: Mapping[str, TensorInfo],
    under: str | None,
    nested: bool,
    beside: dict[str, Any],
) -> dict[str, int]:
    """Creates the file without the tensors' data, and returns the offset of each tensor's data."""
    try:
        import torch
        from torch._subclasses.fake_tensor import FakeTensorMode
    except ImportError as error:
        raise UserError(f"{path}: writing PyTorch files needs torch: pip install 'lcx[torch]'") from error
    with FakeTensorMode():
        state: dict[Any, Any] = collections.OrderedDict(
            (name, torch.empty(info.shape, dtype=getattr(torch, str(info.dtype))))
            for name, info in tensors.items()
        )
    state = _nested(state) if nested else state
    with torch.serialization.skip_data(materialize_fake_tensors=True):
        torch.save(state if under is None else {under: state, **beside}, path)
    made = torch.load(path, map_location="meta", weights_only=True)
    made = made if under is None else made[under]
    if nested:
        made = {f"{i}.{key}": tensor for i, entry in made.items() for key, tensor in entry.items()}
    return {name: tensor.untyped_storage()._checkpoint_offset for name, tensor in made.items()}


def _nested(state: Mapping[str, Any]) -> dict[Any, Any]:
    """{"3.step": x} -> {3: {"step": x}}."""
    found: dict[Any, Any] = {}
    for name, tensor in state.items():
        number, _, key = name.partition(".")
        found.setdefault(int(number), {})[key] = tensor
    return found
