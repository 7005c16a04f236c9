"""The token store: documents tokenised once, in a memory-mapped file named by a fingerprint of its inputs.

A store is a folder named by its fingerprint. It is written to a temporary folder next to its final path and renamed
when complete, so a killed run never leaves an incomplete store under the final name. A store is verified when it is
opened, and rebuilt if it is damaged. All of it can be rebuilt from the source, so the cache folder may be deleted at
any time.
"""

import dataclasses
import errno
import functools
import hashlib
import json
import os
import shutil
import socket
import time
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int

from lcx import paths
from lcx.buckets import is_url
from lcx.data import sources
from lcx.data import tokenizers as tok
from lcx.data.chat import ChatReader, loss_mask
from lcx.data.markers import MarkerCounter
from lcx.data.notices import say_once
from lcx.data.readers import streams
from lcx.data.special import SpecialTokens
from lcx.data.token_files import MaskWriter, TokenWriter, blocks_match
from lcx.errors import UserError

_VERSION = 2  # increase it when the same inputs give a store with different content
_CHUNK_CHARACTERS = 8 << 20  # characters tokenised at a time
_REMEMBERED = 64 << 20  # bytes; the hashes of files at least this large are cached
_SETTLED_NS = 2_000_000_000  # a change this soon after the last one may leave the time stamp as it is
_ABANDONED_SECONDS = 24 * 3600


@dataclasses.dataclass(frozen=True)
class TokenStore:
    """Tokenised documents, end to end.

    Attributes:
      offsets: [D + 1]; document d is tokens[offsets[d]:offsets[d + 1]], BOS and EOS included.
      hashes: [D] uint64, a hash of the text of each document: equal text, equal hash.
      max_id: the largest id that occurs.
      notes: what was skipped, chosen or replaced when the source was read, one line each.
      conversations: how many documents are conversations.
      loss_tokens: how many tokens have a loss.
      markers: end-of-document marker -> number of texts that contain it.
    """

    folder: Path
    fingerprint: str
    dtype: str
    offsets: Int[np.ndarray, "documents+1"]
    hashes: Int[np.ndarray, "documents"]
    max_id: int
    notes: tuple[str, ...] = ()
    conversations: int = 0
    loss_tokens: int | None = None
    markers: dict[str, int] = dataclasses.field(default_factory=dict)

    @functools.cached_property
    def tokens(self) -> Int[np.ndarray, "tokens"]:
        """All tokens, memory-mapped: only what is read is loaded."""
        # Viewed as a plain array, because np.memmap's indexing is several times slower for small reads.
        return np.asarray(np.memmap(self.folder / "tokens.bin", dtype=self.dtype, mode="r"))

    @functools.cached_property
    def loss_mask(self) -> Int[np.ndarray, "tokens"] | None:
        """1 for the tokens that have a loss when they are labels; None if all do. Memory-mapped too."""
        if self.loss_tokens is None:
            return None
        return np.asarray(np.memmap(self.folder / "loss_mask.bin", dtype=np.uint8, mode="r"))

    def __getstate__(self) -> dict[str, Any]:
        # A memory map would be pickled as a copy of the whole corpus; the receiving process maps the file itself.
        return {key: value for key, value in self.__dict__.items() if key not in ("tokens", "loss_mask")}

    @property
    def num_documents(self) -> int:
        return len(self.offsets) - 1

    @property
    def num_tokens(self) -> int:
        return int(self.offsets[-1])

    @functools.cached_property
    def names(self) -> list[str]:
        return (self.folder / "names.txt").read_text(encoding="utf-8").splitlines()


