"""A long row layer by layer: each layer reads the whole row, in pieces, before the next one starts.

A row in pieces (lcx/pieces.py) passes piece by piece through all layers and keeps the keys and values of all of them.
Here they are kept of one layer at a time, together with the residual stream of the row: 2 B T D numbers for the keys
and values of a layer without grouped heads, and B T D for the stream, however many layers there are. The result is the
same. Evo 2 7B has five layers of attention: a million letters need 80 GiB of keys and values in all of them, and 16 GiB
in one.
"""

import functools
from collections.abc import Iterator, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from lcx import activations, mixers
from lcx.activations import Point
from lcx.block import Block
from lcx.model import Decoder, layers

CACHE_BYTES = 8 << 30  # of keys and values in all layers together: up to this they are kept, piece by piece

Row = dict[str, Any]  # positions, segment_ids and counted, [B, T] each or None, and last, [B]


def saves(model: Decoder, rows: int, slots: int) -> bool:
    """Whether rows of so many tokens should pass layer by layer: caches above CACHE_BYTES that this would halve."""
    caches = [cache_bytes(layer.block, model, rows, slots) for layer in layers(model)]
    stream = rows * slots * model.hidden_size * jnp.dtype(model.dtype).itemsize
    return sum(caches) > max(CACHE_BYTES, 2 * (max(caches) + stream))


def cache_bytes(block: Block, model: Decoder, rows: int, slots: int) -> int:
    """Bytes of the layer's state that grow with the row; 0 if its state has a fixed size."""
    if not mixers.grows(block.mixer):
        return 0
    state = jax.eval_shape(lambda: mixers.empty_state(block.mixer, rows, slots, jnp.dtype(model.dtype)))
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state))


def hidden(
    model: Decoder, params: Any, tokens: Int[Any, "B T"], row: Row, length: int, rope_length: int
) -> Float[Array, "B T D"]:
    """The residual stream after the last layer, before the final norm (`Decoder.hidden` of the whole row).

    Args:
      row: positions and segment_ids of the tokens, or None.
      length: tokens per piece; T is a multiple of it.
      rope_length: the length that RoPE types which depend on it assume.
    """
    return _run(model, params, tokens, row, length, rope_length, (), "none")[0]


def pooled(
    model: Decoder,
    params: Any,
    tokens: Int[Any, "B T"],
    row: Row,
    length: int,
    rope_length: int,
    points: Sequence[Point],
    pool: str,
) -> list[Float[Array, "B F"]]:
    """Activations pooled over the whole row, one array per point: "mean" (as a sum), "last" or "max".

    Args:
      row: also counted [B, T], the tokens that count, and last [B], the index of each row's last token in the row.
    """
    x, found = _run(model, params, tokens, row, length, rope_length, points, pool)
    if ("final_norm",) in {point.path for point in points}:
        found |= _final(model, pool, params, x, row)
    return [found[point] for point in points]


def losses(
    model: Decoder, measure: Any, length: int, params: Any, x: Float[Array, "B T D"], labels: Int[Any, "B T"]
) -> Iterator[tuple[int, Array]]:
    """(first token, measure of its piece) from the stream of `hidden`; see scoring.score for `measure`."""
    for first in range(0, x.shape[1], length):
        yield first, _measured(model, measure, length, params, x, labels, first)


def _run(model, params, tokens, row, length, rope_length, points, pool):
    x, found = _embedded(model, tokens, params), dict[Point, Array]()
    if embed := [point for point in points if point.path == ("embed",)]:
        found |= dict.fromkeys(embed, _pooled(x, pool, row["counted"], row["last"]))
    for layer in layers(model):
        own = functools.reduce(lambda tree, name: tree[name], layer.path.split("/"), params)
        here = [
            point for point in points if point.path[:2] == tuple(layer.path.split("/")) and point.repeat == layer.repeat
        ]
        inside = tuple((point.path[2:], point.of_input) for point in here)
        weights = jax.tree.map(lambda leaf, at=layer.repeat: leaf[at], own)
        x, values = _layer(layer.block, length, inside, pool, weights, x, row, rope_length)
        found |= dict(zip(here, values, strict=True))
    return x, found


_pooled = jax.jit(activations.pooled, static_argnums=1)


