"""Writes models with linear attention as published LoLCATS files; `lolcats.files` describes their contents.

Either a complete folder, with low-rank pairs merged, or only the files that a LoRA run adds to the softmax model's
folder:

    python -m lcx.convert --src=path/to/workdir --dst=path --dst_format=lolcats
    python -m lcx.convert --src=path/to/workdir --dst=path --dst_format=lolcats_files

In Python, use `lcx.save(..., format="lolcats")` and `export`; `save` writes the files from memory.
"""

import os
import pathlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from lcx import model as model_lib
from lcx.convert.core import model_source, rules
from lcx.convert.core.format import check_same
from lcx.convert.core.model_source import ModelSource
from lcx.convert.files import destination, folders
from lcx.convert.files.tensor_io import TensorInfo
from lcx.convert.files.torch_bin import TorchFile
from lcx.convert.files.torch_writer import TorchWriter
from lcx.convert.hf import folder as hf_folder
from lcx.convert.hf import writer as hf_writer
from lcx.convert.lolcats import settings as lolcats_settings
from lcx.convert.lolcats.files import DISTILL, FINETUNE
from lcx.convert.lolcats.source import is_map, map_rules
from lcx.convert.peft import adapter as peft
from lcx.convert.peft.files import PREFIX, LowRank
from lcx.convert.workdir.source import LcxSource, step_folder, stored_pairs, trained
from lcx.errors import UserError
from lcx.linearize import softmax_model
from lcx.mixers.linearized import LinearizedAttention
from lcx.model import Decoder

NAME = "model"
_WRAPPER = "model_state_dict"


class _Softmax:
    """The softmax part of a linear model (a `model_source.ModelSource`)."""

    def __init__(self, source: ModelSource):
        self._source, self.model, self.where = source, softmax_model(source.model), source.where
        own = {rule.parts[0].path for rule in map_rules(source.model)}
        self.leaves = {path: info for path, info in source.leaves.items() if path not in own}
        self.carried, self.side_files, self.tokenizer = source.carried, source.side_files, source.tokenizer

    def read(self, path: str, index: rules.Index) -> np.ndarray:
        return self._source.read(path, index)


def planned(source: ModelSource, *, dtype: np.dtype | None) -> dict[str, TensorInfo]:
    """The tensors of the feature map file. Raises UserError if the model cannot be written in this format."""
    hf_writer.config_of(_Softmax(source), dtype)
    _settings(source.model, None)
    table = _map_table(source)
    return {
        name: TensorInfo(dtype or table.foreign_dtype(source.leaves, name), shape)
        for name, shape in table.foreign_shapes.items()
    }


def write(
    folder: pathlib.Path,
    source: ModelSource,
    *,
    dtype: np.dtype | None = None,
    max_shard_bytes: int = 5_000_000_000,
    progress: Callable[[int], None] = lambda nbytes: None,
) -> dict[str, TensorInfo]:
    """Writes the model into an empty folder, holding one piece of one tensor in memory; returns the written tensors.

    Raises:
      UserError: the model has no linear attention, or its layers differ in their settings.
    """
    tensors = hf_writer.write(
        folder, _Softmax(source), dtype=dtype, max_shard_bytes=max_shard_bytes, progress=progress
    )
    maps = write_maps(folder / f"{NAME}{DISTILL}", source, dtype=dtype, progress=progress)
    folders.write_json(folder / lolcats_settings.FILE, _settings(source.model, None))
    return tensors | maps


def write_maps(
    path: pathlib.Path,
    source: ModelSource,
    *,
    dtype: np.dtype | None = None,
    progress: Callable[[int], None] = lambda nbytes: None,
) -> dict[str, TensorInfo]:
    """Writes X_distill.pt; returns its tensors."""
    table, infos = _map_table(source), planned(source, dtype=dtype)

    def read(leaf: str, repeat: int | None) -> np.ndarray:
        rest = (slice(0, size) for size in source.leaves[leaf].shape[1:])
        return source.read(leaf, (slice(repeat, (repeat or 0) + 1), *rest))[0]

    def tensor(name: str) -> np.ndarray:
        return model_source.cast(next(iter(table.foreign_parts(name, read))), infos[name].dtype, name)

    write_tensors(path, infos, tensor, progress)
    return infos


def write_tensors(
    path: pathlib.Path,
    infos: Mapping[str, TensorInfo],
    tensor: Callable[[str], np.ndarray],
    progress: Callable[[int], None] = lambda nbytes: None,
) -> None:
    """Writes a file in the layout of the published code, holding one tensor in memory."""
    writer = TorchWriter(path, infos, under=_WRAPPER, beside={"step": 0})
    try:
        for name in infos:
            values = tensor(name)
            writer.write(name, 0, values)
            progress(values.nbytes)
        writer.finish()
    finally:
        writer.close()


def check_written(folder: pathlib.Path, tensors: Mapping[str, TensorInfo]) -> dict[str, TensorInfo]:
    """The tensors of a written folder, read back from the headers. Raises UserError unless they match `tensors`."""
    own = {name: info for name, info in tensors.items() if is_map(name)}
    _check(folder / f"{NAME}{DISTILL}", own)
    hf_writer.check_written(folder, {name: info for name, info in tensors.items() if name not in own})
    return dict(tensors)


