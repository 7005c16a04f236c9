"""Deterministic random orders that depend only on their arguments.

A run has to find the same order when it resumes years later. numpy's generators do not guarantee that, because their
streams may change between versions. Neither does grain's index shuffle, whose result depends on its version and which
costs 40 to 130 microseconds per index on small data sets. So the order is the argsort of a 64-bit mixing function.
"""

import hashlib

import numpy as np
from jaxtyping import Int


def mix64(values: Int[np.ndarray, "n"]) -> Int[np.ndarray, "n"]:
    """A bijection of 64-bit integers that scatters them: SplitMix64 (Steele, Lea and Flood 2014)."""
    z = np.asarray(values).astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def permutation(length: int, *, seed: int, stream: int = 0) -> Int[np.ndarray, "length"]:
    """A permutation of range(length) that depends only on (length, seed, stream)."""
    key = mix64(mix64(np.array([seed % 2**64], np.uint64)) + np.uint64(stream % 2**64))
    # mix64 is a bijection, so no two sort keys are equal.
    return np.argsort(mix64(np.arange(length, dtype=np.uint64) ^ key), kind="stable")


def derive(*parts: object) -> int:
    """A 64-bit seed derived from `parts`, so that different uses of a run's seed do not share an order."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest(), "little")


class EpochShuffle:
    """Maps position k of an endless sequence to a row: each row once per epoch, with a new order every epoch."""

    def __init__(self, base: int, num_rows: int, seed: int):
        self.base, self.num_rows, self.seed = base, num_rows, seed
        self._epochs: dict[int, np.ndarray] = {}

    def __call__(self, index: int, row: int) -> int:
        del row
        epoch, position = divmod(index, self.num_rows)
        order = self._epochs.get(epoch)
        if order is None:
            # A batch can span two epochs: keep the order of the previous epoch too, but no older ones.
            before = {k: v for k, v in self._epochs.items() if k == epoch - 1}
            order = permutation(self.num_rows, seed=self.seed, stream=epoch)
            self._epochs = {**before, epoch: order}
        return self.base + int(order[position])
