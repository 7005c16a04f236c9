"""The block-Toeplitz convolution on a Hopper GPU, through Mosaic GPU: the walks of `kernels_pallas.fir_conv`.

A program owns 64 lanes of one group, where a lane is a channel of one row of the batch, or a piece of its time, and
walks them along time together, 64 tokens per step. TMA copies boxes of adjacent channels: 64 lanes are 1 to 8 boxes of
64 to 8 channels. Channels of a group are padded to a multiple of 8, and the pieces are as many as fill whole programs.

The group's Toeplitz blocks and the gated inputs of the last steps stay in shared memory, where wgmma reads both of its
operands. Rings of tiles hold the inputs: slot c mod n has block c of the last n.

Forward: y_c = x1_c * (sum_j u_{c-j} M_j + skip u_c). Backward, from the end: du_c = sum_j g_{c+j} M_j^T + skip g_c, and
dM_j += u_c^T g_{c+j}, in registers over the whole walk. dx1 is the forward walk with dy in x1's place. What the inputs
before the row contribute to its first outputs is added in plain jax.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu

from kernels_pallas import mosaic
from kernels_pallas.fir_conv_plan import reached

BLOCK = 64
LANES = 64
BFLOAT16, FLOAT32 = jnp.dtype("bfloat16"), jnp.dtype("float32")
PARTS = {BFLOAT16: 1, FLOAT32: 2}  # bfloat16 numbers for one of an operand
STAGES = {BFLOAT16: 2, FLOAT32: 1}  # steps in shared memory, the one in use included
SPREAD = 264  # programs that keep the 132 processors of an H200 busy: two on each


@dataclasses.dataclass(frozen=True)
class Walk:
    """How lanes map to data. Lanes are boxes of `box` channels: box n of a group is piece n % pieces of the boxes
    n // pieces of its channels, counted along the channels and then along the batch."""

    B: int
    G: int
    R: int  # channels of a group, a multiple of box
    box: int
    pieces: int
    steps: int  # per piece
    blocks: int  # Toeplitz blocks of a group

    @property
    def boxes(self) -> int:
        """Boxes of a program."""
        return LANES // self.box

    @property
    def programs(self) -> int:
        return self.B * (self.R // self.box) * self.pieces // self.boxes

    @property
    def T(self) -> int:
        return self.pieces * self.steps * BLOCK


def plan(v: Array, h: Array) -> Walk:
    """Pieces fill whole programs, then the device, with at least 8 steps to amortise the setup."""
    (B, D, T), (G, K) = v.shape, h.shape
    R = -(-(D // G) // 8) * 8
    box = next(n for n in (64, 32, 16, 8) if R % n == 0)
    steps, pieces = -(-T // BLOCK), 1
    while B * (R // box) * pieces % (LANES // box):
        pieces *= 2
    while G * B * R * pieces // LANES < SPREAD and 16 * pieces <= steps:
        pieces *= 2
    return Walk(B, G, R, box, pieces, -(-steps // pieces), -(-K // BLOCK) + 1)


# ------------------------------------------------------------------------------------------------ arrays of the walk


def _laid(x: Array | None, walk: Walk) -> Array | None:
    """[B, D, T] with the walk's channels and tokens, [B, G R, T]; the same array where nothing is missing."""
    if x is None:
        return None
    B, D, T = x.shape
    channels, tokens = walk.R - D // walk.G, walk.T - T
    if channels:
        x = jnp.pad(x.reshape(B, walk.G, -1, T), ((0, 0), (0, 0), (0, channels), (0, 0)))
        x = x.reshape(B, walk.G * walk.R, T)
    return jnp.pad(x, ((0, 0), (0, 0), (0, tokens))) if tokens else x


def _back(y: Array, walk: Walk, like: Array) -> Array:
    """The inverse of `_laid`."""
    (B, D, T), R = like.shape, walk.R
    if D != walk.G * R:
        y = y.reshape(B, walk.G, R, -1)[:, :, : D // walk.G].reshape(B, D, -1)
    return y[:, :, :T]


def _to_lanes(skip: Array, walk: Walk) -> Array:
    """[D] to the lanes of each program, [G, programs, 64]."""
    x = jnp.pad(skip.reshape(walk.G, -1), ((0, 0), (0, walk.R - skip.shape[0] // walk.G)))
    x = x.reshape(walk.G, 1, walk.R // walk.box, 1, walk.box)
    x = jnp.broadcast_to(x, (walk.G, walk.B, walk.R // walk.box, walk.pieces, walk.box))
    return x.reshape(walk.G, walk.programs, LANES)


def _from_lanes(x: Array, walk: Walk, D: int) -> Array:
    """The sum over lanes of a channel: [G, programs, 64] to [D]."""
    x = x.reshape(walk.G, walk.B, walk.R // walk.box, walk.pieces, walk.box).sum(axis=(1, 3))
    return x.reshape(walk.G, walk.R)[:, : D // walk.G].reshape(D)


def _toeplitz(h: Array, walk: Walk, dtype) -> list[Array]:
    """The parts of the blocks M_j[s, t] = h[64 j + t - s], [G, blocks, 64, 64]."""
    s, t = jnp.arange(BLOCK)[:, None], jnp.arange(BLOCK)
    tap = BLOCK * jnp.arange(walk.blocks)[:, None, None] + t - s
    taps = jnp.where((tap >= 0) & (tap < h.shape[1]), h[:, jnp.clip(tap, 0, h.shape[1] - 1)], 0)
    return mosaic.parts(taps.astype(dtype), PARTS[dtype])


# ---------------------------------------------------------------------------------------------------------- programs


class Lanes:
    """The lanes of a program: copies of their tiles [64 lanes, 64 tokens] at a step, and the tokens of each lane."""

    def __init__(self, walk: Walk):
        self.walk = walk
        self.g, self.program = lax.axis_index("groups"), lax.axis_index("programs")

    def places(self, step):
        """(rows of the box in the tile, row of the batch, channels, first token) of every box."""
        walk = self.walk
        for i in range(walk.boxes):
            n = self.program * walk.boxes + i
            piece, rest = lax.rem(n, walk.pieces), lax.div(n, walk.pieces)
            across = walk.R // walk.box
            channel = self.g * walk.R + lax.rem(rest, across) * walk.box
            token = (piece * walk.steps + step) * BLOCK
            yield pl.ds(i * walk.box, walk.box), lax.div(rest, across), pl.ds(channel, walk.box), token

    def fetch(self, ref, tile, barrier, step, *, outside: bool = False) -> None:
        """Begins to copy the tile at a step. outside: the step may lie before or after the row, and the tile then has
        other numbers, which `inside` removes."""
        for rows, b, channels, token in self.places(step):
            if outside:
                token = jnp.clip(token, 0, self.walk.T - BLOCK)
            source = ref.at[b, channels, pl.ds(token, BLOCK)]
            mosaic_gpu.copy_gmem_to_smem(source, tile.at[rows, :], barrier)

    def put(self, tile, ref, step) -> None:
        """Begins to copy a tile to memory."""
        for rows, b, channels, token in self.places(step):
            mosaic_gpu.copy_smem_to_gmem(tile.at[rows, :], ref.at[b, channels, pl.ds(token, BLOCK)])

    def inside(self, step):
        """The mask of lanes whose tile at this step lies within the row."""
        walk, layout = self.walk, mosaic_gpu.Layout.WGMMA
        lane = mosaic_gpu.broadcasted_iota(jnp.int32, (LANES, BLOCK), 0, layout=layout)
        box = lax.div(lane, jnp.int32(walk.box)) + self.program * walk.boxes
        at = lax.rem(box, jnp.int32(walk.pieces)) * walk.steps + step
        return (at >= 0) & (at < walk.pieces * walk.steps)


def _gated(tiles) -> Array:
    """The product of one tile or two."""
    return functools.reduce(jnp.multiply, [mosaic.load(tile) for tile in tiles])


class Program:
    """What both walks do: tiles of the inputs arrive, and rings of their products are kept.

    given, stages: references in memory and in shared memory by name; ring: the tiles of the last blocks, by part.
    """

    def __init__(self, walk: Walk, given: dict, scratch: dict):
        self.walk, self.given, self.scratch = walk, given, scratch
        self.lanes, self.stages = Lanes(walk), scratch["stages"]
        self.count = STAGES[given["v"].dtype]
        self.names = [name for name in self.stages if given.get(name) is not None]

    def setup(self, ring: list, names: tuple[str, ...], steps: list) -> None:
        """Brings the Toeplitz blocks, and fills the ring with the products of `names` at steps outside of the walk."""
        early, taps = self.scratch["early"], self.scratch["taps"]
        for ref, tile in zip(self.given["taps"], taps, strict=True):
            mosaic_gpu.copy_gmem_to_smem(ref.at[self.lanes.g], tile, self.scratch["built"])
        names = tuple(name for name in names if name in self.names)
        for slot, step in steps:
            tiles = [self.stages[name].at[0] for name in names]
            for name, tile in zip(names, tiles, strict=True):
                self.lanes.fetch(self.given[name], tile, early, step, outside=True)
            mosaic_gpu.barrier_wait(early)
            product = _gated(tiles).astype(jnp.float32)
            mosaic.store([x.at[slot] for x in ring], jnp.where(self.lanes.inside(step), product, 0.0))
        mosaic_gpu.commit_smem()
        mosaic_gpu.barrier_wait(self.scratch["built"])

    def fetch(self, i, slot) -> None:
        """Begins to copy the inputs of a step."""
        for name in self.names:
            tile, barrier = self.stages[name].at[slot], self.scratch["arrived"].at[slot]
            self.lanes.fetch(self.given[name], tile, barrier, i)

    def walked(self, body, carry, *, reverse: bool):
        """carry = body(step, {name: tile}, carry) for every step, while the inputs of the next one arrive."""
        steps = self.walk.steps
        at = (lambda n: steps - 1 - n) if reverse else (lambda n: n)
        for n in range(min(self.count, steps)):
            self.fetch(at(n), n)

        def step(n, carry):
            slot = lax.rem(n, self.count)
            mosaic_gpu.barrier_wait(self.scratch["arrived"].at[slot])
            carry = body(at(n), {name: self.stages[name].at[slot] for name in self.names}, carry)

            @pl.when(n + self.count < steps)
            def _():
                self.fetch(at(n + self.count), slot)

            return carry

        carry = lax.fori_loop(0, steps, step, carry)
        mosaic_gpu.wait_smem_to_gmem(0)
        return carry

    def skip(self):
        """The lanes' weights of the current input along the rows of a tile, or None."""
        if self.given.get("skip") is None:
            return None
        ref = self.given["skip"].at[self.lanes.g, self.lanes.program]
        return lax.broadcast_in_dim(mosaic.rows(ref), (LANES, BLOCK), (0,))

    def block(self, j: int) -> list:
        return [x.at[j] for x in self.scratch["taps"]]

    def write(self, step, **values) -> None:
        """Begins to copy tiles to memory. values: functions, so that one value at a time takes registers."""
        mosaic_gpu.wait_smem_to_gmem(0, wait_read_only=True)
        for name, value in values.items():
            tile = self.scratch["results"][name]
            tile[...] = value().astype(tile.dtype)
        mosaic_gpu.commit_smem()
        for name in values:
            self.lanes.put(self.scratch["results"][name], self.given[name], step)


def _forward(program: Program) -> None:
    ring, n = program.scratch["ring"], program.walk.blocks
    program.setup(ring, ("x2", "v"), [(n - j, -j) for j in range(1, n)])

    def step(i, tiles, _):
        u = _gated([tiles[name] for name in ("x2", "v") if name in tiles])
        mosaic.store([x.at[lax.rem(i, n)] for x in ring], u)
        mosaic_gpu.commit_smem()
        slots = [[x.at[lax.rem(i + n - j, n)] for x in ring] for j in range(n)]
        z = mosaic.product((LANES, BLOCK), *((slots[j], program.block(j)) for j in range(n)))
        if (skip := program.skip()) is not None:
            z += skip * u.astype(jnp.float32)
        program.write(i, y=lambda: z * mosaic.whole([tiles["x1"]]) if "x1" in tiles else z)

    program.walked(step, None, reverse=False)


def _backward(program: Program) -> None:
    walk, ring, n = program.walk, program.scratch["ring"], program.walk.blocks
    last, current = walk.steps - 1, program.scratch["u"]
    program.setup(ring, ("dy", "x1"), [((last + j) % n, last + j) for j in range(1, n)])

    def step(i, tiles, dskip, sums):
        g = _gated([tiles[name] for name in ("dy", "x1") if name in tiles])
        u = _gated([tiles[name] for name in ("x2", "v") if name in tiles])
        mosaic.store([x.at[lax.rem(i, n)] for x in ring], g)
        mosaic.store(current, u)
        if dskip is not None:  # here, so that g and u leave their registers
            dskip += jnp.sum(g.astype(jnp.float32) * u.astype(jnp.float32), axis=1)
        mosaic_gpu.commit_smem()
        slots = [[x.at[lax.rem(i + j, n)] for x in ring] for j in range(n)]
        pairs = ((slots[j], mosaic.transposed(program.block(j))) for j in range(n))
        du = mosaic.product((LANES, BLOCK), *pairs)
        for total, slot in zip(sums, slots, strict=True):
            mosaic.accumulate(total, mosaic.transposed(current), slot)
        if dskip is not None:
            du += program.skip() * mosaic.whole(slots[0])
        if "x2" in tiles:
            x2, v = ([tiles[name]] for name in ("x2", "v"))
            program.write(i, dx2=lambda: du * mosaic.whole(v), dv=lambda: du * mosaic.whole(x2))
        else:
            program.write(i, dv=lambda: du)
        mosaic_gpu.wgmma_wait(0)
        return dskip

    def whole(*sums):
        dskip = None
        if program.given.get("skip") is not None:
            dskip = mosaic_gpu.layout_cast(
                jnp.zeros((LANES,), jnp.float32), mosaic_gpu.Layout.WGMMA.reduce(1)
            )
        dskip = program.walked(functools.partial(step, sums=sums), dskip, reverse=True)
        g, p = program.lanes.g, program.lanes.program
        for j, total in enumerate(sums):
            mosaic_gpu.store(program.given["dM"].at[g, p, j], total[...], optimized=False)
        if dskip is not None:
            mosaic_gpu.store(program.given["dskip"].at[g, p], dskip, optimized=False)

    pl.run_scoped(whole, *(mosaic_gpu.ACC((BLOCK, BLOCK), jnp.float32) for _ in range(n)))


# ------------------------------------------------------------------------------------------------------------- calls


def forward(x1, x2, v, h, skip, state, *, interpret: bool = False):
    """y [B, D, T]; arrays as in `kernels_pallas.fir_conv`, h float32."""
    walk = plan(v, h)
    y = _call(_forward, walk, {"x1": x1, "x2": x2, "v": v}, h, skip, {"y": v}, interpret)["y"]
    if state is None:
        return y
    n = min(state.shape[2], v.shape[2])
    more = reached(state, h, n) * (1 if x1 is None else x1[:, :, :n].astype(jnp.float32))
    return y.at[:, :, :n].add(more.astype(y.dtype))


def backward(dy, x1, x2, v, h, skip, state, *, interpret: bool = False):
    """(dx1, dx2, dv, dM [G, blocks, 64, 64], dskip [D]), None where there is no such input."""
    walk = plan(v, h)
    dx1 = None if x1 is None else forward(dy, x2, v, h, skip, state, interpret=interpret)
    inputs = {"dy": dy, "x1": x1, "x2": x2, "v": v}
    tiles = {"dv": v} if x2 is None else {"dx2": x2, "dv": v}
    found = _call(_backward, walk, inputs, h, skip, tiles, interpret)
    dskip = None if skip is None else _from_lanes(found["dskip"], walk, v.shape[1])
    return dx1, found.get("dx2"), found["dv"], found["dM"].sum(axis=1), dskip


def _call(
    body, walk: Walk, inputs: dict, h: Array, skip: Array | None, results: dict, interpret: bool
) -> dict:
    """Runs body(program) for every program; results: {name: the array whose shape and dtype a result has}."""
    dtype = inputs["v"].dtype
    laid = {name: _laid(x, walk) for name, x in inputs.items() if x is not None}
    given = {**laid, "taps": _toeplitz(h, walk, dtype)}
    outputs = {
        n: jax.ShapeDtypeStruct((walk.B, walk.G * walk.R, walk.T), x.dtype) for n, x in results.items()
    }
    if body is _backward:
        shape = (walk.G, walk.programs, walk.blocks, BLOCK, BLOCK)
        outputs["dM"] = jax.ShapeDtypeStruct(shape, jnp.float32)
    if skip is not None:
        given["skip"] = _to_lanes(skip, walk)
        if body is _backward:
            outputs["dskip"] = jax.ShapeDtypeStruct(given["skip"].shape, jnp.float32)
    leaves, tree = jax.tree.flatten(given)

    def kernel(*refs, **scratch):
        made = dict(zip(outputs, refs[len(leaves) :], strict=True))
        body(Program(walk, jax.tree.unflatten(tree, refs[: len(leaves)]) | made, scratch))

    found = mosaic.call(
        kernel,
        grid={"groups": walk.G, "programs": walk.programs},
        outputs=list(outputs.values()),
        scratch=_scratch(walk, list(laid), list(results), dtype, backward=body is _backward),
        interpret=interpret,
        name=f"fir_conv{body.__name__}",
    )(*leaves)
    named = dict(zip(outputs, found, strict=True))
    return {name: _back(x, walk, results[name]) if name in results else x for name, x in named.items()}


def _scratch(walk: Walk, inputs: list[str], results: list[str], dtype, *, backward: bool) -> dict:
    """Shared memory of one program, and its barriers."""
    shape, n = (LANES, BLOCK), walk.blocks
    halo = [name for name in inputs if name in (("dy", "x1") if backward else ("x2", "v"))]
    arrivals = {
        "arrived": (len(inputs) * walk.boxes, STAGES[dtype]),
        "early": (len(halo) * walk.boxes, 1),
        "built": (PARTS[dtype], 1),
    }
    scratch = {
        "stages": {name: mosaic.tile(STAGES[dtype], *shape, dtype=dtype) for name in inputs},
        "taps": mosaic.tiles(n, BLOCK, BLOCK, parts=PARTS[dtype]),
        "ring": mosaic.tiles(n, *shape, parts=PARTS[dtype]),
        "results": {name: mosaic.tile(*shape, dtype=dtype) for name in results},
    }
    if backward:
        scratch["u"] = mosaic.tiles(*shape, parts=PARTS[dtype])
    barriers = {
        name: mosaic_gpu.Barrier(num_arrivals=count, num_barriers=stages)
        for name, (count, stages) in arrivals.items()
    }
    return scratch | barriers
