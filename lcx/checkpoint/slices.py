"""Reads and writes the arrays of a checkpoint slice by slice, so a conversion needs memory only for the largest slice.

`StepReader` reads slices of any step that lcx wrote. `StepWriter` writes a step slice by slice, fingerprints
included; `Checkpointer.restore` and Orbax itself can read it like any other step. Neither uses jax.

Orbax stores an array in zarr format: inside one key-value database per item (OCDBT) if a `Checkpointer`
saved it, or as a plain folder of chunk files if it was written here. A chunk holds one leading index (one
layer of a stack) or a few megabytes of rows, so reading a slice does not read the rest of the array.
"""

from __future__ import annotations

import json
import math
import os
import pathlib
import shutil
import time
from collections.abc import Callable, Mapping
from types import EllipsisType, MappingProxyType, TracebackType
from typing import Any, Self, TypeVar

import ml_dtypes  # noqa: F401  (numpy learns bfloat16 from it)
import numpy as np
import tensorstore as ts

from lcx.checkpoint.fingerprint import partial
from lcx.checkpoint.folder import (
    COMMIT_MARKER,
    RECORD_ITEM,
    DamagedStep,
    Entry,
    Record,
    checksum,
    few,
    plain,
    read_record,
    why_not_written,
    why_unreadable,
)
from lcx.errors import UserError

T = TypeVar("T")
Path = tuple[str, ...]  # keys from the root of the tree to an array: ("embed", "embedding")
Spec = tuple[tuple[int, ...], Any]  # (shape, dtype)

_ROW_GROUP_BYTES = 4 << 20  # rows smaller than a quarter of this share a chunk
_CHUNK_BYTES = 64 << 20  # largest chunk, so that reading part of a layer does not read all of it
_HANDLERS = "orbax.checkpoint._src.handlers."  # Orbax's step metadata names a handler class in this package per item


def _context() -> ts.Context:
    """Without a cache and with few concurrent copies, so that memory use stays at the size of a slice."""
    return ts.Context(
        {
            "cache_pool": {"total_bytes_limit": 0},
            "data_copy_concurrency": {"limit": 2},
            "file_io_concurrency": {"limit": 4},
        }
    )


def open_array(item_dir: Any, path: Path, expected: Spec | Any, context: ts.Context) -> ts.TensorStore:
    """An array of an item, to be read. Raises ValueError if it is missing or damaged, or is not as `expected`.

    Args:
      expected: (shape, dtype), or something with a shape and a dtype.
    """
    shape, dtype = expected if isinstance(expected, tuple) else (expected.shape, expected.dtype)
    name = ".".join(path) + "/"
    kvstore: dict[str, Any] = {"driver": "file", "path": f"{item_dir}/{name}"}
    if (item_dir / "manifest.ocdbt").exists():
        kvstore = {"driver": "ocdbt", "base": f"file://{item_dir}/", "path": name}
    spec = {"driver": "zarr", "kvstore": kvstore, "fill_missing_data_reads": False}
    store = ts.open(spec, open=True, read=True, context=context).result()
    if (store.shape, store.dtype.numpy_dtype) != (tuple(shape), dtype):
        raise ValueError(f"found {store.dtype.name}{list(store.shape)}, expected {dtype}{list(shape)}")
    return store


def past_damage(path: str | os.PathLike, work: Callable[[], T]) -> T:
    """The result of `work`, which reads the newest usable step at `path`.

    It is repeated with the next older step after one whose arrays turn out to be damaged. If `path` names a step, there
    is no other to fall back to, and the error is raised.
    """
    while True:
        try:
            return work()
        except DamagedStep as damaged:
            if str(pathlib.Path(path).expanduser().resolve()) == str(damaged.step_dir):
                raise


class _Coverage:
    """Which leading rows of one array have been read or written, and the fingerprint of those rows."""

    def __init__(self, shape: tuple[int, ...]):
        self.row_size = math.prod(shape[1:])
        self.seen = np.zeros((shape[0] if shape else 1) if self.row_size else 0, bool)
        self.sum = 0

    @property
    def complete(self) -> bool:
        return bool(self.seen.all())

    def add(self, start: int, stop: int, values: np.ndarray) -> bool:
        """Adds rows start..stop. If any of them was added before, adds nothing and returns False."""
        if self.seen[start:stop].any():
            return False
        self.seen[start:stop] = True
        self.sum = (self.sum + partial(values, start * self.row_size)) % 2**32
        return True


