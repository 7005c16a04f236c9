"""Second-order attention by tiles or by states, chosen at run time: one program holds both kernels and runs one.

Both forms save the same residuals (y in float32 and the sums of the weights), so the branches can share them.
"""

import functools

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int

from kernels_pallas import second_order_attention as tiles_form
from kernels_pallas import second_order_states as states_form
from kernels_pallas.second_order_states_plan import planned
from kernels_pallas.tiles import RESIDUALS, padded, square


def second_order_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    *,
    short_reach: Bool[Array, ""],
    log_decay: Float[Array, "B T N"] | None = None,
    runs: Int[Array, "B T"] | None = None,
    normalize: bool = True,
    scale: float,
    platform: str,
    interpret: bool = False,
) -> Float[Array, "B T N H"]:
    """y by `second_order_attention.py` if short_reach is true, otherwise by `second_order_states.py`."""
    T, H = q.shape[1], q.shape[3]
    plan = planned(T, H, q.dtype, normalize, scale, platform, interpret)
    arrays = padded(q, k, v, log_decay, runs, square(plan.sizes.chunk))
    return _attention(short_reach, *arrays, plan)[:, :T]


@functools.partial(jax.custom_vjp, nondiff_argnums=(6,))
def _attention(short, q, k, v, log_decay, runs, plan):
    return _forward(short, (q, k, v, log_decay, runs), plan, q.dtype)[0]


def _forward(short, arrays, plan, dtype):
    options = plan.options._replace(raw=False)

    def by_tiles(q, k, v, log_decay, runs):
        return tiles_form._forward(q, k, v, log_decay, runs, options, dtype)

    def by_states(q, k, v, log_decay, runs):
        return states_form._forward(q, k, v, log_decay, runs, None, plan, dtype)[:2]

    return jax.lax.cond(short, by_tiles, by_states, *arrays)


def _forward_saving(short, q, k, v, log_decay, runs, plan):
    arrays = q, k, v, log_decay, runs
    y, den = (checkpoint_name(x, RESIDUALS) for x in _forward(short, arrays, plan, jnp.float32))
    return y.astype(q.dtype), (short, *arrays, y, den)


def _backward(plan, residuals, dy):
    short, *arrays, y, den = residuals
    options = plan.options._replace(raw=False)

    def by_tiles(dy, y, den, *arrays):
        return tiles_form._backward(options, (*arrays, y, den), dy)[:4]

    def by_states(dy, y, den, *arrays):
        return states_form._backward(plan, (*arrays, None, y, den), (dy, (None, None)))[:4]

    return None, *jax.lax.cond(short, by_tiles, by_states, dy, y, den, *arrays), None


_attention.defvjp(_forward_saving, _backward)
