"""Mamba-2 (Dao & Gu 2024, arXiv 2405.21060): a selective state space model with one decay per head.

    z, x, B, C, dt = projections of the input         x, B, C <- silu(causal convolution)
    D_t = softplus(dt_t + dt_bias)                    S_t = e^{-exp(A_log) D_t} S_{t-1} + D_t B_t x_t^T
    y_t = S_t^T C_t + skip * x_t                      out = RMSNorm(y * silu(z)) W

The recurrence is `ops.linear_attention` with C as queries, B as keys, D_t x_t as values and -exp(A_log) D_t as log
decay. B and C are shared by groups of heads. The published code's single projection [z | x | B | C | dt] is split into
five here, so that each device holds whole heads.

`mlp_size` > 0 adds gated channels in parallel to the state space, silu(gate) * up, which share the output projection;
in the published code this is `d_ssm < d_inner`. The "Mamba-2" baseline of the 2Mamba paper has this form, with one head
and the rest of the width in the gated channels (num_heads=1, mlp_size=D - head_dim, conv_size=2).

Letters: B batch, T time, D embed, N heads, G groups, H head dim, P state dim, K taps, F mlp.
"""

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as Axes
from jaxtyping import Array, Float, Int

from lcx import sharding
from lcx.errors import UserError, check_not_negative, check_sizes
from lcx.layers import Linear, named_param
from lcx.ops.linear_attention import LinearState, empty_state, linear_attention
from lcx.ops.shards import after_row, halo_in_words
from lcx.ops.short_conv import ConvState, short_conv
from lcx.ops.tiling import scaled

Cache = dict[str, Any]
PER_HEAD = Axes("rows", "time", "heads")


