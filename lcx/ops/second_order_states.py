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

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from lcx.ops import second_order_tiles as tiles
from lcx.ops.tiling import dot, each_head

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
def states(q: Array, k: Array, v: Array, decay: Array, runs: Array, state: Array) -> tuple[Array, Array]:
    """q, k [M, T, H], v [M, T, W], decay, runs [M, T], state [M, P, W] float32 -> sums [M, T, W] float32, state.

    M counts rows times heads; T is a multiple of the tile size. The state belongs to run 0.
    """
    return _forward(q, k, v, decay, runs, state)[0]


def _forward(*arrays):
    return each_head(_head_forward, arrays), arrays


def gradients(residuals, cotangents):
    dq, dk, dv, d_decay, d_state = each_head(_head_backward, (*residuals, *cotangents))
    return dq, dk, dv, d_decay, None, d_state


states.defvjp(_forward, gradients)


def read(q: Array, k: Array, v: Array, decay: Array, runs: Array, state: Array) -> Array:
    """The contribution of the initial state to the sums of `states`."""
    return states(q, k, jnp.zeros_like(v), decay, runs, state)[0]


def write(q: Array, k: Array, v: Array, decay: Array, runs: Array, state: Array) -> Array:
    """The final state of `states`, without the sums."""
    return states(q, k, v, decay, runs, state)[1]


def _chunks(q, k, v, decay, runs) -> tuple:
    """One head's arrays split into chunks, and three weights for each chunk: of the entering state in each query, of
    each key in the leaving state, and of the entering state in the leaving state."""
    C = tiles.tile_size(len(q))
    l, total, to_end, first, last = tiles.local(decay, runs, C)
    before = jnp.concatenate([jnp.zeros(1, runs.dtype), last[:-1]])
    l, runs, to_end, decay = (x.reshape(-1, C) for x in (l, runs, to_end, decay))
    from_start = jnp.exp(l) * (runs == before[:, None])
    kept = jnp.exp(total) * (last == before)
    q, k, v = (x.reshape(-1, C, x.shape[-1]) for x in (q, k, v))
    return q, k, v, decay, runs, from_start[..., None], to_end[..., None], kept


def _head_forward(q, k, v, decay, runs, state):
    def chunk(state, xs):
        q, k, v, rate, runs, from_start, to_end, kept = xs
        s, near = tiles.within(q, k, rate, runs)
        sums = dot((s * s * near).astype(v.dtype), v, 1, 0)
        q, k = (expand(x.astype(state.dtype)) for x in (q, k))
        sums += from_start * dot(q, state, 1, 0)
        return kept * state + dot(k, to_end * v, 0, 0), sums

    state, sums = jax.lax.scan(chunk, state.astype(decay.dtype), _chunks(q, k, v, decay, runs))
    return sums.reshape(v.shape), state


def _head_backward(q, k, v, decay, runs, state, d_out, d_state):
    xs = (*_chunks(q, k, v, decay, runs), d_out.reshape(-1, tiles.tile_size(len(q)), v.shape[-1]))

    def forward(state, xs):
        q, k, v, _, _, from_start, to_end, kept, d_out = xs
        q, k = (x.astype(state.dtype) for x in (q, k))
        (dq,) = jax.vjp(expand, q)[1](dot(from_start * d_out, state, 1, 1))
        return kept * state + dot(expand(k), to_end * v, 0, 0), dq

    def backward(d_state, xs):
        (q, k, v, rate, runs, from_start, to_end, kept, d_out), dq = xs
        near_q, dk, dv = tiles.within_backward(q, k, v, rate, runs, d_out)
        q, k = (x.astype(d_state.dtype) for x in (q, k))
        (far_k,) = jax.vjp(expand, k)[1](dot(to_end * v, d_state, 1, 1))
        dv += to_end * dot(expand(k), d_state, 1, 0)
        d_state = kept * d_state + dot(expand(q), from_start * d_out, 0, 0)
        return d_state, (near_q + dq, dk + far_k, dv)

    final, dq = jax.lax.scan(forward, state.astype(decay.dtype), xs)
    d_initial, results = jax.lax.scan(backward, d_state, (xs, dq), reverse=True)
    dq, dk, dv = (x.reshape(len(q), -1) for x in results)
    # The final state also decays with every token.
    d_decay = tiles.decay_gradient(q, dq, k, dk) + jnp.sum(d_state * final)
    return dq.astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype), d_decay, d_initial.astype(state.dtype)
