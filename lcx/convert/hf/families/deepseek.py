"""DeepSeek V2 (and V2-Lite) and V3 (and R1): latent attention, and experts after some layers with a usual MLP.

model.layers.{i}.self_attn.
  q_a_proj.weight [Rq, D], .bias      q_a_layernorm.weight [Rq]      q_b_proj.weight [N*(nope+rope), Rq]
  q_proj.weight [N*(nope+rope), D]                                   instead of these three, without q_lora_rank
  kv_a_proj_with_mqa.weight [R+rope, D], .bias   kv_a_layernorm.weight [R]   kv_b_proj.weight [N*(nope+v), R]
  o_proj.weight [D, N*v], .bias
model.layers.{i}.mlp.
  gate.weight [E, D]                  gate.e_score_correction_bias [E]         (V3)
  experts.{e}.{gate,up,down}_proj.weight      shared_experts.{gate,up,down}_proj.weight

The layers of multi-token prediction that follow the last layer in the files of V3 are not read.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from lcx.convert.core.rules import Flat, Part, Rule, Same
from lcx.convert.hf.experts import WithExperts
from lcx.convert.hf.layered import SLIDING
from lcx.convert.hf.values import boolean, integer, number
from lcx.errors import UserError
from lcx.mixers.latent_attention import LatentAttention
from lcx.mlps.experts import ExpertsMlp
from lcx.mlps.gated import GatedMlp
from lcx.rope_fields import shown

#: transformers' defaults of the sizes of latent attention.
_SIZES = {"kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128}
_MOST_NEXT = 100  # layers of multi-token prediction; a damaged file shall not build a huge pattern
_GREEDY, _IN_GROUPS = "greedy", "group_limited_greedy"


@dataclasses.dataclass(frozen=True)
class DeepSeek(WithExperts):
    """What V2 and V3 have in common.

    Attributes:
      dense: the default of first_k_dense_replace.
      shared: the default of n_shared_experts.
    """

    own: frozenset[str] = frozenset({
        *_SIZES, "q_lora_rank", "qk_head_dim", "first_k_dense_replace", "n_shared_experts", "n_group", "topk_group",
        "routed_scaling_factor", "norm_topk_prob", "topk_method", "quantization_config",
    })  # fmt: skip
    fixed: tuple = (
        ("moe_layer_freq", (1,)),
        ("sliding_window", (None,)),
        ("use_sliding_window", (None, False)),
    )
    unpacks: frozenset[str] = frozenset({"fp8"})
    experts_key: str = "n_routed_experts"
    fused: tuple = (("kv_a_proj_with_mqa", ("kv_a_proj",)),)
    biases: str = "config"
    mixer_type: type = LatentAttention
    dense: int = 0
    shared: int = 1

    # ------------------------------------------------------------------------------------ config.json -> model

    def mixer(self, config, rope, window):
        sizes: dict[str, Any] = {name: integer(config, name, default) for name, default in _SIZES.items()}
        whole = "q_lora_rank" in config and config["q_lora_rank"] is None  # V2-Lite
        return LatentAttention(
            integer(config, "num_attention_heads"),
            **sizes,
            q_lora_rank=None if whole else integer(config, "q_lora_rank", 1536),
            bias=boolean(config, "attention_bias"),
            rope=rope,
            rope_interleave=self.interleaved(config),
            parent=None,
        )

    def interleaved(self, config: Mapping[str, Any]) -> bool:
        """LatentAttention.rope_interleave."""
        return True

    def mlp(self, config, index):
        if index < integer(config, "first_k_dense_replace", self.dense, least=0):
            activation = self.activation_of(config)
            return GatedMlp(integer(config, "intermediate_size"), activation=activation, parent=None)
        return super().mlp(config, index)

    def balance_loss(self, config):
        return 0.0  # transformers has none for these

    def experts(self, config):
        size = integer(config, self.size_key, self.defaults[1])
        return {
            "gate_multiplier": number(config, "routed_scaling_factor", 1.0),
            "shared_size": size * integer(config, "n_shared_experts", self.shared),
            "shared_gate": False,
            "float32_router": True,
        }

    def kinds(self, config, num_layers):
        kinds = super().kinds(config, num_layers)
        if SLIDING in kinds:
            raise UserError(
                f"config.json has layer_types with {SLIDING}, which model_type {self.model_type!r} does not have: "
                "remove layer_types"
            )
        return kinds

    def _sizes(self, config):
        heads = integer(config, "num_attention_heads")
        if integer(config, "num_key_value_heads", heads) != heads:
            raise UserError(
                f"config.json has num_key_value_heads {shown(config['num_key_value_heads'])}, expected "
                f"num_attention_heads = {heads}: each head of latent attention has its own keys"
            )
        rotated = integer(config, "qk_rope_head_dim", _SIZES["qk_rope_head_dim"])
        return super()._sizes({**config, "num_key_value_heads": heads, "head_dim": rotated})

    # ------------------------------------------------------------------------------------ model -> config.json

    def shape(self, mixer):
        sizes = {"num_heads": mixer.num_heads, "num_kv_heads": mixer.num_heads, "head_dim": mixer.head_dim}
        return sizes | {"qkv_bias": mixer.bias}

    def _kind_keys(self, depth):
        return {}

    def own_keys(self, model, depth):
        mixer, mlps = depth[0].block.mixer, [layer.block.mlp for layer in depth]
        sparse = [i for i, mlp in enumerate(mlps) if isinstance(mlp, ExpertsMlp)]
        keys = {name: getattr(mixer, name) for name in ("q_lora_rank", *_SIZES)}
        keys["first_k_dense_replace"] = sparse[0] if sparse else len(depth)
        if not sparse:
            return keys
        keys |= super().own_keys(model, depth)
        del keys["router_aux_loss_coef"], keys["output_router_logits"]
        mlp = mlps[sparse[0]]
        return keys | {
            "intermediate_size": (mlp if sparse[0] == 0 else mlps[0]).intermediate_size,
            "n_shared_experts": max((mlp.shared_size or 0) // mlp.intermediate_size, 1),
            "routed_scaling_factor": mlp.gate_multiplier,
            "norm_topk_prob": mlp.gating.startswith("normalised"),
            "n_group": mlp.num_groups,
            "topk_group": mlp.num_chosen_groups,
        }

    # ------------------------------------------------------------------------------------ tensors <-> parameters

    def _attention_rules(self, prefix, layer):
        mixer, path = layer.block.mixer, f"{layer.path}/mixer"
        low = mixer.q_lora_rank is not None
        queries = ("q_a_proj", "q_b_proj") if low else ("q_proj",)
        table = self._kernels(prefix, path, (*queries, "kv_a_proj", "kv_b_proj", "o_proj"), layer.repeat)
        biased = (*queries[:low], "kv_a_proj", "o_proj") if mixer.bias else ()
        module = {part: theirs for theirs, (part,) in self.fused}
        for name in biased:
            part = Part(f"{path}/{name}/bias", Flat(), layer.repeat)
            table.append(Rule(f"{prefix}{module.get(name, name)}.bias", (part,)))
        for name in ("q_a",) * low + ("kv_a",):
            part = Part(f"{path}/{name}_norm/scale", Same(), layer.repeat)
            table.append(Rule(f"{prefix}{name}_layernorm.weight", (part,)))
        return table

    def mlp_rules(self, prefix, layer):
        table, path, mlp = super().mlp_rules(prefix, layer), f"{layer.path}/mlp", layer.block.mlp
        if not isinstance(mlp, ExpertsMlp):
            return table
        if mlp.choice_bias:
            bias = Part(f"{path}/choice_bias", Same(), layer.repeat)
            table.append(Rule(f"{prefix}gate.e_score_correction_bias", (bias,)))
        names = ("gate_proj", "up_proj", "down_proj")
        return table + self._kernels(f"{prefix}shared_experts.", f"{path}/shared_expert", names, layer.repeat)


@dataclasses.dataclass(frozen=True)
class DeepSeekV2(DeepSeek):
    model_type: str = "deepseek_v2"
    architecture: str = "DeepseekV2ForCausalLM"
    # The published code divides by the sum if norm_topk_prob is set, and transformers does not.
    fixed: tuple = (*DeepSeek.fixed, ("norm_topk_prob", (None, False)), ("scoring_func", ("softmax",)))
    defaults: tuple[int, int, int | None] = (64, 1407, None)
    shared: int = 2

    def gating(self, config):
        return "softmax"

    def experts(self, config):
        method = config.get("topk_method") or _GREEDY
        if method not in (_GREEDY, _IN_GROUPS):
            raise UserError(
                f"config.json has topk_method {shown(method)}, supported are {_GREEDY} and {_IN_GROUPS} for model_type "
                f"{self.model_type!r}"
            )
        if method == _GREEDY:
            return super().experts(config)
        return super().experts(config) | {
            "num_groups": integer(config, "n_group"),
            "num_chosen_groups": integer(config, "topk_group"),
        }

    def own_keys(self, model, depth):
        keys = super().own_keys(model, depth)
        return keys | {"topk_method": _IN_GROUPS if keys.get("n_group", 1) > 1 else _GREEDY}


@dataclasses.dataclass(frozen=True)
class DeepSeekV3(DeepSeek):
    model_type: str = "deepseek_v3"
    architecture: str = "DeepseekV3ForCausalLM"
    own: frozenset[str] = DeepSeek.own | {"rope_interleave", "num_nextn_predict_layers"}
    fixed: tuple = (*DeepSeek.fixed, ("topk_method", ("noaux_tc",)), ("scoring_func", ("sigmoid",)))
    defaults: tuple[int, int, int | None] = (256, 2048, 8)
    dense: int = 3

    def interleaved(self, config):
        return boolean({"rope_interleave": True, **config}, "rope_interleave")

    def gating(self, config):
        normalised = boolean({"norm_topk_prob": True, **config}, "norm_topk_prob")
        return "normalised_sigmoid" if normalised else "sigmoid"

    def experts(self, config):
        return super().experts({"routed_scaling_factor": 2.5, **config}) | {
            "choice_bias": True,
            "num_groups": integer(config, "n_group", 8),
            "num_chosen_groups": integer(config, "topk_group", 4),
            "group_members": 2,
        }

    def own_keys(self, model, depth):
        keys = super().own_keys(model, depth)
        interleaved = depth[0].block.mixer.rope_interleave
        return keys | {"rope_interleave": interleaved, "num_nextn_predict_layers": 0}

    def unread(self, config):
        first = integer(config, "num_hidden_layers")
        count = integer(config, "num_nextn_predict_layers", 1, least=0)
        numbers = "|".join(str(first + i) for i in range(min(count, _MOST_NEXT)))
        return {} if not count else {rf"model\.layers\.({numbers})\..*": "layers of multi-token prediction"}


DEEPSEEK_V2, DEEPSEEK_V3 = DeepSeekV2(), DeepSeekV3()
