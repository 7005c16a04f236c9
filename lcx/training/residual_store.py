"""Stores the residual stream at one depth of a model on disk, so that a block of layers can be trained separately.

    FOLDER/stream.bin       [rows, T, D], the model's dtype
    FOLDER/rows.npz         segment_ids and positions, int32 [rows, T]
    FOLDER/progress.json    number of complete rows, and the state of the source from which to continue

The stream is stored before the norm of the layer that reads it, because that layer also adds it to its own output.
"""

import dataclasses
import json
import math
import os
import pathlib
import shutil
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from lcx.errors import UserError

STREAM, ROWS, PROGRESS = "stream.bin", "rows.npz", "progress.json"
MASKS = ("segment_ids", "positions")


@dataclasses.dataclass(frozen=True)
class Layout:
    """Shape and dtype of a stored stream, [rows, seq_len, hidden_size]."""

    rows: int
    seq_len: int
    hidden_size: int
    dtype: str

    @property
    def row_bytes(self) -> int:
        return self.seq_len * self.hidden_size * jax.numpy.dtype(self.dtype).itemsize

    @property
    def num_bytes(self) -> int:
        return self.rows * (self.row_bytes + 8 * self.seq_len)


def check_space(folder: pathlib.Path, layouts: Sequence[Layout], *, checkpoints: int, settings: str) -> None:
    """Raises UserError if block inputs and checkpoints do not fit on the disk.

    Files that are already in the folder are subtracted from what is needed, because they will be reused.

    Args:
      folder: where the files will be; it need not exist.
      layouts: all streams that will be stored.
      checkpoints: bytes that the checkpoints will take.
      settings: for the message: what the user can change.
    """
    inputs = sum(layout.num_bytes for layout in layouts)
    there = sum(file.stat().st_blocks * 512 for file in folder.rglob("*") if file.is_file())
    place = next(path for path in (folder, *folder.parents) if path.exists())
    free = shutil.disk_usage(place).free
    if inputs + checkpoints - there > free:
        raise UserError(
            f"{folder}: the inputs of all blocks take {size(inputs)} and their checkpoints {size(checkpoints)}, found "
            f"{size(free)} free; {settings}"
        )


def size(nbytes: float) -> str:
    power = max(0, min(4, int(math.log(max(nbytes, 1), 1000))))
    return f"{nbytes / 1000**power:.3g} {('bytes', 'kB', 'MB', 'GB', 'TB')[power]}"


class Writer:
    """Appends rows batch by batch. After a kill, rows that were not flushed are written again.

    Attributes:
      rows: how many rows are complete.
      data: state of the source after these rows; None at the start.

    Raises:
      UserError: the folder holds rows of other settings, or the disk is full.
    """

    def __init__(self, folder: pathlib.Path, layout: Layout, about: Mapping[str, Any]):
        self._folder, self._layout = folder, layout
        self._record = {"layout": dataclasses.asdict(layout), "about": dict(about)}
        self.rows, self.data = 0, None
        self._masks = {name: np.zeros((layout.rows, layout.seq_len), np.int32) for name in MASKS}
        folder.mkdir(parents=True, exist_ok=True)
        found = progress(folder)
        if found is not None:
            self._check(found)
            self.rows, self.data = found["rows"], found["data"]
            self._masks = {name: np.array(x) for name, x in read_masks(folder).items()}
        self._file = self._open(folder / STREAM)

    def _check(self, found: Mapping[str, Any]) -> None:
        for part, new in self._record.items():
            for key in new:
                old = found[part].get(key)
                if old != new[key]:
                    raise UserError(
                        f"{self._folder} holds inputs of {key} = {old!r}, found {new[key]!r}: set it back, or set "
                        "another --workdir"
                    )

    def _open(self, path: pathlib.Path) -> int:
        """Opens the file and allocates all of it, so that a full disk shows now and not in the middle of the run."""
        needed = self._layout.rows * self._layout.row_bytes
        found = path.stat().st_size if path.exists() else 0
        if self.rows and found != needed:
            raise UserError(
                f"{path}: expected {needed} bytes, found {found}; delete {self._folder} and run again"
            )
        file = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            if found != needed:
                os.posix_fallocate(file, 0, needed)
        except OSError as error:
            os.close(file)
            raise UserError(
                f"cannot reserve {path}: {error.strerror}; free disk space, or set another --workdir"
            ) from None
        return file

    def write(self, stream: np.ndarray, masks: Mapping[str, np.ndarray], data: dict[str, Any] | None) -> None:
        """Appends rows; they count as complete only after `flush`.

        Args:
          stream: residual stream [b, T, D].
          masks: segment_ids and positions, int32 [b, T].
          data: state of the source after these rows.
        """
        x = np.ascontiguousarray(stream.astype(jax.numpy.dtype(self._layout.dtype)))
        _write_all(self._file, x.view(np.uint8).reshape(-1), self.rows * self._layout.row_bytes)
        for name in MASKS:
            self._masks[name][self.rows : self.rows + len(x)] = masks[name]
        self.rows, self.data = self.rows + len(x), data

    def flush(self) -> None:
        """Syncs the rows to disk and only then records them in progress.json, so that a kill cannot count lost rows."""
        os.fsync(self._file)
        partial = self._folder / f"{ROWS}.partial"
        with open(partial, "wb") as out:
            np.savez(out, allow_pickle=False, **self._masks)
            out.flush()
            os.fsync(out.fileno())
        os.replace(partial, self._folder / ROWS)
        partial = self._folder / f"{PROGRESS}.partial"
        partial.write_text(json.dumps({**self._record, "rows": self.rows, "data": self.data}))
        os.replace(partial, self._folder / PROGRESS)

    def __enter__(self) -> "Writer":
        return self

    def __exit__(self, *exception: object) -> None:
        os.close(self._file)


