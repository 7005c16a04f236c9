"""The protocol for tokenizers, which those in `lcx.data.tokenizers` and users' own tokenizers implement."""

from collections.abc import Iterable
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Int


@runtime_checkable
class Tokenizer(Protocol):
    """What lcx needs from a tokenizer; bos_id and eos_id are None if there is no such token."""

    @property
    def vocab_size(self) -> int: ...

    @property
    def bos_id(self) -> int | None: ...

    @property
    def eos_id(self) -> int | None: ...

    def encode(self, text: str, *, add_special_tokens: bool = False) -> Int[np.ndarray, "tokens"]:
        """The ids of `text` as int32 [tokens]; optionally with the special tokens that the tokenizer adds."""

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`, ignoring special ids and ids outside the vocabulary."""

    def to_json(self) -> dict[str, Any]:
        """A JSON object that identifies the tokenizer; see `identity` and `tokenizer_from_json`."""
