"""Documents to batches: sources -> tokenizers -> store -> corpus (splits) -> packing -> batches.

A configuration builds a `Dataset` or a `Mixture`; the other names can also be used on their own.
"""

from lcx.data.batches import BatchIterator, Opened
from lcx.data.checks import Issue, Report, check_documents, is_truncated, repetition
from lcx.data.dataset import Dataset, Mixture
from lcx.data.mixing import BatchSpec
from lcx.data.packing import check_batch
from lcx.data.sources import find_files, read_documents
from lcx.data.special import SpecialTokens, separating_tokens, special_tokens
from lcx.data.store import TokenStore, open_store
from lcx.data.tokenizers import (
    ByteTokenizer,
    Tokenizer,
    check_vocabulary,
    load_tokenizer,
    save_tokenizer,
    tokenizer_from_json,
)

__all__ = [
    "BatchIterator",
    "BatchSpec",
    "ByteTokenizer",
    "Dataset",
    "Issue",
    "Mixture",
    "Opened",
    "Report",
    "SpecialTokens",
    "TokenStore",
    "Tokenizer",
    "check_batch",
    "check_documents",
    "check_vocabulary",
    "find_files",
    "is_truncated",
    "load_tokenizer",
    "open_store",
    "read_documents",
    "repetition",
    "save_tokenizer",
    "separating_tokens",
    "special_tokens",
    "tokenizer_from_json",
]
