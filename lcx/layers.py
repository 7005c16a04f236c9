"""The small layers that mixers, MLPs and blocks share: linear projections (with optional LoRA), norms, embedding.

Parameters keep the dtype they were created or loaded with; computation is in the dtype of the activations, which the
model sets once at the embedding. That is the whole mixed-precision policy: for example float32 master weights with
bfloat16 compute, and nothing to configure per layer.
"""

import contextlib
import contextvars
import dataclasses
import functools
import math
from collections.abc import Iterator
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from lcx import sharding
from lcx.ops import fp8
from lcx.ops.product import FEW_ROWS, few_with_table, narrow_on_cpu, product
from lcx.ops.rms_norm import rms_norm
from lcx.ops.tiling import biased, factor

Names = tuple[str | None, ...]


def named_param(module: nn.Module, name: str, init, names: Names, shape: tuple[int, ...]) -> Array:
    """Creates a parameter whose axes carry logical names (None: unnamed), which sharding.RULES maps to mesh axes."""
    value: Any = module.param(name, nn.with_logical_partitioning(init, names), shape)
    return value


INITIALIZATIONS = ("normal", "torch")
_drawn: contextvars.ContextVar[str] = contextvars.ContextVar("initialization", default="normal")


@contextlib.contextmanager
def initialization(name: str) -> Iterator[None]:
    """Draws the linear maps of the models that are initialised meanwhile as `Decoder.initialization` says."""
    token = _drawn.set(name)
    try:
        yield
    finally:
        _drawn.reset(token)


_of_shapes: contextvars.ContextVar[bool] = contextvars.ContextVar("of_shapes", default=False)


@contextlib.contextmanager
def of_shapes() -> Iterator[None]:
    """Whoever traces an initialization meanwhile wants the shapes alone, not the numbers."""
    token = _of_shapes.set(True)
    try:
        yield
    finally:
        _of_shapes.reset(token)


def wants_shapes() -> bool:
    return _of_shapes.get()


def fan_in_init(num_inputs: int, gain: float = 1.0) -> nn.initializers.Initializer:
    """Normal initializer with standard deviation gain / sqrt(fan-in), truncated at two standard deviations.

    With the initialization "torch", whatever the gain: uniform within +- 1 / sqrt(fan-in), as nn.Linear in torch.
    """
    if _drawn.get() == "torch":
        return _within(num_inputs)
    return nn.initializers.truncated_normal(stddev=gain / math.sqrt(num_inputs))


def _bias_init(num_inputs: int) -> nn.initializers.Initializer:
    return _within(num_inputs) if _drawn.get() == "torch" else nn.initializers.zeros


def _within(num_inputs: int) -> nn.initializers.Initializer:
    bound = 1 / math.sqrt(num_inputs)
    return lambda key, shape, dtype=jnp.float32: jax.random.uniform(key, shape, dtype, -bound, bound)


class Linear(nn.Module):
    """y = x @ kernel (+ bias), over any number of input and output axes.

    If the ``lora`` collection holds a pair (a, b) at this path, the low-rank update is added without merging it into
    the kernel: y += scale * (x @ a) @ b (Hu et al. 2021, arXiv 2106.09685).

    Attributes:
      in_shape, out_shape: sizes of the axes that are contracted and of those that replace them.
      names: logical names of the kernel's axes (in_shape + out_shape); sharding.RULES maps them to mesh axes.
      gain: factor on the standard deviation of the initialisation, 1 / sqrt(fan-in).
      fp8: whether the product is computed in FP8 (ops.fp8). Its scales are the parameter `fp8_scales`, of the input and
        of the kernel; 0 means current scaling. They are not trained. In a training step the collection `fp8` holds the
        scale of the gradient and the history that the next scales are made from (training.fp8_scaling).
    """

    in_shape: tuple[int, ...]
    out_shape: tuple[int, ...]
    names: Names
    bias: bool = False
    gain: float = 1.0
    fp8: bool = False

    @nn.compact
    def __call__(self, x: Float[Array, "*batch_and_in"]) -> Float[Array, "*batch_and_out"]:
        init = fan_in_init(math.prod(self.in_shape), self.gain)
        num_in = len(self.in_shape)
        kernel = named_param(self, "kernel", init, self.names, self.in_shape + self.out_shape)
        gathered = sharding.gathered(kernel.astype(x.dtype), self.names)
        if self.fp8:
            multiply = functools.partial(_contract, num_in=num_in, accumulate="float32")
            y = fp8.product(multiply, x, gathered, *self._scaling())
        else:
            y = _contract(x, gathered, num_in)
        if self.bias:
            init = _bias_init(math.prod(self.in_shape))
            bias = named_param(self, "bias", init, self.names[num_in:], self.out_shape)
            y = biased(y, bias)
        if self.has_variable("lora", "a"):
            a, b, scale = (self.get_variable("lora", leaf).astype(x.dtype) for leaf in ("a", "b", "scale"))
            low_rank = _contract(x, sharding.gathered(a, (*self.names[:num_in], None)), num_in)
            update = _contract(low_rank, sharding.gathered(b, (None, *self.names[num_in:])), 1)
            y += update * jax.lax.stop_gradient(scale)
        return y

    @nn.nowrap
    def _scaling(self) -> tuple[Float[Array, "3"], Float[Array, "3"]]:
        """The scales of the input, the kernel and the gradient, and where a step records their magnitudes."""
        scales = named_param(self, "fp8_scales", nn.initializers.zeros, (None,), (2,)).astype(jnp.float32)
        if not self.has_variable(fp8.COLLECTION, "history"):
            return jnp.append(scales, 0.0), jnp.zeros(3)
        gradient, history = (self.get_variable(fp8.COLLECTION, name) for name in ("gradient_scale", "history"))
        return jnp.append(scales, gradient), history[0]


