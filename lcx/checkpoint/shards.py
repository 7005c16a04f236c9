"""Reads the arrays of a step onto the devices of any mesh: each process the chunks that its devices need, each once.

A chunk is decoded once, however many shards of this process have a part of it, and its parts are copied into buffers
of those shards. Few chunks are under way at a time, so that the host holds its own shards and little more. A CPU device
takes a buffer over as it is; of another device the buffer is freed once it has been copied there.
"""

from __future__ import annotations

import concurrent.futures
import itertools
import json
import math
import os
import threading
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
import tensorstore as ts

from lcx.checkpoint.slices import open_array

_UNDER_WAY_BYTES = 96 << 20  # of chunks that are being read
_COPIES = 3  # of a chunk under way: as stored, decoded, and the part of it that is needed
_THREADS = 16  # most chunks under way; a file system of a network is slow to begin an answer
_ALIGNED = 64  # bytes: a CPU device copies a buffer that begins elsewhere

Bounds = tuple[tuple[int, int], ...]  # a part of an array: start and stop on every axis
Box = tuple[slice, ...]


def read_arrays(item_dir: Any, wanted: Mapping[str, jax.ShapeDtypeStruct]) -> dict[str, jax.Array]:
    """The arrays {"a/b": ...} of one item of a step, each with the sharding of its struct.

    Raises ValueError if a file is missing or damaged, or an array is stored with another shape or dtype.
    """
    context = ts.Context(
        {
            "cache_pool": {"total_bytes_limit": 16 << 20},  # the nodes of Orbax's database, not the chunks
            "data_copy_concurrency": {"limit": os.cpu_count() or 1},
            "file_io_concurrency": {"limit": _THREADS},
        }
    )
    if any(math.prod(struct.shape) for struct in wanted.values()):
        json.loads((item_dir / "_METADATA").read_text())  # a step that Orbax itself could not read is not whole
    budget = _Budget(_UNDER_WAY_BYTES)
    arrays: dict[str, jax.Array] = {}
    with concurrent.futures.ThreadPoolExecutor(_THREADS, "lcx-restore") as pool:
        futures = []
        try:
            for key, struct in wanted.items():
                if not math.prod(struct.shape):  # Orbax stores no empty arrays
                    arrays[key] = jax.device_put(np.zeros(struct.shape, struct.dtype), struct.sharding)
                    continue
                array = _Array(key, struct, open_array(item_dir, tuple(key.split("/")), struct, context), arrays)
                for cell, boxes in array.cells():
                    budget.take(array.nbytes(cell))
                    futures.append(pool.submit(array.read, cell, boxes, budget))
                    if any(future.done() and future.exception() for future in futures[-2 * _THREADS :]):
                        break
            for future in futures:
                future.result()
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise
    return {key: arrays[key] for key in wanted}


class _Budget:
    """Bytes that may be under way; at least one piece is, however large."""

    def __init__(self, most: int):
        self._free, self._most, self._changed = most, most, threading.Condition()

    def take(self, nbytes: int) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self._free >= min(nbytes, self._most))
            self._free -= nbytes

    def give(self, nbytes: int) -> None:
        with self._changed:
            self._free += nbytes
            self._changed.notify()


