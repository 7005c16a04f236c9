"""Turns the results of finished steps into metrics: mean loss, tokens per second, model FLOP utilisation (MFU).

It also stops the run at the first non-finite loss or gradient.
"""

import collections
import concurrent.futures
import contextlib
import functools
import logging
import math
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax

from lcx import model as model_lib
from lcx import objectives
from lcx.errors import UserError
from lcx.model import Decoder
from lcx.multihost import watch
from lcx.training.goodput import Ledger, ledger_of
from lcx.training.logger import MetricsLogger
from lcx.training.peak_flops import peak_flops
from lcx.training.profiling import Profile
from lcx.training.run import trained_sizes

# Seconds of training from which its speed is logged. Python's threads may see the end of a step up to 10 ms late.
_LEAST_S = 0.1

log = logging.getLogger(__name__)


class NotFiniteError(UserError):
    """The loss or the gradient norm of a step is NaN or infinite: the weights after it are useless."""

    def __init__(self, name: str, value: float, step: int):
        super().__init__(f"{name} is {value} at step {step}")
        self.step = step


class Meter:
    """Receives the metrics of every step as it is dispatched, and logs every `every` steps and at the last step.

    The time of a step runs from the end of the previous step to its own end. A separate thread waits for that moment,
    because the host itself may already be a step ahead, or be busy with something else. The first step includes
    compilation and is not timed. A line after less than _LEAST_S seconds has no speed; the next one covers its steps.

    Attributes:
      ahead: steps that are queued on the devices behind the one that runs. One is enough to hide the host's work
        between steps; with dozens, several CPU devices of one process can deadlock.
      losses: of the steps since the last logged line. They are saved in checkpoints, so that a resumed run logs the
        same means as an uninterrupted one.
    """

    def __init__(
        self,
        model: Decoder,
        metrics: MetricsLogger,
        *,
        batch_size: int,
        seq_len: int,
        every: int,
        last: int,
        losses: list[float],
        ahead: int = 1,
        ledger: Ledger | None = None,
        profile: Profile | None = None,
        flops_per_token: Callable[[Decoder, int], float] = model_lib.flops_per_token,
    ):
        self.ahead = ahead
        self.losses = list(losses)
        self._ledger = ledger or Ledger()
        self._profile = profile
        self._metrics = metrics
        self._every, self._last = every, last
        self._tokens = batch_size * seq_len
        self._flops: float | None = None
        try:
            self._flops = self._tokens * flops_per_token(model, seq_len)
        except UserError as error:
            log.warning("mfu is not logged: %s", error)
        self._peak = peak_flops()
        self._watcher = concurrent.futures.ThreadPoolExecutor(1, "lcx-meter")
        self._watcher.submit(
            int
        ).result()  # starts its thread, which would otherwise see the first step end too late
        self._dispatched: collections.deque = (
            collections.deque()
        )  # (step, values, time it was dispatched, future of the time it was done)
        self._ended: float | None = None  # when the last step was done; later if the run was paused since
        self._since: float | None = None
        self._timed = 0

    def add(self, step: int, values: dict[str, jax.Array]) -> None:
        """Adds a step that was just dispatched, and waits for the one `ahead` steps before it.

        Args:
          step: its number.
          values: scalar metrics, still being computed.

        Raises:
          NotFiniteError: the loss or gradient norm of the previous step is not finite.
        """
        watch.dispatched(step)
        done = self._watcher.submit(_done, values["loss"])
        self._dispatched.append((step, values, time.perf_counter(), done))
        if self._profile is not None:
            self._profile.after(step, values)
        while len(self._dispatched) > self.ahead:
            self._record()

    def drain(self) -> None:
        """Waits for all steps that are still running. Raises NotFiniteError as `add` does."""
        while self._dispatched:
            self._record()
        watch.rest()

    def _record(self) -> None:
        step, values, dispatched, done = self._dispatched.popleft()
        now = done.result()
        numbers = {name: float(value) for name, value in values.items()}
        watch.finished()
        for name in ("loss", "grad_norm"):
            if not math.isfinite(numbers[name]):
                raise NotFiniteError(name, numbers[name], step)
        self.losses.append(numbers["loss"])
        self._metrics.advance(step)
        if self._ended is not None:
            self._ledger.step(self._ended, dispatched, now)
        self._ended = now
        if self._since is None:
            self._since = now
        else:
            self._timed += 1
        if step % self._every == 0 or step == self._last:
            numbers["loss"] = sum(self.losses) / len(self.losses)
            if self._timed and now - self._since >= _LEAST_S:
                rate = self._timed / (now - self._since)
                numbers["tokens_per_second"] = rate * self._tokens
                if self._peak is not None and self._flops is not None:
                    numbers["mfu"] = rate * self._flops / self._peak
                self._since, self._timed = now, 0
            self._metrics.log(step, numbers | self._ledger.line())
            self.losses = []

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Waits for the steps that are still running; time spent inside the context does not count as training."""
        self.drain()
        start = time.perf_counter()
        yield
        if self._since is not None and self._ended is not None:
            spent = time.perf_counter() - start
            self._since, self._ended = self._since + spent, self._ended + spent

    def saving(self) -> contextlib.AbstractContextManager[None]:
        """Context manager: the time spent in it is that of a save."""
        return self._ledger.saving()

    def summary(self) -> str:
        """The line about the goodput at the end of a run; what is being recorded is written."""
        if self._profile is not None:
            self._profile.close()
        return self._ledger.summary()


def meter_of(trainer: Any, run: Any, metrics: MetricsLogger, workdir: str, *, ahead: int) -> Meter:
    """The meter of a run (the settings of a `trainer.Trainer`)."""
    return Meter(
        run.model,
        metrics,
        batch_size=trainer.batch_size,
        seq_len=trainer.seq_len,
        every=trainer.log_every,
        last=trainer.last_step,
        losses=run.losses,
        ahead=ahead,
        ledger=ledger_of(workdir, run.step),
        profile=Profile(trainer.profile, workdir, run.step),
        flops_per_token=functools.partial(
            model_lib.flops_per_token,
            trained=trained_sizes(run),
            local=objectives.is_local(trainer.objective),
        ),
    )


def _done(value: jax.Array) -> float:
    value.block_until_ready()
    return time.perf_counter()
