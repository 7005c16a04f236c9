"""Causal tiles on TPU: a grid of heads, chunks and steps.

Heads come first, [B N, T, H], so that a tile is rows by lanes. The grid is (heads, chunks, steps), steps innermost: a
grid row holds one chunk and its sums in VMEM, and each step loads one other tile, first those off the diagonal, from
the diagonal outwards, then the chunk itself. The number of tiles depends on the data: the bounds of all chunks are
prefetched to scalar memory, the grid has as many steps as the chunk with the largest bound needs, and a step past a
chunk's own bound names the tile that is already loaded, so nothing is fetched or computed.

Scalars per token (decays, sums) are rows of [B N, 1, T], since a column would take 128 times its size. Where a tile
needs one along its rows, the kernel transposes it once per chunk. VMEM at C = 512, H = 128, bfloat16: two or three
C x C float32 tiles (3 MiB), double-buffered windows (2 MiB), sums (0.6 MiB).
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

LANES = 128


def dot(a, b, axes):
    """Contracts axes[0] of a with axes[1] of b."""
    exact = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    dims = (((axes[0],), (axes[1],)), ((), ()))
    return jax.lax.dot_general(a, b, dims, precision=exact, preferred_element_type=jnp.float32)


def to_column(row):
    """[1, C] -> [C, 1]."""
    return jnp.transpose(jnp.broadcast_to(row, (8, row.shape[1])))[:, :1]


def to_row(partial):
    """Sums along the lanes of [C, L], as a row [1, C]: a product with ones, which avoids a transposition."""
    return dot(jnp.ones((8, partial.shape[1]), jnp.float32), partial, (1, 1))[:1]


def lanes(x):
    """Sums of groups of lanes, [C, S] -> [C, 128]: additions of whole registers."""
    C, S = x.shape
    if S <= LANES:
        return x
    return sum(x[:, at : at + LANES] for at in range(LANES, S, LANES)) + x[:, :LANES]


def times(x, scalar):
    return x if scalar is None else x * scalar


def fall(local, runs, C, *, keys_down=False):
    """L_i - L_j of the tile on the diagonal (0 without decay), and the mask of visible pairs."""
    down, across = (jax.lax.broadcasted_iota(jnp.int32, (C, C), axis) for axis in (0, 1))
    seen = down <= across if keys_down else down >= across
    if runs is not None:
        seen &= to_column(runs[...].astype(jnp.float32)) == runs[...].astype(jnp.float32)
    if local is None:
        return None, seen
    coarse, fine = (to_column(local[part : part + 1, :]) - local[part : part + 1, :] for part in (0, 1))
    return -(coarse + fine) if keys_down else coarse + fine, seen


def off_diagonal(C):
    """0 where a token of a chunk meets itself, otherwise 1 [C, C]."""
    down, across = (jax.lax.broadcasted_iota(jnp.int32, (C, C), axis) for axis in (0, 1))
    return (down != across).astype(jnp.float32)


class Specs:
    """Blocks for a grid (B N, J, steps): those of the chunk that a grid row holds, and those that are streamed.

    away: the tile of step t < count is t + 1 chunks before the own one (-1) or after it (+1).
    """

    def __init__(self, shape, C, away):
        self.B, self.T, self.N, self.H = shape
        self.C, self.J, self.away = C, self.T // C, away

    def _passing(self, h, i, t, bound, *, back):
        """The index of the tile of step t; at the last step the chunk itself (back), or the tile loaded last."""
        limit = bound[h * self.J + i]
        count = (limit - i) * self.away
        return jnp.where(t < count, i + self.away * (t + 1), i if back else limit)

    def own(self, heads=None):
        G = self.N // (heads or self.N)
        return pl.BlockSpec((None, self.C, self.H), lambda h, i, t, bound, steps: (h // G, i, 0))

    def passing(self, heads, *, back=False):
        G = self.N // heads
        return pl.BlockSpec(
            (None, self.C, self.H),
            lambda h, i, t, bound, steps: (h // G, self._passing(h, i, t, bound, back=back), 0),
        )

    def own_row(self, heads=None):
        """The own chunk's block of [B N, 1, T], or of [B, 1, T] (heads=1)."""
        G = self.N // (heads or self.N)
        return pl.BlockSpec((None, 1, self.C), lambda h, i, t, bound, steps: (h // G, 0, i))

    def own_pair(self):
        """The own chunk's block of [B N, 2, T]."""
        return pl.BlockSpec((None, 2, self.C), lambda h, i, t, bound, steps: (h, 0, i))

    def passing_row(self, *, back=False):
        return pl.BlockSpec(
            (None, 1, self.C), lambda h, i, t, bound, steps: (h, 0, self._passing(h, i, t, bound, back=back))
        )


def call(kernel, specs: Specs, bound, steps, options, operands, outputs, scratch, name):
    """Calls the kernel. operands, outputs: pairs (array or shape, block); an absent array is None.

    bound: how far each chunk sees. steps: a number for each chunk; None if no chunk is skipped.
    """
    J = specs.J
    arrays, in_specs = zip(*((x, None if x is None else spec) for x, spec in operands), strict=True)
    shapes, out_specs = zip(*outputs, strict=True)
    furthest = J if steps is None else jnp.max((bound - jnp.arange(J, dtype=jnp.int32)) * specs.away) + 1
    numbers = jnp.ones(bound.shape, jnp.float32) if steps is None else steps
    grid = pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=2,
        grid=(specs.B * specs.N, J, furthest),
        in_specs=in_specs,
        out_specs=out_specs,
        scratch_shapes=[
            *(pltpu.VMEM(shape, jnp.float32) for shape in scratch),
            pltpu.SMEM((1,), jnp.float32),
        ],
    )
    return pl.pallas_call(
        functools.partial(kernel, options=options, decayed=steps is not None),
        grid_spec=grid,
        out_shape=shapes,
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary")),
        interpret=options.interpret,
        name=name,
    )(bound.reshape(-1), numbers.reshape(-1), *arrays)


def heads_first(x):
    B, T, N, H = x.shape
    return jnp.swapaxes(x, 1, 2).reshape(B * N, T, H)


def tokens_first(x, N):
    return jnp.swapaxes(x.reshape(-1, N, *x.shape[1:]), 1, 2)


def as_rows(x):
    """[B, N, T] or [B, T] -> [B N, 1, T] or [B, 1, T]."""
    return None if x is None else x.reshape(-1, 1, x.shape[-1])


def as_pairs(x):
    """[B, N, 2, T] -> [B N, 2, T]."""
    return None if x is None else x.reshape(-1, 2, x.shape[-1])
