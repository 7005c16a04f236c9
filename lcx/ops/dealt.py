"""Rows dealt out in blocks, so that causal attention is about the same work for every device of a mesh axis.

Rows come in P consecutive parts of L tokens, one a device. A query sees its own token and those before it, at most a
window of w: work that grows over the first w tokens of a row and is constant after them. So the device of the first
part has the least to do. Each part is cut into n blocks, and for each j the j-th blocks of all parts are exchanged: the
block with the most work goes to the device that has the least so far. As few blocks as hold the most loaded device to
BALANCED times the mean:

    no window             n = 2: the first halves stay, the second go to device P - 1 - r
    w up to T / 10.5      n = 1: nothing moves. The most is 1 / (1 - w / 2T) of the mean
    other windows         n = 2 ... 11

That was counted for 2 to 64 devices, parts from 64 tokens on and windows of every 1/150 of the row; shorter parts get
the best of at most MOST blocks. An exchange is one ppermute for each j that moves: each device sends a block and gets
a block, together at most (n - 1) / n of its part.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

BALANCED = 1.05  # the most work that a device does, by the mean
MOST = 16


@dataclasses.dataclass(frozen=True)
class Deal:
    """Which tokens of a row of P L each device takes.

    Attributes:
      columns: for each block j of a part: the device that takes it from part 0, 1, ...
    """

    devices: int
    tokens: int  # L
    columns: tuple[tuple[int, ...], ...]

    @classmethod
    @functools.cache
    def of(cls, devices: int, tokens: int, window: int | None) -> "Deal":
        best, least = cls(devices, tokens, (tuple(range(devices)),)), np.inf
        for blocks in range(1, min(MOST, tokens) + 1):
            deal = cls(devices, tokens, _columns(_work(devices, tokens, blocks, window)))
            work = deal.work(window)
            if work.max() < least * work.mean():
                best, least = deal, work.max() / work.mean()
            if least <= BALANCED:
                break
        return best

    @property
    def blocks(self) -> int:
        """n, of each device."""
        return len(self.columns)

    @property
    def size(self) -> int:
        """Tokens of a block; the last ones of a part have fewer if n does not divide L."""
        return -(-self.tokens // self.blocks)

    @property
    def in_place(self) -> bool:
        return self.blocks == 1

    def sources(self) -> np.ndarray:
        """The part from which each device takes its j-th block, [P, n]."""
        return np.argsort(np.asarray(self.columns), axis=1).T

    def places(self) -> np.ndarray:
        """The place in the row of the first token of every block, [P, n]."""
        return self.sources() * self.tokens + np.arange(self.blocks) * self.size

    def work(self, window: int | None) -> np.ndarray:
        """How many keys the queries of each device see in a row that is one document, [P]."""
        by_part = _work(self.devices, self.tokens, self.blocks, window)
        return np.take_along_axis(by_part, self.sources(), axis=0).sum(axis=1)

    def dealt(self, x: Array, mesh_axis: str) -> Array:
        """This device's part [B, L, ...] -> its blocks [B, n, size, ...]; zeros fill up the last of a part."""
        more = ((0, 0),) * (x.ndim - 2)
        x = jnp.pad(x, ((0, 0), (0, self.blocks * self.size - self.tokens), *more))
        return self._exchanged(x.reshape(x.shape[0], self.blocks, self.size, *x.shape[2:]), mesh_axis, False)

    def restored(self, x: Array, mesh_axis: str) -> Array:
        """The inverse of `dealt`."""
        x = self._exchanged(x, mesh_axis, True)
        return x.reshape(x.shape[0], -1, *x.shape[3:])[:, : self.tokens]

    def _exchanged(self, x: Array, mesh_axis: str, back: bool) -> Array:
        found = []
        for j, takes in enumerate(self.columns):
            route = [(a, b) for b, a in enumerate(takes)] if back else [*enumerate(takes)]
            moves = any(a != b for a, b in route)
            found.append(jax.lax.ppermute(x[:, j], mesh_axis, route) if moves else x[:, j])
        return jnp.stack(found, axis=1)


def _work(devices: int, tokens: int, blocks: int, window: int | None) -> np.ndarray:
    """The keys that the queries of every block of every part see, [P, n]."""
    size, total = -(-tokens // blocks), devices * tokens
    w = total if window is None else min(window, total)
    ends = np.minimum(np.arange(blocks + 1) * size, tokens) + tokens * np.arange(devices)[:, None]
    ramp = np.minimum(ends, w).astype(np.float64)  # exact: whole numbers below 2^53
    return np.diff(ramp * (ramp + 1) / 2 + (ends - ramp) * w, axis=1)


def _columns(work: np.ndarray) -> tuple[tuple[int, ...], ...]:
    """Who takes the j-th block of each part: the device with the least work so far that with the most."""
    columns, load = [np.arange(len(work))], work[:, 0].copy()
    for of_parts in work.T[1:]:
        takes = np.empty(len(work), int)
        takes[np.argsort(-of_parts, kind="stable")] = np.argsort(load, kind="stable")
        load[takes] += of_parts
        columns.append(takes)
    return tuple(tuple(int(device) for device in column) for column in columns)
