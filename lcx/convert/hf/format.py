"""The format "hf": a folder that transformers reads and writes."""

import dataclasses
from typing import Any

from lcx import moved
from lcx.convert.core.format import Format, option
from lcx.errors import UserError


@dataclasses.dataclass(frozen=True)
class HuggingFace(Format):
    """A Hugging Face folder.

    Attributes:
      family: your own `family.Family`, for a model_type that is not in `families.FAMILIES`.
      max_shard_bytes: maximum size of a safetensors file; a larger tensor gets its own file.
    """

    name: str = "hf"
    help: str = "a Hugging Face folder (config.json, safetensors, the tokenizer)"
    family: Any = None
    max_shard_bytes: int = option(
        5_000_000_000,
        help="the maximum size in bytes of a safetensors file of 'hf' and 'lolcats'",
        metavar="N",
    )

    def __post_init__(self):
        check_shard_bytes(self.max_shard_bytes)

    def detect(self, path, names):
        from lcx.convert.hf.folder import CONFIG, WEIGHT_FILES

        return path.is_dir() and any(name in names for name in (CONFIG, *WEIGHT_FILES))

    def open(self, path):
        from lcx.convert.hf.source import HfSource

        return HfSource(path, family=self.family)

    def planned_bytes(self, source, *, dtype):
        from lcx.convert.hf import writer

        writer.config_of(source, dtype, family=self.family)
        return super().planned_bytes(source, dtype=dtype)

    def write(self, folder, source, *, dtype, progress):
        from lcx.convert.hf import writer

        return writer.write(
            folder,
            source,
            dtype=dtype,
            max_shard_bytes=self.max_shard_bytes,
            family=self.family,
            progress=progress,
        )

    def check_written(self, folder, tensors):
        from lcx.convert.hf import writer

        return writer.check_written(folder, tensors, family=self.family)


def check_shard_bytes(value: int) -> None:
    """Raises UserError unless the size is at least 1 byte."""
    if value < 1:
        raise UserError(f"max_shard_bytes is {value}, expected at least 1")


__getattr__ = moved.names_of(__name__)
