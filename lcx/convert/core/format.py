"""The contract of a checkpoint format: one object that recognises, reads, writes, checks and describes it.

A format is a frozen subclass of `Format` in its own file, with an entry in `formats.FORMATS`. Fields created with
`option` are the writing options that a user may set: by name in Python, by a flag of the same name on the command line.

`--help` lists the formats without importing jax or numpy, so a format's file imports heavy packages inside its methods.
"""

import dataclasses
import os
import pathlib
from collections.abc import Callable, Collection, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

from lcx.errors import UserError

if TYPE_CHECKING:
    import numpy as np

    from lcx.convert.core.model_source import ModelSource
    from lcx.convert.core.training_state import TrainingState
    from lcx.convert.files.tensor_io import TensorInfo
    from lcx.model import Decoder

T = TypeVar("T")


def option(default: Any, *, help: str, metavar: str) -> Any:
    """A dataclass field that is a writing option.

    Args:
      default: the default value; its type is the type of the flag (None: str).
      help: completes the sentence "NAME is ...", and names the formats that have the option.
      metavar: placeholder for the value in `--help`.
    """
    return dataclasses.field(default=default, metadata={"help": help, "metavar": metavar})


@dataclasses.dataclass(frozen=True)
class Format:
    """A checkpoint format.

    Attributes:
      name: its value for --src_format, --dst_format and `format=`.
      help: a short description for `--help`.
      reads: whether models can be read from it.
      writes: whether whole models can be written to it.
      overlay: whether it adds files to the folder of another format. Overlays are tried first in detection.
      knows_tensors: whether detection looks at the names of the tensors; these formats are tried next.
    """

    name: str
    help: str
    reads: bool = True
    writes: bool = True
    overlay: bool = False
    knows_tensors = False  # not a field: it belongs to the class

    @classmethod
    def options(cls) -> dict[str, dataclasses.Field]:
        """Writing options: name -> dataclass field."""
        return {field.name: field for field in dataclasses.fields(cls) if "metavar" in field.metadata}

    # ------------------------------------------------------------------------------------------------- reading

    def detect(self, path: pathlib.Path, names: Collection[str]) -> bool:
        """Whether `path` holds a checkpoint of this format, judged by file names and, if necessary, tensor names.

        Args:
          path: a folder or a file; for a file split into pieces, its name without the `.partN` suffix.
          names: the names of the folder's entries, or the name of the file.

        Raises:
          UserError: it is only part of a checkpoint and cannot be read alone.
        """
        return False

    def open(self, path: str | os.PathLike) -> "ModelSource":
        """Opens the model at `path`. Parameters are read lazily, on request.

        Raises:
          UserError: damaged or missing files, or an unsupported model.
        """
        raise NotImplementedError(f"{self.name} is not read")

    def read(self, path: str | os.PathLike, work: Callable[[], T]) -> T:
        """The result of `work`, which opens `path` and reads parameters.

        A format whose checkpoints hold several steps repeats it with an older step after one that is damaged.
        """
        return work()

    def verify(self, path: str | os.PathLike) -> None:
        """Reads all values of a format that stores checksums of them; other formats are taken as they are.

        For work that reads parameters piece by piece over hours, and cannot be repeated with an older step.

        Raises:
          UserError: the values differ from those that were saved, and there is no older step.
        """

    def load(
        self,
        path: str | os.PathLike,
        *,
        dtype: "np.dtype | None",
        mesh: Any,
        change: "Callable[[Decoder], Decoder]",
    ) -> "tuple[Decoder, dict[str, Any]]":
        """Reads the model and places its parameters on devices.

        Args:
          dtype: dtype of the parameters and the computation; None keeps the stored dtype.
          mesh: None for the default device.
          change: applied to the model before any parameter is read, so that its errors come early.
        """
        from lcx.convert.core import model_source

        source = self.open(path)
        source.model = change(source.model)
        return model_source.load(source, dtype=dtype, mesh=mesh)

    def tokenizer(self, path: pathlib.Path) -> Mapping[str, Any] | None:
        """`Tokenizer.to_json` of the tokenizer that this format implies without storing it; None if it implies none."""
        return None

    def training_state(self, path: str | os.PathLike, model: "Decoder") -> "TrainingState":
        """The optimizer's state and the count of updates that are stored beside the model at `path`.

        Raises:
          UserError: the format stores none, or what is stored is damaged or belongs to another model.
        """
        raise UserError(
            f"{path}: the format {self.name!r} stores no optimizer that a run could continue: set "
            "Trainer.init_optimizer = False"
        )

    # ------------------------------------------------------------------------------------------------- writing

    def planned_bytes(self, source: "ModelSource", *, dtype: "np.dtype | None") -> int:
        """Total size in bytes of the tensors to be written.

        Raises:
          UserError: the format cannot represent the model.
        """
        infos = source.leaves.values()
        return sum(info.nbytes // info.dtype.itemsize * (dtype or info.dtype).itemsize for info in infos)

    def write(
        self,
        folder: pathlib.Path,
        source: "ModelSource",
        *,
        dtype: "np.dtype | None",
        progress: Callable[[int], None],
    ) -> "dict[str, TensorInfo]":
        """Writes a model into an empty folder, and returns the written tensors.

        Args:
          dtype: dtype of the tensors; None keeps the stored dtypes.
          progress: called after each piece with its number of bytes.

        Raises:
          UserError: the format cannot represent the model.
        """
        raise NotImplementedError(f"{self.name} is not written")

    def check_written(
        self, folder: pathlib.Path, tensors: "Mapping[str, TensorInfo]"
    ) -> "dict[str, TensorInfo]":
        """The folder's tensors, read back from metadata. Raises UserError unless they match `tensors` from `write`."""
        raise NotImplementedError(f"{self.name} is not written")

    def completed(self, model: "Decoder", like: "Decoder") -> "Decoder":
        """`model`, as read back, with those settings of the written model `like` that this format does not store."""
        return model

    def may_replace(self, folder: pathlib.Path) -> bool:
        """Whether a folder detected as this format may be replaced as a whole."""
        return True


@dataclasses.dataclass(frozen=True)
class ShardedFormat(Format):
    """A format whose tensors are in safetensors files of limited size.

    Attributes:
      max_shard_bytes: maximum size of a safetensors file; a larger tensor gets its own file.
    """

    max_shard_bytes: int = option(
        5_000_000_000,
        help="the maximum size in bytes of a safetensors file of 'hf' and 'lolcats'",
        metavar="N",
    )

    def __post_init__(self):
        if self.max_shard_bytes < 1:
            raise UserError(f"max_shard_bytes is {self.max_shard_bytes}, expected at least 1")


@dataclasses.dataclass(frozen=True)
class TrainedFormat(Format):
    """A format for only the parameters that a run trained: written from a workdir, not readable as a model."""

    reads: bool = False
    writes: bool = False

    def export(self, workdir: pathlib.Path, path: pathlib.Path, *, overwrite: bool) -> list[str]:
        """Writes the trained parameters to a new folder, and returns lines that summarise its contents.

        Raises:
          UserError: there is no run at `src`, a trained parameter has no place in this format, or `dst` exists.
        """
        raise NotImplementedError


def check_same(
    folder: pathlib.Path, found: "Mapping[str, TensorInfo]", expected: "Mapping[str, TensorInfo]"
) -> None:
    """Raises UserError unless names, shapes and dtypes of the tensors agree."""
    specs = [{name: (info.shape, info.dtype) for name, info in side.items()} for side in (found, expected)]
    if specs[0] != specs[1]:
        raise UserError(
            f"{folder}: read-back mismatch, names, shapes or dtypes differ from those written; check the disk and try "
            "again"
        )
