"""Definitions shared by `second_order_attention.py` and its kernels: tuning table, options, fold, cotangents."""

from typing import NamedTuple

from jaxtyping import Array, Float

from kernels_pallas.tiles import TPU_SQUARES, Tile, Tiles

FLOOR = 1e-30  # rows whose weights have a smaller sum give 0

# {(platform, bytes of an element, H): tiles}. Chosen from compiler statistics, not from measurements on a device.
# GPU (ptxas for sm_90a: registers of a thread, nothing spilled). H = 128: forward 164, dq 236, dk dv 252; forward of
# 128 x 128 needs 255, dk dv of 128 x 64 spills 168 bytes. H = 64: forward 128, so that two programs share an SM (of
# 128 x 128: 252), dq 203, dk dv 166 (of 128 x 64: 255). H = 32 with 4 warps spills 328 bytes forward. float32 is three
# TF32 passes, whose split operands fill the registers: at H = 128 every shape tried spills (64 x 16 and 64 x 32 with 4
# and 8 warps), so there is no row.
# TPU: at C = 512 the three kernels use 1.6, 3.0 and 3.5 MiB of 16 on v5e, and no more than 4.1 on v5p and v6e.
TILES = {
    **TPU_SQUARES,
    ("gpu", 2, 16): Tiles(Tile(128, 64, 8, 2), Tile(128, 64, 8, 2), Tile(128, 64, 8, 2)),
    ("gpu", 2, 32): Tiles(Tile(128, 64, 8, 2), Tile(128, 64, 8, 2), Tile(128, 64, 8, 2)),
    ("gpu", 2, 64): Tiles(Tile(128, 64, 8, 2), Tile(128, 64, 8, 2), Tile(128, 32, 8, 3)),
    ("gpu", 2, 128): Tiles(Tile(128, 64, 8, 3), Tile(128, 64, 8, 2), Tile(128, 32, 8, 3)),
    ("gpu", 4, 16): Tiles(Tile(64, 64, 4, 2), Tile(64, 32, 4, 2), Tile(64, 32, 4, 2)),
    ("gpu", 4, 32): Tiles(Tile(64, 64, 4, 2), Tile(64, 32, 4, 2), Tile(64, 32, 4, 2)),
    ("gpu", 4, 64): Tiles(Tile(64, 32, 4, 2), Tile(128, 32, 8, 2), Tile(128, 16, 8, 2)),
}


class Options(NamedTuple):
    """The compile-time options of a call."""

    normalize: bool
    scale: float
    platform: str
    interpret: bool
    tiles: Tiles
    raw: bool = False  # the forward kernel does not divide its sums: another part of the keys is added later


class Fold(NamedTuple):
    """Decay and document masks combined per chunk. J = T / C chunks; all factors but `local` are in [0, 1]."""

    keys: Float[Array, "B T N H"]  # k * leave
    leave: Float[Array, "B N T"]  # e^{(tot - l) / 2}; 0 unless its document is the chunk's last
    enter: Float[Array, "B N T"]  # e^l; 0 unless its document is the chunk's first
    local: Float[Array, "B N 2 T"]  # l in two parts
    step: Float[Array, "B N J"]  # e^tot


class Cotangent(NamedTuple):
    """dy and derived quantities: unfolded ones for the diagonal tile, and the folded `g` and `bias` for the others."""

    dy: Float[Array, "B T N H"]
    ratio: Float[Array, "B N T"]  # 1 / den, or scale^2 without normaliser
    mean: Float[Array, "B N T"]  # dy.y, 0 without normaliser
    g: Float[Array, "B T N H"]  # enter * ratio * dy
    bias: Float[Array, "B N T"]  # g.y, 0 without normaliser
