"""The long convolution on GPUs, through Triton.

See `long_conv.py` for the algorithm. Up to 4096 points (fewer in float32 and in the backward pass: TABLE), a program
holds a pair of rows of one channel in registers. Longer signals do not fit there: persistent programs, one or two per
multiprocessor, process their pairs in three stages. Between stages the data is in each program's own scratch (64 KB at
16384 points), which stays in the L2 cache:

    1  tiles of n2:  gates, product with F1, twiddle factors                       -> scratch [k1, n2]
    2  tiles of k1:  product with F2, the filter, the inverse products             scratch, in place
    3  tiles of n1:  inverse product with F1, gate                                 scratch -> y

The threads of a program wait for each other between stages (debug_barrier); programs never wait for other programs.
When the scratch of all programs exceeds the L2 cache (from 128K points on), the same stages are three passes over
device memory.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl

from kernels_pallas import dft
from kernels_pallas.backends import triton as plgpu


@dataclasses.dataclass(frozen=True)
class Tiles:
    """Tile sizes of one kernel: an entry of the table below."""

    k1: int  # stage 1: rows of F1 per tile
    n2: int  # stages 1 and 3: columns per tile
    depth: int  # n1 (stage 1) or k1 (stage 3) per step of a sum
    row: int  # stage 2: k1 per tile
    k2: int  # stage 2: columns of the spectrum per tile
    n1: int  # stage 3: rows per tile
    warps: int
    stages: int  # buffers of shared memory for the constants that stream through
    programs: int  # number of persistent programs; 0: one program per pair, in registers


# {(bfloat16 parts per number, backward): (maximum points for which a pair fits in registers, tiles for more)}. These
# are the widest tiles that compile for an H200 without register spills, at every length and batch size tried. In
# bfloat16, 64 rows in stage 2 would use only wgmma, but spill 3 to 40 registers; so do 4 warps instead of 8, for some
# shapes.
TABLE = {
    (1, False): (4096, Tiles(64, 32, 32, 32, 32, 64, warps=8, stages=1, programs=132)),
    (1, True): (2048, Tiles(64, 32, 32, 32, 32, 64, warps=8, stages=1, programs=132)),
    (2, False): (2048, Tiles(32, 32, 32, 16, 32, 32, warps=4, stages=1, programs=264)),
    (2, True): (512, Tiles(32, 16, 32, 16, 16, 16, warps=4, stages=1, programs=264)),
}


def plan(length: int) -> dft.Plan:
    """The layout [n1, n2] in powers of two, as Triton requires: square up to 64 x 64, then rows of 128 tokens."""
    n = max(512, 1 << (2 * length - 1).bit_length())
    n2 = min(128, 1 << (n.bit_length() - 1) // 2)
    return dft.Plan(n // n2, n2, n // n2 // 2)


def tiles(points: dft.Plan, dtype, is_backward: bool) -> Tiles:
    in_registers, staged = TABLE[dft.parts_of(dtype), is_backward]
    if points.n <= in_registers:
        warps = 8 if is_backward or points.n > 2048 else 4
        k2 = min(points.n2, 32)
        return Tiles(points.n1, points.n2, points.rows, points.n1, k2, points.rows, warps, 1, 0)
    return dataclasses.replace(
        staged,
        k1=min(staged.k1, points.n1),
        n2=min(staged.n2, points.n2),
        depth=min(staged.depth, points.rows),
        row=min(staged.row, points.n1),
        k2=min(staged.k2, points.n2),
        n1=min(staged.n1, points.rows),
    )


@functools.cache
def _constants(points: dft.Plan, parts: int) -> list[np.ndarray]:
    """F1 [3 (re, im, -im), parts, n1, n1], F2 [2 (re, im), parts, n2, n2] and the twiddle factors [2, n1, n2]."""
    f1, f2 = dft.matrix(points.n1), dft.matrix(points.n2)
    return [
        np.stack([dft.split_constant(f, parts) for f in (*f1, -f1[1])]),
        np.stack([dft.split_constant(f, parts) for f in f2]),
        dft.twiddles(points),
    ]


def _left(f, x, total=(None, None)):
    """The complex product F1 x: F1 as (re, im, -im), x as (re, im), all split. Given (re, -im, im): conj(F1) x."""
    re, im, minus = f
    return (
        dft.product(minus, x[1], dft.product(re, x[0], total[0])),
        dft.product(re, x[1], dft.product(im, x[0], total[1])),
    )


def _right(x, f):
    """The complex product x F2, both as (re, im), all split."""
    (re, im), (fr, fi) = x, f
    # A difference of two products: passing -im as well would need another wide operand in registers.
    return dft.product(re, fr) - dft.product(im, fi), dft.product(im, fr, dft.product(re, fi))


def _right_conj(x, f, total=(None, None)):
    """The complex product x conj(F2)."""
    (re, im), (fr, fi) = x, f
    minus = tuple(-part for part in re)
    return (
        dft.product(im, fi, dft.product(re, fr, total[0])),
        dft.product(minus, fi, dft.product(im, fr, total[1])),
    )


class _Pair:
    """Channel d of rows 2 p and 2 p + 1 of the batch: loads, stores and the constants of their transform."""

    def __init__(self, points, tiles, shape, constants, spectrum, p, d):
        self.points, self.tiles, self.spectrum, self.d = points, tiles, spectrum, d
        self.f1, self.f2, self.twiddles = constants
        self.parts = self.f1.shape[1]
        B, _, self.T = shape
        self.odd = B % 2 == 1
        self.rows = (2 * p, jnp.minimum(2 * p + 1, B - 1) if self.odd else 2 * p + 1)
        self.second = 2 * p + 1 < B

    def _where(self, n1, n2, size1, size2, b):
        """The tokens [size1, size2] of the tile at (n1, n2), and a mask of those that exist; None: all exist."""
        rows = n1 + jax.lax.broadcasted_iota(jnp.int32, (size1, size2), 0)
        t = rows * self.points.n2 + n2 + jax.lax.broadcasted_iota(jnp.int32, (size1, size2), 1)
        ragged, alone = self.points.rows * self.points.n2 > self.T, self.odd and b == 1
        if not (ragged or alone):
            return t, None
        mask = t < self.T
        return t, mask & self.second if alone else mask

    def load(self, ref, at, b):
        n1, n2, size1, size2 = at
        t, mask = self._where(n1, n2, size1, size2, b)
        x = plgpu.load(ref.at[self.rows[b], self.d, t], mask=mask, other=None if mask is None else 0.0)
        return x.astype(jnp.float32)

    def store(self, ref, at, b, value):
        n1, n2, size1, size2 = at
        t, mask = self._where(n1, n2, size1, size2, b)
        plgpu.store(ref.at[self.rows[b], self.d, t], value.astype(ref.dtype), mask=mask)

    def signal(self, inputs, at):
        """The elementwise product of `inputs` at a tile, for both rows, split."""
        return tuple(
            dft.split(functools.reduce(jnp.multiply, [self.load(ref, at, b) for ref in inputs]), self.parts)
            for b in range(2)
        )

    def matrix1(self, at, conj=False):
        parts = [tuple(self.f1[i, p, *at] for p in range(self.parts)) for i in range(3)]
        return (parts[0], parts[2], parts[1]) if conj else parts

    def matrix2(self, at):
        return [tuple(self.f2[i, p, *at] for p in range(self.parts)) for i in range(2)]

    def split(self, x):
        return tuple(dft.split(part, self.parts) for part in x)

    def factors(self, at):
        return self.twiddles[0, *at], self.twiddles[1, *at]

    def filter(self, at):
        return tuple(self.spectrum[self.d, i, *at] for i in range(2))


def _sum(count: int, size, add):
    """Accumulates complex tiles of this size: total = add(i, total) for i < count, from zero."""
    if count == 1:
        return add(0)
    zero = jnp.zeros(size, jnp.float32)
    return jax.lax.fori_loop(0, count, add, (zero, zero))


def _analyse(pair: _Pair, inputs, k1, n2):
    """Stage 1 for the tile at (k1, n2): gates, product with F1, twiddle factors. Returns a complex tile in float32."""
    sizes = pair.tiles

    def add(i, total=(None, None)):
        rows = pl.ds(i * sizes.depth, sizes.depth)
        x = pair.signal(inputs, (i * sizes.depth, n2, sizes.depth, sizes.n2))
        return _left(pair.matrix1((pl.ds(k1, sizes.k1), rows)), x, total)

    a = _sum(pair.points.rows // sizes.depth, (sizes.k1, sizes.n2), add)
    return dft.times(a, pair.factors((pl.ds(k1, sizes.k1), pl.ds(n2, sizes.n2))))


def _synthesise(pair: _Pair, c, n1, n2):
    """Stage 3 for the tile at (n1, n2): the inverse product with F1. `c(k1, n2)` returns a tile of stage 2, split."""
    sizes = pair.tiles
    depth = sizes.depth if sizes.programs else pair.points.n1

    def add(i, total=(None, None)):
        k1 = i * depth
        return _left(pair.matrix1((pl.ds(n1, sizes.n1), pl.ds(k1, depth)), conj=True), c(k1, n2), total)

    return _sum(pair.points.n1 // depth, (sizes.n1, sizes.n2), add)


class _Scratch:
    """A program's own scratch in device memory, used between stages: [2 (re, im), parts, n1, n2] bfloat16."""

    def __init__(self, ref, program, interpret):
        self.ref, self.program, self.interpret = ref, program, interpret
        self.parts = ref.shape[2]

    def wait(self):
        """Waits until all threads of the program have arrived and their writes are visible."""
        if not self.interpret:  # the interpreter has one thread per program and no barrier
            plgpu.debug_barrier()

    def put(self, at, value):
        for i in range(2):
            for p, part in enumerate(dft.split(value[i], self.parts)):
                self.ref[self.program, i, p, *at] = part

    def get(self, at):
        return tuple(tuple(self.ref[self.program, i, p, *at] for p in range(self.parts)) for i in range(2))


