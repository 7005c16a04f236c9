"""The fields of a RoPE setting: which ones each type requires or accepts, and their valid values."""

import dataclasses
import difflib
import math
from collections.abc import Sequence
from typing import Any, TypeGuard

import numpy as np

from lcx.errors import UserError

# For each type: (required fields, optional fields). Every type also has those of SHARED.
SHARED = ("rope_type", "rope_theta", "partial_rotary_factor", "original_max_position_embeddings")
FIELDS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "default": ((), ("inv_freq",)),
    "linear": (("factor",), ("inv_freq",)),
    "ntk": (("factor",), ()),
    "dynamic": (("factor", "original_max_position_embeddings"), ()),
    "yarn": (
        ("factor", "original_max_position_embeddings"),
        ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"),
    ),
    "longrope": (
        ("short_factor", "long_factor", "original_max_position_embeddings"),
        ("factor", "attention_factor"),
    ),
    "llama3": (("factor", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor"), ()),
    "proportional": ((), ("factor",)),
}
_LISTS = ("short_factor", "long_factor", "inv_freq")
_POSITIVE = ("attention_factor", "low_freq_factor", "high_freq_factor")
_UNSET_BY_ZERO = ("beta_fast", "beta_slow", "mscale", "mscale_all_dim")  # 0 means unset, as in transformers
MOST_TOKENS = 2**31 - 1  # positions are int32


def shown(value: Any, most: int = 80) -> str:
    """The repr of a value, truncated to `most` characters for a message."""
    text = repr(value)
    return text if len(text) <= most else f"{text[: most - 3]}..."


def canonical(name: str, value: Any) -> Any:
    """The value in the type of its field (float, int, bool, tuple of floats). Raises UserError if it is invalid."""
    if name == "rope_type" or (value is None and name not in ("rope_theta", "partial_rotary_factor")):
        return value
    if name == "truncate":
        if not isinstance(value, bool):
            raise UserError(f"truncate is {shown(value)}, expected true or false: change truncate")
        return value
    if name in _LISTS:
        if isinstance(value, str) or not isinstance(value, Sequence) or not value:
            raise UserError(f"{name} is {shown(value)}, expected a list of numbers: change {name}")
        numbers = tuple(canonical(f"{name}[{i}]", v) for i, v in enumerate(value))
        wrong = next((i for i, number in enumerate(numbers) if number <= 0), None)
        if wrong is not None and name != "inv_freq":  # a frequency of 0 is valid: a pair that is not rotated
            raise UserError(f"{name}[{wrong}] is {numbers[wrong]:g}, expected more than 0: change {name}")
        return numbers
    if not is_number(value):
        raise UserError(f"{name} is {shown(value)}, expected a number: set {name}")
    return token_count(name, value) if name == "original_max_position_embeddings" else float(value)


def is_number(value: Any) -> TypeGuard[float]:
    """Whether the value is a finite number; a bool does not count as one."""
    if isinstance(value, bool) or not isinstance(value, (int, float, np.number)):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer beyond the range of float
        return False


def token_count(name: str, value: Any) -> int:
    """The value as a number of tokens: 4096.0 is accepted; 4096.5, "4096" and null raise UserError."""
    if not is_number(value) or value != int(value) or not 1 <= value <= MOST_TOKENS:
        raise UserError(
            f"{name} is {shown(value)}, expected a whole number of tokens from 1 to 2^31 - 1: change {name}"
        )
    return int(value)


def check(rope: Any) -> None:
    """Raises UserError if the fields of a Rope are invalid or inconsistent. A custom type checks its own fields."""
    for name, at_least, bound in (
        ("rope_theta", False, 1.0),
        ("factor", True, 1.0),
        ("partial_rotary_factor", True, 0.0),
        *((name, False, 0.0) for name in _POSITIVE),
        *((name, True, 0.0) for name in _UNSET_BY_ZERO),
    ):
        value = getattr(rope, name)
        if value is not None and (value < bound or (value == bound and not at_least)):
            words = "at least" if at_least else "more than"
            raise UserError(f"{name} is {value:g}, expected {words} {bound:g}: change {name}")
    for name, most in (("partial_rotary_factor", 1.0), ("factor", 1e9), ("rope_theta", 1e30)):
        value = getattr(rope, name)
        if value is not None and value > most:
            raise UserError(f"{name} is {value:g}, expected at most {most:g}: change {name}")
    if not callable(rope.rope_type):
        _check_fields(rope, known_type(rope.rope_type))


def _check_fields(rope: Any, name: str) -> None:
    """Raises UserError if a field that the type requires is missing, or a field is set that it would ignore."""
    needed(rope, *FIELDS[name][0])
    for field in dataclasses.fields(rope):
        known = FIELDS[name][0] + FIELDS[name][1] + SHARED
        if field.name not in known and getattr(rope, field.name) != field.default:
            users = " and ".join(t for t in FIELDS if field.name in FIELDS[t][0] + FIELDS[t][1])
            found = f"{field.name} has no effect on rope_type {name!r}, it belongs to {users}"
            raise UserError(f"{found}: remove it or change rope_type")
    if name == "longrope" and rope.factor is None and rope.attention_factor is None:
        raise UserError("rope_type 'longrope' has neither factor nor attention_factor: set one of them")
    low, high = rope.low_freq_factor, rope.high_freq_factor
    if name == "llama3" and low is not None and high is not None and high < low:
        raise UserError(f"high_freq_factor is {high:g}, expected at least low_freq_factor = {low:g}")
    fast, slow = rope.beta_fast or 32, rope.beta_slow or 1
    if fast < slow:
        raise UserError(f"beta_fast is {fast:g}, expected at least beta_slow = {slow:g}")


def needed(rope: Any, *names: str) -> tuple[Any, ...]:
    """The values of these fields of a Rope. Raises UserError if one is None."""
    for name in names:
        if getattr(rope, name) is None:
            title = getattr(rope.rope_type, "__name__", rope.rope_type)
            raise UserError(f"rope_type {title!r} has no {name}, which it requires: set {name}")
    return tuple(getattr(rope, name) for name in names)


def known_type(name: Any) -> str:
    """The name if it is a known type. Else raises UserError with the known names and the closest one."""
    if isinstance(name, str) and name in FIELDS:
        return name
    hint = close(str(name).lower()[:40], FIELDS)
    raise UserError(f"unknown rope_type {shown(name)}: {hint}change it to one of {', '.join(FIELDS)}")


def close(name: str, known: Any) -> str:
    """'did you mean X? ' with the closest known name, or "" if none is close."""
    found = difflib.get_close_matches(name, known, n=1, cutoff=0.65)
    return f"did you mean {found[0]!r}? " if found else ""


def check_keys(given: Any, source: str) -> None:
    """Raises UserError for an unknown key of `rope_scaling`: ignoring it would silently give a different model."""
    known = [name for name in _NAMES if name != "inv_freq"]
    for key in given:
        if key not in known:
            hint = close(str(key), known)
            raise UserError(f"unknown key {shown(key)} in {source}: {hint}known keys are {', '.join(known)}")


_NAMES = (
    *SHARED, "type", "factor", "attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim",
    "truncate", "low_freq_factor", "high_freq_factor", *_LISTS,
)  # fmt: skip
