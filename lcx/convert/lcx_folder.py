"""lcx checkpoints as models: read parameter by parameter, written as a workdir with one step."""

import logging
import os
import pathlib
import re
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from lcx.checkpoint import model_json
from lcx.checkpoint.folder import find_step, read_json, read_record
from lcx.checkpoint.slices import StepReader, StepWriter
from lcx.convert import model_source, rules
from lcx.convert.files import tensor_io
from lcx.convert.files.tensor_io import TensorInfo
from lcx.convert.hf import folder as hf_folder
from lcx.convert.model_source import ModelSource
from lcx.errors import UserError
from lcx.version import __version__

log = logging.getLogger(__name__)

_PARAMS, _LORA, _META = "params", "lora", "meta"
_MOMENTS = re.compile(r".*/mu/params/(.+)")
_CARRIED = "hf_config"  # in the meta item: settings of config.json that the model does not hold


class LcxSource:
    """One step of a workdir, a checkpoints folder, or a step folder (a `model_source.ModelSource`).

    Low-rank pairs that were trained beside the parameters are merged into what is read, unless `merge` is False.

    Raises:
      UserError: no committed step there, or a damaged one.
    """

    def __init__(self, path: str | os.PathLike, *, merge: bool = True):
        directory, step = find_step(path)
        folder = pathlib.Path(os.fspath(directory)) / str(step)
        self.where = str(folder)
        meta = read_meta(folder)
        self.model = model_json.from_json(meta["model"])
        self.carried = carried_of(meta)
        self.side_files = _side_files(folder, meta)
        record = meta.get("tokenizer")
        self.tokenizer = record and {key: value for key, value in record.items() if key != "path"}
        self._reader = StepReader(folder, _PARAMS)
        has_pairs = merge and _LORA in read_record(folder).arrays
        self._lora = StepReader(folder, _LORA) if has_pairs else None
        self.leaves = {
            "/".join(path): TensorInfo(dtype, shape, self.where)
            for path, (shape, dtype) in self._reader.arrays.items()
        }
        model_source.check_leaves(self.leaves, self.model, self.where)
        if self._lora is not None:
            self._check_pairs()
            beside = len(trained(folder) or [])
            log.warning(
                "%s: its %d low-rank pairs are merged into the parameters%s",
                self.where,
                sum(shape[0] for path, (shape, _) in self._lora.arrays.items() if path[-1] == "scale"),
                f", of which {beside} trained beside them" if beside else "",
            )

    def _check_pairs(self) -> None:
        """Raises UserError for a pair that belongs to no parameter: what trained would be lost."""
        assert self._lora is not None
        owners = {path[:-1] for path in self._lora.arrays}
        lost = sorted("/".join(owner) for owner in owners if "/".join((*owner, "kernel")) not in self.leaves)
        if lost:
            raise UserError(
                f"{self.where}: the low-rank pair at {lost[0]} belongs to no parameter of the model"
            )

    def read(self, path: str, index: rules.Index) -> np.ndarray:
        keys, shape = tuple(path.split("/")), self.leaves[path].shape
        pair = (*keys[:-1], "a"), (*keys[:-1], "b"), (*keys[:-1], "scale")
        if self._lora is not None and keys[-1] == "kernel" and pair[0] in self._lora.arrays:
            rows = self._reader.read(keys, index[0])
            a, b, scale = (self._lora.read(name, index[0]) for name in pair)
            return merged(rows, a, b, scale)[(slice(None), *index[1:])]
        if all(s == slice(0, size) for s, size in zip(index[1:], shape[1:], strict=True)):
            return self._reader.read(keys, index[0] if index else None)  # whole rows are verified
        return self._reader.read(keys, index)


