"""Where the numbers of a run go: metrics.jsonl always, wandb if wanted, a progress bar or plain lines.

metrics.jsonl is the record: one JSON object a line, `{"step": 120, "loss": 1.43, "tokens_per_second": 2e4}`,
written as it happens. The rest is a convenience, and nothing here can stop a run: a wandb that fails or a
disk that is full costs one warning.
"""

from __future__ import annotations

import collections
import contextlib
import json
import math
import os
import sys
import threading
import time
from collections.abc import Mapping
from typing import Any

from lcx.errors import UserError, first_line

MODES = ("auto", "offline", "online", "off")
_WANDB_SECONDS = 20  # wandb alone waits 100 s for a server that is not there


class MetricsLogger:
    """Writes on process 0, does nothing on the others.

    Args:
      workdir: gets metrics.jsonl, and a wandb/ folder.
      total_steps: for the progress bar and the time left.
      mode: wandb's: "online", "offline" (`wandb sync` sends it later), "off", or "auto": what WANDB_MODE
        says, else online if WANDB_API_KEY is set, else offline.
      project: wandb's project.
      config_text: kept with the wandb run.
      resume_step: the step that the run goes on from. Lines of later steps, and a line cut short by a kill,
        are dropped: those steps are done again.
      print_every: steps between plain lines when stderr is no terminal; 0 shows neither lines nor a bar.
      process_index: this process; jax.process_index() by default.

    Raises:
      UserError: an unknown mode.
    """

    def __init__(
        self,
        workdir: str | os.PathLike[str],
        *,
        total_steps: int,
        mode: str = "auto",
        project: str = "lcx",
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

    def log(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Writes one line; values are numbers or scalar arrays, waited for if still being computed."""
        if not self._writes:
            return
        numbers = {name: _number(value) for name, value in metrics.items()}
        problem = self._lines.write({"step": int(step)} | numbers)
        if problem:
            self.message(f"warning: {problem}; the run goes on without this line")
        self._progress.show(int(step), numbers)
        self._wandb.log(int(step), numbers)

    def message(self, text: str) -> None:
        """A line on stderr that leaves the progress bar whole."""
        if self._writes:
            self._progress.message(text)

    def close(self, exit_code: int = 0) -> None:
        """Makes everything durable; 0 is a run that ended well. Closing again does nothing."""
        if not self._writes:
            return
        self._writes = False
        self._progress.close()
        self._lines.close()
        self._wandb.close(exit_code)

    def __enter__(self) -> MetricsLogger:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.close(0 if kind is None else 1)


def _number(value: Any) -> float | int | bool:
    if hasattr(value, "item"):
        value = value.item()
    return value if isinstance(value, (bool, int)) else float(value)


class _JsonLines:
    """metrics.jsonl. Each line is one write, so that a kill cuts at most the last one."""

    def __init__(self, path: str, resume_step: int):
        self._torn = False
        self._failed = False
        _drop_after(path, resume_step)
        self._file = open(path, "ab", buffering=0)  # noqa: SIM115, closed in close()

    def write(self, record: Mapping[str, Any]) -> str | None:
        """Returns the first problem of a series, in words."""
        line = (json.dumps({name: _strict(value) for name, value in record.items()}) + "\n").encode()
        line = b"\n" * self._torn + line  # after a write that was cut short, a line of its own again
        try:
            written = self._file.write(line)
            problem = None if written == len(line) else "the disk is full"
            self._torn = self._torn if not written else written < len(line)
        except OSError as error:
            problem = error.strerror or str(error)
        report = problem if not self._failed else None
        self._failed = problem is not None
        return f"{self._file.name} could not be written: {report}" if report else None

    def close(self) -> None:
        with contextlib.suppress(OSError):
            os.fsync(self._file.fileno())
        self._file.close()


def _strict(value: float) -> float | str:
    """JSON has no NaN or infinity; these strings are what float() reads back."""
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value


def _drop_after(path: str, step: int) -> None:
    """Drops lines of later steps and lines that are not JSON; the file is replaced whole or not at all."""
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
        return os.get_terminal_size(sys.stderr.fileno()).columns >= 40  # 0 where a terminal is only pretended
    return False


class _Lines:
    """`step 120/800 loss 1.432 tok/s 21034 mfu 0.31 eta 1m20s`, every so many steps."""

    def __init__(self, total_steps: int, every: int):
        self._total = total_steps
        self._every = every
        self._shown: int | None = None
        self._times: collections.deque[tuple[int, float]] = collections.deque(
            maxlen=50
        )  # recent speed, not the mean

    def show(self, step: int, metrics: Mapping[str, float]) -> None:
        self._times.append((step, time.monotonic()))
        due = self._shown is None or step - self._shown >= self._every or step < self._shown
        if due or step == self._total:
            self._shown = step
            left = f" eta {eta}" if (eta := self._time_left(step)) else ""
            self.message(f"step {step}/{self._total} {_summary(metrics)}{left}")

    def _time_left(self, step: int) -> str:
        (first, then), (last, now) = self._times[0], self._times[-1]
        return _duration((self._total - step) * (now - then) / (last - first)) if last > first else ""

    def message(self, text: str) -> None:
        with contextlib.suppress(OSError):  # stderr may be a file on the disk that is full
            print(text, file=sys.stderr, flush=True)

    def close(self) -> None:
        pass


class _Silent(_Lines):
    def show(self, step: int, metrics: Mapping[str, float]) -> None:
        pass


class _Bar(_Lines):
    def __init__(self, total_steps: int, first_step: int):
        super().__init__(total_steps, 1)
        import tqdm

        form = "{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}]{postfix}"
        self._tqdm = tqdm.tqdm
        self._bar = tqdm.tqdm(
            total=total_steps, initial=first_step, file=sys.stderr, dynamic_ncols=True, bar_format=form
        )

    def show(self, step: int, metrics: Mapping[str, float]) -> None:
        self._bar.set_postfix_str(_summary(metrics), refresh=False)
        self._bar.update(step - self._bar.n)

    def message(self, text: str) -> None:
        self._tqdm.write(text, file=sys.stderr)

    def close(self) -> None:
        self._bar.close()


_SHORT = {"tokens_per_second": ("tok/s", "{:.0f}"), "mfu": ("mfu", "{:.2f}"), "loss": ("loss", "{:.3f}")}


def _summary(metrics: Mapping[str, float]) -> str:
    """Loss, speed and utilisation; of a line that has none of them (an evaluation), all there is."""
    known = [name for name in ("loss", "tokens_per_second", "mfu") if name in metrics]
    parts = []
    for name in known or metrics:
        label, form = _SHORT.get(name, (name, "{:.4g}"))
        parts.append(f"{label} {form.format(metrics[name])}")
    return " ".join(parts)


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours}h{minutes:02d}m"
    return f"{minutes}m{seconds:02d}s" if minutes else f"{seconds}s"


class _Wandb:
    """wandb behind a wall: imported only if wanted, and after any failure one warning and then silence."""

    def __init__(self, folder: str, mode: str, project: str, config_text: str, warn: Any):
        self._warn = warn
        self._folder = folder
        self._run: Any = None
        key = os.environ.get("WANDB_API_KEY")
        if mode == "auto":
            mode = os.environ.get("WANDB_MODE") or ("online" if key else "offline")
        if mode in ("off", "disabled") or os.environ.get("WANDB_DISABLED", "").lower() == "true":
            return
        if mode == "online":
            self._start("online", project, config_text, "logging offline instead")
        if self._run is None:
            self._start("offline", project, config_text, "going on without wandb")

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
            # A run that falls back to an older checkpoint repeats steps; wandb's own counter would drop them.
            self._run.define_metric("step")
            self._run.define_metric("*", step_metric="step")
        except Exception as error:
            self._give_up(f"did not start {mode}", error, otherwise)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        if self._run is None:
            return
        try:
            self._run.log({"step": step, **metrics})
        except Exception as error:
            self._give_up("stopped logging", error, "going on without it")

    def close(self, exit_code: int) -> None:
        """Waits for the upload, but not for ever: what is missing can be sent later."""
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
    """The same wandb run for every restart in this workdir."""
    path = os.path.join(folder, "wandb_run_id.txt")
    with contextlib.suppress(FileNotFoundError), open(path) as file:
        return file.read().strip()
    name = os.urandom(4).hex()
    with open(path, "w") as file:
        file.write(name)
    return name
