"""Layouts of heads that are rotated in pairs of neighbours, and of experts whose matrices are transposed.

In GPT-J, Cohere, GLM and Llama 4, the pairs of a head are its dimensions (2j, 2j + 1). lcx rotates the pairs
(j, j + d/2) of the first d dimensions of a head. Reordering the rows of the projections to queries and keys makes both
the same function, since scores do not depend on the order of a head's dimensions.
"""

import dataclasses

import numpy as np

from lcx.convert.core.rules import Flat, Index, Shape, Transposed


def _from_pairs(dims: int, head_dim: int) -> np.ndarray:
    """For each dimension of a head in lcx, its index in the foreign tensor: [head_dim]."""
    halves = np.arange(dims).reshape(dims // 2, 2).T.reshape(-1)
    return np.concatenate([halves, np.arange(dims, head_dim)])


@dataclasses.dataclass(frozen=True)
class PairedRows(Transposed):
    """A projection to heads: [D, heads, head_dim] in lcx; [heads * head_dim, D] with neighbours in pairs elsewhere."""

    dims: int = 0  # rotated dimensions of a head

    def __init__(self, dims: int):
        object.__setattr__(self, "in_axes", 1)
        object.__setattr__(self, "dims", dims)

    def to_foreign(self, array: np.ndarray) -> np.ndarray:
        return super().to_foreign(array[..., np.argsort(_from_pairs(self.dims, array.shape[-1]))])

    def to_lcx(self, rows: np.ndarray, shape: Shape) -> np.ndarray:
        return super().to_lcx(rows, shape)[..., _from_pairs(self.dims, shape[-1])]


@dataclasses.dataclass(frozen=True)
class PairedBias(Flat):
    """The bias of such a projection: [heads, head_dim] in lcx, [heads * head_dim] elsewhere."""

    dims: int

    def to_foreign(self, array: np.ndarray) -> np.ndarray:
        return super().to_foreign(array[..., np.argsort(_from_pairs(self.dims, array.shape[-1]))])

    def to_lcx(self, rows: np.ndarray, shape: Shape) -> np.ndarray:
        return super().to_lcx(rows, shape)[..., _from_pairs(self.dims, shape[-1])]


@dataclasses.dataclass(frozen=True)
class Experts:
    """The matrices of all experts, each transposed: [E, in, out] in lcx, [E * out, in] elsewhere."""

    def foreign_shape(self, shape: Shape) -> Shape:
        return shape[0] * shape[2], shape[1]

    def to_foreign(self, array: np.ndarray) -> np.ndarray:
        return np.ascontiguousarray(np.swapaxes(array, 1, 2)).reshape(self.foreign_shape(array.shape))

    def to_lcx(self, rows: np.ndarray, shape: Shape) -> np.ndarray:
        experts, into, out = shape
        return np.swapaxes(rows.reshape(experts, out, into), 1, 2)

    def rows(self, shape: Shape, index: Index) -> tuple[int, int, Shape, Index]:
        start, stop, _ = index[0].indices(shape[0])
        inner = shape[2]
        return start * inner, stop * inner, (stop - start, *shape[1:]), (slice(None), *index[1:])
