"""metrics.jsonl under kills, resumes and full disks; plain lines and the bar; wandb really started."""

import contextlib
import fcntl
import glob
import json
import math
import os
import pathlib
import pty
import resource
import struct
import subprocess
import sys
import termios

import jax.numpy as jnp
import numpy as np
import pytest

from lcx.errors import UserError
from lcx.training import logger as metrics


def logger(workdir, **kwargs):
    return metrics.MetricsLogger(
        workdir, **({"total_steps": 100, "mode": "off", "process_index": 0} | kwargs)
    )


def read(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def test_a_line_is_on_disk_as_soon_as_it_is_logged(tmp_path):
    log = logger(tmp_path / "run")
    log.log(1, {"loss": jnp.float32(0.5), "tokens": np.int64(2**40), "speed": np.float64(3)})
    assert read(tmp_path / "run") == [{"step": 1, "loss": 0.5, "tokens": 2**40, "speed": 3}]
    log.close()
    log.close()


def test_numbers_that_json_lacks_stay_readable(tmp_path):
    with logger(tmp_path) as log:
        log.log(1, {"loss": jnp.nan, "grad_norm": float("inf"), "low": -math.inf})

    def refuse(name):
        raise AssertionError(f"{name} is not JSON")

    record = json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=refuse)
    assert math.isnan(float(record["loss"])) and float(record["grad_norm"]) == math.inf
    assert float(record["low"]) == -math.inf


def test_resume_drops_what_will_be_done_again_and_nothing_else(tmp_path):
    path = tmp_path / "metrics.jsonl"
    kept = ['{"step": 10, "loss": 3.0}\n', '{"note": "no step"}\n', '{"step": 20, "loss": 2.0}\n']
    later = ['{"step": 30, "loss": 1.0}\n', '{"step": 20, "eval_loss": 2.5}\n', '{"step": 40, "lo']
    path.write_text("".join(kept + later))
    with logger(tmp_path, resume_step=20) as log:
        log.log(21, {"loss": 1.9})
    lines = path.read_text().splitlines(keepends=True)
    assert lines == [*kept, later[1], '{"step": 21, "loss": 1.9}\n']
    assert os.listdir(tmp_path) == ["metrics.jsonl"]


def test_a_file_with_nothing_to_drop_is_not_rewritten(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 5, "loss": 3.0}\n')
    before = path.stat().st_ino
    with logger(tmp_path, resume_step=5) as log:
        log.log(6, {"loss": 2.0})
    assert path.stat().st_ino == before


def test_a_new_run_in_an_old_folder_starts_an_empty_record(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 7, "loss": 3.0}\n')
    with logger(tmp_path) as log:
        log.log(1, {"loss": 2.0})
    assert read(tmp_path) == [{"step": 1, "loss": 2.0}]


def test_nothing_is_written_before_the_first_line(tmp_path):
    """A run that fails to compile its first step leaves no trace, and a record that is there as it was."""
    pytest.importorskip("tensorboard", reason="an extra")
    (tmp_path / "metrics.jsonl").write_text('{"step": 7, "loss": 3.0}\n')
    logger(tmp_path, tensorboard=True, mode="offline").close()
    assert os.listdir(tmp_path) == ["metrics.jsonl"] and read(tmp_path) == [{"step": 7, "loss": 3.0}]
    (tmp_path / "metrics.jsonl").unlink()
    (tmp_path / "metrics.jsonl").mkdir()
    with pytest.raises(IsADirectoryError):
        logger(tmp_path)


def test_a_full_disk_costs_lines_and_not_the_run(tmp_path, capsys):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    log = logger(tmp_path, print_every=0)
    log.log(1, {"loss": 1.0})
    resource.setrlimit(resource.RLIMIT_FSIZE, (40, hard))  # the second line ends in the middle
    try:
        for step in range(2, 6):
            log.log(step, {"loss": 1.0})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    log.log(6, {"loss": 0.5})
    log.close()
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert json.loads(lines[0])["step"] == 1 and json.loads(lines[-1]) == {"step": 6, "loss": 0.5}
    assert len(lines) == 3, "one torn line, and none glued to it"
    warnings = [line for line in capsys.readouterr().err.splitlines() if "warning" in line]
    assert len(warnings) == 1 and "metrics.jsonl could not be written" in warnings[0]


def test_only_process_0_writes(tmp_path, capsys):
    with logger(tmp_path, process_index=1) as log:
        log.log(1, {"loss": 1.0})
        log.message("hello")
    assert os.listdir(tmp_path) == [] and capsys.readouterr().err == ""


