"""Gated causal convolution with up to 256 taps, shared by groups of channels: Hyena-SE and Hyena-MR.

    g = x2 * v,   y_t = x1_t * ( sum_k h[group, k] g_{t-k} + skip g_t ),   k = 0 .. K-1

Letters: B batch, D channels, G filters (channel d uses filter d // (D/G)), T time, K taps, C block of tokens.
Taps are in convolution order: k = 0 multiplies the current token. Channels come before time: a block of tokens of one
channel is contiguous, and the blocks of all channels of a group are the rows of one matrix.

``reference``  the definition, with every window of K inputs materialised, in float32.
``triton``, ``mosaic``, ``tpu``  kernels_pallas.fir_conv, one pass over memory; packed rows: several (`packed_conv`).
``xla``        K < 16: shifted multiply-adds. Else block Toeplitz products (Ku et al. 2025, "Systems and Algorithms for
               Convolutional Multi-Hybrid Language Models at Scale", section 3.2): a block of outputs needs its own
               inputs and those of the ceil((K - 1) / C) blocks before it, Y_n = X_n M0 + X_{n-1} M1 + ..., where
               Mi[s, t] = h[i C + t - s]. With C = 64 about 2 K + 128 FLOPs per element instead of 2 K, but all in
               matrix products.

Documents. At most one document reaches from one block into a later one, so the product with Mi is exact once the
earlier block and the result are masked to that document. Inside a block the same holds recursively for its two halves,
down to 16 tokens, where shifted multiply-adds take over. Together these products cost less than the product with M0,
whatever the number of documents.

The backward pass saves only the inputs and recomputes the rest. On a CPU the groups of channels are processed one after
the other, all rows together, so that the intermediates between the two gates stay in cache.
"""

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from lcx.errors import UserError
from lcx.ops import MIXER_RESIDUALS, dispatch, segments
from lcx.ops import short_conv as short
from lcx.ops.packed_conv import by_document
from lcx.ops.short_conv import ConvState
from lcx.ops.tiling import factor, put

MAX_TAPS = 256
# Filters with fewer taps than this use shifted multiply-adds, as do blocks of this many tokens within packed rows.
SHIFTED = 16
KERNELS = {"triton": "gpu", "mosaic": "mosaic", "tpu": "tpu"}  # implementations and their platforms
BLOCK = 64  # C; for 128 taps 384 FLOPs per element, against 512 with C = 128 and less efficient products with C = 32


def fir_conv(
    x1: Float[Array, "B D T"] | None,
    x2: Float[Array, "B D T"] | None,
    v: Float[Array, "B D T"],
    h: Float[Array, "G K"],
    *,
    skip: Float[Array, " D"] | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
    initial_state: ConvState | None = None,
    implementation: str | None = None,
    mesh_axis: str | None = None,
) -> tuple[Float[Array, "B D T"], ConvState]:
    """(y [B, D, T] in v's dtype, the state after it: the last K - 1 inputs g). A gate that is None is 1.

    Args:
      segment_ids: documents of a packed row, 0 for padding; None: one document, with id 1.
      mesh_axis: in a shard_map over this axis, the signals are this device's part of the rows (shards.py), and
        initial_state is the state before the rows. A device sends its last K - 1 gated inputs, B D (K - 1) numbers,
        and their ids; if a part is shorter, in several steps.

    Raises:
      UserError: inconsistent shapes, or an implementation that cannot run here.
    """
    (G, K), D = h.shape, v.shape[1]
    if D % G or not 2 <= K <= MAX_TAPS:
        raise UserError(
            f"fir_conv of {D} channels with filters {h.shape}: expected [G, K] with G a divisor of {D} and K from 2 "
            f"to {MAX_TAPS}; change the groups or the length of the filter (long_conv takes longer ones)"
        )
    gated = v if x2 is None else x2 * v
    if mesh_axis is not None:
        initial_state = short.state_before(gated, segment_ids, initial_state, K, mesh_axis)
    carried = segment_ids is not None and initial_state is not None
    name = dispatch.choose("fir_conv", implementation, _forms(v, h, carried))
    state = short.final_state(gated, segment_ids, initial_state, K)
    if name in KERNELS:
        y = _kernel(x1, x2, v, h, skip, segment_ids, initial_state, KERNELS[name])
        return checkpoint_name(y, MIXER_RESIDUALS), state
    whole, ids, before = (x1, x2, v), segment_ids, 0
    if initial_state is not None:  # its inputs are already gated, and their own outputs are not needed
        joined, ids = short.extended(gated, segment_ids, initial_state)
        before = K - 1
        whole = (None if x1 is None else jnp.pad(x1, ((0, 0), (0, 0), (before, 0))), None, joined)
    if name == "reference" or v.shape[2] <= short.DECODED:
        y = reference(*whole, h, skip, ids)
    else:
        y = _grouped(*whole, h, skip, ids)
    return y[:, :, before:], state