def _check(path: pathlib.Path, tensors: Mapping[str, TensorInfo]) -> None:
    check_same(path.parent, TorchFile(path).tensors, tensors)


def _map_table(source: ModelSource) -> rules.Table:
    own = map_rules(source.model)
    paths = {rule.parts[0].path for rule in own}
    return rules.Table(own, {path: source.leaves[path].shape for path in paths})


def _settings(model: Decoder, lora: Mapping[str, Any] | None) -> dict[str, Any]:
    """lolcats.json. Raises UserError if layers differ in a setting that it states once for all."""
    mixers = [layer.block.mixer for layer in model_lib.layers(model)]
    kept = [i for i, mixer in enumerate(mixers) if not isinstance(mixer, LinearizedAttention)]
    different = {_stated_of(mixer): mixer for mixer in mixers if isinstance(mixer, LinearizedAttention)}
    if len(different) > 1:
        raise UserError(
            f"the linear attentions have {len(different)} different settings, expected one for all; save with 'lcx'"
        )
    return lolcats_settings.to_json(next(iter(different.values())), kept, lora)


def _stated_of(mixer: LinearizedAttention) -> LinearizedAttention:
    return mixer.clone(softmax_window=None, rope=LinearizedAttention.rope, implementation=None, parent=None)


# --------------------------------------------------------------------------- the two files without a model


def save(
    path: str | os.PathLike,
    model: Decoder,
    params: Mapping[str, Any],
    lora: Mapping[str, Any] | None = None,
    *,
    overwrite: bool = False,
) -> None:
    """Writes a folder with model_distill.pt, model_ft.pt (if there are pairs) and lolcats.json, without the model.

    Raises:
      UserError: the model has no linear attention, the pairs differ in rank or scale, or the destination cannot be
        written.
    """
    _save(path, model_source.TreeSource(model, params), lora, overwrite)


def export(checkpoint: str | os.PathLike, path: str | os.PathLike, *, overwrite: bool = False) -> None:
    """Like `save`, from the checkpoint of a training run (a workdir, or one of its steps).

    Raises:
      UserError: there is no checkpoint, a trained parameter has no place in these files, or as in `save`.
    """
    source = LcxSource(checkpoint, merge=False)
    own = {rule.parts[0].path for rule in map_rules(source.model)}
    lost = [path for path in trained(step_folder(checkpoint)) or [] if path not in own]
    if lost:
        raise UserError(
            f"{checkpoint}: {len(lost)} parameters trained that are neither feature maps nor low-rank pairs, such as "
            f"{lost[0]}, and these files have no place for them: write the whole model (--dst_format=lolcats)"
        )
    _save(path, source, stored_pairs(checkpoint), overwrite)


def _save(path, source: ModelSource, lora: Mapping[str, Any] | None, overwrite: bool) -> None:
    pairs = {} if lora is None else peft.module_pairs(lora, peft.modules(source.model))
    needed = sum(info.nbytes for info in planned(source, dtype=None).values())
    needed += sum(pair.A.nbytes + pair.B.nbytes for pair in pairs.values())
    with destination.replacing(
        path, overwrite=overwrite, needed_bytes=needed, replaceable=_is_ours
    ) as folder:
        _check(folder / f"{NAME}{DISTILL}", write_maps(folder / f"{NAME}{DISTILL}", source))
        if pairs:
            arrays = dict(_arrays(pairs))
            infos = {name: TensorInfo(array.dtype, array.shape) for name, array in arrays.items()}
            write_tensors(folder / f"{NAME}{FINETUNE}", infos, arrays.__getitem__)
            _check(folder / f"{NAME}{FINETUNE}", infos)
        settings = _settings(source.model, _lora_settings(pairs) if pairs else None)
        folders.write_json(folder / lolcats_settings.FILE, settings)


def _arrays(pairs: Mapping[str, LowRank]) -> Iterator[tuple[str, np.ndarray]]:
    for module, pair in pairs.items():
        yield f"{PREFIX}{module}.lora_A.default.weight", pair.A
        yield f"{PREFIX}{module}.lora_B.default.weight", pair.B


def _lora_settings(pairs: Mapping[str, LowRank]) -> dict[str, Any]:
    """r, lora_alpha and target_modules, which the published settings state once for all pairs."""
    found = {(len(pair.A), np.float32(pair.scale)) for pair in pairs.values()}
    if len(found) > 1:
        raise UserError(
            f"the low-rank pairs have {len(found)} ranks or scales, expected one for all; merge them"
        )
    rank, scale = found.pop()
    names = sorted({".".join(name.split(".")[-2:]) for name in pairs})
    return {"r": rank, "lora_alpha": peft.number(float(scale) * rank), "target_modules": names}


def _is_ours(folder: pathlib.Path) -> bool:
    return (folder / lolcats_settings.FILE).is_file() and not (folder / hf_folder.CONFIG).exists()
