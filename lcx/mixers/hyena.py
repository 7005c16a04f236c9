"""Hyena mixers of StripedHyena 2: a gated convolution with a short, a medium or a long filter.

    z = x W,  z' = featurizer(z),  x1, x2, v = z' by role,  y = (x1 * (h conv (x2 * v) + skip * x2 * v)) Wo + b

SE   explicit filters of 7 taps, no skip; a group of channels shares one
MR   explicit filters of 128 taps, times a fixed decay
LI   implicit filters as long as the sequence: h[c, t] = sum_p R[c, p] exp(-exp(p[c, p] + gamma[c, p]) t)

(Ku et al. 2025, "Systems and Algorithms for Convolutional Multi-Hybrid Language Models at Scale"; formulas and inits as
savanna trains Evo 2.)

Letters: B batch, T time, D embed, C channels, G groups, K taps, P modes.

The three roles (x1, x2, v) of a channel are adjacent: the projection is [D, C, 3], the featurizer [C, 3, K]. Rows of
savanna's interleaved layout are those axes flattened (row 3 c + role). Devices on the `tensor` axis hold whole
channels, so sharding never separates the roles of a channel, and a model can be resharded to any number of devices.

Between the projections channels come before time, the layout that the operators expect. Taps are in convolution order:
k = 0 multiplies the current token.

The cache is the history of both convolutions: the last inputs of the featurizer, and either the last gated inputs of an
explicit filter or the float32 state of the modes of an implicit one. Its size does not depend on the context.
"""

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as Axes
from jaxtyping import Array, Float, Int

from lcx import sharding
from lcx.errors import UserError, check_sizes
from lcx.layers import Linear, named_param
from lcx.ops import modal
from lcx.ops.fir_conv import fir_conv
from lcx.ops.long_conv import long_conv
from lcx.ops.shards import after_row, halo_in_words
from lcx.ops.short_conv import ConvState, short_conv

Cache = dict[str, Any]
_SIZES = ("num_channels", "featurizer_length", "num_groups", "filter_length", "num_modes", "init_length")
CHANNELS_FIRST = Axes("rows", "heads")
FIR_STATE = ConvState._make((CHANNELS_FIRST, Axes("rows")))


class _Hyena(nn.Module):
    """Base class of the three mixers. A subclass defines its filter: `_weights`, `_filter`, `_filter_sends`,
    `_empty`, `_filter_macs`.

    Attributes:
      num_channels: C, the width between the projections.
      featurizer_length: taps of the short convolution on z.
      implementation: of the inner convolution, see ops; None picks the fastest valid one.
      fp8: whether the input projection runs in FP8 (ops.fp8), as Evo 2's 1B, 20B and 40B were trained.
    """

    num_channels: int
    featurizer_length: int = 3
    implementation: str | None = None
    fp8: bool = False

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B T D"],
        *,
        positions: Int[Array, "B T"] | None = None,
        segment_ids: Int[Array, "B T"] | None = None,
        cache: Cache | None = None,
    ) -> tuple[Float[Array, "B T D"], Cache | None]:
        check_sizes(type(self).__name__, **{name: getattr(self, name, None) for name in _SIZES})
        B, T, D = x.shape
        C = self.num_channels
        z = Linear((D,), (C, 3), ("embed", "channels", None), fp8=self.fp8, name="in_proj")(x)
        taps = (C, 3, self.featurizer_length)
        featurizer = named_param(
            self, "featurizer", bounded(self.featurizer_length), ("channels", None, None), taps
        )
        arrays = {
            "z": jnp.transpose(z, (0, 2, 3, 1)),
            "featurizer": featurizer,
            "filter": self._weights(),
            "segment_ids": None if segment_ids is None else jnp.broadcast_to(segment_ids, (B, T)),
            "cache": cache,
        }
        cache_axes = {"featurizer": FIR_STATE, "filter": self._state_axes()}
        axes = {
            "z": Axes("rows", "heads", None, "time"),
            "featurizer": Axes("heads"),
            "filter": Axes("heads"),
            "segment_ids": Axes("rows", "time"),
            "cache": None if cache is None else cache_axes,
        }
        out = (Axes("rows", "heads", "time"), None if cache is None else cache_axes)
        y, cache = sharding.island(self._mix, arrays, axes, out)
        y = jnp.swapaxes(y, 1, 2)
        return Linear((C,), (D,), ("channels", "embed"), bias=True, name="out_proj")(y), cache

    @nn.nowrap
    def _mix(self, arrays: dict[str, Any], mesh_axis: str | None = None) -> tuple[Array, Cache | None]:
        """Everything between the projections, on the channels of one device: z [B, C, 3, T] -> y [B, C, T]."""
        z, ids, cache = arrays["z"], arrays["segment_ids"], arrays["cache"]
        B, C, _, T = z.shape
        K = self.featurizer_length
        before = None
        if cache is not None:
            before = ConvState(
                cache["featurizer"].inputs.reshape(B, 3 * C, K - 1), cache["featurizer"].segment_ids
            )
        z, seen = short_conv(
            z.reshape(B, 3 * C, T),
            arrays["featurizer"].reshape(3 * C, K).astype(z.dtype),
            segment_ids=ids,
            initial_state=before,
            mesh_axis=mesh_axis,
        )
        z = z.reshape(B, C, 3, T)
        signals = (z[:, :, 0], z[:, :, 1], z[:, :, 2])
        state = None if cache is None else cache["filter"]
        y, state = self._filter(signals, arrays["filter"], ids, state, mesh_axis)
        if cache is None:
            return y, None
        featurizer = ConvState(
            seen.inputs.reshape(B, C, 3, K - 1).astype(cache["featurizer"].inputs.dtype), seen.segment_ids
        )
        return y, after_row({"featurizer": featurizer, "filter": state}, ids, mesh_axis)

    @nn.nowrap
    def init_cache(self, batch_size: int, length: int, dtype: jnp.dtype) -> Cache:
        """The empty state. `length` has no effect: the history is a few tokens, or a state of fixed size."""
        seen = (batch_size, self.featurizer_length - 1)
        inputs = jnp.zeros((batch_size, self.num_channels, 3, seen[1]), dtype)
        featurizer = ConvState(inputs, jnp.zeros(seen, jnp.int32))
        return {"featurizer": featurizer, "filter": self._empty(batch_size, dtype)}

    @nn.nowrap
    def context_method(self, *, devices: int, tensor: int, seq_len: int) -> str:
        return f"{halo_in_words(self.featurizer_length - 1)} and {self._filter_sends()}"

    @nn.nowrap
    def macs_per_token(self, seq_len: int) -> float:
        """Multiply-adds per token between the projections, averaged over a sequence: convolutions and gates."""
        return self.num_channels * (3 * self.featurizer_length + 2 + self._filter_macs(seq_len))


