"""The passes of `windowed_linear_attention.py` on a TPU.

The grid is (rows, groups of heads, chunks), with chunks in sequential order. Everything that a step needs from the
chunks before it (with reverse: after it) stays in VMEM: the states, and a ring buffer of the last M - 1 chunks of the
arrays on the tiles' side (near_k, k, v; with reverse also the per-query values). So every array is read once. Arrays
are head-major, [B, N, T, P], so that a head's chunk is a plain matrix. Values per token come as float32 rows and are
transposed to columns all at once, since each transposition costs a pass of the XLU. Masks are computed once per step,
for all its heads. The scores of all M tiles exist at the same time, so the maximum of a row needs no rescaling.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas.windowed_linear_attention_plan import NEVER, Plan

STATES = ("state", "row", "sums")
OF_ROWS = ("nearest", "oldest", "reach", "kept", "whole")
OF_HEADS = ("bias", "top", "place", "total", "mass", "norm")
OF_QUERIES = ("nearest", "oldest", "bias", "top", "place", "total")


def chunk(dtype) -> int:
    """Tokens per chunk: the lanes of a register, but not more, since windows are covered by whole tiles."""
    return 128


def most_heads(dtype) -> int:
    """The maximum number of heads per step.

    Bundles of a forward step that libtpu reports for a v5e (1.5 GHz), for P = H = 128, terraces of 64, bfloat16: 1743
    with 2 heads, 2867 with 4, which is 5.6 per token and head, or 3.7 ns; reading and writing takes 1.9 ns. The XLU is
    the bottleneck (sums and maxima along rows, transposing k for the state).
    """
    return 4 if dtype == jnp.bfloat16 else 2


def recurrence(arrays: dict, plan: Plan, *, reverse: bool = False, last: bool = False) -> dict:
    """The recurrence; `windowed_linear_attention.py` describes arguments and results."""
    B, T, _, V = arrays["v"].shape
    P, N = arrays["k"].shape[-1], plan.heads
    shapes = {"out": ((B, T, N, V), arrays["v"].dtype)}
    if "sums" in arrays:
        shapes |= {name: ((B, N, T), jnp.float32) for name in ("norm", "top")}
    if last:
        shapes |= {f"last_{name}": (arrays[name].shape, jnp.float32) for name in STATES if name in arrays}
    pairs = plan.tiles * plan.chunk if "near_q" in arrays else 0
    soft = pairs * 2 * (arrays["near_q"].shape[-1] + V) if pairs else 0
    far = max(plan.tiles - plan.first_far, 0) * plan.chunk * 2 * (P + V)
    work = soft + far + 4 * P * V, pairs
    return _call(_recurrence, arrays, shapes, plan, reverse, work, "windowed_linear_attention")


def near(arrays: dict, plan: Plan, *, reverse: bool = False) -> dict:
    """The gradient of the softmax's queries or, with reverse, of its keys."""
    B, T, _, H = arrays["near_q"].shape
    shapes: dict = {"out": ((B, T, plan.heads, H), arrays["near_q"].dtype)}
    if not reverse:
        shapes |= {name: ((B, plan.heads, T), jnp.float32) for name in ("place", "total", "mass")}
    arrays = {name: x for name, x in arrays.items() if name not in ("reach", "kept", "whole", "oldest")}
    pairs = plan.tiles * plan.chunk
    work = pairs * 2 * (2 * H + arrays["q"].shape[-1]), pairs
    return _call(_near, arrays, shapes, plan, reverse, work, "windowed_linear_attention_near")


# -------------------------------------------------------------------------------------------------- blocks and scratch


