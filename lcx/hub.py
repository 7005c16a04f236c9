"""Resolves names on the Hugging Face hub, "org/name" or "org/name@revision", to local folders.

A local file or folder of that name has precedence. Otherwise the hub's local cache is used, then the hub itself. With
HF_HUB_OFFLINE=1 nothing is downloaded; huggingface_hub reads this and its other environment variables. Only the files
that lcx can use are downloaded.
"""

import functools
import json
import logging
import os
import re
from collections.abc import Sequence
from fnmatch import fnmatch
from typing import Any

from lcx import paths, small_files
from lcx.buckets import copies, is_url
from lcx.errors import UserError, first_line, naming_flags

log = logging.getLogger(__name__)

_PART = r"[A-Za-z0-9](?:[\w.-]{0,94}[A-Za-z0-9_])?"
_NAME = re.compile(rf"({_PART}/{_PART})(?:@([\w./-]+))?", re.ASCII)
#: Suffixes of files. A name with such a suffix is taken for a path that does not exist, not for a name on the hub.
_FILE = re.compile(
    r"\.(pt|pth|bin|safetensors|gguf|json|jsonl|ndjson|csv|tsv|txt|text|md|parquet|arrow|gz|zst|bz2|xz|zip|tar"
    r"|fa|fasta|fna|ffn|faa|vcf|gin|ya?ml|py|model|npy|npz|part\d+)$",
    re.IGNORECASE,
)

_TOKENIZER = (
    "config.json", "generation_config.json", "tokenizer*", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "vocab.txt", "merges.txt", "chat_template*", "lcx_tokenizer.json",
)  # fmt: skip
#: Those of them that every tool downloads which reads a tokenizer.
_MEANING = ("config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template*")
#: File patterns of weights in order of preference. Only the first kind that a model has is used, because the others
#: contain the same tensors again.
_WEIGHTS = (
    ("model*.safetensors", "model.safetensors.index.json"),
    ("pytorch_model*.bin", "pytorch_model.bin.index.json"),
    ("*.pt", "*.pt.part*"),
)
_BESIDE = ("lolcats.json",)
_ADAPTER = ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin", "lcx_adapter.json")
_TIMEOUT = 20.0  # seconds
_DATA = (
    "*.parquet", "*.arrow", "*.json", "*.jsonl", "*.ndjson", "*.csv", "*.tsv", "*.txt", "*.gz", "*.zst", "*.fa",
    "*.fasta", "*.fna",
)  # fmt: skip


def is_name(path: Any) -> bool:
    """Whether `path` looks like a name on the hub and no local file or folder of that name exists."""
    if not isinstance(path, str | os.PathLike):
        return False
    text = os.fspath(path)
    if not isinstance(text, str) or os.path.lexists(os.path.expanduser(text)):
        return False
    found = _NAME.fullmatch(text)
    return found is not None and not _FILE.search(found[1]) and ".." not in text and "--" not in found[1]


@naming_flags("the path of the checkpoint", "the path of the tokenizer", "the path of the adapter")
def local(path: Any, *, kind: str = "model") -> Any:
    """The local folder of a name on the hub or of a URL in a bucket, downloaded if necessary. Of any other path, "~" is
    expanded.

    Args:
      path: given by a user as a checkpoint, a tokenizer or a source of text. A path need not exist.
      kind: "model", "tokenizer" (of a model, without its weights), "adapter" (PEFT) or "dataset".

    Raises:
      UserError: the name exists neither locally nor on the hub, the hub or the bucket cannot be reached, or the
        package for it is not installed.
    """
    if isinstance(path, str):
        if is_url(path):
            return copies.local(path, _CHOOSE[kind])
        what = f"the path of the {'checkpoint' if kind == 'model' else kind}"
        paths.refuse_scheme(path, what)
        if not path.strip():
            raise UserError(f"{what} is empty, expected a folder, a file or a name on the hub: set {what}")
    if not is_name(path):
        return os.path.expanduser(path) if isinstance(path, str) and path.startswith("~") else path
    match = _NAME.fullmatch(os.fspath(path))
    assert match is not None
    return _folder(match[1], match[2], kind)


