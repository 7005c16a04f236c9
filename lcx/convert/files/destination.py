"""Atomic writing of a destination folder: a failed write leaves no partial folder and keeps the previous one."""

import contextlib
import os
import pathlib
import shutil
from collections.abc import Callable, Iterator

from lcx import paths
from lcx.errors import UserError
from lcx.locks import LOCK, beside, only_writer, refuse_held


@contextlib.contextmanager
def replacing(
    path: str | os.PathLike,
    *,
    overwrite: bool,
    needed_bytes: int,
    replaceable: Callable[[pathlib.Path], bool],
) -> Iterator[pathlib.Path]:
    """Yields an empty temporary folder next to `path`; it is renamed to `path` if the block ends without an error.

    With `overwrite`, the old folder is first moved aside, the new one is renamed into place, and only then is the old
    one deleted. After an error the partial folder is removed and the old one is left unchanged.

    Args:
      path: the destination.
      overwrite: whether an existing folder may be replaced.
      needed_bytes: size of what will be written; checked against the free disk space before anything is written.
      replaceable: whether an existing folder is of a kind that may be replaced (a checkpoint, not a home directory).

    Raises:
      UserError: the destination exists or cannot be written, or the disk is full.
    """
    final = pathlib.Path(os.path.realpath(paths.destination(path, "--dst")))
    paths.refuse_inside(final, "--dst")
    partial, old = (_beside(final, suffix) for suffix in ("tmp", "old"))
    made = _existing_parent(final)
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        with only_writer(beside(final), of=str(final), setting="--dst"):
            try:
                _recover(final, partial, old)
                _check_free(final, overwrite, replaceable)
                for lock in final.rglob(f"*{LOCK}"):  # a run in it, or an evaluation below it
                    refuse_held(lock, of=str(lock.parent), setting="--dst")
                _check_space(final, needed_bytes)
                partial.mkdir()
                yield partial
                sync_folder(partial)
                _check_free(final, overwrite, replaceable)  # another program may have made it since
                _swap(final, partial, old)
            except BaseException:
                shutil.rmtree(partial, ignore_errors=True)
                raise
    except OSError as error:
        _remove_parents(final, made)
        raise UserError(
            f"{final}: cannot be written: {error.strerror or error}; nothing was changed there, free some "
            "space or change --dst"
        ) from error
    except UserError as error:
        _remove_parents(final, made)
        error.args = (str(error).replace(str(partial), str(final)),)  # its class may mean something to the caller
        raise
    except BaseException:
        _remove_parents(final, made)
        raise


def refuse_same(source: str | os.PathLike, destination: str | os.PathLike, setting: str = "--src") -> None:
    """Raises UserError if writing the destination would overwrite or delete the source, which `setting` names."""
    src, dst = pathlib.Path(os.path.realpath(source)), pathlib.Path(os.path.realpath(destination))
    if src == dst:
        raise UserError(f"--dst is the same folder as {setting} ({src}); choose another --dst")
    if src.is_relative_to(dst):
        raise UserError(
            f"--dst ({dst}) contains {setting} ({src}), which replacing it would delete; choose another --dst"
        )
    steps = src if src.name == "checkpoints" else src / "checkpoints"
    if dst.is_relative_to(steps):
        raise UserError(f"--dst ({dst}) is among the checkpoints of {setting} ({src}); choose another --dst")


def sync_folder(folder: pathlib.Path) -> None:
    """Syncs the folder and its subfolders to disk, so that their directory entries survive a crash."""
    for root, _, _ in os.walk(folder):
        handle = os.open(root, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _beside(final: pathlib.Path, suffix: str) -> pathlib.Path:
    return final.with_name(f".{final.name}.lcx-{suffix}")


def _recover(final: pathlib.Path, partial: pathlib.Path, old: pathlib.Path) -> None:
    """Cleans up after a killed conversion. If it was killed between the two renames, the old folder is restored."""
    # Killed after moving the old folder aside, before the new one was in place.
    if old.exists() and not final.exists():
        os.rename(old, final)
    for leftover in (partial, old):
        shutil.rmtree(leftover, ignore_errors=True)


def _check_free(final: pathlib.Path, overwrite: bool, replaceable: Callable[[pathlib.Path], bool]) -> None:
    if not os.path.lexists(final) or (final.is_dir() and not any(final.iterdir())):
        return
    if not overwrite:
        raise UserError(
            f"{final}: already exists; choose another --dst, or pass --overwrite to replace it "
            "(in Python: overwrite=True)"
        )
    if not final.is_dir() or not replaceable(final):
        raise UserError(f"{final}: exists and is not a checkpoint folder, so --overwrite does not replace it")


def _existing_parent(final: pathlib.Path) -> pathlib.Path:
    return next(parent for parent in final.parents if parent.exists())


def _swap(final: pathlib.Path, partial: pathlib.Path, old: pathlib.Path) -> None:
    if final.exists():
        os.rename(final, old)
    try:
        os.rename(partial, final)
    except OSError:
        if old.exists():
            os.rename(old, final)
        raise
    handle = os.open(final.parent, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
    shutil.rmtree(old, ignore_errors=True)


def _check_space(final: pathlib.Path, needed_bytes: int) -> None:
    free = shutil.disk_usage(final.parent).free
    if needed_bytes > free:
        raise UserError(
            f"{final}: needs {needed_bytes:,} bytes and the disk has {free:,} free; free some, or change --dst"
        )


def _remove_parents(final: pathlib.Path, existing_parent: pathlib.Path) -> None:
    """Removes the parent folders that were created for the destination."""
    for parent in final.parents:
        if parent == existing_parent:
            break
        with contextlib.suppress(OSError):
            parent.rmdir()
