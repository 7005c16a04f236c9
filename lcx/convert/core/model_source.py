"""Stored models that are read parameter by parameter, and loading them onto devices."""

import dataclasses
import functools
import logging
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from lcx import model as model_lib
from lcx import parameters
from lcx.convert.core import rules
from lcx.convert.files import tensor_io
from lcx.convert.files.tensor_io import FLOAT_DTYPES, TensorInfo
from lcx.errors import UserError, naming_flags
from lcx.model import Decoder, Layers

log = logging.getLogger(__name__)


class ModelSource(Protocol):
    """A stored model.

    Attributes:
      model: the Decoder to build.
      leaves: "stages_0/block_0/mixer/q_proj/kernel" -> shape (with the repeat axis) and stored dtype.
      carried: settings of its config.json that the Decoder does not hold (token ids).
      side_files: tokenizer and generation files that belong to it.
      tokenizer: `Tokenizer.to_json` of its tokenizer, without a path; None if it has none.
      where: its name in error messages.
    """

    model: Decoder

    @property
    def leaves(self) -> Mapping[str, TensorInfo]: ...

    @property
    def carried(self) -> Mapping[str, Any]: ...

    @property
    def side_files(self) -> Sequence[pathlib.Path]: ...

    @property
    def tokenizer(self) -> Mapping[str, Any] | None: ...

    @property
    def where(self) -> str: ...

    def read(self, path: str, index: rules.Index) -> np.ndarray:
        """The parameter at this index (one slice per axis)."""
        ...


def fp8_scaling(source: ModelSource) -> Mapping[str, np.ndarray]:
    """What a source holds of the histories of FP8 scales: {path: array}, as `training.fp8_scaling` names them.

    Only checkpoints of training runs, and what was converted from them, hold any.
    """
    return getattr(source, "fp8_scaling", {})


def leaf_shapes(model: Decoder | Layers) -> dict[str, rules.Shape]:
    """path -> shape of every parameter."""
    return dict(parameters.leaf_shapes(model))


@dataclasses.dataclass
class TreeSource:
    """A model in memory. Raises UserError at construction if the parameters do not match the model."""

    model: Decoder
    params: Mapping[str, Any]
    carried: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    side_files: Sequence[pathlib.Path] = ()
    tokenizer: Mapping[str, Any] | None = None
    where: str = "params"

    def __post_init__(self):
        self.params = parameters.plain(self.params)
        check_leaves(self.leaves, self.model, self.where)

    @functools.cached_property
    def _flat(self) -> dict[str, Any]:
        return flatten_dict(self.params, sep="/")

    @functools.cached_property
    def leaves(self) -> dict[str, TensorInfo]:
        return {
            path: TensorInfo(np.dtype(leaf.dtype), tuple(leaf.shape), self.where)
            for path, leaf in self._flat.items()
        }

    def read(self, path: str, index: rules.Index) -> np.ndarray:
        leaf = self._flat[path]
        if not isinstance(leaf, jax.Array):
            return np.asarray(leaf)[index]
        starts = [s.start for s in index]
        return np.asarray(jax.lax.dynamic_slice(leaf, starts, [s.stop - s.start for s in index]))


def check_leaves(leaves: Mapping[str, TensorInfo], model: Decoder, where: str) -> None:
    """Raises UserError if parameters are missing, unexpected or differ in shape from the model's."""
    parameters.check(model, {path: info.shape for path, info in leaves.items()}, where)


@naming_flags("dtype")
def parse_dtype(dtype: Any) -> np.dtype | None:
    """The numpy dtype for a name ("bfloat16") or a numpy or jax dtype; None (keep the stored dtype) stays None."""
    if dtype is None:
        return None
    try:
        found = FLOAT_DTYPES.get(dtype) if isinstance(dtype, str) else np.dtype(dtype)
    except TypeError:
        found = None
    if found not in FLOAT_DTYPES.values():
        raise UserError(f"dtype is {dtype!r}, expected one of {', '.join(FLOAT_DTYPES)}: change dtype")
    return found


def cast(array: np.ndarray, dtype: np.dtype, name: str) -> np.ndarray:
    """The array in another dtype; `name` names it in the error.

    Raises:
      UserError: a finite element would overflow to infinity in float16.
    """
    if array.dtype == dtype:
        return array
    with np.errstate(over="ignore"):
        result = array.astype(dtype)
    if (
        dtype == FLOAT_DTYPES["float16"]
        and np.isinf(result).any()
        and np.isfinite(array[np.isinf(result)]).any()
    ):
        raise UserError(f"{name} holds numbers beyond the range of float16; choose dtype bfloat16 or float32")
    return result


