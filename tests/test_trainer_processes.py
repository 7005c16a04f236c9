"""Several real processes: the losses of one, the same checkpoint after SIGTERM to one, one clear line after a death.

The tests share one run, which goes on with 2, 4 and 1 processes, and its workdir at the end. The workdir is in a bucket
of an emulator if there is one; the folder that holds its copy is removed between the first two, as on another machine.
"""

from __future__ import annotations

import importlib.util
import json
import pathlib
import re
import shutil
import signal
import socket
import subprocess
import sys
import time

import bucket_servers
import numpy as np
import pytest
import quick_xla
from own_output import own_lines
from tiny_runs import (  # noqa: F401
    GIN,
    ROOT,
    command,
    environment,
    losses,
    saved,
    text_fixture,
    tiny_trainer,
    write_gin,
)

from lcx.buckets import copies
from lcx.checkpoint import Checkpointer
from lcx.convert.__main__ import main as convert
from lcx.evaluate import main as evaluate
from lcx.generate import main as generate
from lcx.optim import AdamW

STEPS = 150  # a preemption is noticed only after about a second, in which a busy machine may do many of them
LONGER = GIN.replace("steps = 40", f"steps = {STEPS}").replace("checkpoint_every = 4", "checkpoint_every = 30")
MORE = """
from lcx import sharding
trainer.Trainer.mesh = @sharding.MeshShape()
optim.AdamW.schedule = 'constant'
"""
EVALUATE = ["--evals=loss_by_position", "--gin.LossByPosition.max_tokens=200"]
AFTER = """
import sys
from lcx.convert.__main__ import main as convert
from lcx.evaluate import main as evaluate
from lcx.generate import main as generate
run, out, *flags = sys.argv[1:]
status = evaluate([f"--checkpoint={run}", f"--output={out}/evaluation", *%r, *flags])
status += generate([f"--checkpoint={run}", "--prompt=def main", "--max_new_tokens=8", *flags])
status += convert([f"--src={run}", f"--dst={out}/hf", "--dst_format=hf", *flags])
sys.exit(status)
"""


@pytest.fixture(scope="module")
def one(text, tmp_path_factory):
    """The workdir of the same run in this process."""
    workdir = tmp_path_factory.mktemp("one")
    optimizer = AdamW(learning_rate=1e-2, warmup_steps=4, schedule="constant")
    tiny_trainer(text, optimizer=optimizer, checkpoint_every=30, steps=STEPS).run(str(workdir))
    return workdir


def joined(commands: list[list[str]]) -> list[subprocess.Popen]:
    """These commands as the processes of one program."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"--coordinator_address=127.0.0.1:{probe.getsockname()[1]}"
    env = environment(XLA_FLAGS=quick_xla.flags("--xla_force_host_platform_device_count=1"))
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "env": env}
    # No death is noticed by its silence here: a machine that stops all processes for a while has not lost one.
    shared = [address, f"--num_processes={len(commands)}", "--heartbeat_timeout=1000"]
    return [
        subprocess.Popen([*command, *shared, f"--process_id={rank}"], **pipes)
        for rank, command in enumerate(commands)
    ]


def start(text, workdir, count: int, *flags: str) -> list[subprocess.Popen]:
    return joined([command(write_gin(text, LONGER + MORE), workdir, *flags)] * count)


def finish(processes, seconds: float = 300) -> tuple[list[int], list[str], list[str]]:
    """(statuses, stdout, own lines of stderr) of each; a process that hangs is killed, and fails the test."""
    deadline = time.monotonic() + seconds
    try:
        said = [process.communicate(timeout=max(1, deadline - time.monotonic())) for process in processes]
    finally:
        for process in processes:
            process.kill()  # -9: after jax.distributed.initialize SIGTERM alone would not end a hung one
    return [p.returncode for p in processes], [out for out, _ in said], [err for _, err in said]


def wait_for_losses(workdir: pathlib.Path, count: int, processes) -> None:
    deadline = time.monotonic() + 300
    while not (workdir / "metrics.jsonl").exists() or len(losses(workdir)) < count:
        assert time.monotonic() < deadline and all(p.poll() is None for p in processes), finish(processes, 60)
        time.sleep(0.01)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """The shared run's --workdir, and the folder on this machine that has its files."""
    folder = tmp_path_factory.mktemp("several")
    if importlib.util.find_spec("moto") is None:
        yield str(folder), folder
        return
    with bucket_servers.running(), pytest.MonkeyPatch.context() as patch:
        patch.setenv("LCX_CACHE", str(folder))
        copies.local.cache_clear()
        url = f"s3://{bucket_servers.BUCKET}/several"
        yield url, copies.cache(url, "workdirs")