def test_plain_lines(tmp_path, capsys, monkeypatch):
    clock = iter(range(0, 10000, 2))  # two seconds a step
    monkeypatch.setattr(metrics.time, "monotonic", lambda: float(next(clock)))
    with logger(tmp_path, total_steps=95, print_every=10) as log:
        for step in range(1, 96):
            log.log(
                step, {"loss": 1.4321, "tokens_per_second": 21034.4, "mfu": 0.3149, "learning_rate": 1e-3}
            )
        log.log(95, {"eval_loss": 1.25, "passkey": 0.5})
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "step 1/95 loss 1.432 tok/s 21034 mfu 0.31"
    assert lines[1] == "step 11/95 loss 1.432 tok/s 21034 mfu 0.31 eta 2m48s"
    assert lines[-2] == "step 95/95 loss 1.432 tok/s 21034 mfu 0.31"
    assert lines[-1].startswith("step 95/95 eval_loss 1.250 passkey 0.5")
    assert len(lines) == 10 + 1 + 1


def test_every_evaluation_has_a_line(tmp_path, capsys):
    """It has the step of the line before it, and was left out."""
    with logger(tmp_path, total_steps=9, print_every=2) as log:
        for step in range(1, 10):
            log.log(step, {"loss": 1.0})
            if step in (3, 6):
                log.log(step, {"eval_loss": step / 10})
    lines = [line.partition(" eta")[0] for line in capsys.readouterr().err.splitlines()]
    assert lines == [
        *("step 1/9 loss 1.000", "step 3/9 loss 1.000", "step 3/9 eval_loss 0.300", "step 5/9 loss 1.000"),
        *("step 6/9 eval_loss 0.600", "step 7/9 loss 1.000", "step 9/9 loss 1.000"),
    ]


def test_small_figures_keep_two_digits():
    """A speed of 0.4 tokens per second is not 0, nor is an MFU of 0.4%."""
    shown = metrics._summary({"loss": 0.00412, "tokens_per_second": 0.43, "mfu": 0.0042})
    assert shown == "loss 0.0041 tok/s 0.43 mfu 0.0042"
    assert metrics._summary({"loss": -0.5, "tokens_per_second": 12.3}) == "loss -0.500 tok/s 12"


def test_durations():
    assert [metrics.duration(s) for s in (0.4, 59, 80, 3600, 36125)] == [
        "0s",
        "59s",
        "1m20s",
        "1h00m",
        "10h02m",
    ]


