"""What the kernels through Mosaic GPU have in common, and where they run.

Pallas has two ways to a GPU: Triton, which jax deprecates from 0.11 on, and Mosaic GPU. A Mosaic kernel says itself
what Triton does for its author: which tile is in shared memory and in which order (`tile`), when a copy from memory
begins and when it is awaited (barriers), and that a product is a wgmma instruction with operands in shared memory and
sums in registers (`product`). One program is one warpgroup of 128 threads.

wgmma takes 16-bit operands. A float32 operand is a few bfloat16 numbers, each of which holds what those before it leave
(`parts`), and a product of two such operands is the products of their parts, without those below the last digit: three
of two parts are exact to 2^-17, six of three parts to float32.
"""

import functools

import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu

ROWS = 64  # of a wgmma instruction: the least number of rows of a product


def parts(x: Array, count: int) -> list[Array]:
    """`count` bfloat16 arrays that add up to x; a bfloat16 x is one."""
    found, rest = [], x.astype(jnp.float32)
    for _ in range(count):
        found.append(rest.astype(jnp.bfloat16))
        rest = rest - found[-1].astype(jnp.float32)
    return found


def tile(*shape: int, dtype, width: int = 64):
    """A tile in shared memory in the order in which wgmma reads it: 8 rows of up to 128 bytes, swizzled.

    width: the columns of the narrowest operand that meets this one in a product: wgmma reads both in one order.
    """
    size = jnp.dtype(dtype).itemsize
    swizzle = next(n for n in (128, 64, 32) if shape[-1] * size % n == 0 and n <= width * size)
    transforms = mosaic_gpu.TilingTransform((8, swizzle // size)), mosaic_gpu.SwizzleTransform(swizzle)
    return mosaic_gpu.SMEM(shape, dtype, transforms=transforms)


def tiles(*shape: int, parts: int, width: int = 64) -> list:
    """A tile for each part of an operand."""
    return [tile(*shape, dtype=jnp.bfloat16, width=width) for _ in range(parts)]


def store(tiles: list, x: Array) -> None:
    """Stores an operand, where products can read it once `commit_smem` was called."""
    for ref, part in zip(tiles, parts(x, len(tiles)), strict=True):
        ref[...] = part


def accumulate(total, a: list, b: list) -> None:
    """Adds a @ b, each given by its parts, to a reference of sums; the smallest products first."""
    for i in reversed(range(len(a))):
        for j in reversed(range(len(b))):
            if i + j < max(len(a), len(b)):
                mosaic_gpu.wgmma(total, a[i], b[j])


def product(shape: tuple[int, int], *pairs) -> Array:
    """The sum of the products a @ b of pairs of operands, [M, N] float32."""

    def sums(total):
        for a, b in pairs:
            accumulate(total, a, b)
        return held(total[...])

    return pl.run_scoped(sums, mosaic_gpu.ACC(shape, jnp.float32))


def transposed(tiles: list) -> list:
    return [ref.transpose((1, 0)) for ref in tiles]


def held(x: Array) -> Array:
    """x [M, N] in registers as wgmma has its sums."""
    return mosaic_gpu.layout_cast(x, mosaic_gpu.Layout.WGMMA)


def load(ref) -> Array:
    """A tile in registers."""
    return mosaic_gpu.load(ref, layout=mosaic_gpu.Layout.WGMMA, optimized=False)


def whole(tiles: list) -> Array:
    """An operand in registers, float32."""
    return functools.reduce(jnp.add, [load(ref).astype(jnp.float32) for ref in tiles])


def rows(ref) -> Array:
    """A vector from shared memory as the rows' numbers: to be broadcast along the columns of sums."""
    return mosaic_gpu.load(ref, layout=mosaic_gpu.Layout.WGMMA.reduce(1), optimized=False)


def columns(ref) -> Array:
    """A vector from shared memory as the columns' numbers: to be broadcast along the rows of sums."""
    return mosaic_gpu.load(ref, layout=mosaic_gpu.Layout.WGMMA.reduce(0), optimized=False)


def call(body, *, grid: dict[str, int], outputs: list, scratch: dict, interpret: bool, name: str):
    """Runs body(*inputs, *outputs, **scratch) for every point of the grid, of which one name is an axis."""
    return mosaic_gpu.kernel(
        body,
        out_type=outputs,
        scratch_types=scratch,
        grid=tuple(grid.values()),
        grid_names=tuple(grid),
        compiler_params=mosaic_gpu.CompilerParams(lowering_semantics=mosaic_gpu.LoweringSemantics.Lane),
        interpret=mosaic_gpu.InterpretGPUParams() if interpret else None,
        kernel_name=name,
    )
