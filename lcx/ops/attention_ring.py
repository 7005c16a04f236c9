"""Ring attention over the devices of a mesh axis, inside a shard_map over T: exact, with one part's keys in memory.

Letters: P devices, L = T / P tokens of a part, N query heads, K kv heads, H head dim, W width of a value.

Keys and values go round the ring, a part at a time: while a device attends to those that it holds, they are on
their way to the next one (Liu et al. 2023, arXiv 2310.01889). The softmax over what came by so far is kept as in
attention_blocks.py. The backward pass sends them round once more, and with each part the gradients of its keys and
values, to which every device adds its share. The last hop brings them home.

Balance. Parts change places by blocks first (dealt.py), so that all devices compare about as many pairs; without a
window at every step. A window up to a tenth of the row leaves the parts as they are, and the ring stops after the
ceil((w - 1) / L) parts that it reaches; with a wider one keys go all round. Masks know a token by its place in the row
and by its document, so documents may begin and end anywhere, and the changed order shows nowhere outside.

A device receives, per row, for S steps (P - 1, or those of a window):

    forward     K (H + W) L S numbers, and to change places (N + K) (H + W) L (n - 1) / n
    backward    K (H + W) L S again, and K (H + W) L (S + 1) in float32; to change places as many as forward

Segment ids go along (L integers a step), and with a decay its sums (N L). Parts are filled up to whole tiles. Compiled
ahead of time for 8 H200 and for v5p:2x2x2, both passes send asynchronously, all permutes of them.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array

from lcx.ops import MIXER_RESIDUALS, attention_blocks
from lcx.ops.attention_blocks import Gradients, Keys, Pairs, Queries, Seen, Sums
from lcx.ops.attention_tiles import LOWEST, NEG, Plan, head_backward, head_forward
from lcx.ops.dealt import Deal
from lcx.ops.running import later_sums
from lcx.ops.tiling import each_head, row_dots


@dataclasses.dataclass(frozen=True)
class Ring:
    """Which tokens of a row of P L a device holds, and in which order.

    Attributes:
      size: tokens of a block, filled up to whole tiles.
      steps: how often keys are sent on.
    """

    mesh_axis: str
    deal: Deal
    size: int
    steps: int
    plan: Plan

    @classmethod
    def of(cls, mesh_axis: str, devices: int, tokens: int, *, window: int | None, **plan: Any) -> "Ring":
        deal = Deal.of(devices, tokens, window)
        tiles = Plan.of(deal.size, deal.size, window=window, masked=True, **plan)
        unit = max(tiles.rows, tiles.cols)
        steps = devices - 1
        if deal.in_place and window is not None:
            steps = min(steps, -(-(window - 1) // tokens))
        return cls(mesh_axis, deal, -(-deal.size // unit) * unit, steps, tiles)

    @property
    def blocks(self) -> int:
        """n, those that a device holds."""
        return self.deal.blocks

    def arranged(self, x: Array) -> Array:
        """A part [B, L, ...] as this device's blocks [B, n * size, ...]; zeros fill them up."""
        x = self.deal.dealt(x, self.mesh_axis)
        more = ((0, 0),) * (x.ndim - 3)
        x = jnp.pad(x, ((0, 0), (0, 0), (0, self.size - self.deal.size), *more))
        return x.reshape(x.shape[0], -1, *x.shape[3:])

    def restored(self, x: Array) -> Array:
        """The inverse of `arranged`."""
        x = x.reshape(x.shape[0], self.blocks, self.size, *x.shape[2:])[:, :, : self.deal.size]
        return self.deal.restored(x, self.mesh_axis)

    def sent(self, tree: Any, distance: int = 1) -> Any:
        """What the device `distance` before this one holds."""
        P = self.deal.devices
        pairs = [(i, (i + distance) % P) for i in range(P)]
        return jax.tree.map(lambda x: jax.lax.ppermute(x, self.mesh_axis, pairs), tree)

    def before(self, step: Array | int) -> Array:
        """The device whose keys are here after so many steps."""
        return (jax.lax.axis_index(self.mesh_axis) - step) % self.deal.devices


