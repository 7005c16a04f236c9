"""Decays between tokens and divisions by sums of weights, without the differences and squares that lose everything.

A decay e^(L_i - L_j), L the running sum of log decays, is 0 in float32 from L_i - L_j = GONE down. So a log decay below
GONE (a hard reset is -inf) counts as GONE wherever weights are absolute; its own gradient is 0, as in the limit.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

GONE = -104.0  # e^GONE rounds to 0, below the smallest subnormal number of float32


def gaps(log_decay: Float[Array, "*batch S"], place: Int[Array, "... T"]) -> Float[Array, "*batch T S"]:
    """L_i - L_j for queries i that stand at `place` among the keys j, 0 where j is not before i.

    Every entry is a sum of its own: the difference of two sums over the row would lose the digits of a small one behind
    a large log decay, and be no number behind -inf. Quadratic in memory: for references.
    """
    past = jnp.arange(log_decay.shape[-1]) <= place[..., None]
    rates = jnp.where(past, log_decay[..., None, :], 0)
    after = jax.lax.cumsum(rates[..., 1:], axis=rates.ndim - 1, reverse=True)
    return jnp.pad(after, (*((0, 0),) * (rates.ndim - 1), (0, 1)))


def split(log_decay: Float[Array, "*shape"], length: int, lowest: float = GONE) -> Float[Array, "2 *shape"]:
    """Two parts that add up to the log decay, for sums over `length` tokens whose differences are wanted.

    The first are multiples of a power of 2, so coarse that sums of `length` of them, none below `lowest`, are exact in
    float32, and with them the difference of two large sums. Sums of the second are small, and round at their own size.
    """
    unit = unit_of(length, lowest)
    coarse = jnp.round(log_decay / unit) * unit
    return jnp.stack([coarse, log_decay - coarse])


def unit_of(length: int, lowest: float) -> float:
    """The power of 2 of which `length` multiples, none below `lowest`, have an exact sum in float32."""
    return 2.0 ** ((int(-lowest) * length).bit_length() - 24)


@jax.custom_jvp
def divided(sums: Float[Array, "*batch W"], total: Float[Array, "*batch 1"]) -> Float[Array, "*batch W"]:
    """sums / total, 0 where the total is 0.

    The derivative by the total is -y / total here; the usual -sums / total^2 is infinite or not a number from
    total = 1e-19 down, where the square is 0.
    """
    return jnp.where(total == 0, 0, sums / jnp.where(total == 0, 1, total))


@divided.defjvp
def _divided_jvp(primals, tangents):
    sums, total = primals
    y = divided(sums, total)
    return y, divided(tangents[0] - y * tangents[1], total)
