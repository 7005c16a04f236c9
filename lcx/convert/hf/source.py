"""Reads models from Hugging Face folders, parameter by parameter."""

import dataclasses
import functools
import logging
import os
import pathlib
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from lcx.convert.core import model_source, rules
from lcx.convert.files import folders, tensor_io, unsupported
from lcx.convert.files.tensor_io import TensorInfo
from lcx.convert.hf import config as hf_config
from lcx.convert.hf import folder as hf_folder
from lcx.convert.hf import fp8_blocks, mxfp4, tensor_names, text_part
from lcx.convert.hf.family import Family
from lcx.errors import UserError
from lcx.model import Decoder
from lcx.rope_fields import shown

log = logging.getLogger(__name__)

TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "lcx_tokenizer.json")
#: Layers. Above this number the depth is checked first, so that a wrong count does not build a huge model.
_MANY = 200


class HfSource:
    """A Hugging Face folder (a `model_source.ModelSource`).

    Args:
      family: the user's own family, used if the model_type is its own.

    Raises:
      UserError: a damaged folder, an unsupported config.json, or tensors that do not fit it.
    """

    def __init__(self, path: str | os.PathLike, *, family: Family | None = None):
        self._folder = hf_folder.HfFolder(path)
        self.where = str(path)
        self.side_files = folders.side_files(path)
        try:
            config = text_part.config_of(self._folder.config, self._folder.tensors, own=family)
            self.carried = {key: value for key, value in config.items() if key in hf_config.CARRIED}
            text = text_part.tensors_of(self._folder, self._folder.config, self.where, own=family)
            family = hf_config.family_of(config, family)
            unsupported.check_config(config, reads=family.unpacks)
            stored = fp8_blocks.unpacked(mxfp4.unpacked(text, config), config)
            unsupported.check_tensors(stored.tensors)
            unwrapped = tensor_names.unwrapped(stored, self.where, family)
            wanted = tensor_names.without(unwrapped, family.unread(config), self.where)
            self._tensors: tensor_io.TensorSource = self.arranged(wanted)
            _check_depth(config, self._tensors.tensors, family)
            model = self._model(config, family)
            self._table = rules.Table(family.rules(model), model_source.leaf_shapes(model))
            if model.tie_word_embeddings:
                self._tensors = _tied(self._tensors, family, self.where)
            elif family.head not in self._tensors.tensors:
                raise UserError(
                    f"{family.head} is missing; set tie_word_embeddings to true in config.json if the output head "
                    "is the embedding"
                )
            tensors = self._tensors.tensors
            skipped = self._table.check_source(tensors, harmless=family.buffers, against=self.against)
        except UserError as error:
            raise UserError(f"{path}: {error}") from error
        if skipped:
            log.warning(
                "%s: skipped %d buffers that follow from config.json (%s, ...)",
                path,
                len(skipped),
                skipped[0],
            )
        self.leaves = {
            path: TensorInfo(self._table.leaf_dtype(tensors, path), shape, self.where)
            for path, shape in self._table.shapes.items()
        }
        self.model: Decoder = model.clone(dtype=str(model_source.stored_dtype(self.leaves)), parent=None)

    def _model(self, config: Mapping[str, Any], family: Family) -> Decoder:
        try:
            return hf_config.from_config(config, family=family)
        except UserError as error:
            able = [repr(other.model_type) for other in hf_config.fitting(config, self._tensors.tensors)]
            hint = f", or change model_type to {' or '.join(able)}, whose settings and tensors these are"
            raise UserError(f"{error}{hint if able else ''}") from error

    @property
    def against(self) -> str:
        """What says which tensors are expected, for messages."""
        return "config.json"

    def arranged(self, tensors: tensor_io.TensorSource) -> tensor_io.TensorSource:
        """The tensors in the arrangement that the family's rules describe: as stored, unless a subclass says so."""
        return tensors

    @functools.cached_property
    def tokenizer(self) -> Mapping[str, Any] | None:
        return extras(self.where).tokenizer

    def read(self, path: str, index: rules.Index) -> np.ndarray:
        return self._table.read(self._tensors, path, index)

    def stored_name(self, path: str, row: int) -> str:
        """Name of the stored tensor that holds this row of a parameter."""
        places = self._table.places[path]
        return places[next(key for key in places if key in (None, row, (row, 0)))].name


def _tied(source: tensor_io.TensorSource, family: Family, where: str) -> tensor_io.TensorSource:
    """For a tied model: the tensors with the embedding under its own name, whether it or the head is stored.

    If both are stored they must be equal; otherwise tie_word_embeddings or one of the tensors is wrong.
    """
    tensors, both = source.tensors, (family.head, family.embedding)
    if family.head not in tensors:
        return source
    names = {name: name for name in tensors if name != family.head}
    if family.embedding not in tensors:
        log.warning("%s: the embedding is tied to the output head, and stored as %s", where, family.head)
        return tensor_names.Renamed(source, {family.embedding: family.head, **names})
    head, embedding = (tensors[name] for name in both)
    same = (head.shape, head.dtype) == (embedding.shape, embedding.dtype)
    for rows in tensor_io.split_rows(head.shape, head.dtype.itemsize, tensor_io.PIECE_BYTES):
        if same:
            pieces = (source.read(name, *rows).tobytes() for name in both)
            same = next(pieces) == next(pieces)
    if not same:
        raise UserError(
            f"config.json has tie_word_embeddings true but {family.head} is not {family.embedding}; set "
            "tie_word_embeddings to false if the stored head is the one to use"
        )
    return tensor_names.Renamed(source, names)


def _check_depth(config: Mapping[str, Any], tensors: Mapping[str, TensorInfo], family: Family) -> None:
    """Raises UserError if config.json states more than `_MANY` layers and the tensors have a different number."""
    stated = config.get("num_hidden_layers")
    found = {match[1] for name in tensors if (match := re.match(family.layer, name))}
    if isinstance(stated, int) and stated != len(found) and stated > _MANY:
        raise UserError(
            f"config.json has num_hidden_layers {shown(stated)}, but the tensors are of {len(found)} layers: one of "
            "the two is of another model"
        )


@dataclasses.dataclass(frozen=True)
class Extras:
    """What a folder holds in addition to the model: settings of config.json, files, the tokenizer's description."""

    carried: dict[str, Any]
    side_files: list[pathlib.Path]
    tokenizer: dict[str, Any] | None


def extras(path: str | os.PathLike) -> Extras:
    """The settings, files and tokenizer to copy from a Hugging Face folder."""
    config = text_part.config_of(folders.read_json(folders.inside(pathlib.Path(path), hf_folder.CONFIG)))
    carried = {key: value for key, value in config.items() if key in hf_config.CARRIED}
    files = folders.side_files(path)
    tokenizer = None
    if any(file.name in TOKENIZERS for file in files):
        from lcx.data import load_tokenizer

        try:
            tokenizer = {key: value for key, value in load_tokenizer(path).to_json().items() if key != "path"}
        except UserError as error:
            log.warning("the tokenizer is copied but not recorded: %s", error)
    return Extras(carried, files, tokenizer)
