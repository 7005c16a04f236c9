"""lcx.load and lcx.save: models in and out of any format, from Python."""

import os
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from lcx import extend, hub
from lcx import lora as lora_lib
from lcx import model as model_lib
from lcx.checkpoint import Checkpointer, model_json
from lcx.checkpoint.folder import COMMIT_MARKER, find_step, read_record
from lcx.convert import lcx_folder, model_source, rules
from lcx.convert.evo2 import savanna, savanna_files, vortex
from lcx.convert.files import destination, unsupported
from lcx.convert.hf import folder as hf_folder
from lcx.convert.hf import format as hf
from lcx.convert.lolcats import writer as lolcats_writer
from lcx.convert.lolcats.format import Lolcats, LolcatsSource, is_lolcats
from lcx.convert.model_source import ModelSource
from lcx.convert.peft import files as peft_files
from lcx.convert.peft import merged
from lcx.convert.peft import settings as peft_settings
from lcx.errors import UserError
from lcx.model import Decoder

SOURCES: dict[str, Callable[[str | os.PathLike], ModelSource]] = {
    "lcx": lcx_folder.LcxSource,
    "hf": hf.HfSource,
    "savanna": savanna.SavannaSource,
    "savanna_legacy": savanna.legacy_source,
    "savanna_fp32": savanna.float32_source,
    "savanna_legacy_fp32": savanna.legacy_float32_source,
    "vortex": vortex.VortexSource,
    "lolcats": LolcatsSource,
}
WRITTEN = ("lcx", "hf", "savanna", "vortex", "lolcats")


