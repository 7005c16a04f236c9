"""The data sets that a configuration builds: a `Dataset` (one source) or a `Mixture` of several."""

import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np
from jaxtyping import Bool, Int

from lcx.data import chat, checks, markers, sources, store
from lcx.data import corpus as corpora
from lcx.data import tokenizers as tok
from lcx.data.batches import BatchIterator, Opened
from lcx.data.mixing import BatchSpec, Part
from lcx.data.notices import say_once
from lcx.data.special import described
from lcx.errors import UserError

_PARTS = "((@books/data.Dataset(), 0.7), (@code/data.Dataset(), 0.3))"  # as written in a .gin file
PACKINGS = ("concat", "first_fit", "windows", "padded")


@dataclasses.dataclass(frozen=True)
class Dataset:
    """Text to train and evaluate on: its source, its tokenizer, and how its tokens are laid out in rows.

    Attributes:
      source: a file, folder, glob, "stdlib", or a tuple of these (`lcx.data.sources.find_files`).
      tokenizer: "bytes", a tokenizer.json, a sentencepiece .model, a folder with one, or a `Tokenizer`.
      format: text | jsonl | json | csv | tsv | parquet | arrow | fasta | code; by default from the content of each
        file, else from its extension. All but parquet and arrow may be compressed (gzip, zstd, bzip2, xz).
      text_field: the field of a JSON object or the column of a table. If it is "text" and there is no such
        field, the one field with another common name (content, document, body, ...) is read, and the run says so.
      on_bad_line: "error" raises at a row that cannot be read, with its file and line; "skip" skips such rows and
        reports how many. Null and empty texts are skipped and counted in both cases.
      separator: splits text files into documents, e.g. "<|endoftext|>".
      chat: True: every row is a conversation (`messages`, or ShareGPT's `conversations`), rendered with the chat
        template of the tokenizer. None: rows that have `messages` are conversations. False: rows are text.
      chat_template: the path of another template (.jinja), or the name of one of the tokenizer's templates.
      chat_loss: "assistant" trains on the assistant's turns, "all" on whole conversations.
      packing: "concat" joins the documents end to end and cuts every seq_len tokens; "first_fit" keeps documents
        whole if they fit into a row; "windows" cuts long documents into windows that overlap by half, and packs the
        short ones; "padded" puts one document in each row, and drops what is beyond seq_len, which the run says.
      add_bos: True puts BOS before each document, False nothing; None leaves it to the tokenizer, which may have a BOS
        token without adding it.
      add_eos: True puts EOS after each document, False nothing; None leaves it to the tokenizer, and adds EOS if the
        tokenizer adds nothing itself, so that documents in a row are separated.
      document_mask: False trains across the documents of a row (one segment, consecutive positions).
      eval_fraction: share of the documents held out.
      split: the rule by which documents are held out: "hash" chooses them by their text, "tail" takes the last ones.
      eval_documents: names of the documents that are held out, instead of a share chosen by a rule: ("chr20", "chr21")
        for contigs of a genome. `*` stands for any letters. Names are those of `python -m lcx.data`.
      min_length: documents with fewer tokens are dropped.
      long_fraction: share of the training rows made of long documents; None keeps the natural share.
      long_length: tokens from which a document counts as long; by default seq_len.
      cache_dir: folder of the token store; by default $LCX_CACHE or the user's cache folder.
    """

    source: str | tuple[str, ...]
    tokenizer: str | tok.Tokenizer = "bytes"
    format: str | None = None
    text_field: str = "text"
    on_bad_line: str = "error"
    separator: str | None = None
    chat: bool | None = None
    chat_template: str | None = None
    chat_loss: str = "assistant"
    packing: str = "concat"
    add_bos: bool | None = None
    add_eos: bool | None = None
    document_mask: bool = True
    eval_fraction: float = 0.1
    split: str = "hash"
    eval_documents: tuple[str, ...] = ()
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
        if self.on_bad_line not in sources.ON_BAD_LINE:
            raise UserError(
                f"Dataset.on_bad_line={self.on_bad_line!r} is unknown; expected one of"
                f" {', '.join(sources.ON_BAD_LINE)}"
            )
        if not 0 <= self.eval_fraction <= 1:
            raise UserError(f"Dataset.eval_fraction={self.eval_fraction} is not between 0 and 1")
        if self.min_length < 0:
            raise UserError(f"Dataset.min_length={self.min_length} is not a number of tokens; expected at least 0")
        for name in ("text_field", "separator", "chat_template", "cache_dir"):
            if getattr(self, name) == "":
                raise UserError(f"Dataset.{name} is empty; set it, or leave it out (None)")
        _check_long("Dataset", self.long_fraction, self.long_length)

    def load_tokenizer(self) -> tok.Tokenizer:
        return tok.load_tokenizer(self.tokenizer)

    def special_tokens(self, tokenizer: tok.Tokenizer) -> tok.SpecialTokens:
        """The ids before and after each document. Raises UserError if nothing separates the documents of a row."""
        return tok.separating_tokens(
            tokenizer, add_bos=self.add_bos, add_eos=self.add_eos, document_mask=self.document_mask
        )

    def describe_special_tokens(self, *, packed: bool = True) -> str:
        """One line for the start of a run: "BOS before each document: no; EOS after: yes"."""
        tokenizer = self.load_tokenizer()
        special = self.special_tokens(tokenizer)
        if special.separator and not packed:
            special = tok.SpecialTokens()
        return described(tokenizer, special)

    def open(self) -> corpora.Corpus:
        """Tokenises the source unless that has been done before, and divides it into its splits."""
        return self._open(self.load_tokenizer())

    def _open(self, tokenizer: tok.Tokenizer) -> corpora.Corpus:
        name = _listed(self.source)
        tokens = store.open_store(
            sources.find_files(self.source, format=self.format),
            tokenizer,
            text_field=self.text_field,
            separator=self.separator,
            special=self.special_tokens(tokenizer),
            on_bad_line=self.on_bad_line,
            chat=chat.reader(tokenizer, wanted=self.chat, template=self.chat_template, loss=self.chat_loss),
            cache_dir=self.cache_dir,
        )
        if tokens.markers:
            say_once(markers.sentence(tokens.markers, name))
        return corpora.divide(
            tokens,
            eval_fraction=self.eval_fraction,
            rule=self.split,
            eval_documents=self.eval_documents,
            min_length=self.min_length,
            source=name,
        )

    def opened(self) -> Opened:
        """This data set, opened once for a run that reads both splits."""
        return Mixture(((self, 1.0),)).opened()

    def batches(self, split: str | BatchSpec, **settings: Any) -> BatchIterator:
        """This process's share of the batches of a split; see `Mixture.batches`."""
        return Mixture(((self, 1.0),)).batches(split, **settings)

    def documents(self, split: str, *, packed: bool = True) -> Iterator[corpora.Scored]:
        """(tokens, mask) of each whole document of a split, in the order of the source: int32 ids, and which of them
        have a loss.

        Args:
          packed: False omits an EOS that was added only to separate the documents of a row.
        """
        return self._documents(self.open(), split, packed)

    def _documents(self, corpus: corpora.Corpus, split: str, packed: bool) -> Iterator[corpora.Scored]:
        special = self.special_tokens(self.load_tokenizer())
        # A conversation is exactly what its template writes, so there is no EOS to remove.
        added = special.separator and corpus.store.conversations < corpus.store.num_documents
        for tokens, mask in zip(corpus.document_tokens(split), corpus.document_masks(split), strict=True):
            ends = not packed and added and tokens[-1] == special.after[-1]
            yield (tokens[:-1], mask[:-1]) if ends else (tokens, mask)

    def document_tokens(self, split: str, *, packed: bool = True) -> Iterator[Int[np.ndarray, "tokens"]]:
        """The int32 tokens of each document; see `documents`."""
        return (tokens for tokens, _ in self.documents(split, packed=packed))

    def document_masks(self, split: str, *, packed: bool = True) -> Iterator[Bool[np.ndarray, "tokens"]]:
        """Which tokens of each document have a loss; see `documents`."""
        return (mask for _, mask in self.documents(split, packed=packed))

    def document_names(self, split: str) -> list[str]:
        """The name of each document of a split, in the order of `documents`."""
        return self.open().document_names(split)

    def remarks(self) -> list[str]:
        """What a run reports about its data when it starts: conversations, and dropped copies."""
        corpus = self.open()
        return [*corpus.remarks(), *self.without_effect(corpus)]

    def without_effect(self, corpus: corpora.Corpus) -> list[str]:
        """One line for each setting about conversations if there are none."""
        if corpus.store.conversations:
            return []
        names = [name for name in ("chat_template", "chat_loss") if getattr(self, name) != getattr(Dataset, name)]
        return [f"Dataset.{name} has no effect: {corpus.source} holds no conversations" for name in names]

    def check(self, *, min_length: int = 8192, window: int = 50, threshold: float = 0.8) -> checks.Report:
        """Length, repetition and truncation of every document of both splits (`lcx.data.checks`).

        The report also counts the texts that contain an end-of-document marker.
        """
        if min_length < 0:
            raise UserError(f"min_length is {min_length}, expected a number of tokens, at least 0: change min_length")
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
        held-out row of every part once, regardless of the weights.
      long_fraction: share of the training rows made of long documents, over all parts; the weights apply among the
        long rows and among the short rows separately.
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

    def describe_special_tokens(self, *, packed: bool = True) -> str:
        """The line of each part; identical lines appear once."""
        lines = {dataset.describe_special_tokens(packed=packed): dataset.source for dataset, _ in self.parts}
        if len(lines) == 1:
            return next(iter(lines))
        return "; ".join(f"{source}: {line}" for line, source in lines.items())

    def open(self) -> tuple[corpora.Corpus, ...]:
        """Opens every part, and drops training documents of which another part holds out a copy."""
        return _without_copies([dataset.open() for dataset, _ in self.parts])

    def opened(self) -> Opened:
        """The parts, opened once for a run. Raises UserError if their tokenizers differ."""
        tokenizer = self.load_tokenizer()
        opened = _without_copies([dataset._open(tokenizer) for dataset, _ in self.parts])
        parts = zip(self.parts, opened, strict=True)
        return Opened(
            tuple(Part(dataset, weight, corpus) for (dataset, weight), corpus in parts),
            tokenizer,
            long_fraction=self.long_fraction,
            long_length=self.long_length,
        )

    def batches(self, split: str | BatchSpec, **settings: Any) -> BatchIterator:
        """This process's share of the batches of a split, in the order described in `BatchSpec`.

        Args:
          split: a BatchSpec; or the name of the split, with the other fields of a BatchSpec as keyword arguments:
            `batches("train", global_batch_size=8, seq_len=4096)`.

        Raises:
          UserError: this split is empty, has too little data for one batch, or has ids outside the vocabulary.
          TypeError: a setting that BatchSpec does not have.
        """
        if isinstance(split, str):
            split = BatchSpec(split, **settings)
        elif settings:
            split = dataclasses.replace(split, **settings)
        return self.opened().batches(split)

    def documents(self, split: str, *, packed: bool = True) -> Iterator[corpora.Scored]:
        """(tokens, mask) of each whole document of a split, one part after the other; see `Dataset.documents`."""
        for (dataset, _), corpus in zip(self.parts, self.open(), strict=True):
            yield from dataset._documents(corpus, split, packed)

    def document_tokens(self, split: str, *, packed: bool = True) -> Iterator[Int[np.ndarray, "tokens"]]:
        """The int32 tokens of each document; see `documents`."""
        return (tokens for tokens, _ in self.documents(split, packed=packed))

    def document_masks(self, split: str, *, packed: bool = True) -> Iterator[Bool[np.ndarray, "tokens"]]:
        """Which tokens of each document have a loss; see `documents`."""
        return (mask for _, mask in self.documents(split, packed=packed))

    def remarks(self) -> list[str]:
        """What a run reports about its data when it starts, one part after the other."""
        return [line for corpus in self.open() for line in corpus.remarks()]

    def document_names(self, split: str) -> list[str]:
        """The name of each document of a split, in the order of `documents`."""
        return [name for corpus in self.open() for name in corpus.document_names(split)]


def _without_copies(opened: list[corpora.Corpus]) -> tuple[corpora.Corpus, ...]:
    return tuple(
        corpora.without_copies(corpus, [other for other in opened if other is not corpus])
        for corpus in opened
    )


def _listed(source: str | tuple[str, ...]) -> str:
    return source if isinstance(source, str) else ", ".join(source)


def _check_long(owner: str, long_fraction: float | None, long_length: int | None) -> None:
    if long_fraction is not None and not 0 < long_fraction <= 1:
        raise UserError(f"{owner}.long_fraction={long_fraction} is not above 0 and at most 1")
    if long_length is not None and long_length < 1:
        raise UserError(f"{owner}.long_length={long_length} is not a number of tokens; expected at least 1")
    if long_length is not None and long_fraction is None:
        raise UserError(
            f"{owner}.long_length={long_length} has no effect without {owner}.long_fraction, the share of rows from"
            " documents of at least that length; set both, or neither"
        )
