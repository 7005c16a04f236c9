"""Continues training from a PEFT adapter: low-rank pairs stay pairs, parameters trained in full replace the base's."""

import collections
import os
import re
from typing import Any

import jax
from flax.traverse_util import flatten_dict

from lcx import hub
from lcx.convert.core import model_source
from lcx.convert.core.model_source import ModelSource
from lcx.convert.peft import adapter as peft
from lcx.convert.peft import base as adapter_base
from lcx.convert.peft import files as peft_files
from lcx.convert.peft import merged
from lcx.errors import UserError
from lcx.lora import LoRA
from lcx.model import Decoder


def start(
    base: ModelSource,
    adapter: str | os.PathLike,
    *,
    mesh: jax.sharding.Mesh,
    lora: LoRA | None,
    scaled: bool,
) -> tuple[Decoder, dict[str, Any], dict[str, Any], LoRA]:
    """Reads a base model and its adapter without merging the pairs.

    Args:
      base: the model, with its context already extended.
      lora: the run's settings, which must agree with the adapter; None uses those of the adapter.
      scaled: whether the user chose the scaling of the model.

    Returns:
      (model, params, lora, settings): the model, computing in float32; its parameters, in which those that the adapter
      replaces are float32; the `lora` collection on the mesh; its LoRA settings. Smaller ranks are padded to the
      largest with zeros, which training leaves at zero.

    Raises:
      UserError: the adapter does not fit the base, can be merged but not trained further, or has other pairs than
        `lora` describes.
    """
    adapter = hub.local(adapter, kind="adapter")
    source = merged.AdaptedSource(base, adapter, pairs=False)
    adapter_base.check(adapter, source.model, scaled=scaled)
    _check_trainable(source.adapter)
    pairs, model = source.adapter.pairs, source.model
    if not pairs:
        raise UserError(f"{adapter} holds no pairs to train: merge it with python -m lcx.convert --adapter")
    rank = max(len(pair.A) for pair in pairs.values())
    collection = peft.collection(pairs, model, rank=rank)
    scale, _ = collections.Counter(pair.scale * len(pair.A) for pair in pairs.values()).most_common(1)[0]
    found = LoRA(
        rank=rank,
        alpha=peft.number(scale),
        targets=_any_of(sorted({path.rpartition("/")[0] for path in flatten_dict(collection, sep="/")})),
        beside=_any_of([f"params/{leaf}" for leaf in source.changed]) if source.changed else None,
    )
    settings = _agreed(lora, found, model)
    abstract = settings.abstract(model, mesh=mesh)
    placed = jax.tree.map(lambda x, like: jax.device_put(x, like.sharding), collection, abstract)
    params = model_source.to_devices(source, dtype=None, mesh=mesh)
    return model.clone(dtype="float32", parent=None), params, placed, settings


def _agreed(wanted: LoRA | None, found: LoRA, model: Decoder) -> LoRA:
    """The run's settings: those of the adapter, plus the parameters that `wanted.beside` trains in full.

    Raises:
      UserError: Trainer.lora describes other pairs than the adapter has.
    """
    if wanted is None:
        return found
    advice = "training continues with the adapter's own: set it to that, or set Trainer.lora to None"
    for name in ("rank", "alpha"):
        if getattr(wanted, name) != getattr(found, name):
            raise UserError(
                f"LoRA.{name} is {getattr(wanted, name)!r}, the adapter's {getattr(found, name)!r}; {advice}"
            )
    ours, theirs = (set(settings.paths(model)) for settings in (wanted, found))
    if ours != theirs:
        other = sorted(ours ^ theirs)[0]
        state = "no pair in the adapter" if other in ours else "a pair in the adapter, and is no target"
        raise UserError(f"LoRA.targets is {wanted.targets!r}, and {other} has {state}; {advice}")
    both = [pattern for pattern in (found.beside, wanted.beside) if pattern is not None]
    beside = f"(?:{')|(?:'.join(both)})" if len(both) == 2 else next(iter(both), None)
    return LoRA(found.rank, found.alpha, found.targets, beside)


def _check_trainable(adapter: peft_files.Adapter) -> None:
    for name, changes in adapter.changes.items():
        pair = next((c for c in changes if isinstance(c, peft_files.LowRank)), None)
        what = "only some trained rows" if any(isinstance(c, peft_files.Rows) for c in changes) else ""
        if pair is not None and pair.magnitude is not None:
            what = "DoRA"
        elif pair is not None and name in (peft_files.EMBEDDING_WEIGHT, peft_files.HEAD_WEIGHT):
            what = "a pair"
        if what:
            raise UserError(
                f"{adapter.folder}: {name} has {what}, which cannot be trained here: merge the adapter first "
                "(python -m lcx.convert --adapter), and start from that"
            )


def _any_of(paths: list[str]) -> str:
    return f"^(?:{'|'.join(re.escape(path) for path in sorted(paths))})$"
