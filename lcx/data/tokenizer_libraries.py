"""Tokenizers of files: the tokenizers library for tokenizer.json and its relatives, sentencepiece for the rest."""

import dataclasses
import functools
import hashlib
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int

from lcx.data import json_files, sentencepiece_model, tokenizer_build
from lcx.data.special import SpecialTokens
from lcx.data.tokenizer_build import guarded
from lcx.data.tokenizer_names import GENERIC
from lcx.data.tokenizer_settings import Settings
from lcx.errors import UserError

# Ids [tokens], and offsets [tokens, 2]: the index of the first character of each token and of the one after its last.
# If one character is several tokens, all of them have its offsets.
Located = tuple[np.ndarray, np.ndarray]


@dataclasses.dataclass(frozen=True)
class HuggingFaceTokenizer:
    """A `tokenizer.json`, `vocab.json` with `merges.txt`, or a sentencepiece `.model` as transformers converts it.

    A special token written out in a text is encoded as that token, as in transformers.
    """

    path: str
    bos_id: int | None = None
    eos_id: int | None = None
    stop_ids: tuple[int, ...] = ()
    settings: Settings = Settings(GENERIC)

    @property
    def _build(self) -> tokenizer_build.Built:
        return _built(Path(self.path), self.settings, _stamp(Path(self.path)))

    @functools.cached_property
    def _library(self) -> Any:
        return self._build.library

    @functools.cached_property
    def special_texts(self) -> dict[str, str]:
        """{role: text} of the special tokens, as transformers passes them to a chat template."""
        return self._build.special

    @functools.cached_property
    def vocab_size(self) -> int:
        with guarded(f"the vocabulary of {self.path} cannot be read"), tokenizer_build.quiet():
            ids = self._library.get_vocab(with_added_tokens=True).values()
        return checked_size(max(ids, default=-1) + 1, self.path)

    @functools.cached_property
    def special(self) -> SpecialTokens:
        """The ids that the tokenizer itself puts before and after a text."""
        what = f"the post-processor of {self.path} cannot be used"
        with guarded(what):
            return tokenizer_build.special_of(self._library, self.eos_id, what=what)

    @functools.cached_property
    def _fill(self) -> str | None:
        """CodeLlama's fill token, at which CodeLlamaTokenizer splits a text in two and reorders the parts."""
        fill = tokenizer_build.named_tokens(self.settings).get("fill_token")
        return fill.content if fill and self.settings.tokenizer_class == "CodeLlamaTokenizer" else None

    def _refuse_fill(self, texts: Sequence[str]) -> None:
        if self._fill and any(self._fill in text for text in texts):
            raise UserError(
                f"a text holds {json_files.one_line(self._fill, limit=40)}, for which CodeLlamaTokenizer reorders the"
                f" text, which is not supported: remove it from the text, or set fill_token to null in"
                f" {Path(self.path).parent / 'tokenizer_config.json'} to read it as text"
            )

    def encode(self, text: str, *, add_special_tokens: bool = False) -> Int[np.ndarray, "tokens"]:
        self._refuse_fill([text])
        with guarded(f"{self.path} cannot encode a text of {len(text)} characters"):
            return np.array(self._library.encode(text, add_special_tokens=add_special_tokens).ids, np.int32)

    def encode_batch(
        self, texts: Sequence[str], *, add_special_tokens: bool = False
    ) -> list[Int[np.ndarray, "tokens"]]:
        self._refuse_fill(texts)
        with guarded(f"{self.path} cannot encode one of {len(texts)} texts"):
            encodings = self._library.encode_batch_fast(list(texts), add_special_tokens=add_special_tokens)
            return [np.array(encoding.ids, np.int32) for encoding in encodings]

    def encode_with_offsets(self, texts: Sequence[str]) -> list[Located]:
        self._refuse_fill(texts)
        with guarded(f"{self.path} cannot encode one of {len(texts)} texts"):
            found = self._library.encode_batch(list(texts), add_special_tokens=False)
            return [(np.array(e.ids, np.int32), np.array(e.offsets, np.int64).reshape(-1, 2)) for e in found]

    def decode(self, ids: Iterable[int]) -> str:
        known = [i for i in map(int, ids) if 0 <= i < self.vocab_size]
        with guarded(f"{self.path} cannot decode {len(known)} ids"):
            text = self._library.decode(known, skip_special_tokens=True)
            return self._cleaned(text)

    def _cleaned(self, text: str) -> str:
        """Applies clean_up_tokenization_spaces, which for BPE needs a second setting, as in transformers."""
        if not self.settings.option("clean_up_tokenization_spaces"):
            return text
        forced = "clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output"
        if type(self._library.model).__name__ == "BPE" and not self.settings.option(forced):
            return text
        for end in (".", "?", "!", ","):
            text = text.replace(f" {end}", end)
        text = text.replace(" ' ", "'")
        for end in ("n't", "'m", "'s", "'ve", "'re"):
            text = text.replace(f" {end}", end)
        return text

    def to_json(self) -> dict[str, Any]:
        kind = "sentencepiece" if self.path.endswith(".model") else "hugging_face"
        return file_json(kind, self) | {"settings": self.settings.to_json()}


