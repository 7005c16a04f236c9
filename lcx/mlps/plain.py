"""The MLP without a gate, as in GPT-2, GPT-NeoX, StarCoder 2, Phi-2 and Nemotron."""

import flax.linen as nn
from jaxtyping import Array, Float

from lcx.errors import check_sizes
from lcx.layers import Linear
from lcx.mlps.activations import Activation, activation


class PlainMlp(nn.Module):
    """down(activation(up x)).

    Attributes:
      bias: whether both projections have a bias.
      activation: a key of activations.ACTIVATIONS, or a function of arrays. "gelu" is the exact (erf) form.
    """

    intermediate_size: int
    bias: bool = False
    activation: str | Activation = "gelu"

    @nn.compact
    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        check_sizes("PlainMlp", intermediate_size=self.intermediate_size)
        act = activation(self.activation)
        D, F = (x.shape[-1],), (self.intermediate_size,)
        up = Linear(D, F, ("embed", "mlp"), self.bias, name="up_proj")(x)
        return Linear(F, D, ("mlp", "embed"), self.bias, name="down_proj")(act(up))
