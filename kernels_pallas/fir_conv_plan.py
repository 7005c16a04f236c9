"""What the block-Toeplitz convolution and its forms for single platforms share."""

import jax.numpy as jnp
from jax import Array

# Of the form through Mosaic GPU: with 256 the sums of the backward walk spill, and float32 exceeds shared memory.
MOSAIC_TAPS = 128


def reached(before: Array, h: Array, n: int) -> Array:
    """The contribution of the K - 1 inputs before the row to its first n tokens, float32 [B, D, n].

    Args:
      before: [B, D, K - 1]. h: [G, K].
    """
    (B, D, P), (G, K) = before.shape, h.shape
    tap = P + jnp.arange(n) - jnp.arange(P)[:, None]
    blocks = jnp.where(tap < K, h[:, jnp.minimum(tap, K - 1)], 0)
    groups = before.astype(jnp.float32).reshape(B, G, D // G, P)
    return jnp.einsum("bgdp,gpt->bgdt", groups, blocks, precision="highest").reshape(B, D, n)
