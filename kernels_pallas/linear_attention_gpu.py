"""The recurrence of `linear_attention.py` on an NVIDIA GPU, through Triton.

A program owns one head and `columns` of the value dimension. It walks the chunks in order with its part of the state,
P x columns in float32, in registers. Asynchronous copies fetch the next chunk during the products of the current one.
For bfloat16 all four products of a chunk are wgmma instructions, which have 64 rows, the minimum size of a chunk.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from kernels_pallas import state_tiles_gpu
from kernels_pallas.backends import triton
from kernels_pallas.state_tiles_gpu import NARROW, Tile

chunk = state_tiles_gpu.chunk


def tile(names, P: int, V: int, dtype) -> Tile:
    """Tiles that compile for an H200 without register spills and leave room for two programs per multiprocessor.

    P = V = 128, bfloat16, registers a thread (spilled bytes), shared KB, of 228:

        columns, warps, stages     plain    decay    dq, dk     norm    norm, decay
        64, 4, 2                    177      242     255        255     255 (152)      92
        64, 4, 3                    177      237     249        255     255 (128)     134: one program
        32, 4, 2                    146      182     227        197     255            88
        64, 8, 2                    190      211     253        204     255           one program, registers
        128, 8, 2                   212      255 (8) 255 (40)   238     255 (32)      one program, registers

    A chunk of 128 spills in all of them. P = 128 and V = 64 with a bias spills 8 bytes in two stages, none in three.
    dk of packed rows: 64, 4, 2 or 3 spill 16 bytes by CUDA 13's assembler (jax 0.11.2), 64, 8, 2 takes 231 registers.
    float32 as three TensorFloat-32 products keeps each operand twice: chunks of 16, and up to 64 features.
    """
    if dtype == jnp.float32:
        return Tile(16 if "sums" in names else 32, 4, 1)
    if "sums" in names:
        return Tile(32, 4, 2) if "keep" in names else Tile(64, 8, 2)
    if "row" in names and "keep" in names:
        return Tile(64, 8, 2)
    return Tile(64, 4, 3 if P == 128 and V == 64 and "row" in names else 2)


def recurrence(
    arrays: dict, *, heads: int, reverse: bool, eps: float, span: int, chunk: int, out: jnp.dtype, interpret: bool
) -> dict:
    """The recurrence; `linear_attention.py` describes arguments and results."""
    B, T, _, V = arrays["v"].shape
    P, N = arrays["k"].shape[-1], heads
    best = tile(arrays, P, V, arrays["v"].dtype)
    W = min(best.columns, V)
    shapes = {"states": jax.ShapeDtypeStruct((B, N, T // span, P, V), jnp.float32)}
    if "q" in arrays:
        shapes["out"] = jax.ShapeDtypeStruct((B, T, N, V), out)
    if "row" in arrays:
        shapes["rows"] = jax.ShapeDtypeStruct((B, N, T // span, V), jnp.float32)
    if "sums" in arrays:
        shapes["all_sums"] = jax.ShapeDtypeStruct((B, N, T // span, P), jnp.float32)
        shapes["norm"] = jax.ShapeDtypeStruct((B, N, T), jnp.float32)
    kernel = functools.partial(
        _kernel, names=(*arrays, *shapes), reverse=reverse, eps=eps, C=chunk, span=span, interpret=interpret
    )
    call = pl.pallas_call(
        kernel,
        grid=(B * N, V // W),
        in_specs=[_block(name, x.shape, N, W) for name, x in arrays.items()],
        out_specs=[_block(name, x.shape, N, W) for name, x in shapes.items()],
        out_shape=list(shapes.values()),
        compiler_params=triton.CompilerParams(num_warps=best.warps, num_stages=best.stages),
        interpret=interpret,
        name="linear_attention" if "q" in arrays else "linear_attention_states",
    )
    return dict(zip(shapes, call(*arrays.values()), strict=True))


def _block(name: str, shape: tuple[int, ...], N: int, W: int) -> pl.BlockSpec:
    """The block of an array that a program reads: its head (or the shared one) and its columns."""
    if name == "limit":
        return pl.BlockSpec((None, shape[1]), lambda i, j: (i // N, 0))
    if name in ("q", "k", "v", "out"):
        shared = N // shape[2]
        own = name in ("v", "out")
        return pl.BlockSpec(
            (None, shape[1], None, W if own else shape[3]),
            lambda i, j: (i // N, 0, i % N // shared, j if own else 0),
        )
    last = W if name in ("state", "states", "row", "rows") else shape[-1]
    shared, rest = N // shape[1], (0,) * len(shape[2:-1])
    return pl.BlockSpec(
        (None, None, *shape[2:-1], last),
        lambda i, j: (i // N, i % N // shared, *rest, j if last < shape[-1] else 0),
    )


def _kernel(*given, names, reverse, eps, C, span, interpret):
    refs = dict(zip(names, given, strict=True))
    dtype, T = refs["v"].dtype, refs["v"].shape[0]
    dot = functools.partial(state_tiles_gpu.dot, interpret=interpret)

    def chunk(c, carry):
        rows = pl.ds(c * C, C)
        k, v = refs["k"][rows, :], refs["v"][rows, :]
        if "q" in refs:
            out = _outputs(refs, carry, rows, k, v, dot, reverse, eps)
            refs["out"][rows, :] = out.astype(refs["out"].dtype)
        whole = refs["keep" if reverse else "reach"][(c + 1) * C - 1] if "keep" in refs else 1.0
        keep = refs["keep"][rows] if "keep" in refs else jnp.ones((C,), jnp.float32)
        kept = v if "keep" not in refs else (v.astype(jnp.float32) * keep[:, None]).astype(dtype)
        new = {"state": carry["state"] * whole + dot(k, kept, 0, 0)}
        if "row" in refs:
            weighted = kept.astype(jnp.float32)
            if "key_bias" in refs:
                weighted *= refs["key_bias"][rows][:, None]
            new["row"] = carry["row"] * whole + jnp.sum(weighted, axis=0)
        if "sums" in refs:
            wide = jnp.broadcast_to(keep[:, None], (C, NARROW)).astype(dtype)
            new["sums"] = carry["sums"] * whole + dot(k, wide, 0, 0)
        return new

    def step(i, carry):
        c = T // C - 1 - i if reverse else i
        carry = chunk(c, carry)

        @pl.when(lax.rem(i + 1, span // C) == 0)
        def _():
            s = lax.div(c, span // C)
            refs["states"][s, :, :] = carry["state"]
            if "row" in refs:
                refs["rows"][s, :] = carry["row"]
            if "sums" in refs:
                refs["all_sums"][s, :] = jnp.max(carry["sums"], axis=1)

        return carry

    carry = {name: refs[name][...] for name in ("state", "row", "sums") if name in refs}
    if "sums" in refs:
        carry["sums"] = jnp.broadcast_to(carry["sums"][:, None], (refs["sums"].shape[0], NARROW))
    lax.fori_loop(0, T // C, step, carry)


def _outputs(refs, carry, rows, k, v, dot, reverse, eps):
    """The outputs of one chunk, float32; also stores the normaliser."""
    q, C = refs["q"][rows, :], k.shape[0]
    query, key = (lax.broadcasted_iota(jnp.int32, (C, C), i) for i in (0, 1))
    seen = query <= key if reverse else query >= key
    if "limit" in refs:
        limit = refs["limit"][rows][:, None]
        seen &= key <= limit if reverse else key >= limit
    scores = dot(q, k, 1, 1)
    if "query_bias" in refs:
        scores += refs["query_bias"][rows][:, None]
    if "key_bias" in refs:
        scores += refs["key_bias"][rows][None, :]
    if "decay" in refs:
        decay = refs["decay"][rows]
        fall = decay[None, :] - decay[:, None] if reverse else decay[:, None] - decay[None, :]
        scores *= jnp.exp(jnp.where(seen, fall, 0.0))
    scores = jnp.where(seen, scores, 0.0)
    out = dot(q, carry["state"].astype(k.dtype), 1, 0)
    if "row" in refs:
        row = carry["row"][None, :]
        out += row * refs["query_bias"][rows][:, None] if "query_bias" in refs else row
    if "reach" in refs:
        out *= refs["reach"][rows][:, None]
    out += dot(scores.astype(k.dtype), v, 1, 0)
    if "sums" in refs:
        norm = jnp.max(dot(q, carry["sums"].astype(k.dtype), 1, 0), axis=1)
        if "reach" in refs:
            norm *= refs["reach"][rows]
        norm += jnp.sum(scores, axis=1) + eps
        refs["norm"][rows] = norm
        out *= (1.0 / jnp.where(norm == 0.0, 1.0, norm))[:, None]
    return out
