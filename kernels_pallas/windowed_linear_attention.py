"""Linear attention with a softmax over the nearest keys (LoLCATS, arXiv 2410.10254, eq. 7).

    e_ij = gamma exp(s_ij - max_j s_ij)      for the near keys j of i, s_ij = scale wq_i.wk_j
    l_ij = q_i.k_j                           for the far ones (features, applied outside)
    y_i  = sum_j (e_ij + l_ij) v_j / (sum_j (e_ij + l_ij) + eps)

Letters: B batch, T time, N heads, P features of q and k, H head dim, C tokens in a chunk, M tiles of C x C.

Two indices define the keys that token i sees: its document begins at `oldest`, its near keys begin at `nearest`, and
both ranges end at i itself. Terraced blocks, sliding windows, documents and cached keys are thus all handled in the
same way. `oldest` = -1 means that the initial state also belongs to this document.

**Tiles.** A chunk of queries sees the M tiles of keys up to its own, which contain every window. Only tiles at least
`first_far` chunks back may hold far keys; the state covers everything before the tiles, so it lags by M - 1 chunks:

    sliding, size C      M = 2, far keys in the previous tile
    terraced, size C     M = 2, no far keys in tiles if blocks and chunks are aligned: near pairs fill two tiles
                         M = 3, far keys in two of them if documents begin anywhere

    out = reach (q S)  +  sum over tiles [gamma exp(s - max) or q k^T, by the masks] v
    S  <- whole S + k^T (kept v)              for the tile that moves to the state;        P x H in float32

The near pairs come first, with a running maximum and sums that are rescaled as it grows; then gamma, the far pairs and
the state. (The maximum is part of the definition, not only a guard against overflow: far weights are not divided by it,
so it has a gradient, which goes to the key that attains it.) reach, kept and whole are 0 or 1 and separate documents.

**Backward.** With dn_i = dy_i / norm_i, b_i = -dn_i.y_i and dw_ij = dn_i.v_j + b_i the cotangent of a weight,

    dq_i  = sum_far  dw_ij k_j                 recurrence(dn, v, k)         bias b on the queries' side
    dk_j  = sum_far  dw_ij q_i                 recurrence(v, dn, q)         the same, reversed in time
    dv_j  = sum (e_ij + l_ij) dn_i             recurrence(k, q, dn)         with near pairs, reversed
    dwq_i = scale sum_near ds_ij wk_j          near(wq, wk; dn, v)
    dwk_j = scale sum_near ds_ij wq_i          near(wk, wq; v, dn)          reversed
    ds_ij = gamma (e'_ij dw_ij - [j attains i's maximum] total_i)      e' = e / gamma, total_i = sum_j e'_ij dw_ij
    dgamma = sum_i total_i

(If near keys have most of the weight, total_i is a small difference of large numbers: the rounding error of y enters it
times mass_i, the sum of e'_ij, and enters q_i.dq_i = -gamma total_i times the far weights. dgamma combines the two such
that the rounding error of y cancels.)

So one recurrence runs four times, as in linear_attention.py. Its state (S, S^T, dS^T or dS) covers everything before
the tiles. The near pairs need no state, so all their chunks run in parallel. If the cotangent of a far product has an
additional term (b_i), the recurrence carries a `row` next to the state: the sum of keys for the normaliser, or its
cotangent.
Only y, the normalisers and each query's maximum are saved for the backward pass.

**Cost** per token and head, terraces of 64 with C = 64, P = H = 128, bfloat16: forward reads q, k, wq, wk, v and writes
y, 1536 bytes; 4 M C H FLOPs for the near pairs and 4 P H for the state, 131 K. An H200 (4.3 TB/s, 790 TFLOP/s) needs
0.36 ns for the bytes and 0.17 for the products: memory bound. Computing the two parts separately would move 1.5 times
as many bytes: v is read twice, y is written twice, and one y is read again for the sum. Backward: 24 such tensors, 6144
bytes; near and far gradients are computed by separate programs, so that each has enough registers.

Arguments and results of a platform's `recurrence(arrays, plan, reverse=, last=)`. Rows are queries; in reverse, keys:

    q, k [B,T,n,P], v [B,T,n,V]      any n that divides N; without q only the states     out [B,T,N,V]
    near_q, near_k [B,T,n,H]         for the near pairs, with gamma [N,1]; with reverse also top
    nearest, oldest [B,T] int32      per query
    reach, kept [B,T], whole [B,T/C] kept and whole apply when chunk c is done
    bias [B,N,T]                     added to far scores, per query
    state [B,N,G,P,V] float32        before each of G pieces of T; row [B,N,G,V], sums [B,N,G,P]
                                     with sums, the output is normalised                  norm, top [B,N,T]
    last                             whether to return the states after each piece: last_state, last_row, last_sums

and of `near(arrays, plan, reverse=)`: takes near_q, near_k, the factors q, k of dw (dn and v), bias, top, and with
reverse also place and total; returns out, and without reverse each query's place of the maximum, total and mass
[B,N,T].

**Few heads.** A program loops over all of T, and B N programs may not fill a GPU. T is then cut into G pieces that run
in parallel; as in linear_attention.py, a first pass over k and v computes each piece's contribution to the state.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Float, Int

from kernels_pallas import windowed_linear_attention_gpu, windowed_linear_attention_tpu
from kernels_pallas.tiles import RESIDUALS, over_groups
from kernels_pallas.windowed_linear_attention_plan import Plan

SIZES = (16, 32, 64, 128)
MOST_TILES = 9  # tiles are unrolled in a kernel
SLOTS = 132  # programs that an H200 runs at once: one per multiprocessor, limited by registers
PIECE = 1024  # minimum number of tokens per program


def obstacle(
    q: Array, k: Array, v: Array, window_q: Array, *, kind: str, size: int, platform: str
) -> str | None:
    """Why the kernel does not support the arrays, or None. Anything with a shape and a dtype serves as an array."""
    P, H = q.shape[-1], v.shape[-1]
    if P not in SIZES or H not in SIZES or window_q.shape[-1] not in SIZES:
        return (
            f"{P} features and head dims {H} and {window_q.shape[-1]}: "
            f"expected each one of {', '.join(map(str, SIZES))}"
        )
    dtype = jnp.result_type(q, k, v, window_q)
    if dtype not in (jnp.float32, jnp.bfloat16):
        return f"{dtype}: expected float32 or bfloat16"
    if platform == "gpu" and dtype == jnp.float32 and max(P, H, window_q.shape[-1]) > 64:
        return (
            f"float32 with {P} features and head dim {H}: registers hold up to 64 of each; expected bfloat16"
        )
    chunk = _kernels(platform).chunk(dtype)
    if tiles(kind, size, chunk, aligned=False)[0] > MOST_TILES:
        return f"a {kind} window of {size}: it must lie within {MOST_TILES} tiles of {chunk}; expected a smaller one"
    return None


def tiles(kind: str, size: int, C: int, *, aligned: bool) -> tuple[int, int]:
    """(M, first_far): the number of tiles, at least 2, that windows reach back over; the first one with far keys.

    Tiles are counted backwards from the chunk's own, 0. aligned: blocks begin at position 0, so that chunks begin at
    only a few positions of a block.
    """
    begins = np.arange(0, size, np.gcd(C, size) if aligned else 1)[:, None]
    place = np.arange(C)
    back = (begins + place) % size + size if kind == "terraced" else np.full((1, C), size - 1)
    nearest = place - back  # counted from the chunk's first token
    return max(2, 1 - nearest.min().item() // C), max(0, -nearest.max().item() // C + 1)


def windowed_linear_attention(
    q: Float[Array, "B T Nq P"],
    k: Float[Array, "B T Nk P"],
    v: Float[Array, "B T Nv H"],
    window_q: Float[Array, "B T N Hs"],
    window_k: Float[Array, "B T K Hs"],
    gamma: Float[Array, " N"],
    *,
    kind: str,
    size: int,
    nearest: Int[Array, "B T"] | None = None,
    oldest: Int[Array, "B T"] | None = None,
    eps: float = 1e-12,
    initial_state: tuple[Array, Array] | None = None,
    platform: str,
    interpret: bool = False,
) -> Float[Array, "B T N H"]:
    """y in v's dtype, with gradients for the arrays and the state. In arrays with fewer heads,
    consecutive heads share one.

    Args:
      kind, size: "sliding" or "terraced"; no token has near keys outside its window.
      nearest, oldest: the position of each token's first near key, and of the first token of its document (-1: the
        document of the initial state). Both are at most the token's own position, except for padding: its `nearest`
        lies after it, so it sees far keys only. None: one document, with terraced blocks that begin at 0.
      initial_state: (S [B, N, P, H], z [B, N, P]) float32, the sums over all tokens before position 0.
      platform: "gpu" or "tpu".
      interpret: run the kernel in Pallas' interpreter, on any platform, for tests.
    """
    B, T, N, _ = window_q.shape
    dtype = v.dtype
    q, k, v, window_q, window_k = (
        x.astype(jnp.result_type(q, k, v, window_q, window_k)) for x in (q, k, v, window_q, window_k)
    )
    plan = _plan(v.dtype, B, T, N, kind, size, nearest is None, platform, interpret)
    plan = dataclasses.replace(plan, scale=window_q.shape[3] ** -0.5, eps=eps)
    place = jnp.arange(T, dtype=jnp.int32)
    if nearest is None or oldest is None:
        back = place % size + size if kind == "terraced" else size - 1
        nearest = jnp.broadcast_to(jnp.maximum(place - back, 0), (B, T))
        oldest = jnp.full((B, T), 0 if initial_state is None else -1, jnp.int32)
    short = -T % (plan.chunk * plan.split)
    q, k, v, window_q, window_k = (_pad(x, short) for x in (q, k, v, window_q, window_k))
    nearest, oldest = (_pad(x.astype(jnp.int32), short, T + short) for x in (nearest, oldest))
    y = _attend(
        q, k, v, window_q, window_k, gamma.astype(jnp.float32), (nearest, oldest), initial_state, plan
    )
    return y[:, :T].astype(dtype)


def _pad(x: Array, short: int, value: int = 0) -> Array:
    widths = ((0, 0), (0, short)) + ((0, 0),) * (x.ndim - 2)
    return jnp.pad(x, widths, constant_values=value) if short else x


def _kernels(platform: str):
    return windowed_linear_attention_tpu if platform == "tpu" else windowed_linear_attention_gpu


def _plan(dtype, B, T, N, kind, size, aligned, platform, interpret) -> Plan:
    chunk = _kernels(platform).chunk(dtype)
    split = 1 if platform == "tpu" else max(1, min(SLOTS // (B * N), T // PIECE))
    reach, first_far = tiles(kind, size, chunk, aligned=aligned)
    return Plan(platform, interpret, N, 1.0, 0.0, chunk, reach, first_far, split)


# -------------------------------------------------------------------------------------------------- document boundaries


def _vectors(places: tuple[Array, Array], plan: Plan) -> tuple[dict, dict]:
    """nearest, oldest, reach, kept and whole for the recurrence, and for the reversed one.

    A query sees the state if its document began before the tiles. The state after a chunk of keys belongs to the
    document of its last token: keys of earlier documents are dropped, and so is the state before the chunk if that
    document began inside it.
    """
    nearest, oldest = places
    (B, T), C, lag = oldest.shape, plan.chunk, plan.tiles - 1
    chunks, begin = (
        jnp.where(oldest < 0, -T - lag * C, oldest).reshape(B, -1, C),
        jnp.arange(0, T, C)[:, None],
    )
    last = chunks[..., -1:]
    sees = (chunks < begin - lag * C).astype(jnp.float32)
    stays = (begin + jnp.arange(C) >= last).astype(jnp.float32)
    whole = (last < begin).astype(jnp.float32)

    def later(x, fill):  # shifts by `lag` chunks: chunk c gets the values of chunk c - lag
        return jnp.pad(x, ((0, 0), (lag, 0), (0, 0)), constant_values=fill)[:, : T // C]

    def flat(**vectors):
        return {name: x.reshape(B, -1) for name, x in vectors.items()}

    ahead = jnp.pad(sees, ((0, 0), (0, lag), (0, 0)))[:, lag:]
    own = {"nearest": nearest, "oldest": jnp.maximum(oldest, 0)}
    forward = own | flat(reach=sees, kept=later(stays, 0), whole=later(whole, 1))
    return forward, own | flat(reach=stays, kept=ahead, whole=whole)


# ------------------------------------------------------------------------------------------------------ the recurrence


def _run(arrays: dict, plan: Plan, *, reverse: bool = False, last: bool = False) -> dict:
    """The recurrence over all of T. Initial and final states are [B, N, ...]."""
    carried = [name for name in ("state", "row", "sums") if name in arrays]
    run = functools.partial(_kernels(plan.platform).recurrence, plan=plan, reverse=reverse)
    if plan.split == 1:
        entering = {name: arrays[name][:, :, None] for name in carried}
    else:
        entering = _entering(arrays, carried, plan, run, reverse)
    done = run(arrays | entering, last=last)
    end = 0 if reverse else -1
    return {name: x[:, :, end] if name.startswith("last_") else x for name, x in done.items()}


def _entering(arrays: dict, carried: list[str], plan: Plan, run, reverse: bool) -> dict:
    """The states before each piece: the sum of the contributions of all earlier pieces."""
    G = plan.split
    needed = ("k", "v", "kept", "whole", "nearest", *(["bias"] if reverse and "bias" in arrays else []))
    zeros = {
        name: jnp.zeros((*x.shape[:2], G, *x.shape[2:]), jnp.float32)
        for name, x in arrays.items()
        if name in carried
    }
    own = run({name: arrays[name] for name in needed} | zeros, last=True)
    whole = jnp.prod(arrays["whole"].reshape(-1, G, arrays["whole"].shape[1] // G), axis=-1)

    def step(state, x):
        whole, own = x
        new = {n: s * whole.reshape(-1, *(1,) * (s.ndim - 1)) + own[n] for n, s in state.items()}
        return new, state

    xs = whole.T, {name: jnp.moveaxis(own[f"last_{name}"], 2, 0) for name in carried}
    _, entering = lax.scan(step, {name: arrays[name] for name in carried}, xs, reverse=reverse)
    return {name: jnp.moveaxis(x, 0, 2) for name, x in entering.items()}


# --------------------------------------------------------------------------------------------------- values, gradients


@functools.partial(jax.custom_vjp, nondiff_argnums=(8,))
def _attend(q, k, v, window_q, window_k, gamma, places, state, plan: Plan):
    return _forward(q, k, v, window_q, window_k, gamma, places, state, plan)[0]


def _forward(q, k, v, window_q, window_k, gamma, places, state, plan: Plan):
    vectors, _ = _vectors(places, plan)
    S, z = _states(q, v, state, plan)
    near = {"near_q": window_q, "near_k": window_k, "gamma": gamma[:, None]}
    done = _run({"q": q, "k": k, "v": v, **near, "state": S, "sums": z, **vectors}, plan)
    done = {name: checkpoint_name(x, RESIDUALS) for name, x in done.items()}
    return done["out"], (q, k, v, window_q, window_k, gamma, places, state, done)


def _states(q, v, state, plan: Plan) -> tuple[Array, Array]:
    if state is not None:
        return state[0].astype(jnp.float32), state[1].astype(jnp.float32)
    B, P, H = q.shape[0], q.shape[3], v.shape[3]
    return jnp.zeros((B, plan.heads, P, H), jnp.float32), jnp.zeros((B, plan.heads, P), jnp.float32)


def _backward(plan: Plan, residuals, dy):
    q, k, v, window_q, window_k, gamma, places, state, done = residuals
    forward, reverse = _vectors(places, plan)
    S, z = _states(q, v, state, plan)
    norm = jnp.swapaxes(done["norm"], 1, 2)[..., None]
    dn = (dy / jnp.where(norm == 0, 1.0, norm)).astype(dy.dtype)
    b = -jnp.sum(dn.astype(jnp.float32) * done["out"].astype(jnp.float32), axis=-1)
    scores, turned = {"bias": jnp.swapaxes(b, 1, 2)}, jnp.swapaxes(S, 2, 3)
    dq = _run({"q": dn, "k": v, "v": k, "state": turned, "row": z, **scores, **forward}, plan)["out"]
    d_turned, d_row = jnp.zeros_like(turned), jnp.zeros_like(z)
    of_k = {"q": v, "k": dn, "v": q, "state": d_turned, "row": d_row, **scores, **reverse}
    of_k = _run(of_k, plan, reverse=True, last=True)
    near = {"gamma": gamma[:, None], "top": done["top"]}
    of_v = {"q": k, "k": q, "v": dn, "near_q": window_k, "near_k": window_q, **near}
    of_v = _run({**of_v, "state": jnp.zeros_like(S), **reverse}, plan, reverse=True)
    soft = _kernels(plan.platform).near
    near |= scores
    of_wq = soft({"near_q": window_q, "near_k": window_k, "q": dn, "k": v, **near, **forward}, plan)
    near |= {name: of_wq[name] for name in ("place", "total")}
    of_wk = soft(
        {"near_q": window_k, "near_k": window_q, "q": v, "k": dn, **near, **reverse}, plan, reverse=True
    )
    found = (dq, of_k["out"], of_v["out"], of_wq["out"], of_wk["out"])
    given = zip(found, (q, k, v, window_q, window_k), strict=True)
    grads = [over_groups(d, x.shape[2]).astype(x.dtype) for d, x in given]
    d_gamma = jnp.sum(_totals(of_wq, q, dq, b, gamma, done["norm"], plan.eps), axis=(0, 2))
    return *grads, d_gamma, None, None if state is None else _first(of_k, q, dn, b, forward["reach"], plan)


def _totals(near: dict, q: Array, dq: Array, b: Array, gamma: Array, norm: Array, eps: float) -> Array:
    """total_i [B, N, T], combined from the near and the far side such that the rounding error of y cancels."""
    q = jnp.repeat(q, dq.shape[2] // q.shape[2], axis=2).astype(jnp.float32)
    # The near part, the far part and eps b sum to 0.
    far = jnp.sum(q * dq.astype(jnp.float32), axis=-1) + eps * b
    own = gamma[:, None] * near["mass"]
    rest = norm - eps - own
    both = jnp.where(own + rest == 0, 1.0, own + rest)
    return (rest * near["total"] - near["mass"] * jnp.swapaxes(far, 1, 2)) / both


def _first(of_k: dict, q: Array, dn: Array, b: Array, reach: Array, plan: Plan) -> tuple[Array, Array]:
    """The cotangent of the initial state. The reversed recurrence ends M - 1 chunks early; this adds those queries."""
    T = min((plan.tiles - 1) * plan.chunk, q.shape[1])
    q, dn, b = (x[:, :T].astype(jnp.float32) for x in (q, dn, b))
    q = jnp.repeat(q, plan.heads // q.shape[2], axis=2) * reach[:, :T, None, None]
    dS, dz = jnp.einsum("btnp,btnh->bnph", q, dn), jnp.einsum("btnp,btn->bnp", q, b)
    return dS + jnp.swapaxes(of_k["last_state"], 2, 3), dz + of_k["last_row"]


_attend.defvjp(_forward, _backward)
