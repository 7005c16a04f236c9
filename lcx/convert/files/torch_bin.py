"""PyTorch checkpoint files (`.bin`, `.pt`, `.pth`), read without executing anything in them.

torch's restricted unpickler (`weights_only=True`) refuses code. This module additionally refuses tensors that claim
more elements than the file holds (an expanded tensor of stride 0 turns a kilobyte into terabytes), layouts other than
strided, and compressed zip members, whose compressed bytes would otherwise be read as weights.

Tensors are loaded on the meta device, which gives their shapes, strides and offsets in the file but no data; the data
is then read piece by piece. Files of torch < 1.6 do not have these offsets and are read whole.
"""

import contextlib
import io
import os
import pathlib
import pickle
import re
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import ml_dtypes
import numpy as np

from lcx.convert.files import tensor_io
from lcx.convert.files.tensor_io import TensorInfo
from lcx.errors import UserError

MODULE = ("module",)
_LOCAL_HEADER = struct.Struct("<4s22xHH")  # signature, ..., length of the name, length of the extra field


#: Objects that a training state may hold in addition to tensors. They are never built: a `_StandIn` replaces each.
_STAND_INS = re.compile(
    r"(deepspeed|savanna|megatron|transformer_engine|numpy)\..*"
    r"|argparse\.Namespace|_io\.BytesIO|builtins\.bytes|_codecs\.encode|torch\.torch_version\.TorchVersion"
)


class _StandIn:
    """Placeholder for an object of another program: accepts any constructor arguments and state, and discards them."""

    def __new__(cls, *args, **kwargs):
        return super().__new__(cls)

    def __init__(self, *args, **kwargs):
        pass

    def __setstate__(self, state):
        pass


class _HeldBytes(_StandIn):
    """In the place of an io.BytesIO: keeps its contents."""

    data = b""

    def __setstate__(self, state):
        if isinstance(state, tuple) and state and isinstance(state[0], bytes):
            self.data = state[0]


