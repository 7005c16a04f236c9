"""Arcee (AFM-4.5B): Llama with an MLP without a gate, down(relu(up x)^2)."""

import dataclasses

from lcx.convert.core.rules import Flat, Part, Rule
from lcx.convert.hf.layered import Layered
from lcx.convert.hf.values import boolean, integer
from lcx.mlps.plain import PlainMlp


@dataclasses.dataclass(frozen=True)
class Arcee(Layered):
    model_type: str = "arcee"
    architecture: str = "ArceeForCausalLM"
    activation: tuple[str, str] = ("hidden_act", "relu2")
    norm_eps: float = 1e-5
    biases: str = "config"
    mlp_bias: bool = True
    writes_head_dim: bool = False
    mlp_types: tuple[type, ...] = (PlainMlp,)

    def mlp(self, config, index):
        size, bias = integer(config, "intermediate_size"), boolean(config, "mlp_bias")
        return PlainMlp(size, bias, activation=self.activation_of(config), parent=None)

    def mlp_rules(self, prefix, layer):
        path, names = f"{layer.path}/mlp", ("up_proj", "down_proj")
        biases = [
            Rule(f"{prefix}{name}.bias", (Part(f"{path}/{name}/bias", Flat(), layer.repeat),))
            for name in names * layer.block.mlp.bias
        ]
        return self._kernels(prefix, path, names, layer.repeat) + biases


ARCEE = Arcee()
