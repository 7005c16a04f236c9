"""Checkpoints under real faults: flipped bits, lost files, full disks, killed processes, other meshes."""

from __future__ import annotations

import asyncio
import errno
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import time
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import quick_xla
from checkpoint_steps import steps_dir_fixture, three_steps_fixture  # noqa: F401
from checkpoint_workers import (
    abstract_of,
    assert_same,
    largest_file,
    run_worker,
    state_of,
    worker_command,
    worker_env,
    write_steps,
)
from own_output import own_lines

from lcx.checkpoint import Checkpointer, read_record
from lcx.checkpoint import checkpointer as checkpoint
from lcx.checkpoint.folder import why_not_written
from lcx.errors import UserError
from lcx.multihost import watch

# pytest reports what Orbax's abandoned coroutines raise; outside of pytest lcx.checkpoint keeps them quiet.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


# --- damaged files


def flip_a_bit(step_dir):
    path = largest_file(step_dir / "params")
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)


def truncate(step_dir):
    path = largest_file(step_dir / "params")
    os.truncate(path, path.stat().st_size // 2)


def delete_data(step_dir):
    largest_file(step_dir / "params").unlink()


def delete_item(step_dir):
    shutil.rmtree(step_dir / "opt_state")


def delete_manifest(step_dir):
    (step_dir / "params" / "manifest.ocdbt").unlink()


def garble_metadata(step_dir):
    (step_dir / "params" / "_METADATA").write_text('{"tree_meta')


def empty_record(step_dir):
    (step_dir / "fingerprints" / "metadata").write_text("")


def change_record(step_dir):
    path = step_dir / "fingerprints" / "metadata"
    path.write_text(path.read_text().replace('"shape": [48, 64]', '"shape": [48, 65]'))


def delete_record(step_dir):
    shutil.rmtree(step_dir / "fingerprints")


def change_json(step_dir):
    path = step_dir / "meta" / "metadata"
    path.write_text(path.read_text().replace("tiny", "tinz"))


DAMAGES = [
    flip_a_bit,
    truncate,
    delete_data,
    delete_item,
    delete_manifest,
    garble_metadata,
    empty_record,
    change_record,
    delete_record,
    change_json,
]


@pytest.mark.parametrize("damage", DAMAGES)
def test_falls_back_to_the_newest_step_that_verifies(steps_dir, caplog, damage):
    damage(steps_dir / "3")
    step, items, documents = Checkpointer(steps_dir).restore(abstract_of(state_of(3)))
    assert step == 2
    assert documents["meta"]["step"] == 2
    assert_same(items, state_of(2))
    (warning,) = [r.getMessage() for r in caplog.records if r.name == "lcx.checkpoint"]
    assert "step 3: " in warning
    assert "using step 2" in warning
    assert "\n" not in warning
    assert len(warning) < 600


def test_every_bit_flip_in_the_data_is_noticed(steps_dir):
    path = largest_file(steps_dir / "3" / "params")
    good = path.read_bytes()
    rng = random.Random(0)
    for _ in range(12):
        bad = bytearray(good)
        bad[rng.randrange(len(bad))] ^= 1 << rng.randrange(8)
        path.write_bytes(bad)
        step, items, _ = Checkpointer(steps_dir).restore({"params": abstract_of(state_of(3)["params"])})
        assert_same(
            items, {"params": state_of(step)["params"]}
        )  # unread bytes may leave step 3 intact, never wrong


def test_bad_numbers_without_any_read_error_are_noticed(steps_dir, monkeypatch):
    read = checkpoint._read_arrays

    def one_element_off(item_dir, wanted):
        arrays = read(item_dir, wanted)
        if item_dir.parent.name == "3":
            arrays["embed/embedding"] = arrays["embed/embedding"].at[11, 5].multiply(1 + 2**-20)
        return arrays

    monkeypatch.setattr(checkpoint, "_read_arrays", one_element_off)
    step, _, _ = Checkpointer(steps_dir).restore({"params": abstract_of(state_of(3)["params"])})
    assert step == 2


def test_two_damaged_steps_then_all(steps_dir):
    flip_a_bit(steps_dir / "3")
    truncate(steps_dir / "2")
    step, items, _ = Checkpointer(steps_dir).restore(abstract_of(state_of(3)))
    assert step == 1
    assert_same(items, state_of(1))
    delete_item(steps_dir / "1")
    with pytest.raises(UserError, match="no usable checkpoint.*step 3: .*step 2: .*step 1: ") as caught:
        Checkpointer(steps_dir).restore(abstract_of(state_of(3)))
    assert "\n" not in str(caught.value)


def test_a_named_step_does_not_fall_back(steps_dir):
    flip_a_bit(steps_dir / "3")
    checkpointer = Checkpointer(steps_dir)
    with pytest.raises(UserError, match="checkpoints/3 is damaged: params"):
        checkpointer.restore(abstract_of(state_of(3)), step=3)
    step, items, _ = checkpointer.restore(abstract_of(state_of(1)), step=1)
    assert step == 1
    assert_same(items, state_of(1))
    with pytest.raises(UserError, match="no checkpoint of step 4 .*found steps 1, 2, 3"):
        checkpointer.restore(abstract_of(state_of(1)), step=4)


def test_training_on_after_a_fall_back_keeps_the_damaged_steps_aside(steps_dir, caplog):
    flip_a_bit(steps_dir / "3")
    truncate(steps_dir / "2")
    with Checkpointer(steps_dir, max_to_keep=2) as checkpointer:
        assert checkpointer.restore(abstract_of(state_of(3)))[0] == 1
        assert checkpointer.steps() == [1, 2, 3]  # reading changed nothing
        assert checkpointer.save(1, state_of(1))  # the step it stands on: nothing to do
        assert checkpointer.steps() == [1, 2, 3]
        assert checkpointer.save(2, state_of(2), json={"meta": {"step": 2}}, wait=True)
        assert checkpointer.steps() == [1, 2]
    assert sorted(os.listdir(steps_dir / "_set_aside")) == ["2", "3"]
    assert sum("_set_aside" in r.getMessage() for r in caplog.records) == 2
    step, items, _ = Checkpointer(steps_dir).restore(abstract_of(state_of(2)))
    assert step == 2
    assert_same(items, state_of(2))


def test_damage_is_one_quiet_line(steps_dir):
    truncate(steps_dir / "3")
    delete_data(steps_dir / "2")
    done = run_worker("restore", steps_dir)
    assert done.stdout == "1\n"
    assert "Traceback" not in done.stderr
    assert "tensorstore" not in done.stderr.lower()
    assert len(own_lines(done.stderr)) == 1, done.stderr


def test_arrays_that_fail_after_the_first_print_nothing(steps_dir, caplog):
    """Orbax reads arrays concurrently and raises the first failure; asyncio logs the ones that nobody awaits."""
    Checkpointer(steps_dir).close()
    with pytest.raises(FileNotFoundError) as of_orbax:
        checkpoint.ocp.PyTreeCheckpointHandler().restore(steps_dir / "nothing")
    loop = asyncio.new_event_loop()
    for error in (of_orbax.value, ValueError("another program's")):
        loop.call_exception_handler({"message": "Task exception was never retrieved", "exception": error})
    loop.close()
    assert [str(r.exc_info[1]) for r in caplog.records if r.name == "asyncio"] == ["another program's"]


# --- saves that fail


def failing_writes(monkeypatch, error: Exception):
    """Every background save fails with error until the returned dict says otherwise."""
    switch = {"on": True}
    wait = checkpoint.ocp.CheckpointManager.wait_until_finished

    def wait_and_fail(manager):
        wait(manager)
        steps = checkpoint.committed_steps(manager.directory)
        if switch["on"] and steps and steps[-1] not in switch.get("good", ()):
            (manager.directory / str(steps[-1]) / "commit_success.txt").unlink()
            raise error

    monkeypatch.setattr(checkpoint.ocp.CheckpointManager, "wait_until_finished", wait_and_fail)
    return switch


def test_a_failed_save_is_reported_and_the_next_one_works(tmp_path, monkeypatch, caplog):
    switch = failing_writes(monkeypatch, OSError(errno.ENOSPC, "No space left on device"))
    checkpointer = Checkpointer(tmp_path)
    assert checkpointer.save(1, state_of(1))
    while not checkpointer.poll():
        time.sleep(0.01)
    assert len(checkpointer.failures) == 1
    assert "checkpoint of step 1 was not written: no space left" in checkpointer.failures[0]
    assert "it needs up to 0.1 MB" in checkpointer.failures[0]
    assert not (tmp_path / "1").exists()
    assert checkpointer.poll() == []
    checkpointer.save(2, state_of(2))
    switch["on"] = False
    checkpointer.save(3, state_of(3))
    checkpointer.close()
    assert checkpointer.steps() == [2, 3]
    assert [r.getMessage() for r in caplog.records if r.name == "lcx.checkpoint"] == checkpointer.failures


def test_the_first_cause_is_the_one_reported():
    try:
        try:
            raise OSError(errno.ENOSPC, "No space left on device")
        except OSError:
            raise TimeoutError(
                "Barrier timed out. This usually happens because a task came too early"
            ) from None
    except TimeoutError as error:
        line = why_not_written(error, "/", 3_000_000_000)
    assert line.startswith("no space left on the disk of / (it needs up to 3.00 GB, ")
    assert why_not_written(ValueError("x [tensorstore_spec='{}']"), "/nowhere", 5).startswith(
        "ValueError: x (it"
    )


def test_the_last_save_must_land(tmp_path, monkeypatch):
    failing_writes(monkeypatch, ValueError("broken pipe " * 999))
    checkpointer = Checkpointer(tmp_path)
    with pytest.raises(UserError, match="step 1 was not written: ValueError: broken pipe") as caught:
        checkpointer.save(1, state_of(1), wait=True)
    assert len(str(caught.value)) < 600
    checkpointer.close()  # said once is enough
    checkpointer = Checkpointer(tmp_path)
    checkpointer.save(2, state_of(2))
    with pytest.raises(UserError, match="step 2 was not written"):
        checkpointer.close()
    with pytest.raises(KeyError, match="mine"), Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(3, state_of(3))
        raise KeyError("mine")  # not hidden by the failed save


def test_a_failure_before_the_background_part_is_reported(tmp_path, monkeypatch):
    def save(*args, **kwargs):
        raise OSError(errno.EIO, "Input/output error")

    checkpointer = Checkpointer(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.ocp.CheckpointManager, "save", save)
        assert not checkpointer.save(1, state_of(1))
    assert "Input/output error" in checkpointer.failures[0]
    assert checkpointer.save(1, state_of(1), wait=True)
    assert checkpointer.steps() == [1]


def test_a_save_that_fails_as_another_process_is_gone_ends_the_run(tmp_path, monkeypatch):
    """A collective of Orbax failed: nothing is wrong with this process or its disk."""
    saver = Checkpointer(tmp_path)

    def fails(*_, **__):
        raise ValueError("UNKNOWN: Gloo AllGather failed: Connection closed by peer")  # the caller blames it once more

    of_this = types.SimpleNamespace(blame=lambda: "process 1 is gone", report=lambda *_: None)
    monkeypatch.setattr(watch, "_watch", of_this)
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.ocp.CheckpointManager, "save", fails)
        with pytest.raises(ValueError, match="Gloo AllGather failed"):
            saver.save(1, state_of(1))
    assert not saver.failures


