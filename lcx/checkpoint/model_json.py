"""Converts a model to plain JSON and back, so that a checkpoint also says which architecture its arrays belong to.

Modules and dataclasses are written as their class and the fields that differ from the defaults. Reading only
instantiates classes of lcx or of modules that the caller has already imported, so a checkpoint cannot make this
process import code.
"""

import dataclasses
import sys
from typing import Any

import flax.linen as nn

from lcx import moved
from lcx.errors import UserError

CLASS, FUNCTION, TUPLE = "class", "function", "tuple"
_FLAX_FIELDS = ("parent", "name")


def to_json(value: Any) -> Any:
    """Converts a dataclass, Linen module, function, tuple or plain value to a value that JSON can represent.

    Raises:
      UserError: a value that cannot be represented, such as a lambda or an array.
    """
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        out: dict[str, Any] = {CLASS: _path(type(value))}
        for field in dataclasses.fields(value):
            if field.name in _FLAX_FIELDS and isinstance(value, nn.Module):
                continue
            item = getattr(value, field.name)
            if item != field.default:
                out[field.name] = to_json(item)
        return out
    if isinstance(value, tuple | list):
        return {TUPLE: [to_json(item) for item in value]}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if callable(value):
        return {FUNCTION: _path(value)}
    raise UserError(
        f"cannot describe {type(value).__name__} in a checkpoint: expected plain values in the model's fields"
    )


def from_json(value: Any) -> Any:
    """The inverse of to_json.

    Raises:
      UserError: a class that does not exist or is not imported, or fields that it does not have.
    """
    if isinstance(value, dict):
        if TUPLE in value:
            return tuple(from_json(item) for item in value[TUPLE])
        if FUNCTION in value:
            return _find(value[FUNCTION])
        if CLASS in value:
            cls = _find(value[CLASS])
            fields = {key: from_json(item) for key, item in value.items() if key != CLASS}
            if issubclass(cls, nn.Module):
                fields["parent"] = None
            try:
                return cls(**fields)
            except TypeError as e:
                raise UserError(
                    f"the checkpoint describes {value[CLASS]} differently from this version of it: {e}"
                ) from None
        raise UserError(
            f"model description: expected one of {CLASS}, {FUNCTION}, {TUPLE}, found keys {sorted(value)[:5]}"
        )
    return value


def _path(obj: Any) -> str:
    module, name = getattr(obj, "__module__", "?"), getattr(obj, "__qualname__", f"<{type(obj).__name__}>")
    path = f"{module}:{name}"
    if "<" in path or module == "__main__":
        raise UserError(f"{path} cannot be found again by name: define it at the top level of an importable module")
    return moved.stored(path)


def _find(path: str) -> Any:
    module_name, _, name = moved.today(path).partition(":")
    if module_name.partition(".")[0] == "lcx":
        __import__(module_name)
    module = sys.modules.get(module_name)
    if module is None:
        raise UserError(
            f"the checkpoint uses {path}, and {module_name} is not imported: import it before loading, on a command"
            f" line by --import={module_name}"
        )
    obj = getattr(module, name, None)
    described = dataclasses.is_dataclass(obj) if isinstance(obj, type) else callable(obj)
    if obj is None or not described or getattr(obj, "__module__", None) != module_name:
        raise UserError(f"the checkpoint names {path}, which is not a class or function of {module_name}")
    return obj
