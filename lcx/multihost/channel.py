"""Short texts that the processes of one program exchange, through JAX's coordination service in process 0.

Unlike a collective this needs no devices, no equal versions of jax, and no shapes; it also works in a thread while the
main thread hangs in a collective.
"""

from __future__ import annotations

import collections
import itertools
import socket
import sys
import time
from collections.abc import Mapping
from typing import Any

_PREFIX = "lcx"
_LONGEST_PAUSE_S = 0.5
_hosts: dict[int, str] = {}  # {process: host}, as far as it is known
_numbers: dict[str, itertools.count] = collections.defaultdict(itertools.count)


def index() -> int:
    """The number of this process, from 0."""
    return _state().process_id


def count() -> int:
    """How many processes there are; 1 if they have not been joined."""
    return 1 if _state().client is None else _state().num_processes


def coordinator() -> str:
    """HOST:PORT of the coordination service, which lives in process 0."""
    return _state().coordinator_address or ""


def put(key: str, text: str) -> None:
    """Makes a text known under this key, in place of an earlier one."""
    _state().client.key_value_set(f"{_PREFIX}/{key}", text, allow_overwrite=True)


def get(key: str) -> str | None:
    """The text under this key, None if there is none yet. Raises JaxRuntimeError if process 0 does not answer."""
    try:
        return _state().client.key_value_try_get(f"{_PREFIX}/{key}")
    except Exception as error:
        if "NOT_FOUND" in str(error):
            return None
        raise


def by_process(key: str) -> dict[int, str]:
    """{process: text} of what the processes have put under "key/PROCESS"."""
    found = _state().client.key_value_dir_get(f"{_PREFIX}/{key}/")
    return {int(name.rpartition("/")[2]): text for name, text in found}


def wait(key: str) -> str:
    """The text under this key, once there is one. A process that is gone ends the wait: see `watch`."""
    for pause in _pauses():
        if (text := get(key)) is not None:
            return text
        time.sleep(pause)
    raise AssertionError


def gather(what: str, text: str) -> list[str]:
    """The texts of all processes, in their order. Every process calls it, the same calls in the same order."""
    if count() == 1:
        return [text]
    key = f"{what}/{next(_numbers[what])}"
    put(f"{key}/{index()}", text)
    for pause in _pauses():
        if len(found := by_process(key)) == count():
            return [found[process] for process in range(count())]
        time.sleep(pause)
    raise AssertionError


def joined() -> bool:
    """Whether this process is in JAX's coordination service. Does not import jax."""
    distributed = sys.modules.get("jax._src.distributed")
    return distributed is not None and distributed.global_state.client is not None


def hosts() -> list[str]:
    """The name of the host of each process. The first call is one of all processes, unless the roll call has them."""
    if len(_hosts) < count():
        learn(dict(enumerate(gather("hosts", socket.gethostname()))))
    return [_hosts[process] for process in range(count())]


def learn(found: Mapping[int, str]) -> None:
    """Remembers on which host these processes run."""
    _hosts.update(found)


def known_hosts() -> dict[int, str]:
    """{process: host} as far as it is known."""
    return dict(_hosts)


def named(process: int) -> str:
    """A process for a message: "process 3 on node-17"; without its host as long as that is not known."""
    return f"process {process} on {_hosts[process]}" if process in _hosts else f"process {process}"


def _pauses():
    """Seconds between two looks: short at first, as the processes are usually about as fast."""
    yield from (0.01 * 2**i for i in range(5))
    yield from itertools.repeat(_LONGEST_PAUSE_S)


def _state() -> Any:
    from jax._src import distributed  # jax has no public name for the service's key-value store

    return distributed.global_state
