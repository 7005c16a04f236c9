"""Checks whether a configured value fits the annotation of its parameter.

This is done for every binding before anything is built. A value is converted only if nothing is lost: a list becomes
a tuple (frozen dataclasses must be hashable), an int becomes a float. An annotation that is not understood (a TypeVar,
an array type, a name that cannot be resolved) accepts every value, so that no valid configuration is rejected.
"""

from __future__ import annotations

import collections.abc
import dataclasses
import inspect
import os
import sys
import types
import typing
from collections.abc import Callable
from typing import Any

from lcx.wording import quantity

_SEQUENCES = (list, collections.abc.Sequence, collections.abc.Iterable, collections.abc.Collection)
_MAPPINGS = (dict, collections.abc.Mapping, collections.abc.MutableMapping)


class Mismatch(TypeError):
    """The value does not fit the annotation. The message says what was expected and what was found."""


@dataclasses.dataclass(frozen=True)
class Promise:
    """A value that is created later.

    Attributes:
      source: a function or class.
      called: whether the value is the result of calling `source`, or else `source` itself.
    """

    source: Any
    called: bool

    @property
    def produces(self) -> Any:
        if inspect.isclass(self.source):
            return self.source
        return hints_of(self.source).get("return", Any)


def hints_of(source: Any) -> dict[str, Any]:
    """{parameter name: annotation} of a function or class, without annotations that cannot be resolved."""
    holder = source
    if inspect.isclass(source) and not dataclasses.is_dataclass(source):
        holder = source.__init__
    try:
        return typing.get_type_hints(holder)
    except Exception:  # one unresolved forward reference must not hide the other parameters
        pass
    hints = {}
    for name, raw in _raw_annotations(holder).items():
        try:
            module = vars(sys.modules[getattr(holder, "__module__", "builtins")])
            hints[name] = eval(raw, dict(module)) if isinstance(raw, str) else raw
        except Exception:
            continue
    return hints


def _raw_annotations(holder: Any) -> dict[str, Any]:
    raw: dict[str, Any] = {}
    for base in reversed(holder.__mro__ if inspect.isclass(holder) else (holder,)):
        raw |= inspect.get_annotations(base)
    return raw


def fit(value: Any, annotation: Any, promised: Callable[[Any], Promise | None] = lambda value: None) -> Any:
    """Returns `value`, converted to the type of `annotation` if that loses nothing.

    Args:
      value: the configured value; containers may hold values that are created later.
      annotation: a resolved annotation.
      promised: returns a Promise for a value that is created later, else None.

    Raises:
      Mismatch: the value does not fit.
    """
    annotation = _plain(annotation)
    if isinstance(value, str) and "\0" in value:  # no text has one, and no path may
        raise Mismatch(f"expected text without the character NUL, found {value!r}")
    if _is_unknown(annotation):
        return value
    promise = promised(value)
    if promise is not None:
        return _fit_promise(value, promise, annotation)
    origin = typing.get_origin(annotation) or annotation
    arguments = typing.get_args(annotation)
    if origin in (typing.Union, types.UnionType):
        return _fit_union(value, annotation, promised)
    if origin is typing.Literal:
        if any(value == choice and type(value) is type(choice) for choice in arguments):
            return value
    elif origin is tuple and isinstance(value, (tuple, list)):
        return tuple(_fit_items(value, arguments, annotation, promised))
    elif origin in _SEQUENCES:  # a str does not count as one
        if isinstance(value, (tuple, list)):
            items = [fit(item, arguments[0], promised) for item in value] if arguments else list(value)
            return items if origin is list else tuple(items)
    elif origin in _MAPPINGS and isinstance(value, dict):
        key, item = arguments if len(arguments) == 2 else (Any, Any)
        return {fit(k, key, promised): fit(v, item, promised) for k, v in value.items()}
    elif origin is float and type(value) is int:
        return float(value)
    elif origin in (bool, int, float, str):
        if type(value) is origin:  # not isinstance, because bool is a subclass of int
            return value
    elif origin is collections.abc.Callable or origin is type or getattr(origin, "_is_protocol", False):
        pass  # a literal value is never a function, class or protocol
    elif isinstance(origin, type):
        if isinstance(value, origin) or (issubclass(origin, os.PathLike) and isinstance(value, str)):
            return value
    else:
        return value
    raise Mismatch(f"expected {describe(annotation)}, found {_found(value, annotation)}")


def _fit_union(value: Any, annotation: Any, promised: Callable[[Any], Promise | None]) -> Any:
    """Prefers a member of the union that accepts the value unchanged: 3 stays an int for `float | int`."""
    fitted = []
    for arm in typing.get_args(annotation):
        try:
            fitted.append(fit(value, arm, promised))
        except Mismatch:
            continue
    if not fitted:
        raise Mismatch(f"expected {describe(annotation)}, found {_found(value, annotation)}")
    return next((item for item in fitted if type(item) is type(value)), fitted[0])


