"""Reads and writes savanna's checkpoints of Evo 2, at any model-parallel size.

Filters are stored with as many taps as a run's sequences have tokens, but only the first 128 taps are used. Only these
are read; on writing, they are padded with zeros to the model's `max_position_embeddings`, as the published tool does.
The decay is copied, never computed. From one savanna checkpoint to another, tensors without effect on the output
(unused norms, unused taps of filters whose length does not change) are copied unchanged.

The reader assumes what the files do not state: norms with eps 1e-6, a gelu only in the layers before the first MR or LI
layer, and unscaled positions (pass rope_scaling for a model with interpolated positions).
"""

import collections
import dataclasses
import logging
import os
import pathlib
import re
from collections.abc import Callable, Iterator, Mapping

import numpy as np

from lcx.convert.core import model_source, rules
from lcx.convert.core.format import check_same
from lcx.convert.core.model_source import ModelSource
from lcx.convert.evo2 import fp8_states, savanna_files, striped_hyena, weight_files
from lcx.convert.evo2.megatron_files import MegatronFiles
from lcx.convert.evo2.savanna_files import SavannaFiles
from lcx.convert.evo2.striped_hyena import FILTER, LIVE_TAPS, PROJECTION, SCALES, StripedHyenaSource
from lcx.convert.evo2.zero import Float32File
from lcx.convert.files import folders, tensor_io
from lcx.convert.files.tensor_io import TensorInfo
from lcx.convert.files.torch_writer import TorchWriter
from lcx.errors import UserError

log = logging.getLogger(__name__)

_NORM = re.compile(r"(sequential\.\d+\.(?:\w+_layernorm|norm))\.(?:weight|scale)")
_UNUSED = re.compile(r"sequential\.\d+\.(post_attention_layernorm|outer_mlp_layernorm)\.(weight|scale)")
_INV_FREQ = re.compile(r"sequential\.\d+\.mixer\.rotary_emb\.inv_freq")
_TIMES = re.compile(r"sequential\.\d+\.mixer\.mixer\.filter\.t")
_PADDED = re.compile(r"sequential\.\d+\.mixer\.mixer\.filter\.(h|decay)")
_BUFFER = re.compile(r".*\.(inv_freq|filter\.t|filter\.decay|_extra_state)")
_FLOAT32 = np.dtype(np.float32)
_STEP = "global_step0"


