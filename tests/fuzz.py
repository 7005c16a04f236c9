"""Damaged files, the same every time (changes of JSON documents and of bytes), and what a reader makes of them.

for case in json_cases(document, count=50, seed=0):
    outcome = tried(lambda: read(write(case)), seconds=20)
    assert outcome.kind in ("value", "refused"), (case.name, outcome)
"""

import copy
import dataclasses
import json
import random
import signal
import traceback
from collections.abc import Callable, Iterator
from typing import Any

from lcx.errors import UserError

DEEP = 100_000
ODD = (
    None,
    True,
    False,
    0,
    -1,
    10**30,
    1e308,
    float("nan"),
    float("inf"),
    "",
    "x" * 100_000,
    [],
    {},
    "\ud800",
)


@dataclasses.dataclass(frozen=True)
class Case:
    """A damaged file, and what was done to it."""

    name: str
    data: bytes


@dataclasses.dataclass(frozen=True)
class Outcome:
    """value: it was read; refused: a UserError of one line; traceback: anything else was raised; hang: no end."""

    kind: str
    detail: Any = None


def places(value: Any, path: tuple = ()) -> Iterator[tuple]:
    """The path of every value inside a JSON document."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield (*path, key)
        yield from places(item, (*path, key))


def json_cases(document: Any, *, count: int, seed: int) -> Iterator[Case]:
    """`count` structural changes of a document: another type or number, no value, twice, nested, renamed."""
    chance = random.Random(seed)
    found = list(places(document))
    for _ in range(count):
        changed = copy.deepcopy(document)
        path = chance.choice(found)
        parent = changed
        for key in path[:-1]:
            parent = parent[key]
        what = chance.choice(("odd", "odd", "other", "delete", "duplicate", "nest", "rename", "deep"))
        text = _change(changed, parent, path[-1], what, chance, document, found)
        yield Case(f"{what} at {'/'.join(map(str, path))}", text)


def _change(whole, parent, key, what, chance: random.Random, document, found) -> bytes:
    if what == "odd":
        parent[key] = chance.choice(ODD)
    elif what == "other":  # a value from elsewhere in the document
        value = document
        for step in chance.choice(found):
            value = value[step]
        parent[key] = copy.deepcopy(value)
    elif what == "delete":
        del parent[key]
    elif what == "nest":
        parent[key] = [parent[key]]
    elif what == "deep":
        parent[key] = "DEEP"
        return json.dumps(whole).replace('"DEEP"', "[" * DEEP + "]" * DEEP).encode()
    elif isinstance(parent, list):
        parent.append(copy.deepcopy(parent[key]))
    elif what == "rename":
        parent[f"{key}_"] = parent.pop(key)
    else:  # the same key twice, with another value
        parent["TWICE"] = chance.choice(ODD)
        return json.dumps(whole).replace('"TWICE"', json.dumps(key)).encode()
    return json.dumps(whole).encode()


def byte_cases(data: bytes, *, count: int, seed: int) -> Iterator[Case]:
    """`count` changes of bytes: flipped, cut off, a piece removed, repeated or replaced."""
    chance = random.Random(seed)
    for _ in range(count):
        first = chance.randrange(max(len(data), 1))
        last = min(len(data), first + chance.choice((1, 2, 8, 64)))
        what = chance.choice(("flip", "cut", "remove", "repeat", "random"))
        middle = {
            "flip": bytes(x ^ (1 << chance.randrange(8)) for x in data[first:last]),
            "repeat": data[first:last] * chance.choice((2, 1000)),
            "random": chance.randbytes(last - first),
        }.get(what, b"")
        yield Case(f"{what} {first}:{last}", data[:first] + middle + (b"" if what == "cut" else data[last:]))


def tried(call: Callable[[], Any], *, seconds: int = 20) -> Outcome:
    """What a call gives, within so many seconds (in the main thread; code that never returns to Python hangs on)."""

    def late(*_):
        raise TimeoutError("fuzz: no end")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    try:
        return Outcome("value", call())
    except UserError as error:
        return Outcome("traceback" if "\n" in str(error) else "refused", str(error))
    except TimeoutError:
        return Outcome("hang")
    except Exception:
        return Outcome("traceback", traceback.format_exc())
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
