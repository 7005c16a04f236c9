"""One run over two processes, through the command: the losses of one process; a signal to either ends both, saved."""

from __future__ import annotations

import signal
import socket
import subprocess
import time

import numpy as np
import pytest
import quick_xla
from tiny_runs import (  # noqa: F401
    GIN,
    command,
    environment,
    lines,
    losses,
    saved,
    text_fixture,
    tiny_trainer,
    write_gin,
)

import lcx
from lcx.optim import AdamW


@pytest.fixture(scope="module")
def one(text, tmp_path_factory):
    """The workdir of the same run in this process."""
    workdir = tmp_path_factory.mktemp("one")
    optimizer = AdamW(learning_rate=1e-2, warmup_steps=4, schedule="constant")
    tiny_trainer(text, optimizer=optimizer, checkpoint_every=20).run(str(workdir))
    return workdir


MORE = """
from lcx import sharding
trainer.Trainer.mesh = @sharding.MeshShape()
trainer.Trainer.checkpoint_every = 20
optim.AdamW.schedule = 'constant'
"""


def start(text, workdir, *flags: str) -> list[subprocess.Popen]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"--coordinator_address=127.0.0.1:{probe.getsockname()[1]}"
    gin_file = write_gin(text, GIN + MORE)
    env = environment(XLA_FLAGS=quick_xla.flags("--xla_force_host_platform_device_count=1"))
    return [
        subprocess.Popen(
            command(gin_file, workdir, address, "--num_processes=2", f"--process_id={rank}", *flags),
            env=env,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in (0, 1)
    ]


def finish(processes, seconds: float = 150) -> list[str]:
    """What they said; a process that hangs is killed, and fails the test."""
    try:
        said = [process.communicate(timeout=seconds)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()  # -9: after jax.distributed.initialize SIGTERM alone would not end a hung one
    assert [process.returncode for process in processes] == [0, 0], said
    return said


def assert_same_losses(found, expected):
    np.testing.assert_allclose(found[:4], expected[:4], rtol=1e-5)
    np.testing.assert_allclose(found, expected, rtol=1e-3)  # rounding has grown


def test_the_losses_are_those_of_one_process(text, one, tmp_path):
    """Parameters and rows cut in two."""
    said = finish(start(text, tmp_path, "--gin.MeshShape.fsdp=2"))
    assert_same_losses(losses(tmp_path), losses(one))
    assert [line["step"] for line in lines(tmp_path)] == [line["step"] for line in lines(one)]
    evaluated = [
        line["eval_loss"] for folder in (tmp_path, one) for line in lines(folder) if "eval_loss" in line
    ]
    assert evaluated[0] == pytest.approx(evaluated[1], rel=1e-3)
    assert "step 40/40" in said[0] and "step" not in said[1]  # one of them talks
    assert saved(tmp_path)[2]["data"]["next_index"] == 40 * 8
    assert lcx.load(tmp_path)[0] == lcx.load(one)[0]


def test_sigterm_to_one_saves_and_ends_both(text, one, tmp_path):
    """Heads cut in two: both processes read all rows."""
    flags = ("--gin.Trainer.steps=4000", "--gin.Trainer.checkpoint_every=4000")
    processes = start(text, tmp_path, "--gin.MeshShape.fsdp=1", "--gin.MeshShape.tensor=2", *flags)
    deadline = time.monotonic() + 120
    while not (tmp_path / "metrics.jsonl").exists() or len(losses(tmp_path)) < 4:
        assert time.monotonic() < deadline and all(p.poll() is None for p in processes), finish(processes, 1)
        time.sleep(0.01)
    processes[1].send_signal(signal.SIGTERM)
    said = finish(processes)
    step, _, documents = saved(tmp_path)
    assert 12 <= step < 4000
    assert documents["data"]["next_index"] == step * 8
    assert f"stopped at step {step} of 4000" in said[0]
    np.testing.assert_allclose(losses(tmp_path)[:4], losses(one)[:4], rtol=1e-5)
