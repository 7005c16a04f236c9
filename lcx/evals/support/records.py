"""Prompts of key/value retrieval in their published forms, and the files of "Lost in the Middle"."""

import dataclasses
import functools
import gzip
import json
import pathlib
import uuid
from collections.abc import Callable, Sequence

import numpy as np

from lcx.errors import UserError

Pair = tuple[str, str]


@dataclasses.dataclass(frozen=True)
class Form:
    """A published form of the task.

    Attributes:
      prompt: the text for pairs, one of which is asked for.
      pair: new random pairs.
      answer_tokens: generated for an answer, as published.
      citation: where it is from.
    """

    prompt: Callable[[Sequence[Pair], str], str]
    pair: Callable[[np.random.Generator], Pair]
    answer_tokens: int
    citation: str


def _uuid(rng: np.random.Generator) -> str:
    return str(uuid.UUID(bytes=rng.bytes(16), version=4))


def _long_pair(rng: np.random.Generator) -> Pair:
    return _uuid(rng), _uuid(rng)


def _short_pair(rng: np.random.Generator) -> Pair:
    return _uuid(rng)[:8], _uuid(rng)[:4]


def _h2ogpt(pairs: Sequence[Pair], key: str) -> str:
    listed = "".join(f"'{k}' = '{v}'\n" for k, v in pairs)
    return f"## UUID key/value pairs to remember:\n\n{listed}\n\nWhat is the value of the key '{key}'?"


def _object(pairs: Sequence[Pair]) -> str:
    return "{" + ",\n ".join(f'"{key}": "{value}"' for key, value in pairs) + "}"


_EXTRACT = "Extract the value corresponding to the specified key in the JSON object below."


def _lost(pairs: Sequence[Pair], key: str) -> str:
    return f'{_EXTRACT}\n\nJSON data:\n{_object(pairs)}\n\nKey: "{key}"\nCorresponding value:'


def _helmet(pairs: Sequence[Pair], key: str) -> str:
    # Two solved examples, as in HELMET: the first pairs that are not asked for.
    shown = [pair for pair in pairs if pair[0] != key][:2]
    examples = "".join(f"Key: {k}\nCorresponding value: {v}\n\n" for k, v in shown)
    return f"{_object(pairs)}\n\n{_EXTRACT}\n\n{examples}Key: {key}\nCorresponding value:"


FORMS = {
    "uuid": Form(_h2ogpt, _short_pair, 256, "h2oGPT's test of long contexts"),
    "json": Form(_lost, _long_pair, 100, "Liu et al. 2023, arXiv 2307.03172"),
    "helmet": Form(
        _helmet, _long_pair, 100, "json_kv of HELMET, Yen et al. 2024, arXiv 2410.02694, two examples"
    ),
}


def distinct(form: Form, count: int, rng: np.random.Generator) -> list[Pair]:
    """New pairs, no two of which have the same key or value: a value that occurs twice could be found by chance."""
    keys: dict[str, None] = {}
    values: dict[str, None] = {}
    failed = 0
    while len(keys) < count:
        key, value = form.pair(rng)
        if key not in keys and value not in values:
            keys[key] = values[value] = None
            failed = 0
        elif (failed := failed + 1) > 1000:
            raise UserError(f"there are no {count} different values of this form: lower KeyValue.lengths")
    return list(zip(keys, values, strict=True))


@dataclasses.dataclass(frozen=True)
class Record:
    """A line of a file of "Lost in the Middle": pairs in order, and the one that is asked for."""

    pairs: list[Pair]
    key: str
    value: str

    def moved(self, place: int) -> list[Pair]:
        """The pairs with the asked one at this place."""
        others = [pair for pair in self.pairs if pair[0] != self.key]
        return [*others[:place], (self.key, self.value), *others[place:]]


@functools.lru_cache(maxsize=2)
def read(path: str) -> tuple[Record, ...]:
    """The records of kv-retrieval-*_keys.jsonl, compressed or not.

    Raises:
      UserError: it cannot be read, or a line has another layout.
    """
    place, number = pathlib.Path(path).expanduser(), 0  # of the line
    records = []
    try:
        data = place.read_bytes()
        text = (gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data).decode("utf-8")
        for number, line in enumerate(text.splitlines(), start=1):  # noqa: B007 (the message names it)
            if line.strip():
                row = json.loads(line)
                pairs = [(str(key), str(value)) for key, value in row["ordered_kv_records"]]
                if (row["key"], row["value"]) not in pairs:
                    raise ValueError("its key and value are not among its records")
                records.append(Record(pairs, row["key"], row["value"]))
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}; change KeyValue.file") from None
    except (ValueError, LookupError, TypeError, EOFError) as error:
        raise UserError(
            f"{path}, line {number}: {type(error).__name__}: {error}; expected ordered_kv_records, key and value in"
            " every line: change KeyValue.file"
        ) from None
    if not records:
        raise UserError(f"{path} holds no record; change KeyValue.file")
    return tuple(records)