def merged(kernel: np.ndarray, a: np.ndarray, b: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """kernel + scale * a @ b of a stack of layers, computed in float32.

    Args:
      kernel: [L, in..., out...].  a: [L, in..., R].  b: [L, R, out...].  scale: [L].
    """
    result = np.empty_like(kernel)
    for layer in range(len(kernel)):
        low_rank = np.tensordot(a[layer].astype(np.float32), b[layer].astype(np.float32), 1)
        update = np.float32(scale[layer]) * low_rank
        result[layer] = (kernel[layer].astype(np.float32) + update).astype(kernel.dtype)
    return result


def trained(step_folder: str | os.PathLike) -> list[str] | None:
    """Paths of the parameters that a run trained as a whole ("embed/embedding"), not as a low-rank pair.

    Those that its optimizer keeps moments of. None for a checkpoint without an optimizer's state.
    """
    entries = read_record(step_folder).arrays.get("opt_state")
    if entries is None:
        return None
    return sorted(found[1] for key in entries if (found := _MOMENTS.fullmatch(key)))


def read_meta(step_folder: pathlib.Path) -> dict[str, Any]:
    """The meta item of a step. Raises UserError when it does not describe a model."""
    meta = read_json(step_folder, _META)
    if not isinstance(meta, dict) or "model" not in meta:
        raise UserError(f"checkpoint {step_folder} has no model in its meta item; pass one written by lcx")
    return meta


def carried_of(meta: Mapping[str, Any]) -> dict[str, Any]:
    """Settings for config.json: those that came with the model, else the ids of its tokenizer."""
    if meta.get(_CARRIED):
        return dict(meta[_CARRIED])
    tokenizer = meta.get("tokenizer") or {}
    stops = tokenizer.get("stop_ids") or []
    eos = list(stops) if len(stops) > 1 else tokenizer.get("eos_id")
    return {"bos_token_id": tokenizer.get("bos_id"), "eos_token_id": eos} if tokenizer else {}


def _side_files(step_folder: pathlib.Path, meta: Mapping[str, Any]) -> list[pathlib.Path]:
    """Tokenizer files beside the checkpoint, else beside the tokenizer that the checkpoint names."""
    for place in (step_folder, step_folder.parent, step_folder.parent.parent):
        found = hf_folder.side_files(place)
        if found:
            return found
    return _recorded_tokenizer_files(meta.get("tokenizer") or {})


def _recorded_tokenizer_files(record: Mapping[str, Any]) -> list[pathlib.Path]:
    """The files of the tokenizer that a training run recorded, if they are still what they were."""
    from lcx.data import tokenizer_from_json

    if not record.get("path"):
        return []
    try:
        path = pathlib.Path(tokenizer_from_json(dict(record)).to_json()["path"])
    except UserError as error:
        log.warning("no tokenizer is copied: %s", error)
        return []
    return list(dict.fromkeys([path, *hf_folder.side_files(path.parent)]))


def write(
    folder: pathlib.Path,
    source: ModelSource,
    *,
    dtype: np.dtype | None = None,
    progress: Callable[[int], None] = lambda nbytes: None,
) -> dict[str, TensorInfo]:
    """Writes a workdir with one step, 0, into an empty folder; returns what it holds.

    One layer of one parameter is in memory at a time (a piece of it where it is not stacked).
    """
    leaves = {
        path: TensorInfo(dtype or info.dtype, info.shape, str(folder)) for path, info in source.leaves.items()
    }
    specs = {tuple(path.split("/")): (info.shape, info.dtype) for path, info in leaves.items()}
    for file in source.side_files:
        hf_folder.write_bytes(folder / file.name, file.read_bytes())
    with StepWriter(folder / "checkpoints" / "0", _PARAMS, specs) as writer:
        for path, info in leaves.items():
            for rows in _row_groups(path, info.shape, source.leaves[path].dtype):
                index = (rows, *(slice(0, size) for size in info.shape[1:])) if info.shape else ()
                values = model_source.cast(source.read(path, index), info.dtype, path)
                writer.write(tuple(path.split("/")), rows if info.shape else None, values)
                progress(values.nbytes)
        writer.finish({_META: _meta(source)})
    return leaves


def _row_groups(path: str, shape: rules.Shape, dtype: np.dtype) -> list[slice]:
    """Rows to read at a time: one layer of a stack, a bounded piece of anything else."""
    limit = 1 if path.startswith("stages_") and len(shape) > 2 else tensor_io.PIECE_BYTES
    return [slice(start, stop) for start, stop in tensor_io.split_rows(shape, dtype.itemsize, limit)]


def _meta(source: ModelSource) -> dict[str, Any]:
    meta = {"model": model_json.to_json(source.model), "lcx_version": __version__}
    return meta | {"tokenizer": source.tokenizer, _CARRIED: dict(source.carried)}


def check_written(folder: pathlib.Path, leaves: Mapping[str, TensorInfo]) -> dict[str, TensorInfo]:
    """What a written workdir holds, read back from its metadata. Raises UserError when it is something
    else."""
    step = folder / "checkpoints" / "0"
    found = {"/".join(path): spec for path, spec in StepReader(step, _PARAMS).arrays.items()}
    expected = {path: (info.shape, info.dtype) for path, info in leaves.items()}
    if found != expected:
        raise UserError(
            f"{folder}: what was written is not what was meant to be; check the disk and try again"
        )
    read_meta(step)
    return dict(leaves)
