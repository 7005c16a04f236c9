"""gpt-oss: attention sinks, every second layer slides, biased experts with a clamped SwiGLU; weights often in MXFP4.

model.layers.{i}.self_attn.sinks [N]
model.layers.{i}.mlp.router.weight [E, D], .bias [E]
model.layers.{i}.mlp.experts.
  gate_up_proj [E, D, 2F], gate_up_proj_bias [E, 2F]       gate and up alternate along the last axis
  down_proj [E, F, D], down_proj_bias [E, D]
"""

import dataclasses

from lcx.convert.core.rules import Flat, Part, Rule, Same, Transposed
from lcx.convert.hf.experts import WithExperts
from lcx.convert.hf.values import number
from lcx.mlps.experts import ExpertsMlp

#: The scaling of a config.json that states none, as in transformers.
_ROPE = {
    "rope_type": "yarn",
    "factor": 32.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
    "original_max_position_embeddings": 4096,
}


@dataclasses.dataclass(frozen=True)
class GptOss(WithExperts):
    model_type: str = "gpt_oss"
    architecture: str = "GptOssForCausalLM"
    unpacks: frozenset[str] = frozenset({"mxfp4"})
    own: frozenset[str] = frozenset(
        {"swiglu_limit", "experts_per_token", "initial_context_length", "quantization_config"}
    )
    fixed: tuple = (("swiglu_alpha", (1.702,)),)
    experts_key: str = "num_local_experts"
    size_key: str = "intermediate_size"
    defaults: tuple[int, int, int] = (128, 2880, 4)
    period: int | None = 2
    num_kv_heads: int | None = 8
    head_dim: int | None = 64
    sliding_window: int | None = 128
    norm_eps: float = 1e-5
    theta: float = 150_000.0
    biases: str = "config"
    mlp_types: tuple[type, ...] = (ExpertsMlp,)

    def model(self, config, *, dtype):
        config = {"attention_bias": True, **config}
        if not config.get("rope_parameters") and not config.get("rope_scaling"):
            config["rope_scaling"] = _ROPE
        return super().model(config, dtype=dtype)

    def attention(self, config):
        return {"sinks": True}

    def gating(self, config):
        return "chosen"

    def experts(self, config):
        return {"bias": True, "clamp": number(config, "swiglu_limit", 7.0)}

    def own_keys(self, model, depth):
        return super().own_keys(model, depth) | {"swiglu_limit": depth[0].block.mlp.clamp}

    def _attention_rules(self, prefix, layer):
        sinks = Part(f"{layer.path}/mixer/sinks", Same(), layer.repeat)
        return [*super()._attention_rules(prefix, layer), Rule(f"{prefix}sinks", (sinks,))]

    def mlp_rules(self, prefix, layer):
        mlp, path, repeat = layer.block.mlp, f"{layer.path}/mlp", layer.repeat
        E, F = mlp.num_experts, mlp.intermediate_size

        def both(kind: str) -> tuple[Part, ...]:
            return tuple(Part(f"{path}/{name}_{kind}", Flat(), repeat) for name in ("gate_proj", "up_proj"))

        return [
            Rule(f"{prefix}router.weight", (Part(f"{path}/router/kernel", Transposed(), repeat),)),
            Rule(f"{prefix}router.bias", (Part(f"{path}/router/bias", Same(), repeat),)),
            Rule(f"{prefix}experts.gate_up_proj", both("kernel"), block=1, shape=(E, -1, 2 * F)),
            Rule(f"{prefix}experts.gate_up_proj_bias", both("bias"), block=1, shape=(E, 2 * F)),
            Rule(f"{prefix}experts.down_proj", (Part(f"{path}/down_proj_kernel", Same(), repeat),)),
            Rule(f"{prefix}experts.down_proj_bias", (Part(f"{path}/down_proj_bias", Same(), repeat),)),
        ]


GPT_OSS = GptOss()
