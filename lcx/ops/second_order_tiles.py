"""Second-order attention in tiles: quadratic time, with only 128 x 128 weights in memory at a time.

A tile below the diagonal needs no exp and no mask. With l the decay summed from a token's own tile's start, total_j
that of the whole tile j, and gap_ij that of the tiles strictly between i and j,

    exp(L_i - L_j) = exp(l_i) * exp(gap_ij) * exp(total_j - l_j),   every factor at most 1,

so the first factor scales the finished row, the last one scales the values once, and the middle one is a scalar per
tile. All sums are local: a prefix sum over the whole row would lose every digit of a small difference at T = 2^20.
Documents separate in the same way: a query and a key in different tiles share a document exactly if the key is in the
last document of its tile, the query is in the first document of its tile, and these are the same document.

Tiles whose largest decay is below exp(SKIP), or that hold only earlier documents, are skipped. In the units of
second_order_units.py a decay compares a key with the heaviest key that the query sees. So the weight of what is skipped
is at most exp(SKIP) |q|^2 |k|^2 of that key, comparable to the rounding error of its score. After keys that are all 0
nothing is skipped.

Backward (the normaliser is a column of ones appended to the values, so dP = (dy . v - D) / den of FlashAttention-2,
arXiv 2307.08691, follows from the chain rule): dP = dO V^T, dA = 2 A W dP, dq = dA k, dk = dA^T q, dv = (A^2 W)^T dO.
The decay's gradient is nearly free: dL_i = (q_i . dq_i - k_i . dk_i) / 2, since weights are quadratic in q and in k.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array

from lcx.ops import second_order_ends as row_ends
from lcx.ops.decay import split
from lcx.ops.running import later_sums, sums_of_tile
from lcx.ops.second_order_ends import SKIP
from lcx.ops.second_order_rows import Head, Outputs
from lcx.ops.tiling import dot, row_dots


def local(decay: Array, runs: Array) -> tuple[Array, Array, Array, Array, Array]:
    """Quantities of one head's tiles, from decay and runs [n, C].

    Returns the running sums l [n, C] within a tile, the totals of whole tiles [n], the weights of keys [n, C] at the
    end of their tile, and each tile's first and last document.
    """
    l = sums_of_tile(decay)
    after = sums_of_tile(decay[:, :0:-1])[:, ::-1]  # not a difference of two large sums
    to_end = jnp.exp(jnp.pad(after, ((0, 0), (0, 1)))) * (runs == runs[:, -1:])
    return l, l[:, -1], to_end, runs[:, 0], runs[:, -1]


def within(q: Array, k: Array, rate: Array, runs: Array) -> tuple[Array, Array]:
    """Scores and decays [C, C] of a tile on the diagonal; the decay is 0 where a query does not see a key."""
    order = jnp.arange(len(rate))
    seen = (order[:, None] >= order) & (runs[:, None] == runs)
    gaps = _gaps(rate, seen)
    return dot(q, k, 1, 1), jnp.where(seen, jnp.exp(jnp.where(seen, gaps, 0)), 0)


def _gaps(rate: Array, seen: Array) -> Array:
    """L_i - L_j [C, C] of one tile, L summed from the start of the tile or of the document."""
    l = jnp.matmul(split(rate, len(rate)), seen.astype(rate.dtype).T, precision=jax.lax.Precision.HIGHEST)
    return jnp.sum(l[:, :, None] - l[:, None, :], axis=0)


def _earlier(head: Head, i, total: Array, first: Array, last: Array, tile, carry):
    """carry = tile(j, gap, carry) for the tiles j before i, nearest first, until all others are negligible.

    Of heads that are computed at once, those that are done earlier get a gap of -inf.
    """

    def matters(j, gap):
        return (gap >= SKIP) & (last[j] >= first[i])

    def goes_on(state):
        return (state[0] >= 0) & head.in_any(matters(*state[:2]))

    def step(state):
        j, gap, carry = state
        gap = jnp.where(matters(j, gap), gap, -jnp.inf)
        return j - 1, gap + total[j], tile(j, gap, carry)

    start = i - 1, jnp.zeros((), total.dtype), carry
    return jax.lax.while_loop(goes_on, step, start)[2]


def forward(head: Head, state: Array | None, outputs: Outputs) -> tuple[Array | None, Outputs]:
    """Writes the outputs of a head, given the state before the row; returns that after it, None for None."""
    l, total, to_end, first, last = local(head.decay, head.runs)
    earlier, ends = head.earlier(), row_ends.ends(total, first, last)

    def row(i, outputs):
        q_i, k_i, v_i, runs_i = head.queries(i), head.keys(i), head.values(i), head.runs[i]
        s, near = within(q_i, k_i, head.decay[i], runs_i)

        def tile(j, gap, far):
            s, v_j = dot(q_i, earlier.keys(j), 1, 1), earlier.values(j)
            v_j = (v_j * to_end[j][:, None]).astype(v_j.dtype)
            return far + jnp.exp(gap) * dot((s * s).astype(v_j.dtype), v_j, 1, 0)

        far = _earlier(head, i, total, first, last, tile, jnp.zeros(v_i.shape, outputs[0].dtype))
        if state is not None:
            far = row_ends.seen(head, ends.before[i], q_i, state, far)
        from_start = jnp.exp(l[i]) * (runs_i == first[i])
        part = dot((s * s * near).astype(v_i.dtype), v_i, 1, 0) + far * from_start[:, None]
        return head.put_outputs(outputs, part, q_i, k_i, i)

    outputs = jax.lax.fori_loop(0, len(total), row, outputs)
    return None if state is None else row_ends.leave(ends, head, to_end, state), outputs


def backward(head: Head, weights: Array, of_state: tuple[Array, Array] | None, grads: tuple) -> tuple:
    """Writes the gradients of a head: dq, d_own [n, C] (see decay_gradient), dk, dv.

    Before, dq holds y and dv the gradient of y, which are read for tile i before it is written.

    Args:
      of_state: the state before the row, and the gradient of that after it; or None.

    Returns:
      The gradients, the state after the row, and the gradient of that before it.
    """
    l, total, to_end, first, last = local(head.decay, head.runs)
    earlier, ends = head.earlier(), row_ends.ends(total, first, last)

    def row(i, carry):
        (dq, d_own, dk, dv), d_state = carry
        # Read once, since it is then overwritten: XLA would copy an array of which several operations read the tile.
        q_i, k_i, dy_i = head.queries(i), head.keys(i), jax.lax.optimization_barrier(head.cut(dv, i))
        d_i, own = head.d_sums(weights, head.d_weights(dq, weights, dy_i, i), dy_i, i)
        d_far = d_i * (jnp.exp(l[i]) * (head.runs[i] == first[i]))[:, None]
        near, dk_i, dv_i, d_near = within_backward(q_i, k_i, head.values(i), head.decay[i], head.runs[i], d_i)

        def tile(j, gap, carry):
            dq_i, d_own, dk, dv = carry
            k_j, v_j, to_end_j = earlier.keys(j), earlier.values(j), to_end[j][:, None]
            d, dp = _of_values(d_far * jnp.exp(gap), (v_j * to_end_j).astype(v_j.dtype))
            s = dot(q_i, k_j, 1, 1)
            ds = (2 * s * dp).astype(k_j.dtype)
            dk_j = dot(ds, q_i, 0, 0)
            d_own = d_own.at[j].add(-row_dots(k_j, dk_j))
            dk = earlier.add(dk, earlier.d_keys(dk_j, j), j)
            dv = earlier.add(dv, to_end_j * dot((s * s).astype(v_j.dtype), d, 0, 0)[:, :-1], j)
            return dq_i + dot(ds, k_j, 1, 0), d_own, dk, dv

        d_own, dk = d_own.at[i].set(d_near), head.put(dk, head.d_keys(dk_i, i), i)
        carry = jnp.zeros_like(near), d_own, dk, head.put(dv, dv_i + own, i)
        far, d_own, dk, dv = _earlier(head, i, total, first, last, tile, carry)
        if of_state is not None:
            found = q_i, of_state[0], d_far, far, d_state
            far, d_state = row_ends.seen_backward(head, ends.before[i], *found)
        d_own = d_own.at[i].add(row_dots(q_i, far))
        return (head.put(dq, head.d_queries(near + far, i), i), d_own, dk, dv), d_state

    d_state = None if of_state is None else jnp.zeros_like(of_state[0])
    grads, d_state = jax.lax.fori_loop(0, len(total), row, (grads, d_state))
    if of_state is None:
        return grads, None, None
    before, d_after = of_state
    grads = grads[0], *row_ends.leave_backward(ends, head, to_end, d_after, grads[1:])
    d_before = d_state + jnp.exp(ends.whole) * d_after
    return grads, row_ends.leave(ends, head, to_end, before), d_before


def _of_values(d_out: Array, v: Array) -> tuple[Array, Array]:
    """d_out in v's dtype, and d_out v^T.

    The last column, which belongs to the normaliser, is not rounded, since the other columns cancel against it.
    """
    d = d_out.astype(v.dtype)
    dp = dot(d, v, 1, 1)
    if d.dtype != d_out.dtype:
        dp += (d_out - d)[:, -1:] * v[:, -1]
    return d, dp


def within_backward(q, k, v, rate, runs, d_out) -> tuple[Array, Array, Array, Array]:
    """Gradients of one tile on the diagonal, float32: dq, dk, dv without the column of ones, and q . dq - k . dk.

    The last without what a token adds to itself, which is in both terms, and can be most of either.
    """
    s, near = within(q, k, rate, runs)
    d, dp = _of_values(d_out, v)
    ds = (2 * s * near * dp).astype(k.dtype)
    others = jnp.where(jnp.eye(len(s), dtype=bool), 0, ds * s)
    own = jnp.sum(others, axis=1) - jnp.sum(others, axis=0)
    return dot(ds, k, 1, 0), dot(ds, q, 0, 0), dot((s * s * near).astype(v.dtype), d, 0, 0)[:, :-1], own


def decay_gradient(d_own: Array, runs: Array, at_end: Array) -> Array:
    """The gradient of log_decay [n, C], from each token's q . dq - k . dk, in float32.

    Each token's is the sum over the later ones of its document, and in the last document `at_end`, for the state after
    the row. Other documents are left out: their terms add up to 0, but only up to rounding. For a normalised output
    q . dq is 0 in exact arithmetic, but leaving it out would accumulate rounding errors along the row: both terms come
    from the same rounded scores, so contributions from one side of a token cancel.

    The decay before the first token of a document acts on nothing, so its sum would be 0 (but for the document of the
    state, 0). What it is instead has accumulated over the document, and is subtracted in proportion to the distance:
    a parameter of all tokens (A_log) would add up such errors, which have one sign along a row.
    """
    run, place = runs.reshape(-1), jnp.arange(runs.size)
    sums = later_sums(0.5 * d_own.reshape(-1), run) + jnp.where(run == run[-1], at_end, 0)
    first, last = (jnp.diff(run, **edge) != 0 for edge in ({"prepend": -1}, {"append": -1}))
    begin = jax.lax.cummax(jnp.where(first, place, 0))
    end = jax.lax.cummin(jnp.where(last, place, runs.size), reverse=True) + 1
    missed = jnp.where(run == 0, 0, sums[begin])
    return (sums - missed * ((end - place) / (end - begin))).reshape(d_own.shape)
