"""Continuations from a server with an OpenAI completions endpoint, such as `python -m lcx.serve`."""

import http.client
import json
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator, Sequence
from typing import Any

from lcx.errors import UserError, first_line

_SECONDS = 900  # for an answer
_LOCAL = ("localhost", "127.0.0.1", "::1")


def model_of(url: str, *, setting: str) -> str:
    """The name of the first model of the server at a base URL, such as "http://127.0.0.1:8000/v1".

    Args:
      setting: the one that holds the URL, for messages.

    Raises:
      UserError: the server does not answer, or lists no model.
    """
    answer = _asked(url, "models", None, setting)
    try:
        return str(answer["data"][0]["id"])
    except (LookupError, TypeError):
        raise UserError(f"{url}/models lists no model: change {setting}") from None


def continuations(
    url: str,
    prompts: Sequence[str],
    *,
    model: str,
    max_new_tokens: int,
    batch_size: int,
    setting: str,
) -> Iterator[list[str]]:
    """Yields the greedy continuations of the prompts, a list for each batch of `batch_size`.

    Raises:
      UserError: the server does not answer, refuses a prompt, or answers in another shape.
    """
    for start in range(0, len(prompts), batch_size):
        batch = list(prompts[start : start + batch_size])
        body = {"model": model, "prompt": batch, "max_tokens": max_new_tokens, "temperature": 0}
        answer = _asked(url, "completions", body, setting)
        try:
            texts = {choice["index"]: str(choice["text"]) for choice in answer["choices"]}
            found = [texts[i] for i in range(len(batch))]
        except (LookupError, TypeError):
            raise UserError(
                f"{url}/completions did not answer with a choice for each of {len(batch)} prompts: change {setting}"
            ) from None
        yield found


def _asked(url: str, what: str, body: Any, setting: str) -> Any:
    """The JSON that the server answers."""
    parts = urllib.parse.urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise UserError(
            f"{setting} is {url!r}, expected a URL such as http://127.0.0.1:8000/v1: change {setting}"
        )
    handlers = [urllib.request.ProxyHandler({})] if parts.hostname in _LOCAL else []
    request = urllib.request.Request(
        f"{url.rstrip('/')}/{what}",
        data=None if body is None else json.dumps(body).encode(),
        headers={"Content-Type": "application/json"},
    )
    try:
        with urllib.request.build_opener(*handlers).open(request, timeout=_SECONDS) as response:
            return json.load(response)
    except urllib.error.HTTPError as error:
        raise UserError(f"{url}: {_refusal(error)}: change {setting}") from None
    except (OSError, http.client.HTTPException, ValueError) as error:
        found = first_line(getattr(error, "reason", None) or error)
        raise UserError(f"{url}: {found}: start the server, or change {setting}") from None


def _refusal(error: urllib.error.HTTPError) -> str:
    """What a server says in an error, in one line."""
    try:
        return str(json.load(error)["error"]["message"]).splitlines()[0]
    except (ValueError, LookupError, TypeError, OSError):
        return f"HTTP {error.code}"
