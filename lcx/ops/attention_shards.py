"""Softmax attention over rows whose parts lie on several devices, inside a shard_map over T (see shards.py).

Letters: P devices, L = T / P tokens of a part, N query heads, K kv heads, H head dim, per device of the other axes.
A device receives, per row and pass, so many numbers:

``halo``    the w - 1 keys and values before its part, for a window of w tokens:     2 (w - 1) K H
``heads``   all-to-all: whole rows of N / P heads, and its part of the outputs back: (2 N + 2 max(K, P)) H L (P - 1) / P
            (DeepSpeed-Ulysses, arXiv 2309.14509). Kernels run on whole rows.
``gather``  the keys and values of whole rows:                                       2 K H L (P - 1)
            Queries change places by blocks, so that all see about equally many keys (dealt.py): at most 2 N H L
            numbers more, and N H L with two blocks, without a window.
``ring``    the same keys and values, a part at a time (attention_ring.py): 2 K H L (P - 1), and at most 2 (N + K) H L
            to change places. Only two parts of them are in memory; a window up to a tenth of the row stops the ring
            where it ends.

Chosen without a setting: ``halo`` if the window reaches no further than one part back and is so small a share of the
row, up to a tenth, that the first tokens, which see less, leave the devices balanced; else ``heads`` if P divides the
query heads, and P divides the kv heads or is a multiple of them, so that kernels run; else ``gather`` while keys and
values of a whole row are at most MOST_GATHERED numbers, half a GiB with their gradients in bfloat16; else ``ring``,
which sends more in its backward pass. So no device compares more than 1.05 times the mean of pairs, in a row that is
one document; a ``halo`` that the user set does for wider windows, 1 / (1 - w / 2T). Published on TPU v5p for rows of
32K tokens: all-to-all and gathered keys keep the same share of the peak FLOPs, a ring about half of it. Segment ids and
decays go along. The backward pass sends about as much.
"""

import functools
import logging
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from lcx.errors import UserError
from lcx.ops import attention_ring, dispatch, shards
from lcx.ops.dealt import Deal

WORDS = {
    "halo": "a halo of keys and values",
    "heads": "all-to-all over heads",
    "gather": "keys and values, gathered",
    "ring": "keys and values in a ring",
}
MOST_GATHERED = 1 << 27
METHODS = tuple(WORDS)
log = logging.getLogger("lcx")


def check_method(mixer: str, method: str | None) -> None:
    """Raises UserError for a mixer's over_context that is no method, whether or not the mesh needs one."""
    if method is not None and method not in METHODS:
        raise UserError(f"{mixer}.over_context is {method!r}, expected one of {_expected()}: change over_context")


def _expected() -> str:
    return ", ".join(repr(name) for name in METHODS) + ", or None"


def choose(
    method: str | None,
    *,
    devices: int,
    tokens: int,
    heads: int,
    kv_heads: int,
    kv_width: int,
    window: int | None,
    implementation: str | None = None,
) -> str:
    """The name of the method to use.

    Args:
      method: the one that the user set; None: by the rule above.
      tokens: L, those of one part.
      heads, kv_heads: those of one device, before any is sent.
      kv_width: numbers of the key and the value of a kv head.
      implementation: of the attention to the keys that a device has.

    Raises:
      UserError: an unknown method, or one that does not cover these sizes.
    """
    obstacles = {
        "halo": "expected a window; leave over_context at None" if window is None else None,
        "heads": None
        if heads % devices == 0 and (kv_heads % devices == 0 or devices % kv_heads == 0)
        else f"{heads} query heads and {kv_heads} kv heads do not divide over {devices} devices; leave over_context at "
        "None",
        "gather": None,
        "ring": None
        if implementation in (None, "xla")
        else f"implementation is {implementation!r}, but a ring is computed by 'xla'; leave implementation at None",
    }
    if method is None:
        if window is not None and window - 1 <= tokens and Deal.of(devices, tokens, window).in_place:
            return "halo"
        if obstacles["heads"] is None:
            return "heads"
        method = "gather" if devices * tokens * kv_heads * kv_width <= MOST_GATHERED else "ring"
    if method not in obstacles:
        raise UserError(f"over_context is {method!r}, expected one of {_expected()}")
    if obstacles[method] is not None:
        raise UserError(f"over_context {method!r}: {obstacles[method]}")
    return method