def _fit_items(
    value: Any, arguments: tuple, annotation: Any, promised: Callable[[Any], Promise | None]
) -> list:
    if annotation is tuple:
        return list(value)
    if len(arguments) == 2 and arguments[1] is Ellipsis:
        return [fit(item, arguments[0], promised) for item in value]
    if len(arguments) != len(value):
        raise Mismatch(f"expected {describe(annotation)}, found {quantity(len(value), 'value')}")
    return [fit(item, wanted, promised) for item, wanted in zip(value, arguments, strict=True)]


def _fit_promise(value: Any, promise: Promise, annotation: Any) -> Any:
    name = getattr(promise.source, "__name__", str(promise.source))
    if promise.called:
        if not _assignable(promise.produces, annotation):
            raise Mismatch(
                f"expected {describe(annotation)}, found @{name}(), a {describe(promise.produces)}"
            )
    elif not _takes_uncalled(promise.source, annotation):
        kind = "class" if inspect.isclass(promise.source) else "function"
        raise Mismatch(
            f"expected {describe(annotation)}, found the {kind} {name} itself: write @{name}() to call it"
        )
    return value


def _takes_uncalled(source: Any, wanted: Any) -> bool:
    wanted = _plain(wanted)
    if _is_unknown(wanted):
        return True
    origin = typing.get_origin(wanted) or wanted
    if origin in (typing.Union, types.UnionType):
        return any(_takes_uncalled(source, arm) for arm in typing.get_args(wanted))
    if origin is type:
        return inspect.isclass(source)
    return origin is collections.abc.Callable or getattr(origin, "_is_protocol", False)


def _assignable(produced: Any, wanted: Any) -> bool:
    produced, wanted = _plain(produced), _plain(wanted)
    if _is_unknown(produced) or _is_unknown(wanted):
        return True
    source, target = (typing.get_origin(kind) or kind for kind in (produced, wanted))
    if target in (typing.Union, types.UnionType):
        return any(_assignable(produced, arm) for arm in typing.get_args(wanted))
    if source in (typing.Union, types.UnionType):
        return any(_assignable(arm, wanted) for arm in typing.get_args(produced))
    if target is collections.abc.Callable:
        calls = inspect.isclass(source) and any("__call__" in vars(base) for base in source.__mro__)
        return calls or source is collections.abc.Callable
    if not (inspect.isclass(source) and inspect.isclass(target)):
        return True
    if getattr(target, "_is_protocol", False):
        return not _lacks(source, target)
    return issubclass(source, target) or (target is float and source is int)


def _lacks(source: type, protocol: Any) -> list[str]:
    """The public members of a protocol that a class has neither as an attribute nor as a field."""
    wanted = [name for name in vars(protocol) if not name.startswith("_") or name == "__call__"]
    known = {name for base in source.__mro__ for name in (*vars(base), *inspect.get_annotations(base))}
    return [name for name in wanted if name not in known]


def _plain(annotation: Any) -> Any:
    """The underlying type of an alias, NewType, Annotated, InitVar, Final or ClassVar."""
    while True:
        if annotation is None:
            return types.NoneType
        if hasattr(annotation, "__supertype__"):
            annotation = annotation.__supertype__
        elif isinstance(annotation, dataclasses.InitVar):
            annotation = annotation.type
        elif type(annotation).__name__ == "TypeAliasType":  # `type X = ...` of Python 3.12
            annotation = annotation.__value__
        elif hasattr(annotation, "__metadata__"):
            annotation = annotation.__origin__
        elif typing.get_origin(annotation) in (typing.Final, typing.ClassVar):
            annotation = typing.get_args(annotation)[0]
        else:
            return annotation


def _is_unknown(annotation: Any) -> bool:
    return (
        annotation in (Any, object, inspect.Parameter.empty)
        or isinstance(annotation, (typing.TypeVar, str, typing.ForwardRef))
        or getattr(type(annotation), "__module__", "").startswith("jaxtyping")  # arrays are never literals
    )


def describe(annotation: Any) -> str:
    """An annotation as it is written in source code, without module names."""
    annotation = _plain(annotation)
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if annotation is types.NoneType:
        return "None"
    if origin in (typing.Union, types.UnionType):
        return " | ".join(describe(arm) for arm in arguments)
    if origin is typing.Literal:
        return " or ".join(repr(choice) for choice in arguments)
    if (origin or annotation) is collections.abc.Callable or annotation is typing.Callable:
        return "a function"
    name = getattr(origin or annotation, "__name__", str(annotation))
    if origin is None or not arguments:
        return name
    return f"{name}[{', '.join('...' if item is Ellipsis else describe(item) for item in arguments)}]"


def _found(value: Any, annotation: Any) -> str:
    text = repr(value)
    text = text if len(text) <= 60 else text[:57] + "..."
    if isinstance(value, float) and value.is_integer() and int in (annotation, *typing.get_args(annotation)):
        return f"{text}: write {int(value)}"
    return f"{text} ({type(value).__name__})"
