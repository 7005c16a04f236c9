"""A view of a stored model as another model: a subset of its layers, other stages, or additional new parameters.

Parameters are read only on request, so one block of layers of a 405B model can be read without the rest.
"""

import dataclasses
import functools
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from lcx import model as model_lib
from lcx.convert.core import model_source, rules
from lcx.convert.core.model_source import ModelSource
from lcx.convert.files.tensor_io import TensorInfo


@dataclasses.dataclass
class RelaidSource:
    """A `model_source.ModelSource` that takes the layers of another one.

    Attributes:
      source: the stored model that holds the weights.
      model: the model to build: a Decoder, or Layers.
      fresh: path -> new parameter that the source does not have.
      first: index of the source layer that becomes the model's first layer.
    """

    source: ModelSource
    model: Any
    fresh: Mapping[str, np.ndarray]
    first: int = 0

    @functools.cached_property
    def _rows(self) -> dict[tuple[str, int], model_lib.Layer]:
        """(block, row of its stacked parameters) -> the corresponding layer of the source."""
        old, new = model_lib.layers(self.source.model), model_lib.layers(self.model)
        return {(layer.path, layer.repeat): old[self.first + i] for i, layer in enumerate(new)}

    def _places(self, path: str, rows: range) -> list[tuple[str, slice]]:
        """Where each row of a stacked parameter lies in the source."""
        block, name = "/".join(path.split("/")[:2]), "/".join(path.split("/")[2:])
        layers = [self._rows[block, row] for row in rows]
        return [(f"{layer.path}/{name}", slice(layer.repeat, layer.repeat + 1)) for layer in layers]

    def _is_layer(self, path: str) -> bool:
        return ("/".join(path.split("/")[:2]), 0) in self._rows

    @functools.cached_property
    def leaves(self) -> dict[str, TensorInfo]:
        found = {}
        for path, shape in model_source.leaf_shapes(self.model).items():
            if path in self.fresh:
                found[path] = TensorInfo(self.fresh[path].dtype, tuple(shape), self.where)
                continue
            old = self._places(path, range(1))[0][0] if self._is_layer(path) else path
            found[path] = TensorInfo(self.source.leaves[old].dtype, tuple(shape), self.where)
        return found

    @property
    def carried(self) -> Mapping[str, Any]:
        return self.source.carried

    @property
    def side_files(self) -> Sequence[pathlib.Path]:
        return self.source.side_files

    @property
    def tokenizer(self) -> Mapping[str, Any] | None:
        return self.source.tokenizer

    @property
    def where(self) -> str:
        return self.source.where

    def read(self, path: str, index: rules.Index) -> np.ndarray:
        if path in self.fresh:
            return np.asarray(self.fresh[path][index])
        if not self._is_layer(path):
            return self.source.read(path, index)
        rows = range(index[0].start, index[0].stop)
        return np.concatenate(
            [self.source.read(old, (row, *index[1:])) for old, row in self._places(path, rows)]
        )
