"""Feature maps of linear attention: learned functions phi such that phi(q).phi(k) approximates exp(q.k / sqrt H).

(Hedgehog, Zhang et al. 2024, arXiv 2402.04347; T2R, Kasai et al. 2021, arXiv 2103.13076.)
"""

import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from lcx.layers import named_param
from lcx.ops import published_lolcats

FLOOR = 1e-12  # lower bound on every feature, so that no denominator is 0


class FeatureMap(nn.Module):
    """phi(x) = activation(x W (+ b) (+ x)) per head, or with an adapter activation(x + relu(x W0 + b0) W1 + b1).

    Attributes:
      activation: "softmax_dim" (Hedgehog: softmax over the features), "exp_dim" (exp(z - max z) over the features),
        "relu" (T2R) or "pos_elu" (1 + elu).
      full_space: "softmax_dim" and "exp_dim" return [f(z), f(-z)], so 2 feature_dim features.
      bias: add b, one scalar per head.
      skip: add x to x W.
      adapter: hidden size of the adapter; None: the single matrix W.
      start: initialisation of W: "uniform" (+-sqrt(6 / (head_dim feature_dim))), "identity" (keeps the first
        feature_dim coordinates; zeros with skip) or "normal".
      published: round every step to x's dtype, as the LoLCATS authors' code does; otherwise round only the result.

    Called with `like`, the parameters of another map, it is initialised as a copy of that map.
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
    """Applies the activation of a feature map; every feature is at least FLOOR."""
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
