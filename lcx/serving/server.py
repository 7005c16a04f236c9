"""The HTTP server: routes, JSON in and out, errors in OpenAI's shape, one line for each request."""

import http.server
import json
import logging
import socket
import socketserver
import sys
import threading
import time
from collections.abc import Sequence
from http import HTTPStatus
from pathlib import Path
from typing import Any

from lcx.convert.api import load
from lcx.errors import UserError, first_line
from lcx.serving.completions import Completer
from lcx.serving.request import RequestError, parsed
from lcx.terminal import tokenizer_of

MAX_BODY = 64 << 20  # bytes
_SECONDS = 60  # after which a silent connection is closed
_log = logging.getLogger(__name__)


def serve(
    *,
    checkpoint: str,
    host: str = "127.0.0.1",
    port: int = 8000,
    name: str | None = None,
    dtype: str | None = None,
    rope_scaling: dict[str, Any] | None = None,
    context_length: int | None = None,
    adapter: Sequence[str] | None = None,
    format: str | None = None,
    input_projections: str | None = None,
) -> None:
    """Loads a model and answers requests until it is stopped.

    Args:
      checkpoint, dtype, rope_scaling, context_length, adapter, format, input_projections: as in lcx.load.
      host: address to listen on; "127.0.0.1" can be reached from this machine only.
      port: 0 takes one that is free.
      name: of the model in requests; None: the last part of `checkpoint`.

    Raises:
      UserError: the address cannot be used, or the checkpoint or tokenizer cannot be loaded.
    """
    if not 0 <= port < 1 << 16:
        raise UserError(f"--port is {port}, expected 0 to 65535: change --port")
    if name is not None and not (name.strip() and name.isprintable()):
        raise UserError(f"--name is {name!r}, expected the model's name in requests: change it, or leave it out")
    with _bound(host, port) as server:  # before the model is loaded, which may take minutes
        tokenizer = tokenizer_of(checkpoint, format)
        model, params = load(
            checkpoint,
            format=format,
            dtype=dtype,
            rope_scaling=rope_scaling,
            context_length=context_length,
            adapter=adapter,
            input_projections=input_projections,
        )
        name = name or Path(checkpoint).name or str(checkpoint)
        server.completer = Completer(model, params, tokenizer, name)
        server.server_activate()
        where, number = str(server.server_address[0]), server.server_address[1]
        shown = f"[{where}]" if ":" in where else where
        print(f"serving {name} at http://{shown}:{number}/v1", file=sys.stderr, flush=True)
        server.serve_forever()


