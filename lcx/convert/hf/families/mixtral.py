"""Mixtral: Mistral with experts."""

import dataclasses

from lcx.convert.core.rules import renamed
from lcx.convert.hf.experts import WithExperts
from lcx.convert.hf.layered import FULL, SLIDING


@dataclasses.dataclass(frozen=True)
class Mixtral(WithExperts):
    model_type: str = "mixtral"
    architecture: str = "MixtralForCausalLM"
    fixed: tuple = (("router_jitter_noise", (None, 0)),)
    experts_key: str = "num_local_experts"
    size_key: str = "intermediate_size"
    projections: tuple[str, str, str] = ("w1", "w3", "w2")
    defaults: tuple[int, int, int] = (8, 14336, 2)
    num_kv_heads: int | None = 8
    norm_eps: float = 1e-5
    theta: float = 1_000_000.0

    def kinds(self, config, num_layers):
        return [FULL if config.get("sliding_window") is None else SLIDING] * num_layers

    def _kind_keys(self, depth):
        return {"sliding_window": depth[0].block.mixer.window}

    def rules(self, model):
        return renamed(super().rules(model), {r"(layers\.\d+)\.mlp\.": r"\1.block_sparse_moe."})


MIXTRAL = Mixtral()
