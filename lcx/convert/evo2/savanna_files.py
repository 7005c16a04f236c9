"""Reads the files of savanna (Evo 2's trainer, based on DeepSpeed) as one set of whole tensors.

A training run writes `global_stepN/mp_rank_XX_model_states.pt`, one file per model-parallel rank, and `latest`, which
names the newest step. Published weights are one `.pt` file with {"module": tensors}, possibly split into `.partN`
pieces.

Each rank holds an equal, contiguous share of every split tensor, along rows or columns (`split_axis`), and a copy of
the others. The rows of a hyena layer's projection and featurizer have three roles. In the current, interleaved layout,
row 3 c + role belongs to channel c, so contiguous shares are whole channels. In the older layout ("legacy"), each rank
stores three consecutive blocks, one per role; they are interleaved rank by rank as they are read.
"""

import logging
import os
import pathlib
import re
from collections.abc import Mapping, Sequence

import numpy as np

from lcx import small_files
from lcx.convert.evo2 import weight_files, zero
from lcx.convert.evo2.weight_files import Found, WeightFile
from lcx.convert.evo2.zero import Float32File
from lcx.convert.files import tensor_io
from lcx.convert.files.tensor_io import TensorInfo
from lcx.errors import UserError

log = logging.getLogger(__name__)

LATEST = "latest"
STEP = re.compile(r"global_step(\d+)")
RANK = re.compile(r"mp_rank_(\d+)(_model_states)?\.pt")
PIECE = re.compile(r"(.+)\.part_?(\d+)")
TORCH_SUFFIXES = (".pt", ".pth", ".bin")
WORLD = "mp_world_size"

_ROWS = re.compile(
    r".*(word_embeddings\.weight|dense_projection\.weight|short_conv_weight|conv_bias|filter\.(h|decay|p|gamma|R)"
    r"|mlp\.w[12]\.weight)"
)
_COLUMNS = re.compile(r".*(mixer\.dense\.weight|mlp\.w3\.weight)")
_ROLES = re.compile(
    r"(sequential\.\d+\.mixer\.)(dense_projection\.weight|hyena_proj_conv\.short_conv_weight)"
)
_FEATURIZER = "hyena_proj_conv.short_conv_weight"


def split_axis(name: str) -> int | None:
    """The axis along which a tensor is split over model-parallel ranks; None if each rank has a copy."""
    if _ROWS.fullmatch(name):
        return 0
    return 1 if _COLUMNS.fullmatch(name) else None


def has_roles(name: str, names: Mapping[str, TensorInfo]) -> bool:
    """Whether the rows of a tensor are the channels of a hyena layer times three roles."""
    found = _ROLES.fullmatch(name)
    return found is not None and found.group(1) + _FEATURIZER in names