def _rows(index: Any, shape: tuple[int, ...]) -> tuple[int, int]:
    """(start, stop) of leading rows. Raises IndexError for an index out of range, ValueError for a strided slice."""
    count = shape[0] if shape else 1
    if index is None or index is Ellipsis:
        return 0, count
    if isinstance(index, slice):
        start, stop, stride = index.indices(count)
        if stride != 1:
            raise ValueError(f"slice with stride {stride}; expected contiguous rows")
        return start, max(start, stop)
    if not -count <= index < count or not shape:
        raise IndexError(f"index {index} of an array of shape {list(shape)}")
    return index % count, index % count + 1


class StepReader:
    """Reads the arrays of one item of one committed step. Raises UserError if there is no such item.

    `arrays` maps each path to its (shape, dtype); typed PRNG keys appear as key data. Once all leading rows of an
    array have been read, in any order, the array is checked against its fingerprint. An array of which parts of rows
    are read is checked as a whole before its first part.
    """

    def __init__(self, step_dir: Any, item: str):
        self._step_dir = pathlib.Path(step_dir).resolve()
        self._item_dir = self._step_dir / item
        if not (self._step_dir / COMMIT_MARKER).exists():
            raise UserError(
                f"{step_dir} is not a committed checkpoint step; pass a step folder such as checkpoints/1000"
            )
        record = read_record(step_dir)
        if item not in record.arrays:
            raise UserError(f"checkpoint {step_dir} has no item {item!r}; found {few(sorted(record.arrays))}")
        entries = {tuple(key.split("/")): entry for key, entry in record.arrays[item].items()}
        self.arrays: dict[Path, Spec] = {path: (e.shape, np.dtype(e.dtype)) for path, e in entries.items()}
        self._fingerprints = {path: entry.fingerprint for path, entry in entries.items()}
        self._coverage = {path: _Coverage(entry.shape) for path, entry in entries.items()}
        self._stores: dict[Path, ts.TensorStore] = {}
        self._context = _context()

    def read(
        self, path: Path, index: int | slice | tuple[int | slice, ...] | EllipsisType | None = None
    ) -> np.ndarray:
        """The whole array, one leading index, a range of leading rows, or any part (a tuple, one entry per axis).

        Raises KeyError for an unknown path, and DamagedStep if the files are damaged: immediately if they cannot be
        read, or together with the last slice of an array whose values differ from those that were saved.
        """
        shape, dtype = self.arrays[path]
        if not math.prod(shape):
            return np.zeros(shape, dtype)[index if index is not None else ...]
        if isinstance(index, tuple):
            self.verify(path)
        part = index if isinstance(index, tuple) else slice(*_rows(index, shape)) if shape else ...
        try:
            values = np.asarray(self._open(path)[part].read().result())
        except (ValueError, OSError) as error:
            raise DamagedStep(self._step_dir, why_unreadable(self._item_dir.name, error)) from None
        if not isinstance(index, tuple):
            self._check(path, index, values)
        return values[0] if isinstance(index, (int, np.integer)) else values

    def verify(self, path: Path) -> None:
        """Raises DamagedStep if the array differs from what was saved. Reads it, unless all of it was read before."""
        shape, dtype = self.arrays[path]
        if self._coverage[path].complete:
            return
        self._coverage[path] = _Coverage(shape)
        row_bytes = max(1, dtype.itemsize * math.prod(shape[1:]))
        step = max(1, _CHUNK_BYTES // row_bytes)
        for start in range(0, shape[0] if shape else 1, step):
            self.read(path, slice(start, start + step))

    def unread(self) -> list[Path]:
        """Arrays of which some rows have not been read; these have not been verified."""
        return [path for path, coverage in self._coverage.items() if not coverage.complete]

    def _check(self, path: Path, index: Any, values: np.ndarray) -> None:
        coverage = self._coverage[path]
        start, stop = _rows(index, self.arrays[path][0])
        whole = coverage.add(start, stop, values) and coverage.complete
        if whole and coverage.sum != self._fingerprints[path]:
            raise DamagedStep(self._step_dir, f"{self._name(path)} does not match the saved fingerprint")

    def _name(self, path: Path) -> str:
        return "/".join((self._item_dir.name, *path))

    def _open(self, path: Path) -> ts.TensorStore:
        if path not in self._stores:
            self._stores[path] = open_array(self._item_dir, path, self.arrays[path], self._context)
        return self._stores[path]


class StepWriter:
    """Writes one item of arrays and some JSON items as a step folder, slice by slice.

    The step is committed only by `finish`: a process killed before that leaves no committed step, and leaving the
    `with` block by an exception removes the folder.

    Args:
      step_dir: `<checkpoints folder>/<step number>`. An unfinished step there is replaced; a committed one raises
        UserError.
      item: name of the item that holds the arrays.
      arrays: {path: (shape, dtype)} of everything that will be written.
      others: {name: {path: array}} of other items, which are small and written at once.
    """

    def __init__(
        self,
        step_dir: Any,
        item: str,
        arrays: Mapping[Path, Spec],
        *,
        others: Mapping[str, Mapping[Path, np.ndarray]] = MappingProxyType({}),
    ):
        self._step_dir = pathlib.Path(step_dir).resolve()
        if not self._step_dir.name.isdecimal():
            raise UserError(
                f"cannot write a step as {step_dir}; expected a folder named by a step number, such as 0"
            )
        if (self._step_dir / COMMIT_MARKER).exists():
            raise UserError(f"{step_dir} already holds a checkpoint; choose another folder or remove it")
        self._item, small = item, {(name, *path): x for name, tree in others.items() for path, x in tree.items()}
        specs = {(item, *path): spec for path, spec in arrays.items()}
        specs |= {key: (x.shape, x.dtype) for key, x in small.items()}
        self._arrays = {key: (tuple(shape), np.dtype(dtype)) for key, (shape, dtype) in specs.items()}
        self._coverage = {key: _Coverage(shape) for key, (shape, _) in self._arrays.items()}
        self._num_bytes = sum(math.prod(shape) * dtype.itemsize for shape, dtype in self._arrays.values())
        self._start_ns = time.time_ns()
        self._context = _context()
        if bad := [key[1:] for key in specs if not key[1:] or any(not n or set(n) & set("/.") for n in key)]:
            raise ValueError(f"cannot store {few(bad)}; names must not be empty nor contain '/' or '.'")
        shutil.rmtree(self._step_dir, ignore_errors=True)
        self._stores = {key: self._create(key) for key, (shape, _) in self._arrays.items() if math.prod(shape)}
        for key, x in small.items():
            self._write(key, None, x)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if kind is not None:
            shutil.rmtree(self._step_dir, ignore_errors=True)

    def write(self, path: Path, index: int | slice | EllipsisType | None, values: np.ndarray) -> None:
        """Writes one leading index, a range of leading rows, or the whole array (None or ...). Write each row once.

        Raises KeyError for an unknown path, ValueError if the dtype or shape differs from the declared one or a row
        was already written, and UserError if the disk cannot be written to.
        """
        self._write((self._item, *path), index, values)

    def _write(self, key: Path, index: int | slice | EllipsisType | None, values: np.ndarray) -> None:
        shape, dtype = self._arrays[key]
        start, stop = _rows(index, shape)
        block = values[None] if isinstance(index, (int, np.integer)) else values
        expected = (stop - start, *shape[1:]) if shape else ()
        if (block.shape, block.dtype) != (expected, dtype):
            raise ValueError(
                f"{'/'.join(key[1:])}: got {block.dtype}{list(block.shape)}, not {dtype}{list(expected)}"
            )
        if not block.size:
            return
        if not self._coverage[key].add(start, stop, block):
            raise ValueError(f"{'/'.join(key[1:])}: rows {start} to {stop} were written before")
        store = self._stores[key]
        self._guarded(lambda: (store[start:stop] if shape else store).write(block).result())

    def finish(self, json_items: Mapping[str, Any]) -> None:
        """Writes the JSON items and commits the step. Raises ValueError if rows are missing."""
        missing = ["/".join(key[1:]) for key, c in self._coverage.items() if not c.complete]
        if missing:
            raise ValueError(f"cannot commit {self._step_dir}: rows missing in {few(missing)}")
        self._guarded(lambda: self._commit({name: plain(document) for name, document in json_items.items()}))

    def _guarded(self, work: Any) -> None:
        try:
            work()
        except (ValueError, OSError) as error:
            reason = why_not_written(error, self._step_dir.parent, self._num_bytes)
            raise UserError(f"checkpoint {self._step_dir} was not written: {reason}") from None

    def _create(self, key: Path) -> ts.TensorStore:
        shape, dtype = self._arrays[key]
        spec = {
            "driver": "zarr",
            "kvstore": {"driver": "file", "path": f"{self._step_dir / key[0]}/{'.'.join(key[1:])}/"},
            "metadata": {
                "shape": list(shape),
                "chunks": list(_chunk_shape(shape, dtype.itemsize)),
                "dtype": "bfloat16" if dtype.name == "bfloat16" else dtype.str,
                "compressor": {"id": "zstd", "level": 1},
                "fill_value": None,
                "order": "C",
            },
            "store_data_equal_to_fill_value": True,
        }
        stores: list[ts.TensorStore] = []
        self._guarded(
            lambda: stores.append(ts.open(spec, create=True, open=False, context=self._context).result())
        )
        return stores[0]

    def _commit(self, documents: dict[str, Any]) -> None:
        entries: dict[str, dict[str, Entry]] = {self._item: {}}
        for (item, *path), (shape, dtype) in self._arrays.items():
            entries.setdefault(item, {})["/".join(path)] = Entry(shape, dtype.name, self._coverage[(item, *path)].sum)
        record = Record(arrays=entries, json={name: checksum(doc) for name, doc in documents.items()})
        documents = documents | {RECORD_ITEM: record.to_json()}
        handlers = {name: _HANDLERS + "json_checkpoint_handler.JsonCheckpointHandler" for name in documents}
        for item in dict.fromkeys(key[0] for key in self._stores):
            handlers[item] = _HANDLERS + "pytree_checkpoint_handler.PyTreeCheckpointHandler"
            metadata = _tree_metadata([key[1:] for key in self._stores if key[0] == item])
            _write_text(self._step_dir / item / "_METADATA", json.dumps(metadata))
            _write_text(self._step_dir / item / COMMIT_MARKER, "committed")
        for name, document in documents.items():
            _write_text(self._step_dir / name / "metadata", json.dumps(document))
            _write_text(self._step_dir / name / COMMIT_MARKER, "committed")
        step_metadata = {
            "item_handlers": handlers,
            "metrics": {},
            "performance_metrics": {},
            "init_timestamp_nsecs": self._start_ns,
            "commit_timestamp_nsecs": time.time_ns(),
            "custom_metadata": {},
        }
        _write_text(self._step_dir / "_CHECKPOINT_METADATA", json.dumps(step_metadata))
        _write_text(self._step_dir / COMMIT_MARKER, "committed")  # last, because it makes the step valid


def _write_text(path: pathlib.Path, text: str) -> None:
    """Writes a small file durably: both its content and its directory entry survive a power loss."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _tree_metadata(paths: list[Path]) -> dict[str, Any]:
    """Orbax's description of a nested dict of arrays stored without OCDBT."""
    value = {"value_type": "np.ndarray", "skip_deserialize": False}
    tree = {
        str(path): {"key_metadata": [{"key": name, "key_type": 2} for name in path], "value_metadata": value}
        for path in paths
    }
    return {
        "tree_metadata": tree,
        "use_ocdbt": False,
        "use_zarr3": False,
        "store_array_data_equal_to_fill_value": True,
        "custom_metadata": None,
    }


def _chunk_shape(shape: tuple[int, ...], itemsize: int) -> tuple[int, ...]:
    """The zarr chunk shape: one leading index if that is at least 1 MiB, else groups of rows; at most about 64 MiB."""
    if not shape:
        return ()
    row_bytes = math.prod(shape[1:]) * itemsize
    if row_bytes < _ROW_GROUP_BYTES // 4:
        groups = math.ceil(shape[0] * row_bytes / _ROW_GROUP_BYTES)
        return (math.ceil(shape[0] / groups), *shape[1:])
    chunk = [1, *shape[1:]]
    for axis in range(1, len(shape)):
        parts = math.ceil(math.prod(chunk) * itemsize / _CHUNK_BYTES)
        chunk[axis] = math.ceil(chunk[axis] / min(parts, chunk[axis]))
    return tuple(chunk)