class Server(http.server.ThreadingHTTPServer):
    """Connections are threads of their own; the lock lets one of them generate at a time."""

    daemon_threads = True
    completer: Completer

    def __init__(self, address: tuple[str, int], family: socket.AddressFamily):
        self.address_family, self.lock = family, threading.Lock()
        super().__init__(address, Handler, bind_and_activate=False)

    def server_bind(self) -> None:
        # Not that of HTTPServer, which asks a name server for the name of the host and may wait for it.
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = map(str, self.server_address[:2])  # type: ignore[assignment]

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A connection that broke is no fault of the server: one line."""
        print(
            f"{client_address[0]} connection lost: {first_line(sys.exception() or Exception())}",
            file=sys.stderr,
        )


def _bound(host: str, port: int) -> Server:
    """A server that holds its address and does not listen yet."""
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        server = Server(address[:2], family)  # type: ignore[arg-type]
    except OSError as error:
        raise UserError(f"--host={host}: {error.strerror or error}: change --host") from None
    try:
        server.server_bind()
    except OSError as error:
        server.server_close()
        raise UserError(f"{host}:{port}: {error.strerror or error}: change --host or --port") from None
    return server


class Handler(http.server.BaseHTTPRequestHandler):
    """One connection. Every answer is JSON; an error is {"error": {"message", "type", "param", "code"}}."""

    protocol_version = "HTTP/1.1"
    timeout = _SECONDS
    server: Server

    def do_GET(self) -> None:
        completer, started = self.server.completer, time.perf_counter()
        model = {"id": completer.name, "object": "model", "created": 0, "owned_by": "lcx"}
        path = self._path()
        if path == "/health":
            self._send(HTTPStatus.OK, {"status": "ok"}, started)
        elif path == "/v1/models":
            self._send(HTTPStatus.OK, {"object": "list", "data": [model]}, started)
        elif path == f"/v1/models/{completer.name}":
            self._send(HTTPStatus.OK, model, started)
        elif path == "/v1/completions":
            self._fail(HTTPStatus.METHOD_NOT_ALLOWED, f"{path} takes POST", started)
        else:
            self._missing(started)

    def do_POST(self) -> None:
        started = time.perf_counter()
        try:
            if self._path() != "/v1/completions":
                self.close_connection = True  # the body is not read
                self._missing(started)
                return
            body = self._body(started)
            if body is not None:
                self._complete(body, started)
        except (ConnectionError, TimeoutError) as error:
            self.close_connection = True
            self._line("client gone", first_line(error), started)

    def _complete(self, body: bytes, started: float) -> None:
        completer = self.server.completer
        try:
            request = parsed(_json(body))
            if request.model not in (None, completer.name):
                message = (
                    f"there is no model {request.model!r}, this server has {completer.name!r}: change model"
                )
                self._fail(HTTPStatus.NOT_FOUND, message, started, field="model", code="model_not_found")
                return
            with self.server.lock:
                response = completer.answer(request)
        except UserError as error:
            self._fail(HTTPStatus.BAD_REQUEST, str(error), started, field=getattr(error, "field", None))
        except Exception as error:
            _log.exception("a request failed")
            message = f"the server failed: {type(error).__name__}: {first_line(error)}"
            self._fail(HTTPStatus.INTERNAL_SERVER_ERROR, message, started, kind="server_error")
        else:
            usage = response["usage"]
            said = f"{usage['prompt_tokens']} + {usage['completion_tokens']} tokens"
            self._send(HTTPStatus.OK, response, started, said=said)

    def _body(self, started: float) -> bytes | None:
        """The bytes of the request; None if it has been refused."""
        self.close_connection = True  # unless the whole body is read
        if (
            "chunked" in self.headers.get("Transfer-Encoding", "").lower()
            or "Content-Length" not in self.headers
        ):
            self._fail(HTTPStatus.LENGTH_REQUIRED, "a request needs a Content-Length", started)
            return None
        text = self.headers["Content-Length"].strip()
        if not (text.isascii() and text.isdigit()) or int(text) > MAX_BODY:
            found = f"a Content-Length of {text[:20]}, expected at most {MAX_BODY} bytes"
            self._fail(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, found, started)
            return None
        body = self.rfile.read(int(text))
        if len(body) < int(text):
            raise ConnectionError(f"the request ended after {len(body)} of {text} bytes")
        self.close_connection = self.headers.get("Connection", "").lower() == "close"
        return body

    def _path(self) -> str:
        return self.path.partition("?")[0].rstrip("/") or "/"

    def _missing(self, started: float) -> None:
        where = "expected /v1/completions, /v1/models or /health"
        self._fail(HTTPStatus.NOT_FOUND, f"there is nothing at {self._path()[:100]!r}, {where}", started)

    def _fail(
        self,
        status: HTTPStatus,
        message: str,
        started: float,
        *,
        kind: str = "invalid_request_error",
        field: str | None = None,
        code: str | None = None,
    ) -> None:
        error = {"message": message, "type": kind, "param": field, "code": code}
        self._send(status, {"error": error}, started, said=message)

    def _send(self, status: HTTPStatus, value: Any, started: float, *, said: str = "") -> None:
        body = json.dumps(value, allow_nan=False).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(body)
        self._line(str(int(status)), said, started)

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """What the base class refuses (a broken request line, an unknown method), as JSON too."""
        self.close_connection = True
        status = HTTPStatus(code)
        self.command, self.path = getattr(self, "command", None) or "-", getattr(self, "path", "-")
        self._fail(status, message or status.phrase, time.perf_counter())

    def _line(self, status: str, said: str, started: float) -> None:
        """The line of a request. The path comes from outside: what could steer a terminal is escaped."""
        took = time.perf_counter() - started
        path = ascii(self._path()[:100])[1:-1]
        text = f"{self.client_address[0]} {self.command} {path} {status} {said}".rstrip()
        print(f"{text} ({took:.2f} s)", file=sys.stderr, flush=True)

    def log_message(self, format: str, *args: Any) -> None:
        """Says nothing: `_line` does."""


def _json(body: bytes) -> Any:
    try:
        return json.loads(body)
    except (ValueError, RecursionError) as error:
        raise RequestError(f"the request is not JSON ({first_line(error)}): send a JSON object") from None
