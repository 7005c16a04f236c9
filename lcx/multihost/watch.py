"""A process that ends, or hangs, ends all others with one clear line and a status other than 0.

JAX alone leaves the others in a collective that never ends, or aborts them with pages of C++ stack. Each process has a
thread that

- tells the others every few seconds that its process lives and at which step it is. Process 0 notes who is silent;
- ends the process soon after another one has reported its own end (`report`), with that one's reason;
- ends all processes if no training step has ended for long, although steps are under way (`dispatched`, `finished`).

A process that is killed or loses its network cannot report. JAX's coordination service notices that it is silent, and
aborts the others; here the abort becomes the line. On CPUs and with NCCL a collective often fails before that:
`blame` then finds out which process is gone.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import json
import os
import queue
import re
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import Any, NoReturn, TypeVar

from lcx.errors import TemporaryError, UserError
from lcx.multihost import channel

T = TypeVar("T")

LOST = TemporaryError.status  # the exit status of a process that ends because of another
WRONG_INPUT = UserError.status
AGAIN = "this process ends too; the same command goes on from what was saved"
_PERIOD_S = 1.0
_SILENT_S = 5.0  # after this a process is called silent; whether it is gone is for the heartbeat to say
_ANSWER_S = 10.0  # for process 0 to answer, on a busy machine too
_GRACE_S = 4.0  # for a process to end by itself after another has reported its end
GRACE_WRONG_INPUT_S = 20.0  # which all processes find, each in its own time
_STATUS = re.compile(  # absl::StatusCode, as XLA's errors begin
    r"(ABORTED|CANCELLED|DATA_LOSS|DEADLINE_EXCEEDED|FAILED_PRECONDITION|INTERNAL|UNAVAILABLE|UNKNOWN): "
)
_SLOWER = 10  # a step may take this many times as long as the slowest before it


class Watch:
    """The thread of one process, and what it knows about the others."""

    def __init__(self, step_timeout: float):
        self._steps = Steps(step_timeout)
        self._changed: dict[int, tuple[str, float]] = {}  # process: its last sign of life, and when it came
        self._silent: dict[int, int] = {}
        self._gone: set[int] = set()  # as far as `blame` has found out
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="lcx-watch", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._stop.set()
        self._thread.join(_PERIOD_S)

    def _run(self) -> None:
        beats = 0
        while not self._stop.wait(_PERIOD_S):
            beats += 1
            self._steps.tick(_PERIOD_S)
            with contextlib.suppress(Exception):  # process 0 does not answer: JAX's own heartbeat decides
                channel.put(f"alive/{channel.index()}", f"{beats} {self._steps.current}")
                self._look()
                if ended := self._ended():
                    self._stop.wait(GRACE_WRONG_INPUT_S if ended[1] == WRONG_INPUT else _GRACE_S)
                    if not self._stop.is_set():
                        end(*ended)
            if self._steps.hang():
                self._end_hanging()

    def _look(self) -> None:
        """Who is silent, as process 0 sees it."""
        if channel.index() > 0:
            self._silent = {int(p): s for p, s in json.loads(channel.get("silent") or "{}").items()}
            return
        before, self._silent = self._silent, self._silences()
        if self._silent or before:
            channel.put("silent", json.dumps(self._silent))

    def _silences(self) -> dict[int, int]:
        """{process: seconds without a sign of life} of those that are silent."""
        now = time.monotonic()
        for process in range(channel.count()):  # one may be gone before its first sign of life
            self._changed.setdefault(process, ("", now))
        for process, beat in channel.by_process("alive").items():
            if self._changed.get(process, ("", 0))[0] != beat:
                self._changed[process] = beat, now
        return {p: round(now - at) for p, (_, at) in self._changed.items() if now - at > _SILENT_S}

    def _ended(self) -> tuple[str, int] | None:
        """(reason, status) of another process that has reported its end."""
        for process, text in sorted(channel.by_process("ended").items()):
            if process != channel.index():
                return tuple(json.loads(text))
        return None

    def _end_hanging(self) -> NoReturn:
        reached = {}
        with contextlib.suppress(Exception):
            alive = _answered(lambda: channel.by_process("alive"))
            reached = {p: int(beat.split()[1]) for p, beat in alive.items()}
        line = hanging(self._steps.current, self._steps.waited, reached, channel.hosts()) + f" ({_main_thread()})"
        self.report(line, LOST)
        end(line, LOST)

    def report(self, line: str, status: int) -> None:
        """Tells the others that this process ends, and why. Process 0 stays until those that are left have read it."""
        self._steps.rest()
        with contextlib.suppress(Exception):
            _answered(lambda: channel.put(f"ended/{channel.index()}", json.dumps([line, status])))
            if channel.index() == 0 and len(self._gone) < channel.count() - 1:
                time.sleep(2 * _PERIOD_S)

    def blame(self) -> str | None:
        """The reason for the failure of a collective in this process, if it lies in another process.

        It takes a few seconds to see who is silent.
        """
        start = time.monotonic()
        # Of all processes: one may have gone before its first sign of life.
        seen = {process: ("", start) for process in range(channel.count())}
        deadline = start + 2 * _SILENT_S
        while True:
            now = time.monotonic()
            try:
                if ended := _answered(self._ended):
                    return ended[0]
                for process, beat in _answered(lambda: channel.by_process("alive")).items():
                    if seen[process][0] != beat:
                        seen[process] = beat, now
            except Exception:
                if channel.index() > 0:
                    return gone([0])
                if self._silent:
                    return gone(self._silent)
            if silent := [p for p, (_, at) in seen.items() if now - at > _SILENT_S and p != channel.index()]:
                self._gone.update(silent)
                return gone(silent)
            if now > deadline:  # only after a look: on a busy machine each may take seconds
                return None
            time.sleep(_PERIOD_S / 4)

    def leave(self) -> None:
        """Waits for the others at the end, and shuts JAX's service down.

        JAX does so too, but waits for minutes at most, and prints a traceback if a process is lost meanwhile.
        """
        import jax

        try:
            channel.gather("left", "")
            jax.distributed.shutdown()
        except KeyboardInterrupt:
            os._exit(128 + signal.SIGINT)
        except Exception:
            self.aborted()
        self.stop()

    def aborted(self) -> NoReturn:
        """JAX's coordination service has given up: a process is gone, or process 0 with the service itself."""
        if self._silent:
            end(gone(self._silent), LOST)
        if not _answers(channel.coordinator()):
            end(gone([0]), LOST)
        end("JAX has aborted this process, for the reason that it gives above", LOST)


