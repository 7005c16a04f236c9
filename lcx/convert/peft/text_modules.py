"""Adapters trained on a model with encoders, read as adapters of its text model.

PEFT names modules as the class that was trained does. With encoders beside it (hf/text_part.py), the module
model.layers.0.self_attn.q_proj of a text model is model.language_model.layers.0.self_attn.q_proj, and in Llama 4 and in
classes of older versions of transformers language_model.model.layers.0.self_attn.q_proj.
"""

from collections.abc import Collection, Mapping
from typing import TypeVar

from lcx.errors import UserError

#: (the start of a name in the text model alone, that in the model with encoders), for each spelling
Spelling = tuple[tuple[str, str], ...]
_SPELLINGS: tuple[Spelling, ...] = (
    (("model.", "model.language_model."),),
    (("model.", "language_model.model."), ("lm_head", "language_model.lm_head")),
)
_T = TypeVar("_T")


def outer(name: str, spelling: Spelling) -> str:
    """The name of a module in the model that was trained."""
    for ours, theirs in spelling:
        if name.startswith(ours):
            return theirs + name.removeprefix(ours)
    return name


def inside(module: str, saved: Collection[str]) -> list[str]:
    """Those of the names in modules_to_save that select this module, or one that contains it."""
    return [name for name in saved if f".{name}." in f".{module}."]


def of_text_model(found: Mapping[str, _T], saved: Collection[str] = ()) -> tuple[dict[str, _T], Spelling]:
    """What an adapter holds, by the names of the text model alone, and the spelling that it was in.

    Args:
      saved: what modules_to_save names.

    Raises:
      UserError: the adapter was trained on a model with encoders, and changes more than its text model.
    """
    for spelling in _SPELLINGS:
        if any(name.startswith(theirs) for name in found for _, theirs in spelling):
            break
    else:
        return dict(found), ()
    inner, others = {}, []
    for name, value in found.items():
        ours, theirs = next((pair for pair in spelling if name.startswith(pair[1])), ("", ""))
        if not theirs and name != "lm_head":
            others.append(name)
        inner[ours + name.removeprefix(theirs)] = value
    if named := sorted({name for module in others for name in inside(module, saved)}):
        raise UserError(
            f"modules_to_save names {', '.join(named)}, outside of the text model, which alone lcx reads: train an "
            "adapter without it, or merge this one with PEFT and read the merged folder"
        )
    if others:
        listed = others[0] + (f" and {len(others) - 1} more" if len(others) > 1 else "")
        raise UserError(
            f"the adapter was trained on a model with encoders, and changes more than its text model, {listed}, which "
            "lcx does not have: train one whose target_modules select the language model alone, or merge it with PEFT "
            "and read the merged folder"
        )
    return inner, spelling
