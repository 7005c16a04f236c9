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

from lcx.ops.decay import split
from lcx.ops.running import running, sums_of_tile
from lcx.ops.tiling import add, cut, dot, each_head, put

TILE = 128
SKIP = -30.0  # weights whose decay is below exp(SKIP) = 1e-13 are treated as 0


def tile_size(T: int) -> int:
    return min(TILE, T)


def padded(T: int, arrays) -> tuple:
    """Pads T of [M, T, ...] arrays to whole tiles: with zeros, and run indices with the last index."""
    pad = -T % tile_size(T)

    def fill(x):
        mode = "edge" if jnp.issubdtype(x.dtype, jnp.integer) else "constant"
        return jnp.pad(x, ((0, 0), (0, pad), *((0, 0),) * (x.ndim - 2)), mode=mode)

    return tuple(fill(x) for x in arrays) if pad else tuple(arrays)


@jax.custom_vjp
def tiles(q: Array, k: Array, v: Array, decay: Array, runs: Array) -> Array:
    """q, k [M, T, H], v [M, T, W], decay and runs [M, T] -> sums [M, T, W] float32; T in whole tiles."""
    return _forward(q, k, v, decay, runs)[0]


def _forward(q, k, v, decay, runs):
    return each_head(_head_forward, (q, k, v, decay, runs)), (q, k, v, decay, runs)


def gradients(residuals, d_out):
    return *each_head(_head_backward, (*residuals, d_out)), None


tiles.defvjp(_forward, gradients)


def local(decay: Array, runs: Array, C: int) -> tuple[Array, Array, Array, Array, Array]:
    """Quantities of one head's tiles of C tokens.

    Returns the running sums l [T] within a tile, the totals of whole tiles [T / C], the weights of keys [T] at the end
    of their tile, and each tile's first and last document.
    """
    inside, ids = decay.reshape(-1, C), runs.reshape(-1, C)
    l = sums_of_tile(inside)
    after = sums_of_tile(inside[:, :0:-1])[:, ::-1]  # not a difference of two large sums
    to_end = jnp.exp(jnp.pad(after, ((0, 0), (0, 1)))) * (ids == ids[:, -1:])
    return l.reshape(-1), l[:, -1], to_end.reshape(-1), ids[:, 0], ids[:, -1]


def within(q: Array, k: Array, rate: Array, runs: Array) -> tuple[Array, Array]:
    """Scores and decays [C, C] of a tile on the diagonal; the decay is 0 where a query does not see a key."""
    order = jnp.arange(len(rate))
    seen = (order[:, None] >= order) & (runs[:, None] == runs)
    return dot(q, k, 1, 1), jnp.where(seen, jnp.exp(jnp.where(seen, _gaps(rate), 0)), 0)


def _gaps(rate: Array) -> Array:
    """L_i - L_j [C, C] of one tile."""
    l = sums_of_tile(split(rate, len(rate)))
    return jnp.sum(l[:, :, None] - l[:, None, :], axis=0)


def _earlier(i, total: Array, first: Array, last: Array, tile, carry):
    """carry = tile(j, gap, carry) for the tiles j before i, nearest first, until all others are negligible."""

    def matters(state):
        j, gap, _ = state
        return (j >= 0) & (gap >= SKIP) & (last[j] >= first[i])

    def step(state):
        j, gap, carry = state
        return j - 1, gap + total[j], tile(j, gap, carry)

    start = i - 1, jnp.zeros((), total.dtype), carry
    return jax.lax.while_loop(matters, step, start)[2]


