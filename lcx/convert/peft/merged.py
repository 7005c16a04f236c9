"""A stored model with a PEFT adapter merged in, read parameter by parameter.

    source = adapted(source, "path/to/adapter")            # a model_source.ModelSource of any format

The changes of an adapter (`peft.files`) apply to tensors in Hugging Face's layout, so each parameter is converted to
that layout, changed, and converted back, one layer at a time. If an adapter changes only one of a tied embedding and
head, the resulting model is untied.
"""

import logging
import os
from collections.abc import Sequence
from typing import Any

import numpy as np

from lcx import hub
from lcx.convert.core import model_source, rules
from lcx.convert.core.model_source import ModelSource
from lcx.convert.core.rules import Transposed
from lcx.convert.files.tensor_io import TensorInfo
from lcx.convert.hf import families
from lcx.convert.peft import base as adapter_base
from lcx.convert.peft import files as peft_files
from lcx.convert.peft.files import EMBEDDING_WEIGHT, HEAD_WEIGHT, Adapter, Known, LowRank
from lcx.errors import UserError, naming_flags
from lcx.linearize import softmax_model
from lcx.model import Decoder

log = logging.getLogger(__name__)

_EMBEDDING, _HEAD = "embed/embedding", "lm_head/embedding"
_FLOAT32 = np.dtype(np.float32)


def table(model: Decoder) -> rules.Table:
    """Rules for the parameters that have Hugging Face names, i.e. all except those of linear attention.

    Raises:
      UserError: the model_type is not in `families.FAMILIES`.
    """
    if model.model_type not in families.FAMILIES:
        what = f"the model's model_type {model.model_type!r} has no PEFT names"
        raise UserError(
            f"{what}, expected one of {', '.join(families.FAMILIES)}: merge its pairs, or save with 'lcx'"
        )
    listed = families.rules(softmax_model(model))
    paths = {part.path for rule in listed for part in rule.parts}
    return rules.Table(
        listed, {path: s for path, s in model_source.leaf_shapes(model).items() if path in paths}
    )


def known(model: Decoder) -> Known:
    """The model's tensors and modules under the names that adapter files use."""
    names = table(model)
    linear = [
        rule.name.removesuffix(".weight")
        for rule in names.rules.values()
        if isinstance(rule.parts[0].layout, Transposed)
    ]
    shapes = dict(names.foreign_shapes)
    if model.tie_word_embeddings:
        shapes[HEAD_WEIGHT] = shapes[EMBEDDING_WEIGHT]
    return Known(shapes, tuple(linear), model.tie_word_embeddings)


