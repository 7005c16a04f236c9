"""What linear attention carries along a row: its state, the keys still needed by a window, and document starts."""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from lcx.ops import segments

KINDS = ("sliding", "terraced")


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=("q", "k", "scale"), meta_fields=("kind", "size")
)
@dataclasses.dataclass(frozen=True)
class Window:
    """A softmax over the nearest keys, summed and normalised together with the linear part over the older ones.

    Attributes:
      kind: "sliding": the last `size` keys, including the query's own; "terraced": the keys of the query's own block of
        `size` tokens and of the previous block, with blocks counted from the start of the document.
      q, k: queries [B, T, N, H] and keys [B, T, K, H] of the softmax, after rotation.
      scale: [N], the weight of the softmax part (LoLCATS's gamma).
    """

    kind: str
    size: int
    q: Array
    k: Array
    scale: Array


class Held(NamedTuple):
    """The newest keys, which the window of a later token may need; older ones are in the linear state. Newest last."""

    k: Array  # [B, R, K, H]
    v: Array  # [B, R, Kv, H]
    features: Array  # [B, R, Nk, P]
    length: Array  # [B] tokens of the document so far, which align blocks; min(length, R) slots are in use


class LinearState(NamedTuple):
    """Everything that later tokens need of earlier ones."""

    kv: Array  # [B, N, P, H] float32
    k_sum: Array | None  # [B, N, P] float32; None without normalize
    segment_ids: Array  # [B] the document of the state; 0: the state is empty
    held: Held | None = None  # with a window


def empty_state(batch: int, heads: int, features: int, head_dim: int, *, normalize: bool) -> LinearState:
    """The state before the first token."""
    k_sum = jnp.zeros((batch, heads, features), jnp.float32) if normalize else None
    kv = jnp.zeros((batch, heads, features, head_dim), jnp.float32)
    return LinearState(kv, k_sum, jnp.zeros((batch,), jnp.int32))


def starts(segment_ids: Array, before: Array | None = None) -> Array:
    """The index at which each token's document begins, -1 for the state's document: token i sees j >= starts_i."""
    runs = segments.runs(segment_ids, before)
    new = jnp.diff(runs, axis=1, prepend=jnp.zeros_like(runs[:, :1])) != 0
    return jax.lax.cummax(jnp.where(new, jnp.arange(runs.shape[1]), -1), axis=1)
