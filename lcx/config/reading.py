"""Reads .gin files and --gin flags into gin's configuration, statement by statement.

It records where each binding was written, and collects all mistakes instead of stopping at the first.
"""

from __future__ import annotations

import contextlib
import inspect
import io
import os
import tokenize
from collections.abc import Iterator, Sequence
from typing import Any

from gin import config as gin_config
from gin import config_parser

from lcx.config import names
from lcx.config.flags import hint

MACRO = "gin.macro"
_REPOSITORY = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))  # has configs/
_TOO_DEEP = "a value is nested too deeply to read"
Key = tuple[str, str, str]  # scope, full name of the function or class, parameter


class Source:
    """The configuration that has been read, with the origin of each binding.

    Attributes:
      target: "module:function" that will run, or None.
      places: binding -> "file:line" or "--gin.name".
      problems: message -> the places where it applies.
      warnings: lines to print before the run.
      macros: names of the macros that files define.
      incomplete: whether some statements could not be read. Then a name that is "not defined" may be defined in one of
        them, so such checks are skipped.
    """

    def __init__(self, target: str | None):
        self.target = target
        self.places: dict[Key, str] = {}
        self.problems: dict[str, list[str]] = {}
        self.warnings: list[str] = []
        self.incomplete = False
        self.macros: set[str] = set()
        self._open: list[str] = []  # the file being read, after the files that include it

    def problem(self, message: str, place: str | None, *, incomplete: bool = False) -> None:
        if message:
            self.problems.setdefault(message, []).append(place or "")
        self.incomplete |= incomplete

    def report(self) -> list[str]:
        """One line per mistake, with its place in parentheses."""
        lines = []
        for message, places in self.problems.items():
            more = f" and {len(places) - 1} more" if len(places) > 1 else ""
            lines.append(f"{message} ({places[0]}{more})" if places[0] else message)
        return lines

    def read_file(self, path: str, place: str | None) -> None:
        """Reads a file. `place` is where it was included ("file:line"), or None for a --gin_file."""
        path = os.path.expanduser(path)
        beside = [os.path.join(os.path.dirname(self._open[-1]), path)] if self._open else []
        found = next((name for name in (*beside, path) if os.path.isfile(name)), None)
        if found is None:
            return self.problem(_not_a_file(path, self._open), place or "--gin_file", incomplete=True)
        if any(os.path.samefile(found, other) for other in self._open):
            cycle = " -> ".join([*self._open, found])
            return self.problem(f"include cycle: {cycle}", place, incomplete=True)
        try:
            with open(found, encoding="utf-8") as file:
                text = file.read()
        except UnicodeDecodeError:
            return self.problem("not a text file", found, incomplete=True)
        self._open.append(found)
        with gin_config._parse_scope() as context:
            for statement in self._statements(text, found):
                self._execute(statement, context, f"{found}:{statement.location.line_num}")
            gin_config._IMPORTS.update(context.imports)
        self._open.pop()

    def read_flags(self, bindings: Sequence[tuple[str, str]]) -> None:
        """Reads (name, value text) pairs."""
        if not bindings:
            return
        context = names.FlagContext(self.target)
        gin_config._PARSE_CONTEXTS.append(context)
        try:
            for name, value in bindings:
                for statement in self._statements(f"{name} = {value}", f"--gin.{name}"):
                    self._execute(statement, context, f"--gin.{name}")
        finally:
            gin_config._PARSE_CONTEXTS.pop()

    def _statements(self, text: str, origin: str) -> Iterator[Any]:
        """The statements of `text`, up to the first syntax error."""
        line = 1

        def place(line: int) -> str:
            return origin if origin.startswith("--gin.") else f"{origin}:{line}"

        try:
            parser = config_parser.ConfigParser(io.StringIO(text), names.Delegate())
            while True:
                parser._skip_whitespace_and_comments()
                line = parser.current_token.start[0]
                statement = parser.parse_statement()
                if statement is None:
                    return
                yield statement
        except tokenize.TokenError as error:
            nested = "nested" in str(error)  # from Python 3.12 on, 200 levels
            message = _TOO_DEEP if nested else "a bracket or quote is never closed"
            self.problem(message, place(line), incomplete=True)
        except SyntaxError as error:
            number = error.lineno or line
            value = text.splitlines()[number - 1 : number]
            value_text = value[0].partition("=")[2].strip() if value else ""
            message = names.explain_syntax(error, origin, value_text)
            self.problem(message, place(number), incomplete=True)
        except (RecursionError, MemoryError):  # Python's own parser raises either
            self.problem(_TOO_DEEP, place(line), incomplete=True)

    def _execute(self, statement: Any, context: gin_config.ParseContext, place: str) -> None:
        if isinstance(statement, config_parser.BindingStatement):
            self._bind(statement, place)
        elif isinstance(statement, config_parser.IncludeStatement):
            self.read_file(statement.filename, place)
        elif isinstance(statement, config_parser.ImportStatement):
            self._import(statement, context, place)
        # Nothing to do for a block (`Trainer:`): each of its bindings follows as a separate statement.

    def _import(self, statement: Any, context: gin_config.ParseContext, place: str) -> None:
        if statement.module.startswith("__gin__."):
            if statement.module != "__gin__.dynamic_registration":
                return self.problem("only `from __gin__ import dynamic_registration` exists", place)
            if context.imports:
                return self.problem(
                    "`from __gin__ import dynamic_registration` must be the first import", place
                )
        elif statement.bound_name() == "gin":
            return self.problem("`gin` is a reserved name; import the module with `as`", place)
        try:
            context.process_import(statement)
        except ImportError as error:
            self.problem(names.explain_import(statement, error), place)
            context._symbol_table[statement.bound_name()] = names.NotImported()

    def _bind(self, statement: config_parser.BindingStatement, place: str) -> None:
        values = gin_config._iterate_flattened_values(statement.value)
        unresolved = [value.message for value in values if isinstance(value, names.Unresolved)]
        for message in unresolved:
            self.problem(message, place)
        scope, selector, name = statement.scope, statement.selector, statement.arg_name
        if not name:  # NAME = value, without a dot, is a macro
            scope, selector, name = f"{scope}/{selector}" if scope else selector, MACRO, "value"
        try:
            configurable = names.look_up(selector)
        except LookupError as error:
            if self.incomplete and place.startswith("--gin."):
                return None  # it may be defined in a file that could not be read, which is a problem already
            return self.problem(str(error.args[0]), place)
        known = inspect.signature(configurable.wrapped).parameters
        if name not in known and not any(p.kind is p.VAR_KEYWORD for p in known.values()):
            near = hint(name, known) or f"; it has {', '.join(known)}"
            return self.problem(f"{configurable.name} has no parameter {name!r}{near}", place)
        if not unresolved:
            key = (scope, configurable.selector, name)
            self._warn_rebound(key, place)
            gin_config._CONFIG.setdefault(key[:2], {})[name] = statement.value
            self.places[key] = place
            if selector == MACRO and self._open:
                self.macros.add(scope)

    def _warn_rebound(self, key: Key, place: str) -> None:
        """Warns if one file sets a binding twice, or if a later include overrides it; both are probably mistakes.

        The usual case, a file that overrides what it included before, gives no warning.
        """
        before = self.places.get(key, "")
        file = before.rpartition(":")[0]
        if before == place or not self._open:
            return
        if file == self._open[-1]:
            self.warnings.append(f"{spell(key)} is set twice, the later one wins ({before}, {place})")
        elif file in self._open:
            self.warnings.append(
                f"{spell(key)} ({before}) is overridden by a file included after it ({place})"
            )


def spell(key: Key) -> str:
    """The name of a binding as it is written in a .gin file."""
    scope, selector, name = key
    if selector == MACRO:
        return f"%{scope}"
    return f"{scope}/{selector}.{name}" if scope else f"{selector}.{name}"


def _not_a_file(path: str, including: Sequence[str] = ()) -> str:
    if os.path.isdir(path):
        return f"{path} is a folder, expected a .gin file"
    if os.path.exists(path):
        return f"{path} is a device or a pipe, expected a .gin file"
    near: list[str] = []
    with contextlib.suppress(OSError):
        near = [
            os.path.join(os.path.dirname(path), name)
            for name in os.listdir(os.path.dirname(path) or ".")
            if name.endswith(".gin")
        ]
    close = hint(path, near)
    if including and not close and not os.path.isabs(path):
        close = f", neither beside {including[-1]} nor in the working folder: write the whole path"
    elif not close and os.path.isfile(shipped := os.path.join(_REPOSITORY, path)):
        close = f" in the working folder; did you mean {shipped}?"
    return f"{path} does not exist{close}"
