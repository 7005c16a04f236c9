"""`python -m lcx.convert`: a checkpoint from one format to another, streamed."""

import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from lcx import extend, hub, paths
from lcx.convert import api, model_source, verify
from lcx.convert.files import destination
from lcx.convert.lolcats import writer as lolcats_writer
from lcx.convert.lolcats.format import Lolcats
from lcx.convert.peft import adapter as peft
from lcx.convert.peft import merged
from lcx.convert.progress import Progress
from lcx.errors import UserError

_OF_A_RUN = ("peft", "lolcats_files")


def convert(
    *,
    src: str,
    dst: str,
    dst_format: str,
    src_format: str | None = None,
    dtype: str | None = None,
    rope_scaling: dict[str, Any] | None = None,
    context_length: int | None = None,
    overwrite: bool = False,
    max_shard_bytes: int = 5_000_000_000,
    model_parallel: int = 1,
    feature_maps: str | None = None,
    lora: str | None = None,
    attention: str | dict[str, Any] | None = None,
    lora_alpha: float | None = None,
    published_quirks: bool = False,
    adapter: Sequence[str] | None = None,
    base_model: str | None = None,
) -> None:
    """Converts a checkpoint, holding a layer of one parameter in memory at a time.

    Args:
      src, dst: folders; src may be one .pt file, or the name of a model on the Hugging Face hub.
      dst_format: one of api.WRITTEN, or what a run trained without the rest of its model: "peft", a PEFT adapter of its
        low-rank pairs, or "lolcats_files", its feature maps and low-rank pairs.
      src_format: one of api.SOURCES; found out by default.
      dtype: of the written tensors; None as stored.
      rope_scaling, context_length: extend the context, as lcx.load does.
      overwrite: whether a checkpoint at dst may be replaced (after the new one is complete).
      max_shard_bytes: largest safetensors file of the "hf" format.
      model_parallel: how many files share the tensors of the "savanna" format.
      feature_maps, lora, attention, lora_alpha, published_quirks: LoLCATS files on the folder src (`Lolcats`).
      adapter: PEFT adapters of the model at src, merged into it.
      base_model: what a "peft" adapter names as its base; None: what the run started from.

    Raises:
      UserError: whatever is wrong with the source, the destination or the settings.
    """
    target = paths.destination(dst, "--dst")
    source_path = pathlib.Path(hub.local(src)).expanduser()
    if dst_format in _OF_A_RUN:
        changes = {
            "dtype": dtype,
            "rope_scaling": rope_scaling,
            "context_length": context_length,
            "adapter": adapter,
            "lora": lora,
        }
        _write_trained(source_path, target, dst_format, changes, base_model=base_model, overwrite=overwrite)
        return
    if base_model is not None:
        raise UserError(
            f"base_model is what a 'peft' adapter names, and dst_format is {dst_format!r}: leave it out"
        )
    api.checked_destination(dst_format, model_parallel)
    wanted = model_source.parse_dtype(dtype)
    if max_shard_bytes < 1:
        raise UserError(f"max_shard_bytes is {max_shard_bytes}, expected at least 1")
    destination.refuse_same(source_path, target)
    given = (feature_maps, lora, attention, lora_alpha)
    files = None
    if src_format == "lolcats" or published_quirks or any(value is not None for value in given):
        files = Lolcats(*given, published_quirks)
    source = api.opened(source_path, api.checked_format(src_format, files) or api.detect(source_path), files)
    source.model = extend.extend_model(source.model, rope_scaling, context_length)
    scaled = rope_scaling is not None or context_length is not None
    source = merged.adapted(source, adapter, scaled=scaled, dtype=wanted)
    if wanted is not None:
        source.model = source.model.clone(dtype=str(wanted), parent=None)
    total = api.planned_bytes(source, format=dst_format, dtype=wanted, model_parallel=model_parallel)
    with Progress(f"{src} -> {dst}", total) as progress:
        summary = api.write(
            target,
            source,
            format=dst_format,
            dtype=wanted,
            overwrite=overwrite,
            max_shard_bytes=max_shard_bytes,
            model_parallel=model_parallel,
            progress=progress.add,
        )
    print(f"wrote {os.path.realpath(target)} ({dst_format}), read back and checked: {summary}")
    print(verify.verify(source, api.SOURCES[dst_format](target)))


def _write_trained(
    src: pathlib.Path,
    dst: pathlib.Path,
    format: str,
    changes: Mapping[str, Any],
    *,
    base_model: str | None,
    overwrite: bool,
) -> None:
    """What a run trained, without the rest of its model."""
    destination.refuse_same(src, dst)
    if (found := api.detect(src)) != "lcx":
        raise UserError(
            f"{src} holds a model of format {found!r}; {format!r} is written from the workdir of a run that trained "
            "with LoRA: change --src, or --dst_format"
        )
    if given := [name for name, value in changes.items() if value is not None]:
        raise UserError(
            f"{given[0]} does not go with {format!r}, which is what the run trained as it is: leave it out"
        )
    if format == "peft":
        lines = peft.export(src, dst, base_model=base_model, overwrite=overwrite)
        print(f"wrote {os.path.realpath(dst)} (peft), read back: {lines[0]}", *lines[1:], sep="\n")
        print(f"{dst / 'README.md'} says how to load it with transformers and PEFT")
        return
    if base_model is not None:
        raise UserError(
            "base_model is what a 'peft' adapter names, and dst_format is 'lolcats_files': leave it out"
        )
    lolcats_writer.export(src, dst, overwrite=overwrite)
    print(f"wrote {os.path.realpath(dst)}: {', '.join(sorted(p.name for p in dst.iterdir()))}, read back")
