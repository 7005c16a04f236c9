"""The formats "lolcats", a whole model, and "lolcats_files", only the parameters that a run trained."""

import dataclasses

from lcx import moved
from lcx.convert.core.format import ShardedFormat, TrainedFormat
from lcx.convert.lolcats.files import Lolcats, is_lolcats
from lcx.errors import UserError


@dataclasses.dataclass(frozen=True)
class LolcatsFolder(ShardedFormat):
    """A Hugging Face folder with feature maps.

    Attributes:
      files: the LoLCATS files and their settings; None: those in the folder.
    """

    name: str = "lolcats"
    help: str = "a Hugging Face folder with LoLCATS feature maps"
    overlay: bool = True
    files: Lolcats | None = None

    def __post_init__(self):
        super().__post_init__()
        if not isinstance(self.files, Lolcats | None):
            raise UserError(
                f"lolcats is {self.files!r}, expected lcx.Lolcats(feature_maps=..., lora=..., attention=...)"
            )

    def detect(self, path, names):
        found = is_lolcats(names)
        if found and not path.is_dir():
            raise UserError(
                f"{path} lies on a Hugging Face folder: pass that folder, and this file as --feature_maps or --lora"
            )
        return found

    def open(self, path):
        from lcx.convert.lolcats.source import LolcatsSource

        return LolcatsSource(path, self.files)

    def planned_bytes(self, source, *, dtype):
        from lcx.convert.lolcats import writer

        writer.planned(source, dtype=dtype)
        return super().planned_bytes(source, dtype=dtype)

    def write(self, folder, source, *, dtype, progress):
        from lcx.convert.lolcats import writer

        return writer.write(
            folder, source, dtype=dtype, max_shard_bytes=self.max_shard_bytes, progress=progress
        )

    def check_written(self, folder, tensors):
        from lcx.convert.lolcats import writer

        return writer.check_written(folder, tensors)


@dataclasses.dataclass(frozen=True)
class LolcatsFiles(TrainedFormat):
    """The feature maps and low-rank pairs that a run trained, in the form of the published files."""

    name: str = "lolcats_files"
    help: str = (
        "the feature maps and low-rank pairs of a run, for the Hugging Face folder that it started from"
    )

    def export(self, workdir, path, *, overwrite):
        from lcx.convert.lolcats import writer

        writer.export(workdir, path, overwrite=overwrite)
        return [f"{', '.join(sorted(file.name for file in path.iterdir()))}, read back"]


__getattr__ = moved.names_of(__name__)
