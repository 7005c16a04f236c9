"""Reads a Hugging Face folder and published LoLCATS files as a linear model."""

import dataclasses
import logging
import os
import pathlib
import re
from collections.abc import Mapping

import numpy as np

from lcx import hub
from lcx import model as model_lib
from lcx.convert.core import model_source, rules
from lcx.convert.core.rules import Part, PerHead, Rule, Same
from lcx.convert.files import folders, tensor_io
from lcx.convert.files.tensor_io import TensorInfo, TensorSource
from lcx.convert.files.torch_bin import TorchFile
from lcx.convert.hf import families
from lcx.convert.hf import folder as hf_folder
from lcx.convert.hf.source import HfSource
from lcx.convert.lolcats import settings as lolcats_settings
from lcx.convert.lolcats.files import DISTILL, FINETUNE, Lolcats
from lcx.convert.lolcats.settings import Stated
from lcx.errors import UserError, naming_flags
from lcx.linearize import Linearize, softmax_model
from lcx.mixers.linearized import LinearizedAttention
from lcx.model import Decoder

log = logging.getLogger(__name__)

_KEY = re.compile(r"(?:module\.|base_model\.|model\.)*layers\.(\d+)\.(.+)")
#: Name of the file of a separately trained block of layers; the file numbers layers from 0.
_BLOCK = re.compile(r"-in=(\d+)-out=\d+")
_PAIR = re.compile(r"(.+)\.lora_([AB])(?:\.default)?\.weight")
_MAP = re.compile(r"self_attn\.(feature_map_[qk]\.mlp\.(?:layer|bias)[01]?|window_factors)")
_ALIAS = "self_attn.window_factor"  # a duplicate of window_factors under an older name
#: Parameter of a FeatureMap -> its name in the published files.
_PUBLISHED = {
    "layer": "layer",
    "bias": "bias",
    "layer_0": "layer0",
    "bias_0": "bias0",
    "layer_1": "layer1",
    "bias_1": "bias1",
}


class LolcatsSource(HfSource):
    """A linear model from a Hugging Face folder, feature maps and optional LoRA pairs (a `model_source.ModelSource`).

    Raises:
      UserError: as in HfSource; files that are damaged or of another model, or settings that do not fit them.
    """

    def __init__(self, path: str | os.PathLike, files: Lolcats | None = None):
        files = files or Lolcats()
        paths, beside = _find(pathlib.Path(path).expanduser(), files)
        if not (pathlib.Path(path).expanduser() / hf_folder.CONFIG).exists():
            raise UserError(
                f"{path}: no {hf_folder.CONFIG}, expected the Hugging Face folder of the model that the feature maps "
                "are for: set path (--src) to it, and feature_maps to this"
            )
        super().__init__(path)
        stated = _stated(files, paths[0], beside)
        found = _Files(paths)
        softmax = self.model
        quirks = files.published_quirks or stated.published_quirks
        self.model = _linear_model(softmax, found, stated, quirks, str(path))
        own = map_rules(self.model)
        table = rules.Table(
            [*families.rules(softmax_model(self.model)), *own], model_source.leaf_shapes(self.model)
        )
        found.check(own, table.foreign_shapes, stated)
        pairs = found.pairs(self._tensors.tensors, files.lora_alpha or stated.lora_alpha or beside.lora_alpha)
        self._table, self._tensors = table, _Overlay(self._tensors, found, pairs)
        self.leaves = {
            leaf: TensorInfo(table.leaf_dtype(self._tensors.tensors, leaf), shape, self.where)
            for leaf, shape in table.shapes.items()
        }
        self.model = self.model.clone(dtype=str(model_source.stored_dtype(self.leaves)), parent=None)


def is_map(name: str) -> bool:
    """Whether a tensor with this name belongs to feature maps (X_distill.pt)."""
    found = _KEY.fullmatch(name)
    return found is not None and _MAP.fullmatch(found[2]) is not None


