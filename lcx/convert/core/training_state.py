"""A training run as one trainer stored it and another continues it: into lcx, and out of it."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from lcx.convert.core import rules
from lcx.optim import AdamW

MOMENTS = ("first", "second")


@dataclasses.dataclass(frozen=True)
class TrainingState:
    """The state of Adam, by the paths of the parameters.

    Attributes:
      step: updates done, as the schedule counts them.
      updates: updates done, as Adam's bias correction counts them: fewer where loss scaling skipped some.
      moment: (path of a parameter, one of MOMENTS) -> the whole array, float32.
      next_rate: the learning rate of the next update there; None if it is not stored.
      settings: of that run, by the names of AdamW's and Trainer's fields ("AdamW.learning_rate"), as far as stored.
    """

    step: int
    updates: int
    moment: Callable[[str, str], np.ndarray]
    settings: Mapping[str, Any]
    next_rate: float | None = None


@dataclasses.dataclass(frozen=True)
class StoredRun:
    """A run of lcx, for a format that stores the optimizer beside the model.

    Attributes:
      step, updates: as in `TrainingState`.
      steps: updates over which the schedule extends.
      optimizer: its settings.
      dtype: of the activations; None: float32.
      moment: (one of MOMENTS, path of a parameter, index) -> that part of the array, float32.
    """

    step: int
    updates: int
    steps: int
    optimizer: AdamW
    dtype: str | None
    moment: Callable[[str, str, rules.Index], np.ndarray]

    @property
    def next_rate(self) -> float:
        """The learning rate of the next update."""
        return float(self.optimizer.learning_rates(self.steps)(self.step))
