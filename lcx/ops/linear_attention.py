"""Linear attention with an optional scalar decay per head (Mamba-2's SSD), in time and memory linear in T.

    S_t = e^{a_t} S_{t-1} + k_t v_t^T      y_t = q_t S_t      with normalize: y_t = q_t S_t / (q_t z_t + eps)
    z_t = e^{a_t} z_{t-1} + k_t

Letters: B batch, T time, N heads, P features of q and k, H head dim of v, C chunk. q, k, v and log_decay may each have
fewer heads than N: consecutive heads then share one (grouped values, Mamba-2's groups of B and C).

``reference``  the recurrence written as a sum over j <= i, quadratic; in float64 for float64 inputs.
``triton``, ``mosaic``, ``tpu``  the kernels of kernels_pallas/linear_attention.py; with a window (not ``mosaic``)
               windowed_linear_attention.py.
``xla``        C tokens at a time. Inside a chunk the quadratic form, W_ij = (q_i.k_j) e^{g_i - g_j} with g the running
               sum of a *within the chunk*, so that no exponent is ever positive and none is a difference of large
               sums; between chunks the state, in float32 (Yang et al. 2023, arXiv 2312.06635, section 3; Dao & Gu 2024,
               arXiv 2405.21060, section 6). The backward pass stores no states: it recomputes the states at chunk
               boundaries from k and v, then propagates their cotangents backwards.

The decay's gradient: with R_i and K_j the row and column sums of the weights times their gradients, those of the state
included, da_t = sum_{i >= t} (R_i - K_i) to the end of the chunk + <dS, S> at its end. A sum over the whole sequence
would cancel to rounding noise. So would sums with the weights of a token on itself, which have no decay: R_i = dy_i.y_i
and K_j = v_j.dv_j differ from R and K by the same large number, and with a strong decay by little else.

Segments: see ops/segments.py. `window` adds LoLCATS's softmax over the nearest keys: ops/windowed_linear_attention.py.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from lcx.errors import UserError
from lcx.ops import MIXER_RESIDUALS, dispatch, linear_shards, segments
from lcx.ops import windowed_linear_attention as windowed
from lcx.ops.decay import GONE, divided, gaps
from lcx.ops.linear_chunks import (
    chunk_weights,
    decay_gradient,
    dot,
    grouped,
    next_state,
    nonzero,
    states_before,
    ungrouped,
)
from lcx.ops.linear_state import KINDS, Held, LinearState, Window, empty_state, starts
from lcx.ops.tiling import row_dots

__all__ = ["KINDS", "Held", "LinearState", "Window", "empty_state", "linear_attention"]

CHUNK = (
    64  # measured on a CPU at T = 4K and 16K, P = H = 64: 516 and 808 ns a token and head, 128: 635 and 913
)
PLATFORMS = {"triton": "gpu", "mosaic": "mosaic", "tpu": "tpu"}  # the kernels


def linear_attention(
    q: Float[Array, "B T Nq P"],
    k: Float[Array, "B T Nk P"],
    v: Float[Array, "B T Nv H"],
    *,
    log_decay: Float[Array, "B T Na"] | None = None,
    normalize: bool = False,
    eps: float = 1e-12,
    window: Window | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
    initial_state: LinearState | None = None,
    chunk_size: int | None = None,
    implementation: str | None = None,
    mesh_axis: str | None = None,
) -> tuple[Float[Array, "B T N H"], LinearState]:
    """(y [B, T, N, H] in v's dtype, the state after the last token). The caller applies feature maps.

    Args:
      log_decay: a_t <= 0.
      normalize: divide by q z + eps; with a window the output is always normalised.
      implementation: "triton", "mosaic", "tpu", "xla", "reference", or None for the fastest that runs here.
      mesh_axis: in a shard_map over this axis, the arguments are this device's part of the rows (shards.py), and
        initial_state is the state before the rows. linear_shards.py counts what is sent.

    Raises:
      UserError: numbers of heads that do not divide each other, a decay with a window, an unknown kind of window or
        implementation.
    """
    arrays = [q, k, v, *([] if log_decay is None else [log_decay]), *([] if window is None else [window.q])]
    N = max(x.shape[2] for x in arrays)
    if any(N % x.shape[2] for x in arrays):
        heads = ", ".join(str(x.shape[2]) for x in arrays)
        raise UserError(
            f"linear attention over {heads} heads: expected divisors of the largest; change the heads"
        )
    obstacles = {**_kernel_obstacles(q, k, v, window), "xla": None, "reference": None}
    form = dispatch.choose("linear_attention", implementation, obstacles)
    if mesh_axis is not None:
        around: dict[str, Any] = {"heads": N, "mesh_axis": mesh_axis}
        if window is not None:
            initial_state = linear_shards.windowed_state_before(
                k, v, window, segment_ids, initial_state, **around
            )
        else:
            initial_state = linear_shards.state_before(
                k, v, log_decay, segment_ids, initial_state, normalize=normalize, **around
            )
    if segment_ids is None and initial_state is not None:
        segment_ids = jnp.ones(q.shape[:2], jnp.int32)
    options: dict[str, Any] = {"eps": eps, "segment_ids": segment_ids, "initial_state": initial_state}
    if form == "xla":
        options["chunk_size"] = chunk_size
    if form in PLATFORMS:
        options["platform"] = PLATFORMS[form]
    if window is None:
        run = {"reference": reference, "xla": xla}.get(form, kernel)
        return run(q, k, v, log_decay, normalize=normalize, **options)
    if log_decay is not None:
        raise UserError("linear attention with both a window and a log_decay: expected one of them")
    if window.kind not in KINDS:
        raise UserError(f"window kind {window.kind!r}: expected one of {', '.join(KINDS)}")
    attend = {"reference": windowed.reference, "xla": windowed.xla}.get(form, windowed.kernel)
    return attend(q, k, v, window, **options)


def _kernel_obstacles(q: Array, k: Array, v: Array, window: Window | None) -> dict[str, str | None]:
    def of(platform: str) -> str | None:
        if missing := dispatch.kernels(platform):
            return missing
        if q.shape[1] == 1:
            return "one token: the kernel would compute a whole chunk"
        if window is not None and platform == "mosaic":
            return "no kernel with a window; expected 'triton' or 'xla'"
        if window is not None:
            return windowed.obstacle(q, k, v, window, platform=platform)
        from kernels_pallas.linear_attention import obstacle

        return obstacle(q, k, v, platform=platform)

    return {name: of(platform) for name, platform in PLATFORMS.items()}


def kernel(
    q, k, v, log_decay, *, normalize, eps, segment_ids, initial_state, platform
) -> tuple[Array, LinearState]:
    """The Pallas kernel, which identifies documents by their index in the row; padding gets k = 0 and a = 0."""
    from kernels_pallas.linear_attention import linear_attention as run

    real = runs = before = None
    if segment_ids is not None:
        before = None if initial_state is None else initial_state.segment_ids
        real, runs = (segment_ids != 0)[..., None], segments.runs(segment_ids, before)
        k = jnp.where(real[..., None], k, 0)
        log_decay = None if log_decay is None else jnp.where(real, log_decay, 0)
    state = None if initial_state is None else initial_state[:2]
    options = {"normalize": normalize, "eps": eps, "runs": runs, "initial_state": state}
    y, (kv, k_sum) = run(q, k, v, log_decay=log_decay, platform=platform, **options)
    if real is None:
        return y, LinearState(kv, k_sum, jnp.ones(y.shape[:1], jnp.int32))
    return jnp.where(real[..., None], y, 0), LinearState(kv, k_sum, segments.last(segment_ids, before))


# ------------------------------------------------------------------------------------------------------- reference


def _prepare(q, k, v, log_decay, segment_ids, initial_state):
    """Inputs in float32 or wider with heads repeated and padding neutralised; the state, its document, the starts."""
    B, T, _, P = q.shape
    N, H = max(x.shape[2] for x in (q, k, v) + (() if log_decay is None else (log_decay,))), v.shape[3]
    wide = jnp.promote_types(q.dtype, jnp.float32)
    a = jnp.zeros((B, T, 1), wide) if log_decay is None else log_decay
    q, k, v, a = (jnp.repeat(x.astype(wide), N // x.shape[2], axis=2) for x in (q, k, v, a))
    ids = jnp.ones((B, T), jnp.int32) if segment_ids is None else segment_ids
    real = ids != 0
    k, a = jnp.where(real[..., None, None], k, 0), jnp.where(real[..., None], a, 0)
    if initial_state is None:
        kv, z, before = jnp.zeros((B, N, P, H), wide), jnp.zeros((B, N, P), wide), jnp.zeros((B,), jnp.int32)
    else:
        kv, z, before = initial_state[:3]
    z = jnp.zeros((B, N, P), wide) if z is None else z
    return q, k, v, a, kv.astype(wide), z.astype(wide), ids, before


def reference(q, k, v, log_decay, *, normalize, eps, segment_ids, initial_state) -> tuple[Array, LinearState]:
    """The definition: all pairs at once."""
    dtype, has_sum = v.dtype, normalize
    q, k, v, a, kv, z, ids, before = _prepare(q, k, v, log_decay, segment_ids, initial_state)
    T, first = q.shape[1], starts(ids, before)
    place = jnp.arange(T)
    seen = (place <= place[:, None]) & (place >= first[..., None])  # [B, T, S]
    a = a.swapaxes(1, 2)
    decay = jnp.exp(jnp.where(seen[:, None], gaps(a, place), -jnp.inf))
    into = jnp.where((first < 0)[:, None], jnp.exp(jnp.cumsum(a, axis=2)), 0)
    weights = jnp.einsum("btnp,bsnp->bnts", q, k) * decay
    y = jnp.einsum("bnts,bsnh->btnh", weights, v) + jnp.einsum("bnt,btnp,bnph->btnh", into, q, kv)
    if normalize:
        norm = jnp.sum(weights, axis=-1) + jnp.einsum("bnt,btnp,bnp->bnt", into, q, z)
        y = divided(y, (norm + eps).swapaxes(1, 2)[..., None])
    y = jnp.where((ids != 0)[..., None, None], y, 0)
    out, carry = decay[:, :, -1], into[:, :, -1]
    kv = carry[..., None, None] * kv + jnp.einsum("bns,bsnp,bsnh->bnph", out, k, v)
    z = carry[..., None] * z + jnp.einsum("bns,bsnp->bnp", out, k)
    return y.astype(dtype), LinearState(kv, z if has_sum else None, segments.last(ids, before))


# --------------------------------------------------------------------------------------------------- chunk by chunk


def xla(
    q, k, v, log_decay, *, normalize, eps, segment_ids, initial_state, chunk_size=None
) -> tuple[Array, LinearState]:
    """Chunk by chunk, all rows and heads of a chunk together."""
    B, T, _, P = q.shape
    a, H, dtype = log_decay, v.shape[3], v.dtype
    N = max(x.shape[2] for x in (q, k, v) + (() if a is None else (a,)))
    if a is not None:  # the decay's gradient needs dv for each head
        a = jnp.maximum(a.astype(jnp.float32), GONE)
        a, v = (jnp.repeat(x, N // x.shape[2], axis=2) for x in (a, v))
    C = min(chunk_size or CHUNK, T)
    first = before = None
    if segment_ids is not None:
        before = None if initial_state is None else initial_state.segment_ids
        real = (segment_ids != 0)[..., None]
        k = jnp.where(real[..., None], k, 0)
        a = None if a is None else jnp.where(real, a, 0)
        first = starts(segment_ids, before) - jnp.arange(T) // C * C  # counted from the chunk's own start
        first = jnp.pad(first, ((0, 0), (0, -T % C)), mode="edge").reshape(B, -1, C).swapaxes(0, 1)
    q, k, v, a = grouped([q, k, v, a], C)
    R = N // q.shape[2]
    state = (jnp.zeros((B, N, P, H), jnp.float32), jnp.zeros((B, N, P), jnp.float32) if normalize else None)
    state = state if initial_state is None else (initial_state.kv, initial_state.k_sum if normalize else None)
    state = jax.tree.map(lambda x: x.reshape(B, N // R, R, *x.shape[2:]), state)
    y, state = _chunks(q, k, v, a, first, state, normalize, eps)
    kv, k_sum = jax.tree.map(lambda x: x.reshape(B, N, *x.shape[3:]), state)
    y = ungrouped(y, T)
    if segment_ids is None:
        return y.astype(dtype), LinearState(kv, k_sum, jnp.ones((B,), jnp.int32))
    y = jnp.where(real[..., None], y, 0)
    return y.astype(dtype), LinearState(kv, k_sum, segments.last(segment_ids, before))


@functools.partial(jax.custom_vjp, nondiff_argnums=(6, 7))
def _chunks(q, k, v, a, first, state, normalize: bool, eps: float):
    return _chunks_forward(q, k, v, a, first, state, normalize, eps)[0]


def _chunks_forward(q, k, v, a, first, state, normalize, eps):
    C = q.shape[4]

    def step(state, x):
        q, k, v, a, first = x
        decay, entering, leaving, carried = chunk_weights(a, first, C)
        weights = dot("bgrtp,bgrsp->bgrts", q, k) * decay
        y = dot("bgrts,bgrsh->bgrth", weights.astype(v.dtype), v)
        y += entering[..., None] * dot("bgrtp,bgrph->bgrth", q, state[0])
        norm = None
        if normalize:
            norm = eps + jnp.sum(weights, axis=-1) + entering * dot("bgrtp,bgrp->bgrt", q, state[1])
            y = y / nonzero(norm)[..., None]
        return next_state(k, v, leaving, carried, state), (y.astype(v.dtype), norm)

    last, (y, norm) = jax.lax.scan(step, state, (q, k, v, a, first))
    y, norm = jax.tree.map(lambda x: checkpoint_name(x, MIXER_RESIDUALS), (y, norm))
    return (y, last), (q, k, v, a, first, state, y if normalize else None, norm)


def _chunks_backward(normalize, eps, residuals, cotangents):
    q, k, v, a, first, state, y, norm = residuals
    dy, d_last = cotangents
    before, last = states_before(k, v, a, first, state)
    step = functools.partial(_backward_step, heads=[x.shape[3] for x in (q, k, v)], eps=eps)
    end = d_last, _inner(d_last, last)
    xs = (q, k, v, a, first, before, y, norm, dy)
    (d_state, _), (dq, dk, dv, da) = jax.lax.scan(step, end, xs, reverse=True)
    return dq.astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype), da, None, d_state


def _inner(x, y) -> Array:
    """Sum of x y over all axes but [B, G, r], added up over both parts of a state."""
    parts = [jnp.sum(a * b, axis=range(3, a.ndim)) for a, b in zip(x, y, strict=True) if a is not None]
    return functools.reduce(jnp.add, parts)


def _backward_step(carry, x, *, heads, eps):
    """Gradients of one chunk; the carry is the cotangent of the state at its end, then of the state before it."""
    (d_kv, d_z), inner = carry
    q, k, v, a, first, (kv, z), y, norm, dy = x
    rq, rk, rv = heads
    decay, entering, leaving, carried = chunk_weights(a, first, q.shape[3])
    d_num = dy if norm is None else (dy / nonzero(norm)[..., None]).astype(dy.dtype)
    dw = dot("bgrth,bgrsh->bgrts", d_num, v)
    if norm is not None:  # y = num / norm
        d_norm = -row_dots(d_num.astype(jnp.float32), y.astype(jnp.float32))
        dw += d_norm[..., None]
    weights = dot("bgrtp,bgrsp->bgrts", q, k) * decay
    da_pairs = (dw * decay).astype(q.dtype)
    d_in = (d_num * entering[..., None]).astype(d_num.dtype)
    v_out = (v * leaving[..., None]).astype(v.dtype)
    by_state = dot("bgrth,bgrph->bgrtp", d_in, kv, rq if a is None else None)  # the decay's needs each head's
    dq = dot("bgrts,bgrsp->bgrtp", da_pairs, k, rq) + (by_state if a is None else _summed(by_state, rq))
    dk = dot("bgrts,bgrtp->bgrsp", da_pairs, q, rk) + dot("bgrsh,bgrph->bgrsp", v_out, d_kv, rk)
    dv = dot("bgrts,bgrth->bgrsh", weights.astype(dy.dtype), d_num, rv)
    to_state = leaving[..., None] * dot("bgrsp,bgrph->bgrsh", k, d_kv, rv)
    dv += to_state
    d_kv = carried[..., None] * d_kv + dot("bgrtp,bgrth->bgrph", q, d_in)
    if norm is not None:
        d_in = entering * d_norm
        dq += dot("bgrt,bgrp->bgrtp", d_in, z, rq)
        dk += dot("bgrs,bgrp->bgrsp", leaving, d_z, rk)
    if a is None:
        d_z = d_z if norm is None else carried * d_z + dot("bgrt,bgrtp->bgrp", d_in, q)
        return ((d_kv, d_z), inner), (dq, dk, dv, None)
    terms = _off_diagonal(weights * dw) + row_dots(q, by_state) - row_dots(v, to_state)
    if norm is not None:
        terms += d_in * dot("bgrtp,bgrp->bgrt", q, z) - leaving * dot("bgrsp,bgrp->bgrs", k, d_z)
        d_z = carried * d_z + dot("bgrt,bgrtp->bgrp", d_in, q)
    da = decay_gradient(terms, inner, first, q.shape[3])
    return ((d_kv, d_z), _inner((d_kv, d_z), (kv, z))), (dq, dk, dv, da)


def _summed(x: Array, heads: int) -> Array:
    """The sum over the heads of a group, if they share one."""
    return jnp.sum(x, axis=2, keepdims=True) if heads == 1 else x


def _off_diagonal(x: Array) -> Array:
    """Row sums minus column sums of x [.., C, C], without the diagonal."""
    C = x.shape[-1]
    x = jnp.where(jnp.eye(C, dtype=bool), 0.0, x)
    return jnp.sum(x, axis=-1) - jnp.sum(x, axis=-2)


_chunks.defvjp(_chunks_forward, _chunks_backward)
