"""The recurrence of `linear_attention.py` on a Hopper GPU, through Mosaic GPU.

A program owns one head and W columns of the value dimension. It walks the chunks of 64 tokens in order, with its part
of the state, P x W in float32, in registers. TMA brings q, k, v and the decay's vectors of the next chunk into shared
memory during the products of the current one. All products are wgmma: q k^T and q S from the tiles as they came, and
two whose operands were computed in registers and went through shared memory, the weights and the kept values.

wgmma has 64 rows and the state's rows are features, so that P and V are padded with zeros to multiples of 64. There are
no sums, rows and biases here: `linear_attention.py` normalises by a column of ones in v (`with_ones`), which makes the
normaliser a column of the state, and its gradient follows by the same four recurrences.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu

from kernels_pallas import mosaic

CHUNK = 64  # tokens at a time
STATE = 8192  # numbers of the state in one program: 64 registers a thread, and as many for the sum that is added to it
OPERANDS = ("q", "k", "v")


@dataclasses.dataclass(frozen=True)
class Tile:
    """columns: of the value dimension in one program; stages: chunks in shared memory, the one in use included; parts:
    bfloat16 numbers for one of an operand."""

    columns: int
    stages: int
    parts: int


def tile(P: int, dtype) -> Tile:
    """What fits into registers and shared memory (227 KB).

    float32 keeps its digits in three parts. Its many products read from addresses that the compiler computes before the
    loop if they are the same in every chunk, that is with one stage: they alone fill the registers. Two stages of 128
    rows do not fit into shared memory.
    """
    if dtype == jnp.float32:
        return Tile(32, 2 if P <= 64 else 1, 3)
    return Tile(64 if P * 64 <= STATE else 32, 2, 1)


def chunk(dtype) -> int:
    """Tokens at a time."""
    del dtype
    return CHUNK


def with_ones(v: Array) -> Array:
    """v with a column of ones, padded with zeros to a multiple of 64 columns."""
    ones = jnp.ones((*v.shape[:3], 1), v.dtype)
    return padded(jnp.concatenate([v, ones], axis=3), 3)


def padded(x: Array, *axes: int) -> Array:
    """x with zeros at the ends of these axes, up to multiples of 64."""
    short = [-n % mosaic.ROWS if axis in axes else 0 for axis, n in enumerate(x.shape)]
    return jnp.pad(x, [(0, n) for n in short]) if any(short) else x


def recurrence(
    arrays: dict, *, heads: int, reverse: bool, eps: float, span: int, chunk: int, out: jnp.dtype, interpret: bool
) -> dict:
    """The recurrence; `linear_attention.py` describes arguments and results, of which those of the sums are absent."""
    del eps
    (B, T, _, V), P = arrays["v"].shape, arrays["k"].shape[3]
    dtype = arrays["v"].dtype
    wide = {name: padded(x, 3) if name in OPERANDS else x for name, x in arrays.items()}
    wide["state"] = padded(arrays["state"], 2, 3)
    rows, columns = wide["state"].shape[2:]
    best = tile(rows, dtype)
    inputs = {name: mosaic.parts(x, best.parts) if name in OPERANDS else [x] for name, x in wide.items()}
    leaves, tree = jax.tree.flatten(inputs)
    outputs = {"states": jax.ShapeDtypeStruct((B, heads, T // span, rows, columns), jnp.float32)}
    if "q" in arrays:
        outputs["out"] = jax.ShapeDtypeStruct((B, T, heads, columns), out)

    def body(*refs, **scratch):
        given = jax.tree.unflatten(tree, refs[: len(leaves)])
        made = dict(zip(outputs, refs[len(leaves) :], strict=True))
        Program(given, made, scratch, best, heads=heads, reverse=reverse, span=span).run()

    results = mosaic.call(
        body,
        grid={"columns": columns // best.columns, "heads": heads, "batch": B},
        outputs=list(outputs.values()),
        scratch=_scratch(inputs, rows, best, out),
        interpret=interpret,
        name="linear_attention" if "q" in arrays else "linear_attention_states",
    )(*leaves)
    found = dict(zip(outputs, results, strict=True))
    found["states"] = found["states"][..., :P, :V]
    return found | ({"out": found["out"][..., :V]} if "q" in arrays else {})


def _scratch(inputs: dict, P: int, best: Tile, out: jnp.dtype) -> dict:
    """Shared memory of one program, and the barriers at which its copies are awaited."""
    C, W, n = CHUNK, best.columns, best.stages
    staged = {
        name: [mosaic.tile(n, C, W if name == "v" else P, dtype=jnp.bfloat16, width=W) for _ in inputs[name]]
        for name in OPERANDS
        if name in inputs
    }
    for name in inputs:
        if name not in (*OPERANDS, "state"):
            staged[name] = [mosaic_gpu.SMEM((n, C), jnp.int32 if name == "limit" else jnp.float32)]
    copies = sum(len(x) for x in staged.values())
    scratch = {"staged": staged, "arrived": mosaic_gpu.Barrier(num_arrivals=copies, num_barriers=n)}
    scratch["kept"] = mosaic.tiles(C, W, parts=best.parts, width=W) if "keep" in inputs else None
    if "q" in inputs:
        scratch["weights"] = mosaic.tiles(C, C, parts=best.parts, width=W)
        scratch["before"] = mosaic.tiles(P, W, parts=best.parts, width=W)
        scratch["result"] = mosaic.tile(C, W, dtype=out)
    return scratch


class Program:
    """One program: its references, and its head, columns and row of the batch."""

    def __init__(
        self, given: dict, made: dict, scratch: dict, best: Tile, *, heads: int, reverse: bool, span: int
    ):
        self.given, self.made, self.scratch = given, made, scratch
        self.heads, self.reverse, self.span = heads, reverse, span
        self.W, self.stages = best.columns, best.stages
        self.b, self.n = lax.axis_index("batch"), lax.axis_index("heads")
        self.own = pl.ds(lax.axis_index("columns") * self.W, self.W)
        self.chunks = given["v"][0].shape[1] // CHUNK

    def head(self, heads: int):
        """The index of the program's head in an array with this many."""
        return lax.div(self.n, self.heads // heads)

    def chunk(self, i):
        return self.chunks - 1 - i if self.reverse else i

    def fetch(self, i, slot) -> None:
        """Begins to copy everything of the i-th chunk into shared memory."""
        at = pl.ds(self.chunk(i) * CHUNK, CHUNK)
        for name, tiles in self.scratch["staged"].items():
            for ref, tile in zip(self.given[name], tiles, strict=True):
                if name in OPERANDS:
                    columns = self.own if name == "v" else slice(None)
                    source = ref.at[self.b, at, self.head(ref.shape[2]), columns]
                elif name == "limit":
                    source = ref.at[self.b, at]
                else:
                    source = ref.at[self.b, self.head(ref.shape[1]), at]
                mosaic_gpu.copy_gmem_to_smem(source, tile.at[slot], self.scratch["arrived"].at[slot])

    def run(self) -> None:
        for i in range(min(self.stages, self.chunks)):
            self.fetch(i, i)
        state = self.given["state"][0].at[self.b, self.n, :, self.own]
        lax.fori_loop(0, self.chunks, self.step, mosaic.load(state))
        if "out" in self.made:
            mosaic_gpu.wait_smem_to_gmem(0)

    def step(self, i, state):
        slot = lax.rem(i, self.stages)
        mosaic_gpu.barrier_wait(self.scratch["arrived"].at[slot])
        here = {name: [x.at[slot] for x in tiles] for name, tiles in self.scratch["staged"].items()}
        if "out" in self.made:
            self.write(i, self.outputs(here, state))
        state = mosaic.held(self.following(here, state))

        @pl.when(i + self.stages < self.chunks)
        def _():
            self.fetch(i + self.stages, slot)

        @pl.when(lax.rem(i + 1, self.span // CHUNK) == 0)
        def _():
            s = lax.div(self.chunk(i), self.span // CHUNK)
            states = self.made["states"].at[self.b, self.n, s, :, self.own]
            mosaic_gpu.store(states, state, optimized=False)

        return state

    def following(self, here: dict, state):
        """The state after the chunk."""
        k, v = mosaic.transposed(here["k"]), here["v"]
        if "keep" not in here:
            return state + mosaic.product(state.shape, (k, v))
        keep = mosaic.rows(here["keep"][0])
        kept = mosaic.whole(v) * lax.broadcast_in_dim(keep, (CHUNK, self.W), (0,))
        mosaic.store(self.scratch["kept"], kept)
        mosaic_gpu.commit_smem()
        whole = here["keep" if self.reverse else "reach"][0][CHUNK - 1]
        return state * whole + mosaic.product(state.shape, (k, self.scratch["kept"]))

    def outputs(self, here: dict, state):
        """The outputs of the chunk, float32."""
        q, k, v, square = here["q"], here["k"], here["v"], (CHUNK, CHUNK)
        scores = mosaic.product(square, (q, mosaic.transposed(k)))
        weights = self.weighted(here, scores)
        mosaic.store(self.scratch["weights"], weights)
        mosaic.store(self.scratch["before"], state)
        mosaic_gpu.commit_smem()
        out = mosaic.product((CHUNK, self.W), (q, self.scratch["before"]))
        if "reach" in here:
            out *= lax.broadcast_in_dim(mosaic.rows(here["reach"][0]), out.shape, (0,))
        return out + mosaic.product((CHUNK, self.W), (self.scratch["weights"], v))

    def weighted(self, here: dict, scores):
        """The scores of pairs that see each other, times their decay; 0 for the others."""
        square, layout = scores.shape, mosaic_gpu.Layout.WGMMA
        query, key = (mosaic_gpu.broadcasted_iota(jnp.int32, square, i, layout=layout) for i in (0, 1))
        seen = query <= key if self.reverse else query >= key
        if "limit" in here:
            limit = lax.broadcast_in_dim(mosaic.rows(here["limit"][0]), square, (0,))
            seen &= key <= limit if self.reverse else key >= limit
        fall: Array | float = 0.0
        for name in ("decay", "fine"):
            if name in here:
                down = lax.broadcast_in_dim(mosaic.rows(here[name][0]), square, (0,))
                across = lax.broadcast_in_dim(mosaic.columns(here[name][0]), square, (1,))
                fall += across - down if self.reverse else down - across
        if "decay" in here:
            scores *= jnp.exp(jnp.where(seen, fall, 0.0))
        return jnp.where(seen, scores, 0.0)

    def write(self, i, out) -> None:
        """Begins to copy the outputs of the i-th chunk to memory."""
        result = self.scratch["result"]
        mosaic_gpu.wait_smem_to_gmem(0, wait_read_only=True)
        result[...] = out.astype(result.dtype)
        mosaic_gpu.commit_smem()
        at = pl.ds(self.chunk(i) * CHUNK, CHUNK)
        mosaic_gpu.copy_smem_to_gmem(result, self.made["out"].at[self.b, at, self.n, self.own])
