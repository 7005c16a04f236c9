"""Writes folders that the published 2Mamba trainer and its inference script load."""

import math
import pathlib
from collections.abc import Callable, Iterator, Mapping

import numpy as np

from lcx import model as model_lib
from lcx.convert.core import model_source, rules
from lcx.convert.core.format import check_same
from lcx.convert.core.model_source import ModelSource
from lcx.convert.core.training_state import StoredRun
from lcx.convert.files import tensor_io
from lcx.convert.files.tensor_io import TensorInfo
from lcx.convert.hf import config as hf_config
from lcx.convert.hf import folder as hf_folder
from lcx.convert.hf import writer as hf_writer
from lcx.convert.two_mamba import layouts, settings_writer, training_state, training_writer
from lcx.convert.two_mamba.family import KEY, MASK, ROTATION, TWO_MAMBA, attention_types
from lcx.mixers.two_mamba import TwoMamba
from lcx.model import Decoder

_ONE_FILE = 1 << 62  # the published loader reads model.safetensors and no index


def write(
    folder: pathlib.Path,
    source: ModelSource,
    *,
    dtype: np.dtype | None = None,
    progress: Callable[[int], None] = lambda nbytes: None,
) -> dict[str, TensorInfo]:
    """Writes a model into an empty folder, holding one tensor in memory; returns the written tensors.

    From a workdir, the optimizer of its run is written too, so that the published trainer can continue it. That
    trainer loads strictly, so its buffers are written too: the masks, and the frequencies of "softmax".

    Raises:
      UserError: the layers are not all the same published mixer, or the model is not a Llama otherwise.
    """
    table, tensors, config = _table(source), planned(source, dtype=dtype), _config(source, dtype)
    buffers = _buffers(source.model)

    def pieces(name: str) -> Iterator[np.ndarray]:
        if name in buffers:
            made: Iterator[np.ndarray] = buffers[name][1]()
        elif name.endswith(layouts.TURNED):
            made = iter([rules.transpose(np.concatenate(list(_parts(source, table, name))))])
        else:
            made = _parts(source, table, name)
        for piece in made:
            piece = piece if name in buffers else model_source.cast(piece, tensors[name].dtype, name)
            yield piece
            progress(piece.nbytes)

    hf_folder.write(folder, tensors, pieces, config=config, max_shard_bytes=_ONE_FILE)
    hf_writer.write_side_files(folder, source)
    run = _stored_run(source)
    if run is not None and not training_writer.write(folder, run, source.model, table, progress):
        run = None
    settings_writer.write(folder, source.model, config, run)
    return tensors


def optimizer_bytes(source: ModelSource) -> int:
    """The size of the two moments that `write` writes beside the model."""
    return 0 if _stored_run(source) is None else sum(8 * math.prod(x.shape) for x in source.leaves.values())


def _stored_run(source: ModelSource) -> StoredRun | None:
    return getattr(source, "stored_run", None)  # only a workdir holds the optimizer of a run


def planned(source: ModelSource, *, dtype: np.dtype | None) -> dict[str, TensorInfo]:
    """The tensors that `write` would write. Raises UserError as `write` does."""
    _config(source, dtype)
    table = _table(source)
    tensors = {
        name: layouts.turned(name, TensorInfo(dtype or table.foreign_dtype(source.leaves, name), shape))
        for name, shape in table.foreign_shapes.items()
    }
    return tensors | {name: info for name, (info, _) in _buffers(source.model).items()}


def check_written(folder: pathlib.Path, tensors: Mapping[str, TensorInfo]) -> dict[str, TensorInfo]:
    """The tensors of a written folder, read back from the header. Raises UserError unless they match `tensors`."""
    found = hf_folder.HfFolder(folder)
    check_same(folder, found.tensors, tensors)
    model = hf_config.from_config(found.config, family=TWO_MAMBA)
    if (folder / training_state.OPTIMIZER).exists():
        training_state.read(folder, model)
    return found.tensors


def _config(source: ModelSource, dtype: np.dtype | None) -> dict:
    names = attention_types(source.model)
    config = hf_writer.config_of(source, dtype, family=TWO_MAMBA)
    given = source.carried.get(KEY)  # one mixer has two published spellings
    return config | {KEY: given if given in names else names[0]}


def _table(source: ModelSource) -> rules.Table:
    shapes = {path: info.shape for path, info in source.leaves.items()}
    return rules.Table(TWO_MAMBA.rules(source.model), shapes)


def _parts(source: ModelSource, table: rules.Table, name: str) -> Iterator[np.ndarray]:
    def read(path: str, repeat: int | None) -> np.ndarray:
        whole = tuple(slice(0, size) for size in source.leaves[path].shape)
        if repeat is None:
            return source.read(path, whole)
        return source.read(path, (slice(repeat, repeat + 1), *whole[1:]))[0]

    return table.foreign_parts(name, read)


def _buffers(model: Decoder) -> dict[str, tuple[TensorInfo, Callable[[], Iterator[np.ndarray]]]]:
    """Tensors that hold no parameter: name -> description, and the function that makes its pieces."""
    found: dict[str, tuple[TensorInfo, Callable[[], Iterator[np.ndarray]]]] = {}
    length = model.max_position_embeddings
    kind = attention_types(model)[0]
    for i, layer in enumerate(model_lib.layers(model)):
        prefix, mixer = f"model.layers.{i}.self_attn.", layer.block.mixer
        if isinstance(mixer, TwoMamba):
            info = TensorInfo(np.dtype(np.bool_), (1, 1, length, length))
            found[prefix + MASK] = info, lambda: _mask(length)
        elif kind == "softmax":
            pairs = mixer.head_dim // 2
            info = TensorInfo(np.dtype(np.float32), (pairs,))
            found[prefix + ROTATION] = info, lambda pairs=pairs: iter([_frequencies(pairs)])
    return found


def _mask(length: int) -> Iterator[np.ndarray]:
    """The rows of the mask, True where a key lies after the query."""
    keys = np.arange(length)
    for start, stop in tensor_io.split_rows((length, length), 1, tensor_io.PIECE_BYTES):
        yield keys[None] > np.arange(start, stop)[:, None]


def _frequencies(pairs: int) -> np.ndarray:
    return (1.0 / 10000.0 ** (np.arange(pairs, dtype=np.float32) / np.float32(pairs))).astype(np.float32)
