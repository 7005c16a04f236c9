"""Linear attention that replaces pretrained softmax attention: learned feature maps, and a window of softmax attention.

    y_i = sum_j phi_q(q_i).phi_k(k_j) v_j / sum_j phi_q(q_i).phi_k(k_j)

(Hedgehog, Zhang et al. 2024, arXiv 2402.04347; T2R, Kasai et al. 2021, arXiv 2103.13076; with a window LoLCATS, Zhang
et al. 2024, arXiv 2410.10254.) Settings, parameters and attention transfer are those of `linearized.py`.

The cache is the state of the operator: its size does not depend on the context.
"""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as Axes
from jaxtyping import Array, Float, Int

from lcx import rope as rope_lib
from lcx import sharding
from lcx.mixers import Cache
from lcx.mixers.feature_maps import FLOOR, FeatureMap, features
from lcx.mixers.linearized import Arrays, LinearizedAttention, window_of
from lcx.mixers.published_lolcats import PublishedLinearAttention
from lcx.ops.attention_maps import cross_entropy_of_maps
from lcx.ops.linear_attention import Held, LinearState, empty_state, linear_attention
from lcx.ops.shards import after_row
from lcx.ops.windowed_linear_attention import empty_held

__all__ = ["FLOOR", "FeatureMap", "LinearAttention", "features"]

PER_HEAD = Axes("rows", "time", "heads")
HELD = Held._make((*(Axes("rows", None, "heads"),) * 3, Axes("rows")))
STATE = LinearState._make((Axes("rows", "heads"), Axes("rows", "heads"), Axes("rows"), None))


class LinearAttention(LinearizedAttention):
    """Causal linear attention, alone or with a window of softmax attention; LinearizedAttention lists the settings.

    Attributes:
      published_quirks: deprecated. True selects PublishedLinearAttention with these settings, so that older
        configurations and checkpoints keep working.
    """

    published_quirks: bool = False

    def __call__(
        self,
        x: Float[Array, "B T D"],
        *,
        positions: Int[Array, "B T"] | None = None,
        segment_ids: Int[Array, "B T"] | None = None,
        cache: Cache = None,
    ) -> tuple[Float[Array, "B T D"], Cache]:
        arrays = {"positions": positions, "segment_ids": segment_ids, "cache": cache}
        if self.published_quirks:
            return self._call_published(x, **arrays)
        return super().__call__(x, **arrays)

    @nn.compact
    def _call_published(self, x: Array, **arrays: Any) -> tuple[Array, Cache]:
        """Runs PublishedLinearAttention in the scope of this module, so that its parameters keep the same paths."""
        mixer = PublishedLinearAttention(**_settings(self))
        nn.share_scope(self, mixer)
        return mixer(x, **arrays)

    @property
    def whole_prompt(self) -> bool:
        return self.published_quirks and PublishedLinearAttention.whole_prompt

    @nn.nowrap
    def _rotate(self, x: Array, positions: Array, *frequencies: Any) -> Array:
        return rope_lib.rotate(x, positions, *frequencies)

    @nn.nowrap
    def _weighted(self, arrays: Arrays, factors: Float[Array, " N"]) -> Arrays:
        gamma = jax.nn.sigmoid(factors.astype(jnp.float32))
        q = arrays["q"]
        if self.affine:
            q *= (1 - gamma)[:, None].astype(q.dtype)
        return arrays | {"q": q, "gamma": gamma}

    @nn.nowrap
    def _mix(self, arrays: Arrays, state: Any) -> tuple[Float[Array, "B T N H"], Any]:
        """Runs the operator on each device's own rows and heads; arguments and result as in LinearizedAttention."""
        axes: dict[str, Any] = dict.fromkeys(("q", "k", "v", "wq", "wk"), PER_HEAD)
        axes |= {"gamma": Axes("heads"), "segment_ids": Axes("rows", "time")}
        axes = {name: axes[name] for name, x in arrays.items() if x is not None}
        arrays = {name: arrays[name] for name in axes}
        state_axes = STATE if self.window is None else STATE._replace(held=HELD)
        if state is not None:
            arrays["state"], axes["state"] = state, state_axes

        def run(arrays, mesh_axis=None):
            y, after = linear_attention(
                *(arrays[name] for name in "qkv"),
                normalize=True,
                window=window_of(self, arrays),
                segment_ids=arrays.get("segment_ids"),
                initial_state=arrays.get("state"),
                implementation=self.implementation,
                mesh_axis=mesh_axis,
            )
            if state is None:
                return y, None
            after = after_row(after, arrays.get("segment_ids"), mesh_axis)
            return y, jax.tree.map(lambda new, old: new.astype(old.dtype), after, arrays["state"])

        return sharding.island(run, arrays, axes, (PER_HEAD, None if state is None else state_axes))

    @nn.nowrap
    def _empty_state(self, batch_size: int, dtype: jnp.dtype) -> Any:
        if self.published_quirks:
            return PublishedLinearAttention(**_settings(self), parent=None)._empty_state(batch_size, dtype)
        P, H = self.num_features, self.head_dim
        state = empty_state(batch_size, self.num_heads, P, H, normalize=True)
        if self.window is None:
            return state
        kv, of_features = (self.num_kv_heads, H), (self.num_heads, P)
        held = empty_held(
            self.window_kind, self.window, k=kv, v=kv, features=of_features, batch=batch_size, dtype=dtype
        )
        return state._replace(held=held)

    @nn.nowrap
    def context_method(self, *, devices: int, tensor: int, seq_len: int) -> str:
        if self.published_quirks or "maps" in self.transfer:
            return "whole rows, gathered"
        return "states" if self.window is None else f"states and a halo of {self.held} keys and values"

    @nn.nowrap
    def _softmax_sees(self, ids: Array | None) -> tuple[Array | None, int | None]:
        return ids, self.softmax_window

    @nn.nowrap
    def _transfer_losses(
        self, y: Array, q: Array, k: Array, arrays: Arrays, wanted: Array
    ) -> dict[str, Array]:
        losses = {}
        if "outputs" in self.transfer:
            error = y.astype(jnp.float32) - wanted.astype(jnp.float32)
            losses["outputs"] = jnp.mean(jnp.square(error), axis=(2, 3))
        if "maps" in self.transfer:
            k = jnp.repeat(k, self.num_heads // k.shape[2], axis=2)
            losses["maps"] = cross_entropy_of_maps(
                q,
                k,
                arrays["q"],
                arrays["k"],
                window=window_of(self, arrays | {"wq": q, "wk": k}),
                softmax_window=self.softmax_window,
                segment_ids=arrays["segment_ids"],
            )
        return losses


def _settings(mixer: LinearizedAttention) -> dict[str, Any]:
    """The values of the fields that LinearizedAttention defines, as keyword arguments of its subclasses."""
    names = {field.name for field in dataclasses.fields(LinearizedAttention)} - {"parent", "name"}
    return {name: getattr(mixer, name) for name in names}
