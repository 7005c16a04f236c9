"""How the forms of second-order attention go over rows: head by head, a tile of tokens at a time, in place.

A form reads tiles of q, k and v [B, T, N, H] where they lie and writes tiles of its results where they will be used. It
rescales a tile (second_order_units.py) when it reads it, and divides its sums by the weights before it writes them. So
beside its inputs and results it holds the state and a few tiles per head, whatever T is. Only arrays with one number
per token and head, 1 / H as large, exist as copies.

On a CPU this matters for time too: the C library maps memory above 32 MB anew at every call, and the kernel then clears
all of its pages.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from lcx.ops import dispatch
from lcx.ops.decay import divided
from lcx.ops.second_order_units import times_power
from lcx.ops.tiling import row_dots

TILE = 128
FAINT = 1e-12  # a score, relative to the sizes of query and key, that may be pure rounding error
MAYBE, SURELY = 1, 2  # in Rows.alone
AXES = "second_order_rows", "second_order_heads"
Outputs = tuple[Float[Array, "B T N H"], Float[Array, "B T N 1"]]


class Rows(NamedTuple):
    """The arguments of a form. T is n - 1 tiles of C tokens and one that may be shorter.

    Queries are q 2^of_q, keys are k 2^of_k where `shown` and otherwise 0. The state belongs to run 0.

    Without `alone`, a form returns the sums of the weighted values and of the weights. With it, it returns y and the
    weights by which the sums were divided. `alone` says which tokens see only themselves: SURELY, MAYBE (unless their
    score is FAINT) or 0. Their y is exactly their value, whatever their score, so they do not enter the gradient of the
    score, which would be the rounding error of a difference of two equal numbers, divided by the score. Their weight is
    noted as infinite, and as 0 if their score is 0 or they are not `shown`: then y is 0.
    """

    q: Float[Array, "B T N H"]
    k: Float[Array, "B T N H"]
    v: Float[Array, "B T N H"]
    of_q: Int[Array, "B N n C"]
    of_k: Int[Array, "B N n C"]
    shown: Bool[Array, "B N n C"]
    decay: Float[Array, "B N n C"]
    runs: Int[Array, "B N n C"]
    alone: Int[Array, "B N n C"] | None = None


class Head(NamedTuple):
    """One row and head of `Rows`: the first three arrays are whole, `at` is the head's place (b, n) in them.

    axes: names of the axes along which heads are computed at once; none on a CPU.
    """

    at: tuple
    q: Array
    k: Array
    v: Array
    of_q: Int[Array, "n C"]
    of_k: Int[Array, "n C"]
    shown: Bool[Array, "n C"]
    decay: Float[Array, "n C"]
    runs: Int[Array, "n C"]
    alone: Int[Array, "n C"] | None
    axes: tuple[str, ...] = ()

    def in_any(self, flag: Bool[Array, ""]) -> Bool[Array, ""]:
        """Whether it holds in any of the heads that are computed at once.

        By this a loop goes on, so that it has one length for all of them. With one of its own in each, XLA would copy
        what it carries in every step, gradients of whole rows among it.
        """
        return jax.lax.pmax(flag.astype(jnp.int32), self.axes) > 0 if self.axes else flag

    def queries(self, i) -> Float[Array, "C H"]:
        return _scaled(self.cut(self.q, i), self.of_q[i][:, None])

    def keys(self, i) -> Float[Array, "C H"]:
        k = jnp.where(self.shown[i][:, None], self.cut(self.k, i), 0)
        return _scaled(k, self.of_k[i][:, None])

    def values(self, i) -> Float[Array, "C W"]:
        """With a column of ones, whose sum is the sum of the weights."""
        v = self.cut(self.v, i)
        return jnp.concatenate([v, jnp.ones_like(v[:, :1])], axis=1)

    def put_outputs(self, outputs: Outputs, sums: Float[Array, "C W"], q: Array, k: Array, i) -> Outputs:
        """Writes the results of tile i, given its sums of values and of weights, its `queries` and its `keys`."""
        values, weights = sums[:, :-1], sums[:, -1:]
        if self.alone is not None:
            score, alone = row_dots(q.astype(sums.dtype), k.astype(sums.dtype)), self.alone[i]
            fixed = (alone == SURELY) | ((alone == MAYBE) & (jnp.abs(score) > FAINT))
            fixed = (fixed & jnp.isfinite(score) | ~self.shown[i])[:, None]
            itself = fixed & (self.shown[i] & (score != 0))[:, None]
            weights = jnp.where(fixed, jnp.where(itself, jnp.inf, 0), weights)
            values = jnp.where(itself, self.cut(self.v, i), divided(values, weights))
        return self.put(outputs[0], values, i), self.put(outputs[1], weights, i)

    def d_weights(self, y: Array, weights: Array, dy: Float[Array, "C H"], i) -> Float[Array, "C 1"]:
        """The gradient of tile i's sums of weights; without `alone` it is `weights`, and y is not read."""
        weights = self.cut(weights, i)
        if self.alone is None:
            return weights
        return -divided(jnp.sum(self.cut(y, i) * dy, axis=1, keepdims=True), weights)

    def d_sums(self, weights: Array, d_weights: Array, dy: Float[Array, "C H"], i) -> tuple[Array, Array]:
        """(the gradient of tile i's sums [C, W], that of the values which are their token's y [C, H])."""
        if self.alone is None:
            return jnp.concatenate([dy, d_weights], axis=1), jnp.zeros_like(dy)
        weights = self.cut(weights, i)
        sums = jnp.concatenate([divided(dy, weights), d_weights], axis=1)
        return sums, jnp.where(weights == jnp.inf, dy, 0)

    def d_queries(self, dq: Array, i) -> Array:
        """The gradient of q's tile from that of `queries`."""
        return times_power(dq, self.of_q[i][:, None])

    def d_keys(self, dk: Array, i) -> Array:
        return times_power(jnp.where(self.shown[i][:, None], dk, 0), self.of_k[i][:, None])

    def earlier(self) -> "EarlierTiles":
        """The same head, for tiles that have others after them."""
        return EarlierTiles(*self)

    def cut(self, x: Float[Array, "B T N W"], i) -> Float[Array, "C W"]:
        """Tile i of this head; 0 beyond the end of the row."""
        C = self.decay.shape[1]
        start, beyond = self._place(x, i)
        (b, n), width = self.at, x.shape[3]
        tile = jax.lax.dynamic_slice(x, (b, start, n, 0), (1, C, 1, width)).reshape(C, width)
        if x.shape[1] % C == 0:
            return tile

        def shifted(tile):
            return jnp.where((jnp.arange(C) < C - beyond)[:, None], jnp.roll(tile, -beyond, axis=0), 0)

        return jax.lax.cond(beyond == 0, lambda tile: tile, shifted, tile)  # only the last tile is short

    def put(self, x: Float[Array, "B T N W"], tile: Float[Array, "C W"], i) -> Float[Array, "B T N W"]:
        """x with tile i of this head replaced; what is beyond the end of the row is dropped."""
        C = self.decay.shape[1]
        start, beyond = self._place(x, i)
        (b, n), width, tile = self.at, x.shape[3], tile.astype(x.dtype)

        def shifted(tile, old):
            return jnp.where((jnp.arange(C) < beyond)[:, None], old, jnp.roll(tile, beyond, axis=0))

        if x.shape[1] % C:
            old = jax.lax.dynamic_slice(x, (b, start, n, 0), (1, C, 1, width)).reshape(C, width)
            tile = jax.lax.cond(beyond == 0, lambda tile, _: tile, shifted, tile, old)
        return jax.lax.dynamic_update_slice(x, tile[None, :, None], (b, start, n, 0))

    def add(self, x: Float[Array, "B T N W"], tile: Float[Array, "C W"], i) -> Float[Array, "B T N W"]:
        return self.put(x, self.cut(x, i) + tile, i)

    def _place(self, x: Array, i) -> tuple:
        """Where the last C tokens that exist up to the end of tile i begin, and how many of tile i's do not exist."""
        C = self.decay.shape[1]
        start = jnp.minimum(i * C, x.shape[1] - C)
        return start, i * C - start


