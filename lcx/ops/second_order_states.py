"""Second-order attention as a recurrence on a state of P x W numbers, chunk by chunk: linear in T.

    (q . k)^2 = expand(q) . expand(k),      S_t = exp(a_t) S_t-1 + expand(k_t) v_t^T,      sums_t = expand(q_t) S_t

expand is the symmetric square: x_m x_n for m <= n, products with m < n counted twice (each once with factor sqrt 2).
The smallest has H (H + 1) / 2 entries. Blocks of 16 rows keep the products dense at little cost: block a holds
x_m x_n for m in [16 a, 16 a + 16), n in [16 a, H), row by row, so its first 16 columns hold both orders (factor 1) and
the others one (factor sqrt 2): 2560 numbers for H = 64 against 2080 and the full 4096.

Weights between tokens of one chunk are computed directly (second_order_tiles.within); older tokens contribute through
the state. This takes 2 P W multiply-adds per token and head forward and 5 P W backward. No state is stored for the
backward pass: one sweep forward in time recomputes them (for dq), one sweep back propagates their gradient (for dk and
dv).

Products with the state are in float32 for bfloat16 inputs too: (q . k)^2 is the result of cancellation between terms up
to |q|^2 |k|^2.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from lcx.ops import second_order_tiles as tiles
from lcx.ops.second_order_rows import Head, Rows, each_head
from lcx.ops.tiling import dot

BLOCK = 16


def expanded_size(head_dim: int) -> int:
    return sum(min(BLOCK, head_dim - at) * (head_dim - at) for at in range(0, head_dim, BLOCK))


def expand(x: Float[Array, "*batch H"]) -> Float[Array, "*batch P"]:
    """The symmetric square: expand(x) . expand(y) = (x . y)^2."""
    H, parts = x.shape[-1], []
    for at in range(0, H, BLOCK):
        once = np.arange(at, H) < at + BLOCK
        right = x[..., None, at:] * np.where(once, 1, 2**0.5).astype(x.dtype)
        parts.append((x[..., at : at + BLOCK, None] * right).reshape(*x.shape[:-1], -1))
    return jnp.concatenate(parts, axis=-1)


@jax.custom_vjp
def states(rows: Rows, state: Array) -> tuple[tiles.Sums, Array]:
    """The sums as in second_order_tiles.tiles, and the state after the rows; states [B, N, P, H + 1]."""
    return _forward(rows, state)[0]


def _forward(rows: Rows, state: Array):
    widths = (rows.v.shape[3], 1)
    return each_head(_head_forward, rows, (), (state.astype(rows.decay.dtype),), widths), (rows, state)


def gradients(residuals, cotangents) -> tuple[Rows, Array]:
    (rows, state), (d_sums, d_state) = residuals, cotangents
    widths = tuple(x.shape[3] for x in rows[:3])
    of_heads = state.astype(rows.decay.dtype), d_state
    (dq, dk, dv), (d_decay, d_initial) = each_head(_head_backward, rows, d_sums, of_heads, widths)
    return tiles.of_rows(rows, dq, dk, dv, d_decay), d_initial.astype(state.dtype)


states.defvjp(_forward, gradients)


def read(rows: Rows, state: Array) -> tiles.Sums:
    """The contribution of the initial state to the sums of `states`."""
    return states(rows._replace(shown=jnp.zeros_like(rows.shown)), state)[0]


def write(rows: Rows, state: Array) -> Array:
    """The final state of `states`, without the sums."""
    return states(rows, state)[1]


class Factors(NamedTuple):
    """Three weights for each of a head's tiles."""

    from_start: Float[Array, "n C 1"]  # of the entering state in each query
    to_end: Float[Array, "n C 1"]  # of each key in the leaving state
    kept: Float[Array, " n"]  # of the entering state in the leaving state


def _factors(head: Head) -> Factors:
    l, total, to_end, first, last = tiles.local(head.decay, head.runs)
    before = jnp.concatenate([jnp.zeros(1, last.dtype), last[:-1]])
    from_start = jnp.exp(l) * (head.runs == before[:, None])
    return Factors(from_start[..., None], to_end[..., None], jnp.exp(total) * (last == before))


def _head_forward(head: Head, _, of_head, sums: tiles.Sums):
    def chunk(carry, xs):
        state, sums = carry
        i, (from_start, to_end, kept) = xs
        q, k, v = head.queries(i), head.keys(i), head.values(i)
        s, near = tiles.within(q, k, head.decay[i], head.runs[i])
        part = dot((s * s * near).astype(v.dtype), v, 1, 0)
        q, k = (expand(x.astype(state.dtype)) for x in (q, k))
        part += from_start * dot(q, state, 1, 0)
        return (kept * state + dot(k, to_end * v, 0, 0), head.put_sums(sums, part, i)), None

    xs = jnp.arange(len(head.decay)), _factors(head)
    (state, sums), _ = jax.lax.scan(chunk, (of_head[0], sums), xs)
    return sums, state


def _head_backward(head: Head, d_sums: tiles.Sums, of_head, grads):
    """dq in the order of time, with the states; then dk and dv in the reverse order, with the states' gradients."""
    (state, d_final), (dq, dk, dv) = of_head, grads

    def forward(carry, xs):
        state, dq = carry
        i, (from_start, to_end, kept) = xs
        q, k = (x.astype(state.dtype) for x in (head.queries(i), head.keys(i)))
        d_out = from_start * head.of_sums(d_sums, i)
        (far,) = jax.vjp(expand, q)[1](dot(d_out, state, 1, 1))
        state = kept * state + dot(expand(k), to_end * head.values(i), 0, 0)
        return (state, head.put(dq, head.d_queries(far, i), i)), jnp.sum(q * far, axis=-1)

    def backward(carry, xs):
        d_state, dq, dk, dv = carry
        i, (from_start, to_end, kept), d_own = xs
        q, k, v, d_out = head.queries(i), head.keys(i), head.values(i), head.of_sums(d_sums, i)
        near, dk_i, dv_i = tiles.within_backward(q, k, v, head.decay[i], head.runs[i], d_out)
        q, k = (x.astype(d_state.dtype) for x in (q, k))
        (far,) = jax.vjp(expand, k)[1](dot(to_end * v, d_state, 1, 1))
        dk_i += far
        dv_i += to_end * dot(expand(k), d_state, 1, 0)[:, :-1]
        d_own += jnp.sum(q * near - k * dk_i, axis=-1)
        d_state = kept * d_state + dot(expand(q), from_start * d_out, 0, 0)
        dq, dk = head.add(dq, head.d_queries(near, i), i), head.put(dk, head.d_keys(dk_i, i), i)
        return (d_state, dq, dk, head.put(dv, dv_i, i)), d_own

    xs = jnp.arange(len(head.decay)), _factors(head)
    (final, dq), d_own = jax.lax.scan(forward, (state, dq), xs)
    carry = d_final, dq, dk, dv
    (d_initial, *grads), d_own = jax.lax.scan(backward, carry, (*xs, d_own), reverse=True)
    # The final state also decays with every token.
    return tuple(grads), (tiles.decay_gradient(d_own) + jnp.sum(d_final * final), d_initial)
