"""Gemma 4, text, of 31B and 26B-A4B: layers that see the whole text have heads of another size, whose keys are values.

model.layers.{i}.
  self_attn.{q,k}_norm.weight [H]                    values are normalised without weights; v_proj is absent with k = v
  layer_scalar [1]                                   the result of the layer is multiplied by it; not trained
  router.proj.weight [E, D], .scale [D], .per_expert_scale [E]
  experts.gate_up_proj [E, 2F, D], .down_proj [E, D, F]

E2B and E4B have embeddings for each layer, and layers that use the keys and values of others: they are refused.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from lcx.convert.core.rules import Part, Rule, Same, Transposed
from lcx.convert.hf.families.gemma2 import NORMS
from lcx.convert.hf.layered import FULL, SLIDING, Layered
from lcx.convert.hf.layouts import Experts
from lcx.convert.hf.rope_parameters import RopeDialect
from lcx.convert.hf.values import boolean, cap, fraction, integer
from lcx.errors import UserError
from lcx.mlps.beside import ExpertsBeside
from lcx.mlps.experts import ExpertsMlp
from lcx.mlps.gated import GatedMlp
from lcx.rope_fields import shown

_WITHIN = (
    ("pre_feedforward_layernorm", "mlp/dense_norm"),
    ("post_feedforward_layernorm_1", "mlp/dense_post_norm"),
    ("pre_feedforward_layernorm_2", "mlp/experts_norm"),
    ("post_feedforward_layernorm_2", "mlp/experts_post_norm"),
)
_ROPES = {
    FULL: {"rope_type": "proportional", "partial_rotary_factor": 0.25, "rope_theta": 1_000_000.0},
    SLIDING: {"rope_type": "default", "rope_theta": 10_000.0},
}
_OF_LAYERS = {"head_dim", "num_key_value_heads"}  # what per_layer_config may change
_MOST = 10_000  # experts; a damaged file shall not build a huge model


@dataclasses.dataclass(frozen=True)
class Gemma4Rope(RopeDialect):
    """transformers 4 has no Gemma 4, so only the new spelling is written."""

    def spelled(self, keys, rope, window):
        return {"rope_parameters": keys["rope_parameters"]}


@dataclasses.dataclass(frozen=True)
class Gemma4(Layered):
    model_type: str = "gemma4_text"
    architecture: str = "Gemma4ForCausalLM"
    own: frozenset[str] = frozenset({
        "final_logit_softcapping", "global_head_dim", "num_global_key_value_heads",
        "attention_k_eq_v", "per_layer_config", "enable_moe_block", "num_experts", "top_k_experts",
        "moe_intermediate_size", "vocab_size_per_layer_input", "use_double_wide_mlp",
    })  # fmt: skip
    fixed: tuple = (
        ("use_bidirectional_attention", (None, False, "vision")),
        ("hidden_size_per_layer_input", (None, 0)),
        ("num_kv_shared_layers", (None, 0)),
    )
    period: int | None = 6
    norm_names: tuple = NORMS
    activation: tuple[str, str] = ("hidden_activation", "gelu_pytorch_tanh")
    rope: RopeDialect = Gemma4Rope()
    biases: str = "config"
    qk_norm: bool | str = True
    num_kv_heads: int | None = 4
    head_dim: int | None = 256
    sliding_window: int | None = 512
    theta: float = 1_000_000.0
    local_theta: float | None = 10_000.0
    tied: bool = True
    mlp_types: tuple[type, ...] = (GatedMlp, ExpertsBeside)

    # ------------------------------------------------------------------------------------ config.json -> model

    def model(self, config, *, dtype):
        if config.get("rope_parameters") is None:
            config = {**config, "rope_parameters": _ROPES}
        return super().model(config, dtype=dtype)

    def check_config(self, config):
        if "hidden_size_per_layer_input" not in config:
            raise UserError(
                "config.json has no hidden_size_per_layer_input, which means 256, embeddings for each layer: expected 0"
            )
        super().check_config(config)

    def kinds(self, config, num_layers):
        return [*super().kinds(config, num_layers)[:-1], FULL]  # the last one is full whatever the file says

    def _rope(self, config, kind, head_dim):
        return super()._rope(config, kind, self._full_sizes(config)["head_dim"] if kind == FULL else head_dim)

    def _full_sizes(self, config: Mapping[str, Any]) -> dict[str, int]:
        """head_dim and num_key_value_heads of the layers that see the whole text."""
        if "per_layer_config" in config:
            given = self._listed(config)
        else:
            kv_heads = config.get("num_global_key_value_heads") if boolean(config, "attention_k_eq_v") else None
            given = {"head_dim": integer(config, "global_head_dim", 512), "num_key_value_heads": kv_heads}
        sizes = self._sizes(config)
        defaults = {"head_dim": sizes.head_dim, "num_key_value_heads": sizes.num_kv_heads}
        found = {key: integer(given, key, default) for key, default in defaults.items()}
        if sizes.num_heads % found["num_key_value_heads"]:
            raise UserError(
                f"config.json has num_attention_heads {sizes.num_heads}, expected a multiple of the kv heads of layers "
                f"that see the whole text, {found['num_key_value_heads']}"
            )
        return found

    def _listed(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """What per_layer_config, in files of transformers 5, says of every layer that sees the whole text."""
        given = config["per_layer_config"]
        kinds = self.kinds(config, integer(config, "num_hidden_layers"))
        places = {i for i, kind in enumerate(kinds) if kind == FULL}
        values: list[Any] = list(given.values()) if isinstance(given, Mapping) else [None]
        alike = all(isinstance(x, Mapping) and x == values[0] and x.keys() <= _OF_LAYERS for x in values)
        # With more than ten layers the keys are "05", "11", ...
        if not alike or (given and {int(key) if str(key).isdecimal() else key for key in given} != places):
            raise UserError(
                f"config.json has per_layer_config {shown(given, 60)}, expected the same head_dim and "
                "num_key_value_heads for each layer of full_attention and for no other"
            )
        return dict(values[0]) if values else {}

    def attention(self, config):
        return {"scale": 1.0, "value_norm": True}

    def mixer(self, config, rope, window):
        mixer = super().mixer(config, rope, window)
        if window is not None:
            return mixer
        sizes = self._full_sizes(config)
        return mixer.clone(
            head_dim=sizes["head_dim"],
            num_kv_heads=sizes["num_key_value_heads"],
            keys_as_values=boolean(config, "attention_k_eq_v"),
            parent=None,
        )

    def block(self, config):
        within = {"mlp_norms": "after"} if boolean(config, "enable_moe_block") else {}
        return {"norms": "both", "output_scale": True, **within}

    def decoder(self, config):
        return {
            "embedding_multiplier": integer(config, "hidden_size") ** 0.5,
            "logit_softcap": cap(config, "final_logit_softcapping", None),
        }

    def mlp(self, config, index):
        dense: Any = super().mlp(config, index)
        if not boolean(config, "enable_moe_block"):
            return dense
        experts = ExpertsMlp(
            min(integer(config, "num_experts"), _MOST),
            integer(config, "top_k_experts"),
            integer(config, "moe_intermediate_size"),
            activation=self.activation_of(config),
            expert_scale=True,
            parent=None,
        )
        experts.check()
        eps = fraction(config, self.eps_key, self.norm_eps)
        return ExpertsBeside(dense, experts, norm_eps=eps, parent=None)

    # ------------------------------------------------------------------------------------ model -> config.json

    def own_keys(self, model, depth):
        mixers, mlp = [layer.block.mixer for layer in depth], depth[0].block.mlp
        full = next((mixer for mixer in mixers if mixer.window is None), mixers[0])
        near = next((mixer for mixer in mixers if mixer.window is not None), mixers[0])
        keys: dict[str, Any] = {
            "head_dim": near.head_dim,
            "num_key_value_heads": near.num_kv_heads,
            "global_head_dim": full.head_dim,
            "num_global_key_value_heads": full.num_kv_heads if full.keys_as_values else None,
            "attention_k_eq_v": full.keys_as_values,
            "attention_bias": near.qkv_bias,
            "final_logit_softcapping": model.logit_softcap,
            "hidden_size_per_layer_input": 0,
            "num_kv_shared_layers": 0,
            "enable_moe_block": isinstance(mlp, ExpertsBeside),
        }
        if isinstance(mlp, GatedMlp):
            return keys
        return keys | {
            "intermediate_size": mlp.dense.intermediate_size,
            "hidden_activation": "gelu_pytorch_tanh",
            "num_experts": mlp.experts.num_experts,
            "top_k_experts": mlp.experts.num_chosen,
            "moe_intermediate_size": mlp.experts.intermediate_size,
        }

    def _rope_keys(self, model, depth):
        keys = super()._rope_keys(model, depth)
        return {key: value for key, value in keys.items() if key != "rope_local_base_freq"}  # of transformers 4

    # ------------------------------------------------------------------------------------ tensors <-> parameters

    def norms_of(self, layer):
        if not isinstance(layer.block.mlp, ExpertsBeside):
            return self.norm_names
        return (*(pair for pair in self.norm_names if pair[1] != "mlp_norm"), *_WITHIN)

    def _attention_rules(self, prefix, layer):
        mixer, path, repeat = layer.block.mixer, layer.path, layer.repeat
        table = super()._attention_rules(prefix, layer)
        if mixer.keys_as_values:
            table = [rule for rule in table if not rule.name.startswith(f"{prefix}v_proj.")]
        scale = Part(f"{path}/output_scale", Same(), repeat)
        return [*table, Rule(prefix.replace("self_attn.", "layer_scalar"), (scale,))]

    def mlp_rules(self, prefix, layer):
        mlp, path, repeat = layer.block.mlp, f"{layer.path}/mlp", layer.repeat
        if not isinstance(mlp, ExpertsBeside):
            return self._mlp_rules(prefix, layer)
        E, F, outer = mlp.experts.num_experts, mlp.experts.intermediate_size, prefix.removesuffix("mlp.")
        names = ("gate_proj", "up_proj", "down_proj")
        gate, up, down = (Part(f"{path}/experts/{name}_kernel", Experts(), repeat) for name in names)
        return [
            *self._kernels(prefix, f"{path}/dense", names, repeat),
            Rule(f"{outer}router.proj.weight", (Part(f"{path}/experts/router/kernel", Transposed(), repeat),)),
            Rule(f"{outer}router.scale", (Part(f"{path}/router_norm/scale", Same(), repeat),)),
            Rule(f"{outer}router.per_expert_scale", (Part(f"{path}/experts/expert_scale", Same(), repeat),)),
            Rule(f"{outer}experts.gate_up_proj", (gate, up), block=F, shape=(E, 2 * F, -1)),
            Rule(f"{outer}experts.down_proj", (down,), shape=(E, -1, F)),
        ]


GEMMA4 = Gemma4()
