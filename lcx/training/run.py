"""The contents of a training run; everything but the arrays can be prepared before any memory is allocated."""

import dataclasses
import types
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
import optax

from lcx import model as model_lib
from lcx.lora import LoRA
from lcx.model import Decoder
from lcx.optim import AdamW
from lcx.parameters import leaf_paths
from lcx.training import fp8_scaling, row_state
from lcx.training import step as train_step
from lcx.training.step import State


@dataclasses.dataclass
class Run:
    """A training run: what is fixed, and how far it has got.

    Attributes:
      model: the architecture.
      optimizer: the optax transformation over the weights that train.
      trains: tree of bool over the weights: True for those that are trained.
      abstract: shapes, dtypes and shardings of the state.
      lora: the LoRA settings; None if the run trains the weights themselves.
      state: the arrays, see training.step. Empty until restored or initialised.
      step: number of updates done.
      data: position in the data; None for a new run.
      losses: of the steps that are not yet part of a line in metrics.jsonl.
      before: the settings of the run being resumed, see resume_check.changeable.
      carried: settings of the pretrained model that lcx does not use itself but writes again on export.
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


def trained_sizes(run: Run) -> dict[str, int]:
    """{path: number of values} of the weights that train, low-rank ones included."""
    found = {}
    for name, trains in run.trains.items():
        leaves = jax.tree.leaves(run.abstract[name]), jax.tree.leaves(trains)
        found |= {
            path: leaf.size
            for path, leaf, yes in zip(leaf_paths(run.abstract[name]), *leaves, strict=True)
            if yes
        }
    return found


OPTIONAL_ITEMS = (fp8_scaling.COLLECTION,)  # of a checkpoint: an earlier version did not write them


def with_state(run: Run, state: State, fp8: Mapping[str, np.ndarray] = types.MappingProxyType({})) -> Run:
    """The run with its arrays; with a history of FP8 scales and a state of rows if it needs them and has none.

    Args:
      fp8: what a checkpoint holds of that history; see fp8_scaling.begun.
    """
    state = fp8_scaling.begun(state, run.abstract, fp8)
    return dataclasses.replace(run, state=row_state.begun(state, run.abstract, run.model))


def prepared(
    optimizer: AdamW,
    steps: int,
    model: Decoder,
    mesh,
    lora: LoRA | None,
    stored: Any = None,
    *,
    stateful_rows: int = 0,
) -> Run:
    """A run without its arrays.

    Args:
      optimizer: its settings.
      steps: updates of the whole run, over which the schedule extends.
      model: the architecture.
      mesh: where the arrays will be placed.
      lora: LoRA settings, or None to train the weights themselves.
      stored: tree of the parameters, or of their shapes. Parameters that do not train keep its dtypes.
      stateful_rows: rows of a batch that continue those of the batch before; 0: rows do not.
    """
    weights = {"params": model_lib.abstract_params(model, mesh=mesh)}
    if lora is not None:
        weights["lora"] = lora.abstract(model, mesh=mesh)
    trains = optimizer.trains(weights, None if lora is None else lora.beside)
    if stored is not None:
        weights["params"] = train_step.kept(weights["params"], trains["params"], stored)
    built = optimizer.build(train_step.moving(weights, trains), steps)
    abstract = train_step.abstract_state(weights, built, mesh, trains) | fp8_scaling.abstract(model, mesh)
    if stateful_rows:
        abstract |= row_state.abstract(model, stateful_rows, mesh)
    return Run(model, built, trains, abstract, lora)
