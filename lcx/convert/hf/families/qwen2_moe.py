"""Qwen2-MoE (also Qwen1.5-MoE): Qwen2 with experts, and one that every token uses."""

import dataclasses

from lcx.convert.core.rules import Part, Rule, Transposed
from lcx.convert.hf.experts import QwenWithExperts
from lcx.convert.hf.layered import FULL, SLIDING
from lcx.convert.hf.values import boolean, integer
from lcx.errors import UserError
from lcx.mlps.experts import ExpertsMlp


@dataclasses.dataclass(frozen=True)
class Qwen2Moe(QwenWithExperts):
    model_type: str = "qwen2_moe"
    architecture: str = "Qwen2MoeForCausalLM"
    own: frozenset[str] = QwenWithExperts.own | {"shared_expert_intermediate_size", "qkv_bias"}
    defaults: tuple[int, int, int] = (60, 1408, 4)
    num_kv_heads: int | None = 16
    sliding_window: int | None = 4096
    biases: str = "qkv"
    writes_head_dim: bool = False

    def attention(self, config):
        return {"qkv_bias": boolean({"qkv_bias": True, **config}, "qkv_bias")}

    def experts(self, config):
        return {"shared_size": integer(config, "shared_expert_intermediate_size", 5632)}

    def kinds(self, config, num_layers):
        if not boolean(config, "use_sliding_window"):
            return [FULL] * num_layers
        if config.get("layer_types") is None:
            raise UserError(
                "config.json has use_sliding_window without layer_types, which versions of transformers read "
                "differently for model_type 'qwen2_moe': add layer_types"
            )
        return super().kinds(config, num_layers)

    def own_keys(self, model, depth):
        keys = super().own_keys(model, depth)
        mixers = [layer.block.mixer for layer in depth]
        windows = [mixer.window for mixer in mixers]
        shared = next(x.block.mlp.shared_size for x in depth if isinstance(x.block.mlp, ExpertsMlp))
        return keys | {
            "shared_expert_intermediate_size": shared,
            "qkv_bias": mixers[0].qkv_bias,
            "use_sliding_window": any(windows),
            "sliding_window": next((window for window in windows if window), None),
            "layer_types": [FULL if window is None else SLIDING for window in windows],
        }

    def mlp_rules(self, prefix, layer):
        table, path = super().mlp_rules(prefix, layer), f"{layer.path}/mlp"
        if not isinstance(layer.block.mlp, ExpertsMlp):
            return table
        names = ("gate_proj", "up_proj", "down_proj")
        table += self._kernels(f"{prefix}shared_expert.", f"{path}/shared_expert", names, layer.repeat)
        gate = Part(f"{path}/shared_gate/kernel", Transposed(), layer.repeat)
        return [*table, Rule(f"{prefix}shared_expert_gate.weight", (gate,))]

    def _biases(self, config):
        return {}


QWEN2_MOE = Qwen2Moe()
