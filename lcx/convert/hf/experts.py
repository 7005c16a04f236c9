"""Families whose MLPs are mixtures of experts, each expert stored as three tensors of its own."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from lcx.convert.core.rules import Part, Rule, Transposed
from lcx.convert.hf.layered import Layered
from lcx.convert.hf.values import boolean, integer, nonnegative
from lcx.errors import UserError
from lcx.mlps.experts import ExpertsMlp
from lcx.mlps.gated import GatedMlp
from lcx.model import Decoder, Layer
from lcx.rope_fields import shown

_NUMBERS = ("num_experts", "num_local_experts")  # two names of one number; which one is written differs
_MOST = 10_000  # experts; a damaged file shall not build a huge model


@dataclasses.dataclass(frozen=True)
class WithExperts(Layered):
    """A family with experts.

    Attributes:
      experts_key, size_key: the keys of the number of experts and of an expert's intermediate_size.
      router: the name of the router below the MLP.
      projections: the names of an expert's gate, up and down projections.
      defaults: transformers' defaults of the two keys above and of num_experts_per_tok.
    """

    experts_key: str = "num_experts"
    size_key: str = "moe_intermediate_size"
    router: str = "gate"
    projections: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")
    defaults: tuple[int, int, int | None] = (128, 768, 8)
    mlp_types: tuple[type, ...] = (GatedMlp, ExpertsMlp)

    def __post_init__(self):
        keys = {
            *_NUMBERS,
            self.experts_key,
            self.size_key,
            "num_experts_per_tok",
            "router_aux_loss_coef",
            "output_router_logits",
        }
        object.__setattr__(self, "own", self.own | keys)
        super().__post_init__()

    def gating(self, config: Mapping[str, Any]) -> str:
        """ExpertsMlp.gating."""
        return "normalised"

    def balance_loss(self, config: Mapping[str, Any]) -> float:
        """ExpertsMlp.aux_loss_weight."""
        if not boolean(config, "output_router_logits"):
            return 0.0
        return nonnegative(config, "router_aux_loss_coef", 0.001)

    def experts(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """More fields of ExpertsMlp."""
        return {}

    def mlp(self, config, index):
        number, size, chosen = self.defaults
        total = integer(config, next((key for key in _NUMBERS if config.get(key)), self.experts_key), number)
        for key in _NUMBERS:
            if config.get(key) not in (None, total):
                raise UserError(f"config.json has {' and '.join(_NUMBERS)}, which differ: remove one of them")
        if total > _MOST:
            raise UserError(f"config.json has {self.experts_key} {total}, expected at most {_MOST}")
        mlp = ExpertsMlp(
            total,
            integer(config, "num_experts_per_tok", chosen),
            integer(config, self.size_key, size),
            gating=self.gating(config),
            activation=self.activation_of(config),
            aux_loss_weight=self.balance_loss(config),
            **self.experts(config),
            parent=None,
        )
        mlp.check()
        return mlp

    def own_keys(self, model: Decoder, depth: Sequence[Layer]) -> dict[str, Any]:
        mlp = next((x.block.mlp for x in depth if isinstance(x.block.mlp, ExpertsMlp)), None)
        if mlp is None:
            raise UserError(
                f"the model has no experts, which model_type {self.model_type!r} has; save with format 'lcx'"
            )
        return {
            self.experts_key: mlp.num_experts,
            self.size_key: mlp.intermediate_size,
            "num_experts_per_tok": mlp.num_chosen,
            "output_router_logits": mlp.aux_loss_weight > 0,
            "router_aux_loss_coef": mlp.aux_loss_weight or 0.001,
        }

    def mlp_rules(self, prefix, layer):
        path, mlp = f"{layer.path}/mlp", layer.block.mlp
        if not isinstance(mlp, ExpertsMlp):
            return self._mlp_rules(prefix, layer)
        table = [
            Rule(
                f"{prefix}{self.router}.weight", (Part(f"{path}/router/kernel", Transposed(), layer.repeat),)
            )
        ]
        pairs = zip(self.projections, ("gate_proj", "up_proj", "down_proj"), strict=True)
        for theirs, ours in pairs:
            for expert in range(mlp.num_experts):
                part = Part(f"{path}/{ours}_kernel", Transposed(), layer.repeat, expert)
                table.append(Rule(f"{prefix}experts.{expert}.{theirs}.weight", (part,)))
        return table


@dataclasses.dataclass(frozen=True)
class QwenWithExperts(WithExperts):
    """What Qwen2-MoE and Qwen3-MoE have in common: layers with a usual MLP may lie between those with experts."""

    own: frozenset[str] = frozenset({"decoder_sparse_step", "mlp_only_layers", "norm_topk_prob"})

    def gating(self, config):
        return "normalised" if boolean(config, "norm_topk_prob") else "softmax"

    def mlp(self, config, index):
        dense = config.get("mlp_only_layers") or []
        if not isinstance(dense, list) or not all(isinstance(i, int) for i in dense):
            raise UserError(f"config.json has mlp_only_layers {shown(dense, 60)}, expected a list of layers")
        step = integer(config, "decoder_sparse_step", 1)
        if index in dense or (index + 1) % step:
            activation = self.activation_of(config)
            return GatedMlp(integer(config, "intermediate_size"), activation=activation, parent=None)
        return super().mlp(config, index)

    def own_keys(self, model, depth):
        keys = super().own_keys(model, depth)
        mlps = [layer.block.mlp for layer in depth]
        dense = [i for i, mlp in enumerate(mlps) if not isinstance(mlp, ExpertsMlp)]
        gating = next(mlp.gating for mlp in mlps if isinstance(mlp, ExpertsMlp))
        # Without a usual MLP nothing has this size, but transformers wants a number.
        size = mlps[dense[0]].intermediate_size if dense else keys["moe_intermediate_size"]
        return keys | {
            "decoder_sparse_step": 1,
            "mlp_only_layers": dense,
            "norm_topk_prob": gating == "normalised",
            "intermediate_size": size,
        }