def _each(count: jax.Array | int, body):
    def step(i, carry):
        body(i)
        return carry

    jax.lax.fori_loop(0, count, step, None)


def _place(i, columns: int, height: int, width: int):
    """The row and the column at which the i-th tile begins."""
    return jax.lax.div(i, columns) * height, jax.lax.rem(i, columns) * width


def _stage1(pair: _Pair, inputs, scratch: _Scratch):
    sizes, points = pair.tiles, pair.points
    columns = points.n2 // sizes.n2

    def tile(i):  # all n2 of one k1, then the next k1
        k1, n2 = _place(i, columns, sizes.k1, sizes.n2)
        scratch.put((pl.ds(k1, sizes.k1), pl.ds(n2, sizes.n2)), _analyse(pair, inputs, k1, n2))

    _each(points.n1 // sizes.k1 * columns, tile)


def _stage3(pair: _Pair, outputs, scratch: _Scratch):
    """Each output is its gate (or None) times the signal."""
    sizes, points = pair.tiles, pair.points
    columns = points.n2 // sizes.n2

    def c(k1, n2):
        return scratch.get((pl.ds(k1, sizes.depth), pl.ds(n2, sizes.n2)))

    def tile(i):
        n1, n2 = _place(i, columns, sizes.n1, sizes.n2)
        _emit(pair, outputs, _synthesise(pair, c, n1, n2), n1, n2)

    _each(points.rows // sizes.n1 * columns, tile)


def _emit(pair: _Pair, outputs, value, n1, n2):
    at = (n1, n2, pair.tiles.n1, pair.tiles.n2)
    for ref, gate in outputs:
        for b in range(2):
            pair.store(ref, at, b, value[b] if gate is None else value[b] * pair.load(gate, at, b))


def _convolve(pair: _Pair, a, k1):
    """Stage 2 for these k1: product with F2, the filter, the inverse product, twiddle factors. `a` is split."""
    sizes, points = pair.tiles, pair.points

    def add(i, total=(None, None)):
        k2 = pl.ds(i * sizes.k2, sizes.k2)
        spectrum = _right(a, pair.matrix2((slice(None), k2)))
        filtered = dft.times(spectrum, pair.filter((k1, k2)))
        return _right_conj(pair.split(filtered), pair.matrix2((k2, slice(None))), total)

    c = _sum(points.n2 // sizes.k2, (sizes.row, points.n2), add)
    return dft.times(c, pair.factors((k1, slice(None))), conj=True)


def _correlate(pair: _Pair, g, u, k1, gradient):
    """Stage 2 of the backward pass for g: with the filter's conjugate; `gradient` collects G conj(U)."""
    sizes, points = pair.tiles, pair.points

    def add(i, total=(None, None)):
        k2 = pl.ds(i * sizes.k2, sizes.k2)
        f2 = pair.matrix2((slice(None), k2))
        spectrum = _right(g, f2)
        gradient((k1, k2), dft.times(spectrum, _right(u, f2), conj=True))
        filtered = dft.times(spectrum, pair.filter((k1, k2)), conj=True)
        return _right_conj(pair.split(filtered), pair.matrix2((k2, slice(None))), total)

    c = _sum(points.n2 // sizes.k2, (sizes.row, points.n2), add)
    return dft.times(c, pair.factors((k1, slice(None))), conj=True)


def _items(program, total: int, programs: int, body):
    """Runs body(i) for this program's share of `total` items."""
    if programs == 0:  # one program per item
        body(program)
    else:
        _each(jax.lax.div(total - program + programs - 1, programs), lambda i: body(program + i * programs))


def _forward_kernel(*refs, points, sizes, shape, gates, interpret):
    x1, x2, v, spectrum, *constants, y, scratch = dft.present(refs, (*gates, *[True] * 6, sizes.programs > 0))
    pairs = -(-shape[0] // 2)
    inputs = [x for x in (x2, v) if x is not None]
    program = pl.program_id(0)

    def item(i):  # consecutive items are pairs of one channel: they share its filter in the L2 cache
        pair = _Pair(points, sizes, shape, constants, spectrum, jax.lax.rem(i, pairs), jax.lax.div(i, pairs))
        if scratch is None:
            c = pair.split(_convolve(pair, pair.split(_analyse(pair, inputs, 0, 0)), slice(None)))
            return _emit(pair, [(y, x1)], _synthesise(pair, lambda *_: c, 0, 0), 0, 0)
        own = _Scratch(scratch, program, interpret)
        _stage1(pair, inputs, own)
        own.wait()

        def tile(j):
            k1 = pl.ds(j * sizes.row, sizes.row)
            c = _convolve(pair, own.get((k1, slice(None))), k1)
            own.wait()  # everyone has read the tile
            own.put((k1, slice(None)), c)

        _each(points.n1 // sizes.row, tile)
        own.wait()
        _stage3(pair, [(y, x1)], own)
        own.wait()

    _items(program, shape[1] * pairs, sizes.programs, item)


def _backward_kernel(*refs, points, sizes, shape, gates, interpret):
    """dy, x1, x2, v -> dx1 = dy conv(u), dx2 = du v, dv = du x2 and the filter's dH, summed over the batch."""
    persistent = sizes.programs > 0
    given = (True, *gates, *[True] * 5, *gates, True, True, persistent, persistent)
    dy, x1, x2, v, spectrum, *constants, dx1, dx2, dv, dh, scratch_g, scratch_u = dft.present(refs, given)
    inputs_u = [x for x in (x2, v) if x is not None]
    inputs_g = [x for x in (x1, dy) if x is not None]
    outputs_g = [(dv, x2)] + ([(dx2, v)] if dx2 is not None else [])
    outputs_u = [(dx1, dy)] if dx1 is not None else []
    program = pl.program_id(0)

    def one(p, d):
        pair = _Pair(points, sizes, shape, constants, spectrum, p, d)
        gradient = functools.partial(_collect, dh, d, p)
        if not persistent:
            g, u = (pair.split(_analyse(pair, x, 0, 0)) for x in (inputs_g, inputs_u))
            c = pair.split(_correlate(pair, g, u, slice(None), gradient))
            _emit(pair, outputs_g, _synthesise(pair, lambda *_: c, 0, 0), 0, 0)
            if outputs_u:
                c = pair.split(_convolve(pair, u, slice(None)))
                _emit(pair, outputs_u, _synthesise(pair, lambda *_: c, 0, 0), 0, 0)
            return
        own_g, own_u = (_Scratch(ref, program, interpret) for ref in (scratch_g, scratch_u))
        _stage1(pair, inputs_g, own_g)
        _stage1(pair, inputs_u, own_u)
        own_g.wait()

        def tile(j):
            at = (pl.ds(j * sizes.row, sizes.row), slice(None))
            c = _correlate(pair, own_g.get(at), own_u.get(at), at[0], gradient)
            own_g.wait()  # everyone has read the tile
            own_g.put(at, c)
            if outputs_u:
                c = _convolve(pair, own_u.get(at), at[0])
                own_u.wait()
                own_u.put(at, c)

        _each(points.n1 // sizes.row, tile)
        own_g.wait()
        _stage3(pair, outputs_g, own_g)
        if outputs_u:
            _stage3(pair, outputs_u, own_u)
        own_g.wait()

    def channel(d):  # one program processes all pairs of a channel, so dH needs no atomics
        _each(-(-shape[0] // 2), lambda p: one(p, d))

    _items(program, shape[1], sizes.programs, channel)


def _collect(ref, d, p, at, value):
    """Adds to the gradient of channel d's filter. The first pair overwrites the uninitialised memory."""
    for i in range(2):
        there = ref.at[d, i, *at]
        before = jnp.where(p > 0, there[...], 0.0)
        there[...] = before + value[i]


def call(arrays, H, gates, *, is_backward: bool, interpret: bool):
    """Runs the forward or the backward kernel; see `long_conv._kernels`."""
    B, D, T = arrays[-1].shape
    dtype, outputs = arrays[-1].dtype, 1 + is_backward * sum(gates)
    points, kernel = plan(T), _backward_kernel if is_backward else _forward_kernel
    sizes = tiles(points, dtype, is_backward)
    signals = 2 if is_backward else 1  # transformed at a time
    out_shape = [jax.ShapeDtypeStruct((B, D, T), dtype)] * outputs
    out_shape += [jax.ShapeDtypeStruct(H.shape, jnp.float32)] * is_backward
    programs = D if is_backward else D * -(-B // 2)
    if sizes.programs:
        programs = min(sizes.programs, programs)
        sizes = dataclasses.replace(sizes, programs=programs)
        out_shape += [
            jax.ShapeDtypeStruct((programs, 2, dft.parts_of(dtype), points.n1, points.n2), jnp.bfloat16)
        ] * signals
    macs = signals * D * -(-B // 2) * points.n * (4 * points.n1 + 8 * points.n2)
    out = pl.pallas_call(
        functools.partial(
            kernel, points=points, sizes=sizes, shape=(B, D, T), gates=gates, interpret=interpret
        ),
        out_shape=out_shape,
        grid=(programs,),
        compiler_params=plgpu.CompilerParams(num_warps=sizes.warps, num_stages=sizes.stages),
        cost_estimate=pl.CostEstimate(
            flops=2 * macs * (2 * dft.parts_of(dtype) - 1),
            bytes_accessed=(len(arrays) + outputs) * B * D * T * dtype.itemsize
            + (1 + is_backward) * H.size * 4,
            transcendentals=0,
        ),
        interpret=interpret,
        name="long_conv_backward" if is_backward else "long_conv",
    )(*arrays, H, *map(jnp.asarray, _constants(points, dft.parts_of(dtype))))
    return out[: outputs + is_backward]
