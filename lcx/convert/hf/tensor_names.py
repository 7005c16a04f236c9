"""Removes from tensor names the prefixes that wrappers add (DDP, torch.compile, FSDP, Lightning)."""

import dataclasses
import logging
import re
from collections.abc import Iterable, Mapping

import numpy as np

from lcx.convert.files.tensor_io import TensorInfo, TensorSource
from lcx.convert.hf.family import Family
from lcx.errors import UserError
from lcx.rope_fields import shown

log = logging.getLogger(__name__)

#: Name components that wrappers insert between a module and its parent, at any depth.
_WRAPPERS = ("module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_forward_module")
_PEFT = re.compile(r"\.(lora_[AB]|lora_embedding_[AB]|base_layer|lora_magnitude_vector)\b")


@dataclasses.dataclass(frozen=True)
class Renamed:
    """A checkpoint with renamed tensors (a `TensorSource`).

    Attributes:
      source: the checkpoint that holds the tensors.
      names: new name -> name in the source.
    """

    source: TensorSource
    names: Mapping[str, str]

    @property
    def tensors(self) -> dict[str, TensorInfo]:
        return {name: self.source.tensors[stored] for name, stored in self.names.items()}

    @property
    def shared_bytes(self) -> int:
        return self.source.shared_bytes

    def read(self, name: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        return self.source.read(self.names[name], start, stop)


def unwrapped(source: TensorSource, where: str, family: Family) -> TensorSource:
    """The tensors of a model under the names of its family; logs how many it renamed.

    Raises:
      UserError: two tensors would get the same name, or the checkpoint has unmerged low-rank pairs.
    """
    pairs = [name for name in source.tensors if _PEFT.search(name)]
    if pairs:
        raise UserError(
            f"{len(pairs)} tensors belong to an adapter that is not merged ({shown(pairs[0])}, ...): save the model "
            "again after merge_and_unload() of peft, or pass the base model and the adapter apart"
        )
    inner = {name: without_wrappers(name) for name in source.tensors}
    removed, added = _prefixes(inner.values(), family)
    names: dict[str, str] = {}
    head = f"{family.head.rpartition('.')[0]}."
    for stored, name in inner.items():
        name = name.removeprefix(removed)
        name = name if name.startswith(head) else added + name
        if name in names:
            raise UserError(
                f"the tensors {shown(names[name])} and {shown(stored)} are both {shown(name)} without the prefixes of "
                "wrappers: remove one of them"
            )
        names[name] = stored
    _say(names, removed, added, where)
    return Renamed(source, names) if any(name != stored for name, stored in names.items()) else source


def without(source: TensorSource, unread: Mapping[str, str], where: str) -> TensorSource:
    """The tensors but those whose names match a regular expression of `unread`; logs how many, and what they are."""
    left = dict.fromkeys(source.tensors)
    for pattern, what in unread.items():
        found = [name for name in left if re.fullmatch(pattern, name)]
        if found:
            log.warning("%s: %d tensors are not read: %s (%s, ...)", where, len(found), what, shown(found[0]))
        left = {name: None for name in left if name not in set(found)}
    return Renamed(source, {name: name for name in left}) if len(left) < len(source.tensors) else source


def without_wrappers(name: str) -> str:
    """The name of a tensor without the components that wrappers insert."""
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def _prefixes(names: Iterable[str], family: Family) -> tuple[str, str]:
    """(prefix to remove from the names, prefix to add), so that the layers are below the family's `body`."""
    anchors = [name for name in names if name == family.anchor or name.endswith(f".{family.anchor}")]
    if len(anchors) != 1:
        return "", ""
    before = anchors[0].removesuffix(family.anchor)
    if not before:
        return "", family.body  # saved from the base model, without the head
    return (before.removesuffix(family.body), "") if before.endswith(family.body) else ("", "")


def _say(names: Mapping[str, str], removed: str, added: str, where: str) -> None:
    changed = [stored for name, stored in names.items() if name != stored]
    parts = [part for part in _WRAPPERS if any(part in stored.split(".") for stored in changed)]
    what = [f"removed {prefix}" for prefix in (*(f"{part}." for part in parts), removed) if prefix]
    what += [f"added {added}"] if added else []
    if changed:
        log.warning(
            "%s: a wrapper renamed %d of %d tensors: %s", where, len(changed), len(names), ", ".join(what)
        )