def in_a_terminal(script, columns):
    """What a process shows on a terminal of that width."""
    main, side = pty.openpty()
    fcntl.ioctl(side, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    env = os.environ | {"TERM": "xterm", "TQDM_MININTERVAL": "0"}
    subprocess.run([sys.executable, "-c", script], stderr=side, check=True, env=env, timeout=60)
    os.close(side)
    shown = b""
    with contextlib.suppress(OSError):  # Linux says EIO at the end of a terminal
        while piece := os.read(main, 65536):
            shown += piece
    os.close(main)
    return shown.decode().replace("\r", "\n")


def test_a_terminal_gets_a_bar(tmp_path):
    script = f"""
import logging
from lcx.training.logger import MetricsLogger
with MetricsLogger({str(tmp_path)!r}, total_steps=20, mode="off", process_index=0, resume_step=10) as log:
    for step in range(11, 21):
        log.advance(step)
        if step % 2 == 0:
            log.log(step, {{"loss": 1 / step, "tokens_per_second": 999.0}})
        if step == 15:
            log.message("saved step 15")
        if step == 17:
            logging.getLogger("lcx.checkpoint").warning("not saved")
"""
    text = in_a_terminal(script, columns=100)
    assert "100%|" in text and " 20/20 " in text and " 11/20 " in text, "it moves with every step"
    for step in range(12, 21, 2):  # lines that stay, above the bar
        assert f"\nstep {step}/20 loss {1 / step:.3f} tok/s 999\n" in text
    assert "\nsaved step 15\n" in text and "\nnot saved\n" in text
    assert "  0%|" not in text and " 50%|" in text, "a resumed run starts where it was"
    text = in_a_terminal(script, columns=0)
    assert "%|" not in text and "step 20/20 loss 0.050 tok/s 999\n" in text


def wandb_records(path):
    """The records of a .wandb file: LevelDB's log format behind a header of 7 bytes."""
    from wandb.proto import wandb_internal_pb2

    data, at, record = pathlib.Path(path).read_bytes(), 7, b""
    while at + 7 <= len(data):
        if (room := 32768 - at % 32768) < 7:
            at += room
            continue
        length, kind = struct.unpack("<HB", data[at + 4 : at + 7])
        record += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # a whole record, or the last piece of one
            yield wandb_internal_pb2.Record.FromString(record)
            record = b""


def test_wandb_offline_is_really_written(tmp_path, monkeypatch):
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    with logger(tmp_path, mode="auto", config_text="toy.Job.steps = 7", project="some_project") as log:
        for step in (1, 2, 3, 2, 3):  # a fallback to an older checkpoint does steps again
            log.log(step, {"loss": 10.0 + step})
    import wandb

    wandb.teardown()  # its own process writes the file; as at the end of ours, wait for it
    (path,) = glob.glob(str(tmp_path / "wandb" / "offline-run-*" / "run-*.wandb"))
    records = list(wandb_records(path))
    history = []
    for record in records:
        if record.HasField("history"):
            items = {(item.key or ".".join(item.nested_key)): item.value_json for item in record.history.item}
            history.append((json.loads(items["step"]), json.loads(items["loss"])))
    assert history == [(1, 11.0), (2, 12.0), (3, 13.0), (2, 12.0), (3, 13.0)]
    (run,) = [record.run for record in records if record.HasField("run")]
    assert run.project == "some_project" and "toy.Job.steps = 7" in str(run.config)
    assert [record.exit.exit_code for record in records if record.HasField("exit")] == [0]


def test_tensorboard_holds_the_numbers_of_the_record(tmp_path):
    """Read back with TensorBoard's own reader, which leaves out what a resumed run has repeated."""
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator", reason="an extra")
    with logger(tmp_path, tensorboard=True, config_text="toy.Job.steps = 7") as log:
        for step in range(1, 5):
            log.log(step, {"loss": 2.0 / step, "tokens_per_second": 1e9 + step})
        log.log(4, {"eval_loss": math.nan, "huge": 1e300})
    with logger(tmp_path, tensorboard=True, resume_step=2) as log:
        for step in range(3, 6):
            log.log(step, {"loss": 3.0 / step})
    found = reader.EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    shown = [(event.step, event.value) for event in found.Scalars("loss")]
    recorded = [(line["step"], float(np.float32(line["loss"]))) for line in read(tmp_path) if "loss" in line]
    assert shown == recorded and [step for step, _ in shown] == [1, 2, 3, 4, 5]
    assert [event.value for event in found.Scalars("tokens_per_second")] == [np.float32(1e9 + 1), np.float32(1e9 + 2)]
    assert "toy.Job.steps = 7" in found.Tensors("config.gin/text_summary")[0].tensor_proto.string_val[0].decode()


def test_tensorboard_that_is_missing_or_fails(tmp_path, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        for name in ("tensorboard", "tensorboard.compat.proto"):  # the second may be imported already
            patch.setitem(sys.modules, name, None)
        with pytest.raises(UserError, match=r"Trainer.tensorboard needs .* pip install 'lcx\[tensorboard\]'"):
            logger(tmp_path, tensorboard=True)
    pytest.importorskip("tensorboard", reason="an extra")
    (tmp_path / "tensorboard").write_text("in the way")
    with logger(tmp_path, tensorboard=True, print_every=0) as log:
        log.log(1, {"loss": 1.0})
    assert "warning: TensorBoard stopped logging (" in capsys.readouterr().err and len(read(tmp_path)) == 1


@pytest.mark.parametrize("fails", ["init", "log", "finish"])
def test_a_wandb_that_fails_is_one_warning(tmp_path, monkeypatch, capsys, fails):
    class Run:
        def define_metric(self, *args, **kwargs):
            pass

        def log(self, record):
            if fails == "log":
                raise RuntimeError("lost the server\nand more")

        def finish(self, exit_code):
            if fails == "finish":
                raise RuntimeError("lost the server\nand more")

    def init(**kwargs):
        if fails == "init":
            raise RuntimeError("lost the server\nand more")
        return Run()

    import wandb

    monkeypatch.setattr(wandb, "init", init)
    with logger(tmp_path, mode="offline", print_every=0) as log:
        for step in range(3):
            log.log(step, {"loss": 1.0})
    warnings = capsys.readouterr().err.splitlines()
    assert (
        len(warnings) == 1 and warnings[0].startswith("warning: wandb") and "lost the server" in warnings[0]
    )
    assert len(read(tmp_path)) == 3


@pytest.mark.parametrize("online_works", [True, False])
def test_a_key_means_online_with_offline_behind_it(tmp_path, monkeypatch, capsys, online_works):
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    modes, identities = [], []

    class Run:
        define_metric = log = finish = lambda self, *args, **kwargs: None

    def init(*, mode, settings, id=None, resume=None, **kwargs):
        modes.append(mode)
        identities.append((id, resume))
        assert settings.init_timeout == 20
        if mode == "online" and not online_works:
            raise TimeoutError("no route")
        return Run()

    import wandb

    monkeypatch.setattr(wandb, "init", init)
    for _ in range(2):
        with logger(tmp_path, mode="auto", print_every=0) as log:
            log.begin()
    if online_works:
        assert modes == ["online"] * 2 and identities[0] == identities[1] and identities[0][1] == "allow"
    else:
        assert modes == ["online", "offline"] * 2
        assert "logging offline instead" in capsys.readouterr().err


def test_off_does_not_import_wandb(tmp_path):
    script = (
        "import sys; from lcx.training.logger import MetricsLogger as M\n"
        f"M({str(tmp_path)!r}, total_steps=1, mode='off', process_index=0).close()\n"
        "assert 'wandb' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


def test_an_unknown_mode_names_the_modes(tmp_path):
    with pytest.raises(UserError, match="'ofline', expected one of auto, offline, online, off"):
        logger(tmp_path, mode="ofline")
