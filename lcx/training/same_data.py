"""The hosts of a run read the same data: each reads its own rows, so a difference would not show."""

from typing import Any

from lcx.multihost.agreement import require_same


def check(opened: Any) -> None:
    """Raises UserError on every process if the tokens differ between hosts: other files, tokenizers or versions.

    Args:
      opened: the data, a `data.Opened`; a block of layers trains on stored activations, which have no fingerprint.
    """
    parts = getattr(opened, "parts", ())
    values = {f"{part.dataset.source} [{i}]": part.corpus.store.fingerprint for i, part in enumerate(parts)}
    require_same(
        "the data", values, advice="copy the same files and tokenizer to every host, or read them from a shared folder"
    )
