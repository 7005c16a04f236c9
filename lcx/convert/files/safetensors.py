"""The safetensors format: a reader that validates the whole header, and a streaming writer.

Layout of a file: the header's length in bytes as little-endian uint64; the header, JSON
`{name: {"dtype", "shape", "data_offsets": [begin, end]}, "__metadata__": {...}}`; then the tensors, without gaps.
"""

import io
import json
import math
import os
import pathlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import ml_dtypes
import numpy as np

from lcx import small_files
from lcx.convert.files import tensor_io
from lcx.convert.files.tensor_io import TensorInfo
from lcx.errors import UserError, first_line
from lcx.rope_fields import shown

MAX_HEADER_BYTES = 100_000_000  # the format's own limit
MAX_AXES = 16
METADATA = "__metadata__"
DTYPES: dict[str, np.dtype] = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "I64": np.dtype("<i8"),
    "I32": np.dtype("<i4"),
    "I16": np.dtype("<i2"),
    "I8": np.dtype("i1"),
    "U64": np.dtype("<u8"),
    "U32": np.dtype("<u4"),
    "U16": np.dtype("<u2"),
    "U8": np.dtype("u1"),
    "BOOL": np.dtype("?"),
}
_CODES = {dtype: code for code, dtype in DTYPES.items()}


