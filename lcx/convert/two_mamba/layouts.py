"""The tensors of each published mixer, and the layouts that only they have.

model.layers.{i}.self_attn. of most attention types      of "softmax"               of "mamba", below mamba_layer.
  A_log [N], D [N, H]                                      rotary_emb.freqs [H/2]     dt_bias [1], A_log [1], D [H]
  qkv_proj.weight [3 N H, D], rows q | k | v               qkv_proj.weight            in_proj.weight, rows
  o_proj.weight [D, N H]                                   o_proj.weight                gate | up | z | x | B | C | dt
  A_mask_proj.weight [N, D]                                                           conv1d.weight, rows x | B | C
  conv1d.weight [3 N H, 1, K], .bias [3 N H]                                          norm.weight [H]
  dt_proj.weight [N, D]                                                               out_proj.weight [D, D],
  z_gate_proj.weight [N H, D], .bias [N H]                                              columns of the MLP | of the SSM
  out_norm.weight [N H]
  attn_mask, bool [1, 1, L, L]: a buffer, dropped here

The order is that in which the published modules register them, which is the order of the optimizer's state.
"""

import dataclasses
from typing import Any

import numpy as np

from lcx.convert.core.rules import Flat, Index, Part, Rule, Same, Shape, Taps, Transposed, transpose
from lcx.convert.files.tensor_io import TensorInfo, TensorSource, row_range
from lcx.mixers.attention import Attention
from lcx.mixers.mamba2 import Mamba2

#: Tensors that concatenate columns. The rules see their transposes, which concatenate rows.
TURNED = ".mamba_layer.out_proj.weight"
_OUT = ("out_proj.weight", "down_proj", "out_proj")
_MAMBA_IN = ("gate_proj", "up_proj", "z_proj", "x_proj", "b_proj", "c_proj", "dt_proj")


@dataclasses.dataclass(frozen=True)
class AdjacentPairs(Transposed):
    """A projection [D, N, H] of q or k: the published code rotates neighbours (2m, 2m + 1), ours (m, m + H/2)."""

    def to_foreign(self, array: np.ndarray) -> np.ndarray:
        embed, heads, size = array.shape
        halves = array.reshape(embed, heads, 2, size // 2)
        return super().to_foreign(np.ascontiguousarray(halves.swapaxes(2, 3)).reshape(array.shape))

    def to_lcx(self, rows: np.ndarray, shape: Shape) -> np.ndarray:
        embed, heads, size = shape
        pairs = super().to_lcx(rows, shape).reshape(embed, heads, size // 2, 2)
        return np.ascontiguousarray(pairs.swapaxes(2, 3)).reshape(shape)


@dataclasses.dataclass(frozen=True)
class Rows:
    """A transposed linear map: [in..., D] in lcx, [in, D] in the (turned) foreign tensor."""

    def foreign_shape(self, shape: Shape) -> Shape:
        return int(np.prod(shape[:-1])), shape[-1]

    def to_foreign(self, array: np.ndarray) -> np.ndarray:
        return array.reshape(self.foreign_shape(array.shape))

    def to_lcx(self, rows: np.ndarray, shape: Shape) -> np.ndarray:
        return rows.reshape(shape)

    def rows(self, shape: Shape, index: Index) -> tuple[int, int, Shape, Index]:
        start, stop, _ = index[0].indices(shape[0])
        inner = int(np.prod(shape[1:-1]))
        return start * inner, stop * inner, (stop - start, *shape[1:]), (slice(None), *index[1:])


class Turned:
    """A checkpoint with the tensors `TURNED` transposed (a `TensorSource`)."""

    def __init__(self, source: TensorSource):
        self._source = source
        self.tensors = {name: turned(name, info) for name, info in source.tensors.items()}

    @property
    def shared_bytes(self) -> int:
        return self._source.shared_bytes

    def read(self, name: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        if not name.endswith(TURNED):
            return self._source.read(name, start, stop)
        row_range(self.tensors[name], name, start, stop)
        return transpose(self._source.read(name))[start:stop]


def turned(name: str, info: TensorInfo) -> TensorInfo:
    """The tensor as the rules see it, or, from there, as it is stored."""
    if name.endswith(TURNED) and len(info.shape) == 2:
        return dataclasses.replace(info, shape=info.shape[::-1])
    return info


def rules(mixer: Any, path: str, prefix: str, repeat: int) -> list[Rule]:
    """The rules of one layer's mixer.

    Args:
      mixer: as `two_mamba.published` builds it.
      path: of its parameters, "stages_0/block_0/mixer".
      prefix: of its tensors, "model.layers.0.self_attn.".
      repeat: the layer's row in its stacked parameters.
    """
    made = {Attention: _softmax, Mamba2: _mamba}.get(type(mixer), _two_mamba)(mixer)
    return [
        Rule(prefix + name, tuple(Part(f"{path}/{ours}", layout, repeat) for ours, layout in parts))
        for name, *parts in made
    ]


def _two_mamba(mixer: Any) -> list[tuple]:
    present = {
        "A_log": mixer.decay == "discretize",
        "D": mixer.residual,
        "A_mask_proj": mixer.decay == "softplus",
        "conv1d": mixer.conv_width > 1,
        "dt_proj": mixer.value_step or mixer.decay == "discretize",
        "z_gate_proj": mixer.gate,
        "out_norm": mixer.norm == "output",
    }
    table: list[tuple] = [
        ("A_log", ("A_log", Same())),
        ("D", ("D", Same())),
        ("qkv_proj.weight", ("qkv_proj/kernel", Transposed())),
        ("o_proj.weight", ("o_proj/kernel", Transposed(2))),
        ("A_mask_proj.weight", ("forget_proj/kernel", Transposed())),
        ("conv1d.weight", ("conv_kernel", Taps())),
        ("conv1d.bias", ("conv_bias", Flat())),
        ("dt_proj.weight", ("dt_proj/kernel", Transposed())),
        ("z_gate_proj.weight", ("gate_proj/kernel", Transposed())),
        ("z_gate_proj.bias", ("gate_proj/bias", Flat())),
        ("out_norm.weight", ("out_norm/scale", Same())),
    ]
    return [row for row in table if present.get(row[0].partition(".")[0], True)]


def _softmax(mixer: Any) -> list[tuple]:
    q, k = (f"{name}_proj/kernel" for name in "qk")
    qkv = ((q, AdjacentPairs()), (k, AdjacentPairs()), ("v_proj/kernel", Transposed()))
    return [("qkv_proj.weight", *qkv), ("o_proj.weight", ("o_proj/kernel", Transposed(2)))]


def _mamba(mixer: Any) -> list[tuple]:
    table: list[tuple] = [
        ("dt_bias", ("dt_bias", Same())),
        ("A_log", ("A_log", Same())),
        ("D", ("D", Flat())),
        ("in_proj.weight", *((f"{name}/kernel", Transposed()) for name in _MAMBA_IN)),
        ("conv1d.weight", *((f"{name}_conv", Taps()) for name in "xbc")),
        ("norm.weight", ("norm", Flat())),
        (_OUT[0], *((f"{name}/kernel", Rows()) for name in _OUT[1:])),
    ]
    return [(f"mamba_layer.{name}", *parts) for name, *parts in table]
