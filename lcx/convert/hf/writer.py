"""Writes models as Hugging Face folders, tensor by tensor."""

import dataclasses
import functools
import json
import logging
import pathlib
from collections.abc import Callable, Iterator, Mapping

import numpy as np

from lcx.convert.core import model_source, rules
from lcx.convert.core.format import check_same
from lcx.convert.core.model_source import ModelSource
from lcx.convert.files import folders, tensor_io
from lcx.convert.files.tensor_io import TensorInfo
from lcx.convert.hf import config as hf_config
from lcx.convert.hf import families
from lcx.convert.hf import folder as hf_folder
from lcx.convert.hf.family import Family
from lcx.convert.hf.rope import REMEMBERED
from lcx.convert.hf.source import TOKENIZERS
from lcx.errors import UserError
from lcx.rope_fields import is_number

log = logging.getLogger(__name__)

_TOKENIZER_CONFIG = "tokenizer_config.json"


def write(
    folder: pathlib.Path,
    source: ModelSource,
    *,
    dtype: np.dtype | None = None,
    max_shard_bytes: int = 5_000_000_000,
    family: Family | None = None,
    progress: Callable[[int], None] = lambda nbytes: None,
) -> dict[str, TensorInfo]:
    """Writes a model into an empty folder, holding one piece of one tensor in memory; returns the written tensors.

    Args:
      source: the model.
      dtype: dtype of the tensors; None keeps each stored dtype.
      family: the user's own family, used if the model_type is its own.
      progress: called after each piece with its number of bytes.

    Raises:
      UserError: the model has a property that its model_type cannot express in this format.
    """
    config = config_of(source, dtype, family=family)
    found = families.find(source.model.model_type, family)
    assert found is not None  # config_of raises UserError without a family
    table = rules.Table(found.rules(source.model), {path: info.shape for path, info in source.leaves.items()})
    if REMEMBERED in config:
        log.warning(
            "model_type %r has no rope_type %r in transformers: written as %r with the same frequencies",
            found.model_type,
            config[REMEMBERED].get("rope_type", "default"),
            config["rope_parameters"]["rope_type"],
        )
    tensors = {}
    for name, shape in table.foreign_shapes.items():
        stored = TensorInfo(table.foreign_dtype(source.leaves, name), shape)
        wanted = model_source.dtype_of(table.rules[name].parts[0].path, stored, dtype)
        tensors[name] = dataclasses.replace(stored, dtype=wanted)

    def pieces(name: str) -> Iterator[np.ndarray]:
        rule = table.rules[name]
        whole = (piece for part in rule.parts for piece in _part_pieces(source, table, part))
        for piece in whole if rule.block is None else table.foreign_parts(name, functools.partial(_one, source)):
            piece = model_source.cast(piece, tensors[name].dtype, name)
            yield piece
            progress(piece.nbytes)

    hf_folder.write(folder, tensors, pieces, config=config, max_shard_bytes=max_shard_bytes)
    write_side_files(folder, source)
    return tensors


def write_side_files(folder: pathlib.Path, source: ModelSource) -> None:
    """Copies the tokenizer and generation files; a byte tokenizer, which has none, is written as its description."""
    for path in source.side_files:
        window = source.model.max_position_embeddings
        data = _with_window(path, window) if path.name == _TOKENIZER_CONFIG else path.read_bytes()
        folders.write_bytes(folder / path.name, data)
    record = dict(source.tokenizer or {})
    # A byte tokenizer has no file.
    if record.get("kind") == "bytes" and not (folder / TOKENIZERS[-1]).exists():
        folders.write_json(folder / TOKENIZERS[-1], record)


def _with_window(path: pathlib.Path, window: int) -> bytes:
    """tokenizer_config.json with model_max_length, at which transformers truncates, raised to the window if lower."""
    data = path.read_bytes()
    try:
        config = folders.read_json(path)
    except UserError as error:
        log.warning("copied as it is: %s", error)
        return data
    found = config.get("model_max_length")
    if not is_number(found) or found >= window:
        return data
    log.warning("%s: model_max_length %g becomes %d, the model's window", path.name, found, window)
    text = json.dumps(config | {"model_max_length": window}, indent=2, ensure_ascii=False)
    return (text + "\n").encode()


def check_written(
    folder: pathlib.Path, tensors: Mapping[str, TensorInfo], *, family: Family | None = None
) -> dict[str, TensorInfo]:
    """The tensors of a written folder, read back from the headers. Raises UserError unless they match `tensors`."""
    found = hf_folder.HfFolder(folder)
    check_same(folder, found.tensors, tensors)
    hf_config.from_config(found.config, family=family)
    return found.tensors


def config_of(source: ModelSource, dtype: np.dtype | None = None, *, family: Family | None = None) -> dict:
    """The config.json that `write` writes. Raises UserError if the model_type cannot express the model."""
    name = str(dtype or model_source.stored_dtype(source.leaves))
    return hf_config.to_config(source.model, dtype=name, carried=source.carried, family=family)


def _one(source: ModelSource, path: str, key: rules.Key) -> np.ndarray:
    """One part of a parameter."""
    leading = () if key is None else key if isinstance(key, tuple) else (key,)
    shape = source.leaves[path].shape
    index = (*(slice(i, i + 1) for i in leading), *(slice(0, size) for size in shape[len(leading) :]))
    return source.read(path, index).reshape(shape[len(leading) :])


def _part_pieces(source: ModelSource, table: rules.Table, part: rules.Part) -> Iterator[np.ndarray]:
    """Yields the foreign rows of one part, in pieces if its rows are the foreign rows unchanged (layout `Same`)."""
    shape = table.slice_shape(part)
    whole = tuple(slice(0, size) for size in shape)
    if part.key is not None:
        yield part.layout.to_foreign(_one(source, part.path, part.key))
    elif part.layout == rules.Same() and shape:
        itemsize = source.leaves[part.path].dtype.itemsize
        for start, stop in tensor_io.split_rows(shape, itemsize, tensor_io.PIECE_BYTES):
            yield source.read(part.path, (slice(start, stop), *whole[1:]))
    else:
        yield part.layout.to_foreign(source.read(part.path, whole))
