"""Which files of a folder are its data.

- A folder written by `datasets`' `save_to_disk` is read in the order that it records.
- Files of rows and sequences (JSON, CSV, Arrow, parquet, FASTA) and texts are data; source code and documentation next
to
  them are not. If the only data files are deep inside a tree of source code, the folder is taken for a repository, and
  its code is read as one document.
- If there is a training split among several splits, only the training split is read.

What is skipped is reported. Links are followed; a folder that is reached twice is read once, so cycles of links end.
"""

import dataclasses
import fnmatch
import glob
import os
import re
import stat
from collections.abc import Iterator, Mapping, Sequence, Set
from pathlib import Path

from lcx.buckets import client, is_url
from lcx.data import saved_dataset
from lcx.data.notices import say_once
from lcx.data.readers import ROW_FORMATS, SourceFile, detect, shown, streams
from lcx.errors import UserError

_SKIP = frozenset(("__pycache__", "node_modules", "_delta_log"))
# Files that describe data, by the beginning of their names, and files that tools leave next to it.
_ABOUT = re.compile(
    r"(readme|license|licence|copying|notice|authors|changelog|citation|contributing|requirements)\b[^.]*"
    r"(\.(md|txt|rst|cff|bib|html))*$"
    r"|(dataset_infos?|dataset_dict|state|config|croissant|package|package-lock|tsconfig)\.json$"
    r"|(sources|index|manifest|metadata)\.(csv|tsv|json)$"
    r"|_(success|metadata|common_metadata)$|cache-.*\.arrow$",
    re.IGNORECASE,
)
_TRAIN = re.compile(r"(?<![a-z])train(ing)?(?![a-z])", re.IGNORECASE)
_HELD_OUT = re.compile(r"(?<![a-z])(test(ing)?|val(id(ation)?)?|dev|eval(uation)?)(?![a-z])", re.IGNORECASE)
_SHARD = re.compile(r"(\d{5})-of-(\d{5})")
_SPLITS = {"t": "test", "v": "validation", "d": "validation", "e": "evaluation"}  # by the first letter
_CODE = "source code"
_DOCUMENTS = (".md", ".rst")


def source_file(path: str, name: str, format: str | None) -> SourceFile:
    """A file that the user names, with its format; logs a message if its extension stands for another format."""
    streams.size(path)
    found = detect.format_of(path, wanted=format)
    by_name = detect.by_name(path)
    if format is None and found != by_name and {found, by_name} != {"json", "jsonl"}:
        say_once(
            f"{shown(path)} is read as {found}, by its content; Dataset.format='{by_name}' reads it as {by_name}"
        )
    return SourceFile(path, name, found)


def relative(path: str, root: str) -> str:
    return Path(os.path.relpath(os.path.abspath(path), root)).as_posix()


def matches(pattern: str) -> list[str]:
    """The files and folders that a glob matches, sorted. With "**" a folder is entered once, so cycles of links end."""
    parts = pattern.split("/")
    if "**" not in parts:
        return sorted(glob.glob(pattern))
    at = parts.index("**")
    roots = glob.glob("/".join([*parts[:at], ""])) if at else ["."]
    found = []
    for root in sorted(roots):
        for path in walk(root, skip=frozenset(), folders=True):
            if _fits(os.path.relpath(path, root).split(os.sep), parts[at:]):
                found.append(path if at else os.path.relpath(path))
    return sorted(found)


def _fits(names: list[str], pattern: list[str]) -> bool:
    """Whether the parts of a path match those of a pattern, in which "**" matches any number of parts."""
    if not pattern:
        return not names
    if pattern[0] == "**":
        return len(pattern) == 1 or any(_fits(names[i:], pattern[1:]) for i in range(len(names) + 1))
    return bool(names) and fnmatch.fnmatchcase(names[0], pattern[0]) and _fits(names[1:], pattern[1:])


def walk(
    root: str, *, skip: frozenset[str] = _SKIP, follow: bool = True, folders: bool = False
) -> Iterator[str]:
    """The files below `root` (with `folders`: and the folders), in path order, without hidden names.

    Raises:
      UserError: a folder that cannot be read.
    """
    seen: set[tuple[int, int]] = set()
    paths: list[str] = []
    waiting, linked = [root], []
    while waiting or linked:  # real folders first, so that a folder is not named by a link to it
        folder = waiting.pop() if waiting else linked.pop()
        try:
            status = os.stat(folder)
            if (status.st_dev, status.st_ino) in seen:
                continue
            seen.add((status.st_dev, status.st_ino))
            entries = sorted(os.scandir(folder), key=lambda entry: entry.name, reverse=True)
        except OSError as error:
            raise UserError(
                f"cannot read the folder {shown(folder)}: {error.strerror}; check Dataset.source"
            ) from error
        for entry in entries:
            if entry.name.startswith(".") or (entry.is_symlink() and not follow):
                continue
            try:
                is_folder = entry.is_dir()
            except OSError:  # a link that leads to itself: refused if it is read as a file
                is_folder = False
            if folders or not is_folder:
                paths.append(entry.path)
            if is_folder and entry.name not in skip:
                (linked if entry.is_symlink() else waiting).append(entry.path)
    yield from sorted(paths, key=lambda path: Path(path).parts)


