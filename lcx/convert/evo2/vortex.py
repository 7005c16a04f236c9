"""Reads and writes vortex's checkpoints of Evo 2 (inference weights, one file).

vortex stores products whose factors training keeps separate: h * decay of MR, and exp(p + gamma), the decay rates of
LI's modes. The factors cannot be recovered. The model gets a decay of ones and p = log(-log_pole). gamma holds the
float32 rounding error of p, so that the rates are restored bit for bit. The model computes the same function, but
training it further is not equivalent, because savanna trained with the original decay and gamma.

The file does not state how many tokens the model was trained for, nor what positions are divided by: vortex reads both
from its configuration. A `config.json` with its names is written beside the file; it is read again, and so is a
`config.yml` of vortex. Without one, 8192 tokens and undivided positions are assumed.
"""

import functools
import json
import logging
import os
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from lcx.convert.core import model_source, rules
from lcx.convert.core.format import check_same
from lcx.convert.core.model_source import ModelSource
from lcx.convert.evo2 import fp8_states, savanna, savanna_files, striped_hyena, weight_files
from lcx.convert.evo2.striped_hyena import (
    EMBEDDING,
    FEATURIZER,
    FILTER,
    LIVE_TAPS,
    PROJECTION,
    SHORT_FILTER,
    prefix,
)
from lcx.convert.evo2.weight_files import WeightFile
from lcx.convert.files import tensor_io
from lcx.convert.files.tensor_io import TensorInfo
from lcx.convert.files.torch_bin import TorchFile
from lcx.convert.files.torch_writer import TorchWriter
from lcx.errors import UserError
from lcx.mixers.attention import Attention
from lcx.model import Decoder

log = logging.getLogger(__name__)

FILE = "model.pt"
_FP8 = "projections._extra_state"
_TIMES = ("filter.t", "mixer.mixer.filter.t")  # the second is that of the released files
_HEAD, _INV_FREQ = "unembed.weight", "inner_mha_cls.rotary_emb.inv_freq"
_SHARED = {
    "input_layernorm.weight": "pre_norm.scale",
    "pre_mlp_layernorm.weight": "post_norm.scale",
    "mlp.w1.weight": "mlp.l1.weight",
    "mlp.w2.weight": "mlp.l2.weight",
    "mlp.w3.weight": "mlp.l3.weight",
}
_ATTENTION = {
    PROJECTION: "inner_mha_cls.Wqkv.weight",
    "mixer.dense.weight": "inner_mha_cls.out_proj.weight",
    "mixer.dense.bias": "inner_mha_cls.out_proj.bias",
}
_HYENA = {
    PROJECTION: "projections.weight",
    FEATURIZER: "filter.short_filter_weight",
    "mixer.dense.weight": "out_filter_dense.weight",
    "mixer.dense.bias": "out_filter_dense.bias",
}
_FILTERS = {
    "S": {SHORT_FILTER: "filter.h"},
    "D": {FILTER + "h": "filter.h", "mixer.mixer.conv_bias": "filter.D"},
    "H": {FILTER + "R": "filter.residues", "mixer.mixer.conv_bias": "filter.D"},
}
_POLES = "filter.log_poles"
_FLOAT32 = np.dtype(np.float32)
#: vortex's name -> (savanna's name, "" if there is none; shape; the function that computes the tensor)
Makers = dict[str, tuple[str, tuple[int, ...], Callable[[], np.ndarray]]]


def names_of(letter: str) -> dict[str, str]:
    """savanna's name -> vortex's name, for the tensors of a layer that correspond one to one."""
    return _SHARED | (_ATTENTION if letter == "*" else _HYENA | _FILTERS[letter])


