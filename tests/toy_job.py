"""What the configuration tests configure: plain Python, no jax."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Literal

from lcx.errors import UserError


@dataclasses.dataclass(frozen=True)
class Optimizer:
    learning_rate: float = 0.1
    betas: tuple[float, float] = (0.9, 0.95)


@dataclasses.dataclass(frozen=True)
class Job:
    name: str
    steps: int = 10
    optimizer: Optimizer | None = None
    sizes: tuple[int, ...] = ()
    labels: Sequence[str] = ()
    activation: Callable[[float], float] | None = None
    mode: Literal["fast", "slow"] = "fast"
    verbose: bool = False
    stages: tuple[Optimizer, ...] = ()
    extra: NoSuchType = None  # an annotation that cannot be resolved hides no other

    def __post_init__(self):
        if self.steps < 0:
            raise UserError(f"steps is {self.steps}, expected at least 0: change steps")


def power(x: float, exponent: int = 2) -> float:
    return x**exponent


def make_optimizer(scale: float = 1.0) -> Optimizer:
    return Optimizer(learning_rate=0.1 * scale)


def train(*, workdir: str, job: Job, seed: int = 0, config_text: str = "", operative_config=None):
    """Records what it was called with."""
    CALLS.append({"workdir": workdir, "job": job, "seed": seed})
    TEXTS.append((config_text, operative_config() if operative_config else ""))


CALLS: list[dict] = []
TEXTS: list[tuple[str, str]] = []


def fail(*, kind: str = "nothing", status: int = 0) -> int:
    if kind == "user":
        raise UserError("window is 3, expected a power of two: change window")
    if kind == "os":
        raise FileNotFoundError(2, "No such file or directory", "some/file")
    if kind == "interrupt":
        raise KeyboardInterrupt
    if kind == "bug":
        raise ZeroDivisionError("a bug")
    if kind == "pipe":
        while True:
            print("text " * 1000)
    return status
