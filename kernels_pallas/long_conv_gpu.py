"""The long convolution on GPUs, through Triton.

See `long_conv.py` for the algorithm. Up to 4096 points (less in float32 and backward: TABLE) a program holds a pair of
rows of one channel in registers. Longer ones do not fit: persistent programs, one or two per multiprocessor, process
their pairs in three stages. Between stages the data is in each program's own scratch (64 KB at 16384 points), which
stays in the L2 cache:

    1  tiles of n2:  gates, product with F1, twiddle factors                       -> scratch [k1, n2]
    2  tiles of k1:  product with F2, the filter, the inverse products             scratch, in place
    3  tiles of n1:  inverse product with F1, gate                                 scratch -> y

The threads of a program wait for each other between stages (debug_barrier); programs never wait for programs. Where
the scratch of all programs outgrows the L2 (from 128K points on) the same stages are three passes over device memory.
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
    """Sizes of one kernel: an entry of the table below."""

    k1: int  # of stage 1: the rows of F1 at a time
    n2: int  # of stages 1 and 3
    depth: int  # of the sums over n1 and k1
    row: int  # k1 at a time in stage 2
    k2: int  # columns of the spectrum at a time in stage 2
    n1: int  # of stage 3
    warps: int
    stages: int  # buffers of shared memory for the constants that stream through
    programs: int  # persistent


# {(parts of a number, backward): (points up to which a pair fits in registers, tiles beyond)}. The widest tiles that an
# H200's compiler fits into registers without spilling one, at every length and batch that was tried. In bfloat16, 64
# rows in stage 2 would be all wgmma, but spill 3 to 40 registers; so do 4 warps in place of 8, for some shapes.
TABLE = {
    (1, False): (4096, Tiles(64, 32, 32, 32, 32, 64, warps=8, stages=1, programs=132)),
    (1, True): (2048, Tiles(64, 32, 32, 32, 32, 64, warps=8, stages=1, programs=132)),
    (2, False): (2048, Tiles(32, 32, 32, 16, 32, 32, warps=4, stages=1, programs=264)),
    (2, True): (512, Tiles(32, 16, 32, 16, 16, 16, warps=4, stages=1, programs=264)),
}


def plan(length: int) -> dft.Plan:
    """Powers of two, as Triton requires: square up to 64 x 64, then rows of 128 tokens, 256 contiguous bytes."""
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
    """F1 [3, parts, n1, n1] and F2 [2, parts, n2, n2]: real, imaginary (and minus that); twiddle factors."""
    f1, f2 = dft.matrix(points.n1), dft.matrix(points.n2)
    return [
        np.stack([dft.split_constant(f, parts) for f in (*f1, -f1[1])]),
        np.stack([dft.split_constant(f, parts) for f in f2]),
        dft.twiddles(points),
    ]


def _left(f, x, total=(None, None)):
    """The product of F1 (re, im, -im) with x (re, im), all split. With (re, -im, im): of its conjugate."""
    re, im, minus = f
    return (
        dft.product(minus, x[1], dft.product(re, x[0], total[0])),
        dft.product(re, x[1], dft.product(im, x[0], total[1])),
    )


def _right(x, f):
    """The product of x (re, im) with F2 (re, im), all split."""
    (re, im), (fr, fi) = x, f
    # A difference of narrow products: -im would be one more wide operand in registers.
    return dft.product(re, fr) - dft.product(im, fi), dft.product(im, fr, dft.product(re, fi))


def _right_conj(x, f, total=(None, None)):
    """The product of x with the conjugate of F2."""
    (re, im), (fr, fi) = x, f
    minus = tuple(-part for part in re)
    return (
        dft.product(im, fi, dft.product(re, fr, total[0])),
        dft.product(minus, fi, dft.product(im, fr, total[1])),
    )


class _Pair:
    """Rows 2 p and 2 p + 1 of the batch, channel d: where they are and how they are transformed."""

    def __init__(self, points, tiles, shape, constants, spectrum, p, d):
        self.points, self.tiles, self.spectrum, self.d = points, tiles, spectrum, d
        self.f1, self.f2, self.twiddles = constants
        self.parts = self.f1.shape[1]
        B, _, self.T = shape
        self.odd = B % 2 == 1
        self.rows = (2 * p, jnp.minimum(2 * p + 1, B - 1) if self.odd else 2 * p + 1)
        self.second = 2 * p + 1 < B

    def _where(self, n1, n2, size1, size2, b):
        """Tokens [size1, size2] of the tile at (n1, n2), and which of them there are; None: all."""
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
        """The product of `inputs` at a tile: both rows, split."""
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
    """add(0, ...), ..., add(count - 1, total so far) of complex tiles of this size, from 0."""
    if count == 1:
        return add(0)
    zero = jnp.zeros(size, jnp.float32)
    return jax.lax.fori_loop(0, count, add, (zero, zero))


def _analyse(pair: _Pair, inputs, k1, n2):
    """Stage 1 at (k1, n2): gates, product with F1, twiddle factors. A complex tile, float32."""
    sizes = pair.tiles

    def add(i, total=(None, None)):
        rows = pl.ds(i * sizes.depth, sizes.depth)
        x = pair.signal(inputs, (i * sizes.depth, n2, sizes.depth, sizes.n2))
        return _left(pair.matrix1((pl.ds(k1, sizes.k1), rows)), x, total)

    a = _sum(pair.points.rows // sizes.depth, (sizes.k1, sizes.n2), add)
    return dft.times(a, pair.factors((pl.ds(k1, sizes.k1), pl.ds(n2, sizes.n2))))


def _synthesise(pair: _Pair, c, n1, n2):
    """Stage 3 at (n1, n2): the inverse product with F1. `c(k1, n2)` gives a tile of stage 2, split."""
    sizes = pair.tiles
    depth = sizes.depth if sizes.programs else pair.points.n1

    def add(i, total=(None, None)):
        k1 = i * depth
        return _left(pair.matrix1((pl.ds(n1, sizes.n1), pl.ds(k1, depth)), conj=True), c(k1, n2), total)

    return _sum(pair.points.n1 // depth, (sizes.n1, sizes.n2), add)


class _Scratch:
    """A program's own device memory between the stages: [2 (re, im), parts, n1, n2] bfloat16."""

    def __init__(self, ref, program, interpret):
        self.ref, self.program, self.interpret = ref, program, interpret
        self.parts = ref.shape[2]

    def wait(self):
        """Waits until all threads of the program are here and their writes are visible."""
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

    def tile(i):  # the tiles of k1 one after the other: they read the same tokens
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
    """body(i) for this program's share of `total`."""
    if programs == 0:  # a program each
        body(program)
    else:
        _each(jax.lax.div(total - program + programs - 1, programs), lambda i: body(program + i * programs))