def _call(kernel, arrays: dict, shapes: dict, plan, reverse: bool, work: tuple[int, int], title: str) -> dict:
    """Runs a kernel; returns its results by name. work: FLOPs and exponentials per token and head."""
    (B, T, _, _), N, dtype = arrays["k"].shape, plan.heads, arrays["k"].dtype
    counts = [x.shape[2] for name, x in arrays.items() if _of_tokens(name)]
    layout = Layout(B, N, T, plan.chunk, _heads_a_step(N, counts, most_heads(dtype)), reverse)
    inputs = {name: layout.inner(name, x) for name, x in arrays.items()}
    results = {
        name: jax.ShapeDtypeStruct(layout.shape(name, shape), kind) for name, (shape, kind) in shapes.items()
    }
    in_specs = {name: layout.block(name, x.shape) for name, x in inputs.items()}
    scratch = {
        f"held_{name}": pltpu.VMEM(inputs[name].shape[2:], jnp.float32) for name in STATES if name in arrays
    }
    for name in ("near_k", "k", "v", *(OF_QUERIES if reverse else ())):
        if name in inputs:
            shape = plan.tiles - 1, *layout.of_chunk(name, inputs[name].shape)
            scratch[f"ring_{name}"] = pltpu.VMEM(shape, inputs[name].dtype)
    names = (*inputs, *results, *scratch)
    out = pl.pallas_call(
        functools.partial(kernel, names=names, plan=plan, reverse=reverse, each=layout.each),
        grid=(B, N // layout.each, T // plan.chunk),
        in_specs=list(in_specs.values()),
        out_specs=[layout.block(name, x.shape) for name, x in results.items()],
        out_shape=list(results.values()),
        scratch_shapes=list(scratch.values()),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary")),
        cost_estimate=pl.CostEstimate(
            flops=B * T * N * work[0],
            transcendentals=B * T * N * work[1],
            bytes_accessed=sum(x.size * x.dtype.itemsize for x in (*inputs.values(), *results.values())),
        ),
        interpret=plan.interpret,
        name=title,
    )(*inputs.values())
    out = dict(zip(results, out, strict=True))
    return {
        name: jnp.swapaxes(x, 1, 2) if _of_tokens(name) else x.reshape(shapes[name][0])
        for name, x in out.items()
    }


def _of_tokens(name: str) -> bool:
    """Whether an array has the shape [B, T, n, P]."""
    return name in ("q", "k", "v", "near_q", "near_k", "out")


@dataclasses.dataclass(frozen=True)
class Layout:
    """The layout of arrays in memory, and the blocks that a step of the grid reads: `each` heads, C tokens."""

    B: int
    N: int
    T: int
    C: int
    each: int
    reverse: bool

    def shape(self, name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
        groups = self.N // self.each
        if _of_tokens(name):
            return self.B, shape[2], self.T, shape[3]
        if name == "gamma":
            return groups, self.each, 1
        if name in OF_ROWS:
            return self.B, 1, self.T
        return self.B, groups, self.each, *(shape[2:] if name in OF_HEADS else shape[3:])

    def inner(self, name: str, x):
        if _of_tokens(name):
            return jnp.swapaxes(x, 1, 2)
        x = jnp.repeat(x, self.C, axis=1) if name == "whole" else x
        return x.astype(jnp.float32).reshape(self.shape(name, x.shape))

    def of_chunk(self, name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of a step's block of an array with tokens, without the axes of rows and groups."""
        if _of_tokens(name):
            return max(self.each * shape[1] // self.N, 1), self.C, shape[3]
        return (self.each if name in OF_HEADS else 1), self.C

    def block(self, name: str, shape: tuple[int, ...]) -> pl.BlockSpec:
        last, each = self.T // self.C - 1, self.each

        def at(c):
            return last - c if self.reverse else c

        if _of_tokens(name):
            own, shared = self.of_chunk(name, shape), self.N // shape[1]
            return pl.BlockSpec((1, *own), lambda b, g, c: (b, g * each // shared // own[0], at(c), 0))
        if name == "gamma":
            return pl.BlockSpec((1, each, 1), lambda b, g, c: (g, 0, 0))
        if name in OF_ROWS:
            return pl.BlockSpec((1, 1, self.C), lambda b, g, c: (b, 0, at(c)))
        if name in OF_HEADS:
            return pl.BlockSpec((1, 1, each, self.C), lambda b, g, c: (b, g, 0, at(c)))
        rest = (0,) * (len(shape) - 2)
        return pl.BlockSpec((1, 1, *shape[2:]), lambda b, g, c: (b, g, *rest))


def _heads_a_step(N: int, counts: list[int], most: int) -> int:
    """The largest divisor of N up to `most` such that a step's heads form whole blocks of every array."""
    shared = [N // n for n in counts]
    fits = (e for e in range(min(N, most), 0, -1) if N % e == 0)
    return next(e for e in fits if all(e % s == 0 or s % e == 0 for s in shared))


class Step:
    """The data of a step: the rows of chunk c, and tiles t, each t chunks before it (with reverse: after it)."""

    def __init__(self, given, names, plan, reverse, each):
        self.refs = dict(zip(names, given, strict=True))
        self.plan, self.reverse, self.each, self.C = plan, reverse, each, plan.chunk
        self.chunks, i = pl.num_programs(2), pl.program_id(2)
        self.first, self.last = i == 0, i == self.chunks - 1
        self.c = self.chunks - 1 - i if reverse else i
        self.rings = [name.removeprefix("ring_") for name in names if name.startswith("ring_")]

        @pl.when(self.first)
        def _():
            for name in STATES:
                if name in self.refs:
                    self.refs[f"held_{name}"][...] = self.refs[name][0, 0]
            for name in self.rings:
                self.refs[f"ring_{name}"][...] = jnp.zeros_like(self.refs[f"ring_{name}"])

        # Computed by this pass unless reversed.
        found = ("top",) if "norm" in self.refs else ("place", "total")
        turned = ("reach", "kept") if reverse else ("reach", "kept", *OF_QUERIES)
        self.columns = {
            name: self.turned(self.rows(name)) for name in turned if name in self.refs and name not in found
        }
        self.masks = [self.seen(t) for t in range(plan.tiles)]

    def rows(self, name):
        """Values per token of the chunk, [each or 1, C]."""
        return self.refs[name][0] if name in OF_ROWS else self.refs[name][0, 0]

    @staticmethod
    def turned(x):
        """Transposes [n, C] to [C, n], or to [C, 8] with equal columns if n is 1."""
        if x.shape[0] == 1:
            x = jnp.broadcast_to(x, (8, x.shape[1]))
        return jnp.transpose(x)

    def slot(self, t):
        held = self.plan.tiles - 1
        return 0 if held == 1 else lax.rem(self.c + t if self.reverse else self.c - t + held, held)

    def tile(self, name, t, h):
        """Tile t of head h, [C, P]."""
        count = self.refs[name].shape[1]
        head = h * count // self.each
        return self.refs[name][0, head] if t == 0 else self.refs[f"ring_{name}"][self.slot(t), head]

    def own(self, name, h):
        return self.tile(name, 0, h)

    def of_query(self, name, t, h):
        """A value per query, shaped to broadcast along the query axis of the scores."""
        h = 0 if name in OF_ROWS else h
        if not self.reverse:
            return self.columns[name][:, h : h + 1]
        x = self.rows(name) if t == 0 else self.refs[f"ring_{name}"][self.slot(t)]
        return x[h : h + 1, :]

    def places(self, t):
        """The positions of queries and of keys, each in the shape of the scores."""
        down, across = (lax.broadcasted_iota(jnp.int32, (self.C, self.C), i) for i in (0, 1))
        down, across = down + self.c * self.C, across + (self.c + (t if self.reverse else -t)) * self.C
        down, across = down.astype(jnp.float32), across.astype(jnp.float32)
        return (across, down) if self.reverse else (down, across)

    def seen(self, t):
        """Masks of the tile's near pairs and of its far ones; None: it has no far pairs."""
        query, key = self.places(t)
        nearest = self.of_query("nearest", t, 0)
        real = query < self.chunks * self.C
        near = (key >= nearest) & (key <= query) & real
        if "oldest" not in self.refs or t < self.plan.first_far:
            return near, None
        return near, (key >= self.of_query("oldest", t, 0)) & (key < nearest) & real

    def products(self, t, h):
        """The products of the near pairs; NEVER for others."""
        s = _dot(self.own("near_q", h), self.tile("near_k", t, h), 1, 1)
        return jnp.where(self.masks[t][0], s, NEVER)

    def soft(self, s, t, h):
        """exp(scale (s - max)) for the near pairs, 0 for others."""
        s = (s - self.of_query("top", t, h)) * self.plan.scale
        return jnp.exp(jnp.where(self.masks[t][0], s, NEVER))

    def push(self):
        """Stores this chunk in the ring buffer, over the oldest one."""
        for name in self.rings:
            x = self.rows(name) if name in OF_QUERIES else self.refs[name][0]
            self.refs[f"ring_{name}"][self.slot(self.plan.tiles - 1)] = x


# --------------------------------------------------------------------------------------------------------- the kernels


def _recurrence(*given, names, plan, reverse, each):
    step = Step(given, names, plan, reverse, each)
    found = [_head(step, h) for h in range(each)]
    for name, columns in zip(("norm", "top"), zip(*found), strict=False):
        step.refs[name][0, 0] = jnp.transpose(jnp.concatenate(columns, axis=1))
    step.push()

    @pl.when(step.last)
    def _():
        for name in STATES:
            if f"last_{name}" in names:
                step.refs[f"last_{name}"][0, 0] = step.refs[f"held_{name}"][...]


def _head(step: Step, h: int):
    """Processes one head's chunk; returns the results per query as columns."""
    refs, plan = step.refs, step.plan
    dtype, reach, gamma = refs["v"].dtype, step.columns["reach"][:, :1], None
    q, state, found = step.own("q", h), refs["held_state"][h], ()
    out = _dot(q, state.astype(dtype), 1, 0)
    if "row" in refs:
        row = refs["held_row"][h : h + 1, :]
        out += row if step.reverse else row * step.of_query("bias", 0, h)
    out *= reach
    soft: list = [None] * plan.tiles
    if "near_q" in refs:
        gamma = refs["gamma"][0, h : h + 1, :]
        soft, found = (
            _softmax(step, h)
            if "norm" in refs
            else ([step.soft(step.products(t, h), t, h) for t in range(plan.tiles)], ())
        )
    norm = jnp.zeros((step.C, 1), jnp.float32)
    for t in range(plan.tiles):
        weights = None if soft[t] is None else soft[t] * gamma
        if t >= plan.first_far:
            scores = _dot(q, step.tile("k", t, h), 1, 1)
            if "bias" in refs:
                scores += step.of_query("bias", t, h)
            scores = jnp.where(step.masks[t][1], scores, 0.0)
            weights = scores if weights is None else weights + scores
        if weights is not None:
            out += _dot(weights.astype(dtype), step.tile("v", t, h), 1, 0)
            if "norm" in refs:
                norm += jnp.sum(weights, axis=1, keepdims=True)
    if "norm" in refs:
        far = jnp.sum(q.astype(jnp.float32) * refs["held_sums"][h : h + 1, :], axis=1, keepdims=True)
        norm += far * reach + plan.eps
        out *= 1.0 / jnp.where(norm == 0.0, 1.0, norm)
    refs["out"][0, h] = out.astype(refs["out"].dtype)
    _advance(step, h)
    return (norm, *found) if "norm" in refs else ()


def _softmax(step: Step, h: int):
    """exp(scale (s - max)) of every tile, and each query's largest product with a near key."""
    s = [step.products(t, h) for t in range(step.plan.tiles)]
    top = jnp.max(functools.reduce(jnp.maximum, s), axis=1, keepdims=True)
    shift = jnp.maximum(top, NEVER / 2)  # a query without near keys gives 0
    return [jnp.exp((x - shift) * step.plan.scale) for x in s], (top,)


def _advance(step: Step, h: int):
    """The states after this chunk: the furthest tile moves to the state."""
    refs, t = step.refs, step.plan.tiles - 1
    k, v = step.tile("k", t, h), step.tile("v", t, h)
    kept, whole = step.columns["kept"][:, :1], step.rows("whole")[:, :1]
    weighted = v.astype(jnp.float32) * kept
    refs["held_state"][h] = refs["held_state"][h] * whole + _dot(k, weighted.astype(v.dtype), 0, 0)
    if "row" in refs:
        if step.reverse:
            weighted *= step.turned(step.of_query("bias", t, h))[:, :1]
        old = refs["held_row"][h : h + 1, :]
        refs["held_row"][h : h + 1, :] = old * whole + jnp.sum(weighted, axis=0, keepdims=True)
    if "sums" in refs:
        old = refs["held_sums"][h : h + 1, :]
        new = jnp.sum(k.astype(jnp.float32) * kept, axis=0, keepdims=True)
        refs["held_sums"][h : h + 1, :] = old * whole + new


def _near(*given, names, plan, reverse, each):
    step = Step(given, names, plan, reverse, each)
    found = [_near_head(step, h) for h in range(each)]
    for name, columns in zip(("place", "total", "mass"), zip(*found), strict=False):
        step.refs[name][0, 0] = jnp.transpose(jnp.concatenate(columns, axis=1))
    step.push()


def _near_head(step: Step, h: int):
    """Processes one head's chunk; returns each query's place, total and mass as columns."""
    refs, tiles, q = step.refs, range(step.plan.tiles), step.own("q", h)
    s = [step.products(t, h) for t in tiles]
    found: tuple[jax.Array, ...] = ()
    e = [step.soft(s[t], t, h) for t in tiles]
    e_dw = [e[t] * (_dot(q, step.tile("k", t, h), 1, 1) + step.of_query("bias", t, h)) for t in tiles]
    if not step.reverse:
        most = jnp.max(functools.reduce(jnp.maximum, s), axis=1, keepdims=True)
        places = [jnp.where(s[t] == most, step.places(t)[1], -1.0) for t in tiles]
        place = jnp.max(functools.reduce(jnp.maximum, places), axis=1, keepdims=True)
        found = place, *(jnp.sum(sum(x[1:], x[0]), axis=1, keepdims=True) for x in (e_dw, e))
    out = jnp.zeros(refs["out"].shape[2:], jnp.float32)
    for t in tiles:
        query, key = step.places(t)
        place, total = found[:2] if found else (step.of_query(name, t, h) for name in ("place", "total"))
        top = (key == place) & (query < step.chunks * step.C)
        ds = e_dw[t] - jnp.where(top, total, 0.0)
        k = step.tile("near_k", t, h)
        out += _dot(ds.astype(k.dtype), k, 1, 0)
    scale = refs["gamma"][0, h : h + 1, :] * step.plan.scale
    refs["out"][0, h] = (out * scale).astype(refs["out"].dtype)
    return found


def _dot(a, b, a_axis, b_axis):
    """float32 accumulation; float32 inputs in float32."""
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    dims = (((a_axis,), (b_axis,)), ((), ()))
    return lax.dot_general(a, b, dims, precision=precision, preferred_element_type=jnp.float32)