def open_store(
    files: Sequence[sources.SourceFile],
    tokenizer: tok.Tokenizer,
    *,
    text_field: str = "text",
    separator: str | None = None,
    special: SpecialTokens = SpecialTokens(),  # noqa: B008 (frozen)
    on_bad_line: str = "error",
    chat: ChatReader | None = None,
    cache_dir: str | None = None,
) -> TokenStore:
    """Opens the store of these inputs, or builds it, with a progress bar, if it does not exist.

    The special tokens are put around texts only: a conversation begins and ends with what its template writes.

    The fingerprint covers names, sizes and contents of the files, the tokenizer, the options and the special tokens
    of each document, so a changed file gives another store. Folders and time stamps do not count, so a moved data set
    keeps its store. What was skipped in the source is logged every time.

    Raises:
      UserError: an input cannot be read or contains no text, or the cache folder cannot be written (for example,
        the disk is full).
    """
    root = paths.cache_folder(cache_dir)
    options = {"text_field": text_field, "separator": separator, **_special_options(tokenizer, special)}
    if on_bad_line != "error":
        options["on_bad_line"] = on_bad_line
    if chat is not None and chat.identity() is not None:
        options["chat"] = chat.identity()
    try:
        root.mkdir(parents=True, exist_ok=True)
        fingerprint = _fingerprint(files, tokenizer, options, root)
        store = _read_store(root / fingerprint, fingerprint)
        if store is None:
            _remove_abandoned(root)
            tally = sources.Tally(on_bad_line)
            documents = sources.read_documents(
                tuple(files), text_field=text_field, separator=separator, chat=chat, tally=tally
            )
            ends = np.array(special.before, np.int32), np.array(special.after, np.int32)
            size = sum(streams.size(file.path) for file in files)
            _build(root / fingerprint, documents, tokenizer, ends, size, tally)
            store = _read_store(root / fingerprint, fingerprint)
    except OSError as error:
        raise _cache_error(root, error) from error
    if store is None:
        raise UserError(
            f"the token cache in {root} does not read back as written; set LCX_CACHE (or"
            " Dataset.cache_dir) to another disk"
        )
    for line in store.notes:
        say_once(f"{_source_name(files)}: {line}")
    return store


def _source_name(files: Sequence[sources.SourceFile]) -> str:
    if any(is_url(file.path) for file in files):
        return os.path.commonprefix([file.path for file in files])
    return os.path.commonpath([os.path.abspath(file.path) for file in files])


def _fingerprint(
    files: Sequence[sources.SourceFile], tokenizer: tok.Tokenizer, options: dict[str, Any], root: Path
) -> str:
    listed = [[file.name, file.format, file.document, *content] for file, content in _hashed(files, root)]
    inputs = {"version": _VERSION, "files": listed, "tokenizer": tok.identity(tokenizer), **options}
    return hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()[:32]


