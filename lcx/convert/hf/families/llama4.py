"""Llama 4, text: layers that see their own chunk of the text, and every fourth the whole text without positions.

model.layers.{i}.feed_forward.
  {gate,up}_proj.weight [F', D], down_proj.weight [D, F']            a layer without experts
  router.weight [E, D]
  experts.gate_up_proj [E, D, 2F], experts.down_proj [E, F, D]       not transposed; gate before up
  shared_expert.{gate,up}_proj.weight [F, D], shared_expert.down_proj.weight [D, F]

The layers with positions divide q and k by their root mean square after the rotation. Those without multiply q by a
factor that grows with the position.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from lcx.convert.core.rules import Flat, Part, Rule, Same, Transposed, renamed
from lcx.convert.hf.experts import WithExperts
from lcx.convert.hf.layered import FULL, SLIDING
from lcx.convert.hf.values import boolean, integer, number
from lcx.errors import UserError
from lcx.mlps.experts import ExpertsMlp
from lcx.mlps.gated import GatedMlp
from lcx.rope_fields import shown

_CHUNKED = "chunked_attention"


@dataclasses.dataclass(frozen=True)
class Llama4(WithExperts):
    model_type: str = "llama4_text"
    architecture: str = "Llama4ForCausalLM"
    own: frozenset[str] = frozenset({
        "no_rope_layers", "no_rope_layer_interval", "attention_chunk_size", "attn_temperature_tuning", "floor_scale",
        "attn_scale", "use_qk_norm", "intermediate_size_mlp", "moe_layers", "interleave_moe_layer_step",
    })  # fmt: skip
    fixed: tuple = (("router_jitter_noise", (None, 0)), ("sliding_window", (None,)))
    experts_key: str = "num_local_experts"
    size_key: str = "intermediate_size"
    router: str = "router"
    defaults: tuple[int, int, int | None] = (16, 8192, 1)
    num_kv_heads: int | None = 8
    head_dim: int | None = 128
    norm_eps: float = 1e-5
    theta: float = 500_000.0
    biases: str = "config"
    paired: bool = True

    # ------------------------------------------------------------------------------------ config.json -> model

    def kinds(self, config, num_layers):
        kinds = config.get("layer_types")
        if kinds is None:
            return [SLIDING if self.rotates(config, i, "") else FULL for i in range(num_layers)]
        known = {FULL: FULL, _CHUNKED: SLIDING}
        if not isinstance(kinds, list) or len(kinds) != num_layers or any(kind not in known for kind in kinds):
            raise UserError(
                f"config.json has layer_types {shown(kinds, 60)}, expected {FULL} or {_CHUNKED} for each of "
                f"{num_layers} layers"
            )
        return [known[kind] for kind in kinds]

    def rotates(self, config, index, kind):
        listed = config.get("no_rope_layers")  # 1 for a layer that rotates, despite its name
        if not listed:
            return (index + 1) % integer(config, "no_rope_layer_interval", 4) != 0
        if not isinstance(listed, list) or len(listed) <= index or listed[index] not in (0, 1):
            raise UserError(
                f"config.json has no_rope_layers {shown(listed, 60)}, expected a 0 or 1 for each layer: change it"
            )
        return bool(listed[index])

    def _window(self, config):
        return integer(config, "attention_chunk_size", None if "attention_chunk_size" in config else 8192)

    def mixer(self, config, rope, window):
        own: dict[str, Any] = {"chunked": window is not None}
        if rope is not None:
            own["qk_norm"] = "l2" if boolean({"use_qk_norm": True, **config}, "use_qk_norm") else False
        elif config.get("attn_temperature_tuning", True):  # in some files a number
            own["temperature"] = number(config, "attn_scale", 0.1)
            own["temperature_floor"] = integer(config, "floor_scale", 8192)
        return super().mixer(config, rope, window).clone(**own, parent=None)

    def mlp(self, config, index):
        if index in self._sparse(config):
            return super().mlp(config, index)
        size = integer(config, "intermediate_size_mlp", 16384)
        return GatedMlp(size, activation=self.activation_of(config), parent=None)

    def _sparse(self, config: Mapping[str, Any]) -> list[int]:
        """The layers with experts."""
        listed, depth = config.get("moe_layers"), integer(config, "num_hidden_layers")
        if listed is None:
            step = integer(config, "interleave_moe_layer_step", 1)
            return list(range(step - 1, depth, step))
        if not isinstance(listed, list) or not all(type(i) is int and 0 <= i < depth for i in listed):
            raise UserError(
                f"config.json has moe_layers {shown(listed, 60)}, expected a list of layers from 0 to {depth - 1}"
            )
        return listed

    def gating(self, config):
        return "chosen_sigmoid"

    def balance_loss(self, config):
        return 0.0  # transformers has none for it

    def experts(self, config):
        size = integer(config, self.size_key, self.defaults[1])
        return {"gate_inputs": True, "shared_size": size, "shared_gate": False}

    # ------------------------------------------------------------------------------------ model -> config.json

    def _kind_keys(self, depth):
        windows = [layer.block.mixer.window for layer in depth]
        return {
            "attention_chunk_size": next((window for window in windows if window), 8192),
            "layer_types": [_CHUNKED if window else FULL for window in windows],
        }

    def own_keys(self, model, depth):
        mixers, mlps = ([getattr(layer.block, part) for layer in depth] for part in ("mixer", "mlp"))
        sparse = [i for i, mlp in enumerate(mlps) if isinstance(mlp, ExpertsMlp)]
        dense = [mlp.intermediate_size for mlp in mlps if not isinstance(mlp, ExpertsMlp)]
        rotating = [mixer for mixer in mixers if mixer.rope is not None]
        still = next((mixer for mixer in mixers if mixer.temperature is not None), None)
        total, _, chosen = self.defaults
        keys = {"num_local_experts": total, "num_experts_per_tok": chosen, "intermediate_size": dense and dense[0]}
        keys = super().own_keys(model, depth) if sparse else keys
        keys |= {
            "no_rope_layers": [int(mixer.rope is not None) for mixer in mixers],
            "use_qk_norm": not rotating or rotating[0].qk_norm == "l2",
            "attn_temperature_tuning": still is not None,
            "moe_layers": sparse,
            "interleave_moe_layer_step": 1,
            # Without a usual MLP nothing has this size, but transformers wants a number.
            "intermediate_size_mlp": dense[0] if dense else keys["intermediate_size"],
        }
        if still is not None:
            keys |= {"attn_scale": still.temperature, "floor_scale": still.temperature_floor}
        return keys

    # ------------------------------------------------------------------------------------ tensors <-> parameters

    def mlp_rules(self, prefix, layer):
        mlp, path, repeat = layer.block.mlp, f"{layer.path}/mlp", layer.repeat
        if not isinstance(mlp, ExpertsMlp):
            return self._mlp_rules(prefix, layer)
        E, F = mlp.num_experts, mlp.intermediate_size
        both = tuple(Part(f"{path}/{name}_kernel", Flat(), repeat) for name in ("gate_proj", "up_proj"))
        names = ("gate_proj", "up_proj", "down_proj")
        return [
            Rule(f"{prefix}experts.gate_up_proj", both, block=F, shape=(E, -1, 2 * F)),
            Rule(f"{prefix}experts.down_proj", (Part(f"{path}/down_proj_kernel", Same(), repeat),)),
            Rule(f"{prefix}router.weight", (Part(f"{path}/router/kernel", Transposed(), repeat),)),
            *self._kernels(f"{prefix}shared_expert.", f"{path}/shared_expert", names, repeat),
        ]

    def rules(self, model):
        return renamed(super().rules(model), {r"(layers\.\d+)\.mlp\.": r"\1.feed_forward."})


LLAMA4 = Llama4()
