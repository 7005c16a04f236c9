"""Definitions shared by `windowed_linear_attention.py` and its kernels: the division of T, and the masked score."""

import dataclasses

NEVER = -1e30  # the score of a masked key; finite, so that the difference of two is not NaN


@dataclasses.dataclass(frozen=True)
class Plan:
    """How T is divided: into `split` pieces, then into chunks of `chunk` tokens; and the tiles that a chunk sees."""

    platform: str
    interpret: bool
    heads: int
    scale: float
    eps: float
    chunk: int
    tiles: int
    first_far: int
    split: int