def attention(
    q: Array,
    k: Array,
    v: Array,
    log_decay: Array | None,
    ids: Array,
    sinks: Array | None,
    *,
    window: int | None,
    scale: float,
    softcap: float | None,
    mesh_axis: str,
) -> Array:
    """This device's part of the outputs [B, L, N, W] in q's dtype; arguments as in attention_shards.attention."""
    (B, L, N, _), K = q.shape, k.shape[2]
    ring = Ring.of(
        mesh_axis,
        jax.lax.axis_size(mesh_axis),
        L,
        window=window,
        softcap=softcap,
        heads=B * K,
        group=N // K,
        decays=log_decay is not None,
    )
    if log_decay is not None:
        log_decay = jnp.maximum(jnp.where(ids[..., None] != 0, log_decay.astype(jnp.float32), 0), LOWEST)

    def by_kv_head(x: Array) -> Array:
        """A part [B, L, heads, ...] -> blocks [B K, G, blocks * size, ...]"""
        x = jnp.moveaxis(ring.arranged(x), 1, 2)
        return x.reshape(B * K, -1, *x.shape[2:])

    queries, decay = jax.tree.map(by_kv_head, (q * scale, log_decay))
    keys, values = (by_kv_head(x)[:, 0] for x in (k, v))
    if sinks is not None:
        sinks = jnp.tile(sinks.astype(jnp.float32).reshape(K, N // K), (B, 1))  # [B K, G]
    out = _attention(queries, keys, values, decay, sinks, ring.arranged(ids), ring)
    return ring.restored(jnp.moveaxis(out.reshape(B, N, *out.shape[2:]), 1, 2))


class _Decay(NamedTuple):
    """Log decays of this device's blocks, [B K, G, blocks * size], and of every block of the row."""

    rates: Array
    since: Array
    until: Array
    blocks: Array  # [B K, G, P, blocks]

    @classmethod
    def of(cls, rates: Array | None, ring: Ring) -> "_Decay | None":
        if rates is None:
            return None
        by_block = rates.reshape(*rates.shape[:2], ring.blocks, ring.size)
        since = jnp.cumsum(by_block, axis=3)
        until = jnp.pad(
            jax.lax.cumsum(by_block, axis=3, reverse=True)[..., 1:], ((0, 0),) * 3 + ((0, 1),)
        )
        blocks = jax.lax.all_gather(since[..., -1], ring.mesh_axis, axis=2)
        return cls(rates, since.reshape(rates.shape), until.reshape(rates.shape), blocks)

    def between(self, q_starts: Array, k_starts: Array, ring: Ring) -> Array:
        """[B K, G, n, n]: the sum over the blocks that lie between each of the queries' and each of the keys'."""
        places = jnp.asarray(ring.deal.places())
        inside = (places < q_starts[:, None, None, None]) & (places > k_starts[:, None, None])
        return jnp.einsum("bgpm,qkpm->bgqk", self.blocks, inside.astype(jnp.float32), precision="highest")


def _by_block(x: Array, ring: Ring, *, axis: int) -> Array:
    """[B K, ..., blocks * size, ...] -> [B K blocks, ..., size, ...]: each block as a row of its own."""
    x = jnp.moveaxis(x.reshape(*x.shape[:axis], ring.blocks, ring.size, *x.shape[axis + 1 :]), axis, 1)
    return x.reshape(-1, *x.shape[2:])


def _joined(x: Array, ring: Ring, *, axis: int) -> Array:
    """The inverse of _by_block."""
    x = jnp.moveaxis(x.reshape(-1, ring.blocks, *x.shape[1:]), 1, axis)
    return x.reshape(*x.shape[:axis], -1, *x.shape[axis + 2 :])


def _own_blocks(q, k, v, ids, decay, ring: Ring) -> tuple[Array, ...]:
    """The first arguments of head_forward."""
    per_query = [_by_block(x, ring, axis=2) for x in (q, decay)]
    per_key = [_by_block(x, ring, axis=1) for x in (k, v, _per_kv_head(ids, len(k)))]
    return per_query[0], *per_key, per_query[1]


def _per_kv_head(ids: Array, heads: int) -> Array:
    """[B, L] -> [B K, L]"""
    return jnp.repeat(ids, heads // ids.shape[0], axis=0)


@functools.partial(jax.custom_vjp, nondiff_argnums=(6,))
def _attention(q, k, v, decay, sinks, ids, ring: Ring):
    return _forward(q, k, v, decay, sinks, ids, ring)[0]


def _step(
    function, queries: tuple, keys: tuple, more: tuple, *, step: Array | int, ring: Ring, plan: Plan, decay
):
    """function (of attention_blocks.py) with the keys that are here after so many steps, for each kv head.

    Args:
      queries, keys: as the NamedTuples there, with ids [B, L].
      more: the arguments that follow.
    """
    places = jnp.asarray(ring.deal.places())
    pairs = Pairs(plan, places[ring.before(0)], places[ring.before(step)], ring.size, decay is None)
    between = None if decay is None else decay.between(pairs.q_starts, pairs.k_starts, ring)
    (q, q_ids, since), (k, v, k_ids, until) = queries, keys
    q_ids, k_ids = (_per_kv_head(ids, len(k)) for ids in (q_ids, k_ids))
    arrays = Queries(q, q_ids, since), Keys(k, v, k_ids, until), between, *more
    return each_head(functools.partial(function, pairs=pairs), arrays, at_once=plan.heads)


def _forward(q, k, v, decay, sinks, ids, ring: Ring):
    found = _Decay.of(decay, ring)
    since, until = (None, None) if found is None else (found.since, found.until)
    queries = q, ids, since

    def attend(keys: tuple, step: Array | int, sums: Sums) -> Sums:
        settings: dict[str, Any] = {"step": step, "ring": ring, "plan": ring.plan, "decay": found}
        return _step(attention_blocks.forward, queries, keys, (sums,), **settings)

    def one(carry, step: Array):
        keys, sums = carry
        return (ring.sent(keys), attend(keys, step, sums)), None

    first = (k, v, ids, until), _first_sums(q, k, v, ids, decay, sinks, ring)
    (keys, sums), _ = jax.lax.scan(one, first, jnp.arange(ring.steps))
    out, top, total = attend(keys, ring.steps, sums)
    real = _per_kv_head(ids, len(q))[:, None] != 0  # padding sees nothing
    out = jnp.where(real[..., None], out / total[..., None], 0).astype(q.dtype)
    out, lse = (checkpoint_name(x, MIXER_RESIDUALS) for x in (out, top + jnp.log(total)))
    return out, (q, k, v, decay, sinks, ids, out, lse)


def _first_sums(q, k, v, ids, decay, sinks, ring: Ring) -> Sums:
    """The sums before any pair: of sinks alone, or with a decay those of each block's own keys."""
    if decay is None:
        zeros = jnp.zeros(q.shape[:3], jnp.float32)
        top, total = (NEG, 0) if sinks is None else (sinks[..., None], 1)
        return Sums(jnp.zeros((*q.shape[:3], v.shape[-1]), jnp.float32), zeros + top, zeros + total)
    sinks = None if sinks is None else jnp.repeat(sinks, ring.blocks, axis=0)
    arrays = *_own_blocks(q, k, v, ids, decay, ring), None, None, sinks
    found = each_head(functools.partial(head_forward, plan=ring.plan), arrays, at_once=ring.plan.heads)
    out, lse = (_joined(x, ring, axis=2) for x in found)
    return Sums(out.astype(jnp.float32), lse, jnp.ones_like(lse))


def _backward(ring: Ring, residuals, d_out):
    q, k, v, decay, sinks, ids, out, lse = residuals
    plan, found = ring.plan.backward(*q.shape[:2]), _Decay.of(decay, ring)
    since, until = (None, None) if found is None else (found.since, found.until)
    queries = q, ids, since
    seen = Seen(d_out, lse, row_dots(out.astype(jnp.float32), d_out.astype(jnp.float32)))

    def attend(keys: tuple, step: Array | int, grads: Gradients) -> Gradients:
        settings: dict[str, Any] = {"step": step, "ring": ring, "plan": plan, "decay": found}
        return _step(attention_blocks.backward, queries, keys, (seen, grads), **settings)

    def sent(grads: Gradients, distance: int) -> Gradients:  # with the keys that they belong to
        dk, dv, d_until = ring.sent((grads.dk, grads.dv, grads.d_until), distance)
        return grads._replace(dk=dk, dv=dv, d_until=d_until)

    def one(carry, step: Array):
        keys, grads = carry
        return (ring.sent(keys), sent(attend(keys, step, grads), 1)), None

    grads, d_decay = _first_gradients(q, k, v, ids, decay, seen, out, ring, plan)
    (keys, grads), _ = jax.lax.scan(one, ((k, v, ids, until), grads), jnp.arange(ring.steps))
    grads = sent(attend(keys, ring.steps, grads), -ring.steps)
    if d_decay is not None:
        d_decay = d_decay + _from_sums(jax.tree.map(jnp.add, grads.d_since, grads.d_until), ids, ring)
    # A sink's weight is exp(sink - logsumexp), and its value is 0.
    d_sinks = None if sinks is None else -jnp.sum(jnp.exp(sinks[..., None] - lse) * seen.delta, axis=2)
    dq, dk, dv = (g.astype(x.dtype) for g, x in zip((grads.dq, grads.dk, grads.dv), (q, k, v), strict=True))
    return dq, dk, dv, d_decay, d_sinks, None


def _first_gradients(
    q, k, v, ids, decay, seen: Seen, out, ring: Ring, plan: Plan
) -> tuple[Gradients, Array | None]:
    """(the gradients before any pair, the decay's): zeros, or with a decay those from each block's own keys."""
    if decay is None:
        dq, dk, dv = (jnp.zeros(x.shape, jnp.float32) for x in (q, k, v))
        return Gradients(dq, None, dk, dv, None), None
    rest = (_by_block(x, ring, axis=2) for x in (out, seen.lse, seen.d_out, jnp.zeros_like(seen.lse)))
    arrays = *_own_blocks(q, k, v, ids, decay, ring), None, None, None, *rest
    found = each_head(functools.partial(head_backward, plan=plan), arrays, at_once=plan.heads)
    dq, dk, dv, d_decay = (_joined(x, ring, axis=a) for x, a in zip(found[:4], (2, 1, 1, 2), strict=True))
    dq, dk, dv = (x.astype(jnp.float32) for x in (dq, dk, dv))
    return Gradients(dq, jnp.zeros_like(d_decay), dk, dv, jnp.zeros_like(d_decay)), d_decay


def _from_sums(d_sums: Array, ids: Array, ring: Ring) -> Array:
    """The gradient by log decays [B K, G, blocks * size] of that by their running sums L over the row: each token's is
    the sum over the later ones of its document, ids [B, blocks * size]."""
    by_block = d_sums.reshape(*d_sums.shape[:2], ring.blocks, ring.size)
    documents = _without_padding(ids.reshape(-1, ring.blocks, ring.size))
    documents = _per_kv_head(documents, len(d_sums))[:, None]
    sums = later_sums(by_block, documents)
    to_all = functools.partial(jax.lax.all_gather, axis_name=ring.mesh_axis, axis=2)
    blocks, begins, places = to_all(sums[..., 0]), to_all(documents[..., 0]), jnp.asarray(ring.deal.places())
    later = places > places[ring.before(0)][:, None, None]  # [n, P, n]
    ends = documents[..., -1]
    goes_on = later & (begins[:, 0, None] == ends[:, 0, :, None, None])  # [B K, n, P, n]
    later_blocks = jnp.einsum("bgpm,bqpm->bgq", blocks, goes_on.astype(jnp.float32), precision="highest")
    sums += jnp.where(documents == ends[..., None], later_blocks[..., None], 0)
    return sums.reshape(d_sums.shape)


def _without_padding(ids: Array) -> Array:
    """Ids [..., size] in which padding has that of the token before it, or of the first one that is none."""
    place = jax.lax.cummax(jnp.where(ids != 0, jnp.arange(ids.shape[-1]), 0), axis=ids.ndim - 1)
    first = jnp.argmax(ids != 0, axis=-1, keepdims=True)
    return jnp.take_along_axis(ids, jnp.maximum(place, first), axis=-1)


_attention.defvjp(_forward, _backward)