class _Canonical:
    """vortex's tensors in the canonical form of striped_hyena.py."""

    layer_0_only = True
    shared_bytes = 0

    def __init__(self, file: WeightFile, fp8: bool | None, config: Mapping[str, Any]):
        self._file = file
        self.length, self.interpolation = weight_files.window_of(config), weight_files.interpolation_of(config)
        self._names = {EMBEDDING: "embedding_layer.weight"}
        self._poles: dict[str, str] = {}
        self.tensors: dict[str, TensorInfo] = {}
        letters = _pattern(file.tensors)
        self._names[striped_hyena.final_norm(len(letters))] = "norm.scale"
        for i, letter in enumerate(letters):
            block = f"blocks.{i}."
            self._names |= {prefix(i) + ours: block + theirs for ours, theirs in names_of(letter).items()}
            if letter == "H":
                self._poles |= {prefix(i) + FILTER + name: block + _POLES for name in ("p", "gamma")}
        for name, theirs in self._names.items():
            if theirs in file.tensors:
                self.tensors[name] = _without_ones(name, file.tensors[theirs])
                if name.endswith(FILTER + "h"):
                    self.tensors[name[:-1] + "decay"] = self.tensors[name]
        for name, theirs in self._poles.items():
            self.tensors[name] = TensorInfo(_FLOAT32, file.tensors[theirs].shape[:2])
        states = {i: f"blocks.{i}.{_FP8}" for i, letter in enumerate(letters) if letter != "*"}
        self.fp8_states = fp8_states.of_layers([file], states, fp8, str(file.path))
        self._scales = striped_hyena.scales_of(self.fp8_states)
        self.tensors |= {name: TensorInfo(pair.dtype, pair.shape) for name, pair in self._scales.items()}
        self.inv_freq = self._frequencies(letters)
        self._refuse_others(letters)

    def read(self, name: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        info = self.tensors[name]
        shape = tensor_io.row_range(info, name, start, stop)[2]
        if name in self._scales:
            return self._scales[name][start:stop]
        if name in self._poles:
            return self._log_rate(name, start, stop).reshape(shape)
        if name not in self._names:  # MR's decay, whose product with h vortex stores as h
            return np.ones(shape, info.dtype)
        return self._file.read(self._names[name], start, stop).reshape(shape)

    def _log_rate(self, name: str, start: int, stop: int | None) -> np.ndarray:
        poles = self._file.read(self._poles[name], start, stop).astype(np.float64)
        if np.any(poles > 0):
            raise UserError(
                f"{self._poles[name]} holds positive numbers, which would grow with time; the file is damaged"
            )
        with np.errstate(divide="ignore", invalid="ignore"):
            exact = np.log(-poles)
            p = exact.astype(np.float32)
            rest = np.where(np.isfinite(p), exact - p, 0)  # p is -inf for a mode that does not decay
        return p if name.endswith(".p") else rest.astype(np.float32)

    def _frequencies(self, letters: str) -> np.ndarray | None:
        names = [f"blocks.{i}.{_INV_FREQ}" for i, letter in enumerate(letters) if letter == "*"]
        stored = [self._file.read(name) for name in names if name in self._file.tensors]
        if any(not np.array_equal(other, stored[0]) for other in stored[1:]):
            raise UserError(f"{self._file.path}: inv_freq is not the same in all layers; the file is damaged")
        return stored[0].astype(np.float32) if stored else None

    def _refuse_others(self, letters: str) -> None:
        known = {*self._names.values(), *self._poles.values(), _HEAD}
        known |= {f"blocks.{i}.{name}" for i in range(len(letters)) for name in (_INV_FREQ, *_TIMES)}
        if unexpected := sorted(set(self._file.tensors) - known):
            raise UserError(f"{len(unexpected)} unexpected tensors: {', '.join(unexpected[:6])}")
        embedding = self._names[EMBEDDING]
        heads = [self._file.read(name).tobytes() for name in (embedding, _HEAD) if name in self._file.tensors]
        if len(set(heads)) > 1:
            log.warning(
                "%s: %s is not the embedding; the model's head is the embedding", self._file.path, _HEAD
            )


def _without_ones(name: str, info: TensorInfo) -> TensorInfo:
    """MR's filters without the singleton axis of torch convolutions."""
    if name.endswith(FILTER + "h") and len(info.shape) == 3:
        return TensorInfo(info.dtype, (info.shape[0], info.shape[2]), info.where)
    return info


def _pattern(names: Mapping[str, TensorInfo]) -> str:
    letters = ""
    while f"blocks.{len(letters)}.mlp.l1.weight" in names:
        block = f"blocks.{len(letters)}."
        if block + _POLES in names:
            letters += "H"
        elif block + "filter.h" in names:
            letters += "D" if block + "filter.D" in names else "S"
        else:
            letters += "*"
    if not letters:
        raise UserError("no blocks.0.mlp.l1.weight, which vortex's checkpoints have")
    return letters


class VortexSource(striped_hyena.StripedHyenaSource):
    """A vortex checkpoint, a file or its folder, as a model (a `model_source.ModelSource`)."""

    def __init__(self, path: str | os.PathLike):
        files = savanna_files.find(path)
        if len(files) > 1:
            raise UserError(f"{path}: expected one file of vortex, found {len(files)}")
        self.file = weight_files.open_file(files[0])
        try:
            fp8 = fp8_states.configured(files[0], self.file.counters)
            canonical = _Canonical(self.file, fp8, weight_files.beside(files[0]))
        except UserError as error:
            raise UserError(f"{path}: {error}") from error
        super().__init__(canonical, str(path))
        if canonical.length is None:
            _say_assumed(str(path), self.model.max_position_embeddings)


@functools.cache
def _say_assumed(path: str, window: int) -> None:
    log.warning(
        "%s: a window of %d tokens is assumed, as vortex's files state none: set another with --context_length, or "
        '{"%s": N} in a %s beside the file',
        path,
        window,
        weight_files.LENGTH,
        weight_files.CONFIG,
    )


def is_vortex(path: str | os.PathLike) -> bool:
    """Whether a file (or the single file of a folder) has vortex's tensor names.

    Raises:
      UserError: it cannot be read.
    """
    files = savanna_files.find(path)
    return len(files) == 1 and "embedding_layer.weight" in weight_files.open_file(files[0]).tensors


# ------------------------------------------------------------------------------------------------- writing


def write(
    folder: pathlib.Path,
    source: ModelSource,
    *,
    dtype: np.dtype | None = None,
    progress: Callable[[int], None] = lambda nbytes: None,
) -> dict[str, TensorInfo]:
    """Writes model.pt and config.json into an empty folder, holding one tensor in memory; returns the written tensors.

    Poles and residues are always float32, as vortex requires; `dtype` applies to the other tensors.
    """
    infos, makers = _plan(source, dtype)
    striped_hyena.say_scaling(source.model)
    _fill(folder / FILE, infos, {theirs: make for theirs, (_, _, make) in makers.items()}, progress)
    (folder / weight_files.CONFIG).write_text(json.dumps(_config(source.model), indent=2) + "\n", "utf-8")
    return infos


def _config(model: Decoder) -> dict[str, Any]:
    """What vortex needs to know and no tensor states, under the names of its configuration."""
    mixers = [layer.block.mixer for layer in striped_hyena.layers(model)]
    ropes = [mixer.rope for mixer in mixers if isinstance(mixer, Attention)]
    factor = ropes[0].factor if ropes else None
    return {
        weight_files.LENGTH: model.max_position_embeddings,
        weight_files.FP8: any(getattr(mixer, "fp8", False) for mixer in mixers),
        weight_files.INTERPOLATED: factor is not None,
        weight_files.FACTOR: factor or 1,
    }


def planned(source: ModelSource, *, dtype: np.dtype | None) -> dict[str, TensorInfo]:
    """The tensors that `write` would write. Raises UserError as `write` does."""
    return _plan(source, dtype)[0]


def _plan(source: ModelSource, dtype: np.dtype | None) -> tuple[dict[str, TensorInfo], Makers]:
    striped_hyena.check_activations(source.model, layer_0_only=True)
    found = striped_hyena.layers(source.model)
    if any(layer.letter == "D" and layer.block.mixer.filter_length < LIVE_TAPS for layer in found):
        raise UserError(f"MR filters of less than {LIVE_TAPS} taps would be taken for SE filters by vortex")
    table = rules.Table(
        striped_hyena.table_of(source.model), {path: i.shape for path, i in source.leaves.items()}
    )
    frequencies = striped_hyena.frequencies_of(source.model)

    def tensor(name: str) -> np.ndarray:
        parts = list(
            table.foreign_parts(name, lambda path, repeat: savanna.read_repeat(source, path, repeat))
        )
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    makers: Makers = {}
    for name, theirs in (
        (EMBEDDING, "embedding_layer.weight"),
        (EMBEDDING, _HEAD),
        (striped_hyena.final_norm(len(found)), "norm.scale"),
    ):
        makers[theirs] = name, table.foreign_shapes[name], _maker(tensor, name)
    for i, layer in enumerate(found):
        makers |= _block_makers(i, layer.letter, table.foreign_shapes, tensor)
        if layer.letter == "*" and frequencies is not None:
            makers[f"blocks.{i}.{_INV_FREQ}"] = "", frequencies.shape, lambda: frequencies
        if layer.letter != "*" and layer.block.mixer.fp8:
            scaling = fp8_states.of_repeat(source, f"{layer.path}/mixer/in_proj", layer.repeat)
            state = np.frombuffer(fp8_states.written(scaling), np.uint8)
            makers[f"blocks.{i}.{_FP8}"] = "", state.shape, functools.partial(np.copy, state)
    infos = {}
    for theirs, (name, shape, _) in makers.items():
        if theirs.endswith(_FP8):
            infos[theirs] = TensorInfo(np.dtype(np.uint8), shape)
            continue
        fixed = not name or theirs.endswith((_POLES, "filter.residues"))
        infos[theirs] = TensorInfo(
            _FLOAT32 if fixed else dtype or table.foreign_dtype(source.leaves, name), shape
        )
    return infos, makers


def _fill(
    path: pathlib.Path,
    infos: Mapping[str, TensorInfo],
    makers: Mapping[str, Callable[[], np.ndarray]],
    progress: Callable[[int], None],
) -> None:
    writer = TorchWriter(path, infos)
    try:
        for name, info in infos.items():
            values = model_source.cast(makers[name](), info.dtype, name).reshape(info.shape)
            writer.write(name, 0, values)
            progress(values.nbytes)
        writer.finish()
    finally:
        writer.close()


def _maker(tensor: Callable[[str], np.ndarray], name: str) -> Callable[[], np.ndarray]:
    return lambda: tensor(name)


def _block_makers(
    i: int, letter: str, shapes: Mapping[str, tuple[int, ...]], tensor: Callable[[str], np.ndarray]
) -> Makers:
    head, block = prefix(i), f"blocks.{i}."

    def taps() -> np.ndarray:
        return tensor(f"{head}{FILTER}h").astype(_FLOAT32) * tensor(f"{head}{FILTER}decay").astype(_FLOAT32)

    def poles() -> np.ndarray:
        log_rate = tensor(f"{head}{FILTER}p").astype(np.float64) + tensor(f"{head}{FILTER}gamma")
        return -np.exp(log_rate).astype(np.float32)

    makers: Makers = {}
    for ours, theirs in names_of(letter).items():
        name, shape = head + ours, shapes[head + ours]
        if (letter, theirs) == ("D", "filter.h"):
            makers[block + theirs] = name, (shape[0], 1, shape[1]), taps
        else:
            makers[block + theirs] = name, shape, _maker(tensor, name)
    if letter == "H":
        name = f"{head}{FILTER}p"
        makers[block + _POLES] = name, (*shapes[name], 1), poles
    return makers


def check_written(folder: pathlib.Path, tensors: Mapping[str, TensorInfo]) -> dict[str, TensorInfo]:
    """The written tensors, read back from the headers. Raises UserError unless they match `tensors`."""
    found = TorchFile(folder / FILE, training_state=True).tensors
    check_same(folder, found, weight_files.without_extra_states(tensors))
    return dict(found)