def test_trouble_after_the_commit_is_no_lost_save(tmp_path, monkeypatch, caplog):
    def wait(manager):
        manager._finalize_thread.get_not_none().join()
        raise OSError(errno.EBUSY, "Device or resource busy")

    checkpointer = Checkpointer(tmp_path)
    with monkeypatch.context() as patch:
        checkpointer.save(1, state_of(1))
        patch.setattr(checkpoint.ocp.CheckpointManager, "wait_until_finished", wait)
        checkpointer.poll()
        while checkpointer._pending:
            checkpointer.poll()
    assert checkpointer.failures == []
    assert "step 1 is saved, but the cleanup after it failed: OSError" in caplog.text
    checkpointer.save(2, state_of(2))
    checkpointer.close()
    assert checkpointer.steps() == [1, 2]


def test_a_folder_that_cannot_be_readied_does_not_stop_the_run(steps_dir, monkeypatch):
    """The disk is full when the first save after a fall back wants to set the damaged step aside."""

    def full(self, step):
        raise OSError(errno.ENOSPC, "No space left on device")

    truncate(steps_dir / "3")
    checkpointer = Checkpointer(steps_dir)
    assert checkpointer.restore(abstract_of(state_of(1)))[0] == 2
    with monkeypatch.context() as patch:
        patch.setattr(Checkpointer, "_set_aside", full)
        assert not checkpointer.save(3, state_of(3))
    assert "no space left" in checkpointer.failures[0]
    assert checkpointer.steps() == [1, 2, 3]
    assert checkpointer.save(4, state_of(4), wait=True)
    assert checkpointer.steps() == [1, 2, 4]


