"""Attention of blocks of queries to blocks of keys that lie elsewhere in the row, added to what the queries saw before.

The step of a ring (attention_ring.py): a device has n blocks of queries and gets n blocks of keys. Every pair of blocks
is visited in tiles (attention_tiles.py); tiles that no query of the pair can see are skipped. The softmax over all keys
seen so far is kept as its largest score, the sum of weights relative to that score, and the weighted sum of values.

Letters: n blocks of C tokens, G query heads of a key/value head, H head dim, W width of a value. Functions treat one
row and one kv head; `each_head` maps them.

Decay. Between two different blocks L_i - L_j is a sum of three terms, none above 0, so that nothing cancels: the decay
from the start of the query's block to the query, that of the blocks between, and that from the key to the end of its
block. The pairs of a block with itself are then done by attention_tiles.py, which sums outwards, and are skipped here.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from lcx.ops.attention_tiles import Places, Plan
from lcx.ops.tiling import add, cut, dot, put


class Queries(NamedTuple):
    q: Float[Array, "G L H"]  # L = n C, scaled
    ids: Int[Array, " L"]
    since: Float[Array, "G L"] | None  # the log decay from the start of its block to each token, with its own


class Keys(NamedTuple):
    k: Float[Array, "L H"]
    v: Float[Array, "L W"]
    ids: Int[Array, " L"]
    until: Float[Array, "G L"] | None  # the log decay of the tokens after each one, to the end of its block


class Sums(NamedTuple):
    """The softmax over the keys seen so far, of every query; float32."""

    out: Float[Array, "G L W"]  # sum_j exp(score_j - top) v_j
    top: Float[Array, "G L"]
    total: Float[Array, "G L"]  # sum_j exp(score_j - top)


class Seen(NamedTuple):
    """What the backward pass knows of every query."""

    d_out: Float[Array, "G L W"]
    lse: Float[Array, "G L"]  # the logarithm of its sum of weights over all keys
    delta: Float[Array, "G L"]  # out . d_out


class Pairs(NamedTuple):
    """The pairs of blocks of one step: the places of the blocks in the row, and the tiles to visit them in."""

    plan: Plan
    q_starts: Int[Array, " n"]
    k_starts: Int[Array, " n"]
    size: int  # C
    own: bool  # whether pairs of a block with itself are visited

    def visit(self, body, carry):
        """carry = body(a, b, query, place, carry) for a block of queries a, of keys b and every `plan.rows` queries.

        query: the index of the first of them among the device's. place: how far it lies after the first key of b.
        """
        n = len(self.q_starts)

        def pair(number: Array, carry):
            a, b = number // n, number % n
            offset = self.q_starts[a] - self.k_starts[b]
            if not self.own:
                offset = jnp.where(offset == 0, -self.size, offset)  # before all keys, so that it sees none
            rows = self.plan.rows

            def some(i: Array, carry):
                return body(a, b, a * self.size + i * rows, offset + i * rows, carry)

            return jax.lax.fori_loop(0, self.size // rows, some, carry)

        return jax.lax.fori_loop(0, n * n, pair, carry)


def forward(
    queries: Queries, keys: Keys, between: Float[Array, "G n n"] | None, sums: Sums, *, pairs: Pairs
) -> Sums:
    """The sums with these keys.

    Args:
      between: the log decay of the blocks between each block of queries and each of keys.
    """
    plan, C = pairs.plan, pairs.plan.rows

    def rows(a: Array, b: Array, query: Array, place: Array, sums: Sums) -> Sums:
        q, own, far = _queries(queries, between, a, b, query, C)

        def tile(start: Array, held: Sums, whole: bool) -> Sums:
            at = b * pairs.size + start
            gap = _gap(far, keys, at, plan)
            s, _, _ = plan.scores(q, keys.k, own, keys.ids, place + b * pairs.size, at, gap, whole=whole)
            top = jnp.maximum(held.top, jnp.max(s, axis=-1))
            p, shrink = jnp.exp(s - top[..., None]), jnp.exp(held.top - top)
            flat = p.astype(keys.v.dtype).reshape(-1, plan.cols)
            new = dot(flat, cut(keys.v, at, plan.cols), 1, 0).reshape(held.out.shape)
            return Sums(held.out * shrink[..., None] + new, top, held.total * shrink + jnp.sum(p, axis=-1))

        held = Sums._make(cut(x, query, C, axis=1) for x in sums)
        held = plan.over_tiles(Places(place, place), pairs.size, tile, held)
        return Sums._make(put(x, part, query, axis=1) for x, part in zip(sums, held, strict=True))

    return pairs.visit(rows, sums)


class Gradients(NamedTuple):
    """The gradients so far, float32. d_since and d_until are those by L, at the queries and at the keys."""

    dq: Float[Array, "G L H"]
    d_since: Float[Array, "G L"] | None
    dk: Float[Array, "L H"]
    dv: Float[Array, "L W"]
    d_until: Float[Array, "G L"] | None


def backward(
    queries: Queries,
    keys: Keys,
    between: Float[Array, "G n n"] | None,
    seen: Seen,
    so_far: Gradients,
    *,
    pairs: Pairs,
) -> Gradients:
    """The gradients with what these keys add; scores are computed again."""
    plan, C = pairs.plan, pairs.plan.rows

    def rows(a: Array, b: Array, query: Array, place: Array, grads: Gradients) -> Gradients:
        q, own, far = _queries(queries, between, a, b, query, C)
        d_out, lse, delta = (cut(x, query, C, axis=1) for x in seen)
        flat_q, flat_d = q.reshape(-1, q.shape[2]), d_out.reshape(-1, d_out.shape[2])

        def tile(start: Array, grads: Gradients, whole: bool) -> Gradients:
            dq, d_since, dk, dv, d_until = grads
            at = b * pairs.size + start
            gap = _gap(far, keys, at, plan)
            s, visible, slope = plan.scores(q, keys.k, own, keys.ids, place + b * pairs.size, at, gap, whole=whole)
            p = jnp.exp(s - lse[..., None])
            p = p if visible is None else jnp.where(visible, p, 0)
            dp = dot(flat_d, cut(keys.v, at, plan.cols), 1, 1).reshape(p.shape)
            ds = p * (dp - delta[..., None])
            if d_since is not None and d_until is not None:
                d_since = add(d_since, jnp.sum(ds, axis=2), query, axis=1)
                d_until = add(d_until, -jnp.sum(ds, axis=1), at, axis=1)
            ds = (ds * slope).astype(keys.k.dtype).reshape(-1, plan.cols)
            dk = add(dk, dot(ds, flat_q, 0, 0), at)
            dv = add(dv, dot(p.astype(keys.v.dtype).reshape(ds.shape), flat_d, 0, 0), at)
            dq = dq + dot(ds, cut(keys.k, at, plan.cols), 1, 0).reshape(q.shape)
            return Gradients(dq, d_since, dk, dv, d_until)

        own_dq = cut(grads.dq, query, C, axis=1)  # of these rows alone: small enough to stay in cache
        found = plan.over_tiles(Places(place, place), pairs.size, tile, grads._replace(dq=own_dq))
        return found._replace(dq=put(grads.dq, found.dq, query, axis=1))

    return pairs.visit(rows, so_far)


def _queries(queries: Queries, between: Array | None, a: Array, b: Array, query: Array, rows: int):
    """(queries [G, rows, H], their ids, the log decay [G, rows] from the end of block b to each; None: no decay)."""
    far = None
    if queries.since is not None and between is not None:
        far = cut(queries.since, query, rows, axis=1) + between[:, a, b, None]
    return cut(queries.q, query, rows, axis=1), cut(queries.ids, query, rows), far


def _gap(far: Array | None, keys: Keys, at: Array, plan: Plan) -> Array | float:
    """L_i - L_j of a tile [G, rows, cols]; 0 without decay."""
    if far is None or keys.until is None:
        return 0.0
    return far[:, :, None] + cut(keys.until, at, plan.cols, axis=1)[:, None]
