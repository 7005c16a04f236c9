"""Checks the folders that are written to before any work is done: they must be on a local or mounted file system."""

import os
import pathlib
import re

from lcx.errors import UserError

_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")


def destination(path: str | os.PathLike, setting: str) -> pathlib.Path:
    """The folder that a setting names, with ~ expanded.

    Raises:
      UserError: it is empty, or a URL such as gs://bucket/run, which would create a local folder named "gs:".
    """
    text = os.fspath(path)
    if not text.strip():
        raise UserError(f"{setting} is empty, expected a folder: set {setting}")
    refuse_scheme(text, setting)
    return pathlib.Path(text).expanduser()


def refuse_scheme(path: str | os.PathLike, setting: str) -> None:
    """Raises UserError for a URL such as gs://bucket/run."""
    match = _SCHEME.match(os.fspath(path))
    if match:
        raise UserError(
            f"{setting} is {os.fspath(path)}: {match[1]}:// is not supported, expected a folder on this machine (mount "
            f"the bucket, or copy it here): change {setting}"
        )
