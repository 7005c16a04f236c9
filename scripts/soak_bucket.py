"""A bucket on 127.0.0.1 that fails for a while when scripts/soak.py says so: moto's server of S3."""

from __future__ import annotations

import contextlib
import logging
import os
import random
import threading
import time
from collections.abc import Iterator

BUCKET = "lcx-soak"
SLOW_S = 1.0  # before each answer of a slow server
PATIENCE_S = 60  # for which a run repeats a request: longer than the server fails


class Bucket:
    """What the server does with requests: "", "fails" (503) or "slow"."""

    def __init__(self) -> None:
        self.weather = ""
        self.url = f"s3://{BUCKET}"

    def storm(self, rng: random.Random) -> str:
        """Turns the weather bad and says how."""
        self.weather = rng.choice(("fails", "slow"))
        return self.weather


@contextlib.contextmanager
def running() -> Iterator[Bucket]:
    """The server with an empty bucket, named by the variables that this process and its children read."""
    import moto.server
    import werkzeug.serving

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    app = moto.server.DomainDispatcherApplication(moto.server.create_backend_app)
    bucket = Bucket()

    def answer(environ, start_response):
        if bucket.weather == "fails":
            start_response("503 Slow Down", [("Content-Length", "0")])
            return [b""]
        time.sleep(SLOW_S if bucket.weather == "slow" else 0)
        return app(environ, start_response)

    server = werkzeug.serving.make_server("127.0.0.1", 0, answer, threaded=True)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    os.environ |= {
        **dict.fromkeys(("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"), "testing"),
        **{"AWS_DEFAULT_REGION": "us-east-1", "AWS_ENDPOINT_URL": f"http://127.0.0.1:{server.server_port}"},
        "LCX_BUCKET_PATIENCE": str(PATIENCE_S),
    }
    import s3fs

    s3fs.S3FileSystem().mkdir(BUCKET)
    yield bucket
    server.shutdown()
