"""A command that runs in several processes: it joins the others before its work, and tells them when it fails."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from gin import config as gin_config

from lcx.config.flags import Flags
from lcx.errors import first_line

if TYPE_CHECKING:
    from lcx.multihost.join import Processes

_SAME = ("XLA_FLAGS", "JAX_ENABLE_X64", "JAX_DEFAULT_MATMUL_PRECISION", "JAX_PLATFORMS")  # change the numbers


def begin(flags: Flags) -> None:
    """Says to the other processes that this one is there, before the heavy imports.

    Raises:
      UserError: the flags about several processes contradict each other, or process 0 cannot listen at its address.
    """
    if flags.processes is not None:
        from lcx.multihost import join as multihost

        multihost.begin(_given(flags.processes))


def join(flags: Flags) -> None:
    """Joins the other processes, if the command may run in several and there are others.

    Raises:
      UserError: they cannot be reached, or run something else.
    """
    if flags.processes is None:
        return
    from lcx.multihost import join as multihost

    multihost.join(_given(flags.processes), settings(flags, gin_config.config_str(), os.environ))


def _given(flags: Mapping[str, Any]) -> Processes:
    from lcx.multihost.join import Processes

    return Processes(**{name: value for name, value in flags.items() if value is not None})


def settings(flags: Flags, config: str, env: Mapping[str, str]) -> dict[str, str]:
    """{name: value} of all that has to be the same in every process: flags, bindings, environment.

    Args:
      flags: the command line.
      config: the whole configuration, as gin writes it.
      env: the environment variables.
    """
    own = {f"--{name}": repr(value) for name, value in sorted(flags.own.items())}
    return own | bindings(config.splitlines()) | {name: env.get(name, "not set") for name in _SAME}


def bindings(lines: Sequence[str]) -> dict[str, str]:
    """{name: value} of the bindings in a configuration that gin has written: a value may go on in the next lines."""
    found: dict[str, str] = {}
    name = ""
    for line in lines:
        key, equals, value = line.partition(" = ")
        if equals and not line.startswith((" ", "#")):
            name, found[key] = key, value
        elif line.startswith(" ") and name:
            found[name] += line
        elif line.startswith(("import ", "from ")):
            found[line] = "imported"
    return found


def leave(status: int) -> None:
    """The work is done; the others may take longer. A process with a status other than 0, which ends at once, waits."""
    if (watch := _watch()) is not None:
        watch.rest()
        if status:
            watch.leave()


def report(error: BaseException, status: int) -> None:
    """Tells the others that this process ends with an error that it prints."""
    line = "interrupted" if isinstance(error, KeyboardInterrupt) else first_line(error)
    for module in (sys.modules.get("lcx.multihost.rollcall"), _watch()):
        if module is not None:
            module.report(line, status)


def failed(error: Exception) -> int:
    """Prints why this process ends, which may be that another one is gone, and tells the others.

    Returns:
      its exit status.
    """
    watch = _watch()
    line = None if watch is None else watch.blame(error)
    if watch is not None and line is not None:
        print(f"\nerror: {line}", file=sys.stderr)
        return watch.LOST
    traceback.print_exception(error)
    if watch is not None:
        watch.report(f"{type(error).__name__}: {first_line(error)}", 1)
    return 1


def _watch():
    return sys.modules.get("lcx.multihost.watch")  # not imported unless there are several processes
