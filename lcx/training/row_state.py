"""Training with a state that outlives the batch: what the rows of a batch leave to those of the next.

With `Trainer.stateful` row i of a batch continues where row i of the batch before ended (lcx/data/streams.py). The
state's item "row_state" is what the model needs of it: the cache after the last batch (Decoder.init_cache). Values are
passed on, gradients are not: they end at the first token of a row (truncated backpropagation through time). A document
uses the state only of its own earlier tokens, as in a packed row.

The item is an input and a result of the compiled step, and is saved with every checkpoint, so that a resumed run
continues bit for bit.
"""

import inspect
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from lcx import mixers, pieces, sharding
from lcx.errors import UserError
from lcx.model import Decoder, layers

ITEM = "row_state"
_LONG = 1 << 20  # tokens; a cache that grows beyond is refused


def check(trainer: Any) -> None:
    """Raises UserError for settings of a `trainer.Trainer` that do not go with `stateful`."""
    if not trainer.stateful:
        return
    if trainer.accumulation != 1:
        raise UserError(
            f"Trainer.accumulation is {trainer.accumulation} with Trainer.stateful, expected 1: to need less memory, "
            "lower Trainer.batch_size or set Trainer.piece_length"
        )
    if trainer.piece_length is not None and trainer.seq_len % trainer.piece_length:
        raise UserError(
            f"Trainer.seq_len {trainer.seq_len} is not a multiple of Trainer.piece_length {trainer.piece_length}, and "
            "Trainer.stateful leaves no room for padding between rows: change one of them"
        )
    if "state" not in inspect.signature(trainer.objective).parameters:
        name = getattr(trainer.objective, "__name__", str(trainer.objective))
        raise UserError(
            f"Trainer.objective {name} has no argument `state`, expected one as next_token has: it cannot continue "
            "rows; set Trainer.stateful to False"
        )


def abstract(model: Decoder, rows: int, mesh: Mesh) -> dict[str, Any]:
    """{"row_state": tree of shapes} of a batch of `rows` rows, divided over the devices that divide the batch.

    Raises:
      UserError: a mixer keeps all earlier tokens, cannot continue from a state, or rotates by angles that depend on the
        length; or the rows would get padding beside them (see training.division), which would be part of the state.
    """
    if rows % sharding.row_parts(mesh):
        raise UserError(
            f"{rows} rows (Trainer.batch_size) do not divide over data x fsdp = {sharding.row_parts(mesh)} devices, as "
            "Trainer.stateful needs: change batch_size or the mesh"
        )
    pieces.check(model)
    _check_rotations(model)
    shapes, longer = (jax.eval_shape(lambda n=n: model.init_cache(rows, n)) for n in (_LONG, 2 * _LONG))
    if jax.tree.map(lambda x: x.shape, shapes) != jax.tree.map(lambda x: x.shape, longer):
        raise UserError(
            "Trainer.stateful needs mixers whose state has a fixed size, and a mixer of this model keeps the keys and "
            "values of all earlier tokens: give it a window, or set Trainer.stateful to False"
        )

    def placed(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        by_rows = leaf.ndim > 1 and leaf.shape[1] == rows
        spec = PartitionSpec(None, sharding.BATCH_AXES) if by_rows else PartitionSpec()
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, spec))

    return {ITEM: jax.tree.map(placed, shapes)}


def _check_rotations(model: Decoder) -> None:
    """The keys in a state keep the rotation that they were given: it must be that of the queries of all later rows."""
    for layer in layers(model):
        if (rotary := mixers.rotary(layer.block.mixer)) is None or rotary.head_dim is None:
            continue
        short, long = (rotary.rope.frequencies(rotary.head_dim, length) for length in (1, _LONG))
        if not all(np.array_equal(a, b) for a, b in zip(short, long, strict=True)):
            raise UserError(
                f"Trainer.stateful with rope_type {rotary.rope.rope_type!r} in {mixers.kind(layer.block.mixer)}, which "
                "rotates by angles that depend on the length of the longest document so far: a row would not see the "
                "one before it as it was; use another rope_type, or set Trainer.stateful to False"
            )


def begun(state: dict[str, Any], like: dict[str, Any], model: Decoder) -> dict[str, Any]:
    """The state with its item "row_state", empty if it needs one and has none.

    Args:
      like: the abstract state.
    """
    if ITEM not in like or ITEM in state:
        return state
    rows = max(leaf.shape[1] for leaf in jax.tree.leaves(like[ITEM]) if len(leaf.shape) > 1)
    places = jax.tree.map(lambda leaf: leaf.sharding, like[ITEM])
    return {**state, ITEM: jax.jit(lambda: model.init_cache(rows, _LONG), out_shardings=places)()}


def of(state: dict[str, Any]) -> Any:
    """The state before a batch; None if rows do not continue each other."""
    return state.get(ITEM)


def after_step(before: Any, after: Any) -> dict[str, Any]:
    """{"row_state": ...} after a batch, or {}; in the dtypes of the state before it."""
    return {} if before is None else {ITEM: jax.tree.map(lambda x, y: jnp.asarray(y, x.dtype), before, after)}
