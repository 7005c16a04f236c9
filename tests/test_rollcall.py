"""Before the processes have joined: who is missing, who is gone. Real processes; they import no jax until they join."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest

from lcx.errors import TemporaryError
from lcx.multihost.peer import _RUN
from lcx.multihost.rollcall import Member, _numbers

HOST = socket.gethostname()
PROGRAM = """
import json, sys, time
from lcx.errors import UserError
from lcx.multihost import rollcall
from lcx.multihost.join import Processes, begin, join
flags, then = json.loads(sys.argv[1]), sys.argv[2]
processes, rollcall._LATE_S = Processes(**flags), float(sys.argv[3])
try:
    begin(processes)
    if then == "fails":
        raise UserError("its file has an error")
    if then == "imports":
        rollcall._part.known.wait()
        print("known", flush=True)
        time.sleep(60)
    join(processes, {})
    from lcx.multihost import channel, watch
    print(channel.hosts(), flush=True)
    watch.leave()
except UserError as error:
    print(f"error: {error}", file=sys.stderr, flush=True)
    rollcall.report(str(error), error.status)
    sys.exit(error.status)
"""


@pytest.fixture(name="start")
def start_fixture():
    """Starts a process of a program of three; `late` is for how many seconds process 0 tells those that come late."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    started = []

    def start(process: int, then: str = "joins", late: float = 0.1, **flags) -> subprocess.Popen:
        given = {"coordinator_address": address, "num_processes": 3, "process_id": process, **flags}
        command = [sys.executable, "-c", PROGRAM, json.dumps(given), then, str(late)]
        env = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
        started.append(
            subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        )
        return started[-1]

    start.address = address
    yield start
    for process in started:
        process.kill()
        process.communicate()


def said(process: subprocess.Popen, status: int = 75) -> str:
    """The one line of a process that has to end within a minute."""
    _, err = process.communicate(timeout=60)
    assert process.returncode == status, err
    (line,) = [line for line in err.splitlines() if line.startswith("error: ")]
    assert "Traceback" not in err
    return line.removeprefix("error: ")


def known(*processes: subprocess.Popen) -> None:
    """Waits until the others would notice that one of these has ended."""
    for process in processes:
        assert process.stdout.readline() == "known\n", process.communicate()


GONE = f"on {HOST} is gone (killed, out of memory, or a lost host)"


def test_one_that_is_killed_before_all_have_come_ends_those_that_wait_and_those_that_come_later(start):
    leader, killed = start(0, late=60, heartbeat_timeout=1000), start(1, "imports")
    known(killed)
    killed.kill()
    time.sleep(0.5)
    late = start(2)
    assert said(leader).startswith(f"process 1 {GONE}: ")
    assert said(late).startswith(f"process 1 {GONE}: ")


def test_one_that_is_killed_while_it_imports_ends_those_that_import_too(start):
    processes = [start(rank, "imports", heartbeat_timeout=1000) for rank in range(3)]  # not by its silence
    known(*processes)
    processes[2].kill()
    assert all(said(process).startswith(f"process 2 {GONE}: ") for process in processes[:2])


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "halted"])
def test_process_0_is_gone(start, number):
    leader, other = start(0, "imports"), start(1, "imports", heartbeat_timeout=2)
    known(other)
    leader.send_signal(number)
    assert said(other).startswith(f"process 0 {GONE}: ")


def test_one_that_is_halted_ends_the_others(start):
    leader, halted = start(0, heartbeat_timeout=2), start(1, "imports")  # a third one has not come yet
    known(halted)
    halted.send_signal(signal.SIGSTOP)
    assert said(leader).startswith(f"process 1 {GONE}: ")


def test_one_that_never_comes_is_named(start):
    leader, other = start(0, join_timeout=3), start(1)
    line = "process 2 of 3 did not come within 3 s: look at what that host says, or set --join_timeout to more seconds"
    assert said(leader) == line
    assert said(other).startswith(f"process 0 on {HOST} has ended: {line}: this process ends too")


def test_process_0_cannot_be_reached(start):
    assert said(start(2, join_timeout=1)).startswith(
        f"process 0 at {start.address} could not be reached within 1 s (connection refused): "
    )


@pytest.mark.parametrize("greeting, found", [
    (b"", "no answer"),
    (b"HTTP/1.1 400 Bad Request\r\n\r\n", "another program answers there"),
    (b"\0\0\x18\4\0\0\0\0\0", _RUN),  # as JAX's service begins: what a process meets that is started twice
])  # fmt: skip
def test_another_program_at_the_address_of_process_0(greeting, found):
    with socket.create_server(("127.0.0.1", 0)) as server:
        threading.Thread(target=greet, args=(server, greeting), daemon=True).start()
        address = f"127.0.0.1:{server.getsockname()[1]}"
        member = Member(address, 1, 3, timeout=0.5, silence=30)
        member.begin()
        with pytest.raises(TemporaryError) as error:
            member.wait()
        member.close()
    assert f"process 0 at {address} could not be reached within 0.5 s ({found}): look at" in str(error.value)


def greet(server, greeting):
    with contextlib.suppress(OSError), contextlib.ExitStack() as held:
        while True:
            held.enter_context(server.accept()[0]).sendall(greeting)


def test_one_that_is_started_twice_is_named_as_long_as_process_0_imports(start):
    known(*[start(rank, "imports") for rank in range(3)])
    assert said(start(1), 2).startswith(
        f"process 1 on {HOST} is also started on {HOST}, expected each number below 3"
    )


def test_one_that_ends_with_an_error_of_its_own_gives_its_reason(start):
    leader = start(0)
    assert said(start(1, "fails"), 2) == "its file has an error"
    assert said(leader, 2).startswith(f"process 1 on {HOST} has ended: its file has an error: ")


@pytest.mark.parametrize("flags, line", [
    ({}, f"process 1 on {HOST} is also started on {HOST}, expected each number below 3 once: set --process_id"),
    ({"num_processes": 4}, f"there are 4 processes on {HOST} (process 1), 3 on process 0 on {HOST}: set the same"),
])  # fmt: skip
def test_numbers_that_contradict_each_other(start, flags, line):
    leader = start(0)
    if not flags:
        known(start(1, "imports"))
    other = start(1, **flags)
    assert said(leader, 2).startswith(line) and said(other, 2).startswith(line)


def test_strangers_at_the_port_disturb_nobody(start):
    """A probe that asks whether the port is open, a client of HTTP, one that says nothing; another server."""
    host, port = start.address.split(":")
    other = socket.create_server((host, int(port)))
    threading.Thread(
        target=lambda: other.accept()[0].sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n"), daemon=True
    ).start()
    early = start(1, num_processes=2)
    time.sleep(1)
    other.close()
    leader = start(0, num_processes=2)
    greetings, strangers = [b"", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", b'{"a": 1}\n[1]\n', b"1\n"], []
    while leader.poll() is None and len(strangers) < len(greetings):
        try:
            strangers.append(socket.create_connection((host, int(port)), timeout=5))
        except OSError:
            time.sleep(0.01)
            continue
        strangers[-1].sendall(greetings[len(strangers) - 1])
        if len(strangers) == 1:
            strangers[0].close()
    for process in (leader, early):
        out, err = process.communicate(timeout=120)
        assert process.returncode == 0, err
        assert out == f"{[HOST, HOST]}\n"


def test_who_is_missing_is_one_short_line():
    assert _numbers([3]) == "process 3"
    assert _numbers([1, 2, 3, 4, 9, 10]) == "processes 1, 2, 3, 4 and 2 more"