class _Array:
    """One array on its way to the devices of this process."""

    def __init__(self, key: str, struct: jax.ShapeDtypeStruct, store: ts.TensorStore, arrays: dict[str, jax.Array]):
        self._key, self._struct, self._store, self._arrays = key, struct, store, arrays
        self._devices: dict[Bounds, list[Any]] = {}  # a shard -> the devices with a copy of it
        for device, index in struct.sharding.addressable_devices_indices_map(struct.shape).items():
            bounds = tuple(part.indices(size)[:2] for part, size in zip(index, struct.shape))
            self._devices.setdefault(bounds, []).append(device)
        self._buffers: dict[Bounds, np.ndarray] = {}
        self._lock, self._missing = threading.Lock(), 0

    def cells(self) -> list[tuple[Box, list[Bounds]]]:
        """(the part of a chunk to read, the shards that it is for) for each chunk that a shard needs."""
        chunk = tuple(size or 1 for size in self._store.chunk_layout.read_chunk.shape or ())
        needed: dict[tuple[int, ...], list[Bounds]] = {}
        for bounds in self._devices:
            for cell in itertools.product(*_cells(bounds, chunk)):
                needed.setdefault(cell, []).append(bounds)
        found = []
        for cell, shards in needed.items():
            inside = [_common(_bounds(cell, chunk), bounds) for bounds in shards]
            hull = tuple(slice(min(a for a, _ in axis), max(b for _, b in axis)) for axis in zip(*inside))
            found.append((hull, shards))
        self._missing = len(found)
        return found

    def nbytes(self, cell: Box) -> int:
        """The memory that it takes to read a part."""
        return _COPIES * math.prod(part.stop - part.start for part in cell) * self._struct.dtype.itemsize

    def read(self, cell: Box, shards: list[Bounds], budget: _Budget) -> None:
        """Reads a part and copies it into the shards; the last part of an array puts it on its devices."""
        try:
            parts = [_common([(part.start, part.stop) for part in cell], bounds) for bounds in shards]
            targets = [self._buffer(bounds)[_within(part, bounds)] for part, bounds in zip(parts, shards)]
            if sum(target.size for target in targets) == math.prod(part.stop - part.start for part in cell):
                _laid(targets, parts).write(self._store[cell]).result()
            else:  # devices of other processes have the rest
                decoded = self._store[cell].read().result()
                corner = [(part.start, part.stop) for part in cell]
                for target, part in zip(targets, parts):
                    ts.array(target).write(ts.array(decoded[_within(part, corner)])).result()
        finally:
            budget.give(self.nbytes(cell))
        with self._lock:
            self._missing -= 1
            last = not self._missing
        if last:
            self._place()

    def _buffer(self, bounds: Bounds) -> np.ndarray:
        with self._lock:
            if bounds not in self._buffers:
                shape = tuple(stop - start for start, stop in bounds)
                self._buffers[bounds] = _aligned(shape, np.dtype(self._struct.dtype))
            return self._buffers[bounds]

    def _place(self) -> None:
        placed = []
        for bounds, devices in self._devices.items():
            buffer = self._buffers.pop(bounds)
            placed += [jax.device_put(buffer, device, may_alias=True) for device in devices]
        shape, sharding = self._struct.shape, self._struct.sharding
        array = jax.make_array_from_single_device_arrays(shape, sharding, placed)
        self._arrays[self._key] = array.block_until_ready()  # so that no more buffers are under way than arrays


def _laid(targets: list[np.ndarray], parts: list[Any]) -> ts.TensorStore:
    """The targets as one array, in which each has the place of its part: what is decoded is copied once, into all.

    By tensorstore: numpy would hold back the threads that read other chunks.
    """
    views = [ts.array(x).translate_to[tuple(start for start, _ in part)] for x, part in zip(targets, parts)]
    return ts.overlay(views) if len(views) > 1 else views[0]


def _aligned(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    nbytes = math.prod(shape) * dtype.itemsize
    raw = np.empty(nbytes + _ALIGNED, np.uint8)
    start = -raw.ctypes.data % _ALIGNED
    return raw[start : start + nbytes].view(dtype).reshape(shape)


def _within(part: Any, bounds: Any) -> tuple[Any, ...]:
    """The indices of a part in an array that holds only `bounds`; they give a view of an array without axes too."""
    return *(slice(start - first, stop - first) for (start, stop), (first, _) in zip(part, bounds)), ...


def _cells(bounds: Any, chunk: tuple[int, ...]) -> Iterator[range]:
    """On each axis, the numbers of the chunks that a shard has a part of."""
    return (range(start // size, -(-stop // size)) for (start, stop), size in zip(bounds, chunk))


def _bounds(cell: tuple[int, ...], chunk: tuple[int, ...]) -> list[tuple[int, int]]:
    return [(number * size, (number + 1) * size) for number, size in zip(cell, chunk)]


def _common(a: Any, b: Any) -> list[tuple[int, int]]:
    """The part of two boxes that they share, as bounds."""
    return [(max(start, other), min(stop, end)) for (start, stop), (other, end) in zip(a, b)]
