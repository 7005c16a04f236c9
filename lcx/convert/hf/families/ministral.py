"""Ministral: Mistral whose layers may be of two kinds, with and without a window."""

import dataclasses

from lcx.convert.hf.layered import FULL, SLIDING, Layered
from lcx.convert.hf.llama_like import layer_types


@dataclasses.dataclass(frozen=True)
class Ministral(Layered):
    model_type: str = "ministral"
    architecture: str = "MinistralForCausalLM"
    num_kv_heads: int | None = 8
    sliding_window: int | None = 4096

    def kinds(self, config, num_layers):
        window = config.get("sliding_window", self.sliding_window)
        kind = FULL if window is None else SLIDING
        return layer_types(config, num_layers) or [kind] * num_layers

    def own_keys(self, model, depth):
        windows = [layer.block.mixer.window for layer in depth]
        return {
            "sliding_window": next((window for window in windows if window), None),
            "layer_types": [FULL if window is None else SLIDING for window in windows],
        }


MINISTRAL = Ministral()