class _Explicit(_Hyena):
    """Base class of mixers whose filters are stored tap by tap.

    Attributes:
      num_groups: channels c with the same c // (num_channels / num_groups) share a filter.
    """

    num_groups: int = 1
    filter_length: int = 7

    @nn.nowrap
    def _taps(self, name: str, init) -> Array:
        if self.num_channels % self.num_groups:
            raise UserError(
                f"num_channels {self.num_channels} is not a multiple of num_groups {self.num_groups}; "
                "change num_groups"
            )
        return named_param(self, name, init, ("groups", None), (self.num_groups, self.filter_length))

    @nn.nowrap
    def _filter(self, signals, weights, ids, state, mesh_axis):
        h = weights["h"]
        if "decay" in weights:
            h = h * jax.lax.stop_gradient(weights["decay"])
        y, new = fir_conv(
            *signals,
            h,
            skip=weights.get("skip"),
            segment_ids=ids,
            initial_state=state,
            implementation=self.implementation,
            mesh_axis=mesh_axis,
        )
        return y, None if state is None else ConvState(new.inputs.astype(state.inputs.dtype), new.segment_ids)

    @nn.nowrap
    def _empty(self, batch_size: int, dtype) -> ConvState:
        seen = (batch_size, self.filter_length - 1)
        inputs = jnp.zeros((batch_size, self.num_channels, seen[1]), dtype)
        return ConvState(inputs, jnp.zeros(seen, jnp.int32))

    @nn.nowrap
    def _state_axes(self) -> ConvState:
        return FIR_STATE

    @nn.nowrap
    def _filter_sends(self) -> str:
        return f"of {self.filter_length - 1} gated tokens"

    @nn.nowrap
    def _filter_macs(self, seq_len: int) -> float:
        reached = min(self.filter_length, seq_len)
        return reached - reached * (reached - 1) / (2 * seq_len)


class HyenaSE(_Explicit):
    """Hyena-SE, short explicit filters: 7 taps per group, no skip."""

    @nn.nowrap
    def _weights(self) -> dict[str, Array]:
        return {"h": self._taps("h", bounded(self.featurizer_length))}


