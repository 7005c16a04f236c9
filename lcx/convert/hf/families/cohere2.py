"""Cohere 2 (Command R7B and A): parallel blocks with one LayerNorm; only sliding layers have positions."""

import dataclasses

from lcx.convert.hf.layered import SLIDING, Layered
from lcx.convert.hf.values import number
from lcx.layers import Norm


@dataclasses.dataclass(frozen=True)
class Cohere2(Layered):
    model_type: str = "cohere2"
    architecture: str = "Cohere2ForCausalLM"
    own: frozenset[str] = frozenset({"logit_scale", "sliding_window_pattern"})
    fixed: tuple = (
        ("position_embedding_type", ("rope_gptj",)),
        ("rotary_pct", (1,)),
        ("use_embedding_sharing", (True,)),
        ("use_gated_activation", (True,)),
        ("use_parallel_block", (True,)),
        ("use_parallel_embedding", (False,)),
        ("order_of_interleaved_layers", ("local_attn_first",)),
    )
    period: int | None = 4
    norm_names: tuple = (("input_layernorm", "mixer_norm"),)
    eps_key: str = "layer_norm_eps"
    norm_eps: float = 1e-5
    biases: str = "config"
    sliding_window: int | None = 4096
    tied: bool = True
    paired: bool = True

    def block(self, config):
        return {"norm": Norm(center=True), "parallel": True, "shared_norm": True}

    def decoder(self, config):
        return {"norm": Norm(center=True), "logit_multiplier": number(config, "logit_scale", 0.0625)}

    def rotates(self, config, index, kind):
        return kind == SLIDING

    def own_keys(self, model, depth):
        return {"logit_scale": model.logit_multiplier}


COHERE2 = Cohere2()
