"""Qwen3-MoE: Qwen3 with experts; one window for all layers, or none."""

import dataclasses

from lcx.convert.hf.experts import QwenWithExperts
from lcx.convert.hf.layered import FULL, SLIDING
from lcx.convert.hf.values import boolean


@dataclasses.dataclass(frozen=True)
class Qwen3Moe(QwenWithExperts):
    model_type: str = "qwen3_moe"
    architecture: str = "Qwen3MoeForCausalLM"
    num_kv_heads: int | None = 4
    sliding_window: int | None = 4096
    biases: str = "config"
    qk_norm: bool | str = True

    def kinds(self, config, num_layers):
        return [SLIDING if boolean(config, "use_sliding_window") else FULL] * num_layers

    def own_keys(self, model, depth):
        window = depth[0].block.mixer.window
        own = {"use_sliding_window": window is not None, "sliding_window": window}
        return super().own_keys(model, depth) | own


QWEN3_MOE = Qwen3Moe()