@pytest.fixture
def small_disk(tmp_path):
    """A folder on a file system of 4 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = shutil.which("mount")
    command = [mount or "mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(folder)]
    if not mount or os.geteuid() != 0 or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("needs the right to mount a tmpfs; the failures are simulated in the tests above")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_full_disk(small_disk):
    done = run_worker("fill_disk", small_disk)
    report = json.loads(done.stdout)
    assert report["failed"] == [4, 5]  # while a stranger's file fills the disk
    assert report["steps_while_full"] == [2, 3]
    assert report["steps"] == [6, 7]
    assert "Traceback" not in done.stderr
    lines = own_lines(done.stderr)
    assert len(lines) == 2, done.stderr
    assert "step 4 was not written: no space left on the disk" in lines[0]
    assert "it needs up to 0.4 MB" in lines[0]
    assert "steps on disk: 3, 2" in lines[0]


# --- kill -9


def test_killed_in_the_middle_of_saves(tmp_path):
    rng = random.Random(5)
    resumed = 0
    for _ in range(6):
        command = worker_command("save_forever", tmp_path, resumed)
        with subprocess.Popen(command, env=worker_env(), stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            landed = [int(process.stdout.readline())]  # one save got through, the next ones are under way
            time.sleep(rng.uniform(0.0, 0.6))
            process.send_signal(signal.SIGKILL)
            landed += [int(line) for line in process.stdout.read().splitlines()]
        checkpointer = Checkpointer(tmp_path, max_to_keep=2)
        for step in checkpointer.steps():  # whatever is listed can be read
            _, items, _ = checkpointer.restore(abstract_of(state_of(step, 256)), step=step)
            assert_same(items, state_of(step, 256))
        assert checkpointer.steps()[-1] >= landed[-1] > resumed
        resumed = checkpointer.steps()[-1]


# --- other meshes and more processes


def test_one_device_to_eight_and_back(tmp_path):
    write_steps(tmp_path, [1])
    flags = quick_xla.flags("--xla_force_host_platform_device_count=8")
    done = run_worker("reshard", tmp_path, XLA_FLAGS=flags, NPROC="32")
    assert done.returncode == 0, done.stderr
    for step in (2, 3, 4):  # written on three meshes
        _, items, _ = Checkpointer(tmp_path).restore(abstract_of(state_of(1)), step=step)
        assert_same(items, state_of(1))
    records = [read_record(tmp_path / str(step)).arrays for step in (1, 2, 3, 4)]
    assert all(record == records[0] for record in records)  # the fingerprints know of no mesh


def test_two_processes_take_the_same_step(tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    env = worker_env(XLA_FLAGS=quick_xla.flags("--xla_force_host_platform_device_count=1"))
    processes = [
        subprocess.Popen(
            worker_command("process", rank, port, tmp_path),
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in (0, 1)
    ]
    try:
        outputs = [process.communicate(timeout=100) for process in processes]
    finally:
        for process in processes:
            process.kill()
    for (out, err), rank in zip(outputs, (0, 1), strict=True):
        assert out.endswith("done\n"), (rank, out, err[-3000:])
        assert "using step 2" in err
    assert "another process could not use params" in outputs[0][1]
    assert "broken on this host" in outputs[1][1]
    _, items, _ = Checkpointer(tmp_path).restore(
        {"params": {"w": jax.ShapeDtypeStruct((4, 6), jnp.float32)}}, step=3
    )
    np.testing.assert_array_equal(items["params"]["w"], np.arange(24).reshape(4, 6) + 3)
