"""Roll call: each process says that it is there, before all of them join JAX's coordination service.

That service waits until every process has connected to it. Meanwhile it cannot tell a process that was killed from one
that is late, and names neither. So until then each process keeps a connection to process 0, on the port that JAX's
service will have. One that ends closes its connection, one that is halted or loses its network is silent on it: both
end all others within seconds, with a line that names it. One that never came at all cannot be told from one that still
starts: process 0 says every half minute for whom it waits, and all end after --join_timeout.

Process 0 names a process that is started twice until JAX's service takes the port, just before all join. One that comes
later finds that service, which cannot be told from an earlier run's that will end: it says so and waits.

Where flags or variables say who a process is, the roll call begins before the heavy imports, otherwise with
jax.distributed.initialize, which finds it out.
"""

from __future__ import annotations

import contextlib
import selectors
import socket
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

from lcx.errors import TemporaryError, UserError
from lcx.multihost import channel, watch
from lcx.multihost.peer import Peer, listening

_PERIOD_S = 1.0
_SAY_S = 30.0  # between two lines about those that are missing
_REACH_S = 5.0  # for process 0 to accept a connection, and for a process that ends to tell its reason
_GRACE_S = 2.0  # for the main thread to end this process by itself
_LATE_S = 20.0  # for those that come later to be told that a process is gone


class _Part:
    """What process 0 and the others have in common: a thread, and how it ends.

    Args:
      process: the number of this process.
      timeout: seconds for all processes to come.
      silence: seconds after which a silent process counts as gone.

    Attributes:
      known: set once the others would notice that this process has ended.
    """

    def __init__(self, process: int, timeout: float, silence: float):
        self.known = threading.Event()
        self._process, self._timeout, self._silence = process, timeout, silence
        self._begun = time.monotonic()
        self._selector = selectors.DefaultSelector()
        self._closing = threading.Event()
        self._outcome: tuple[str, int] | None = None  # why this process has to end, and its status
        self._told = threading.Event()  # the others have been told so
        self._thread = threading.Thread(target=self._run, name="lcx-rollcall", daemon=True)

    def begin(self) -> None:
        self._thread.start()

    def close(self) -> None:
        """This process has joined: from now on its watch looks after the others."""
        self._closing.set()
        self._thread.join(2 * _PERIOD_S)
        self._send_all(joined=True)

    def check(self, seconds: float = 0.0) -> None:
        """Raises if this process has to end; it may take so many seconds to find that out."""
        deadline = time.monotonic() + seconds
        while self._outcome is None and time.monotonic() < deadline:
            time.sleep(0.02)
        if self._outcome is not None:
            self._told.wait()
            line, status = self._outcome
            raise (TemporaryError if status == watch.LOST else UserError)(watch.with_advice(line, status))

    def _run(self) -> None:
        ticked = time.monotonic()
        while not self._closing.is_set() and self._outcome is None:
            self._look()
            if (passed := time.monotonic() - ticked) >= _PERIOD_S:
                ticked += passed
                self._tick(min(passed, 2 * _PERIOD_S))  # not all of a time in which the machine was suspended
        if self._outcome is not None:
            self._linger()
            self._told.set()
            wrong = self._outcome[1] == watch.WRONG_INPUT  # which all find, each in its own time
            if not self._closing.wait(watch.GRACE_WRONG_INPUT_S if wrong else _GRACE_S):
                watch.end(*self._outcome)

    def report(self, line: str, status: int) -> None:
        """This process ends with an error of its own: tells the others, and those that come within seconds."""
        deadline = time.monotonic() + _REACH_S
        line = f"{channel.named(self._process)} has ended: {line}"
        while True:
            known = self.known.is_set()  # by all, or of a member by process 0
            self._send_all(end=[line, status])
            if known or self._outcome or time.monotonic() > deadline:
                break
            time.sleep(_PERIOD_S / 10)
        self._closing.set()

    def _send_all(self, **message: Any) -> None:
        """Sends it to all that this process is connected with."""
        raise NotImplementedError

    def _look(self) -> None:
        """Takes what arrives within a quarter of a period."""
        raise NotImplementedError

    def _tick(self, passed: float) -> None:
        """Called about once a period."""
        raise NotImplementedError

    def _linger(self) -> None:
        """What is left to do once this process has to end."""

    def _say(self, said: float, line: str) -> float:
        """Prints a line if it is time to; when it was last printed."""
        if (now := time.monotonic()) - said < _SAY_S:
            return said
        print(
            f"{line} ({now - self._begun:.0f} s of --join_timeout={self._timeout:g})",
            file=sys.stderr,
            flush=True,
        )
        return now


