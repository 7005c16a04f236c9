"""Start-up: the processes of a TPU pod, a SLURM or Open MPI job, a Kubernetes job, or of plain hosts join each other.

Each process finds out who it is from the first of these that says so:

1. `--hosts=a,b,c`, the same on every host: its number is the place of its own host in the list;
2. `--coordinator_address`, `--num_processes` and `--process_id`, or the variables JAX_COORDINATOR_ADDRESS,
   JAX_NUM_PROCESSES and JAX_PROCESS_ID; in an indexed Kubernetes job JOB_COMPLETION_INDEX is the process id;
3. JAX itself, on TPUs, and under SLURM and Open MPI if the job has several tasks; with `--distributed` also elsewhere
   (Kubernetes with the package `kubernetes`).

Otherwise, and with `--no-distributed`, the program is one process.
"""

from __future__ import annotations

import dataclasses
import glob
import importlib.util
import math
import os
import socket
from collections.abc import Mapping, Sequence
from typing import Any

from lcx.errors import TemporaryError, UserError, first_line
from lcx.multihost import agreement, channel, compiled, rollcall, watch

PORT = 8476
_TASKS = ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE")  # set for each process that srun or mpirun has started
_LOCAL_TASKS = ("SLURM_STEP_TASKS_PER_NODE", "OMPI_COMM_WORLD_LOCAL_SIZE")
_TPUS = ("accel[0-9]*", "vfio/[0-9]*")


@dataclasses.dataclass(frozen=True)
class Processes:
    """The flags of a command that can run in several processes.

    Attributes:
      distributed: True: join, and let JAX find the others; False: do not; None: join if something says that there are
        others.
      hosts: the names or addresses of all hosts, comma-separated, with a process on each; process 0 on the first.
      coordinator_address: "host:port" of process 0, the same for all processes.
      num_processes: how many processes there are in total.
      process_id: the index of this process, from 0.
      join_timeout: seconds for all processes to come at the start.
      heartbeat_timeout: seconds of silence after which a process counts as gone.
      step_timeout: seconds after which a training step that has not ended counts as hanging.
      saves: whether the command saves its progress when asked to stop (SIGTERM). Otherwise SIGTERM ends the process.
    """

    distributed: bool | None = None
    hosts: str | None = None
    coordinator_address: str | None = None
    num_processes: int | None = None
    process_id: int | None = None
    join_timeout: float = 300
    heartbeat_timeout: float = 30
    step_timeout: float = 600
    saves: bool = False


def begin(processes: Processes) -> None:
    """Says to the other processes that this one is there, if flags or variables say which one it is.

    Otherwise JAX finds that out, in `join`. Imports no jax, so that it can be the first thing that a command does.

    Raises:
      TemporaryError: process 0 cannot listen at its address.
      UserError: the flags contradict each other.
    """
    found = whereabouts(processes, os.environ) or {}
    address, count, process = (found.get(name) for name in ("coordinator_address", "num_processes", "process_id"))
    if address is None or process is None or (process == 0 and count is None) or channel.joined():
        return
    if count is not None and not 0 <= process < count:
        raise UserError(f"--process_id is {process}, expected a number from 0 to {count - 1}: change --process_id")
    bind = os.environ.get("JAX_COORDINATOR_BIND_ADDRESS") or f"[::]:{address.rpartition(':')[2]}"
    rollcall.begin(address, bind, process, count, timeout=processes.join_timeout, silence=processes.heartbeat_timeout)


def join(processes: Processes, settings: Mapping[str, str]) -> None:
    """Joins the other processes, if there are any, and compares versions and settings with theirs.

    Call it after jax is configured, and before anything uses the devices.

    Args:
      processes: the flags.
      settings: {name: value} of what has to be the same in all processes.

    Raises:
      TemporaryError: the others cannot be reached or do not join in time.
      UserError: the flags do not say who they are; or versions or settings differ.
    """
    found = whereabouts(processes, os.environ)
    if found is None:
        return
    import jax

    if not processes.saves:
        jax.config.update("jax_enable_preemption_service", False)  # it would only take note of SIGTERM
    found["heartbeat_timeout_seconds"] = max(1, round(processes.heartbeat_timeout))
    found["initialization_timeout"] = max(1, round(processes.join_timeout))
    try:
        with rollcall.held(processes.join_timeout, processes.heartbeat_timeout):
            if not channel.joined():  # it has in a program that runs one command after another
                jax.distributed.initialize(**found)
            if channel.count() > 1:
                watch.start(processes.step_timeout)
    except UserError:
        raise
    except (RuntimeError, ValueError, OSError) as error:
        # A host that is late or was lost meanwhile; or flags that say too little, which jax refuses with ValueError.
        kind = UserError if isinstance(error, ValueError) else TemporaryError
        raise kind(
            f"the processes did not find each other: {_why(error)}; outside of TPU pods and SLURM set "
            "--hosts, or --coordinator_address=HOST:PORT, --num_processes and --process_id; for a single process set "
            "--no-distributed"
        ) from None
    if channel.count() == 1:
        return
    compiled.keep_on_every_host()
    agreement.require_same(
        "the versions", agreement.versions(), advice="install the same versions on every host"
    )
    agreement.require_same(
        "the configuration", settings, advice="start every process with the same .gin files and flags"
    )


