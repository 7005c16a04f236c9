"""Causal tiles on GPU, through Triton: a program for each chunk, head and row, and the loops over what it sees.

Arrays keep their layout, [B, T, N, H]: a tile's rows are N H elements apart, with H contiguous elements each, so
nothing is transposed. A program owns the rows of one chunk (with its sums in registers, about half of the register file
at H = 128) and streams tiles of `streamed` tokens through shared memory: first the visible chunks off the diagonal,
from the diagonal outwards; then its own chunk, where the decay is computed per token pair and the triangle and the
documents are masked. Programs with the most work (late queries; early keys) start first.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from kernels_pallas.backends import triton

EXACT = jax.lax.DotAlgorithmPreset.TF32_TF32_F32_X3  # float32 products from three passes of TF32


def dot(a, b, options):
    exact = jax.lax.Precision.HIGHEST if options.interpret else EXACT  # a CPU has no TF32
    return jnp.dot(
        a, b, preferred_element_type=jnp.float32, precision=exact if a.dtype == jnp.float32 else None
    )


def cut(ref, start, size):
    return None if ref is None else ref[pl.ds(start, size)]


def times(x, scalar):
    return x if scalar is None else x * scalar


def visit(steps, count, at, body, sums, *, grow, begin):
    """sums = body(t, scalar, sums) for t = 0 .. count - 1; the scalar becomes grow(scalar, steps[at(t)]) after each."""
    if steps is None:
        return jax.lax.fori_loop(0, count, lambda t, sums: body(t, None, sums), sums)

    def one(t, carry):
        scalar, sums = carry
        return grow(scalar, steps[at(t)]), body(t, scalar, sums)

    return jax.lax.fori_loop(0, count, one, (begin, sums))[1]


def fall(local, runs, queries, keys, size, *, keys_down=False):
    """L_i - L_j of a tile on the diagonal (0 without decay), and the mask of visible pairs.

    queries, keys: the index of the first token of each. Keys run along the columns, or down the rows if keys_down.
    """
    down, across = (keys, queries) if keys_down else (queries, keys)
    rows = down + jax.lax.broadcasted_iota(jnp.int32, size, 0)
    columns = across + jax.lax.broadcasted_iota(jnp.int32, size, 1)
    seen = rows <= columns if keys_down else rows >= columns
    if runs is not None:
        seen &= runs[pl.ds(down, size[0])][:, None] == runs[pl.ds(across, size[1])][None, :]
    if local is None:
        return None, seen
    coarse, fine = (
        local[part, pl.ds(down, size[0])][:, None] - local[part, pl.ds(across, size[1])][None, :]
        for part in (0, 1)
    )
    return -(coarse + fine) if keys_down else coarse + fine, seen


def off_diagonal(down, across, size):
    """0 where a token meets itself, otherwise 1: for rows from token `down` on and columns from `across` on."""
    rows = down + jax.lax.broadcasted_iota(jnp.int32, size, 0)
    columns = across + jax.lax.broadcasted_iota(jnp.int32, size, 1)
    return (rows != columns).astype(jnp.float32)


class Specs:
    """Blocks for a grid (J, N, B) of chunks: those of the program's own chunk, and whole rows to stream from."""

    def __init__(self, shape, C, *, reverse=False):
        self.B, self.T, self.N, self.H = shape
        self.C, self.J = C, self.T // C
        self.at = (lambda i: self.J - 1 - i) if reverse else (lambda i: i)

    def own(self, heads):
        G = self.N // heads
        return pl.BlockSpec((None, self.C, None, self.H), lambda i, n, b: (b, self.at(i), n // G, 0))

    def whole(self, heads):
        G = self.N // heads
        return pl.BlockSpec((None, self.T, None, self.H), lambda i, n, b: (b, 0, n // G, 0))

    def own_row(self):
        return pl.BlockSpec((None, None, self.C), lambda i, n, b: (b, n, self.at(i)))

    def row(self, x):
        """The whole row of [B, N, any], [B, N, 2, T] or [B, T]."""
        if x is None:
            return None
        if x.ndim == 2:
            return pl.BlockSpec((None, x.shape[1]), lambda i, n, b: (b, 0))
        if x.ndim == 4:
            return pl.BlockSpec((None, None, *x.shape[2:]), lambda i, n, b: (b, n, 0, 0))
        return pl.BlockSpec((None, None, x.shape[2]), lambda i, n, b: (b, n, 0))


def call(kernel, specs: Specs, tile, options, operands, outputs, name):
    """Calls the kernel. operands, outputs: pairs (array or shape, block); an absent one is None."""
    arrays, in_specs = zip(*operands, strict=True)
    shapes, out_specs = zip(*outputs, strict=True)
    return pl.pallas_call(
        functools.partial(kernel, tile=tile, options=options),
        grid=(specs.J, specs.N, specs.B),
        in_specs=in_specs,
        out_specs=out_specs,
        out_shape=shapes,
        compiler_params=triton.CompilerParams(num_warps=tile.warps, num_stages=tile.stages),
        interpret=options.interpret,
        name=name,
    )(*arrays)


def spread(step, parts, at, rest):
    """Expands one number per chunk to streamed tiles: the chunk's number on its tile `at` of `parts`, else `rest`.

    `at` is the tile of the chunk that is visited last.
    """
    each = jnp.full((*step.shape, parts), rest, jnp.float32).at[..., at].set(step)
    return each.reshape(*step.shape[:2], -1)
