"""What a training run holds, and how it is laid out before there are arrays."""

import dataclasses
from typing import Any

import optax

from lcx import model as model_lib
from lcx.lora import LoRA
from lcx.model import Decoder
from lcx.optim import AdamW
from lcx.training import step as train_step
from lcx.training.step import State


@dataclasses.dataclass
class Run:
    """What a run holds.

    Attributes:
      trains: tree of bool, which of the weights move.
      abstract: shapes and shardings of the state.
      lora: the settings of its pairs, if it trains pairs.
      state: see train_step. Empty until it is restored or started.
      step: updates done.
      data: position in the data; None at a start.
      losses: of the steps that are not yet in a line of metrics.jsonl.
      before: the settings of the run that it goes on with, see resume_check.changeable.
      carried: settings that came with a pretrained model, for its export.
    """

    model: Decoder
    optimizer: optax.GradientTransformation
    trains: Any
    abstract: State
    lora: LoRA | None = None
    state: State = dataclasses.field(default_factory=dict)
    step: int = 0
    data: dict[str, Any] | None = None
    losses: list[float] = dataclasses.field(default_factory=list)
    before: dict[str, Any] = dataclasses.field(default_factory=dict)
    carried: dict[str, Any] = dataclasses.field(default_factory=dict)


def prepared(
    optimizer: AdamW, steps: int, model: Decoder, mesh, lora: LoRA | None, stored: Any = None
) -> Run:
    """Everything but the arrays.

    Args:
      steps: of the whole run, which the schedule spans.
      stored: parameters, or their shapes, in the dtypes of what does not train.
    """
    weights = {"params": model_lib.abstract_params(model, mesh=mesh)}
    if lora is not None:
        weights["lora"] = lora.abstract(model, mesh=mesh)
    trains = optimizer.trains(weights, None if lora is None else lora.beside)
    if stored is not None:
        weights["params"] = train_step.kept(weights["params"], trains["params"], stored)
    built = optimizer.build(train_step.moving(weights, trains), steps)
    abstract = train_step.abstract_state(weights, built, mesh, trains)
    return Run(model, built, trains, abstract, lora)
