"""One writer per workdir and per destination, and addresses that are no folders."""

from __future__ import annotations

import contextlib
import os
import pathlib
import signal
import subprocess
import sys

import pytest

from lcx import evaluate, paths, report, train
from lcx.checkpoint import Checkpointer
from lcx.convert import __main__ as convert
from lcx.convert.files.destination import refuse_same, replacing
from lcx.errors import UserError
from lcx.evals.support.growing_files import GrowingFiles
from lcx.locks import LOCK, only_writer
from lcx.paths import claimed

HOLDER = """
import sys, time
from lcx.locks import only_writer
with only_writer(sys.argv[1], of="it", setting="--workdir"):
    print("held", flush=True)
    time.sleep(600)
"""
RECIPE = """
from __gin__ import dynamic_registration
from lcx import trainer
import one_writer_job
trainer.train.job = @one_writer_job.Job()
"""


@contextlib.contextmanager
def holder(lock: pathlib.Path):
    """Another process that holds the lock."""
    process = subprocess.Popen([sys.executable, "-c", HOLDER, str(lock)], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout.readline() == "held\n"
        yield process
    finally:
        process.kill()
        process.wait()


def taken(lock: pathlib.Path) -> None:
    with only_writer(lock, of="run", setting="--workdir"):
        pass


def test_a_lock_of_a_killed_process_does_not_hold(tmp_path):
    with holder(tmp_path / LOCK) as process:
        with pytest.raises(UserError, match=f"run is being .* .process {process.pid} on .* change --workdir"):
            taken(tmp_path / LOCK)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        with only_writer(tmp_path / LOCK, of="run", setting="--workdir"):
            assert f"process {os.getpid()} " in (tmp_path / LOCK).read_text()
    assert not (tmp_path / LOCK).exists()


def test_an_owner_that_ends_removes_the_file_that_another_has_just_opened(tmp_path, monkeypatch):
    """The second process then holds a lock on a file without a name, which keeps nobody out."""
    import filelock

    acquire, once = filelock.FileLock.acquire, iter([True])

    def opened_before_it_was_removed(lock, *args, **kwargs):
        got = acquire(lock, *args, **kwargs)
        if next(once, False):
            (tmp_path / LOCK).unlink()
        return got

    monkeypatch.setattr(filelock.FileLock, "acquire", opened_before_it_was_removed)
    held = only_writer(tmp_path / LOCK, of="run", setting="--workdir")
    with held, pytest.raises(UserError, match="being written"):
        taken(tmp_path / LOCK)


def test_a_result_replaces_only_results_of_its_kind(tmp_path):
    """`lcx.generate --output=WORKDIR --overwrite` deleted the run."""
    run, store, file = tmp_path / "run", tmp_path / "a.zarr", tmp_path / "a.fa"
    for path in (run / "config.gin", store / ".zgroup"):
        path.parent.mkdir()
        path.write_text("kept")
    file.write_text("old")
    for place, holds in ((run, None), (run, ".zgroup"), (store, None)):
        claim = paths.claimed_file(place, "--output", overwrite=True, holds=holds)
        with pytest.raises(UserError, match="is a folder with other contents: choose another --output"), claim:
            raise AssertionError("it is not ours")
    assert (run / "config.gin").read_text() == "kept"
    os.mkfifo(tmp_path / "pipe")  # or /dev/null, which --overwrite deleted
    for claim in (
        paths.claimed_file(tmp_path / "pipe", "--output", overwrite=True),
        GrowingFiles([str(tmp_path / "pipe")], settings={}, overwrite=True),
    ):
        with pytest.raises(UserError, match="pipe is a device or a pipe, expected a file: choose another"), claim:
            raise AssertionError("it is not ours")
    assert (tmp_path / "pipe").is_fifo()
    with paths.claimed_file(store, "--output", overwrite=True, holds=".zgroup") as partial:
        partial.mkdir()
    with paths.claimed_file(file, "--output", overwrite=True) as partial:
        partial.write_text("new")
    assert not any(store.iterdir()) and file.read_text() == "new"


def test_links(tmp_path):
    """What a link leads to is replaced, not the link; a link to a disk that is not mounted is named as such."""
    (tmp_path / "a.fa").write_text("old")
    (tmp_path / "link.fa").symlink_to("a.fa")
    with paths.claimed_file(tmp_path / "link.fa", "--output", overwrite=True) as partial:
        partial.write_text("new")
    assert (tmp_path / "a.fa").read_text() == "new" and (tmp_path / "link.fa").is_symlink()
    (tmp_path / "disk").symlink_to("/not/mounted")
    for path in ("disk", "disk/runs/one"):
        with pytest.raises(UserError, match="disk, a link to /not/mounted, which does not exist: .*change --workdir"):
            paths.destination(tmp_path / path, "--workdir")


def test_an_output_is_none_of_the_inputs(tmp_path):
    file = tmp_path / "calls.vcf"
    file.write_text("#")
    for given in (str(file), str(tmp_path / "*.vcf"), f"{tmp_path}/../{tmp_path.name}/calls.vcf"):
        with pytest.raises(UserError, match="--annotated is .*calls.vcf, which --variants reads: choose another"):
            paths.refuse_inputs(str(file), "--annotated", {"--fasta": None, "--variants": given})
    paths.refuse_inputs(str(tmp_path / "new.vcf"), "--annotated", {"--variants": str(file)})
    paths.refuse_inputs(None, "--annotated", {"--variants": str(file)})
    with pytest.raises(UserError, match=r"--dst is the same folder as --adapter"):
        refuse_same(tmp_path / "adapter", tmp_path / "adapter", "--adapter")


def test_a_workdir_that_holds_a_model_of_another_library_is_refused(tmp_path, capsys):
    """Who evaluates it later would get that model."""
    recipe = tmp_path / "recipe.gin"
    recipe.write_text(RECIPE)
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "config.json").write_text("{}")
    assert train.main([f"--gin_file={recipe}", f"--workdir={tmp_path / 'hf'}"]) == 2
    assert "hf, which holds a model (config.json): set --workdir to another folder" in capsys.readouterr().err
    assert os.listdir(tmp_path / "hf") == ["config.json"]


