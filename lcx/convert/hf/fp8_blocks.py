"""Reads weights in FP8 with a scale for each block, as DeepSeek V3 is published, as bfloat16.

A stored matrix [out, in] of float8_e4m3fn has beside it, under its name with _scale_inv added, a float32 matrix with a
factor for each block of 128 x 128 numbers, the last ones of a row or column being smaller. A number is the product,
rounded to bfloat16 (DeepSeek-V3, arXiv 2412.19437, section 3.3, and fp8_cast_bf16.py of its repository).
"""

import dataclasses
import functools
from collections.abc import Mapping

import ml_dtypes
import numpy as np

from lcx.convert.files.tensor_io import TensorInfo, TensorSource
from lcx.errors import UserError
from lcx.rope_fields import shown

_SCALES = "_scale_inv"
_STORED, _DTYPE = np.dtype(ml_dtypes.float8_e4m3fn), np.dtype(ml_dtypes.bfloat16)


@dataclasses.dataclass(frozen=True)
class Unpacked:
    """A checkpoint whose FP8 matrices appear in bfloat16, without their scales (a `TensorSource`).

    Attributes:
      block: rows and columns of a block.

    Raises:
      UserError: at construction, for a matrix without scales, or scales that do not fit.
    """

    source: TensorSource
    block: tuple[int, int]

    def __post_init__(self):
        for name, info in self.source.tensors.items():
            if info.dtype == _STORED:
                self._check(name, info)

    @functools.cached_property
    def tensors(self) -> dict[str, TensorInfo]:
        stored = self.source.tensors
        return {
            name: dataclasses.replace(info, dtype=_DTYPE) if info.dtype == _STORED else info
            for name, info in stored.items()
            if not (name.endswith(_SCALES) and name.removesuffix(_SCALES) in stored)
        }

    @property
    def shared_bytes(self) -> int:
        return self.source.shared_bytes

    def _check(self, name: str, info: TensorInfo) -> None:
        scales = self.source.tensors.get(name + _SCALES)
        expected = tuple(-(-size // step) for size, step in zip(info.shape, self.block, strict=False))
        fits = scales is not None and scales.shape == expected and scales.dtype == np.dtype(np.float32)
        if len(info.shape) != 2 or not fits:
            found = "none" if scales is None else f"{scales.dtype} {scales.shape}"
            raise UserError(
                f"{shown(name)} is FP8 {info.shape} with scales {found}, expected a matrix with float32 {expected}, "
                f"one for each block of {self.block[0]} x {self.block[1]}: download the file again"
            )

    def read(self, name: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        rows = self.source.read(name, start, stop)
        if rows.dtype != _STORED:
            return rows
        high, wide = self.block
        scales = self.source.read(name + _SCALES)
        of_rows = scales[np.arange(start, start + len(rows)) // high]
        factors = np.repeat(of_rows, wide, axis=1)[:, : rows.shape[1]]
        return (rows.astype(np.float32) * factors).astype(_DTYPE)


def unpacked(source: TensorSource, config: Mapping[str, object]) -> TensorSource:
    """The source with FP8 matrices in bfloat16, if config.json says that there are any.

    Raises:
      UserError: another form of FP8 than that of blocks.
    """
    given = config.get("quantization_config")
    if not isinstance(given, Mapping) or given.get("quant_method") != "fp8":
        return source
    block = given.get("weight_block_size")
    sizes = block if isinstance(block, list) and all(type(n) is int and n > 0 for n in block) else []
    if len(sizes) != 2 or given.get("fmt", "e4m3") != "e4m3":
        raise UserError(
            f"config.json has quantization_config {shown(dict(given), 120)}, expected weight_block_size [rows, "
            "columns] and fmt 'e4m3', as in DeepSeek-V3: write the weights in 16 bits first"
        )
    return Unpacked(source, (sizes[0], sizes[1]))
