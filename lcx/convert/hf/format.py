"""Hugging Face folders of the Llama family as models, read parameter by parameter and written tensor by tensor."""

import dataclasses
import functools
import json
import logging
import os
import pathlib
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from lcx.convert import model_source, rules
from lcx.convert.files import tensor_io, unsupported
from lcx.convert.files.tensor_io import TensorInfo
from lcx.convert.hf import config as hf_config
from lcx.convert.hf import folder as hf_folder
from lcx.convert.hf import llama, tensor_names
from lcx.convert.model_source import ModelSource
from lcx.errors import UserError
from lcx.model import Decoder
from lcx.rope_fields import is_number, shown

log = logging.getLogger(__name__)

_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "lcx_tokenizer.json")
_HEAD, _EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
_MANY = 200  # layers: more are not built only to list the tensors that are missing
_LAYER = re.compile(r"model\.layers\.(\d+)\.")
_TOKENIZER_CONFIG = "tokenizer_config.json"


class HfSource:
    """A Hugging Face folder (a `model_source.ModelSource`).

    Raises:
      UserError: a damaged folder, a config.json that is not supported, tensors that do not fit it.
    """

    def __init__(self, path: str | os.PathLike):
        self._folder = hf_folder.HfFolder(path)
        self.where = str(path)
        self.carried = {key: value for key, value in self._folder.config.items() if key in hf_config.CARRIED}
        self.side_files = hf_folder.side_files(path)
        try:
            unsupported.check_tensors(self._folder.tensors)
            self._tensors: tensor_io.TensorSource = tensor_names.unwrapped(self._folder, self.where)
            _check_depth(self._folder.config, self._tensors.tensors)
            model = hf_config.from_config(self._folder.config)
            self._table = rules.Table(llama.rules(model), model_source.leaf_shapes(model))
            if model.tie_word_embeddings:
                self._tensors = self._tied(self._tensors)
            elif _HEAD not in self._tensors.tensors:
                raise UserError(
                    f"{_HEAD} is missing; set tie_word_embeddings to true in config.json if the output head "
                    "is the embedding"
                )
            tensors = self._tensors.tensors
            skipped = self._table.check_source(tensors, harmless=llama.HARMLESS)
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

    @functools.cached_property
    def tokenizer(self) -> Mapping[str, Any] | None:
        return extras(self.where).tokenizer

    def read(self, path: str, index: rules.Index) -> np.ndarray:
        return self._table.read(self._tensors, path, index)

    def stored_name(self, path: str, row: int) -> str:
        """The tensor in which the file has this row of a parameter."""
        places = self._table.places[path]
        return places[None if None in places else row].name

    def _tied(self, source: tensor_io.TensorSource) -> tensor_io.TensorSource:
        """The tensors with one name for the embedding that is the output head too, whichever of the two is stored.

        Where both are, they must be the same, or one of the two settings is a mistake.
        """
        tensors = source.tensors
        if _HEAD not in tensors:
            return source
        names = {name: name for name in tensors if name != _HEAD}
        if _EMBEDDING not in tensors:
            log.warning("%s: the embedding is tied to the output head, and stored as %s", self.where, _HEAD)
            return tensor_names.Renamed(source, {_EMBEDDING: _HEAD, **names})
        head, embedding = tensors[_HEAD], tensors[_EMBEDDING]
        same = (head.shape, head.dtype) == (embedding.shape, embedding.dtype)
        for rows in tensor_io.split_rows(head.shape, head.dtype.itemsize, tensor_io.PIECE_BYTES):
            if same:
                pieces = (source.read(name, *rows).tobytes() for name in (_HEAD, _EMBEDDING))
                same = next(pieces) == next(pieces)
        if not same:
            raise UserError(
                f"config.json has tie_word_embeddings true but {_HEAD} is not {_EMBEDDING}; set "
                "tie_word_embeddings to false if the stored head is the one to use"
            )
        return tensor_names.Renamed(source, names)


def _check_depth(config: Mapping[str, Any], tensors: Mapping[str, TensorInfo]) -> None:
    """UserError unless the tensors are of as many layers as config.json says, where that is a great many."""
    stated = config.get("num_hidden_layers")
    found = {match[1] for match in map(_LAYER.match, tensors) if match}
    if isinstance(stated, int) and stated != len(found) and stated > _MANY:
        raise UserError(
            f"config.json has num_hidden_layers {shown(stated)}, but the tensors are of {len(found)} layers: one of "
            "the two is of another model"
        )


@dataclasses.dataclass(frozen=True)
class Extras:
    """What a folder holds beside the model: settings of config.json, files, the tokenizer's description."""

    carried: dict[str, Any]
    side_files: list[pathlib.Path]
    tokenizer: dict[str, Any] | None


