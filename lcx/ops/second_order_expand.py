"""The symmetric square, which turns the square of a product into a product: (q . k)^2 = expand(q) . expand(k).

Its entries are x_m x_n for m <= n, products with m < n counted twice (each once with factor sqrt 2). The smallest has
H (H + 1) / 2 entries. Blocks of 16 rows keep the products dense at little cost: block a holds x_m x_n for m in
[16 a, 16 a + 16), n in [16 a, H), row by row, so its first 16 columns hold both orders (factor 1) and the others one
(factor sqrt 2): 2560 numbers for H = 64 against 2080 and the full 4096.
"""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

BLOCK = 16


def expanded_size(head_dim: int) -> int:
    return sum(min(BLOCK, head_dim - at) * (head_dim - at) for at in range(0, head_dim, BLOCK))


def expand(x: Float[Array, "*batch H"]) -> Float[Array, "*batch P"]:
    """The symmetric square: expand(x) . expand(y) = (x . y)^2."""
    H, parts = x.shape[-1], []
    for at in range(0, H, BLOCK):
        once = np.arange(at, H) < at + BLOCK
        right = x[..., None, at:] * np.where(once, 1, 2**0.5).astype(x.dtype)
        parts.append((x[..., at : at + BLOCK, None] * right).reshape(*x.shape[:-1], -1))
    return jnp.concatenate(parts, axis=-1)
