"""Softmax attention over rows whose parts lie on several devices, inside a shard_map over T (see shards.py).

Letters: P devices, L = T / P tokens of a part, N query heads, K kv heads, H head dim, per device of the other axes.
A device receives, per row and pass, so many numbers:

``halo``    the w - 1 keys and values before its part, for a window of w tokens:     2 (w - 1) K H
``heads``   all-to-all: whole rows of N / P heads, and its part of the outputs back: (2 N + 2 max(K, P)) H L (P - 1) / P
            (DeepSpeed-Ulysses, arXiv 2309.14509). Kernels run on whole rows.
``gather``  the keys and values of whole rows:                                       2 K H L (P - 1)
            Queries change places by half parts: device r takes the r-th and r-th last of 2 P blocks, so that all see
            equally many keys (if L is even). 2 N H L numbers more.

Chosen without a setting: ``halo`` if the window reaches no further than one part back; else ``heads`` if P divides the
query heads, and P divides the kv heads or is a multiple of them; else ``gather``. Segment ids and decays go along.
The backward pass sends about as much. There is no ring: keys and values of whole rows are held in one layer at a time.
"""

import functools
import logging
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array

from lcx.errors import UserError
from lcx.ops import dispatch, shards

WORDS = {
    "halo": "a halo of keys and values",
    "heads": "all-to-all over heads",
    "gather": "keys and values, gathered",
}
METHODS = tuple(WORDS)
log = logging.getLogger("lcx")


def choose(
    method: str | None, *, devices: int, tokens: int, heads: int, kv_heads: int, window: int | None
) -> str:
    """The name of the method to use.

    Args:
      method: the one that the user set; None: by the rule above.
      tokens: L, those of one part.
      heads, kv_heads: those of one device, before any is sent.

    Raises:
      UserError: an unknown method, or one that does not cover these sizes.
    """
    obstacles = {
        "halo": "expected a window" if window is None else None,
        "heads": None
        if heads % devices == 0 and (kv_heads % devices == 0 or devices % kv_heads == 0)
        else f"{heads} query heads and {kv_heads} kv heads do not divide over {devices} devices",
        "gather": None,
    }
    if method is None:
        near = window is not None and window - 1 <= tokens
        return "halo" if near else "heads" if obstacles["heads"] is None else "gather"
    if method not in obstacles:
        expected = ", ".join(repr(name) for name in METHODS)
        raise UserError(f"over_context {method!r}: expected one of {expected}, or None")
    if obstacles[method] is not None:
        raise UserError(f"over_context {method!r}: {obstacles[method]}; leave over_context at None")
    return method


def attention(
    attend: Callable[..., Array],
    q: Array,
    k: Array,
    v: Array,
    log_decay: Array | None,
    segment_ids: Array | None,
    sinks: Array | None,
    *,
    window: int | None,
    mesh_axis: str,
    method: str | None,
) -> Array:
    """This device's part of the outputs [B, L, N, H].

    Args:
      attend: ops.attention with all settings that are not arguments here.
    """
    B, L, N, _ = q.shape
    P = jax.lax.axis_size(mesh_axis)
    name = choose(method, devices=P, tokens=L, heads=N, kv_heads=k.shape[2], window=window)
    _say(name, P)
    run: Callable[..., Array] = {"halo": _halo, "heads": _heads, "gather": _gather}[name]
    ids = jnp.ones((B, L), jnp.int32) if segment_ids is None else segment_ids
    return run(functools.partial(attend, window=window), q, k, v, log_decay, ids, sinks, window, mesh_axis)


@functools.cache
def _say(name: str, devices: int) -> None:
    log.info("attention over %d devices of `context`: %s", devices, name)


def _halo(attend, q, k, v, log_decay, ids, sinks, window: int, mesh_axis: str) -> Array:
    def longer(x: Array) -> Array:
        return jnp.concatenate([shards.halo(x, window - 1, mesh_axis), x], axis=1)

    attend = functools.partial(attend, sinks=sinks)
    k, v, decay, kv_ids = jax.tree.map(longer, (k, v, log_decay, ids))
    if dispatch.platform() == "cpu":
        offset = jnp.full(q.shape[:1], window - 1, jnp.int32)
        return attend(q, k, v, log_decay=decay, q_segment_ids=ids, kv_segment_ids=kv_ids, q_offset=offset)
    # The kernels take as many queries as keys.
    q = jnp.pad(q, ((0, 0), (window - 1, 0), (0, 0), (0, 0)))
    return attend(q, k, v, log_decay=decay, q_segment_ids=kv_ids, kv_segment_ids=kv_ids)[:, window - 1 :]


