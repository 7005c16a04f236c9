"""Nucleotide sequences in evaluations: FASTA records, reverse complements, log-likelihoods."""

import collections
import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from lcx.data import Tokenizer, check_vocabulary, special_tokens
from lcx.data.sources import Document, find_files, read_fasta
from lcx.errors import UserError
from lcx.evals.support import scoring
from lcx.evals.support.windows import window_rows
from lcx.model import Decoder

# IUPAC codes (NC-IUB 1984) and what each pairs with, in both cases.
_LETTERS, _PARTNERS = "ACGTURYKMSWBDHVN", "TGCAAYRMKSWVHDBN"
_COMPLEMENT = str.maketrans(_LETTERS + _LETTERS.lower(), _PARTNERS + _PARTNERS.lower())
_PLAIN = frozenset("ACGTacgt")
_WIDTH_STEP = 128


@contextlib.contextmanager
def naming(owner: str) -> Iterator[None]:
    """Context in which error messages name the setting `owner` instead of Dataset.source."""
    try:
        yield
    except UserError as error:
        raise UserError(str(error).replace("Dataset.source", owner)) from error


def check_files(path: str, *, owner: str) -> None:
    """Raises UserError if there is no file. `read` also checks what the files hold."""
    with naming(owner):
        find_files(path, format="fasta")


def read(path: str, *, owner: str) -> list[Document]:
    """The records of FASTA files, including empty ones, with line breaks removed.

    Args:
      path: a file, a glob or a folder; files may be compressed (.gz).
      owner: the setting that the path comes from, for messages.

    Raises:
      UserError: there is no file, it is not FASTA, or two records have the same name.
    """
    with naming(owner):
        records = [record for file in find_files(path, format="fasta") for record in read_fasta(file)]
    counts = collections.Counter(record.name for record in records)
    twice = [name for name, count in counts.items() if count > 1]
    if twice:
        raise UserError(f"{path} has {counts[twice[0]]} records named {twice[0]!r}: rename them ({owner})")
    if not records:
        raise UserError(f"{path} holds no FASTA record: change {owner}")
    return records


def read_contigs(path: str, *, owner: str) -> dict[str, str]:
    """{record name: sequence}; the name is the first word of the record's header.

    Raises:
      UserError: as in `read`, or two files have a record of the same name.
    """
    found: dict[str, str] = {}
    where: dict[str, str] = {}
    with naming(owner):
        records = [
            (file.name, record) for file in find_files(path, format="fasta") for record in read_fasta(file)
        ]
    for file, record in records:
        name = record.name.removeprefix(f"{file}:")
        if name in found:
            raise UserError(
                f"{path} has two records named {name!r}, in {where[name]} and {file}: keep one of them ({owner})"
            )
        found[name], where[name] = record.text, file
    if not found:
        raise UserError(f"{path} holds no FASTA record: change {owner}")
    return found


def reverse_complement(sequence: str) -> str:
    """The reverse complement. Letters that are not IUPAC codes are kept unchanged."""
    return sequence.translate(_COMPLEMENT)[::-1]


def ambiguous(sequence: str) -> int:
    """The number of letters other than A, C, G and T."""
    return sum(letter not in _PLAIN for letter in sequence)


def token_log_likelihoods(
    model: Decoder,
    params: Any,
    tokenizer: Tokenizer | None,
    sequences: Sequence[str],
    *,
    window: int,
    stride: int,
    tokens_per_batch: int = scoring.TOKENS_PER_BATCH,
    description: str = "scoring",
) -> list[Float[np.ndarray, " scored"]]:
    """log p in nats of every token that has context, for each sequence.

    BOS is put first if the tokenizer adds it; without BOS the first letter has no context and is not scored. A sequence
    longer than `window` tokens is scored with windows that start `stride` tokens apart, each token once, in the first
    window that contains it. Equal sequences are scored only once; sequences of similar length share batches.

    Raises:
      UserError: there is no tokenizer, or its vocabulary is larger than the model's.
    """
    if tokenizer is None:
        raise UserError(
            "the checkpoint has no tokenizer: DNA needs a byte tokenizer, save the model with one"
        )
    check_vocabulary(tokenizer, model.vocab_size)
    unique = {sequence: i for i, sequence in enumerate(dict.fromkeys(sequences))}
    start = np.array(special_tokens(tokenizer).before, np.int32)
    tokens = [np.concatenate([start, tokenizer.encode(sequence)]) for sequence in unique]
    rows = window_rows([len(t) for t in tokens], window=window, stride=stride)
    widths = np.array([_width(int(end - begin), window) for _, begin, end, _ in rows], np.int64)
    found = [np.zeros(max(len(t) - 1, 0), np.float32) for t in tokens]
    for width in np.unique(widths):
        chosen = rows[widths == width]
        ids, labels = (np.zeros((len(chosen), width), np.int32) for _ in range(2))
        for i, (sequence, begin, end, _) in enumerate(chosen):
            ids[i, : end - begin] = tokens[sequence][begin:end]
            labels[i, : end - begin - 1] = tokens[sequence][begin + 1 : end]
        nll = scoring.score(
            model,
            params,
            ids,
            labels,
            tokens_per_batch=tokens_per_batch,
            description=f"{description}, {width} wide",
        )
        for values, (sequence, begin, end, first) in zip(nll, chosen, strict=True):
            found[sequence][first - 1 : end - 1] = -values[first - 1 - begin : end - 1 - begin]
    return [found[unique[sequence]] for sequence in sequences]


def _width(length: int, window: int) -> int:
    """The padded width of a row: powers of two from 128, so that few programs are compiled for many lengths."""
    width = _WIDTH_STEP
    while width < length:
        width *= 2
    return max(min(width, window), length)
