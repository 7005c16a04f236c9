"""LoLCATS's attention exactly as its authors' code computes it, mistakes included. Only for parity with their models.

Differences from `linear_attention` with a window (Zhang et al. 2024, arXiv 2410.10254, eq. 7):

- the blocks of the terraced window are counted from the end of the row, so the keys that an early token sees depend on
  the row's length; in a row no longer than the window every key is in both parts;
- decoding uses a sliding window, also after a terraced prefill;
- a second prefill starts a new window, and all earlier tokens go through the linear part; the keys that the first
  window still held never reach the state that decoding reads (without a window the new tokens do not see the earlier
  ones at all);
- documents of a packed row are not separated (padding is excluded, unlike in the published code, so outputs do not
  depend on the padding);
- there is no eps in the denominators, except in a pass without a window;
- with bfloat16 inputs every step of the rotation, of the feature maps and of the form without a window is rounded to
  bfloat16, as are the weight of the softmax part and the states.

Time and memory are quadratic in T. Letters: B batch, T time, N heads, K kv heads, P features, H head dim, W window.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from lcx.ops.linear_state import Window

FLOOR = 1e-12  # lower bound on features, and the eps of a pass without a window
NEG = -1e8


class Held(NamedTuple):
    """The keys and values of the window during decoding, newest last."""

    k: Float[Array, "B W K H"]
    v: Float[Array, "B W K H"]
    features: Float[Array, "B W N P"]
    used: Int[Array, " B"]  # how many of the W slots are in use
    all_kv: Float[Array, "B N P H"]  # the linear state of all tokens of all prefills
    all_k_sum: Float[Array, "B N P"]


class State(NamedTuple):
    """The cache of one layer."""

    kv: Float[Array, "B N P H"]  # linear state of the tokens before the held ones; of all without a window
    k_sum: Float[Array, "B N P"]
    seen: Int[Array, " B"]
    held: Held | None = None


def empty_state(
    *, batch: int, heads: int, kv_heads: int, features: int, head_dim: int, window: int | None, dtype: Any
) -> State:
    """The state before the first token."""
    kv, k_sum = (
        jnp.zeros((batch, heads, features, head_dim), dtype),
        jnp.zeros((batch, heads, features), dtype),
    )
    zero, held = jnp.zeros(batch, jnp.int32), None
    if window is not None:
        keys = jnp.zeros((batch, window, kv_heads, head_dim), dtype)
        held = Held(keys, keys, jnp.zeros((batch, window, heads, features), dtype), zero, kv, k_sum)
    return State(kv, k_sum, zero, held)


def masks(kind: str, size: int, length: int) -> tuple[Bool[np.ndarray, "T T"], Bool[np.ndarray, "T T"]]:
    """Boolean masks over (query, key): (pairs of the softmax part, pairs of the linear part)."""
    query, key = np.arange(length)[:, None], np.arange(length)
    causal = key <= query
    if kind == "sliding":
        near = key > query - size
    else:
        query, key = (x + -length % size for x in (query, key))
        near = key // size >= query // size - 1
    both = kind == "terraced" and length <= size
    return causal & near, causal if both else causal & ~near


def rounded(x: Float[Array, "*shape"], dtype: Any) -> Float[Array, "*shape"]:
    """x rounded to the precision of `dtype`, in x's own dtype. (XLA may remove a cast to `dtype` and back.)"""
    info = jnp.finfo(dtype)
    return x if info.bits >= 32 else jax.lax.reduce_precision(x, info.nexp, info.nmant)


def rotate(
    x: Float[Array, "B T N H"],
    positions: Int[Array, "#B T"],
    inv_freq: Float[Array, " pairs"] | Float[np.ndarray, " pairs"],
    attention_scaling: Any = 1.0,
) -> Float[Array, "B T N H"]:
    """rope.rotate over all of H, with every step rounded to x's dtype."""
    step = functools.partial(rounded, dtype=x.dtype)
    angle = positions[:, :, None, None].astype(jnp.float32) * inv_freq
    cos, sin = (step(jnp.tile(turn(angle) * attention_scaling, 2)) for turn in (jnp.cos, jnp.sin))
    wide = x.astype(jnp.float32)
    first, second = jnp.split(wide, 2, axis=-1)
    turned = step(wide * cos) + step(jnp.concatenate([-second, first], axis=-1) * sin)
    return _narrow(turned, x.dtype)


