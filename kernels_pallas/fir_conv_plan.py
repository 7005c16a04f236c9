"""What the block-Toeplitz convolution and its forms for single platforms share."""

import jax.numpy as jnp
from jax import Array


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
