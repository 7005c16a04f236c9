"""Takes the tokens of a long row through an MLP in tiles, one after another: its inner arrays are those of one tile."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from lcx import sharding

TILE = 16384  # the most tokens of a row that a device takes at a time


def in_tiles(mlp: nn.Module, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
    """mlp(x), of which the backward pass recomputes one tile at a time.

    A row is taken whole if it is not longer than TILE on each device, or does not divide into equal tiles of at least a
    quarter of TILE. So is every row by an MLP that sows losses, and while activations are recorded: every tile would
    have values of its own.

    Args:
      mlp: a bound module.
    """
    B, T, D = x.shape
    devices = sharding.axis_size("context")
    count = _count(T // devices) if T % devices == 0 else 1
    if count == 1 or mlp.is_initializing():
        return mlp(x)
    unbound, variables = mlp.clone(parent=None), mlp.variables
    if mlp.is_mutable_collection("activations") or _sows(unbound, variables, x):
        return mlp(x)

    @jax.checkpoint
    def of_tile(tile: Float[Array, "B devices tile D"]) -> Float[Array, "B devices tile D"]:
        tile = sharding.constrain(tile, sharding.BATCH_AXES, "context", None, None)
        y = unbound.apply(variables, tile.reshape(B, -1, D)).reshape(tile.shape)
        return sharding.constrain(y, sharding.BATCH_AXES, "context", None, None)

    # Every device walks through its own tokens: the axis of devices stays whole, and that of tiles comes first.
    tiles = jnp.moveaxis(x.reshape(B, devices, count, -1, D), 2, 0)
    return jnp.moveaxis(jax.lax.map(of_tile, tiles), 0, 2).reshape(B, T, D)


def _sows(mlp: nn.Module, variables: Any, x: Float[Array, "B T D"]) -> bool:
    """Whether the MLP adds something to the loss (objectives.next_token)."""
    _, sown = jax.eval_shape(lambda x: mlp.apply(variables, x, mutable=["losses"]), x[:, :1])
    return bool(sown)


def _count(tokens: int) -> int:
    """The fewest equal tiles of at most TILE tokens; 1 if they would be short."""
    fewest = -(-tokens // TILE)
    return next((count for count in range(fewest, 4 * fewest + 1) if tokens % count == 0), 1)
