"""The recurrence of `linear_attention.py` on a TPU.

The grid is (rows, groups of heads, chunks), with chunks in order: the states of a group stay in VMEM from one step to
the next, while the pipeline fetches the next chunk. Several heads per step give the scheduler independent work between
a product and its use. Arrays are head-major, [B, N, T, P], so that a head's chunk is a plain matrix. Scalars per token
come as rows and are transposed to columns all together, since each transposition costs a pass of the XLU.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

STATES = {"state": "states", "row": "rows", "sums": "all_sums"}
PER_TOKEN = ("decay", "fine", "reach", "keep", "query_bias", "key_bias")


def chunk(T: int, dtype) -> int:
    """Tokens per chunk; fewer in float32, since weights are differences of sums over a chunk's decays."""
    return 256 if T > 128 and dtype == jnp.bfloat16 else 128


def most_heads(dtype) -> int:
    """The maximum number of heads per step.

    P = H = 128 with decay, bfloat16, as libtpu counts the bundles of a step for a v5e (1.5 GHz); reading and writing
    takes 1.25 ns a token and head:

        chunk, heads     bundles     ns a token and head
        128, 8             2286           1.49
        256, 4             2481           1.62
        256, 8             4325           1.41

    In float32 8 heads of 256 tokens would fill the 16 MB of VMEM that a kernel is given.
    """
    return 8 if dtype == jnp.bfloat16 else 4