def _why(error: Exception) -> str:
    """jax's reason; where it is lost on the way through the callback of `rollcall.held`, what it was."""
    lost = "bad_cast" in str(error)
    return "one of them was lost meanwhile" if lost else first_line(error)[:300]


def whereabouts(processes: Processes, env: Mapping[str, str]) -> dict[str, Any] | None:
    """The arguments of jax.distributed.initialize; None for a program of one process.

    Args:
      processes: the flags.
      env: the environment variables.

    Raises:
      UserError: flags that contradict each other, or are incomplete.
    """
    for name in ("join_timeout", "heartbeat_timeout", "step_timeout"):
        if not 0 < (seconds := getattr(processes, name)) < math.inf:
            raise UserError(f"--{name} is {seconds:g}, expected a positive number of seconds: change --{name}")
    given = {
        name: value
        for name in ("hosts", "coordinator_address", "num_processes", "process_id")
        if (value := getattr(processes, name)) is not None
    }
    if processes.distributed is False:
        if given:
            raise UserError(f"--no-distributed and --{next(iter(given))} are both set: leave one of them out")
        return None
    if processes.hosts is not None:
        if len(given) > 1:
            raise UserError(f"--hosts and --{list(given)[1]} are both set: leave one of them out")
        return _among(processes.hosts.split(","))
    address = processes.coordinator_address or env.get("JAX_COORDINATOR_ADDRESS")
    if address is None:
        if given:
            raise UserError("--num_processes and --process_id need the address of process 0: set --coordinator_address")
        wanted = processes.distributed or _has_tasks(env) or _on_tpus(env)
        return {**_devices(env)} if wanted else None
    if not address.rpartition(":")[2].isdecimal() or not address.rpartition(":")[0]:
        raise UserError(f"--coordinator_address is {address!r}, expected HOST:PORT, as in 10.0.0.1:{PORT}")
    count = _number(processes.num_processes, env, "JAX_NUM_PROCESSES")
    index = _number(processes.process_id, env, "JAX_PROCESS_ID", "JOB_COMPLETION_INDEX")
    return {"coordinator_address": address, "num_processes": count, "process_id": index, **_devices(env)}


def _number(value: int | None, env: Mapping[str, str], *names: str) -> int | None:
    """A flag, or the first of these variables that is set; None if neither is, which leaves it to JAX."""
    if value is not None:
        return value
    name = next((name for name in names if env.get(name)), None)
    if name is None:
        return None
    if not env[name].isdecimal():
        raise UserError(f"{name} is {env[name]!r}, expected a number: change the environment variable")
    return int(env[name])


def _has_tasks(env: Mapping[str, str]) -> bool:
    """Whether this process is one of several tasks of a SLURM step or an mpirun."""
    return any(env.get(name, "").isdecimal() and int(env[name]) > 1 for name in _TASKS)


def _on_tpus(env: Mapping[str, str]) -> bool:
    """Whether this machine has TPUs that jax will use: then it may be one host of a pod, which JAX finds out."""
    platforms = env.get("JAX_PLATFORMS", "")
    return (
        (not platforms or "tpu" in platforms)
        and any(glob.glob(f"/dev/{name}") for name in _TPUS)
        and importlib.util.find_spec("libtpu") is not None
    )


def _devices(env: Mapping[str, str]) -> dict[str, Any]:
    """All GPUs for the only task of a host: under SLURM and Open MPI, JAX would give it a single one."""
    local = next((env[name] for name in _LOCAL_TASKS if name in env), None)
    if local is None or "JAX_LOCAL_DEVICE_IDS" in env or local.partition("(")[0] != "1":
        return {}
    visible = env.get("CUDA_VISIBLE_DEVICES")
    count = len(glob.glob("/dev/nvidia[0-9]*")) if visible is None else len(list(filter(None, visible.split(","))))
    return {"local_device_ids": list(range(count))} if count > 1 else {}


def _among(hosts: Sequence[str]) -> dict[str, Any]:
    """This process's place among hosts with one process each."""
    hosts = [host.strip() for host in hosts]
    if len(hosts) < 2 or not all(hosts):
        raise UserError(f"--hosts is {','.join(hosts)!r}, expected the names of at least two hosts, as in a,b,c")
    names = [host.rpartition(":")[0] if host.rpartition(":")[2].isdecimal() else host for host in hosts]
    mine = [i for i, name in enumerate(names) if _is_here(name)]
    if len(mine) != 1:
        found = "none of them" if not mine else f"{len(mine)} of them"
        raise UserError(
            f"--hosts is {','.join(hosts)}: {found} is this machine ({socket.gethostname()}); list each host once, or "
            "set --coordinator_address, --num_processes and --process_id"
        )
    address = hosts[0] if hosts[0] != names[0] else f"{hosts[0]}:{PORT}"
    return {"coordinator_address": address, "num_processes": len(hosts), "process_id": mine[0]}


def _is_here(host: str) -> bool:
    """Whether a name or address belongs to this machine: only then can a socket be bound to it."""
    if host == socket.gethostname():
        return True
    try:
        for family, kind, protocol, _, place in socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM):
            with socket.socket(family, kind, protocol) as probe:
                probe.bind(place)
                return True
    except OSError:
        pass
    return False
