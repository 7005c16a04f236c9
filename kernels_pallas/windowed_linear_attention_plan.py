"""What `windowed_linear_attention.py` and its kernels share: how T is cut, and the score of a key that is not seen."""

import dataclasses

NEVER = -1e30  # the score of a key that is not seen; finite, so that differences of two stay numbers


@dataclasses.dataclass(frozen=True)
class Plan:
    """How T is cut: into `split` pieces, these into chunks (tokens), and what a chunk looks at."""

    platform: str
    interpret: bool
    heads: int
    scale: float
    eps: float
    chunk: int
    tiles: int
    first_far: int
    split: int