def _forms(v: Array, h: Array, carried: bool) -> dict[str, str | None]:
    """The obstacles of each implementation; carried: whether there is an initial state."""

    def obstacle(platform: str) -> str | None:
        from kernels_pallas import fir_conv as kernels

        return kernels.obstacle(v, h, platform=platform, segments=carried)

    plain: dict[str, str | None] = {"xla": None, "reference": None}
    forms = {name: dispatch.kernels(platform) or obstacle(platform) for name, platform in KERNELS.items()}
    return plain | forms if v.shape[2] <= short.DECODED else forms | plain


def _kernel(x1, x2, v, h, skip, segment_ids, state: ConvState | None, platform: str) -> Array:
    from kernels_pallas import fir_conv as kernels

    if segment_ids is not None and kernels.obstacle(v, h, platform=platform, segments=True):

        def one_document(signals, weights):
            return kernels.fir_conv(*signals, weights[0], skip=weights[1], platform=platform)[0]

        return by_document(one_document, (x1, x2, v), (h, skip), segment_ids, taps=h.shape[1])
    history = short.kernel_history(segment_ids, state)
    return kernels.fir_conv(x1, x2, v, h, skip=skip, **history, platform=platform)[0]


def reference(x1, x2, v, h, skip, ids) -> Array:
    """The definition, in float32. ids None: one document."""
    g = v.astype(jnp.float32) if x2 is None else x2.astype(jnp.float32) * v.astype(jnp.float32)
    y = short.reference(g, jnp.repeat(h, v.shape[1] // h.shape[0], axis=0), ids)
    if skip is not None:
        y = y + skip.astype(jnp.float32)[:, None] * (g if ids is None else jnp.where(ids[:, None] != 0, g, 0))
    return (y if x1 is None else y * x1.astype(jnp.float32)).astype(v.dtype)


@jax.custom_vjp
def _grouped(x1, x2, v, h, skip, ids) -> Array:
    return _grouped_forward(x1, x2, v, h, skip, ids)[0]


def _grouped_forward(x1, x2, v, h, skip, ids):
    y, _ = each_group(lambda *group: (_slab(*group), ()), (x1, x2, v), (h, skip), ids, h.shape[0])
    return checkpoint_name(y, MIXER_RESIDUALS), (x1, x2, v, h, skip, ids)


def _grouped_backward(residuals, dy):
    x1, x2, v, h, skip, ids = residuals

    def slab_gradient(signals, weights, ids):
        *inputs, dy = signals
        _, pull = jax.vjp(lambda i, w: _slab(i, w, ids), tuple(inputs), weights)
        return pull(dy)

    signals, weights = each_group(slab_gradient, (x1, x2, v, dy), (h, skip), ids, h.shape[0])
    return *signals, *jax.tree.map(lambda dw, w: dw.reshape(w.shape), weights, (h, skip)), None


_grouped.defvjp(_grouped_forward, _grouped_backward)


def each_group(fn, signals, weights, ids, G: int):
    """fn(signals [B, D/G, T], weights of a group, ids [B, T]) -> (signals, weights), for each of G groups of channels.

    Signals are [B, D, T], also the resulting ones. Weights are [G, ...] or [D]; the resulting ones are [G, ...]. On a
    CPU the groups take turns, and each writes its results in place.
    """
    B, _, T = jax.tree.leaves(signals)[0].shape
    signals = jax.tree.map(lambda x: x.reshape(B, G, -1, T), signals)
    weights = jax.tree.map(lambda w: w.reshape(G, -1) if w.ndim == 1 else w, weights)

    def one(group):
        take = jax.tree.map(lambda x: x[:, group], signals), jax.tree.map(lambda w: w[group], weights)
        return fn(*take, ids)

    if dispatch.platform() != "cpu":
        out = jax.vmap(fn, in_axes=(1, 0, None), out_axes=(1, 0))(signals, weights, ids)
    elif G == 1:
        own, of_weights = one(0)
        out = jax.tree.map(lambda x: x[:, None], own), jax.tree.map(lambda w: w[None], of_weights)
    else:
        one = jax.jit(one, inline=True)  # traced once for its shapes and for the loop
        own, of_weights = jax.eval_shape(one, 0)
        empty = (
            jax.tree.map(lambda x: jnp.zeros((B, G, *x.shape[1:]), x.dtype), own),
            jax.tree.map(lambda w: jnp.zeros((G, *w.shape), w.dtype), of_weights),
        )

        def turn(group, out):
            own, of_weights = one(group)
            return (
                jax.tree.map(lambda all_, x: put(all_, x[:, None], group, axis=1), out[0], own),
                jax.tree.map(lambda all_, w: put(all_, w[None], group), out[1], of_weights),
            )

        out = jax.lax.fori_loop(0, G, turn, empty)
    own, of_weights = out
    return jax.tree.map(lambda x: x.reshape(B, -1, T), own), of_weights


def _slab(signals, weights, ids):
    """One group of channels: signals [B, D/G, T], (h [K], skip [D/G]), ids [B, T] -> y [B, D/G, T]."""
    (x1, x2, v), (h, skip) = signals, weights
    dtype = jnp.float32 if dispatch.platform() == "cpu" else v.dtype
    g = v.astype(dtype) if x2 is None else x2.astype(dtype) * v.astype(dtype)
    runs = None
    if ids is not None:
        g, runs = jnp.where(ids[:, None] != 0, g, 0), segments.runs(ids)
    y = unless_packed(lambda g, runs: convolve(g, h, runs), g, runs)
    if skip is not None:
        y = y + jnp.einsum("d,bdt->bdt", skip.astype(jnp.float32), g)
    if x1 is not None:
        y = y * x1.astype(jnp.float32)
    return (y if ids is None else jnp.where(ids[:, None] != 0, y, 0)).astype(v.dtype)


def unless_packed(fn, g: Array, runs: Array | None) -> Array:
    """fn(g [B, R, T], None) if the tokens of each row belong to one run, otherwise fn(g[row], runs[row]) for each row.

    Both give the same, the former at a lower cost.
    """
    if runs is None:
        return fn(g, None)
    if dispatch.platform() != "cpu":  # everything is vectorised there, and a cond would execute both branches
        return jax.vmap(fn)(g, runs)
    # Padding on the left has index 0 and contributes nothing; the first document has index 1.
    return jax.lax.cond(jnp.max(runs) <= 1, lambda: fn(g, None), lambda: jax.vmap(fn)(g, runs))


def convolve(g: Array, h: Array, runs: Array | None) -> Array:
    """sum_k h[k] g[..., t - k] over tokens of the same run, float32; g [..., T], h [K], runs [T] non-decreasing.

    With runs, g is [R, T].
    """
    whole, (T, K) = g.shape, (g.shape[-1], h.shape[0])
    g = g.reshape(-1, T)
    if K < SHIFTED:
        return _shift(g, h, runs).reshape(whole)
    C = min(BLOCK, max(2 * SHIFTED, 1 << (K - 2).bit_length()))
    blocks = jnp.pad(g, ((0, 0), (0, -T % C))).reshape(g.shape[0], -1, C)
    count = min(1 - (1 - K) // C, blocks.shape[1])
    M = toeplitz(h[: count * C].astype(g.dtype), C, count)
    if runs is None:
        parts = jnp.split(_dot(blocks, M), count, axis=-1)
        y = sum(_later(part, n) for n, part in enumerate(parts))
    else:
        ids = jnp.pad(runs, (0, -T % C), mode="edge").reshape(-1, C)
        y = within(blocks, h, ids, M)
        for n in range(1, count):
            earlier = jnp.pad(ids[:-n], ((n, 0), (0, 0)), constant_values=-1)
            y = y + _across(_later(blocks, n), earlier, ids, M[:, n * C : (n + 1) * C])
    return y.reshape(g.shape[0], -1)[:, :T].reshape(whole)


def within(x: Array, h: Array, runs: Array, M: Array) -> Array:
    """The convolution inside each block, [R, n, C] float32: recursively across its halves, down to 16 tokens.

    x [R, n, C], h [K], runs [n, C] non-decreasing along the n C tokens, M = toeplitz(h, C/2 or more).
    """
    R, _, size = x.shape
    y = jnp.zeros(x.shape, jnp.float32)
    while size > SHIFTED:
        size //= 2
        halves, ids = x.reshape(R, -1, 2, size), runs.reshape(-1, 2, size)
        second = _across(halves[:, :, 0], ids[:, 0], ids[:, 1], M[:size, size : 2 * size])
        y = y + jnp.pad(second[:, :, None], ((0, 0), (0, 0), (1, 0), (0, 0))).reshape(y.shape)
    # Both the runs and the index of the 16-token block are non-decreasing, so their sum distinguishes all pairs.
    alone = runs.reshape(-1) + jnp.arange(runs.size) // SHIFTED
    return y + _shift(x.reshape(R, -1), h[:SHIFTED], alone).reshape(y.shape)


def _across(left: Array, left_runs: Array, right_runs: Array, M: Array) -> Array:
    """The contribution of the left block to the right one, [R, n, C]; only one run can cross the boundary."""
    crossing = right_runs[:, :1]
    reached = _dot(jnp.where(left_runs == crossing, left, 0), M)
    return jnp.where(right_runs == crossing, reached, 0)


def _shift(g: Array, h: Array, runs: Array | None) -> Array:
    taps = jnp.broadcast_to(h.astype(jnp.float32), (g.shape[0], h.shape[0]))
    return short.shifted(g.astype(jnp.float32)[None], taps, None if runs is None else runs[None], 2)[0]


def _later(x: Array, n: int) -> Array:
    """Shifts blocks by n: block i moves to i + n, and the first n blocks become zeros."""
    return jnp.pad(x[:, : x.shape[1] - n], ((0, 0), (n, 0), (0, 0)))


def _dot(rows: Array, M: Array) -> Array:
    precision = "highest" if rows.dtype == jnp.float32 else None
    return jnp.matmul(factor(rows), factor(M), precision=precision, preferred_element_type=jnp.float32)


def toeplitz(h: Array, C: int, count: int) -> Array:
    """[C, count C] with h[t - s] at (s, t), 0 outside of h.

    Flattening rows of length L and reshaping to rows of length L - 1 shifts each row by one more than the row before.
    This needs no gather, and its gradient is a sum along the diagonals by the reverse reshape.
    """
    L = max(count * C, h.shape[0]) + C
    rows = jnp.broadcast_to(jnp.pad(h, (0, L - h.shape[0])), (C, L))
    return rows.reshape(-1)[: C * (L - 1)].reshape(C, L - 1)[:, : count * C]