class Leader(_Part):
    """Process 0: it hears from all others.

    Args:
      bind: HOST:PORT of JAX's service in this process.
      count: how many processes there are.
    """

    def __init__(self, bind: str, count: int, timeout: float, silence: float):
        super().__init__(0, timeout, silence)
        self._count = count
        self._peers: dict[int, Peer] = {}
        self._listener = listening(bind)
        self._wanted, self._free = threading.Event(), threading.Event()  # the port, for JAX's service
        self._selector.register(self._listener, selectors.EVENT_READ)

    def wait(self) -> None:
        """Waits until all have said that they are there; then the port is free.

        Raises:
          TemporaryError: they were not in time, or one is gone.
          UserError: two are the same process, or one expects another number of processes.
        """
        said = self._begun
        while not self.known.wait(_PERIOD_S / 10):
            self.check()
            missing = _numbers([i for i in range(1, self._count) if i not in self._peers])
            if time.monotonic() - self._begun > self._timeout:
                raise TemporaryError(
                    f"{missing} of {self._count} did not come within {self._timeout:g} s: look at what that host "
                    "says, or set --join_timeout to more seconds"
                )
            said = self._say(said, f"waiting for {missing} of {self._count}")
        self._wanted.set()  # until now one that is started twice was told so
        while not self._free.wait(_PERIOD_S / 10):
            self.check()

    def go(self) -> None:
        """JAX's service listens: the others may join it."""
        self._send_all(hosts=channel.known_hosts())

    def _send_all(self, **message: Any) -> None:
        for peer in list(self._peers.values()):
            peer.send(**message)

    def _linger(self) -> None:
        """Tells processes that come only now that this one has to end."""
        deadline = time.monotonic() + _LATE_S
        while (
            self._outcome
            and not self.known.is_set()
            and not self._closing.is_set()
            and time.monotonic() < deadline
        ):
            self._look()
            line, status = self._outcome
            self._send_all(end=[line, status])

    def _look(self) -> None:
        if self._wanted.is_set() and not self._free.is_set():
            self._selector.unregister(self._listener)
            self._listener.close()
            self._free.set()
        for key, _ in self._selector.select(_PERIOD_S / (20 if self.known.is_set() else 4)):
            if key.fileobj is self._listener:
                with contextlib.suppress(OSError):  # it has gone again
                    connection, _ = self._listener.accept()
                    connection.settimeout(_PERIOD_S)
                    self._selector.register(connection, selectors.EVENT_READ, Peer(connection))
            else:
                self._hear(key.data)

    def _hear(self, peer: Peer) -> None:
        try:
            messages = peer.read()
        except ValueError:  # another program's
            messages = None
        for message in messages or ():
            if {"process", "count", "host"} <= message.keys():
                self._welcome(peer, message["process"], message["count"], message["host"])
            elif "end" in message:
                self._end(*message["end"])
            peer.done |= "joined" in message
        if messages is None:
            self._selector.unregister(peer.connection)
            if peer.process is None:
                peer.connection.close()
            elif not peer.done:
                self._end(watch.gone([peer.process]), watch.LOST)

    def _welcome(self, peer: Peer, process: int, count: int | None, host: str) -> None:
        """A process has said who it is."""
        if process in self._peers or not 0 < process < self._count:
            first = channel.named(process) if process < self._count else f"process {process} of {self._count}"
            line = f"{first} is also started on {host}, expected each number below {self._count} once: set --process_id"
            peer.send(end=[line, watch.WRONG_INPUT])
            return self._end(line, watch.WRONG_INPUT)
        peer.process, self._peers[process] = process, peer
        channel.learn({process: host})
        peer.send(host=socket.gethostname())
        if count not in (None, self._count):
            line = f"there are {count} processes on {host} (process {process}), {self._count} on {channel.named(0)}"
            return self._end(f"{line}: set the same --num_processes on every host", watch.WRONG_INPUT)
        if len(self._peers) == self._count - 1:
            self.known.set()

    def _tick(self, passed: float) -> None:
        for process, peer in sorted(self._peers.items()):
            peer.send()
            peer.silent += passed
            if peer.silent > self._silence and not peer.done:
                return self._end(watch.gone([process]), watch.LOST)

    def _end(self, line: str, status: int) -> None:
        if self._outcome is None:
            self._outcome = line, status
            self._send_all(end=[line, status])


