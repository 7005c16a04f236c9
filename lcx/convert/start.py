"""Loads the initial model of a training run, from any format."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from lcx import extend, hub
from lcx.convert import formats
from lcx.convert.core.format import Format
from lcx.convert.core.model_source import fp8_scaling
from lcx.convert.peft import start as peft_start
from lcx.errors import naming
from lcx.lora import LoRA
from lcx.model import Decoder

SETTINGS = {  # of a run, for what `lcx.load` and `extend.extend_model` call them
    "rope_scaling": "Trainer.rope_scaling",
    "context_length": "Trainer.context_length",
    "setting adapter": "setting Trainer.adapter",
    "the path of the checkpoint": "Trainer.init_from",
    "the path of the adapter": "Trainer.adapter",
}


@dataclasses.dataclass(frozen=True)
class Start:
    """A pretrained model.

    Attributes:
      model: a Decoder (or some of its layers) with its context extended, computing in float32.
      params: in the stored dtypes.
      carried: settings of its config.json that the Decoder does not hold (ids of special tokens).
      fp8_scaling: histories of FP8 scales that the checkpoint holds (model_source.fp8_scaling).
      lora, pairs: with an adapter, the LoRA settings and the `lora` collection to continue training from. Without one,
        the settings that were passed in, and None.
    """

    model: Any
    params: dict[str, Any]
    carried: dict[str, Any]
    lora: LoRA | None = None
    pairs: dict[str, Any] | None = None
    fp8_scaling: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)


@naming(SETTINGS)
def start(
    path: str,
    *,
    mesh: jax.sharding.Mesh,
    rope_scaling: Mapping[str, Any] | None = None,
    context_length: int | None = None,
    adapter: str | None = None,
    lora: LoRA | None = None,
    format: str | Format | None = None,
) -> Start:
    """Reads the model that training starts from. The arguments are those of `lcx.load`, plus the run's LoRA settings.

    Raises:
      UserError: as in `lcx.load`; an adapter that cannot be trained further, or that does not match `lora`.
    """
    path = hub.local(path)
    reader = formats.reader(path, format, where="Trainer.init_format")

    def change(model: Decoder) -> Decoder:
        return extend.extend_model(model, rope_scaling, context_length)

    if adapter is None:
        model, params = reader.load(path, dtype=None, mesh=mesh, change=change)
        source = reader.open(path)  # of the step that `load` has read
        carried, histories = dict(source.carried), fp8_scaling(source)
        return Start(model.clone(dtype="float32", parent=None), params, carried, lora, fp8_scaling=histories)
    scaled = rope_scaling is not None or context_length is not None

    def with_adapter() -> Start:
        source = reader.open(path)
        carried = dict(source.carried)
        source.model = change(source.model)
        model, params, pairs, settings = peft_start.start(
            source, adapter, mesh=mesh, lora=lora, scaled=scaled
        )
        return Start(model, params, carried, settings, pairs, fp8_scaling(source))

    return reader.read(path, with_adapter)


def model_at(path: str, format: str | Format | None = None) -> Decoder:
    """The model at `path`, without its parameters. Raises UserError when it cannot be read."""
    path = hub.local(path)
    return formats.reader(path, format, where="Trainer.init_format").open(path).model
