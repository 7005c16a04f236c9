"""A mixture of experts without dropped tokens: each token goes through the best of several gated MLPs.

Tokens are ordered by expert and multiplied group by group (ops/grouped_matmul.py), so the cost is that of the experts
that are used. Over the `tensor` axis of a mesh each device holds E / tensor experts and computes the pairs of a token
and a chosen expert that are theirs (ops/routing.py); if E is not divisible, each device holds all experts at F / tensor
of their width. The results of the devices are summed, as after any MLP that is split over `tensor`.

That sum sends 2 D numbers a token and device (times 1 - 1 / tensor). The tokens are on all devices of `tensor` already,
so nothing else is sent. An all-to-all, which sends each pair to its expert and back and then gathers the tokens, would
send (2 k / tensor + 1) D for k chosen experts: less only if tensor > 2 k, and then at most by half.

(Shazeer et al. 2017, arXiv 1701.06538; Mixtral, arXiv 2401.04088; Qwen2-MoE, arXiv 2407.10671; gpt-oss, arXiv
2508.10925; DeepSeek-V2, arXiv 2405.04434, and V3, arXiv 2412.19437, section 2.1.2.)
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from lcx import sharding
from lcx.errors import UserError, check_positive, check_sizes
from lcx.layers import Linear, fan_in_init, named_param
from lcx.mlps.activations import Activation, activation
from lcx.mlps.gated import GatedMlp
from lcx.ops import routing
from lcx.ops.grouped_matmul import grouped_matmul

GATINGS = ("softmax", "normalised", "chosen", "sigmoid", "normalised_sigmoid", "chosen_sigmoid")
PROJECTIONS = ("gate_proj", "up_proj", "down_proj")


class ExpertsMlp(nn.Module):
    """The sum of the outputs of the `num_chosen` experts with the largest router scores, weighted by gates.

    Attributes:
      intermediate_size: F, of one expert.
      gating: how the gates follow from the router's logits. "softmax": probabilities over all experts (Qwen2-MoE).
        "normalised": those of the chosen experts, divided by their sum (Mixtral, Qwen3-MoE). "chosen": a softmax over
        the logits of the chosen experts, equal in value to "normalised", in the dtype of the activations (gpt-oss).
        "sigmoid": one of each logit; "normalised_sigmoid": those of the chosen experts, divided by their sum (DeepSeek
        V3); "chosen_sigmoid": one of each logit too, but the experts are chosen by their logits, which sigmoids in
        float32 no longer tell apart above 17 (Llama 4).
      gate_inputs: whether a gate multiplies what its expert reads instead of what it returns (Llama 4).
      gate_multiplier: factor on the gates: routed_scaling_factor of DeepSeek.
      choice_bias: whether each expert has a number that is added to its score for the choice, not for its gate
        (DeepSeek V3). It has no gradient: it stays as it was loaded, and 0 in a new model.
      num_groups, num_chosen_groups: experts are chosen from the best `num_chosen_groups` of `num_groups` groups of
        neighbours. 1 and 1: from all.
      group_members: how many of a group's best scores are added to its own: 1 in DeepSeek V2, 2 in V3.
      expert_scale: whether the gates of each expert are multiplied by a trained number of its own (Gemma 4).
      float32_router: whether the router's product is in float32, whatever the dtype of the activations (DeepSeek).
      bias: whether the router and all projections have biases.
      activation: a key of activations.ACTIVATIONS, or a function of arrays.
      clamp: the bound c of gpt-oss's SwiGLU: min(gate, c) sigmoid(1.702 min(gate, c)) (clip(up, -c, c) + 1), in place
        of activation(gate) up. None: the usual form.
      shared_size: F of an expert that every token uses. None: none.
      shared_gate: whether it has a gate of its own, sigmoid(s x) (Qwen2-MoE), or counts fully (DeepSeek).
      aux_loss_weight: factor on the load balance loss, E sum_e (share of tokens of e) (mean probability of e) (Fedus et
        al. 2021, arXiv 2101.03961, eq. 4), which is added to the training loss. 0: no such loss.
      implementation: see ops.grouped_matmul.

    The three projections may have pairs of LoRA, a [E, in, r], b [E, r, out] and a scale, in the collection `lora`.
    """

    num_experts: int
    num_chosen: int
    intermediate_size: int
    gating: str = "normalised"
    bias: bool = False
    activation: str | Activation = "silu"
    clamp: float | None = None
    shared_size: int | None = None
    aux_loss_weight: float = 0.0
    implementation: str | None = None
    gate_multiplier: float = 1.0
    choice_bias: bool = False
    num_groups: int = 1
    num_chosen_groups: int = 1
    group_members: int = 1
    float32_router: bool = False
    shared_gate: bool = True
    gate_inputs: bool = False
    expert_scale: bool = False

    takes_segment_ids = True

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B T D"],
        *,
        segment_ids: Int[Array, "B T"] | None = None,
        routed: Float[Array, "B T D"] | None = None,
    ) -> Float[Array, "B T D"]:
        """The weighted sum of the chosen experts' outputs. The router reads `routed`, or x."""
        self.check()
        D, E, F = x.shape[-1], self.num_experts, self.intermediate_size
        routed = x if routed is None else routed
        routed = routed.astype(jnp.float32) if self.float32_router else routed
        logits = Linear((D,), (E,), ("embed", None), self.bias, name="router")(routed)
        weights, names = {}, {}
        for name, shape in zip(PROJECTIONS, ((D, F), (D, F), (F, D)), strict=True):
            self._weights(name, shape, weights, names)
        if sharding.axis_size("fsdp") > 1:  # the narrower dtype is gathered
            weights = jax.tree.map(lambda w: w.astype(x.dtype), weights)
        split = self._split()
        placed = {key: PartitionSpec(*("heads" if n == split else None for n in names[key])) for key in weights}
        tokens = PartitionSpec("rows", "time")
        arrays = {"x": x, "logits": logits, "weights": weights}
        specs = {"x": tokens, "logits": tokens, "weights": placed}
        if self.choice_bias:
            arrays["choice_bias"] = named_param(self, "choice_bias", nn.initializers.zeros, (None,), (E,))
            specs["choice_bias"] = PartitionSpec()
        if self.expert_scale:
            arrays["expert_scale"] = named_param(self, "expert_scale", nn.initializers.ones, (None,), (E,))
            specs["expert_scale"] = PartitionSpec()
        # Each device orders its own tokens; ordering those of all devices would move them between devices.
        out = PartitionSpec("heads" if split else None, "rows", "time"), tokens
        shares, chosen = sharding.island(self._shares, arrays, specs, out)
        if self.aux_loss_weight:
            self.sow("losses", "load_balance", self._balance_loss(logits, chosen, segment_ids))
        y = jax.lax.reduce_sum(shares, axes=(0,))  # jnp.sum would send wider numbers
        return y if self.shared_size is None else y + self._shared(x)

    @nn.nowrap
    def check(self) -> None:
        """Raises UserError for invalid settings."""
        check_sizes(
            "ExpertsMlp",
            num_experts=self.num_experts,
            num_chosen=self.num_chosen,
            intermediate_size=self.intermediate_size,
            shared_size=self.shared_size,
            num_groups=self.num_groups,
            num_chosen_groups=self.num_chosen_groups,
            group_members=self.group_members,
        )
        check_positive("ExpertsMlp", gate_multiplier=self.gate_multiplier)
        if self.num_chosen > self.num_experts:
            raise UserError(
                f"ExpertsMlp.num_chosen is {self.num_chosen}, expected at most num_experts = {self.num_experts}: "
                "change num_chosen"
            )
        if self.gating not in GATINGS:
            raise UserError(
                f"ExpertsMlp.gating is {self.gating!r}, expected one of {', '.join(GATINGS)}: change gating"
            )
        self._check_groups()

    @nn.nowrap
    def _check_groups(self) -> None:
        groups, size = self.num_groups, self.num_experts // self.num_groups
        if self.num_experts % groups:
            raise UserError(
                f"ExpertsMlp.num_experts is {self.num_experts}, expected a multiple of num_groups = {groups}: change "
                "num_groups"
            )
        for name, found, most in (
            ("num_chosen_groups", self.num_chosen_groups, groups),
            ("group_members", self.group_members if groups > 1 else 1, size),
            ("num_chosen", self.num_chosen, self.num_chosen_groups * size),
        ):
            if found > most:
                raise UserError(
                    f"ExpertsMlp.{name} is {found}, expected at most {most} with {groups} groups of {size} experts: "
                    f"change {name}"
                )

    @nn.nowrap
    def _gates(
        self, logits: Float[Array, "B T E"], choice_bias: Float[Array, " E"] | None
    ) -> tuple[Array, Array]:
        """The weights [B, T, k] of the chosen experts and their numbers."""
        scores = logits if self.gating.startswith("chosen") else self._scores(logits)
        gates, chosen = self._best(scores, choice_bias)
        if self.gating == "chosen":
            gates = jax.nn.softmax(gates, axis=-1)
        elif self.gating == "chosen_sigmoid":
            gates = jax.nn.sigmoid(gates.astype(jnp.float32))
        elif self.gating.startswith("normalised"):
            gates = gates / (jnp.sum(gates, axis=-1, keepdims=True) + 1e-20)
        return gates if self.gate_multiplier == 1 else gates * self.gate_multiplier, chosen

    @nn.nowrap
    def _scores(self, logits: Float[Array, "B T E"]) -> Float[Array, "B T E"]:
        of = jax.nn.sigmoid if self.gating.endswith("sigmoid") else jax.nn.softmax
        return of(logits.astype(jnp.float32))

    @nn.nowrap
    def _best(self, scores: Array, choice_bias: Array | None) -> tuple[Array, Array]:
        """The scores [B, T, k] of the chosen experts and their numbers."""
        if choice_bias is None and self.num_groups == 1:
            return jax.lax.top_k(scores, self.num_chosen)
        judged = scores if choice_bias is None else scores + choice_bias.astype(scores.dtype)
        judged = jax.lax.stop_gradient(judged)
        if self.num_groups > 1:
            groups = self.num_groups, self.num_chosen_groups, self.group_members
            judged = jnp.where(routing.best_groups(judged, *groups), judged, -jnp.inf)
        _, chosen = jax.lax.top_k(judged, self.num_chosen)
        return jnp.take_along_axis(scores, chosen, axis=-1), chosen

    def _weights(self, name: str, shape: tuple[int, int], weights: dict, names: dict) -> None:
        """Adds a projection's kernel [E, in, out], bias [E, out] and pair of LoRA, and the names of their axes."""
        into, out = ("embed", "mlp") if name != "down_proj" else ("mlp", "embed")
        E, key = self.num_experts, f"{name}_kernel"
        names[key] = ("experts", into, out)
        weights[key] = named_param(self, key, fan_in_init(shape[0]), names[key], (E, *shape))
        if self.bias:
            key = f"{name}_bias"
            names[key] = ("experts", out)
            weights[key] = named_param(self, key, nn.initializers.zeros, names[key], (E, shape[1]))
        if self.has_variable("lora", name):
            pair = self.get_variable("lora", name)
            names |= {f"{name}_a": ("experts", into, None), f"{name}_b": ("experts", None, out)}
            weights[f"{name}_a"] = pair["a"]
            weights[f"{name}_b"] = pair["b"] * jax.lax.stop_gradient(pair["scale"])

    @nn.nowrap
    def _split(self) -> str | None:
        """The logical name of the axis of the weights that is split over `tensor`; None if all devices hold all."""
        parts = sharding.axis_size("tensor")
        sizes = {"experts": self.num_experts, "mlp": self.intermediate_size}
        return next((name for name, size in sizes.items() if parts > 1 and size % parts == 0), None)

    @nn.nowrap
    def _shares(
        self, arrays: dict[str, Any], mesh_axis: str | None = None
    ) -> tuple[Float[Array, "1 B T D"], Int[Array, "B T k"]]:
        """(what this device adds to the weighted sum of the chosen experts' outputs, the chosen experts)."""
        x, logits, weights = (arrays[key] for key in ("x", "logits", "weights"))
        gates, chosen = self._gates(logits, arrays.get("choice_bias"))
        if self.expert_scale:
            gates *= arrays["expert_scale"].astype(gates.dtype)[chosen]
        own = len(weights["gate_proj_kernel"])
        first: Array | int = 0
        if own < self.num_experts:
            first = jax.lax.axis_index("tensor") * own
        elif self.bias and weights["gate_proj_bias"].shape[1] < self.intermediate_size:
            # Every device has a part of the width, and one of them adds the bias of the sum.
            bias = jnp.where(jax.lax.axis_index("tensor") == 0, weights["down_proj_bias"], 0)
            weights = weights | {"down_proj_bias": bias}
        rows = routing.ordered(chosen.reshape(-1) - first, own)
        size = routing.part_size(chosen.size, self.num_experts // own)
        x, gates = x.reshape(-1, x.shape[-1]), gates.astype(x.dtype).reshape(-1, 1)
        y = routing.sum_of_parts(lambda part: self._outputs(x, gates, weights, part), rows, size)
        return y.reshape(arrays["x"].shape)[None], chosen

    @nn.nowrap
    def _outputs(self, tokens: Array, gates: Array, weights: dict[str, Array], part: routing.Rows) -> Array:
        """The weighted sum [N, D] of the outputs of the rows in `part`; tokens [N, D], gates [N k, 1]."""

        def multiply(x: Array, w: Array) -> Array:
            return grouped_matmul(x, w, part.sizes, implementation=self.implementation)

        def grouped(name: str, x: Array, factor: Array) -> Array:
            """factor (x W + bias), for rows x that are already multiplied by it."""
            y = multiply(x, weights[f"{name}_kernel"])
            if self.bias:
                y += multiply(factor, weights[f"{name}_bias"][:, None])
            if f"{name}_a" in weights:
                y += multiply(multiply(x, weights[f"{name}_a"]), weights[f"{name}_b"])
            return y

        x = routing.spread(tokens, part, self.num_chosen)
        gate_of_row = routing.spread(gates, part, 1)
        ones = jnp.ones_like(gate_of_row)
        if self.gate_inputs:
            x, gate_of_row = x * gate_of_row, ones
        inner = self._product(grouped("gate_proj", x, ones), grouped("up_proj", x, ones))
        # Gates before the last product: their gradient then does not need its result.
        y = grouped("down_proj", inner * gate_of_row, gate_of_row)
        return routing.collect(y, part, self.num_chosen)

    @nn.nowrap
    def _product(self, gate: Array, up: Array) -> Array:
        if self.clamp is None:
            return activation(self.activation)(gate) * up
        gate, up = jnp.minimum(gate, self.clamp), jnp.clip(up, -self.clamp, self.clamp)
        return gate * jax.nn.sigmoid(1.702 * gate) * (up + 1)

    def _shared(self, x: Array) -> Array:
        shared = GatedMlp(self.shared_size or 1, activation=self.activation, name="shared_expert")(x)
        if not self.shared_gate:
            return shared
        return jax.nn.sigmoid(Linear((x.shape[-1],), (1,), ("embed", None), name="shared_gate")(x)) * shared

    @nn.nowrap
    def _balance_loss(self, logits: Array, chosen: Array, segment_ids: Array | None) -> Array:
        real = jnp.ones(chosen.shape[:2]) if segment_ids is None else (segment_ids != 0).astype(jnp.float32)
        count = jnp.maximum(jnp.sum(real), 1)
        probabilities = self._scores(logits)
        if self.gating.endswith("sigmoid"):
            probabilities /= jnp.sum(probabilities, axis=-1, keepdims=True)
        used = jnp.zeros(self.num_experts).at[chosen].add(real[..., None]) / count
        mean = jnp.einsum("bte,bt->e", probabilities, real) / count
        return self.aux_loss_weight * self.num_experts * jnp.sum(jax.lax.stop_gradient(used) * mean)

    @nn.nowrap
    def macs_per_token(self, hidden_size: int) -> float:
        """Multiply-adds per token: the router, the chosen experts and the shared one."""
        experts = 3 * hidden_size * self.intermediate_size * self.num_chosen
        shared = 0
        if self.shared_size is not None:
            shared = 3 * hidden_size * self.shared_size + self.shared_gate * hidden_size
        return float(hidden_size * self.num_experts + experts + shared)
