"""A job that only says that it ran."""

import dataclasses
import pathlib


@dataclasses.dataclass(frozen=True)
class Job:
    def run(self, workdir: str) -> None:
        (pathlib.Path(workdir) / "ran").touch()
