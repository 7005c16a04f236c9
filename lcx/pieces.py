"""A row processed in pieces: exact gradients, with the activations of one piece in memory at a time.

A model maps a stretch of tokens and the state before it to outputs and the state after it (``lcx/mixers``). A loss over
a row of T tokens is therefore a sum over pieces of L tokens, each of which gets the state that the previous one left::

    forward    state_p+1, sums_p = piece(weights, state_p, tokens_p)         p = 0, 1, ..., P - 1
    backward   d weights, d state_p = vjp of the same at (weights, state_p)   p = P - 1, ..., 1, 0

The backward pass recomputes one piece at a time from the state at its border and passes the state's cotangent on to the
piece before. Nothing is approximated: the gradients are those of the whole row, up to rounding. The cost is one more
forward pass, 4/3 of the whole row's FLOPs.

What is kept between the passes:

- States of fixed size (recurrences, histories of convolutions): one per border. If these would exceed BORDER_BYTES,
  only every g-th is kept, and the backward pass recomputes the g - 1 between them: at most one more forward pass again.
  With `borders = "host"` all are kept, in the memory of the host.
- Caches that grow with the row (keys and values): once. The cache before piece p is the final cache, of whose slots a
  mixer reads only those filled before p. Their cotangents accumulate in one array of the same size.

So memory is flat in T for models with linear cost, and linear in T through keys and values alone for softmax attention.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero
from jax.sharding import PartitionSpec
from jaxtyping import Array, Int

from lcx import mixers, sharding
from lcx.errors import UserError
from lcx.model import Decoder, layers
from lcx.ops import dispatch, fp8

Tree = Any
PieceFn = Callable[[Tree, Tree, dict[str, Array]], tuple[Tree, Tree]]
CARRIES = ("exact", "stop")
BORDERS = ("device", "host")
BORDER_BYTES = 1 << 30  # of all states at borders together, on the device; above this only every g-th is kept


@dataclasses.dataclass(frozen=True)
class Pieces:
    """How rows are divided.

    Attributes:
      length: tokens per piece; the last piece of a row may be shorter.
      carry: "exact": gradients flow through the states at the borders, as in a whole row. "stop": they stop there
        (truncated backpropagation through time); the states themselves are still passed on.
      borders: where the states at the borders wait for the backward pass: in the memory of the "device", or of the
        "host", where all of them are kept. CPUs have only one memory, and there "host" changes nothing.

    Raises:
      UserError: a length below 1, or another carry or place.
    """

    length: int
    carry: str = "exact"
    borders: str = "device"

    def __post_init__(self):
        if self.length < 1:
            raise UserError(
                f"piece_length is {self.length}, expected at least 1: change Trainer.piece_length"
            )
        for name, known in {"carry": CARRIES, "borders": BORDERS}.items():
            if (value := getattr(self, name)) not in known:
                raise UserError(
                    f"{name} is {value!r}, expected one of {', '.join(known)}: change Trainer.{name}"
                )

    def count(self, seq_len: int) -> int:
        """The number of pieces of a row of `seq_len` tokens."""
        return -(-seq_len // self.length)


def total(
    piece: PieceFn,
    model: Decoder,
    variables: Tree,
    batch: dict[str, Int[Array, "B T"]],
    pieces: Pieces,
    state: Tree = None,
) -> tuple[Tree, Tree]:
    """The sum over the pieces of a batch of what `piece` returns, differentiable in `variables`; the state after them.

    Args:
      piece: piece(variables, state, batch) -> (a tree of sums, floating point; the state after the piece).
      model: the model whose states these are (Decoder.init_cache).
      variables: the weights. Gradients are computed only for those with respect to which the result is differentiated.
      batch: tokens, positions, segment_ids and others, each [B, T]. Padding (segment id 0) fills up the last piece.
      pieces: how rows are divided.
      state: the state before the rows, whose arrays all have a fixed size; no gradient flows into it, or from the state
        after them. None: there is none before, and None is returned as the one after.

    Raises:
      UserError: a mixer cannot continue from a state.
    """
    B, T = batch["tokens"].shape
    count = pieces.count(T)
    check(model)
    continues = state is not None
    if continues:
        grows = jax.tree.map(lambda _: False, state)
    else:
        state = empty_state(model, B, count * pieces.length, rope_length(batch))
        grows = _growing(model, B, count * pieces.length)
    offloaded = pieces.borders == "host" and dispatch.platform() != "cpu"
    every = 1 if offloaded else _border_interval(state, grows, count)
    order = jnp.arange(-(-count // every) * every).reshape(-1, every)
    rows = Rows(_reader(batch, pieces.length, order.size), order)
    sums, after = _total(piece, grows, pieces.carry, offloaded, variables, state, rows)
    return sums, after if continues else None


def rope_length(batch: dict[str, Int[Array, "B T"]]) -> Int[Array, ""]:
    """The length that RoPE types which depend on it assume: that of the longest document so far."""
    return jnp.max(jnp.where(batch["segment_ids"] != 0, batch["positions"], 0)) + 1


def check(model: Decoder) -> None:
    """Raises UserError if a mixer cannot continue from the state that an earlier piece left."""
    for layer in layers(model):
        if mixers.whole_prompt(layer.block.mixer):
            raise UserError(
                f"{mixers.kind(layer.block.mixer)} reads its text in one piece, expected a mixer that continues from a "
                "state: process whole rows (Trainer.piece_length = None, stateful = False), or use another mixer"
            )
    jax.eval_shape(lambda: model.init_cache(1, 1))


def empty_state(model: Decoder, rows: int, slots: int, rope_length: Int[Array, ""] | int) -> Tree:
    """The state before the first token of `rows` rows of at most `slots` tokens, on the devices that hold the rows.

    rope_length: the length that RoPE types which depend on it assume for the whole rows.
    """
    state = mixers.with_rope_length(model.init_cache(rows, slots), rope_length)
    return jax.tree.map(lambda x: _over_rows(x, 1, rows), state)


def _over_rows(x: Array, axis: int, rows: int) -> Array:
    """Splits the axis of rows over the devices that split the batch, and leaves the other axes to the compiler."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1 or x.ndim <= axis or x.shape[axis] != rows:
        return x
    if rows % math.prod(mesh.shape[name] for name in sharding.BATCH_AXES):
        return x
    free = PartitionSpec.UNCONSTRAINED
    axes = (sharding.BATCH_AXES if i == axis else free for i in range(x.ndim))
    return jax.lax.with_sharding_constraint(x, PartitionSpec(*axes))


