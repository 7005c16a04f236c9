"""Definitions shared by `attention.py` and its kernels: tuning table, options, bias, cotangents."""

import math
from typing import NamedTuple

from jaxtyping import Array, Float

from kernels_pallas.tiles import TPU_SQUARES, Tile, Tiles

NEVER = -1e30  # finite, so that the difference of two is not NaN
LOG2E = math.log2(math.e)

# {(platform, bytes of an element, H): tiles}. Chosen from compiler statistics, not from measurements on a device.
# GPU (ptxas for sm_90a; registers, nothing spilled): H = 128 forward 158, dq 200, dk dv 229; H = 64 154, 163, 187.
# TPU: at C = 512 the three kernels use 1.8, 2.4 and 2.5 MiB of 16 on v5e, and no more than 3.0 on v5p and v6e.
TILES = {
    **TPU_SQUARES,
    ("gpu", 2, 16): Tiles(Tile(128, 64, 8, 2), Tile(128, 64, 8, 2), Tile(128, 64, 8, 2)),
    ("gpu", 2, 32): Tiles(Tile(128, 64, 8, 2), Tile(128, 64, 8, 2), Tile(128, 64, 8, 2)),
    ("gpu", 2, 64): Tiles(Tile(128, 64, 8, 2), Tile(128, 64, 8, 2), Tile(128, 64, 8, 2)),
    ("gpu", 2, 128): Tiles(Tile(128, 64, 8, 2), Tile(128, 64, 8, 2), Tile(128, 32, 8, 2)),
    ("gpu", 4, 16): Tiles(Tile(64, 64, 4, 2), Tile(64, 32, 4, 2), Tile(64, 32, 4, 2)),
    ("gpu", 4, 32): Tiles(Tile(64, 64, 4, 2), Tile(64, 32, 4, 2), Tile(64, 32, 4, 2)),
    ("gpu", 4, 64): Tiles(Tile(64, 32, 4, 2), Tile(128, 32, 8, 2), Tile(128, 16, 8, 2)),
}


class Bias(NamedTuple):
    """The parts of L_i - L_j in base 2, for J chunks.

    column is NEVER for tokens outside the last document of their chunk, row for tokens outside the first.
    """

    column: Float[Array, "B N T"]  # tot - l
    row: Float[Array, "B N T"]  # l
    local: Float[Array, "B N 2 T"]  # l in two parts, regardless of documents, and not in base 2
    step: Float[Array, "B N J"]  # tot


class Options(NamedTuple):
    """The compile-time options of a call."""

    scale: float
    platform: str
    interpret: bool
    tiles: Tiles


class Cotangent(NamedTuple):
    """What the backward kernels need from dy and the forward pass."""

    dy: Float[Array, "B T N H"]
    mean: Float[Array, "B N T"]  # dy.y
    lse: Float[Array, "B N T"]  # log2 of the sum of a row's exponentials
    far: Float[Array, "B N T"]  # lse - l, used off the diagonal