def map_rules(model: Decoder) -> list[Rule]:
    """Rules for the parameters of linear attention that softmax attention does not have: their tensors in X_distill.pt.

    Raises:
      UserError: the model has no linear attention.
    """
    found, shapes = [], model_source.leaf_shapes(model)
    for i, layer in enumerate(model_lib.layers(model)):
        if isinstance(layer.block.mixer, LinearizedAttention):
            for path in shapes:
                name = path.removeprefix(f"{layer.path}/mixer/")
                parts = name.split("/")
                if name == "window_factors":
                    theirs = name
                elif name != path and parts[0].startswith("feature_map_"):
                    theirs = f"{parts[0]}.mlp.{_PUBLISHED[parts[1]]}"
                else:
                    continue
                layout = Same() if "layer" in parts[-1] else PerHead()
                found.append(
                    Rule(f"model.layers.{i}.self_attn.{theirs}", (Part(path, layout, layer.repeat),))
                )
    if not found:
        raise UserError(
            "the model has no linear attention, which the 'lolcats' format is for; save with format 'hf'"
        )
    return found


# ------------------------------------------------------------------------------------------------- reading


@naming_flags("feature_maps")
def _find(folder: pathlib.Path, files: Lolcats) -> tuple[list[pathlib.Path], Stated]:
    """(the files of the feature maps followed by the file of the pairs; the settings found next to them)."""
    maps = folder if files.feature_maps is None else pathlib.Path(hub.local(files.feature_maps)).expanduser()
    lora = None if files.lora is None else pathlib.Path(hub.local(files.lora)).expanduser()
    beside = Stated({}, "")
    if not maps.exists():
        raise UserError(f"no feature maps at {maps}, expected X{DISTILL}: change feature_maps")
    found, folder = [maps], maps if maps.is_dir() else maps.parent
    if (folder / lolcats_settings.FILE).exists():
        beside = lolcats_settings.read(folders.inside(folder, lolcats_settings.FILE))
    if lora is not None and lora.is_dir():
        lora = next(iter(_inside(lora, FINETUNE)), lora)
    if maps.is_dir():
        found = _inside(maps, DISTILL)
        pairs = _inside(maps, FINETUNE) if lora is None else []
        lora = pairs[0] if pairs else lora
        if not found and lora is None:
            raise UserError(f"no feature maps in {maps}, expected X{DISTILL}: set feature_maps")
    paths = found if lora is None else [*found, lora]
    for path in paths:
        if not path.is_file():
            raise UserError(
                f"no file at {path}, expected X{DISTILL} or X{FINETUNE}: change feature_maps or lora"
            )
    return paths, beside


def _inside(folder: pathlib.Path, suffix: str) -> list[pathlib.Path]:
    """The single file with this suffix, or the files of all blocks."""
    found = sorted(path for path in folder.iterdir() if path.name.endswith(suffix))
    if len(found) > 1 and not all(_BLOCK.search(path.name) for path in found):
        what = "feature_maps" if suffix == DISTILL else "lora"
        raise UserError(f"{folder} holds {len(found)} files X{suffix}: set {what} to one of them")
    return [folders.inside(folder, path.name) for path in found]


def _stated(files: Lolcats, maps: pathlib.Path, beside: Stated) -> Stated:
    if files.lora_alpha is not None and not files.lora_alpha > 0:
        raise UserError(f"lora_alpha is {files.lora_alpha!r}, expected a positive number")
    if files.attention is not None:
        return lolcats_settings.read(files.attention)
    if beside.values:
        return beside
    stated = lolcats_settings.of_name(maps)
    if "window_size" not in stated.values:
        log.warning(
            "%s: nothing next to it states its window and activation; assuming the published ones, a terraced window "
            "of %d (if it has factors) and softmax_dim; set attention (--attention=config.yaml) if they were others",
            maps,
            LinearizedAttention.window,
        )
    return stated


@dataclasses.dataclass(frozen=True)
class _Pair:
    A: np.ndarray  # [R, in] float32
    B: np.ndarray  # [out, R] float32
    scale: np.float32


