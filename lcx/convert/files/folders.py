"""A checkpoint folder: file names that must not leave it, JSON files, and the tokenizer files that are copied along."""

import json
import os
import pathlib
from typing import Any

from lcx import small_files
from lcx.convert.files import safetensors, tensor_io, unsupported
from lcx.errors import UserError
from lcx.rope_fields import shown

#: Files next to the weights that belong to the tokenizer or to generation; copied unchanged.
SIDE_FILES = (
    "generation_config.json",
    "lcx_tokenizer.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "vocab.txt",
    "chat_template.jinja",
    "chat_template.json",
)
_MAX_JSON_BYTES = 100_000_000


def inside(folder: pathlib.Path, name: str) -> pathlib.Path:
    """The path of an existing plain file of the folder.

    Raises:
      UserError: the name is not a plain file name, the file is missing, or it is a link that leads out of the folder
        (links within Hugging Face's download cache, snapshots/REVISION/* -> blobs/*, are allowed).
    """
    if not is_plain(name):
        raise UserError(
            f"{folder}: the index names the file {shown(name)}, expected a plain file name inside the folder"
        )
    path = folder / name
    if not path.exists():
        raise UserError(f"{folder}: {name} is missing; copy or download the folder again")
    root = folder.resolve()
    roots = [root]
    if root.parent.name == "snapshots":
        roots.append(root.parent.parent / "blobs")
    if not any(path.resolve().is_relative_to(allowed) for allowed in roots):
        raise UserError(f"{folder}: {name} is a link that leads out of the folder; put the file itself there")
    if not path.is_file():
        raise UserError(f"{folder}: {name} is not a regular file")
    unsupported.check_pointer(path)
    return path


def is_plain(name: Any) -> bool:
    """Whether the name is a printable, plain file name, without path separators and not one of "", "." and ".."."""
    if not isinstance(name, str) or not name.isprintable() or len(name) > 255:
        return False
    return os.path.basename(name) == name and name not in ("", ".", "..")


def read_json(path: pathlib.Path) -> dict:
    """Reads a JSON object from a file; duplicate keys are an error.

    Raises:
      UserError: the file is not a JSON object, has duplicate keys, or exceeds the size limit.
    """
    try:
        text = small_files.read_text(path, max_bytes=_MAX_JSON_BYTES)
        value = json.loads(text, object_pairs_hook=safetensors.no_duplicates)
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path}: is not valid JSON: {safetensors.first_line(error)}") from error
    if not isinstance(value, dict):
        raise UserError(f"{path}: holds a {type(value).__name__}, expected a JSON object")
    return value


def side_files(folder: str | os.PathLike) -> list[pathlib.Path]:
    """The tokenizer and generation files in the folder."""
    folder = pathlib.Path(folder)
    return [inside(folder, name) for name in SIDE_FILES if (folder / name).exists()]


def write_json(path: pathlib.Path, value: dict) -> None:
    """Writes and syncs a JSON file."""
    write_bytes(path, (json.dumps(value, indent=2) + "\n").encode())


def write_bytes(path: pathlib.Path, data: bytes) -> None:
    with open(path, "xb", buffering=0) as file:
        tensor_io.write_all(file, data)
        os.fsync(file.fileno())
