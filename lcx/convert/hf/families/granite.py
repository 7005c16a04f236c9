"""Granite, dense: Llama with multipliers on embeddings, scores, residual branches and logits."""

import dataclasses

from lcx.convert.hf.layered import Layered
from lcx.convert.hf.values import number


@dataclasses.dataclass(frozen=True)
class Granite(Layered):
    model_type: str = "granite"
    architecture: str = "GraniteForCausalLM"
    own: frozenset[str] = frozenset({
        "embedding_multiplier", "logits_scaling", "residual_multiplier", "attention_multiplier",
    })  # fmt: skip
    biases: str = "config"
    mlp_bias: bool = True
    writes_head_dim: bool = False

    def attention(self, config):
        return {"scale": number(config, "attention_multiplier", 1.0)}

    def block(self, config):
        return {"residual_multiplier": number(config, "residual_multiplier", 1.0)}

    def decoder(self, config):
        return {
            "embedding_multiplier": number(config, "embedding_multiplier", 1.0),
            "logit_multiplier": 1 / number(config, "logits_scaling", 1.0),
        }

    def own_keys(self, model, depth):
        block = depth[0].block
        scale = block.mixer.scale
        return {
            "embedding_multiplier": model.embedding_multiplier,
            "residual_multiplier": block.residual_multiplier,
            "attention_multiplier": block.mixer.head_dim**-0.5 if scale is None else scale,
            "logits_scaling": 1 / model.logit_multiplier,
        }


GRANITE = Granite()
