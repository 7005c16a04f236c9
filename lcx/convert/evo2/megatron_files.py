"""Reads Megatron's distributed checkpoints of Evo 2 (bionemo, NeMo, Megatron Bridge) under savanna's tensor names.

    FOLDER/.metadata, *.distcp                            torch_dist (files.torch_dist)
    FOLDER/module.decoder.layers.0.mlp.../.zarray         zarr, of older versions (files.zarr_folder)
    FOLDER/weights/..., FOLDER/iter_0000100/...           where NeMo and Megatron put such a folder

The names are those of bionemo's Hyena model, with and without Transformer Engine. `mlp.linear_fc1` holds w1 above w2.
Rows of projections are ordered as savanna's. The settings that no tensor holds (heads, rotary base) are in the run's
configuration, a YAML file beside the tensors or in context/.
"""

import logging
import os
import pathlib
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from lcx import small_files
from lcx.convert.files import tensor_io
from lcx.convert.files.tensor_io import TensorInfo
from lcx.convert.files.torch_dist import METADATA, TorchDist
from lcx.convert.files.zarr_folder import ARRAY, ZarrFolder
from lcx.errors import UserError
from lcx.rope import Rope
from lcx.rope_fields import shown

log = logging.getLogger(__name__)

_LATEST = "latest_checkpointed_iteration.txt"
_ITERATION = re.compile(r"iter_(\d+)")
_IGNORED = re.compile(r"(?!.*_extra_state)(?:.*optimizer\..*|.*rng_state.*|rerun_state.*|.*\.mixer\.mixer\.filter\.t)")
_EXTRA = re.compile(r"(.*_extra_state)(?:/shard_.*)?")
_LAYER = re.compile(r"decoder\.layers\.(\d+)\.(.+)")
_TOP = {"embedding.word_embeddings.weight": "sequential.0.word_embeddings.weight"}
_FINAL = "decoder.final_norm.weight"
_NAMES = {
    "input_layernorm.weight": (
        *("mixer.dense_projection.layer_norm_weight", "self_attention.linear_qkv.layer_norm_weight"),
        *("norm.weight", "input_layernorm.weight"),
    ),
    "pre_mlp_layernorm.weight": ("mlp.linear_fc1.layer_norm_weight", "pre_mlp_layernorm.weight"),
    "mixer.dense_projection.weight": ("mixer.dense_projection.weight", "self_attention.linear_qkv.weight"),
    "mixer.dense.weight": ("mixer.dense.weight", "self_attention.linear_proj.weight"),
    "mixer.dense.bias": ("mixer.dense.bias", "self_attention.linear_proj.bias"),
    "mlp.w3.weight": ("mlp.linear_fc2.weight",),
    "mixer.dense_projection._extra_state": ("mixer.dense_projection._extra_state",),
}
_SAME = (
    *("mixer.hyena_proj_conv.short_conv_weight", "mixer.mixer.short_conv.short_conv_weight", "mixer.mixer.conv_bias"),
    *(f"mixer.mixer.filter.{name}" for name in ("h", "decay", "p", "gamma", "R")),
)
_SAVANNA = {theirs: ours for ours, names in _NAMES.items() for theirs in names} | {name: name for name in _SAME}
_GATES = "mlp.linear_fc1.weight"
_SETTING = r"^\s*(?:-\s+)?{name}\s*:\s*([\w.+-]+)\s*$"
_SETTINGS = ("num_attention_heads", "kv_channels", "rotary_base", "seq_length")
_CONFIGS = ("run_config.yaml", "model_config.yaml", "../context/model.yaml", "context/model.yaml")