class SafetensorsFile:
    """One safetensors file. The header is read at construction, tensors on demand.

    Raises:
      UserError: at construction, if the file violates the format in any way.
    """

    shared_bytes = 0  # the format has no second names

    def __init__(self, path: str | os.PathLike):
        self.path = pathlib.Path(path)
        header, data_start, data_bytes, self._known = _read_header(self.path)
        self.tensors: dict[str, TensorInfo] = {}
        self._offsets: dict[str, int] = {}
        spans = []
        for name, entry in header.items():
            info, begin, end = _check_entry(self.path, name, entry, data_bytes)
            self.tensors[name] = info
            self._offsets[name] = data_start + begin
            spans.append((begin, end, name))
        _check_spans(self.path, spans, data_bytes)

    def read(self, name: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        info = self.tensors[name]
        skip, _, shape = tensor_io.row_range(info, name, start, stop)
        return tensor_io.read_array(self.path, self._offsets[name] + skip, info.dtype, shape, known=self._known)


def _read_header(path: pathlib.Path) -> tuple[dict, int, int, tuple[Any, ...]]:
    """(header without its metadata, offset of the data, size of the data in bytes, the file's identity)."""
    try:
        known = tensor_io.identity(path)
        with io.BufferedReader(small_files.opened(path)) as file:
            size = os.fstat(file.fileno()).st_size
            prefix = file.read(8)
            length = int.from_bytes(prefix, "little")
            if len(prefix) < 8 or length > min(size - 8, MAX_HEADER_BYTES):
                raise UserError(
                    f"{path}: not a complete safetensors file: {size} bytes, whose header claims {length} "
                    f"bytes (at most {max(0, min(size - 8, MAX_HEADER_BYTES))} possible); copy or download it again"
                )
            text = file.read(length)
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}") from error
    try:
        header = json.loads(text.decode("utf-8"), object_pairs_hook=no_duplicates)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: the safetensors header is not valid: {first_line(error)}") from error
    if not isinstance(header, dict):
        raise UserError(
            f"{path}: the safetensors header is a {type(header).__name__}, expected a JSON object"
        )
    metadata = header.pop(METADATA, {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise UserError(f"{path}: {METADATA} in the safetensors header must map strings to strings")
    return header, 8 + length, size - 8 - length, known


def no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object_pairs_hook for json that rejects duplicate keys."""
    result: dict[str, Any] = {}
    for name, value in pairs:
        if name in result:
            raise ValueError(f"the key {shown(name)} occurs twice")
        result[name] = value
    return result


def _is_size(value) -> bool:
    # No file is larger. Without the bound, the product of a hostile shape could be an integer of a million digits.
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**62


def _check_entry(path: pathlib.Path, name: str, entry, data_bytes: int) -> tuple[TensorInfo, int, int]:
    if not isinstance(entry, dict) or not {"dtype", "shape", "data_offsets"} <= entry.keys():
        raise UserError(f"{path}: tensor {shown(name)}: expected dtype, shape and data_offsets in the header")
    dtype = DTYPES.get(entry["dtype"]) if isinstance(entry["dtype"], str) else None
    if dtype is None:
        raise UserError(
            f"{path}: tensor {shown(name)} has dtype {shown(entry['dtype'], 40)}, expected one of "
            f"{', '.join(DTYPES)}"
        )
    shape, offsets = entry["shape"], entry["data_offsets"]
    if not isinstance(shape, list) or len(shape) > MAX_AXES or not all(map(_is_size, shape)):
        raise UserError(
            f"{path}: tensor {shown(name)} has shape {shown(shape)}, expected a list of at most {MAX_AXES} "
            "integers >= 0"
        )
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(map(_is_size, offsets)):
        raise UserError(
            f"{path}: tensor {shown(name)} has data_offsets {shown(offsets)}, expected two integers >= 0"
        )
    begin, end = offsets
    if not begin <= end <= data_bytes:
        raise UserError(
            f"{path}: tensor {shown(name)} lies at bytes {begin} to {end} of the data, but the file holds "
            f"{data_bytes} "
            "bytes of data; it is truncated or damaged, copy or download it again"
        )
    if end - begin != math.prod(shape) * dtype.itemsize:
        raise UserError(
            f"{path}: tensor {shown(name)} of shape {shape} and dtype {entry['dtype']} takes "
            f"{math.prod(shape) * dtype.itemsize} bytes, but the header gives it {end - begin}"
        )
    return TensorInfo(dtype, tuple(shape), path.name), begin, end


def _check_spans(path: pathlib.Path, spans: list[tuple[int, int, str]], data_bytes: int) -> None:
    """Raises UserError unless every byte of the data belongs to exactly one tensor."""
    position = 0
    for begin, end, name in sorted(spans):
        if begin != position:
            kind = "overlaps the tensor before it" if begin < position else "leaves a hole before it"
            raise UserError(
                f"{path}: tensor {shown(name)} starts at byte {begin} of the data, expected {position}: it {kind}"
            )
        position = end
    if position != data_bytes:
        raise UserError(f"{path}: {data_bytes - position} bytes after the last tensor belong to none")


def write_file(
    path: str | os.PathLike,
    tensors: Mapping[str, TensorInfo],
    pieces: Callable[[str], Iterable[np.ndarray]],
) -> None:
    """Writes a file tensor by tensor, holding one piece of one tensor in memory, and syncs it to disk.

    Args:
      path: the file, which must not exist yet.
      tensors: name -> dtype and shape. They determine the offsets, so the header can be written before the data.
      pieces: name -> an iterable of arrays, the tensor's rows in order.

    Raises:
      OSError: the disk is full, or the file exists.
    """
    names = sorted(
        tensors, key=lambda name: -tensors[name].dtype.itemsize
    )  # stable; keeps every tensor aligned
    header: dict[str, dict] = {METADATA: {"format": "pt"}}
    position = 0
    for name in names:
        info = tensors[name]
        span = [position, position + info.nbytes]
        header[name] = {"dtype": _CODES[info.dtype], "shape": list(info.shape), "data_offsets": span}
        position = span[1]
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "xb", buffering=0) as file:
        tensor_io.write_all(file, len(text).to_bytes(8, "little") + text)
        for name in names:
            info, written = tensors[name], 0
            for piece in pieces(name):
                if piece.dtype != info.dtype:
                    raise TypeError(f"{name}: a piece of dtype {piece.dtype}, expected {info.dtype}")
                tensor_io.write_all(file, piece)
                written += piece.nbytes
            if written != info.nbytes:
                raise ValueError(f"{name}: {written} bytes produced, expected {info.nbytes}")
        os.fsync(file.fileno())