def place(path: str | os.PathLike) -> str:
    """The form in which a checkpoint records a path: absolute, or unchanged if it is a URL or a name on the hub."""
    return os.fspath(path) if is_url(path) or is_name(path) else os.path.abspath(os.path.expanduser(path))


@functools.lru_cache(maxsize=64)  # resolve and log each name once per process
def _folder(repo: str, revision: str | None, kind: str) -> str:
    try:
        import huggingface_hub
    except ImportError:
        raise UserError(
            f"{repo}: there is no such file or folder here, and reading from the Hugging Face hub needs the package "
            "huggingface_hub: pip install 'lcx[hub]'"
        ) from None
    fetch = _Fetch(huggingface_hub, repo, revision, kind)
    folder = fetch.cached() or fetch.downloaded()
    _say_once(f"{repo} is read from {folder}")  # the folder's name contains the revision
    return folder


@functools.cache
def _say_once(line: str) -> None:
    """A model and its tokenizer are looked up separately, in the same folder."""
    log.warning("%s", line)


class _Fetch:
    """Finds one name in the local cache or downloads it."""

    def __init__(self, hub: Any, repo: str, revision: str | None, kind: str):
        self._hub, self._repo, self._revision, self._kind = hub, repo, revision, kind
        self._where = {
            "repo_id": repo,
            "revision": revision,
            "repo_type": "dataset" if kind == "dataset" else "model",
        }

    def cached(self) -> str | None:
        """The folder in the local cache if it contains everything that is needed, else None."""
        try:
            folder = self._hub.snapshot_download(**self._where, local_files_only=True)
        except Exception as error:  # newer versions of huggingface_hub raise if a file of the repository is missing
            folder = getattr(error, "snapshot_path", None)
        if folder is None or not self._is_complete(str(folder)):
            return None
        # They know the list of files, and so whether what is needed is whole: half of a data set looks like a data set.
        try:
            self._hub.snapshot_download(**self._where, local_files_only=True, allow_patterns=self._needed(str(folder)))
        except Exception:
            return None
        return str(folder)

    def _needed(self, folder: str) -> list[str]:
        """Patterns of the files without which a folder would be read otherwise than it is meant."""
        if self._kind == "dataset":
            return list(_DATA)
        names = os.listdir(folder)
        if self._kind == "adapter":
            return [name for name in names if name in _ADAPTER]
        kinds = (patterns for patterns in _WEIGHTS if _matching(names, patterns))
        return [*_MEANING, *(next(kinds, ()) if self._kind == "model" else ())]

    def _is_complete(self, folder: str) -> bool:
        names = [name for name in os.listdir(folder) if os.path.exists(os.path.join(folder, name))]
        if self._kind == "model":
            kind = next((patterns for patterns in _WEIGHTS if _matching(names, patterns)), None)
            return kind is not None and all(name in names for name in _shards(folder, kind))
        if self._kind == "tokenizer":
            return any(name.startswith("tokenizer") or name == "lcx_tokenizer.json" for name in names)
        if self._kind == "dataset":
            return bool(names)
        return _ADAPTER[0] in names and any(name in names for name in _ADAPTER[1:3])

    def downloaded(self) -> str:
        """The folder after downloading the needed files. Raises UserError, which explains what went wrong."""
        own = logging.getLogger("huggingface_hub")
        propagated, own.propagate = own.propagate, False  # or each of its lines comes twice
        try:
            return self._hub.snapshot_download(**self._where, allow_patterns=self._patterns())
        except UserError:
            raise
        except Exception as error:  # from requests, httpx, huggingface_hub or the disk, depending on versions
            raise UserError(self._explained(error)) from error
        finally:
            own.propagate = propagated

    def _patterns(self) -> list[str]:
        """Patterns of the files to download."""
        # A single request, without the retries of a download: a name that does not exist is usually a mistyped path.
        info = self._hub.HfApi().repo_info(**self._where, timeout=_TIMEOUT)
        names = [sibling.rfilename for sibling in info.siblings or ()]
        if self._kind == "dataset":
            return list(_DATA)
        if self._kind == "tokenizer":
            return list(_TOKENIZER)
        if self._kind == "adapter":
            return list(_ADAPTER)
        for patterns in _WEIGHTS:
            if _matching(names, patterns):
                return [*_TOKENIZER, *_BESIDE, *patterns]
        raise UserError(
            f"{self._repo} on the Hugging Face hub has no weights that are read here (.safetensors, .bin or .pt), "
            f"found {', '.join(sorted(names)[:6]) or 'nothing'}"
        )

    def _explained(self, error: Exception) -> str:
        classes = {kind.__name__ for kind in type(error).__mro__}
        name, kind = self._repo, "dataset" if self._kind == "dataset" else "model"
        page = f"https://huggingface.co/{'datasets/' if kind == 'dataset' else ''}{name}"
        nothing = f"{name}: there is no such file or folder here"
        if "GatedRepoError" in classes:
            return f"{name} is gated: accept its terms on {page}, then log in with `hf auth login` (or set HF_TOKEN)"
        if "RepositoryNotFoundError" in classes:
            return (
                f"{nothing}, and no {kind} of this name on the Hugging Face hub: check the name (a private one needs "
                "`hf auth login`)"
            )
        if "RevisionNotFoundError" in classes:
            return (
                f"{name} on the Hugging Face hub has no revision {self._revision!r}: see {page}/commits/main"
            )
        if "HFValidationError" in classes:
            return f"{nothing}, and it is not a valid name on the Hugging Face hub"
        if classes & {
            "LocalEntryNotFoundError",
            "OfflineModeIsEnabled",
            "ConnectionError",
            "ConnectError",
            "TimeoutError",
        }:
            offline = os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "TRUE", "YES", "ON")
            why = "HF_HUB_OFFLINE is set" if offline else "the hub cannot be reached"
            return (
                f"{nothing}, the local cache of the Hugging Face hub does not contain all of it, and {why}: run "
                f"`hf download {name}` where there is a network, or pass a folder"
            )
        return f"{name} cannot be downloaded from the Hugging Face hub: {first_line(error)}"


