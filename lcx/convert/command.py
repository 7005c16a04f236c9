"""`python -m lcx.convert`: a checkpoint from one format to another, streamed."""

import functools
import os
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from lcx import extend, hub, paths
from lcx.buckets import copies, is_url
from lcx.convert import api, formats, verify
from lcx.convert.core import model_source
from lcx.convert.core.format import TrainedFormat
from lcx.convert.core.model_source import ModelSource
from lcx.convert.files import destination
from lcx.convert.lolcats.files import Lolcats
from lcx.convert.peft import merged
from lcx.convert.progress import Progress
from lcx.convert.workdir.format import Workdir
from lcx.errors import UserError, by_url, naming
from lcx.multihost.agreement import first_only


def _into_buckets(convert: Callable[..., None]) -> Callable[..., None]:
    """The same for a `dst` in a bucket too: it is written here first, and copied there once it is complete."""

    @functools.wraps(convert)
    def wrapped(*, dst: str, overwrite: bool = False, **settings: Any) -> None:
        if not is_url(dst):
            convert(dst=dst, overwrite=overwrite, **settings)
            return
        with copies.written(dst, setting="--dst", overwrite=overwrite) as folder:
            convert(dst=folder, **settings)
        print(f"copied to {dst}")

    return wrapped


@first_only
@_into_buckets
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
    options: Mapping[str, Any] | None = None,
    feature_maps: str | None = None,
    lora: str | None = None,
    attention: str | dict[str, Any] | None = None,
    lora_alpha: float | None = None,
    published_quirks: bool = False,
    adapter: Sequence[str] | None = None,
) -> None:
    """Converts a checkpoint, holding one layer of one parameter in memory at a time.

    With several processes the first of them converts, and the others wait for it.

    Args:
      src, dst: folders, also in a bucket (gs://, s3://); src may also be one .pt file, or the name of a model on the
        Hugging Face hub.
      dst_format: the name of a writable format in `formats.FORMATS`, or of a `TrainedFormat`, which holds only the
        parameters that a run trained.
      src_format: the name of a readable format in `formats.FORMATS`; detected by default.
      dtype: dtype of the written tensors; None keeps the stored dtypes.
      rope_scaling, context_length: extend the context, as in lcx.load.
      overwrite: whether an existing checkpoint at dst may be replaced (once the new one is complete).
      options: writing options of the destination format (`Format.options`).
      feature_maps, lora, attention, lora_alpha, published_quirks: LoLCATS files for the folder src (`Lolcats`).
      adapter: PEFT adapters for the model at src, merged into it.

    Raises:
      UserError: the source, the destination or a setting is not usable.
    """
    target_path = paths.destination(dst, "--dst")
    with naming({"the path of the checkpoint": "--src"}):
        source_path = pathlib.Path(hub.local(src)).expanduser()
    target = formats.named(dst_format, where="--dst_format")
    if isinstance(target, TrainedFormat):
        configured = formats.configured(target, options or {})
        changes = {
            "dtype": dtype,
            "rope_scaling": rope_scaling,
            "context_length": context_length,
            "adapter": adapter,
            "lora": lora,
        }
        _write_trained(source_path, target_path, configured, changes, overwrite=overwrite)
        return
    target = formats.writer(target, **(options or {}))
    wanted = model_source.parse_dtype(dtype)
    destination.refuse_same(source_path, target_path)
    for name, found in {"adapter": adapter or (), "feature_maps": [feature_maps], "lora": [lora]}.items():
        for path in filter(None, found):
            destination.refuse_same(pathlib.Path(path).expanduser(), target_path, f"--{name}")
    given = (feature_maps, lora, attention, lora_alpha)
    has_files = published_quirks or any(value is not None for value in given)
    files = Lolcats(*given, published_quirks) if has_files else None
    reader = formats.reader(source_path, src_format, files, where="--src_format")

    def write() -> tuple[ModelSource, str]:
        source = reader.open(source_path)
        source.model = extend.extend_model(source.model, rope_scaling, context_length)
        scaled = rope_scaling is not None or context_length is not None
        source = merged.adapted(source, adapter, scaled=scaled, dtype=wanted)
        if wanted is not None:
            source.model = source.model.clone(dtype=str(wanted), parent=None)
        total = target.planned_bytes(source, dtype=wanted)
        with Progress(by_url(f"{src} -> {dst}"), total) as progress:
            return source, api.write(
                target_path, source, format=target, dtype=wanted, overwrite=overwrite, progress=progress.add
            )

    source, summary = reader.read(source_path, write)
    print(f"wrote {by_url(os.path.realpath(target_path))} ({target.name}), read back and checked: {summary}")
    print(verify.verify(source, target, target_path))


def _write_trained(
    src: pathlib.Path,
    dst: pathlib.Path,
    target: TrainedFormat,
    changes: Mapping[str, Any],
    *,
    overwrite: bool,
) -> None:
    """Writes only the parameters that a run trained."""
    destination.refuse_same(src, dst)
    if not isinstance(found := formats.detect(src), Workdir):
        raise UserError(
            f"{src} holds a model of format {found.name!r}; {target.name!r} is written from the workdir of a run that "
            "trained with LoRA: change --src, or --dst_format"
        )
    if given := [f"--{name}" for name, value in changes.items() if value is not None]:
        raise UserError(
            f"{given[0]} cannot be combined with {target.name!r}, which holds the trained parameters unchanged: leave "
            f"out {given[0]}"
        )
    first, *rest = found.read(src, lambda: target.export(src, dst, overwrite=overwrite))
    print(f"wrote {by_url(os.path.realpath(dst))} ({target.name}), {first}", *rest, sep="\n")