def _head_forward(q, k, v, decay, runs):
    T, C = len(q), tile_size(len(q))
    l, total, to_end, first, last = local(decay, runs, C)
    to_end = to_end[:, None]

    def row(i, out):
        at = i * C
        q_i, l_i, runs_i = cut(q, at, C), cut(l, at, C), cut(runs, at, C)
        s, near = within(q_i, cut(k, at, C), cut(decay, at, C), runs_i)

        def tile(j, gap, far):
            s, v_j = dot(q_i, cut(k, j * C, C), 1, 1), cut(v, j * C, C) * cut(to_end, j * C, C)
            return far + jnp.exp(gap) * dot((s * s).astype(v.dtype), v_j.astype(v.dtype), 1, 0)

        far = _earlier(i, total, first, last, tile, jnp.zeros((C, v.shape[1]), out.dtype))
        from_start = jnp.exp(l_i) * (runs_i == first[i])
        sums = dot((s * s * near).astype(v.dtype), cut(v, at, C), 1, 0) + far * from_start[:, None]
        return put(out, sums, at)

    return jax.lax.fori_loop(0, T // C, row, jnp.zeros(v.shape, decay.dtype))


def _head_backward(q, k, v, decay, runs, d_out):
    T, C = len(q), tile_size(len(q))
    l, total, to_end, first, last = local(decay, runs, C)
    to_end = to_end[:, None]

    def row(i, carry):
        dq, dk, dv = carry
        at = i * C
        q_i, l_i, runs_i, d_i = (cut(x, at, C) for x in (q, l, runs, d_out))
        from_start = jnp.exp(l_i) * (runs_i == first[i])
        d_far = d_i * from_start[:, None]
        dq_i, dk_i, dv_i = within_backward(q_i, cut(k, at, C), cut(v, at, C), cut(decay, at, C), runs_i, d_i)

        def tile(j, gap, carry):
            dq_i, dk, dv = carry
            k_j, to_end_j = cut(k, j * C, C), cut(to_end, j * C, C)
            d, dp = _of_values(d_far * jnp.exp(gap), (cut(v, j * C, C) * to_end_j).astype(v.dtype))
            s = dot(q_i, k_j, 1, 1)
            ds = (2 * s * dp).astype(k.dtype)
            dk = add(dk, dot(ds, q_i, 0, 0), j * C)
            dv = add(dv, to_end_j * dot((s * s).astype(v.dtype), d, 0, 0), j * C)
            return dq_i + dot(ds, k_j, 1, 0), dk, dv

        carry = dq_i, put(dk, dk_i, at), put(dv, dv_i, at)
        dq_i, dk, dv = _earlier(i, total, first, last, tile, carry)
        return put(dq, dq_i, at), dk, dv

    like = (jnp.zeros(x.shape, decay.dtype) for x in (q, k, v))
    dq, dk, dv = jax.lax.fori_loop(0, T // C, row, tuple(like))
    return dq.astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype), decay_gradient(q, dq, k, dk)


def _of_values(d_out: Array, v: Array) -> tuple[Array, Array]:
    """d_out in v's dtype, and d_out v^T.

    The last column, which belongs to the normaliser, is not rounded, since the other columns cancel against it.
    """
    d = d_out.astype(v.dtype)
    dp = dot(d, v, 1, 1)
    if d.dtype != d_out.dtype:
        dp += (d_out - d)[:, -1:] * v[:, -1]
    return d, dp


def within_backward(q, k, v, rate, runs, d_out) -> tuple[Array, Array, Array]:
    """Gradients of one tile on the diagonal, float32."""
    s, near = within(q, k, rate, runs)
    d, dp = _of_values(d_out, v)
    ds = (2 * s * near * dp).astype(k.dtype)
    return dot(ds, k, 1, 0), dot(ds, q, 0, 0), dot((s * s * near).astype(v.dtype), d, 0, 0)


def decay_gradient(q, dq, k, dk) -> Array:
    """The gradient of log_decay [T], from float32 gradients of q and k.

    For a normalised output q . dq is 0 in exact arithmetic, but leaving it out would accumulate rounding errors along
    the row: both terms come from the same rounded scores, so contributions from one side of a token cancel.
    """
    d_sum = 0.5 * jnp.sum(q * dq - k * dk, axis=-1)
    return running(jnp.add, d_sum[::-1], 0, axis=0)[::-1]
