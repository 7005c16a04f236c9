"""The small layers that mixers, MLPs and blocks share: linear projections (with optional LoRA), norms, embedding.

Parameters keep the dtype they were created or loaded with; the arithmetic runs in the dtype of the activations,
which the model sets once at the embedding. That is the whole mixed-precision policy: float32 master weights,
bfloat16 compute, nothing to configure per layer.
"""

import dataclasses
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from lcx import sharding

Names = tuple[str | None, ...]


def named_param(module: nn.Module, name: str, init, names: Names, shape: tuple[int, ...]) -> Array:
    """A parameter whose axes carry logical names."""
    value: Any = module.param(name, nn.with_logical_partitioning(init, names), shape)
    return value


def fan_in_normal(num_inputs: int, gain: float = 1.0) -> nn.initializers.Initializer:
    """Normal with variance gain^2 / fan-in, cut at two standard deviations."""
    return nn.initializers.truncated_normal(stddev=gain / math.sqrt(num_inputs))


class Linear(nn.Module):
    """y = x @ kernel (+ bias), over any number of input and output axes.

    ``names``: logical names of the kernel's axes (``in_shape + out_shape``); sharding.RULES maps them to mesh axes.
    When the ``lora`` collection holds a pair (a, b) at this path, the low-rank update is added without ever merging
    it: y += scale * (x @ a) @ b (Hu et al. 2021, arXiv 2106.09685).
    """

    in_shape: tuple[int, ...]
    out_shape: tuple[int, ...]
    names: Names
    bias: bool = False
    gain: float = 1.0

    @nn.compact
    def __call__(self, x: Float[Array, "*batch_and_in"]) -> Float[Array, "*batch_and_out"]:
        init = fan_in_normal(math.prod(self.in_shape), self.gain)
        num_in = len(self.in_shape)
        kernel = named_param(self, "kernel", init, self.names, self.in_shape + self.out_shape)
        y = _contract(x, sharding.gathered(kernel.astype(x.dtype), self.names), num_in)
        if self.bias:
            bias = named_param(self, "bias", nn.initializers.zeros, self.names[num_in:], self.out_shape)
            y += bias.astype(x.dtype)
        if self.has_variable("lora", "a"):
            a, b, scale = (self.get_variable("lora", leaf).astype(x.dtype) for leaf in ("a", "b", "scale"))
            low_rank = _contract(x, sharding.gathered(a, (*self.names[:num_in], None)), num_in)
            update = _contract(low_rank, sharding.gathered(b, (None, *self.names[num_in:])), 1)
            y += update * jax.lax.stop_gradient(scale)
        return y


def _contract(x: Array, kernel: Array, num_in: int) -> Array:
    """x over its last num_in axes with kernel over its first.

    As one plain matrix product wherever tokens can be merged into one axis: on CPUs the gradient of a product over
    several axes at once runs at a third of the speed. Rows and tokens that lie on different mesh axes cannot be merged
    without moving them.
    """
    kernel = kernel.astype(x.dtype)
    if sharding.axis_size("context") > 1:
        last = tuple(range(x.ndim - num_in, x.ndim))
        return jax.lax.dot_general(x, kernel, ((last, tuple(range(num_in))), ((), ())))
    size = math.prod(kernel.shape[:num_in])
    y = x.reshape(-1, size) @ kernel.reshape(size, -1)
    return y.reshape(*x.shape[: x.ndim - num_in], *kernel.shape[num_in:])


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * scale, statistics in float32 (Zhang & Sennrich 2019, arXiv 1910.07467)."""

    size: int
    eps: float = 1e-5
    names: Names = ("norm",)  # on every device: gathering it would cost more than keeping it

    @nn.compact
    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        scale = named_param(self, "scale", nn.initializers.ones, self.names, (self.size,))
        x32 = x.astype(jnp.float32)
        normed = x32 * jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + self.eps)
        return normed.astype(x.dtype) * scale.astype(x.dtype)


class AffineNorm(nn.Module):
    """((x - mean(x)) / sqrt(var(x) + eps)) * (offset + scale) + bias, all of it in float32.

    Attributes:
      center, bias, offset: see Norm.
    """

    size: int
    eps: float
    names: Names
    center: bool
    bias: bool
    offset: float

    @nn.compact
    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        start = nn.initializers.constant(1 - self.offset)
        scale = named_param(self, "scale", start, self.names, (self.size,)).astype(jnp.float32)
        y = x.astype(jnp.float32)
        if self.center:
            y -= jnp.mean(y, axis=-1, keepdims=True)
        y *= jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + self.eps)
        y *= self.offset + scale
        if self.bias:
            y += named_param(self, "bias", nn.initializers.zeros, self.names, (self.size,)).astype(
                jnp.float32
            )
        return y.astype(x.dtype)


@dataclasses.dataclass(frozen=True)
class Norm:
    """Which normalisation a model uses, without its sizes. The default is RMSNorm.

    A kind of your own is a frozen dataclass derived from this one, with a `__call__` of the same arguments.

        Norm()                                             Llama, Qwen, Mistral
        Norm(offset=1.0)                                   Gemma: the weight is stored as its difference from 1
        Norm(center=True)                                  Cohere: LayerNorm without a bias
        Norm(center=True, bias=True)                       LayerNorm: GPT-NeoX, Phi-2, StarCoder 2
        Norm(center=True, bias=True, offset=1.0)           Nemotron

    Attributes:
      center: subtract the mean first, as LayerNorm does (Ba et al. 2016, arXiv 1607.06450).
      bias: add a trained bias last.
      offset: what is added to the trained scale.
    """

    center: bool = False
    bias: bool = False
    offset: float = 0.0

    def __call__(self, size: int, eps: float, names: Names = ("norm",), *, name: str) -> nn.Module:
        """A module over the last axis, `size` wide; to be called inside the module that it belongs to."""
        if self == Norm():
            return RMSNorm(size, eps, names, name=name)
        return AffineNorm(size, eps, names, self.center, self.bias, self.offset, name=name)


class Embedding(nn.Module):
    """A table [V, D]: looked up at the input, and (tied or on its own) the output head.

    Attributes:
      multiplier: of what is looked up; the head does not see it.
    """

    vocab_size: int
    hidden_size: int
    names: Names = ("vocab", "embed")
    multiplier: float = 1.0

    def setup(self):
        init = nn.initializers.truncated_normal(stddev=self.hidden_size**-0.5)
        shape = (self.vocab_size, self.hidden_size)
        self.embedding = named_param(self, "embedding", init, self.names, shape)

    def __call__(self, tokens: Int[Array, "B T"], *, dtype: jnp.dtype) -> Float[Array, "B T D"]:
        # Gathering the fsdp pieces first lets every device look up its own rows; left to itself, the partitioner
        # replicates the result.
        table = sharding.constrain(self.embedding.astype(dtype), "tensor", None)
        x = sharding.constrain(jnp.take(table, tokens, axis=0), sharding.BATCH_AXES, "context", None)
        return x if self.multiplier == 1 else x * self.multiplier

    def logits(self, x: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
        return jnp.einsum(
            "btd,vd->btv", x, self.embedding.astype(x.dtype), preferred_element_type=jnp.float32
        )
