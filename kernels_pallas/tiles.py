"""Common parts of causal tiles with a decay: chunks of T, sums of the decay inside them, and how far a chunk sees.

T is cut into chunks of C tokens. With l the running sum of log_decay inside a chunk and tot its end, token i of chunk
I sees token j of an earlier chunk J through e^{L_i - L_j} with

    L_i - L_j = l_i  +  sum of tot over the chunks between J and I  +  (tot_J - l_j)
                row           one number per pair of chunks              column

All three are at most 0 and the sums inside a chunk are local, so precision does not degrade with T. Documents separate
in the same way: two tokens of different chunks share a document only if it is the last one of chunk J and the first one
of chunk I.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

FORGOTTEN = 30.0  # a weight with a decay below e^-30 is treated as 0
GONE = -104.0  # e^GONE rounds to 0 in float32; lower log decays are clamped to it
RESIDUALS = "mixer_residuals"  # residuals that rematerialisation may save: equal to lcx.ops.MIXER_RESIDUALS


class Tile(NamedTuple):
    """A program holds `held` rows and streams tiles of `streamed` rows, a divisor of `held`.

    Warps and pipeline stages are options of Triton.
    """

    held: int
    streamed: int
    warps: int = 0
    stages: int = 0


class Tiles(NamedTuple):
    """The tiles of each pass. dq and dkv hold chunks of the same size, so that their sums cancel to the last digits."""

    forward: Tile
    dq: Tile
    dkv: Tile


def square(C: int) -> Tiles:
    return Tiles(Tile(C, C), Tile(C, C), Tile(C, C))


# {(platform, bytes of an element, H): tiles} on TPUs, for every attention with a decay.
TPU_SQUARES = {("tpu", size, H): square(1024 // size) for size in (2, 4) for H in (16, 32, 64, 128)}


def fitting(tiles: Tiles, T: int) -> Tiles:
    """The tiles, halved until a short row is not mostly padding (at least 128 for TPU lanes, 64 for wgmma)."""
    smallest = 128 if tiles.forward.warps == 0 else 64
    while max(tile.held for tile in tiles) >= max(2 * T, 2 * smallest):
        tiles = Tiles(*(t._replace(held=t.held // 2, streamed=min(t.streamed, t.held // 2)) for t in tiles))
    return tiles


def padded(
    q: Array,
    k: Array,
    v: Array,
    log_decay: Array | None,
    runs: Array | None,
    tiles: Tiles,
    lowest: Array | float = GONE,
):
    """Pads T to whole chunks at the end, where the causal mask hides it; clamps log_decay [B, N, T] to `lowest`.

    lowest: a number, or one per head [B, 1, N]. Lower values would only cost precision in the sums.
    """
    longest, T = (
        max(tile.held for tile in tiles),
        q.shape[1],
    )  # all other sizes are this one divided by a power of two
    pad = ((0, 0), (0, -T % longest))
    q, k, v = (jnp.pad(x, (*pad, (0, 0), (0, 0))) if T % longest else x for x in (q, k, v))
    if log_decay is not None:
        log_decay = jnp.maximum(log_decay.astype(jnp.float32), lowest)
        log_decay = jnp.pad(jnp.swapaxes(log_decay, 1, 2), ((0, 0), *pad))
    if runs is not None:
        runs = jnp.pad(runs, pad, mode="edge")
    return q, k, v, log_decay, runs


class Chunks(NamedTuple):
    """Sums of log decays in J = T / C chunks, all at most 0, and masks, which are None without documents."""

    parts: Float[
        Array, "B N 2 T"
    ]  # l = parts[0] + parts[1]; differences of l, taken per part, are exact to 1e-7 for any decay
    local: Float[Array, "B N J C"]  # l: the sum of log_decay from the chunk's first token to this one
    rest: Float[Array, "B N J C"]  # tot - l
    total: Float[Array, "B N J"]  # tot
    enters: Bool[Array, "B 1 J C"] | None  # the token's document is the chunk's first
    leaves: Bool[Array, "B 1 J C"] | None  # the token's document is the chunk's last


class Reach(NamedTuple):
    """first[i]: the first chunk that chunk i sees; last[j]: the last chunk that sees chunk j."""

    first: Int[Array, "B N J"]
    last: Int[Array, "B N J"]


def chunked(
    log_decay: Array | None, runs: Array | None, shape: tuple[int, int, int], C: int, forgotten: Array | float
) -> tuple[Chunks | None, Reach]:
    """Chunks of C tokens and their reach, for shape (B, N, T). Chunks are None without decay and documents.

    forgotten: the -log of the decay beyond which a chunk is not seen; a number, or one per head [B, N, 1].
    """
    B, N, T = shape
    J = T // C
    if log_decay is None and runs is None:
        whole = jnp.zeros((B, N, J), jnp.int32)
        return None, Reach(whole, whole + J - 1)
    if log_decay is None:
        # Without sums: XLA would compute those of constants while it compiles, number by number, for minutes.
        parts, first = jnp.zeros((B, N, 2, J, C), jnp.float32), jnp.zeros((B, N, J), jnp.int32)
        local, total = parts[:, :, 0], parts[:, :, 0, :, -1]
    else:
        parts = in_parts(log_decay.reshape(B, N, J, C))
        local = jnp.sum(parts, axis=2)
        total = local[..., -1]
        # Inexact for large sums, which is harmless: this only decides which chunks are negligible. A total may be
        # slightly above 0 (a change of units in second-order attention), but the search needs sorted values.
        before = jax.lax.cummax(-jnp.cumsum(total, axis=-1), axis=2)
        first = _search(before, before + total - forgotten - 1e-6 * before)
    enters = leaves = None
    if runs is not None:
        chunks = runs.reshape(B, 1, J, C)
        enters, leaves = chunks == chunks[..., :1], chunks == chunks[..., -1:]
        begun = _search(chunks[:, 0, :, -1], chunks[:, 0, :, 0])
        first = jnp.maximum(first, begun[:, None])
    chunk = jnp.broadcast_to(jnp.arange(J, dtype=jnp.int32), first.shape)
    first = jnp.minimum(first, chunk)
    last = _search(first, chunk, side="right") - 1
    rest = local if log_decay is None else jnp.sum(parts[..., -1:] - parts, axis=2)
    return Chunks(parts.reshape(B, N, 2, T), local, rest, total, enters, leaves), Reach(first, last)


def in_parts(
    log_decay: Float[Array, "B N J C"], begins: Bool[Array, "B #N J C"] | None = None
) -> Float[Array, "B N 2 J C"]:
    """The running sums of each chunk, in two parts whose differences do not lose digits.

    In a single float32 sum a small decay would lose its digits next to a decay of GONE. Sums of C multiples of the unit
    (1/256 for C = 512) are exact, and the rest is small.

    Args:
      begins: which tokens are the first of their document: sums begin anew there.
    """
    unit = 2.0 ** ((int(-GONE) * log_decay.shape[-1]).bit_length() - 24)
    coarse = jnp.round(log_decay / unit) * unit
    parts = jnp.stack([coarse, log_decay - coarse], axis=2)
    return jnp.cumsum(parts, axis=-1) if begins is None else sums_by_document(parts, begins[:, :, None])


def sums_by_document(terms: Float[Array, "*B T"], edges: Bool[Array, "*B T"], *, reverse: bool = False) -> Array:
    """Running sums along the last axis that begin anew at `edges`: the first tokens of documents, or the last ones."""

    def joined(before, after):
        (sums, begun), (term, begins) = before, after
        return jnp.where(begins, term, sums + term), begun | begins

    arrays = terms, jnp.broadcast_to(edges, terms.shape)
    return jax.lax.associative_scan(joined, arrays, reverse=reverse, axis=terms.ndim - 1)[0]


def last_tokens(runs: Int[Array, "*B T"]) -> Bool[Array, "*B T"]:
    """Which tokens are the last ones of their documents."""
    return jnp.diff(runs, axis=-1, append=-1) != 0


def later_sums(terms: Float[Array, "B N T"], runs: Int[Array, "B T"] | None) -> Float[Array, "B N T"]:
    """Each token's sum of its own term and the later ones of its document: a log decay's gradient, from row sums.

    The terms of each other document add up to 0, but only up to rounding.
    """
    if runs is None:
        return jax.lax.cumsum(terms, axis=2, reverse=True)
    return sums_by_document(terms, last_tokens(runs)[:, None], reverse=True)


def _search(rows: Array, values: Array, side: str = "left") -> Array:
    """searchsorted along the last axis, for non-decreasing rows."""
    J = rows.shape[-1]
    found = jax.vmap(functools.partial(jnp.searchsorted, side=side))(
        rows.reshape(-1, J), values.reshape(-1, J)
    )
    return found.reshape(rows.shape).astype(jnp.int32)


def over_groups(x: Array, K: int) -> Array:
    """Gradients per query head [B, T, N, ...], summed in float32 over the heads that share one of K heads."""
    B, T, N, *rest = x.shape
    return x if N == K else jnp.sum(x.reshape(B, T, K, -1, *rest).astype(jnp.float32), axis=3).astype(x.dtype)