@dataclasses.dataclass(frozen=True)
class _Candidate:
    """A file of a folder: its format, or None and the reason why it is not data."""

    path: str
    name: str
    format: str | None
    reason: str = ""

    @property
    def is_table(self) -> bool:
        return self.format in ROW_FORMATS or self.format == "fasta"


def files_of(folder: str, format: str | None) -> tuple[SourceFile, ...]:
    """The files to read from a folder that the user names.

    Raises:
      UserError: there are none, or one of them cannot be read.
    """
    saved = saved_dataset.files_of(folder)
    if saved is not None and format in (None, "arrow"):
        return saved
    if format == "code":
        return code_files(folder)
    root = os.path.abspath(folder)
    found = _candidates({path: relative(path, root) for path in walk(folder)}, format)
    if any(one.reason == _CODE for one in found) and not any(_is_data_set(one) for one in found):
        _say_left_out(folder, "source code is", [one for one in found if one.is_table and not one.reason])
        return code_files(folder)
    return _data_files(folder, found, format)


def bucket_files(url: str, format: str | None) -> tuple[SourceFile, ...]:
    """The files of a source in a bucket: one object, a folder, or a glob, with the rules for folders on this machine.

    Raises:
      UserError: there are none, one of them cannot be read, or it is a folder that has to be copied here first.
    """
    if format == "code":
        raise UserError(f"{url}: source code is read from a folder on this machine: copy it here")
    if set(url) & set("*?["):
        root = re.split(r"[*?\[]", url)[0].rpartition("/")[0]
        pattern = url.removeprefix(f"{root}/").split("/")
        names = [name for name in client.listing(root) if _fits(name.split("/"), pattern)]
        if not names:
            raise UserError(f"data source {url!r} matches no object; set Dataset.source")
        above = os.path.commonpath([os.path.dirname(name) for name in names]) or "."
        return tuple(source_file(client.join(root, n), os.path.relpath(n, above), format) for n in names)
    names = list(client.listing(url))
    if not names:
        return (source_file(url, url.rpartition("/")[2], format),)
    if saved_dataset.is_saved(names):
        raise UserError(
            f"{url}: a data set of `datasets` is read from a folder on this machine; copy it here, or name its files"
            ' in Dataset.source, as "FOLDER/*.arrow"'
        )
    hidden = [name for name in names if any(p.startswith(".") or p in _SKIP for p in name.split("/"))]
    paths = {client.join(url, name): name for name in names if name not in hidden}
    return _data_files(url, _candidates(paths, format), format)


def _candidates(names: Mapping[str, str], format: str | None) -> list[_Candidate]:
    """The files of a folder, {path: name in it}, classified."""
    named = {path for path in names if format is not None and _ending_says(path) == format}
    return [_candidate(path, name, format, named) for path, name in names.items()]


def _data_files(folder: str, found: Sequence[_Candidate], format: str | None) -> tuple[SourceFile, ...]:
    """The data among the files of a folder. Raises UserError if there is none."""
    chosen = _without_held_out(_data(found))
    if not chosen:
        known = ", ".join([*_DOCUMENTS, *detect.BY_ENDING])
        raise UserError(
            f"data folder {folder!r} has no file of a known kind ({known} or source code);"
            f' name the files with a glob such as "{folder}/*", or set Dataset.format'
        )
    _say_missing_shards(folder, chosen)
    names = {one.name for one in chosen}
    _say_left_out(folder, _counted(len(chosen)), [one for one in found if one.name not in names])
    return tuple(source_file(one.path, one.name, format) for one in chosen)


def code_files(folder: str, *, document: str | None = None) -> tuple[SourceFile, ...]:
    """The source files of a repository, which form one document.

    Raises:
      UserError: there are no source files.
    """
    root = os.path.abspath(folder)
    document = os.path.basename(root) if document is None else document
    real: set[str] = set()  # resolved: a link to another file of the repository must not repeat it
    files, left_out = [], []
    for path in filter(detect.is_code, walk(folder)):
        name = relative(path, root)
        if not _is_regular(path):
            left_out.append(_Candidate(path, name, None, "not a regular file"))
        elif os.path.realpath(path) not in real:
            real.add(os.path.realpath(path))
            files.append(SourceFile(path, f"{document}/{name}", "code", document=document))
    _say_left_out(folder, "source code is", left_out)
    if not files:
        raise UserError(f"code folder {folder!r} has no source file of a known kind; check Dataset.source")
    return tuple(files)


