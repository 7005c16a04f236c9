"""Scales of FP8 projections and their histories, in Transformer Engine's extra states (`..._extra_state`).

An extra state is a pickled dict with `scale_fwd` (of the input, the weight and the output), `amax_history_fwd`, the
same of the gradients (`scale_bwd`, ...) and others, as raw bytes or as a file of torch.save, by version. It is read
with an allow list: tensors are rebuilt by torch's restricted loader, other objects are replaced by stand-ins, and
nothing in it is executed.
"""

import dataclasses
import io
import logging
import pickle
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from lcx.convert.core.model_source import ModelSource, fp8_scaling
from lcx.convert.evo2.weight_files import Found, beside, wants_fp8
from lcx.errors import UserError
from lcx.ops.fp8 import E4M3_MAX, HISTORY

log = logging.getLogger(__name__)
# of a model's parameters, and of what training keeps beside them (training.fp8_scaling)
SCALES, HISTORIES, GRADIENT_SCALE = "fp8_scales", "history", "gradient_scale"
_INPUT, _WEIGHT = 0, 1
_HARMLESS = re.compile(
    r"(transformer_engine|numpy|enum|collections)\..*|builtins\.(getattr|set|frozenset|slice|complex|range)"
)


class _StandIn:
    """In the place of any other object: accepts and discards whatever it is built from."""

    def __new__(cls, *args, **kwargs):
        return super().__new__(cls)

    def __init__(self, *args, **kwargs):
        pass

    def __setstate__(self, state):
        pass

    def append(self, value):
        pass

    def extend(self, values):
        pass

    def __setitem__(self, key, value):
        pass


class _Unpickler(pickle.Unpickler):
    """Rebuilds tensors and plain values only."""

    def find_class(self, module: str, name: str) -> Any:
        import torch

        known = {
            ("collections", "OrderedDict"): dict,
            ("torch._utils", "_rebuild_tensor_v2"): torch._utils._rebuild_tensor_v2,
            ("torch.storage", "_load_from_bytes"): _storage,
            ("torch", "Size"): tuple,
            ("torch", "device"): lambda *args: None,
            ("_codecs", "encode"): lambda text, encoding="latin1": text.encode("latin1"),
        }
        if (module, name) in known:
            return known[module, name]
        if _HARMLESS.fullmatch(f"{module}.{name}"):
            return _StandIn
        raise pickle.UnpicklingError(f"it asks for {module}.{name}")


def _storage(data: bytes) -> Any:
    import torch

    return torch.load(io.BytesIO(data), weights_only=True, map_location="cpu")


class Holder(Protocol):
    """A file, or a set of files, with extra states."""

    @property
    def extra_states(self) -> Collection[str]: ...

    def extra_state(self, name: str) -> bytes | None: ...


@dataclasses.dataclass(frozen=True)
class State:
    """The scaling of one projection.

    Attributes:
      scales: of the input and the weight; 0 where none is stored, which means current scaling.
      gradient_scale: of the gradient; 1 is Transformer Engine's initial value.
      history: [16, 3], the largest magnitudes of input, weight and gradient in the last steps.
    """

    scales: tuple[float, float]
    gradient_scale: float = 1.0
    history: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros((HISTORY, 3), np.float32))


def read(data: bytes | None) -> State | None:
    """The scaling in an extra state; None if it is empty.

    A scale that is no positive number is returned as 0, which means current scaling. A history of another length is cut
    or filled up with zeros at its end, as Transformer Engine does.

    Raises:
      UserError: it is not an extra state that can be read safely.
    """
    if not data:
        return None
    try:
        state = _torch_file(data) if data[:2] == b"PK" else _Unpickler(io.BytesIO(data)).load()
        if not isinstance(state, dict) or state.get("scale_fwd") is None:
            return None
        scales = _numbers(state["scale_fwd"]).reshape(-1)[[_INPUT, _WEIGHT]]
        backward = _numbers(state.get("scale_bwd")).reshape(-1)[:1]
        history = np.zeros((HISTORY, 3), np.float32)
        for name, columns in (("amax_history_fwd", (0, 2)), ("amax_history_bwd", (2, 3))):
            stored = _numbers(state.get(name))
            if stored.ndim == 2:
                rows = stored[:HISTORY, : columns[1] - columns[0]]
                history[: len(rows), slice(*columns)] = rows
    except MemoryError:
        raise
    except Exception as error:  # an unpickler raises a dozen kinds of error on damaged or hostile input
        reason = " ".join(str(error).split())[:120] or type(error).__name__
        raise UserError(f"is not a state of Transformer Engine that can be read safely ({reason})") from error
    pair = tuple(float(x) if np.isfinite(x) and x > 0 else 0.0 for x in scales)
    usable = [float(x) for x in backward if np.isfinite(x) and x > 0]
    return State((pair[0], pair[1]), usable[0] if usable else 1.0, history)


