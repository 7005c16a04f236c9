"""Softmax attention: grouped-query heads, rotary positions, optional windows or chunks, biases and q/k norm."""

import functools
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from lcx import rope as rope_lib
from lcx import sharding
from lcx.errors import UserError, check_not_negative, check_positive, check_sizes
from lcx.layers import Norm, named_param
from lcx.mixers import kv_cache
from lcx.mixers.kv_cache import Cache
from lcx.mixers.projections import merged_heads, positions_of, rotated_heads, unit_heads
from lcx.mixers.softmax import softmax_attention
from lcx.ops.attention_shards import check_method, in_words


class Attention(nn.Module):
    """Causal attention of Llama, Mistral, Qwen and Phi.

    Attributes:
      rope: rotary embedding of queries and keys. None: no positional encoding apart from the causal mask (NoPE, arXiv
        2305.19466), as in some layers of SmolLM3, Llama 4 and Cohere 2.
      window: a query sees keys at most window - 1 tokens back (Mistral); None: all earlier keys.
      chunked: a query sees the keys of its own chunk of `window` tokens instead, counted from the first token of its
        document: position p sees window * (p // window), ..., p (Llama 4).
      qk_norm: True: a norm over head_dim on q and k before the rotation (Qwen3); "all_heads": one over all heads at
        once (OLMo 2); "l2": one without weights on each head after the rotation (Llama 4).
      norm: the kind of that norm; see layers.Norm.
      scale: factor on q k^T before the softmax; None: 1 / sqrt(head_dim).
      softcap: c in c tanh(score / c), which bounds the scores (Gemma 2); None: no cap.
      sinks: whether each head has a trained score that counts in its softmax without a value (gpt-oss).
      temperature: factors on the queries that grow with the position p, 1 + temperature log(1 + floor((p +
        temperature_offset) / temperature_floor)), so that attention stays sharp over many keys (Llama 4, and with
        offset 0 Ministral 3; arXiv 2501.19399). None: none.
      keys_as_values: whether there is no projection to values: they are what the keys are made of, before norm and
        rotation (Gemma 4).
      value_norm: whether each value is divided by its root mean square (Gemma 4).
      implementation: see ops.attention; None picks the fastest valid one.
      over_context: how devices of the mesh axis `context` see each other's keys: "halo", "heads", "gather", "ring", or
        None to choose; see ops/attention_shards.py. With a cache (rows in pieces, generation) those of the new tokens
        are gathered.
      position_dtype: positions are rounded to this dtype before the rotation. None: exact. "bfloat16" is a quirk of
        the 2Mamba paper's softmax model in training: positions above 256 collapse to every second, fourth, ... one.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    rope: rope_lib.Rope | None = rope_lib.Rope()
    window: int | None = None
    qkv_bias: bool = False
    o_bias: bool = False
    qk_norm: bool | str = False
    norm_eps: float = 1e-6
    implementation: str | None = None
    norm: Norm = Norm()
    scale: float | None = None
    softcap: float | None = None
    sinks: bool = False
    over_context: str | None = None
    position_dtype: str | None = None
    chunked: bool = False
    temperature: float | None = None
    temperature_floor: int = 8192
    keys_as_values: bool = False
    value_norm: bool = False
    temperature_offset: int = 1

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B T D"],
        *,
        positions: Int[Array, "B T"] | None = None,
        segment_ids: Int[Array, "B T"] | None = None,
        cache: Any = None,  # a Cache, or a LayerOf where reads_in_place
        deferred: bool = False,
    ) -> tuple[Float[Array, "B T D"], Cache | None]:
        self.check()
        rotate = functools.partial(_rotate, self.position_dtype)
        q, k, v = rotated_heads(
            self, x, positions, cache, rotate, segment_ids=segment_ids, keys_as_values=self.keys_as_values
        )
        v = unit_heads(v, self.norm_eps) if self.value_norm else v
        if self.chunked or self.temperature is not None:
            places = positions_of(x.shape[1], positions, cache)
            q = q if self.temperature is None else q * self._sharpness(places, q.dtype)
            segment_ids = self._chunks(places, segment_ids) if self.chunked else segment_ids
        sinks = None
        if self.sinks:
            sinks = named_param(self, "sinks", nn.initializers.zeros, ("heads",), (self.num_heads,))
        if cache is None:
            if segment_ids is not None:
                segment_ids = jnp.broadcast_to(segment_ids, x.shape[:2])
            y = self._attend(q, k, v, {"segment_ids": segment_ids, "sinks": sinks})
            return merged_heads(self, y, x.shape[-1]), None
        k, v = (sharding.by_token(heads) for heads in (k, v))
        new = kv_cache.entries(k, v, segment_ids)
        ring = self._is_ring(cache["segment_ids"])
        if self.reads_in_place(x.shape[1]):
            y = kv_cache.attend(
                cache, q, new, window=self.window, ring=ring, softcap=self.softcap, sinks=sinks
            )
        else:
            q, k, v, masks = kv_cache.arguments(cache, q, new, window=self.window, ring=ring)
            masks = masks | {"segment_ids": masks.pop("q_segment_ids"), "sinks": sinks}
            y = self._attend(q, k, v, masks)
        cache = new if deferred else self.append_cache(cache, new)
        return merged_heads(self, y, x.shape[-1]), cache

    @nn.nowrap
    def check(self) -> None:
        """Raises UserError for settings that cannot be."""
        check_sizes(
            "Attention",
            num_heads=self.num_heads,
            num_kv_heads=self.num_kv_heads,
            head_dim=self.head_dim,
            window=self.window,
            temperature_floor=self.temperature_floor,
        )
        check_positive("Attention", scale=self.scale, softcap=self.softcap, temperature=self.temperature)
        check_not_negative("Attention", norm_eps=self.norm_eps, temperature_offset=self.temperature_offset)
        check_method("Attention", self.over_context)
        if self.position_dtype not in (None, "bfloat16"):
            raise UserError(f"Attention.position_dtype is {self.position_dtype!r}, expected None or 'bfloat16'")
        if self.chunked and self.window is None:
            raise UserError("Attention.chunked is True without a window, expected the size of a chunk: set window")

    @nn.nowrap
    def _chunks(self, places: Int[Array, "B T"], segment_ids: Array | None) -> Int[Array, "B T"]:
        """Segment ids that also differ between neighbouring chunks; those further apart are outside the window."""
        ids = jnp.ones((1, 1), jnp.int32) if segment_ids is None else segment_ids
        return jnp.where(ids == 0, 0, 2 * ids + places // (self.window or 1) % 2)

    @nn.nowrap
    def _sharpness(self, places: Int[Array, "B T"], dtype: jnp.dtype) -> Float[Array, "B T 1 1"]:
        first = places.astype(jnp.float32) + self.temperature_offset
        steps = jnp.floor(first / self.temperature_floor)
        factor = jnp.log1p(steps) * (self.temperature or 0) + 1
        return factor.astype(dtype)[..., None, None]

    @nn.nowrap
    def _attend(self, q: Array, k: Array, v: Array, masks: dict[str, Any]) -> Array:
        """Runs the operator on each device's own rows and heads; returns [B, T, N, H]."""
        k, v = (sharding.repeat_heads(heads, self.num_heads) for heads in (k, v))
        return softmax_attention(
            q,
            k,
            v,
            window=self.window,
            softcap=self.softcap,
            implementation=self.implementation,
            over_context=self.over_context,
            **masks,
        )

    @nn.nowrap
    def reads_in_place(self, num_tokens: int) -> bool:
        return num_tokens <= kv_cache.FEW and self.implementation in (None, "xla")

    @nn.nowrap
    def init_cache(self, batch_size: int, length: int, dtype: jnp.dtype) -> Cache:
        """An empty cache of `length` slots, or a ring for the window if that needs fewer.

        rope_length = length: one rotation for the whole generation (rope.py).
        """
        held = length if self.window is None else min(length, kv_cache.ring_slots(self.window))
        slots = kv_cache.empty(batch_size, held, self.num_kv_heads, self.head_dim, dtype)
        return {**slots, "rope_length": jnp.full((), length, jnp.int32)}

    @nn.nowrap
    def append_cache(self, cache: Cache, new: Cache) -> Cache:
        return kv_cache.append(cache, new, ring=self._is_ring(cache["segment_ids"]))

    @nn.nowrap
    def _is_ring(self, segment_ids: Int[Array, "*L B S"]) -> bool:
        """Whether the cache with these segment ids is a ring. A smaller one has room for the whole text."""
        return self.window is not None and segment_ids.shape[-1] == kv_cache.ring_slots(self.window)

    @nn.nowrap
    def context_method(self, *, devices: int, tensor: int, seq_len: int) -> str:
        return in_words(
            self.over_context,
            devices=devices,
            tensor=tensor,
            seq_len=seq_len,
            heads=self.num_heads,
            kv_heads=self.num_kv_heads,
            kv_width=2 * self.head_dim,
            window=self.window,
            implementation=self.implementation,
        )

    @nn.nowrap
    def macs_per_token(self, seq_len: int) -> float:
        """Multiply-adds per token of q k^T and its product with v, averaged over a sequence: 2 N H per visible key."""
        span = seq_len if self.window is None else min(self.window, seq_len)
        visible = (span * (span + 1) / 2 + (seq_len - span) * span) / seq_len
        if self.chunked:
            chunks, rest = divmod(seq_len, span)
            visible = (chunks * span * (span + 1) + rest * (rest + 1)) / 2 / seq_len
        return 2 * self.num_heads * self.head_dim * visible


def _rotate(position_dtype: str | None, x: Array, positions: Array, *frequencies: Any) -> Array:
    if position_dtype is not None:
        positions = positions.astype(position_dtype).astype(jnp.int32)
    return rope_lib.rotate(x, positions, *frequencies)
