"""What the values of finished steps say: a mean loss, tokens per second, model FLOP utilisation; when to give up."""

import contextlib
import logging
import math
import time
from collections.abc import Iterator

import jax

from lcx import model as model_lib
from lcx.errors import UserError
from lcx.model import Decoder
from lcx.training import peak_flops
from lcx.training.logger import MetricsLogger

log = logging.getLogger(__name__)


class NotFiniteError(UserError):
    """The loss or the gradient of a step is infinite or no number: what follows would be worthless."""

    def __init__(self, name: str, value: float, step: int):
        super().__init__(f"{name} is {value} at step {step}")
        self.step = step


class Meter:
    """Collects the values of every step, logs every `every` steps and at the last one.

    Attributes:
      losses: of the steps since the last line; a checkpoint keeps them, so that a resumed run logs the same means.
    """

    def __init__(
        self,
        model: Decoder,
        *,
        batch_size: int,
        seq_len: int,
        every: int,
        last: int,
        losses: list[float],
    ):
        self.losses = list(losses)
        self._every, self._last = every, last
        self._tokens = batch_size * seq_len
        self._flops: float | None = None
        try:
            self._flops = self._tokens * model_lib.flops_per_token(model, seq_len)
        except UserError as error:
            log.warning("mfu is not logged: %s", error)
        self._peak = peak_flops.peak_flops()
        self._since: float | None = None  # the first step compiles: its time says nothing
        self._timed = 0

    def record(self, step: int, values: dict[str, jax.Array], metrics: MetricsLogger) -> None:
        """Waits for a step, checks it, and logs it if it is due.

        Raises:
          NotFiniteError: the loss or the gradient.
        """
        numbers = {name: float(value) for name, value in values.items()}
        for name in ("loss", "grad_norm"):
            if not math.isfinite(numbers[name]):
                raise NotFiniteError(name, numbers[name], step)
        self.losses.append(numbers["loss"])
        now = time.perf_counter()
        if self._since is None:
            self._since = now
        else:
            self._timed += 1
        if step % self._every == 0 or step == self._last:
            numbers["loss"] = sum(self.losses) / len(self.losses)
            if self._timed:
                rate = self._timed / (now - self._since)
                numbers["tokens_per_second"] = rate * self._tokens
                if self._flops is not None:
                    numbers["mfu"] = rate * self._flops / self._peak
            metrics.log(step, numbers)
            self.losses, self._since, self._timed = [], now, 0

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Time in here does not count as training."""
        start = time.perf_counter()
        yield
        if self._since is not None:
            self._since += time.perf_counter() - start
