"""A connection between two processes before they have joined: messages in JSON, one a line."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import socket
import threading
import time
from typing import Any

from lcx.errors import TemporaryError, first_line

_PORT_S = 30.0  # for an earlier run on this port to end
_LONGEST = 1 << 20  # bytes of a message
_HTTP2 = b"\4"  # the fourth byte of what a server of HTTP/2, such as JAX's service, says first
_STRANGER = "another program answers there"
_RUN = "JAX's service of a run that has already begun, or another program, answers there; start each --process_id once"


@dataclasses.dataclass(eq=False)
class Peer:
    """One end of a connection.

    Attributes:
      process: its number, once it has said it.
      silent: seconds since its last message.
      done: whether it has joined JAX's service, and may close the connection.
    """

    connection: socket.socket
    process: int | None = None
    silent: float = 0.0
    done: bool = False
    _rest: bytes = b""
    _sending: Any = dataclasses.field(default_factory=threading.Lock)

    def send(self, **message: Any) -> None:
        with self._sending, contextlib.suppress(OSError):  # its end is noticed where it is read
            self.connection.sendall(json.dumps(message).encode() + b"\n")

    def read(self) -> list[dict[str, Any]] | None:
        """What has arrived, None at the end of the connection. Raises ValueError if it is another program's."""
        try:
            data = self.connection.recv(1 << 16)
        except TimeoutError:
            return []
        except OSError:
            data = b""
        if not data:
            return None
        *lines, self._rest = (self._rest + data).split(b"\n")
        if (
            any(not line.startswith(b"{") for line in (*lines, self._rest) if line)
            or len(self._rest) > _LONGEST
        ):
            raise ValueError(_RUN if data[3:4] == _HTTP2 else _STRANGER)
        try:
            messages = [json.loads(line) for line in lines]
        except ValueError:
            raise ValueError(_STRANGER) from None
        self.silent = 0.0
        return messages


def listening(bind: str) -> socket.socket:
    """A socket that listens where JAX's service will."""
    host, _, port = bind.rpartition(":")
    host = host.strip("[]")
    both = host in ("", "::") and socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if both or ":" in host else socket.AF_INET
    place = ("" if host == "::" else host, int(port))
    deadline = time.monotonic() + _PORT_S
    while True:
        try:
            return socket.create_server(place, family=family, backlog=1024, dualstack_ipv6=both)
        except OSError as error:
            if time.monotonic() > deadline:
                raise TemporaryError(
                    f"process 0 cannot listen on {bind}: {first_line(error)}; perhaps an earlier run has not ended: "
                    "choose another port with --coordinator_address=HOST:PORT or --hosts=HOST:PORT,..."
                ) from None
        time.sleep(0.25)