class Steps:
    """How long the training step under way has taken, in ticks of the watching thread.

    Ticks and not the clock, so that a process that was stopped and goes on (Ctrl-Z, a debugger) has not hung meanwhile.

    Attributes:
      current: the last step that was dispatched.
      waited: seconds since the last step was dispatched or has ended.
    """

    def __init__(self, timeout: float):
        self.current = 0
        self.waited = 0.0
        self._timeout = timeout
        self._slowest = 0.0
        self._armed = False
        self._compiled = False

    def dispatched(self, step: int) -> None:
        self.current, self.waited = step, 0.0
        self._armed = self._compiled  # the first step may compile for as long as it likes

    def finished(self) -> None:
        if self._armed:
            self._slowest = max(self._slowest, self.waited)
        self.waited = 0.0
        self._compiled = True

    def rest(self) -> None:
        """No step is under way: an evaluation, a checkpoint, the end."""
        self._armed, self.waited = False, 0.0

    def tick(self, seconds: float) -> None:
        self.waited += seconds

    def hang(self) -> bool:
        return self._armed and self.waited > max(self._timeout, _SLOWER * self._slowest)


def hanging(step: int, seconds: float, reached: dict[int, int], hosts: list[str]) -> str:
    """One line about a step that does not end: the processes that the others wait for, if these can be told."""
    line = f"step {step} has not ended for {seconds:.0f} s (--step_timeout)"
    behind = [p for p, at in sorted(reached.items()) if at < max(reached.values(), default=0)]
    if not behind:
        return f"{line}: every process is in it, and one of them hangs"
    who = ", ".join(f"process {p} on {hosts[p]} (step {reached[p]})" for p in behind[:4])
    return f"{line}: the others wait for {who}"


def end(line: str, status: int) -> NoReturn:
    """Prints the reason once and ends this process at once: its main thread may hang in a collective."""
    if not _leaving.acquire(blocking=False):
        time.sleep(60)  # another thread is printing
    with contextlib.suppress(OSError, ValueError):
        sys.stdout.flush()
    os.write(2, f"\nerror: {with_advice(line, status)}\n".encode())
    os._exit(status)


def with_advice(line: str, status: int) -> str:
    """Why another process has ended, and what follows for this one, which ends with this status."""
    return f"{line}: {AGAIN if status == LOST else 'this process ends too'}"


def gone(processes: Any) -> str:
    """One line about processes that have ended without a word, or are silent."""
    who = " and ".join(channel.named(process) for process in sorted(processes)[:4])
    more = f" and {len(processes) - 4} more" if len(processes) > 4 else ""
    return f"{who}{more} {'is' if len(processes) == 1 else 'are'} gone (killed, out of memory, or a lost host)"


