"""Resolves the names in .gin files and --gin flags, and explains what is wrong with a name that does not resolve."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util  # gin 0.5.0 uses it without importing it
import pathlib
import pkgutil
import re
import sys
from typing import Any

import gin
from gin import config as gin_config
from gin import config_parser

from lcx.config.flags import hint
from lcx.errors import first_line


class Unresolved:
    """Placeholder for a reference that does not resolve, so that parsing can continue and find further mistakes."""

    def __init__(self, message: str = ""):
        self.message = message


class NotImported:
    """Placeholder for a module whose import failed, so that this is reported once and not again at every use."""


class Delegate(gin_config.ParserDelegate):
    """Creates gin's references while a file is parsed; those that do not resolve become `Unresolved`."""

    def configurable_reference(self, scoped_selector: str, evaluate: bool) -> Any:
        try:
            look_up(scoped_selector.rpartition("/")[2])
        except LookupError as error:
            return Unresolved(str(error.args[0]))
        return super().configurable_reference(scoped_selector, evaluate)


class FlagContext(gin_config.ParseContext):
    """Resolves names on the command line.

    A name may be any unambiguous suffix of a name that the files use, an attribute of a module that a file imports,
    the target function or its module, or a full dotted path.
    """

    def __init__(self, target: str | None):
        super().__init__()
        self._target = target or ""
        self._enable_dynamic_registration()
        for statement in gin_config._IMPORTS:
            if not statement.module.startswith("__gin__"):
                self.process_import(statement)

    def get_configurable(self, selector: str) -> gin_config.Configurable | None:
        try:
            known = gin_config._REGISTRY.get_match(selector)
        except KeyError:  # several functions of this name: the target's is meant, if it has one
            if self._from_target(selector) is None:
                raise
            known = None
        if known is not None:
            return known
        with contextlib.suppress(NameError, AttributeError):
            return super().get_configurable(selector)
        found = self._from_target(selector) or _from_path(selector)
        if found is None:
            return None
        if not callable(found):
            raise TypeError(f"it is a {type(found).__name__}, expected a function or class")
        if gin_config._inverse_lookup(found) is None:
            gin.external_configurable(found, module=found.__module__)
        return gin_config._inverse_lookup(found)

    def _from_target(self, selector: str) -> Any:
        module, _, function = self._target.partition(":")
        first, _, rest = selector.partition(".")
        if first == module.rpartition(".")[2]:
            return getattr(importlib.import_module(module), rest, None)
        return getattr(importlib.import_module(module), function) if selector == function else None


def _from_path(selector: str) -> Any:
    """What a dotted path leads to; None if it leads nowhere. Raises TypeError if a module on it cannot be imported."""
    if "." not in selector or importlib.util.find_spec(selector.partition(".")[0]) is None:
        return None
    module = selector.rpartition(".")[0]
    try:
        with contextlib.suppress(AttributeError):
            return pkgutil.resolve_name(selector)
        importlib.import_module(module)
    except ImportError as error:
        if not isinstance(error, ModuleNotFoundError) or not f"{module}.".startswith(f"{error.name}."):
            raise TypeError(f"importing {module} failed: {first_line(error)}") from error
    return None


def look_up(selector: str) -> gin_config.Configurable:
    """The function or class that `selector` refers to in the file or flag being read.

    Raises:
      LookupError: it does not resolve. The message is for the user, and empty if the cause was already reported.
    """
    context = gin_config._parse_context()
    if _is_reported(context, selector):
        raise LookupError("")
    try:
        found = context.get_configurable(selector)
    except KeyError:
        fits = " or ".join(sorted(gin_config._REGISTRY.matching_selectors(selector)))
        raise LookupError(f"{selector!r} is ambiguous: write more of {fits}") from None
    except NameError:
        raise LookupError(_not_imported(context, selector)) from None
    except AttributeError:
        raise LookupError(_no_attribute(context, selector)) from None
    except (TypeError, ValueError) as error:
        raise LookupError(f"{selector!r} cannot be configured: {first_line(error)}") from None
    if found is not None:
        return found
    names = [name.rpartition(".")[2] for name, _ in gin_config._REGISTRY.items()]
    close = hint(selector.rpartition(".")[2], names)
    if not close and not isinstance(context, FlagContext):
        close = "; start the file with `from __gin__ import dynamic_registration` and import its module"
    elif not close and (home := _home(selector)):
        close = f"; write its module too, as in {home}.{selector}"
    raise LookupError(f"nothing is called {selector!r}{close}")


