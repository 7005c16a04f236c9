"""Restores a model from an lcx checkpoint through Orbax: in parallel, verified, with the low-rank pairs merged."""

import os
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from flax.traverse_util import unflatten_dict

from lcx import lora as lora_lib
from lcx import model as model_lib
from lcx.checkpoint import Checkpointer, as_stored, find_step, model_json, read_record
from lcx.checkpoint.folder import COMMIT_MARKER
from lcx.convert.core import model_source
from lcx.convert.workdir.source import LORA, PARAMS
from lcx.model import Decoder


def load(
    path: str | os.PathLike,
    *,
    dtype: np.dtype | None,
    mesh: jax.sharding.Mesh | None,
    change: Callable[[Decoder], Decoder],
) -> tuple[Decoder, dict[str, Any]]:
    """See `Format.load`. If the newest step is damaged, falls back to the previous one."""
    directory, newest = find_step(path)
    only = newest if (pathlib.Path(path).expanduser() / COMMIT_MARKER).exists() else None
    with Checkpointer(directory) as checkpointer:
        step, _, documents = checkpointer.restore({}, step=only)
        model = model_json.from_json(documents["meta"]["model"])
        changed = change(model)  # before the parameters are read, so that its errors come early
        step_folder = directory / str(step)
        abstract = {PARAMS: as_stored(model_lib.abstract_params(model, mesh=mesh), step_folder)}
        stored = read_record(step_folder).arrays
        if LORA in stored:
            abstract[LORA] = _abstract_lora(mesh, stored[LORA])
        _, items, _ = checkpointer.restore(abstract, step=only)
    params = items[PARAMS]
    if dtype is not None:  # cast before merging, so that a wider dtype does not lose part of the update
        changed = changed.clone(dtype=str(dtype), parent=None)
        params = model_source.cast_params(params, dtype)
    return changed, _merge(params, items[LORA]) if LORA in items else params


def _abstract_lora(mesh, entries: Mapping[str, Any]) -> Any:
    sharding = None if mesh is None else jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    return unflatten_dict(
        {
            path: jax.ShapeDtypeStruct(entry.shape, jax.numpy.dtype(entry.dtype), sharding=sharding)
            for path, entry in entries.items()
        },
        sep="/",
    )


def _merge(params: Any, lora: Any) -> Any:
    """Merges the low-rank pairs into the parameters, keeping each parameter's sharding."""
    where = jax.tree.map(lambda leaf: leaf.sharding, params)
    return jax.jit(lora_lib.merge, out_shardings=where)(params, lora)
