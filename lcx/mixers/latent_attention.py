"""Multi-head latent attention (MLA): keys and values of all heads are made from one narrow vector per token.

DeepSeek-V2, arXiv 2405.04434, section 2.1. A token's latent c (kv_lora_rank numbers) and one rotated key r, which all
heads share, are all that later tokens need:

    c = norm(W_c x), r = rotate(W_r x)        k_n = [U_n c ; r], v_n = V_n c        (one head, n)
    q_n = [q_n' ; rotate(q_n'')]              score = q_n' U_n c + q_n'' r

**Two forms, equal in value.** *Expanded*: keys and values of all heads are computed, and attention is the usual one;
for training and prompts; of a long cache, a part at a time (ops/attention_parts.py). *Absorbed*: U_n is applied to the
query instead of the keys, and V_n to the weighted sum of latents instead of the latents; for a few new tokens. A step
then reads the cached numbers once, for all heads at once: its cost is linear in kv_lora_rank and does not include the
heads' keys and values, which never exist.

The cache holds [B, 1, S, kv_lora_rank + qk_rope_head_dim], c and r of each token, as keys of a single head; the first
kv_lora_rank numbers of such a key are its value.
"""

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as Axes
from jaxtyping import Array, Float, Int

from lcx import rope as rope_lib
from lcx import sharding
from lcx.errors import check_not_negative, check_sizes
from lcx.layers import Linear, RMSNorm
from lcx.mixers import kv_cache
from lcx.mixers.kv_cache import Cache
from lcx.mixers.projections import positions_and_frequencies
from lcx.mixers.softmax import attention_to_cache, softmax_attention
from lcx.ops import attention_parts
from lcx.ops.attention_parts import attention_in_parts
from lcx.ops.attention_shards import check_method, in_words


