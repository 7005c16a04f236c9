"""A gated MLP beside a mixture of experts, each with norms of its own, as in Gemma 4."""

import flax.linen as nn
from jaxtyping import Array, Float, Int

from lcx.layers import Norm, RMSNorm
from lcx.mlps.experts import ExpertsMlp
from lcx.mlps.gated import GatedMlp


class ExpertsBeside(nn.Module):
    """norm(dense(norm(x))) + norm(experts(norm(x))), with four norms; the router reads x normalised by a fifth.

    The block shall have no norm before it: `Block.mlp_norms = 'after'`, or none.

    Attributes:
      norm, norm_eps: of the four norms. The router's is always RMSNorm, and its result is divided by sqrt(D).
    """

    dense: GatedMlp
    experts: ExpertsMlp
    norm_eps: float = 1e-6
    norm: Norm = Norm()

    takes_segment_ids = True

    @nn.compact
    def __call__(
        self, x: Float[Array, "B T D"], *, segment_ids: Int[Array, "B T"] | None = None
    ) -> Float[Array, "B T D"]:
        D = x.shape[-1]

        def normed(y: Array, name: str) -> Array:
            return self.norm(D, self.norm_eps, name=name)(y)

        dense = normed(self.dense(normed(x, "dense_norm")), "dense_post_norm")
        routed = RMSNorm(D, self.norm_eps, name="router_norm")(x) * D**-0.5
        chosen = self.experts(normed(x, "experts_norm"), routed=routed, segment_ids=segment_ids)
        return dense + normed(chosen, "experts_post_norm")

    @nn.nowrap
    def macs_per_token(self, hidden_size: int) -> float:
        """Multiply-adds per token: the dense MLP, the router and the chosen experts."""
        return 3.0 * hidden_size * self.dense.intermediate_size + self.experts.macs_per_token(hidden_size)
