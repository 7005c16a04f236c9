"""A mixture of experts without dropped tokens: each token goes through the best of several gated MLPs.

Tokens are ordered by expert and multiplied group by group (ops/grouped_matmul.py), so the cost is that of the experts
that are used. (Shazeer et al. 2017, arXiv 1701.06538; Mixtral, arXiv 2401.04088; Qwen2-MoE, arXiv 2407.10671; gpt-oss,
arXiv 2508.10925.)
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from lcx import sharding
from lcx.errors import UserError, check_sizes
from lcx.layers import Linear, fan_in_init, named_param
from lcx.mlps.activations import Activation, activation
from lcx.mlps.gated import GatedMlp
from lcx.ops.grouped_matmul import collect, grouped_matmul, spread

GATINGS = ("softmax", "normalised", "chosen")


class ExpertsMlp(nn.Module):
    """The sum of the outputs of the `num_chosen` experts with the largest router scores, weighted by gates.

    Attributes:
      intermediate_size: F, of one expert.
      gating: how the gates follow from the router's logits. "softmax": probabilities over all experts (Qwen2-MoE).
        "normalised": those of the chosen experts, divided by their sum (Mixtral, Qwen3-MoE). "chosen": a softmax over
        the logits of the chosen experts, equal in value to "normalised", in the dtype of the activations (gpt-oss).
      bias: whether the router and all projections have biases.
      activation: a key of activations.ACTIVATIONS, or a function of arrays.
      clamp: the bound c of gpt-oss's SwiGLU: min(gate, c) sigmoid(1.702 min(gate, c)) (clip(up, -c, c) + 1), in place
        of activation(gate) up. None: the usual form.
      shared_size: F of an expert that every token uses, with a gate of its own, sigmoid(s x) (Qwen2-MoE). None: none.
      aux_loss_weight: factor on the load balance loss, E sum_e (share of tokens of e) (mean probability of e) (Fedus et
        al. 2021, arXiv 2101.03961, eq. 4), which is added to the training loss. 0: no such loss.
      implementation: see ops.grouped_matmul.
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

    takes_segment_ids = True

    @nn.compact
    def __call__(
        self, x: Float[Array, "B T D"], *, segment_ids: Int[Array, "B T"] | None = None
    ) -> Float[Array, "B T D"]:
        self.check()
        D, E, F = x.shape[-1], self.num_experts, self.intermediate_size
        logits = Linear((D,), (E,), ("embed", None), self.bias, name="router")(x)
        gates, chosen = self._gates(logits)
        if self.aux_loss_weight:
            self.sow("losses", "load_balance", self._balance_loss(logits, chosen, segment_ids))
        weights = {
            **self._weights("gate_proj", (D, F)),
            **self._weights("up_proj", (D, F)),
            **self._weights("down_proj", (F, D)),
        }
        rows, whole = PartitionSpec("rows"), PartitionSpec()
        arrays = {"x": x, "gates": gates.astype(x.dtype), "chosen": chosen, "weights": weights}
        specs = {"x": rows, "gates": rows, "chosen": rows, "weights": whole}
        # Each device orders its own tokens; ordering those of all devices would move them between devices.
        y = sharding.island(lambda a: self._sum_of_experts(**a), arrays, specs, rows)
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
        )
        if self.num_chosen > self.num_experts:
            raise UserError(
                f"ExpertsMlp.num_chosen is {self.num_chosen}, expected at most num_experts = {self.num_experts}: "
                "change num_chosen"
            )
        if self.gating not in GATINGS:
            raise UserError(
                f"ExpertsMlp.gating is {self.gating!r}, expected one of {', '.join(GATINGS)}: change gating"
            )

    @nn.nowrap
    def _gates(self, logits: Float[Array, "B T E"]) -> tuple[Array, Array]:
        """The weights [B, T, k] of the chosen experts and their numbers."""
        if self.gating == "chosen":
            best, chosen = jax.lax.top_k(logits, self.num_chosen)
            return jax.nn.softmax(best, axis=-1), chosen
        gates, chosen = jax.lax.top_k(jax.nn.softmax(logits.astype(jnp.float32), axis=-1), self.num_chosen)
        if self.gating == "normalised":
            gates = gates / jnp.sum(gates, axis=-1, keepdims=True)
        return gates, chosen

    def _weights(self, name: str, shape: tuple[int, int]) -> dict[str, Array]:
        """The kernels [E, in, out] and biases [E, out] of a projection."""
        names = ("embed", "mlp") if name != "down_proj" else ("mlp", "embed")
        init, E = fan_in_init(shape[0]), self.num_experts
        kernel = f"{name}_kernel"
        found = {kernel: named_param(self, kernel, init, (None, *names), (E, *shape))}
        if self.bias:
            bias = f"{name}_bias"
            found[bias] = named_param(self, bias, nn.initializers.zeros, (None, names[1]), (E, shape[1]))
        return found

    @nn.nowrap
    def _sum_of_experts(self, x: Array, gates: Array, chosen: Array, weights: dict[str, Array]) -> Array:
        """The weighted sum of the chosen experts' outputs, [B, T, D]; gates and chosen [B, T, k]."""
        flat, copies = chosen.reshape(-1), self.num_chosen
        order = jnp.argsort(flat, stable=True)  # of the pairs of token and expert, by expert
        back, sizes = jnp.argsort(order), jnp.bincount(flat, length=self.num_experts)

        def grouped(name: str, rows: Array, factor: Array) -> Array:
            """factor (rows W + bias), for rows that are already multiplied by it."""
            y = grouped_matmul(rows, weights[f"{name}_kernel"], sizes, implementation=self.implementation)
            if not self.bias:
                return y
            bias = weights[f"{name}_bias"][:, None]
            return y + grouped_matmul(factor, bias, sizes, implementation=self.implementation)

        rows = spread(x.reshape(-1, x.shape[-1]), order, back, copies)
        gate_of_row = spread(gates.reshape(-1, 1), order, back, 1)
        ones = jnp.ones_like(gate_of_row)
        inner = self._product(grouped("gate_proj", rows, ones), grouped("up_proj", rows, ones))
        # Gates before the last product: their gradient then does not need its result.
        y = grouped("down_proj", inner * gate_of_row, gate_of_row)
        return collect(y, order, back, copies).reshape(x.shape)

    @nn.nowrap
    def _product(self, gate: Array, up: Array) -> Array:
        if self.clamp is None:
            return activation(self.activation)(gate) * up
        gate, up = jnp.minimum(gate, self.clamp), jnp.clip(up, -self.clamp, self.clamp)
        return gate * jax.nn.sigmoid(1.702 * gate) * (up + 1)

    def _shared(self, x: Array) -> Array:
        shared = GatedMlp(self.shared_size or 1, activation=self.activation, name="shared_expert")(x)
        return jax.nn.sigmoid(Linear((x.shape[-1],), (1,), ("embed", None), name="shared_gate")(x)) * shared

    @nn.nowrap
    def _balance_loss(self, logits: Array, chosen: Array, segment_ids: Array | None) -> Array:
        real = jnp.ones(chosen.shape[:2]) if segment_ids is None else (segment_ids != 0).astype(jnp.float32)
        count = jnp.maximum(jnp.sum(real), 1)
        probabilities = jax.nn.softmax(logits.astype(jnp.float32), axis=-1)
        used = jnp.zeros(self.num_experts).at[chosen].add(real[..., None]) / count
        mean = jnp.einsum("bte,bt->e", probabilities, real) / count
        return self.aux_loss_weight * self.num_experts * jnp.sum(jax.lax.stop_gradient(used) * mean)

    @nn.nowrap
    def macs_per_token(self, hidden_size: int) -> float:
        """Multiply-adds per token: the router, the chosen experts and the shared one."""
        experts = 3 * hidden_size * self.intermediate_size * self.num_chosen
        shared = 0 if self.shared_size is None else 3 * hidden_size * self.shared_size + hidden_size
        return float(hidden_size * self.num_experts + experts + shared)
