"""OLMoE: experts, and norms on all heads of q and k at once."""

import dataclasses

from lcx.convert.hf.experts import WithExperts
from lcx.convert.hf.values import boolean
from lcx.mlps.experts import ExpertsMlp


@dataclasses.dataclass(frozen=True)
class Olmoe(WithExperts):
    model_type: str = "olmoe"
    architecture: str = "OlmoeForCausalLM"
    own: frozenset[str] = frozenset({"norm_topk_prob"})
    fixed: tuple = (("clip_qkv", (None,)), ("sliding_window", (None,)))
    size_key: str = "intermediate_size"
    defaults: tuple[int, int, int | None] = (64, 2048, 8)
    norm_eps: float = 1e-5
    biases: str = "config"
    qk_norm: bool | str = "all_heads"
    writes_head_dim: bool = False
    mlp_types: tuple[type, ...] = (ExpertsMlp,)

    def gating(self, config):
        return "normalised" if boolean(config, "norm_topk_prob") else "softmax"

    def balance_loss(self, config):
        return super().balance_loss({"router_aux_loss_coef": 0.01, **config})

    def own_keys(self, model, depth):
        normalised = depth[0].block.mlp.gating == "normalised"
        return super().own_keys(model, depth) | {"norm_topk_prob": normalised}


OLMOE = Olmoe()