class AdaptedSource:
    """A source with the changes of an adapter applied (a `model_source.ModelSource`).

    Args:
      base: the model, with its context already extended.
      path: the adapter's folder.
      dtype: dtype of the changed parameters; None keeps that of the base. The arithmetic is in float32.
      pairs: whether to merge the low-rank pairs. If False, parameters that were trained in full are float32.

    Raises:
      UserError: as in `peft.files.read`.
    """

    def __init__(
        self, base: ModelSource, path: str | os.PathLike, *, dtype: np.dtype | None = None, pairs: bool = True
    ):
        self._base, self.where = base, f"{base.where} with {path}"
        self.adapter: Adapter = peft_files.read(path, known(base.model))
        self.carried, self.side_files, self.tokenizer = base.carried, base.side_files, base.tokenizer
        self._changes = dict(self.adapter.changes)
        if not pairs:
            self._changes = {
                n: c for n, c in self._changes.items() if not any(isinstance(x, LowRank) for x in c)
            }
            dtype = _FLOAT32
        self.model: Decoder = base.model
        self.leaves = dict(base.leaves)
        if base.model.tie_word_embeddings and not self.adapter.ties:
            self.model = base.model.clone(tie_word_embeddings=False, parent=None)
            self.leaves[_HEAD] = base.leaves[_EMBEDDING]
        self._table = table(self.model)
        for leaf in self.changed:
            info = self.leaves[leaf]
            self.leaves[leaf] = TensorInfo(dtype or info.dtype, info.shape, self.where)

    @property
    def changed(self) -> list[str]:
        """Paths of the parameters that differ from the base."""
        places = self._table.places
        return [leaf for leaf in places if any(at.name in self._changes for at in places[leaf].values())]

    def read(self, path: str, index: rules.Index) -> np.ndarray:
        if path not in self.changed:
            return self._base.read(path if path in self._base.leaves else _EMBEDDING, index)
        return self._table.assembled(path, index, lambda key, rest: self._rows(path, key, rest))

    def _rows(self, path: str, key: rules.Key, index: rules.Index) -> np.ndarray:
        """Reads one slice of a changed parameter (or of one part of it)."""
        place, dtype = self._table.places[path][key], self.leaves[path].dtype
        leading = () if key is None else key if isinstance(key, tuple) else (key,)
        shape = self.leaves[path].shape[len(leading) :]
        stored = path if path in self._base.leaves else _EMBEDDING
        # An embedding table has the same rows in both layouts, so only the requested rows are read.
        if key is None and shape:
            start, stop, _ = index[0].indices(shape[0])
            old = self._base.read(stored, (slice(start, stop), *(slice(0, size) for size in shape[1:])))
            new = self._changed(place, old.astype(np.float32), start)
            return model_source.cast(new[(slice(None), *index[1:])], dtype, path)
        whole = tuple(slice(0, size) for size in shape)
        old = self._base.read(stored, (*(slice(i, i + 1) for i in leading), *whole)).reshape(shape)
        new = self._changed(place, place.layout.to_foreign(old).astype(np.float32), 0)
        return model_source.cast(place.layout.to_lcx(new, shape)[index], dtype, path)

    def _changed(self, place: rules.Place, rows: np.ndarray, start: int) -> np.ndarray:
        for change in self._changes.get(place.name, ()):
            rows = change.apply(rows, place.start + start)
        return rows


@naming_flags("setting adapter", "rope_scaling", "context_length")
def adapted(
    source: ModelSource,
    adapter: str | os.PathLike | Sequence[str | os.PathLike] | None,
    *,
    scaled: bool,
    dtype: np.dtype | None = None,
) -> ModelSource:
    """The source with one or more adapters merged in; their low-rank updates are summed.

    Args:
      scaled: whether the user chose the scaling of the model.
      dtype: dtype of the changed parameters; None keeps the stored dtype.

    Raises:
      UserError: an adapter cannot be read, does not fit the model, was trained with another RoPE scaling or is given
        twice, or several replace the same parameter.
    """
    if adapter is None:
        return source
    paths = [adapter] if isinstance(adapter, str | os.PathLike) else list(adapter)
    if source.model.model_type not in families.FAMILIES:
        raise UserError(
            f"the model has model_type {source.model.model_type!r}, which PEFT has no names for: leave out "
            "the setting adapter"
        )
    paths = [hub.local(path, kind="adapter") for path in paths]
    places = [os.path.realpath(path) for path in paths]
    if twice := next((path for path, place in zip(paths, places) if places.count(place) > 1), None):
        raise UserError(f"{twice} is given twice, and would be merged twice: change the setting adapter")
    taken: dict[str, Any] = {}
    for path in paths:
        source = AdaptedSource(source, path, dtype=dtype)
        adapter_base.check(path, source.model, scaled=scaled)
        for name, changes in source.adapter.changes.items():
            whole = not all(isinstance(c, LowRank) and c.magnitude is None for c in changes)
            if name in taken and (whole or taken[name][1]):
                raise UserError(
                    f"{taken[name][0]} and {path} both change {name}, and the changes do not add up: merge one first"
                )
            taken[name] = path, whole
        counts = len(source.adapter.pairs), len(source.adapter.changes)
        log.warning("%s: its %d pairs are merged into the parameters, %d tensors change", path, *counts)
    return source
