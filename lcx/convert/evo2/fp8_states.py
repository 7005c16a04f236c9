"""Scales of FP8 projections in Transformer Engine's extra states (`..._extra_state` in a checkpoint).

An extra state is a pickled dict with `scale_fwd` (of the input, the weight and the output), `amax_history_fwd` and
others, as raw bytes or as a file of torch.save, by version. It is read with an allow list: tensors are rebuilt by
torch's restricted loader, other objects are replaced by stand-ins, and nothing in it is executed.
"""

import io
import logging
import pickle
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from lcx.convert.evo2.weight_files import Found, WeightFile, beside, wants_fp8
from lcx.errors import UserError

log = logging.getLogger(__name__)
HISTORY = 16
E4M3_MAX = 448.0
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


def scales(data: bytes | None) -> tuple[float, float] | None:
    """(scale of the input, scale of the weight) of an extra state; None if it is empty.

    A scale that is no positive number is returned as 0, which means current scaling.

    Raises:
      UserError: it is not an extra state that can be read safely.
    """
    if not data:
        return None
    try:
        state = _torch_file(data) if data[:2] == b"PK" else _Unpickler(io.BytesIO(data)).load()
        if state is None:
            return None
        found = state.get("scale_fwd") if isinstance(state, dict) else None
        if found is None:
            return None
        values = np.asarray(found.detach().float().cpu().numpy(), np.float32).reshape(-1)
        pair = values[_INPUT], values[_WEIGHT]
    except MemoryError:
        raise
    except Exception as error:  # an unpickler raises a dozen kinds of error on damaged or hostile input
        reason = " ".join(str(error).split())[:120] or type(error).__name__
        raise UserError(f"is not a state of Transformer Engine that can be read safely ({reason})") from error
    input_scale, weight_scale = (float(x) if np.isfinite(x) and x > 0 else 0.0 for x in pair)
    return input_scale, weight_scale


def _torch_file(data: bytes) -> Any:
    import torch

    from lcx.convert.files.torch_bin import stand_ins

    file: Any = io.BufferedReader(io.BytesIO(data))
    with stand_ins(file, wanted=True):
        return torch.load(file, map_location="cpu", weights_only=True)


def state_of(input_scale: float, weight_scale: float) -> bytes:
    """The extra state with these scales, in the form of Transformer Engine 1.x, which later versions read too.

    A scale of 0 is written as 1, Transformer Engine's initial value.
    """
    import torch

    forward = torch.tensor([input_scale or 1.0, weight_scale or 1.0, 1.0], dtype=torch.float32)
    history = torch.zeros(HISTORY, 3)
    for i, scale in enumerate((input_scale, weight_scale)):
        history[0, i] = E4M3_MAX / scale if scale else 0.0
    backward = torch.ones(2)
    state = {
        "scale_fwd": forward,
        "scale_inv_fwd": 1 / forward,
        "amax_history_fwd": history,
        "scale_bwd": backward,
        "scale_inv_bwd": 1 / backward,
        "amax_history_bwd": torch.zeros(HISTORY, 2),
        "extra_fp8_variables": {"num_gemms": 1},
    }
    return pickle.dumps(state)


def of_layers(
    files: Sequence[WeightFile], states: Mapping[int, str], wanted: bool | None, where: str
) -> dict[int, np.ndarray]:
    """{layer: (scale of the input, scale of the weight)} of a checkpoint; {} if its projections are not in FP8.

    They are in FP8 if the configuration says so, or if it does not say and a state holds scales.

    Args:
      files: the model-parallel ranks; of several scales the smallest is taken, which clips nothing.
      states: the name of the extra state of each layer with such a projection.
      wanted: what the configuration says; None: nothing.
    """
    found, unreadable = dict[int, tuple[float, float]](), list[str]()
    for layer, name in states.items():
        try:
            states_of_ranks = [file.extra_state(name) for file in files if name in file.extra_states]
            pairs = [pair for state in states_of_ranks if (pair := scales(state))]
        except UserError as error:
            unreadable.append(f"{name} {error}")
            continue
        if pairs:
            input_scale, weight_scale = (min(filter(None, one), default=0.0) for one in zip(*pairs, strict=True))
            found[layer] = input_scale, weight_scale
    if unreadable:
        log.warning(
            "%s: %d FP8 states are not read, and their scales not used: %s", where, len(unreadable), unreadable[0]
        )
    if not (bool(found) if wanted is None else wanted):
        if found:
            log.info("%s: the configuration switches FP8 off; the scales of %d layers are not used", where, len(found))
        return {}
    stored = sum(bool(pair[0] and pair[1]) for pair in found.values())
    log.info(
        "%s: the input projections of %d layers are in FP8, %d with stored scales (input_projections='plain' leaves "
        "FP8 out)",
        where,
        len(states),
        stored,
    )
    return {layer: np.array(found.get(layer, (0.0, 0.0)), np.float32) for layer in states}


def configured(found: Found, counters: Mapping[str, Any]) -> bool | None:
    """Whether the settings stored in the file, or in a file beside it, set FP8 input projections; None: nothing."""
    inside = wants_fp8(counters)
    return wants_fp8(beside(found)) if inside is None else inside
