"""SmolLM3: Llama with every fourth layer without positions."""

import dataclasses

from lcx.convert.hf.layered import FULL, SLIDING, Layered
from lcx.convert.hf.llama_like import layer_types
from lcx.convert.hf.values import boolean, integer
from lcx.errors import UserError
from lcx.rope_fields import shown


@dataclasses.dataclass(frozen=True)
class SmolLm3(Layered):
    model_type: str = "smollm3"
    architecture: str = "SmolLM3ForCausalLM"
    own: frozenset[str] = frozenset({"no_rope_layers", "no_rope_layer_interval"})
    num_kv_heads: int | None = 4
    biases: str = "config"
    mlp_bias: bool = True
    writes_head_dim: bool = False
    theta: float = 2_000_000.0
    tied: bool = True

    def kinds(self, config, num_layers):
        slides = boolean(config, "use_sliding_window") and config.get("sliding_window") is not None
        found = layer_types(config, num_layers)
        if found is not None:
            return found if slides else [FULL] * num_layers
        return [SLIDING if slides and not self.rotates(config, i, "") else FULL for i in range(num_layers)]

    def rotates(self, config, index, kind):
        listed = config.get("no_rope_layers")  # 1 for a layer that rotates, despite its name
        if listed is None:
            return (index + 1) % integer(config, "no_rope_layer_interval", 4) != 0
        if not isinstance(listed, list) or len(listed) <= index or listed[index] not in (0, 1):
            raise UserError(
                f"config.json has no_rope_layers {shown(listed, 60)}, expected a 0 or 1 for each layer: change it"
            )
        return bool(listed[index])

    def own_keys(self, model, depth):
        windows = [layer.block.mixer.window for layer in depth]
        return {
            "no_rope_layers": [int(layer.block.mixer.rope is not None) for layer in depth],
            "use_sliding_window": any(windows),
            "sliding_window": next((window for window in windows if window), None),
            "layer_types": [FULL if window is None else SLIDING for window in windows],
        }


SMOLLM3 = SmolLm3()