def test_results_do_not_go_among_the_checkpoints_of_a_run(tmp_path):
    (tmp_path / "checkpoints" / "4").mkdir(parents=True)
    (tmp_path / "config.gin").touch()
    for folder in (tmp_path / "checkpoints", tmp_path / "checkpoints" / "4", tmp_path / "checkpoints" / "4" / "a"):
        with (
            pytest.raises(UserError, match="--output is .*, among the checkpoints of the run in"),
            paths.claimed(folder, "--output"),
        ):
            raise AssertionError
        with (  # a conversion of the run to one of its own steps deleted what it was reading
            pytest.raises(UserError, match="--dst is .*, among the checkpoints of the run in"),
            replacing(folder, overwrite=True, needed_bytes=0, replaceable=lambda _: True),
        ):
            raise AssertionError
    (tmp_path / "config.gin").unlink()
    with pytest.raises(UserError, match="--dst .* is among the checkpoints of --src"):
        refuse_same(tmp_path, tmp_path / "checkpoints" / "4")
    with paths.claimed(tmp_path / "evaluation", "--output"):
        assert [path.name for path in (tmp_path / "checkpoints").rglob("*")] == ["4"]


def test_a_second_training_is_refused_and_changes_nothing(tmp_path, capsys):
    recipe = tmp_path / "recipe.gin"
    recipe.write_text(RECIPE)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.gin").write_text("# of the first\n")
    with holder(tmp_path / "run" / LOCK):
        assert train.main([f"--gin_file={recipe}", f"--workdir={tmp_path / 'run'}"]) == 2
    assert "run is being written by another process" in capsys.readouterr().err
    assert sorted(os.listdir(tmp_path / "run")) == [LOCK, "config.gin"]
    assert (tmp_path / "run" / "config.gin").read_text() == "# of the first\n"
    assert train.main([f"--gin_file={recipe}", f"--workdir={tmp_path / 'run'}"]) == 0
    assert (tmp_path / "run" / "ran").exists()


