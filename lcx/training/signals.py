"""Turns SIGTERM (preemption, a scheduler) and Ctrl-C into a flag that the training loop checks between steps.

A run that SIGTERM has stopped ends as if it had succeeded, because the same command will be started again; so does one
that it ends at once, because nothing would be lost. After Ctrl-C the command ends with status 130, so that a script
does not go on with an unfinished run (`interrupted`).

With several processes JAX's own preemption notice is used for SIGTERM. It makes all of them stop at the same step, even
if only one has received the signal, and a Python handler installed after jax.distributed.initialize would override it.
Ctrl-C is passed on to it as a SIGTERM to the process itself.
"""

import os
import signal
import sys
import threading
from types import FrameType

import jax

from lcx.buckets import workdirs

_interrupted = threading.Event()


def interrupted() -> bool:
    """Whether Ctrl-C has stopped a run of this process."""
    return _interrupted.is_set()


class StopRequest:
    """Context manager. `requested(step)` is True once the run should save a checkpoint and end.

    A second signal ends the process immediately.

    Attributes:
      safe: None while there is progress that would be lost without a checkpoint. Otherwise what the process prints
        when the first signal ends it immediately, even while the main thread compiles and cannot run a Python signal
        handler.
    """

    def __init__(self):
        self.safe: str | None = None
        self._flag = threading.Event()
        self._previous_pipe = -1
        self._previous: dict[int, object] = {}
        self._pipe: tuple[int, int] | None = None

    def __enter__(self) -> "StopRequest":
        _interrupted.clear()
        numbers = (signal.SIGTERM, signal.SIGINT) if jax.process_count() == 1 else (signal.SIGINT,)
        if threading.current_thread() is threading.main_thread():
            for number in numbers:
                self._previous[number] = signal.signal(number, self._handle)
            self._pipe = os.pipe()
            os.set_blocking(self._pipe[1], False)
            self._previous_pipe = signal.set_wakeup_fd(self._pipe[1], warn_on_full_buffer=False)
            threading.Thread(target=self._watch, args=(self._pipe[0],), daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        if self._pipe is not None:
            signal.set_wakeup_fd(self._previous_pipe)
            os.close(self._pipe[1])  # ends the thread, which closes the other end
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _watch(self, pipe: int) -> None:
        """Runs in a thread and receives the number of each signal immediately through the wakeup pipe.

        Python runs its own signal handlers only in the main thread, which does not get to them during a compilation.
        """
        received = 0
        while numbers := os.read(pipe, 1):
            number = numbers[0]
            if number not in self._previous:
                continue
            received += 1
            if self.safe is not None:
                print(f"\n{signal.Signals(number).name}: {self.safe}", file=sys.stderr, flush=True)
                workdirs.copy_now()
                os._exit(0 if number == signal.SIGTERM else 128 + number)
            if received > 1:
                os._exit(128 + number)
        os.close(pipe)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.safe is not None or self._flag.is_set():
            return  # the thread that watches the pipe is about to end the process
        self._flag.set()
        if number == signal.SIGINT:
            _interrupted.set()
        if jax.process_count() > 1:
            os.kill(os.getpid(), signal.SIGTERM)
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
