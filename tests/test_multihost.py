"""Who a process is, what a difference between hosts is called, when a step hangs, and what each process keeps."""

from __future__ import annotations

import itertools
import os
import socket
import subprocess
import sys
import threading
import types

import jax
import pytest

from lcx.config import processes
from lcx.config.flags import Flags
from lcx.errors import UserError
from lcx.multihost import agreement, channel, watch
from lcx.multihost.join import PORT, Processes, join, whereabouts

HERE = socket.gethostname()
THREE = {"coordinator_address": "10.0.0.1:99", "num_processes": 4, "process_id": 2}
SLURM = {"SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "2", "SLURM_STEP_TASKS_PER_NODE": "1(x4)"}


def two(address, index):
    return {"coordinator_address": address, "num_processes": 2, "process_id": index}


@pytest.mark.parametrize(
    "flags, env, expected",
    [
        ({}, {}, None),
        (THREE, {}, THREE),
        (THREE, {"JAX_PROCESS_ID": "3"}, THREE),
        ({}, {"JAX_COORDINATOR_ADDRESS": "10.0.0.1:99", "JAX_NUM_PROCESSES": "4", "JAX_PROCESS_ID": "2"}, THREE),
        ({"num_processes": 4}, {"JAX_COORDINATOR_ADDRESS": "10.0.0.1:99", "JOB_COMPLETION_INDEX": "2"}, THREE),
        ({}, {"JOB_COMPLETION_INDEX": "2"}, None),  # an indexed job may be of independent tasks
        ({"distributed": True}, {}, {}),
        ({}, SLURM, {}),
        ({"distributed": False}, SLURM, None),
        ({}, SLURM | {"SLURM_STEP_NUM_TASKS": "1"}, None),
        ({}, SLURM | {"CUDA_VISIBLE_DEVICES": "0,1,2,3"}, {"local_device_ids": [0, 1, 2, 3]}),
        ({}, SLURM | {"CUDA_VISIBLE_DEVICES": "0,1", "SLURM_STEP_TASKS_PER_NODE": "2(x2)"}, {}),
        ({}, SLURM | {"CUDA_VISIBLE_DEVICES": "0,1", "JAX_LOCAL_DEVICE_IDS": "1"}, {}),
        ({}, {"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_LOCAL_SIZE": "2"}, {}),
        ({"hosts": f"203.0.113.9,{HERE}"}, {}, two(f"203.0.113.9:{PORT}", 1)),
        ({"hosts": "127.0.0.1:77, 203.0.113.9"}, {}, two("127.0.0.1:77", 0)),
    ],
)
def test_a_process_finds_out_who_it_is(flags, env, expected):
    assert whereabouts(Processes(**flags), env | {"JAX_PLATFORMS": "cpu"}) == expected


@pytest.mark.parametrize(
    "flags, env, message",
    [
        ({"num_processes": 2}, {}, "need the address of process 0: set --coordinator_address"),
        ({"coordinator_address": "host"}, {}, "is 'host', expected HOST:PORT"),
        ({"distributed": False, "process_id": 1}, {}, "--no-distributed and --process_id are both set"),
        ({"hosts": "a,b", "process_id": 1}, {}, "--hosts and --process_id are both set"),
        ({"heartbeat_timeout": 0}, {}, "--heartbeat_timeout is 0, expected a positive number"),
        ({"hosts": "a"}, {}, "expected the names of at least two hosts"),
        ({"hosts": "203.0.113.8,203.0.113.9"}, {}, f"none of them is this machine \\({HERE}\\)"),
        ({"hosts": f"{HERE},127.0.0.1"}, {}, "2 of them is this machine"),
        ({}, {"JAX_COORDINATOR_ADDRESS": "a:1", "JAX_NUM_PROCESSES": "two"}, "JAX_NUM_PROCESSES is 'two', expected a"),
    ],
)
def test_flags_that_say_too_little_or_too_much(flags, env, message):
    with pytest.raises(UserError, match=message) as error:
        whereabouts(Processes(**flags), env)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("error, why, status", [
    (RuntimeError("DEADLINE_EXCEEDED: late"), "DEADLINE_EXCEEDED: late", 75),
    (RuntimeError("std::bad_cast"), "one of them was lost meanwhile", 75),
    (ValueError("no address"), "no address", 2),
])  # fmt: skip
def test_a_host_that_is_late_is_no_mistake_in_the_settings(error, why, status, monkeypatch):
    """Scripts start the same command again after 75, and never after 2."""

    def initialize(**_):
        raise error

    monkeypatch.setattr(jax.distributed, "initialize", initialize)
    with pytest.raises(UserError, match=f"the processes did not find each other: {why}") as found:
        join(Processes(hosts=f"203.0.113.9,{HERE}"), {})
    assert found.value.status == status


def test_a_difference_names_each_value_and_its_hosts():
    hosts = ["a", "a", "b", "c", "d", "e"]
    jax = ["0.10.1", "0.10.1", "0.10.2", "0.10.1", "0.10.1", "0.10.1"]
    values = [{"lcx": "1", "jax": version} for version in jax]
    assert agreement.difference("the versions", values, hosts) == (
        "the processes do not agree on the versions: jax is 0.10.1 on a, c, d, e (processes 0, 1, 3, 4, ...), "
        "0.10.2 on b (process 2)"
    )
    values[2] = {"lcx": "1", "jax": "0.10.1", "flax": "3"}
    values[0] = values[1]
    said = agreement.difference("the versions", values, hosts)
    assert "flax is not set on a, c, d, e" in said and "3 on b (process 2)" in said


def test_versions_know_the_source():
    found = agreement.versions()
    assert {"lcx", "jax", "jaxlib"} <= found.keys() and "source" in found["lcx"]


def test_all_that_has_to_be_the_same():
    config = """
import lcx.trainer
# Parameters for Trainer:
# ==================
Trainer.steps = 40
Trainer.names = \\
    {'a': 1,
     'b = 2': 3}
Trainer.seed = 0
"""
    flags = Flags(own={"workdir": "/run"}, gin_files=[], bindings=[], debug=False)
    found = processes.settings(flags, config, {"XLA_FLAGS": "--x", "HOSTNAME": "a"})
    assert found == {
        "--workdir": "'/run'",
        "import lcx.trainer": "imported",
        "Trainer.steps": "40",
        "Trainer.names": "\\    {'a': 1,     'b = 2': 3}",
        "Trainer.seed": "0",
        "XLA_FLAGS": "--x",
        **dict.fromkeys(("JAX_ENABLE_X64", "JAX_DEFAULT_MATMUL_PRECISION", "JAX_PLATFORMS"), "not set"),
    }


def test_when_a_step_hangs():
    steps = watch.Steps(timeout=100)
    steps.dispatched(1)
    steps.tick(1e6)
    assert not steps.hang()  # it compiles
    steps.finished()
    steps.tick(1e6)
    assert not steps.hang()  # nothing is under way
    steps.dispatched(2)
    steps.tick(30)
    steps.finished()
    steps.dispatched(3)
    steps.tick(299)
    assert not steps.hang()  # ten times the slowest
    steps.tick(2)
    assert steps.hang()
    steps.rest()
    steps.tick(1e6)
    assert not steps.hang()  # an evaluation or a checkpoint
    fast = watch.Steps(timeout=100)
    for step in range(3):
        fast.dispatched(step)
        fast.finished()
    fast.dispatched(4)
    fast.tick(101)
    assert fast.hang()


def test_a_hanging_step_names_who_is_behind():
    hosts = ["a", "b", "c"]
    assert "the others wait for process 1 on b (step 6)" in watch.hanging(7, 600, {0: 7, 1: 6, 2: 7}, hosts)
    said = watch.hanging(7, 600, {0: 7, 1: 7, 2: 7}, hosts)
    assert said == "step 7 has not ended for 600 s (--step_timeout): every process is in it, and one of them hangs"


def test_alone_nothing_is_compared_or_waited_for():
    agreement.require_same("anything", {}, advice="")
    agreement.require_same_outcome("anything", "failed")
    assert agreement.first_only(lambda x: x + 1)(1) == 2
    watch.dispatched(1)
    watch.finished()
    watch.rest()
    watch.report("an error", 2)
    assert watch.blame(RuntimeError()) is None


@pytest.mark.parametrize("hosts", [{0: "a", 1: "b", 2: "c"}, {}], ids=["known", "not yet known"])
def test_a_process_that_was_gone_before_its_first_sign_of_life_is_blamed(hosts, monkeypatch):
    """Perhaps even before it could say on which host it is."""
    beats = itertools.count()
    monkeypatch.setattr(channel, "_hosts", hosts)
    monkeypatch.setattr(channel, "count", lambda: 3)
    monkeypatch.setattr(channel, "index", lambda: 0)
    monkeypatch.setattr(channel, "put", lambda key, text: None)
    monkeypatch.setattr(channel, "by_process", lambda name: {0: "1", 1: f"{next(beats)}"} if name == "alive" else {})
    monkeypatch.setattr(watch, "_SILENT_S", 0.3)
    monkeypatch.setattr(watch, "_PERIOD_S", 0.1)
    who = "process 2 on c" if hosts else "process 2"
    looking = watch.Watch(1.0)
    looking._look()
    assert looking.blame() == f"{who} is gone (killed, out of memory, or a lost host)"
    looking._look()
    assert set(looking._silent) == {0, 2}  # process 0, this one, has said nothing here


def test_a_process_that_ends_does_not_wait_for_one_that_is_halted(monkeypatch):
    """Calls of JAX's client wait for process 0 without an end."""
    halted, ended = threading.Event(), []
    monkeypatch.setattr(channel, "_hosts", {0: "a", 1: "b"})
    monkeypatch.setattr(channel, "index", lambda: 1)
    for name in ("put", "by_process"):
        monkeypatch.setattr(channel, name, lambda *_: halted.wait())
    monkeypatch.setattr(channel, "hosts", lambda: ["a", "b"])
    monkeypatch.setattr(watch, "_ANSWER_S", 0.1)
    monkeypatch.setattr(watch, "end", lambda line, status: ended.append(line))
    ending = watch.Watch(1.0)
    of_this = threading.Thread(
        target=lambda: (ending.report("an error", 2), ended.append(ending.blame()), ending._end_hanging()),
        daemon=True,
    )
    of_this.start()
    of_this.join(20)
    assert not of_this.is_alive()
    halted.set()
    assert ended[0] == "process 0 on a is gone (killed, out of memory, or a lost host)"
    assert ended[1].startswith("step 0 has not ended for 0 s (--step_timeout): every process is in it")


@pytest.mark.parametrize("lost", ["before it has left", "after it"])
def test_a_process_that_is_lost_while_this_one_exits_is_named(lost, monkeypatch):
    """Its own work is done; JAX would end it with status 0 and a traceback, or abort it with pages of C++."""

    def fails(*_):
        raise RuntimeError("std::bad_cast")

    leaving = watch.Watch(1.0)
    monkeypatch.setattr(watch.channel, "gather", fails if lost == "before it has left" else lambda *_: ["", ""])
    monkeypatch.setattr(jax.distributed, "shutdown", fails)
    monkeypatch.setattr(channel, "_hosts", {0: "a", 1: "b"})
    monkeypatch.setattr(leaving, "_silent", {1: 30})
    monkeypatch.setattr(watch, "end", lambda line, status: sys.exit(f"{status} {line}"))
    with pytest.raises(SystemExit, match="75 process 1 on b is gone"):
        leaving.leave()
    monkeypatch.setattr(jax.distributed, "shutdown", lambda: None)
    monkeypatch.setattr(channel, "gather", lambda *_: ["", ""])
    monkeypatch.setattr(leaving, "stop", lambda: None)
    leaving.leave()


@pytest.mark.parametrize("status", [0, 130])
def test_a_process_that_ends_with_a_status_waits_for_the_others(status, monkeypatch):
    """After Ctrl-C in one of them, all have saved the same step, and the others end with 0."""
    done = []
    of_this = types.SimpleNamespace(leave=lambda: done.append("left"), _steps=watch.Steps(1))
    monkeypatch.setattr(watch, "_watch", of_this)
    processes.leave(status)
    assert done == (["left"] if status else [])


def test_what_xla_raises_is_told_from_errors_of_this_process():
    gloo = "UNKNOWN: Gloo AllGather failed: Read error [127.0.0.1]:5010: Connection reset by peer"
    assert watch._of_runtime(jax.errors.JaxRuntimeError("a collective failed"))
    assert watch._of_runtime(ValueError(gloo))
    with pytest.raises(RuntimeError) as wrapped:
        try:
            raise ValueError(gloo)
        except ValueError as error:
            raise RuntimeError("the save failed") from error
    assert watch._of_runtime(wrapped.value)
    for own in (ValueError("unknown: a name"), KeyError("INTERNAL"), RuntimeError("a status of UNKNOWN: 3")):
        assert not watch._of_runtime(own)


PROGRAM = """
import sys
import jax
from lcx.multihost import compiled
jax.distributed.initialize(sys.argv[1], num_processes=2, process_id=int(sys.argv[2]))
compiled.keep_on_every_host()
compiled.keep_on_every_host()  # as the next command of a program does
mesh = jax.make_mesh((2,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
of_both = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("x"))
x = jax.make_array_from_callback((2,), of_both, lambda at: jax.numpy.ones(1))
jax.jit(lambda to_be_kept: to_be_kept + 1).lower(x).compile()
"""


def test_every_process_keeps_its_compiled_programs(tmp_path):
    """On CPUs the programs of two processes have different names, and jax writes those of process 0 alone."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    keep = {"JAX_COMPILATION_CACHE_DIR": str(tmp_path), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    env = {**os.environ, **keep, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": "", "JAX_COMPILATION_CACHE_MAX_SIZE": "-1"}
    commands = ([sys.executable, "-c", PROGRAM, address, rank] for rank in "01")
    processes = [subprocess.Popen(command, env=env) for command in commands]
    assert [process.wait(120) for process in processes] == [0, 0]
    assert len(list(tmp_path.glob("jit__lambda*"))) == 2
