"""lcx.load and lcx.save: models in and out of any format, from Python."""

import os
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from lcx import extend, hub
from lcx.buckets import copies, is_url
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
from lcx.striped_hyena import with_input_projections


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
    input_projections: str | None = None,
    check: Callable[[Decoder], None] = lambda model: None,
) -> tuple[Decoder, dict[str, Any]]:
    """Reads a model.

    Args:
      path: a Hugging Face folder, or the name of a model on the hub ("org/name", "org/name@revision"); an lcx workdir,
        checkpoints folder or step folder, each also in a bucket (gs://, s3://); for Evo 2 a savanna folder (a
        run or a step), or one savanna or vortex .pt file, whole or split into `.partN` pieces.
      format: a name in `formats.FORMATS`, or your own Format (the object, or "module:NAME"). None detects the format
        from the files. The files do not distinguish "savanna_legacy" (projections in per-rank blocks) from "savanna",
        so it must be named. "savanna_fp32" and "savanna_legacy_fp32" read the float32 weights from DeepSpeed's
        optimizer states.
      dtype: dtype of the parameters and of the computation, "float32", "bfloat16" or "float16"; None keeps the stored
        dtype.
      mesh: from sharding.make_mesh; parameters are sharded over it according to sharding.RULES. None: the default
        device.
      rope_scaling: extends the context; same form as in Hugging Face, e.g. {"rope_type": "yarn", "factor": 4.0}.
      context_length: the new window in tokens; by default factor times the original window. Alone, or with
        {"rope_theta": B}, it keeps the model's current scaling (`extend.extend`).
      lolcats: published LoLCATS files that belong to this Hugging Face folder, and their settings.
      adapter: the folder of a PEFT LoRA adapter for this model, or several whose updates are summed; merged into
        params.
      input_projections: "fp8" or "plain": how the input projections of Hyena layers are computed. None: as the
        checkpoint says, by its configuration or by the FP8 scales in it (Evo 2 1B, 20B and 40B need FP8).
      check: called with the model before any parameter is read; what it raises comes within a second.

    Returns:
      (model, params): `model.apply({"params": params}, tokens)` gives the logits. Low-rank pairs in the checkpoint are
      merged into params.

    Raises:
      UserError: there is no readable checkpoint at `path`, or a setting does not fit it.
    """
    if input_projections is not None:
        loaded = load(
            path,
            format=format,
            dtype=dtype,
            mesh=mesh,
            rope_scaling=rope_scaling,
            context_length=context_length,
            lolcats=lolcats,
            adapter=adapter,
            check=check,
        )
        return with_input_projections(*loaded, input_projections)
    wanted, path = model_source.parse_dtype(dtype), hub.local(path)
    reader = formats.reader(path, format, lolcats)

    def change(model: Decoder) -> Decoder:
        changed = extend.extend_model(model, rope_scaling, context_length)
        check(changed)
        return changed

    if adapter is None:
        return reader.load(path, dtype=wanted, mesh=mesh, change=change)
    scaled = rope_scaling is not None or context_length is not None

    def with_adapter() -> tuple[Decoder, dict[str, Any]]:
        source = reader.open(path)
        source.model = change(source.model)
        whole = merged.adapted(source, adapter, scaled=scaled, dtype=wanted)
        return model_source.load(whole, dtype=wanted, mesh=mesh)

    return reader.read(path, with_adapter)


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
    """Writes a model as a Hugging Face folder ("hf"), a workdir with one step ("lcx"), a "savanna", "vortex",
    "lolcats" or "two_mamba" folder, or in your own Format.

    The folder is renamed into place once it is complete, so a partial one never appears at `path`.

    Args:
      path: the folder to write, also in a bucket (gs://, s3://), where it is copied once it is complete.
      model, params: as `load` returns them.
      format: a name in `formats.FORMATS`, or your own Format (the object, or "module:NAME").
      overwrite: whether an existing checkpoint folder may be replaced.
      like: a Hugging Face folder from which tokenizer files and token ids are copied.
      model_parallel: number of model-parallel files that the tensors are split over ("savanna" only).

    Raises:
      UserError: the destination exists or cannot be written, or the format cannot represent the model.
    """
    if is_url(os.fspath(path)):
        with copies.written(os.fspath(path), setting="path", overwrite=overwrite) as folder:
            save(folder, model, params, format=format, like=like, model_parallel=model_parallel)
        return
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
    """Writes any source into a new folder, reads its metadata back, and returns a one-line summary of what it holds."""
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


def source(path: str | os.PathLike, format: str | Format | None = None) -> ModelSource:
    """Opens the model at `path`; format None detects its format. Raises UserError when it cannot be read."""
    path = hub.local(path)
    return formats.reader(path, format).open(path)


def verify_source(path: str | os.PathLike, format: str | Format | None = None) -> None:
    """Reads the model at `path` once, if its format can tell whether values are damaged (`Format.verify`)."""
    path = hub.local(path)
    formats.reader(path, format).verify(path)


def detect(path: str | os.PathLike, format: str | Format | None = None) -> str:
    """The name of the format of a folder or file: the one given, else the detected one.

    Raises:
      UserError: an unknown format.
    """
    return formats.reader(path, format).name


def tokenizer_record(path: str | os.PathLike, format: str | Format | None = None) -> Mapping[str, Any] | None:
    """`Tokenizer.to_json` of the tokenizer that the format of this checkpoint implies without storing it; else None."""
    try:
        found = formats.reader(path, format)
    except UserError:
        return None
    return found.tokenizer(pathlib.Path(hub.local(path)).expanduser())