class HyenaMR(_Explicit):
    """Hyena-MR, medium regularised filters: 128 taps per group, times a fixed decay.

    The published decay depends on the sequence length at which a model was first trained. It is therefore stored with
    the weights and never recomputed, not even after context extension; its gradient is 0. There are no taps beyond
    `filter_length`, so nothing grows with the context.

    Attributes:
      init_length: the training length, in tokens, that sets the initial decay and the initial scale of h.
    """

    filter_length: int = 128
    init_length: int = 8192

    @nn.nowrap
    def _weights(self) -> dict[str, Array]:
        scale = nn.initializers.normal(1e-5 / math.sqrt(self.init_length))
        return {
            "h": self._taps("h", scale),
            "decay": self._taps("decay", lambda key, shape: weak_decay(shape[0], shape[1], self.init_length)),
            "skip": skip_param(self, self.filter_length),
        }


class HyenaLI(_Hyena):
    """Hyena-LI, long implicit filters: a sum of decaying exponentials per channel, evaluated at any sequence length.

    Attributes:
      num_modes: P, exponentials per channel.
      init_length: the training length, in tokens, that sets the initial scale of the skip.
    """

    num_modes: int = 16
    init_length: int = 8192

    @nn.nowrap
    def _weights(self) -> dict[str, Array]:
        names, shape = ("channels", None), (self.num_channels, self.num_modes)

        def log_uniform(key, shape, dtype=jnp.float32):
            return jnp.log(jax.random.uniform(key, shape, dtype, 0.01, 0.1))

        return {
            "p": named_param(self, "p", nn.initializers.constant(-1.0), names, shape),
            "gamma": named_param(self, "gamma", log_uniform, names, shape),
            "R": named_param(
                self, "R", nn.initializers.normal(0.1 / math.sqrt(self.num_modes)), names, shape
            ),
            "skip": skip_param(self, self.init_length),
        }

    @nn.nowrap
    def _filter(self, signals, weights, ids, state, mesh_axis):
        log_pole = -jnp.exp(weights["p"].astype(jnp.float32) + weights["gamma"].astype(jnp.float32))
        R, skip = weights["R"].astype(jnp.float32), weights["skip"].astype(jnp.float32)
        x1, x2, v = signals
        T = v.shape[2]
        g = x2.astype(jnp.float32) * v.astype(jnp.float32)
        if mesh_axis is not None:
            around = {"segment_ids": ids, "initial_state": state, "mesh_axis": mesh_axis}
            state = modal.state_before(g, log_pole, **around)
        if state is None or T > 1:
            h = modal.taps(log_pole, R, T)
            y = long_conv(x1, x2, v, h, skip=skip, segment_ids=ids, implementation=self.implementation)
            if state is None:
                return y, None
        if T > 1:  # the FFT covers the new tokens only; add the response to the tokens before them
            earlier = modal.response(state, log_pole, R, length=T, segment_ids=ids)
            y = y + (x1 * earlier).astype(y.dtype)
            return y, modal.state(g, log_pole, segment_ids=ids, initial_state=state)
        y, state = modal.step(g[:, :, 0], log_pole, R, state, segment_ids=None if ids is None else ids[:, 0])
        y = x1 * (y[:, :, None] + skip[:, None] * g)
        return y.astype(v.dtype), state

    @nn.nowrap
    def _empty(self, batch_size: int, dtype) -> modal.ModalState:
        modes = jnp.zeros((batch_size, self.num_channels, self.num_modes), jnp.float32)
        return modal.ModalState(modes, jnp.zeros(batch_size, jnp.int32))

    @nn.nowrap
    def _state_axes(self) -> modal.ModalState:
        return modal.ModalState._make((CHANNELS_FIRST, Axes("rows")))

    @nn.nowrap
    def _filter_sends(self) -> str:
        return "the states of its modes"

    @nn.nowrap
    def _filter_macs(self, seq_len: int) -> float:
        """Two real FFTs of n = 2 T points, 2.5 n log2 n FLOPs each, and n / 2 complex products; an FMA is 2 FLOPs."""
        return 5 * math.log2(2 * seq_len) + 3


def bounded(num_inputs: int) -> nn.initializers.Initializer:
    """Uniform within +-1 / sqrt(fan-in), torch's default for convolutions."""
    bound = num_inputs**-0.5
    return lambda key, shape, dtype=jnp.float32: jax.random.uniform(key, shape, dtype, -bound, bound)


def skip_param(module: _Hyena, length: int) -> Array:
    return named_param(module, "skip", bounded(length), ("channels",), (module.num_channels,))


def weak_decay(num_groups: int, num_taps: int, length: int) -> Float[Array, "G K"]:
    """exp(-r k / (length - 1)) with one rate r per group, log-spaced from 0.01 to 100."""
    rates = np.logspace(-2, 2, num_groups)
    return jnp.asarray(np.exp(-np.outer(rates, np.arange(num_taps)) / (length - 1)), jnp.float32)
