"""The format "two_mamba": the folders that the published 2Mamba trainer writes and continues from."""

import contextlib
import dataclasses

from lcx.convert.core.format import Format
from lcx.errors import UserError


@dataclasses.dataclass(frozen=True)
class TwoMambaFolder(Format):
    """A folder of the published 2Mamba trainer."""

    name: str = "two_mamba"
    help: str = (
        "a folder of the published 2Mamba trainer (config.json with attention_type, model.safetensors)"
    )
    overlay: bool = True  # its config.json is also that of a Llama

    def detect(self, path, names):
        from lcx.convert.files import folders

        if not path.is_dir() or "config.json" not in names:
            return False
        with contextlib.suppress(UserError):  # a damaged file is reported by the format that reads the folder
            config = folders.read_json(folders.inside(path, "config.json"))
            return "attention_type" in config and config.get("model_type") == "llama"
        return False

    def open(self, path):
        from lcx.convert.two_mamba.source import TwoMambaSource

        return TwoMambaSource(path)

    def training_state(self, path, model):
        from lcx.convert.two_mamba import training_state

        return training_state.read(path, model)

    def planned_bytes(self, source, *, dtype):
        from lcx.convert.two_mamba import writer

        tensors = writer.planned(source, dtype=dtype)
        return sum(info.nbytes for info in tensors.values()) + writer.optimizer_bytes(source)

    def write(self, folder, source, *, dtype, progress):
        from lcx.convert.two_mamba import writer

        return writer.write(folder, source, dtype=dtype, progress=progress)

    def check_written(self, folder, tensors):
        from lcx.convert.two_mamba import writer

        return writer.check_written(folder, tensors)