def _is_regular(path: str) -> bool:
    if is_url(path):
        return True
    try:
        return stat.S_ISREG(os.stat(path).st_mode)
    except OSError:
        return False


def _ending_says(path: str) -> str | None:
    return detect.BY_ENDING.get(os.path.splitext(streams.plain_name(path))[1])


def _candidate(path: str, name: str, format: str | None, named: Set[str]) -> _Candidate:
    """A file, classified by its name; its content is read only if the extension is unknown.

    Args:
      named: the files whose extension is that of the requested format; if there are any, only these are read.
    """
    if named and path not in named:
        return _Candidate(path, name, None, f"not {format} by its name")
    ending = os.path.splitext(name)[1].lower()
    by_ending = format or _ending_says(path) or ("text" if ending in _DOCUMENTS else None)
    if _ABOUT.match(os.path.basename(name)):
        return _Candidate(path, name, by_ending, "describes the data")
    if format is None and detect.is_code(name) and ending not in _DOCUMENTS:
        return _Candidate(path, name, None, _CODE)
    if by_ending is not None:
        return _Candidate(path, name, by_ending)
    if not _is_regular(path):
        return _Candidate(path, name, None, "not a regular file")
    try:
        found = detect.format_of(path)
    except UserError:
        found = "text"
    # Plain text without a known ending may be anything.
    return (
        _Candidate(path, name, None, "an unknown ending")
        if found == "text"
        else _Candidate(path, name, found)
    )


def _is_data_set(one: _Candidate) -> bool:
    """Whether a file of rows is where data sets have it, not where repositories keep settings and test cases."""
    if not one.is_table or one.reason:
        return False
    folder = one.name.rpartition("/")[0]
    if folder.split("/")[0] == "data" or _TRAIN.search(one.name):
        return True
    return not folder and not (one.format == "json" and _is_settings(one.path))


def _is_settings(path: str) -> bool:
    """Whether a JSON file is a single object, which is how tools store their settings."""
    try:
        head = streams.head(path, 1 << 16)
    except UserError:
        return False
    return head.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"{") and detect.json_format(head, "json") == "json"


def _data(found: Sequence[_Candidate]) -> list[_Candidate]:
    """Tables and the texts next to them; else texts and documentation; else files that describe data."""
    readable = [one for one in found if one.format is not None]
    data = [one for one in readable if not one.reason] or readable
    if any(one.is_table for one in data):
        return [one for one in data if not one.name.lower().endswith(_DOCUMENTS)]
    return data


def _without_held_out(chosen: list[_Candidate]) -> list[_Candidate]:
    """The files without those of held-out splits, if there is a training split; else all files.

    Raises:
      UserError: there are several splits and none is for training.
    """
    splits = {one.name: _split_of(one.name) for one in chosen}
    present = {split for split in splits.values() if split}
    if "train" in present:
        return [one for one in chosen if splits[one.name] in ("train", None)]
    if len(present) > 1 and all(one.is_table for one in chosen):
        raise UserError(
            f"the folder has the splits {', '.join(sorted(present))} and none for training; name the files to read in"
            ' Dataset.source, for example "FOLDER/*test*"'
        )
    return chosen


def _split_of(name: str) -> str | None:
    """The split "train" or a held-out one, by the last part of a path that names one; None if none does."""
    for part in reversed(name.split("/")):
        if _TRAIN.search(part):
            return "train"
        if held_out := _HELD_OUT.search(part):
            return _SPLITS[held_out[0][0].lower()]
    return None


def _say_missing_shards(folder: str, chosen: Sequence[_Candidate]) -> None:
    """Warns about missing shards if file names count them, as in train-00000-of-00002."""
    found: dict[tuple[str, int], set[int]] = {}
    for one in chosen:
        if part := _SHARD.search(one.name):
            found.setdefault((one.name[: part.start()], int(part[2])), set()).add(int(part[1]))
    for (name, total), numbers in found.items():
        if len(numbers) < total:
            say_once(f"{shown(folder)}: {name}* has {len(numbers)} of {total} parts; download the others")


def _counted(files: int) -> str:
    return "1 file is" if files == 1 else f"{files} files are"


def _say_left_out(folder: str, read: str, left_out: Sequence[_Candidate]) -> None:
    if not left_out:
        return
    names = ", ".join(f"{shown(one.name)}{f' ({one.reason})' if one.reason else ''}" for one in left_out[:5])
    more = f" and {len(left_out) - 5} more" if len(left_out) > 5 else ""
    say_once(f"{shown(folder)}: {read} read, without {names}{more}")