def extras(path: str | os.PathLike) -> Extras:
    """What to take along from a Hugging Face folder."""
    config = hf_folder.read_json(hf_folder.inside(pathlib.Path(path), hf_folder.CONFIG))
    carried = {key: value for key, value in config.items() if key in hf_config.CARRIED}
    files = hf_folder.side_files(path)
    tokenizer = None
    if any(file.name in _TOKENIZERS for file in files):
        from lcx.data import load_tokenizer

        try:
            tokenizer = {key: value for key, value in load_tokenizer(path).to_json().items() if key != "path"}
        except UserError as error:
            log.warning("the tokenizer is copied but not recorded: %s", error)
    return Extras(carried, files, tokenizer)


def write(
    folder: pathlib.Path,
    source: ModelSource,
    *,
    dtype: np.dtype | None = None,
    max_shard_bytes: int = 5_000_000_000,
    progress: Callable[[int], None] = lambda nbytes: None,
) -> dict[str, TensorInfo]:
    """Writes a model into an empty folder, one piece of one tensor in memory; returns the tensors written.

    Args:
      source: the model.
      dtype: of the tensors; None keeps each as it is.
      progress: called with the number of bytes after each piece.

    Raises:
      UserError: the model has something that its model_type does not have in this format.
    """
    config = config_of(source, dtype)
    table = rules.Table(llama.rules(source.model), {path: info.shape for path, info in source.leaves.items()})
    tensors = {
        name: TensorInfo(dtype or table.foreign_dtype(source.leaves, name), shape)
        for name, shape in table.foreign_shapes.items()
    }

    def pieces(name: str) -> Iterator[np.ndarray]:
        for part in table.rules[name].parts:
            for piece in _part_pieces(source, table, part):
                piece = model_source.cast(piece, tensors[name].dtype, name)
                yield piece
                progress(piece.nbytes)

    hf_folder.write(folder, tensors, pieces, config=config, max_shard_bytes=max_shard_bytes)
    for path in source.side_files:
        window = source.model.max_position_embeddings
        data = _with_window(path, window) if path.name == _TOKENIZER_CONFIG else path.read_bytes()
        hf_folder.write_bytes(folder / path.name, data)
    record = dict(source.tokenizer or {})
    if record.get("kind") == "bytes" and not (folder / _TOKENIZERS[-1]).exists():  # it has no file of its own
        hf_folder.write_json(folder / _TOKENIZERS[-1], record)
    return tensors


def _with_window(path: pathlib.Path, window: int) -> bytes:
    """tokenizer_config.json; its model_max_length, where transformers cuts texts, is not below the model's window."""
    data = path.read_bytes()
    try:
        config = hf_folder.read_json(path)
    except UserError as error:
        log.warning("copied as it is: %s", error)
        return data
    found = config.get("model_max_length")
    if not is_number(found) or found >= window:
        return data
    log.warning("%s: model_max_length %g becomes %d, the model's window", path.name, found, window)
    text = json.dumps(config | {"model_max_length": window}, indent=2, ensure_ascii=False)
    return (text + "\n").encode()


def check_written(folder: pathlib.Path, tensors: Mapping[str, TensorInfo]) -> dict[str, TensorInfo]:
    """What a written folder holds, read back from its headers. Raises UserError when it is something else."""
    found = hf_folder.HfFolder(folder)
    expected = {name: (info.shape, info.dtype) for name, info in tensors.items()}
    if {name: (info.shape, info.dtype) for name, info in found.tensors.items()} != expected:
        raise UserError(
            f"{folder}: what was written is not what was meant to be; check the disk and try again"
        )
    hf_config.from_config(found.config)
    return found.tensors


def config_of(source: ModelSource, dtype: np.dtype | None = None) -> dict:
    """The config.json that `write` writes. Raises UserError where the model_type cannot express the model."""
    name = str(dtype or model_source.stored_dtype(source.leaves))
    return hf_config.to_config(source.model, dtype=name, carried=source.carried)


def _part_pieces(source: ModelSource, table: rules.Table, part: rules.Part) -> Iterator[np.ndarray]:
    """The foreign rows of one part. Only arrays whose rows are the foreign rows can be cut into pieces."""
    shape = table.slice_shape(part)
    whole = tuple(slice(0, size) for size in shape)
    if part.repeat is not None:
        index = (slice(part.repeat, part.repeat + 1), *whole)
        yield part.layout.to_foreign(source.read(part.path, index)[0])
    elif part.layout == rules.Same() and shape:
        itemsize = source.leaves[part.path].dtype.itemsize
        for start, stop in tensor_io.split_rows(shape, itemsize, tensor_io.PIECE_BYTES):
            yield source.read(part.path, (slice(start, stop), *whole[1:]))
    else:
        yield part.layout.to_foreign(source.read(part.path, whole))
