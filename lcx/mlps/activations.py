"""The activation functions that a configuration can name."""

import functools
from collections.abc import Callable

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array

from lcx.errors import UserError

Activation = Callable[[Array], Array]

ACTIVATIONS: dict[str, Activation] = {
    "silu": nn.silu,
    "gelu": functools.partial(nn.gelu, approximate=False),
    "gelu_tanh": functools.partial(nn.gelu, approximate=True),
    "relu": nn.relu,
    "relu2": lambda x: jnp.square(nn.relu(x)),  # So et al. 2021, arXiv 2109.08668
    "identity": lambda x: x,
}


def activation(chosen: str | Activation) -> Activation:
    """The activation function with this name; a function is returned unchanged.

    Raises:
      UserError: an unknown name.
    """
    if callable(chosen):
        return chosen
    if chosen not in ACTIVATIONS:
        names = ", ".join(ACTIVATIONS)
        raise UserError(f"activation {chosen!r}: expected a function or one of {names}; change activation")
    return ACTIVATIONS[chosen]