class _Files:
    """The tensors of several files under names without prefixes; for equal names, the last file takes precedence.

    Attributes:
      maps: "model.layers.0.self_attn.window_factors" -> (file, name in the file).
      layers: indices of the layers that have feature maps.
    """

    def __init__(self, paths: list[pathlib.Path]):
        self.maps: dict[str, tuple[TorchFile, str]] = {}
        self._pairs: dict[str, dict[str, tuple[TorchFile, str]]] = {}
        names = [str(path) for path in paths]
        self.where = " and ".join(names if len(names) < 3 else [names[0], f"{len(names) - 1} more"])
        for path in paths:
            file = TorchFile(path, training_state=True)
            for key in file.tensors:
                self._add(path, file, key)
        self.layers = sorted({int(name.split(".")[2]) for name in self.maps})
        if not self.layers:
            raise UserError(
                f"{self.where}: no feature maps, expected model.layers.0.self_attn.feature_map_q..."
            )

    def _add(self, path: pathlib.Path, file: TorchFile, key: str) -> None:
        found, block = _KEY.fullmatch(key), _BLOCK.search(path.name)
        first = int(block[1]) if block else 0
        if found and is_map(key):
            self.maps[f"model.layers.{first + int(found[1])}.{found[2]}"] = file, key
        elif pair := _PAIR.fullmatch(key):
            module = _KEY.fullmatch(pair[1])
            name = f"model.layers.{int(module[1])}.{module[2]}" if module else pair[1]
            self._pairs.setdefault(name, {})[pair[2]] = file, key
        elif not (found and found[2] == _ALIAS):
            raise UserError(
                f"{path}: unexpected tensor {key!r}, expected feature maps, window factors and LoRA pairs alone"
            )

    def info(self, name: str) -> TensorInfo:
        file, key = self.maps[name]
        return file.tensors[key]

    def of_layer(self, layer: int) -> dict[str, tuple[int, ...]]:
        """Name below `self_attn.` -> shape, for the feature map tensors of a layer."""
        prefix = f"model.layers.{layer}.self_attn."
        return {
            name.removeprefix(prefix): self.info(name).shape for name in self.maps if name.startswith(prefix)
        }

    def check(self, own: list[Rule], shapes: Mapping[str, tuple[int, ...]], stated: Stated) -> None:
        """Raises UserError unless the maps are exactly those that the model needs."""
        expected = {rule.name for rule in own}
        missing, extra = (
            [name for name in expected if name not in self.maps],
            sorted(set(self.maps) - expected),
        )
        where = stated.where or "the published settings"
        if missing:
            raise UserError(
                f"{self.where}: {len(missing)} tensors are missing, such as {min(missing)}, required by {where}"
                f"{f' (and {len(extra)} are unexpected, such as {extra[0]})' if extra else ''}: "
                "change attention (softmax_attentions for layers without), or give the whole file"
            )
        if extra:
            raise UserError(
                f"{self.where}: {len(extra)} unexpected tensors, such as {extra[0]}, which {where} have no place for: "
                "change attention (attention_type, tie_qk_kernels, softmax_attentions, learned_kernel_kwargs)"
            )
        for name in sorted(expected):
            if self.info(name).shape != shapes[name]:
                raise UserError(
                    f"{self.where}: {name} is {self.info(name).shape}, expected {shapes[name]}: the file and the "
                    "folder (--src) are of different models, or attention is another's; change one"
                )
            if self.info(name).dtype not in tensor_io.FLOAT_DTYPES.values():
                raise UserError(
                    f"{self.where}: {name} is {self.info(name).dtype}, expected float32 or bfloat16"
                )

    def pairs(self, base: Mapping[str, TensorInfo], alpha: float | None) -> dict[str, _Pair]:
        """Name of a tensor of the folder -> the pair to merge into it."""
        out = {}
        for module, sides in self._pairs.items():
            name = f"{module}.weight"
            if set(sides) != {"A", "B"}:
                raise UserError(
                    f"{self.where}: {module} has lora_{next(iter(sides))} alone, expected both A and B"
                )
            a, b = (file.tensors[key].shape for file, key in (sides["A"], sides["B"]))
            if name not in base:
                raise UserError(
                    f"{self.where}: LoRA pair for {module}, which the folder (--src) lacks; change lora"
                )
            if len(a) != 2 or len(b) != 2 or a[0] != b[1] or (b[0], a[1]) != base[name].shape:
                raise UserError(
                    f"{self.where}: the LoRA pair of {module} is {a} and {b}, which do not fit its weight "
                    f"{base[name].shape}: it belongs to another model; change lora or --src"
                )
            A, B = (file.read(key).astype(np.float32) for file, key in (sides["A"], sides["B"]))
            out[name] = _Pair(A, B, np.float32(2.0 if alpha is None else alpha / a[0]))
        if out and alpha is None:
            log.warning("%s: lora_alpha is not stated; twice the rank, as in all published runs", self.where)
        return out