def stored_dtype(leaves: Mapping[str, TensorInfo]) -> np.dtype:
    """The dtype that holds most of the model's elements."""
    sizes: dict[np.dtype, int] = {}
    for info in leaves.values():
        sizes[info.dtype] = sizes.get(info.dtype, 0) + info.nbytes // info.dtype.itemsize
    return max(sizes, key=lambda dtype: sizes[dtype])


def load(
    source: ModelSource, *, dtype: np.dtype | None, mesh: jax.sharding.Mesh | None
) -> tuple[Decoder, dict[str, Any]]:
    """The model, computing in `dtype` if given, and its parameters on devices."""
    model = source.model if dtype is None else source.model.clone(dtype=str(dtype), parent=None)
    return model, to_devices(source, dtype=dtype, mesh=mesh)


def to_devices(
    source: ModelSource, *, dtype: np.dtype | None, mesh: jax.sharding.Mesh | None
) -> dict[str, Any]:
    """The parameter tree on devices. Arrays are read and placed one by one, so host memory holds one at a time.

    On a mesh, each process reads only the slices that its own devices hold.
    """
    placed: dict[str, Any] = {}
    shardings = {} if mesh is None else flatten_dict(model_lib.param_shardings(source.model, mesh), sep="/")
    for path, info in source.leaves.items():
        wanted = dtype_of(path, info, dtype)
        if mesh is None:
            whole = tuple(slice(0, size) for size in info.shape)
            placed[path] = jax.device_put(_read_box(source, path, whole, [whole], wanted)[0])
            continue
        # Replicated shards share an index, so each distinct slice is read and cast once.
        indices = shardings[path].addressable_devices_indices_map(info.shape)
        exact = {device: _bounds(index, info.shape) for device, index in indices.items()}
        unique = list(dict.fromkeys(_key(index) for index in exact.values()))
        boxes = [tuple(slice(*pair) for pair in key) for key in unique]
        arrays = dict(zip(unique, _read_box(source, path, _union(boxes), boxes, wanted), strict=True))
        shards = [jax.device_put(arrays[_key(index)], device) for device, index in exact.items()]
        placed[path] = jax.make_array_from_single_device_arrays(info.shape, shardings[path], shards)
    return unflatten_dict(placed, sep="/")


#: Parameters that keep their dtype: scales of FP8, and biases that decide between experts.
_EXACT = ("fp8_scales", "choice_bias")


def dtype_of(path: str, info: TensorInfo, dtype: np.dtype | None) -> np.dtype:
    """The dtype of a parameter that is stored as `info`, in a model of this dtype; some keep their own (`_EXACT`)."""
    return info.dtype if dtype is None or path.endswith(_EXACT) else dtype


def cast_params(params: Any, dtype: np.dtype) -> Any:
    """A tree of parameters in this dtype, except for those that keep their own (`dtype_of`)."""
    flat = flatten_dict(params, sep="/")
    return unflatten_dict({p: x if p.endswith(_EXACT) else x.astype(dtype) for p, x in flat.items()}, sep="/")


def _read_box(
    source: ModelSource, path: str, box: rules.Index, parts: list[rules.Index], dtype: np.dtype
) -> list[np.ndarray]:
    """Reads several slices of a parameter that all lie inside `box`; each row of the first axis is read once."""
    outs = [np.empty([s.stop - s.start for s in part], dtype) for part in parts]
    if not box:
        outs[0][()] = cast(source.read(path, ()), dtype, path)
        return outs
    row_bytes = source.leaves[path].nbytes // max(1, source.leaves[path].shape[0])
    step = max(1, tensor_io.PIECE_BYTES // max(1, row_bytes))
    for start in range(box[0].start, box[0].stop, step):
        stop = min(start + step, box[0].stop)
        rows = cast(source.read(path, (slice(start, stop), *box[1:])), dtype, path)
        for part, out in zip(parts, outs, strict=True):
            first, last = max(start, part[0].start), min(stop, part[0].stop)
            if first < last:
                inner = tuple(
                    slice(p.start - b.start, p.stop - b.start) for p, b in zip(part[1:], box[1:], strict=True)
                )
                out[first - part[0].start : last - part[0].start] = rows[
                    (slice(first - start, last - start), *inner)
                ]
    return outs


def _bounds(index: rules.Index, shape: rules.Shape) -> rules.Index:
    return tuple(slice(*s.indices(size)[:2]) for s, size in zip(index, shape, strict=True))


def _key(index: rules.Index) -> tuple[tuple[int, int], ...]:
    return tuple((s.start, s.stop) for s in index)


def _union(boxes: list[rules.Index]) -> rules.Index:
    return tuple(
        slice(min(s.start for s in axis), max(s.stop for s in axis)) for axis in zip(*boxes, strict=True)
    )
