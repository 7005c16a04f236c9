"""EXAONE 4: norms after attention and MLP, and on q and k.

In the 32B, three of four layers slide and the others have no positions; in the 1.2B, without a window, all have them.
"""

import dataclasses

from lcx.convert.hf.layered import FULL, SLIDING, Layered
from lcx.convert.hf.llama_like import layer_types


@dataclasses.dataclass(frozen=True)
class Exaone4(Layered):
    model_type: str = "exaone4"
    architecture: str = "Exaone4ForCausalLM"
    own: frozenset[str] = frozenset({"sliding_window_pattern"})
    period: int | None = 4
    norm_names: tuple = (
        ("post_attention_layernorm", "mixer_post_norm"),
        ("post_feedforward_layernorm", "mlp_post_norm"),
    )
    anchor: str = "layers.0.post_attention_layernorm.weight"
    num_kv_heads: int | None = 32
    sliding_window: int | None = 4096
    norm_eps: float = 1e-5
    qk_norm: bool | str = True
    writes_head_dim: bool = False

    def block(self, config):
        return {"norms": "after"}

    def kinds(self, config, num_layers):
        if config.get("sliding_window", self.sliding_window) is None and config.get("layer_types") is None:
            return [FULL] * num_layers
        return layer_types(config, num_layers) or super().kinds(config, num_layers)

    def rotates(self, config, index, kind):
        return kind == SLIDING or config.get("sliding_window", self.sliding_window) is None

    def own_keys(self, model, depth):
        mixers = [layer.block.mixer for layer in depth]
        # Without a window all layers have positions; a window that no layer has says that they have none.
        default = None if mixers[0].rope is not None else self.sliding_window
        return {"sliding_window": next((mixer.window for mixer in mixers if mixer.window), default)}


EXAONE4 = Exaone4()
