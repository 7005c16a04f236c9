"""Causal softmax attention in tiles, in plain JAX for any backend.

Each block of queries visits the tiles of keys that it can see, from the nearest to the furthest. Tiles beyond the
causal triangle or the window are skipped, not just masked. The backward pass recomputes each tile's scores from the
saved logsumexp (Dao 2022, arXiv 2205.14135, section 3.1).

Decay: L_i - L_j <= 0 is added to a score. The sums are accumulated outwards from each block of queries, so their error
grows with the distance i - j and not with the position: the difference of two prefix sums over the row would lose the
digits of a small value. No sum reaches into another document, whose decays would change its rounding.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array

from lcx.ops import MIXER_RESIDUALS, dispatch, segments
from lcx.ops.decay import split
from lcx.ops.running import later_sums
from lcx.ops.tiling import add, cut, dot, each_head, put, row_dots

# Where a device has several cores, its tiles are large enough for each product and each elementwise operation to be
# divided. Measured on two cores, H = 64, T = 256 ... 8192: WIDE x WIDE tiles of so many heads that they have SCORES
# scores together (half in the backward pass) take 0.5 to 0.7 of the time of 64 x 128. Tiles of twice the width are for
# so few heads that one WIDE x WIDE tile of all has less than FEW scores; for others they take 5% more CPU time.
WIDE, SCORES, FEW = 256, 1 << 20, 1 << 17
LOWEST = -16384.0  # lower values of log decay are clamped to this: no difference of two scores comes near it
NEG = -1e30  # finite, to avoid NaN; exp(NEG - NEG) is 1, so rows that see nothing are zeroed explicitly


def tiled(
    q: Array,
    k: Array,
    v: Array,
    q_segments: Array | None,
    kv_segments: Array | None,
    q_offset: Array | None,
    log_decay: Array | None,
    *,
    window: int | None,
    scale: float,
    softcap: float | None = None,
    sinks: Array | None = None,
) -> tuple[Array, Array]:
    """Attention in tiles; arguments as in attention(). Has its own backward pass, also with a cache (q_offset).

    Returns the outputs [B, T, N, W] and the logarithms of the sums of exponentials [B, T, N], float32; of queries that
    see no key, NEG or a little more.
    """
    B, T, N, _ = q.shape
    S, K = k.shape[1:3]
    masks: dict[str, Any] = {"window": window, "masked": q_segments is not None, "softcap": softcap}
    plan = Plan.of(T, S, heads=B * K, group=N // K, decays=log_decay is not None, **masks)
    if q_segments is None or kv_segments is None:
        q_segments, kv_segments = jnp.ones((1, T), jnp.int32), jnp.ones((1, S), jnp.int32)
    # Padding comes after every query, where the causal mask hides it.
    q_pad, kv_pad = (0, -T % plan.rows), (0, -S % plan.cols)
    if q_offset is None:
        q_pad = kv_pad

    def by_kv_head(x, pad):
        """[B, T, heads, ...] -> [B K, G, T, ...]"""
        x = jnp.moveaxis(x, 1, 2).reshape(B * K, -1, x.shape[1], *x.shape[3:])
        return jnp.pad(x, ((0, 0), (0, 0), pad, *((0, 0),) * (x.ndim - 3)))

    def each_row(x, pad):
        return jnp.pad(jnp.repeat(jnp.broadcast_to(x, (B, x.shape[1])), K, axis=0), ((0, 0), pad))

    queries, ids = by_kv_head(q * scale, q_pad), each_row(kv_segments, kv_pad)
    keys, values = (by_kv_head(x, kv_pad)[:, 0] for x in (k, v))
    decay = None
    if log_decay is not None:
        decay = by_kv_head(jnp.maximum(log_decay.astype(jnp.float32), LOWEST), kv_pad)
    cached: tuple[Array | None, Array | None] = (None, None)
    if q_offset is not None:
        cached = each_row(q_segments, q_pad), jnp.repeat(q_offset, K)
    if sinks is not None:
        sinks = jnp.tile(sinks.astype(jnp.float32).reshape(K, N // K), (B, 1))  # [B K, G]
    out, lse = _tiled(queries, keys, values, ids, decay, *cached, sinks, plan)
    by_token = (jnp.moveaxis(x[:, :, :T].reshape(B, N, T, *x.shape[3:]), 1, 2) for x in (out, lse))
    return next(by_token), next(by_token)


@dataclasses.dataclass(frozen=True)
class Plan:
    """The tiling of a head: `rows` queries against `cols` keys at a time, of `heads` key/value heads at once."""

    rows: int
    cols: int
    heads: int
    window: int | None
    masked: bool  # several segments, or padding
    softcap: float | None = None

    @classmethod
    def of(
        cls, T: int, S: int, *, heads: int, group: int, decays: bool, window: int | None, **masks: Any
    ) -> "Plan":
        """The plan for `heads` key/value heads (of all rows together), each with a group of query heads."""
        # Measured on a CPU core, forward and backward, H = 32 and 64, T = 256 ... 4096: tiles of 64 x 128 stay in the
        # second-level cache and beat 128 and 256 wide ones at every T by 1.1x to 1.4x.
        rows, cols = (T, T) if T == S <= 64 else (min(T, 64), 128)
        plan = cls(rows, cols, 1, window, **masks)
        if decays or not dispatch.shares_cores() or (window is not None and window < 4 * WIDE):
            return plan
        sizes = [size for size in (WIDE, 2 * WIDE) if -T % size <= T // 8]
        if heads * group * T * min(T, WIDE) < SCORES or not sizes:
            return plan
        narrow = window is not None or heads * group * WIDE * WIDE >= FEW
        size = WIDE if narrow else sizes[-1]
        return dataclasses.replace(plan, rows=size, cols=size)._fitted(heads, group, SCORES)

    def backward(self, heads: int, group: int) -> "Plan":
        """The plan of the backward pass, whose tiles need more memory each."""
        if self.cols < WIDE:
            return self
        return dataclasses.replace(self, rows=min(self.rows, WIDE), cols=WIDE)._fitted(
            heads, group, SCORES // 2
        )

    def _fitted(self, heads: int, group: int, scores: int) -> "Plan":
        """As many heads at once, or as few rows, as have about so many scores in one tile."""
        rows = self.rows
        while rows > 64 and group * rows * self.cols > scores:
            rows //= 2
        most = max(1, scores // (group * rows * self.cols))
        at_once = max(number for number in range(1, min(most, heads) + 1) if heads % number == 0)
        return dataclasses.replace(self, rows=rows, heads=at_once)

    def over_rows(self, T: int, body, carry):
        """carry = body(row, carry) for row = 0, rows, 2 rows, ... < T."""
        return jax.lax.fori_loop(0, T // self.rows, lambda i, c: body(i * self.rows, c), carry)

    def over_tiles(self, places: "Places", S: int, body, carry, *, documents: "Documents | None" = None):
        """carry = body(first key, carry, whole) for each tile that any query of the block can see, nearest first.

        whole: every query sees every key of the tile, so that no mask is needed.
        """
        first = 0 if self.window is None else jnp.maximum(places.lowest - self.window + 1, 0) // self.cols
        last = jnp.minimum((places.highest + self.rows - 1) // self.cols + 1, S // self.cols)
        if documents is not None:
            first = documents.furthest(places.lowest, self.rows, first, last)
        whole = first
        if not self.masked and self.window is None:
            whole = jnp.clip((places.lowest + 1) // self.cols, first, last)

        def down(last, first, carry, whole):
            step = functools.partial(body, whole=whole)
            return jax.lax.fori_loop(0, last - first, lambda j, c: step((last - 1 - j) * self.cols, c), carry)

        carry = down(last, whole, carry, False)
        return carry if whole is first else down(whole, first, carry, True)

    def scores(
        self, q: Array, k: Array, q_segments: Array, kv_segments: Array, place: Array, start: Array, gap, *, whole
    ):
        """Scores of one tile, [G, rows, cols] float32, the mask of visible pairs, [rows, cols], and the cap's slope.

        The mask is None if the tile is `whole`.

        The slope is the derivative of a capped score with respect to the product of query and key; 1 without a cap.
        q [G, rows, H] and q_segments [rows] belong to the tile; its first query has index `place` among the keys.
        """
        G, C, H = q.shape
        size = self.cols
        s = dot(q.reshape(G * C, H), cut(k, start, size), 1, 1).reshape(G, C, size)
        slope: Array | float = 1.0
        if self.softcap is not None:
            bounded = jnp.tanh(s / self.softcap)
            s, slope = bounded * self.softcap, 1 - jnp.square(bounded)
        s = s + gap
        if whole:
            return s, None, slope
        distance = (place - start) + jnp.arange(C)[:, None] - jnp.arange(size)[None]
        seen = distance >= 0
        if self.window is not None:
            seen &= distance < self.window
        if self.masked:
            own = q_segments[:, None]
            seen &= (own == cut(kv_segments, start, size)[None]) & (own != 0)
        return jnp.where(seen, s, NEG), seen, slope


class Places(NamedTuple):
    """The place among the keys of a block's first query: the lowest and the highest one of all rows of a batch.

    One for all heads and rows: with bounds of its own in each, a loop over tiles for several at once would copy what it
    carries in every step, the gradients of all keys and values among it.
    """

    lowest: Array | int
    highest: Array | int

    @classmethod
    def of(cls, offset: Array | None) -> "Places":
        return FIRST if offset is None else cls(jnp.min(offset), jnp.max(offset))

    def of_block(self, row: Array) -> "Places":
        return Places(self.lowest + row, self.highest + row)


FIRST = Places(0, 0)  # queries and keys are the same tokens


class Documents(NamedTuple):
    """The segment ids of all rows of a batch, by which blocks of queries leave out the tiles of other documents.

    One for all heads, see Places.
    """

    ids: Array  # [rows, S]
    lowest: Array  # [rows, S / cols], without padding
    highest: Array

    @classmethod
    def of(cls, ids: Array, cols: int) -> "Documents":
        return cls(ids, *_range(ids.reshape(len(ids), -1, cols)))

    def furthest(self, place: Array | int, rows: int, first: Array | int, last: Array) -> Array:
        """Of the tiles first ... last - 1, the first whose range of ids meets that of the queries from `place` on, in
        any row; `last` if there is none."""
        low, high = _range(cut(self.ids, place, rows, axis=1)[:, None])
        meet = jnp.any((self.lowest <= high) & (self.highest >= low), axis=0)
        tiles = jnp.arange(len(meet))
        return jnp.minimum(jnp.min(jnp.where(meet & (tiles >= first), tiles, last)), last)


def _range(ids: Array) -> tuple[Array, Array]:
    real = ids != 0
    top = jnp.iinfo(ids.dtype).max
    return jnp.min(jnp.where(real, ids, top), axis=-1), jnp.max(jnp.where(real, ids, -1), axis=-1)


class Gaps(NamedTuple):
    """L_i - L_j of one head, tile by tile, outwards from a block of queries whose first has index p.

    For tokens after p, L is summed from p or from the start of their document, whichever is later.
    """

    rate: Array  # [2, G, S + rows], decay.split
    runs: Array | None  # [S + rows], the document of each token (segments.runs); None: one document

    @classmethod
    def of(cls, decay: Array, runs: Array | None, rows: int, cols: int) -> "Gaps":
        runs = None if runs is None else jnp.pad(runs, (0, rows))
        return cls(split(jnp.pad(decay, ((0, 0), (0, rows))), rows + cols, LOWEST), runs)

    def of_queries(self, place: Array, rows: int) -> Array:
        """L_i, [2, G, rows]."""
        return self._sums(cut(self.rate, place, rows, axis=2).at[:, :, 0].set(0), place)

    def _sums(self, rate: Array, start: Array) -> Array:
        """The running sums of rate [2, G, n], of tokens from `start` on, each within its document."""
        if self.runs is None:
            return jnp.cumsum(rate, axis=2)
        own, order = cut(self.runs, start, rate.shape[2]), jnp.arange(rate.shape[2])
        summed = (order[:, None] <= order) & (own[:, None] == own)
        return jnp.matmul(rate, summed.astype(rate.dtype), precision=jax.lax.Precision.HIGHEST)

    def of_tile(
        self, of_queries: Array, place: Array, edge: Array, start: Array, cols: int
    ) -> tuple[Array, Array]:
        """The tile's gaps [G, rows, cols], and the edge [2, G] of the next tile: L_p - L before this one's first
        token."""
        rate, before = cut(self.rate, start, cols, axis=2), start + jnp.arange(cols) <= place
        past, ahead = jnp.where(before, rate, 0), jnp.where(before, 0, rate)
        later = jnp.cumsum(past[:, :, :0:-1], axis=2)[:, :, ::-1]
        # If the tile begins after p, its tokens count from L of the token before it. (Otherwise that is 0, entry 0.)
        between = jnp.clip(start - 1 - place, 0, of_queries.shape[2] - 1)
        entry = cut(of_queries, between, 1, axis=2)
        if self.runs is not None:
            entry = entry * (cut(self.runs, start, cols) == cut(self.runs, place + between, 1))
        of_keys = jnp.pad(later, ((0, 0), (0, 0), (0, 1))) - self._sums(ahead, start) - entry + edge[:, :, None]
        gaps = jnp.sum(of_queries[:, :, :, None] + of_keys[:, :, None], axis=0)
        return gaps, edge + jnp.sum(past, axis=2)


def head_forward(
    q, k, v, kv_segments, decay, q_segments, offset, sinks, *, plan: Plan, places: Places = FIRST,
    documents: Documents | None = None,
) -> tuple[Array, Array]:  # fmt: skip
    """One row and kv head: q [G,T,H], k [S,H], v [S,W] -> out [G,T,W], logsumexp [G,T] float32.

    q_segments [T] and offset [] are given for queries after a cache; None: queries and keys are the same tokens.
    sinks [G]: scores that count in the softmax and have no value. places, documents: of `offset` and `kv_segments`, in
    all heads.
    """
    G, T, _ = q.shape
    S, C, size = k.shape[0], plan.rows, plan.cols
    q_segments, offset = (kv_segments, 0) if offset is None else (q_segments, offset)
    nothing = jnp.zeros((2, G), jnp.float32)
    runs = segments.runs(kv_segments[None])[0] if plan.masked else None
    gaps = None if decay is None else Gaps.of(decay, runs, C, size)

    def rows(row, carry):
        q_row, own = cut(q, row, C, axis=1), cut(q_segments, row, C)
        place = row + offset
        near = nothing if gaps is None else gaps.of_queries(place, C)

        def tile(start, state, whole):
            out, top, total, edge = state
            gap, edge = (0, edge) if gaps is None else gaps.of_tile(near, place, edge, start, size)
            s, _, _ = plan.scores(q_row, k, own, kv_segments, place, start, gap, whole=whole)
            new_top = jnp.maximum(top, jnp.max(s, axis=-1))
            p, shrink = jnp.exp(s - new_top[..., None]), jnp.exp(top - new_top)
            new = dot(p.astype(v.dtype).reshape(G * C, size), cut(v, start, size), 1, 0).reshape(G, C, -1)
            return out * shrink[..., None] + new, new_top, total * shrink + jnp.sum(p, axis=-1), edge

        zeros = jnp.zeros((G, C), jnp.float32)
        lowest, count = (NEG, 0) if sinks is None else (sinks[:, None], 1)
        empty = (jnp.zeros((G, C, v.shape[1]), jnp.float32), zeros + lowest, zeros + count, nothing)
        out, top, total, _ = plan.over_tiles(places.of_block(row), S, tile, empty, documents=documents)
        total = jnp.where(total == 0, 1, total)  # no tile is in sight
        out = out / total[..., None]
        if plan.masked:  # padding sees nothing
            out = jnp.where(own[None, :, None] != 0, out, 0)
        return put(carry[0], out, row, axis=1), put(carry[1], top + jnp.log(total), row, axis=1)

    outputs = jnp.zeros((G, T, v.shape[1]), q.dtype)
    return plan.over_rows(T, rows, (outputs, jnp.zeros((G, T), jnp.float32)))


def head_backward(
    q, k, v, kv_segments, decay, q_segments, offset, sinks, out, lse, d_out, d_lse, *, plan: Plan,
    places: Places = FIRST, documents: Documents | None = None,
) -> tuple:  # fmt: skip
    """Gradients for one row and kv head; scores are recomputed tile by tile."""
    G, T, H = q.shape
    S, C, size = k.shape[0], plan.rows, plan.cols
    after = 0 if offset is None else C  # room for the last block of queries, which may reach beyond the keys
    q_segments, offset = (kv_segments, 0) if offset is None else (q_segments, offset)
    nothing = jnp.zeros((2, G), jnp.float32)
    runs = segments.runs(kv_segments[None])[0] if plan.masked else None
    gaps = None if decay is None else Gaps.of(decay, runs, C, size)
    delta = row_dots(out.astype(jnp.float32), d_out.astype(jnp.float32)) - d_lse

    def rows(row, carry):
        dq, dk, dv, d_sums = carry
        q_row, d_row, lse_row, delta_row = (cut(x, row, C, axis=1) for x in (q, d_out, lse, delta))
        own, place = cut(q_segments, row, C), row + offset
        flat_q, flat_d = q_row.reshape(G * C, H), d_row.reshape(G * C, -1)
        near = nothing if gaps is None else gaps.of_queries(place, C)

        def tile(start, state, whole):
            dq_row, dk, dv, d_sums, edge = state
            gap, edge = (0, edge) if gaps is None else gaps.of_tile(near, place, edge, start, size)
            s, seen, slope = plan.scores(q_row, k, own, kv_segments, place, start, gap, whole=whole)
            p = jnp.exp(s - lse_row[..., None])
            p = p if seen is None else jnp.where(seen, p, 0)
            dp = dot(flat_d, cut(v, start, size), 1, 1).reshape(G, C, size)
            ds = p * (dp - delta_row[..., None])
            if gaps is not None:
                d_sums = add(d_sums, jnp.sum(ds, axis=2), place, axis=1)
                d_sums = add(d_sums, -jnp.sum(ds, axis=1), start, axis=1)
            ds = (ds * slope).astype(k.dtype).reshape(G * C, size)
            dk = add(dk, dot(flat_q, ds, 0, 0), start, axis=1)
            dv = add(dv, dot(flat_d, p.astype(v.dtype).reshape(G * C, size), 0, 0), start, axis=1)
            return dq_row + dot(ds, cut(k, start, size), 1, 0), dk, dv, d_sums, edge

        state = (jnp.zeros((G * C, H), jnp.float32), dk, dv, d_sums, nothing)
        dq_row, dk, dv, d_sums, _ = plan.over_tiles(places.of_block(row), S, tile, state, documents=documents)
        return put(dq, dq_row.reshape(G, C, H), row, axis=1), dk, dv, d_sums

    # [H, S] and [W, S]: on a CPU these products take half the time of those that give [S, H] and [S, W].
    dk, dv = (jnp.zeros(x.shape[::-1], jnp.float32) for x in (k, v))
    d_sums = None if decay is None else jnp.pad(jnp.zeros_like(decay), ((0, 0), (0, after)))
    dq, dk, dv, d_sums = plan.over_rows(T, rows, (jnp.zeros_like(q), dk, dv, d_sums))
    d_decay = None if d_sums is None else later_sums(d_sums[:, :S], runs)
    # A sink's weight is exp(sink - logsumexp), and its value is 0.
    d_sinks = None if sinks is None else -jnp.sum(jnp.exp(sinks[:, None] - lse) * delta, axis=1)
    return dq, dk.T.astype(k.dtype), dv.T.astype(v.dtype), d_decay, d_sinks


@functools.partial(jax.custom_vjp, nondiff_argnums=(8,))
def _tiled(q, k, v, kv_segments, decay, q_segments, offset, sinks, plan: Plan):
    return _tiled_forward(q, k, v, kv_segments, decay, q_segments, offset, sinks, plan)[0]


def _documents(kv_segments: Array, offset: Array | None, plan: Plan) -> Documents | None:
    """None without segments, or with queries that are at other places in each row."""
    return Documents.of(kv_segments, plan.cols) if plan.masked and offset is None else None


def _tiled_forward(q, k, v, kv_segments, decay, q_segments, offset, sinks, plan: Plan):
    arrays = (q, k, v, kv_segments, decay, q_segments, offset, sinks)
    shared: dict[str, Any] = {"places": Places.of(offset), "documents": _documents(kv_segments, offset, plan)}
    one = functools.partial(head_forward, plan=plan, **shared)
    out, lse = each_head(one, arrays, at_once=plan.heads)
    out, lse = checkpoint_name(out, MIXER_RESIDUALS), checkpoint_name(lse, MIXER_RESIDUALS)
    return (out, lse), (*arrays, out, lse)


def _tiled_backward(plan: Plan, residuals, gradients):
    plan = plan.backward(*residuals[0].shape[:2])
    kv_segments, offset = residuals[3], residuals[6]
    shared: dict[str, Any] = {"places": Places.of(offset), "documents": _documents(kv_segments, offset, plan)}
    one = functools.partial(head_backward, plan=plan, **shared)
    grads = each_head(one, (*residuals, *gradients), at_once=plan.heads)
    dq, dk, dv, d_decay, d_sinks = grads
    return dq, dk, dv, None, d_decay, None, None, d_sinks


_tiled.defvjp(_tiled_forward, _tiled_backward)
