"""The letters of DNA and RNA, and what each pairs with."""

import re

from lcx.errors import UserError

# IUPAC codes (NC-IUB 1984) and what each pairs with, in both cases.
_LETTERS, _PARTNERS = "ACGTURYKMSWBDHVN", "TGCAAYRMKSWVHDBN"
IUPAC = frozenset(_LETTERS + _LETTERS.lower())
_COMPLEMENT = str.maketrans(_LETTERS + _LETTERS.lower(), _PARTNERS + _PARTNERS.lower())
_FOREIGN = re.compile(rf"[^\W\d_{_LETTERS}{_LETTERS.lower()}Xx]")  # X: masked


def reverse_complement(sequence: str) -> str:
    """The reverse complement. Characters that are no letters, such as gaps, are kept unchanged.

    Raises:
      UserError: it holds a letter that stands for no nucleotide, as a protein or a text does.
    """
    if foreign := _FOREIGN.search(sequence):
        raise UserError(
            f"a sequence holds {foreign[0]!r}, which is no letter of DNA or RNA and has no complement: leave out"
            " both_strands, or correct the sequence"
        )
    return sequence.translate(_COMPLEMENT)[::-1]
