"""The block-Toeplitz convolution on TPU: the walks of `kernels_pallas.fir_conv`.

Blocks have 128 tokens. A grid step has `channels` channels and `tokens` tokens of a row in VMEM. Steps along time run
in order and pass on the last gated inputs (backward: the first gradients) in scratch. A step arranges its tokens by
blocks, rows [(block, channel), 128]: the inputs j blocks back are then the same rows at an offset of j x channels, and
no data moves. There are two cases:

  a step lies within a group (its channels are a multiple of 8): all rows are one matrix, times the group's M_j;
  groups are small: every channel's blocks, a strided read, are a matrix of their own.

The Toeplitz blocks [M_0 | M_1 | ...] of a group are made in VMEM once for the whole batch and length, by one strided
roll of its taps: row s is h shifted by s lanes. dM_j is accumulated in float32 in its output block, which stays in VMEM
over the whole batch and length. float32 inputs use products of precision HIGHEST.

Every input block is read once and every output is written once: 8 bytes per element forward, 14 backward. In addition,
each backward step reads the 128 tokens of x2 and v before it (for dx1).
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

BLOCK = 128
# Elements of one array in a grid step. The backward step holds nine arrays and four float32 temporaries; both steps fit
# the 16 MiB of VMEM that a kernel gets by default on v5e and v5p.
ELEMENTS = {"forward": 128 * 2048, "backward": 128 * 512}


@dataclasses.dataclass(frozen=True)
class Walk:
    B: int
    D: int
    T: int
    K: int
    per_group: int
    channels: int  # per step
    tokens: int
    within: bool  # all channels of a step are in one group

    @property
    def reach(self) -> int:
        return -(-self.K // BLOCK)

    @property
    def blocks(self) -> int:
        return self.tokens // BLOCK

    @property
    def groups(self) -> int:
        """Number of groups in a step."""
        return 1 if self.within else self.channels // self.per_group

    @property
    def grid(self):
        inner = self.per_group // self.channels if self.within else 1
        return -(-self.D // (inner * self.channels)), inner, self.B, -(-self.T // self.tokens)


def channels(D: int, G: int) -> tuple[int, bool] | None:
    """(channels per step, whether they are all in one group); None if no step size fits."""
    per_group = D // G
    for count in range(min(per_group, 128), 7, -1):
        if count % 8 == 0 and per_group % count == 0:
            return count, True
    several = math.lcm(per_group, 16)
    several = D if several > D else several
    return None if several > 256 else (several, False)


def plan(kind: str, v: jax.Array, h: jax.Array) -> Walk:
    (B, D, T), (G, K) = v.shape, h.shape
    count, within = channels(D, G)
    unit = BLOCK * -(-K // BLOCK)
    most = max(unit, ELEMENTS[kind] * 2 // v.dtype.itemsize // max(count, 16) // unit * unit)
    return Walk(B, D, T, K, D // G, count, min(most, -(-T // unit) * unit), within)


def _dot(a, b, contract=((1,), (0,))):
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return jax.lax.dot_general(
        a, b, (contract, ((), ())), precision=precision, preferred_element_type=jnp.float32
    )


def _toeplitz(h, blocks, walk: Walk):
    """blocks[group] = [M_0 | M_1 | ...], M_j[s, t] = h[128 j + t - s]: row s is h rolled by s."""

    def one(group, _):
        taps = jnp.broadcast_to(h[group], (BLOCK, h.shape[-1]))
        blocks[group] = pltpu.roll(taps, 0, 1, stride=1, stride_axis=0).astype(blocks.dtype)

    jax.lax.fori_loop(0, walk.groups, one, None)


def _columns(j):
    return slice(j * BLOCK, (j + 1) * BLOCK)


def _lay(rows, x, first, walk: Walk):
    """Writes tokens [channels, n 128] to rows, from block `first` on."""
    for c in range(x.shape[1] // BLOCK):
        rows[(first + c) * walk.channels : (first + c + 1) * walk.channels] = x[:, _columns(c)].astype(
            rows.dtype
        )


def _products(out, rows, blocks, walk: Walk, *, back: bool):
    """out = sum_j (rows j blocks before) M_j; `back`: sum_j (rows j blocks after) M_j^T."""
    count, n = walk.channels, walk.blocks
    contract = ((1,), (1,)) if back else ((1,), (0,))
    starts = [j if back else walk.reach - j for j in range(walk.reach + 1)]
    if walk.within:
        out[...] = sum(
            _dot(rows[start * count : (start + n) * count], blocks[0, :, _columns(j)], contract)
            for j, start in enumerate(starts)
        )
        return

    def one(channel, _):
        group = channel // walk.per_group
        out[pl.ds(channel, n, stride=count)] = sum(
            _dot(
                rows[pl.ds(start * count + channel, n, stride=count)].astype(blocks.dtype),
                blocks[group, :, _columns(j)],
                contract,
            )
            for j, start in enumerate(starts)
        )

    jax.lax.fori_loop(0, count, one, None)


def _correlate(sums, u, g, walk: Walk, dtype):
    """sums[group, j] += (u of this step)^T (g j blocks after)."""
    count, n = walk.channels, walk.blocks
    down = ((0,), (0,))
    if walk.within:
        own = u[walk.reach * count :]
        for j in range(walk.reach + 1):
            sums[0, j] += _dot(own, g[j * count : (j + n) * count], down)
        return

    def one(channel, _):
        own = u[pl.ds(walk.reach * count + channel, n, stride=count)].astype(dtype)
        for j in range(walk.reach + 1):
            ahead = g[pl.ds(j * count + channel, n, stride=count)].astype(dtype)
            sums[channel // walk.per_group, j] += _dot(own, ahead, down)

    jax.lax.fori_loop(0, count, one, None)


def _value(*refs):
    """The product of the given blocks [1, channels, n], skipping None, in float32."""
    tiles = [ref[0].astype(jnp.float32) for ref in refs if ref is not None]
    return functools.reduce(jnp.multiply, tiles)


def _inside(x, time, walk: Walk):
    """x [channels, tokens], with 0 after the end of the row."""
    if walk.T % walk.tokens == 0:
        return x
    token = time * walk.tokens + jax.lax.broadcasted_iota(jnp.int32, x.shape, 1)
    return jnp.where(token < walk.T, x, 0.0)


def _tile(rows, block, walk: Walk):
    return rows[block * walk.channels : (block + 1) * walk.channels]


def _forward(refs, *, walk: Walk):
    (x1, x2, v, h, skip, state), (y,), (blocks, rows, out) = refs
    time = pl.program_id(3)

    @pl.when((pl.program_id(2) == 0) & (time == 0))
    def _():
        _toeplitz(h, blocks, walk)

    @pl.when(time == 0)
    def _():
        before = (
            jnp.zeros((walk.channels, walk.reach * BLOCK), jnp.float32) if state is None else _value(state)
        )
        _lay(rows, before, 0, walk)

    u = _inside(_value(x2, v), time, walk)
    _lay(rows, u, walk.reach, walk)
    _products(out, rows, blocks, walk, back=False)
    for c in range(walk.blocks):
        z = _tile(out, c, walk)
        if skip is not None:
            z = z + skip[...] * u[:, _columns(c)]
        if x1 is not None:
            z = z * x1[0, :, _columns(c)].astype(jnp.float32)
        y[0, :, _columns(c)] = z.astype(y.dtype)
    for c in range(walk.reach):
        _move(rows, c, walk.blocks + c, walk)


def _move(rows, to, block, walk: Walk):
    rows[to * walk.channels : (to + 1) * walk.channels] = _tile(rows, block, walk)


def _backward(refs, *, walk: Walk):
    (dy, x1, x2, v, h, skip, state, x2_before, v_before), (dx1, dx2, dv, sums, dskip), scratch = refs
    blocks, u_rows, g_rows, out = scratch
    inner, row, step = pl.program_id(1), pl.program_id(2), pl.program_id(3)
    time = walk.grid[3] - 1 - step

    @pl.when((row == 0) & (step == 0))
    def _():
        _toeplitz(h, blocks, walk)
        if dskip is not None:
            dskip[...] = jnp.zeros(dskip.shape, jnp.float32)

    @pl.when((inner == 0) & (row == 0) & (step == 0))
    def _():
        sums[...] = jnp.zeros(sums.shape, jnp.float32)

    @pl.when(step == 0)
    def _():
        _lay(g_rows, jnp.zeros((walk.channels, walk.reach * BLOCK), jnp.float32), walk.blocks, walk)

    @pl.when(step > 0)
    def _():
        for c in range(walk.reach):
            _move(g_rows, walk.blocks + c, c, walk)

    u, g = _inside(_value(x2, v), time, walk), _inside(_value(dy, x1), time, walk)
    first = 0.0 if state is None else _value(state)
    _lay(u_rows, jnp.where(time == 0, first, _value(x2_before, v_before)), 0, walk)
    _lay(u_rows, u, walk.reach, walk)
    _lay(g_rows, g, 0, walk)
    _correlate(sums, u_rows, g_rows, walk, blocks.dtype)
    _products(out, g_rows, blocks, walk, back=True)
    for c in range(walk.blocks):
        du = _tile(out, c, walk)
        if skip is not None:
            du = du + skip[...] * g[:, _columns(c)]
            dskip[...] += u[:, _columns(c)] * g[:, _columns(c)]
        if x2 is not None:
            dx2[0, :, _columns(c)] = (du * v[0, :, _columns(c)].astype(jnp.float32)).astype(dx2.dtype)
            du = du * x2[0, :, _columns(c)].astype(jnp.float32)
        dv[0, :, _columns(c)] = du.astype(dv.dtype)
    if x1 is None:
        return
    _products(out, u_rows, blocks, walk, back=False)
    for c in range(walk.blocks):
        z = _tile(out, c, walk)
        if skip is not None:
            z = z + skip[...] * u[:, _columns(c)]
        dx1[0, :, _columns(c)] = (z * dy[0, :, _columns(c)].astype(jnp.float32)).astype(dx1.dtype)


def forward(x1, x2, v, h, skip, state, *, interpret: bool = False):
    """y [B, D, T]; arrays as in `kernels_pallas.fir_conv`, h float32."""
    return _call(_forward, plan("forward", v, h), (x1, x2, v, h, skip, state), (v,), interpret)[0]


def backward(dy, x1, x2, v, h, skip, state, *, interpret: bool = False):
    """(dx1, dx2, dv, dM [G, blocks, 128, 128], dskip [D]), None where there is no such input."""
    walk = plan("backward", v, h)
    f32 = jnp.float32
    sums = jax.ShapeDtypeStruct((h.shape[0], walk.reach + 1, BLOCK, BLOCK), f32)
    dskip = None if skip is None else jax.ShapeDtypeStruct((v.shape[1], BLOCK), f32)
    inputs = (dy, x1, x2, v, h, skip, state, x2, v)
    dx1, dx2, dv, sums, dskip = _call(_backward, walk, inputs, (x1, x2, v, sums, dskip), interpret)
    return dx1, dx2, dv, sums, None if skip is None else dskip.sum(axis=1)


def _call(body, walk: Walk, inputs, likes, interpret):
    """Runs body((inputs, outputs, scratch), walk=walk) over the grid; for an input or output None it passes None."""
    back = body is _backward
    here = [[x is not None for x in arrays] for arrays in (inputs, likes)]
    count, reach, v = walk.channels, walk.reach * BLOCK, likes[2 if back else 0]
    last = walk.grid[3] - 1

    def time(t):
        return last - t if back else t

    signal = pl.BlockSpec((1, count, walk.tokens), lambda g, c, b, t: (b, g * walk.grid[1] + c, time(t)))
    per = walk.tokens // reach
    before = pl.BlockSpec(
        (1, count, reach), lambda g, c, b, t: (b, g * walk.grid[1] + c, jnp.maximum(time(t) * per - 1, 0))
    )
    taps = pl.BlockSpec((walk.groups, 1, reach + BLOCK), lambda g, c, b, t: (g, 0, 0))
    one = pl.BlockSpec((count, 1), lambda g, c, b, t: (g * walk.grid[1] + c, 0))
    state = pl.BlockSpec((1, count, reach), lambda g, c, b, t: (b, g * walk.grid[1] + c, 0))
    sums = pl.BlockSpec((walk.groups, walk.reach + 1, BLOCK, BLOCK), lambda g, c, b, t: (g, 0, 0, 0))
    lanes = pl.BlockSpec((count, BLOCK), lambda g, c, b, t: (g * walk.grid[1] + c, 0))
    signals, weights = inputs[: 4 if back else 3], inputs[4 if back else 3 :]
    h, skip, initial = weights[:3]
    h = jnp.pad(h, ((0, 0), (0, reach + BLOCK - walk.K)))[:, None]
    skip = None if skip is None else skip.astype(jnp.float32)[:, None]
    initial = None if initial is None else jnp.pad(initial, ((0, 0), (0, 0), (reach - walk.K + 1, 0)))
    arrays = (*signals, h, skip, initial, *weights[3:])
    in_specs = (*(signal for _ in signals), taps, one, state, before, before)
    out_specs = (signal, signal, signal, sums, lanes) if back else (signal,)
    rows = ((walk.blocks + walk.reach) * count, BLOCK)
    row_type = v.dtype if walk.within else jnp.float32  # strided reads need 32-bit elements
    scratch = [pltpu.VMEM((walk.groups, BLOCK, reach + BLOCK), v.dtype)]
    scratch += [pltpu.VMEM(rows, row_type)] * (2 if back else 1)
    scratch += [pltpu.VMEM((walk.blocks * count, BLOCK), jnp.float32)]

    def kernel(*refs):
        left = iter(refs)
        filled = [[next(left) if there else None for there in part] for part in here]
        body((*filled, list(left)), walk=walk)

    outputs = pl.pallas_call(
        kernel,
        grid=walk.grid,
        in_specs=[spec for x, spec in zip(arrays, in_specs) if x is not None],
        out_specs=[spec for x, spec in zip(likes, out_specs) if x is not None],
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in likes if x is not None],
        scratch_shapes=scratch,
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", *("arbitrary",) * 3)),
        interpret=interpret,
        name=f"fir_conv{body.__name__}",
    )(*(x for x in arrays if x is not None))
    found = iter(outputs)
    return [next(found) if there else None for there in here[1]]
