"""Which modules an adapter's settings name, so that PEFT puts its pairs where the adapter has them.

Pairs of experts are written as those of the modules that an expert has in transformers 4, "experts.3.gate_proj".
transformers 5 keeps the experts of a layer in one parameter, and PEFT then fuses the pairs, if the settings name the
experts' modules by the last part of their names.
"""

import logging
from collections.abc import Collection, Iterable
from typing import Any

from lcx.errors import UserError
from lcx.lora import all_targets
from lcx.model import Decoder

log = logging.getLogger(__name__)

def settings(pairs: Collection[str], linear: Iterable[str], experts: Collection[str]) -> dict[str, Any]:
    """target_modules and, if needed, exclude_modules of adapter_config.json.

    Args:
      pairs: the modules with a pair.
      linear: all linear modules of the model.
      experts: those that are an expert's.
    """
    last = {_last(name) for name in pairs}
    others = {name for name in linear if _last(name) in last} - set(pairs)
    of_experts = {_last(name) for name in pairs if name in experts}
    if beside := sorted({name for name in pairs if name not in experts and _last(name) in of_experts}):
        log.warning(
            "%s has a pair, and so have experts' modules of the same name: lcx and PEFT on transformers 4 read both, "
            "but PEFT 0.21 on transformers 5 gives other logits",
            beside[0],
        )
    if not others:
        return {"target_modules": sorted(last)}
    excluded = {_last(name, 2) for name in others}
    if of_experts and not others & set(experts) and not any(_last(name, 2) in excluded for name in pairs):
        return {"target_modules": sorted(last), "exclude_modules": sorted(excluded)}
    return {"target_modules": list(pairs)}


def _last(name: str, parts: int = 1) -> str:
    return ".".join(name.split(".")[-parts:])


def check_places(model: Decoder, lora_paths: Iterable[str], places: Collection[str]) -> None:
    """Raises UserError if the family keeps its experts in tensors for which adapters have no modules (gpt-oss)."""
    lost = {target.path for target in all_targets(model) if len(target.stack) == 2} - set(places)
    if found := sorted(lost & set(lora_paths)):
        raise UserError(
            f"{found[0]} has pairs of experts, which model_type {model.model_type!r} keeps in one tensor, and here an "
            "adapter has a place for pairs of modules only: write the merged model (--dst_format=hf), or set "
            "LoRA.targets to '/mixer/'"
        )