def _forward_kernel(*refs, points, sizes, shape, gates, interpret):
    x1, x2, v, spectrum, *constants, y, scratch = _take(refs, (*gates, *[True] * 6, sizes.programs > 0))
    pairs = -(-shape[0] // 2)
    inputs = [x for x in (x2, v) if x is not None]
    program = pl.program_id(0)

    def item(i):  # the pairs of a channel in a row: they share its filter, in the L2
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
    present = (True, *gates, *[True] * 5, *gates, True, True, persistent, persistent)
    dy, x1, x2, v, spectrum, *constants, dx1, dx2, dv, dh, scratch_g, scratch_u = _take(refs, present)
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

    def channel(d):  # a channel's pairs belong to one program: its dH needs no atomics
        _each(-(-shape[0] // 2), lambda p: one(p, d))

    _items(program, shape[1], sizes.programs, channel)


def _collect(ref, d, p, at, value):
    """Adds to the gradient of channel d's filter; the first pair overwrites it."""
    for i in range(2):
        there = ref.at[d, i, *at]
        before = jnp.where(p > 0, there[...], 0.0)
        there[...] = before + value[i]


def _take(refs, present):
    """The next ref for each input that is present, otherwise None."""
    refs = iter(refs)
    return [next(refs) if p else None for p in present]


def forward(x1, x2, v, H, *, interpret: bool):
    """y [B, D, T] of gates and v [B, D, T] and a spectrum [D, 2, n1, n2] by `dft.spectrum` for `plan(T)`."""
    gates = (x1 is not None, x2 is not None)
    (y,) = _call(_forward_kernel, "long_conv", (x1, x2, v), H, gates, outputs=1, interpret=interpret)
    return y


def backward(dy, x1, x2, v, H, *, interpret: bool):
    """(dx1, dx2, dv, dH), the first two None without the gate; dH is for `dft.taps`."""
    gates = (x1 is not None, x2 is not None)
    outputs = 1 + sum(gates)
    out = _call(
        _backward_kernel,
        "long_conv_backward",
        (dy, x1, x2, v),
        H,
        gates,
        outputs=outputs,
        interpret=interpret,
    )
    return _take(out, (*gates, True, True))


def _call(kernel, name, arrays, H, gates, *, outputs, interpret):
    arrays = [x for x in arrays if x is not None]
    B, D, T = arrays[-1].shape
    dtype = arrays[-1].dtype
    points, is_backward = plan(T), kernel is _backward_kernel
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
        name=name,
    )(*arrays, H, *map(jnp.asarray, _constants(points, dft.parts_of(dtype))))
    return out[: outputs + is_backward]