class _Overlay:
    """The tensors of a folder with the pairs merged, plus the feature maps (a `tensor_io.TensorSource`)."""

    def __init__(self, base: TensorSource, files: _Files, pairs: Mapping[str, _Pair]):
        self._base, self._files, self._pairs = base, files, pairs
        self.tensors = {**base.tensors, **{name: files.info(name) for name in files.maps}}
        self.shared_bytes = base.shared_bytes

    def read(self, name: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        if name in self._files.maps:
            file, key = self._files.maps[name]
            return file.read(key, start, stop)
        rows, pair = self._base.read(name, start, stop), self._pairs.get(name)
        if pair is None:
            return rows
        update = pair.scale * (pair.B[start : start + len(rows)] @ pair.A)
        return (rows.astype(np.float32) + update).astype(rows.dtype)


def _linear_model(softmax: Decoder, files: _Files, stated: Stated, quirks: bool, where: str) -> Decoder:
    """The model that the files and settings describe."""
    first = files.of_layer(files.layers[0])
    adapter = first.get("feature_map_q.mlp.layer0")
    kernel = first.get("feature_map_q.mlp.layer1" if adapter else "feature_map_q.mlp.layer", ())
    inputs, heads = adapter or kernel, softmax.stages[0].pattern[0].mixer
    sizes = heads.num_heads, heads.head_dim
    if len(kernel) != 3 or inputs[:2] != sizes:
        raise UserError(
            f"{files.where}: feature maps are {inputs or 'missing'} in layer {files.layers[0]}, expected "
            f"({sizes[0]}, {sizes[1]}, feature_dim) for the {sizes[0]} heads of {sizes[1]} that {where} has: they "
            "belong to another model; change feature_maps or --src"
        )
    inner = "learned_kernel_kwargs."
    for name, found in (("feature_dim", kernel[2]), ("hidden_dim", adapter[2] if adapter else None)):
        if found is not None and stated.get(inner + name, found) != found:
            raise UserError(
                f"{files.where}: feature maps have {name} {found}, expected {stated.get(inner + name, found)} as "
                f"{stated.where} says; change attention or feature_maps"
            )
    window, kind = lolcats_settings.window_of(stated, has_factors="window_factors" in first)
    has_k = any(name.startswith("feature_map_k.") for name in first)
    linear = Linearize(
        window=window,
        window_kind=kind,
        window_factor=float(stated.get("init_window_factor", LinearizedAttention.window_factor)),
        feature_map=stated.get("feature_map", LinearizedAttention.feature_map),
        feature_dim=kernel[2],
        full_space=stated.get("feature_map_kwargs.fullspace", True),
        feature_bias=stated.get(f"{inner}bias", "feature_map_q.mlp.bias" in first) and not adapter,
        skip=stated.get(f"{inner}skip_connection", False) and not adapter,
        adapter=adapter[2] if adapter else None,
        feature_init=lolcats_settings.start_of(stated),
        tied=stated.get("tie_qk_kernels", not has_k),
        affine=stated.get("affine_attention_factors", False),
        published_quirks=quirks,
        keep_softmax=tuple(stated.get("softmax_attentions", ())),
    )
    return linear.model(softmax)
