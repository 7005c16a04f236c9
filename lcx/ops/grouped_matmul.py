"""Products of groups of rows, each with its own matrix: y[i] = x[i] @ w[group of row i], rows ordered by group.

The products of the experts of a mixture without dropped tokens. Cost and memory follow the rows, not the number of
groups: a group without rows costs nothing, and no array has an axis of groups but w and its gradient.

``reference``  one gathered matrix for each row.
``tiles``      a loop over tiles of rows of one group each, for CPUs, where XLA would compute every group for every row.
``ragged``     jax.lax.ragged_dot, which compilers for GPUs and TPUs turn into grouped kernels.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from lcx.ops import MIXER_RESIDUALS, dispatch
from lcx.ops.tiling import add, cut, dot, put


def grouped_matmul(
    x: Float[Array, "M I"],
    w: Float[Array, "E I O"],
    sizes: Int[Array, " E"],
    *,
    implementation: str | None = None,
) -> Float[Array, "M O"]:
    """The products, in x's dtype. Rows beyond the sum of `sizes` give 0.

    Args:
      sizes: rows of each group; the first sizes[0] rows belong to group 0, and so on.
      implementation: see dispatch.py; here "tiles", "ragged", "reference" or None for the fastest valid one.

    Raises:
      UserError: an unknown implementation.
    """
    obstacles = {"tiles": dispatch.on("cpu"), "ragged": None, "reference": None}
    name = dispatch.choose("grouped_matmul", implementation, obstacles)
    if name == "tiles":
        return checkpoint_name(_tiled(x, w, sizes), MIXER_RESIDUALS)  # else recomputed: a loop is not a product
    if name == "ragged":
        return checkpoint_name(jax.lax.ragged_dot(x, w.astype(x.dtype), sizes), MIXER_RESIDUALS)
    ends = jnp.cumsum(sizes)
    group = jnp.searchsorted(ends, jnp.arange(x.shape[0]), side="right")
    y = jnp.einsum("mi,mio->mo", x, w.astype(x.dtype)[jnp.minimum(group, w.shape[0] - 1)])
    return jnp.where((group < w.shape[0])[:, None], y, 0)


def _over_tiles(sizes: Array, rows: int, body, carry):
    """carry = body(group, first row, mask of the tile's rows, carry) for each tile that holds rows of one group.

    Tiles come in the order of their rows. What a tile holds beyond its group belongs to later tiles.
    """
    size = _tile(rows, sizes)
    starts = jnp.cumsum(sizes) - sizes
    tiles = -(-sizes // size)
    ends = jnp.cumsum(tiles)

    def one(number, carry):
        group = jnp.searchsorted(ends, number, side="right")
        first = starts[group] + (number - (ends[group] - tiles[group])) * size
        inside = first + jnp.arange(size) < starts[group] + sizes[group]
        return body(group, first, inside[:, None], carry)

    return jax.lax.fori_loop(0, ends[-1], one, carry)


def _tile(rows: int, sizes: Array) -> int:
    """Rows of a tile: large ones are faster if groups are large, else they hold too little."""
    return 128 if rows >= 256 * sizes.shape[0] else 64


def _padded(x: Array, sizes: Array) -> Array:
    return jnp.pad(x, ((0, _tile(len(x), sizes)), (0, 0)))


def _of_groups(y: Array, rows: int, sizes: Array) -> Array:
    """The rows of all tiles, 0 where no group has a row."""
    return jnp.where((jnp.arange(rows) < jnp.sum(sizes))[:, None], y[:rows], 0)


@jax.custom_vjp
def _tiled(x: Array, w: Array, sizes: Array) -> Array:
    padded = _padded(x, sizes)

    def body(group, first, inside, y):  # what is written beyond the group, later tiles replace
        return put(y, dot(cut(padded, first, len(inside)), w[group].astype(x.dtype), 1, 0), first)

    y = _over_tiles(sizes, len(x), body, jnp.zeros((padded.shape[0], w.shape[2]), x.dtype))
    return _of_groups(y, len(x), sizes)


def _tiled_forward(x, w, sizes):
    return _tiled(x, w, sizes), (x, w, sizes)


def _tiled_backward(residuals, dy):
    x, w, sizes = residuals
    padded, padded_dy = _padded(x, sizes), _padded(dy, sizes)
    wide = jnp.promote_types(x.dtype, jnp.float32)

    def body(group, first, inside, carry):
        dx, dw = carry
        part = cut(padded_dy, first, len(inside))
        dx = put(dx, dot(part, w[group].astype(dy.dtype), 1, 1), first)
        part = jnp.where(inside, part, 0)
        return dx, add(dw, dot(cut(padded, first, len(inside)), part, 0, 0)[None], group)

    dx, dw = _over_tiles(sizes, len(x), body, (jnp.zeros(padded.shape, x.dtype), jnp.zeros(w.shape, wide)))
    return _of_groups(dx, len(x), sizes), dw.astype(w.dtype), np.zeros(sizes.shape, jax.dtypes.float0)


_tiled.defvjp(_tiled_forward, _tiled_backward)
