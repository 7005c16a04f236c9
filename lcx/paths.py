"""Folders that are written to: checked before any work is done, and written by one process at a time."""

import contextlib
import errno
import glob
import os
import pathlib
import re
import shutil
from collections.abc import Iterator, Mapping

from lcx.errors import UserError
from lcx.locks import LOCK, beside, only_writer, refuse_held

_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")


def destination(path: str | os.PathLike, setting: str) -> pathlib.Path:
    """The folder that a setting names, with ~ expanded.

    Raises:
      UserError: it is empty, a URL such as gs://bucket/run, which would create a local folder named "gs:", or a link
        to something that does not exist, such as a disk that is not mounted.
    """
    text = os.fspath(path)
    if not text.strip():
        raise UserError(f"{setting} is empty, expected a folder: set {setting}")
    refuse_scheme(text, setting)
    path = pathlib.Path(text).expanduser()
    try:
        os.lstat(path)
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            raise UserError(f"{setting} has a name that is too long for a file: change {setting}") from None
    there = next((part for part in (path, *path.parents) if os.path.lexists(part)), path)
    if there.is_symlink() and not os.path.exists(there):
        where = "" if there == path else f"in {there}, "
        raise UserError(
            f"{setting} is {text}, {where}a link to {os.readlink(there)}, which does not exist: make that first, or "
            f"change {setting}"
        )
    return path


def destination_file(path: str | os.PathLike, setting: str) -> pathlib.Path:
    """`destination` of a file: of a link to a file that file, so that not the link is replaced."""
    place = destination(path, setting)
    return pathlib.Path(os.path.realpath(place)) if place.is_symlink() and place.is_file() else place


def cache_folder(folder: str | None = None) -> pathlib.Path:
    """`folder` if it is set, else $LCX_CACHE, else the user's cache folder. All that is in it can be made again."""
    if folder:
        return destination(folder, "Dataset.cache_dir")
    if os.environ.get("LCX_CACHE"):
        return destination(os.environ["LCX_CACHE"], "LCX_CACHE")
    return pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache") / "lcx"


@contextlib.contextmanager
def claimed(folder: pathlib.Path, setting: str, *, lock: str = LOCK, of: str | None = None) -> Iterator[None]:
    """Creates a folder and its parents, and lets no other process write to it within the block.

    What is still empty after an exception is removed again.

    Args:
      setting: for messages: the setting that names the folder.
      lock: name of the lock file in the folder.
      of: for messages: what is written, if it is not the folder itself.

    Raises:
      UserError: the folder cannot be created or written to, it lies among the checkpoints of a run, or another process
        writes to it.
    """
    refuse_inside(folder, setting)
    missing = [path for path in (folder, *folder.absolute().parents) if not path.exists()]
    try:
        with contextlib.ExitStack() as stack:
            try:
                folder.mkdir(parents=True, exist_ok=True)
                stack.enter_context(only_writer(folder / lock, of=of or str(folder), setting=setting))
                refuse_held(beside(pathlib.Path(os.path.realpath(folder))), of=str(folder), setting=setting)
            except OSError as error:
                why = "it is a file, expected a folder" if folder.is_file() else error.strerror or error
                raise UserError(f"cannot write to {folder} ({why}): change {setting}") from None
            yield
    except BaseException:
        with contextlib.suppress(OSError):  # not empty: the work had begun
            for path in missing:
                path.rmdir()
        raise


@contextlib.contextmanager
def claimed_file(
    path: str | os.PathLike, setting: str, *, overwrite: bool = False, holds: str | None = None
) -> Iterator[pathlib.Path]:
    """Creates a result, a file or a folder of another format, that appears only when it is complete.

    Yields PATH.partial, to write within the block, which no other process writes at the same time; at the end it is
    renamed. After an exception nothing is left of it.

    Args:
      overwrite: whether an existing result is replaced. A folder is so only if it has the file `holds`, by which a
        result of this kind is recognised: any other folder is not ours to delete.
      holds: the name of that file; None: the result is a file.

    Raises:
      UserError: the result exists already, another process is writing it, or its folder cannot be written to.
    """
    place = destination_file(path, setting)
    with claimed(place.parent, setting, lock=f"{place.name}{LOCK}", of=str(place)):
        if place.is_dir() and (holds is None or not (place / holds).is_file()):
            raise UserError(f"{place} is a folder with other contents: choose another {setting}")
        refuse_device(place, setting)
        if place.exists() and not overwrite:  # asked only now: another process may just have finished it
            raise UserError(f"{place} is there already: choose another {setting}, or set --overwrite")
        partial = place.with_name(f"{place.name}.partial")
        _remove(partial)
        try:
            yield partial
            _remove(place)
            os.replace(partial, place)
        finally:
            _remove(partial)


def refuse_device(path: pathlib.Path, setting: str) -> None:
    """Raises UserError for a device or a pipe: a result that is renamed to it would delete /dev/null."""
    if path.exists() and not path.is_file() and not path.is_dir():
        raise UserError(f"{path} is a device or a pipe, expected a file: choose another {setting}")


def refuse_inside(folder: pathlib.Path, setting: str) -> None:
    """Raises UserError for the folder with the checkpoints of a run, and for any folder in it."""
    place = folder.absolute()
    for part in (place, *place.parents):
        if part.name == "checkpoints" and (part.parent / "config.gin").is_file():
            raise UserError(
                f"{setting} is {folder}, among the checkpoints of the run in {part.parent}: set {setting} to another "
                "folder, such as the run's own"
            )


def refuse_inputs(output: str | None, setting: str, inputs: Mapping[str, str | None]) -> None:
    """Raises UserError if the file to write is one of those that the command reads.

    Args:
      output: the file to write; None: there is none.
      setting: for messages: its setting.
      inputs: {setting: a file, a glob, a folder, or None}.
    """
    place = None if output is None else destination(output, setting)
    if place is None or not place.exists():
        return
    for name, given in inputs.items():
        for found in glob.glob(os.path.expanduser(given)) if given else ():
            if os.path.samefile(found, place):
                raise UserError(f"{setting} is {output}, which {name} reads: choose another {setting}")


def _remove(path: pathlib.Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def refuse_scheme(path: str | os.PathLike, setting: str) -> None:
    """Raises UserError for a URL such as gs://bucket/run."""
    match = _SCHEME.match(os.fspath(path))
    if match:
        raise UserError(
            f"{setting} is {os.fspath(path)}: {match[1]}:// is not supported here, expected a folder on this machine "
            f"(mount the bucket, or copy it here): change {setting}"
        )
