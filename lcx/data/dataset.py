"""What a configuration builds: a `Dataset` (one source) or a `Mixture` of several."""

import dataclasses
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Bool, Int

from lcx.data import chat, markers, sources, store
from lcx.data import corpus as corpora
from lcx.data import tokenizers as tok
from lcx.data.notices import say_once
from lcx.errors import UserError

if TYPE_CHECKING:
    from lcx.data.batches import BatchIterator
    from lcx.data.checks import Report

_PARTS = "((@books/data.Dataset(), 0.7), (@code/data.Dataset(), 0.3))"  # as a .gin file has it
PACKINGS = ("concat", "first_fit", "windows")


@dataclasses.dataclass(frozen=True)
class Dataset:
    """Text to train and evaluate on: where it is, how it becomes tokens, and how they are laid out in rows.

    Attributes:
      source: a file, folder, glob, "stdlib", or a tuple of these (`lcx.data.sources.find_files`).
      tokenizer: "bytes", a tokenizer.json, a sentencepiece .model, a folder with one, or a `Tokenizer`.
      format: text | jsonl | parquet | fasta | code; by default from the file names.
      text_field: the field of a jsonl line or the column of a parquet file.
      separator: splits text files into documents, e.g. "<|endoftext|>".
      chat: True: every row is a conversation (`messages`, or ShareGPT's `conversations`), written in the chat template
        of the tokenizer. None: the rows that have `messages` are. False: rows are text.
      chat_template: the file of another template (.jinja), or the name of one of the tokenizer's.
      chat_loss: "assistant" trains on what the assistant says, "all" on whole conversations.
      packing: "concat" cuts the documents, end to end, every seq_len tokens; "first_fit" keeps documents
        whole where they fit a row; "windows" slides over long documents by half a window and packs the short
        ones.
      add_bos: begin each document with BOS; by default when the tokenizer has one.
      add_eos: end each document with EOS.
      document_mask: False trains across the documents of a row (one segment, running positions).
      eval_fraction: share of the documents held out.
      split: "hash" chooses them by their text, "tail" takes the last ones.
      min_length: documents with fewer tokens are left out.
      long_fraction: share of the training rows made of long documents; None leaves the natural share.
      long_length: tokens from which a document counts as long; by default seq_len.
      cache_dir: where the tokens are kept; by default $LCX_CACHE or the user's cache folder.
    """

    source: str | tuple[str, ...]
    tokenizer: str | tok.Tokenizer = "bytes"
    format: str | None = None
    text_field: str = "text"
    separator: str | None = None
    chat: bool | None = None
    chat_template: str | None = None
    chat_loss: str = "assistant"
    packing: str = "concat"
    add_bos: bool | None = None
    add_eos: bool = False
    document_mask: bool = True
    eval_fraction: float = 0.1
    split: str = "hash"
    min_length: int = 0
    long_fraction: float | None = None
    long_length: int | None = None
    cache_dir: str | None = None

    def __post_init__(self):
        if self.packing not in PACKINGS:
            raise UserError(
                f"Dataset.packing={self.packing!r} is unknown; expected one of {', '.join(PACKINGS)}"
            )
        if self.chat_loss not in chat.LOSSES:
            raise UserError(
                f"Dataset.chat_loss={self.chat_loss!r} is unknown; expected one of {', '.join(chat.LOSSES)}"
            )
        if self.split not in corpora.SPLIT_RULES:
            raise UserError(
                f"Dataset.split={self.split!r} is unknown; expected one of {', '.join(corpora.SPLIT_RULES)}"
            )
        if not 0 <= self.eval_fraction <= 1:
            raise UserError(f"Dataset.eval_fraction={self.eval_fraction} is not between 0 and 1")
        _check_long("Dataset", self.long_fraction, self.long_length)

    def load_tokenizer(self) -> tok.Tokenizer:
        return tok.load_tokenizer(self.tokenizer)

    def open(self) -> corpora.Corpus:
        """Tokenises the source where that is still to do, and divides it into its splits."""
        tokenizer, name = self.load_tokenizer(), _listed(self.source)
        tokens = store.open_store(
            sources.find_files(self.source, format=self.format),
            tokenizer,
            text_field=self.text_field,
            separator=self.separator,
            add_bos=tokenizer.bos_id is not None if self.add_bos is None else self.add_bos,
            add_eos=self.add_eos,
            chat=chat.reader(tokenizer, wanted=self.chat, template=self.chat_template, loss=self.chat_loss),
            cache_dir=self.cache_dir,
        )
        if tokens.markers:
            say_once(markers.sentence(tokens.markers, name))
        return corpora.divide(
            tokens,
            eval_fraction=self.eval_fraction,
            rule=self.split,
            min_length=self.min_length,
            source=name,
        )

    def batches(
        self,
        split: str,
        *,
        global_batch_size: int,
        seq_len: int,
        seed: int = 0,
        process_index: int = 0,
        process_count: int = 1,
        start: int = 0,
        shuffle: bool | None = None,
        repeat: bool | None = None,
        vocab_size: int | None = None,
        num_threads: int = 1,
        num_workers: int = 0,
    ) -> "BatchIterator":
        """This process's share of the batches of a split; see `Mixture.batches`."""
        return Mixture(((self, 1.0),)).batches(
            split,
            global_batch_size=global_batch_size,
            seq_len=seq_len,
            seed=seed,
            process_index=process_index,
            process_count=process_count,
            start=start,
            shuffle=shuffle,
            repeat=repeat,
            vocab_size=vocab_size,
            num_threads=num_threads,
            num_workers=num_workers,
        )

    def document_tokens(self, split: str) -> Iterator[Int[np.ndarray, "tokens"]]:
        """The int32 tokens of each whole document of a split, in the order of the source."""
        return self.open().document_tokens(split)

    def document_names(self, split: str) -> list[str]:
        """The name of each document of a split, in the order of `document_tokens`."""
        return self.open().document_names(split)

    def document_masks(self, split: str) -> Iterator[Bool[np.ndarray, "tokens"]]:
        """Which tokens of each document have a loss, in the order of `document_tokens`."""
        return self.open().document_masks(split)

    def remarks(self) -> list[str]:
        """What a run says of its data when it starts: conversations, copies that were left out."""
        return self.open().remarks()

    def check(self, *, min_length: int = 8192, window: int = 50, threshold: float = 0.8) -> "Report":
        """Length, repetition and truncation of every document of both splits (`lcx.data.checks`).

        The report also counts the texts that have a marker of a document's end inside.
        """
        from lcx.data import checks

        tokens = self.open().store
        documents = (
            (name, tokens.tokens[first:last].astype(np.int32))
            for name, first, last in zip(
                tokens.names, tokens.offsets[:-1].tolist(), tokens.offsets[1:].tolist(), strict=True
            )
        )
        report = checks.check_documents(
            documents,
            tokenizer=self.load_tokenizer(),
            min_length=min_length,
            window=window,
            threshold=threshold,
        )
        return dataclasses.replace(report, markers=tuple(tokens.markers.items()))