def recurrence(
    arrays: dict, *, heads: int, reverse: bool, eps: float, span: int, chunk: int, out: jnp.dtype, interpret: bool
) -> dict:
    """The recurrence; `linear_attention.py` describes arguments and results."""
    B, T, _, V = arrays["v"].shape
    P, N, C = arrays["k"].shape[-1], heads, chunk
    each = _heads_a_step(N, [arrays[name].shape[2] for name in "qkv"], most_heads(arrays["v"].dtype))
    groups = N // each

    def head_major(name, x):
        if name in "qkv":
            return jnp.swapaxes(x, 1, 2)
        if name == "limit":
            return x[:, None]
        if x.shape[1] != N:
            x = jnp.repeat(x, N // x.shape[1], axis=1)
        return x.reshape(B, groups, each, *x.shape[2:])

    inputs = {name: head_major(name, x) for name, x in arrays.items()}
    shapes = {
        "out": jax.ShapeDtypeStruct((B, N, T, V), out),
        "states": jax.ShapeDtypeStruct((B, groups, T // span, each, P, V), jnp.float32),
    }
    if "row" in arrays:
        shapes["rows"] = jax.ShapeDtypeStruct((B, groups, T // span, each, V), jnp.float32)
    if "sums" in arrays:
        shapes["all_sums"] = jax.ShapeDtypeStruct((B, groups, T // span, each, P), jnp.float32)
        shapes["norm"] = jax.ShapeDtypeStruct((B, groups, each, T), jnp.float32)
    cost = pl.CostEstimate(
        flops=B * T * N * (2 * C * (P + V) + 4 * P * V),
        transcendentals=B * T * N * C if "decay" in arrays else 0,
        bytes_accessed=sum(x.size * x.dtype.itemsize for x in (*inputs.values(), *shapes.values())),
    )
    block = functools.partial(_block, N=N, each=each, C=C, span=span, last=T // C - 1 if reverse else None)
    kept = [name for name in STATES if name in inputs]
    names = (*inputs, *shapes, *(f"held_{name}" for name in kept))
    outputs = pl.pallas_call(
        functools.partial(_kernel, names=names, reverse=reverse, eps=eps, per_span=span // C, each=each),
        grid=(B, groups, T // C),
        in_specs=[block(name, x.shape) for name, x in inputs.items()],
        out_specs=[block(name, x.shape) for name, x in shapes.items()],
        out_shape=list(shapes.values()),
        scratch_shapes=[pltpu.VMEM(inputs[name].shape[2:], jnp.float32) for name in kept],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary")),
        cost_estimate=cost,
        interpret=interpret,
        name="linear_attention",
    )(*inputs.values())
    return _token_major(dict(zip(shapes, outputs, strict=True)), B, N)


def _token_major(results: dict, B: int, N: int) -> dict:
    """Converts results to the shapes that `linear_attention.py` expects."""
    results["out"] = jnp.swapaxes(results["out"], 1, 2)
    for name in STATES.values():  # in one order, so that every process compiles the same program
        if name in results:
            x = jnp.swapaxes(results[name], 2, 3)
            results[name] = x.reshape(B, N, *x.shape[3:])
    if "norm" in results:
        results["norm"] = results["norm"].reshape(B, N, -1)
    return results


def _heads_a_step(N: int, counts: list[int], most: int) -> int:
    """The largest divisor of N up to `most` such that a step's heads form whole blocks of every array."""
    shared = [N // n for n in counts]
    fits = (e for e in range(min(N, most), 0, -1) if N % e == 0)
    return next(e for e in fits if all(e % s == 0 or s % e == 0 for s in shared))


def _block(name: str, shape: tuple[int, ...], *, N: int, each: int, C: int, span: int, last: int | None):
    def at(c):
        return c if last is None else last - c

    if name in ("q", "k", "v", "out"):
        shared = N // shape[1]
        own = max(each // shared, 1)
        return pl.BlockSpec((1, own, C, shape[3]), lambda b, g, c: (b, g * each // shared // own, at(c), 0))
    if name == "limit":
        return pl.BlockSpec((1, 1, C), lambda b, g, c: (b, 0, at(c)))
    if name in PER_TOKEN or name == "norm":
        return pl.BlockSpec((1, 1, each, C), lambda b, g, c: (b, g, 0, at(c)))
    rest = (0,) * (len(shape) - 3)
    if name in STATES:
        return pl.BlockSpec((1, 1, *shape[2:]), lambda b, g, c: (b, g, 0, *rest))
    return pl.BlockSpec((1, 1, 1, *shape[3:]), lambda b, g, c: (b, g, at(c) // (span // C), *rest))


def _kernel(*given, names, reverse, eps, per_span, each):
    refs = dict(zip(names, given, strict=True))
    kept = [name for name in STATES if name in refs]

    @pl.when(pl.program_id(2) == 0)
    def _():
        for name in kept:
            refs[f"held_{name}"][...] = refs[name][0, 0]

    columns = {name: jnp.transpose(refs[name][0, 0]) for name in PER_TOKEN if name in refs}
    seen = _seen(refs, reverse)
    norms = [_head(refs, columns, seen, h, each, reverse, eps) for h in range(each)]
    if "norm" in refs:
        refs["norm"][0, 0] = jnp.transpose(jnp.concatenate(norms, axis=1))

    @pl.when(lax.rem(pl.program_id(2) + 1, per_span) == 0)
    def _():
        for name in kept:
            refs[STATES[name]][0, 0, 0] = refs[f"held_{name}"][...]


def _seen(refs, reverse):
    C = refs["v"].shape[2]
    query, key = (lax.broadcasted_iota(jnp.int32, (C, C), i) for i in (0, 1))
    seen = query <= key if reverse else query >= key
    if "limit" in refs:
        limit = jnp.transpose(refs["limit"][0].astype(jnp.float32))
        key = key.astype(jnp.float32)
        seen &= key <= limit if reverse else key >= limit
    return seen


def _head(refs, columns, seen, h, each, reverse, eps):
    """Processes one head's chunk; returns its normalisers, [C, 1]."""

    def own(name):
        count = refs[name].shape[1]
        return refs[name][0, h * count // each]

    def column(name):
        return columns[name][:, h : h + 1]

    def row(name):
        return refs[name][0, 0, h : h + 1, :]

    q, k, v = own("q"), own("k"), own("v")
    state = refs["held_state"][h]
    scores = _dot(q, k, 1, 1)
    if "query_bias" in refs:
        scores += column("query_bias")
    if "key_bias" in refs:
        scores += row("key_bias")
    if "decay" in refs:

        def fall_of(name):
            return row(name) - column(name) if reverse else column(name) - row(name)

        fall = fall_of("decay") + fall_of("fine") if "fine" in refs else fall_of("decay")
        scores *= jnp.exp(jnp.where(seen, fall, 0.0))
    scores = jnp.where(seen, scores, 0.0)
    out = _dot(q, state.astype(k.dtype), 1, 0)
    if "row" in refs:
        far = refs["held_row"][h : h + 1, :]
        out += far * column("query_bias") if "query_bias" in refs else far
    if "reach" in refs:
        out *= column("reach")
    out += _dot(scores.astype(k.dtype), v, 1, 0)
    norm = None
    if "sums" in refs:
        norm = jnp.sum(q.astype(jnp.float32) * refs["held_sums"][h : h + 1, :], axis=1, keepdims=True)
        if "reach" in refs:
            norm *= column("reach")
        norm += jnp.sum(scores, axis=1, keepdims=True) + eps
        out *= 1.0 / jnp.where(norm == 0.0, 1.0, norm)
    refs["out"][0, h] = out.astype(refs["out"].dtype)
    _advance(refs, h, k, v, row, column, reverse)
    return norm


def _advance(refs, h, k, v, row, column, reverse):
    """The states after this chunk."""
    whole = jnp.ones((1, 1), jnp.float32)
    kept = v
    if "keep" in refs:
        whole = row("keep" if reverse else "reach")[:, -1:]
        kept = (v.astype(jnp.float32) * column("keep")).astype(v.dtype)
    refs["held_state"][h] = refs["held_state"][h] * whole + _dot(k, kept, 0, 0)
    if "row" in refs:
        weighted = kept.astype(jnp.float32)
        if "key_bias" in refs:
            weighted *= column("key_bias")
        old = refs["held_row"][h : h + 1, :]
        refs["held_row"][h : h + 1, :] = old * whole + jnp.sum(weighted, axis=0, keepdims=True)
    if "sums" in refs:
        weighted = k.astype(jnp.float32)
        if "keep" in refs:
            weighted *= column("keep")
        old = refs["held_sums"][h : h + 1, :]
        refs["held_sums"][h : h + 1, :] = old * whole + jnp.sum(weighted, axis=0, keepdims=True)


def _dot(a, b, a_axis, b_axis):
    """float32 accumulation; float32 inputs in float32."""
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    dims = (((a_axis,), (b_axis,)), ((), ()))
    return lax.dot_general(a, b, dims, precision=precision, preferred_element_type=jnp.float32)