def _shards(folder: str, patterns: Sequence[str]) -> list[str]:
    """The files listed in the index of this kind of weights; empty if there is no readable index."""
    index = next((name for name in patterns if name.endswith(".json")), "")
    try:
        found = json.loads(small_files.read_text(os.path.join(folder, index)))
        return sorted({str(name) for name in found["weight_map"].values()})
    except (OSError, ValueError, LookupError, AttributeError, TypeError, RecursionError):
        return []


def _model_files(names: Sequence[str]) -> list[str]:
    """The files of a folder without the weights of a second kind, which hold the same tensors again."""
    kinds = [patterns for patterns in _WEIGHTS if _matching(names, patterns)]
    again = [pattern for patterns in kinds[1:] for pattern in patterns]
    return [name for name in names if "/" in name or not _matching([name], again)]


def _tokenizer_files(names: Sequence[str]) -> list[str]:
    return [
        name for name in names if any(fnmatch(name, pattern) for pattern in (*_TOKENIZER, *_DATA, "*.model"))
    ]


_CHOOSE = {"model": _model_files, "tokenizer": _tokenizer_files, "adapter": list, "dataset": list}


def _matching(names: Sequence[str], patterns: Sequence[str]) -> bool:
    """Whether any file matches; a match of an index file (.json) alone does not count."""
    return any(
        fnmatch(name, pattern) for name in names for pattern in patterns if not pattern.endswith(".json")
    )
