"""What both recurrences of linear attention share on an NVIDIA GPU: a program's tile, its chunk, and its products."""

import dataclasses

import jax.numpy as jnp
from jax import lax

NARROW = 16  # the narrowest product; the sum of keys is kept as 16 equal columns, cheaper than a vector


@dataclasses.dataclass(frozen=True)
class Tile:
    """columns: of the value dimension in one program; stages: chunks in flight, each in shared memory."""

    columns: int
    warps: int
    stages: int


def chunk(dtype) -> int:
    """Tokens at a time."""
    return 64 if dtype == jnp.bfloat16 else 16


def dot(a, b, a_axis, b_axis, *, interpret):
    """float32 accumulation; float32 inputs as three TensorFloat-32 products, which is close to float32."""
    precision = None
    if a.dtype == jnp.float32:
        precision = lax.Precision.HIGHEST if interpret else lax.DotAlgorithmPreset.TF32_TF32_F32_X3
    dims = (((a_axis,), (b_axis,)), ((), ()))
    return lax.dot_general(a, b, dims, precision=precision, preferred_element_type=jnp.float32)