@pytest.fixture(scope="module")
def run(text, place):
    """A workdir, and what the processes said: two, of which one gets SIGTERM; four, of which one is killed; one."""
    given, workdir = place
    two = start(text, given, 2, "--gin.MeshShape.fsdp=1", "--gin.MeshShape.tensor=2")  # both read all rows
    wait_for_losses(workdir, 4, two)
    two[1].send_signal(signal.SIGTERM)
    said = {"stopped": finish(two), "step": saved(workdir)[0], "next": saved(workdir)[2]["data"]["next_index"]}
    if given != str(workdir):
        shutil.rmtree(workdir)
    four = start(text, given, 4, "--gin.MeshShape.fsdp=2", "--gin.MeshShape.data=2")
    wait_for_losses(workdir, said["step"] // 3 + 2, four)
    four[3].kill()
    said["killed"] = finish(four)
    said["done"] = finish(joined([command(write_gin(text, LONGER + MORE), given)]))
    return workdir, said


def test_sigterm_to_one_saves_the_same_step_and_ends_all(run):
    _, said = run
    statuses, _, err = said["stopped"]
    assert statuses == [0, 0], err
    assert 12 <= said["step"] < STEPS and said["next"] == said["step"] * 8
    assert f"stopped at step {said['step']} of {STEPS}" in err[0]
    assert "loss" not in err[1] and "stopped at" not in err[1]  # one of them talks


def test_a_process_that_dies_ends_all_others_with_one_line(run):
    statuses, _, err = run[1]["killed"]
    assert statuses == [75, 75, 75, -signal.SIGKILL], "\n".join(err)  # whole: the reasons are at the ends
    for said in err[:3]:
        (line,) = [line for line in said.splitlines() if line.startswith("error: ")]
        assert line.startswith(f"error: process 3 on {socket.gethostname()} is gone "), line
        assert "Traceback" not in said


def test_the_losses_are_those_of_one_process(run, one):
    """2, 4 and 1 processes, one after the other."""
    workdir, said = run
    assert said["done"][0] == [0], said
    assert f"step {said['step']} of {STEPS} is done: resuming" in said["killed"][2][0]
    found, expected = losses(workdir), losses(one)
    assert len(found) == len(expected) == STEPS // 3
    np.testing.assert_allclose(found[:4], expected[:4], rtol=1e-5)
    np.testing.assert_allclose(found, expected, rtol=2e-3)  # rounding has grown
    assert saved(workdir)[2]["data"] == saved(one)[2]["data"]


def test_what_follows_runs_in_two_processes_and_gives_what_one_gives(run, tmp_path, capsys):
    workdir, _ = run
    commands = [[sys.executable, "-c", AFTER % EVALUATE, str(workdir), str(tmp_path / "two")]] * 2
    (tmp_path / "two").mkdir()
    statuses, out, err = finish(joined(commands))
    assert statuses == [0, 0], err
    assert not own_lines(out[1]) and not own_lines(err[1])  # one of them talks
    flags = [f"--checkpoint={workdir}", f"--output={tmp_path}/one/evaluation", *EVALUATE]
    assert evaluate(flags) == 0
    found = [json.loads((tmp_path / name / "evaluation/results.json").read_text()) for name in ("one", "two")]
    tables = [results["evaluations"]["loss_by_position"]["table"] for results in found]
    assert tables[0] == pytest.approx(tables[1], rel=1e-5) and tables[0]
    capsys.readouterr()
    assert generate([f"--checkpoint={workdir}", "--prompt=def main", "--max_new_tokens=8"]) == 0
    assert capsys.readouterr().out in out[0]
    assert convert([f"--src={workdir}", f"--dst={tmp_path}/one/hf", "--dst_format=hf"]) == 0
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "one/hf" / name).read_bytes() == (tmp_path / "two/hf" / name).read_bytes()


@pytest.mark.parametrize("differs", ["versions", "configuration", "data"])
def test_hosts_that_differ_are_named_at_the_start(differs, text, tmp_path):
    """Of versions: one file of lcx was edited. Of data: the same relative path in two folders."""
    flags = [["--gin.Trainer.steps=4"], ["--gin.Trainer.steps=5"]]
    if differs == "data":
        flags = [[f"--gin.Dataset.source='{text}/text'"], [f"--gin.Dataset.source='{tmp_path}/text'"]]
        (tmp_path / "text").mkdir()
        (tmp_path / "text" / "00.txt").write_text("another text " * 100)
        folders = [tmp_path / "a", tmp_path / "b"]
        for folder, source in zip(folders, (text / "text", tmp_path / "text")):
            folder.mkdir()
            (folder / "here").symlink_to(source)
        flags = [["--gin.Dataset.source='here'"]] * 2
    commands = [command(write_gin(text, GIN), tmp_path / "run", *own) for own in flags]
    if differs == "versions":
        shutil.copytree(f"{ROOT}/lcx", tmp_path / "lcx", ignore=shutil.ignore_patterns("__pycache__"))
        (tmp_path / "lcx" / "version.py").open("a").write("# edited\n")
        commands[1] = ["env", "-C", str(tmp_path), *commands[1]]
    if differs == "data":
        commands = [["env", "-C", str(folder), *own] for folder, own in zip(folders, commands)]
    statuses, _, err = finish(joined(commands))
    host = socket.gethostname()
    assert statuses == [2, 2], err
    for said in err:
        (line,) = [line for line in own_lines(said) if line.startswith("error: ")]
        start = f"error: the processes do not agree on the {differs}: "
        assert line.startswith(start), line
        if differs == "versions":
            pattern = r"lcx is (.+) on (\S+) \(process 0\), (.+) on \2 \(process 1\); "
            found = re.match(pattern, line.removeprefix(start))
            assert found and found[1] != found[3], line
        if differs == "configuration":
            found = f"trainer.Trainer.steps is 4 on {host} (process 0), 5 on {host} (process 1)"
            assert line.startswith(start + found), line
    assert not (tmp_path / "run" / "checkpoints").exists()
    assert not Checkpointer(tmp_path / "run" / "checkpoints").steps()