class EarlierTiles(Head):
    """A head of which only tiles before the last are used: they are whole, so that nothing has to be shifted."""

    __slots__ = ()

    def cut(self, x: Float[Array, "B T N W"], i) -> Float[Array, "C W"]:
        (b, n), C, width = self.at, self.decay.shape[1], x.shape[3]
        return jax.lax.dynamic_slice(x, (b, i * C, n, 0), (1, C, 1, width)).reshape(C, width)

    def put(self, x: Float[Array, "B T N W"], tile: Float[Array, "C W"], i) -> Float[Array, "B T N W"]:
        (b, n), C = self.at, self.decay.shape[1]
        return jax.lax.dynamic_update_slice(x, tile.astype(x.dtype)[None, :, None], (b, i * C, n, 0))


def _scaled(x: Array, power: Array) -> Array:
    """times_power(x, power), as a branch so that XLA computes it once and not again inside every product."""
    return jax.lax.cond(jnp.any(power != 0), times_power, lambda x, _: x, x, power)


def tile_size(T: int) -> int:
    return min(TILE, T)


def in_tiles(x: Array) -> Array:
    """[B, T, N] -> [B, N, n, C], the end filled with 0; integers [B, T] (runs) likewise, with the last entry."""
    T = x.shape[1]
    pad, C = -T % tile_size(T), tile_size(T)
    x = jnp.moveaxis(x, 1, -1)
    x = jnp.pad(x, (*((0, 0),) * (x.ndim - 1), (0, pad)), mode="edge" if x.ndim == 2 else "constant")
    return x.reshape(*x.shape[:-1], -1, C)


def each_head(fn, rows: Rows, others: tuple, of_heads: tuple, results: tuple):
    """(results, small) = fn(head, others, of_head, results) for each head, and small results as [B, N, ...].

    On a CPU this is a loop, so that one head's tiles stay in cache; elsewhere it is a vmap, to fill the chip.

    Args:
      others: further arrays [B, T, N, W].
      of_heads: further arrays [B, N, ...].
      results: arrays [B, T, N, W] that fn overwrites.
    """
    B, _, N = rows.q.shape[:3]
    large, small = (*rows[:3], *others), (rows[3:], *of_heads)

    def one(at, large, small, results, axes=()):
        head = Head(at, *large[:3], *small[0], axes=axes)
        return fn(head, large[3:], small[1:], results)

    if dispatch.platform() == "cpu":

        def next_head(results, xs):
            index, small = xs
            return one((index // N, index % N), large, small, results)

        flat = jax.tree.map(lambda x: x.reshape(B * N, *x.shape[2:]), small)
        results, out = jax.lax.scan(next_head, results, (jnp.arange(B * N), flat))
        return results, jax.tree.map(lambda x: x.reshape(B, N, *x.shape[1:]), out)

    def alone(large, small, results):
        large, results = jax.tree.map(lambda x: x[None, :, None], (large, results))
        results, out = one((0, 0), large, small, results, AXES)
        return jax.tree.map(lambda x: x[0, :, 0], results), out

    heads = jax.vmap(alone, in_axes=(1, 0, 1), out_axes=(1, 0), axis_name=AXES[1])
    return jax.vmap(heads, axis_name=AXES[0])(large, small, results)