def _growing(model: Decoder, batch_size: int, slots: int) -> Tree:
    """Tree of bool: which arrays of the state grow beyond `slots`. The rings of layers with a window may not."""
    short, long = (
        jax.eval_shape(functools.partial(model.init_cache, batch_size, number)) for number in (slots, 2 * slots)
    )
    return jax.tree.map(lambda a, b: a.shape != b.shape, short, long)


def _border_interval(state: Tree, grows: Tree, count: int) -> int:
    """g: every g-th state at a border is kept. 1, or about sqrt(count) if all together exceed BORDER_BYTES."""
    size = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(_take(state, grows, False)))
    return 1 if size * count <= BORDER_BYTES else math.isqrt(count - 1) + 1


class Rows(NamedTuple):
    """The rows of a batch in pieces.

    Attributes:
      read: the number of a piece -> its batch, [B, length] each.
      order: the numbers of the pieces, [groups, g]. Those beyond the rows are all padding.
    """

    read: Callable[[Array], dict[str, Array]]
    order: Int[Array, "groups g"]


def _reader(batch: dict[str, Array], length: int, count: int) -> Callable[[Array], dict[str, Array]]:
    """`Rows.read` for `count` pieces. What is beyond the rows is padding: zeros."""
    if sharding.axis_size("context") == 1:
        return lambda p: {name: stretch(x, p * length, length) for name, x in batch.items()}
    cut = {name: _cut(x, length, count) for name, x in batch.items()}
    return lambda p: {name: x[p] for name, x in cut.items()}


def stretch(x: Array, start: Array, length: int) -> Array:
    """x[:, start : start + length] with zeros beyond the end of x, without a padded copy of x; length <= x.shape[1]."""
    begin = jnp.minimum(start, x.shape[1] - length)
    missing = start - begin
    moved = jnp.roll(jax.lax.dynamic_slice_in_dim(x, begin, length, 1), -missing, axis=1)
    return jnp.where(jnp.arange(length) < length - missing, moved, jnp.zeros((), x.dtype))


def _cut(x: Array, length: int, count: int) -> Array:
    """[B, T] split over `context` -> [count, B, length] with every piece split over it: tokens change places once."""
    B, T = x.shape
    x = jnp.pad(x, ((0, 0), (0, count * length - T)))
    x = jnp.moveaxis(x.reshape(B, count, length), 0, 1)
    return sharding.constrain(x, None, sharding.BATCH_AXES, "context")


# ------------------------------------------------------------------------------------- trees with and without parts


def _take(tree: Tree, flags: Tree, wanted: bool) -> Tree:
    """The leaves whose flag is `wanted`; None for the others."""
    return jax.tree.map(lambda x, flag: x if flag is wanted else None, tree, flags)


def _merge(first: Tree, second: Tree) -> Tree:
    """The leaves of the first tree, and those of the second where the first has None."""
    return jax.tree.map(lambda a, b: b if a is None else a, first, second, is_leaf=lambda x: x is None)


def _floating(tree: Tree) -> Tree:
    """Tree of bool: which leaves have gradients."""
    return jax.tree.map(lambda x: jnp.issubdtype(x.dtype, jnp.inexact), tree)


def _zeros(tree: Tree) -> Tree:
    return jax.tree.map(jnp.zeros_like, tree)


def _to_host(tree: Tree) -> Tree:
    return jax.device_put(tree, jax.memory.Space.Host)


def _to_device(tree: Tree) -> Tree:
    return jax.device_put(tree, jax.memory.Space.Device)


# ------------------------------------------------------------------------------------------------------- both passes


