"""Depthwise causal convolution with a few taps: Hyena's featuriser, Mamba's convolution.

    y_t = sum_k w[:, k] x_{t-k} + bias,   k = 0 .. K-1

Letters: B batch, D channels, T time, K taps.

Taps are in convolution order: k = 0 multiplies the current token. (Checkpoints hold correlation order, the last tap for
the current token; converters flip them.) A tap counts only if both tokens are in the same document (`ops.segments`),
and y is 0 at padding. The history before and after the T tokens is a `ConvState`.

``reference``  the definition, with every window of K inputs materialised, in float32.
``triton``, ``tpu``  kernels_pallas.short_conv, one pass over memory.
``xla``        K shifted multiply-adds, which XLA fuses into one pass over x. The backward pass saves only x.

At 2 K FLOPs per element the convolution is memory bound on every machine (read x, write y), so no form uses matrix
products.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from lcx.errors import UserError
from lcx.ops import dispatch, segments, shards
from lcx.ops.tiling import biased

MAX_TAPS = 8
KERNELS = {"triton": "gpu", "tpu": "tpu"}  # implementations and their platforms
DECODED = 8  # up to this many tokens a kernel is not worth launching


class ConvState(NamedTuple):
    """The last K - 1 inputs of a convolution, along its time axis, and their segment ids; 0: no token there."""

    inputs: Float[Array, "B D K1"]  # [B, K - 1, D] where time_axis is 1
    segment_ids: Int[Array, "B K1"]


def short_conv(
    x: Float[Array, "B _ _"],  # [B, D, T] or [B, T, D]: a union of the two would bind D to T
    w: Float[Array, "D K"],
    *,
    bias: Float[Array, " D"] | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
    initial_state: ConvState | None = None,
    time_axis: int = -1,
    implementation: str | None = None,
    mesh_axis: str | None = None,
) -> tuple[Array, ConvState]:
    """(y with the shape and dtype of x, the state after the last token).

    Args:
      segment_ids: documents of a packed row, 0 for padding; None: one document, with id 1.
      time_axis: -1 for x [B, D, T], 1 for x [B, T, D].
      mesh_axis: in a shard_map over this axis, x is this device's part of the rows (shards.py), and initial_state is
        the state before the rows. A device sends its last K - 1 inputs, B D (K - 1) numbers, and their ids.

    Raises:
      UserError: inconsistent shapes, or an implementation that cannot run here.
    """
    axis = time_axis % 3
    if axis not in (1, 2) or not 1 <= w.shape[1] <= MAX_TAPS or w.shape[0] != x.shape[3 - axis]:
        raise UserError(
            f"short_conv of x {x.shape} with w {w.shape} and time_axis {time_axis}: expected x [B, D, T] and time_axis "
            f"-1, or [B, T, D] and 1, and w [D, 1 .. {MAX_TAPS}]; fir_conv takes more taps"
        )
    if mesh_axis is not None:
        initial_state = state_before(x, segment_ids, initial_state, w.shape[1], mesh_axis, axis=axis)
    name = dispatch.choose("short_conv", implementation, _forms(x, axis))
    whole, ids = extended(x, segment_ids, initial_state, axis=axis)
    if name in KERNELS:
        y = _kernel(x, w, bias, segment_ids, initial_state, KERNELS[name])
    else:
        y = reference(whole, w, ids, axis=axis) if name == "reference" else _xla(whole, w, ids, axis)
        y = _from(y, whole.shape[axis] - x.shape[axis], axis)
        if bias is not None:
            y = biased(y, _over_time(bias, axis))
            y = y if segment_ids is None else jnp.where(_over_channels(segment_ids != 0, axis), y, 0)
    return y, final_state(x, segment_ids, initial_state, w.shape[1], axis=axis)


def _forms(x: Array, axis: int) -> dict[str, str | None]:
    kernels = {name: dispatch.kernels(platform) for name, platform in KERNELS.items()}
    if axis == 1:
        kernels = {
            name: found or "the kernel takes x [B, D, T], time_axis -1" for name, found in kernels.items()
        }
    plain: dict[str, str | None] = {"xla": None, "reference": None}
    return plain | kernels if x.shape[axis] <= DECODED else kernels | plain


def _kernel(x, w, bias, segment_ids, state: ConvState | None, platform: str) -> Array:
    from kernels_pallas import short_conv as kernels

    before = kernel_history(segment_ids, state)
    return kernels.short_conv(x, w, bias=bias, **before, platform=platform)[0]


def kernel_history(segment_ids: Array | None, state: ConvState | None) -> dict[str, Any]:
    """Documents and state as keyword arguments of the kernels: document indices (`runs`), -1 at padding, and inputs."""
    if segment_ids is None:  # tokens without ids are document 1; `own_inputs` zeroes all others
        inputs = None if state is None else own_inputs(state)
        return {"runs": None, "initial_inputs": inputs, "initial_runs": None}
    seen = 0 if state is None else state.segment_ids.shape[1]
    ids = segment_ids if state is None else jnp.concatenate([state.segment_ids, segment_ids], axis=1)
    runs = jnp.where(ids != 0, segments.runs(ids), -1)
    if state is None:
        return {"runs": runs, "initial_inputs": None, "initial_runs": None}
    return {"runs": runs[:, seen:], "initial_inputs": state.inputs, "initial_runs": runs[:, :seen]}


def reference(x: Array, w: Array, ids: Array | None, *, axis: int = 2) -> Array:
    """The definition, in float32, with every window of K inputs materialised. w [D, K]; ids None: one document."""
    x = x if axis == 2 else jnp.swapaxes(x, 1, 2)
    T, K = x.shape[2], w.shape[1]
    source = jnp.arange(T)[:, None] - jnp.arange(K)  # [T, K]: the token under each tap
    counts = source >= 0
    if ids is not None:
        runs = segments.runs(ids)
        counts = counts & (runs[:, source] == runs[:, :, None]) & ((ids[:, source] * ids[:, :, None]) != 0)
        counts = counts[:, None]
    windows = jnp.where(counts, x[:, :, source].astype(jnp.float32), 0)
    y = jnp.einsum("bdtk,dk->bdt", windows, w.astype(jnp.float32), precision="highest").astype(x.dtype)
    return y if axis == 2 else jnp.swapaxes(y, 1, 2)


def _xla(x: Array, w: Array, ids: Array | None, axis: int) -> Array:
    if ids is None:
        return shifted(x, w, None, axis)
    return _shown(shifted(_shown(x, ids, axis), w, segments.runs(ids), axis), ids, axis)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def shifted(x: Array, w: Array, runs: Array | None, axis: int) -> Array:
    """The K taps as shifted multiply-adds with float32 sums, for any K; a tap counts if both tokens are in one run."""
    taps = enumerate(_parts(x, runs, w.shape[1], axis))
    return jnp.asarray(sum(_over_time(w[:, k], axis).astype(jnp.float32) * part for k, part in taps), x.dtype)


def _shifted_forward(x, w, runs, axis):
    return shifted(x, w, runs, axis), (x, w, runs)


def _shifted_backward(axis, residuals, dy):
    x, w, runs = residuals
    taps = enumerate(_parts(dy, runs, w.shape[1], axis, ahead=True))
    dx = sum(_over_time(w[:, k], axis).astype(jnp.float32) * part for k, part in taps)
    # Dot products, because a plain sum along the minor axis takes three times as long on a CPU.
    letters, dy = "bdt,bdt->d" if axis == 2 else "btd,btd->d", dy.astype(jnp.float32)
    parts = _parts(x, runs, w.shape[1], axis)
    dw = [jnp.einsum(letters, dy, part, precision="highest") for part in parts]
    return jnp.asarray(dx, x.dtype), jnp.stack(dw, axis=1).astype(w.dtype), None


shifted.defvjp(_shifted_forward, _shifted_backward)


def _parts(x: Array, runs: Array | None, K: int, axis: int, ahead: bool = False):
    """x[t - k] (x[t + k] if `ahead`) for k = 0 .. K-1, float32, 0 if that token is in another run than t."""
    T, pad = x.shape[axis], [(0, 0)] * 3
    pad[axis] = (0, K - 1) if ahead else (K - 1, 0)
    # The barrier keeps XLA from fusing the pad into its K readers, which then test bounds at every element: 1.5x the
    # time on a CPU.
    padded = jax.lax.optimization_barrier(jnp.pad(x, pad))
    padded_runs = None if runs is None else jnp.pad(runs, (pad[0], pad[axis]), constant_values=-1)
    for k in range(K):
        start = k if ahead else K - 1 - k
        part = jax.lax.slice_in_dim(padded, start, start + T, axis=axis).astype(jnp.float32)
        if runs is not None and padded_runs is not None:
            same = jnp.equal(jax.lax.slice_in_dim(padded_runs, start, start + T, axis=1), runs)
            part = jnp.where(_over_channels(same, axis), part, 0)
        yield part


def _over_time(per_channel: Array, axis: int) -> Array:
    return per_channel[:, None] if axis == 2 else per_channel


def _over_channels(per_token: Array, axis: int) -> Array:
    return per_token[:, None] if axis == 2 else per_token[:, :, None]


def _shown(x: Array, ids: Array | None, axis: int) -> Array:
    """x with 0 at padding."""
    return x if ids is None else jnp.where(_over_channels(ids != 0, axis), x, 0)


def _from(x: Array, start: int, axis: int) -> Array:
    return jax.lax.slice_in_dim(x, start, x.shape[axis], axis=axis)


def extended(x, segment_ids, state: ConvState | None, *, axis: int = 2) -> tuple[Array, Array | None]:
    """The state's inputs followed by x, along the time axis, and the ids of all; ids None: one document."""
    if state is None:
        return x, segment_ids
    inputs = own_inputs(state, axis=axis) if segment_ids is None else state.inputs
    whole = jnp.concatenate([inputs.astype(x.dtype), x], axis=axis)
    if segment_ids is None:
        return whole, None
    return whole, jnp.concatenate([state.segment_ids.astype(segment_ids.dtype), segment_ids], axis=1)