class Mamba2(nn.Module):
    """A Mamba-2 mixer.

    Attributes:
      head_dim, state_dim: H and P; the state of a head is P x H.
      num_groups: G, heads of one group share B and C; the norm runs over one group's channels.
      conv_size: taps of the convolutions, 1 to 8.
      skip_per_channel: one skip weight per channel instead of one per head.
      mlp_size: channels of a gated MLP in parallel to the state space.
      implementation: see ops.linear_attention; None picks the fastest valid one.
    """

    num_heads: int
    head_dim: int = 64
    state_dim: int = 128
    num_groups: int = 1
    conv_size: int = 4
    conv_bias: bool = True
    skip_per_channel: bool = False
    mlp_size: int = 0
    norm_eps: float = 1e-5
    implementation: str | None = None

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B T D"],
        *,
        positions: Int[Array, "B T"] | None = None,
        segment_ids: Int[Array, "B T"] | None = None,
        cache: Cache | None = None,
    ) -> tuple[Float[Array, "B T D"], Cache | None]:
        self._check()
        B, T, D = x.shape
        heads, groups = (self.num_heads, self.head_dim), (self.num_groups, self.state_dim)
        z = Linear((D,), heads, ("embed", "heads", "head_dim"), name="z_proj")(x)
        dt = Linear((D,), heads[:1], ("embed", "heads"), name="dt_proj")(x)
        signals, convs = {}, {}
        for name, shape, axis in (("x", heads, "heads"), ("b", groups, "groups"), ("c", groups, "groups")):
            signals[name] = Linear((D,), shape, ("embed", axis, "head_dim"), name=f"{name}_proj")(x)
            convs[name] = self._conv(name, shape, (axis, "head_dim", None))
        segment_ids = None if segment_ids is None else jnp.broadcast_to(segment_ids, (B, T))
        ssm = {"dt": dt, **self._per_head()}
        y, cache = self._mixed(signals, convs, ssm, segment_ids, cache)
        scale = named_param(self, "norm", nn.initializers.ones, ("heads", "head_dim"), heads)
        y = gated_norm(y, z, scale, num_groups=self.num_groups, eps=self.norm_eps)
        out = Linear(heads, (D,), ("heads", "head_dim", "embed"), name="out_proj")(y)
        if self.mlp_size:
            gate, up = (
                Linear((D,), (self.mlp_size,), ("embed", "mlp"), name=f"{name}_proj")(x)
                for name in ("gate", "up")
            )
            out += Linear((self.mlp_size,), (D,), ("mlp", "embed"), name="down_proj")(nn.silu(gate) * up)
        return out, cache

    def _check(self) -> None:
        sizes = ("num_heads", "head_dim", "state_dim", "num_groups", "conv_size")
        check_sizes("Mamba2", **{name: getattr(self, name) for name in sizes})
        check_not_negative("Mamba2", mlp_size=self.mlp_size, norm_eps=self.norm_eps)
        if self.num_heads % self.num_groups:
            raise UserError(f"num_heads {self.num_heads} must be a multiple of num_groups {self.num_groups}")

    def _conv(self, name: str, shape: tuple[int, int], names) -> dict[str, Array]:
        """Parameters of one convolution: taps [heads, size, K], the current token's first, and bias [heads, size]."""
        bound = self.conv_size**-0.5
        init = _uniform(bound)
        conv = {"taps": named_param(self, f"{name}_conv", init, names, (*shape, self.conv_size))}
        if self.conv_bias:
            conv["bias"] = named_param(self, f"{name}_conv_bias", init, names[:2], shape)
        return conv

    def _per_head(self) -> dict[str, Array]:
        """dt_bias, A_log and skip, as published: steps of 0.001 to 0.1, decay rates of 1 to 16, skips of 1."""
        N = (self.num_heads,)
        skip = (*N, self.head_dim) if self.skip_per_channel else N
        return {
            "dt_bias": named_param(self, "dt_bias", _steps, ("heads",), N),
            "a_log": named_param(self, "A_log", _log_rates, ("heads",), N),
            "skip": named_param(self, "D", nn.initializers.ones, ("heads", "head_dim")[: len(skip)], skip),
        }

    @nn.nowrap
    def _mixed(self, signals, convs, ssm, segment_ids, cache) -> tuple[Array, Cache | None]:
        """Convolutions and recurrence, on each device's own rows and heads -> y [B, T, N, H]."""
        group = "heads" if self.num_groups > 1 else None  # a single group is replicated on every device
        names = {"x": "heads", "b": group, "c": group}
        arrays: dict[str, Any] = {"signals": signals, "convs": convs, "ssm": ssm}
        cache_axes: dict[str, Any] = {
            name: ConvState._make((Axes("rows", None, axis), Axes("rows"))) for name, axis in names.items()
        }
        cache_axes["ssm"] = LinearState._make((Axes("rows", "heads"), None, Axes("rows"), None))
        axes: dict[str, Any] = {
            "signals": {name: Axes("rows", "time", axis) for name, axis in names.items()},
            "convs": {name: Axes(axis) for name, axis in names.items()},
            "ssm": {"dt": PER_HEAD, "dt_bias": Axes("heads"), "a_log": Axes("heads"), "skip": Axes("heads")},
        }
        if segment_ids is not None:
            arrays["segment_ids"], axes["segment_ids"] = segment_ids, Axes("rows", "time")
        if cache is None:
            return sharding.island(self._local, arrays, axes, (PER_HEAD, None))
        arrays["cache"], axes["cache"] = cache, cache_axes
        return sharding.island(self._local, arrays, axes, (PER_HEAD, cache_axes))

    @nn.nowrap
    def _local(self, arrays, mesh_axis: str | None = None) -> tuple[Array, Cache | None]:
        cache, segment_ids = arrays.get("cache"), arrays.get("segment_ids")
        if cache is not None and segment_ids is None:
            segment_ids = jnp.ones(arrays["signals"]["x"].shape[:2], jnp.int32)
        mixed, new = {}, {}
        for name, signal in arrays["signals"].items():
            before = None if cache is None else cache[name]
            conv = arrays["convs"][name]
            mixed[name], new[name] = convolved(signal, conv, segment_ids, before, mesh_axis=mesh_axis)
        x, ssm = mixed["x"], arrays["ssm"]
        dt = jax.nn.softplus(ssm["dt"].astype(jnp.float32) + ssm["dt_bias"].astype(jnp.float32))
        y, state = linear_attention(
            mixed["c"],
            mixed["b"],
            (x * dt[..., None]).astype(x.dtype),
            log_decay=-jnp.exp(ssm["a_log"].astype(jnp.float32)) * dt,
            segment_ids=segment_ids,
            initial_state=None if cache is None else cache["ssm"],
            implementation=self.implementation,
            mesh_axis=mesh_axis,
        )
        skip = ssm["skip"] if self.skip_per_channel else ssm["skip"][:, None]
        y = y + scaled(x, skip)
        return y, None if cache is None else after_row({**new, "ssm": state}, segment_ids, mesh_axis)

    @nn.nowrap
    def init_cache(self, batch_size: int, length: int, dtype: jnp.dtype) -> Cache:
        """The empty state; `length` has no effect, since the state has a fixed size."""
        slots = (batch_size, self.conv_size - 1)
        heads, groups = (self.num_heads, self.head_dim), (self.num_groups, self.state_dim)
        cache: Cache = {
            name: ConvState(jnp.zeros((*slots, *shape), dtype), jnp.zeros(slots, jnp.int32))
            for name, shape in (("x", heads), ("b", groups), ("c", groups))
        }
        return {
            **cache,
            "ssm": empty_state(batch_size, self.num_heads, self.state_dim, self.head_dim, normalize=False),
        }

    @nn.nowrap
    def context_method(self, *, devices: int, tensor: int, seq_len: int) -> str:
        return f"states and {halo_in_words(self.conv_size - 1)}"

    @nn.nowrap
    def macs_per_token(self, seq_len: int) -> float:
        """Multiply-adds per token beyond the weights: updating and reading the state. (Taps count as weights.)"""
        return 2.0 * self.num_heads * self.head_dim * self.state_dim