@functools.partial(jax.jit, static_argnums=(0,))
def _embedded(model: Decoder, tokens: Array, params: Any) -> Array:
    dtype = jnp.dtype(model.dtype)
    found: Any = model.apply({"params": params}, tokens, method=lambda module, x: module.embed(x, dtype=dtype))
    return found


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3), donate_argnames="x")
def _layer(
    block: Block,
    length: int,
    inside: tuple[tuple[tuple[str, ...], bool], ...],
    pool: str,
    weights: Any,
    x: Float[Array, "B T D"],
    row: Row,
    rope_length: Int[Array, ""],
) -> tuple[Float[Array, "B T D"], tuple[Array, ...]]:
    """The stream after one layer, and the pooled activations inside it."""
    B, T, _ = x.shape
    state = mixers.with_rope_length(mixers.empty_state(block.mixer, B, T, x.dtype), rope_length)

    @functools.partial(jax.jit, inline=True)  # traced once, for its shapes and for the loop
    def piece(number: Array, x: Array, state: Any) -> tuple[Array, Any, tuple[Array, ...]]:
        part = _cut(x, number, length)
        here = {name: None if row.get(name) is None else _cut(row[name], number, length) for name in _PER_TOKEN}
        with _captured(inside, pool, here["counted"], _last(row, number, length)) as found:
            y, given = block.apply(
                {"params": weights},
                part,
                positions=here["positions"],
                segment_ids=here["segment_ids"],
                cache=state,
            )
        return y, mixers.state_after(block.mixer, state, given), tuple(found[key] for key in inside)

    def one(number: Array, carried: Any) -> Any:
        x, state, pooled = carried
        y, state, new = piece(number, x, state)
        pooled = tuple(_joined(pool, a, b, row, number, length) for a, b in zip(pooled, new, strict=True))
        return jax.lax.dynamic_update_slice_in_dim(x, y.astype(x.dtype), number * length, 1), state, pooled

    shapes = jax.eval_shape(piece, 0, x, state)[2]
    empty = tuple(_empty(pool, shape) for shape in shapes)
    x, _, pooled = jax.lax.fori_loop(0, T // length, one, (x, state, empty))
    return x, pooled


_PER_TOKEN = ("positions", "segment_ids", "counted")


class _captured:
    """Within this context, the pooled activations of the modules `inside` a block, by (path, whether of the input)."""

    def __init__(self, inside, pool, counted, last):
        self._wanted, self._pool, self._counted, self._last = set(inside), pool, counted, last
        self._found: dict[Any, Array] = {}
        self._context = nn.intercept_methods(self._record)

    def __enter__(self) -> dict[Any, Array]:
        self._context.__enter__()
        return self._found

    def __exit__(self, *error) -> None:
        self._context.__exit__(*error)

    def _record(self, call, args, kwargs, context):
        out = call(*args, **kwargs)
        if context.method_name == "__call__":
            for of_input in (False, True):
                key = (context.module.path, of_input)
                if key in self._wanted:
                    value = args[0] if of_input else out
                    value = value[0] if isinstance(value, tuple) else value
                    self._found[key] = activations.pooled(value, self._pool, self._counted, self._last)
        return out


def _final(model: Decoder, pool: str, params: Any, x: Array, row: Row) -> dict[Point, Array]:
    """The pooled input and output of the final norm."""
    before, after = _ends(model, pool, params, x, row["counted"], row["last"])
    return {Point(("final_norm",), None, True): before, Point(("final_norm",), None, False): after}


@functools.partial(jax.jit, static_argnums=(0, 1))
def _ends(model: Decoder, pool: str, params: Any, x: Array, counted: Array, last: Array) -> tuple[Array, ...]:
    y: Any = model.apply({"params": params}, x, method=lambda module, x: module.final_norm(x))
    return tuple(activations.pooled(value, pool, counted, last) for value in (x, y))


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _measured(model: Decoder, measure: Any, length: int, params: Any, x: Array, labels: Array, first: Array) -> Array:
    part: Any = jax.lax.dynamic_slice_in_dim(x, first, length, 1)
    part = model.apply({"params": params}, part, method=lambda module, x: module.final_norm(x))
    targets = jax.lax.dynamic_slice_in_dim(labels, first, length, 1)
    return measure(part, model.head(params), targets, transform=model.logit_transform)


def _cut(x: Array, number: Array, length: int) -> Array:
    return jax.lax.dynamic_slice_in_dim(x, number * length, length, 1)


def _last(row: Row, number: Array, length: int) -> Int[Array, " B"] | None:
    """The index in a piece of each row's last token; -1 if it is in another."""
    if row.get("last") is None:
        return None
    at = row["last"] - number * length
    return jnp.where((at >= 0) & (at < length), at, -1)


def _empty(pool: str, shape: jax.ShapeDtypeStruct) -> Array:
    return jnp.full(shape.shape, -jnp.inf if pool == "max" else 0.0, shape.dtype)


def _joined(pool: str, before: Array, new: Array, row: Row, number: Array, length: int) -> Array:
    if pool == "last":
        here: Any = _last(row, number, length)
        return jnp.where((here >= 0)[:, None], new, before)
    return jnp.maximum(before, new) if pool == "max" else before + new

