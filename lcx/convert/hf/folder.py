"""Hugging Face model folders: finding the files that hold the tensors, and writing such a folder.

File names in an index file are untrusted input: each must be a plain file name in the folder (links must not lead out
of it), exist, and hold exactly the tensors that the index assigns to it.
"""

import logging
import os
import pathlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np

from lcx.convert.files import safetensors, tensor_io, torch_bin, unsupported
from lcx.convert.files.folders import inside, is_plain, read_json, write_json
from lcx.convert.files.tensor_io import TensorInfo
from lcx.errors import UserError
from lcx.rope_fields import shown

log = logging.getLogger(__name__)

CONFIG = "config.json"
#: In the order in which transformers tries them.
WEIGHT_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)


class HfFolder:
    """All tensors of a Hugging Face folder, across all of its weight files.

    Attributes:
      path: the folder.
      config: config.json.
      tensors: name -> TensorInfo, every tensor of every weight file.

    Raises:
      UserError: at construction, for a missing, damaged or inconsistent file.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = pathlib.Path(path)
        if not self.path.is_dir():
            raise UserError(
                f"{self.path}: expected a folder with {CONFIG} and {' or '.join(WEIGHT_FILES[::2])}"
            )
        self.config = read_json(inside(self.path, CONFIG))
        # Before the tensors are read: their quantized dtypes would raise a less clear error.
        unsupported.check_config(self.config, self.path)
        self._files: dict[str, tensor_io.TensorSource] = {}
        self.tensors: dict[str, TensorInfo] = {}
        for file in _open_weights(self.path):
            for name, info in file.tensors.items():
                if name in self.tensors:
                    raise UserError(
                        f"{self.path}: the tensor {shown(name)} is in {self.tensors[name].where} and in "
                        f"{info.where}, expected each tensor once; remove the file that does not belong here"
                    )
                self.tensors[name] = info
                self._files[name] = file

    @property
    def shared_bytes(self) -> int:
        return sum(file.shared_bytes for file in set(self._files.values()))

    def read(self, name: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        return self._files[name].read(name, start, stop)


def _open_weights(folder: pathlib.Path) -> list[tensor_io.TensorSource]:
    name = next((name for name in WEIGHT_FILES if os.path.lexists(folder / name)), None)
    if name is None:
        found = sorted(path.name for path in folder.iterdir())
        unsupported.check_names(folder, found)
        raise UserError(
            f"{folder}: no weights, expected one of {', '.join(WEIGHT_FILES)}; found "
            f"{', '.join(found[:8]) or 'nothing'}"
        )
    reader: Callable[[pathlib.Path], tensor_io.TensorSource] = (
        safetensors.SafetensorsFile if "safetensors" in name else torch_bin.TorchFile
    )
    if not name.endswith(".json"):
        return [reader(inside(folder, name))]
    index_path = inside(folder, name)
    weight_map, total = _read_index(index_path)
    shards = {shard: inside(folder, shard) for shard in sorted(set(weight_map.values()))}
    files = {shard: reader(path) for shard, path in shards.items()}
    for tensor, shard in weight_map.items():
        if tensor not in files[shard].tensors:
            raise UserError(
                f"{index_path}: the tensor {shown(tensor)} should be in {shard}, which does not hold it"
            )
    stored = sum(info.nbytes for file in files.values() for info in file.tensors.values())
    shared = sum(file.shared_bytes for file in files.values())  # some writers count shared tensors twice
    if total not in (
        None,
        stored,
        stored - shared,
    ):  # only a warning: every tensor is checked against its own shape
        log.warning(
            "%s: metadata.total_size is %s bytes but the files hold %d; it is not used",
            index_path,
            shown(total),
            stored,
        )
    return list(files.values())


def _read_index(path: pathlib.Path) -> tuple[dict[str, str], Any]:
    index = read_json(path)
    weight_map, metadata = index.get("weight_map"), index.get("metadata") or {}
    if not isinstance(weight_map, dict) or not weight_map or not isinstance(metadata, dict):
        raise UserError(f"{path}: expected a weight_map from tensor names to file names")
    for shard in weight_map.values():
        if not is_plain(shard):
            raise UserError(
                f"{path}: names the file {shown(shard)}, expected a plain file name inside the folder"
            )
    return weight_map, metadata.get("total_size")


def write(
    folder: pathlib.Path,
    tensors: Mapping[str, TensorInfo],
    pieces: Callable[[str], Iterable[np.ndarray]],
    *,
    config: dict,
    max_shard_bytes: int = 5_000_000_000,
) -> None:
    """Writes config.json and the weights into an existing, empty folder, holding one piece of one tensor in memory.

    Args:
      folder: create it with `destination.replacing`, so that a failure leaves no partial folder.
      tensors: name -> dtype and shape, in the order in which they are written.
      pieces: name -> the tensor's rows in order.
      config: config.json.
      max_shard_bytes: a file is closed before it would grow beyond this (a larger tensor gets a file of its
        own).
    """
    shards = _split(tensors, max_shard_bytes)
    names = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    if len(shards) == 1:
        names = [WEIGHT_FILES[0]]
    for name, shard in zip(names, shards, strict=True):
        safetensors.write_file(folder / name, {tensor: tensors[tensor] for tensor in shard}, pieces)
    if len(shards) > 1:
        total = sum(info.nbytes for info in tensors.values())
        weight_map = {tensor: name for name, shard in zip(names, shards, strict=True) for tensor in shard}
        write_json(folder / WEIGHT_FILES[1], {"metadata": {"total_size": total}, "weight_map": weight_map})
    write_json(folder / CONFIG, config)


def _split(tensors: Mapping[str, TensorInfo], max_shard_bytes: int) -> list[list[str]]:
    shards: list[list[str]] = [[]]
    size = 0
    for name, info in tensors.items():
        if shards[-1] and size + info.nbytes > max_shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += info.nbytes
    return shards