def load(
    path: str | os.PathLike,
    *,
    format: str | None = None,
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
      format: one of SOURCES; None finds out from the files. No file tells "savanna_legacy" (projections in blocks a
        rank) from "savanna"; "savanna_fp32" and "savanna_legacy_fp32" take the float32 weights of DeepSpeed's optimizer
        states.
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
    format = checked_format(format, lolcats) or detect(path)
    if format == "lcx" and adapter is None:
        return _load_lcx(path, wanted, mesh, rope_scaling, context_length)
    source = opened(path, format, lolcats)
    source.model = extend.extend_model(source.model, rope_scaling, context_length)
    scaled = rope_scaling is not None or context_length is not None
    source = merged.adapted(source, adapter, scaled=scaled, dtype=wanted)
    model = source.model
    if wanted is not None:
        model = model.clone(dtype=str(wanted), parent=None)
    return model, model_source.to_devices(source, dtype=wanted, mesh=mesh)


def _load_lcx(
    path, dtype: np.dtype | None, mesh, rope_scaling, context_length
) -> tuple[Decoder, dict[str, Any]]:
    """Through Orbax, in parallel and verified; a damaged newest step falls back to the one before."""
    directory, newest = find_step(path)
    only = newest if (pathlib.Path(path).expanduser() / COMMIT_MARKER).exists() else None
    with Checkpointer(directory) as checkpointer:
        step, _, documents = checkpointer.restore({}, step=only)
        model = model_json.from_json(documents["meta"]["model"])
        stored = read_record(directory / str(step)).arrays
        extended = extend.extend_model(
            model, rope_scaling, context_length
        )  # its errors come before the reading
        abstract: dict[str, Any] = {"params": as_stored(model, mesh, directory / str(step))}
        if "lora" in stored:
            abstract["lora"] = _lora_as_stored(mesh, stored["lora"])
        _, items, _ = checkpointer.restore(abstract, step=only)
    params = items["params"]
    if dtype is not None:  # before merging: a wider dtype keeps all of the update
        extended = extended.clone(dtype=str(dtype), parent=None)
        params = jax.tree.map(lambda x: x.astype(dtype), params)
    return extended, _merge(params, items["lora"]) if "lora" in items else params


def as_stored(model: Decoder, mesh, step_folder: Any) -> Any:
    """The model's abstract parameters, in the dtypes that a step has them in."""
    entries = read_record(step_folder).arrays["params"]
    abstract = rules.flatten(model_lib.abstract_params(model, mesh=mesh))
    for path, struct in abstract.items():
        if path in entries:
            dtype = jax.numpy.dtype(entries[path].dtype)
            abstract[path] = jax.ShapeDtypeStruct(struct.shape, dtype, sharding=struct.sharding)
    return rules.unflatten(abstract)


def _lora_as_stored(mesh, entries: Mapping[str, Any]) -> Any:
    sharding = None if mesh is None else jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    return rules.unflatten(
        {
            path: jax.ShapeDtypeStruct(entry.shape, jax.numpy.dtype(entry.dtype), sharding=sharding)
            for path, entry in entries.items()
        }
    )


def _merge(params: Any, lora: Any) -> Any:
    """Parameters with the low-rank pairs in them, each where it was."""
    where = jax.tree.map(lambda leaf: leaf.sharding, params)
    return jax.jit(lora_lib.merge, out_shardings=where)(params, lora)


def save(
    path: str | os.PathLike,
    model: Decoder,
    params: Mapping[str, Any],
    *,
    format: str,
    overwrite: bool = False,
    like: str | os.PathLike | None = None,
    model_parallel: int = 1,
) -> None:
    """Writes a model: a Hugging Face folder ("hf"), a workdir with one step ("lcx"), a folder of "savanna", "vortex" or
    "lolcats".

    The folder appears whole or not at all.

    Args:
      overwrite: whether an existing checkpoint folder may be replaced.
      like: a Hugging Face folder whose tokenizer files and token ids belong to the model, and are copied.
      model_parallel: how many files share the tensors ("savanna").

    Raises:
      UserError: the destination exists or cannot be written; the format cannot hold the model.
    """
    checked_destination(format, model_parallel)
    if jax.process_count() > 1:
        raise UserError("lcx.save runs in one process; let the trainer save, and use python -m lcx.convert")
    extras = hf.Extras({}, [], None)
    if like is not None:
        destination.refuse_same(like, path)
        extras = hf.extras(hub.local(like))
    source = model_source.TreeSource(model, params, extras.carried, extras.side_files, extras.tokenizer)
    write(path, source, format=format, overwrite=overwrite, model_parallel=model_parallel)


def write(
    path: str | os.PathLike,
    source: ModelSource,
    *,
    format: str,
    dtype: np.dtype | None = None,
    overwrite: bool = False,
    max_shard_bytes: int = 5_000_000_000,
    model_parallel: int = 1,
    progress: Callable[[int], None] = lambda nbytes: None,
) -> str:
    """Writes any source into a new folder, reads its metadata back, and returns a line that says what is
    there."""
    needed = planned_bytes(source, format=format, dtype=dtype, model_parallel=model_parallel)
    with destination.replacing(
        path, overwrite=overwrite, needed_bytes=needed, replaceable=is_checkpoint
    ) as folder:
        if format == "hf":
            tensors = hf.write(
                folder, source, dtype=dtype, max_shard_bytes=max_shard_bytes, progress=progress
            )
            found = hf.check_written(folder, tensors)
        elif format == "savanna":
            tensors = savanna.write(
                folder, source, dtype=dtype, model_parallel=model_parallel, progress=progress
            )
            found = savanna.check_written(folder, tensors)
        elif format == "lolcats":
            tensors = lolcats_writer.write(
                folder, source, dtype=dtype, max_shard_bytes=max_shard_bytes, progress=progress
            )
            found = lolcats_writer.check_written(folder, tensors)
        elif format == "vortex":
            found = vortex.check_written(folder, vortex.write(folder, source, dtype=dtype, progress=progress))
        else:
            leaves = lcx_folder.write(folder, source, dtype=dtype, progress=progress)
            found = lcx_folder.check_written(folder, leaves)
    return hf_folder.describe(found)


def planned_bytes(
    source: ModelSource, *, format: str, dtype: np.dtype | None = None, model_parallel: int = 1
) -> int:
    """Size of the tensors to be written.

    Raises:
      UserError: the format cannot hold the model.
    """
    if format == "savanna":
        planned = savanna.planned(source, dtype=dtype, model_parallel=model_parallel)
        return sum(info.nbytes for info in planned.values())
    if format == "vortex":
        return sum(info.nbytes for info in vortex.planned(source, dtype=dtype).values())
    if format == "hf":
        hf.config_of(source, dtype)
    if format == "lolcats":
        lolcats_writer.planned(source, dtype=dtype)
    infos = source.leaves.values()
    return sum(info.nbytes // info.dtype.itemsize * (dtype or info.dtype).itemsize for info in infos)


def checked_format(format: str | None, lolcats: Lolcats | None = None) -> str | None:
    """The format itself, "lolcats" where its files are given. Raises UserError when there is none of this name."""
    if format is not None and format not in SOURCES:
        raise UserError(f"format is {format!r}, expected one of {', '.join(SOURCES)}")
    if not isinstance(lolcats, Lolcats | None):
        raise UserError(
            f"lolcats is {lolcats!r}, expected lcx.Lolcats(feature_maps=..., lora=..., attention=...)"
        )
    if lolcats is not None and format not in (None, "lolcats"):
        raise UserError(
            f"format is {format!r}, expected 'lolcats' with its files: leave the format out, or the files"
        )
    return "lolcats" if lolcats is not None else format


def opened(path: str | os.PathLike, format: str, files: Lolcats | None) -> ModelSource:
    """The model there, in this format. Raises UserError when it cannot be read."""
    path = hub.local(path)
    return LolcatsSource(path, files) if format == "lolcats" else SOURCES[format](path)


def source(path: str | os.PathLike) -> ModelSource:
    """The model there, in whatever format. Raises UserError when it cannot be read."""
    return opened(path, detect(path), None)


def checked_destination(format: str, model_parallel: int = 1) -> str:
    """The format itself. Raises UserError when nothing is written in it, or not in so many files."""
    if format not in WRITTEN:
        raise UserError(f"format is {format!r}, expected one of {', '.join(WRITTEN)}")
    if model_parallel < 1 or (model_parallel > 1 and format != "savanna"):
        expected = (
            "1 or more"
            if format == "savanna"
            else f"1 for {format!r} (files share tensors in 'savanna' alone)"
        )
        raise UserError(f"model_parallel is {model_parallel}, expected {expected}: change it")
    return format


def detect(path: str | os.PathLike) -> str:
    """The format of a folder, from the names of its files (of torch files in it: also from the names of tensors).

    Raises:
      UserError: it is none of the known ones.
    """
    folder = pathlib.Path(hub.local(path)).expanduser()
    if not folder.is_dir():
        if folder.is_file():
            unsupported.check_names(folder, [folder.name])
            unsupported.check_pointer(folder)
        if is_lolcats({folder.name}):
            raise UserError(
                f"{path} lies on a Hugging Face folder: pass that folder, and this file as --feature_maps or --lora"
            )
        if folder.name.endswith(savanna_files.TORCH_SUFFIXES) or savanna_files.PIECE.fullmatch(folder.name):
            return _detect_torch(folder)
        what = "a file, expected the folder it is in" if folder.exists() else "nothing"
        raise UserError(f"no checkpoint at {path}: there is {what}")
    names = {entry.name for entry in folder.iterdir()}
    if is_lolcats(names):
        return "lolcats"
    if peft_files.CONFIG in names and hf_folder.CONFIG not in names:
        base = peft_settings.read(folder).base
        raise UserError(
            f"{path} is a PEFT adapter: pass its base{f', {base!r},' if base else ''} as the model, and this as "
            "--adapter (adapter= in Python)"
        )
    if names & {hf_folder.CONFIG, *hf_folder.WEIGHT_FILES}:
        return "hf"
    if "checkpoints" in names or COMMIT_MARKER in names or any(name.isdecimal() for name in names):
        return "lcx"
    if any(savanna_files.is_part(name) for name in names):
        return _detect_torch(folder)
    unsupported.check_names(folder, sorted(names))
    raise UserError(
        f"no checkpoint at {path}: expected a Hugging Face folder (config.json and weights), an lcx workdir "
        "(checkpoints/) or files of savanna or vortex (.pt), found "
        f"{', '.join(sorted(names)[:6]) or 'an empty folder'}"
    )


def _detect_torch(path: pathlib.Path) -> str:
    return "vortex" if vortex.is_vortex(path) else "savanna"


def tokenizer_record(path: str | os.PathLike) -> Mapping[str, Any] | None:
    """What `Tokenizer.to_json` says of the tokenizer of a checkpoint that has no files for it; None of all others."""
    try:
        format = detect(path)
    except UserError:
        return None
    return SOURCES[format](path).tokenizer if format in ("savanna", "vortex") else None


def is_checkpoint(path: pathlib.Path) -> bool:
    """Whether a folder may be replaced by a checkpoint, because it is one."""
    try:
        format = detect(path)
    except UserError:
        return False
    # one torch file makes no checkpoint of a folder that holds other things too
    return format in ("hf", "lcx", "lolcats") or all(
        savanna_files.is_part(entry.name) for entry in path.iterdir()
    )
