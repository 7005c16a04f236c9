"""Linear attention with an optional scalar decay per head (Mamba-2's SSD): one recurrence, run four times.

    S_t = e^{a_t} S_{t-1} + k_t v_t^T      y_t = q_t S_t      with normalize: y_t = q_t S_t / (q_t z_t + eps)
    z_t = e^{a_t} z_{t-1} + k_t

Letters: B batch, T time, N heads, P features of q and k, H head dim of v, C tokens in a chunk.

The recurrence, one chunk at a time. With g the running sum of a from the chunk's first token (within the chunk, so that
no exponent below is positive or a difference of large sums) and S the state that enters the chunk:

    out = e^g (q S) + [(q k^T) . W] v     W_ij = e^{g_i - g_j} for j <= i, else 0        C x C, never stored
    S  <- e^{g_C} S + k^T (e^{g_C - g} v)                                                P x H in float32

These are four products, 2 C (P + H) + 4 P H FLOPs per token and head: 98 K for C = 64 and P = H = 128. q, k, v are read
and y is written once, 1024 bytes in bfloat16. An H200 (4.3 TB/s, 790 TFLOP/s) needs 0.24 ns for the bytes and 0.12 ns
for the products, a v5e (819 GB/s, 197 TFLOP/s; C = 256, so 197 K) 1.25 and 1.0 ns. So a single pass is memory bound.
Kernels that write the chunks' states and read them again move 2.5 times the bytes (flash-linear-attention's `chunk_h`
and `chunk_o`; the five kernels of Mamba-2, arXiv 2405.21060, sections 6 and 7).

The backward pass uses the same recurrence. Written as sums over pairs, with w_ij = e^{a_{j+1} + ... + a_i} and dy the
cotangent of y,

    y_i  = sum_{j<=i} w_ij (q_i.k_j) v_j          = recurrence(q,  k,  v)
    dq_i = sum_{j<=i} w_ij (dy_i.v_j) k_j         = recurrence(dy, v,  k)
    dk_j = sum_{i>=j} w_ij (v_j.dy_i) q_i         = recurrence(v,  dy, q)    reversed in time
    dv_j = sum_{i>=j} w_ij (k_j.q_i) dy_i         = recurrence(k,  q,  dy)   reversed in time

and the states are S, S^T, dS^T and dS. So no chunk's state is stored, one kernel serves all passes, and 3072 bytes per
token and head go through memory, where the minimum is 1792. In reverse, e^g and e^{g_C - g} swap roles and the triangle
is the upper one.

The normaliser adds a vector z to the state, and y = num / norm. With dnum = dy / norm instead of dy, dnorm = -dnum.y,
the pairs' products dy_i.v_j become dnum_i.v_j + dnorm_i: a `bias` on the query side for dq and on the key side for dk,
and a `row` of P numbers next to the state, z or its cotangent.

The decay's gradient needs no matrix products: da_t sums the contributions of pairs of a key before t and a query at or
after t. With R_i = q_i.dq_i and K_j = k_j.dk_j it is sum_{i>=t} (R_i - K_i) up to any e, plus <dS_e, S_e>. Over a whole
sequence rounding errors would dominate the sum, so the states at the edges of spans of `SPAN` tokens are kept. R_i and
K_i share what a token adds to itself, and with a strong decay differ by little else: so dq and dk are written in
float32 if there are decays, which takes 512 of 3584 bytes.

Documents in a row (`runs`) only change masks: a token sees keys from `limit` on, and the entering state if it belongs
to the token's document. The leaving state holds only the last token's document.

Small batches. A program walks all of T, and B N H / 64 programs may not fill a GPU. T is then cut into `split` pieces
that are walked in parallel: a first pass over k and v computes each piece's contribution to the state, and a sum over
the few pieces gives the states that enter them (as Dao & Gu, section 8.2, do across devices).

Arguments and results of a platform's `recurrence(arrays, heads=, reverse=, eps=, span=, chunk=, out=, interpret=)`:

    q, k [B,T,n,P], v [B,T,n,V]   any n that divides N      out [B,T,N,V] of dtype `out`
    state [B,N,P,V] float32       the entering state        states [B,N,T/span,P,V]: after each span
    fine [B,n,T]                  or none: what is left of g, decay then is its multiples of a power of 2
    decay, reach, keep [B,n,T]    g + any, e^g, e^{g_C - g} (reach and keep masked with runs, exchanged in reverse)
    limit [B,T]                   first key in the chunk that counts, in reverse the last
    sums [B,N,P]                  z; with it the output is normalised      all_sums [B,N,T/span,P], norm [B,N,T]
    row [B,N,V]                   with query_bias or key_bias [B,N,T]      rows [B,N,T/span,V]
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Float, Int

from kernels_pallas import backends, linear_attention_gpu, linear_attention_tpu
from kernels_pallas.tiles import GONE, RESIDUALS, in_parts, last_tokens, over_groups, sums_by_document

SIZES = (16, 32, 64, 128)
SPAN = 512  # tokens; the states at span edges take half of y's bytes, and rounding errors in da grow with sqrt(SPAN)
SLOTS = 264  # programs that an H200 runs at once: two on each of 132 multiprocessors
PIECE = 1024  # minimum number of tokens that one program walks


def obstacle(q: Array, k: Array, v: Array, *, platform: str) -> str | None:
    """Why the kernel does not support these arrays, or None."""
    if platform == "mosaic" and (reason := backends.missing("mosaic")):
        return reason
    P, H = q.shape[-1], v.shape[-1]
    if P not in SIZES or H not in SIZES:
        return f"{P} features and head dim {H}: expected each one of {', '.join(map(str, SIZES))}"
    dtype = jnp.result_type(q, k, v)
    if dtype not in (jnp.float32, jnp.bfloat16):
        return f"{dtype}: expected float32 or bfloat16"
    if platform != "tpu" and dtype == jnp.float32 and max(P, H) > 64:
        return (
            f"float32 with {P} features and head dim {H}: registers hold up to 64 of each; expected bfloat16"
        )
    return None


def _kernels(platform: str):
    """The module with this platform's recurrence; Mosaic GPU's takes a second to import, so only where it is used."""
    if platform == "mosaic":
        from kernels_pallas import linear_attention_mosaic

        return linear_attention_mosaic
    return linear_attention_tpu if platform == "tpu" else linear_attention_gpu


def linear_attention(
    q: Float[Array, "B T Nq P"],
    k: Float[Array, "B T Nk P"],
    v: Float[Array, "B T Nv H"],
    *,
    log_decay: Float[Array, "B T Na"] | None = None,
    normalize: bool = False,
    eps: float = 1e-12,
    runs: Int[Array, "B T"] | None = None,
    initial_state: tuple[Array, Array | None] | None = None,
    platform: str,
    interpret: bool = False,
) -> tuple[Float[Array, "B T N H"], tuple[Array, Array | None]]:
    """(y in v's dtype, (S [B, N, P, H], z [B, N, P] or None without normalize) after the last token, float32).

    Args:
      log_decay: a <= 0; values below -104, where e^a is 0 in float32, are a hard reset. N is the largest number of
        heads; in arrays with fewer, consecutive heads share one.
      runs: the index of each token's document, non-decreasing, 0 for that of the initial state. Padding must have the
        index of the token before it, k = 0 and a = 0.
      platform: "gpu" (through Triton), "mosaic" (a Hopper GPU, through Mosaic GPU) or "tpu".
      interpret: run on a CPU, for tests.

    Raises:
      ValueError: Mosaic GPU with a jax that is too old for it.
    """
    if platform == "mosaic" and (reason := backends.missing("mosaic")):
        raise ValueError(f"linear_attention kernel: {reason}")
    if normalize and platform == "mosaic":
        options = {"log_decay": log_decay, "runs": runs, "platform": platform, "interpret": interpret}
        return _normalized(q, k, v, initial_state, eps, options)
    B, T, _, P = q.shape
    H, dtype = v.shape[3], v.dtype
    N = max(x.shape[2] for x in (q, k, v, log_decay) if x is not None)
    q, k, v = (x.astype(jnp.result_type(q, k, v)) for x in (q, k, v))
    kv, z = (None, None) if initial_state is None else initial_state
    kv = jnp.zeros((B, N, P, H), jnp.float32) if kv is None else kv
    z = (jnp.zeros((B, N, P), jnp.float32) if z is None else z) if normalize else None
    plan = _plan(B, T, N, P, H, q.dtype, log_decay is not None, eps, platform, interpret)
    short = -T % (plan.span * plan.split)
    q, k, v = (_pad(x, short) for x in (q, k, v))
    if log_decay is not None:
        log_decay = _pad(jnp.maximum(log_decay.astype(jnp.float32), GONE), short)
    if runs is not None:
        runs = jnp.pad(runs, ((0, 0), (0, short)), mode="edge")
    y, state = _attend(q, k, v, log_decay, runs, kv, z, plan)
    return y[:, :T].astype(dtype), state


def _normalized(q, k, v, initial_state, eps: float, options: dict) -> tuple[Array, tuple[Array, Array]]:
    """The normalised operator by the other one: a column of ones in v makes the normaliser a column of the output."""
    H, wide = v.shape[3], _kernels("mosaic").with_ones(v)
    if initial_state is not None and (kv := initial_state[0]) is not None:
        z = jnp.zeros(kv.shape[:3], jnp.float32) if initial_state[1] is None else initial_state[1]
        kv = jnp.concatenate([kv, z[..., None].astype(kv.dtype)], axis=3)
        initial_state = jnp.pad(kv, ((0, 0),) * 3 + ((0, wide.shape[3] - H - 1),)), None
    y, (kv, _) = linear_attention(q, k, wide, initial_state=initial_state, **options)
    norm = y[..., H : H + 1].astype(jnp.float32) + eps
    y = y[..., :H].astype(jnp.float32) / jnp.where(norm == 0, 1.0, norm)
    return y.astype(v.dtype), (kv[..., :H], kv[..., H])


def _pad(x: Array, short: int) -> Array:
    return jnp.pad(x, ((0, 0), (0, short)) + ((0, 0),) * (x.ndim - 2)) if short else x


@dataclasses.dataclass(frozen=True)
class Plan:
    """How T is divided: into `split` pieces, pieces into spans, spans into chunks (sizes in tokens, except `split`)."""

    platform: str
    interpret: bool
    heads: int
    eps: float
    chunk: int
    span: int
    split: int


def _plan(B, T, N, P, H, dtype, decays, eps, platform, interpret) -> Plan:
    split = 1
    if platform == "tpu":
        chunk = linear_attention_tpu.chunk(T, dtype)
    else:
        chunk = _kernels(platform).chunk(dtype)
        programs = B * N * max(1, min(P, H) // 64)
        split = max(1, min(SLOTS // programs, T // PIECE))
    chunks = -(-T // (chunk * split))
    spans = -(-chunks * chunk // SPAN) if decays else 1
    return Plan(platform, interpret, N, eps, chunk, -(-chunks // spans) * chunk, split)


# ------------------------------------------------------------------------------------------------ decays and documents


def _vectors(log_decay: Array | None, runs: Array | None, C: int, exact: bool) -> tuple[dict, dict]:
    """decay, reach, keep and limit of the forward and of the reversed recurrence. exact: decay in two parts."""
    if log_decay is None and runs is None:
        return {}, {}
    reach = keep = jnp.ones((1, 1, 1, 1), jnp.float32)
    decay, first, last, run, begins = {}, {}, {}, None, None
    if runs is not None:
        run = runs.reshape(runs.shape[0], -1, C)
        begins = jnp.diff(run, axis=2, prepend=run[..., :1]) != 0
    if log_decay is not None:
        B, T, n = log_decay.shape
        by_chunk = jnp.swapaxes(log_decay, 1, 2).reshape(B, n, T // C, C)
        g = in_parts(by_chunk, None if begins is None else begins[:, None])
        rest = jnp.sum(g[..., -1:] - g, axis=2)  # above 0 for some tokens of earlier documents, which are masked below
        reach, keep = jnp.exp(jnp.sum(g, axis=2)), jnp.exp(jnp.minimum(rest, 0))
        # Only differences matter: centring the values halves the rounding error if a chunk holds many resets.
        middle = g[..., C // 2, None]
        g -= middle if run is None else jnp.where((run == run[..., C // 2, None])[:, None, None], middle, 0)
        decay = {"decay": (g[:, :, 0] if exact else jnp.sum(g, axis=2)).reshape(B, n, T)}
        if exact:
            decay["fine"] = g[:, :, 1].reshape(B, n, T)
    if runs is not None and run is not None and begins is not None:
        (B, T), place = runs.shape, jnp.arange(C)
        before = jnp.pad(run[:, :-1, -1:], ((0, 0), (1, 0), (0, 0)))
        reach, keep = reach * (run == before)[:, None], keep * (run == run[..., -1:])[:, None]
        ends = jnp.diff(run, axis=2, append=run[..., -1:]) != 0
        first = {"limit": lax.cummax(jnp.where(begins, place, 0), axis=2).reshape(B, T)}
        last = {"limit": lax.cummin(jnp.where(ends, place, C - 1), axis=2, reverse=True).reshape(B, T)}
    reach, keep = (x.reshape(*x.shape[:2], -1) for x in (reach, keep))
    return {**decay, **first, "reach": reach, "keep": keep}, {**decay, **last, "reach": keep, "keep": reach}


# ------------------------------------------------------------------------------------------------------ the recurrence


def _run(
    arrays: dict, plan: Plan, *, out: jnp.dtype, reverse: bool = False, entering: dict | None = None
) -> dict:
    """The recurrence over all of T. entering: the states that enter each piece, if already known."""
    recurrence = functools.partial(
        _kernels(plan.platform).recurrence,
        heads=plan.heads,
        reverse=reverse,
        eps=plan.eps,
        chunk=plan.chunk,
        out=out,
        interpret=plan.interpret,
    )
    if plan.split == 1:
        return recurrence(arrays, span=plan.span)
    S, carried = plan.split, {name: arrays[name] for name in ("state", "row", "sums") if name in arrays}
    pieces = {name: _cut(name, x, S) for name, x in arrays.items() if name not in carried}
    pieces |= entering or _entering(pieces, carried, S, recurrence, reverse)
    return {name: _join(name, x, S) for name, x in recurrence(pieces, span=plan.span).items()}


def _entering(pieces: dict, first: dict, S: int, recurrence, reverse: bool) -> dict:
    """The states that enter each piece: the decayed sum of the contributions of all earlier pieces."""
    T, C = pieces["v"].shape[1], recurrence.keywords["chunk"]
    arrays = {
        name: x for name, x in pieces.items() if name not in ("q", "decay", "fine", "limit", "query_bias")
    }
    zeros = {name: jnp.zeros((x.shape[0] * S, *x.shape[1:]), x.dtype) for name, x in first.items()}
    own = recurrence({**arrays, **zeros}, span=T)
    own = {
        name: own[after]
        for name, after in (("state", "states"), ("row", "rows"), ("sums", "all_sums"))
        if name in first
    }
    own = {name: jnp.swapaxes(x.reshape(-1, S, *x.shape[1:2], *x.shape[3:]), 0, 1) for name, x in own.items()}
    whole = jnp.ones((S, 1, 1), jnp.float32)
    if "keep" in arrays:
        whole = jnp.prod(arrays["keep" if reverse else "reach"][..., C - 1 :: C], axis=-1)
        whole = jnp.swapaxes(whole.reshape(-1, S, whole.shape[1]), 0, 1)
        whole = jnp.repeat(whole, recurrence.keywords["heads"] // whole.shape[2], axis=2)

    def step(state, x):
        whole, own = x
        new = {n: s * whole.reshape(*whole.shape, *(1,) * (s.ndim - 2)) + own[n] for n, s in state.items()}
        return new, state

    _, entering = lax.scan(step, first, (whole, own), reverse=reverse)
    return {name: jnp.swapaxes(x, 0, 1).reshape(-1, *x.shape[2:]) for name, x in entering.items()}


def _at_pieces(edges: Array, S: int) -> Array:
    """Selects the states at the beginnings of pieces from those at the beginnings of spans [B, N, spans, ...]."""
    x = jnp.swapaxes(edges[:, :, :: edges.shape[2] // S], 1, 2)
    return x.reshape(-1, *x.shape[2:])


def _cut(name: str, x: Array, S: int) -> Array:
    """Reshapes an array so that pieces of T become rows of the batch."""
    if name in ("q", "k", "v", "limit"):
        return x.reshape(x.shape[0] * S, -1, *x.shape[2:])
    x = x.reshape(*x.shape[:2], S, -1)
    return jnp.swapaxes(x, 1, 2).reshape(-1, x.shape[1], x.shape[3])


def _join(name: str, x: Array, S: int) -> Array:
    """The inverse of _cut: joins the pieces of a result."""
    if name == "out":
        return x.reshape(-1, S * x.shape[1], *x.shape[2:])
    x = jnp.swapaxes(x.reshape(-1, S, *x.shape[1:]), 1, 2)
    return x.reshape(*x.shape[:2], -1, *x.shape[4:])


# --------------------------------------------------------------------------------------------------- values, gradients


def _exact(plan: Plan, q: Array) -> bool:
    """Whether decays need two parts for accuracy; chunks of 16 and bfloat16 do not."""
    return plan.platform != "gpu" and q.dtype == jnp.float32


@functools.partial(jax.custom_vjp, nondiff_argnums=(7,))
def _attend(q, k, v, log_decay, runs, kv, z, plan: Plan):
    return _forward(q, k, v, log_decay, runs, kv, z, plan)[0]


def _forward(q, k, v, log_decay, runs, kv, z, plan: Plan):
    vectors, _ = _vectors(log_decay, runs, plan.chunk, _exact(plan, q))
    sums = {} if z is None else {"sums": z}
    done = _run({"q": q, "k": k, "v": v, "state": kv, **vectors, **sums}, plan, out=v.dtype)
    done = {name: checkpoint_name(x, RESIDUALS) for name, x in done.items()}
    result = done["out"], (done["states"][:, :, -1], done["all_sums"][:, :, -1] if sums else None)
    if not sums:
        del done["out"]  # only the division's gradient needs it
    return result, (q, k, v, log_decay, runs, kv, z, done)


def _backward(plan: Plan, residuals, cotangents):
    q, k, v, log_decay, runs, kv, z, done = residuals
    dy, (d_kv, d_z) = cotangents
    forward, reverse = _vectors(log_decay, runs, plan.chunk, _exact(plan, q))
    into_q, into_k = {}, {}
    if z is not None:
        norm = jnp.swapaxes(done["norm"], 1, 2)[..., None]
        dy = (dy / jnp.where(norm == 0, 1.0, norm)).astype(dy.dtype)
        d_norm = -jnp.sum(dy.astype(jnp.float32) * done["out"].astype(jnp.float32), axis=-1)
        bias = jnp.swapaxes(d_norm, 1, 2)
        into_q, into_k = {"query_bias": bias, "row": z}, {"key_bias": bias, "row": d_z}
    turned = functools.partial(jnp.swapaxes, axis1=2, axis2=3)
    entering = {"state": turned(_at_pieces(_edges(kv, done["states"])[:, :, :-1], plan.split))}
    if z is not None:
        entering["row"] = _at_pieces(_edges(z, done["all_sums"])[:, :, :-1], plan.split)
    of_q = {"q": dy, "k": v, "v": k, "state": turned(kv), **forward, **into_q}
    of_v = {"q": k, "k": q, "v": dy, "state": d_kv, **reverse}
    of_k = {"q": v, "k": dy, "v": q, "state": turned(d_kv), **reverse, **into_k}
    wide = q.dtype if log_decay is None else jnp.dtype(jnp.float32)  # what a token adds to itself cancels below
    dq = _run(of_q, plan, out=wide, entering=entering)["out"]
    to_v = _run(of_v, plan, out=v.dtype, reverse=True)
    to_k = _run(of_k, plan, out=wide, reverse=True)
    dk, dv, d_kv_before = to_k["out"], to_v["out"], to_v["states"]
    da = None
    if log_decay is not None:
        change = _inner(q, dq) - _inner(k, dk)
        across = _across(done["states"], d_kv_before, kv, d_kv)
        if z is not None:
            across += _across(done["all_sums"], to_k["rows"], z, d_z)
        da = over_groups(_pairs_across(change, across, plan.span, runs), log_decay.shape[2])
    dq, dk, dv = (over_groups(d, x.shape[2]).astype(x.dtype) for d, x in ((dq, q), (dk, k), (dv, v)))
    return dq, dk, dv, da, None, d_kv_before[:, :, 0], None if z is None else to_k["rows"][:, :, 0]


def _inner(x: Array, dx: Array) -> Array:
    """x . dx for each token and head of dx, float32."""
    B, T, n, P = x.shape
    dx = dx.reshape(B, T, n, -1, P).astype(jnp.float32)
    return jnp.sum(dx * x[:, :, :, None].astype(jnp.float32), axis=-1).reshape(B, T, -1)


def _edges(state: Array, states: Array) -> Array:
    """The states at all edges of spans, beginning with the initial state."""
    return jnp.concatenate([state[:, :, None], states], axis=2)


def _across(states: Array, d_states: Array, state: Array, d_state: Array) -> Array:
    """The contribution <dS, S> of pairs across each span edge, [B, spans + 1, N], including the outer edges."""
    states = _edges(state, states)
    d_states = jnp.concatenate([d_states, d_state[:, :, None]], axis=2)
    return jnp.swapaxes(jnp.sum(d_states * states, axis=range(3, states.ndim)), 1, 2)


def _pairs_across(change: Array, across: Array, span: int, runs: Array | None) -> Array:
    """The sum over the pairs that a_t decays, for every t: [B, T, N].

    Up to the end of t's span, or of its document in it, this is a sum of `change`. The value at their start is known
    from the states, 0 where a document starts. It gives the rounding error that accumulates up to there, which is
    subtracted in proportion to the distance.
    """
    B, T, N = change.shape
    change = jnp.swapaxes(change, 1, 2).reshape(B, N, -1, span)
    before, after = (jnp.swapaxes(x, 1, 2)[..., None] for x in (across[:, :-1], across[:, 1:]))
    if runs is None:
        sums = lax.cumsum(change, axis=3, reverse=True) + after
        sums += (before - sums[..., :1]) * ((span - jnp.arange(span)) / span)
    else:
        run, place = runs.reshape(B, 1, -1, span), jnp.arange(span)
        ends, first = last_tokens(run), jnp.diff(run, axis=3, prepend=-1) != 0
        begin = lax.cummax(jnp.where(first, place, 0), axis=3)
        end = lax.cummin(jnp.where(ends, place, span - 1), axis=3, reverse=True) + 1
        sums = sums_by_document(change, ends, reverse=True) + jnp.where(run == run[..., -1:], after, 0)
        at_first = sums_by_document(jnp.where(first, sums, 0), first)
        sums += (jnp.where(begin == 0, before, 0) - at_first) * ((end - place) / (end - begin))
    return jnp.swapaxes(sums.reshape(B, N, T), 1, 2)


_attend.defvjp(_forward, _backward)
