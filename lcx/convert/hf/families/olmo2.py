"""OLMo 2 and OLMo 3: norms after attention and MLP, and on all heads of q and k at once.

In OLMo 3, three of four layers slide, and a context extension scales the full layers only.
"""

import dataclasses

from lcx.convert.hf.layered import Layered
from lcx.convert.hf.rope_parameters import RopeDialect


@dataclasses.dataclass(frozen=True)
class Olmo2Rope(RopeDialect):
    """transformers 4 loads OLMo 2 only with `linear` and `dynamic`, and only if these are written as `type`."""

    def spelled(self, keys, rope, window):
        old = keys["rope_scaling"] or {}
        if set(old) != {"rope_type", "factor"}:
            return keys
        return keys | {"rope_scaling": {"type": old["rope_type"], "factor": old["factor"]}}


@dataclasses.dataclass(frozen=True)
class Olmo(Layered):
    norm_names: tuple = (
        ("post_attention_layernorm", "mixer_post_norm"),
        ("post_feedforward_layernorm", "mlp_post_norm"),
    )
    anchor: str = "layers.0.post_attention_layernorm.weight"
    biases: str = "config"
    norm_eps: float = 1e-5
    qk_norm: bool | str = "all_heads"
    writes_head_dim: bool = False

    def block(self, config):
        return {"norms": "after"}


OLMO2 = Olmo(model_type="olmo2", architecture="Olmo2ForCausalLM", rope=Olmo2Rope())
OLMO3 = Olmo(
    model_type="olmo3",
    architecture="Olmo3ForCausalLM",
    period=4,
    sliding_window=4096,
    theta=500_000.0,
    local_theta=500_000.0,
)