class Canonical:
    """savanna's tensors in the canonical form of striped_hyena.py.

    Args:
      layer_0_only: see striped_hyena.Tensors.
    """

    interpolation: float | None = None  # a setting of the run, not of its files
    shared_bytes = 0

    def __init__(self, files: SavannaFiles | MegatronFiles, *, layer_0_only: bool = False):
        self.layer_0_only = layer_0_only
        self._files = files
        self._names = {}
        self.tensors = {}
        pattern = striped_hyena.pattern_of(files.tensors)
        count = len(pattern)
        finals = {f"sequential.{count + i}.norm.weight": striped_hyena.final_norm(count) for i in (2, 3)}
        for name, info in files.tensors.items():
            if any(pattern.fullmatch(name) for pattern in (_UNUSED, _INV_FREQ, _TIMES)):
                continue
            found = _NORM.fullmatch(name)
            known = f"{found.group(1)}.weight" if found else name
            known = finals.get(known, known)
            self._names[known], self.tensors[known] = name, self._shaped(name, info)
        self.fp8_states = _fp8_states(files, pattern)
        self._scales = striped_hyena.scales_of(self.fp8_states)
        self.tensors |= {name: TensorInfo(pair.dtype, pair.shape) for name, pair in self._scales.items()}
        self.inv_freq = self._frequencies()
        self.length = self._length()

    def _shaped(self, name: str, info: TensorInfo) -> TensorInfo:
        shape = info.shape
        if _PADDED.fullmatch(name) and len(shape) == 2:
            shape = (shape[0], min(shape[1], LIVE_TAPS))
        elif name.endswith("short_conv_weight") and len(shape) == 2:  # the layout of savanna's fast kernels
            shape = (shape[0], 1, shape[1])
        return dataclasses.replace(info, shape=shape)

    def read(self, name: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        if name in self._scales:
            return self._scales[name][start:stop]
        stored, info = self._names[name], self.tensors[name]
        _, first, shape = tensor_io.row_range(info, name, start, stop)
        if not _PADDED.fullmatch(stored):
            return self._files.read(stored, start, stop).reshape(shape)
        out = np.empty(shape, info.dtype)
        for low, high, rows in _pieces(self._files, stored, first, first + shape[0]):
            out[low - first : high - first] = rows[:, : shape[1]]
        return out

    def _frequencies(self) -> np.ndarray | None:
        stored = [self._files.read(name) for name in self._files.tensors if _INV_FREQ.fullmatch(name)]
        if any(not np.array_equal(other, stored[0]) for other in stored[1:]):
            raise UserError(
                f"{self._files.where}: inv_freq is not the same in all layers; the files are damaged"
            )
        return stored[0].astype(_FLOAT32) if stored else None

    def _length(self) -> int | None:
        lengths = {
            info.shape[-1]
            for name, info in self._files.tensors.items()
            if info.shape and (_PADDED.fullmatch(name) or _TIMES.fullmatch(name))
        }
        if len(lengths) > 1:
            raise UserError(
                f"{self._files.where}: filters are stored to {sorted(lengths)} taps, expected one length; the files "
                "are not of one run"
            )
        return lengths.pop() if lengths else None


def _fp8_states(files: SavannaFiles | MegatronFiles, pattern: str) -> dict[int, fp8_states.State]:
    """The FP8 scaling of the hyena layers' input projections, by layer."""
    states = {i: _extra_state(i) for i, letter in enumerate(pattern) if letter != "*"}
    ranks = [file for file in files.files if not isinstance(file, Float32File)]
    if not ranks:
        return {}
    wanted = fp8_states.configured(files.found[0], ranks[0].counters)
    return fp8_states.of_layers(ranks, states, wanted, files.where)


def _extra_state(layer: int) -> str:
    return striped_hyena.prefix(layer) + PROJECTION.removesuffix("weight") + weight_files.EXTRA_STATE


class SavannaSource(StripedHyenaSource):
    """A savanna checkpoint (see `savanna_files`) as a model (a `model_source.ModelSource`).

    Args:
      legacy: whether the roles of hyena layers are stored as three blocks on each rank; the files do not state it.
      float32: whether to read the float32 weights of the optimizer states (`zero`).
    """

    def __init__(self, path: str | os.PathLike, *, legacy: bool = False, float32: bool = False):
        self.files = SavannaFiles(path, legacy=legacy, float32=float32)
        try:
            canonical = Canonical(self.files)
        except UserError as error:
            raise UserError(f"{path}: {str(error).removeprefix(f'{path}: ')}") from error
        super().__init__(canonical, str(path))
        self.length, self.inv_freq = canonical.length, canonical.inv_freq
        left_out = [name for name in self.files.tensors if _UNUSED.fullmatch(name) or _TIMES.fullmatch(name)]
        if left_out:
            log.info(
                "%s: %d tensors have no effect and are left out (%s, ...)", path, len(left_out), left_out[0]
            )
        self._say_configured()
        if different := self.files.differing_copies():
            log.warning(
                "%s: the ranks' copies of %d tensors differ (%s, ...); rank 0's are read",
                path,
                len(different),
                different[0],
            )

    def _say_configured(self) -> None:
        """Warns if the run's recorded configuration differs from what the tensors hold or cannot express."""
        settings = self.files.files[0].counters
        base, factor = settings.get("rotary_emb_base"), settings.get("rotary_emb_scaling_factor", 1)
        ropes = [layer.block.mixer.rope for layer in striped_hyena.layers(self.model) if layer.letter == "*"]
        if ropes and base is not None and self.inv_freq is not None and base != ropes[0].rope_theta:
            log.warning(
                "%s: the run had configured rope_theta %g, and inv_freq is that of %g; the stored inv_freq is used",
                self.where,
                base,
                ropes[0].rope_theta,
            )
        if ropes and factor != 1:
            log.warning(
                "%s: the run divided positions by %g, which is not stored in any tensor; pass rope_scaling "
                '{"rope_type": "linear", "factor": %g}',
                self.where,
                factor,
                factor,
            )


# ------------------------------------------------------------------------------------------------- writing


@dataclasses.dataclass(frozen=True)
class _Entry:
    """A whole tensor to write; `pieces` yields (first row, rows)."""

    info: TensorInfo
    pieces: Callable[[], Iterator[tuple[int, np.ndarray]]]
    unit: int = 1  # rows that must stay on one rank


def write(
    folder: pathlib.Path,
    source: ModelSource,
    *,
    dtype: np.dtype | None = None,
    model_parallel: int = 1,
    progress: Callable[[int], None] = lambda nbytes: None,
) -> dict[str, TensorInfo]:
    """Writes `latest` and a step folder with one file per rank into an empty folder; returns the unsplit tensors.

    Raises:
      UserError: a tensor cannot be split evenly over the ranks, or the model is not a StripedHyena 2.
    """
    entries = entries_of(source, dtype)
    striped_hyena.say_scaling(source.model)
    shares = {name: _share(name, entry, model_parallel) for name, entry in entries.items()}
    (folder / _STEP).mkdir()
    writers = [
        TorchWriter(
            folder / _STEP / f"mp_rank_{rank:02d}_model_states.pt",
            shares,
            under="module",
            beside=_state(shares, model_parallel),
        )
        for rank in range(model_parallel)
    ]
    try:
        for name, entry in entries.items():
            for start, rows in entry.pieces():
                rows = model_source.cast(rows, entry.info.dtype, name)
                _distribute(writers, name, start, rows, shares[name])
                progress(rows.nbytes)
        for writer in writers:
            writer.finish()
    finally:
        for writer in writers:
            writer.close()
    folders.write_bytes(folder / savanna_files.LATEST, _STEP.encode())
    return {name: entry.info for name, entry in entries.items()}


def planned(source: ModelSource, *, dtype: np.dtype | None, model_parallel: int) -> dict[str, TensorInfo]:
    """The unsplit tensors that `write` would write. Raises UserError as `write` does."""
    entries = entries_of(source, dtype)
    for name, entry in entries.items():
        _share(name, entry, model_parallel)
    return {name: entry.info for name, entry in entries.items()}


def check_written(folder: pathlib.Path, tensors: Mapping[str, TensorInfo]) -> dict[str, TensorInfo]:
    """The written tensors, read back from the headers. Raises UserError unless they match `tensors`."""
    found = SavannaFiles(folder).tensors
    check_same(folder, found, weight_files.without_extra_states(tensors))
    return found


def _share(name: str, entry: _Entry, ranks: int) -> TensorInfo:
    axis, shape = savanna_files.split_axis(name), list(entry.info.shape)
    if axis is None:
        return entry.info
    unit = entry.unit if axis == 0 else 1
    if shape[axis] % (ranks * unit):
        what = (
            f"{shape[axis] // unit} groups of {unit} rows" if unit > 1 else f"{shape[axis]} along axis {axis}"
        )
        raise UserError(
            f"{name} has {what}, which do not divide by --model_parallel={ranks}; choose another size"
        )
    shape[axis] //= ranks
    return dataclasses.replace(entry.info, shape=tuple(shape))


def _state(shares: Mapping[str, TensorInfo], ranks: int) -> dict:
    """The entries that DeepSpeed expects next to "module". param_shapes lists parameters, not buffers."""
    import torch

    shapes = collections.OrderedDict(
        (name, torch.Size(info.shape)) for name, info in shares.items() if not _BUFFER.fullmatch(name)
    )
    return {"param_shapes": [shapes], "dp_world_size": 1, savanna_files.WORLD: ranks}


def _distribute(
    writers: list[TorchWriter], name: str, start: int, rows: np.ndarray, share: TensorInfo
) -> None:
    """Writes each rank's share of some rows of an unsplit tensor."""
    axis = savanna_files.split_axis(name)
    for rank, writer in enumerate(writers):
        if axis is None:
            writer.write(name, start, rows)
        elif axis == 1:
            width = share.shape[1]
            writer.write(name, start, rows[:, rank * width : (rank + 1) * width])
        else:
            first = rank * share.shape[0]
            low, high = max(start, first), min(start + len(rows), first + share.shape[0])
            if low < high:
                writer.write(name, low - first, rows[low - start : high - start])


def entries_of(source: ModelSource, dtype: np.dtype | None) -> dict[str, _Entry]:
    """All tensors to write, under savanna's names."""
    striped_hyena.check_activations(source.model, layer_0_only=False)
    frequencies = striped_hyena.frequencies_of(source.model)
    found = striped_hyena.layers(source.model)
    length = source.model.max_position_embeddings
    _check_live_taps(found, length)
    if isinstance(source, SavannaSource):
        entries = _stored_entries(source, dtype, length)
    else:
        entries = _model_entries(source, found, dtype, length)
    for i, layer in enumerate(found):
        head = striped_hyena.prefix(i)
        if layer.letter != "*" and layer.block.mixer.fp8 and _extra_state(i) not in entries:
            state = fp8_states.of_repeat(source, f"{layer.path}/mixer/in_proj", layer.repeat)
            entries[_extra_state(i)] = _whole(np.frombuffer(fp8_states.written(state), np.uint8))
        if layer.letter == "*" and frequencies is not None:
            stored = source.inv_freq if isinstance(source, SavannaSource) else None
            # Unchanged frequencies are copied in the dtype in which they are stored.
            if stored is None or not np.array_equal(stored, frequencies):
                entries[head + "mixer.rotary_emb.inv_freq"] = _whole(frequencies)
            unit = 3 * layer.block.mixer.head_dim
        else:
            unit = 3
            name = head + striped_hyena.FEATURIZER
            entries[name] = dataclasses.replace(entries[name], unit=3)
        entries[head + PROJECTION] = dataclasses.replace(entries[head + PROJECTION], unit=unit)
    return entries


def _check_live_taps(found: list[striped_hyena.LetteredLayer], length: int) -> None:
    """Raises UserError for MR filters that would be read back with another number of taps: 128, or all if fewer."""
    for layer in found:
        taps = layer.block.mixer.filter_length if layer.letter == "D" else min(LIVE_TAPS, length)
        if taps != min(LIVE_TAPS, length):
            raise UserError(
                f"its MR filters have {taps} taps, and savanna's of {length} tokens have {min(LIVE_TAPS, length)}; "
                "save with format 'lcx'"
            )


def _stored_entries(source: SavannaSource, dtype: np.dtype | None, length: int) -> dict[str, _Entry]:
    """All tensors of a savanna checkpoint. If the context changed, filters are resized as the published tool does."""
    entries = {}
    for name, info in source.files.tensors.items():
        kept = dtype is None or _TIMES.fullmatch(name) or _INV_FREQ.fullmatch(name)
        target = info if kept else dataclasses.replace(info, dtype=dtype or info.dtype)
        if length != source.length and _TIMES.fullmatch(name):
            entries[name] = _times(length, target.dtype)
        elif length != source.length and _PADDED.fullmatch(name):
            target = dataclasses.replace(target, shape=(info.shape[0], length))
            entries[name] = _Entry(target, _extended(source.files, name, target))
        else:
            entries[name] = _Entry(target, _copied(source.files, name))
    file = source.files.files[0]
    if source.files.ranks == 1 and not isinstance(file, Float32File):  # a part of a weight needs no other scale
        states = {name: file.extra_state(name) for name in file.extra_states}
        entries |= {name: _whole(np.frombuffer(state, np.uint8)) for name, state in states.items() if state}
    return entries


def _copied(files: SavannaFiles, name: str) -> Callable[[], Iterator[tuple[int, np.ndarray]]]:
    def pieces():
        for start, _, rows in _pieces(files, name, 0, None):
            yield start, rows

    return pieces


def _extended(
    files: SavannaFiles, name: str, target: TensorInfo
) -> Callable[[], Iterator[tuple[int, np.ndarray]]]:
    def pieces():
        for start, stop in tensor_io.split_rows(target.shape, target.dtype.itemsize, tensor_io.PIECE_BYTES):
            for low, _, rows in _pieces(files, name, start, stop):
                yield low, _padded(rows[:, :LIVE_TAPS], target.shape[1])

    return pieces


def _pieces(
    files: SavannaFiles | MegatronFiles, name: str, start: int, stop: int | None
) -> Iterator[tuple[int, int, np.ndarray]]:
    """Yields (first row, last row + 1, rows) of a stored tensor, a bounded number of bytes at a time."""
    info = files.tensors[name]
    if not info.shape:
        yield 0, 1, files.read(name)
        return
    last = info.shape[0] if stop is None else stop
    part = (last - start, *info.shape[1:])
    for low, high in tensor_io.split_rows(part, info.dtype.itemsize, tensor_io.PIECE_BYTES):
        yield start + low, start + high, files.read(name, start + low, start + high)


def _padded(taps: np.ndarray, length: int) -> np.ndarray:
    out = np.zeros((len(taps), length), taps.dtype)
    width = min(taps.shape[1], length)
    out[:, :width] = taps[:, :width]
    return out


def _model_entries(
    source: ModelSource, found: list[striped_hyena.LetteredLayer], dtype: np.dtype | None, length: int
) -> dict[str, _Entry]:
    """A model's tensors, plus those that savanna's modules expect but do not use."""
    table = rules.Table(
        striped_hyena.table_of(source.model), {path: i.shape for path, i in source.leaves.items()}
    )
    entries = {}
    for name, shape in table.foreign_shapes.items():
        if name.endswith(SCALES):
            continue
        info = TensorInfo(dtype or table.foreign_dtype(source.leaves, name), shape)
        if _PADDED.fullmatch(name):
            info = dataclasses.replace(info, shape=(shape[0], length))
        entries[name] = _Entry(info, _rows_of(source, table, name, info))
        if name.endswith("input_layernorm.weight"):
            for unused in ("post_attention_layernorm", "outer_mlp_layernorm"):
                ones = _whole(np.ones(shape, info.dtype))
                entries[name.replace("input_layernorm", unused)] = ones
    for i, layer in enumerate(found):
        if layer.letter == "H":
            entries[striped_hyena.prefix(i) + FILTER + "t"] = _times(length, _FLOAT32)
    return entries


def _rows_of(
    source: ModelSource, table: rules.Table, name: str, info: TensorInfo
) -> Callable[[], Iterator[tuple[int, np.ndarray]]]:
    def pieces():
        start = 0
        for part in table.foreign_parts(name, lambda path, repeat: read_repeat(source, path, repeat)):
            step = max(1, tensor_io.PIECE_BYTES // max(1, 4 * int(np.prod(info.shape[1:]))))
            for low in range(0, len(part), step):
                rows = part[low : low + step]
                yield start + low, _padded(rows, info.shape[1]) if _PADDED.fullmatch(name) else rows
            start += len(part)

    return pieces


def read_repeat(source: ModelSource, path: str, repeat: int | None) -> np.ndarray:
    """One layer of a stacked parameter, or (repeat None) the whole of an unstacked one."""
    shape = source.leaves[path].shape
    if repeat is None:
        return source.read(path, tuple(slice(0, size) for size in shape))
    return source.read(path, (slice(repeat, repeat + 1), *(slice(0, size) for size in shape[1:])))[0]


def _whole(array: np.ndarray) -> _Entry:
    return _Entry(TensorInfo(array.dtype, array.shape), lambda: iter([(0, array)]))


def _times(length: int, dtype: np.dtype) -> _Entry:
    """The time steps that savanna stores with each LI filter, [1, 1, length]."""
    info = TensorInfo(dtype, (1, 1, length))
    return _Entry(info, lambda: iter([(0, np.arange(length, dtype=_FLOAT32).astype(dtype)[None, None])]))