class Member(_Part):
    """Any other process: it keeps a connection to process 0.

    Args:
      address: HOST:PORT of process 0.
      process: its number.
      count: how many processes there are; None if JAX has to find it out.
    """

    def __init__(self, address: str, process: int, count: int | None, timeout: float, silence: float):
        super().__init__(process, timeout, silence)
        host, _, port = address.rpartition(":")
        self._address, self._host, self._port = address, host.strip("[]"), int(port)
        self._hello = {"process": process, "count": count, "host": socket.gethostname()}
        self._peer: Peer | None = None
        self._met = "no answer"  # what was found at the address last
        self._go = threading.Event()

    def wait(self) -> None:
        """Waits until all processes are there and JAX's service listens.

        Raises:
          TemporaryError: process 0 cannot be reached, or a process is gone, or did not come.
        """
        said = self._begun
        while not self._go.wait(_PERIOD_S / 10):
            self.check()
            if self.known.is_set():
                continue
            who = f"process 0 at {self._address}"
            if time.monotonic() - self._begun > self._timeout:
                raise TemporaryError(
                    f"{who} could not be reached within {self._timeout:g} s ({self._met}): look at what that host "
                    "says, or set --join_timeout to more seconds"
                )
            said = self._say(said, f"waiting for {who}: {self._met}")

    def _send_all(self, **message: Any) -> None:
        if self._peer is not None:
            self._peer.send(**message)

    def _look(self) -> None:
        if self._peer is None:
            self._reach()
            return
        if not self._selector.select(_PERIOD_S / 4):
            self._met = "no answer"
            return
        try:
            messages = self._peer.read()
        except ValueError as error:
            messages, self._met = None, str(error)
        for message in messages or ():
            self.known.set()
            if "host" in message:
                channel.learn({0: message["host"]})
            if "hosts" in message:
                channel.learn({int(process): host for process, host in message["hosts"].items()})
                self._go.set()
            if "end" in message:
                self._outcome = tuple(message["end"])
                return
            self._peer.done |= "joined" in message
        if messages is None:
            self._lose()

    def _reach(self) -> None:
        try:
            connection = socket.create_connection((self._host, self._port), timeout=_REACH_S)
        except OSError as error:  # it does not listen yet, or has no name yet
            self._met = (error.strerror or "no answer").lower()  # of a time that is up there is none
            self._closing.wait(_PERIOD_S / 4)
            return
        connection.settimeout(_PERIOD_S)
        self._peer = Peer(connection)
        self._selector.register(connection, selectors.EVENT_READ)
        self._peer.send(**self._hello)

    def _lose(self) -> None:
        """The connection has ended, or process 0 is silent."""
        if self._peer is None or self._peer.done:
            self._closing.wait(_PERIOD_S / 4)
            return
        if self.known.is_set():
            self._outcome = watch.gone([0]), watch.LOST
            return
        self._selector.unregister(self._peer.connection)
        self._peer.connection.close()
        self._peer = None
        self._closing.wait(_PERIOD_S)

    def _tick(self, passed: float) -> None:
        if self._peer is not None:
            self._peer.send()
            self._peer.silent += passed
            if self._peer.silent > self._silence:
                self._lose()


def _numbers(processes: list[int]) -> str:
    more = f" and {len(processes) - 4} more" if len(processes) > 4 else ""
    return f"process{'es' if len(processes) > 1 else ''} {', '.join(map(str, processes[:4]))}{more}"


# ------------------------------------------------------------------------------- the part of this process

_part: Leader | Member | None = None


def begin(
    address: str, bind: str, process: int, count: int | None, *, timeout: float, silence: float
) -> Leader | Member | None:
    """This process says that it is there, if it has not yet; None if it is the only one.

    Args:
      address: HOST:PORT of process 0.
      bind: HOST:PORT at which process 0 listens.
      process: the number of this process.
      count: how many there are; None if this is not known yet, in another process than process 0.
      timeout: seconds for all processes to come.
      silence: seconds after which a silent process counts as gone.

    Raises:
      TemporaryError: in process 0, if it cannot listen there.
    """
    global _part
    if _part is None and count != 1:
        channel.learn({process: socket.gethostname()})
        if process > 0:
            _part = Member(address, process, count, timeout, silence)
        else:
            assert count is not None
            _part = Leader(bind, count, timeout, silence)
        _part.begin()
    return _part


def report(line: str, status: int) -> None:
    """Tells the other processes that this one ends with an error of its own, if they still join each other."""
    global _part
    if _part is not None:
        _part.report(line, status)
        _part = None


@contextlib.contextmanager
def held(timeout: float, silence: float) -> Iterator[None]:
    """Within the block, jax.distributed.initialize waits for the roll call before it makes its service and its client.

    A failure of the client becomes one line. Left to itself the client prints its own stack and aborts. It also takes
    a callback; but in the versions of jaxlib that this was written with, the callback cannot receive its argument, and
    the C++ library aborts. So the signal of the abort is handled too (`watch.start`).
    """
    global _part
    watch.handle_aborts()
    from jax._src import distributed

    native = distributed._jax
    make_service, make_client = native.get_distributed_runtime_service, native.get_distributed_runtime_client

    def service(bind: str, count: int, *args: Any, **kwargs: Any) -> Any:
        part = begin("", bind, 0, count, timeout=timeout, silence=silence)
        if part is None:
            return make_service(bind, count, *args, **kwargs)
        assert isinstance(part, Leader)
        part.wait()
        made = make_service(bind, count, *args, **kwargs)
        part.go()
        return made

    def client(address: str, process: int, *args: Any, **kwargs: Any) -> Any:
        if process > 0:
            count = distributed.global_state.num_processes
            part = begin(address, "", process, count, timeout=timeout, silence=silence)
            assert isinstance(part, Member)
            part.wait()
        return make_client(
            address, process, *args, missed_heartbeat_callback=lambda *_: watch.aborted(), **kwargs
        )

    native.get_distributed_runtime_service, native.get_distributed_runtime_client = service, client
    try:
        yield
        if _part is not None:
            _part.close()
            _part = None
    except RuntimeError:  # perhaps as another process is gone
        if _part is not None:
            _part.check(_GRACE_S)
        raise
    finally:
        native.get_distributed_runtime_service, native.get_distributed_runtime_client = (
            make_service,
            make_client,
        )