def _answered(ask: Callable[[], T]) -> T:
    """What process 0 answers. Raises TimeoutError if it does not: it is halted, or JAX's client has failed.

    JAX's own calls then wait without an end.
    """
    found: queue.SimpleQueue[T | Exception] = queue.SimpleQueue()

    def asking() -> None:
        try:
            found.put(ask())
        except Exception as error:
            found.put(error)

    threading.Thread(target=asking, name="lcx-ask", daemon=True).start()
    try:
        answer = found.get(timeout=_ANSWER_S)
    except queue.Empty:
        raise TimeoutError("process 0 does not answer") from None
    if isinstance(answer, Exception):
        raise answer
    return answer


def _answers(address: str) -> bool:
    host, _, port = address.rpartition(":")
    try:
        with socket.create_connection((host.strip("[]"), int(port)), timeout=3):
            return True
    except (OSError, ValueError):
        return False


def _main_thread() -> str:
    """Where the main thread of this process is: "the main thread of process 1 is at trainer.py:380"."""
    frame: FrameType | None = sys._current_frames().get(threading.main_thread().ident or 0)
    inside = frame
    while inside is not None and "lcx" not in inside.f_code.co_filename.split(os.sep):
        inside = inside.f_back
    at = inside or frame
    place = "an unknown place" if at is None else f"{os.path.basename(at.f_code.co_filename)}:{at.f_lineno}"
    return f"the main thread of process {channel.index()} is at {place}"


# ----------------------------------------------------------------------------------- the watch of this process

_watch: Watch | None = None
_leaving = threading.Lock()
_handlers: list[Any] = []  # ctypes must be able to call them as long as the process lives


def start(step_timeout: float) -> None:
    """Starts to watch. Call it once the processes have joined."""
    global _watch
    if _watch is not None:  # of an earlier command of this program
        _watch.stop()
    else:
        atexit.register(leave)  # after jax's own, so that it comes before it
    _watch = Watch(step_timeout)
    handle_aborts()
    _watch.start()
    channel.hosts()  # from now on a process that is lost has a name, also without a roll call


def handle_aborts() -> None:
    """From now on, JAX's abort of this process becomes one line."""
    _handlers[:] = ctypes.CFUNCTYPE(None, ctypes.c_int)(lambda number: aborted()), ctypes.CFUNCTYPE(None)(aborted)
    ctypes.CDLL(None).signal(int(signal.SIGABRT), _handlers[0])
    with contextlib.suppress(OSError, AttributeError):  # std::set_terminate, which comes before the abort
        ctypes.CDLL("libstdc++.so.6")._ZSt13set_terminatePFvvE(_handlers[1])


def dispatched(step: int) -> None:
    """A training step was handed to the devices."""
    if _watch is not None:
        _watch._steps.dispatched(step)


def finished() -> None:
    """A training step has ended."""
    if _watch is not None:
        _watch._steps.finished()


def rest() -> None:
    """No training step is under way until the next is dispatched."""
    if _watch is not None:
        _watch._steps.rest()


def report(line: str, status: int) -> None:
    """Tells the other processes that this one ends with an error of its own."""
    if _watch is not None:
        _watch.report(f"{channel.named(channel.index())} has ended: {line}", status)


def blame(error: BaseException) -> str | None:
    """Why this error happened, if the reason is that another process is gone; None if it is this process's own."""
    if _watch is None or not _of_runtime(error):
        return None
    line = _watch.blame()
    if line is None:
        return None
    _watch.report(line, LOST)
    return with_advice(line, LOST)


def _of_runtime(error: BaseException) -> bool:
    """Whether XLA raised this error, or one that led to it.

    Most arrive as JaxRuntimeError, but a call of a compiled function has been seen to raise ValueError with the same
    text, which starts with the name of a status: "UNKNOWN: Gloo AllGather failed: ...".
    """
    cause: BaseException | None = error
    while cause is not None:
        names = {kind.__name__ for kind in type(cause).__mro__}
        if names & {"JaxRuntimeError", "XlaRuntimeError"} or _STATUS.match(str(cause)):
            return True
        cause = cause.__cause__ or cause.__context__
    return False


def leave() -> None:
    """Waits until the work of all processes is done, and leaves JAX together with them."""
    if _watch is not None:
        _watch.leave()


def aborted() -> None:
    """JAX's client has failed, in this process or as another one is gone."""
    if _watch is not None:
        _watch.aborted()
    time.sleep(2 * _PERIOD_S)  # the roll call, if it is not over, knows who is gone, and ends this process
    end("JAX has aborted this process, for the reason that it gives above", LOST)
