"""What another trainer stored beside its weights, so that a run can continue from there."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

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
