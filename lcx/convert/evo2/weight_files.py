"""The files that Evo 2's weights come in: torch files, whole or in pieces, and safetensors, one file or several."""

import dataclasses
import json
import math
import os
import pathlib
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from lcx import small_files
from lcx.convert.files import tensor_io
from lcx.convert.files.safetensors import SafetensorsFile
from lcx.convert.files.tensor_io import TensorInfo
from lcx.convert.files.torch_bin import TorchFile
from lcx.errors import UserError

SAFETENSORS = ".safetensors"
CONFIGS = ("config.json", "config.yml", "config.yaml")
EXTRA_STATE = "_extra_state"
CONFIG = CONFIGS[0]  # the one that is written
# The settings that no tensor states, under vortex's names.
FP8, LENGTH = "use_fp8_input_projections", "max_seqlen"
INTERPOLATED, FACTOR = "use_interpolated_rotary_pos_emb", "rotary_emb_scaling_factor"
_NUMBER = r"(?:0|[1-9]\d*)(?:\.\d+)?(?:e[+-]?\d+)?"
_YAML = re.compile(
    rf"^\s*({FP8}|{LENGTH}|{INTERPOLATED}|{FACTOR})\s*:\s*(true|false|{_NUMBER})\s*(?:#.*)?$", re.I | re.M
)


@dataclasses.dataclass(frozen=True)
class Shards:
    """The safetensors files of one model."""

    paths: tuple[pathlib.Path, ...]

    @property
    def name(self) -> str:
        return self.paths[0].name

    @property
    def parent(self) -> pathlib.Path:
        return self.paths[0].parent

    def __str__(self) -> str:
        return str(self.paths[0]) if len(self.paths) == 1 else f"{self.paths[0]} and {len(self.paths) - 1} more"


Found = pathlib.Path | tensor_io.Pieces | Shards


class SafetensorsShards:
    """The tensors of several safetensors files, as a TorchFile has them.

    Raises:
      UserError: at construction, if a file is damaged or a tensor is in two of them.
    """

    shared_bytes = 0

    def __init__(self, shards: Shards):
        self.path = shards
        self.counters: dict[str, int | float] = {}
        self.param_shapes: list[dict[str, tuple[int, ...]]] = []
        self._files: dict[str, SafetensorsFile] = {}
        for path in shards.paths:
            file = SafetensorsFile(path)
            if twice := sorted(file.tensors.keys() & self._files.keys()):
                raise UserError(f"{path}: {twice[0]} is in another file, too; the files are not of one model")
            self._files |= dict.fromkeys(file.tensors, file)
        self.extra_states = [name for name in self._files if name.endswith(EXTRA_STATE)]
        self.tensors: dict[str, TensorInfo] = {
            name: file.tensors[name] for name, file in self._files.items() if not name.endswith(EXTRA_STATE)
        }

    def read(self, name: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        return self._files[name].read(name, start, stop)

    def extra_state(self, name: str) -> bytes | None:
        return self._files[name].read(name).tobytes() or None


WeightFile = TorchFile | SafetensorsShards


def open_file(found: Found) -> WeightFile:
    """Opens a file of weights. Raises UserError if it is damaged or holds anything but tensors."""
    return SafetensorsShards(found) if isinstance(found, Shards) else TorchFile(found, training_state=True)


def shards_of(path: pathlib.Path) -> Shards | None:
    """The safetensors at `path`, a file or a folder; None if there are none."""
    if path.is_file():
        return Shards((path,)) if path.name.endswith(SAFETENSORS) else None
    files = sorted(entry for entry in path.iterdir() if entry.name.endswith(SAFETENSORS))
    _check_complete(path, files)
    return Shards(tuple(files)) if files else None


def _check_complete(folder: pathlib.Path, files: list[pathlib.Path]) -> None:
    """Raises UserError if the index of the folder names a file that is missing."""
    for index in folder.glob(f"*{SAFETENSORS}.index.json"):
        try:
            wanted = set(json.loads(small_files.read_text(index))["weight_map"].values())
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise UserError(f"{index}: is not an index of safetensors files; copy it again") from error
        if missing := sorted(map(str, wanted - {file.name for file in files})):
            raise UserError(f"{folder}: {missing[0][:200]} of {index.name} is missing; copy it too")


def without_extra_states(tensors: Mapping[str, TensorInfo]) -> dict[str, TensorInfo]:
    return {name: info for name, info in tensors.items() if not name.endswith(EXTRA_STATE)}


def beside(found: Found) -> Mapping[str, Any]:
    """The model's configuration in a file next to the weights, as far as it is used here; {} if there is none.

    vortex keeps it in YAML, its repositories on the hub also in config.json.
    """
    folder = found.paths[0].parent if isinstance(found, tensor_io.Pieces | Shards) else found.parent
    for name in CONFIGS:
        place = folder / name
        if not place.is_file() or os.path.getsize(place) > 1 << 20:
            continue
        text = place.read_text("utf-8", "replace")
        if name.endswith("json"):
            try:
                config = json.loads(text)
            except (ValueError, RecursionError):
                continue
            if isinstance(config, dict):
                return config
        elif lines := _YAML.findall(text):
            return {key.lower(): json.loads(value.lower()) for key, value in lines}
    return {}


def window_of(config: Mapping[str, Any]) -> int | None:
    """The tokens that a configuration says the model was trained for; None if it does not say."""
    value = config.get(LENGTH)
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else None


def interpolation_of(config: Mapping[str, Any]) -> float | None:
    """What a configuration divides positions by; None if it does not."""
    value = config.get(FACTOR)
    if config.get(INTERPOLATED) is not True or isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if math.isfinite(value) and value > 1 else None


def wants_fp8(config: Mapping[str, Any]) -> bool | None:
    """Whether a configuration sets FP8 input projections; None if it does not say."""
    value = config.get(FP8)
    return bool(value) if isinstance(value, bool | int) else None
