"""Linear attention in place of a pretrained softmax one: learned feature maps, and a softmax over the nearest keys.

    y_i = sum_j phi_q(q_i).phi_k(k_j) v_j / sum_j phi_q(q_i).phi_k(k_j)

(Hedgehog, Zhang et al. 2024, arXiv 2402.04347; T2R, Kasai et al. 2021, arXiv 2103.13076; with a window LoLCATS, Zhang
et al. 2024, arXiv 2410.10254.) The projections are those of `Attention`, under the same names, so that a pretrained
model's weights fit. Feature maps come after the rotation, and every *query* head has its own also for the keys; the
window keeps the kv heads.

The cache is the state of the operator: its size does not depend on the context.
"""

import functools
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as Axes
from jaxtyping import Array, Float, Int

from lcx import rope as rope_lib
from lcx import sharding
from lcx.errors import UserError
from lcx.layers import Norm, named_param
from lcx.mixers.projections import merged_heads, rotated_heads
from lcx.ops import published_lolcats
from lcx.ops.attention import attention
from lcx.ops.attention_maps import cross_entropy_of_maps
from lcx.ops.linear_attention import KINDS, Held, LinearState, Window, empty_state, linear_attention
from lcx.ops.windowed_linear_attention import empty_held

Cache = dict[str, Any]
FLOOR = 1e-12  # of every feature, so that no denominator is 0
PER_HEAD = Axes("rows", None, "heads")
HELD = Held._make((PER_HEAD, PER_HEAD, PER_HEAD, Axes("rows")))
STATE = LinearState._make((Axes("rows", "heads"), Axes("rows", "heads"), Axes("rows"), None))


class FeatureMap(nn.Module):
    """phi(x) = activation(x W (+ b) (+ x)), or with an adapter activation(x + relu(x W0 + b0) W1 + b1), head by head.

    Attributes:
      activation: "softmax_dim" and "exp_dim" (Hedgehog: softmax, or exp below the maximum, over the features),
        "relu" (T2R), "pos_elu" (1 + elu).
      full_space: the first two give [f(z), f(-z)], 2 feature_dim features.
      bias: one number a head.
      adapter: hidden size of the adapter; None: one matrix.
      start: of W: "uniform" (+-sqrt(6 / (head_dim feature_dim))), "identity" (the first coordinates; 0 with skip),
        "normal".
      published: round every step to x's dtype, as the authors of LoLCATS do; else only the result.

    Called with `like`, the parameters of another map, it starts as its copy.
    """

    num_heads: int
    head_dim: int
    feature_dim: int
    activation: str = "softmax_dim"
    full_space: bool = True
    bias: bool = False
    skip: bool = False
    adapter: int | None = None
    start: str = "uniform"
    published: bool = False

    @nn.compact
    def __call__(
        self, x: Float[Array, "B T N H"], like: dict[str, Array] | None = None
    ) -> Float[Array, "B T N P"]:
        dtype, x = x.dtype, x.astype(jnp.promote_types(x.dtype, jnp.float32))
        step = functools.partial(published_lolcats.rounded, dtype=dtype) if self.published else _exact
        product = functools.partial(self._product, like=like, step=step)
        if self.adapter is None:
            z = product("layer", x, self.feature_dim, self._init())
            if self.bias:
                bias = self._param("bias", _uniform(math.sqrt(6 / self.num_heads)), (self.num_heads,), like)
                z = step(z + step(bias)[:, None])
            z = step(z + x) if self.skip else z
        else:
            start = _uniform(math.sqrt(6 / (self.head_dim * self.adapter)))
            z = nn.relu(product("layer_0", x, self.adapter, start, bias="bias_0"))
            z = step(x + product("layer_1", z, self.feature_dim, nn.initializers.zeros, bias="bias_1"))
        if self.published:
            return published_lolcats.features(z, self.activation, full_space=self.full_space, dtype=dtype)
        return features(z, self.activation, full_space=self.full_space).astype(dtype)

    def _param(self, name: str, init, shape: tuple[int, ...], like: dict[str, Array] | None) -> Array:
        if like is not None and self.is_initializing():
            copied = like[name]

            def init(key, shape):
                return copied

        return named_param(self, name, init, ("heads", "head_dim", None)[: len(shape)], shape)

    def _product(self, name, x, size, init, bias=None, *, like, step) -> Array:
        kernel = self._param(name, init, (self.num_heads, x.shape[-1], size), like)
        z = step(jnp.einsum("btnh,nhf->btnf", x, step(kernel.astype(x.dtype))))
        if bias is None:
            return z
        return step(z + step(self._param(bias, nn.initializers.zeros, (self.num_heads, size), like)))

    def _init(self):
        if self.start == "normal":
            return nn.initializers.normal(1.0)
        if self.start == "identity":
            return nn.initializers.zeros if self.skip else _first_coordinates
        return _uniform(math.sqrt(6 / (self.head_dim * self.feature_dim)))