def _home(name: str) -> str | None:
    """The module of lcx that defines a public class or function of this name, found without importing any."""
    root = pathlib.Path(__file__).parents[1]
    if not name.isidentifier() or name.startswith("_"):
        return None
    for path in sorted(root.rglob("*.py"), key=lambda path: (len(path.parts), path)):
        if re.search(rf"^(class|def) {name}\b", path.read_text("utf-8"), re.MULTILINE):
            return ".".join(path.relative_to(root.parent).with_suffix("").parts).removesuffix(".__init__")
    return None


def _is_reported(context: gin_config.ParseContext, selector: str) -> bool:
    return isinstance(context._symbol_table.get(selector.partition(".")[0]), NotImported)


def _not_imported(context: gin_config.ParseContext, selector: str) -> str:
    first = selector.partition(".")[0]
    if first == selector:
        known = gin_config._REGISTRY.matching_selectors(selector)
        example = ".".join(known[0].split(".")[-2:]) if known else f"module.{selector}"
        return f"{selector!r}: write its module too, as in {example}"
    imported = [name for name in context._symbol_table if name != "gin"]
    close = hint(first, imported) or f"; import it, as in `from lcx import {first}`"
    return f"{first!r} is not imported in this file{close}"


def _no_attribute(context: gin_config.ParseContext, selector: str) -> str:
    first, *rest = selector.split(".")
    holder = context._symbol_table[first]
    for name in rest:
        if not hasattr(holder, name):
            public = [other for other in dir(holder) if not other.startswith("_")]
            return f"{getattr(holder, '__name__', first)} has no {name!r}{hint(name, public)}"
        holder = getattr(holder, name)
    return f"{selector!r} is neither a function nor a class"


def explain_import(statement: config_parser.ImportStatement, error: ImportError) -> str:
    missing = error.name if isinstance(error, ModuleNotFoundError) else None
    if not missing or not f"{statement.module}.".startswith(f"{missing}."):
        # The module exists, but something that it imports itself is missing.
        return f"importing {statement.module} failed: {error}"
    parent, _, name = missing.rpartition(".")
    if parent and not hasattr(sys.modules.get(parent), "__path__"):
        where, _, what = parent.rpartition(".")
        line = f"from {where} import {what}" if where else f"import {what}"
        return f"{missing} is not a module; write `{line}` and use {what}.{name}"
    paths = sys.modules[parent].__path__ if parent else None
    return f"no module named {missing!r}{hint(name, [module.name for module in pkgutil.iter_modules(paths)])}"


def explain_syntax(error: SyntaxError, origin: str, value: str) -> str:
    """Explains what is wrong with a statement.

    Args:
      error: from gin's parser.
      origin: the file or the flag. Text in a flag needs a second pair of quotes for the shell.
      value: the text after the = in the line of the error.
    """
    token = re.search(r"Failed to parse token '(.*)'", str(error.msg), re.DOTALL)
    if token or str(error.msg).startswith("Unable to parse value"):
        name = token[1] if token else value
        if not name.strip():
            return f"there is no value behind the =; write {origin}=VALUE" if origin.startswith("--gin.") else (
                "there is no value behind the ="
            )
        if value and value[0] not in "([{'\"" and not value.startswith(("%", "@")):
            name = value.partition("  #")[0].strip()  # gin reports only the first word; quote the whole value
        name = _cut(name)
        if name.lower() in ("true", "false", "none"):
            return f"{name} is not a value; write {name.capitalize()}"
        text = f"{origin}=\"'{name}'\"" if origin.startswith("--gin.") else f"'{name}'"
        macro = f", %{name} for a macro, @module.{name} to refer" if name.isidentifier() else ""
        return f"{name} is not a value; write {text} for text{macro}"
    if str(error.msg).startswith("Expected newline"):
        found = f"{_cut(value)} is not one value: " if value else ""
        expected = "expected one value or import per line and nothing after it"
        return f"{found}{expected}; gin has no arithmetic or units, write the result"
    return _cut(str(error.msg).splitlines()[0], 200)


def _cut(text: str, limit: int = 100) -> str:
    return text if len(text) <= limit else f"{text[: limit - 3]}..."