class SavannaFiles:
    """All tensors of a savanna checkpoint, merged over its ranks (a `tensor_io.TensorSource`).

    Args:
      path: a run's folder, a step's folder, a folder of rank files or a single file (see `find`).
      legacy: whether the rows of hyena layers are stored as three blocks per rank.
      float32: whether to read the float32 weights of the optimizer states instead of the 16-bit ones (`zero`).

    Attributes:
      tensors: name as stored -> TensorInfo of the whole tensor.
      ranks: number of model-parallel files.

    Raises:
      UserError: ranks are missing, or the files are not of one checkpoint.
    """

    shared_bytes = 0

    def __init__(self, path: str | os.PathLike, *, legacy: bool = False, float32: bool = False):
        found = self.found = find(path)
        self.files: list[WeightFile | Float32File] = [
            Float32File(_not_shards(file)) if float32 else weight_files.open_file(file) for file in found
        ]
        if not float32:
            _say_float32(path, found)
        self.ranks, self._legacy, self.where = len(found), legacy, str(path)
        _check_world(path, self.files)
        self.tensors = {name: self._merged(name) for name in self.files[0].tensors}

    def _merged(self, name: str) -> TensorInfo:
        first = self.files[0].tensors[name]
        for rank, file in enumerate(self.files):
            info = file.tensors.get(name)
            if info is None or (info.shape, info.dtype) != (first.shape, first.dtype):
                what = "missing" if info is None else f"{info.shape} {info.dtype}"
                raise UserError(
                    f"{self.where}: {name} is {first.shape} {first.dtype} on rank 0 and {what} on rank {rank}; the "
                    "files are not of one checkpoint, copy them again"
                )
        axis = split_axis(name)
        if axis is None or self.ranks == 1:
            return TensorInfo(first.dtype, first.shape, self.where)
        if len(first.shape) <= axis:
            raise UserError(
                f"{self.where}: {name} has shape {first.shape}, expected at least {axis + 1} axes"
            )
        shape = list(first.shape)
        shape[axis] *= self.ranks
        return TensorInfo(first.dtype, tuple(shape), self.where)

    def read(self, name: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        info, axis = self.tensors[name], split_axis(name)
        _, first, shape = tensor_io.row_range(info, name, start, stop)
        last = first + shape[0] if shape else 1
        if axis is None:
            return self.files[0].read(name, first, last) if shape else self.files[0].read(name)
        if axis == 1:
            out = np.empty(shape, info.dtype)
            width = shape[1] // self.ranks
            for rank, file in enumerate(self.files):
                out[:, rank * width : (rank + 1) * width] = file.read(name, first, last)
            return out
        rows, parts = info.shape[0] // self.ranks, []
        for rank, file in enumerate(self.files):
            low, high = max(first, rank * rows), min(last, (rank + 1) * rows)
            if low < high:
                parts.append(self._rank_rows(file, name, low - rank * rows, high - rank * rows))
        return parts[0] if len(parts) == 1 else np.concatenate(parts or [np.empty(shape, info.dtype)])

    def _rank_rows(self, file: WeightFile | Float32File, name: str, start: int, stop: int) -> np.ndarray:
        """Rows of one rank's share, with the roles interleaved."""
        if not self._legacy or not has_roles(name, self.tensors):
            return file.read(name, start, stop)
        channels = file.tensors[name].shape[0] // 3
        if channels * 3 != file.tensors[name].shape[0]:
            raise UserError(
                f"{self.where}: {name} has {file.tensors[name].shape[0]} rows a rank, expected a multiple of 3"
            )
        low, high = start // 3, -(-stop // 3)
        blocks = [file.read(name, role * channels + low, role * channels + high) for role in range(3)]
        rows = np.stack(blocks, axis=1)
        return rows.reshape(-1, *rows.shape[2:])[start - 3 * low : stop - 3 * low]

    def differing_copies(self) -> list[str]:
        """Names of unsplit tensors whose copies differ between ranks."""
        different = []
        for name in self.tensors:
            if split_axis(name) is None and self.ranks > 1:
                copy = self.files[0].read(name).tobytes()
                if any(file.read(name).tobytes() != copy for file in self.files[1:]):
                    different.append(name)
        return different


def _not_shards(found: Found) -> pathlib.Path | tensor_io.Pieces:
    if isinstance(found, weight_files.Shards):
        raise UserError(f"{found}: safetensors have no optimizer states, read them without")
    return found


def is_part(name: str) -> bool:
    """Whether a file of this name may be part of a savanna checkpoint folder."""
    known = STEP.fullmatch(name) or PIECE.fullmatch(name) or name.endswith(TORCH_SUFFIXES)
    return bool(known) or name in (LATEST, "zero_to_fp32.py")


def find(path: str | os.PathLike) -> list[Found]:
    """Finds the files of a checkpoint, ordered by rank.

    Raises:
      UserError: there is no checkpoint, more than one, or a rank or piece is missing.
    """
    place = pathlib.Path(path).expanduser()
    if not place.is_dir():
        shards = weight_files.shards_of(place) if place.is_file() else None
        return [shards or _file_or_pieces(place)]
    names = sorted(entry.name for entry in place.iterdir())
    if any(map(RANK.fullmatch, names)):
        return _ranks(place, names)
    if LATEST in names:
        return find(_latest(place))
    steps = [name for name in names if STEP.fullmatch(name) and (place / name).is_dir()]
    if steps:
        return find(place / max(steps, key=lambda name: int(name.removeprefix("global_step"))))
    files = [name for name in names if name.endswith(TORCH_SUFFIXES)]
    files += sorted({found.group(1) for name in names if (found := PIECE.fullmatch(name))} - set(files))
    shards = None if files else weight_files.shards_of(place)
    if shards is not None:
        return [shards]
    if len(files) != 1:
        listing = ", ".join(names[:6]) or "an empty folder"
        raise UserError(
            f"{place}: expected mp_rank_XX_model_states.pt files, {LATEST}, global_stepN folders or one .pt file, "
            f"found {listing}; pass one file or one step"
        )
    return [_file_or_pieces(place / files[0])]


def _latest(folder: pathlib.Path) -> pathlib.Path:
    try:
        name = small_files.read_text(folder / LATEST)[:1000].strip()
    except (OSError, ValueError) as error:
        raise UserError(f"{folder / LATEST}: cannot be read: {error}") from error
    if not name or os.path.basename(name) != name or name in (".", "..") or not (folder / name).is_dir():
        raise UserError(
            f"{folder / LATEST}: names the step {name!r}, expected a folder next to it; pass a step folder"
        )
    return folder / name


def _ranks(folder: pathlib.Path, names: Sequence[str]) -> list[Found]:
    by_rank: dict[int, list[str]] = {}
    for name in names:
        if (found := RANK.fullmatch(name)) is not None:
            by_rank.setdefault(int(found.group(1)), []).append(name)
    if twice := next((files for files in by_rank.values() if len(files) > 1), None):
        raise UserError(
            f"{folder}: {' and '.join(twice)} are of one rank; remove the file that does not belong here"
        )
    missing = sorted(set(range(max(by_rank) + 1)) - set(by_rank))
    if missing:
        raise UserError(
            f"{folder}: the files of ranks {', '.join(map(str, missing))} are missing, found ranks up to "
            f"{max(by_rank)}; copy them too"
        )
    return [folder / by_rank[rank][0] for rank in sorted(by_rank)]


def _say_float32(path: str | os.PathLike, found: Sequence[Found]) -> None:
    folder = getattr(found[0], "parent", None)
    shares = [] if folder is None else [file for file in folder.iterdir() if zero.SHARE.fullmatch(file.name)]
    if shares:
        log.info(
            "%s: %d files of optimizer states are not read (format 'savanna_fp32' takes their float32 weights)",
            path,
            len(shares),
        )


def _file_or_pieces(path: pathlib.Path) -> pathlib.Path | tensor_io.Pieces:
    whole = path
    if found := PIECE.fullmatch(path.name):
        whole = path.with_name(found.group(1))
    elif path.is_file():
        return path
    pieces = {}
    for entry in whole.parent.glob("*") if whole.parent.is_dir() else ():
        found = PIECE.fullmatch(entry.name)
        if found and found.group(1) == whole.name:
            pieces[int(found.group(2))] = entry
    if not pieces:
        raise UserError(f"no checkpoint at {path}: the path does not exist")
    numbers = sorted(pieces)
    if numbers != list(range(numbers[0], numbers[0] + len(numbers))) or numbers[0] > 1:
        raise UserError(
            f"{whole}: has the pieces {', '.join(map(str, numbers))}; one is missing, copy it too"
        )
    return tensor_io.Pieces(tuple(pieces[number] for number in numbers))


def _check_world(path: str | os.PathLike, files: Sequence[WeightFile | Float32File]) -> None:
    """Raises UserError if the number of files is not the recorded number of ranks.

    Without this check, a copy that lacks the last ranks would look complete.
    """
    for file in files:
        world = file.counters.get(WORLD, file.counters.get("model_parallel_size", len(files)))
        if world != len(files):
            raise UserError(
                f"{path}: {file.path.name} is of {world} model-parallel ranks, found {len(files)} files; copy all of "
                "them, or pass their folder"
            )


def looks_like(path: str | os.PathLike) -> bool:
    """Whether the tensors have savanna's names. Raises UserError if they cannot be read."""
    return all("sequential.0.word_embeddings.weight" in weight_files.open_file(file).tensors for file in find(path)[:1])
