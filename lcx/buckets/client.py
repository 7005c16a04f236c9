"""Objects in buckets. Every failure is one line, and what may pass (a busy or unreachable server) is tried again."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import io
import logging
import os
import random
import shutil
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, BinaryIO, TypeVar, cast

from lcx.errors import UserError, first_line

T = TypeVar("T")
log = logging.getLogger(__name__)

PACKAGES = {"s3": "s3fs", "gs": "gcsfs"}
_BLOCK = 8 << 20  # bytes per request of a reader
_AT_ONCE = 8  # transfers of files
_TIMEOUT_S = 60  # for one answer of the server
_SAID_FROM_S = 1  # pauses from which a line says that a request is repeated
# Errors that another attempt does not change, by the names of their classes: these libraries need not be installed.
_FINAL = {
    *("FileNotFoundError", "FileExistsError", "PermissionError", "IsADirectoryError", "NotADirectoryError"),
    *("NoCredentialsError", "PartialCredentialsError", "ProfileNotFound", "ParamValidationError"),
    *("DefaultCredentialsError", "RefreshError", "TypeError", "ImportError"),
}


def patience() -> float:
    """Seconds for which a request is repeated before it counts as failed: LCX_BUCKET_PATIENCE, by default 120."""
    text = os.environ.get("LCX_BUCKET_PATIENCE") or "120"
    try:
        return float(text)
    except ValueError:
        raise UserError(f"LCX_BUCKET_PATIENCE is {text!r}, expected a number of seconds") from None


def is_url(path: Any) -> bool:
    """Whether a path is a URL in a bucket: gs://... or s3://..."""
    return isinstance(path, str) and path.partition("://")[0] in PACKAGES and "://" in path


def normal(url: str) -> str:
    """The URL without a slash at its end. Raises UserError if it names no bucket, or has a part that is "..", "." or
    empty."""
    scheme, _, rest = url.partition("://")
    parts = rest.rstrip("/").split("/")
    if not all(part not in ("", ".", "..") for part in parts):
        raise UserError(
            f"{url} is not the name of something in a bucket: expected {scheme}://BUCKET/FOLDER/NAME"
        )
    return f"{scheme}://{'/'.join(parts)}"


def join(url: str, name: str) -> str:
    return f"{url.rstrip('/')}/{name}"


@dataclasses.dataclass(frozen=True)
class Stat:
    """An object: its size in bytes, and a text that changes whenever its content does."""

    size: int
    version: str


def stat(url: str) -> Stat | None:
    """What is stored under exactly this name; None if there is no object (there may be a folder of that name)."""
    url = normal(url)
    try:
        about = _tried(url, "read", lambda: _filesystem(url).info(url))
    except FileNotFoundError:
        return None
    return None if about["type"] == "directory" else _stat(about)


def listing(url: str) -> dict[str, Stat]:
    """{name below the URL: Stat} of all objects of a folder, in the order of the names; {} if there are none."""
    url = normal(url)
    start = url.partition("://")[2] + "/"
    try:
        found = _tried(url, "read", lambda: _filesystem(url).find(url, detail=True))
    except FileNotFoundError:
        return {}
    below = {path.removeprefix(start): about for path, about in found.items() if path.startswith(start)}
    # A name that is empty or ends in a slash is how browsers of buckets mark a folder.
    return {name: _stat(about) for name, about in sorted(below.items()) if name and not name.endswith("/")}


def read(url: str) -> bytes:
    """The content of a small object. Raises FileNotFoundError if there is none."""
    return _tried(url, "read", lambda: _filesystem(url).cat_file(url))


def write(url: str, data: bytes, *, new: bool = False) -> None:
    """Writes a small object. With `new`, raises FileExistsError if there is one already (and changes nothing)."""
    mode = "create" if new else "overwrite"
    try:
        _tried(url, "written", lambda: _filesystem(url).pipe_file(url, data, mode=mode))
    except FileNotFoundError as error:
        raise UserError(
            f"{url} cannot be written: there is no such bucket; create it, or name another"
        ) from error


def remove(url: str, names: Iterable[str]) -> None:
    """Removes objects below a URL; those that are gone already do not matter."""
    paths = [join(url, name) for name in names]
    if paths:
        with contextlib.suppress(FileNotFoundError):
            _tried(url, "written", lambda: _filesystem(url).rm(paths))


def opened(url: str, about: Stat | None = None) -> BinaryIO:
    """A seekable stream of an object, which holds one block of it in memory and repeats requests that fail.

    Args:
      about: what is known of the object; None: ask. The content must still be that when it is read.
    """
    about = about or stat(url)
    if about is None:
        raise FileNotFoundError(f"there is nothing at {url}")
    return cast(BinaryIO, io.BufferedReader(_Reader(normal(url), about), _BLOCK))