class TorchFile:
    """One file with a dict of tensors (or {"state_dict": dict of tensors}, or {"model_state_dict": ...}).

    Args:
      path: the file, the pieces that it was split into, or a region of a file, which may hold one bare tensor: it is
        named "".
      training_state: whether the dict may be the "module" entry of a trainer's state. The settings, counters and random
        states next to it are ignored. `_extra_state` entries (Transformer Engine's scales) are kept apart.
      within: the keys that lead to the tensors in a trainer's state. A list found there becomes a dict with the keys
        "0", "1", ...
      nested: whether what is found there is a dict of dicts of tensors; the names are then "KEY.KEY".

    Attributes:
      counters: the numbers stored next to the tensors and in the state's "args" ("mp_world_size", "iteration").
      extra_states: names of the `_extra_state` entries, in order; `extra_state` reads them.
      param_shapes: DeepSpeed's record of the parameters: one dict, name -> shape, per optimizer group.

    Raises:
      UserError: at construction, if the file holds anything but tensors whose data lies within the file.
    """

    def __init__(
        self,
        path: str | os.PathLike | tensor_io.Pieces | tensor_io.Region,
        *,
        training_state: bool = False,
        within: tuple[str, ...] = MODULE,
        nested: bool = False,
    ):
        self.path = path if isinstance(path, tensor_io.Pieces | tensor_io.Region) else pathlib.Path(path)
        try:
            self._known = tensor_io.identity(self.path)
            records = _stored_records(self.path)
        except UserError:
            raise
        except (
            OSError,
            EOFError,
            RuntimeError,
            ValueError,
            struct.error,
            zipfile.BadZipFile,
            zlib.error,
        ) as error:
            raise UserError(
                f"{self.path}: not a readable PyTorch file: {error}; copy or download it again"
            ) from error
        on_meta, wanted = records is not None, within if training_state else None
        flat = _flat if nested else None
        state, self.counters, self.param_shapes = _load(self.path, on_meta=on_meta, within=wanted, flat=flat)
        if records is not None and not all(map(_has_place, _weights(state, wanted).values())):  # an older torch
            records, (state, *_) = None, _load(self.path, on_meta=False, within=wanted, flat=flat)
        weights = _weights(state, wanted)
        self._extra = {name: value for name, value in state.items() if name not in weights}
        self.extra_states = list(self._extra)
        self._records, state = records, weights
        self._state = {
            name: _check_tensor(self.path, name, tensor, records) for name, tensor in state.items()
        }
        self.tensors = {
            name: TensorInfo(numpy_dtype(self.path, name, tensor.dtype), tuple(tensor.shape), self.path.name)
            for name, tensor in self._state.items()
        }
        self._in_memory = records is None
        places = {self._place(name): info.nbytes for name, info in self.tensors.items()}
        self.shared_bytes = sum(info.nbytes for info in self.tensors.values()) - sum(places.values())

    def _place(self, name: str) -> tuple[Any, ...]:
        tensor = self._state[name]
        storage = tensor.untyped_storage()
        start = storage.data_ptr() if self._in_memory else storage._checkpoint_offset
        return start, tensor.storage_offset(), tensor.shape, tensor.stride()

    def read(self, name: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        tensor, info = self._state[name], self.tensors[name]
        _, first, shape = tensor_io.row_range(info, name, start, stop)
        rows = tensor[first : first + shape[0]] if info.shape else tensor
        if self._in_memory:
            return _to_numpy(rows, info.dtype)
        offset = rows.untyped_storage()._checkpoint_offset + rows.storage_offset() * info.dtype.itemsize
        # A non-contiguous tensor: read the span of bytes that it covers once, then apply its strides.
        if rows.is_contiguous():
            return tensor_io.read_array(self.path, offset, info.dtype, shape, known=self._known)
        span = 1 + sum((size - 1) * stride for size, stride in zip(shape, rows.stride(), strict=True))
        flat = tensor_io.read_array(
            self.path, offset, info.dtype, (span if rows.numel() else 0,), known=self._known
        )
        strides = [stride * info.dtype.itemsize for stride in rows.stride()]
        return np.ascontiguousarray(np.lib.stride_tricks.as_strided(flat, shape, strides, writeable=False))


    def extra_state(self, name: str) -> bytes | None:
        """The bytes of an `_extra_state` entry, whatever it is stored as; None if it is empty."""
        import torch

        value = self._extra[name]
        if not isinstance(value, torch.Tensor):
            return _bytes_of(value)
        if value.dtype != torch.uint8 or not value.numel():
            return None
        tensor = _check_tensor(self.path, name, value, self._records).contiguous()
        if self._in_memory:
            return _to_numpy(tensor, np.dtype(np.uint8)).tobytes()
        offset = tensor.untyped_storage()._checkpoint_offset + tensor.storage_offset()
        shape = (tensor.numel(),)
        return tensor_io.read_array(self.path, offset, np.dtype(np.uint8), shape, known=self._known).tobytes()


def _bytes_of(value: Any) -> bytes | None:
    data = value.data if isinstance(value, _HeldBytes) else value
    return bytes(data) or None if isinstance(data, bytes | bytearray) else None


def held_bytes(region: tensor_io.Region) -> bytes | None:
    """The bytes in a region that holds one saved io.BytesIO, bytes or uint8 tensor; None if there are none.

    Raises:
      UserError: it cannot be read without executing something.
    """
    import torch

    value = _unpickled(region, on_meta=False, wanted=True)
    if isinstance(value, torch.Tensor):
        return value.numpy().tobytes() or None if value.dtype == torch.uint8 else None
    return _bytes_of(value)


def _weights(state: dict, within: tuple[str, ...] | None) -> dict:
    """The entries that are weights: all, or for a training state those that are no extra states."""
    return {name: value for name, value in state.items() if within is None or not name.endswith("_extra_state")}


def _opened(path: tensor_io.File) -> io.BufferedReader:
    return io.BufferedReader(tensor_io.open_binary(path))


def _stored_records(path: tensor_io.File) -> dict[int, int] | None:
    """{offset of a member's data: its size} for a zip with only uncompressed members; None if it is not a zip."""
    with _opened(path) as file:
        if not zipfile.is_zipfile(file):
            return None
        size = file.seek(0, os.SEEK_END)
        return _records(path, file, size)


def _records(path: tensor_io.File, file: io.BufferedReader, size: int) -> dict[int, int]:
    records = {}
    with zipfile.ZipFile(file) as archive:
        for member in archive.infolist():
            if member.compress_type != zipfile.ZIP_STORED or member.compress_size != member.file_size:
                raise UserError(
                    f"{path}: the member {member.filename!r} is compressed, expected stored members as "
                    "torch.save writes them; save the file again with torch.save"
                )
            if member.filename.endswith("/byteorder") and archive.read(member).strip() != b"little":
                raise UserError(f"{path}: the tensors are big-endian, expected little-endian")
            file.seek(member.header_offset)
            _, name_length, extra_length = _LOCAL_HEADER.unpack(file.read(_LOCAL_HEADER.size))
            start = member.header_offset + _LOCAL_HEADER.size + name_length + extra_length
            if start + member.file_size > size:
                raise UserError(
                    f"{path}: the member {member.filename!r} ends beyond the file; copy or download it again"
                )
            records[start] = member.file_size
    return records


def _load(
    path: tensor_io.File,
    *,
    on_meta: bool,
    within: tuple[str, ...] | None,
    flat: Callable[[Any], Any] | None = None,
) -> tuple[dict, dict[str, int | float], list[dict[str, tuple[int, ...]]]]:
    state = _unpickled(path, on_meta=on_meta, wanted=within is not None and on_meta)
    counters: dict[str, int | float] = {}
    shapes: list[dict[str, tuple[int, ...]]] = []
    if isinstance(state, dict) and within is not None:
        shapes = _shapes(state.get("param_shapes"))
        state, counters = _descended(path, state, within)
        state = state if flat is None else flat(state)
    if isinstance(path, tensor_io.Region) and _is_tensor(state):
        state = {"": state}
    for wrapper in ("state_dict", "model_state_dict"):
        if isinstance(state, dict) and isinstance(state.get(wrapper), dict):
            state = state[wrapper]
    if not isinstance(state, dict) or not all(isinstance(name, str) for name in state):
        raise UserError(f"{path}: holds a {type(state).__name__}, expected a dict of named tensors")
    return state, counters, shapes


def _is_tensor(value: Any) -> bool:
    import torch

    return isinstance(value, torch.Tensor)


def _flat(state: Any) -> Any:
    """A dict of dicts as one dict, with the keys joined by points; anything else as it is, to be refused later."""
    if not isinstance(state, dict) or not all(isinstance(inner, dict) for inner in state.values()):
        return state
    return {f"{key}.{name}": value for key, inner in state.items() for name, value in inner.items()}


def plain_values(path: pathlib.Path) -> dict[Any, Any]:
    """The dict in a file of settings; tensors in it have no data. Nothing in the file is executed.

    Raises:
      UserError: the file is damaged, or holds anything but plain values, containers and tensors.
    """
    try:
        on_meta = _stored_records(path) is not None
    except UserError:
        raise
    except (
        OSError,
        EOFError,
        RuntimeError,
        ValueError,
        struct.error,
        zipfile.BadZipFile,
        zlib.error,
    ) as error:
        raise UserError(f"{path}: not a readable PyTorch file: {error}; copy or download it again") from error
    state = _unpickled(path, on_meta=on_meta, wanted=False)
    if not isinstance(state, dict):
        raise UserError(f"{path}: holds a {type(state).__name__}, expected a dict of settings")
    return state


def _unpickled(path: tensor_io.File, *, on_meta: bool, wanted: bool) -> Any:
    try:
        import torch
    except ImportError as error:
        raise UserError(f"{path}: reading PyTorch files needs torch: pip install 'lcx[torch]'") from error
    try:
        with _opened(path) as file, stand_ins(file, wanted=wanted):
            return torch.load(file, map_location="meta" if on_meta else "cpu", weights_only=True)
    except MemoryError:
        raise
    except Exception as error:  # the unpickler raises a dozen kinds of error on damaged or hostile input
        reason = " ".join(str(error).split())
        if isinstance(error, pickle.UnpicklingError) and "GLOBAL" in reason:
            raise UserError(
                f"{path}: holds more than tensors, and nothing in it was executed ({_reason(reason)}); "
                "expected a dict of tensors, save the state_dict again"
            ) from error
        raise UserError(
            f"{path}: not a readable PyTorch file ({_reason(reason)}); copy or download it again"
        ) from error


def _descended(
    path: tensor_io.File, state: dict, within: tuple[str, ...]
) -> tuple[Any, dict[str, int | float]]:
    """(the value that these keys lead to, numbers found on the way); the state itself if it has no "module"."""
    found: Any = state
    beside = dict(state["args"]) if isinstance(state.get("args"), dict) else {}
    for key in within:
        if not isinstance(found, dict) or not isinstance(found.get(key), dict | list):
            if within == MODULE:
                return state, {}
            raise UserError(f"{path}: has no {'.'.join(within)}, which files of optimizer states have")
        beside |= found
        found = found[key]
    if isinstance(found, list):
        found = {str(i): value for i, value in enumerate(found)}
    for name, value in beside.items():  # DeepSpeed repeats some counters once per optimizer group
        if isinstance(value, list) and all(isinstance(x, int) for x in value) and len(set(value)) == 1:
            beside[name] = value[0]
    return found, {name: value for name, value in beside.items() if isinstance(value, int | float)}


def _shapes(groups: Any) -> list[dict[str, tuple[int, ...]]]:
    """DeepSpeed's param_shapes as one dict per group; versions before 0.4 stored a single dict."""
    groups = [groups] if isinstance(groups, dict) else groups
    if not isinstance(groups, list) or not all(isinstance(group, dict) for group in groups):
        return []
    return [{str(name): tuple(shape) for name, shape in group.items()} for group in groups]


@contextlib.contextmanager
def stand_ins(file: io.BufferedReader, *, wanted: bool) -> Iterator[None]:
    """Within this context, torch.load accepts the non-tensor objects of a training state, as stand-ins."""
    if not wanted:
        yield
        return
    import torch

    names = torch.serialization.get_unsafe_globals_in_checkpoint(file)
    file.seek(0)
    with torch.serialization.safe_globals([_stand_in(name) for name in names if _STAND_INS.fullmatch(name)]):
        yield


def _stand_in(path: str) -> type:
    """A stand-in class with this qualified name."""
    module, _, name = path.rpartition(".")
    base = _HeldBytes if path == "_io.BytesIO" else _StandIn
    return type(name, (base,), {"__module__": module, "__qualname__": name})


def _reason(text: str) -> str:
    """What the unpickler refused, without torch's advice to load the file with weights_only=False."""
    found = re.search(r"GLOBAL ([\w.]+)", text)
    if found:
        return f"it asks for {found.group(1)}"
    return text.split("WeightsUnpickler error: ")[-1][:120]


def _has_place(tensor: Any) -> bool:
    strided = getattr(tensor, "layout", None) is not None and str(tensor.layout) == "torch.strided"
    return not strided or hasattr(tensor.untyped_storage(), "_checkpoint_offset")


def _check_tensor(path: tensor_io.File, name: str, tensor, records: dict[int, int] | None):
    import torch

    if not isinstance(tensor, torch.Tensor) or tensor.layout != torch.strided or tensor.is_quantized:
        kind = getattr(tensor, "layout", None) or type(tensor).__name__
        raise UserError(f"{path}: {name!r} is {kind}, expected a plain dense tensor")
    tensor = tensor.detach()
    if tensor.is_conj() or tensor.is_neg() or (records is None and tensor.is_meta):
        raise UserError(f"{path}: {name!r} is a lazy view or has no data, expected a plain dense tensor")
    storage = tensor.untyped_storage()
    span = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    last = (tensor.storage_offset() + span) * tensor.element_size() if tensor.numel() else 0
    if max(last, tensor.numel() * tensor.element_size()) > storage.nbytes():
        raise UserError(
            f"{path}: {name!r} claims shape {tuple(tensor.shape)}, more than the {storage.nbytes()} bytes "
            "stored for it; "
            "expected dense tensors, save them with .clone()"
        )
    if records is not None and storage.nbytes():
        available = records.get(storage._checkpoint_offset, 0)
        if storage.nbytes() > available:
            raise UserError(
                f"{path}: {name!r} needs {storage.nbytes()} bytes but the file stores {available}; "
                "copy or download it again"
            )
    return tensor


def numpy_dtype(path: tensor_io.File, name: str, dtype) -> np.dtype:
    import torch

    if dtype == torch.bfloat16:
        return np.dtype(ml_dtypes.bfloat16)
    try:
        return torch.empty((), dtype=dtype).numpy().dtype
    except TypeError as error:
        raise UserError(
            f"{path}: {name!r} has dtype {dtype}, expected float32, bfloat16 or float16"
        ) from error


def _to_numpy(tensor, dtype: np.dtype) -> np.ndarray:
    import torch

    tensor = tensor.contiguous()
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(dtype)
    return tensor.numpy()
