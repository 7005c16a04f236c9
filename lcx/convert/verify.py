"""Compares a converted checkpoint with its source: the parameters, and the logits if they are not bit-identical."""

import dataclasses
import math
import os

import jax
import jax.numpy as jnp
import numpy as np

from lcx.convert.core import model_source
from lcx.convert.core.format import Format
from lcx.convert.core.model_source import ModelSource
from lcx.convert.files import tensor_io
from lcx.errors import UserError
from lcx.model import Decoder

#: Larger models are not run to compare logits.
MAX_RUN_BYTES = 64 << 20
_TOKENS = 64
_FLOAT32 = np.dtype(np.float32)


@dataclasses.dataclass(frozen=True)
class Report:
    """Both sides of a conversion, parameter by parameter.

    Attributes:
      tensors, numbers: how many parameters and how many elements were compared; shapes agree on both sides.
      sums: sum of all elements (float64) of the source and of the written checkpoint.
      changed: parameter -> largest absolute difference, where the written elements differ from those of the source
        (rounded to the written dtype).
      logits: (largest difference, largest logit) on 64 random tokens; None if the models were not run.
      same: whether both are the same function by construction: equal model descriptions and equal elements.
      not_finite: (tensor, number of NaNs, number of infinities) for each tensor of the source with non-finite elements.
    """

    tensors: int
    numbers: int
    sums: tuple[float, float]
    changed: dict[str, float]
    logits: tuple[float, float] | None
    same: bool
    not_finite: tuple[tuple[str, int, int], ...] = ()

    def __str__(self) -> str:
        lines = [
            f"warning: {name} of the source holds {nan:,} NaN and {infinite:,} infinite numbers: a damaged model"
            for name, nan, infinite in self.not_finite[:4]
        ]
        if len(self.not_finite) > 4:
            total = sum(nan + infinite for _, nan, infinite in self.not_finite)
            lines.append(
                f"warning: {len(self.not_finite)} tensors of the source hold {total:,} numbers that are not finite"
            )
        lines += [
            f"verified: {self.tensors} parameters of the same shapes, {self.numbers:,} numbers, sum {self.sums[0]:.9g} "
            f"in the source and {self.sums[1]:.9g} as written"
        ]
        if self.changed:
            listing = ", ".join(f"{path} by {by:.3g}" for path, by in list(self.changed.items())[:4])
            lines.append(f"verified: {len(self.changed)} parameters are stored otherwise: {listing}")
        if self.logits is not None:
            lines.append(f"verified: logits differ by {self.logits[0]:.3g} at most, of {self.logits[1]:.3g}")
        else:
            lines.append(
                "verified: the same model and the same numbers, so the same logits"
                if self.same
                else "not verified: logits, since the model is too large to be run here"
            )
        return "\n".join(lines)


def verify(source: ModelSource, target: Format, path: str | os.PathLike) -> Report:
    """Compares a model with its written copy, reading one layer of one parameter at a time.

    Args:
      target: the format in which the copy was written to `path`.

    Raises:
      UserError: the parameters differ in shape, or the logits differ although all parameters are float32.
    """
    written = target.open(path)
    found = {path: info.shape for path, info in written.leaves.items()}
    expected = {path: info.shape for path, info in source.leaves.items()}
    if found != expected:
        wrong = sorted(path for path in found | expected if found.get(path) != expected.get(path))
        raise UserError(
            f"{written.where}: {', '.join(wrong[:4])} differ in shape from the source; convert again"
        )
    sums, changed, not_finite = np.zeros(2), {}, []
    for path in expected:
        both, by = _compare(source, written, path)
        sums += both
        if not np.isfinite(both[0]):
            not_finite += _not_finite(source, path)
        if by is not None:
            changed[path] = by
    model = target.completed(written.model, source.model)
    exact = all(info.dtype == source.leaves[path].dtype for path, info in written.leaves.items())
    same = exact and not changed and _plain(model) == _plain(source.model)
    small = all(
        sum(info.nbytes for info in side.leaves.values()) <= MAX_RUN_BYTES for side in (source, written)
    )
    logits = None
    if not same and small:
        ours, theirs = _logits(source, source.model), _logits(written, model)
        logits = float(np.abs(ours - theirs).max()), float(np.abs(ours).max())
        float32 = exact and all(info.dtype == _FLOAT32 for info in written.leaves.values())
        if float32 and np.isfinite(ours).all() and not logits[0] <= 1e-3 * max(1.0, logits[1]):
            raise UserError(
                f"{written.where}: its logits differ from the source's by up to {logits[0]:.3g}; do not use it"
            )
    numbers = sum(math.prod(shape) for shape in expected.values())
    return Report(
        len(expected), numbers, (float(sums[0]), float(sums[1])), changed, logits, same, tuple(not_finite)
    )


def _compare(source: ModelSource, written: ModelSource, path: str) -> tuple[np.ndarray, float | None]:
    """For one parameter: (the sums of both sides, the largest difference or None if they are equal)."""
    info, sums, largest = source.leaves[path], np.zeros(2), None
    limit = 1 if path.startswith("stages_") else tensor_io.PIECE_BYTES
    for start, stop in tensor_io.split_rows(info.shape, info.dtype.itemsize, limit):
        index = (slice(start, stop), *(slice(0, size) for size in info.shape[1:])) if info.shape else ()
        ours, theirs = source.read(path, index).reshape(-1), written.read(path, index).reshape(-1)
        for low, high in tensor_io.split_rows(ours.shape, 8, tensor_io.PIECE_BYTES):
            a, b = ours[low:high], theirs[low:high]
            sums += a.sum(dtype=np.float64), b.sum(dtype=np.float64)
            # Compare bytes, not values: NaN != NaN, and -0.0 == 0.0.
            rounded = model_source.cast(a, b.dtype, path)
            if rounded.tobytes() != b.tobytes():
                by = float(np.abs(rounded.astype(np.float64) - b.astype(np.float64)).max())
                largest = by if largest is None else max(largest, by)
    return sums, largest


def _not_finite(source: ModelSource, path: str) -> list[tuple[str, int, int]]:
    """(tensor name in the source, number of NaNs, number of infinities) per row of a parameter that holds any."""
    info, found = source.leaves[path], dict[str, list[int]]()
    stacked = path.startswith("stages_")
    limit = 1 if stacked else tensor_io.PIECE_BYTES
    for start, stop in tensor_io.split_rows(info.shape, info.dtype.itemsize, limit):
        index = (slice(start, stop), *(slice(0, size) for size in info.shape[1:])) if info.shape else ()
        values = source.read(path, index)
        called = getattr(source, "stored_name", None)
        name = called(path, start) if called else f"{path}[{start}]" if stacked else path
        counts = found.setdefault(name, [0, 0])
        counts[0] += int(np.isnan(values).sum())
        counts[1] += int(np.isinf(values).sum())
    return [(name, nan, infinite) for name, (nan, infinite) in found.items() if nan or infinite]


def _plain(model: Decoder) -> Decoder:
    return model.clone(dtype="float32", initialization="normal", parent=None)


def _logits(source: ModelSource, model: Decoder) -> np.ndarray:
    length = min(_TOKENS, model.max_position_embeddings)
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, model.vocab_size, (1, length)), jnp.int32)
    params = model_source.to_devices(source, dtype=_FLOAT32, mesh=None)
    model = _plain(model)
    return np.asarray(jax.jit(model.apply)({"params": params}, tokens), np.float32)
