"""Reads models from the folders of the published 2Mamba trainer."""

import logging
import os
import pathlib
import re

import numpy as np

from lcx.convert.files.tensor_io import TensorSource
from lcx.convert.hf.source import HfSource
from lcx.convert.two_mamba.family import KEY, MASK, ROTATION, TWO_MAMBA
from lcx.convert.two_mamba.layouts import Turned
from lcx.errors import UserError

log = logging.getLogger(__name__)

#: What the trainer writes beside the model.
TRAINER_FILES = ("optimizer.pt", "scheduler.pt", "config.pt", "tokenizer.pt", "scaler.pt")
_MASK = re.compile(rf"model\.layers\.\d+\.self_attn\.{MASK}")


class TwoMambaSource(HfSource):
    """A folder of the published trainer (a `model_source.ModelSource`).

    The masks are dropped, since they follow from the length. The frequencies of "softmax" are checked.

    Raises:
      UserError: a damaged folder, an unknown attention_type, or tensors that do not fit it.
    """

    def __init__(self, path: str | os.PathLike):
        super().__init__(path, family=TWO_MAMBA)
        config = self._folder.config
        self.carried = self.carried | {KEY: config[KEY]}
        try:
            self._check_masks()
            self._check_rotation()
        except UserError as error:
            raise UserError(f"{path}: {error}") from error

    @property
    def against(self) -> str:
        return f"config.json with {KEY} {self._folder.config[KEY]!r}"

    def arranged(self, tensors: TensorSource) -> TensorSource:
        return Turned(tensors)

    def _check_masks(self) -> None:
        """Raises UserError for a mask that is not one of a square over all positions."""
        for name, info in self._tensors.tensors.items():
            square = len(info.shape) == 4 and info.shape[:2] == (1, 1) and info.shape[2] == info.shape[3]
            if _MASK.fullmatch(name) and not (square and info.dtype.itemsize == 1):
                raise UserError(
                    f"{name} is {info.dtype} {info.shape}, expected the published causal mask, bool [1, 1, L, L]"
                )

    def _check_rotation(self) -> None:
        """Raises UserError for frequencies other than those of base 10000, which the model computes itself."""
        for name in self._tensors.tensors:
            if not name.endswith(ROTATION):
                continue
            found = self._tensors.read(name).astype(np.float64)
            expected = 10000.0 ** (-np.arange(found.size) / max(found.size, 1))
            if found.ndim != 1 or not np.allclose(found, expected, rtol=1e-2):  # bfloat16 keeps 3 digits
                raise UserError(
                    f"{name} holds other frequencies than those of base 10000, which {KEY} 'softmax' has"
                )


def trainer_files(folder: str | os.PathLike) -> list[str]:
    """The names of the trainer's own files in the folder."""
    return [name for name in TRAINER_FILES if (pathlib.Path(folder) / name).exists()]
