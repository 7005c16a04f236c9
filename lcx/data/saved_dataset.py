"""Folders that `datasets` wrote with `save_to_disk`: a `Dataset`, or a `DatasetDict` of splits."""

import json
import os
from collections.abc import Collection
from typing import Any

from lcx.data.notices import say_once
from lcx.data.readers import SourceFile, detect, shown, streams
from lcx.errors import UserError

_DICT, _STATE, _INFO = "dataset_dict.json", "state.json", "dataset_info.json"
_MOST = 64 << 20  # bytes; the largest description file that is read


def files_of(folder: str) -> tuple[SourceFile, ...] | None:
    """The Arrow files of such a folder, in the order that it records; None for any other folder.

    From a `DatasetDict`, the split "train" is read, and a message names the splits that are not.

    Raises:
      UserError: a file of the folder is damaged or missing, or there are splits but none named "train".
    """
    if os.path.isfile(os.path.join(folder, _DICT)):
        splits = _names(_read(folder, _DICT), folder, "splits")
        if "train" not in splits and len(splits) != 1:
            raise UserError(
                f"{shown(folder)} has the splits {', '.join(splits)} and none named train; name the folder of one in"
                f" Dataset.source, as {os.path.join(folder, (splits or ['SPLIT'])[0])!r}"
            )
        split = "train" if "train" in splits else splits[0]
        others = [name for name in splits if name != split]
        if others:
            say_once(f"{shown(folder)}: the split {split} is read, without {', '.join(others)}")
        files = _files(os.path.join(folder, split))
        return tuple(SourceFile(file.path, f"{split}/{file.name}", file.format) for file in files)
    there = [name for name in (_STATE, _INFO) if os.path.isfile(os.path.join(folder, name))]
    return _files(folder) if is_saved(there) else None


def is_saved(names: Collection[str]) -> bool:
    """Whether a folder with these files was written by `save_to_disk`."""
    return _DICT in names or (_STATE in names and _INFO in names)


def _files(folder: str) -> tuple[SourceFile, ...]:
    state = _read(folder, _STATE)
    if any(state.get(key) for key in ("_indices_files", "_indices_data_files")):
        raise UserError(
            f"{shown(folder)} holds a selection of rows, written by an old version of datasets; load and save it again"
        )
    listed = state.get("_data_files")
    entries = listed if isinstance(listed, list) else [None]
    names = _names(
        {"_data_files": [one.get("filename") if isinstance(one, dict) else one for one in entries]},
        folder,
        "_data_files",
    )
    files = []
    for name in names:
        path = os.path.join(folder, name)
        streams.check_regular(path)
        files.append(SourceFile(path, name, detect.format_of(path, wanted="arrow")))
    if not files:
        raise UserError(f"{shown(folder)} is a saved data set without rows; check Dataset.source")
    return tuple(files)


def _names(content: dict[str, Any], folder: str, key: str) -> list[str]:
    """The names in the list `key`. Raises UserError for a name that is not directly in this folder."""
    names = content.get(key)
    if not isinstance(names, list):
        raise UserError(f"{shown(folder)}: its description has no list {key!r}; save the data set again")
    for name in names:
        if (
            not isinstance(name, str)
            or name in ("", ".", "..")
            or len(name) > 255
            or set(name) & {"/", os.sep, "\0"}
        ):
            raise UserError(
                f"{shown(folder)}: {key} holds {name!r:.80}, expected a name in that folder; save the data set again"
            )
    return names


def _read(folder: str, name: str) -> dict[str, Any]:
    path = os.path.join(folder, name)
    try:
        content = json.loads(streams.decode(streams.head(path, _MOST), shown(path)))
    except (ValueError, RecursionError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(
            f"{shown(path)} is not JSON ({type(error).__name__}); save the data set again"
        ) from error
    if not isinstance(content, dict):
        raise UserError(
            f"{shown(path)} has a {type(content).__name__}, expected an object; save the data set again"
        )
    return content
