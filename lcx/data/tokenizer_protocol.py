"""What the library needs of a tokenizer: the protocol that `lcx.data.tokenizers` and users' own ones follow."""

from collections.abc import Iterable
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Int


@runtime_checkable
class Tokenizer(Protocol):
    """What the library needs of a tokenizer; bos_id and eos_id are None where there is none."""

    @property
    def vocab_size(self) -> int: ...

    @property
    def bos_id(self) -> int | None: ...

    @property
    def eos_id(self) -> int | None: ...

    def encode(self, text: str, *, add_special_tokens: bool = False) -> Int[np.ndarray, "tokens"]:
        """The ids of `text` as int32; alone, or with what the tokenizer itself puts before and after a text."""

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`; special ids and ids outside the vocabulary give nothing."""

    def to_json(self) -> dict[str, Any]:
        """A JSON object that identifies the tokenizer; see `identity` and `tokenizer_from_json`."""
