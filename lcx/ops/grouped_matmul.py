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
from jaxtyping import Array, Float, Int

from lcx.ops import dispatch
from lcx.ops.tiling import add, cut, dot, put

TILE = 64  # rows of a product: enough for the products to run at the speed of larger ones on a CPU core


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
        return _tiled(x, w, sizes)
    if name == "ragged":
        return jax.lax.ragged_dot(x, w.astype(x.dtype), sizes)
    ends = jnp.cumsum(sizes)
    group = jnp.searchsorted(ends, jnp.arange(x.shape[0]), side="right")
    y = jnp.einsum("mi,mio->mo", x, w.astype(x.dtype)[jnp.minimum(group, w.shape[0] - 1)])
    return jnp.where((group < w.shape[0])[:, None], y, 0)


def _over_tiles(sizes: Array, rows: int, body, carry):
    """carry = body(group, first row, mask of the tile's rows, carry) for each tile that holds rows of one group."""
    starts = jnp.cumsum(sizes) - sizes
    tiles = -(-sizes // TILE)
    ends = jnp.cumsum(tiles)

    def one(number, carry):
        group = jnp.searchsorted(ends, number, side="right")
        first = starts[group] + (number - (ends[group] - tiles[group])) * TILE
        inside = first + jnp.arange(TILE) < starts[group] + sizes[group]
        return body(group, first, inside[:, None], carry)

    return jax.lax.fori_loop(0, ends[-1], one, carry)


def _padded(x: Array) -> Array:
    return jnp.pad(x, ((0, TILE), (0, 0)))


@jax.custom_vjp
def _tiled(x: Array, w: Array, sizes: Array) -> Array:
    rows, padded = x.shape[0], _padded(x)

    def body(group, first, inside, y):
        product = dot(cut(padded, first, TILE), w[group].astype(x.dtype), 1, 0)
        return put(y, jnp.where(inside, product, cut(y, first, TILE)), first)

    return _over_tiles(sizes, rows, body, jnp.zeros((rows + TILE, w.shape[2]), x.dtype))[:rows]


def _tiled_forward(x, w, sizes):
    return _tiled(x, w, sizes), (x, w, sizes)


def _tiled_backward(residuals, dy):
    x, w, sizes = residuals
    rows, padded, padded_dy = x.shape[0], _padded(x), _padded(dy)
    wide = jnp.promote_types(x.dtype, jnp.float32)

    def body(group, first, inside, carry):
        dx, dw = carry
        part = jnp.where(inside, cut(padded_dy, first, TILE), 0)
        product = dot(part, w[group].astype(dy.dtype), 1, 1)
        dx = put(dx, jnp.where(inside, product, cut(dx, first, TILE)), first)
        return dx, add(dw, dot(cut(padded, first, TILE), part, 0, 0)[None], group)

    start = jnp.zeros((rows + TILE, x.shape[1]), x.dtype), jnp.zeros(w.shape, wide)
    dx, dw = _over_tiles(sizes, rows, body, start)
    return dx[:rows], dw.astype(w.dtype), np.zeros(sizes.shape, jax.dtypes.float0)


_tiled.defvjp(_tiled_forward, _tiled_backward)
