"""Reads weights in MXFP4 (Open Compute Project, Microscaling Formats 1.0), as gpt-oss is published, as bfloat16.

A stored tensor [..., G, 16] of bytes holds G blocks of 32 four-bit numbers, the lower half of a byte first; each block
has an exponent, stored as 127 more in [..., G]. A number is its value below times 2^exponent, which bfloat16 holds
exactly. The tensor is the transpose of the projection: [E, out, in] for kernels [E, in, out].
"""

import dataclasses
import functools
from collections.abc import Mapping

import ml_dtypes
import numpy as np

from lcx.convert.files.tensor_io import TensorInfo, TensorSource
from lcx.errors import UserError
from lcx.rope_fields import shown

_BLOCKS, _SCALES = "_blocks", "_scales"
_VALUES = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)
VALUES = np.concatenate([_VALUES, -_VALUES])
_DTYPE = np.dtype(ml_dtypes.bfloat16)


@dataclasses.dataclass(frozen=True)
class Unpacked:
    """A checkpoint whose packed tensors appear under their plain names, in bfloat16 (a `TensorSource`).

    Raises:
      UserError: at construction, for packed tensors whose blocks and scales do not belong together.
    """

    source: TensorSource

    def __post_init__(self):
        for name in self.tensors:
            self._check(name)

    @functools.cached_property
    def tensors(self) -> dict[str, TensorInfo]:
        found = {}
        for name, info in self.source.tensors.items():
            if name.endswith(_BLOCKS) and len(info.shape) == 4:
                experts, rows, blocks, size = info.shape
                found[name.removesuffix(_BLOCKS)] = TensorInfo(
                    _DTYPE, (experts, blocks * size * 2, rows), info.where
                )
            elif not name.endswith((_BLOCKS, _SCALES)):
                found[name] = info
            elif name.removesuffix(_SCALES) + _BLOCKS not in self.source.tensors:
                found[name] = info  # an unexpected tensor, which the rules report
        return found

    @property
    def shared_bytes(self) -> int:
        return self.source.shared_bytes

    def _check(self, name: str) -> None:
        stored: Mapping[str, TensorInfo] = self.source.tensors
        if name in stored:
            return
        blocks, scales = stored[name + _BLOCKS], stored.get(name + _SCALES)
        fits = scales is not None and scales.shape == blocks.shape[:-1] and blocks.shape[-1] == 16
        if not fits or {blocks.dtype, scales.dtype if scales else None} != {np.dtype(np.uint8)}:
            other = "no scales" if scales is None else f"scales {scales.dtype} {scales.shape}"
            raise UserError(
                f"{shown(name)} has blocks {blocks.dtype} {blocks.shape} and {other}, expected uint8 [experts, rows, "
                "blocks, 16] and uint8 of the same shape without its last axis: download the file again"
            )

    def read(self, name: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        if name in self.source.tensors:
            return self.source.read(name, start, stop)
        stop = self.tensors[name].shape[0] if stop is None else stop
        experts = [self._expert(name, expert) for expert in range(start, stop)]
        return np.stack(experts) if experts else np.zeros((0, *self.tensors[name].shape[1:]), _DTYPE)

    def _expert(self, name: str, expert: int) -> np.ndarray:
        """The kernel of one expert, [in, out]."""
        packed = self.source.read(name + _BLOCKS, expert, expert + 1)[0]
        exponents = self.source.read(name + _SCALES, expert, expert + 1)[0].astype(np.int32) - 127
        numbers = VALUES[np.stack([packed & 15, packed >> 4], axis=-1)].reshape(*packed.shape[:-1], 32)
        kernel = np.ldexp(numbers, exponents[..., None]).astype(_DTYPE)
        return np.ascontiguousarray(kernel.reshape(kernel.shape[0], -1).T)


def unpacked(source: TensorSource, config: Mapping[str, object]) -> TensorSource:
    """The source with MXFP4 tensors unpacked, if config.json says that there are any."""
    return Unpacked(source) if is_mxfp4(config) else source


def is_mxfp4(config: Mapping[str, object]) -> bool:
    given = config.get("quantization_config")
    return isinstance(given, Mapping) and given.get("quant_method") == "mxfp4"
