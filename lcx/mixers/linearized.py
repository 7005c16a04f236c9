"""The base class of linear attentions that replace pretrained softmax attention: parameters, settings, transfer losses.

The projections are those of `Attention`, under the same names, so that pretrained weights can be loaded. Feature maps
are applied after the rotation, and each *query* head has its own feature map for the keys too; the window uses the kv
heads directly. Attention transfer trains the feature maps and the window factors to match the softmax attention that
was replaced.

The subclasses `linear_attention.LinearAttention` and `published_lolcats.PublishedLinearAttention` compute the outputs
from queries, keys and values.

Letters: B batch, T time, D embed, N query heads, K key/value heads, H head dim, P features.
"""

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from lcx import rope as rope_lib
from lcx import sharding
from lcx.errors import UserError, check_not_negative, check_positive, check_sizes
from lcx.layers import Norm, named_param
from lcx.mixers import Cache
from lcx.mixers.feature_maps import FeatureMap
from lcx.mixers.projections import merged_heads, rotated_heads
from lcx.mixers.softmax import softmax_attention
from lcx.ops.linear_attention import KINDS, Window

# Features q and k [B,T,N,P]; v [B,T,K,H]; segment_ids [B,T] or None. With a window also the queries wq [B,T,N,H] and
# keys wk [B,T,K,H] of the softmax part, and its weight gamma [N].
Arrays = dict[str, Any]