def _build(
    folder: Path,
    documents: Iterator[sources.Document],
    tokenizer: tok.Tokenizer,
    ends: tuple[np.ndarray, np.ndarray],
    size: int,
    tally: sources.Tally,
) -> None:
    """Writes a store next to its final path, then renames it; after any error the incomplete store is removed."""
    partial = folder.with_name(f"{folder.name}.{socket.gethostname()}.{os.getpid()}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        _write(partial, folder.name, documents, tokenizer, ends, size, tally)
        _publish(partial, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _cache_error(root: Path, error: OSError) -> UserError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        free = shutil.disk_usage(root).free >> 20
        return UserError(
            f"the disk is full ({free} MiB free) while writing the token cache in {root}; free some space,"
            " or set LCX_CACHE (or Dataset.cache_dir) to another disk"
        )
    return UserError(
        f"cannot write the token cache in {root}: {error.strerror}; set LCX_CACHE (or Dataset.cache_dir) to"
        " a folder that can be written"
    )


def _special_options(tokenizer: tok.Tokenizer, special: SpecialTokens) -> dict[str, Any]:
    """The special tokens in the fingerprint; the ids of BOS and EOS are part of the tokenizer's identity."""
    bos, eos = (() if value is None else (value,) for value in (tokenizer.bos_id, tokenizer.eos_id))
    options: dict[str, Any] = {"add_bos": special.before == bos != (), "add_eos": special.after == eos != ()}
    if special.before not in ((), bos) or special.after not in ((), eos):
        options["special"] = [special.before, special.after]
    return options


def _hashed(
    files: Sequence[sources.SourceFile], root: Path
) -> Iterator[tuple[sources.SourceFile, tuple[int, str]]]:
    """Each file with (size, SHA-256).

    Hashes of large files are cached by path, size, inode and time stamps. For an object in a bucket its version stands
    for the hash.
    """
    memory = root / "file_hashes.json"
    try:
        known = json.loads(memory.read_text())
    except (OSError, ValueError):
        known = {}
    changed = False
    for file in files:
        if is_url(file.path):  # its version changes with its content, so it need not be read for that
            yield file, (streams.size(file.path), f"version {streams.version(file.path)}")
            continue
        try:
            stat = os.stat(file.path)
            key = [stat.st_size, stat.st_ino, stat.st_mtime_ns, stat.st_ctime_ns]
            path = os.path.abspath(file.path)
            entry = known.get(path)
            if entry is None or entry[0] != key:
                now = time.time_ns()
                with open(file.path, "rb") as stream:
                    entry = [key, hashlib.file_digest(stream, "sha256").hexdigest()]
                if stat.st_size >= _REMEMBERED and now - stat.st_ctime_ns > _SETTLED_NS:
                    known[path], changed = entry, True
        except OSError as error:
            raise UserError(f"cannot read {file.path}: {error.strerror}; check Dataset.source") from error
        yield file, (stat.st_size, entry[1])
    if changed:
        partial = memory.with_suffix(f".{os.getpid()}.partial")
        try:
            partial.write_text(json.dumps(known))
            os.replace(partial, memory)
        except OSError:  # without the cached hashes the next run only takes longer
            partial.unlink(missing_ok=True)


def _chunks(documents: Iterator[sources.Document]) -> Iterator[list[sources.Document]]:
    """Documents in groups of a few million characters: enough work for several threads, little memory."""
    chunk: list[sources.Document] = []
    characters = 0
    for document in documents:
        chunk.append(document)
        characters += len(document.text)
        if characters >= _CHUNK_CHARACTERS:
            yield chunk
            chunk, characters = [], 0
    if chunk:
        yield chunk


@dataclasses.dataclass
class _Index:
    """The offsets and hashes of the documents written so far."""

    lengths: list[int] = dataclasses.field(default_factory=list)
    hashes: list[int] = dataclasses.field(default_factory=list)
    conversations: int = 0
    loss_tokens: int = 0

    def add(self, document: sources.Document, mask: np.ndarray) -> None:
        self.lengths.append(len(mask))
        digest = hashlib.blake2b(document.text.encode(), digest_size=8).digest()
        self.hashes.append(int.from_bytes(digest, "little"))
        self.conversations += document.chat is not None
        self.loss_tokens += int(np.count_nonzero(mask))

    def arrays(self) -> tuple[np.ndarray, np.ndarray]:
        """(offsets [D + 1], hashes [D] as int64)."""
        offsets = np.concatenate([[0], np.cumsum(self.lengths)]).astype("<i8")
        return offsets, np.array(self.hashes, "<u8").view("<i8")


def _encode(
    chunk: list[sources.Document], tokenizer: tok.Tokenizer, ends: tuple[np.ndarray, np.ndarray]
) -> Iterator[tuple[sources.Document, np.ndarray, np.ndarray]]:
    """(document, ids, loss mask) of each document that has tokens."""
    partial = [d for d in chunk if d.chat is not None and d.chat.spans is not None]
    located = iter(tok.locate_all(tokenizer, [d.text for d in partial])) if partial else iter(())
    whole = [d for d in chunk if d.chat is None or d.chat.spans is None]
    encoded = iter(tok.encode_all(tokenizer, [d.text for d in whole]))
    for document in chunk:
        if document.chat is not None and document.chat.spans is not None:
            ids, offsets = next(located)
            mask = loss_mask(offsets, document.chat.spans, marked=document.chat.marked)
        else:
            ids = next(encoded)
            before, after = ends if document.chat is None else (ids[:0], ids[:0])
            ids = np.concatenate([before, ids, after]) if len(ids) else ids
            mask = np.ones(len(ids), bool)
        if len(ids):
            yield document, ids, mask


def _write(
    folder: Path,
    fingerprint: str,
    documents: Iterator[sources.Document],
    tokenizer: tok.Tokenizer,
    ends: tuple[np.ndarray, np.ndarray],
    size: int,
    tally: sources.Tally,
) -> None:
    """Writes the files of a store into `folder`; meta.json, which makes it valid, comes last."""
    from tqdm import tqdm

    dtype = "<u2" if tokenizer.vocab_size <= 1 << 16 else "<u4"
    index, markers = _Index(), MarkerCounter(tokenizer.eos_id)
    bar = tqdm(total=size, desc="tokenising", unit="B", unit_scale=True, disable=None, delay=1.0)
    names = open(folder / "names.txt", "w", encoding="utf-8", errors="backslashreplace")  # noqa: SIM115
    with open(folder / "tokens.bin", "wb") as stream, names, bar:
        tokens, masks = TokenWriter(stream, dtype), MaskWriter(folder / "loss_mask.bin")
        for chunk in _chunks(documents):
            for document, ids, mask in _encode(chunk, tokenizer, ends):
                tokens.append(ids)
                masks.append(mask)
                index.add(document, mask)
                if document.chat is None:
                    markers.add(document.text, ids[len(ends[0]) : len(ids) - len(ends[1])])
                names.write(" ".join(document.name.split()) + "\n")
            bar.update(chunk[-1].bytes_read - bar.n)
        tokens.finish()
    if not index.lengths:
        found = "; ".join(tally.lines()) or "every document is empty"
        raise UserError(f"the data source holds no text: {found}; check Dataset.source")
    offsets, hashes = index.arrays()
    table = np.concatenate([offsets, hashes])
    table.tofile(folder / "documents.bin")
    meta = {
        "fingerprint": fingerprint,
        "dtype": dtype,
        "num_documents": len(index.lengths),
        "num_tokens": int(offsets[-1]),
        "max_id": tokens.max_value,
        "documents_crc32": zlib.crc32(table.tobytes()),
        "block_crc32": tokens.checksums,
        "notes": tally.lines(),
        "conversations": index.conversations,
        "markers": markers.counts,
    }
    if (checksums := masks.finish()) is not None:
        meta |= {"loss_tokens": index.loss_tokens, "mask_crc32": checksums}
    (folder / "meta.json").write_text(json.dumps(meta))


def _publish(partial: Path, folder: Path) -> None:
    """Renames a complete store to its final path; another process may already have put an identical one there."""
    for _ in range(2):
        try:
            os.rename(partial, folder)
            return
        except OSError as error:
            if error.errno not in (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR):
                raise
            if _read_store(folder, folder.name) is not None:
                return
            shutil.rmtree(folder, ignore_errors=True)


def _remove_abandoned(root: Path) -> None:
    """Removes incomplete stores that are so old that the process writing them must have been killed."""
    for folder in root.glob("*.partial"):
        try:
            if folder.is_dir() and time.time() - folder.stat().st_mtime > _ABANDONED_SECONDS:
                shutil.rmtree(folder, ignore_errors=True)
        except OSError:
            continue


def _read_store(folder: Path, fingerprint: str) -> TokenStore | None:
    """The store in `folder`, or None if there is none or it is damaged (it is then rebuilt)."""
    try:
        meta = json.loads((folder / "meta.json").read_text())
        count, dtype = meta["num_documents"], meta["dtype"]
        index = np.fromfile(folder / "documents.bin", "<i8")
        expected = meta["num_tokens"] * np.dtype(dtype).itemsize
        sound = (
            meta["fingerprint"] == fingerprint
            and len(index) == 2 * count + 1
            and zlib.crc32(index.tobytes()) == meta["documents_crc32"]
            and os.path.getsize(folder / "tokens.bin") == expected
            and blocks_match(folder / "tokens.bin", meta["block_crc32"])
            and all(isinstance(line, str) for line in meta["notes"])
        )
        loss_tokens = meta.get("loss_tokens")
        if loss_tokens is not None:
            mask = folder / "loss_mask.bin"
            sound = sound and os.path.getsize(mask) == meta["num_tokens"]
            sound = sound and blocks_match(mask, meta["mask_crc32"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
    if not sound:
        return None
    offsets, hashes = index[: count + 1], index[count + 1 :].view("<u8")
    more = {"conversations": meta.get("conversations", 0), "markers": meta.get("markers", {})}
    more |= {"notes": tuple(meta["notes"]), "loss_tokens": loss_tokens}
    return TokenStore(folder, fingerprint, dtype, offsets, hashes, meta["max_id"], **more)