def in_words(
    method: str | None, *, devices: int, tensor: int, seq_len: int, heads: int, kv_heads: int, **sizes: Any
) -> str:
    """What `devices` devices of `context` send each other, as mixers.context_method says it.

    Args:
      tensor: devices that divide the heads.
      heads, kv_heads: those of the mixer.
      sizes: kv_width, window and implementation of `choose`.
    """
    if heads % tensor == 0 and tensor % kv_heads == 0:
        kv_heads = tensor  # repeated, see sharding.repeat_heads
    if heads % tensor == 0 and kv_heads % tensor == 0:  # else every device has all of them, see sharding.island
        heads, kv_heads = heads // tensor, kv_heads // tensor
    tokens = -(-seq_len // devices)
    return WORDS[choose(method, devices=devices, tokens=tokens, heads=heads, kv_heads=kv_heads, **sizes)]


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
    scale: float,
    softcap: float | None,
    implementation: str | None,
    mesh_axis: str,
    method: str | None,
) -> Array:
    """This device's part of the outputs [B, L, N, W].

    Args:
      attend: ops.attention with scale, softcap and implementation.
    """
    B, L, N, _ = q.shape
    P, K = jax.lax.axis_size(mesh_axis), k.shape[2]
    width = k.shape[3] + v.shape[3]
    sizes = {"devices": P, "tokens": L, "heads": N, "kv_heads": K, "kv_width": width}
    name = choose(method, window=window, implementation=implementation, **sizes)
    _say(name, P, P * L * K * width)
    ids = jnp.ones((B, L), jnp.int32) if segment_ids is None else segment_ids
    if name == "ring":
        return attention_ring.attention(
            q, k, v, log_decay, ids, sinks, window=window, scale=scale, softcap=softcap, mesh_axis=mesh_axis
        )
    run: Callable[..., Array] = {"halo": _halo, "heads": _heads, "gather": _gather}[name]
    return run(functools.partial(attend, window=window), q, k, v, log_decay, ids, sinks, window, mesh_axis)


@functools.cache
def _say(name: str, devices: int, numbers: int) -> None:
    log.info(
        "attention over %d devices of `context`: %s; keys and values of a whole row are %s numbers",
        devices,
        WORDS[name],
        f"{numbers:,}",
    )


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

    def outputs(q: Array, ids: Array, start: Array) -> Array:
        offset = jnp.full(q.shape[:1], start, jnp.int32)
        return attend(q, k, v, log_decay=decay, q_segment_ids=ids, kv_segment_ids=kv_ids, q_offset=offset)

    return balanced(outputs, q, ids, window, mesh_axis)


def balanced(
    outputs: Callable[[Array, Array, Array], Array], q: Array, ids: Array, window: int | None, mesh_axis: str
) -> Array:
    """This device's part of the outputs where each device has the keys of whole rows: queries change places by blocks.

    Args:
      outputs: outputs(queries [B, n, N, H], their ids [B, n], the place of the first of them in the row).
    """
    deal = Deal.of(jax.lax.axis_size(mesh_axis), ids.shape[1], window)
    starts = jnp.asarray(deal.places())[jax.lax.axis_index(mesh_axis)]
    if deal.in_place:
        return outputs(q, ids, starts[0])
    q, ids = (jnp.moveaxis(deal.dealt(x, mesh_axis), 1, 0) for x in (q, ids))
    y = jax.lax.map(lambda block: outputs(*block), (q, ids, starts))
    return deal.restored(jnp.moveaxis(y, 0, 1), mesh_axis)
