"""Validated reading of values of config.json."""

import math
from collections.abc import Mapping
from typing import Any

from lcx.errors import UserError
from lcx.rope_fields import shown


def integer(config: Mapping[str, Any], key: str, default: int | None = None, *, least: int = 1) -> int:
    """An integer. Raises UserError unless it is from `least` to 2^31 - 1, or if it is missing without a default."""
    value = config.get(key)
    value = default if value is None else value
    if value is None:
        raise UserError(f"config.json has no {key}; it is needed")
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value < 2**31:
        raise UserError(
            f"config.json has {key} = {shown(value)}, expected an integer from {least} to 2^31 - 1"
        )
    return value


def fraction(config: Mapping[str, Any], key: str, default: float) -> float:
    """A number. Raises UserError unless it is between 0 and 1."""
    value = config.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1:
        raise UserError(f"config.json has {key} = {shown(value)}, expected a number between 0 and 1")
    return float(value)


def boolean(config: Mapping[str, Any], key: str) -> bool:
    """A boolean; False if missing or null. Raises UserError for any other value."""
    value = config.get(key)
    value = False if value is None else value
    if not isinstance(value, bool):
        raise UserError(f"config.json has {key} = {shown(value)}, expected true or false")
    return value


def number(config: Mapping[str, Any], key: str, default: float) -> float:
    """A positive number. Raises UserError for any other value."""
    value = config.get(key)
    value = default if value is None else value
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise UserError(f"config.json has {key} = {shown(value)}, expected a positive number")
    return value


def cap(config: Mapping[str, Any], key: str, default: float | None) -> float | None:
    """A positive number, or None where config.json says null; `default` if it says nothing."""
    value = config.get(key, default)
    return None if value is None else number({key: value}, key, 1.0)


def nonnegative(config: Mapping[str, Any], key: str, default: float) -> float:
    """A number of at least 0. Raises UserError for any other value."""
    value = config.get(key)
    return 0.0 if value == 0 and not isinstance(value, bool) else float(number(config, key, default))