@dataclasses.dataclass(frozen=True)
class SentencePieceTokenizer:
    """A sentencepiece `.model`, read by the sentencepiece library: unigram models, and BPE with normalization.

    It adds nothing to a text. A control token written out in a text is encoded as ordinary text.
    """

    path: str
    bos_id: int | None = None
    eos_id: int | None = None
    stop_ids: tuple[int, ...] = ()

    @functools.cached_property
    def _library(self) -> Any:
        return _load_sentencepiece(self.path)

    @functools.cached_property
    def vocab_size(self) -> int:
        return checked_size(self._library.vocab_size(), self.path)

    @property
    def special(self) -> SpecialTokens:
        return SpecialTokens()

    def encode(self, text: str, *, add_special_tokens: bool = False) -> Int[np.ndarray, "tokens"]:
        return self.encode_batch([text], add_special_tokens=add_special_tokens)[0]

    def encode_batch(
        self, texts: Sequence[str], *, add_special_tokens: bool = False
    ) -> list[Int[np.ndarray, "tokens"]]:
        with guarded(f"{self.path} cannot encode one of {len(texts)} texts"):
            return [np.array(ids, np.int32) for ids in self._library.encode(list(texts))]

    def encode_with_offsets(self, texts: Sequence[str]) -> list[Located]:
        located = []
        with guarded(f"{self.path} cannot encode one of {len(texts)} texts"):
            for text in texts:
                pieces = self._library.encode(text, out_type="immutable_proto").pieces
                offsets = np.array([(p.begin, p.end) for p in pieces], np.int64).reshape(-1, 2)
                located.append((np.array([p.id for p in pieces], np.int32), offsets))
        return located

    def piece(self, token: int) -> str:
        """The text of a token, including special tokens."""
        return self._library.id_to_piece(token)

    def decode(self, ids: Iterable[int]) -> str:
        known = [i for i in map(int, ids) if 0 <= i < self.vocab_size]
        with guarded(f"{self.path} cannot decode {len(known)} ids"):
            return self._library.decode(known)

    def to_json(self) -> dict[str, Any]:
        return file_json("sentencepiece", self)


@functools.lru_cache(maxsize=4)
def _built(path: Path, settings: Settings, stamp: tuple) -> tokenizer_build.Built:
    """Cached per file, because a run loads its tokenizer many times and a large vocabulary takes a second."""
    return tokenizer_build.build(path, settings)


def _stamp(path: Path) -> tuple:
    """Inode, size and modification time of the files, which invalidate the cache when a file changes."""
    try:
        stats = [os.stat(file) for file in files_of(path)]
    except OSError:
        return ()
    return tuple((stat.st_ino, stat.st_size, stat.st_mtime_ns) for stat in stats)


FileTokenizer = HuggingFaceTokenizer | SentencePieceTokenizer


def files_of(path: Path) -> tuple[Path, ...]:
    """The files that hold the vocabulary: one, or two for vocab.json."""
    return (path, path.with_name("merges.txt")) if path.name == "vocab.json" else (path,)


def checksum(path: Path) -> str:
    """SHA-256 of the vocabulary's files. Raises UserError if one is missing."""
    digest = hashlib.sha256()
    for file in files_of(path):
        data = json_files.read_bytes(file, max_bytes=tokenizer_build.MAX_BYTES)
        if data is None:
            raise UserError(
                f"tokenizer file {file} does not exist; copy the tokenizer next to the checkpoint"
            )
        digest.update(data)
    return digest.hexdigest()


def file_json(kind: str, tokenizer: FileTokenizer) -> dict[str, Any]:
    """The record of a tokenizer read from a file: `path` is its path, `file` the file name that a copy gets."""
    name = Path(tokenizer.path).name
    name = (
        name if name == "vocab.json" else "tokenizer.model" if kind == "sentencepiece" else "tokenizer.json"
    )
    return {
        "kind": kind,
        "path": tokenizer.path,
        "file": name,
        "sha256": checksum(Path(tokenizer.path)),
        "bos_id": tokenizer.bos_id,
        "eos_id": tokenizer.eos_id,
        "stop_ids": list(tokenizer.stop_ids),
        "vocab_size": tokenizer.vocab_size,
    }


def checked_size(size: int, path: str) -> int:
    """`size`, checked. Raises UserError if the vocabulary is empty or its ids do not fit into int32."""
    if not 0 < size <= json_files.LARGEST_ID + 1:
        found = "is empty" if size <= 0 else f"has ids up to {size - 1}"
        raise UserError(
            f"the vocabulary of {path} {found}, expected ids from 0 to {json_files.LARGEST_ID}: restore the file"
        )
    return size


def _load_sentencepiece(path: str) -> Any:
    sentencepiece_model.read(Path(path))  # validate the file first, because the library trusts its input
    try:
        import sentencepiece
    except ImportError as error:
        raise UserError(
            f"reading {path} needs the sentencepiece package: pip install sentencepiece"
        ) from error
    with guarded(f"{path} is not a readable sentencepiece model"):
        return sentencepiece.SentencePieceProcessor(model_file=path)
