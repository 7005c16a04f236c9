"""The table of checkpoint formats, and detection of the format of a folder.

To add a format, write a file with a subclass of `core.format.Format` and add an instance to `FORMATS`.
"""

import dataclasses
import importlib
import os
import pathlib
from collections.abc import Mapping
from typing import Any, TypeVar

from lcx import hub
from lcx.convert.core.format import Format, TrainedFormat
from lcx.convert.evo2.format import Megatron, Savanna, Vortex
from lcx.convert.hf.format import HuggingFace
from lcx.convert.lolcats.files import Lolcats
from lcx.convert.lolcats.format import LolcatsFiles, LolcatsFolder
from lcx.convert.peft.format import PeftAdapter
from lcx.convert.two_mamba.format import TwoMambaFolder
from lcx.convert.workdir.format import Workdir
from lcx.errors import UserError, naming_flags

F = TypeVar("F", bound=Format)
LOLCATS = LolcatsFolder()
FORMATS: tuple[Format, ...] = (
    Workdir(),
    HuggingFace(),
    Savanna(),
    Savanna("savanna_legacy", "savanna with per-rank blocks of hyena roles", legacy=True, writes=False),
    Savanna(
        "savanna_fp32",
        "savanna with the float32 weights of DeepSpeed's optimizer states",
        float32=True,
        writes=False,
    ),
    Savanna("savanna_legacy_fp32", "savanna with both", legacy=True, float32=True, writes=False),
    Vortex(),
    Megatron(),
    LOLCATS,
    TwoMambaFolder(),
    PeftAdapter(),
    LolcatsFiles(),
)


@naming_flags("setting format")
def named(format: str | Format, *, where: str = "setting format") -> Format:
    """The format with this name, or the Format object at "module:NAME"; a Format is returned unchanged.

    Args:
      where: the setting that holds the name, for error messages.

    Raises:
      UserError: no format has this name, or it cannot be imported.
    """
    if isinstance(format, Format):
        return format
    if isinstance(format, str) and ":" in format:
        return _imported(format, where)
    found = next((known for known in FORMATS if known.name == format), None)
    if found is None:
        raise UserError(f"{where} is {format!r}, expected one of {_listed(FORMATS)}")
    return found


def _imported(path: str, where: str) -> Format:
    module, _, name = path.partition(":")
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(f"{where} is {path!r}, which cannot be imported: {error}") from error
    if not isinstance(found, Format):
        raise UserError(
            f"{where} is {path!r}, a {type(found).__name__}, expected an instance of {Format.__name__}"
        )
    return found


@naming_flags("setting format")
def reader(
    path: str | os.PathLike,
    format: str | Format | None = None,
    lolcats: Lolcats | None = None,
    *,
    where: str = "setting format",
) -> Format:
    """The format to read `path` with: the named one, else the detected one.

    Args:
      where: the setting that holds the format, for error messages.

    Raises:
      UserError: an unknown or write-only format; LoLCATS files given with another format; no checkpoint at `path`.
    """
    if lolcats is None and format is None:
        return detect(path)
    chosen = LOLCATS if format is None else named(format, where=where)
    if not chosen.reads:
        raise UserError(
            f"{where} is {chosen.name!r}, expected one of {_listed(f for f in FORMATS if f.reads)}"
        )
    if lolcats is None:
        return chosen
    if not isinstance(chosen, LolcatsFolder):
        raise UserError(
            f"format is {chosen.name!r}, expected {LOLCATS.name!r} with its files: leave the format out, or the files"
        )
    return dataclasses.replace(chosen, files=lolcats)


def writer(format: str | Format, **options: Any) -> Format:
    """The format to write a model in, with its options set; options that are None keep their defaults.

    Raises:
      UserError: an unknown format, one that cannot hold a whole model, or an option that the format does not have.
    """
    chosen = named(format)
    if not chosen.writes:
        raise UserError(
            f"format is {chosen.name!r}, expected one of {_listed(f for f in FORMATS if f.writes)}"
        )
    return configured(chosen, options)


@naming_flags("model_parallel", "max_shard_bytes", "base_model")
def configured(format: F, options: Mapping[str, Any]) -> F:
    """The format with these options set. Raises UserError for an option it does not have or a value out of range."""
    given = {name: value for name, value in options.items() if value is not None}
    for name in given.keys() - format.options():
        field = next((other.options()[name] for other in FORMATS if name in other.options()), None)
        what = "no option of any format" if field is None else field.metadata["help"]
        raise UserError(f"{name} is {what}, and the format is {format.name!r}: leave out {name}")
    return dataclasses.replace(format, **given)


def detect(path: str | os.PathLike, *more: Format) -> Format:
    """Detects the format of a folder or file from its file names and, for torch files, from the tensor names.

    Args:
      more: the user's own formats, tried before those of the table.

    Raises:
      UserError: no format matches, or what is there is not a model on its own (an adapter, for example).
    """
    from lcx.convert.files import unsupported

    place = pathlib.Path(hub.local(path)).expanduser()
    names = {entry.name for entry in place.iterdir()} if place.is_dir() else {place.name}
    if place.is_file():
        unsupported.check_names(place, [place.name])
        unsupported.check_pointer(place)
    # Overlay formats add files to the folder of another format, which would otherwise match first; so would formats
    # that know their own folders only by the name of a file.
    order = sorted((*more, *FORMATS), key=lambda format: (not format.overlay, not format.knows_tensors))
    for format in order:
        if format.detect(place, names):
            return format
    if not place.is_dir():
        what = "is a file, expected the folder it is in" if place.exists() else "does not exist"
        raise UserError(f"no checkpoint at {path}: the path {what}")
    unsupported.check_names(place, sorted(names))
    raise UserError(
        f"no checkpoint at {path}: expected a Hugging Face folder (config.json and weights), an lcx workdir "
        "(checkpoints/) or files of savanna or vortex (.pt), found "
        f"{', '.join(sorted(names)[:6]) or 'an empty folder'}"
    )


def is_checkpoint(path: pathlib.Path, *more: Format) -> bool:
    """Whether a folder may be replaced: only if it is a checkpoint itself (`detect`)."""
    try:
        return detect(path, *more).may_replace(path)
    except UserError:
        return False


def help_lines(*, writing: bool) -> str:
    """The readable or writable formats with their descriptions, for `--help`."""
    known = [f for f in FORMATS if (f.writes or isinstance(f, TrainedFormat) if writing else f.reads)]
    return "; ".join(f"{format.name}, {format.help}" for format in known)


def _listed(formats) -> str:
    return ", ".join(format.name for format in formats)
