"""End-of-document markers that occur literally in a text, such as <|endoftext|>.

A file that joins documents with a marker is read as one document unless the marker is set as the separator. The model
then trains on unrelated texts as if they were one, and some tokenizers turn the marker into the special token itself.
"""

import re
from collections.abc import Mapping

import numpy as np
from jaxtyping import Int

from lcx.wording import quantity

#: <|endoftext|>, <|eot_id|>, <|im_end|>; <|return|>; </s>; <eos>, [EOD]; <end_of_turn>; that of DeepSeek, of other
#: characters.
_BAR = "[|\N{FULLWIDTH VERTICAL LINE}]"
MARKER = re.compile(
    rf"<{_BAR}(?:[a-z]{{1,8}}_)?(?:end|eo[dstm](?![a-z]))[\w\N{{LOWER ONE EIGHTH BLOCK}} -]{{0,40}}{_BAR}>"
    r"|<\|return\|>|</s>|<eo[dst]>|\[eo[dst]\]|<end_?of_?\w{1,20}>",
    re.IGNORECASE,
)
MARKER_AT_END = re.compile(rf"(?:{MARKER.pattern})\Z", re.IGNORECASE)
_MOST = 20  # different markers to count


class MarkerCounter:
    """Counts the texts that contain a marker, or ids of the tokenizer's EOS under another name.

    Args:
      eos_id: of the tokenizer; None if it has none.
    """

    def __init__(self, eos_id: int | None = None) -> None:
        self.counts: dict[str, int] = {}
        self._eos_id = eos_id

    def add(self, text: str, ids: Int[np.ndarray, "tokens"]) -> None:
        """Counts the markers of a text with these ids, without what is put around each document."""
        found = sorted(set(MARKER.findall(text))) if "<" in text or "[" in text else []
        if not found and self._eos_id is not None and self._eos_id in ids:
            found = [f"EOS token {self._eos_id}"]
        for marker in found:
            if marker in self.counts or len(self.counts) < _MOST:
                self.counts[marker] = self.counts.get(marker, 0) + 1


def sentence(counts: Mapping[str, int], source: str) -> str:
    """The message about the markers that were found."""
    found = ", ".join(f"{marker!r} in {quantity(count, 'document')}" for marker, count in counts.items())
    return (
        f"{source} has markers of a document's end inside its text: {found}; set Dataset.separator where one separates"
        " the documents of a text file, or take it out of the text"
    )