@dataclasses.dataclass(frozen=True)
class Mixture:
    """Several data sets, drawn from in proportion to their weights.

    Attributes:
      parts: (data set, weight) pairs; the weights are shares of the training rows (so of the tokens) and need
        not sum to 1. A small data set is repeated more often than a large one. Evaluation reads every
        held-out row of every part once, whatever the weights.
      long_fraction: share of the training rows made of long documents over all parts; within the long and
        within the short rows the weights hold.
      long_length: tokens from which a document counts as long; by default seq_len.
    """

    parts: tuple[tuple[Dataset, float], ...] = dataclasses.field(metadata={"example": _PARTS})
    long_fraction: float | None = None
    long_length: int | None = None

    def __post_init__(self):
        if not self.parts:
            raise UserError(f"Mixture.parts is empty, expected (Dataset, weight) pairs; write it as {_PARTS}")
        for part in self.parts:
            if not (isinstance(part, tuple | list) and len(part) == 2 and isinstance(part[0], Dataset)):
                raise UserError(
                    f"Mixture.parts holds {part!r:.80}, expected (Dataset, weight) pairs; write it as {_PARTS}"
                )
            if not (isinstance(part[1], int | float) and 0 < part[1] < float("inf")):
                raise UserError(f"Mixture weight {part[1]!r} of {part[0].source!r} is not a positive number")
            if self.long_fraction is not None and part[0].long_fraction is not None:
                raise UserError(
                    "long_fraction is set on the Mixture and on a Dataset in it; keep one of the two"
                )
        _check_long("Mixture", self.long_fraction, self.long_length)

    def load_tokenizer(self) -> tok.Tokenizer:
        """The tokenizer that all parts share; UserError when they differ."""
        found = [dataset.load_tokenizer() for dataset, _ in self.parts]
        for (dataset, _), tokenizer in zip(self.parts, found, strict=True):
            if tok.identity(tokenizer) != tok.identity(found[0]):
                raise UserError(
                    f"{dataset.source!r} has another tokenizer than {self.parts[0][0].source!r};"
                    " all data sets of a Mixture need the same one"
                )
        return found[0]

    def open(self) -> tuple[corpora.Corpus, ...]:
        """Opens every part; a training document of which another part holds a copy out is left out."""
        opened = [dataset.open() for dataset, _ in self.parts]
        return tuple(
            corpora.without_copies(corpus, [other for other in opened if other is not corpus])
            for corpus in opened
        )

    def batches(
        self,
        split: str,
        *,
        global_batch_size: int,
        seq_len: int,
        seed: int = 0,
        process_index: int = 0,
        process_count: int = 1,
        start: int = 0,
        shuffle: bool | None = None,
        repeat: bool | None = None,
        vocab_size: int | None = None,
        num_threads: int = 1,
        num_workers: int = 0,
    ) -> "BatchIterator":
        """This process's share of the batches of a split.

        The batches are one sequence of rows, whatever the number of processes: batch k is rows
        k * global_batch_size .. (k + 1) * global_batch_size, and process i of n holds the i-th of n equal
        blocks.

        Args:
          split: "train" or "eval".
          global_batch_size: rows of a batch over all processes.
          seq_len: tokens of a row (T).
          seed: decides the order of documents and rows, nothing else.
          start: rows to skip, as `state()["next_index"]` counts them.
          shuffle: by default in training only.
          repeat: endless, in another order every epoch; by default in training only. Without it every row
            comes once, weights and long_fraction do not apply, and the last batch is filled up with rows of
            weight 0.
          vocab_size: the model's, to refuse tokens that it does not have.
          num_threads: threads that prepare batches ahead; 0 prepares each when it is asked for.
          num_workers: worker processes; on few cores they cost more than they give, and they outlive a run
            that is killed.

        Raises:
          UserError: no data in this split, too little for one batch, or ids outside the vocabulary.
        """
        from lcx.data import batches, mixing

        if len(self.parts) > 1:
            self.load_tokenizer()  # refuses parts that differ
        request = mixing.Request(
            split=split,
            global_batch_size=global_batch_size,
            seq_len=seq_len,
            seed=seed,
            process_index=process_index,
            process_count=process_count,
            shuffle=(split == "train") if shuffle is None else shuffle,
            repeat=(split == "train") if repeat is None else repeat,
            vocab_size=vocab_size,
            num_threads=num_threads,
            num_workers=num_workers,
        )
        return batches.make_iterator(self, request, start=start)

    def document_tokens(self, split: str) -> Iterator[Int[np.ndarray, "tokens"]]:
        """The int32 tokens of each whole document of a split, part after part."""
        for corpus in self.open():
            yield from corpus.document_tokens(split)

    def document_masks(self, split: str) -> Iterator[Bool[np.ndarray, "tokens"]]:
        """Which tokens of each document have a loss, in the order of `document_tokens`."""
        for corpus in self.open():
            yield from corpus.document_masks(split)

    def remarks(self) -> list[str]:
        """What a run says of its data when it starts, part after part."""
        return [line for corpus in self.open() for line in corpus.remarks()]

    def document_names(self, split: str) -> list[str]:
        """The name of each document of a split, in the order of `document_tokens`."""
        return [name for corpus in self.open() for name in corpus.document_names(split)]


def _listed(source: str | tuple[str, ...]) -> str:
    return source if isinstance(source, str) else ", ".join(source)


def _check_long(owner: str, long_fraction: float | None, long_length: int | None) -> None:
    if long_fraction is not None and not 0 < long_fraction <= 1:
        raise UserError(f"{owner}.long_fraction={long_fraction} is not above 0 and at most 1")
    if long_length is not None and long_length < 1:
        raise UserError(f"{owner}.long_length={long_length} is not a number of tokens; expected at least 1")