class MegatronFiles:
    """All tensors of a checkpoint under savanna's names, with the attributes of `savanna_files.SavannaFiles`.

    Raises:
      UserError: there is no such checkpoint, it is damaged, or it has other tensors than Evo 2.
    """

    ranks = 1
    shared_bytes = 0
    counters: Mapping[str, int | float] = {}

    def __init__(self, path: str | os.PathLike):
        folder = find(pathlib.Path(path).expanduser())
        if folder is None:
            raise UserError(f"{path}: no .metadata and no zarr arrays of a distributed checkpoint; pass their folder")
        self.where = str(path)
        kind = TorchDist if (folder / METADATA).exists() else ZarrFolder
        self._container = kind(folder, _IGNORED)
        self.found, self.files = [self._container.path], [self]
        self._places: dict[str, tuple[str, int | None]] = {}  # name -> (stored name, which half of its rows)
        self.extra_states: dict[str, str] = {}
        self._name_all()
        self.settings = _settings(folder)
        self.tensors = {name: self._info(*place) for name, place in self._places.items()}
        self.inv_freq = self._frequencies()
        attention = [name for name, place in self._places.items() if "self_attention.linear_qkv.weight" in place[0]]
        self._rotary = [name.replace("dense_projection.weight", "rotary_emb.inv_freq") for name in attention]
        self.tensors |= {
            name: TensorInfo(np.dtype(np.float32), self.inv_freq.shape, self.where) for name in self._rotary
        }

    def _name_all(self) -> None:
        stored = self._container.tensors
        layers = {int(m[1]) for name in stored if (m := _LAYER.fullmatch(_bare(name)))}
        final = f"sequential.{len(layers) + 3}.norm.weight"
        unknown = []
        for name in stored:
            if _EXTRA.fullmatch(name):
                continue
            found = _LAYER.fullmatch(_bare(name))
            ours = (_TOP | {_FINAL: final}).get(_bare(name))
            if found is not None:
                prefix = f"sequential.{int(found[1]) + 2}."
                if found[2] == _GATES:
                    self._places |= {f"{prefix}mlp.w{half + 1}.weight": (name, half) for half in (0, 1)}
                    continue
                ours = prefix + _SAVANNA[found[2]] if found[2] in _SAVANNA else None
            if ours is None:
                unknown.append(name)
            elif ours in self._places:
                raise UserError(f"{self.where}: {name} and {self._places[ours][0]} are the same tensor of the model")
            else:
                self._places[ours] = name, None
        if unknown or not layers:
            listed = ", ".join(map(shown, (unknown or list(stored))[:6])) or "nothing"
            raise UserError(
                f"{self.where}: its tensors are not those of Evo 2 in bionemo; found {listed}, expected names such as "
                "decoder.layers.0.mixer.dense_projection.weight"
            )
        for name in (*self._container.others, *stored):
            state = _EXTRA.fullmatch(_bare(name))
            layer = _LAYER.fullmatch(state[1]) if state else None
            if layer is not None and layer[2] in _SAVANNA:
                self.extra_states[f"sequential.{int(layer[1]) + 2}.{_SAVANNA[layer[2]]}"] = name

    def _info(self, name: str, half: int | None) -> TensorInfo:
        info = self._container.tensors[name]
        if half is None:
            return info
        if not info.shape or info.shape[0] % 2:
            raise UserError(f"{self.where}: {name} is {info.shape}, expected w1 above w2, so an even number of rows")
        return TensorInfo(info.dtype, (info.shape[0] // 2, *info.shape[1:]), info.where)

    def read(self, name: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        if name in self._rotary:
            return self.inv_freq[start:stop]
        stored, half = self._places[name]
        if half is None:
            return self._container.read(stored, start, stop)
        _, first, shape = tensor_io.row_range(self.tensors[name], name, start, stop)
        first += half * self.tensors[name].shape[0]
        return self._container.read(stored, first, first + shape[0])

    def extra_state(self, name: str) -> bytes | None:
        stored = self.extra_states[name]
        if stored in self._container.tensors:
            return self._container.read(stored).tobytes() or None
        return self._container.held_bytes(stored)

    def _frequencies(self) -> np.ndarray:
        """inv_freq [head_dim / 2] as the configuration says, which no tensor holds."""
        width = self.tensors.get("sequential.0.word_embeddings.weight", TensorInfo(np.dtype("f4"), (0, 0))).shape[-1]
        heads = self.settings.get("num_attention_heads")
        head_dim = int(self.settings.get("kv_channels") or (width // heads if heads else 128))
        base = self.settings.get("rotary_base")
        if base is None:
            log.warning(
                "%s: no configuration with rotary_base beside the tensors: 10000 is assumed, and heads of %d; copy "
                "run_config.yaml or context/ too",
                self.where,
                head_dim,
            )
        return np.asarray(Rope(rope_theta=float(base or 1e4)).frequencies(head_dim, 1)[0], np.float32)


def _bare(name: str) -> str:
    """A name without the prefixes that wrappers of the model add."""
    while name.startswith(("module.", "model.")):
        name = name.partition(".")[2]
    return name


def find(path: pathlib.Path) -> pathlib.Path | None:
    """The folder of the tensors: `path`, its weights/, or its newest iteration; None if there is none."""
    if not path.is_dir():
        return None
    for folder in (path, path / "weights"):
        if (folder / METADATA).is_file() or _has_arrays(folder):
            return folder
    steps = {int(m[1]): entry for entry in path.iterdir() if (m := _ITERATION.fullmatch(entry.name))}
    if not steps:
        return None
    try:
        latest = int(small_files.read_text(path / _LATEST)[:100])
    except (OSError, ValueError):
        latest = max(steps)
    if latest not in steps:
        raise UserError(f"{path / _LATEST}: names iteration {latest}, which is not there; pass one iter_N folder")
    return find(steps[latest])


def _has_arrays(folder: pathlib.Path) -> bool:
    if not folder.is_dir():
        return False
    wanted = (entry for entry in folder.iterdir() if _bare(entry.name).startswith(("decoder.", "embedding.")))
    return any((entry / ARRAY).is_file() for entry in wanted)


def _settings(folder: pathlib.Path) -> dict[str, Any]:
    """The settings of the run's configuration that are used here; {} if there is none."""
    for name in _CONFIGS:
        place = folder / name
        if place.is_file() and os.path.getsize(place) <= 1 << 24:
            text = place.read_text("utf-8", "replace")
            found = {key: _value(text, key) for key in _SETTINGS}
            found["factor"] = _value(text, "seq_len_interpolation_factor")
            found["first_only"] = _value(text, "remove_activation_post_first_layer")
            return {key: value for key, value in found.items() if value is not None}
    return {}


def _value(text: str, name: str) -> Any:
    match = re.search(_SETTING.format(name=name), text, re.M)
    if match is None or match[1] in ("null", "None", "~"):
        return None
    if match[1].lower() in ("true", "false"):
        return match[1].lower() == "true"
    try:
        value = float(match[1])
    except ValueError:
        return None
    return int(value) if value.is_integer() and 0 < value < 1 << 40 else value if 0 < value < 1e15 else None