class LatentAttention(nn.Module):
    """Attention of DeepSeek V2 and V3, also that of Kimi K2 and Moonlight.

    The fields have the names of Hugging Face's config.json.

    Attributes:
      kv_lora_rank: width of the latent of keys and values.
      q_lora_rank: width of the latent of queries; None: queries are projected from x directly (DeepSeek-V2-Lite).
      qk_nope_head_dim, qk_rope_head_dim: widths of the two parts of a query or key, without and with rotation.
      v_head_dim: width of a value.
      rope: rotary embedding. None: no positions apart from the causal mask.
      rope_interleave: whether dimensions 2j and 2j + 1 of the rotated part are a pair; False: j and j + width / 2.
      bias: whether the projections to the latents and the output projection have biases.
      norm_eps: of the norms of the latents; in the published code it is 1e-6 whatever rms_norm_eps is.
      implementation, over_context: see mixers.attention.Attention.
    """

    num_heads: int
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    q_lora_rank: int | None = None
    rope: rope_lib.Rope | None = rope_lib.Rope()
    rope_interleave: bool = True
    bias: bool = False
    norm_eps: float = 1e-6
    implementation: str | None = None
    over_context: str | None = None

    @property
    def head_dim(self) -> int:
        """Width of what is rotated."""
        return self.qk_rope_head_dim

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
        q, latent = self._queries(x), self._latents(x)
        if self.rope is not None:
            q, latent = self._rotated(q, latent, positions, segment_ids, cache)
        q = q * rope_lib.score_factor(self.rope)
        shape = self.num_heads, self.qk_nope_head_dim + self.v_head_dim
        expand = Linear((self.kv_lora_rank,), shape, ("latent", "heads", "head_dim"), name="kv_b_proj")
        if cache is None:
            if segment_ids is not None:
                segment_ids = jnp.broadcast_to(segment_ids, x.shape[:2])
            return self._output(self._attend(q, latent, expand, {"segment_ids": segment_ids}), x), None
        new = kv_cache.entries(latent[:, :, None], None, segment_ids)
        if self.reads_in_place(x.shape[1]):
            y = self._absorbed(q, new, cache, expand)
        else:
            _, kept, _, masks = kv_cache.arguments(cache, q, new)
            if self.implementation in (None, "xla") and kept.shape[1] > attention_parts.SLOTS:
                y = self._attend_in_parts(q, kept[:, :, 0], _HeadMap.of(expand, q.dtype).merged(), masks)
            else:
                masks = masks | {"segment_ids": masks.pop("q_segment_ids")}
                y = self._attend(q, kept[:, :, 0], expand, masks)
        return self._output(y, x), new if deferred else self.append_cache(cache, new)

    @nn.nowrap
    def check(self) -> None:
        """Raises UserError for sizes that cannot be."""
        check_sizes(
            "LatentAttention",
            num_heads=self.num_heads,
            kv_lora_rank=self.kv_lora_rank,
            q_lora_rank=self.q_lora_rank,
            qk_nope_head_dim=self.qk_nope_head_dim,
            qk_rope_head_dim=self.qk_rope_head_dim,
            v_head_dim=self.v_head_dim,
        )
        check_not_negative("LatentAttention", norm_eps=self.norm_eps)
        check_method("LatentAttention", self.over_context)

    # ---------------------------------------------------------------------------------------------- projections

    def _queries(self, x: Float[Array, "B T D"]) -> Float[Array, "B T N H"]:
        shape = self.num_heads, self.qk_nope_head_dim + self.qk_rope_head_dim
        D, R, heads = x.shape[-1], self.q_lora_rank, ("heads", "head_dim")
        if R is None:
            return Linear((D,), shape, ("embed", *heads), name="q_proj")(x)
        low = Linear((D,), (R,), ("embed", "latent"), self.bias, name="q_a_proj")(x)
        low = RMSNorm(R, self.norm_eps, name="q_a_norm")(low)
        return Linear((R,), shape, ("latent", *heads), name="q_b_proj")(low)

    def _latents(self, x: Float[Array, "B T D"]) -> Float[Array, "B T R"]:
        """What is cached of each token, before the rotation."""
        R = self.kv_lora_rank
        width = R + self.qk_rope_head_dim
        both = Linear((x.shape[-1],), (width,), ("embed", "latent"), self.bias, name="kv_a_proj")(x)
        normed = RMSNorm(R, self.norm_eps, name="kv_a_norm")(both[..., :R])
        return jnp.concatenate([normed, both[..., R:]], axis=-1)

    def _output(self, y: Float[Array, "B T N V"], x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        shape, names = (self.num_heads, self.v_head_dim), ("heads", "head_dim", "embed")
        return Linear(shape, (x.shape[-1],), names, self.bias, name="o_proj")(y)

    @nn.nowrap
    def _rotated(self, q, latent, positions, segment_ids, cache) -> tuple[Array, Array]:
        """Queries [B, T, N, H] and latents [B, T, R] with their last qk_rope_head_dim numbers rotated."""
        rotation = positions_and_frequencies(self, q.shape[1], positions, cache, segment_ids)

        def rotate(heads: Array) -> Array:
            fixed, turned = jnp.split(heads, [heads.shape[-1] - self.head_dim], axis=-1)
            if self.rope_interleave:  # the order of a head's dimensions has no effect on scores
                turned = jnp.concatenate([turned[..., ::2], turned[..., 1::2]], axis=-1)
            return jnp.concatenate([fixed, rope_lib.rotate(turned, *rotation)], axis=-1)

        return rotate(q), rotate(latent[:, :, None])[:, :, 0]

    # ------------------------------------------------------------------------------------------------ the two forms

    def _attend(self, q: Array, latent: Array, expand: Linear, masks: dict[str, Any]) -> Array:
        """The expanded form: outputs [B, T, N, V] for the latents [B, S, R] of all tokens."""
        k, v = self._keys_and_values(latent, expand(latent[..., : self.kv_lora_rank]))
        return softmax_attention(
            q, k, v, implementation=self.implementation, over_context=self.over_context, **masks
        )

    @nn.nowrap
    def _keys_and_values(self, latent: Float[Array, "B S R"], both: Float[Array, "B S N H"]) -> tuple[Array, Array]:
        keys, v = jnp.split(both, [self.qk_nope_head_dim], axis=-1)
        shared = latent[:, :, None, self.kv_lora_rank :]
        k = jnp.concatenate([keys, jnp.broadcast_to(shared, (*keys.shape[:3], self.head_dim))], axis=-1)
        return k, v

    @nn.nowrap
    def _attend_in_parts(self, q: Array, latent: Array, kernel: Array, masks: dict[str, Any]) -> Array:
        """The expanded form over a long cache, without the keys and values of all its slots at once."""
        arrays = {"latent": latent, "kernel": kernel, **masks}
        q_ids = arrays.pop("q_segment_ids")
        axes = dict.fromkeys(arrays, Axes("rows")) | {"kernel": Axes(None, "heads")}

        def attend(q: Array, ids: Array, start: Array | int, arrays: dict[str, Any]) -> Array:
            def made(latent: Array) -> tuple[Array, Array]:
                both = jnp.einsum("bsr,rnh->bsnh", latent[..., : self.kv_lora_rank], arrays["kernel"])
                return self._keys_and_values(latent, both)

            where = {"kv_segment_ids": arrays["kv_segment_ids"], "q_offset": arrays["q_offset"] + start}
            more = {"q_segment_ids": ids, "scale": q.shape[-1] ** -0.5, **where}
            return attention_in_parts(q, made, arrays["latent"], self.v_head_dim, **more)

        return attention_to_cache(attend, q, q_ids, arrays, axes, heads=self.num_heads)

    def _absorbed(self, q: Array, new: Cache, cache: Any, expand: Linear) -> Array:
        """The absorbed form: outputs [B, T, N, V] for a few tokens, over cached latents that are only read."""
        apart = self.qk_nope_head_dim
        to_heads = _HeadMap.of(expand, q.dtype)
        inner = to_heads.part(slice(0, apart)).transposed(q[..., :apart])
        y = kv_cache.attend(
            cache,
            jnp.concatenate([inner, q[..., apart:]], axis=-1),
            new,
            value_width=self.kv_lora_rank,
            scale=q.shape[-1] ** -0.5,
        )
        return to_heads.part(slice(apart, None))(y)

    @nn.nowrap
    def reads_in_place(self, num_tokens: int) -> bool:
        return num_tokens <= kv_cache.FEW and self.implementation in (None, "xla")

    # ---------------------------------------------------------------------------------------------- the contract

    @nn.nowrap
    def init_cache(self, batch_size: int, length: int, dtype: jnp.dtype) -> Cache:
        """An empty cache of `length` slots; rope_length as in mixers.attention.Attention."""
        slots = kv_cache.empty(batch_size, length, 1, self.kv_lora_rank + self.head_dim, dtype, values=False)
        return {**slots, "rope_length": jnp.full((), length, jnp.int32)}

    @nn.nowrap
    def append_cache(self, cache: Cache, new: Cache) -> Cache:
        return kv_cache.append(cache, new)

    @nn.nowrap
    def context_method(self, *, devices: int, tensor: int, seq_len: int) -> str:
        return in_words(
            self.over_context,
            devices=devices,
            tensor=tensor,
            seq_len=seq_len,
            heads=self.num_heads,
            kv_heads=self.num_heads,
            kv_width=self.qk_nope_head_dim + self.head_dim + self.v_head_dim,
            window=None,
            implementation=self.implementation,
        )

    @nn.nowrap
    def macs_per_token(self, seq_len: int) -> float:
        """Multiply-adds per token of scores and of their product with values, averaged over a sequence, expanded."""
        widths = self.qk_nope_head_dim + self.qk_rope_head_dim + self.v_head_dim
        return self.num_heads * widths * (seq_len + 1) / 2


class _HeadMap(NamedTuple):
    """The map from latents to heads, kernel + a b, as a Linear has it: kernel [R, N, H], a [R, r], b [r, N, H]."""

    kernel: Array
    pair: tuple[Array, Array] | None

    @classmethod
    def of(cls, linear: Linear, dtype: jnp.dtype) -> "_HeadMap":
        kernel = nn.meta.unbox(linear.get_variable("params", "kernel"))
        kernel = sharding.gathered(kernel.astype(dtype), linear.names)
        if not linear.has_variable("lora", "a"):
            return cls(kernel, None)
        a, b, scale = (linear.get_variable("lora", leaf).astype(dtype) for leaf in ("a", "b", "scale"))
        return cls(kernel, (a, b * jax.lax.stop_gradient(scale)))

    def merged(self) -> Array:
        """One kernel [R, N, H] for both."""
        return self.kernel if self.pair is None else self.kernel + jnp.einsum("rl,lnh->rnh", *self.pair)

    def part(self, dims: slice) -> "_HeadMap":
        """The map to some dimensions of each head."""
        pair = None if self.pair is None else (self.pair[0], self.pair[1][..., dims])
        return _HeadMap(self.kernel[..., dims], pair)

    def __call__(self, latent: Float[Array, "B T N R"]) -> Float[Array, "B T N H"]:
        """Each head's own latent, mapped to this head."""
        y = jnp.einsum("btnr,rnh->btnh", latent, self.kernel)
        if self.pair is not None:
            a, b = self.pair
            y += jnp.einsum("btnl,lnh->btnh", jnp.einsum("btnr,rl->btnl", latent, a), b)
        return y

    def transposed(self, heads: Float[Array, "B T N H"]) -> Float[Array, "B T N R"]:
        """What the scalar product with a latent has to be, to be that of `heads` with the mapped latent."""
        y = jnp.einsum("btnh,rnh->btnr", heads, self.kernel)
        if self.pair is not None:
            a, b = self.pair
            y += jnp.einsum("btnl,rl->btnr", jnp.einsum("btnh,lnh->btnl", heads, b), a)
        return y
