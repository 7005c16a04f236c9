"""Causal softmax attention with grouped heads, sliding windows and packed segments; never a T x T array at scale.

Letters: B batch, T queries, S keys, N query heads, K key/value heads, G = N / K, H head dim, C block of queries.

``reference``  the definition, in float32, quadratic memory: what the others are tested against.
``blocks``     one block of C queries at a time against the keys it can see. Row softmax needs no running maximum, the
               causal triangle and the window are skipped block by block (not just masked), and the backward pass
               recomputes each block's scores from the saved logsumexp (Dao 2022, arXiv 2205.14135, section 3.1).
               Memory: C x S scores for one (row, kv head) at a time.

Masks. A query sees a key of its own segment, at or before it in the row, less than `window` tokens back. Segment id 0
is padding: it sees nothing, and its output is 0. With a cache the queries are T of the S keys: `q_offset` keys lie
before the first of them.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from lcx.errors import UserError
from lcx.ops import MIXER_RESIDUALS

DECODED = 8  # up to so many new tokens against a cache, one product over all keys is fastest
NEG = -1e30  # finite: exp(NEG - NEG) would be 1, so rows that see nothing are zeroed explicitly


def attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    *,
    q_segment_ids: Int[Array, "B T"] | None = None,
    kv_segment_ids: Int[Array, "B S"] | None = None,
    q_offset: Int[Array, " B"] | None = None,
    window: int | None = None,
    scale: float | None = None,
    implementation: str | None = None,
) -> Float[Array, "B T N H"]:
    """softmax(scale q k^T + mask) v; scale defaults to H^-0.5. Result in q's dtype.

    Args:
      implementation: "reference", "blocks", or None for the best one here.

    Raises:
      UserError: an unknown implementation, or heads that do not divide.
    """
    if q.shape[2] % k.shape[2]:
        raise UserError(
            f"{q.shape[2]} query heads over {k.shape[2]} kv heads: num_heads must be a multiple of num_kv_heads"
        )
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if implementation is None:  # a few decoded tokens against a cache are one small block anyway
        implementation = "reference" if q_offset is not None and q.shape[1] <= DECODED else "blocks"
    if implementation not in ("reference", "blocks"):
        raise UserError(f"attention implementation {implementation!r}: expected 'reference' or 'blocks'")
    if implementation == "blocks":
        return blocks(q, k, v, q_segment_ids, kv_segment_ids, q_offset, window=window, scale=scale)
    offset = jnp.full(q.shape[:1], k.shape[1] - q.shape[1]) if q_offset is None else q_offset
    mask = _mask(q_segment_ids, kv_segment_ids, offset, window, q.shape[1], k.shape[1])
    return reference(q, k, v, mask, scale=scale)


def _mask(q_segments, kv_segments, offset, window, T, S) -> Array:
    """Boolean [B, T, S]: may query t see key s?"""
    distance = (offset[:, None] + jnp.arange(T))[:, :, None] - jnp.arange(S)
    seen = distance >= 0
    if window is not None:
        seen &= distance < window
    if q_segments is not None:
        seen &= (q_segments[:, :, None] == kv_segments[:, None, :]) & (q_segments[:, :, None] != 0)
    return seen


def reference(q: Array, k: Array, v: Array, mask: Array, *, scale: float) -> Array:
    """The definition. float32 throughout; a query that sees no key gives 0."""
    B, T, N, H = q.shape
    K = k.shape[2]
    grouped = q.reshape(B, T, K, N // K, H).astype(jnp.float32) * scale
    scores = jnp.einsum("btkgh,bskh->bkgts", grouped, k.astype(jnp.float32))
    mask = mask[:, None, None]
    weights = jax.nn.softmax(jnp.where(mask, scores, NEG), axis=-1) * mask
    out = jnp.einsum("bkgts,bskh->btkgh", weights, v.astype(jnp.float32))
    return out.reshape(B, T, N, H).astype(q.dtype)


def blocks(
    q: Array,
    k: Array,
    v: Array,
    q_segments: Array | None,
    kv_segments: Array | None,
    q_offset: Array | None,
    *,
    window: int | None,
    scale: float,
) -> Array:
    """Block by block, with its own backward pass (not with a q_offset: a cache is not trained through)."""
    B, T, N, H = q.shape
    S, K = k.shape[1:3]
    plan = Plan.of(T, S, window=window, masked=q_segments is not None)
    if q_segments is None or kv_segments is None:
        q_segments, kv_segments = jnp.ones((1, T), jnp.int32), jnp.ones((1, S), jnp.int32)
    # What is padded lies after every query, where causality alone hides it.
    q_pad, kv_pad = (0, -T % plan.rows), (0, -S % plan.cols)
    if q_offset is None:
        q_pad = kv_pad
    per_head = jnp.transpose((q * scale).reshape(B, T, K, N // K, H), (0, 2, 3, 1, 4)).reshape(
        B * K, N // K, T, H
    )
    per_head = jnp.pad(per_head, ((0, 0), (0, 0), q_pad, (0, 0)))
    keys, values = (
        jnp.pad(jnp.transpose(x, (0, 2, 1, 3)).reshape(B * K, S, H), ((0, 0), kv_pad, (0, 0))) for x in (k, v)
    )

    def each_head(x, pad):
        return jnp.pad(jnp.repeat(jnp.broadcast_to(x, (B, x.shape[1])), K, axis=0), ((0, 0), pad))

    segments = each_head(kv_segments, kv_pad)
    if q_offset is None:
        out = _blocks(per_head, keys, values, segments, plan)
    else:
        forward = functools.partial(_head_forward, plan=plan)
        offsets = jnp.repeat(q_offset, K)
        out, _ = _each_head(
            forward, (per_head, keys, values, each_head(q_segments, q_pad), segments, offsets)
        )
    out = out[:, :, :T].reshape(B, K, N // K, T, H)
    return jnp.transpose(out, (0, 3, 1, 2, 4)).reshape(B, T, N, H)


@dataclasses.dataclass(frozen=True)
class Plan:
    """How one head is cut: `rows` queries against `cols` keys at a time."""

    rows: int
    cols: int
    window: int | None
    masked: bool  # several segments, or padding

    @classmethod
    def of(cls, T: int, S: int, *, window: int | None, masked: bool) -> "Plan":
        # Measured on a CPU core, forward and backward, H = 32 and 64, T = 256 ... 4096: tiles of 64 x 128 stay in the
        # second-level cache and beat 128 and 256 wide ones at every T by 1.1x to 1.4x.
        rows, cols = (T, T) if T == S <= 64 else (min(T, 64), 128)
        return cls(rows, cols, window, masked)

    def over_rows(self, T: int, body, carry):
        """carry = body(row, carry) for row = 0, rows, 2 rows, ... < T."""
        return jax.lax.fori_loop(0, T // self.rows, lambda i, c: body(i * self.rows, c), carry)

    def over_tiles(self, place: Array, S: int, body, carry):
        """carry = body(first key, carry) for each tile of keys that any query at place .. place + rows - 1 can see."""
        first = 0 if self.window is None else jnp.maximum(place - self.window + 1, 0) // self.cols
        last = jnp.minimum((place + self.rows - 1) // self.cols + 1, S // self.cols)
        return jax.lax.fori_loop(first, last, lambda j, c: body(j * self.cols, c), carry)

    def scores(self, q: Array, k: Array, q_segments: Array, kv_segments: Array, place: Array, start: Array):
        """Scores of one tile, [G, rows, cols] float32, and which of them count, [rows, cols].

        q [G, rows, H] and q_segments [rows] are those of the tile; its first query lies at `place` among the keys.
        """
        G, C, H = q.shape
        size = self.cols
        s = _dot(q.reshape(G * C, H), _cut(k, start, size), 1, 1).reshape(G, C, size)
        distance = (place - start) + jnp.arange(C)[:, None] - jnp.arange(size)[None]
        seen = distance >= 0
        if self.window is not None:
            seen &= distance < self.window
        if self.masked:
            own = q_segments[:, None]
            seen &= (own == _cut(kv_segments, start, size)[None]) & (own != 0)
        return jnp.where(seen, s, NEG), seen


def _cut(x: Array, start: Array, size: int, axis: int = 0) -> Array:
    return jax.lax.dynamic_slice_in_dim(x, start, size, axis)


def _put(x: Array, part: Array, start: Array, axis: int = 0) -> Array:
    return jax.lax.dynamic_update_slice_in_dim(x, part.astype(x.dtype), start, axis)


def _dot(a: Array, b: Array, a_axis: int, b_axis: int) -> Array:
    dims = (((a_axis,), (b_axis,)), ((), ()))
    return jax.lax.dot_general(a, b, dims, preferred_element_type=jnp.float32)


def _head_forward(q, k, v, q_segments, kv_segments, offset, *, plan: Plan) -> tuple[Array, Array]:
    """One row and kv head: q [G,T,H], k and v [S,H] -> out [G,T,H], logsumexp [G,T] float32."""
    G, T, H = q.shape
    C, size = plan.rows, plan.cols

    def rows(row, carry):
        q_row, own = _cut(q, row, C, axis=1), _cut(q_segments, row, C)
        place = row + offset

        def tile(start, state):
            out, top, total = state
            s, _ = plan.scores(q_row, k, own, kv_segments, place, start)
            new_top = jnp.maximum(top, jnp.max(s, axis=-1))
            p, shrink = jnp.exp(s - new_top[..., None]), jnp.exp(top - new_top)
            new = _dot(p.astype(v.dtype).reshape(G * C, size), _cut(v, start, size), 1, 0).reshape(G, C, H)
            return out * shrink[..., None] + new, new_top, total * shrink + jnp.sum(p, axis=-1)

        zeros = jnp.zeros((G, C), jnp.float32)
        out, top, total = plan.over_tiles(
            place, k.shape[0], tile, (jnp.zeros((G, C, H), jnp.float32), zeros + NEG, zeros)
        )
        out = out / total[..., None]
        if plan.masked:  # padding sees nothing
            out = jnp.where(own[None, :, None] != 0, out, 0)
        return _put(carry[0], out, row, axis=1), _put(carry[1], top + jnp.log(total), row, axis=1)

    return plan.over_rows(T, rows, (jnp.zeros_like(q), jnp.zeros((G, T), jnp.float32)))


def _head_backward(q, k, v, segments, out, lse, d_out, *, plan: Plan) -> tuple[Array, Array, Array]:
    """Gradients for one row and kv head; scores are recomputed tile by tile."""
    G, T, H = q.shape
    C, size = plan.rows, plan.cols
    delta = jnp.sum(out.astype(jnp.float32) * d_out.astype(jnp.float32), axis=-1)

    def rows(row, carry):
        dq, dk, dv = carry
        q_row, d_row, lse_row, delta_row = (_cut(x, row, C, axis=1) for x in (q, d_out, lse, delta))
        own = _cut(segments, row, C)
        flat_q, flat_d = q_row.reshape(G * C, H), d_row.reshape(G * C, H)

        def tile(start, state):
            dq_row, dk, dv = state
            s, seen = plan.scores(q_row, k, own, segments, row, start)
            p = jnp.where(seen, jnp.exp(s - lse_row[..., None]), 0)
            dp = _dot(flat_d, _cut(v, start, size), 1, 1).reshape(G, C, size)
            ds = (p * (dp - delta_row[..., None])).astype(k.dtype).reshape(G * C, size)
            p = p.astype(v.dtype).reshape(G * C, size)
            dk = _put(dk, _cut(dk, start, size) + _dot(ds, flat_q, 0, 0), start)
            dv = _put(dv, _cut(dv, start, size) + _dot(p, flat_d, 0, 0), start)
            return dq_row + _dot(ds, _cut(k, start, size), 1, 0), dk, dv

        dq_row, dk, dv = plan.over_tiles(row, T, tile, (jnp.zeros((G * C, H), jnp.float32), dk, dv))
        return _put(dq, dq_row.reshape(G, C, H), row, axis=1), dk, dv

    zeros = jnp.zeros(k.shape, jnp.float32)
    dq, dk, dv = plan.over_rows(T, rows, (jnp.zeros_like(q), zeros, zeros))
    return dq, dk.astype(k.dtype), dv.astype(v.dtype)


def _each_head(fn, arrays):
    """CPU: one head after the other, so that a head's tiles stay in cache. Elsewhere: all at once, to fill the chip."""
    if jax.default_backend() == "cpu":
        return jax.lax.map(lambda xs: fn(*xs), arrays)
    return jax.vmap(fn)(*arrays)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _blocks(q, k, v, segments, plan: Plan):
    return _blocks_forward(q, k, v, segments, plan)[0]


def _blocks_forward(q, k, v, segments, plan: Plan):
    def forward(q, k, v, segments):
        return _head_forward(q, k, v, segments, segments, 0, plan=plan)

    out, lse = _each_head(forward, (q, k, v, segments))
    out, lse = checkpoint_name(out, MIXER_RESIDUALS), checkpoint_name(lse, MIXER_RESIDUALS)
    return out, (q, k, v, segments, out, lse)


def _blocks_backward(plan: Plan, residuals, d_out):
    return *_each_head(functools.partial(_head_backward, plan=plan), (*residuals, d_out)), None


_blocks.defvjp(_blocks_forward, _blocks_backward)
