"""Reads the float32 weights of DeepSpeed's ZeRO (stages 1 and 2), stored separately from the 16-bit model states.

    global_stepN/mp_rank_RR_model_states.pt                                  module, param_shapes, ...
    global_stepN/[bf16_]zero_pp_rank_D_mp_rank_RR_optim_states.pt            optimizer_state_dict, ...

Each optimizer group is one flat vector: the concatenation of its parameters in the order of `param_shapes`, padded so
that its length divides evenly over the data-parallel ranks. Rank D holds the D-th equal, contiguous share. Buffers and
frozen parameters are only in the model states. (This is the inverse of the layout in DeepSpeed's zero_to_fp32.)
"""

import math
import pathlib
import re
from collections.abc import Sequence

import numpy as np

from lcx.convert.files import tensor_io
from lcx.convert.files.tensor_io import TensorInfo
from lcx.convert.files.torch_bin import TorchFile
from lcx.errors import UserError

SHARE = re.compile(r"(?:[a-z0-9]+_)?zero_pp_rank_(\d+)_mp_rank_(\d+)_optim_states\.pt")
_STATES = re.compile(r"mp_rank_(\d+)_model_states\.pt")
_GROUPS = ("optimizer_state_dict", "single_partition_of_fp32_groups")
_FLOAT32 = np.dtype(np.float32)


class Float32File:
    """A model-parallel rank's file of model states with its parameters in float32 (a `tensor_io.TensorSource`).

    The first and last rows of each parameter are compared with the 16-bit ones, to detect files of another run or step,
    or another order of the parameters.

    Args:
      path: the file of model states; the optimizer states are in the same folder.

    Raises:
      UserError: optimizer states are missing, of another ZeRO stage, or do not match the weights.
    """

    shared_bytes = 0

    def __init__(self, path: pathlib.Path | tensor_io.Pieces):
        self._states = TorchFile(path, training_state=True)
        self.path, self.counters = self._states.path, self._states.counters
        self._shares = [TorchFile(share, training_state=True, within=_GROUPS) for share in shares_of(path)]
        self._size = [self._share_size(str(group)) for group in range(len(self._shares[0].tensors))]
        self._places = self._placed(self._states.param_shapes)
        self.tensors = dict(self._states.tensors)
        for name in self._places:
            self.tensors[name] = TensorInfo(_FLOAT32, self.tensors[name].shape, self.tensors[name].where)
        for name in self._places:
            self._check_values(name)

    def read(self, name: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        if name not in self._places:
            return self._states.read(name, start, stop)
        info = self.tensors[name]
        _, first, shape = tensor_io.row_range(info, name, start, stop)
        group, begin = self._places[name]
        begin += first * math.prod(info.shape[1:])
        end, size = begin + math.prod(shape), self._size[group]
        # The tensor may span several ranks' shares: read its overlap with each.
        parts = [
            share.read(str(group), max(begin - rank * size, 0), min(end - rank * size, size))
            for rank, share in enumerate(self._shares)
            if begin < (rank + 1) * size and rank * size < end
        ]
        flat = parts[0] if len(parts) == 1 else np.concatenate(parts or [np.empty(0, _FLOAT32)])
        return flat.reshape(shape)

    def _share_size(self, group: str) -> int:
        """Number of elements of a group that each rank holds."""
        infos = [share.tensors.get(group) for share in self._shares]
        first = infos[0]
        for share, info in zip(self._shares, infos, strict=True):
            ranks = share.counters.get("partition_count", len(self._shares))
            if share.counters.get("zero_stage", 1) > 2:
                raise UserError(
                    f"{share.path}: is of ZeRO stage {share.counters['zero_stage']}, expected 1 or 2; convert it with "
                    "DeepSpeed's zero_to_fp32.py"
                )
            if ranks != len(self._shares):
                raise UserError(
                    f"{share.path}: is one of {ranks} shares, found {len(self._shares)}; copy all of them"
                )
            if info is None or first is None or (info.shape, info.dtype) != (first.shape, _FLOAT32):
                what = "nothing" if info is None else f"{info.shape} {info.dtype}"
                expected = "one float32 vector of equal length on every rank"
                raise UserError(f"{share.path}: group {group} is {what}, expected {expected}; copy it again")
        assert first is not None
        return math.prod(first.shape)

    def _placed(self, groups: Sequence[dict[str, tuple[int, ...]]]) -> dict[str, tuple[int, int]]:
        """Name -> (group, offset in the group's vector)."""
        if len(groups) != len(self._size):
            raise UserError(
                f"{self.path}: param_shapes has {len(groups)} groups, and the optimizer states {len(self._size)}; the "
                "files are not of one run"
            )
        places = {}
        for group, shapes in enumerate(groups):
            end, unit = 0, 2 * len(self._shares)
            for name, shape in shapes.items():
                info = self._states.tensors.get(name)
                if info is None or info.shape != shape:
                    found = "missing" if info is None else str(info.shape)
                    raise UserError(f"{self.path}: {name} is {found}, and {shape} in param_shapes")
                places[name] = group, end
                end += math.prod(shape)
            there = self._size[group] * len(self._shares)
            # Equal after rounding up to the padding unit, as DeepSpeed's own check.
            if there < end or -(-there // unit) != -(-end // unit):
                raise UserError(
                    f"{self.path}: the parameters of group {group} are {end} numbers, and the optimizer states hold "
                    f"{there}; the files are not of one run"
                )
        return places

    def _check_values(self, name: str) -> None:
        """Raises UserError unless the first and last rows equal the module's up to 16-bit rounding."""
        info = self._states.tensors[name]
        rows = info.shape[0] if info.shape else 1
        for start in {0, max(rows - 1, 0)} if rows else ():
            stop = start + 1
            stored = self._states.read(name, start, stop).astype(np.float64)
            there = self.read(name, start, stop).astype(np.float64)
            unit = 2.0 ** -{2: 8 if "bfloat16" in str(info.dtype) else 11, 4: 24}.get(info.dtype.itemsize, 53)
            if not np.all(np.abs(stored - there) <= 2 * unit * np.abs(there) + 1e-7):
                by = float(np.abs(stored - there).max())
                raise UserError(
                    f"{self.path}: the float32 weights of {name} are up to {by:.3g} away from those of the module; the "
                    "files are not of one step, read it without its optimizer states (format 'savanna')"
                )


def shares_of(path: pathlib.Path | tensor_io.Pieces) -> list[pathlib.Path]:
    """The optimizer state files that belong to a file of model states, ordered by data-parallel rank.

    Raises:
      UserError: there are none, or one is missing.
    """
    found = None if isinstance(path, tensor_io.Pieces) else _STATES.fullmatch(path.name)
    shares: dict[int, pathlib.Path] = {}
    if found is not None and isinstance(path, pathlib.Path):
        for entry in path.parent.iterdir():
            match = SHARE.fullmatch(entry.name)
            if match is not None and int(match.group(2)) == int(found.group(1)):
                shares[int(match.group(1))] = entry
    if not shares:
        raise UserError(
            f"{path}: no [bf16_]zero_pp_rank_D_mp_rank_RR_optim_states.pt is next to it, which holds the float32 "
            "weights; copy them, or read the 16-bit ones (format 'savanna')"
        )
    missing = sorted(set(range(max(shares) + 1)) - set(shares))
    if missing:
        raise UserError(
            f"{path}: of its optimizer states those of the data-parallel ranks {', '.join(map(str, missing))} are "
            "missing; copy them too"
        )
    return [shares[rank] for rank in sorted(shares)]
