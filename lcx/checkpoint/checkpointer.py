"""Checkpoints that are complete, verified and independent of the mesh, on Orbax.

`folder` defines the layout on disk and `tree` how a pytree maps to it; this file saves and restores.

It adds three safeguards that Orbax lacks:

- Orbax does not detect corrupted data. Here every array has a fingerprint, and `restore` falls back to the
  newest step that verifies.
- Orbax lists a failed background save as done. Here the commit marker on disk decides, and the outcome of
  every save is known before the next one starts.
- Orbax fills a missing key with an abstract leaf and casts dtypes silently. Here keys, shapes and dtypes are
  compared first.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
import threading
from collections.abc import Callable, Collection, Mapping
from types import TracebackType
from typing import Any, Self

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from flax.traverse_util import unflatten_dict
from jax.experimental import multihost_utils
from orbax.checkpoint._src.metadata.array_metadata_store import Store  # not exported

from lcx import paths
from lcx.checkpoint import orbax_messages
from lcx.checkpoint.folder import (
    COMMIT_MARKER,
    RECORD_ITEM,
    Damaged,
    DamagedStep,
    Record,
    brief,
    checksum,
    committed_steps,
    few,
    find_step,
    load_json,
    load_record,
    metadata,
    nothing_usable,
    plain,
    read_json,
    read_record,
    remember_damage,
    say_damage,
    step_folders,
    why_not_written,
    why_unreadable,
)
from lcx.checkpoint.shards import read_arrays as _read_arrays
from lcx.checkpoint.tree import Tree, from_stored, misfits, stored_structs, to_stored, verify
from lcx.errors import UserError
from lcx.multihost import watch

__all__ = ["Checkpointer", "committed_steps", "find_step", "metadata", "read_json", "read_record"]

_TRASH = "_trash"  # steps past max_to_keep wait here for removal
_SET_ASIDE = "_set_aside"  # steps newer than the one a run resumed from, and rejected steps; never removed
_CHUNK_BYTES = 64 << 20  # larger arrays are cut into pieces, so that readers can stream them
_SLICE_BYTES = 4 << 20  # devices that hold the same array each write a part of it, unless the parts are smaller
_SAVE_TIMEOUT_S = 1200  # for the background write of one step, and for processes to wait for each other

_log = logging.getLogger("lcx.checkpoint")


@dataclasses.dataclass
class _Pending:
    """A save that was started and whose outcome is not known yet."""

    step: int
    num_bytes: int


class Checkpointer:
    """Saves training states in the background and restores the newest one that verifies, in one checkpoints folder.

    Saving: `save` returns once the arrays are copied; writing to disk continues in the background while training
    proceeds. A save that fails (a full disk, a lost mount) never stops the run: it is logged as one warning on the
    logger `lcx.checkpoint` and appended to `failures`, its partially written folder is removed, older steps stay,
    and the next save tries again. Only `save(..., wait=True)`, for the last or a forced checkpoint, and
    `close` raise UserError when the newest save was not written. Call `poll` after every training step: it never
    waits, and reports a failure as soon as it is known. With several processes a failure is reported at the next
    save instead, which is where all of them synchronise.

    Restoring: `restore` tries the newest committed step. If its files are damaged, it logs a warning and falls back
    to the newest older step that verifies. A step that does not fit the requested trees raises UserError and is no
    reason to fall back. With several processes all of them restore the same step.

    After a resume from an older step, the first save moves the newer steps to `_set_aside`, from which nothing is
    ever removed. `reject` moves a step there too: one whose files are intact, but which comes from a diverged run.
    Nothing is written, created or removed before the first save, so a folder in use can be opened for reading.
    """

    def __init__(self, directory: Any, *, max_to_keep: int = 3):
        if max_to_keep < 1:
            raise UserError(f"max_to_keep={max_to_keep}; expected at least 1 checkpoint to keep")
        paths.refuse_scheme(str(directory), "the checkpoint folder")
        self.directory = epath.Path(directory).expanduser().resolve()
        self.failures: list[str] = []
        self._max_to_keep = max_to_keep
        self._manager: ocp.CheckpointManager | None = None
        self._pending: _Pending | None = None
        self._latest: int | None = None  # the step that this object restored or wrote last
        self._newest_failure: str | None = None
        self._sweeper: threading.Thread | None = None
        orbax_messages.hush()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        elif isinstance(value, UserError) or jax.process_count() == 1:
            # A failed save was reported as a warning; the exception under way matters more.
            with contextlib.suppress(UserError):
                self.close()
        # Else another process may be gone: waiting until it has written its part would take minutes.

    def steps(self) -> list[int]:
        """Committed steps on disk, oldest first. A save still in progress is not included."""
        return committed_steps(self.directory)

    def save(
        self,
        step: int,
        items: Mapping[str, Tree],
        *,
        json: Mapping[str, Any] | None = None,
        wait: bool = False,
    ) -> bool:
        """Starts writing one step, after waiting for the previous save to finish. Call it on every process.

        Args:
          step: its number. A step that this object just wrote or restored is not written again.
          items: {name: pytree of arrays}. The arrays may be donated or modified after the call.
          json: {name: JSON document}. Items and documents must not share a name.
          wait: return only once the step is on disk.

        Returns:
          False if the save failed immediately (which is logged as a warning), else True.

        Raises:
          UserError: the folder cannot be created, or already holds this or a newer step that this object has not
            restored; with wait=True also if the step could not be written.
          ValueError: the step is lower than the last one written or restored, or a name is used twice.
        """
        self._settle()
        if step != self._latest:
            documents = {name: plain(document) for name, document in (json or {}).items()}
            trouble = None
            try:
                self._make_room(step)
            except OSError as error:
                trouble = error
            if _everywhere(trouble is None):
                self._start(step, items, documents)
            else:
                self._report(_Pending(step, 0), trouble)
        if wait:
            self._settle()
            if self._latest != step:
                self._newest_failure, failure = None, self._newest_failure
                raise UserError(failure or f"checkpoint of step {step} was not written")
        return self._pending is not None or self._latest == step

    def poll(self) -> list[str]:
        """Reports a failed background save, without waiting. Returns the new failure messages, usually none."""
        known = len(self.failures)
        alone = jax.process_count() == 1
        if alone and self._pending and self._manager and not self._manager.is_saving_in_progress():
            self._settle()
        return self.failures[known:]

    def restore(
        self, abstract: Mapping[str, Tree], *, step: int | None = None, optional: Collection[str] = ()
    ) -> tuple[int, dict[str, Tree], dict[str, Any]]:
        """(step, items, JSON documents) of the newest step that verifies.

        Args:
          abstract: {item: tree of jax.ShapeDtypeStruct (or arrays) with the shardings to restore to}. Only these
            items are read; {} reads none. JSON documents are always read. A leaf without a sharding goes to the
            first device.
          step: restore exactly this step, without falling back to an older one.
          optional: items that may be missing from the checkpoint; a missing one is left out of the result.

        Raises:
          UserError: there is no checkpoint, no step verifies (the message gives the reason for each), or the trees
            do not fit (the message names the first keys that differ).
          DamagedStep: `step` is given, and damaged.
        """
        self._settle()
        self._close_manager()  # Orbax caches the list of steps, and the next save may set some of them aside
        steps = _from_first_process(self.steps())
        if not steps:
            raise UserError(f"no checkpoint in {self.directory}; expected at least one committed step folder")
        if step is not None and step not in steps:
            raise UserError(
                f"no checkpoint of step {step} in {self.directory}; found steps {few(steps, limit=9)}"
            )
        bad: dict[int, str] = {}
        while candidates := [s for s in steps if s not in bad and step in (None, s)]:
            candidate = candidates[-1]
            try:
                items, documents = _load_step(self.directory / str(candidate), abstract, optional)
            except Damaged as damage:
                if step is not None:
                    raise DamagedStep(self.directory / str(step), str(damage)) from None
                bad[candidate] = f"step {candidate}: {damage}"
                remember_damage(self.directory / str(candidate), str(damage))
                # A run that is still writing may have added or removed steps in the meantime.
                steps = _from_first_process(self.steps())
                continue
            if bad:
                say_damage(self.directory, bad.values(), candidate)
            self._latest = candidate
            return candidate, items, documents
        raise nothing_usable(self.directory, bad.values())

    def close(self) -> None:
        """Waits for a save in progress. Raises UserError if the newest save could not be written."""
        self._settle()
        self._close_manager()
        self._join_sweeper()
        self._newest_failure, failure = None, self._newest_failure
        if failure:
            raise UserError(failure)

    def reject(self, step: int) -> None:
        """Sets aside a committed step whose weights gave a non-finite loss or gradient, if an older step remains."""
        self._settle()
        self._close_manager()
        if jax.process_index() == 0 and self.steps()[1:].count(step):
            self._set_aside(step, "gave a non-finite loss or gradient")

    def _make_room(self, step: int) -> None:
        """Prepares the folder for a save: sets newer steps aside and removes unfinished ones. Raises as `save` does."""
        if self._latest is not None and step < self._latest:
            raise ValueError(f"save of step {step} after step {self._latest}; steps must increase")
        self._join_sweeper()
        behind = step - 1 if self._latest is None else self._latest
        newer = [other for other in self.steps() if other > behind]
        if newer and self._latest is None:
            raise UserError(
                f"{self.directory} already holds step {newer[-1]}, found a save of step {step}: "
                "resume from that checkpoint, or set another workdir"
            )
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
        except (PermissionError, FileExistsError, NotADirectoryError) as error:
            raise UserError(f"cannot create {self.directory} ({brief(error)}); set another workdir") from None
        if jax.process_index() == 0:
            for other in newer:
                self._set_aside(other)
            for other, committed in list(step_folders(self.directory)):
                if not committed:
                    _remove(self.directory / str(other))
            self._sweep()
            self._join_sweeper()

    def _set_aside(self, step: int, why: str = "is newer than the checkpoint this run resumed from") -> None:
        parent = self.directory / _SET_ASIDE
        parent.mkdir(exist_ok=True)
        taken = {child.name for child in parent.iterdir()}
        names = (str(step), *(f"{step}.{again}" for again in range(1, len(taken) + 2)))
        name = next(name for name in names if name not in taken)
        (self.directory / str(step)).rename(parent / name)
        _log.warning("step %d %s; moved to %s", step, why, parent / name)

    def _start(self, step: int, items: Mapping[str, Tree], documents: dict[str, Any]) -> None:
        if clash := (items.keys() & documents.keys()) | ({RECORD_ITEM} & (items.keys() | documents.keys())):
            raise ValueError(f"items named twice, or reserved: {few(sorted(clash))}")
        saves: dict[str, Any] = {name: ocp.args.JsonSave(document) for name, document in documents.items()}
        record = Record(arrays={}, json={name: checksum(document) for name, document in documents.items()})
        num_bytes = 0
        for name, tree in items.items():
            arrays, record.arrays[name] = to_stored(name, tree)
            arrays = {key: x for key, x in arrays.items() if x.size}  # Orbax refuses empty arrays
            num_bytes += sum(x.nbytes for x in arrays.values())
            if arrays:
                saves[name] = _save_args(arrays)
        saves[RECORD_ITEM] = ocp.args.JsonSave(record.to_json())
        pending = _Pending(step, num_bytes)
        try:
            self._manager = self._manager or _new_manager(self.directory, self._max_to_keep)
            self._manager.save(step, args=ocp.args.Composite(**saves), force=True)
        except Exception as error:
            self._report(pending, error)
        else:
            self._pending = pending

    def _settle(self) -> None:
        """Waits for the save in progress; all processes agree on whether it was written."""
        if self._pending is None or self._manager is None:
            return
        pending, error = self._pending, None
        try:
            self._manager.wait_until_finished()
        except Exception as failure:
            error = failure
        self._pending = None  # only now: after an interrupt during the wait, the save must still count as pending
        landed = _everywhere((self.directory / str(pending.step) / COMMIT_MARKER).exists())
        clean = _everywhere(error is None)
        if landed:
            self._latest, self._newest_failure = pending.step, None
            if not clean:
                self._close_manager()
                why = brief(error) if error else "another process failed"
                _log.warning("step %d is saved, but the cleanup after it failed: %s", pending.step, why)
            self._sweep()
        else:
            self._report(pending, error)

    def _report(self, pending: _Pending, error: Exception | None) -> None:
        """Cleans up after a failed save and logs it in one line. Raises the error again if another process is gone."""
        if error is not None and watch.blame(error) is not None:
            raise error
        self._close_manager()  # its cached list of steps is wrong now; the next save reads the disk again
        if jax.process_index() == 0:
            folder = self.directory / str(pending.step)
            if not (folder / COMMIT_MARKER).exists():
                _remove(folder)
            self._sweep()
            self._join_sweeper()
        reason = "another process failed"
        if error is not None:
            reason = why_not_written(error, self.directory, pending.num_bytes)
        line = (
            f"checkpoint of step {pending.step} was not written: {reason}; steps on disk: "
            f"{few(reversed(self.steps()))}; free space or lower max_to_keep={self._max_to_keep}"
        )
        self.failures.append(line)
        self._newest_failure = line
        _log.warning("%s", line)

    def _close_manager(self) -> None:
        manager, self._manager = self._manager, None
        if manager is not None:
            with contextlib.suppress(Exception):  # a failure of its last save was already reported by _settle
                manager.close()

    def _sweep(self) -> None:
        """Deletes steps beyond max_to_keep in a background thread; Orbax has only moved them to the trash folder."""
        self._join_sweeper()
        trash = self.directory / _TRASH
        if jax.process_index() == 0 and trash.exists():
            self._sweeper = threading.Thread(target=_remove, args=(trash,), daemon=True)
            self._sweeper.start()

    def _join_sweeper(self) -> None:
        sweeper, self._sweeper = self._sweeper, None
        if sweeper is not None:
            sweeper.join()


class _Manager(ocp.CheckpointManager):
    def reached_preemption(self, step: int) -> bool:
        """False: the training loop asks for itself (training/signals.py).

        Orbax would record how much work a save at a preemption rescued, from times that it does not read with
        `lightweight_initialize`, and fail before it removes old steps.
        """
        return False


def _new_manager(directory: epath.Path, max_to_keep: int) -> ocp.CheckpointManager:
    options = ocp.CheckpointManagerOptions(
        max_to_keep=max_to_keep,
        todelete_subdir=_TRASH,  # a rename is atomic: a kill during the removal cannot leave half a step
        save_root_metadata=False,
        lightweight_initialize=True,
        async_options=ocp.options.AsyncOptions(
            timeout_secs=_SAVE_TIMEOUT_S, create_directories_asynchronously=False
        ),
        atomicity_options=ocp.options.AtomicityOptions(mode=ocp.options.AtomicityMode.COMMIT_FILE),
    )
    return _Manager(directory, options=options, handler_registry=_handlers())


def _handlers() -> ocp.DefaultCheckpointHandlerRegistry:
    """Orbax's handler of trees, which by default cuts the smallest array into a part for each device that holds it.

    Each cut is a program that has to be compiled: the first save of 40 small arrays on eight devices took ten seconds.
    """
    kinds = ocp.type_handlers
    types = kinds.create_type_handler_registry(
        (
            jax.Array,
            kinds.ArrayHandler(array_metadata_store=Store(), min_slice_bytes_for_replica_parallel=_SLICE_BYTES),
        ),
        (np.ndarray, kinds.NumpyHandler()),
    )
    registry = ocp.DefaultCheckpointHandlerRegistry()
    registry.add(None, ocp.args.PyTreeSave, ocp.PyTreeCheckpointHandler(type_handler_registry=types))
    return registry


def _remove(path: epath.Path) -> None:
    with contextlib.suppress(OSError):  # whatever remains (a late writer, a busy mount) is removed before the next save
        path.rmtree()


def _save_args(flat: Mapping[str, Any]) -> ocp.args.PyTreeSave:
    """Splits arrays above 64 MiB into chunks; stacked layers at layer boundaries, so one layer can be read alone."""

    def cut(x: Any) -> ocp.SaveArgs:
        if x.nbytes <= _CHUNK_BYTES:
            return ocp.SaveArgs()
        stacked = x.ndim >= 3 and x.shape[0] <= 1024
        return ocp.SaveArgs(chunk_byte_size=_CHUNK_BYTES, shard_axes=(0,) if stacked else ())

    tree = unflatten_dict(flat, sep="/")
    return ocp.args.PyTreeSave(tree, save_args=jax.tree.map(cut, tree))


def _load_step(
    step_dir: epath.Path, abstract: Mapping[str, Tree], optional: Collection[str]
) -> tuple[dict[str, Tree], dict[str, Any]]:
    """(items, JSON documents) of one step, verified. Raises Damaged, or UserError if the trees do not fit."""
    record = _agreed(lambda: load_record(step_dir), "the record of fingerprints")
    documents = {
        name: _agreed(functools.partial(load_json, step_dir, name, record), name)
        for name in sorted(record.json)
    }
    for item, tree in abstract.items():
        if item not in record.arrays and item not in optional:
            found = few(sorted(record.arrays))
            raise UserError(
                f"checkpoint {step_dir} has no item {item!r}; found {found}; ask for one of these"
            )
        if item in record.arrays and (misfit := misfits(tree, record.arrays[item])):
            raise UserError(
                f"checkpoint {step_dir} does not fit: in {item}, {misfit}; "
                "check the model and optimizer settings, or pass another checkpoint"
            )
    items = {}
    for item, tree in abstract.items():
        if item in record.arrays:
            entries = record.arrays[item]
            arrays = _agreed(functools.partial(_read_arrays, step_dir / item, stored_structs(tree)), item)
            _agreed(functools.partial(verify, item, arrays, entries), item)
            items[item] = from_stored(tree, arrays, entries)
    return items, documents


def _agreed(work: Callable[[], Any], what: str) -> Any:
    """The result of `work`; raises Damaged on every process if it fails on any of them.

    This keeps the processes in lockstep: if one fell back to another step while the others continued, their
    collectives would no longer match and all of them would hang.
    """
    reason, result = None, None
    try:
        result = work()
    except Damaged as bad:
        reason = str(bad)
    except Exception as error:  # Orbax and tensorstore raise many types for damaged files
        reason = why_unreadable(what, error)
    if not _everywhere(reason is None):
        raise Damaged(reason or f"another process could not use {what}")
    return result


def _everywhere(verdict: bool) -> bool:
    """Whether the verdict is True on all processes. A collective: every process must call it."""
    return (
        verdict
        if jax.process_count() == 1
        else bool(np.all(multihost_utils.process_allgather(np.array(verdict))))
    )


def _from_first_process(steps: list[int]) -> list[int]:
    """The list of process 0 on all processes: on a shared file system the others may see changes later."""
    if jax.process_count() == 1:
        return steps
    count = int(multihost_utils.broadcast_one_to_all(np.int32(len(steps))))
    mine = np.array(steps if jax.process_index() == 0 else [0] * count, np.int32)
    return [int(step) for step in multihost_utils.broadcast_one_to_all(mine)] if count else []
