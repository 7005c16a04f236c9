"""Which special tokens are put before and after a text, for data, evaluations and generation.

By default the tokenizer decides (its post-processor, add_bos_token, add_eos_token); a tokenizer that has a BOS token
need not add it. Settings can override the tokenizer.
"""

import dataclasses

from lcx.data.tokenizer_protocol import Tokenizer
from lcx.errors import UserError


@dataclasses.dataclass(frozen=True)
class SpecialTokens:
    """Ids before and after the ids of a text.

    `separator` is true if `after` was added only to separate documents, not by the tokenizer or a setting.
    """

    before: tuple[int, ...] = ()
    after: tuple[int, ...] = ()
    separator: bool = False

    @property
    def ids(self) -> tuple[int, ...]:
        return self.before + self.after


def special_tokens(
    tokenizer: Tokenizer, *, add_bos: bool | None = None, add_eos: bool | None = None
) -> SpecialTokens:
    """The ids that are put before and after a text.

    Args:
      add_bos: None leaves it to the tokenizer; True puts BOS before the text, regardless of the tokenizer; False
        puts nothing there.
      add_eos: the same for EOS after the text.

    Raises:
      UserError: a setting requests a token that the tokenizer does not have.
    """
    own = _own(tokenizer)
    before, after = own.before, own.after
    if add_bos is not None:
        bos = _asked("bos", tokenizer.bos_id) if add_bos else None
        before = () if bos is None else before if bos in before else (bos, *before)
    if add_eos is not None:
        eos = _asked("eos", tokenizer.eos_id) if add_eos else None
        after = () if eos is None else after if eos in after else (*after, eos)
    return SpecialTokens(before, after)


def separating_tokens(
    tokenizer: Tokenizer,
    *,
    add_bos: bool | None = None,
    add_eos: bool | None = None,
    document_mask: bool = True,
) -> SpecialTokens:
    """`special_tokens` for documents that share a row: adds EOS after each if the tokenizer adds nothing itself.

    A setting that removes what the tokenizer adds (add_bos=False) is respected; then only the document mask separates
    the documents.

    Raises:
      UserError: nothing separates the documents, neither a token nor the document mask.
    """
    chosen = special_tokens(tokenizer, add_bos=add_bos, add_eos=add_eos)
    if chosen.ids:
        return chosen
    if not _own(tokenizer).ids and add_eos is None and tokenizer.eos_id is not None:
        return SpecialTokens(after=(tokenizer.eos_id,), separator=True)
    if not document_mask:
        found = "Dataset.document_mask=False joins the documents of a row and no token separates them"
        if tokenizer.eos_id is None and tokenizer.bos_id is None:
            raise UserError(f"{found} (the tokenizer has neither BOS nor EOS): set document_mask=True")
        which = "add_bos" if tokenizer.eos_id is None else "add_eos"
        raise UserError(f"{found}: set Dataset.{which}=True, or document_mask=True")
    return chosen


def described(tokenizer: Tokenizer, chosen: SpecialTokens, *, of: str = "document") -> str:
    """One line for the start of a run, e.g. "BOS before each document: no; EOS after: yes"."""
    line = (
        f"BOS before each {of}: {_yes_no(tokenizer.bos_id, chosen.before)}; EOS after:"
        f" {_yes_no(tokenizer.eos_id, chosen.after)}"
    )
    others = [i for i in chosen.ids if i not in (tokenizer.bos_id, tokenizer.eos_id)]
    return line + (f"; other special tokens: {', '.join(map(str, others))}" if others else "")


def _yes_no(special: int | None, ids: tuple[int, ...]) -> str:
    return "yes" if special is not None and special in ids else "no"


def _own(tokenizer: Tokenizer) -> SpecialTokens:
    own = getattr(tokenizer, "special", None)
    if own is not None:
        return own
    return SpecialTokens(before=() if tokenizer.bos_id is None else (tokenizer.bos_id,))


def _asked(name: str, value: int | None) -> int:
    if value is None:
        raise UserError(
            f"add_{name}=True but the tokenizer has no {name.upper()} token: remove add_{name}, or set it to False"
        )
    return value
