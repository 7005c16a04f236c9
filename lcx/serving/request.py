"""A request for completions in OpenAI's shape: JSON in, a checked `Request` out.

Source: https://platform.openai.com/docs/api-reference/completions. A field that would change the text and is not
supported is refused instead of ignored.
"""

import dataclasses
import math
from typing import Any

from lcx.errors import UserError

MAX_COMPLETIONS = 64  # of one request: rows of its batch
MAX_LOGPROBS = 20
_MAX_STOPS = 16
_UNSUPPORTED = {  # the values with which these fields change nothing
    "suffix": (None, ""),
    "presence_penalty": (None, 0),
    "frequency_penalty": (None, 0),
    "logit_bias": (None, {}),
    "stream": (None, False),
    "stream_options": (None,),
}


class RequestError(UserError):
    """A request that cannot be answered: one line, and the field that is wrong (None: the request as a whole)."""

    def __init__(self, message: str, *, field: str | None = None):
        super().__init__(message)
        self.field = field


@dataclasses.dataclass(frozen=True)
class Request:
    """What to complete and how; the fields and defaults of OpenAI's.

    Attributes:
      prompts: each a text, or a list of token ids.
      max_tokens: of a completion; 0 generates nothing, which needs `echo`.
      temperature, top_p: as in lcx.generate; temperature 0 takes the likeliest token.
      n: completions of each prompt.
      stop: texts at which a completion ends; they are not part of it.
      seed: for sampling; None: another one for each request.
      echo: whether the prompt comes before the completion.
      logprobs: the log-probability of each token and of so many of the likeliest; None: none.
      model: the name that the client gave; None: none.
    """

    prompts: tuple[str | tuple[int, ...], ...]
    max_tokens: int = 16
    temperature: float = 1.0
    top_p: float = 1.0
    n: int = 1
    stop: tuple[str, ...] = ()
    seed: int | None = None
    echo: bool = False
    logprobs: int | None = None
    model: str | None = None


def parsed(body: Any) -> Request:
    """The request that a JSON value holds.

    Raises:
      RequestError: it is no object, a field is unknown or unsupported, or a value is out of range.
    """
    if not isinstance(body, dict):
        raise RequestError(f"the request is {_kind(body)}, expected a JSON object with a prompt")
    known = {field.name for field in dataclasses.fields(Request)} - {"prompts"} | {
        "prompt",
        "best_of",
        "user",
    }
    for name, value in body.items():
        if name in _UNSUPPORTED:
            if value not in _UNSUPPORTED[name]:
                raise RequestError(f"{name} is not supported by this server: leave it out", field=name)
        elif name not in known:
            raise RequestError(f"{name!r} is no field of a completion: leave it out", field=name)
    given = {name: value for name, value in body.items() if value is not None}
    request = Request(
        prompts=_prompts(given.get("prompt")),
        max_tokens=_integer(given, "max_tokens", 16, 0, 1 << 24),
        temperature=_number(given, "temperature", 1.0, 0.0, 100.0),
        top_p=_number(given, "top_p", 1.0, 1e-9, 1.0),
        n=_integer(given, "n", 1, 1, MAX_COMPLETIONS),
        stop=_stops(given.get("stop", ())),
        seed=_integer(given, "seed", 0, -(2**31), 2**32 - 1) if "seed" in given else None,
        echo=_of(given, "echo", bool, False),
        logprobs=_integer(given, "logprobs", 0, 0, MAX_LOGPROBS) if "logprobs" in given else None,
        model=_of(given, "model", str, None),
    )
    if _integer(given, "best_of", request.n, 1, MAX_COMPLETIONS) != request.n:
        raise RequestError(f"best_of is {body['best_of']}, expected n, which is {request.n}", field="best_of")
    if request.max_tokens == 0 and not request.echo:
        raise RequestError(
            "max_tokens is 0 and echo is not set, so there is nothing to answer", field="max_tokens"
        )
    if len(request.prompts) * request.n > MAX_COMPLETIONS:
        found = f"{len(request.prompts)} prompts with n {request.n}"
        raise RequestError(
            f"{found}, expected at most {MAX_COMPLETIONS} completions: send fewer", field="prompt"
        )
    return request


def _prompts(value: Any) -> tuple[str | tuple[int, ...], ...]:
    """A text, several, the ids of one, or of several, as OpenAI takes them."""
    if isinstance(value, str) or (isinstance(value, list) and value and all(map(_is_id, value))):
        value = [value]
    if not isinstance(value, list) or not value:
        raise RequestError(
            "prompt is missing or empty, expected text, a list of texts, or lists of token ids",
            field="prompt",
        )
    found: list[str | tuple[int, ...]] = []
    for one in value:
        if isinstance(one, str):
            found.append(one)
        elif isinstance(one, list) and one and all(map(_is_id, one)):
            found.append(tuple(one))
        else:
            raise RequestError(f"a prompt is {_kind(one)}, expected text or token ids", field="prompt")
    return tuple(found)


def _is_id(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**31


def _stops(value: Any) -> tuple[str, ...]:
    stops = (value,) if isinstance(value, str) else value
    if not isinstance(stops, list | tuple) or not all(isinstance(text, str) and text for text in stops):
        raise RequestError("stop is no text and no list of texts: change stop", field="stop")
    if len(stops) > _MAX_STOPS:
        raise RequestError(f"stop has {len(stops)} texts, expected at most {_MAX_STOPS}", field="stop")
    return tuple(stops)


def _of(given: dict[str, Any], name: str, kind: type, default: Any) -> Any:
    value = given.get(name, default)
    if name in given and not isinstance(value, kind):
        expected = {bool: "true or false", str: "text"}[kind]
        raise RequestError(f"{name} is {_kind(value)}, expected {expected}", field=name)
    return value


def _integer(given: dict[str, Any], name: str, default: int, least: int, most: int) -> int:
    value = given.get(name, default)
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
        raise RequestError(
            f"{name} is {_shown(value)}, expected an integer from {least} to {most}", field=name
        )
    return value


def _number(given: dict[str, Any], name: str, default: float, least: float, most: float) -> float:
    value = given.get(name, default)
    if not isinstance(value, int | float) or isinstance(value, bool) or not least <= value <= most:
        raise RequestError(
            f"{name} is {_shown(value)}, expected a number from {least:g} to {most:g}", field=name
        )
    return float(value)


def _shown(value: Any) -> str:
    short = isinstance(value, int | float) and math.isfinite(value) and abs(value) < 1e20
    return str(value) if short else _kind(value)


def _kind(value: Any) -> str:
    kinds = {dict: "an object", list: "a list", str: "text", bool: "true or false", type(None): "null"}
    return kinds.get(type(value), "a number out of range")
