"""The format "lcx": a workdir with the steps of a run, or with the single step of a converted model."""

import dataclasses

from lcx.convert.core.format import Format


@dataclasses.dataclass(frozen=True)
class Workdir(Format):
    """An lcx workdir, checkpoints folder or step folder."""

    name: str = "lcx"
    help: str = "an lcx workdir"

    def detect(self, path, names):
        from lcx.checkpoint.folder import COMMIT_MARKER

        if (
            not path.is_dir() or "config.json" in names
        ):  # a Hugging Face folder may have a folder checkpoints/ too
            return False
        return "checkpoints" in names or COMMIT_MARKER in names or any(name.isdecimal() for name in names)

    def open(self, path):
        from lcx.convert.workdir.source import LcxSource

        return LcxSource(path)

    def read(self, path, work):
        from lcx.checkpoint.slices import past_damage

        return past_damage(path, work)

    def verify(self, path):
        self.read(path, lambda: self.open(path).verify())

    def load(self, path, *, dtype, mesh, change):
        from lcx.convert.workdir import restore

        return restore.load(path, dtype=dtype, mesh=mesh, change=change)

    def write(self, folder, source, *, dtype, progress):
        from lcx.convert.workdir import writer

        return writer.write(folder, source, dtype=dtype, progress=progress)

    def check_written(self, folder, tensors):
        from lcx.convert.workdir import writer

        return writer.check_written(folder, tensors)
