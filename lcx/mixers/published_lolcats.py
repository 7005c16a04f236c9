"""LoLCATS's attention exactly as its authors' code computes it, mistakes included. Only for parity with their models.

It is slow, quadratic in time and memory, and the outputs of a prefix depend on the text after it.
`ops/published_lolcats.py` lists the differences from `linear_attention.LinearAttention`.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from lcx.mixers.feature_maps import FeatureMap
from lcx.mixers.linearized import Arrays, LinearizedAttention, window_of
from lcx.ops import published_lolcats


class PublishedLinearAttention(LinearizedAttention):
    """LinearizedAttention in the arithmetic of the published code (Zhang et al. 2024, arXiv 2410.10254).

    `softmax_window` and `implementation` have no effect.
    """

    kind = "LinearAttention"  # the name recorded in adapters trained on this class
    published_quirks = True
    whole_prompt = True  # in the published code a second prefill does not continue the first

    def _feature_map(self, name: str, **settings: Any) -> FeatureMap:
        return super()._feature_map(name, published=True, **settings)

    @nn.nowrap
    def _rotate(self, x: Array, positions: Array, *frequencies: Any) -> Array:
        return published_lolcats.rotate(x, positions, *frequencies)

    @nn.nowrap
    def _weighted(self, arrays: Arrays, factors: Float[Array, " N"]) -> Arrays:
        gamma = jax.nn.sigmoid(factors.astype(jnp.float32))
        return arrays | {"gamma": published_lolcats.rounded(gamma, factors.dtype).astype(factors.dtype)}

    @nn.nowrap
    def _mix(self, arrays: Arrays, state: Any) -> tuple[Float[Array, "B T N H"], Any]:
        return published_lolcats.attend(
            *(arrays[name] for name in "qkv"),
            window=window_of(self, arrays),
            affine=self.affine,
            segment_ids=arrays["segment_ids"],
            state=state,
        )

    @nn.nowrap
    def _empty_state(self, batch_size: int, dtype: jnp.dtype) -> published_lolcats.State:
        return published_lolcats.empty_state(
            batch=batch_size,
            heads=self.num_heads,
            kv_heads=self.num_kv_heads,
            features=self.num_features,
            head_dim=self.head_dim,
            window=self.window,
            dtype=dtype,
        )

    @nn.nowrap
    def _softmax_sees(self, ids: Array | None) -> tuple[Array | None, int | None]:
        """As published: all documents of a row count as one, and there is no sliding window."""
        return None if ids is None else (ids != 0).astype(jnp.int32), None

    @nn.nowrap
    def _transfer_losses(
        self, y: Array, q: Array, k: Array, arrays: Arrays, wanted: Array
    ) -> dict[str, Array]:
        ids = arrays["segment_ids"]
        y, weights = published_lolcats.transfer(
            *(arrays[name] for name in "qkv"),
            window=window_of(self, arrays),
            affine=self.affine,
            segment_ids=ids,
        )
        losses = {}
        if "outputs" in self.transfer:
            losses["outputs"] = jnp.mean(
                jnp.square(y.astype(jnp.float32) - wanted.astype(jnp.float32)), axis=(2, 3)
            )
        if "maps" in self.transfer:
            losses["maps"] = published_lolcats.cross_entropy(weights, q, k, segment_ids=ids)
        return losses
