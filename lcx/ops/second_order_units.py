"""Units for second-order attention in which no significant weight underflows in float32.

A squared score of 1e-20 is 0 in float32, and so is a decay of e^-110; yet a normalised output depends on neither alone,
only on how the weights of one query compare. For any integers r_i and m_j,

    (q_i . k_j)^2 e^(L_i - L_j) = 4^(r_i + m_i) (2^-r_i q_i . 2^-m_j k_j)^2 e^(L'_i - L'_j)
    a'_i = a_i + (m_i-1 - m_i) log 4,   L' the running sum of a'

Here 2^r_i is the size of q_i, and 4^m_i that of the heaviest key that i sees, decay included:

    m_i = max(m_i-1 + a_i / log 4, log2 of k_i's largest entry), from -inf on at the start of each document

rounded up, so that keys are at most 1, no sum of a' over a range of tokens exceeds log 4, and a query that sees any
weight sees one of order 1. Where keys have similar sizes, a' is about a; after a token whose key is 0 it is 0. Thus
tiles are negligible if their weights are small relative to the others, not if they are small in absolute terms.
Multiplying by powers of 2 is exact in any dtype. The units have no gradient, since the identity holds for all of them.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from lcx.ops.decay import GONE
from lcx.ops.running import running
from lcx.ops.tiling import by_pieces

LOG4 = 1.3862943611198906
NOTHING = -(2**16)  # the unit while no key has any weight
FURTHEST = 60  # largest shift of a query into a shared key unit, such that its square is still finite


class Units(NamedTuple):
    """The exponents that rescale the inputs, and those that undo it for the results.

    Multiply q by 2^of_q, k by 2^of_k, sums of weights by 4^of_rows, the state before the row by 4^-of_state, and the
    state after it by 4^of_last. log_decay is in the units above.
    """

    of_q: Int[Array, "B T N"]
    of_k: Int[Array, "B T K"]
    log_decay: Float[Array, "B T N"]
    of_rows: Int[Array, "B T N"]
    of_state: Int[Array, "B N"]
    of_last: Int[Array, "B N"]


def units(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    shown: Bool[Array, "B T"],
    log_decay: Float[Array, "B T N"],
    runs: Int[Array, "B T"],
    k_sum: Float[Array, "B N P"],
    *,
    decays: bool = True,
) -> Units:
    """Chooses the units. If query heads share keys, m uses the slowest decay in the group.

    Args:
      shown: keys where it is False count as 0.
      k_sum: k_sum of the state before the row (without scale), which belongs to run 0.
      decays: False keeps log_decay at 0, for kernels that are faster without a decay: keys then have one unit for all
        of T, and queries absorb the difference, up to FURTHEST.
    """
    (B, _, N, _), K = q.shape, k.shape[2]
    begins = jnp.diff(runs, axis=1, prepend=0)[..., None] != 0
    rates = jax.lax.stop_gradient(log_decay).reshape(*q.shape[:2], K, N // K).max(axis=-1)
    before = (exponent(k_sum).reshape(B, K, N // K).max(axis=-1) + 1) // 2
    rates = jnp.where(begins, -jnp.inf, rates / LOG4)
    sizes = by_pieces(_shown_exponent, jax.lax.stop_gradient(k), shown).astype(rates.dtype)
    fall, heaviest = running(_joined, (rates, sizes), (0.0, -jnp.inf), axis=1)
    heaviest = jnp.maximum(heaviest, before[:, None] + fall)
    seen = jnp.maximum(jnp.ceil(heaviest), NOTHING).astype(jnp.int32)  # m, [B, T, K]
    rows = by_pieces(exponent, jax.lax.stop_gradient(q))
    if decays:
        own, of_queries = seen, jnp.zeros_like(rows)
        earlier = jnp.concatenate([before[:, None], seen[:, :-1]], axis=1)
        change = jnp.where(begins, 0, (earlier - seen) * LOG4).astype(log_decay.dtype)
        log_decay = jnp.maximum(log_decay + jnp.repeat(change, N // K, axis=2), GONE)
    else:
        one = jnp.maximum(seen.max(axis=1), before)[:, None]
        own, before = jnp.broadcast_to(one, seen.shape), one[:, 0]
        seen = jnp.maximum(seen, one - FURTHEST)
        of_queries = jnp.repeat(one - seen, N // K, axis=2)
    last = jnp.repeat(own[:, -1], N // K, axis=1)
    return Units(
        of_q=of_queries - rows,
        of_k=-own,
        log_decay=log_decay,
        of_rows=rows + jnp.repeat(seen, N // K, axis=2),
        of_state=jnp.repeat(before, N // K, axis=1),
        of_last=last,
    )


def _shown_exponent(k: Array, shown: Array) -> Array:
    return exponent(jnp.where(shown[..., None, None], k, 0))


def _joined(first, second):
    """Combines (sum of rates, m) of two adjacent ranges of tokens."""
    return first[0] + second[0], jnp.maximum(first[1] + second[0], second[1])


def exponent(x: Float[Array, "*batch H"]) -> Int[Array, "*batch"]:
    """The least integer e with |x| < 2^e along the last axis; NOTHING for zeros, 0 for non-finite values."""
    top = jnp.max(jnp.abs(jax.lax.stop_gradient(x)), axis=-1).astype(jnp.promote_types(x.dtype, jnp.float32))
    power = jnp.where(jnp.isfinite(top), jnp.frexp(top)[1], 0)
    return jnp.where(top == 0, NOTHING, power)


def times_power(x: Array, power: Int[Array, "..."]) -> Array:
    """x 2^power, in two steps so that each factor is a normal number; zeros stay 0."""
    for part in (power // 2, power - power // 2):
        bits = (jnp.clip(part, -126, 127) + 127) << 23
        x = x * jax.lax.bitcast_convert_type(bits, jnp.float32).astype(x.dtype)
    return x
