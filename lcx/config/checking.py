"""Checks a configuration that has been read: types, macros, missing parameters.

It also lists the bindings that can have no effect, before a run, and those that had none, after it.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Iterable, Iterator
from typing import Any

import gin
from gin import config as gin_config

from lcx.config import names, typecheck
from lcx.config.flags import hint
from lcx.config.reading import MACRO, Key, Source, spell

Use = tuple[str, tuple[str, ...], str | None]  # full name of what is called, its scopes, the "file:line" of the call


def check(source: Source) -> None:
    """Adds every mistake to `source.problems`, and converts values where an annotation requires it (list to tuple)."""
    unset: dict[Key, str] = {}
    for (scope, selector), bound in list(gin_config._CONFIG.items()):
        wrapped = gin_config._REGISTRY[selector].wrapped
        hints = typecheck.hints_of(wrapped)
        for name, value in list(bound.items()):
            key = (scope, selector, name)
            inlined = _inline(value, key, source)
            if selector == MACRO:  # a macro has no type of its own; it is checked wherever it is used
                continue
            try:
                fitted = typecheck.fit(inlined, hints.get(name, Any), _promise)
            except typecheck.Mismatch as error:
                message = f"{spell(key)}: {error}{_example(wrapped, key)}"
                if _is_unset(value, inlined):
                    macro = "/".join(value.scopes)
                    unset[key] = f"{message}; set {macro}, as in --gin.{macro}=VALUE"
                else:
                    source.problem(message, source.places.get(key))
                continue
            if repr(fitted) != repr(inlined):
                bound[name] = fitted
    _check_flag_macros(source)
    uses = None if source.target is None else list(_uses(source))
    for key, message in unset.items():
        if uses is None or _decides(key, uses):
            source.problem(message, source.places.get(key))
    if uses is not None and not source.problems:
        for use in uses:
            _report_missing(source, *use)


def _is_unset(value: Any, inlined: Any) -> bool:
    """Whether the value is a macro that a file sets to None for the user to fill in.

    That is an error only if something that will be built uses it.
    """
    return inlined is None and value is not None


def _decides(key: Key, uses: Iterable[Use]) -> bool:
    """Whether the binding sets a value in something that will be built, instead of being overridden there."""
    scope, selector, name = key
    for built, scopes, _ in uses:
        if built == selector:
            partial = ["/".join(scopes[:depth]) for depth in range(len(scopes), -1, -1)]
            bound = (one for one in partial if name in gin_config._CONFIG.get((one, selector), {}))
            if next(bound, None) == scope:
                return True
    return False


def _example(wrapped: Any, key: Key) -> str:
    """An example of how to write a field in a .gin file, if the metadata of the dataclass field has one."""
    fields = dataclasses.fields(wrapped) if dataclasses.is_dataclass(wrapped) else ()
    examples = (field.metadata.get("example") for field in fields if field.name == key[2])
    found = next((example for example in examples if example), None)
    return f"; write it as {spell(key)} = {found}" if found else ""


def _promise(value: Any) -> typecheck.Promise | None:
    if isinstance(value, names.Unresolved):
        return typecheck.Promise(lambda: None, called=True)
    if isinstance(value, gin_config.ConfigurableReference):
        return typecheck.Promise(value.configurable.wrapped, called=value.evaluate)
    return None


def _inline(value: Any, key: Key, source: Source, chain: tuple[Key, ...] = ()) -> Any:
    """`value` with macros and constants replaced by their values.

    Args:
      value: may be nested in lists, tuples and dicts.
      key: the binding that holds it.
      source: receives problems, such as a macro that is not defined.
      chain: the macros being expanded, to detect one that refers to itself.
    """
    if isinstance(value, dict):
        return {name: _inline(item, key, source, chain) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_inline(item, key, source, chain) for item in value)
    if not isinstance(value, gin_config.ConfigurableReference):
        return value
    if value.configurable.wrapped is gin_config._retrieve_constant:
        constant = value.scoped_configurable_fn()
        if constant is not gin.REQUIRED:
            return constant
        source.problem(f"{spell(key)} must be set", source.places.get(key))
        return names.Unresolved()
    if value.configurable.selector != MACRO:
        return value
    macro = ("/".join(value.scopes), MACRO, "value")
    bound = gin_config._get_bindings(MACRO, value.scopes)
    if macro in chain:
        source.problem(f"macro {spell(macro)} is defined by itself", source.places.get(macro))
    elif "value" in bound:
        return _inline(bound["value"], macro, source, (*chain, macro))
    else:
        defined = [scope for scope, selector in gin_config._CONFIG if selector == MACRO]
        source.problem(
            f"macro {spell(macro)} is not defined{hint(macro[0], defined)}", source.places.get(key)
        )
    return names.Unresolved()


def _check_flag_macros(source: Source) -> None:
    """Reports a macro that is set on the command line but defined or used in no file: it must be a typo."""
    known = source.macros | {
        "/".join(reference.scopes)
        for reference in gin_config.iterate_references(gin_config._CONFIG)
        if reference.configurable.selector == MACRO
    }
    for (scope, selector, _), place in source.places.items():
        if selector == MACRO and place.startswith("--gin.") and scope not in known:
            source.problem(f"no .gin file has a macro {scope}{hint(scope, known)}", place)


def _uses(source: Source) -> Iterator[Use]:
    """Every call of a function or class that the references from the target lead to."""
    for reached, place, called in _references(source):
        if called:
            yield *reached, place


def _roots(source: Source) -> list[tuple[str, tuple[str, ...]]]:
    """The target, if any binding names it."""
    module, _, function = str(source.target).partition(":")
    return [
        (selector, ())
        for selector, configurable in gin_config._REGISTRY.items()
        if configurable.wrapped.__module__ == module and configurable.wrapped.__qualname__ == function
    ]


def _references(source: Source) -> Iterator[tuple[tuple[str, tuple[str, ...]], str | None, bool]]:
    """Follows the references from the target as gin will: (full name, scopes), "file:line", whether it is called."""
    todo = _roots(source)
    seen = set(todo)
    while todo:
        selector, scopes = todo.pop()
        for name, value in gin_config._get_bindings(selector, list(scopes)).items():
            place = _place(source, scopes, selector, name)
            inlined = _inline(value, ("", selector, name), source)
            for reference in gin_config.iterate_references([inlined]):
                reached = (reference.configurable.selector, tuple(reference.scopes) or scopes)
                yield reached, place, reference.evaluate
                if reached not in seen:
                    seen.add(reached)
                    todo.append(reached)


def _report_missing(source: Source, selector: str, scopes: tuple[str, ...], place: str | None) -> None:
    configurable = gin_config._REGISTRY[selector]
    bound = gin_config._get_bindings(selector, list(scopes))
    for name, parameter in inspect.signature(configurable.wrapped).parameters.items():
        variadic = parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
        if parameter.default is parameter.empty and not variadic and name not in bound:
            key = ("/".join(scopes), selector, name)
            message = (
                f"{configurable.name} needs {name!r}: set {spell(key)}{_example(configurable.wrapped, key)}"
            )
            if place not in source.problems.get(message, ()):
                source.problem(message, place)


def _place(source: Source, scopes: tuple[str, ...], selector: str, name: str) -> str | None:
    keys = [("/".join(scopes[:depth]), selector, name) for depth in range(len(scopes), -1, -1)]
    return next((source.places[key] for key in keys if key in source.places), None)


def _settings(source: Source) -> Iterator[tuple[Key, str]]:
    """The bindings that may be listed as without effect, with their places.

    Macros are not, nor are bindings to a macro without a value: a file may offer such a macro for settings that
    another binding overrides.
    """
    for key, place in source.places.items():
        scope, selector, name = key
        value = gin_config._CONFIG.get((scope, selector), {}).get(name)
        if selector != MACRO and not _is_unset(value, _inline(value, key, source)):
            yield key, place


def unreached(source: Source) -> dict[Key, str]:
    """One line for each binding of a function or class that no reference from the target leads to."""
    reached = {selector for selector, _ in _roots(source)}
    reached |= {selector for (selector, _), _, _ in _references(source)}
    return {
        key: f"{spell(key)} has no effect: nothing that the run builds refers to {key[1].rpartition('.')[2]} ({place})"
        for key, place in _settings(source)
        if key[1] not in reached
    }


def without_effect(source: Source, flags: dict[str, Any]) -> list[str]:
    """One line for each binding that had no effect on the run that just ended, but those that `unreached` lists."""
    lines = []
    known = unreached(source)
    for key, place in _settings(source):
        scope, selector, name = key
        if key in known:
            continue
        used = any(
            name in values
            for (where, other), values in gin_config._OPERATIVE_CONFIG.items()
            if other == selector and (not scope or f"{where}/".startswith(f"{scope}/"))
        )
        if not used:
            reason = f"--{name} was given" if name in flags else "nothing used it"
            lines.append(f"{spell(key)} had no effect: {reason} ({place})")
    return lines
