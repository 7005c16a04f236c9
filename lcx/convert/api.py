"""lcx.load and lcx.save: models in and out of any format, from Python."""

import functools
import os
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from lcx import extend, hub
from lcx.convert import formats
from lcx.convert.core import model_source
from lcx.convert.core.format import Format
from lcx.convert.core.model_source import ModelSource
from lcx.convert.files import destination, tensor_io
from lcx.convert.hf import source as hf_source
from lcx.convert.lolcats.files import Lolcats
from lcx.convert.peft import merged
from lcx.errors import UserError
from lcx.model import Decoder


def load(
    path: str | os.PathLike,
    *,
    format: str | Format | None = None,
    dtype: Any = None,
    mesh: jax.sharding.Mesh | None = None,
    rope_scaling: Mapping[str, Any] | None = None,
    context_length: int | None = None,
    lolcats: Lolcats | None = None,
    adapter: str | os.PathLike | Sequence[str | os.PathLike] | None = None,
) -> tuple[Decoder, dict[str, Any]]:
    """Reads a model.

    Args:
      path: a Hugging Face folder, or the name of a model on the hub ("org/name", "org/name@revision"); an lcx workdir,
        checkpoints folder or step folder; for Evo 2 a folder of savanna (a run, a step) or one .pt file, in pieces or
        not, of savanna or vortex.
      format: a name of `formats.FORMATS`, or a Format of your own (the object, or "module:NAME"); None finds out from
        the files. No file tells "savanna_legacy" (projections in blocks a rank) from "savanna"; "savanna_fp32" and
        "savanna_legacy_fp32" take the float32 weights of DeepSpeed's optimizer states.
      dtype: of the parameters and of the computation, "float32", "bfloat16" or "float16"; None as stored.
      mesh: from sharding.make_mesh; each parameter is placed on it as sharding.RULES say. None: the default
        device.
      rope_scaling: what Hugging Face writes, {"rope_type": "yarn", "factor": 4.0}: extends the context.
      context_length: the new window in tokens; by default factor times the original window. Alone, or with
        {"rope_theta": B}, it keeps the scaling that the model has (`extend.extend`).
      lolcats: published LoLCATS files that sit on this Hugging Face folder, and their settings.
      adapter: a folder of PEFT's LoRA for this model, or several whose updates add up; merged into params.

    Returns:
      (model, params): `model.apply({"params": params}, tokens)` are the logits. Low-rank pairs that were
      trained are merged into params.

    Raises:
      UserError: nothing readable there, or a setting that does not fit it.
    """
    wanted, path = model_source.parse_dtype(dtype), hub.local(path)
    reader = formats.reader(path, format, lolcats)
    change = functools.partial(extend.extend_model, rope_scaling=rope_scaling, context_length=context_length)
    if adapter is None:
        return reader.load(path, dtype=wanted, mesh=mesh, change=change)
    source = reader.open(path)
    source.model = change(source.model)
    scaled = rope_scaling is not None or context_length is not None
    return model_source.load(
        merged.adapted(source, adapter, scaled=scaled, dtype=wanted), dtype=wanted, mesh=mesh
    )


def save(
    path: str | os.PathLike,
    model: Decoder,
    params: Mapping[str, Any],
    *,
    format: str | Format,
    overwrite: bool = False,
    like: str | os.PathLike | None = None,
    model_parallel: int = 1,
) -> None:
    """Writes a model: a Hugging Face folder ("hf"), a workdir with one step ("lcx"), a folder of "savanna", "vortex" or
    "lolcats", or a Format of your own.

    The folder appears whole or not at all.

    Args:
      overwrite: whether an existing checkpoint folder may be replaced.
      like: a Hugging Face folder whose tokenizer files and token ids belong to the model, and are copied.
      model_parallel: how many files share the tensors ("savanna").

    Raises:
      UserError: the destination exists or cannot be written; the format cannot hold the model.
    """
    target = formats.writer(format, model_parallel=None if model_parallel == 1 else model_parallel)
    if jax.process_count() > 1:
        raise UserError("lcx.save runs in one process; let the trainer save, and use python -m lcx.convert")
    extras = hf_source.Extras({}, [], None)
    if like is not None:
        destination.refuse_same(like, path)
        extras = hf_source.extras(hub.local(like))
    source = model_source.TreeSource(model, params, extras.carried, extras.side_files, extras.tokenizer)
    write(path, source, format=target, overwrite=overwrite)


def write(
    path: str | os.PathLike,
    source: ModelSource,
    *,
    format: str | Format,
    dtype: np.dtype | None = None,
    overwrite: bool = False,
    progress: Callable[[int], None] = lambda nbytes: None,
) -> str:
    """Writes any source into a new folder, reads its metadata back, and returns a line that says what is there."""
    target = formats.writer(format)
    needed = target.planned_bytes(source, dtype=dtype)
    with destination.replacing(
        path,
        overwrite=overwrite,
        needed_bytes=needed,
        replaceable=lambda old: formats.is_checkpoint(old, target),
    ) as folder:
        tensors = target.write(folder, source, dtype=dtype, progress=progress)
        return tensor_io.describe(target.check_written(folder, tensors))


def source(path: str | os.PathLike) -> ModelSource:
    """The model there, in whatever format. Raises UserError when it cannot be read."""
    path = hub.local(path)
    return formats.detect(path).open(path)


def detect(path: str | os.PathLike) -> str:
    """The name of the format of a folder or file. Raises UserError when it is none of the known ones."""
    return formats.detect(path).name


def tokenizer_record(path: str | os.PathLike) -> Mapping[str, Any] | None:
    """What `Tokenizer.to_json` says of the tokenizer of a checkpoint that has no files for it; None of all others."""
    try:
        found = formats.detect(path)
    except UserError:
        return None
    return found.tokenizer(pathlib.Path(hub.local(path)).expanduser())
