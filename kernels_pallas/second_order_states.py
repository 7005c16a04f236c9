"""Second-order attention through a state of fixed size, in time linear in T (2Mamba, arXiv 2602.17363; power attention
of degree 2, arXiv 2507.04239). The weights are those of `kernels_pallas.second_order_attention`,

    w_ij = (q_i.k_j)^2 e^{L_i - L_j} = sum_mn  q_im q_in  k_jm k_jn  e^{L_i - L_j}

so that all keys before a chunk of C tokens can be summed once, into a state of P products x_m x_n by H values. With l
the running sum of log_decay in the chunk and tot its value at the end, token i of chunk c gets

    near   the chunk's own tokens: the tile kernels of `second_order_attention`, with each chunk as a row of the batch
    far    e^{l_i} sum_mn q_im q_in S_c[m, n],     S_{c+1} = e^tot S_c + sum_{j in c} e^{tot - l_j} k_jm k_jn v_j

and y is the sum of both, divided by the sum of all weights. Every exponent is at most 0; a document boundary acts as
a decay of minus infinity (`Edges`). Sums and the recurrence of the state are float32; queries read the state in q's
dtype.

**The symmetric square in slices.** The columns n are cut into H / R blocks of R; a slice is one row m times one
block, for m up to the block's last row: R features of H values. Rows before the block represent both orders of the
pair, so their slices are stored times 2, which is exact. P = H (H + R) / 2: 3072 for H = 64 and R = 32, compared with
2080 distinct products and 4096 in all. The features of a slice are x_m x_block: one row broadcast over a tile, never
stored in memory.

**The sum of the weights** needs no extra column of v: it is the quadratic form q^T Z q with Z the H x H sum of k k^T,
which XLA accumulates chunk by chunk (H / P of the work) and the kernels apply to their tile.

**Three kernels**, which also make up the backward pass. With g = dy / den and D = g.y (over near and far together,
Dao 2023, arXiv 2307.08691):

    walk(k, v)         S before each chunk, and after the last              dS after each chunk = walk(q, g) in reverse
    read(q, S)         sum_mn q_m q_n S[m, n]                               dv = read(k, dS)
    contract(q, g, S)  the gradient with respect to q of read(q, S) . g     dq; dk = contract(k, v, dS)

With normalisation, D enters through Z: dq -= 2 D Z q, and dk += 2 dZ k with dZ = -sum D q q^T. The backward pass runs
walk again to recompute the states: only y in float32 and den are saved, and S and dS are in memory together, 4 P H / C
bytes per token and head. The gradient of log_decay at t sums w dw over the pairs that t's decay affects, i >= t > j.
Near pairs are handled as in the tiles. Far pairs are split into rows from t on in t's chunk (q.dq / 2), columns before
t in it (k.dk / 2), and pairs that span the whole chunk (the product of S before it and dS after it), so that no sum
along T relies on cancellation.

The initial state is S before the first chunk and the final state is S after the last, with features in the order of
`places`.

Data placement. walk: on GPU a program holds a few slices of a head in registers (128 of a thread's 219) and streams k
and v tile by tile over all of T; on TPU the state of a head stays in VMEM from step to step. read and contract: a
program holds a tile of tokens and streams the slices (on GPU from L2: 2 P H bytes per tile of 128 or 256 tokens).
Chunks and tiles that no state reaches (the first one, or those after a strong decay or a document boundary) skip the
loop.

Cost per token and head, for H = 64 and C = 1024 on GPU: (4 P + 2 C) H = 0.92 MFLOP forward and (10 P + 7 C) H = 2.4
backward, independent of T: 1.2 ns and 3.1 ns at 790 TFLOP/s, or 2.4 and 6.5 ms at B T N = 2 x 65536 x 16. HBM forward:
about 44 H bytes for tokens (near sums in float32, copies with T last) and 4 P H / C for states, together 3.6 KB or 0.84
ns at 4.3 TB/s, so the kernels are bound by the matrix units. C is chosen such that near pairs and states cost about the
same. The cheapest known algorithm needs 4 (H + 1) H (H + 1) / 2 FLOPs, 0.54 M: 1.7 times less, a factor of 1.45 of
which is due to slices and the rest to near pairs. Temporary memory of a training step as XLA plans it: 2.3 KB per token
and head, a third of it S and dS.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jax.custom_derivatives import CustomVJPPrimal, SymbolicZero
from jaxtyping import Array, Float, Int

from kernels_pallas import second_order_attention as near_part
from kernels_pallas import second_order_states_gpu, second_order_states_tpu
from kernels_pallas.second_order_states_plan import Plan, Sizes, planned
from kernels_pallas.tiles import (
    FORGOTTEN,
    RESIDUALS,
    Tiles,
    chunked,
    last_tokens,
    over_groups,
    padded,
    square,
    sums_by_document,
)

BLOCK = 16  # rows per block in the feature order of the initial and the final state


def obstacle(q: Array, k: Array, v: Array, *, platform: str) -> str | None:
    """Why these kernels do not support the arrays, or None. Anything with a shape and a dtype serves as an array."""
    return near_part.obstacle(q, k, v, platform=platform)


def second_order_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    *,
    log_decay: Float[Array, "B T N"] | None = None,
    runs: Int[Array, "B T"] | None = None,
    normalize: bool = True,
    scale: float | None = None,
    initial_state: tuple[Float[Array, "B N P H"], Float[Array, "B N P"]] | None = None,
    platform: str,
    interpret: bool = False,
    tiles: Tiles | None = None,
    sizes: Sizes | None = None,
) -> tuple[Float[Array, "B T N H"], tuple[Float[Array, "B N P H"], Float[Array, "B N P"]]]:
    """(y in q's dtype, the state after the T tokens), with gradients for all but runs.

    Query head n reads kv head n K / N.

    Args:
      log_decay: at most 0; values below -104, where e^a is 0 in float32, are a hard reset. None: no decay.
      runs: the index of each token's document, non-decreasing along T, 0 for that of the initial state. None: one
        document. Padding must have the same index as the token before it, k = 0 and no decay.
      normalize: divide by the sum of the weights (a row whose sum is below 1e-30 gives 0).
      scale: factor on q.k, H^-0.5 by default; no effect on y if normalised.
      initial_state: sums of scale^2 expand(k) times v and times 1, float32; P features in the order of `places`.
      tiles, sizes: replace the entries of the tuning tables (`second_order_states_plan.planned`).
    """
    T, H = q.shape[1], q.shape[3]
    scale = H**-0.5 if scale is None else scale
    plan = planned(T, H, q.dtype, normalize, scale, platform, interpret, tiles, sizes)
    q, k, v, log_decay, runs = padded(q, k, v, log_decay, runs, square(plan.sizes.chunk))
    block = plan.sizes.block
    state = None if initial_state is None else _taken(*initial_state, block, scale)
    y, (after, squares) = _attention(q, k, v, log_decay, runs, state, plan)
    return y[:, :T], _given(after, squares, block, scale)


# ----------------------------------------------------------------------------------------------- the order of features


@functools.cache
def places(H: int) -> tuple[np.ndarray, np.ndarray]:
    """m and n of each feature of an initial or final state: x_m x_n for n from m's block of 16 on, row by row.

    Where n is in a later block the feature represents both orders and holds sqrt(2) times the product.
    """
    pairs = [(m, n) for m in range(H) for n in range(m // BLOCK * BLOCK, H)]
    m, n = np.array(pairs).T
    return m, n


@functools.cache
def slices(H: int, R: int) -> tuple[np.ndarray, np.ndarray]:
    """m and n of each feature inside the kernels: for each block of R columns n, all rows m up to the block's last."""
    pairs = [(m, n) for b in range(0, H, R) for m in range(b + R) for n in range(b, b + R)]
    m, n = np.array(pairs).T
    return m, n


def twice(H: int, R: int) -> np.ndarray:
    """The factor of each feature inside the kernels: 2 if it represents both orders (m, n) and (n, m), otherwise 1."""
    m, n = slices(H, R)
    return np.where(m // R == n // R, 1.0, 2.0).astype(np.float32)


def _find(wanted, present, H: int) -> np.ndarray:
    """The index of each wanted pair among the present ones, in either order."""
    at = np.full((H, H), -1)
    at[present[1], present[0]] = np.arange(len(present[0]))
    at[present] = np.arange(len(present[0]))
    return at[wanted]


def _root(H: int) -> np.ndarray:
    m, n = places(H)
    return np.where(m // BLOCK == n // BLOCK, 1.0, 2**0.5).astype(np.float32)


def _taken(kv: Array, k_sum: Array, R: int, scale: float) -> tuple[Array, Array]:
    """Converts a state to the kernels' layout: features in slices, and the sums of keys as a square [B, N, H, H]."""
    H = kv.shape[-1]
    here, everything = places(H), tuple(np.indices((H, H)))
    kv, k_sum = kv / (_root(H) * scale**2)[:, None], k_sum / (_root(H) * scale**2)
    kv = kv[:, :, _find(slices(H, R), here, H)] * twice(H, R)[:, None]
    return kv, k_sum[:, :, _find(everything, here, H)]


def _given(kv: Array, squares: Array, R: int, scale: float) -> tuple[Array, Array]:
    H = kv.shape[-1]
    here, root = places(H), _root(H) * scale**2
    kv = (kv / twice(H, R)[:, None])[:, :, _find(here, slices(H, R), H)]
    return kv * root[:, None], squares[:, :, *here] * root


# ------------------------------------------------------------------------------------------------------- far and near


class Edges(NamedTuple):
    """Decay and document factors at the borders of chunks, all in [0, 1]."""

    # of the state before the chunk in a query's sum: e^l, 0 unless of its document
    enter: Float[Array, "B N T"]
    # of a key in the state after the chunk: e^(tot - l), 0 unless of its document
    leave: Float[Array, "B N T"]
    kept: Float[Array, "B N J"]  # of the state before the chunk in the state after it


def edges(
    log_decay: Array | None, runs: Array | None, shape: tuple[int, int, int], C: int, begun: bool
) -> Edges:
    """The factors of every chunk of C tokens. log_decay is [B, N, T]; begun: an initial state of run 0 exists."""
    B, N, T = shape
    J = T // C
    there = jnp.ones((1, J), bool) if begun else jnp.arange(J)[None] > 0
    chunks, _ = chunked(log_decay, runs, shape, C, FORGOTTEN)
    if chunks is None:
        kept = jnp.broadcast_to(there[:, None], (B, N, J))
        whole = jnp.broadcast_to(there[:, None, :, None], (B, N, J, C))
        enter, leave, kept = (x.astype(jnp.float32) for x in (whole, jnp.ones_like(whole), kept))
    else:
        local, rest = jnp.exp(chunks.local), jnp.exp(chunks.rest)
        enter, leave = (jnp.where(x > np.exp(-FORGOTTEN), x, 0) for x in (local, rest))
        kept = jnp.exp(chunks.total)
        if runs is not None and chunks.enters is not None and chunks.leaves is not None:
            first, last = runs[:, ::C], runs[:, C - 1 :: C]
            there &= first == jnp.pad(last[:, :-1], ((0, 0), (1, 0)))
            enter, leave = enter * chunks.enters, leave * chunks.leaves
            kept = kept * (first == last)[:, None]
        enter, kept = enter * there[:, None, :, None], kept * there[:, None]
    return Edges(enter.reshape(shape), leave.reshape(shape), kept)


def _squares(weights: Array, x: Array, kept: Array, initial: Array | None, *, reverse: bool = False):
    """The sums of weights x x^T before each chunk [B, N, J, H, H], in x's dtype, and after the last [B, N, H, H]."""
    (B, T, n, H), (_, N, J) = x.shape, kept.shape
    x = jnp.repeat(x, N // n, axis=2)
    weighted = (x.astype(jnp.float32) * jnp.swapaxes(weights, 1, 2)[..., None]).astype(x.dtype)
    added = jnp.einsum(
        "bjcnh,bjcni->jbnhi",
        *(y.reshape(B, J, T // J, N, H) for y in (weighted, x)),
        precision=jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None,
        preferred_element_type=jnp.float32,
    )
    begin = jnp.zeros((B, N, H, H), jnp.float32) if initial is None else initial

    def chunk(before, xs):
        keep, more = xs
        return keep[..., None, None] * before + more, before.astype(x.dtype)

    after, before = jax.lax.scan(chunk, begin, (jnp.moveaxis(kept, 2, 0), added), reverse=reverse)
    return jnp.moveaxis(before, 0, 2), after


def _rows(x: Array | None, J: int, axis: int) -> Array | None:
    """Reshapes chunks to rows of a batch: along axis 1 of [B, T, ...], or axis 2 of [B, N, T]."""
    if x is None:
        return None
    x = x.reshape(*x.shape[:axis], J, -1, *x.shape[axis + 1 :])
    return jnp.moveaxis(x, axis, 1).reshape(-1, *x.shape[1:axis], *x.shape[axis + 1 :])


def _joined(x: Array, J: int, axis: int) -> Array:
    x = jnp.moveaxis(x.reshape(-1, J, *x.shape[1:]), 1, axis)
    return x.reshape(*x.shape[:axis], -1, *x.shape[axis + 2 :])


def _kernels(platform: str):
    return second_order_states_gpu if platform == "gpu" else second_order_states_tpu


@functools.partial(jax.custom_vjp, nondiff_argnums=(6,))
def _attention(q, k, v, log_decay, runs, state, plan: Plan):
    y, _, state = _forward(q, k, v, log_decay, runs, state, plan, q.dtype)
    return y, state


def _forward(q, k, v, log_decay, runs, state, plan: Plan, dtype):
    """y [B, T, N, H] in `dtype`, the sums of the weights [B, N, T], and the state after the last chunk."""
    (B, T, N, _), C, options = q.shape, plan.sizes.chunk, plan.options
    J, kernels = T // C, _kernels(plan.options.platform)
    near_q, near_k, near_v, near_runs = (_rows(x, J, 1) for x in (q, k, v, runs))
    near_decay = _rows(log_decay, J, 2)
    near, near_den = near_part._forward(near_q, near_k, near_v, near_decay, near_runs, options, jnp.float32)
    near, near_den = _joined(near, J, 1), _joined(near_den, J, 2)
    edge = edges(log_decay, runs, (B, N, T), C, state is not None)
    kv, squares = (None, None) if state is None else state
    states, kv = kernels.walk(edge.leave, k, v, edge.kept, kv, plan)
    enter, scalars = edge.enter, {}
    if options.normalize:
        squares_before, squares = _squares(edge.leave, k, edge.kept, squares)
        scalars = {"near_den": near_den, "squares": squares_before}
    else:
        squares = _squares(edge.leave, k, edge.kept, squares)[1]
        enter *= options.scale**2
    y, den = kernels.read(q, states, enter, plan, dtype, near=near, **scalars)
    return y, den, (kv, squares)


def _forward_saving(*given: Any):
    arrays: list[Any]
    *arrays, plan = jax.tree.map(
        lambda x: x.value if isinstance(x, CustomVJPPrimal) else x,
        given,
        is_leaf=lambda x: isinstance(x, CustomVJPPrimal),
    )
    q, k, v, log_decay, runs, state = arrays
    y, den, state = _forward(q, k, v, log_decay, runs, state, plan, jnp.float32)
    y, den = checkpoint_name(y, RESIDUALS), checkpoint_name(den, RESIDUALS)
    return (y.astype(arrays[0].dtype), state), (*arrays, y, den)


def _backward(plan: Plan, residuals, cotangents):
    q, k, v, log_decay, runs, state, y, den = residuals
    (B, T, N, _), C = q.shape, plan.sizes.chunk
    dy, d_state = cotangents
    dy = jnp.zeros(q.shape, q.dtype) if isinstance(dy, SymbolicZero) else dy
    dq, dk, dv, flow = _near_gradients(q, k, v, log_decay, runs, y, den, dy, plan)
    edge = edges(log_decay, runs, (B, N, T), C, state is not None)
    far = _far_gradients(q, k, v, edge, state, y, den, dy, d_state, plan)
    d_decay = None if log_decay is None else _decay_gradient(flow, q, k, far, edge.kept, runs)
    dq, dk, dv = (
        over_groups((x.astype(jnp.float32) + more).astype(like.dtype), like.shape[2])
        for x, more, like in ((dq, far.q, q), (dk, far.k, k), (dv, far.v, v))
    )
    return dq, dk, dv, d_decay, None, far.state


def _decay_gradient(flow: Array, q: Array, k: Array, far: "Far", kept: Array, runs: Array | None) -> Array:
    """The gradient of log_decay [B, N, T], chunk by chunk, so that no rounding error accumulates along T.

    With documents over each of them alone.
    """
    B, N, J = kept.shape
    rows, columns = (
        0.5 * jnp.sum(jnp.repeat(x, N // x.shape[2], axis=2).astype(jnp.float32) * dx, axis=-1)
        for x, dx in ((q, far.q), (k, far.k))
    )
    rows, columns = (jnp.swapaxes(x, 1, 2).reshape(B, N, J, -1) for x in (rows, columns))
    later, earlier = flow.reshape(rows.shape) + rows, jnp.pad(columns, ((0, 0),) * 3 + ((1, 0),))[..., :-1]
    if runs is None:
        after, before = jax.lax.cumsum(later, axis=3, reverse=True), jax.lax.cumsum(earlier, axis=3)
    else:
        of_chunks = runs.reshape(B, 1, J, -1)
        first = jnp.diff(of_chunks, axis=3, prepend=-1) != 0
        after = sums_by_document(later, last_tokens(of_chunks), reverse=True)
        before = sums_by_document(jnp.where(first, 0, earlier), first)
    return (after + before + (kept * far.through)[..., None]).reshape(B, N, -1)


def _near_gradients(q, k, v, log_decay, runs, y, den, dy, plan: Plan):
    """dq, dk, dv for each query head [B, T, N, H] and sum_j w dw - sum_i w dw [B, N, T], from inside the chunks."""
    N, J, options = q.shape[2], q.shape[1] // plan.sizes.chunk, plan.options
    q, k, v, runs, y, dy = (_rows(x, J, 1) for x in (q, k, v, runs, y, dy))
    log_decay, den = (_rows(x, J, 2) for x in (log_decay, den))
    kernels = near_part._kernels(options.platform)
    folded, reach = near_part.fold(k, log_decay, runs, N, options.tiles.dq.held)
    cotangent = near_part._cotangent(dy, y, den, folded, options)
    common = cotangent, folded, reach, runs, options
    dq, row = kernels.backward_dq(q, k, v, *common, options.tiles.dq)
    dk, dv, column = kernels.backward_dkv(q, k, v, *common, options.tiles.dkv)
    return *(_joined(x, J, 1) for x in (dq, dk, dv)), _joined(row - column, J, 2)


class Far(NamedTuple):
    """The part of the gradients that passes through the states, per query head."""

    q: Float[Array, "B T N H"]
    k: Float[Array, "B T N H"]
    v: Float[Array, "B T N H"]
    state: tuple[Array, Array] | None
    # the product of the state before a chunk and the cotangent of the one after it
    through: Float[Array, "B N J"]


def _far_gradients(q, k, v, edge: Edges, state, y, den, dy, d_state: Any, plan: Plan) -> Far:
    kernels, options = _kernels(plan.options.platform), plan.options
    factors = jnp.asarray(twice(q.shape[3], plan.sizes.block))[:, None]
    cotangent = near_part._cotangent(dy, y, den, None, options)
    g, mean = cotangent.g, cotangent.bias
    kv, squares = (None, None) if state is None else state
    d_kv: Any
    d_squares: Any
    d_kv, d_squares = (None if isinstance(x, SymbolicZero) else x for x in d_state)
    if d_squares is not None:
        d_squares = (d_squares + jnp.swapaxes(d_squares, 2, 3)) / 2
    states, _ = kernels.walk(edge.leave, k, v, edge.kept, kv, plan)
    d_kv = None if d_kv is None else d_kv * factors
    d_states, d_kv = kernels.walk(edge.enter, q, g, edge.kept, d_kv, plan, reverse=True)
    into_q, into_k, through = {}, {}, _product(states, d_states, q.shape[3], plan)
    if options.normalize or d_squares is not None:
        before, _ = _squares(edge.leave, k, edge.kept, squares)
        after, d_squares = _squares(edge.enter * -mean, q, edge.kept, d_squares, reverse=True)
        into_q, into_k = {"bias": -mean, "squares": before}, {"bias": jnp.ones_like(mean), "squares": after}
        through += jnp.sum(before.astype(jnp.float32) * after.astype(jnp.float32), axis=(3, 4))
    elif squares is not None:
        d_squares = jnp.zeros_like(squares)
    dq = kernels.contract(q, g, states, edge.enter, plan, **into_q)
    dk = kernels.contract(k, v, d_states, edge.leave, plan, **into_k)
    dv, _ = kernels.read(k, d_states, edge.leave, plan, jnp.float32)
    return Far(dq, dk, dv, None if state is None else (d_kv / factors, d_squares), through)


def _product(states: Array, d_states: Array, H: int, plan: Plan) -> Array:
    """The product of S before each chunk and dS after it, [B, N, J].

    Features that represent both orders of a pair are doubled in both states, so one factor of 2 is divided out.
    """
    once = 1 / twice(H, plan.sizes.block)[:: plan.sizes.block, None, None]
    return jnp.sum(states.astype(jnp.float32) * d_states.astype(jnp.float32) * once, axis=(3, 4, 5))


_attention.defvjp(_forward_saving, _backward, symbolic_zeros=True)
