"""A small Hugging Face hub on 127.0.0.1: repositories in memory, with the headers that huggingface_hub reads."""

import contextlib
import dataclasses
import hashlib
import http.server
import json
import threading
from collections.abc import Iterator

COMMIT = "89abcdef0123456789abcdef0123456789abcdef"
SMALL = 1000  # a larger file is stored as an object of its own, whose etag is its SHA-256


@dataclasses.dataclass
class Hub:
    """What the server has and does.

    Attributes:
      repos: {"models/org/name" or "datasets/org/name": {file name: contents}}.
      gated: names of models whose terms have not been accepted.
      breaks: names of files that end in the middle, as often as their count says.
      asked: the paths of all requests.
    """

    repos: dict[str, dict[str, bytes]]
    gated: frozenset[str] = frozenset()
    breaks: dict[str, int] = dataclasses.field(default_factory=dict)
    asked: list[str] = dataclasses.field(default_factory=list)
    url: str = ""


@contextlib.contextmanager
def running(hub: Hub) -> Iterator[Hub]:
    """Serves `hub`; its `url` is the value of HF_ENDPOINT."""

    class Handler(_Handler):
        of = hub

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        hub.url = f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        thread.start()
        yield hub
        server.shutdown()
        thread.join()


class _Handler(http.server.BaseHTTPRequestHandler):
    of: Hub
    protocol_version = "HTTP/1.1"

    def do_HEAD(self):
        self._answer(body=False)

    def do_GET(self):
        self._answer(body=True)

    def _answer(self, *, body: bool) -> None:
        path = self.path.partition("?")[0].strip("/")
        self.of.asked.append(f"{self.command} {path}")
        api = path.startswith("api/")
        kind = "datasets" if path.removeprefix("api/").startswith("datasets/") else "models"
        rest = path.removeprefix("api/").removeprefix(f"{kind}/").split("/")
        repo, place = "/".join(rest[:2]), rest[2:]
        files = self.of.repos.get(f"{kind}/{repo}")
        if files is None:
            return self._send(401 if api else 404, {"X-Error-Code": "RepoNotFound"}, b"{}", body)
        if place[1:2] and place[1] not in ("main", COMMIT):
            return self._send(404, {"X-Error-Code": "RevisionNotFound"}, b"{}", body)
        if api:
            return self._send(200, {}, json.dumps(_info(repo, files, place)).encode(), body)
        if repo in self.of.gated:
            return self._send(403, {"X-Error-Code": "GatedRepo"}, b"", body)
        name = "/".join(place[2:])
        if name not in files:
            return self._send(404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT}, b"", body)
        data = files[name]
        headers = {"ETag": f'"{_etag(data)}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
        start = int(self.headers.get("Range", "bytes=0-").removeprefix("bytes=").partition("-")[0])
        if start:
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        cut = None
        if body and self.of.breaks.get(name, 0) > 0:
            self.of.breaks[name] -= 1
            cut = (len(data) - start) // 2
        return self._send(206 if start else 200, headers, data[start:], body, cut=cut)

    def _send(self, status: int, headers: dict[str, str], data: bytes, body: bool, cut: int | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if body:
            self.wfile.write(data[:cut])
        if cut is not None:
            self.close_connection = True

    def log_message(self, *args):
        pass


def _etag(data: bytes) -> str:
    git = hashlib.sha1(f"blob {len(data)}\0".encode() + data)
    return (git if len(data) <= SMALL else hashlib.sha256(data)).hexdigest()


def _info(repo: str, files: dict[str, bytes], place: list[str]) -> object:
    if place[:1] == ["tree"]:
        return [{"type": "file", "path": n, "size": len(d), "oid": _etag(d)} for n, d in files.items()]
    siblings = [{"rfilename": name} for name in files]
    return {"_id": "1", "id": repo, "sha": COMMIT, "private": False, "tags": [], "downloads": 0, "siblings": siblings}
