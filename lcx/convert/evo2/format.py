"""The formats of Evo 2: "savanna" (training), "vortex" (inference) and "megatron" (bionemo), without a config.json."""

import dataclasses
import json
import pathlib

from lcx import small_files
from lcx.convert.core.format import Format, option
from lcx.errors import UserError


class _Evo2(Format):
    """Common to both: files of weights from which the model follows, and an implied byte tokenizer."""

    knows_tensors = True

    def tokenizer(self, path):
        return self.open(path).tokenizer

    def completed(self, model, like):
        from lcx.convert.evo2 import striped_hyena

        return striped_hyena.with_scaling_of(like, model)

    def may_replace(self, folder):
        from lcx.convert.evo2 import savanna_files, weight_files

        # a torch file among other files does not make the folder a replaceable checkpoint
        return all(savanna_files.is_part(entry.name) or entry.name == weight_files.CONFIG for entry in folder.iterdir())


@dataclasses.dataclass(frozen=True)
class Savanna(_Evo2):
    """Checkpoints of savanna, Evo 2's trainer.

    Attributes:
      legacy: whether the roles of hyena layers are stored as blocks on each rank; the files do not state it.
      float32: whether to read the float32 weights from DeepSpeed's optimizer states.
      model_parallel: number of model-parallel files that the tensors are split over.
    """

    name: str = "savanna"
    help: str = "Evo 2's training checkpoints, at any model-parallel size"
    legacy: bool = False
    float32: bool = False
    model_parallel: int = option(1, help="the number of model-parallel files of 'savanna'", metavar="N")

    def __post_init__(self):
        if self.model_parallel < 1:
            raise UserError(f"model_parallel is {self.model_parallel}, expected 1 or more: change model_parallel")

    def detect(self, path, names):
        from lcx.convert.evo2 import savanna_files, vortex

        # the files do not distinguish the variants, so only the plain one is detected
        if self.legacy or self.float32 or not _has_parts(path, names):
            return False
        return savanna_files.looks_like(path) if _of_others(path, names) else not vortex.is_vortex(path)

    def open(self, path):
        from lcx.convert.evo2.savanna import SavannaSource

        return SavannaSource(path, legacy=self.legacy, float32=self.float32)

    def planned_bytes(self, source, *, dtype):
        from lcx.convert.evo2 import savanna

        planned = savanna.planned(source, dtype=dtype, model_parallel=self.model_parallel)
        return sum(info.nbytes for info in planned.values())

    def write(self, folder, source, *, dtype, progress):
        from lcx.convert.evo2 import savanna

        return savanna.write(
            folder, source, dtype=dtype, model_parallel=self.model_parallel, progress=progress
        )

    def check_written(self, folder, tensors):
        from lcx.convert.evo2 import savanna

        return savanna.check_written(folder, tensors)


@dataclasses.dataclass(frozen=True)
class Vortex(_Evo2):
    """Checkpoints of vortex, Evo 2's inference code."""

    name: str = "vortex"
    help: str = "Evo 2's inference checkpoint, a single file"

    def detect(self, path, names):
        from lcx.convert.evo2 import vortex

        return _has_parts(path, names) and vortex.is_vortex(path)

    def open(self, path):
        from lcx.convert.evo2.vortex import VortexSource

        return VortexSource(path)

    def planned_bytes(self, source, *, dtype):
        from lcx.convert.evo2 import vortex

        return sum(info.nbytes for info in vortex.planned(source, dtype=dtype).values())

    def write(self, folder, source, *, dtype, progress):
        from lcx.convert.evo2 import vortex

        return vortex.write(folder, source, dtype=dtype, progress=progress)

    def check_written(self, folder, tensors):
        from lcx.convert.evo2 import vortex

        return vortex.check_written(folder, tensors)


@dataclasses.dataclass(frozen=True)
class Megatron(_Evo2):
    """Megatron's distributed checkpoints of Evo 2, as bionemo trains it."""

    name: str = "megatron"
    help: str = "Evo 2 in bionemo's distributed checkpoints (torch_dist, zarr)"
    writes: bool = False

    def detect(self, path, names):
        known = ".metadata" in names or "weights" in names
        if not known and not any(name.startswith(("iter_", "module.", "decoder.", "embedding.")) for name in names):
            return False
        from lcx.convert.evo2 import megatron_files

        return megatron_files.find(path) is not None

    def open(self, path):
        from lcx.convert.evo2.megatron import MegatronSource

        return MegatronSource(path)

    def may_replace(self, folder):
        return False


def _has_parts(path: pathlib.Path, names) -> bool:
    from lcx.convert.evo2 import savanna_files, weight_files

    if path.is_dir():
        if "config.json" in names and _is_hf(path / "config.json"):
            return False
        return any(savanna_files.is_part(name) or name.endswith(weight_files.SAFETENSORS) for name in names)
    suffixes = (*savanna_files.TORCH_SUFFIXES, weight_files.SAFETENSORS)
    return path.name.endswith(suffixes) or bool(savanna_files.PIECE.fullmatch(path.name))


def _of_others(path: pathlib.Path, names) -> bool:
    """Whether the names of the files are those of other formats, so that only the tensors' names can tell."""
    from lcx.convert.evo2 import weight_files

    hf = ("pytorch_model", "model.safetensors", "model-", "adapter_model", "config.json")
    return any(name.startswith(hf) or name.endswith(weight_files.SAFETENSORS) for name in names)


def _is_hf(config: pathlib.Path) -> bool:
    """Whether a config.json is that of a Hugging Face model, and not vortex's own."""
    try:
        found = json.loads(small_files.read_text(config))
    except (OSError, ValueError, RecursionError):  # UserError is a ValueError
        return True
    return not isinstance(found, dict) or bool({"model_type", "architectures"} & found.keys())