def state_before(
    x: Array, segment_ids: Array | None, state: ConvState | None, K: int, mesh_axis: str, *, axis: int = 2
) -> ConvState:
    """The K - 1 inputs before this device's part x of the rows."""
    ids = jnp.ones((x.shape[0], x.shape[axis]), jnp.int32) if segment_ids is None else segment_ids
    inputs, before = (None, None) if state is None else state
    return ConvState(
        shards.halo(x, K - 1, mesh_axis, axis=axis, before=inputs),
        shards.halo(ids, K - 1, mesh_axis, before=before),
    )


def own_inputs(state: ConvState, *, axis: int = 2) -> Array:
    """The state's inputs that belong to document 1, 0 elsewhere: the history that tokens without ids see."""
    return jnp.where(_over_channels(state.segment_ids == 1, axis), state.inputs, 0)


def final_state(x, segment_ids, state: ConvState | None, K: int, *, axis: int = 2) -> ConvState:
    """The last K - 1 inputs up to the last token that is not padding, from x, the previous state, or zeros."""
    T = x.shape[axis]
    if segment_ids is None and T >= K - 1:
        return ConvState(_from(x, T - (K - 1), axis), jnp.ones((x.shape[0], K - 1), jnp.int32))
    ids = jnp.ones((x.shape[0], T), jnp.int32) if segment_ids is None else segment_ids
    if state is None:
        shape = (x.shape[0], K - 1, x.shape[2]) if axis == 1 else (*x.shape[:2], K - 1)
        state = ConvState(jnp.zeros(shape, x.dtype), jnp.zeros((x.shape[0], K - 1), ids.dtype))
    x = jnp.concatenate([state.inputs.astype(x.dtype), x], axis=axis)
    places = segments.end(ids)[:, None] + jnp.arange(K - 1)
    ids = jnp.concatenate([state.segment_ids.astype(ids.dtype), ids], axis=1)
    inputs = jnp.take_along_axis(x, _over_channels(places, axis), axis=axis)
    return ConvState(inputs, jnp.take_along_axis(ids, places, axis=1))
