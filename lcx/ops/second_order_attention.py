"""Second-order attention: weights are squared scores, so that the history fits in a state of fixed size.

    w_ij = (scale q_i . k_j)^2 exp(L_i - L_j) for j <= i of the same document,  L_i = log_decay_1 + ... + log_decay_i
    y_i  = sum_j w_ij v_j / sum_j w_ij            (without the division when normalize=False)

This is the core of 2Mamba (arXiv 2602.17363) and degree-2 power attention with gates (arXiv 2507.04239). Weights are
squares, never negative, and a decay is at most 1, so neither a running maximum nor an epsilon is needed. A token whose
weights are all zero (padding, or q = 0) gives 0. All forms but the reference rescale q and k to units in which weights
do not underflow in float32 (second_order_units.py). A token that sees only itself gives its value, whatever its score.

``reference``   the definition, quadratic memory, in float64 for float64 inputs.
``triton``      both forms as Pallas kernels for GPUs, ``tpu`` for TPUs (kernels_pallas/second_order_attention.py and
                second_order_states.py). Form "tiles" takes no initial state, and XLA computes the
                final state if it is used.
``xla``         form "tiles": quadratic in time, linear in memory, skips tiles that the decay has made negligible
                (second_order_tiles.py). form "states": linear in time, one state of P x (H + 1) numbers a head
                (second_order_states.py). form "recurrent": a step for each token, as in decoding, to compare with.
                form None: second_order_choice.py.

Letters: B batch, T tokens, N query heads, K kv heads, H head dim, P = `expanded_size(H)`.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Float32, Int

from lcx.errors import UserError
from lcx.ops import (
    MIXER_RESIDUALS,
    dispatch,
    second_order_choice,
    second_order_shards,
    segments,
)
from lcx.ops.decay import GONE, divided, gaps, split, unit_of
from lcx.ops.second_order_expand import expand, expanded_size
from lcx.ops.second_order_forms import attend
from lcx.ops.second_order_rows import FAINT, MAYBE, SURELY, Rows, in_tiles
from lcx.ops.second_order_units import LOG4, Units, exponent, times_power, units
from lcx.ops.tiling import by_pieces

FORMS = ("tiles", "states", "recurrent")
PLATFORMS = {"triton": "gpu", "tpu": "tpu"}  # platform of each kernel
# Lower finite log decays are clamped to this value: no two squared scores in float32 differ by a factor of e^400.
LOWEST = -512.0


class SecondOrderState(NamedTuple):
    """The state after T tokens: sums over j of exp(L_T - L_j) scale^2 expand(k_j), times v_j and times 1.

    `segment_ids` is the document to which the state belongs, 0 if it is empty.
    """

    kv: Float32[Array, "B N P H"]
    k_sum: Float32[Array, "B N P"]
    segment_ids: Int[Array, " B"]


def empty_state(batch_size: int, num_heads: int, head_dim: int) -> SecondOrderState:
    size = expanded_size(head_dim)
    return SecondOrderState(
        jnp.zeros((batch_size, num_heads, size, head_dim), jnp.float32),
        jnp.zeros((batch_size, num_heads, size), jnp.float32),
        jnp.zeros(batch_size, jnp.int32),
    )


def second_order_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    *,
    log_decay: Float[Array, "B T N"] | None = None,
    normalize: bool = True,
    scale: float | None = None,
    form: str | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
    initial_state: SecondOrderState | None = None,
    implementation: str | None = None,
    mesh_axis: str | None = None,
) -> tuple[Float[Array, "B T N H"], SecondOrderState]:
    """(outputs [B, T, N, H] in q's dtype, the state after the T tokens).

    Args:
      log_decay: at most 0; -inf hides all earlier tokens. Values at padding are ignored. None: no decay.
      normalize: divide by the sum of the weights.
      scale: defaults to H^-0.5. It cancels when normalize=True, except in the state.
      form: "tiles", "states", "recurrent", or None to choose by the length and the data, so that time grows at most
        linearly with T from 4K tokens on, whatever the decay (second_order_choice.py).
      segment_ids: documents of packed rows (segments.py); None: one document with id 1.
      initial_state: the state after earlier tokens; None: empty.
      implementation: see dispatch.py; here "reference", "xla", "triton", "tpu" or None.
      mesh_axis: in a shard_map over this axis, the arguments are this device's part of the rows (shards.py), and
        initial_state is the state before the rows. second_order_shards.py counts what is sent.

    Raises:
      UserError: an unknown form or implementation, or query heads that are not a multiple of the kv heads.
    """
    B, T, N, H = q.shape
    _check(N, k.shape[2], form)
    recurrent, form = form == "recurrent" and T > 1, "states" if form == "recurrent" else form
    follows, scale = initial_state is not None or mesh_axis is not None, H**-0.5 if scale is None else scale
    forgets = log_decay is not None or segment_ids is not None
    form = second_order_choice.choose(form, T, H, follows=follows, forgets=forgets)
    obstacles = {**_kernel_obstacles(q, k, v, form, follows), "xla": None, "reference": None}
    name = dispatch.choose("second_order_attention", implementation, obstacles)
    state = empty_state(B, N, H) if initial_state is None else initial_state
    ids = jnp.ones((B, T), jnp.int32) if segment_ids is None else segment_ids
    real = (ids != 0)[:, :, None]
    decay = _clamped(jnp.zeros((B, T, N)) if log_decay is None else log_decay, real, q.dtype)
    if mesh_axis is not None:
        visible = jnp.where(real[..., None], k, 0)
        before, of = second_order_shards.state_before(
            visible, v, decay, ids, state, scale=scale, mesh_axis=mesh_axis
        )
        state = SecondOrderState(*before, of)
    if recurrent:
        options = {"normalize": normalize, "scale": scale, "implementation": implementation}
        return _recurrent({"q": q, "k": k, "v": v, "log_decay": decay, "segment_ids": ids}, state, options)
    if segment_ids is None:  # runs and last as below
        runs = jnp.broadcast_to((state.segment_ids != 1).astype(jnp.int32)[:, None], (B, T))
        last = jnp.ones(B, jnp.int32)
    else:
        runs, last = segments.runs(ids, state.segment_ids), segments.last(ids, state.segment_ids)
    if name not in PLATFORMS:
        k, v = (jnp.repeat(x, N // k.shape[2], axis=2) for x in (k, v))
    case = Case(
        *(normalize, scale, form, PLATFORMS.get(name), follows),
        documents=segment_ids is not None or follows,
        decays=log_decay is not None or name not in PLATFORMS,
    )
    if name == "reference":
        k = jnp.where(real[..., None], k, 0)  # padding gets weight 0
        y, state = reference(q, k, v, decay, runs, state, normalize=normalize, scale=scale)
        y = jnp.where(real[..., None], y, 0)
    else:
        y, state = _in_units(q, k, v, decay, ids != 0, runs, state, case)
    return y.astype(q.dtype), state._replace(segment_ids=last)


def _check(num_heads: int, num_kv_heads: int, form: str | None) -> None:
    if num_heads % num_kv_heads:
        raise UserError(
            f"{num_heads} query heads over {num_kv_heads} kv heads: num_heads must be a multiple of num_kv_heads"
        )
    if form not in (None, *FORMS):
        raise UserError(f"second_order_attention form {form!r}: expected {', '.join(map(repr, FORMS))} or None")


def _clamped(log_decay: Array, real: Array, dtype: jnp.dtype) -> Array:
    """Log decays of at least float32; 0 at padding, and LOWEST for lower ones that are finite."""
    decay = jnp.where(real, log_decay.astype(jnp.promote_types(dtype, jnp.float32)), 0)
    return jnp.where(decay < LOWEST, jnp.where(decay == -jnp.inf, -jnp.inf, LOWEST), decay)


def _recurrent(rows: dict[str, Array], state: SecondOrderState, options: dict[str, Any]):
    """A token after the other, each from the state that the one before left.

    The backward pass has the states of one piece of about sqrt(T) tokens at once, and computes them again.
    """
    T = rows["q"].shape[1]
    size = math.isqrt(T - 1) + 1
    count = -(-T // size)

    def pieces_of(x: Array) -> Array:
        padded = jnp.pad(jnp.moveaxis(x, 1, 0), ((0, count * size - T), *((0, 0),) * (x.ndim - 1)))  # document 0
        return padded.reshape(count, size, *padded.shape[1:])

    def token(state, row):
        row = {name: x[:, None] for name, x in row.items()}
        y, state = second_order_attention(**row, initial_state=state, form="states", **options)
        return state, y[:, 0]

    piece = jax.checkpoint(lambda state, rows: jax.lax.scan(token, state, rows))
    state, y = jax.lax.scan(piece, state, jax.tree.map(pieces_of, rows))
    return jnp.moveaxis(y.reshape(count * size, *y.shape[2:])[:T], 0, 1), state


class Case(NamedTuple):
    """What is known at compile time."""

    normalize: bool
    scale: float
    form: str  # tiles, states or either
    platform: str | None  # the platform of a kernel; None for plain JAX
    follows: bool  # there is an initial state
    documents: bool  # there may be more than one document per row
    decays: bool  # for kernels: whether they get a decay

    def finishes(self, T: int) -> bool:
        """Whether the form divides by the weights: not kernels, nor a single token."""
        return self.normalize and self.platform is None and T > 1


def _in_units(q, k, v, decay, shown, runs, state: SecondOrderState, case: Case):
    """Computes in the units of second_order_units.py; returns y and the state in the original units.

    Keys where `shown` [B, T] is False get weight 0, and so do queries.
    """
    unit = units(q, k, shown, decay, runs, state.k_sum / case.scale**2, decays=case.decays)
    of_tokens = unit.of_q, unit.of_k, shown
    kv, k_sum = (times_power(x, _spread(-2 * unit.of_state, x)) for x in state[:2])
    state = state._replace(kv=kv, k_sum=k_sum)
    begins = (jnp.diff(runs, axis=1, prepend=0) != 0)[..., None] | (decay == -jnp.inf)
    alone = jnp.where(begins, SURELY, jnp.where(unit.log_decay <= GONE, MAYBE, 0))
    if case.platform is not None:
        (y, total), after = _by_kernel(*_scaled(q, k, *of_tokens), v, unit.log_decay, runs, state, case)
    elif q.shape[1] == 1:
        (y, total), after = step(*_scaled(q, k, *of_tokens), v, unit.log_decay, runs, state, scale=case.scale)
    else:
        (y, total), after = _chunked(q, k, v, unit, alone, shown, runs, state, case)
    if not case.normalize:
        y = times_power(jnp.where(shown[..., None, None], y, 0), 2 * unit.of_rows[..., None])
    elif not case.finishes(q.shape[1]):
        own = by_pieces(_own, *jax.lax.stop_gradient((q, k)), *of_tokens).astype(decay.dtype)
        fixed, seen = _fixed(own, alone, shown)
        y = jnp.where(fixed, jnp.where(seen, jnp.repeat(v, q.shape[2] // v.shape[2], axis=2), 0), y)
        y = y if total is None else _divided(y, jnp.where(fixed, 1, total))
    kv, k_sum = (times_power(x, _spread(2 * unit.of_last, x)) for x in after[:2])
    return y, state._replace(kv=kv, k_sum=k_sum)


def _spread(exponents: Array, x: Array) -> Array:
    return exponents.reshape(*exponents.shape, *(1,) * (x.ndim - 2))


def _scaled(q, k, of_q, of_k, shown) -> tuple[Array, Array]:
    """q and k in their units, k 0 where it is not shown."""
    return times_power(q, of_q[..., None]), times_power(
        jnp.where(shown[..., None, None], k, 0), of_k[..., None]
    )


def _own(*arrays) -> Array:
    """The score of each token with itself, without scale [B, T, N]; arguments of _scaled."""
    q, k = _scaled(*arrays)
    by_group = q.reshape(*k.shape[:3], -1, k.shape[3]) * k[:, :, :, None]
    wide = jnp.promote_types(q.dtype, jnp.float32)
    return jnp.sum(by_group.astype(wide), axis=-1).reshape(q.shape[:3])


@jax.custom_vjp
def _divided(sums: Array, total: Array) -> Array:
    """decay.divided with the gradient of the total as a product with ones: XLA's sum over the last axis of a product
    holds four times its arguments on a CPU."""
    return divided(sums, total)


def _divided_forward(sums, total):
    y = divided(sums, total)
    return y, (y, total)


def _divided_backward(residuals, dy):
    (y, total), ones = residuals, jnp.ones((dy.shape[-1], 1), dy.dtype)
    return divided(dy, total), -divided(jnp.matmul(y * dy, ones, precision="highest"), total)


_divided.defvjp(_divided_forward, _divided_backward)


def _fixed(own: Array, alone: Array, shown: Array) -> tuple[Array, Array]:
    """(which outputs do not depend on the sums, and which of these are the token's value, the others 0) [B, T, N, 1].

    As in second_order_rows.py, for `alone` [B, T, N] and scores `own`.
    """
    shown = shown[..., None]
    fixed = (alone == SURELY) | ((alone == MAYBE) & (jnp.abs(own) > FAINT))
    return (fixed & jnp.isfinite(own) | ~shown)[..., None], (shown & (own != 0))[..., None]


def _by_kernel(q, k, v, decay, runs, state: SecondOrderState, case: Case):
    options: dict[str, Any] = {"normalize": case.normalize, "scale": case.scale, "platform": case.platform}
    options["log_decay"] = decay if case.decays else None
    options["runs"] = runs if case.documents else None
    if case.form == "states" or case.follows:  # the kernel for tiles takes no initial state
        from kernels_pallas.second_order_states import second_order_attention as kernel

        y, (kv, k_sum) = kernel(q, k, v, initial_state=state[:2] if case.follows else None, **options)
        return (y, None), state._replace(kv=kv, k_sum=k_sum)
    from kernels_pallas.second_order_attention import second_order_attention as tiles

    if case.form == "either":
        from kernels_pallas.second_order_either import second_order_attention as by_reach

        short = second_order_choice.short_reach(decay, runs, q.shape[3])
        y = by_reach(q, k, v, short_reach=short, **options)
    else:
        y = tiles(q, k, v, **options)
    k, v = (jnp.repeat(x, q.shape[2] // k.shape[2], axis=2) for x in (k, v))
    unscaled = jnp.zeros(q.shape[:3], jnp.int32)
    unit = Units(unscaled, unscaled, decay, unscaled, unscaled[:, 0], unscaled[:, 0])
    shown, case = jnp.ones(q.shape[:2], bool), case._replace(form="states", normalize=False)
    # XLA removes this computation if the state is unused.
    return (y, None), _chunked(q, k, v, unit, unscaled, shown, runs, state, case)[1]


def _with_ones(v: Array) -> Array:
    return jnp.concatenate([v, jnp.ones_like(v[..., :1])], axis=-1)


def _parts(rates: Array) -> tuple[Array, Array, float]:
    """(log decays rounded to multiples of a unit, whose sums over the row are exact; the rest; the unit).

    -inf is in the first part.
    """
    coarse, fine = split(rates, rates.shape[-1], LOWEST)
    hidden = rates == -jnp.inf
    return jnp.where(hidden, -jnp.inf, coarse), jnp.where(hidden, 0, fine), unit_of(rates.shape[-1], LOWEST)


def reference(
    q, k, v, decay, runs, state: SecondOrderState, *, normalize: bool, scale: float
) -> tuple[Array, SecondOrderState]:
    """The definition, all pairs at once, with each row's weights relative to its largest, to avoid underflow."""
    q, k, v = (x.astype(decay.dtype) for x in (q, k, v))
    rows, keys = jnp.swapaxes(exponent(q), 1, 2), jnp.swapaxes(exponent(k), 1, 2)
    queries = times_power(q, -exponent(q)[..., None])
    scores = scale * jnp.einsum("btnh,bsnh->bnts", queries, times_power(k, -exponent(k)[..., None]))
    order, rates = jnp.arange(q.shape[1]), jnp.moveaxis(decay, 2, 1)
    coarse, fine, unit = _parts(rates)
    far, near, since = gaps(coarse, order), gaps(fine, order), jnp.cumsum(rates, axis=2)
    between = far + near
    carried = jnp.concatenate([state.kv, state.k_sum[..., None]], axis=-1)
    old = jnp.einsum("btnp,bnpw->bntw", expand(queries), carried)
    # The logarithm of the magnitude of every weight, in two parts: decay and squared score (or the state's).
    of_pairs = between + LOG4 * (rows[..., None] + keys[:, :, None])
    of_state = since + LOG4 * rows
    seen = (order[:, None] >= order) & (runs[:, :, None] == runs[:, None, :])
    seen = seen[:, None] & (scores != 0) & (of_pairs > -jnp.inf)
    entering = (runs == 0)[:, None] & (old[..., -1] > 0) & (of_state > -jnp.inf)
    sizes = jnp.where(seen, 2 * jnp.log(jnp.abs(scores)) + of_pairs, -jnp.inf).max(axis=-1)
    top = jnp.maximum(sizes, jnp.where(entering, jnp.log(old[..., -1]) + of_state, -jnp.inf))
    top = jax.lax.stop_gradient(jnp.where(top > -jnp.inf, top, 0))
    # The difference of two large sums, computed from parts whose differences are exact.
    shift = jnp.round(top / unit) * unit
    near = near - (top - shift)[..., None] + LOG4 * (rows[..., None] + keys[:, :, None])
    roots = scores * jnp.exp(jnp.where(seen, (far - shift[..., None]) + near, 0) / 2)
    weights = jnp.where(seen, roots**2, 0)
    entering = jnp.where(entering, jnp.exp(jnp.where(entering, of_state - top, 0)), 0)
    sums = jnp.einsum("bnts,bsnw->bntw", weights, _with_ones(v)) + entering[..., None] * old
    y, own = sums[..., :-1], jnp.diagonal(weights, axis1=2, axis2=3)[..., None]
    if normalize:
        alone = (
            (own > 0) & (jnp.count_nonzero(weights, axis=-1, keepdims=True) == 1) & (entering[..., None] == 0)
        )
        y = jnp.where(alone, jnp.swapaxes(v, 1, 2), divided(y, sums[..., -1:]))
    else:
        y = y * jnp.exp(top / 2)[..., None] * jnp.exp(top / 2)[..., None]
    new = jnp.exp(between[:, :, -1]) * (runs == runs[:, -1:])[:, None]
    kept = jnp.exp(since[:, :, -1]) * (runs[:, -1:] == 0)
    carried = kept[..., None, None] * carried + scale**2 * jnp.einsum(
        "btnp,bnt,btnw->bnpw", expand(k), new, _with_ones(v)
    )
    return jnp.swapaxes(y, 1, 2), state._replace(kv=carried[..., :-1], k_sum=carried[..., -1])


def step(q, k, v, decay, runs, state: SecondOrderState, *, scale: float):
    """One token. Its own weight is computed directly, as within a chunk, since the state would lose digits."""
    q, k, v = (x[:, 0].astype(decay.dtype) for x in (q, k, v))
    kept = (jnp.exp(decay[:, 0]) * (runs == 0))[..., None]
    weight = (scale * jnp.sum(q * k, axis=-1, keepdims=True)) ** 2
    q_expanded, k_expanded = expand(q), scale**2 * expand(k)
    y = weight * v + kept * jnp.einsum("bnp,bnph->bnh", q_expanded, state.kv)
    total = weight + kept * jnp.sum(q_expanded * state.k_sum, axis=-1, keepdims=True)
    kv = kept[..., None] * state.kv + k_expanded[..., None] * v[:, :, None]
    state = state._replace(kv=kv, k_sum=kept * state.k_sum + k_expanded)
    return (y[:, None], total[:, None]), state


def _chunked(q, k, v, unit: Units, alone, shown, runs, state: SecondOrderState, case: Case):
    """Both tiled forms: (y, the weights) or sums (`Case.finishes`), and the state, by the arguments' own units."""
    (_, _, N, H), finishes = q.shape, case.finishes(q.shape[1])
    of_q, of_k, decay, alone = map(in_tiles, (unit.of_q, unit.of_k, unit.log_decay, alone))
    of_row = (shown.astype(jnp.int32), runs)
    seen, documents = (jnp.repeat(in_tiles(x)[:, None], N, axis=1) for x in of_row)
    rows = Rows(q, k, v, of_q, of_k, seen != 0, decay, documents, alone if finishes else None)
    carried = jnp.concatenate([state.kv, state.k_sum[..., None]], axis=-1) / case.scale**2
    reaches = case.form == "either"
    short = second_order_choice.short_reach(unit.log_decay, runs, H) if reaches else None
    if case.follows or case.form == "states":
        outputs, carried = attend(case.form, rows, carried, short)
    else:
        outputs, _ = attend(case.form, rows, None, short)
        # XLA removes this computation if the state is unused.
        _, carried = attend("states", rows._replace(alone=None), carried, None)
    carried = carried * case.scale**2
    if not finishes:
        outputs = checkpoint_name(jax.tree.map(lambda x: x * case.scale**2, outputs), MIXER_RESIDUALS)
    return outputs, state._replace(kv=carried[..., :-1], k_sum=carried[..., -1])


def _kernel_obstacles(q: Array, k: Array, v: Array, form: str, follows: bool) -> dict[str, str | None]:
    def of(platform: str) -> str | None:
        if missing := dispatch.kernels(platform):
            return missing
        from kernels_pallas import second_order_attention, second_order_states

        if form != "tiles":
            if q.shape[1] == 1:
                return "one token is no chunk"
            return second_order_states.obstacle(q, k, v, platform=platform)
        return second_order_attention.obstacle(q, k, v, platform=platform, initial_state=follows or None)

    return {name: of(platform) for name, platform in PLATFORMS.items()}
