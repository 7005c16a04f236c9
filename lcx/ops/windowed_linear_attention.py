"""Linear attention with a softmax over the nearest keys: the hybrid of LoLCATS (arXiv 2410.10254, eq. 7).

    e_ij = gamma exp(s_ij - max_j s_ij)    for j in the window of i, s_ij = q_i.k_j / sqrt(H)
    l_ij = phi(q_i).phi(k_j)               for the older j of the document
    y_i  = sum_j (e_ij + l_ij) v_j / (sum_j (e_ij + l_ij) + eps)

The maximum is over the window's keys and is part of the definition: it does not scale the linear part, so it affects
the relative weight of the two parts, and it has a gradient. Features have N heads, the window's keys K.

Slots. Rows are first rearranged: padding at the front, then the held tokens, then the new ones. Every document is then
contiguous, and two indices per token describe all masks: it sees the slots from `oldest` (-1: also the initial linear
state) to its own, and those from `nearest` on by softmax. Padding has no effect, wherever it is.

A chunk of C queries attends to the M C keys that end at the chunk's end, which cover every window; earlier keys are in
the linear state. One pass, with memory and time linear in T: T (M C (2 H + P + H) + 2 P H) multiply-adds per head.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array

from lcx.ops import MIXER_RESIDUALS, segments
from lcx.ops.decay import divided
from lcx.ops.linear_chunks import chunk_weights, dot, grouped, next_state, nonzero, states_before, ungrouped
from lcx.ops.linear_state import Held, LinearState, Window, starts
from lcx.ops.tiling import row_dots

NEG = -1e30
WIDEST = 128  # largest chunk: scores cover C + size keys, so a chunk wider than the window is wasteful


def held_slots(kind: str, size: int) -> int:
    """How many of the newest keys the window of a later token can contain."""
    return 2 * size if kind == "terraced" else size


def empty_held(window_kind: str, size: int, *, k, v, features, batch: int, dtype) -> Held:
    """No held keys yet; k, v and features are given as (heads, size)."""
    slots = held_slots(window_kind, size)
    arrays = (jnp.zeros((batch, slots, *shape), dtype) for shape in (k, v, features))
    return Held(*arrays, length=jnp.zeros((batch,), jnp.int32))


# ---------------------------------------------------------------------------------------------------- arrangement


@dataclasses.dataclass(frozen=True)
class Slots:
    """The rearranged rows: S slots, with the new tokens among the last T."""

    order: Array | None  # [B, S] each slot's index in [held, new]; None: the same order
    back: Array | None  # the inverse permutation
    real: Array  # [B, S] whether the slot holds a token
    oldest: Array  # [B, S] the first slot that a token sees; -1: also the initial state
    nearest: Array  # [B, S] the first slot that it sees by softmax
    length: Array  # [B] tokens of the last document

    @classmethod
    def of(
        cls, window: Window, segment_ids: Array | None, state: LinearState | None, B: int, T: int
    ) -> "Slots":
        ids, order, back = jnp.ones((B, T), jnp.int32) if segment_ids is None else segment_ids, None, None
        before = None
        length = used = jnp.zeros((B,), jnp.int32)
        if state is not None:
            R, before, length = state.held.k.shape[1], state.segment_ids, state.held.length
            used = jnp.minimum(length, R)
            occupied = jnp.arange(R) >= R - used[:, None]
            ids = jnp.concatenate([jnp.where(occupied, before[:, None], 0), ids], axis=1)
        if segment_ids is not None:
            order = jnp.argsort(ids != 0, axis=1, stable=True)
            back = jnp.argsort(order, axis=1)
            ids = jnp.take_along_axis(ids, order, axis=1)
        place, real, oldest = jnp.arange(ids.shape[1]), ids != 0, starts(ids, before)
        # The slot of the document's first held token, and the index of that token in its document.
        first = jnp.where(oldest < 0, jnp.argmax(real, axis=1)[:, None], oldest)
        index = place - first + jnp.where(oldest < 0, (length - used)[:, None], 0)
        reach = index if window.kind == "sliding" else index % window.size + window.size
        nearest = place - jnp.minimum(index, window.size - 1 if window.kind == "sliding" else reach)
        nearest = jnp.where(real, nearest, place + 1)
        length = jnp.where(real[:, -1], index[:, -1] + 1, length)
        return cls(order, back, real, oldest, nearest, length)

    def arrange(self, held: Array | None, new: Array) -> Array:
        """[B, R, ...] and [B, T, ...] -> [B, S, ...]; slots without a token are 0."""
        S = self.real.shape[1]
        missing = jnp.zeros((new.shape[0], S - new.shape[1], *new.shape[2:]), new.dtype)
        x = jnp.concatenate([missing if held is None else held.astype(new.dtype), new], axis=1)
        x = x if self.order is None else _reorder(x, self.order, self.back)
        return jnp.where(self.real.reshape(*self.real.shape, *(1,) * (x.ndim - 2)), x, 0)

    def restore(self, y: Array) -> Array:
        """[B, T, ...], the last T slots -> the T new tokens in their original order; padding gives 0."""
        T, S = y.shape[1], self.real.shape[1]
        y = jnp.where(self.real[:, S - T :, None, None], y, 0)
        if self.order is None:
            return y
        y = jnp.pad(y, ((0, 0), (S - T, 0), (0, 0), (0, 0)))
        return _reorder(y, self.back, self.order)[:, S - T :]


@jax.custom_vjp
def _reorder(x, order, back):
    """x[b, order[b]]; its gradient is also a gather, which is faster than a scatter on most machines."""
    return jax.vmap(lambda x, order: x[order])(x, order)


_reorder.defvjp(
    lambda x, order, back: (_reorder(x, order, back), (order, back)),
    lambda places, dy: (_reorder(dy, *places[::-1]), None, None),
)


def _final_state(
    window: Window, slots: Slots, k, v, features, state: LinearState | None, ids, before
) -> LinearState:
    """The state after the row: the linear part covers tokens of the last document older than the held slots."""
    S, N, R = slots.real.shape[1], window.q.shape[2], held_slots(window.kind, window.size)
    oldest = slots.oldest[:, -1:]
    old = max(S - R, 0)
    folded = (jnp.arange(old) >= oldest)[..., None, None]
    wide = jnp.promote_types(v.dtype, jnp.float32)
    f, w = jnp.where(folded, features[:, :old], 0).astype(wide), v[:, :old].astype(wide)
    G = math.gcd(f.shape[2], w.shape[2])
    if min(f.shape[2], w.shape[2]) > G:
        f, w, G = jnp.repeat(f, N // f.shape[2], axis=2), jnp.repeat(w, N // w.shape[2], axis=2), N
    f, w = (x.reshape(*x.shape[:2], G, x.shape[2] // G, x.shape[3]) for x in (f, w))
    kv, k_sum = jnp.einsum("bsgrp,bsgrh->bgrph", f, w), jnp.sum(f, axis=1)
    kv, k_sum = (x.reshape(x.shape[0], x.shape[1] * x.shape[2], *x.shape[3:]) for x in (kv, k_sum))
    kv, k_sum = (jnp.repeat(x, N // x.shape[1], axis=1) for x in (kv, k_sum))
    if state is not None:
        same = (oldest[:, 0] < 0).astype(wide)
        kv, k_sum = (
            kv + same[:, None, None, None] * state.kv,
            k_sum + same[:, None, None] * jnp.asarray(state.k_sum),
        )

    def newest(x):
        return jnp.pad(x, ((0, 0), (max(R - S, 0), 0), (0, 0), (0, 0)))[:, -R:]

    held = Held(newest(k), newest(v), newest(features), slots.length)
    return LinearState(kv, k_sum, segments.last(ids, before), held)


def _run(attend, q, k, v, window, eps, segment_ids, state) -> tuple[Array, LinearState]:
    """Rearranges the rows, runs `attend`, and restores the order; also returns the state after the row."""
    B, T = q.shape[:2]
    slots = Slots.of(window, segment_ids, state, B, T)
    held = (None, None, None) if state is None else state.held[:3]
    keys, values, features = map(slots.arrange, held, (window.k, v, k))
    queries, query_features = (slots.arrange(None, x)[:, -T:] for x in (window.q, q))
    y = attend(queries, keys, values, query_features, features, window.scale, slots, state, eps)
    before = None if state is None else state.segment_ids
    ids = jnp.ones((B, T), jnp.int32) if segment_ids is None else segment_ids
    return slots.restore(y).astype(v.dtype), _final_state(
        window, slots, keys, values, features, state, ids, before
    )


# ------------------------------------------------------------------------------------------------------- reference


def reference(q, k, v, window: Window, *, eps, segment_ids, initial_state) -> tuple[Array, LinearState]:
    """All pairs at once, in float32 or wider."""
    return _run(_all_pairs, q, k, v, window, eps, segment_ids, initial_state)


def _all_pairs(q, k, v, qf, kf, scale, slots: Slots, state, eps) -> Array:
    N, T, S = q.shape[2], q.shape[1], k.shape[1]
    wide = jnp.promote_types(q.dtype, jnp.float32)
    q, k, v, qf, kf = (jnp.repeat(x.astype(wide), N // x.shape[2], axis=2) for x in (q, k, v, qf, kf))
    place = jnp.arange(S)
    own, oldest, nearest = (
        place[S - T :, None],
        slots.oldest[:, S - T :, None],
        slots.nearest[:, S - T :, None],
    )
    near = ((place >= nearest) & (place <= own))[:, None]
    far = ((place >= oldest) & (place < nearest))[:, None]
    s = jnp.where(near, jnp.einsum("btnh,bsnh->bnts", q, k) * q.shape[-1] ** -0.5, NEG)
    soft = (
        jnp.where(near, jnp.exp(s - jnp.max(s, axis=-1, keepdims=True)), 0)
        * scale.astype(wide)[:, None, None]
    )
    weights = soft + jnp.where(far, jnp.einsum("btnp,bsnp->bnts", qf, kf), 0)
    y, norm = jnp.einsum("bnts,bsnh->btnh", weights, v), eps + jnp.sum(weights, axis=-1).swapaxes(1, 2)
    if state is not None:
        qf = qf * (oldest < 0)[..., None]
        y += jnp.einsum("btnp,bnph->btnh", qf, state.kv)
        norm += jnp.einsum("btnp,bnp->btn", qf, state.k_sum)
    return divided(y, norm[..., None])


# ------------------------------------------------------------------------------------------------------ the kernel


def kernel(
    q, k, v, window: Window, *, eps, segment_ids, initial_state, platform
) -> tuple[Array, LinearState]:
    """The Pallas kernel; held keys are passed as tokens whose queries are 0."""

    def attend(q, k, v, qf, kf, scale, slots: Slots, state, eps):
        from kernels_pallas.windowed_linear_attention import windowed_linear_attention as run

        T, S = q.shape[1], k.shape[1]
        q, qf = (jnp.pad(x, ((0, 0), (S - T, 0), (0, 0), (0, 0))) for x in (q, qf))
        plain = slots.order is None  # one document from the first token on
        y = run(
            *(qf, kf, v, q, k, scale),
            kind=window.kind,
            size=window.size,
            nearest=None if plain else slots.nearest,
            oldest=None if plain else slots.oldest,
            eps=eps,
            initial_state=None if state is None else state[:2],
            platform=platform,
        )
        return y[:, S - T :]

    return _run(attend, q, k, v, window, eps, segment_ids, initial_state)


def obstacle(q: Array, k: Array, v: Array, window: Window, *, platform: str) -> str | None:
    """Why the kernel does not support these arrays, or None."""
    from kernels_pallas.windowed_linear_attention import obstacle as of

    return of(q, k, v, window.q, kind=window.kind, size=window.size, platform=platform)


# --------------------------------------------------------------------------------------------------- chunk by chunk


def xla(
    q, k, v, window: Window, *, eps, segment_ids, initial_state, chunk_size=None
) -> tuple[Array, LinearState]:
    """Chunk by chunk, all rows and heads of a chunk together."""
    attend = functools.partial(_attend, window=window, chunk_size=chunk_size)
    return _run(attend, q, k, v, window, eps, segment_ids, initial_state)


@dataclasses.dataclass(frozen=True)
class Plan:
    """C queries at a time against the `tiles` x C keys that end at the same token."""

    C: int
    tiles: int
    linear: int  # how many of the tiles may hold keys that count linearly
    scale: float
    eps: float

    @classmethod
    def of(cls, window: Window, T: int, S: int, chunk_size: int | None, eps: float) -> "Plan":
        C = min(chunk_size or min(max(window.size, 32), WIDEST), T)
        reach = min(held_slots(window.kind, window.size), S - 1)
        tiles = -(-reach // C) + 1
        linear = tiles if window.size < C else tiles - 1
        return cls(C, tiles, linear, window.q.shape[-1] ** -0.5, eps)

    def masks(self, first: Array, nearest: Array) -> tuple[Array, Array, Array]:
        """Masks of near and far pairs [B, 1, 1, C, keys], and of queries that see the entering state [B, 1, 1, C].

        Both arguments are [B, C], as indices relative to the first of the keys.
        """
        first, nearest = first[:, None, None, :, None], nearest[:, None, None, :, None]
        place = jnp.arange(self.tiles * self.C)
        own = place[(self.tiles - 1) * self.C :, None]
        near = (place >= nearest) & (place <= own)
        far = ((place >= first) & (place < nearest))[..., : self.linear * self.C]
        return near, far, (first[..., 0] < 0).astype(jnp.float32)

    def scores(self, q, k, qf, kf, near, far) -> tuple[Array, Array, Array]:
        """(exp(s - max), the indicator of the maximum, divided equally among ties, linear weights for all keys)."""
        s = jnp.where(near, dot("bgrth,bgrsh->bgrts", q, k) * self.scale, NEG)
        top = jnp.max(s, axis=-1, keepdims=True)
        soft = jnp.where(near, jnp.exp(s - top), 0)
        far_weights = dot("bgrtp,bgrsp->bgrts", qf, kf[..., : self.linear * self.C, :]) * far
        blank = ((0, 0),) * (far_weights.ndim - 1)
        return (
            soft,
            (s == top) & near,
            jnp.pad(far_weights, (*blank, (0, soft.shape[-1] - far_weights.shape[-1]))),
        )

    def keys(self, x: Array, chunk: Array) -> Array:
        return jax.lax.dynamic_slice_in_dim(x, chunk * self.C, self.tiles * self.C, axis=3)

    def add_keys(self, total: Array, part: Array, chunk: Array) -> Array:
        part = self.keys(total, chunk) + part
        return jax.lax.dynamic_update_slice_in_dim(total, part, chunk * self.C, axis=3)


def _attend(q, k, v, qf, kf, scale, slots: Slots, state, eps, *, window, chunk_size) -> Array:
    B, T, N, _ = q.shape
    S = k.shape[1]
    plan = Plan.of(window, T, S, chunk_size, eps)
    C, rows = plan.C, -(-T // plan.C) * plan.C
    total = (plan.tiles - 1) * C + rows
    lead = total - S  # aligned at the last slot, so padding goes to the front

    def aligned(x, size, fill=0):
        x = x[:, -size:]
        return jnp.pad(x, ((0, 0), (size - x.shape[1], 0), *((0, 0),) * (x.ndim - 2)), constant_values=fill)

    oldest = aligned(jnp.where(slots.oldest < 0, -1, slots.oldest + lead), total, -1)
    nearest = aligned(slots.nearest + lead, rows, total)
    first = (oldest[:, :rows].reshape(B, -1, C) - jnp.arange(0, rows, C)[:, None]).swapaxes(0, 1)
    own = (oldest[:, -rows:].reshape(B, -1, C) - jnp.arange(0, rows, C)[:, None]).swapaxes(0, 1)
    nearest = (nearest.reshape(B, -1, C) - jnp.arange(0, rows, C)[:, None]).swapaxes(0, 1)
    arrays = [aligned(x, rows) for x in (q, qf)] + [aligned(x, total) for x in (k, v, kf)]
    q, qf, k, v, kf = grouped(arrays, C)
    k, v, kf = (_joined(x) for x in (k, v, kf))
    G, P, H = q.shape[2], qf.shape[-1], v.shape[-1]
    R = N // G
    if state is None:
        before = (jnp.zeros((B, G, R, P, H), jnp.float32), jnp.zeros((B, G, R, P), jnp.float32))
    else:
        before = (state.kv.reshape(B, G, R, P, H), state.k_sum.reshape(B, G, R, P))
    gamma = scale.astype(jnp.float32).reshape(G, R)[..., None, None]
    y = _chunks(q, qf, k, v, kf, gamma, (first, own, nearest), before, plan)
    return ungrouped(y, rows)[:, rows - T :]


def _joined(x: Array) -> Array:
    """[n, B, G, r, C, ...] -> [B, G, r, n C, ...]."""
    x = jnp.moveaxis(x, 0, 3)
    return x.reshape(*x.shape[:3], -1, x.shape[-1])


@functools.partial(jax.custom_vjp, nondiff_argnums=(8,))
def _chunks(q, qf, k, v, kf, gamma, places, state, plan: Plan):
    return _chunks_forward(q, qf, k, v, kf, gamma, places, state, plan)[0]


def _chunks_forward(q, qf, k, v, kf, gamma, places, state, plan: Plan):
    def step(state, x):
        chunk, q, qf, (first, own, nearest) = x
        keys, values, features = (plan.keys(x, chunk) for x in (k, v, kf))
        near, far, entering = plan.masks(own, nearest)
        soft, _, weights = plan.scores(q, keys, qf, features, near, far)
        weights = weights + gamma * soft
        num = dot("bgrts,bgrsh->bgrth", weights.astype(v.dtype), values)
        num += entering[..., None] * dot("bgrtp,bgrph->bgrth", qf, state[0])
        norm = plan.eps + jnp.sum(weights, axis=-1) + entering * dot("bgrtp,bgrp->bgrt", qf, state[1])
        _, _, leaving, carried = chunk_weights(None, first, plan.C)
        state = next_state(features[..., : plan.C, :], values[..., : plan.C, :], leaving, carried, state)
        return state, ((num / nonzero(norm)[..., None]).astype(v.dtype), norm)

    _, (y, norm) = jax.lax.scan(step, state, (jnp.arange(q.shape[0]), q, qf, places))
    y, norm = checkpoint_name(y, MIXER_RESIDUALS), checkpoint_name(norm, MIXER_RESIDUALS)
    return y, (q, qf, k, v, kf, gamma, places, state, y, norm)


def _chunks_backward(plan: Plan, residuals, dy):
    q, qf, k, v, kf, gamma, places, state, y, norm = residuals
    chunks, C = jnp.arange(q.shape[0]), plan.C

    def cut(x):  # the chunks of keys that enter the state
        x = x[..., : len(chunks) * C, :]
        return jnp.moveaxis(x.reshape(*x.shape[:3], -1, C, x.shape[-1]), 3, 0)

    before, _ = states_before(cut(kf), cut(v), None, places[0], state)
    d_state = jax.tree.map(jnp.zeros_like, state)
    d_keys = tuple(jnp.zeros(x.shape, jnp.float32) for x in (k, v, kf))
    step = functools.partial(_backward_step, k=k, v=v, kf=kf, gamma=gamma, plan=plan)
    start = d_state, d_keys, jnp.zeros_like(gamma)
    xs = (chunks, q, qf, places, before, y, norm, dy)
    (d_state, d_keys, d_gamma), (dq, dqf) = jax.lax.scan(step, start, xs, reverse=True)
    grads = (dq, dqf, *d_keys)
    dq, dqf, dk, dv, dkf = (g.astype(x.dtype) for g, x in zip(grads, (q, qf, k, v, kf), strict=True))
    return dq, dqf, dk, dv, dkf, d_gamma, None, d_state


def _backward_step(carry, x, *, k, v, kf, gamma, plan: Plan):
    """Gradients of one chunk; gradients of the keys that it attends to are accumulated in the carry."""
    (d_kv, d_z), (dk, dv, dkf), d_gamma = carry
    chunk, q, qf, (first, own, nearest), (kv, z), y, norm, dy = x
    C, r = plan.C, {name: x.shape[2] for name, x in (("qf", qf), ("k", k), ("v", v), ("kf", kf))}
    keys, values, features = (plan.keys(x, chunk) for x in (k, v, kf))
    near, far, entering = plan.masks(own, nearest)
    soft, is_top, weights = plan.scores(q, keys, qf, features, near, far)
    weights = weights + gamma * soft
    d_num = (dy / nonzero(norm)[..., None]).astype(dy.dtype)
    d_norm = -row_dots(d_num.astype(jnp.float32), y.astype(jnp.float32))
    dw = dot("bgrth,bgrsh->bgrts", d_num, values) + d_norm[..., None]
    dv_near = dot("bgrts,bgrth->bgrsh", weights.astype(dy.dtype), d_num, r["v"])
    # The softmax part, including the gradient through its maximum.
    d_soft = dw * soft
    total = jnp.sum(d_soft, axis=-1, keepdims=True)
    ties = jnp.maximum(jnp.sum(is_top, axis=-1, keepdims=True), 1)
    ds = (plan.scale * gamma * (d_soft - jnp.where(is_top, total / ties, 0))).astype(q.dtype)
    dq, dk_near = dot("bgrts,bgrsh->bgrth", ds, keys), dot("bgrts,bgrth->bgrsh", ds, q, r["k"])
    # The linear part: first pairs within the tiles, then pairs through the entering state.
    linear = plan.linear * C
    dl = (dw[..., :linear] * far).astype(q.dtype)
    d_in, d_norm_in = (d_num * entering[..., None]).astype(dy.dtype), entering * d_norm
    dqf = dot("bgrts,bgrsp->bgrtp", dl, features[..., :linear, :], r["qf"])
    dqf += dot("bgrth,bgrph->bgrtp", d_in, kv, r["qf"]) + dot("bgrt,bgrp->bgrtp", d_norm_in, z, r["qf"])
    dkf_near = dot("bgrts,bgrtp->bgrsp", dl, qf, r["kf"])
    # The first tile moves to the state.
    _, _, leaving, carried = chunk_weights(None, first, C)
    v_out = (values[..., :C, :] * leaving[..., None]).astype(v.dtype)
    dkf_out = dot("bgrsh,bgrph->bgrsp", v_out, d_kv, r["kf"])
    dkf_out += dot("bgrs,bgrp->bgrsp", leaving, d_z, r["kf"])
    dv_out = leaving[..., None] * dot("bgrsp,bgrph->bgrsh", features[..., :C, :], d_kv, r["v"])
    d_kv = carried[..., None] * d_kv + dot("bgrtp,bgrth->bgrph", qf, d_in)
    d_z = carried * d_z + dot("bgrt,bgrtp->bgrp", d_norm_in, qf)
    dk = plan.add_keys(dk, dk_near, chunk)
    dv = plan.add_keys(dv, dv_near.at[..., :C, :].add(dv_out), chunk)
    dkf_near = jnp.pad(dkf_near, ((0, 0), (0, 0), (0, 0), (0, (plan.tiles - plan.linear) * C), (0, 0)))
    dkf = plan.add_keys(dkf, dkf_near.at[..., :C, :].add(dkf_out), chunk)
    d_gamma += jnp.sum(
        _exact_total(total[..., 0], soft, qf, dqf, d_norm, gamma[..., 0], norm, plan.eps), (0, 3)
    )[..., None, None]
    return ((d_kv, d_z), (dk, dv, dkf), d_gamma), (dq, dqf)


def _exact_total(total, soft, qf, dqf, d_norm, gamma, norm, eps) -> Array:
    """The softmax part's total sum_j e_ij dw_ij without the rounding error of y, [B, G, R, C].

    y is rounded, hence also d_norm, which contributes to the totals of both parts in proportion to their weights. Where
    near keys hold most of the weight, this error can exceed the total itself. But gamma total + qf.dqf + eps d_norm is
    0, and combining the two totals, each weighted by the other part's weights, eliminates d_norm.
    """
    far = row_dots(qf.astype(jnp.float32), dqf) + eps * d_norm
    mass = jnp.sum(soft, axis=-1)
    rest = norm - eps - gamma * mass
    return (rest * total - mass * far) / nonzero(rest + gamma * mass)


_chunks.defvjp(_chunks_forward, _chunks_backward)
