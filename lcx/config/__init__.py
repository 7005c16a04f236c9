"""Configuration through gin, and the command lines built on it. Nothing outside this folder imports gin.

A `.gin` file names functions and classes by their Python modules and sets their parameters. It needs no
decorator in the code, so a class of your own package is used by importing it in the file:

    from __gin__ import dynamic_registration
    from lcx import trainer
    from my_package import my_mixer

    trainer.train.job = @trainer.Trainer()
    trainer.Trainer.steps = 800

`include 'other.gin'` looks in the folder of the including file first. On the command line
`--gin.trainer.Trainer.steps=10`, or any shorter name that is unambiguous (`--gin.Trainer.steps=10`), overrides
the files; `--gin.MACRO=10` sets a macro. A .gin file is code: it imports the modules that it names and calls whatever
is followed by `()`, so run only files that you trust.

Every binding is checked against the type annotations before anything is built. All mistakes are reported at once
with file and line. Bindings that nothing refers to are listed before the run, others without effect at its end.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import errno
import importlib
import inspect
import os
import re
import sys
from collections.abc import Callable, Sequence
from typing import Any

import gin
from gin import config as gin_config
from gin import config_parser

from lcx.config import (
    checking,
    environment,
    interrupts,
    messages,
    plugins,
    processes,
    reading,
    slow_compilation,
)
from lcx.config import flags as flags_lib
from lcx.config.environment import blamed, setup_jax
from lcx.config.flags import BINDS, json_object, parser
from lcx.errors import UserError, by_url, command_has, first_line

__all__ = [
    "BINDS",
    "ConfigError",
    "config_text",
    "json_object",
    "operative_config",
    "parse",
    "parser",
    "run",
    "setup_jax",
]


class ConfigError(UserError):
    """One or more mistakes in .gin files or --gin flags. `problems` has one line for each."""

    def __init__(self, problems: Sequence[str]):
        super().__init__("\n".join(problems))
        self.problems = tuple(problems)


def run(
    parser: argparse.ArgumentParser,
    target: str,
    argv: Sequence[str] | None = None,
    *,
    defaults: Sequence[tuple[str, str]] = (),
    bindings_of: str | None = None,
) -> int:
    """Reads flags and .gin files, checks them, then calls `target`; returns the exit status.

    Bad input gives one line on stderr per mistake and status 2; Ctrl-C gives status 130. An unexpected exception
    propagates with its traceback.

    Args:
      parser: from `parser`, with the command's own flags added.
      target: "module:function", imported only once the flags and the .gin files are known to be valid. It is called
        with the flags that were given and, for its other parameters, with their .gin bindings. If it has a parameter
        `config_text`, it receives the whole configuration as text; a parameter `operative_config` receives a function
        that returns the part that has been used so far.
      argv: the arguments; None: sys.argv[1:].
      defaults: (name, value text) pairs that apply unless a .gin file or a flag overrides them.
      bindings_of: the "module:function" whose .gin bindings the target receives, as far as it has these parameters;
        None: its own.
    """
    try:
        flags = flags_lib.read(parser, sys.argv[1:] if argv is None else argv)
    except SystemExit as stop:  # raised by argparse after --help or an error in the flags
        return stop.code if isinstance(stop.code, int) else 0
    setup_jax()
    plugins.hide_unusable()
    try:
        with messages.plain_warnings(), command_has(parser._option_string_actions):
            environment.check()
            processes.begin(flags)
            with interrupts.importing():
                function, source = _read(flags, target, defaults, bindings_of or target)
            slow_compilation.hide_alarm()
            with interrupts.interruptible():
                processes.join(flags)
                status = _call(function, source, flags)
                processes.leave(status)
    except (KeyboardInterrupt, UserError, OSError) as error:
        if flags.debug:
            raise
        status = _report(error)
        processes.report(error, status)
    except Exception as error:
        if (line := blamed(error)) and not flags.debug:
            return _report(UserError(line))
        if interrupts.pressed() and not flags.debug:  # inside an import, Ctrl-C surfaces as an ImportError
            interrupts.leave_interrupted()
        if _is_distributed():
            # A normal exit waits for the other processes, which would hang if one of them failed.
            interrupts.leave(processes.failed(error))
        processes.report(error, 1)
        raise
    if (status and _is_distributed()) or (status == interrupts.STATUS and argv is None):
        interrupts.leave(status)
    return status


def parse(
    files: Sequence[str],
    bindings: Sequence[tuple[str, str]] = (),
    *,
    target: str | None = None,
    defaults: Sequence[tuple[str, str]] = (),
) -> reading.Source:
    """Replaces gin's configuration with `files` and then `bindings`, checks it and locks it.

    Args:
      files: paths of .gin files; later ones override earlier ones.
      bindings: (name, value text) pairs, from flags --gin.name=value; they override the files.
      target: the "module:function" that will run. Its parameters can be bound without importing it in a file, and
        everything that it will build is checked for missing parameters.
      defaults: pairs like `bindings`, which the files override.

    Returns:
      The source of each binding, for messages.

    Raises:
      ConfigError: with every mistake found, not just the first.
    """
    gin.clear_config()
    gin_config._IMPORTS.add(_DYNAMIC)  # makes `config_text` write module imports even if no file has any
    source = reading.Source(target)
    source.read_flags(defaults)
    source.places.clear()  # nobody has written the defaults, so no warning is about them
    for file in files:
        source.read_file(file, None)
    source.read_flags(bindings)
    if not source.incomplete:
        checking.check(source)
    if not source.problems:
        for warning in source.warnings:
            print(f"warning: {warning}", file=sys.stderr)
        gin.finalize()
        return source
    raise ConfigError(source.report())


_DYNAMIC = config_parser.ImportStatement(
    "__gin__.dynamic_registration",
    is_from=True,
    alias=None,
    location=config_parser.Location(None, 0, None, ""),
)


def config_text() -> str:
    """The whole configuration as one .gin file without includes. Parsing it yields the same configuration."""
    return gin.config_str(max_line_length=100)


def operative_config() -> str:
    """The settings that have been used so far, defaults included, as a .gin file."""
    return gin.operative_config_str(max_line_length=100)


def _read(
    flags: flags_lib.Flags, target: str, defaults: Sequence[tuple[str, str]], bindings_of: str
) -> tuple[Callable, reading.Source]:
    """The function to call and its configuration."""
    for name in flags.imports:
        try:
            importlib.import_module(name)
        except (ImportError, ValueError, TypeError) as error:
            raise UserError(
                f"--import={name} cannot be imported ({first_line(error)}): run from its folder, or install its package"
            ) from error
    source = parse(flags.gin_files, flags.bindings, target=bindings_of, defaults=defaults)
    return _imported(target), source


def _imported(target: str) -> Callable:
    module, _, name = target.partition(":")
    return getattr(importlib.import_module(module), name)


def _call(function: Callable, source: reading.Source, flags: flags_lib.Flags) -> int:
    configured = _imported(str(source.target))
    _check_complete(function, flags.own, configured)  # before the warnings, among which its line would be lost
    for warning in [*environment.misspelt(), *checking.unreached(source).values()]:
        print(f"warning: {warning}", file=sys.stderr)
    result = function(**_arguments(function, flags.own, configured))
    for warning in checking.without_effect(source, flags.own):
        print(f"warning: {warning}", file=sys.stderr)
    return result if type(result) is int else 0


def _arguments(
    function: Callable, flags: dict[str, Any], configured: Callable | None = None
) -> dict[str, Any]:
    """The keyword arguments of the target, from the bindings of `configured` (by default its own); flags override them.

    The target is then called directly and not through gin, because gin rewrites the exceptions that pass through it.
    """
    configured = configured or function
    _check_complete(function, flags, configured)
    bound = _bound(function, flags, configured)
    if (known := gin_config._inverse_lookup(configured)) is not None:
        gin_config._OPERATIVE_CONFIG.setdefault(("", known.selector), {}).update(bound)
    try:
        built = copy.deepcopy(bound)  # gin instantiates a reference when it is deep-copied
    except (UserError, TypeError, ValueError) as error:
        raise ConfigError([_one_line(error)]) from error
    texts = {name: text() for name, text in _TEXTS.items() if name in inspect.signature(function).parameters}
    return texts | built | flags


def _bound(function: Callable, flags: dict[str, Any], configured: Callable) -> dict[str, Any]:
    """The bindings of `configured` that the function takes and no flag overrides."""
    parameters = inspect.signature(function).parameters
    known = gin_config._inverse_lookup(configured)
    bound = gin_config._get_bindings(known.selector) if known else {}
    own = configured is function  # then a binding without a parameter is a mistake that gin has reported
    return {name: value for name, value in bound.items() if name not in flags and (own or name in parameters)}


def _check_complete(function: Callable, flags: dict[str, Any], configured: Callable) -> None:
    """Raises ConfigError if neither a flag nor a binding gives a parameter that has no default."""
    given = {*_bound(function, flags, configured), *flags, *_TEXTS}
    missing = [
        name
        for name, parameter in inspect.signature(function).parameters.items()
        if parameter.default is parameter.empty
        and parameter.kind is not parameter.VAR_KEYWORD
        and name not in given
    ]
    if missing:
        where = f"{configured.__module__.rpartition('.')[2]}.{configured.__name__}"
        raise ConfigError([f"nothing sets {name!r}: bind {where}.{name} in a --gin_file" for name in missing])


_TEXTS: dict[str, Callable[[], Any]] = {
    "config_text": config_text,
    "operative_config": lambda: operative_config,
}


def _report(error: BaseException) -> int:
    if isinstance(error, KeyboardInterrupt):
        print("interrupted", file=sys.stderr)
        return interrupts.STATUS
    if isinstance(error, BrokenPipeError):  # the reader of our output closed it, as `head` does; not an error
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    prefix = "config error" if isinstance(error, ConfigError) else "error"
    for line in error.problems if isinstance(error, ConfigError) else [_one_line(error)]:
        print(f"{prefix}: {by_url(line, where=True)}", file=sys.stderr)
    return error.status if isinstance(error, UserError) else UserError.status


def _one_line(error: BaseException) -> str:
    if isinstance(error, OSError) and error.strerror:
        if error.filename is not None:
            return f"{error.strerror}: {error.filename}"
        advice = (
            ": free some space on the output disk, or choose another"
            if error.errno == errno.ENOSPC
            else ""
        )
        return f"{error.strerror}{advice}"
    line = first_line(error)
    built = re.search(r"In call to configurable '(\w+)'", str(error))
    return f"{built[1]}: {line}" if built and not line.startswith(built[1]) else line


def _is_distributed() -> bool:
    jax = sys.modules.get("jax")
    return jax is not None and jax.distributed.is_initialized()