def gated_norm(y: Array, z: Array, scale: Array, *, num_groups: int, eps: float) -> Array:
    """RMSNorm(y silu(z)) [B, T, N, H], statistics in float32 over the channels of a group."""
    gated = y.astype(jnp.float32) * nn.silu(z.astype(jnp.float32))
    grouped = gated.reshape(*y.shape[:2], num_groups, -1)
    grouped *= jax.lax.rsqrt(jnp.mean(jnp.square(grouped), axis=-1, keepdims=True) + eps)
    return grouped.reshape(y.shape).astype(y.dtype) * scale.astype(y.dtype)


def convolved(
    x: Array,
    conv: dict[str, Array],
    segment_ids: Array | None,
    before: ConvState | None,
    *,
    mesh_axis: str | None = None,
) -> tuple[Array, ConvState]:
    """silu(short convolution over T) of x [B, T, heads, size], and the new history, [B, K - 1, heads, size]."""
    B, T, *shape = x.shape
    size = math.prod(shape)
    flat = None
    if before is not None:
        flat = before._replace(inputs=before.inputs.reshape(*before.inputs.shape[:2], size).astype(x.dtype))
    y, after = short_conv(
        x.reshape(B, T, size),
        conv["taps"].reshape(size, -1).astype(x.dtype),
        bias=conv["bias"].reshape(size) if "bias" in conv else None,
        segment_ids=segment_ids,
        initial_state=flat,
        time_axis=1,
        mesh_axis=mesh_axis,
    )
    inputs = after.inputs.reshape(*after.inputs.shape[:2], *shape)
    dtype = x.dtype if before is None else before.inputs.dtype
    return nn.silu(y).reshape(x.shape), after._replace(inputs=inputs.astype(dtype))


def _uniform(bound: float):
    return lambda key, shape: jax.random.uniform(key, shape, jnp.float32, -bound, bound)


def _steps(key, shape):
    """softplus^-1 of step sizes drawn log-uniformly from 0.001 to 0.1."""
    step = jnp.exp(jax.random.uniform(key, shape, jnp.float32, math.log(1e-3), math.log(0.1)))
    return step + jnp.log(-jnp.expm1(-step))


def _log_rates(key, shape):
    return jnp.log(jax.random.uniform(key, shape, jnp.float32, 1, 16))
