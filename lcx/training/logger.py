"""Logs the metrics of a run to metrics.jsonl, on request to wandb and TensorBoard, and on the terminal.

metrics.jsonl is the authoritative record: one JSON object per line, such as
`{"step": 120, "loss": 1.43, "tokens_per_second": 2e4}`, written immediately. wandb and TensorBoard receive the same
numbers under the same names. Nothing here can stop a run: a failure of wandb or a full disk causes one warning.
Nothing is written before the first line, so that a run that fails to compile its first step leaves nothing behind.
"""

from __future__ import annotations

import collections
import contextlib
import io
import json
import logging
import math
import os
import pathlib
import sys
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

from lcx.errors import UserError, first_line
from lcx.training.tensorboard import TensorBoard
from lcx.wording import duration

MODES = ("auto", "offline", "online", "off")
_WANDB_SECONDS = 20  # by default wandb waits 100 s for an unreachable server


class MetricsLogger:
    """Writes on process 0 and does nothing on the others.

    Args:
      workdir: folder for metrics.jsonl, wandb/ and tensorboard/.
      total_steps: steps of the whole run, for the progress bar and the estimate of the time left.
      mode: wandb mode: "online", "offline" (upload later with `wandb sync`), "off", or "auto": the value of
        WANDB_MODE if set, else online if WANDB_API_KEY is set, else offline.
      project: wandb project.
      tensorboard: whether to write TensorBoard event files.
      config_text: stored with the wandb run and in the event files.
      resume_step: the step that the run resumes from. Lines of later steps are dropped from metrics.jsonl because
        those steps will be repeated; so is a line that a kill cut short.
      print_every: steps between plain lines when stderr is not a terminal; 0 shows neither lines nor a bar.
      process_index: index of this process; None: jax.process_index().

    Raises:
      UserError: an unknown mode; or the tensorboard package is not installed.
      OSError: there is a metrics.jsonl that cannot be written to.
    """

    def __init__(
        self,
        workdir: str | os.PathLike[str],
        *,
        total_steps: int,
        mode: str = "auto",
        project: str = "lcx",
        tensorboard: bool = False,
        config_text: str = "",
        resume_step: int = 0,
        print_every: int = 10,
        process_index: int | None = None,
    ):
        if mode not in MODES:
            raise UserError(f"wandb mode is {mode!r}, expected one of {', '.join(MODES)}: change mode")
        if process_index is None:
            import jax

            process_index = jax.process_index()
        self._writes = process_index == 0
        if not self._writes:
            return
        folder = os.fspath(workdir)
        os.makedirs(folder, exist_ok=True)
        self._lines = _JsonLines(os.path.join(folder, "metrics.jsonl"), resume_step)
        self._progress = _make_progress(total_steps, resume_step, print_every)
        self._wandb = _Wandb(folder, mode, project, config_text, self._progress.message)
        self._tensorboard: TensorBoard | None = None
        if tensorboard:
            events, about = os.path.join(folder, "tensorboard"), {"config_text": config_text}
            self._tensorboard = TensorBoard(
                events, **about, resume_step=resume_step, warn=self._progress.message
            )

    def begin(self) -> None:
        """Starts the wandb run, which may take a while; without it, the first line does."""
        if self._writes:
            self._wandb.begin()

    def advance(self, step: int) -> None:
        """Moves the progress bar to a step that is done, whether or not its metrics are logged."""
        if self._writes:
            self._progress.advance(int(step))

    def log(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Writes one line. Values are numbers or scalar arrays; blocks until arrays are computed."""
        if not self._writes:
            return
        numbers = {name: _number(value) for name, value in metrics.items()}
        problem = self._lines.write({"step": int(step)} | numbers)
        if problem:
            self.message(f"warning: {problem}; training continues without this line")
        self._progress.show(int(step), numbers)
        self._wandb.log(int(step), numbers)
        if self._tensorboard is not None:
            self._tensorboard.log(int(step), numbers)

    def message(self, text: str) -> None:
        """Prints a line on stderr without breaking the progress bar."""
        if self._writes:
            self._progress.message(text)

    def close(self, exit_code: int = 0) -> None:
        """Flushes everything to disk and ends the wandb run with `exit_code` (0: success). May be called twice."""
        if not self._writes:
            return
        self._writes = False
        self._progress.close()
        self._lines.close()
        self._wandb.close(exit_code)
        if self._tensorboard is not None:
            self._tensorboard.close()

    def __enter__(self) -> MetricsLogger:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.close(0 if kind is None else 1)


def _number(value: Any) -> float | int | bool:
    if hasattr(value, "item"):
        value = value.item()
    return value if isinstance(value, (bool, int)) else float(value)


class _JsonLines:
    """metrics.jsonl. Each line is a single write, so a kill can truncate only the last line."""

    def __init__(self, path: str, resume_step: int):
        self._path, self._resume_step = path, resume_step
        self._torn = False
        self._failed = False
        self._file: io.FileIO | None = None
        if os.path.exists(path):
            open(path, "r+b").close()  # fails now, and not after the first steps

    def write(self, record: Mapping[str, Any]) -> str | None:
        """Writes one record. Returns what went wrong, but only for the first of several failures in a row."""
        line = (json.dumps({name: _strict(value) for name, value in record.items()}) + "\n").encode()
        line = b"\n" * self._torn + line  # terminates the previous line if it was only partially written
        try:
            if self._file is None:
                _drop_after(self._path, self._resume_step)
                self._file = open(self._path, "ab", buffering=0)  # noqa: SIM115, closed in close()
            written = self._file.write(line)
            problem = None if written == len(line) else "the disk is full"
            self._torn = self._torn if not written else written < len(line)
        except OSError as error:
            problem = error.strerror or str(error)
        report = problem if not self._failed else None
        self._failed = problem is not None
        return f"{self._path} could not be written: {report}" if report else None

    def close(self) -> None:
        if self._file is None:
            return
        with contextlib.suppress(OSError):
            os.fsync(self._file.fileno())
        self._file.close()


def _strict(value: float) -> float | str:
    """NaN and infinities as strings that float() parses, because JSON has no such numbers."""
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value


def _drop_after(path: str, step: int) -> None:
    """Drops lines of later steps and lines that are not JSON. The file is replaced atomically."""
    try:
        with open(path, "rb") as file:
            lines = file.readlines()
    except FileNotFoundError:
        return
    kept = [line for line in lines if line.endswith(b"\n") and _step_of(line) <= step]
    if kept == lines:
        return
    with open(f"{path}.tmp", "wb") as file:
        file.writelines(kept)
        file.flush()
        os.fsync(file.fileno())
    os.replace(f"{path}.tmp", path)


def _step_of(line: bytes) -> float:
    try:
        return json.loads(line).get("step", -math.inf)
    except (ValueError, AttributeError):
        return math.inf


def _make_progress(total_steps: int, first_step: int, print_every: int) -> _Lines:
    if not print_every:
        return _Silent(total_steps, 0)
    return _Bar(total_steps, first_step) if _has_room_for_a_bar() else _Lines(total_steps, print_every)


def _has_room_for_a_bar() -> bool:
    if not sys.stderr.isatty() or os.environ.get("TERM") == "dumb":
        return False
    with contextlib.suppress(OSError, ValueError):
        return (
            os.get_terminal_size(sys.stderr.fileno()).columns >= 40
        )  # some pseudo-terminals report 0 columns
    return False


class _Lines:
    """Prints `step 120/800 loss 1.432 tok/s 21034 mfu 0.31 eta 1m20s` every `every` steps."""

    def __init__(self, total_steps: int, every: int):
        self._total = total_steps
        self._every = every
        self._shown: int | None = None
        self._times: collections.deque[tuple[int, float]] = collections.deque(
            maxlen=50
        )  # the estimate uses the recent speed, not the mean over the run

    def show(self, step: int, metrics: Mapping[str, float]) -> None:
        self._times.append((step, time.monotonic()))
        trains = "loss" in metrics  # an evaluation is rare, and has the step of the line before it
        due = not trains or self._shown is None or step - self._shown >= self._every or step < self._shown
        if due or step == self._total:
            self._shown = step if trains else self._shown
            left = f" eta {eta}" if (eta := self._time_left(step)) else ""
            self.message(f"step {step}/{self._total} {_summary(metrics)}{left}")

    def advance(self, step: int) -> None:
        pass

    def _time_left(self, step: int) -> str:
        (first, then), (last, now) = self._times[0], self._times[-1]
        known = last > first and step < self._total
        return duration((self._total - step) * (now - then) / (last - first)) if known else ""

    def message(self, text: str) -> None:
        with contextlib.suppress(OSError):  # stderr may be a file on the disk that is full
            print(text, file=sys.stderr, flush=True)

    def close(self) -> None:
        pass


class _Silent(_Lines):
    def show(self, step: int, metrics: Mapping[str, float]) -> None:
        pass


class _AboveTheBar(logging.Handler):
    """Warnings of all loggers, which Python would otherwise print into the line of the bar."""

    def __init__(self, write: Callable[[str], None]):
        super().__init__(logging.WARNING)
        self._write = write

    def emit(self, record: logging.LogRecord) -> None:
        self._write(self.format(record))


class _Bar(_Lines):
    """A bar that moves with every step, below the same lines that are printed elsewhere."""

    def __init__(self, total_steps: int, first_step: int):
        super().__init__(total_steps, 1)
        import tqdm

        form = "{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}]"
        self._tqdm = tqdm.tqdm
        self._bar = tqdm.tqdm(
            total=total_steps, initial=first_step, file=sys.stderr, dynamic_ncols=True, bar_format=form
        )
        self._handler = _AboveTheBar(self.message)
        self._replaced = logging.getLogger("lcx").handlers[
            :
        ]  # those of `lcx.config`, which write into the bar's line
        _exchange(logging.getLogger("lcx"), self._replaced, [self._handler] * bool(self._replaced))
        if not logging.root.handlers:  # the user has not set up logging
            logging.root.addHandler(self._handler)

    def show(self, step: int, metrics: Mapping[str, float]) -> None:
        self.message(f"step {step}/{self._total} {_summary(metrics)}")

    def advance(self, step: int) -> None:
        self._bar.update(step - self._bar.n)

    def message(self, text: str) -> None:
        self._tqdm.write(text, file=sys.stderr)

    def close(self) -> None:
        logging.root.removeHandler(self._handler)
        _exchange(logging.getLogger("lcx"), [self._handler] * bool(self._replaced), self._replaced)
        self._bar.close()


def _exchange(logger: logging.Logger, old: list[logging.Handler], new: list[logging.Handler]) -> None:
    for handler in old:
        logger.removeHandler(handler)
    for handler in new:
        logger.addHandler(handler)


_SHORT = {  # name -> (label, decimals)
    "tokens_per_second": ("tok/s", 0),
    "mfu": ("mfu", 2),
    "loss": ("loss", 3),
    "eval_loss": ("eval_loss", 3),
}


def _summary(metrics: Mapping[str, float]) -> str:
    """Loss, speed and utilisation as text. A line with none of them (an evaluation) is shown with all its values."""
    known = [name for name in ("loss", "tokens_per_second", "mfu") if name in metrics]
    parts = []
    for name in known or metrics:
        label, decimals = _SHORT.get(name, (name, None))
        parts.append(f"{label} {_figure(metrics[name], decimals)}")
    return " ".join(parts)


def _figure(value: float, decimals: int | None) -> str:
    """A number with so many decimals, or with significant digits where fewer than two of them would be left."""
    few = decimals is None or abs(value) < 10 ** (1 - decimals)
    return f"{value:.{4 if decimals is None else 2}g}" if few else f"{value:.{decimals}f}"


class _Wandb:
    """Isolates wandb: it is imported only if enabled, and any failure causes one warning and disables it."""

    def __init__(self, folder: str, mode: str, project: str, config_text: str, warn: Any):
        self._warn = warn
        self._folder = folder
        self._settings = project, config_text
        self._run: Any = None
        key = os.environ.get("WANDB_API_KEY")
        if mode == "auto":
            mode = os.environ.get("WANDB_MODE") or ("online" if key else "offline")
        disabled = os.environ.get("WANDB_DISABLED", "").lower() == "true"
        self._mode = "off" if mode == "disabled" or disabled else mode  # once begun, "off"

    def begin(self) -> None:
        mode, self._mode = self._mode, "off"
        if mode == "online":
            self._start("online", *self._settings, "logging offline instead")
        if mode != "off" and self._run is None:
            self._start("offline", *self._settings, "continuing without wandb")

    def _start(self, mode: str, project: str, config_text: str, otherwise: str) -> None:
        try:
            import wandb

            settings = wandb.Settings(init_timeout=_WANDB_SECONDS, silent=True, console="off")
            kind: dict[str, Any] = {"mode": mode}
            if mode == "online":
                kind |= {"id": _run_id(self._folder), "resume": "allow"}
            config = {"gin": config_text}
            self._run = wandb.init(
                project=project, dir=self._folder, config=config, settings=settings, **kind
            )
            # A run that resumes from an older checkpoint repeats steps. wandb's own step counter must increase and
            # would drop the repeated ones, so `step` is logged as a metric and used as the x axis.
            self._run.define_metric("step")
            self._run.define_metric("*", step_metric="step")
        except Exception as error:
            self._give_up(f"did not start {mode}", error, otherwise)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self.begin()
        if self._run is None:
            return
        try:
            self._run.log({"step": step, **metrics})
        except Exception as error:
            self._give_up("stopped logging", error, "continuing without it")

    def close(self, exit_code: int) -> None:
        """Waits up to a minute for the upload; `wandb sync` can send the rest later."""
        if self._run is None:
            return
        problems: list[Exception] = []

        def finish() -> None:
            try:
                self._run.finish(exit_code=exit_code)
            except Exception as error:
                problems.append(error)

        thread = threading.Thread(target=finish, daemon=True)
        thread.start()
        thread.join(3 * _WANDB_SECONDS)
        if thread.is_alive() or problems:
            error = problems[0] if problems else TimeoutError("still uploading")
            self._give_up(
                "did not finish", error, f"send the rest with `wandb sync {self._folder}/wandb/*run-*`"
            )

    def _give_up(self, what: str, error: Exception, otherwise: str) -> None:
        self._run = None
        reason = first_line(error)
        self._warn(f"warning: wandb {what} ({reason}); {otherwise}")


def _run_id(folder: str) -> str:
    """The id of the wandb run, stored in the workdir so that a resumed run continues the same wandb run."""
    path = os.path.join(folder, "wandb_run_id.txt")
    with contextlib.suppress(FileNotFoundError), open(path) as file:
        return file.read().strip()
    name = os.urandom(4).hex()
    with open(path, "w") as file:
        file.write(name)
    return name


def logger_of(trainer: Any, workdir: str, step: int) -> MetricsLogger:
    """The logger of a run (the settings of a `trainer.Trainer`) that starts after `step` updates."""
    config = pathlib.Path(workdir) / "config.gin"
    return MetricsLogger(
        workdir,
        total_steps=trainer.last_step,
        mode=trainer.wandb,
        tensorboard=trainer.tensorboard,
        resume_step=step,
        print_every=trainer.log_every,
        config_text=config.read_text() if config.exists() else "",
    )
