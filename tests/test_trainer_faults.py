"""Runs that are killed, stopped, damaged, starved of disk or fed bad numbers; real processes where it matters."""

from __future__ import annotations

import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import pytest
from own_output import own_lines
from tiny_runs import (  # noqa: F401
    GIN,
    assert_same_checkpoint,
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
from lcx import model as model_lib
from lcx import objectives, terminal, train
from lcx import trainer as trainer_lib
from lcx.checkpoint import Checkpointer, model_json
from lcx.checkpoint.folder import COMMIT_MARKER
from lcx.convert import __main__ as convert_command
from lcx.errors import UserError
from lcx.optim import AdamW

# pytest reports what Orbax's abandoned coroutines raise; outside of pytest lcx.checkpoint keeps them quiet.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")

POISON = 1  # a byte that is in no other document


def poisoned(model, variables, batch):
    """The loss of a row with the poison in it is infinite."""
    loss, weight = objectives.next_token(model, variables, batch)
    return loss / jnp.where(jnp.any(batch["tokens"] == POISON), 0.0, 1.0), weight


@pytest.fixture(scope="module")
def gin_file(text):
    return write_gin(text)


@pytest.fixture(scope="module")
def whole(gin_file, tmp_path_factory):
    """The workdir of a run that nothing disturbed."""
    workdir = tmp_path_factory.mktemp("whole")
    assert train.main([f"--gin_file={gin_file}", f"--workdir={workdir}"]) == 0
    return workdir


def start(gin_file, workdir, *flags) -> subprocess.Popen:
    return subprocess.Popen(
        command(gin_file, workdir, *flags), env=environment(), stderr=subprocess.PIPE, text=True, cwd="/"
    )


def wait_for(condition, process, seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline and process.poll() is None, process.communicate(timeout=60)
        time.sleep(0.002)  # less than a save takes; looking without a pause costs the process its core


def finish(gin_file, workdir) -> str:
    done = subprocess.run(
        command(gin_file, workdir), env=environment(), capture_output=True, text=True, timeout=300, cwd="/"
    )
    assert done.returncode == 0, done.stderr
    return done.stderr


# --- killed


def unfinished(workdir: pathlib.Path) -> list[int]:
    """Steps whose folder is there and not yet committed."""
    folders = [path for path in (workdir / "checkpoints").glob("*") if path.name.isdecimal()]
    return [int(path.name) for path in folders if not (path / COMMIT_MARKER).exists()]


def test_kill_9_in_the_middle_of_saves_and_anywhere(gin_file, whole, tmp_path):
    """Each time the same command goes on; what comes out is, to the bit, what an undisturbed run gives."""

    def saving(least):
        return lambda: max(unfinished(tmp_path), default=0) >= least

    def trained(least):
        return lambda: 3 * len(losses_of(tmp_path)) >= least

    newest, hits = 0, 0
    for moment in (saving(8), trained(18), saving(28)):
        process = start(gin_file, tmp_path)
        wait_for(moment, process)
        process.send_signal(signal.SIGKILL)
        process.communicate(timeout=60)
        committed = Checkpointer(tmp_path / "checkpoints").steps()
        assert committed[-1] > newest
        newest = committed[-1]
        hits += bool(unfinished(tmp_path))
    assert newest < 40 and hits  # at least one was in the middle of a save
    finish(gin_file, tmp_path)
    assert_same_checkpoint(tmp_path, whole)
    assert lines(tmp_path) == lines(whole)
    assert not unfinished(tmp_path)


def losses_of(workdir: pathlib.Path) -> list:
    return losses(workdir) if (workdir / "metrics.jsonl").exists() else []


# --- asked to stop


def test_sigterm_saves_exits_0_and_the_same_command_goes_on(gin_file, whole, tmp_path):
    process = start(gin_file, tmp_path, "--gin.Trainer.checkpoint_every=1000")
    wait_for(lambda: losses_of(tmp_path), process)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert "SIGTERM: saving a checkpoint, then stopping; send it again to stop now" in err
    (step,) = Checkpointer(tmp_path / "checkpoints").steps()
    assert 3 <= step < 40
    assert f"stopped at step {step} of 40; the same command resumes from {tmp_path}/checkpoints/{step}" in err
    said = finish(gin_file, tmp_path)
    assert f"step {step} of 40 is done: resuming" in said
    for line in (
        "model: llama, 2 layers, ",
        " parameters in float32, activations in float32, window of 32 tokens",
        " tokens held out",
        "steps: 40, each of 8 rows x 32 = 256 tokens, on 1 x cpu",
        f"writing to {tmp_path}",
        "compiling the first step",
        f"done: {tmp_path}/checkpoints/40; next: python -m lcx.evaluate --checkpoint={tmp_path}",
    ):
        assert line in said
    assert_same_checkpoint(tmp_path, whole)
    assert lines(tmp_path) == lines(whole)


@pytest.mark.parametrize("first", ["SIGTERM", "SIGINT"])
def test_the_second_signal_stops_at_once(first):
    script = f"""
import os, signal, sys, time
from lcx.training.signals import StopRequest
with StopRequest() as stop:
    assert not stop.requested(0)
    os.kill(os.getpid(), signal.{first})
    assert stop.requested(1) and stop.requested(2)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(60)
    sys.exit("still here")
"""
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment(), capture_output=True, text=True, timeout=50
    )
    assert done.returncode == 128 + signal.SIGTERM, done
    assert own_lines(done.stderr) == [
        f"{first}: saving a checkpoint, then stopping; send it again to stop now"
    ]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_before_the_first_step_ends_a_run_that_compiles(number):
    """The main thread hangs in a C function that no signal interrupts, as the compiler is one."""
    script = """
import ctypes, sys
from lcx.training.signals import StopRequest
mutex = ctypes.create_string_buffer(128)
with StopRequest() as stop:
    stop.safe = "nothing is lost"
    print("compiling", flush=True)
    for _ in range(2):
        ctypes.CDLL(None).pthread_mutex_lock(mutex)
"""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen([sys.executable, "-c", script], env=environment(), **pipes)
    assert process.stdout.readline() == "compiling\n"
    process.send_signal(number)
    _, err = process.communicate(timeout=50)
    assert process.returncode == (0 if number == signal.SIGTERM else 128 + number)
    assert own_lines(err) == [f"{number.name}: nothing is lost"]


def test_a_run_that_can_never_save_stops_early(text, tmp_path, monkeypatch):
    class Full(Checkpointer):
        def save(self, step, items, **_):
            self.failures.append(f"checkpoint of step {step} was not written: no space left on device")

    monkeypatch.setattr(trainer_lib, "Checkpointer", Full)
    with pytest.raises(UserError, match="none of the first 2 checkpoints could be saved, .* of step 4 was not"):
        tiny_trainer(text, checkpoint_every=2, eval_batches=1).run(str(tmp_path))


def test_signals_are_given_back(tmp_path):
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    with pytest.raises(UserError, match="at step 1"):
        tiny_trainer(poisonous(tmp_path), objective=poisoned, eval_batches=1).run(str(tmp_path / "run"))
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == before


# --- numbers that are none


def test_a_learning_rate_that_explodes(gin_file, tmp_path, capsys):
    """Exit 2 and one line with the step; the last sound checkpoint stays, and the run goes on from it."""
    flags = [f"--gin_file={gin_file}", f"--workdir={tmp_path}", "--gin.Trainer.checkpoint_every=1"]
    wrong = ["--gin.AdamW.learning_rate=1.0", "--gin.AdamW.weight_decay=1e6", "--gin.AdamW.warmup_from=1e-9"]
    assert train.main([*flags, *wrong]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    found = re.match(
        r"error: (loss|grad_norm) is (nan|inf) at step (\d+): the checkpoint of step (\d+) is kept; ", line
    )
    assert found and "lower AdamW.learning_rate" in line
    bad, kept = int(found[3]), int(found[4])
    assert 0 < kept < bad - 1  # the weights before the bad step gave the bad numbers
    model, params = lcx.load(tmp_path)
    assert jnp.all(jnp.isfinite(lcx.logits(model, params, jnp.ones((1, 8), jnp.int32))))
    assert train.main([*flags, *wrong]) == 2
    again = f"is {found[2]} at step {bad}: the checkpoint of step {kept} is kept"
    assert again in capsys.readouterr().err


def test_poisoned_data_stops_at_its_step(text, tmp_path):
    folder = tmp_path / "corpus"
    shutil.copytree(text / "text", folder / "text")
    (folder / "text" / "00.txt").write_text(chr(POISON) * 40 + "text " * 500)
    trainer = tiny_trainer(folder, objective=poisoned, checkpoint_every=2, log_every=1)
    with trainer.data.batches("train", global_batch_size=8, seq_len=32, seed=0) as batches:
        first = next(i for i, batch in enumerate(batches, start=1) if (batch["tokens"] == POISON).any())
    assert first > 2, "nothing was saved before the poison: change the seed"
    with pytest.raises(
        UserError, match=f"^(loss|grad_norm) is (inf|nan) at step {first}: the checkpoint of step "
    ) as e:
        trainer.run(str(tmp_path / "run"))
    assert "\n" not in str(e.value)
    step, _, _ = saved(tmp_path / "run")
    assert step < first
    assert f"the checkpoint of step {step} is kept" in str(e.value)
    assert [line["step"] for line in lines(tmp_path / "run")] == list(range(1, first))


def test_bad_numbers_before_the_first_checkpoint(tmp_path):
    with pytest.raises(UserError, match="at step 1: there is no checkpoint yet; lower AdamW.learning_rate"):
        tiny_trainer(poisonous(tmp_path), objective=poisoned).run(str(tmp_path / "run"))


def poisonous(folder):
    """Text that is nothing but poison."""
    (folder / "text").mkdir()
    for i in range(4):
        (folder / "text" / f"{i}.txt").write_text(chr(POISON) * (2000 + i))  # no two alike
    return folder


# --- damage


def test_a_damaged_newest_checkpoint_is_stepped_over(text, whole, tmp_path, caplog):
    shutil.copytree(whole, tmp_path / "run")
    steps = Checkpointer(tmp_path / "run" / "checkpoints").steps()
    assert steps == [32, 36, 40]
    params = tmp_path / "run" / "checkpoints" / "40" / "params"
    largest = max(
        (file for file in params.rglob("*") if file.is_file()), key=lambda file: file.stat().st_size
    )
    os.truncate(largest, largest.stat().st_size // 2)
    run = tiny_trainer(text).run(str(tmp_path / "run"))
    assert run.step == 40
    assert "using step 36" in caplog.text
    assert_same_checkpoint(tmp_path / "run", whole)
    assert lines(tmp_path / "run") == lines(whole)


@pytest.mark.parametrize("damaged", ["meta", "params"])
def test_every_reader_steps_over_damage_and_says_so_alike(whole, tmp_path, damaged, caplog):
    """One line, the same for each; a step that is named itself has no other in its place."""

    def convert(run):
        flags = [f"--src={run}", f"--dst={run.parent / 'hf'}", "--dst_format=hf"]
        assert convert_command.main(flags) == 0

    readers = [lcx.load, convert, as_a_resumed_run]
    readers += [terminal.tokenizer_of] if damaged == "meta" else []
    said = []
    for number, read in enumerate(readers):
        run = tmp_path / str(number) / "run"
        shutil.copytree(whole, run)
        step = run / "checkpoints" / "40"
        if damaged == "meta":
            document = (step / "meta" / "metadata").read_text()
            (step / "meta" / "metadata").write_text(document.replace('"seq_len": 32', '"seq_len": 33'))
        else:
            files = [file for file in (step / "params").rglob("*") if file.is_file()]
            largest = max(files, key=lambda file: file.stat().st_size)
            os.truncate(largest, largest.stat().st_size // 2)
        caplog.clear()
        read(run)
        found = [record.getMessage() for record in caplog.records if record.name == "lcx.checkpoint"]
        said += [line.replace(str(run), "RUN") for line in found]
        with pytest.raises(UserError, match=f"{damaged}.* (does not match|unreadable)"):
            lcx.load(step)
    why = "meta does not match its checksum" if damaged == "meta" else r"params is unreadable \([A-Z_]+ in its files\)"
    line = re.compile(rf"damaged checkpoint in RUN/checkpoints \(step 40: {why}\); using step 36")
    assert len(said) == len(readers) and all(line.fullmatch(one) for one in said), said
    assert len({*said}) == 1, said


def as_a_resumed_run(run):
    """What a resumed run reads."""
    with Checkpointer(run / "checkpoints") as checkpointer:
        step, _, documents = checkpointer.restore({})
        model = model_json.from_json(documents["meta"]["model"])
        restored = checkpointer.restore({"params": model_lib.abstract_params(model)})
        assert restored[0] == 36 and step in (36, 40)


def test_changed_data_is_refused(text, whole, tmp_path):
    shutil.copytree(text / "text", tmp_path / "text")
    (tmp_path / "text" / "03.txt").write_text("something else")
    before = sorted(whole.rglob("*"))
    with pytest.raises(
        UserError, match="the data differs from what the checkpoint was trained on: the files"
    ) as e:
        tiny_trainer(tmp_path, steps=50).run(str(whole))
    assert "\n" not in str(e.value)
    with pytest.raises(UserError, match="the data differs .*: seed was 0 and is 1"):
        tiny_trainer(text, steps=50, seed=1).run(str(whole))
    assert sorted(whole.rglob("*")) == before


def test_moved_data_is_the_same_data(text, whole, tmp_path):
    shutil.copytree(whole, tmp_path / "run")
    shutil.copytree(text / "text", tmp_path / "text")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "40")
    assert tiny_trainer(tmp_path).run(str(tmp_path / "run")).step == 40
    assert lines(tmp_path / "run") == lines(whole)


# --- a full disk


@pytest.fixture
def small_disk(tmp_path):
    """A folder on a file system of 6 MB; a checkpoint of the tiny model takes about half of one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = shutil.which("mount")
    options = [mount or "mount", "-t", "tmpfs", "-o", "size=6m", "tmpfs", str(folder)]
    if not mount or os.geteuid() != 0 or subprocess.run(options, capture_output=True).returncode:
        pytest.skip(
            "needs the right to mount a tmpfs; tests/test_checkpoint_faults.py simulates full disks, too"
        )
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_loses_nothing_that_was_written(text, whole, small_disk, caplog, monkeypatch):
    """Full from step 20 on: training goes on with warnings, the end is an error, and with room the run is completed."""
    save = Checkpointer.save

    def fill_and_save(self, step, *args, **kwargs):
        if step == 20:
            self._settle()
            self._join_sweeper()
            (small_disk / "stranger").write_bytes(b"x" * (shutil.disk_usage(small_disk).free - 100_000))
        return save(self, step, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(Checkpointer, "save", fill_and_save)
        with pytest.raises(
            UserError, match="checkpoint of step 40 was not written: no space left on the disk"
        ) as e:
            tiny_trainer(text, keep_checkpoints=2).run(str(small_disk / "run"))
    assert "\n" not in str(e.value) and "free space" in str(e.value)
    warned = [
        int(step)
        for step in re.findall(r"checkpoint of step (\d+) was not written: no space left", caplog.text)
    ]
    assert warned == [20, 24, 28, 32, 36, 40]
    assert Checkpointer(small_disk / "run" / "checkpoints").steps() == [12, 16]
    (small_disk / "stranger").unlink()
    tiny_trainer(text, keep_checkpoints=2).run(str(small_disk / "run"))
    assert_same_checkpoint(small_disk / "run", whole)
    assert [line for line in lines(small_disk / "run") if "loss" in line] == [
        x for x in lines(whole) if "loss" in x
    ]


# --- the command


def test_what_the_command_leaves_behind(gin_file, whole):
    assert {"config.gin", "operative_config.gin", "metrics.jsonl", "checkpoints"} <= {
        p.name for p in whole.iterdir()
    }
    assert "trainer.Trainer.seq_len = 32" in (whole / "config.gin").read_text()
    assert "clip_norm = 1.0" in (whole / "operative_config.gin").read_text()  # a default that was used


def test_the_command_is_what_python_runs(text, whole, tmp_path):
    tiny_trainer(text).run(str(tmp_path))
    assert_same_checkpoint(tmp_path, whole)
    assert lines(tmp_path) == lines(whole)


def test_another_configuration_is_kept_beside_the_first(gin_file, whole, tmp_path, capsys):
    shutil.copytree(whole, tmp_path / "run")
    flags = [f"--gin_file={gin_file}", f"--workdir={tmp_path / 'run'}"]
    assert train.main([*flags, "--gin.llama.hidden_size=64"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "Trainer.model.hidden_size = 32, found 64" in line
    assert train.main([*flags, "--gin.Trainer.steps=41"]) == 0
    first, newest = ((tmp_path / "run" / name).read_text() for name in ("config.1.gin", "config.gin"))
    assert not (tmp_path / "run" / "config.2.gin").exists()  # the refused one left nothing
    assert first == (whole / "config.gin").read_text()
    assert "trainer.Trainer.steps = 41" in newest


def test_mistakes_in_the_file_come_before_anything_is_written(text, tmp_path, capsys):
    wrong = tmp_path / "wrong.gin"
    wrong.write_text(GIN.replace("{folder}", str(text)).replace("steps = 40", "stepz = 40"))
    assert train.main([f"--gin_file={wrong}", f"--workdir={tmp_path / 'run'}"]) == 2
    assert "stepz" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def untraceable(model, variables, batch):
    raise ValueError("an objective that cannot be traced")


def test_a_run_that_fails_to_compile_its_first_step_leaves_nothing(text, whole, tmp_path):
    """A new run leaves no folder, and one that is resumed stays as it was."""
    shutil.copytree(whole, tmp_path / "run")
    with (tmp_path / "run" / "metrics.jsonl").open("a") as record:
        record.write('{"step": 99, "loss": 1.0}\n')  # of a step that would be repeated
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    job = tiny_trainer(text, objective=untraceable, steps=41)
    for name in ("new", "run"):
        with pytest.raises(ValueError, match="cannot be traced"):
            trainer_lib.train(workdir=str(tmp_path / name), job=job, config_text="# another\n")
    assert not (tmp_path / "new").exists()
    assert before == {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}


def test_processes_that_cannot_be_found(gin_file, tmp_path):
    done = subprocess.run(
        command(gin_file, tmp_path / "run", "--distributed"),
        env=environment(),
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 2, done
    (line,) = own_lines(done.stderr)
    assert (
        line.startswith("error: the processes did not find each other: ") and "--coordinator_address" in line
    )
    assert not (tmp_path / "run").exists()
    assert jax.process_count() == 1


def test_the_optimizer_of_the_command_is_the_one_of_python():
    assert AdamW(learning_rate=1e-2, warmup_steps=4) == tiny_trainer(pathlib.Path("/")).optimizer
