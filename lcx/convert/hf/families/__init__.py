"""The table of Hugging Face families: a file each, found by the model_type of config.json."""

from lcx.convert.core.rules import Rule
from lcx.convert.hf.families.llama import LLAMA
from lcx.convert.hf.families.mistral import MISTRAL
from lcx.convert.hf.families.phi3 import PHI3
from lcx.convert.hf.families.qwen2 import QWEN2
from lcx.convert.hf.families.qwen3 import QWEN3
from lcx.convert.hf.family import Family
from lcx.model import Decoder

FAMILIES: dict[str, Family] = {family.model_type: family for family in (LLAMA, MISTRAL, QWEN2, QWEN3, PHI3)}


def find(model_type: object, own: Family | None = None) -> Family | None:
    """The family of a model_type, one of the user's own before those of the table; None if there is none."""
    if own is not None and own.model_type == model_type:
        return own
    return FAMILIES.get(model_type) if isinstance(model_type, str) else None


def rules(model: Decoder) -> list[Rule]:
    """Which tensors are which parameters of a model whose model_type is in the table."""
    return FAMILIES[model.model_type].rules(model)