def test_a_second_evaluation_or_report_is_refused_and_leaves_no_folder(tmp_path, capsys):
    def evaluated(output):
        return evaluate.main([f"--checkpoint={tmp_path / 'nowhere'}", f"--output={output}"])

    def reported(output):
        return report.main([f"--workdir={tmp_path / 'nowhere'}", f"--output={output}"])

    for number, (command, lock) in enumerate(
        ((evaluated, LOCK), (reported, ".lcx-report-lock"), (reported, LOCK))  # an evaluation writes a report, too
    ):
        (taken := tmp_path / str(number)).mkdir()
        with holder(taken / lock):
            assert command(taken) == 2
        error = capsys.readouterr().err
        assert (
            error.count("\n") == 1 and "is being written by another process" in error and "--output" in error
        )
        assert command(tmp_path / "a" / "b") == 2 and not (tmp_path / "a").exists()
        assert "nowhere" in capsys.readouterr().err


def test_a_second_conversion_to_a_destination_is_refused(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "kept").touch()

    def write() -> None:
        with replacing(out, overwrite=True, needed_bytes=0, replaceable=lambda path: True) as folder:
            (folder / "new").touch()

    refused = pytest.raises(UserError, match="out is being written by another process .* change --dst")
    with holder(tmp_path / ".out.lcx-lock"), refused:
        write()
    assert os.listdir(out) == ["kept"]
    write()
    assert os.listdir(out) == ["new"]
    assert os.listdir(tmp_path) == ["out"]


def test_a_folder_that_is_written_to_is_not_replaced(tmp_path):
    """A conversion and a run take different locks: neither starts while the other is at work, at any depth."""
    (out := tmp_path / "out").mkdir()
    (out / "evaluation").mkdir()
    replacing_out = {"overwrite": True, "needed_bytes": 0, "replaceable": lambda path: True}
    for busy in (out, out / "evaluation"):
        held = only_writer(busy / LOCK, of="it", setting="--workdir")
        with held, pytest.raises(UserError, match=f"{busy} is being written .* change --dst"):
            replacing(out, **replacing_out).__enter__()
    with replacing(out, **replacing_out) as folder:
        (folder / "new").touch()
        with pytest.raises(UserError, match="out is being written by another process .* change --workdir"):
            claimed(out, "--workdir").__enter__()
        assert sorted(os.listdir(out)) == ["evaluation"]
    with (
        pytest.raises(UserError, match="already exists"),
        replacing(tmp_path / "made", **replacing_out | {"overwrite": False}),
    ):
        (tmp_path / "made").mkdir()  # by another program, meanwhile
        (tmp_path / "made" / "kept").touch()
    assert os.listdir(out) == ["new"] and os.listdir(tmp_path / "made") == ["kept"]
    assert sorted(os.listdir(tmp_path)) == ["made", "out"]


@pytest.mark.parametrize(
    "main, arguments, setting",
    [
        (train.main, ["--workdir=az://bucket/run"], "--workdir"),
        (train.main, ["--workdir="], "--workdir"),
        (convert.main, ["--src=hf", "--dst=az://bucket/x", "--dst_format=lcx"], "--dst"),
        (convert.main, ["--src=az://bucket/hf", "--dst=x", "--dst_format=lcx"], "--src"),
        (evaluate.main, ["--checkpoint=hf", "--output=gs://bucket/out"], "--output"),
    ],
)
def test_an_address_is_no_folder(main, arguments, setting, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipe.gin").write_text(RECIPE)
    if main is train.main:
        arguments = ["--gin_file=recipe.gin", *arguments]
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert f"error: {setting} is " in error and len(error.splitlines()) == 1, error
    assert sorted(os.listdir(tmp_path)) == ["recipe.gin"]


def test_checkpoints_go_to_folders(tmp_path):
    with pytest.raises(UserError, match="gs:// is not supported"):
        Checkpointer("gs://bucket/run/checkpoints")
