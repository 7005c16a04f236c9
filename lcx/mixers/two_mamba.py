"""2Mamba: attention with a decay and squared scores, and the paper's ablation from linear attention towards it.

    q, k, v = conv(x W_qkv),  a_t = log decay,  w_ij = f(q_i . k_j / sqrt H) exp(a_j+1 + ... + a_i)
    y_i = sum_j w_ij v_j  (/ sum_j w_ij)  + D v_i,   times silu(x W_z + b),   then W_o

    2Mamba      f(s) = s^2, divided by the sum, a = -softplus(x W_a), convolution of width 2
    2Mamba-E    f(s) = e^s: softmax with a forget gate; its cache of keys and values grows with the sequence
    Mamba-2S    f(s) = s, RMSNorm instead of the division, values times softplus(x W_dt)

(Mongaras & Larson 2026, arXiv 2602.17363.) `published` builds each of the paper's 28 variants by name. There is no
rotary embedding: order comes from the decay and the convolution. If the weights of a token sum to 0, the output here is
0; the published torch code returns the sum of the values instead, and its kernels differ from both.

Letters: B batch, T time, D embed, N heads, H head dim, K taps (k = 0 multiplies the current token).

q, k and v share one projection [D, 3, N, H], so that devices on the `tensor` axis hold whole heads of all three. The
cache is the last K - 1 inputs of the convolution and the float32 state of the operator (for e^s the keys, values and
decays).
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as Axes
from jaxtyping import Array, Float, Int

from lcx import sharding
from lcx.errors import UserError, check_positive, check_sizes
from lcx.layers import Linear, RMSNorm, named_param
from lcx.mixers import kv_cache
from lcx.mixers.attention import Attention
from lcx.mixers.hyena import bounded
from lcx.mixers.mamba2 import Mamba2
from lcx.ops import attention_shards, second_order_choice
from lcx.ops import linear_attention as linear_op
from lcx.ops import second_order_attention as second_order_op
from lcx.ops.attention import attention
from lcx.ops.shards import after_row, halo_in_words
from lcx.ops.short_conv import ConvState, short_conv
from lcx.ops.tiling import scaled

Cache = dict[str, Any]
CHOICES: dict[str, tuple[str, ...]] = {
    "score": ("linear", "square", "exp"),
    "norm": ("scores", "output"),
    "qk_activation": ("none", "relu", "silu"),
    "decay": ("none", "softplus", "discretize"),
}
ACTIVATIONS = {"none": lambda x: x, "relu": nn.relu, "silu": nn.silu}
HEADS, HEAD_STATE = Axes("rows", "time", "heads"), Axes("rows", "heads")


class TwoMamba(nn.Module):
    """A mixer of the 2Mamba family; the defaults give 2Mamba.

    Attributes:
      score: the function f: "linear" (s), "square" (s^2) or "exp" (e^s, which needs norm "scores").
      norm: "scores" divides by the sum of the weights; "output" applies an RMSNorm over all heads before W_o.
      qk_activation: activation of q and k after the convolution: "none", "relu" or "silu".
      conv_width: taps of the convolution over q, k and v; 1: no convolution.
      decay: log decay a: "none", "softplus": -softplus(x W_a), "discretize": -exp(A_log) softplus(x W_dt).
      value_step: multiply the values by softplus(x W_dt).
      residual: add D v to the output, v after the convolution.
      gate: multiply y by silu(x W_z + b).
      form: how score "square" is computed: "tiles", "states", "recurrent", or None to let ops/second_order_choice.py
        decide.
      init_gain: gain of the initialisation of all projections; 3^-0.5 gives the variance of torch's default, as in the
        published code.
      implementation: of the operator, see ops; None picks the fastest valid one.
    """

    num_heads: int
    head_dim: int
    score: str = "square"
    norm: str = "scores"
    qk_activation: str = "none"
    conv_width: int = 2
    decay: str = "softplus"
    value_step: bool = False
    residual: bool = False
    gate: bool = False
    form: str | None = None
    init_gain: float = 1.0
    implementation: str | None = None

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B T D"],
        *,
        positions: Int[Array, "B T"] | None = None,
        segment_ids: Int[Array, "B T"] | None = None,
        cache: Cache | None = None,
        deferred: bool = False,
    ) -> tuple[Float[Array, "B T D"], Cache | None]:
        self._check()
        (B, T, D), N, H = x.shape, self.num_heads, self.head_dim
        if cache is not None and segment_ids is None:
            segment_ids = jnp.ones((B, T), jnp.int32)
        names = ("embed", None, "heads", "head_dim")
        arrays = {
            "qkv": Linear((D,), (3, N, H), names, gain=self.init_gain, name="qkv_proj")(x),
            "segment_ids": None if segment_ids is None else jnp.broadcast_to(segment_ids, (B, T)),
            "cache": cache,
            **self._steps(x),
            **self._weights(),
        }
        state_axes, new_axes = (None, None) if cache is None else map(self._state_axes, (False, True))
        axes = {
            "qkv": Axes("rows", "time", None, "heads"),
            "segment_ids": Axes("rows", "time"),
            "cache": state_axes,
            **dict.fromkeys(("log_decay", "dt"), HEADS),
            **dict.fromkeys(("taps", "taps_bias"), Axes(None, "heads")),
            "D": Axes("heads"),
        }
        axes, out = {name: axes[name] for name in arrays}, (HEADS, new_axes)
        over: tuple[str, ...] = ("tensor",)
        if self.score == "exp" and cache is not None:  # keys, values and decays of whole rows are in the cache
            axes, out = sharding.whole_rows((axes, out))
            over = sharding.head_axes(N)
        y, new = sharding.island(self._mix, arrays, axes, out, heads=over)
        y = sharding.by_token(y) if "context" in over else y
        if cache is not None:
            cache = new if deferred else self.append_cache(cache, new)
        if self.gate:
            shape = ("embed", "heads", "head_dim")
            z = Linear((D,), (N, H), shape, bias=True, gain=self.init_gain, name="gate_proj")(x)
            y = y * nn.silu(z)
        if self.norm == "output":
            eps = float(jnp.finfo(jnp.float32).eps)
            y = RMSNorm(N * H, eps, name="out_norm")(y.reshape(B, T, N * H)).reshape(B, T, N, H)
        out_names = ("heads", "head_dim", "embed")
        return Linear((N, H), (D,), out_names, gain=self.init_gain, name="o_proj")(y), cache

    def _check(self) -> None:
        check_sizes("TwoMamba", num_heads=self.num_heads, head_dim=self.head_dim, conv_width=self.conv_width)
        check_positive("TwoMamba", init_gain=self.init_gain)
        for field, choices in CHOICES.items():
            if getattr(self, field) not in choices:
                expected = ", ".join(repr(choice) for choice in choices)
                raise UserError(f"{field} {getattr(self, field)!r}: expected one of {expected}")
        if self.form not in (None, *second_order_op.FORMS):
            expected = ", ".join(map(repr, second_order_op.FORMS))
            raise UserError(f"TwoMamba.form {self.form!r}: expected {expected} or None")
        if self.form is not None and self.score != "square":
            raise UserError(
                f"form {self.form!r} with score {self.score!r}: only 'square' has forms; set form=None"
            )
        if self.score == "exp" and self.norm == "output":
            raise UserError("score 'exp' with norm 'output': exponentials need their sum; set norm='scores'")

    def _steps(self, x: Array) -> dict[str, Array]:
        """`dt` and `log_decay` [B, T, N], float32, as far as the settings use them, from the input x."""
        shape, names = ((x.shape[-1],), (self.num_heads,)), ("embed", "heads")

        def softplus_of(name: str) -> Array:
            projected = Linear(*shape, names, gain=self.init_gain, name=name)(x)
            return nn.softplus(projected.astype(jnp.float32))

        out: dict[str, Array] = {}
        if self.value_step or self.decay == "discretize":
            dt = softplus_of("dt_proj")
        if self.value_step:
            out["dt"] = dt
        if self.decay == "softplus":
            out["log_decay"] = -softplus_of("forget_proj")
        if self.decay == "discretize":
            a_log = named_param(self, "A_log", log_uniform(1, 16), ("heads",), (self.num_heads,))
            out["log_decay"] = -jnp.exp(a_log.astype(jnp.float32)) * dt
        return out

    def _weights(self) -> dict[str, Array]:
        out: dict[str, Array] = {}
        heads, names = (self.num_heads, self.head_dim), ("heads", "head_dim")
        if self.conv_width > 1:
            init = bounded(self.conv_width)
            out["taps"] = named_param(
                self, "conv_kernel", init, (None, *names, None), (3, *heads, self.conv_width)
            )
            out["taps_bias"] = named_param(self, "conv_bias", init, (None, *names), (3, *heads))
        if self.residual:
            out["D"] = named_param(self, "D", nn.initializers.ones, names, heads)
        return out

    @nn.nowrap
    def _mix(self, arrays: dict[str, Any], mesh_axis: str | None = None) -> tuple[Array, Cache | None]:
        """Everything between the projections, on the heads of one device; returns y [B, T, N, H] and the new cache."""
        qkv, ids, cache = arrays["qkv"], arrays["segment_ids"], arrays["cache"]
        conv = None
        if self.conv_width > 1:
            before = None if cache is None else cache["conv"]
            qkv, conv = self._convolve(qkv, arrays, ids, before, mesh_axis)
        q, k, v = qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2]
        residual = scaled(v, arrays["D"]) if self.residual else None
        if self.value_step:
            v = (v * arrays["dt"][..., None]).astype(v.dtype)
        q, k = (ACTIVATIONS[self.qk_activation](heads) for heads in (q, k))
        state = None if cache is None else cache["state"]
        y, state = self._attend(q, k, v, arrays.get("log_decay"), ids, state, mesh_axis)
        y = y if residual is None else y + residual
        return y, None if cache is None else after_row({"conv": conv, "state": state}, ids, mesh_axis)

    @nn.nowrap
    def _convolve(
        self, qkv: Array, arrays, ids, before: ConvState | None, mesh_axis: str | None
    ) -> tuple[Array, ConvState]:
        B, T, *channels = qkv.shape
        if before is not None:
            before = before._replace(inputs=before.inputs.reshape(B, self.conv_width - 1, -1))
        y, seen = short_conv(
            qkv.reshape(B, T, -1),
            arrays["taps"].reshape(-1, self.conv_width).astype(qkv.dtype),
            bias=arrays["taps_bias"].reshape(-1),
            segment_ids=ids,
            initial_state=before,
            time_axis=1,
            mesh_axis=mesh_axis,
        )
        dtype = seen.inputs.dtype if before is None else before.inputs.dtype
        inputs = seen.inputs.reshape(B, self.conv_width - 1, *channels).astype(dtype)
        return y.reshape(qkv.shape), seen._replace(inputs=inputs)

    @nn.nowrap
    def _attend(self, q, k, v, log_decay, ids, state, mesh_axis):
        options = {"log_decay": log_decay, "implementation": self.implementation}
        if self.score == "exp":
            return self._softmax(q, k, v, ids, state, options, mesh_axis)
        options |= {"normalize": self.norm == "scores", "segment_ids": ids, "initial_state": state}
        options["mesh_axis"] = mesh_axis
        if self.score == "linear":
            return linear_op.linear_attention(q * self.head_dim**-0.5, k, v, **options)
        return second_order_op.second_order_attention(q, k, v, form=self.form, **options)

    @nn.nowrap
    def _softmax(self, q, k, v, ids, state, options, mesh_axis):
        """Score "exp": (outputs [B, T, N, H], the entries to append to the cache; None without one)."""
        if state is None:
            options |= {"q_segment_ids": ids, "kv_segment_ids": ids, "mesh_axis": mesh_axis}
            return attention(q, k, v, **options), None
        new = kv_cache.entries(k, v, ids, options["log_decay"])
        if q.shape[1] <= kv_cache.FEW and self.implementation in (None, "xla"):
            return kv_cache.attend(state, q, new), new
        *heads, others = kv_cache.arguments(state, q, new)
        return attention(*heads, **options | others), new

    @nn.nowrap
    def init_cache(self, batch_size: int, length: int, dtype: jnp.dtype) -> Cache:
        """The empty state. Only score "exp" uses `length`; the other scores have a state of fixed size."""
        B, N, H = batch_size, self.num_heads, self.head_dim
        conv = None
        if self.conv_width > 1:
            seen = (B, self.conv_width - 1)
            conv = ConvState(jnp.zeros((*seen, 3, N, H), dtype), jnp.zeros(seen, jnp.int32))
        if self.score == "linear":
            return {"conv": conv, "state": linear_op.empty_state(B, N, H, H, normalize=self.norm == "scores")}
        if self.score == "square":
            return {"conv": conv, "state": second_order_op.empty_state(B, N, H)}
        state = kv_cache.empty(B, length, N, H, dtype)
        if self.decay != "none":
            state["log_decay"] = jnp.zeros((B, N, length), jnp.float32)
        return {"conv": conv, "state": state}

    @nn.nowrap
    def append_cache(self, cache: Cache, new: Cache) -> Cache:
        """The cache with `new` appended for score "exp"; other scores replace their state."""
        state = kv_cache.append(cache["state"], new["state"]) if self.score == "exp" else new["state"]
        return {"conv": new["conv"], "state": state}

    @nn.nowrap
    def _state_axes(self, added: bool) -> dict[str, Any]:
        """The sharding of the cache's leaves, or (`added`) of the entries appended to it."""
        rows, conv = Axes("rows"), None
        if self.conv_width > 1:
            conv = ConvState._make((Axes("rows", None, None, "heads"), Axes("rows")))
        if self.score == "linear":
            k_sum = HEAD_STATE if self.norm == "scores" else None
            return {"conv": conv, "state": linear_op.LinearState._make((HEAD_STATE, k_sum, rows, None))}
        if self.score == "square":
            return {
                "conv": conv,
                "state": second_order_op.SecondOrderState._make((HEAD_STATE, HEAD_STATE, rows)),
            }
        heads, index = (HEADS, {}) if added else (Axes("rows", "heads"), {"index": Axes()})
        names = ("k", "v", *(() if self.decay == "none" else ("log_decay",)))
        return {"conv": conv, "state": dict.fromkeys(names, heads) | {"segment_ids": rows} | index}

    @nn.nowrap
    def context_method(self, *, devices: int, tensor: int, seq_len: int) -> str:
        core = "states"
        if self.score == "exp":
            sizes = {"devices": devices, "tensor": tensor, "seq_len": seq_len, "kv_width": 2 * self.head_dim}
            heads = {"heads": self.num_heads, "kv_heads": self.num_heads}
            core = attention_shards.in_words(None, window=None, implementation=self.implementation, **sizes, **heads)
        return f"{core} and {halo_in_words(self.conv_width - 1)}" if self.conv_width > 1 else core

    @nn.nowrap
    def form_of_rows(self, *, seq_len: int, follows: bool) -> str | None:
        if self.score != "square":
            return None
        return second_order_choice.in_words(self.form, seq_len, self.head_dim, follows=follows)

    @nn.nowrap
    def macs_per_token(self, seq_len: int) -> float:
        """Multiply-adds per token between the projections, averaged over a sequence; of the cheaper form if not set."""
        H = self.head_dim
        pairs = (2 * H + 1) * (seq_len + 1) / 2
        if self.score == "linear":
            core = 2.0 * H * H
        elif self.score == "square":
            states = 2.0 * second_order_op.expanded_size(H) * (H + 1)
            core = {"tiles": pairs, "states": states, "recurrent": states}.get(self.form or "", min(pairs, states))
        else:
            core = pairs
        taps = 3 * H * self.conv_width if self.conv_width > 1 else 0
        return self.num_heads * (core + taps)