def _contract(x: Array, kernel: Array, num_in: int, accumulate: str | None = None) -> Array:
    """Contracts the last num_in axes of x with the first num_in axes of kernel.

    Uses one plain matrix product wherever rows and tokens can be merged into one axis: on CPUs the gradient of a
    contraction over several axes runs at a third of the speed. With context > 1, rows and tokens are sharded over
    different mesh axes, and merging them would move data between devices.
    """
    kernel = kernel.astype(x.dtype)
    if sharding.axis_size("context") > 1:
        last = tuple(range(x.ndim - num_in, x.ndim))
        dimensions = ((last, tuple(range(num_in))), ((), ()))
        return jax.lax.dot_general(x, kernel, dimensions, preferred_element_type=accumulate)
    size = math.prod(kernel.shape[:num_in])
    rows, matrix = x.reshape(-1, size), kernel.reshape(size, -1)
    if accumulate is None:
        y = product(rows, matrix)
    else:
        y = jnp.matmul(rows, matrix, preferred_element_type=accumulate)
    return y.reshape(*x.shape[: x.ndim - num_in], *kernel.shape[num_in:])


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * scale, statistics in float32 (Zhang & Sennrich 2019, arXiv 1910.07467)."""

    size: int
    eps: float = 1e-5
    names: Names = ("norm",)  # replicated: gathering it would cost more than keeping a copy on every device

    @nn.compact
    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        scale = named_param(self, "scale", nn.initializers.ones, self.names, (self.size,))
        return rms_norm(x, scale, self.eps)


class AffineNorm(nn.Module):
    """((x - mean(x)) / sqrt(mean((x - mean(x))^2) + eps)) * (offset + scale) + bias, computed in float32.

    Without `center` the mean is not subtracted, without `bias` none is added.

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
    """The kind of normalisation that a model uses, independent of sizes. The default is RMSNorm.

    To add a kind, derive a frozen dataclass from this one and give its `__call__` the same arguments.

        Norm()                                             Llama, Qwen, Mistral
        Norm(offset=1.0)                                   Gemma: the weight is stored as its difference from 1
        Norm(center=True)                                  Cohere: LayerNorm without a bias
        Norm(center=True, bias=True)                       LayerNorm: GPT-NeoX, Phi-2, StarCoder 2
        Norm(center=True, bias=True, offset=1.0)           Nemotron

    Attributes:
      center: subtract the mean first, as LayerNorm does (Ba et al. 2016, arXiv 1607.06450).
      bias: add a trained bias at the end.
      offset: constant added to the trained scale.
    """

    center: bool = False
    bias: bool = False
    offset: float = 0.0

    def __call__(self, size: int, eps: float, names: Names = ("norm",), *, name: str) -> nn.Module:
        """A module that normalises the last axis, of length `size`; call it inside the module that owns it."""
        if self == Norm():
            return RMSNorm(size, eps, names, name=name)
        return AffineNorm(size, eps, names, self.center, self.bias, self.offset, name=name)


class Embedding(nn.Module):
    """A table [V, D], used to look up tokens at the input and as the output head (tied, or as a separate table).

    Attributes:
      multiplier: factor on looked-up embeddings; it does not apply to the output head.
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
        x = sharding.constrain(_looked_up(self.embedding, tokens, dtype), sharding.BATCH_AXES, "context", None)
        return x if self.multiplier == 1 else x * self.multiplier

    def logits(self, x: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
        table = self.embedding.astype(x.dtype)
        if narrow_on_cpu(x) and x.shape[0] * x.shape[1] <= FEW_ROWS:
            return few_with_table(x.reshape(-1, x.shape[-1]), table).reshape(*x.shape[:2], -1)
        return jnp.einsum("btd,vd->btv", factor(x), factor(table), preferred_element_type=jnp.float32)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _looked_up(table: Float[Array, "V D"], tokens: Int[Array, "B T"], dtype: jnp.dtype) -> Float[Array, "B T D"]:
    """The rows of a table in `dtype`; their gradients are added in float32 or wider.

    In bfloat16, 65,536 tokens of four letters lost nine tenths of the gradient (see tiling.biased).
    """
    # Gathering the table over `fsdp` first, in the narrower dtype, lets every device look up its own rows of the batch.
    # Without the constraint the partitioner replicates the result.
    return jnp.take(sharding.constrain(table.astype(dtype), "tensor", None), tokens, axis=0)


def _look_up(table: Array, tokens: Array, dtype: jnp.dtype) -> tuple[Array, tuple[Array, Array]]:
    return _looked_up(table, tokens, dtype), (table, tokens)


def _add_up(dtype: jnp.dtype, residuals: tuple[Array, Array], dx: Array) -> tuple[Array, None]:
    table, tokens = residuals
    sums = jnp.zeros(table.shape, jnp.promote_types(table.dtype, jnp.float32))
    sums = sharding.constrain(sums.at[tokens].add(dx.astype(sums.dtype)), "tensor", None)
    return sums.astype(table.dtype), None


_looked_up.defvjp(_look_up, _add_up)