def download(url: str, files: Iterable[tuple[str, str | os.PathLike]]) -> None:
    """Copies objects below a URL to local paths, several at a time. An incomplete copy is never seen under its path.

    Args:
      files: (name below the URL, local path).
    """

    def one(pair: tuple[str, str | os.PathLike]) -> None:
        name, path = pair
        partial = f"{os.fspath(path)}.{os.getpid()}.lcx-partial"
        os.makedirs(os.path.dirname(partial), exist_ok=True)
        try:
            with opened(join(url, name)) as source, open(partial, "wb") as target:
                shutil.copyfileobj(source, target, _BLOCK)
            os.replace(partial, path)
        except OSError as error:
            with contextlib.suppress(OSError):
                os.unlink(partial)
            raise UserError(f"{join(url, name)} cannot be copied to {path}: {first_line(error)}") from error

    _each(one, files)


def upload(url: str, files: Iterable[tuple[str | os.PathLike, str]]) -> None:
    """Copies local files to objects below a URL, several at a time. A file that has vanished is left out.

    Args:
      files: (local path, name below the URL).
    """

    def one(pair: tuple[str | os.PathLike, str]) -> None:
        path, target = os.fspath(pair[0]), join(url, pair[1])
        try:
            if os.path.exists(path):
                _tried(target, "written", lambda: _filesystem(target).put_file(path, target))
        except FileNotFoundError as error:
            if os.path.exists(path):  # the file has not vanished meanwhile
                raise UserError(
                    f"{target} cannot be written: there is no such bucket; create it, or name another"
                ) from error

    _each(one, files)


def _each(work: Callable[[Any], None], items: Iterable[Any]) -> None:
    with ThreadPoolExecutor(_AT_ONCE, "lcx-bucket") as pool:
        waiting = [pool.submit(work, item) for item in items]
        try:
            for future in waiting:
                future.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


class _Reader(io.RawIOBase):
    """The bytes of one object, a block per request."""

    def __init__(self, url: str, about: Stat):
        self._url, self._about, self._at = url, about, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._about.size}[whence]
        return self._at

    def readall(self) -> bytes:
        """The rest of the object, a block per request (the inherited method asks for 8 KiB each)."""
        parts = []
        while data := self.read(_BLOCK):
            parts.append(data)
        return b"".join(parts)

    def readinto(self, buffer: Any) -> int:
        stop = min(self._at + len(buffer), self._about.size)
        if stop <= self._at:
            return 0
        data = _tried(self._url, "read", lambda: self._range(self._at, stop))
        buffer[: len(data)] = data
        self._at = stop
        return len(data)

    def _range(self, start: int, stop: int) -> bytes:
        data = _filesystem(self._url).cat_file(self._url, start=start, end=stop)
        if len(data) != stop - start:
            now = stat(self._url)
            if now != self._about:
                raise UserError(f"{self._url} has changed while it was read: start again")
            raise OSError(f"{len(data)} of {stop - start} bytes arrived")
        return data


def _stat(about: dict[str, Any]) -> Stat:
    version = about.get("ETag") or about.get("md5Hash") or about.get("etag") or about.get("generation") or ""
    return Stat(int(about["size"] or 0), str(version).strip('"'))


def _tried(url: str, doing: str, work: Callable[[], T]) -> T:
    """The result of `work`, repeated with growing pauses for as long as the failure may pass.

    Raises:
      FileNotFoundError, FileExistsError: unchanged, because callers know what they mean.
      UserError: anything else, in one line.
    """
    end, pause, said = time.monotonic() + patience(), 0.25, False
    while True:
        try:
            return work()
        except (UserError, FileNotFoundError, FileExistsError):
            raise
        except Exception as error:
            # gcsfs raises a plain OSError where the rights are missing.
            final = {kind.__name__ for kind in type(error).__mro__} & _FINAL or str(error).startswith(
                "Forbidden"
            )
            if final or time.monotonic() + pause > end:
                advice = (
                    "check the credentials and rights" if final else "the bucket can be tried again later"
                )
                raise UserError(
                    f"{url} cannot be {doing} ({type(error).__name__}: {first_line(error)[:200]}); {advice}"
                ) from error
            if not said and pause > _SAID_FROM_S:
                reason = f"{type(error).__name__}: {first_line(error)[:200]}"
                log.warning("%s cannot be %s yet (%s): tried again for up to %.0f s", url, doing, reason, patience())
                said = True
        time.sleep(pause * random.uniform(0.5, 1))
        pause = min(2 * pause, 15.0)


@functools.cache
def _of_scheme(scheme: str) -> Any:
    try:
        import fsspec

        if scheme == "s3":
            import s3fs  # noqa: F401

            waits = {"connect_timeout": 10, "read_timeout": _TIMEOUT_S, "retries": {"max_attempts": 2}}
            return fsspec.filesystem("s3", config_kwargs=waits, use_listings_cache=False)
        # Otherwise gcsfs asks for the kind of every bucket first, with rights that reading it does not need.
        os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
        import gcsfs  # noqa: F401

        logging.getLogger("gcsfs").setLevel(logging.CRITICAL)  # each failure is reported by `_tried`
        return fsspec.filesystem("gs", requests_timeout=_TIMEOUT_S, use_listings_cache=False)
    except ImportError as error:
        raise UserError(
            f"{scheme}:// needs the package {PACKAGES[scheme]} ({first_line(error)}): pip install 'lcx[buckets]'"
        ) from error


def _filesystem(url: str) -> Any:
    return _of_scheme(url.partition("://")[0])