def log_uniform(low: float, high: float) -> nn.initializers.Initializer:
    """An initializer: the logarithm of numbers drawn uniformly between low and high."""
    return lambda key, shape, dtype=jnp.float32: jnp.log(jax.random.uniform(key, shape, dtype, low, high))


_LINEAR = {"score": "linear", "norm": "output", "conv_width": 1, "decay": "none"}
_LINEAR_S = _LINEAR | {"conv_width": 2, "decay": "softplus", "value_step": True}
PUBLISHED: dict[str, dict[str, Any]] = {
    "linear": _LINEAR | {"norm": "scores", "qk_activation": "relu"},
    "linear__output_norm": _LINEAR,
    "linear__output_norm__ReLU": _LINEAR | {"qk_activation": "relu"},
    "linear__output_norm__in_conv_k_2": _LINEAR | {"conv_width": 2},
    "linear__output_norm__in_conv_k_3": _LINEAR | {"conv_width": 3},
    "linear__output_norm__in_conv_k_4": _LINEAR | {"conv_width": 4},
    "linear__output_norm__in_conv_k_2__silu": _LINEAR | {"conv_width": 2, "qk_activation": "silu"},
    "linear__output_norm__in_conv_k_3__silu": _LINEAR | {"conv_width": 3, "qk_activation": "silu"},
    "linear__output_norm__in_conv_k_4__silu": _LINEAR | {"conv_width": 4, "qk_activation": "silu"},
    "linear__output_norm__D_res": _LINEAR | {"residual": True},
    "linear__output_norm__Z_out_gate": _LINEAR | {"gate": True},
    "linear__output_norm__dt_on_values": _LINEAR | {"value_step": True},
    "linear__output_norm__A_mask_type_discretize": _LINEAR | {"decay": "discretize"},
    "linear__output_norm__A_mask_type_neg_softplus": _LINEAR | {"decay": "softplus"},
    "linear__output_norm__A_mask_type_discretize__in_conv_k_2": _LINEAR
    | {"decay": "discretize", "conv_width": 2},
    "linear__output_norm__A_mask_type_neg_softplus__in_conv_k_2": _LINEAR
    | {"decay": "softplus", "conv_width": 2},
    "linear__output_norm__A_mask_type_neg_softplus__in_conv_k_2__dt_on_values": _LINEAR_S,  # Mamba-2S
    "linear__output_norm__A_mask_type_neg_softplus__in_conv_k_2__dt_on_values__silu": _LINEAR_S
    | {"qk_activation": "silu"},
    "linear__output_norm__A_mask_type_neg_softplus__in_conv_k_2__dt_on_values__D_res": _LINEAR_S
    | {"residual": True},
    "linear__output_norm__A_mask_type_neg_softplus__in_conv_k_2__dt_on_values__Z_out_gate": _LINEAR_S
    | {"gate": True},
    "linear__out_norm__A_mask_type_neg_softplus__in_conv_k_2": _LINEAR
    | {"decay": "softplus", "conv_width": 2},
    "squared__output_norm__A_mask_type_neg_softplus__in_conv_k_2__dt_on_values": {
        "norm": "output",
        "value_step": True,
    },
    "squared__sm_norm__A_mask_type_neg_softplus__in_conv_k_2__dt_on_values": {"value_step": True},
    "squared__sm_norm__A_mask_type_neg_softplus__in_conv_k_2": {},  # 2Mamba
    "exp__sm_norm__A_mask_type_neg_softplus__in_conv_k_2__dt_on_values": {"score": "exp", "value_step": True},
    "exp__sm_norm__A_mask_type_neg_softplus__in_conv_k_2": {"score": "exp"},  # 2Mamba-E
}


