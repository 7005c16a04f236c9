"""End-of-document markers that occur literally in a text, such as <|endoftext|>.

A file that joins documents with a marker is read as one document unless the marker is set as the separator. The model
then trains on unrelated texts as if they were one, and some tokenizers turn the marker into the special token itself.
"""

from collections.abc import Mapping

from lcx.wording import quantity

KNOWN = (
    "<|endoftext|>", "<|end_of_text|>", "<|endofdocument|>", "<|end_of_document|>", "<|eos|>", "<|EOT|>", "</s>",
    "<eos>", "<EOS>", "[EOS]", "<|im_end|>", "<|eot_id|>", "<|end|>", "<end_of_turn>", "<\N{FULLWIDTH VERTICAL LINE}"
    "end\N{LOWER ONE EIGHTH BLOCK}of\N{LOWER ONE EIGHTH BLOCK}sentence\N{FULLWIDTH VERTICAL LINE}>",
)  # fmt: skip
_SIGNS = ("<", "[EOS]")  # every known marker contains one of these


class MarkerCounter:
    """Counts the texts that contain a marker."""

    def __init__(self) -> None:
        self.counts: dict[str, int] = {}

    def add(self, text: str) -> None:
        if not any(sign in text for sign in _SIGNS):
            return
        for marker in KNOWN:
            if marker in text:
                self.counts[marker] = self.counts.get(marker, 0) + 1


def sentence(counts: Mapping[str, int], source: str) -> str:
    """The message about the markers that were found."""
    found = ", ".join(f"{marker!r} in {quantity(count, 'document')}" for marker, count in counts.items())
    return (
        f"{source} has markers of a document's end inside its text: {found}; set Dataset.separator where one separates"
        " the documents of a text file, or take it out of the text"
    )
