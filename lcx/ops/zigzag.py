"""Rows divided so that causal attention is the same work for every device: blocks r and 2 P - 1 - r on device r.

Rows come in P consecutive parts, one a device. Cut into halves they are 2 P blocks, of which device r holds blocks 2 r
and 2 r + 1. A query of block c sees about c + 1/2 blocks of keys, so the two of a device see 2 P together, whatever r.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array


def routes(P: int) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """(device that holds it, device that takes it) of the even and of the odd of 2 P blocks."""
    takes = [c if c < P else 2 * P - 1 - c for c in range(2 * P)]
    return [(r, takes[2 * r]) for r in range(P)], [(r, takes[2 * r + 1]) for r in range(P)]


def to_zigzag(even: Array, odd: Array, mesh_axis: str) -> tuple[Array, Array]:
    """Blocks 2 r and 2 r + 1 of device r -> its blocks r and 2 P - 1 - r."""
    P = jax.lax.axis_size(mesh_axis)
    first, second = (
        jax.lax.ppermute(x, mesh_axis, route) for x, route in zip((even, odd), routes(P), strict=True)
    )
    swap = jax.lax.axis_index(mesh_axis) % 2 == 1  # on odd devices the block r is an odd one
    return jnp.where(swap, second, first), jnp.where(swap, first, second)


def from_zigzag(near: Array, far: Array, mesh_axis: str) -> tuple[Array, Array]:
    """The inverse of to_zigzag."""
    P = jax.lax.axis_size(mesh_axis)
    swap = jax.lax.axis_index(mesh_axis) % 2 == 1
    pair = jnp.where(swap, far, near), jnp.where(swap, near, far)
    back = ([(b, a) for a, b in route] for route in routes(P))
    first, second = (jax.lax.ppermute(x, mesh_axis, route) for x, route in zip(pair, back, strict=True))
    return first, second
