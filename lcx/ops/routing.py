"""The rows of a mixture of experts: the pairs of a token and a chosen expert, ordered by expert, in parts.

Every token has k pairs. A device computes those of its own experts, about 1/n of them with the experts on n devices,
but at worst all. A compiled program has arrays of one size, so the pairs are taken in parts of equal size: the first
holds a quarter more than an equal share, and the others are only computed if there are more pairs than that. No pair is
dropped, and no array has room for the pairs of other devices.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

SLACK = 1.25  # size of a part, in equal shares: with more experts than devices, shares differ little
SMALLEST = 128  # rows of a part, for which a second part would cost more than it saves


class Rows(NamedTuple):
    """The pairs of some experts: rows of one part, or of all parts together.

    Attributes:
      order: the pair at each row; pair i belongs to token i // k.
      back: the row of each of the M pairs; no row of `order` if the pair is elsewhere.
      sizes: rows of each expert; the first sizes[0] rows belong to expert 0, and so on. Rows beyond their sum are void.
    """

    order: Int[Array, " R"]
    back: Int[Array, " M"]
    sizes: Int[Array, " E"]


def best_groups(
    scores: Float[Array, "*n E"], num_groups: int, num_chosen: int, members: int
) -> Bool[Array, "*n E"]:
    """Which experts are in one of the `num_chosen` best of `num_groups` groups of neighbours.

    A group is as good as the sum of the scores of its `members` best experts.
    """
    grouped = scores.reshape(*scores.shape[:-1], num_groups, -1)
    of_groups = jnp.sum(jax.lax.top_k(grouped, members)[0], axis=-1)
    _, chosen = jax.lax.top_k(of_groups, num_chosen)
    kept = jnp.any(chosen[..., None] == jnp.arange(num_groups), axis=-2)
    return jnp.repeat(kept, grouped.shape[-1], axis=-1)


def ordered(chosen: Int[Array, " M"], num_experts: int) -> Rows:
    """All M pairs, ordered by expert. Those of experts outside of [0, num_experts) come last."""
    known = (chosen >= 0) & (chosen < num_experts)
    order = jnp.argsort(jnp.where(known, chosen, num_experts), stable=True)
    sizes = jnp.bincount(jnp.where(known, chosen, num_experts), length=num_experts + 1)[:num_experts]
    return Rows(order, jnp.argsort(order), sizes)


def part_size(pairs: int, devices: int) -> int:
    """Rows of a part if the experts of `pairs` rows are on this many devices."""
    return min(pairs, max(math.ceil(SLACK * pairs / devices), SMALLEST))


def part(rows: Rows, number: Int[Array, ""] | int, size: int) -> Rows:
    """The rows [number size, (number + 1) size) of all parts. The last part may reach beyond the M pairs."""
    if size >= len(rows.order):
        return rows
    first, ends = number * size, jnp.cumsum(rows.sizes)
    padded = jnp.pad(rows.order, (0, size))
    order = jax.lax.dynamic_slice_in_dim(padded, first, size)
    back = rows.back - first
    inside = (back >= 0) & (back < size) & (rows.back < ends[-1])
    upto = jnp.clip(ends - first, 0, size)
    return Rows(order, jnp.where(inside, back, size), jnp.diff(upto, prepend=0))


def sum_of_parts(fn, rows: Rows, size: int):
    """The sum of fn(part) over all parts; fn gives 0 for a part without rows.

    What follows the first part is rarely needed. If it is, the backward pass computes it again: nothing is kept for it.
    """
    total = fn(part(rows, 0, size))
    numbers = jnp.arange(1, -(-len(rows.order) // size))
    if not len(numbers):
        return total
    one = jax.checkpoint(lambda number: fn(part(rows, number, size)))

    def rarely_needed():
        nothing = jnp.zeros_like(total)
        return jax.lax.cond(
            jnp.sum(rows.sizes) > size,
            lambda: jax.lax.scan(lambda sum, number: (sum + one(number), None), nothing, numbers)[0],
            lambda: nothing,
        )

    return total + jax.checkpoint(jax.jit(rarely_needed))()


# ------------------------------------------------------------------------------------- tokens into rows and back


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def spread(x: Float[Array, "N D"], rows: Rows, copies: int) -> Float[Array, "R D"]:
    """The rows of tokens: row i of the result is x[order[i] // copies].

    Its gradient is `collect` and the other way round. That of indexing would be a scatter, which is much slower.
    """
    return x[rows.order // copies]


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def collect(y: Float[Array, "R D"], rows: Rows, copies: int) -> Float[Array, "N D"]:
    """The sums over the rows that `spread` made of each token."""
    if len(rows.order) == len(rows.back):
        found = y[rows.back]
    else:  # void pairs all read the last row, which costs no traffic
        inside = rows.back < len(y)
        found = jnp.where(inside[:, None], y[jnp.where(inside, rows.back, len(y) - 1)], 0)
    return jnp.sum(found.reshape(-1, copies, y.shape[1]), axis=1)


def _moved_back(move, copies, rows, gradient):
    zeros = jax.tree.map(lambda x: np.zeros(x.shape, jax.dtypes.float0), rows)
    return move(gradient, rows, copies), zeros


spread.defvjp(
    lambda x, rows, copies: (spread(x, rows, copies), rows), functools.partial(_moved_back, collect)
)
collect.defvjp(
    lambda y, rows, copies: (collect(y, rows, copies), rows), functools.partial(_moved_back, spread)
)
