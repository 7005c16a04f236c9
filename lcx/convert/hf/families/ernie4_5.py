"""ERNIE 4.5, dense: Llama with heads rotated in pairs of neighbours, and one key for the biases of all projections."""

import dataclasses

from lcx.convert.hf.layered import Layered
from lcx.convert.hf.values import boolean, integer
from lcx.mlps.gated import GatedMlp


@dataclasses.dataclass(frozen=True)
class Ernie45(Layered):
    model_type: str = "ernie4_5"
    architecture: str = "Ernie4_5ForCausalLM"
    own: frozenset[str] = frozenset({"use_bias"})
    num_kv_heads: int | None = 2
    head_dim: int | None = 128
    norm_eps: float = 1e-5
    theta: float = 500_000.0
    tied: bool = True
    paired: bool = True

    def attention(self, config):
        return dict.fromkeys(("qkv_bias", "o_bias"), boolean(config, "use_bias"))

    def mlp(self, config, index):
        size, bias = integer(config, "intermediate_size"), boolean(config, "use_bias")
        return GatedMlp(size, bias, activation=self.activation_of(config), parent=None)

    def own_keys(self, model, depth):
        return {"use_bias": depth[0].block.mixer.qkv_bias}


ERNIE4_5 = Ernie45()
