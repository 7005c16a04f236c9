"""The text of an evaluation: whole documents of a data split, tokenised by the checkpoint's own tokenizer."""

import dataclasses
import hashlib
import json

import numpy as np
from jaxtyping import Bool, Int

from lcx.data import ByteTokenizer, Dataset, Mixture, Tokenizer, check_vocabulary
from lcx.data.tokenizers import identity
from lcx.errors import UserError
from lcx.evals.support import remembered
from lcx.model import Decoder
from lcx.multihost import channel
from lcx.multihost.agreement import require_same


@dataclasses.dataclass(frozen=True)
class Documents:
    """Tokenised documents.

    Attributes:
      tokens: ids of each document.
      tokenizer: by which they were tokenised.
      source: where they come from, for messages.
      masks: for each document, which tokens are scored as targets; in conversations those of the assistant.
      special: which special tokens were put before and after each document, in words.
    """

    tokens: list[Int[np.ndarray, " length"]]
    tokenizer: Tokenizer
    source: str
    masks: list[Bool[np.ndarray, " length"]]
    special: str = ""

    @property
    def num_tokens(self) -> int:
        return sum(map(len, self.tokens))

    def num_bytes(self) -> int:
        """UTF-8 bytes of the decoded text of all documents; special tokens do not count."""
        if isinstance(self.tokenizer, ByteTokenizer):
            special = [i for i in (self.tokenizer.bos_id, self.tokenizer.eos_id) if i is not None]
            return int(sum(((d < 256) & ~np.isin(d, special)).sum() for d in self.tokens))
        return sum(len(self.tokenizer.decode(document.tolist()).encode()) for document in self.tokens)

    @property
    def scored(self) -> str:
        """A phrase for the definition of a result if not every token is scored, else ""."""
        whole = all(mask.all() for mask in self.masks)
        return "" if whole else " of the tokens with a loss (in conversations what the assistant says)"

    @property
    def tokenizer_id(self) -> str:
        """Equal for tokenizers that encode alike, so that losses per token can be compared."""
        return hashlib.sha256(json.dumps(identity(self.tokenizer), sort_keys=True).encode()).hexdigest()[:16]

    @property
    def unit(self) -> str:
        return "nats per byte" if isinstance(self.tokenizer, ByteTokenizer) else "nats per token"


def read(
    dataset: Dataset | Mixture | None,
    split: str,
    *,
    tokenizer: Tokenizer | None,
    model: Decoder,
    max_tokens: int | None,
    max_length: int | None = None,
    packed: bool = False,
    owner: str,
) -> Documents:
    """The first documents of a split, with the special tokens that the dataset sets (default: as the tokenizer does).

    Args:
      dataset: the text.
      split: "eval" or "train".
      tokenizer: the checkpoint's, which replaces that of the dataset; None: the dataset's own.
      model: whose vocabulary must contain all tokens.
      max_tokens: limit on all documents together; the last one is truncated. None: no limit.
      max_length: each document is truncated to this many tokens.
      packed: whether documents will share rows; then EOS separates them if nothing else does.
      owner: the evaluation, for messages.

    Raises:
      UserError: there is no dataset, the split has no text, or the tokenizer has ids that the model does not have.
    """
    if dataset is None:
        raise UserError(f"{owner} has no text: set {owner}.dataset to a Dataset")
    if max_tokens is not None and max_tokens < 2:
        raise UserError(f"{owner}.max_tokens is {max_tokens}, expected at least 2")
    known = dataset if tokenizer is None else _with_tokenizer(dataset, tokenizer, owner)
    own = known.load_tokenizer()
    check_vocabulary(own, model.vocab_size)
    return remembered.once(
        ("documents", id(dataset), id(tokenizer), split, max_tokens, max_length, packed, owner),
        lambda: _read(known, split, own, max_tokens, max_length, packed, owner),
    )


def _read(
    dataset: Dataset | Mixture,
    split: str,
    tokenizer: Tokenizer,
    max_tokens: int | None,
    max_length: int | None,
    packed: bool,
    owner: str,
) -> Documents:
    tokens, masks, left = [], [], max_tokens
    for document, mask in dataset.documents(split, packed=packed):
        document = document[: min((n for n in (max_length, left) if n is not None), default=len(document))]
        tokens.append(document)
        masks.append(mask[: len(document)])
        if left is not None:
            left -= len(document)
            if left <= 0:
                break
    if channel.count() > 1:
        digest = hashlib.sha256(b"".join(document.tobytes() for document in tokens)).hexdigest()[:16]
        require_same(f"the text of {owner}", {_source(dataset): digest}, advice=f"copy {owner}.dataset to every host")
    place = _source(dataset) if _is_whole(dataset, split) else f"{_source(dataset)}, {split} split"
    if not any(len(document) > 1 for document in tokens):
        if _is_whole(dataset, split):
            raise UserError(f"{place} holds no text of at least 2 tokens: change Dataset.source")
        raise UserError(
            f"split {split!r} of {_source(dataset)} holds no text: set {owner}.split, or raise Dataset.eval_fraction"
        )
    if not any(mask[1:].any() for mask in masks):
        raise UserError(
            f"the first {sum(map(len, tokens))} tokens of {place} hold none with a loss:"
            f" raise {owner}.max_tokens, or set Dataset.chat_loss='all'"
        )
    return Documents(tokens, tokenizer, place, masks, dataset.describe_special_tokens(packed=packed))


def _with_tokenizer(dataset: Dataset | Mixture, tokenizer: Tokenizer, owner: str) -> Dataset | Mixture:
    if isinstance(dataset, Dataset):
        return _retokenized(dataset, tokenizer, owner)
    parts = tuple((_retokenized(part, tokenizer, owner), weight) for part, weight in dataset.parts)
    return dataclasses.replace(dataset, parts=parts)


def _retokenized(dataset: Dataset, tokenizer: Tokenizer, owner: str) -> Dataset:
    if dataset.tokenizer != "bytes" and identity(dataset.load_tokenizer()) != identity(tokenizer):
        raise UserError(
            f"{owner}: the dataset sets the tokenizer {_short(dataset.tokenizer)}, but the checkpoint has another one:"
            " remove Dataset.tokenizer, the checkpoint's is used"
        )
    return dataclasses.replace(dataset, tokenizer=tokenizer)


def _source(dataset: Dataset | Mixture) -> str:
    if isinstance(dataset, Mixture):
        return " + ".join(_source(part) for part, _ in dataset.parts)
    return dataset.source if isinstance(dataset.source, str) else ", ".join(dataset.source)


def _is_whole(dataset: Dataset | Mixture, split: str) -> bool:
    """Whether the held-out part is all of the text, as of --dataset."""
    parts = [dataset] if isinstance(dataset, Dataset) else [part for part, _ in dataset.parts]
    return split == "eval" and all(part.eval_fraction == 1 and not part.eval_documents for part in parts)


def _short(tokenizer: str | Tokenizer) -> str:
    return tokenizer if isinstance(tokenizer, str) else type(tokenizer).__name__