def _total(
    piece: PieceFn, grows: Tree, carry: str, offloaded: bool, variables: Tree, state: Tree, rows: Rows
) -> tuple[Tree, Tree]:
    """The sums over the pieces of `rows`, with the backward pass described at the top of this file; the last state."""

    @functools.partial(jax.jit, inline=True)  # traced once, for its shapes and for the loops of both passes
    def numbered(variables: Tree, state: Tree, number: Array) -> tuple[Tree, Tree]:
        return piece(variables, state, rows.read(number))

    def forward(variables: Tree, state: Tree) -> tuple[Tree, Tree, Tree]:
        """(sums, the final state, the states that do not grow before each group)."""

        def one(carried, number):
            sums, state = carried
            new, state = numbered(variables, state, number)
            return (jax.tree.map(jnp.add, sums, new), state), None

        def group(carried, numbers):
            border = _take(carried[1], grows, False)
            return jax.lax.scan(one, carried, numbers)[0], _to_host(border) if offloaded else border

        zero = _zeros(jax.eval_shape(numbered, variables, state, rows.order[0, 0])[0])
        (sums, last), borders = jax.lax.scan(group, (zero, state), rows.order)
        return sums, last, borders

    @jax.custom_vjp
    def summed(variables: Tree, state: Tree) -> tuple[Tree, Tree]:
        return forward(variables, state)[:2]

    def summed_forward(variables: Tree, state: Tree) -> tuple[Tree, Tree]:
        moves = jax.tree.map(lambda x: x.perturbed, variables)
        variables, state = jax.tree.map(lambda x: x.value, (variables, state))
        sums, last, borders = forward(variables, state)
        moving, still = (_take(variables, moves, wanted) for wanted in (True, False))
        return (sums, last), (moving, still, _take(last, grows, True), borders)

    def summed_backward(kept: Tree, cotangents: tuple[Tree, Tree]) -> tuple[Tree, None]:
        moving, still, grown, borders = kept
        d_sums = jax.tree.map(
            lambda d: jnp.zeros(d.shape, d.dtype) if isinstance(d, SymbolicZero) else d,
            cotangents[0],
            is_leaf=lambda d: isinstance(d, SymbolicZero),
        )
        backward = functools.partial(_group_backward, numbered, carry, grows, moving, still, d_sums)
        back = _to_device if offloaded else lambda border: border
        first = _merge(grown, back(jax.tree.map(lambda x: x[0], borders)))
        nothing = (_zeros(moving), _zeros(_take(first, _floating(first), True)), grown)

        def group(carried: tuple[Tree, Tree, Tree], xs: tuple[Tree, Array]) -> tuple[tuple[Tree, Tree, Tree], None]:
            border, numbers = xs
            return backward(carried, back(border), numbers), None

        return jax.lax.scan(group, nothing, (borders, rows.order), reverse=True)[0][0], None

    summed.defvjp(summed_forward, summed_backward, symbolic_zeros=True)
    return summed(variables, state)


def _group_backward(
    numbered: Callable[[Tree, Tree, Array], tuple[Tree, Tree]],
    carry: str,
    grows: Tree,
    moving: Tree,
    still: Tree,
    d_sums: Tree,
    carried: tuple[Tree, Tree, Tree],
    border: Tree,
    numbers: Int[Array, " g"],
) -> tuple[Tree, Tree, Tree]:
    """The backward pass through one group of g pieces: (d weights so far, d state before the group, grown caches).

    Args:
      carried: d weights of the later groups, d state after this group, and the caches that grow, filled.
      border: the other states before the group.
      numbers: of its g pieces.
    """

    def apply(moving: Tree, state: Tree, number: Array) -> tuple[Tree, Tree]:
        return numbered(_merge(moving, still), state, number)

    def recompute(state: Tree, number: Array) -> tuple[Tree, Tree]:
        return apply(moving, state, number)[1], _take(state, grows, False)

    d_moving, d_state, grown = carried
    if len(numbers) == 1:
        borders = jax.tree.map(lambda x: x[None], border)
    else:  # also writes this group's slots of the growing caches again, with the same values
        last, borders = jax.lax.scan(recompute, _merge(grown, border), numbers)
        grown = _take(last, grows, True)

    def one(carried: tuple[Tree, Tree], xs: tuple[Tree, Any]) -> tuple[tuple[Tree, Tree], None]:
        d_moving, d_state = carried
        border, number = xs
        state = _merge(grown, border)
        has_gradient = _floating(state)
        fixed = _take(state, has_gradient, False)

        def differentiable(moving: Tree, floats: Tree) -> tuple[Tree, Tree]:
            sums, after = apply(moving, _merge(floats, fixed), number)
            return sums, _take(after, has_gradient, True)

        _, pull = jax.vjp(differentiable, moving, _take(state, has_gradient, True))
        d_weights, d_before = pull((d_sums, d_state))
        if carry == "stop":
            d_before = _zeros(d_before)
        return (fp8.accumulated(d_moving, d_weights), d_before), None

    (d_moving, d_state), _ = jax.lax.scan(one, (d_moving, d_state), (borders, numbers), reverse=True)
    return d_moving, d_state, grown