def _heads(attend, q, k, v, log_decay, ids, sinks, window: int | None, mesh_axis: str) -> Array:
    P = jax.lax.axis_size(mesh_axis)
    if k.shape[2] % P:
        k, v = (jnp.repeat(x, P // x.shape[2], axis=2) for x in (k, v))
    to_heads = functools.partial(
        jax.lax.all_to_all, axis_name=mesh_axis, split_axis=2, concat_axis=1, tiled=True
    )
    q, k, v, decay = jax.tree.map(to_heads, (q, k, v, log_decay))
    ids = jax.lax.all_gather(ids, mesh_axis, axis=1, tiled=True)
    if sinks is not None:  # those of the heads that this device has now
        sinks = jax.lax.dynamic_slice_in_dim(sinks, jax.lax.axis_index(mesh_axis) * q.shape[2], q.shape[2])
    y = attend(q, k, v, log_decay=decay, q_segment_ids=ids, kv_segment_ids=ids, sinks=sinks)
    return jax.lax.all_to_all(y, mesh_axis, split_axis=1, concat_axis=2, tiled=True)


def _gather(attend, q, k, v, log_decay, ids, sinks, window: int | None, mesh_axis: str) -> Array:
    gather = functools.partial(jax.lax.all_gather, axis_name=mesh_axis, axis=1, tiled=True)
    attend = functools.partial(attend, sinks=sinks)
    k, v, decay, kv_ids = jax.tree.map(gather, (k, v, log_decay, ids))
    B, L = ids.shape
    P, place = jax.lax.axis_size(mesh_axis), jax.lax.axis_index(mesh_axis)

    def outputs(block: tuple[Array, Array, Array]) -> Array:
        q, q_ids, start = block
        offset = jnp.full((B,), start, jnp.int32)
        return attend(q, k, v, log_decay=decay, q_segment_ids=q_ids, kv_segment_ids=kv_ids, q_offset=offset)

    if L % 2:
        return outputs((q, ids, place * L))
    q, ids = (jnp.stack(_to_zigzag(x[:, : L // 2], x[:, L // 2 :], mesh_axis)) for x in (q, ids))
    starts = jnp.stack([place, 2 * P - 1 - place]) * (L // 2)
    y = jax.lax.map(outputs, (q, ids, starts))
    return jnp.concatenate(_from_zigzag(y[0], y[1], mesh_axis), axis=1)


def _routes(P: int) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """(device that holds it, device that takes it) of the even and of the odd of 2 P blocks."""
    takes = [c if c < P else 2 * P - 1 - c for c in range(2 * P)]
    return [(r, takes[2 * r]) for r in range(P)], [(r, takes[2 * r + 1]) for r in range(P)]


def _to_zigzag(even: Array, odd: Array, mesh_axis: str) -> tuple[Array, Array]:
    """Blocks 2 r and 2 r + 1 of device r -> its blocks r and 2 P - 1 - r."""
    P = jax.lax.axis_size(mesh_axis)
    first, second = (
        jax.lax.ppermute(x, mesh_axis, route) for x, route in zip((even, odd), _routes(P), strict=True)
    )
    swap = jax.lax.axis_index(mesh_axis) % 2 == 1  # on odd devices the block r is an odd one
    return jnp.where(swap, second, first), jnp.where(swap, first, second)


def _from_zigzag(near: Array, far: Array, mesh_axis: str) -> tuple[Array, Array]:
    """The inverse of _to_zigzag."""
    P = jax.lax.axis_size(mesh_axis)
    swap = jax.lax.axis_index(mesh_axis) % 2 == 1
    pair = jnp.where(swap, far, near), jnp.where(swap, near, far)
    back = ([(b, a) for a, b in route] for route in _routes(P))
    first, second = (jax.lax.ppermute(x, mesh_axis, route) for x, route in zip(pair, back, strict=True))
    return first, second
