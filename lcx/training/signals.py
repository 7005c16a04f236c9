"""Turns SIGTERM (preemption, a scheduler) and Ctrl-C into a flag that the training loop checks between steps.

With several processes JAX's own preemption notice is used instead. It makes every process stop at the same step, and
a Python signal handler installed after jax.distributed.initialize would override it.
"""

import os
import signal
import sys
import threading
from types import FrameType

import jax


class StopRequest:
    """Context manager. `requested(step)` is True once the run should save a checkpoint and end.

    A second signal ends the process immediately.

    Attributes:
      unsaved: whether there is progress that would be lost without a checkpoint. While it is False, the first signal
        ends the process immediately, even while the main thread compiles and cannot run a Python signal handler.
    """

    def __init__(self):
        self.unsaved = True
        self._flag = threading.Event()
        self._previous: dict[int, object] = {}
        self._pipe: tuple[int, int] | None = None

    def __enter__(self) -> "StopRequest":
        if jax.process_count() == 1 and threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._previous[number] = signal.signal(number, self._handle)
            self._pipe = os.pipe()
            os.set_blocking(self._pipe[1], False)
            signal.set_wakeup_fd(self._pipe[1], warn_on_full_buffer=False)
            threading.Thread(target=self._watch, args=(self._pipe[0],), daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        if self._pipe is not None:
            signal.set_wakeup_fd(-1)
            os.close(self._pipe[1])  # ends the thread, which closes the other end
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _watch(self, pipe: int) -> None:
        """Runs in a thread and receives the number of each signal immediately through the wakeup pipe.

        Python runs its own signal handlers only in the main thread, which does not get to them during a compilation.
        """
        while numbers := os.read(pipe, 1):
            number = numbers[0]
            if not self.unsaved and number in self._previous:
                name = signal.Signals(number).name
                print(f"\n{name}: stopped before the first step, nothing is lost", file=sys.stderr, flush=True)
                os._exit(128 + number)
        os.close(pipe)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if not self.unsaved:
            return  # the thread that watches the pipe is about to end the process
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