def _write_all(file: int, data: np.ndarray, offset: int) -> None:
    while data.size:
        done = os.pwrite(file, data[: 1 << 26].data, offset)
        data, offset = data[done:], offset + done


def progress(folder: pathlib.Path) -> dict[str, Any] | None:
    """The contents of a folder's progress.json; None if there is none. Raises UserError if the file is damaged."""
    path = folder / PROGRESS
    if not path.exists():
        return None
    try:
        record = json.loads(path.read_text())
        return {key: record[key] for key in ("layout", "about", "rows", "data")}
    except (ValueError, KeyError) as error:
        raise UserError(
            f"{path} is damaged ({error}): delete {folder} and run again, the inputs will be recomputed"
        ) from None


def read_masks(folder: pathlib.Path) -> dict[str, np.ndarray]:
    with np.load(folder / ROWS, allow_pickle=False) as arrays:
        return {name: arrays[name] for name in MASKS}


class Rows:
    """Iterates over batches {residual [B, T, D], segment_ids [B, T], positions [B, T]} in the order written.

    With `repeat` it starts again after the last row, else it stops. `state` and `restore` work as in
    data.BatchIterator. With several processes each reads its own B / process_count rows of every batch.

    Raises:
      UserError: some rows have not been written yet, or the file has the wrong size.
    """

    def __init__(
        self,
        folder: pathlib.Path,
        *,
        batch_size: int,
        process_index: int = 0,
        process_count: int = 1,
        repeat: bool = True,
    ):
        record = progress(folder)
        if record is None or record["rows"] < record["layout"]["rows"]:
            found = "nothing" if record is None else f"{record['rows']} of {record['layout']['rows']} rows"
            raise UserError(
                f"{folder}: expected the inputs of a block, found {found}; run with Blocks.only = () first"
            )
        layout = Layout(**record["layout"])
        expected, path = layout.rows * layout.row_bytes, folder / STREAM
        found_bytes = path.stat().st_size if path.is_file() else 0
        if found_bytes != expected:
            raise UserError(
                f"{path}: expected {expected} bytes, found {found_bytes}; delete {folder} and run again"
            )
        shape = layout.rows, layout.seq_len, layout.hidden_size
        self._stream = np.memmap(path, jax.numpy.dtype(layout.dtype), mode="r", shape=shape)
        self._masks = read_masks(folder)
        self._size, self._next, self._repeat = batch_size, 0, repeat
        share = batch_size // process_count
        self._own = np.arange(process_index * share, (process_index + 1) * share)

    def __iter__(self) -> "Rows":
        return self

    def __next__(self) -> dict[str, np.ndarray]:
        if not self._repeat and self._next >= len(self._stream):
            raise StopIteration
        rows = (self._next + self._own) % len(self._stream)
        self._next += self._size
        return {
            **{name: x[rows] for name, x in self._masks.items()},
            "residual": np.asarray(self._stream[rows]),
        }

    def padding(self) -> dict[str, np.ndarray]:
        """Zeros with the shapes and dtypes of all batches. Nothing is read for it."""
        arrays = {**self._masks, "residual": self._stream}
        return {name: np.zeros((len(self._own), *x.shape[1:]), x.dtype) for name, x in arrays.items()}

    def state(self) -> dict[str, Any]:
        return {"next_index": self._next}

    def restore(self, state: Mapping[str, Any]) -> None:
        self._next = int(state["next_index"])

    def __enter__(self) -> "Rows":
        return self

    def __exit__(self, *exception: object) -> None:
        pass
