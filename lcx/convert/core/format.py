"""The contract of a checkpoint format: one object that recognises, reads, writes, checks and describes it.

A format is a frozen subclass of `Format` in a file of its own, and an entry of `formats.FORMATS`. Its fields made with
`option` are what a user may set when it is written, in Python by name, on the command line by a flag of that name.

`--help` lists the formats before jax and numpy are imported, so a format's file imports what it needs in its methods.
"""

import dataclasses
import os
import pathlib
from collections.abc import Callable, Collection, Mapping
from typing import TYPE_CHECKING, Any

from lcx.errors import UserError

if TYPE_CHECKING:
    import numpy as np

    from lcx.convert.core.model_source import ModelSource
    from lcx.convert.files.tensor_io import TensorInfo
    from lcx.model import Decoder


def option(default: Any, *, help: str, metavar: str) -> Any:
    """A field that is an option of writing.

    Args:
      default: used where the user gives none; its type is that of the flag (None: text).
      help: continues "NAME is ...", and names the formats that take it.
      metavar: stands for the value in `--help`.
    """
    return dataclasses.field(default=default, metadata={"help": help, "metavar": metavar})


@dataclasses.dataclass(frozen=True)
class Format:
    """A checkpoint format.

    Attributes:
      name: what --src_format, --dst_format and `format=` call it.
      help: what it is, for `--help`.
      reads: whether models are read from it.
      writes: whether any model can be written to it.
      overlay: whether its files lie on the folder of another format, so that it is asked first what a folder is.
    """

    name: str
    help: str
    reads: bool = True
    writes: bool = True
    overlay: bool = False

    @classmethod
    def options(cls) -> dict[str, dataclasses.Field]:
        """Name -> field of what can be set when it is written."""
        return {field.name: field for field in dataclasses.fields(cls) if "metavar" in field.metadata}

    # ------------------------------------------------------------------------------------------------- reading

    def detect(self, path: pathlib.Path, names: Collection[str]) -> bool:
        """Whether a checkpoint of this format is at `path`, by the names of files (and, if need be, of tensors).

        Args:
          path: an existing folder or file.
          names: of what lies in the folder, or of the file itself.

        Raises:
          UserError: it is a part of one, which cannot be read alone.
        """
        return False

    def open(self, path: str | os.PathLike) -> "ModelSource":
        """The model at `path`, which is read as its parameters are asked for.

        Raises:
          UserError: damaged or missing files, or a model that is not supported.
        """
        raise NotImplementedError(f"{self.name} is not read")

    def load(
        self,
        path: str | os.PathLike,
        *,
        dtype: "np.dtype | None",
        mesh: Any,
        change: "Callable[[Decoder], Decoder]",
    ) -> "tuple[Decoder, dict[str, Any]]":
        """The model and its parameters on devices.

        Args:
          dtype: of the parameters and the computation; None as stored.
          mesh: None for the default device.
          change: applied to the model before anything large is read.
        """
        from lcx.convert.core import model_source

        source = self.open(path)
        source.model = change(source.model)
        return model_source.load(source, dtype=dtype, mesh=mesh)

    def tokenizer(self, path: pathlib.Path) -> Mapping[str, Any] | None:
        """What `Tokenizer.to_json` says of the tokenizer that this format implies without any file for it."""
        return None

    # ------------------------------------------------------------------------------------------------- writing

    def planned_bytes(self, source: "ModelSource", *, dtype: "np.dtype | None") -> int:
        """Size of the tensors to be written.

        Raises:
          UserError: the format cannot hold the model.
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
        """Writes a model into an empty folder, and returns the tensors that it wrote.

        Args:
          dtype: of the tensors; None as stored.
          progress: called with the number of bytes after each piece.

        Raises:
          UserError: the format cannot hold the model.
        """
        raise NotImplementedError(f"{self.name} is not written")

    def check_written(
        self, folder: pathlib.Path, tensors: "Mapping[str, TensorInfo]"
    ) -> "dict[str, TensorInfo]":
        """The tensors that the folder holds, read back. Raises UserError when they are not those of `write`."""
        raise NotImplementedError(f"{self.name} is not written")

    def completed(self, model: "Decoder", like: "Decoder") -> "Decoder":
        """A model read back, with the settings of the written one that no file of this format states."""
        return model

    def may_replace(self, folder: pathlib.Path) -> bool:
        """Whether a folder in which this format was detected may be replaced as a whole."""
        return True


@dataclasses.dataclass(frozen=True)
class TrainedFormat(Format):
    """What a run trained, without the rest of its model: written from a workdir, and not read alone."""

    reads: bool = False
    writes: bool = False

    def export(self, workdir: pathlib.Path, path: pathlib.Path, *, overwrite: bool) -> list[str]:
        """Writes it to a new folder, and returns lines that say what is there.

        Raises:
          UserError: no run there, something trained that this format has no place for, a destination that exists.
        """
        raise NotImplementedError


def check_same(
    folder: pathlib.Path, found: "Mapping[str, TensorInfo]", expected: "Mapping[str, TensorInfo]"
) -> None:
    """Raises UserError unless both are tensors of the same names, shapes and dtypes."""
    specs = [{name: (info.shape, info.dtype) for name, info in side.items()} for side in (found, expected)]
    if specs[0] != specs[1]:
        raise UserError(
            f"{folder}: read-back mismatch, names, shapes or dtypes differ from those written; check the disk and try "
            "again"
        )
