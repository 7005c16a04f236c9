"""Folders that are copied whole: a model from a bucket into the local cache, a converted folder into a bucket."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import logging
import pathlib
import re
import shutil
import tempfile
from collections.abc import Callable, Collection, Iterator, Sequence

from lcx import paths
from lcx.buckets import client
from lcx.errors import UserError, copied

COMMIT_MARKER = "commit_success.txt"  # of a checkpoint step; a save writes it last
STEP = re.compile(r"(?:.*/)?checkpoints/\d+/")  # how the name of a file in a step of a workdir begins
_MARKER = re.compile(
    rf"((?:checkpoints/)?(\d+)/){re.escape(COMMIT_MARKER)}"
)  # in a workdir or a checkpoints folder
_COMPLETES = {
    "config.json",
    "latest",
    "adapter_config.json",
    COMMIT_MARKER,
}  # written last: without it none is read

log = logging.getLogger(__name__)


def cache(url: str, use: str) -> pathlib.Path:
    """The folder in the local cache for one use of a URL."""
    url = client.normal(url)
    digest = hashlib.sha256(url.encode()).hexdigest()[:16]
    name = re.sub(r"[^\w.-]", "_", url.rpartition("/")[2])
    folder = paths.cache_folder() / "buckets" / use / f"{digest}-{name}"
    copied(str(folder), url)
    return folder


@functools.cache  # one copy, and one line about it, per process
def local(url: str, choose: Callable[[Sequence[str]], Sequence[str]]) -> str:
    """A local folder (or file) with what is at a URL. What the cache already holds of it is not read again.

    Of a workdir only the newest committed step is copied, and not its optimizer state.

    Args:
      choose: which of the names below the URL are needed.

    Raises:
      UserError: nothing is there, or it cannot be read or stored.
    """
    url = client.normal(url)
    found = client.listing(url)
    if not found:
        about = client.stat(url)
        if about is None:
            raise UserError(f"there is nothing at {url}, expected a folder or a file: check the name")
        parent, _, name = url.rpartition("/")
        return str(pathlib.Path(_copied(parent, {name: about}, None)) / name)
    if any(name.rpartition("/")[2] == COMMIT_MARKER for name in found):
        wanted = _newest_step(url, list(found))
    else:
        wanted = list(choose(list(found)))
    return _copied(url, {name: found[name] for name in wanted}, found.keys())


def _newest_step(url: str, names: Sequence[str]) -> list[str]:
    """The files of the newest committed step, or of the step at the URL, and the small files beside the steps."""
    own = url.rpartition("/")[2]
    if own.isdecimal() and COMMIT_MARKER in names:
        return [name for name in names if not name.startswith("opt_state/")]
    steps = {}
    for name in names:
        if found := _MARKER.fullmatch(name):
            steps[int(found[2])] = found[1]
    if not steps:
        raise UserError(f"{url} holds no committed step of a checkpoint: pass a workdir that has one")
    step = steps[max(steps)]
    return [
        name
        for name in names
        if (name.startswith(step) and not name.startswith(f"{step}opt_state/")) or "/" not in name
    ]


def _copied(url: str, wanted: dict[str, client.Stat], present: Collection[str] | None) -> str:
    """The local folder with the wanted objects; without what is no longer `present` in the bucket, if that is known."""
    folder = cache(url, "read")
    if url.rpartition("/")[2].isdecimal():  # a step, which is known by its name
        folder = folder / url.rpartition("/")[2]
        copied(str(folder), url)
    folder.mkdir(parents=True, exist_ok=True)
    index = folder.parent / f"{folder.name}.lcx-versions.json"
    known: dict[str, list] = {}
    with contextlib.suppress(OSError, ValueError):
        known = json.loads(index.read_text())
    missing = []
    for name, about in wanted.items():
        path = _inside(folder, name)
        there = path.is_file() and path.stat().st_size == about.size
        if not there or known.get(name) != [about.size, about.version]:
            missing.append(name)
    if missing:
        size = sum(wanted[name].size for name in missing)
        _check_space(folder, size)
        log.warning("%s is copied to %s (%.1f MB in %d files)", url, folder, size / 1e6, len(missing))
        client.download(url, [(name, folder / name) for name in missing])
        known |= {name: [wanted[name].size, wanted[name].version] for name in missing}
        index.write_text(json.dumps(known))
    if present is None:
        return str(folder)
    for path in folder.rglob("*"):
        name = path.relative_to(folder).as_posix()
        if path.is_file() and name not in present and not name.endswith(".lcx-partial"):
            path.unlink(missing_ok=True)
    return str(folder)


def _inside(folder: pathlib.Path, name: str) -> pathlib.Path:
    if any(part in ("", ".", "..") for part in name.split("/")):
        raise UserError(f"the bucket holds an object named {name!r}, which would leave its folder: remove it")
    return folder / name


def _check_space(folder: pathlib.Path, size: int) -> None:
    free = shutil.disk_usage(folder).free
    if size > free:
        raise UserError(
            f"{folder}: the copy needs {size:,} bytes and the disk has {free:,} free; set LCX_CACHE to another disk"
        )


@contextlib.contextmanager
def written(url: str, *, setting: str, overwrite: bool) -> Iterator[str]:
    """A local path to write a folder to, which is then copied to the URL; the file that completes it is copied last.

    Raises:
      UserError: the URL holds something already (with overwrite: something that is no checkpoint), or cannot be
        written.
    """
    url = client.normal(url)
    before = client.listing(url)
    if before and not overwrite:
        raise UserError(f"{url}: already exists; choose another {setting}, or pass --overwrite to replace it")
    complete = [name for name in before if name.rpartition("/")[2] in _COMPLETES]
    if before and not complete:
        raise UserError(f"{url}: exists and is not a checkpoint folder, so --overwrite does not replace it")
    parent = paths.cache_folder() / "buckets" / "write"
    parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=parent) as temporary:
        folder = pathlib.Path(temporary) / url.rpartition("/")[2]
        copied(str(folder), url)
        yield str(folder)
        client.remove(
            url, complete
        )  # so that no reader takes a mixture of the old and the new one for complete
        names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
        last = [name for name in names if name.rpartition("/")[2] in _COMPLETES]
        client.upload(url, [(folder / name, name) for name in names if name not in last])
        for name in sorted(last, key=lambda name: -name.count("/")):
            client.upload(url, [(folder / name, name)])
        client.remove(url, sorted(before.keys() - set(names) - set(complete)))
