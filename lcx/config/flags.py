"""Command-line flags: argparse with one-line errors that suggest the closest known flag."""

from __future__ import annotations

import argparse
import difflib
import inspect
import itertools
import json
import re
import sys
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple, NoReturn

PROCESSES = "processes:"  # the `dest` of a flag about several processes, a field of multihost.join.Processes
BINDS = "gin:"  # the `dest` of a flag that sets a binding, "gin:evaluate.evals"; its `type` gives the value as gin text


class Flags(NamedTuple):
    """A parsed command line: the command's own flags, the .gin files, --gin.name=value as (name, value) pairs, the
    modules to import first, and the flags about several processes (None: the command is always one process)."""

    own: dict[str, Any]
    gin_files: list[str]
    bindings: list[tuple[str, str]]
    debug: bool
    imports: Sequence[str] = ()
    processes: dict[str, Any] | None = None


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:  # argparse itself would print the whole usage first
        self.exit(2, f"error: {message} (--help explains the flags)\n")


def parser(description: str | None, *, gin: bool = True, imports: bool = False) -> argparse.ArgumentParser:
    """An argument parser with the flags that all commands share.

    A flag that is not given and has no default of its own is not passed to the target, so that the .gin binding or
    the default in the target's signature applies.

    Args:
      description: shown by --help with its line breaks; usually the module's docstring, with two examples.
      gin: whether the command accepts --gin_file and --gin.NAME=VALUE.
      imports: whether it accepts --import, because it reads checkpoints, which cannot import code by themselves.
    """
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    parser = _Parser(
        prog=f"python -m {spec.name.removesuffix('.__main__')}" if spec else None,
        description=inspect.cleandoc(description or ""),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    parser.add_argument("--debug", action="store_true", help="show the traceback of every error")
    if imports:
        explained = "a module of your own that the checkpoint names, such as my_mixer; may be repeated"
        parser.add_argument("--import", action="append", dest="imports", metavar="MODULE", help=explained)
    if gin:
        group = parser.add_argument_group("configuration")
        group.add_argument(
            "--gin_file", action="append", metavar="PATH", help="a .gin file; may be repeated, later ones win"
        )
        explained = "set a parameter or a macro, as in --gin.Trainer.steps=10; overrides the .gin files"
        group.add_argument("--gin.NAME", metavar="VALUE", help=explained)
    return parser


def json_object(text: str) -> dict[str, Any]:
    """Parses the value of a flag that is a JSON object, as in --rope_scaling='{"rope_type": "yarn", "factor": 4.0}'."""
    try:
        value = json.loads(text, object_pairs_hook=_without_repeats)
    except (ValueError, RecursionError) as error:  # RecursionError: nested too deeply
        raise argparse.ArgumentTypeError(f"not JSON ({error}): {text[:200]!r}") from None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(
            f'expected a JSON object like {{"factor": 4.0}}, found {text[:200]!r}'
        )
    return value


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    names = [name for name, _ in pairs]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"{name!r} is set twice")
    return dict(pairs)


def read(parser: argparse.ArgumentParser, argv: Sequence[str]) -> Flags:
    """Parses the command line. Raises SystemExit after --help and for a flag that does not parse."""
    options = parser._option_string_actions
    bindings, rest = [], []
    for argument in argv:
        if "\0" in argument:  # no path may have one; a shell passes none, but a caller of main() can
            parser.error(f"{argument!r} contains the character NUL: remove it")
        if argument.startswith("--gin.") and "--gin_file" in options:
            name, equals, value = argument.removeprefix("--gin.").partition("=")
            if not equals or not name.strip():
                parser.error(f"{argument}: expected --gin.NAME=VALUE")
            bindings.append((name.strip(), value))
        else:
            rest.append(argument)
    # Before argparse, which would say of a misspelt flag only that the required one is missing.
    long_flags = [argument for argument in itertools.takewhile("--".__ne__, rest) if argument.startswith("--")]
    unknown = [argument for argument in long_flags if argument.partition("=")[0] not in options]
    if not unknown:
        known, unknown = parser.parse_known_args(rest)
    if unknown:
        parser.error(f"unknown argument {unknown[0]!r}{hint(unknown[0].partition('=')[0], options)}")
    own = vars(known)
    _refuse_empty(parser, own)
    _say_repeated(parser, long_flags)
    first = [(name.removeprefix(BINDS), own.pop(name)) for name in list(own) if name.startswith(BINDS)]
    several = {name.removeprefix(PROCESSES): own.pop(name) for name in list(own) if name.startswith(PROCESSES)}
    files, debug, imports = own.pop("gin_file", []), own.pop("debug", False), own.pop("imports", [])
    bindings = [*first, *bindings]
    return Flags(
        gin_files=files, debug=debug, own=own, bindings=bindings, imports=imports, processes=several or None
    )


def _say_repeated(parser: argparse.ArgumentParser, given: Sequence[str]) -> None:
    """Warns of flags that have one value and were given several."""
    names = [argument.partition("=")[0] for argument in given]
    for name in dict.fromkeys(names):
        action = parser._option_string_actions[name]
        several = isinstance(action, argparse._AppendAction | argparse._ExtendAction) or action.nargs == 0
        if names.count(name) > 1 and not several:
            print(f"warning: {name} is given {names.count(name)} times: the last one counts", file=sys.stderr)


_PLACES = {"DIR": "a folder", "FOLDER": "a folder", "FILE": "a file", "PATH": "a path"}


def _refuse_empty(parser: argparse.ArgumentParser, own: dict[str, Any]) -> None:
    """Ends with an error for an empty path: an empty variable of a script, which would be the current folder."""
    for action in parser._actions:
        kind = re.match(r"[A-Z]*", str(action.metavar))
        given = own.get(action.dest)
        for value in given if isinstance(given, list) else [given]:
            if kind and kind[0] in _PLACES and isinstance(value, str) and not value.strip():
                flag = action.option_strings[0]
                parser.error(f"{flag} is empty, expected {_PLACES[kind[0]]}: set {flag}, or leave it out")


def hint(name: str, known: Iterable[object], *, cutoff: float = 0.6) -> str:
    """`; did you mean X?` with the closest known name, or "" if none is closer than `cutoff` (of 1)."""
    close = difflib.get_close_matches(name, [str(item) for item in known], n=1, cutoff=cutoff)
    return f"; did you mean {close[0]}?" if close else ""