def features(
    z: Float[Array, "... F"], activation: str, *, full_space: bool, dtype: Any
) -> Float[Array, "... P"]:
    """The activation of a feature map, with every step rounded to dtype (a softmax is rounded only once)."""
    step = functools.partial(rounded, dtype=dtype)
    if activation == "softmax_dim":
        maps = [step(jax.nn.softmax(x)) for x in (z, -z)]
    elif activation == "exp_dim":
        maps = [step(jnp.exp(step(x - jnp.max(x, axis=-1, keepdims=True)))) for x in (z, -z)]
    else:
        maps, full_space = [jax.nn.relu(z) if activation == "relu" else step(1 + step(jax.nn.elu(z)))], False
    return _narrow(jnp.maximum(jnp.concatenate(maps, axis=-1) if full_space else maps[0], FLOOR), dtype)


def attend(
    q: Float[Array, "B T N P"],
    k: Float[Array, "B T N P"],
    v: Float[Array, "B T K H"],
    *,
    window: Window | None,
    affine: bool = False,
    segment_ids: Int[Array, "B T"] | None = None,
    state: State | None = None,
) -> tuple[Float[Array, "B T N H"], State | None]:
    """(y in v's dtype, the state after the last token), from the features q and k.

    Args:
      affine: weight the linear part by 1 - window.scale instead of 1.
      segment_ids: 0 is padding; all other ids count as one document.
      state: of earlier tokens. None: there are none, and no state is returned.
    """
    if state is None and window is not None:
        return transfer(q, k, v, window=window, affine=affine, segment_ids=segment_ids)[0], None
    (q, k, v), window, real, place = _padding_first((q, k, v), window, segment_ids)
    if window is None:
        y = _without_window(q, k, _repeated(v, q))
    if state is None:
        return _in_place(y, place), None
    newest_q, newest_k, newest_v = (x[:, -1:] for x in (q, k, v))
    if window is None:
        after = _added(k, _repeated(v, q), state, _count(q, real))
        later, later_state = _from_state(newest_q, after, v.dtype), after
    else:
        assert state.held is not None
        y, after = _prefill(q, k, v, window, affine, state, state.held, real)
        last = dataclasses.replace(window, q=window.q[:, -1:], k=window.k[:, -1:])
        later, later_state = _step(newest_q, newest_k, newest_v, last, affine, state, state.held)
    count = _count(q, real)
    one_more = (count == 1) & (state.seen > 0)
    y = y.at[:, -1:].set(_row_by_row(one_more, later, y[:, -1:]))
    after = _row_by_row(count > 0, _row_by_row(one_more, later_state, after), state)
    return _in_place(y, place), after


def transfer(
    q: Float[Array, "B T N P"],
    k: Float[Array, "B T N P"],
    v: Float[Array, "B T K H"],
    *,
    window: Window | None,
    affine: bool = False,
    segment_ids: Int[Array, "B T"] | None = None,
) -> tuple[Float[Array, "B T N H"], Float[Array, "B N T T"]]:
    """(y, the weights of all pairs) for attention transfer; arguments as in `attend`."""
    (q, k, v), window, real, place = _padding_first((q, k, v), window, segment_ids)
    v = _repeated(v, q)
    if window is not None:
        weights, norm = _weights(q, k, window, affine, real)
        y = _product("bnts,bsnh->btnh", weights, v) / _by_time(norm)
        y, weights = _narrow(y, v.dtype), _narrow(weights / norm, v.dtype)
    else:
        step = functools.partial(rounded, dtype=q.dtype)
        weights = jnp.where(jnp.tri(q.shape[1], dtype=bool), step(_product("btnp,bsnp->bnts", q, k)), 0)
        weights = step(weights / step(step(jnp.sum(weights, axis=-1, keepdims=True)) + FLOOR))
        y, weights = _narrow(_product("bnts,bsnh->btnh", weights, v), v.dtype), weights.astype(q.dtype)
    if place is not None:
        for axis, places in ((2, place[:, None, :, None]), (3, place[:, None, None, :])):
            weights = jnp.take_along_axis(weights, places, axis=axis)
    return _in_place(y, place), weights


def _padding_first(arrays, window: Window | None, segment_ids: Array | None):
    """Moves the padding to the front of each row: (arrays with 0 at padding, window, mask of tokens, new positions).

    Blocks are counted from the end of a row, so this gives the same blocks as a row without padding.
    """
    if segment_ids is None:
        return arrays, window, None, None
    real = segment_ids != 0
    order = jnp.argsort(real, axis=1, stable=True)
    real = jnp.take_along_axis(real, order, axis=1)

    def moved(x):
        return jnp.where(real[..., None, None], jnp.take_along_axis(x, order[..., None, None], axis=1), 0)

    if window is not None:
        window = dataclasses.replace(window, q=moved(window.q), k=moved(window.k))
    return tuple(map(moved, arrays)), window, real, jnp.argsort(order, axis=1)


