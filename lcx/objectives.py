"""What a training step minimises. An objective returns sums, so that any split of the global batch adds up exactly."""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from lcx.model import Decoder
from lcx.ops.cross_entropy import cross_entropy

Batch = dict[str, Array]


def next_token(model: Decoder, variables: Any, batch: Batch) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Sum of the weighted next-token nll in nats, and the sum of the weights.

    Labels come shifted from the data; a zero weight masks padding and the first token of a document.
    """
    x, _ = model.apply(
        variables, batch["tokens"], positions=batch["positions"], segment_ids=batch["segment_ids"], method="hidden"
    )
    weights = batch["loss_weights"].astype(jnp.float32)
    return cross_entropy(x, model.head(variables["params"]), batch["labels"], weights), jnp.sum(weights)
