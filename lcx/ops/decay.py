"""Numerically safe decays between tokens and divisions by sums of weights.

A decay e^(L_i - L_j), L the running sum of log decays, is 0 in float32 for L_i - L_j <= GONE. So wherever weights are
absolute, log decays below GONE (a hard reset is -inf) are clamped to GONE; their gradient is 0, as in the limit.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

GONE = -104.0  # e^GONE rounds to 0, below the smallest subnormal number of float32


def gaps(log_decay: Float[Array, "*batch S"], place: Int[Array, "... T"]) -> Float[Array, "*batch T S"]:
    """L_i - L_j for queries i at index `place` among the keys j; 0 where j is not before i.

    Every entry is summed separately: the difference of two prefix sums would lose the digits of a small value after a
    large log decay, and would be NaN after -inf. Quadratic in memory, so only for references.
    """
    past = jnp.arange(log_decay.shape[-1]) <= place[..., None]
    rates = jnp.where(past, log_decay[..., None, :], 0)
    after = jax.lax.cumsum(rates[..., 1:], axis=rates.ndim - 1, reverse=True)
    return jnp.pad(after, (*((0, 0),) * (rates.ndim - 1), (0, 1)))


def split(log_decay: Float[Array, "*shape"], length: int, lowest: float = GONE) -> Float[Array, "2 *shape"]:
    """Splits log decays into two parts whose prefix sums over `length` tokens can be subtracted without cancellation.

    The first part holds multiples of a power of 2 so coarse that sums of `length` of them, none below `lowest`, are
    exact in float32, and so are differences of such sums. The second part is the small rest, so its sums have small
    rounding errors.
    """
    unit = unit_of(length, lowest)
    coarse = jnp.round(log_decay / unit) * unit
    return jnp.stack([coarse, log_decay - coarse])


def unit_of(length: int, lowest: float) -> float:
    """The power of 2 such that sums of `length` multiples of it, none below `lowest`, are exact in float32."""
    return 2.0 ** ((int(-lowest) * length).bit_length() - 24)


@jax.custom_jvp
def divided(sums: Float[Array, "*batch W"], total: Float[Array, "*batch 1"]) -> Float[Array, "*batch W"]:
    """sums / total, and 0 where the total is 0.

    The derivative with respect to the total is computed as -y / total. The usual -sums / total^2 is infinite or NaN for
    totals below about 1e-19, whose square underflows to 0.
    """
    return jnp.where(total == 0, 0, sums / jnp.where(total == 0, 1, total))


@divided.defjvp
def _divided_jvp(primals, tangents):
    sums, total = primals
    y = divided(sums, total)
    return y, divided(tangents[0] - y * tangents[1], total)