def _count(q: Array, real: Array | None) -> Int[Array, " B"]:
    """The number of tokens per row that are not padding."""
    if real is None:
        return jnp.full(q.shape[0], q.shape[1], jnp.int32)
    return jnp.sum(real, axis=1, dtype=jnp.int32)


def _in_place(y: Array, place: Array | None) -> Array:
    return y if place is None else jnp.take_along_axis(y, place[..., None, None], axis=1)


def _row_by_row(chosen: Bool[Array, " B"], one: Any, other: Any) -> Any:
    return jax.tree.map(lambda x, y: jnp.where(chosen.reshape(-1, *(1,) * (x.ndim - 1)), x, y), one, other)


def cross_entropy(
    weights: Float[Array, "B N T T"],
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    *,
    segment_ids: Int[Array, "B T"] | None = None,
) -> Float[Array, "B T"]:
    """Cross-entropy of the weights of `transfer` against those of softmax attention, averaged over heads, in nats.

    Weights are floored and each row is renormalised, including the keys after the query (but not padding).
    """
    step = functools.partial(rounded, dtype=q.dtype)
    s = step(step(_product("btnh,bsnh->bnts", q, _repeated(k, q))) * q.shape[-1] ** -0.5)
    T = q.shape[1]
    real = jnp.ones((1, 1, 1, T), bool) if segment_ids is None else (segment_ids != 0)[:, None, None]
    seen = jnp.tri(T, dtype=bool) & real | jnp.eye(
        T, dtype=bool
    )  # a padding query sees itself, so that no row is empty
    target = jax.lax.stop_gradient(step(jax.nn.softmax(jnp.where(seen, s, -jnp.inf))))
    floored = jnp.where(real, jnp.log(jnp.maximum(weights, FLOOR).astype(jnp.float32)), -1e30)
    return -jnp.mean(jnp.sum(target * jax.nn.log_softmax(floored), axis=-1), axis=1)


def _without_window(q, k, v) -> Array:
    """The output of a prefill without a window, which ignores all earlier tokens."""
    step = functools.partial(rounded, dtype=v.dtype)
    weights = jnp.where(jnp.tri(v.shape[1], dtype=bool), _product("btnp,bsnp->bnts", q, k), 0)
    num = step(_product("bnts,bsnh->btnh", weights, v))
    sums = step(jnp.cumsum(k.astype(jnp.float32), axis=1))
    norm = step(step(_product("btnp,btnp->btn", q, sums)) + FLOOR)
    return _narrow(num / norm[..., None], v.dtype)


def _added(k, v, state: State, count: Array) -> State:
    """The state (without a window) with these tokens added."""
    kv = _plus(state.kv, _product("bsnp,bsnh->bnph", k, v))
    k_sum = _plus(state.k_sum, jnp.sum(k.astype(jnp.float32), axis=1))
    return State(kv, k_sum, state.seen + count)


def _from_state(q, state: State, dtype: Any) -> Array:
    """The output of one decoded token, from a state that already includes it."""
    step = functools.partial(rounded, dtype=dtype)
    num = step(_product("btnp,bnph->btnh", q, state.kv))
    return _narrow(num / step(_product("btnp,bnp->btn", q, state.k_sum))[..., None], dtype)


def _weights(q, k, window: Window, affine: bool, real: Array | None) -> tuple[Array, Array]:
    """The weights [B, N, T, T], float32, and their row sums [B, N, T, 1]."""
    near, far = _seen(window, q.shape[1], real)
    gamma, linear = _shares(window, affine)
    s = _product("btnh,bsnh->bnts", window.q, _repeated(window.k, q)) * window.q.shape[-1] ** -0.5
    s = jnp.where(near, s, NEG)
    soft = gamma[:, None, None] * jnp.exp(s - jnp.max(s, axis=-1, keepdims=True))
    rest = linear[:, None, None] * jnp.where(far, _product("btnp,bsnp->bnts", q, k), 0)
    return soft + rest, jnp.sum(soft, axis=-1, keepdims=True) + jnp.sum(rest, axis=-1, keepdims=True)


def _seen(window: Window, length: int, real: Array | None) -> tuple[Array, Array]:
    """`masks` for rows with padding in front, where the number of tokens differs per row."""
    near, far = (jnp.asarray(mask) for mask in masks(window.kind, window.size, length))
    if real is None:
        return near, far
    if window.kind == "terraced":
        short = (jnp.sum(real, axis=1) <= window.size)[:, None, None, None]
        far = jnp.where(short, jnp.tri(length, dtype=bool), far)
    keys = real[:, None, None]
    return near & keys, far & keys


