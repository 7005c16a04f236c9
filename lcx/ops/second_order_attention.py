"""Second-order attention: the square of a score is its weight, so that its history fits in a state of fixed size.

    w_ij = (scale q_i . k_j)^2 exp(L_i - L_j) for j <= i of the same document,  L_i = log_decay_1 + ... + log_decay_i
    y_i  = sum_j w_ij v_j / sum_j w_ij            (without the division when normalize=False)

This is the core of 2Mamba (arXiv 2602.17363) and degree-2 power attention with gates (arXiv 2507.04239). Weights are
sums of squares, never negative, and a decay is at most 1: no running maximum, no epsilon. A token whose weights are
all zero (padding, or q = 0) gives 0.

``reference``   the definition, quadratic memory, in float64 where the inputs are.
``triton``      both forms as Pallas kernels for GPUs, ``tpu`` for TPUs (kernels_pallas/second_order_attention.py and
                second_order_states.py). Form "tiles" takes no initial state, and where the final one is asked for it
                comes from XLA.
``xla``         form "tiles": quadratic in time, linear in memory, skips tiles that the decay has made negligible
                (second_order_tiles.py). form "states": linear in time, one state of P x (H + 1) numbers a head
                (second_order_states.py). form None picks by T and H.

Letters: B batch, T tokens, N query heads, K kv heads, H head dim, P = `expanded_size(H)`.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Float32, Int

from lcx.errors import UserError
from lcx.ops import MIXER_RESIDUALS, dispatch, second_order_states, second_order_tiles, segments
from lcx.ops.second_order_states import expand, expanded_size

PLATFORMS = {"triton": "gpu", "tpu": "tpu"}  # of the kernels


class SecondOrderState(NamedTuple):
    """What the tokens so far leave behind: sums over j of exp(L_T - L_j) scale^2 expand(k_j) times v_j, and times 1.

    `segment_ids` is the document that the state belongs to, 0 where it is empty.
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
) -> tuple[Float[Array, "B T N H"], SecondOrderState]:
    """Outputs in q's dtype, and the state after the T tokens.

    Args:
      log_decay: at most 0 (below -30 counts as -30); None is 0, no decay. That of a padding token is not applied.
      scale: defaults to H^-0.5. It cancels when normalize=True, except in the state.
      form: "tiles", "states", or None for the faster of the two.
      segment_ids: documents of packed rows (segments.py); None is one document with id 1.
      initial_state: what earlier tokens left; None is empty.
      implementation: see dispatch.py; here "reference", "xla", "triton", "tpu" or None.

    Raises:
      UserError: an unknown form or implementation, or heads that do not divide.
    """
    B, T, N, H = q.shape
    if N % k.shape[2]:
        raise UserError(
            f"{N} query heads over {k.shape[2]} kv heads: num_heads must be a multiple of num_kv_heads"
        )
    if form not in (None, "tiles", "states"):
        raise UserError(f"second_order_attention form {form!r}: expected 'tiles', 'states' or None")
    follows, scale = initial_state is not None, H**-0.5 if scale is None else scale
    faster = form or _faster(T, H, follows=follows, decays=log_decay is not None)
    obstacles = {**_kernel_obstacles(q, k, v, faster, follows), "xla": None, "reference": None}
    name = dispatch.choose("second_order_attention", implementation, obstacles)
    state = empty_state(B, N, H) if initial_state is None else initial_state
    ids = jnp.ones((B, T), jnp.int32) if segment_ids is None else segment_ids
    runs, real = segments.runs(ids, state.segment_ids), (ids != 0)[:, :, None]
    wide = jnp.promote_types(q.dtype, jnp.float32)
    decay = jnp.zeros((B, T, N), wide)
    if log_decay is not None:
        decay = jnp.where(real, jnp.maximum(log_decay.astype(wide), second_order_tiles.SKIP), 0)
    k = jnp.where(real[..., None], k, 0)  # padding weighs nothing
    last = segments.last(ids, state.segment_ids)
    if name in PLATFORMS:
        options = {"normalize": normalize, "scale": scale, "platform": PLATFORMS[name]}
        options["log_decay"] = None if log_decay is None else decay
        options["runs"] = None if segment_ids is None and not follows else runs
        y, state = _by_kernel(q, k, v, decay, runs, state, form=faster, follows=follows, options=options)
        return jnp.where(real[..., None], y, 0), state._replace(segment_ids=last)
    k, v = (jnp.repeat(x, N // k.shape[2], axis=2) for x in (k, v))
    if name == "reference":
        sums, state = reference(q, k, v, decay, runs, state, scale=scale)
    elif T == 1:
        sums, state = step(q, k, v, decay, runs, state, scale=scale)
    else:
        sums, state = _chunked(q, k, v, decay, runs, state, form=faster, scale=scale, follows=follows)
    sums = checkpoint_name(sums, MIXER_RESIDUALS)
    y, total = sums[..., :-1], sums[..., -1:]
    if normalize:
        y = y / jnp.where(total == 0, 1, total)
    return jnp.where(real[..., None], y, 0).astype(q.dtype), state._replace(segment_ids=last)


def _by_kernel(q, k, v, decay, runs, state: SecondOrderState, *, form: str, follows: bool, options: dict):
    if form == "states":
        from kernels_pallas.second_order_states import second_order_attention as kernel

        y, (kv, k_sum) = kernel(q, k, v, initial_state=state[:2] if follows else None, **options)
        return y, state._replace(kv=kv, k_sum=k_sum)
    from kernels_pallas.second_order_attention import second_order_attention as tiles

    y = tiles(q, k, v, **options)
    k, v = (jnp.repeat(x, q.shape[2] // k.shape[2], axis=2) for x in (k, v))
    # XLA drops the state where nobody asks for it.
    scale = options["scale"]
    return y, _chunked(q, k, v, decay, runs, state, form="states", scale=scale, follows=False)[1]


def _with_ones(v: Array) -> Array:
    return jnp.concatenate([v, jnp.ones_like(v[..., :1])], axis=-1)


def reference(
    q, k, v, decay, runs, state: SecondOrderState, *, scale: float
) -> tuple[Array, SecondOrderState]:
    """The definition: sums [B, T, N, H + 1], the last column those of the weights."""
    q, k, values = (x.astype(decay.dtype) for x in (q, k, _with_ones(v)))
    total = jnp.cumsum(decay, axis=1)
    order = jnp.arange(q.shape[1])
    seen = (order[:, None] >= order) & (runs[:, :, None] == runs[:, None, :])
    gap = jnp.where(seen[..., None], total[:, :, None] - total[:, None], 0)
    scores = scale * jnp.einsum("btnh,bsnh->btsn", q, k)
    sums = jnp.einsum("btsn,bsnw->btnw", jnp.where(seen[..., None], scores**2 * jnp.exp(gap), 0), values)
    old = jnp.exp(total) * (runs == 0)[..., None]
    carried = jnp.concatenate([state.kv, state.k_sum[..., None]], axis=-1)
    sums += old[..., None] * jnp.einsum("btnp,bnpw->btnw", expand(q), carried)
    new = jnp.exp(total[:, -1:] - total) * (runs == runs[:, -1:])[..., None]
    carried = old[:, -1, :, None, None] * carried + scale**2 * jnp.einsum(
        "btnp,btn,btnw->bnpw", expand(k), new, values
    )
    return sums, state._replace(kv=carried[..., :-1], k_sum=carried[..., -1])


def step(q, k, v, decay, runs, state: SecondOrderState, *, scale: float) -> tuple[Array, SecondOrderState]:
    """One token. Its own weight is formed directly, as in a chunk: through the state it would cost digits."""
    q, k, v = (x[:, 0].astype(decay.dtype) for x in (q, k, v))
    kept = (jnp.exp(decay[:, 0]) * (runs == 0))[..., None]
    weight = (scale * jnp.sum(q * k, axis=-1, keepdims=True)) ** 2
    q_expanded, k_expanded = expand(q), scale**2 * expand(k)
    y = weight * v + kept * jnp.einsum("bnp,bnph->bnh", q_expanded, state.kv)
    total = weight + kept * jnp.sum(q_expanded * state.k_sum, axis=-1, keepdims=True)
    kv = kept[..., None] * state.kv + k_expanded[..., None] * v[:, :, None]
    state = state._replace(kv=kv, k_sum=kept * state.k_sum + k_expanded)
    return jnp.concatenate([y, total], axis=-1)[:, None], state


def _chunked(q, k, v, decay, runs, state: SecondOrderState, *, form: str, scale: float, follows: bool):
    """Both tiled forms. Heads come first, T is filled up to whole tiles, and the scale is left to the results."""
    B, T, N, _ = q.shape

    def heads_first(x):
        return jnp.moveaxis(x, 2, 1).reshape(B * N, T, *x.shape[3:])

    q, k, v, decay = (heads_first(x) for x in (q, k, _with_ones(v), decay))
    q, k, v, decay, runs = second_order_tiles.padded(T, (q, k, v, decay, jnp.repeat(runs, N, axis=0)))
    carried = jnp.concatenate([state.kv, state.k_sum[..., None]], axis=-1)
    carried = (carried / scale**2).reshape(B * N, *carried.shape[2:])
    if form == "states":
        sums, carried = second_order_states.states(q, k, v, decay, runs, carried)
    else:
        sums = second_order_tiles.tiles(q, k, v, decay, runs)
        if follows:
            sums += second_order_states.read(q, k, v, decay, runs, carried)
        carried = second_order_states.write(q, k, v, decay, runs, carried)
    sums = jnp.moveaxis(sums[:, :T].reshape(B, N, T, -1), 1, 2) * scale**2
    carried = (carried * scale**2).reshape(B, N, *carried.shape[1:])
    return sums, state._replace(kv=carried[..., :-1], k_sum=carried[..., -1])


def _faster(T: int, H: int, *, follows: bool, decays: bool) -> str:
    """By multiply-adds a causal row of tiles costs T H a token, the state H^3: they meet at T = H^2.

    As kernels, forward and backward: 4.5 T H against 7 P H + 4.5 C H multiply-adds, with P = 3/4 H^2 features and
    chunks of C tokens. They meet at T = C + 1.2 H^2, 6K for H = 64 and 21K for H = 128. The states' products are
    smaller, each of their operands is made first, and 8 P / C H bytes a token go through memory: two thirds of the
    tiles' rate is assumed (an estimate from compiled programs), which gives 2 H^2.

    A decay that forgets after r tokens lets tiles skip all but 2 r / T of that, to a twentieth of the states' time;
    one that forgets nothing costs them T / (2 H^2) times it. Which it is, is not known before the data. Below 64 H^2
    tiles risk less.

    On a CPU, measured in both passes: without decay they meet at 4K for H = 32 and 10K for H = 64. With one that
    forgets in 300 tokens tiles take a third of the time at 8K for H = 32, a seventh for H = 64.
    """
    if follows:
        return "states"
    if dispatch.platform() == "cpu":
        return "states" if (1280 if decays else 160) * H <= T else "tiles"
    return "states" if (64 if decays else 2) * H * H <= T else "tiles"


def _kernel_obstacles(q: Array, k: Array, v: Array, form: str, follows: bool) -> dict[str, str | None]:
    def of(platform: str) -> str | None:
        if missing := dispatch.on(platform):
            return missing
        from kernels_pallas import second_order_attention, second_order_states

        if form == "states":
            if q.shape[1] == 1:
                return "one token is no chunk"
            return second_order_states.obstacle(q, k, v, platform=platform)
        return second_order_attention.obstacle(q, k, v, platform=platform, initial_state=follows or None)

    return {name: of(platform) for name, platform in PLATFORMS.items()}
