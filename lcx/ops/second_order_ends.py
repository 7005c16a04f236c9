"""The state before a row and the state after it, for form "tiles": only tiles near the ends of the row take part.

Tile i sees the state before the row through the decay of all tiles before i, and tile j enters the state after the row
through the decay of all tiles after j. Where these are below exp(SKIP), or another document lies between, the tile is
left out, as between tiles (second_order_tiles.py). So with a strong decay the states cost nothing per token.

What is left out or not is a loop that runs once or not at all, since a branch would copy what it overwrites. Where
heads are computed at once, it is left out if it is in all of them, and otherwise has a decay of -inf in those.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from lcx.ops.second_order_expand import expand
from lcx.ops.second_order_rows import Head
from lcx.ops.tiling import dot, row_dots

SKIP = -30.0  # weights whose decay is below exp(SKIP) = 1e-13 are treated as 0


class Ends(NamedTuple):
    """Log decays between tiles and the ends of the row; -inf where another document lies between."""

    before: Float[Array, " n"]  # from the start of the row to that of each tile
    after: Float[Array, " n"]  # from the end of each tile to that of the row
    whole: Float[Array, ""]  # from the start of the row to its end


def ends(total: Float[Array, " n"], first: Int[Array, " n"], last: Int[Array, " n"]) -> Ends:
    """From the decay of each tile and the documents at its start and end; the state before the row is of document 0."""
    none = jnp.zeros(1, total.dtype)
    before = jnp.concatenate([none, jnp.cumsum(total[:-1])])
    after = jnp.concatenate([jnp.cumsum(total[:0:-1])[::-1], none])
    return Ends(
        jnp.where(first == 0, before, -jnp.inf),
        jnp.where(last == last[-1], after, -jnp.inf),
        jnp.where(last[-1] == 0, before[-1] + total[-1], -jnp.inf),
    )


def seen(
    head: Head, decay: Array, q: Float[Array, "C H"], state: Float[Array, "P W"], sums: Float[Array, "C W"]
) -> Array:
    """`sums` of the queries of a tile at `decay` from the start of the row, with what they see of the state."""

    def add(decay, sums):
        return sums + jnp.exp(decay) * dot(expand(q.astype(state.dtype)), state, 1, 0)

    return _if_it_matters(head, decay, add, sums)


def seen_backward(
    head: Head, decay: Array, q, state, d_sums: Float[Array, "C W"], dq: Array, d_state: Array
) -> tuple:
    """dq and d_state with what `seen` adds to them."""

    def add(decay, grads):
        (dq, d_state), wide, d = grads, q.astype(state.dtype), jnp.exp(decay) * d_sums
        expanded, pull = jax.vjp(expand, wide)
        return dq + pull(dot(d, state, 1, 1))[0], d_state + dot(expanded, d, 0, 0)

    return _if_it_matters(head, decay, add, (dq, d_state))


def _if_it_matters(head: Head, decay: Array, fn, carry):
    matters = decay >= SKIP
    decay, times = jnp.where(matters, decay, -jnp.inf), jnp.where(head.in_any(matters), 1, 0)
    return jax.lax.fori_loop(0, times, lambda _, carry: fn(decay, carry), carry)


def leave(of: Ends, head: Head, to_end: Float[Array, "n C"], state: Float[Array, "P W"]) -> Array:
    """The state after the row, given that before it and the weights of keys at the end of their tile."""

    def tile(j, after, state):
        weights = (jnp.exp(after) * to_end[j])[:, None]
        return state + dot(expand(head.keys(j).astype(state.dtype)), weights * head.values(j), 0, 0)

    return _last_tiles(head, of, tile, jnp.exp(of.whole) * state)


def leave_backward(of: Ends, head: Head, to_end: Array, d_state: Array, grads: tuple) -> tuple:
    """d_own, dk, dv (second_order_tiles.backward) with what the gradient of the state after the row adds to them."""

    def tile(j, after, grads):
        d_own, dk, dv = grads
        k, weights = head.keys(j).astype(d_state.dtype), (jnp.exp(after) * to_end[j])[:, None]
        expanded, pull = jax.vjp(expand, k)
        (dk_j,) = pull(dot(weights * head.values(j), d_state, 1, 1))
        dv_j = weights * dot(expanded, d_state, 1, 0)[:, :-1]
        d_own = d_own.at[j].add(-row_dots(k, dk_j))
        return d_own, head.add(dk, head.d_keys(dk_j, j), j), head.add(dv, dv_j, j)

    return _last_tiles(head, of, tile, grads)


def _last_tiles(head: Head, of: Ends, tile, carry):
    """carry = tile(j, after, carry) for the tiles that matter after the row, the last first; after: their decay to its
    end."""
    matters = jnp.cumprod((of.after >= SKIP)[::-1])[::-1] > 0
    after = jnp.where(matters, of.after, -jnp.inf)

    def goes_on(state):
        return (state[0] >= 0) & head.in_any(matters[state[0]])

    def step(state):
        j, carry = state
        return j - 1, tile(j, after[j], carry)

    return jax.lax.while_loop(goes_on, step, (jnp.array(len(after) - 1), carry))[1]
