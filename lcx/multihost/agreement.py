"""The processes of one program run the same thing: what differs between hosts is found at the start and named.

A difference would otherwise show as a hang in a collective, or not at all, as wrong numbers.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import itertools
import json
import pathlib
import time
from collections.abc import Callable, Mapping, Sequence
from typing import ParamSpec, TypeVar

from lcx.errors import UserError, first_line
from lcx.multihost import channel
from lcx.version import __version__

P = ParamSpec("P")
T = TypeVar("T")

_MISSING = "not set"
_LONGEST_VALUE = 100  # characters of a value in a message
_SEEN_WITHIN_S = 30  # a network file system shows a new file late
_OUT_OF_STEP_S = 30  # for the other processes to fail as well
_DONE = "done"
_calls = itertools.count()  # of functions that run on process 0 only, the same on every process


def require_same(what: str, values: Mapping[str, str], *, advice: str) -> None:
    """Compares values between the processes. Every process calls it.

    Args:
      what: what the values are, for the message.
      values: {name: value} of this process.
      advice: how to make them equal.

    Raises:
      UserError: on every process, if a value differs; the message says which hosts have which value.
    """
    own = json.dumps(values, sort_keys=True)
    digests = channel.gather(what, hashlib.sha256(own.encode()).hexdigest())
    if len(set(digests)) == 1:
        return
    # Only now the values themselves, once for each digest: there may be thousands of processes.
    spoken = digests.index(digests[channel.index()]) == channel.index()
    texts = channel.gather(f"{what}, values", own if spoken else "")
    of_process = [json.loads(texts[digests.index(digest)]) for digest in digests]
    message = difference(what, of_process, channel.hosts())
    # Process 0, which holds the texts, must not end before all have read them.
    channel.gather(f"{what}, read", "")
    raise UserError(f"{message}; {advice}")


def difference(what: str, values: Sequence[Mapping[str, str]], hosts: Sequence[str]) -> str:
    """One line about the first name whose value differs: which value each host has."""
    names = dict.fromkeys(name for own in values for name in own)
    name = next(name for name in names if len({own.get(name) for own in values}) > 1)
    groups: dict[str, list[int]] = {}
    for process, own in enumerate(values):
        groups.setdefault(own.get(name, _MISSING), []).append(process)
    found = ", ".join(f"{_cut(value)} on {_places(members, hosts)}" for value, members in groups.items())
    return f"the processes do not agree on {what}: {name} is {found}"


def _cut(value: str) -> str:
    value = " ".join(value.split())
    return value if len(value) <= _LONGEST_VALUE else f"{value[:_LONGEST_VALUE]}..."


def _places(members: Sequence[int], hosts: Sequence[str], limit: int = 4) -> str:
    names = list(dict.fromkeys(hosts[process] for process in members))
    more = f" and {len(names) - limit} more hosts" if len(names) > limit else ""
    numbers = ", ".join(map(str, members[:limit])) + (", ..." if len(members) > limit else "")
    return f"{', '.join(names[:limit])}{more} (process{'es' if len(members) > 1 else ''} {numbers})"


def versions() -> dict[str, str]:
    """The versions that decide what is computed: of jax, and of lcx with a digest of its source."""
    packages = ("jax", "jaxlib", "flax", "optax", "numpy", "orbax-checkpoint", "grain")
    found = {name: importlib.metadata.version(name) for name in packages if _is_installed(name)}
    return {"lcx": f"{__version__} (source {_source()})", **found}


def _is_installed(package: str) -> bool:
    try:
        return bool(importlib.metadata.version(package))
    except importlib.metadata.PackageNotFoundError:
        return False


@functools.cache
def _source() -> str:
    """A digest of the package's files: an edited copy on one host has the same version."""
    digest, root = hashlib.sha256(), pathlib.Path(__file__).parents[1]
    for path in sorted(root.rglob("*.py")):
        digest.update(f"{path.relative_to(root)}\0".encode() + path.read_bytes())
    return digest.hexdigest()[:12]


def require_shared(file: pathlib.Path, setting: str) -> None:
    """Raises UserError on every process unless all see this file of process 0: the folder must be a shared one."""
    if channel.count() == 1:
        return
    written = channel.index() == 0 and file.is_file()
    expected = channel.gather("shared", file.read_text() if written else "")[0]
    if not expected:  # process 0 writes no such file: in a bucket, which all hosts share anyway
        return
    deadline = time.monotonic() + _SEEN_WITHIN_S
    while not (seen := file.is_file() and file.read_text() == expected) and time.monotonic() < deadline:
        time.sleep(0.2)
    blind = [i for i, text in enumerate(channel.gather("shared, seen", str(seen))) if text == "False"]
    if blind:
        raise UserError(
            f"{setting} is {file.parent}, which is another folder on {_places(blind, channel.hosts())} than on "
            f"{channel.named(0)}: set {setting} to a folder that all hosts share"
        )


def first_only(work: Callable[P, T]) -> Callable[P, T | None]:
    """`work` on process 0 alone; the others wait until it is done there, and return None.

    What it raises as UserError or OSError on process 0 becomes a UserError on the others.
    """

    @functools.wraps(work)
    def on_first(*args: P.args, **kwargs: P.kwargs) -> T | None:
        if channel.count() == 1:
            return work(*args, **kwargs)
        key = f"first_only/{next(_calls)}"
        if channel.index() > 0:
            if failure := channel.wait(key).removeprefix(_DONE):
                raise UserError(failure)
            return None
        try:
            result = work(*args, **kwargs)
        except (UserError, OSError) as error:
            channel.put(key, f"{channel.named(0)}: {first_line(error)}")
            raise
        channel.put(key, _DONE)
        return result

    return on_first


def all_compiled() -> None:
    """Waits until every process has compiled its program.

    A first collective waits only half a minute for a process that still compiles (gloo), and a cache of compiled
    programs may be warm on one host and cold on another.
    """
    channel.gather("compiled", "")


def require_same_outcome(what: str, error: str) -> None:
    """Raises UserError if something has failed here or elsewhere, but not with the same error in all processes.

    The processes are then out of step: one has left a collective in which others wait.

    Args:
      what: what has failed or succeeded, a name that is used once.
      error: what went wrong in this process; "" if nothing did.
    """
    if channel.count() == 1:
        return
    channel.put(f"{what}/{channel.index()}", error or _DONE)
    deadline = time.monotonic() + _OUT_OF_STEP_S
    while len(found := channel.by_process(what)) < channel.count() and not (error and time.monotonic() > deadline):
        time.sleep(0.1)
    if len(set(found.values())) > 1 or len(found) < channel.count():
        failed = {i: text for i, text in found.items() if text != _DONE}
        reason = next(iter(failed.values()))
        raise UserError(f"{what} has failed on {_places(sorted(failed), channel.hosts())} alone: {reason}")
