"""The format "hf": a folder that transformers reads and writes."""

import dataclasses
from typing import Any

from lcx import moved
from lcx.convert.core.format import ShardedFormat


@dataclasses.dataclass(frozen=True)
class HuggingFace(ShardedFormat):
    """A Hugging Face folder.

    Attributes:
      family: your own `family.Family`, for a model_type that is not in `families.FAMILIES`.
    """

    name: str = "hf"
    help: str = "a Hugging Face folder (config.json, safetensors, the tokenizer)"
    family: Any = None

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


__getattr__ = moved.names_of(__name__)
