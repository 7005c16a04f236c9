"""GLM-4: half of each head rotated, in pairs of neighbours; in the models of 0414 also norms after each part."""

import dataclasses

from lcx.convert.hf.layered import Layered
from lcx.convert.hf.rope_parameters import RopeDialect


@dataclasses.dataclass(frozen=True)
class Glm(Layered):
    model_type: str = "glm"
    architecture: str = "GlmForCausalLM"
    fused: tuple = (("gate_up_proj", ("gate_proj", "up_proj")),)
    num_kv_heads: int | None = 2
    head_dim: int | None = 128
    norm_eps: float = 0.00000015625
    biases: str = "qkv_of_config"
    rope: RopeDialect = RopeDialect(partial=True)
    partial_factor: float = 0.5
    paired: bool = True

    def model(self, config, *, dtype):
        return super().model({"attention_bias": True, **config}, dtype=dtype)


@dataclasses.dataclass(frozen=True)
class Glm4(Glm):
    model_type: str = "glm4"
    architecture: str = "Glm4ForCausalLM"
    norm_names: tuple = (
        ("input_layernorm", "mixer_norm"),
        ("post_self_attn_layernorm", "mixer_post_norm"),
        ("post_attention_layernorm", "mlp_norm"),
        ("post_mlp_layernorm", "mlp_post_norm"),
    )

    def block(self, config):
        return {"norms": "both"}


GLM, GLM4 = Glm(), Glm4()
