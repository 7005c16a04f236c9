"""Emulators of S3 and of Google Cloud Storage on 127.0.0.1, which fail or wait when a test says so."""

import asyncio
import contextlib
import dataclasses
import logging
import os
import threading
import time
import types
from collections.abc import Callable, Iterator

import pytest

from lcx.buckets import client

BUCKET = "lcx-test"


@dataclasses.dataclass
class Weather:
    """What the servers do with requests.

    Attributes:
      fails: called with the number of the request and its method; whether it is answered by `status`.
      slow: seconds before each answer.
    """

    fails: Callable[[int, str], bool] = lambda number, method: False
    status: int = 503
    slow: float = 0.0
    requests: int = 0
    failed: int = 0

    def refuses(self, method: str) -> bool:
        self.requests += 1
        time.sleep(self.slow)
        bad = self.fails(self.requests, method)
        self.failed += bad
        return bad


@contextlib.contextmanager
def running() -> Iterator[Weather]:
    """Both servers with an empty bucket, named by the environment variables that all their clients read."""
    pytest.importorskip("moto", reason="needs the emulators: pip install 'lcx[dev,buckets]'")
    pytest.importorskip("gcp_storage_emulator")
    pytest.importorskip("s3fs")
    pytest.importorskip("gcsfs")
    weather = Weather()
    with contextlib.ExitStack() as stack, pytest.MonkeyPatch.context() as patch:
        s3 = stack.enter_context(_s3(weather))
        gcs = stack.enter_context(_gcs(weather, patch))
        for name, value in {
            **dict.fromkeys(("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"), "testing"),
            **{"AWS_DEFAULT_REGION": "us-east-1", "AWS_ENDPOINT_URL": s3, "STORAGE_EMULATOR_HOST": gcs},
            "LCX_BUCKET_PATIENCE": "20",
        }.items():
            patch.setenv(name, value)
        import gcsfs.retry
        import s3fs

        # Its own six attempts would take half a minute each time that a server fails for good.
        patch.setattr(gcsfs.retry, "asyncio", types.SimpleNamespace(sleep=lambda seconds: asyncio.sleep(0.01)))
        # Clients keep the address of a server that an earlier module of this process has started.
        for forget in (
            s3fs.S3FileSystem.clear_instance_cache,
            gcsfs.GCSFileSystem.clear_instance_cache,
            client._of_scheme.cache_clear,
        ):
            forget()
            stack.callback(forget)
        with contextlib.suppress(FileExistsError):  # moto keeps its buckets as long as the process lives
            s3fs.S3FileSystem().mkdir(BUCKET)
        yield weather


@contextlib.contextmanager
def _s3(weather: Weather) -> Iterator[str]:
    import moto.server
    import werkzeug.serving

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    app = moto.server.DomainDispatcherApplication(moto.server.create_backend_app)

    def answer(environ, start_response):
        if weather.refuses(environ["REQUEST_METHOD"]):
            start_response(f"{weather.status} Slow Down", [("Content-Length", "0")])
            return [b""]
        return app(environ, start_response)

    server = werkzeug.serving.make_server("127.0.0.1", 0, answer, threaded=True)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


@contextlib.contextmanager
def _gcs(weather: Weather, patch: pytest.MonkeyPatch) -> Iterator[str]:
    from gcp_storage_emulator import server as emulator

    logging.getLogger("gcp_storage_emulator").setLevel(logging.CRITICAL)
    handle = emulator.Router.handle

    def answer(self, method):
        if not weather.refuses(method):
            return handle(self, method)
        handler = self._request_handler
        handler.rfile.read(int(handler.headers.get("Content-Length") or 0))
        handler.send_response(weather.status)
        handler.send_header("Content-Length", "0")
        handler.end_headers()

    patch.setattr(emulator.Router, "handle", answer)
    # It answers one request at a time. Of more than five that wait, the others would be dropped and come again after
    # 1, 2, 4, 8 and 16 s, and so last longer than the patience above on a busy machine.
    patch.setattr("http.server.HTTPServer.request_queue_size", 128)
    # A client that has read enough hangs up, of which the standard library's server would print a traceback.
    patch.setattr("socketserver.BaseServer.handle_error", lambda *_: None)
    server = emulator.create_server("127.0.0.1", 0, in_memory=True, default_bucket=BUCKET)
    server.start()
    port = server._api._httpd.socket.getsockname()[1]
    os.environ.pop("GOOGLE_APPLICATION_CREDENTIALS", None)
    yield f"http://127.0.0.1:{port}"
    server.stop()
