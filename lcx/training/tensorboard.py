"""Writes the metrics of a run as TensorBoard event files, with the writer of the tensorboard package.

The package needs no TensorFlow. It is imported only if a run asks for it, and a failure causes one warning.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from typing import Any

from lcx.errors import UserError, first_line

_FLUSH_SECONDS = 10


class TensorBoard:
    """One event file of scalars, in float32 as TensorBoard stores them; other files in the folder are kept.

    Args:
      folder: of the event files.
      config_text: shown on the page "Text".
      resume_step: the step that the run resumes from. TensorBoard then hides what earlier files hold of later steps,
        because those steps will be repeated.
      warn: called with one line when writing fails.

    Raises:
      UserError: the tensorboard package is not installed.
    """

    def __init__(self, folder: str, *, config_text: str, resume_step: int, warn: Callable[[str], None]):
        try:
            from tensorboard.compat.proto import event_pb2, summary_pb2
            from tensorboard.summary.writer.event_file_writer import EventFileWriter
        except ImportError as error:
            raise UserError(
                f"Trainer.tensorboard needs the tensorboard package ({first_line(error)}): pip install "
                "'lcx[tensorboard]', or set it to False"
            ) from error
        self._event, self._summary, self._warn = event_pb2, summary_pb2, warn
        self._make: Callable[[], Any] | None = lambda: EventFileWriter(folder, flush_secs=_FLUSH_SECONDS)
        self._writer: Any = None
        self._first = []
        if resume_step:
            start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
            self._first += [event_pb2.Event(wall_time=time.time(), step=resume_step + 1, session_log=start)]
        if config_text:
            self._first += [self._text_event("config.gin", config_text)]

    def _begin(self) -> None:
        """Makes the event file, before the first line: until then, nothing is written."""
        make, self._make = self._make, None
        if make is None:
            return
        try:
            self._writer = make()
        except OSError as error:
            self._give_up(error)
        for event in self._first:
            self._add(event)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self._begin()
        value = self._summary.Summary.Value
        values = [value(tag=name, simple_value=_float32(number)) for name, number in metrics.items()]
        summary = self._summary.Summary(value=values)
        self._add(self._event.Event(wall_time=time.time(), step=step, summary=summary))

    def close(self) -> None:
        writer, self._writer = self._writer, None
        if writer is not None:
            try:
                writer.close()
            except Exception as error:
                self._give_up(error)

    def _text_event(self, tag: str, text: str) -> Any:
        from tensorboard.compat.proto import tensor_pb2, types_pb2

        content = tensor_pb2.TensorProto(dtype=types_pb2.DT_STRING, string_val=[f"```\n{text}\n```".encode()])
        content.tensor_shape.dim.add(size=1)
        metadata = self._summary.SummaryMetadata()
        metadata.plugin_data.plugin_name = "text"
        value = self._summary.Summary.Value(tag=f"{tag}/text_summary", tensor=content, metadata=metadata)
        return self._event.Event(wall_time=time.time(), summary=self._summary.Summary(value=[value]))

    def _add(self, event: Any) -> None:
        if self._writer is None:
            return
        try:
            self._writer.add_event(event)
        except Exception as error:
            self._give_up(error)

    def _give_up(self, error: Exception) -> None:
        self._writer = None
        self._warn(f"warning: TensorBoard stopped logging ({first_line(error)}); continuing without it")


def _float32(number: float) -> float:
    """Numbers beyond the range of float32 as infinities, which protobuf refuses to round by itself."""
    return math.copysign(math.inf, number) if math.isfinite(number) and abs(number) > 3.4e38 else number
