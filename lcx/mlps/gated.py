"""The gated MLP: SwiGLU, GeGLU and the like (Shazeer 2020, arXiv 2002.05202)."""

import flax.linen as nn
from jaxtyping import Array, Float

from lcx.errors import check_sizes
from lcx.layers import Linear
from lcx.mlps.activations import Activation, activation


class GatedMlp(nn.Module):
    """down(activation(gate x) * up x): SwiGLU with silu (Llama), GeGLU with gelu_tanh (Gemma).

    Attributes:
      bias: whether all three projections have a bias.
      activation: a key of activations.ACTIVATIONS, or a function of arrays. "gelu" is the exact (erf) form.
    """

    intermediate_size: int
    bias: bool = False
    activation: str | Activation = "silu"

    @nn.compact
    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        check_sizes("GatedMlp", intermediate_size=self.intermediate_size)
        act = activation(self.activation)
        D, F = (x.shape[-1],), (self.intermediate_size,)
        gate = Linear(D, F, ("embed", "mlp"), self.bias, name="gate_proj")(x)
        up = Linear(D, F, ("embed", "mlp"), self.bias, name="up_proj")(x)
        return Linear(F, D, ("mlp", "embed"), self.bias, name="down_proj")(act(gate) * up)
