"""Writes a model as a workdir with one step, 0."""

import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from lcx.checkpoint import model_json
from lcx.checkpoint.slices import StepReader, StepWriter
from lcx.convert.core import model_source, rules
from lcx.convert.core.format import check_same
from lcx.convert.core.model_source import ModelSource
from lcx.convert.files import folders, tensor_io
from lcx.convert.files.tensor_io import TensorInfo
from lcx.convert.workdir.source import CARRIED, FP8, META, PARAMS, read_meta
from lcx.version import __version__


def write(
    folder: pathlib.Path,
    source: ModelSource,
    *,
    dtype: np.dtype | None = None,
    progress: Callable[[int], None] = lambda nbytes: None,
) -> dict[str, TensorInfo]:
    """Writes a workdir with one step, 0, into an empty folder; returns the written tensors.

    The histories of FP8 scales that the source holds become the item that a training run would write.

    Holds one layer of one stacked parameter, or one piece of any other parameter, in memory at a time.
    """
    leaves = {
        path: TensorInfo(model_source.dtype_of(path, info, dtype), info.shape, str(folder))
        for path, info in source.leaves.items()
    }
    specs = {tuple(path.split("/")): (info.shape, info.dtype) for path, info in leaves.items()}
    for file in source.side_files:
        folders.write_bytes(folder / file.name, file.read_bytes())
    histories = {tuple(path.split("/")): x for path, x in model_source.fp8_scaling(source).items()}
    others = {FP8: histories} if histories else {}
    with StepWriter(folder / "checkpoints" / "0", PARAMS, specs, others=others) as writer:
        for path, info in leaves.items():
            for rows in _row_groups(path, info.shape, source.leaves[path].dtype):
                index = (rows, *(slice(0, size) for size in info.shape[1:])) if info.shape else ()
                values = model_source.cast(source.read(path, index), info.dtype, path)
                writer.write(tuple(path.split("/")), rows if info.shape else None, values)
                progress(values.nbytes)
        writer.finish({META: _meta(source)})
    return leaves


def _row_groups(path: str, shape: rules.Shape, dtype: np.dtype) -> list[slice]:
    """Row ranges to read at a time: one layer of a stacked parameter, a bounded piece of any other."""
    limit = 1 if path.startswith("stages_") and len(shape) > 2 else tensor_io.PIECE_BYTES
    return [slice(start, stop) for start, stop in tensor_io.split_rows(shape, dtype.itemsize, limit)]


def _meta(source: ModelSource) -> dict[str, Any]:
    meta = {"model": model_json.to_json(source.model), "lcx_version": __version__}
    return meta | {"tokenizer": source.tokenizer, CARRIED: dict(source.carried)}


def check_written(folder: pathlib.Path, leaves: Mapping[str, TensorInfo]) -> dict[str, TensorInfo]:
    """The tensors of a written workdir, read back from its metadata. Raises UserError unless they match `leaves`."""
    step = folder / "checkpoints" / "0"
    arrays = StepReader(step, PARAMS).arrays
    check_same(
        folder, {"/".join(path): TensorInfo(dtype, shape) for path, (shape, dtype) in arrays.items()}, leaves
    )
    read_meta(step)
    return dict(leaves)
