"""Second-order attention over rows in either form, forward and backward: what both forms share.

Every array of T tokens is made once. The backward pass writes two of its three results over what it has just read for
the last time: those for queries over y, those for values over the gradient of y. So beside its inputs, results and
residuals it takes the same memory for any T, and few passes over it: rows that no longer fit the cache cost more per
token with each.

Where the data decides between the forms, each is the body of a loop that runs once or not at all: a branch would copy
the arrays that it overwrites.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float

from lcx.ops import MIXER_RESIDUALS
from lcx.ops import second_order_states as states
from lcx.ops import second_order_tiles as tiles
from lcx.ops.second_order_expand import expanded_size
from lcx.ops.second_order_rows import Head, Outputs, Rows, each_head


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def attend(
    form: str, rows: Rows, state: Float[Array, "B N P W"] | None, short: Bool[Array, ""] | None
) -> tuple[Outputs, Any]:
    """(what `Rows` describes, in the decay's dtype; the state after the rows [B, N, P, W], W = H + 1, or None).

    Args:
      form: "tiles", "states", or "either": tiles if `short`.
      state: the state before the rows, or None: then none is returned.
    """
    return _outputs(form, rows, state, short)


def _outputs(form: str, rows: Rows, state, short):
    def of_head(head: Head, _, of_head, outputs):
        def by_tiles(arrays):
            return tiles.forward(head, *arrays)

        def by_states(arrays):
            before, outputs = arrays
            after, outputs = states.forward(head, _no_state(rows) if before is None else before, outputs)
            return None if before is None else after, outputs

        before = of_head[0] if of_head else None
        return _by(form, short, by_tiles, by_states, (before, outputs))[::-1]

    blank = _blank(rows, rows.v.shape[3], 0), _blank(rows, 1, 1)
    return each_head(of_head, rows, (), () if state is None else (state.astype(rows.decay.dtype),), blank)


def _forward(form: str, rows: Rows, state, short):
    outputs, after = _outputs(form, rows, state, short)
    outputs = checkpoint_name(outputs, MIXER_RESIDUALS)
    return (outputs, after), (rows, state, short, None if rows.alone is None else outputs)


def _backward(form: str, residuals, cotangents):
    (rows, state, short, outputs), (d_outputs, d_after) = residuals, cotangents
    y, weights = (_blank(rows, rows.q.shape[3], 2), d_outputs[1]) if outputs is None else outputs

    def of_head(head: Head, others, of_head, results):
        def by_tiles(arrays):
            of_state, grads = arrays
            grads, *of_state = tiles.backward(head, others[0], of_state, grads)
            return None if arrays[0] is None else tuple(of_state), grads

        def by_states(arrays):
            of_state, grads = arrays
            grads, *after = states.backward(head, others[0], of_state or (_no_state(rows),) * 2, grads)
            return None if of_state is None else tuple(after), grads

        (dq, dk, dv), d_own = results, jnp.zeros_like(head.decay)
        of_state, grads = _by(form, short, by_tiles, by_states, (of_head or None, (dq, d_own, dk, dv)))
        d_total, d_before = jnp.zeros(()), None
        if of_state is not None:
            after, d_before = of_state
            d_total = jnp.sum(of_head[1] * after)  # the final state also decays with every token
        dq, d_own, dk, dv = grads
        d_decay = tiles.decay_gradient(d_own, head.runs, d_total.astype(d_own.dtype))
        return (dq, dk, dv), (d_decay, d_before)

    of_heads = () if state is None else (state.astype(rows.decay.dtype), d_after)
    results = y, _blank(rows, rows.k.shape[3], 3), d_outputs[0]
    grads, (d_decay, d_before) = each_head(of_head, rows, (weights,), of_heads, results)
    dq, dk, dv = (d.astype(x.dtype) for d, x in zip(grads, rows))
    d_rows = Rows(dq, dk, dv, None, None, None, d_decay, None, None)  # type: ignore[arg-type]
    return d_rows, None if state is None else d_before.astype(state.dtype), None


attend.defvjp(_forward, _backward)


def _by(form: str, short, by_tiles, by_states, arrays):
    """The arrays after one of the forms. lcx/planning/flops.py counts one of the two loops of `either_in_place`."""
    if form != "either":
        return {"tiles": by_tiles, "states": by_states}[form](arrays)

    def either_in_place(arrays):
        arrays = jax.lax.fori_loop(0, jnp.where(short, 1, 0), lambda _, arrays: by_tiles(arrays), arrays)
        return jax.lax.fori_loop(0, jnp.where(short, 0, 1), lambda _, arrays: by_states(arrays), arrays)

    return jax.jit(either_in_place)(arrays)


def _no_state(rows: Rows) -> Float[Array, "P W"]:
    return jnp.zeros((expanded_size(rows.k.shape[3]), rows.v.shape[3] + 1), rows.decay.dtype)


def _blank(rows: Rows, width: int, place: int) -> Float[Array, "B T N W"]:
    """A result of which every entry will be written before it is read.

    Results with different places hold different numbers: XLA would make equal constants once and copy them.
    """
    return jnp.full((*rows.q.shape[:3], width), place, rows.decay.dtype)