def _prefill(
    q, k, v, window: Window, affine: bool, state: State, before: Held, real: Array | None
) -> tuple[Array, State]:
    """A prefill: a new window over these tokens, and the linear part over the tokens of all earlier prefills."""
    size, T = window.size, q.shape[1]
    wide, (_, linear) = _repeated(v, q), _shares(window, affine)
    weights, norm = _weights(q, k, window, affine, real)
    y = _product("bnts,bsnh->btnh", weights, wide)
    y += linear[:, None] * _product("btnp,bnph->btnh", q, before.all_kv)
    norm = _by_time(norm) + (linear * _product("btnp,bnp->btn", q, before.all_k_sum))[..., None]
    first, missing = max(T - size, 0), max(size - T, 0)

    def newest(x):
        return jnp.pad(x[:, first:], ((0, 0), (missing, 0), (0, 0), (0, 0)))

    def plus(old_values, old_sums, stop):
        values = _product("bsnp,bsnh->bnph", k[:, :stop], wide[:, :stop]) + old_values.astype(jnp.float32)
        sums = jnp.sum(k[:, :stop].astype(jnp.float32), axis=1) + old_sums.astype(jnp.float32)
        return _narrow(values, old_values.dtype), _narrow(sums, old_sums.dtype)

    dtype, count = before.k.dtype, _count(q, real)
    used = jnp.minimum(count, size)
    kept = (newest(x).astype(dtype) for x in (window.k, v, k))
    held = Held._make((*kept, used, *plus(before.all_kv, before.all_k_sum, T)))
    kv, k_sum = plus(state.kv, state.k_sum, first)
    return _narrow(y / norm, v.dtype), State(kv, k_sum, state.seen + count, held)


def _step(q, k, v, window: Window, affine: bool, state: State, before: Held) -> tuple[Array, State]:
    """Decodes one token; when all slots are in use, the oldest held key moves to the linear state."""
    size, (gamma, linear) = window.size, _shares(window, affine)
    leaving = jnp.where((before.used == size)[:, None, None], before.features[:, 0], 0)
    values = _product("bnp,bnh->bnph", leaving, _repeated(before.v, q)[:, 0])
    kv, k_sum = _plus(state.kv, values), _plus(state.k_sum, leaving)
    pairs = zip(before[:3], (window.k, v, k), strict=True)
    kept = [jnp.concatenate([old[:, 1:], new.astype(old.dtype)], axis=1) for old, new in pairs]
    used = jnp.minimum(before.used + 1, size)
    s = _product("btnh,bsnh->bnts", window.q, _repeated(kept[0], q)) * window.q.shape[-1] ** -0.5
    s = jnp.where(jnp.arange(size) >= size - used[:, None, None, None], s, NEG)
    soft = gamma[:, None, None] * jnp.exp(s - jnp.max(s, axis=-1, keepdims=True))
    num = _product("bnts,bsnh->btnh", soft, _repeated(kept[1], q))
    num += linear[:, None] * _product("btnp,bnph->btnh", q, kv)
    norm = _by_time(jnp.sum(soft, axis=-1, keepdims=True))
    norm += (linear * _product("btnp,bnp->btn", q, k_sum))[..., None]
    held = Held(kept[0], kept[1], kept[2], used, before.all_kv, before.all_k_sum)
    return _narrow(num / norm, v.dtype), State(kv, k_sum, state.seen + 1, held)


def _shares(window: Window, affine: bool) -> tuple[Array, Array]:
    """Weights of the softmax and of the linear part, [N] float32; window.scale may have a narrower dtype."""
    gamma = window.scale.astype(jnp.float32)
    return gamma, rounded(1 - gamma, window.scale.dtype) if affine else jnp.ones_like(gamma)


def _plus(state: Array, x: Array) -> Array:
    """state + x, with both operands and the sum rounded to the state's dtype."""
    return _narrow(state.astype(jnp.float32) + rounded(x.astype(jnp.float32), state.dtype), state.dtype)


def _narrow(x: Array, dtype: Any) -> Array:
    return rounded(x, dtype).astype(dtype)


def _product(spec: str, *arrays: Array) -> Array:
    return jnp.einsum(spec, *(x.astype(jnp.float32) for x in arrays))


def _by_time(x: Array) -> Array:
    """[B, N, T, 1] -> [B, T, N, 1]."""
    return jnp.swapaxes(x, 1, 2)


def _repeated(x: Array, like: Array) -> Array:
    return jnp.repeat(x, like.shape[2] // x.shape[2], axis=2)