class LinearizedAttention(nn.Module):
    """Causal linear attention, alone or with a window of softmax attention.

    A subclass defines the computation: `_rotate`, `_weighted`, `_mix`, `_empty_state`, `_softmax_sees` and
    `_transfer_losses`.

    Attributes:
      window: size of the softmax window in keys; earlier keys go through the linear part. None: no softmax part.
      window_kind: "terraced": the query's own block of `window` keys and the previous block; "sliding": the last
        `window` keys.
      window_factor: initial value of the softmax part's weight before the sigmoid; one trained scalar per query head.
      feature_map, feature_dim, full_space, feature_bias, skip, adapter, feature_init: see FeatureMap.
      tied: share one feature map between queries and keys.
      linear: False drops the linear part and keeps only the window, for ablations (linearize.ablated).
      affine: weight the two parts by g and 1 - g instead of g and 1.
      rope, qk_norm, norm_eps, norm, scale: see Attention.
      softmax_window: the sliding window of the softmax attention that this layer replaces.
      transfer: losses of attention transfer to compute, "outputs" and "maps" (objectives.attention_transfer). If any is
        set, the layer returns the softmax attention's output instead of its own.
      implementation: see ops.linear_attention; None picks the fastest valid one.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    rope: rope_lib.Rope | None = rope_lib.Rope()
    window: int | None = 64
    window_kind: str = "terraced"
    window_factor: float = -2.1972245773362196  # the published start: sigmoid gives 0.1
    feature_map: str = "softmax_dim"
    feature_dim: int = 64
    full_space: bool = True
    feature_bias: bool = False
    skip: bool = False
    adapter: int | None = None
    feature_init: str = "uniform"
    tied: bool = False
    linear: bool = True
    affine: bool = False
    qkv_bias: bool = False
    o_bias: bool = False
    qk_norm: bool | str = False
    norm_eps: float = 1e-6
    softmax_window: int | None = None
    transfer: tuple[str, ...] = ()
    implementation: str | None = None
    norm: Norm = Norm()
    scale: float | None = None

    # Whether the class reproduces the published code's arithmetic. A class attribute here, not a field.
    published_quirks = False

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B T D"],
        *,
        positions: Int[Array, "B T"] | None = None,
        segment_ids: Int[Array, "B T"] | None = None,
        cache: Cache = None,
    ) -> tuple[Float[Array, "B T D"], Cache]:
        self.check()
        B, T, D = x.shape
        q, k, v = rotated_heads(self, x, positions, cache, self._rotate, segment_ids=segment_ids)
        arrays: Arrays = self._features(q, k)
        if cache is None:  # with a cache the heads stay as they are: it holds the kv heads only
            k, v = (sharding.repeat_heads(heads, self.num_heads) for heads in (k, v))
        segment_ids = None if segment_ids is None else jnp.broadcast_to(segment_ids, (B, T))
        arrays |= {"v": v, "segment_ids": segment_ids}
        if self.window is not None:
            start = nn.initializers.constant(self.window_factor)
            factors = named_param(self, "window_factors", start, ("heads",), (self.num_heads,))
            arrays = self._weighted(arrays | {"wq": q, "wk": k}, factors)
        if not self.linear:
            arrays["q"] = jnp.zeros_like(arrays["q"])
        y, state = self._mix(arrays, None if cache is None else cache["state"])
        if cache is not None:
            cache = {**cache, "state": state, "index": cache["index"] + T}
        if self.transfer:
            y = self._imitated(y, q, k, arrays)
        return merged_heads(self, y, D), cache

    def _features(self, q: Array, k: Array) -> Arrays:
        """The features of queries and keys, [B, T, N, P] each."""
        k = jnp.repeat(k, self.num_heads // self.num_kv_heads, axis=2)
        of_q = self._feature_map("feature_map_q")
        q = of_q(q)
        if self.tied:
            return {"q": q, "k": of_q(k)}
        # The keys' feature map starts as a copy of the queries'.
        like = nn.meta.unbox(dict(of_q.variables["params"])) if self.is_initializing() else None
        return {"q": q, "k": self._feature_map("feature_map_k")(k, like)}

    def _feature_map(self, name: str, **settings: Any) -> FeatureMap:
        return FeatureMap(
            self.num_heads,
            self.head_dim,
            self.feature_dim,
            activation=self.feature_map,
            full_space=self.full_space,
            bias=self.feature_bias,
            skip=self.skip,
            adapter=self.adapter,
            start=self.feature_init,
            **settings,
            name=name,
        )

    # -------------------------------------------------------------------------------------------- attention transfer

    def _imitated(self, y: Array, q: Array, k: Array, arrays: Arrays) -> Array:
        """The output of softmax attention; the distance of y from it is sown into the collection `losses`."""
        seen, softmax_window = self._softmax_sees(arrays["segment_ids"])
        softmax = jax.tree.map(jax.lax.stop_gradient, {"q": q, "k": k, "v": arrays["v"]})
        wanted = softmax_attention(**softmax, segment_ids=seen, window=softmax_window)
        for name, loss in self._transfer_losses(y, q, k, arrays, wanted).items():
            self.sow("losses", name, loss)
        return wanted

    # ------------------------------------------------------------------------------------------- what a subclass says

    @nn.nowrap
    def _rotate(self, x: Array, positions: Array, *frequencies: Any) -> Array:
        """`rope.rotate`, or another rounding of it."""
        raise NotImplementedError

    @nn.nowrap
    def _weighted(self, arrays: Arrays, factors: Float[Array, " N"]) -> Arrays:
        """The arrays plus gamma [N], the weight of the softmax part: the sigmoid of the parameter `factors`."""
        raise NotImplementedError

    @nn.nowrap
    def _mix(self, arrays: Arrays, state: Any) -> tuple[Float[Array, "B T N H"], Any]:
        """(outputs, the state including these tokens); the state is None without a cache."""
        raise NotImplementedError

    @nn.nowrap
    def _empty_state(self, batch_size: int, dtype: jnp.dtype) -> Any:
        raise NotImplementedError

    @nn.nowrap
    def _softmax_sees(self, ids: Array | None) -> tuple[Array | None, int | None]:
        """(segment ids, sliding window) of the softmax attention that attention transfer imitates."""
        raise NotImplementedError

    @nn.nowrap
    def _transfer_losses(
        self, y: Array, q: Array, k: Array, arrays: Arrays, wanted: Array
    ) -> dict[str, Array]:
        """Loss name -> [B, T], for every name in `transfer`."""
        raise NotImplementedError

    # ------------------------------------------------------------------------------------------------- the contract

    @nn.nowrap
    def init_cache(self, batch_size: int, length: int, dtype: jnp.dtype) -> Cache:
        """The empty state. `length` affects only the rotation (rope.py); the state has a fixed size."""
        return {
            "state": self._empty_state(batch_size, dtype),
            "index": jnp.zeros((), jnp.int32),
            "rope_length": jnp.full((), length, jnp.int32),
        }

    @nn.nowrap
    def macs_per_token(self, seq_len: int) -> float:
        """Multiply-adds per token beyond the weights, averaged: updating and reading the state, and the window."""
        span = min(0 if self.window is None else self.window, seq_len)
        visible = span if self.window_kind == "sliding" else min(1.5 * span, seq_len)
        return self.num_heads * 2.0 * self.head_dim * (self.num_features + visible)

    # ----------------------------------------------------------------------------------------------------- settings

    @property
    def num_features(self) -> int:
        """P, the number of features that the operator sees: doubled by full_space."""
        return self.feature_dim * (
            2 if self.full_space and self.feature_map in ("softmax_dim", "exp_dim") else 1
        )

    @property
    def held(self) -> int | None:
        """The largest number of keys in a window; rows up to this length have no linear part. None without a window."""
        return None if self.window is None else self.window * (2 if self.window_kind == "terraced" else 1)

    @nn.nowrap
    def too_short(self, seq_len: int) -> str:
        """The error message for rows so short that every key is in the window."""
        return (
            f"seq_len {seq_len} is not beyond the {self.held} keys that a {self.window_kind} window of {self.window} "
            "holds: nothing would be linear; raise Trainer.seq_len or lower Linearize.window"
        )

    @nn.nowrap
    def check(self) -> None:
        """Raises UserError for settings that are out of range or do not fit each other."""
        own = type(self).__name__
        sizes = ("num_heads", "num_kv_heads", "head_dim", "feature_dim", "adapter")
        check_sizes(own, **{name: getattr(self, name) for name in sizes})
        check_positive(own, scale=self.scale)
        check_not_negative(own, norm_eps=self.norm_eps)
        if not math.isfinite(self.window_factor):
            raise UserError(f"window_factor {self.window_factor}: expected a finite number")
        if self.num_heads % self.num_kv_heads:
            raise UserError(
                f"num_heads {self.num_heads} must be a multiple of num_kv_heads {self.num_kv_heads}; change one"
            )
        choices = {
            "feature_map": ("softmax_dim", "exp_dim", "relu", "pos_elu"),
            "window_kind": KINDS,
            "feature_init": ("uniform", "identity", "normal"),
        }
        if unknown := set(self.transfer) - {"outputs", "maps"}:
            raise UserError(f"transfer {sorted(unknown)}: expected only the names outputs, maps")
        for name, expected in choices.items():
            if getattr(self, name) not in expected:
                raise UserError(f"{name} {getattr(self, name)!r}: expected one of {', '.join(expected)}")
        if (self.skip or self.adapter is not None) and self.feature_dim != self.head_dim:
            raise UserError(
                f"feature_dim {self.feature_dim} with skip or adapter: expected head_dim {self.head_dim}; set "
                "feature_dim to it"
            )
        if self.window is None and not self.linear:
            raise UserError("linear = False with window = None: nothing is left; set a window")
        if self.window is not None and self.window < 1:
            raise UserError(f"window {self.window}: expected at least 1, or None for no window")


def window_of(mixer: LinearizedAttention, arrays: Arrays) -> Window | None:
    """The softmax part in the form that the operators take; None without a window."""
    if mixer.window is None:
        return None
    return Window(mixer.window_kind, mixer.window, arrays["wq"], arrays["wk"], arrays["gamma"])
