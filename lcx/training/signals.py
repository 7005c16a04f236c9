"""How a run is asked to stop: SIGTERM (a preempted machine, a scheduler) and Ctrl-C become a flag that the loop reads.

With several processes JAX's own preemption notice is used instead: it reaches every process at the same step, and a
Python handler set after jax.distributed.initialize would hide it.
"""

import os
import signal
import sys
import threading
from types import FrameType

import jax


class StopRequest:
    """Context manager; `requested(step)` is True once the run should save and end. A second signal ends it at once."""

    def __init__(self):
        self._flag = threading.Event()
        self._previous: dict[int, object] = {}

    def __enter__(self) -> "StopRequest":
        if jax.process_count() == 1 and threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._flag.is_set():
            os._exit(128 + number)
        self._flag.set()
        name = signal.Signals(number).name
        print(
            f"\n{name}: saving a checkpoint, then stopping; send it again to stop now",
            file=sys.stderr,
            flush=True,
        )

    def requested(self, step: int) -> bool:
        if jax.process_count() > 1:
            from jax.experimental import multihost_utils

            return multihost_utils.reached_preemption_sync_point(step)
        return self._flag.is_set()
