"""Definitions shared by `second_order_states.py` and its kernels: the tuning table and the chunks of a row."""

from typing import NamedTuple

from kernels_pallas.second_order_attention_plan import FLOOR, TILES, Options
from kernels_pallas.tiles import Tile, fitting


class Sizes(NamedTuple):
    """Tokens per chunk, columns per block, and for each kernel the amount that a program holds and streams.

    The number of columns must be a multiple of `second_order_states.BLOCK`. Otherwise the gradient of an initial state
    would be the gradient of its symmetric part.
    """

    chunk: int
    block: int
    walk: Tile  # held: slices (GPU), slices at a time (TPU); streamed: tokens
    read: Tile  # held: tokens; streamed: slices at a time
    contract: Tile


# {(platform, bytes of an element, H): sizes}. Chosen from compiler statistics, not from measurements on a device.
# GPU (ptxas for sm_90a: registers of a thread, nothing spilled): walk, read, contract take 219, 254, 148 for H = 64 and
# 218, 254, 151 for H = 128, within 10 of that with 64-bit addresses or an initial state; in float32 174, 228, 200
# for H = 64 and 255, 143, 145 for H = 32. At H < 64 the products of walk are too short for wgmma and run as mma.
# TPU: VMEM of walk 6.5 MiB at H = 64 and 21 at H = 128 (float32 26; 10 more for an initial state), read and
# contract 3.0 and 6.8 (11.7), on v5e. At H = 64 they take 2044, 868 and 715 bundles with 8 slices per iteration, and
# only 244, 171 and 259 more with 16, since much of an iteration waits for the first result of the matrix unit.
SIZES = {
    ("tpu", 2, 16): Sizes(2048, 16, Tile(16, 512), Tile(512, 16), Tile(512, 16)),
    ("tpu", 2, 32): Sizes(2048, 32, Tile(16, 512), Tile(512, 16), Tile(512, 16)),
    ("tpu", 2, 64): Sizes(2048, 32, Tile(16, 512), Tile(512, 16), Tile(512, 16)),
    ("tpu", 2, 128): Sizes(2048, 32, Tile(16, 512), Tile(512, 16), Tile(512, 16)),
    ("tpu", 4, 16): Sizes(2048, 16, Tile(8, 256), Tile(256, 8), Tile(256, 8)),
    ("tpu", 4, 32): Sizes(2048, 32, Tile(8, 256), Tile(256, 8), Tile(256, 8)),
    ("tpu", 4, 64): Sizes(2048, 32, Tile(8, 256), Tile(256, 8), Tile(256, 8)),
    ("tpu", 4, 128): Sizes(2048, 32, Tile(8, 256), Tile(256, 8), Tile(256, 8)),
    ("gpu", 2, 16): Sizes(1024, 16, Tile(4, 64, 4, 2), Tile(128, 1, 4, 2), Tile(128, 1, 4, 2)),
    ("gpu", 2, 32): Sizes(1024, 32, Tile(4, 64, 4, 2), Tile(128, 1, 4, 2), Tile(128, 1, 4, 2)),
    ("gpu", 2, 64): Sizes(1024, 32, Tile(8, 64, 4, 2), Tile(256, 1, 8, 3), Tile(128, 1, 4, 3)),
    ("gpu", 2, 128): Sizes(2048, 64, Tile(4, 64, 8, 2), Tile(128, 1, 8, 3), Tile(128, 1, 8, 3)),
    ("gpu", 4, 16): Sizes(1024, 16, Tile(4, 32, 4, 1), Tile(64, 1, 4, 1), Tile(64, 1, 4, 1)),
    ("gpu", 4, 32): Sizes(1024, 32, Tile(4, 32, 4, 1), Tile(64, 1, 4, 1), Tile(64, 1, 4, 1)),
    ("gpu", 4, 64): Sizes(1024, 32, Tile(4, 32, 4, 1), Tile(64, 1, 4, 1), Tile(64, 1, 4, 1)),
}


class Plan(NamedTuple):
    """The compile-time options of a call: those of the tiles inside a chunk, and the sizes."""

    options: Options
    sizes: Sizes

    @property
    def floor(self) -> float:
        return FLOOR

    def features(self, H: int) -> int:
        blocks = H // self.sizes.block
        return self.sizes.block**2 * blocks * (blocks + 1) // 2


def planned(
    T: int,
    H: int,
    dtype,
    normalize: bool,
    scale: float,
    platform: str,
    interpret: bool,
    tiles=None,
    sizes=None,
) -> Plan:
    """The plan for rows of T tokens: the fewest chunks of equal length, in whole tiles, that the table's size allows.

    Args:
      tiles, sizes: replace the entries of the tuning tables.
    """
    sizes = sizes or SIZES[platform, dtype.itemsize, H]
    tiles = fitting(tiles or TILES[platform, dtype.itemsize, H], sizes.chunk)
    unit = max(*(tile.held for tile in tiles), sizes.walk.streamed, sizes.read.held, sizes.contract.held)
    chunks = -(-T // sizes.chunk)
    sizes = sizes._replace(chunk=-(-T // (chunks * unit)) * unit)
    options = Options(normalize, scale, platform, interpret, tiles, raw=True)
    return Plan(options, sizes)
