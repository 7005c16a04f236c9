"""A window of steps recorded by JAX's profiler, to be looked at with xprof or TensorBoard's profile page."""

from __future__ import annotations

import logging
import os
from typing import Any

import jax

from lcx.errors import UserError, first_line

log = logging.getLogger(__name__)


def check(window: tuple[int, int] | None, last_step: int) -> None:
    """Raises UserError unless the window is None or (first step, last step) of a run that ends after `last_step`."""
    if window is None:
        return
    if len(window) != 2 or not 1 <= window[0] <= window[1]:
        raise UserError(
            f"Trainer.profile is {window!r}, expected the first and the last step to record, as (20, 22)"
        )
    if window[0] > last_step:
        raise UserError(
            f"Trainer.profile is {window!r}, expected steps of the run, which ends after {last_step}: lower it, or set "
            "it to None"
        )


class Profile:
    """Records the steps first..last of this process into WORKDIR/profile. A failure is one warning.

    The first step of a process compiles: a window that includes it shows little else.

    Args:
      window: (first step, last step); None records nothing.
      workdir: where the trace is written, in the layout of TensorBoard: profile/plugins/profile/DATE/HOST.xplane.pb.
      step: updates done before.
    """

    def __init__(self, window: tuple[int, int] | None, workdir: str, step: int):
        self._window, self._folder = window, os.path.join(workdir, "profile")
        self._running = False
        if window is not None and window[0] <= step < window[1]:
            self._window = (step + 1, window[1])  # the run was resumed within the window
        self.after(step)

    def after(self, step: int, values: Any = None) -> None:
        """To be called once a step is dispatched; `values` are its results, for which the end of the window waits."""
        if self._window is None:
            return
        if self._running and step >= self._window[1]:
            jax.block_until_ready(values)
            self.close()
            self._window = None
        elif not self._running and step + 1 == self._window[0]:
            jax.block_until_ready(values)  # the steps before stay out of the trace
            self._try(lambda: jax.profiler.start_trace(self._folder))
            self._running = self._window is not None

    def close(self) -> None:
        """Writes the trace, if one is being recorded."""
        if self._running:
            self._running = False
            self._try(jax.profiler.stop_trace)
            log.warning(
                "the trace is in %s: look at it with xprof, or TensorBoard with its profile plugin",
                self._folder,
            )

    def _try(self, work: Any) -> None:
        try:
            work()
        except Exception as error:  # a second profiler in this process, a full disk
            self._window = None
            log.warning("the profiler failed (%s); the run goes on without it", first_line(error))