def _numbers(value: Any) -> np.ndarray:
    """A tensor of an extra state; no numbers if it has none there."""
    return np.zeros(0, np.float32) if value is None else value.detach().float().cpu().numpy()


def _torch_file(data: bytes) -> Any:
    import torch

    from lcx.convert.files.torch_bin import stand_ins

    file: Any = io.BufferedReader(io.BytesIO(data))
    with stand_ins(file, wanted=True):
        return torch.load(file, map_location="cpu", weights_only=True)


def written(state: State) -> bytes:
    """The extra state, in the form of Transformer Engine 1.x, which later versions read too.

    A scale of 0 is written as 1, Transformer Engine's initial value. In a history without the magnitude that a scale
    follows from, row 0 gets it, so that the scale outlasts the first steps of a run.
    """
    import torch

    history = np.array(state.history, np.float32)
    for i, scale in enumerate(state.scales):
        if scale and not history[:, i].any():
            history[0, i] = E4M3_MAX / scale
    forward = torch.tensor([state.scales[0] or 1.0, state.scales[1] or 1.0, 1.0], dtype=torch.float32)
    backward = torch.tensor([state.gradient_scale, 1.0], dtype=torch.float32)
    no_result = np.zeros((HISTORY, 1), np.float32)
    state_dict = {
        "scale_fwd": forward,
        "scale_inv_fwd": 1 / forward,
        "amax_history_fwd": torch.tensor(np.concatenate([history[:, :2], no_result], axis=1)),
        "scale_bwd": backward,
        "scale_inv_bwd": 1 / backward,
        "amax_history_bwd": torch.tensor(np.concatenate([history[:, 2:], no_result], axis=1)),
        "extra_fp8_variables": {"num_gemms": 1},
    }
    return pickle.dumps(state_dict)


def of_repeat(source: ModelSource, path: str, repeat: int) -> State:
    """The scaling of one layer's projection: `path` is that of the module, `repeat` its place in the stack."""
    index = (slice(repeat, repeat + 1), slice(0, 2))
    scales = source.read(f"{path}/{SCALES}", index)[0].tolist()
    stored = fp8_scaling(source)
    if f"{path}/{HISTORIES}" not in stored:
        return State((scales[0], scales[1]))
    gradient = float(stored[f"{path}/{GRADIENT_SCALE}"][repeat])
    return State((scales[0], scales[1]), gradient, stored[f"{path}/{HISTORIES}"][repeat])


def of_layers(
    files: Sequence[Holder], states: Mapping[int, str], wanted: bool | None, where: str
) -> dict[int, State]:
    """{layer: scaling} of a checkpoint; {} if its projections are not in FP8.

    They are in FP8 if the configuration says so, or if it does not say and a state holds scales.

    Args:
      files: the model-parallel ranks; of several scales the smallest is taken, which clips nothing, and of several
        histories the largest magnitudes.
      states: the name of the extra state of each layer with such a projection.
      wanted: what the configuration says; None: nothing.
    """
    found, unreadable = dict[int, State](), list[str]()
    for layer, name in states.items():
        try:
            stored = [file.extra_state(name) for file in files if name in file.extra_states]
            ranks = [state for data in stored if (state := read(data))]
        except UserError as error:
            unreadable.append(f"{name} {error}")
            continue
        if ranks:
            found[layer] = _merged(ranks)
    if unreadable:
        log.warning(
            "%s: %d FP8 states are not read, and their scales not used: %s", where, len(unreadable), unreadable[0]
        )
    if not (bool(found) if wanted is None else wanted):
        if found:
            log.info("%s: the configuration switches FP8 off; the scales of %d layers are not used", where, len(found))
        return {}
    with_scales = sum(all(state.scales) for state in found.values())
    log.info(
        "%s: the input projections of %d layers are in FP8, %d with stored scales (input_projections='plain' leaves "
        "FP8 out)",
        where,
        len(states),
        with_scales,
    )
    return {layer: found.get(layer, State((0.0, 0.0))) for layer in states}


def _merged(ranks: Sequence[State]) -> State:
    pairs = [state.scales for state in ranks]
    input_scale, weight_scale = (min(filter(None, one), default=0.0) for one in zip(*pairs, strict=True))
    gradient = min(state.gradient_scale for state in ranks)
    return State((input_scale, weight_scale), gradient, np.max([state.history for state in ranks], axis=0))


def configured(found: Found, counters: Mapping[str, Any]) -> bool | None:
    """Whether the settings stored in the file, or in a file beside it, set FP8 input projections; None: nothing."""
    inside = wants_fp8(counters)
    return wants_fp8(beside(found)) if inside is None else inside