def published(
    attention_type: str, *, num_heads: int, head_dim: int, bf16_positions: bool = False
) -> nn.Module:
    """The mixer that the published code calls `attention_type`.

    With `bf16_positions`, "softmax" computes its positions in bfloat16, as the published code does while it trains in
    bfloat16 (`Attention.position_dtype`); the other mixers have no positions.

    "softmax" gives Attention, "mamba" gives Mamba2 with one head (as published), all other names give TwoMamba. For
    "softmax", rows of published q and k weights must be reordered: the published rotary embedding pairs adjacent
    dimensions, ours pairs dimension i with i + head_dim / 2.

    Raises:
      UserError: an unknown name.
    """
    if attention_type == "softmax":
        rounded = "bfloat16" if bf16_positions else None
        return Attention(num_heads, num_heads, head_dim, position_dtype=rounded, parent=None)
    if attention_type == "mamba":
        width = (num_heads - 1) * head_dim
        return Mamba2(
            1, head_dim, conv_size=2, conv_bias=False, skip_per_channel=True, mlp_size=width, parent=None
        )
    if attention_type not in PUBLISHED:
        names = ", ".join(repr(name) for name in ("softmax", "mamba", *PUBLISHED))
        raise UserError(f"attention_type {attention_type!r}: expected one of {names}")
    return TwoMamba(num_heads, head_dim, **PUBLISHED[attention_type], init_gain=3**-0.5, parent=None)
