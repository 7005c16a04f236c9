"""`python -m lcx.convert`: a checkpoint from one format to another, streamed."""

import os
import pathlib
from typing import Any

from lcx import hub
from lcx.convert import api, destination, lolcats_writer, sources, verify
from lcx.convert.lolcats import Lolcats
from lcx.convert.progress import Progress
from lcx.errors import UserError


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
) -> None:
    """Converts a checkpoint, holding a layer of one parameter in memory at a time.

    Args:
      src, dst: folders; src may be one .pt file, or the name of a model on the Hugging Face hub.
      dst_format: one of api.WRITTEN, or "lolcats_files": the feature maps and low-rank pairs of a run alone.
      src_format: one of api.SOURCES; found out by default.
      dtype: of the written tensors; None as stored.
      rope_scaling, context_length: extend the context, as lcx.load does.
      overwrite: whether a checkpoint at dst may be replaced (after the new one is complete).
      max_shard_bytes: largest safetensors file of the "hf" format.
      model_parallel: how many files share the tensors of the "savanna" format.
      feature_maps, lora, attention, lora_alpha, published_quirks: LoLCATS files on the folder src (`Lolcats`).

    Raises:
      UserError: whatever is wrong with the source, the destination or the settings.
    """
    source_path, target = pathlib.Path(hub.local(src)).expanduser(), pathlib.Path(dst).expanduser()
    if dst_format == "lolcats_files":
        destination.refuse_same(source_path, target)
        if (found := api.detect(source_path)) != "lcx":
            raise UserError(
                f"{src} holds a model of format {found!r}; 'lolcats_files' are written from the workdir of a "
                "linearized run: change --src, or --dst_format"
            )
        lolcats_writer.export(source_path, target, overwrite=overwrite)
        print(
            f"wrote {os.path.realpath(target)}: {', '.join(sorted(p.name for p in target.iterdir()))}, read back"
        )
        return
    api.checked_destination(dst_format, model_parallel)
    wanted = sources.parse_dtype(dtype)
    if max_shard_bytes < 1:
        raise UserError(f"max_shard_bytes is {max_shard_bytes}, expected at least 1")
    destination.refuse_same(source_path, target)
    given = (feature_maps, lora, attention, lora_alpha)
    files = None
    if src_format == "lolcats" or published_quirks or any(value is not None for value in given):
        files = Lolcats(*given, published_quirks)
    source = api.opened(source_path, api.checked_format(src_format, files) or api.detect(source_path), files)
    source.model = sources.extended(source.model, rope_scaling, context_length)
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
