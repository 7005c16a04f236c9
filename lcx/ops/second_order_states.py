"""Second-order attention as a recurrence on a state of P x W numbers, chunk by chunk: linear in T.

    (q . k)^2 = expand(q) . expand(k),      S_t = exp(a_t) S_t-1 + expand(k_t) v_t^T,      sums_t = expand(q_t) S_t

expand is the symmetric square (second_order_expand.py).

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
from jaxtyping import Array, Float

from lcx.ops import second_order_tiles as tiles
from lcx.ops.second_order_expand import expand
from lcx.ops.second_order_rows import Head, Outputs
from lcx.ops.tiling import dot, row_dots


class Factors(NamedTuple):
    """Three weights for each of a head's tiles."""

    from_start: Float[Array, "n C 1"]  # of the entering state in each query
    to_end: Float[Array, "n C 1"]  # of each key in the leaving state
    kept: Float[Array, " n"]  # of the entering state in the leaving state

    def of(self, i) -> tuple[Array, Array, Array]:
        return self.from_start[i], self.to_end[i], self.kept[i]


def _factors(head: Head) -> Factors:
    l, total, to_end, first, last = tiles.local(head.decay, head.runs)
    before = jnp.concatenate([jnp.zeros(1, last.dtype), last[:-1]])
    from_start = jnp.exp(l) * (head.runs == before[:, None])
    return Factors(from_start[..., None], to_end[..., None], jnp.exp(total) * (last == before))


def forward(head: Head, state: Array, outputs: Outputs) -> tuple[Array, Outputs]:
    """Writes the outputs of a head, given the state before the row; returns that after it."""
    factors = _factors(head)

    def chunk(i, carry):
        (state, outputs), (from_start, to_end, kept) = carry, factors.of(i)
        q, k, v = head.queries(i), head.keys(i), head.values(i)
        s, near = tiles.within(q, k, head.decay[i], head.runs[i])
        part = dot((s * s * near).astype(v.dtype), v, 1, 0)
        q_expanded, k_expanded = (expand(x.astype(state.dtype)) for x in (q, k))
        part += from_start * dot(q_expanded, state, 1, 0)
        state = kept * state + dot(k_expanded, to_end * v, 0, 0)
        return state, head.put_outputs(outputs, part, q, k, i)

    return jax.lax.fori_loop(0, len(head.decay), chunk, (state, outputs))


def backward(head: Head, weights: Array, of_state: tuple[Array, Array], grads: tuple) -> tuple:
    """(gradients as in second_order_tiles.backward, the state after the row, the gradient of that before it).

    dq in the order of time, with the states; then dk and dv in the reverse order, with the states' gradients. The first
    sweep is the last to read y and keeps one number per token of it, the gradient of the sum of weights.

    Args:
      of_state: the state before the row, and the gradient of that after it.
    """
    (state, d_state), (dq, d_own, dk, dy) = of_state, grads
    factors, count = _factors(head), len(head.decay)

    def chunk(i, carry):
        (state, dq, d_own, d_weights), (from_start, to_end, kept) = carry, factors.of(i)
        q, k = (x.astype(state.dtype) for x in (head.queries(i), head.keys(i)))
        dy_i = head.cut(dy, i)
        of_weights = head.d_weights(dq, weights, dy_i, i)
        d_sums, _ = head.d_sums(weights, of_weights, dy_i, i)
        (far,) = jax.vjp(expand, q)[1](dot(from_start * d_sums, state, 1, 1))
        state = kept * state + dot(expand(k), to_end * head.values(i), 0, 0)
        d_own, d_weights = d_own.at[i].set(row_dots(q, far)), d_weights.at[i].set(of_weights)
        return state, head.put(dq, head.d_queries(far, i), i), d_own, d_weights

    def chunk_backward(step, carry):
        i, (d_state, dq, d_own, dk, dv, dy_i) = count - 1 - step, carry
        from_start, to_end, kept = factors.of(i)
        q, k, v = head.queries(i), head.keys(i), head.values(i)
        d_sums, own = head.d_sums(weights, d_weights[i], dy_i, i)
        near, dk_i, dv_i, d_near = tiles.within_backward(q, k, v, head.decay[i], head.runs[i], d_sums)
        q, k = (x.astype(d_state.dtype) for x in (q, k))
        (far,) = jax.vjp(expand, k)[1](dot(to_end * v, d_state, 1, 1))
        dk_i += far
        dv_i += to_end * dot(expand(k), d_state, 1, 0)[:, :-1] + own
        d_own = d_own.at[i].add(d_near - row_dots(k, far))
        d_state = kept * d_state + dot(expand(q), from_start * d_sums, 0, 0)
        dq, dk = head.add(dq, head.d_queries(near, i), i), head.put(dk, head.d_keys(dk_i, i), i)
        # The next tile of dy is read after this one of dv is written: XLA would copy an array whose reads and writes
        # in an iteration are in no fixed order.
        dv = head.put(dv, dv_i, i)
        return d_state, dq, d_own, dk, dv, head.cut(dv, jnp.maximum(i - 1, 0))

    d_weights = jnp.zeros((*d_own.shape, 1), d_own.dtype)
    final, dq, d_own, d_weights = jax.lax.fori_loop(0, count, chunk, (state, dq, d_own, d_weights))
    carry = d_state, dq, d_own, dk, dy, head.cut(dy, count - 1)
    d_state, *grads, _ = jax.lax.fori_loop(0, count, chunk_backward, carry)
    return tuple(grads), final, d_state
