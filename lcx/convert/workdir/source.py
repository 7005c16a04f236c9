"""Reads models from lcx checkpoints parameter by parameter, and the metadata that a step records about its run."""

import functools
import logging
import os
import pathlib
import re
from collections.abc import Mapping
from typing import Any

import numpy as np
from flax.traverse_util import unflatten_dict

from lcx.checkpoint import model_json
from lcx.checkpoint.folder import find_step, read_json, read_record
from lcx.checkpoint.slices import StepReader
from lcx.convert.core import model_source, rules
from lcx.convert.core.training_state import StoredRun
from lcx.convert.files import folders
from lcx.convert.files.tensor_io import TensorInfo
from lcx.convert.workdir import training_state
from lcx.errors import UserError

log = logging.getLogger(__name__)

PARAMS, LORA, FP8, META = "params", "lora", "fp8", "meta"
_MOMENTS = re.compile(r".*/mu/params/(.+)")
CARRIED = "hf_config"  # key in the meta item: settings of config.json that the Decoder does not hold


class LcxSource:
    """One step of a workdir, a checkpoints folder, or a step folder (a `model_source.ModelSource`).

    Trained low-rank pairs are merged into the parameters as they are read, unless `merge` is False.

    Raises:
      UserError: there is no committed step, or it is damaged.
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
        self._reader = StepReader(folder, PARAMS)
        has_pairs = merge and LORA in read_record(folder).arrays
        self._lora = StepReader(folder, LORA) if has_pairs else None
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
                f"; {beside} parameters were trained in full" if beside else "",
            )

    @functools.cached_property
    def stored_run(self) -> StoredRun | None:
        """The optimizer and the schedule of the run, as this step holds them; None if it holds none for the model."""
        return training_state.read(pathlib.Path(self.where), self.leaves)

    @functools.cached_property
    def fp8_scaling(self) -> dict[str, np.ndarray]:
        """See model_source.fp8_scaling."""
        if FP8 not in read_record(self.where).arrays:
            return {}
        reader = StepReader(self.where, FP8)
        return {"/".join(path): reader.read(path) for path in reader.arrays}

    def _check_pairs(self) -> None:
        """Raises UserError for a pair that belongs to no parameter: merging would silently drop its training."""
        assert self._lora is not None
        owners = {path[:-1] for path in self._lora.arrays}
        lost = sorted("/".join(owner) for owner in owners if "/".join((*owner, "kernel")) not in self.leaves)
        if lost:
            raise UserError(
                f"{self.where}: the low-rank pair at {lost[0]} belongs to no parameter of the model"
            )

    def verify(self) -> None:
        """Raises DamagedStep if values differ from those that were saved."""
        for reader in (self._reader, self._lora):
            for path in reader.arrays if reader else ():
                reader.verify(path)

    def read(self, path: str, index: rules.Index) -> np.ndarray:
        keys, shape = tuple(path.split("/")), self.leaves[path].shape
        pair = (*keys[:-1], "a"), (*keys[:-1], "b"), (*keys[:-1], "scale")
        if self._lora is not None and keys[-1] == "kernel" and pair[0] in self._lora.arrays:
            rows = self._reader.read(keys, index[0])
            a, b, scale = (self._lora.read(name, index[0]) for name in pair)
            return merged(rows, a, b, scale)[(slice(None), *index[1:])]
        if all(s == slice(0, size) for s, size in zip(index[1:], shape[1:], strict=True)):
            return self._reader.read(keys, index[0] if index else None)
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
    """Paths of the parameters that a run trained in full ("embed/embedding"), not through a low-rank pair.

    These are the parameters with optimizer moments. None for a checkpoint without optimizer state.
    """
    entries = read_record(step_folder).arrays.get("opt_state")
    if entries is None:
        return None
    return sorted(found[1] for key in entries if (found := _MOMENTS.fullmatch(key)))


def stored_pairs(checkpoint: str | os.PathLike) -> dict[str, Any] | None:
    """The `lora` collection of a checkpoint; None if it has none."""
    folder = step_folder(checkpoint)
    if LORA not in read_record(folder).arrays:
        return None
    reader = StepReader(folder, LORA)
    return unflatten_dict({"/".join(keys): reader.read(keys, slice(None)) for keys in reader.arrays}, sep="/")


def step_folder(checkpoint: str | os.PathLike) -> pathlib.Path:
    """The folder of the newest step, or of the step that the path names."""
    directory, step = find_step(checkpoint)
    return pathlib.Path(os.fspath(directory)) / str(step)


def read_meta(step_folder: pathlib.Path) -> dict[str, Any]:
    """The meta item of a step. Raises UserError if it does not describe a model."""
    meta = read_json(step_folder, META)
    if not isinstance(meta, dict) or "model" not in meta:
        raise UserError(f"checkpoint {step_folder} has no model in its meta item; pass one written by lcx")
    return meta


def carried_of(meta: Mapping[str, Any]) -> dict[str, Any]:
    """Settings for config.json: those that came with the model, else the token ids of its tokenizer."""
    if meta.get(CARRIED):
        return dict(meta[CARRIED])
    tokenizer = meta.get("tokenizer") or {}
    stops = tokenizer.get("stop_ids") or []
    eos = list(stops) if len(stops) > 1 else tokenizer.get("eos_id")
    return {"bos_token_id": tokenizer.get("bos_id"), "eos_token_id": eos} if tokenizer else {}


def _side_files(step_folder: pathlib.Path, meta: Mapping[str, Any]) -> list[pathlib.Path]:
    """Tokenizer files next to the checkpoint, else next to the tokenizer that the checkpoint names."""
    for place in (step_folder, step_folder.parent, step_folder.parent.parent):
        found = folders.side_files(place)
        if found:
            return found
    return _recorded_tokenizer_files(meta.get("tokenizer") or {})


def _recorded_tokenizer_files(record: Mapping[str, Any]) -> list[pathlib.Path]:
    """The files of the tokenizer that a training run recorded, if they have not changed since."""
    from lcx.data import tokenizer_from_json

    if not record.get("path"):
        return []
    try:
        path = pathlib.Path(tokenizer_from_json(dict(record)).to_json()["path"])
    except UserError as error:
        log.warning("no tokenizer is copied: %s", error)
        return []
    return list(dict.fromkeys([path, *folders.side_files(path.parent)]))