def features(z: Float[Array, "... F"], activation: str, *, full_space: bool = True) -> Float[Array, "... P"]:
    """The activation of a feature map; every feature is at least FLOOR."""
    if activation == "softmax_dim":
        maps = [nn.softmax(z), nn.softmax(-z)]
    elif activation == "exp_dim":
        maps = [jnp.exp(x - jnp.max(x, axis=-1, keepdims=True)) for x in (z, -z)]
    else:
        maps, full_space = [nn.relu(z) if activation == "relu" else 1 + nn.elu(z)], False
    z = jnp.concatenate(maps, axis=-1) if full_space else maps[0]
    return jnp.maximum(z, FLOOR)


def _exact(x: Array) -> Array:
    return x


def _uniform(bound: float):
    return lambda key, shape: jax.random.uniform(key, shape, jnp.float32, -bound, bound)


def _first_coordinates(key, shape):
    return jnp.broadcast_to(jnp.eye(*shape[1:]), shape)


class LinearAttention(nn.Module):
    """Causal linear attention, alone or with a window of softmax attention.

    Attributes:
      window: keys of the softmax part; None: none. The keys before them count linearly.
      window_kind: "terraced": the query's own block of `window` keys and the one before; "sliding": the last `window`.
      window_factor: what the weight of the softmax part starts at, before the sigmoid; one number a query head trains.
      feature_map, feature_dim, full_space, feature_bias, skip, adapter, feature_init: see FeatureMap.
      tied: one feature map for queries and keys.
      linear: False leaves the window alone, to see what the linear part does (linearize.ablated).
      affine: the two parts weigh g and 1 - g, in place of g and 1.
      published_quirks: what the authors' code computes, mistakes included, and as slowly: ops/published_lolcats.py.
      rope, qk_norm, norm_eps, norm, scale: see Attention.
      softmax_window: the sliding window of the softmax attention in whose place this is.
      transfer: losses of attention transfer to compute, "outputs" and "maps" (objectives.attention_transfer). Then the
        softmax attention's output is passed on in place of this layer's own.
      implementation: see ops.linear_attention; None picks the fastest that is valid here.
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
    published_quirks: bool = False
    qkv_bias: bool = False
    o_bias: bool = False
    qk_norm: bool | str = False
    norm_eps: float = 1e-6
    softmax_window: int | None = None
    transfer: tuple[str, ...] = ()
    implementation: str | None = None
    norm: Norm = Norm()
    scale: float | None = None

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B T D"],
        *,
        positions: Int[Array, "B T"] | None = None,
        segment_ids: Int[Array, "B T"] | None = None,
        cache: Cache | None = None,
    ) -> tuple[Float[Array, "B T D"], Cache | None]:
        self.check()
        B, T, D = x.shape
        rotate = published_lolcats.rotate if self.published_quirks else rope_lib.rotate
        q, k, v = rotated_heads(self, x, positions, cache, rotate, segment_ids=segment_ids)
        arrays: dict[str, Any] = self._features(q, k)
        if cache is None:  # which holds the kv heads alone
            k, v = (sharding.repeat_heads(heads, self.num_heads) for heads in (k, v))
        segment_ids = None if segment_ids is None else jnp.broadcast_to(segment_ids, (B, T))
        arrays |= {"v": v, "segment_ids": segment_ids}
        if self.window is not None:
            factors = named_param(
                self,
                "window_factors",
                nn.initializers.constant(self.window_factor),
                ("heads",),
                (self.num_heads,),
            )
            gamma = jax.nn.sigmoid(factors.astype(jnp.float32))
            if self.published_quirks:
                gamma = published_lolcats.rounded(gamma, factors.dtype).astype(factors.dtype)
            elif self.affine:
                arrays["q"] *= (1 - gamma)[:, None].astype(q.dtype)
            arrays |= {"wq": q, "wk": k, "gamma": gamma}
        if not self.linear:
            arrays["q"] = jnp.zeros_like(arrays["q"])
        y, cache = (self._published if self.published_quirks else self._mix)(arrays, cache)
        if self.transfer:
            y = self._imitated(y, q, k, arrays)
        return merged_heads(self, y, D), cache

    def _imitated(self, y: Array, q: Array, k: Array, arrays: dict[str, Any]) -> Array:
        """What softmax attention gives; how far y is from it goes into the collection `losses`."""
        ids, losses = arrays["segment_ids"], {}
        seen, softmax_window = ids, self.softmax_window
        if self.published_quirks:  # which tell no documents apart
            seen, softmax_window = None if ids is None else (ids != 0).astype(jnp.int32), None
        softmax = {"q": q, "k": k, "v": arrays["v"], "q_segment_ids": seen, "kv_segment_ids": seen}
        softmax = jax.tree.map(jax.lax.stop_gradient, softmax)
        attend = functools.partial(attention, window=softmax_window)
        wanted = sharding.per_device(attend, softmax, heads=("q", "k", "v"))
        if self.published_quirks:
            y, weights = published_lolcats.transfer(
                *(arrays[name] for name in "qkv"),
                window=self._window(arrays),
                affine=self.affine,
                segment_ids=ids,
            )
            losses["maps"] = published_lolcats.cross_entropy(weights, q, k, segment_ids=ids)
        if "outputs" in self.transfer:
            error = y.astype(jnp.float32) - wanted.astype(jnp.float32)
            losses["outputs"] = jnp.mean(jnp.square(error), axis=(2, 3))
        if "maps" in self.transfer and not self.published_quirks:
            k = jnp.repeat(k, self.num_heads // k.shape[2], axis=2)
            window = None
            if self.window is not None:
                window = Window(self.window_kind, self.window, q, k, arrays["gamma"])
            options = {"window": window, "softmax_window": self.softmax_window, "segment_ids": ids}
            losses["maps"] = cross_entropy_of_maps(q, k, arrays["q"], arrays["k"], **options)
        for name in self.transfer:
            self.sow("losses", name, losses[name])
        return wanted

    def _features(self, q: Array, k: Array) -> dict[str, Array | None]:
        """Queries and keys of the linear part, [B, T, N, P] both."""
        make = functools.partial(
            FeatureMap,
            self.num_heads,
            self.head_dim,
            self.feature_dim,
            activation=self.feature_map,
            full_space=self.full_space,
            bias=self.feature_bias,
            skip=self.skip,
            adapter=self.adapter,
            start=self.feature_init,
            published=self.published_quirks,
        )
        k = jnp.repeat(k, self.num_heads // self.num_kv_heads, axis=2)
        of_q = make(name="feature_map_q")
        q = of_q(q)
        if self.tied:
            return {"q": q, "k": of_q(k)}
        like = nn.meta.unbox(dict(of_q.variables["params"])) if self.is_initializing() else None
        return {"q": q, "k": make(name="feature_map_k")(k, like)}

    @nn.nowrap
    def _mix(self, arrays: dict[str, Any], cache: Cache | None) -> tuple[Array, Cache | None]:
        """The operator, on each device's own rows and heads."""
        axes: dict[str, Any] = dict.fromkeys(("q", "k", "v", "wq", "wk"), PER_HEAD)
        axes |= {"gamma": Axes("heads"), "segment_ids": Axes("rows")}
        axes = {name: axes[name] for name, x in arrays.items() if x is not None}
        arrays = {name: arrays[name] for name in axes}
        state_axes = STATE if self.window is None else STATE._replace(held=HELD)
        if cache is not None:
            arrays["state"], axes["state"] = cache["state"], state_axes

        def run(arrays):
            y, state = linear_attention(
                *(arrays[name] for name in "qkv"),
                normalize=True,
                window=self._window(arrays),
                segment_ids=arrays.get("segment_ids"),
                initial_state=arrays.get("state"),
                implementation=self.implementation,
            )
            if cache is None:
                return y
            return y, jax.tree.map(lambda new, old: new.astype(old.dtype), state, arrays["state"])

        if cache is None:
            return sharding.island(run, arrays, axes, PER_HEAD), None
        y, state = sharding.island(run, arrays, axes, (PER_HEAD, state_axes))
        return y, {**cache, "state": state, "index": cache["index"] + y.shape[1]}

    def _window(self, arrays: dict[str, Any]) -> Window | None:
        if self.window is None:
            return None
        return Window(self.window_kind, self.window, arrays["wq"], arrays["wk"], arrays["gamma"])

    @nn.nowrap
    def _published(self, arrays: dict[str, Any], cache: Cache | None) -> tuple[Array, Cache | None]:
        y, state = published_lolcats.attend(
            *(arrays[name] for name in "qkv"),
            window=self._window(arrays),
            affine=self.affine,
            segment_ids=arrays["segment_ids"],
            state=None if cache is None else cache["state"],
        )
        return y, None if cache is None else {**cache, "state": state, "index": cache["index"] + y.shape[1]}

    @nn.nowrap
    def check(self) -> None:
        """Raises UserError for settings that do not fit each other."""
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
            raise UserError(f"transfer {sorted(unknown)}: expected names out of outputs, maps")
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

    @property
    def held(self) -> int | None:
        """How many keys the window may hold: rows no longer have no linear part. None without a window."""
        return None if self.window is None else self.window * (2 if self.window_kind == "terraced" else 1)

    @nn.nowrap
    def too_short(self, seq_len: int) -> str:
        """The message for rows in which every key is in the window."""
        return (
            f"seq_len {seq_len} is not beyond the {self.held} keys that a {self.window_kind} window of {self.window} "
            "holds: nothing would be linear; raise Trainer.seq_len or lower Linearize.window"
        )

    @property
    def whole_prompt(self) -> bool:
        """Whether a prompt must come in one piece: as published, a second prefill is not the rest of the first."""
        return self.published_quirks

    @property
    def num_features(self) -> int:
        """P, as the operator sees it."""
        return self.feature_dim * (
            2 if self.full_space and self.feature_map in ("softmax_dim", "exp_dim") else 1
        )

    @nn.nowrap
    def init_cache(self, batch_size: int, length: int, dtype: jnp.dtype) -> Cache:
        """Nothing seen yet. Of `length` only the rotation depends (rope.py); the state has one size."""
        P, H = self.num_features, self.head_dim
        state: Any = empty_state(batch_size, self.num_heads, P, H, normalize=True)
        if self.published_quirks:
            heads = {"heads": self.num_heads, "kv_heads": self.num_kv_heads, "head_dim": H}
            state = published_lolcats.empty_state(
                batch=batch_size, **heads, features=P, window=self.window, dtype=dtype
            )
        elif self.window is not None:
            kv, features = (self.num_kv_heads, H), (self.num_heads, P)
            held = empty_held(
                self.window_kind, self.window, k=kv, v=kv, features=features, batch=batch_size, dtype=dtype
            )
            state = state._replace(held=held)
        return {
            "state": state,
            "index": jnp.zeros((), jnp.int32),
            "rope_length": jnp.full((), length, jnp.int32),
        }

    @nn.nowrap
    def macs_per_token(self, seq_len: int) -> float:
        """Multiply-adds per token beyond the weights, averaged: into the state and out of it, and the window's keys."""
        span = min(0 if self.window is None else self.window, seq_len)
        visible = span if self.window_kind == "sliding" else min(1.5 * span, seq_len)
        return self.num_heads * 2.0 * self.head_dim * (self.num_features + visible)
