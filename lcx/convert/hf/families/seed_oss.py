"""Seed-OSS: Llama with biases on q, k and v, and a key of its own for that of the output projection."""

import dataclasses

from lcx.convert.hf.layered import Layered
from lcx.convert.hf.values import boolean


@dataclasses.dataclass(frozen=True)
class SeedOss(Layered):
    model_type: str = "seed_oss"
    architecture: str = "SeedOssForCausalLM"
    own: frozenset[str] = frozenset({"attention_out_bias", "residual_dropout"})
    num_kv_heads: int | None = 8
    head_dim: int | None = 128
    biases: str = "qkv_of_config"
    mlp_bias: bool = True

    def attention(self, config):
        qkv = boolean({"attention_bias": True, **config}, "attention_bias")
        return {"qkv_bias": qkv, "o_bias": boolean(config, "attention_out_bias")}

    def own_keys(self, model, depth):
        return {"attention_out_bias": depth[0].block.mixer.o_bias}


SEED_OSS = SeedOss()
