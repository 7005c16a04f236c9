"""Which form of second-order attention runs where none is named, so that time grows no faster than T from 4K tokens on.

Tiles cost each token its reach, the earlier keys that the decay and its document leave within e^-30 of it: T / 2 where
nothing is forgotten. States cost each token a number that depends on the head size alone. They meet at a reach of

    GPU, TPU   H^2. As kernels, forward and backward: 9 H times the reach against 7 P H + 4.5 C H multiply-adds, with
               P = 3/4 H^2 features and chunks of C tokens, at two thirds of the tiles' rate (an estimate from compiled
               programs: each operand is made first, and 8 P / C H bytes a token go through memory). Not measured.
    CPU        80 H: benchmarks/results/second_order_forms_cpu.json, made by benchmarks/second_order_forms.py.

From LONG tokens on (or from twice the meeting point, if that comes first) the reach decides, which only the data knows:
tiles where it is at most a bound that does not depend on T, else states. With one decay for all of T that is the same
form for T and 2 T, and either grows as T. A rule that took tiles up to the meeting point would be faster for some T in
between, where H is large and nothing is forgotten, and four times slower from one T to its double.

Both forms are compiled then, and a branch of the program runs, forward and backward. Shorter rows take tiles unless
nothing is forgotten and they are beyond the meeting point. Rows behind a state take states, which read it anyway.
"""

import functools
import logging

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from lcx.ops import dispatch, second_order_states, second_order_tiles

log = logging.getLogger("lcx")
LONG = 4096
MOST = LONG // 4  # a longer reach would still grow with T there


def meeting_point(H: int) -> int:
    """The reach at which both forms take as long, here."""
    return 80 * H if dispatch.platform() == "cpu" else H * H


def choose(form: str | None, T: int, H: int, *, follows: bool, forgets: bool) -> str:
    """ "tiles", "states", or "either": as the data says.

    Args:
      form: the one that was asked for.
      follows: there is a state before the row.
      forgets: there is a decay, or there may be several documents.
    """
    if form is None:
        form = _choose(T, 2 * meeting_point(H), follows, forgets)
        _say(form, min(MOST, meeting_point(H)))
    return form


def _choose(T: int, meet: int, follows: bool, forgets: bool) -> str:
    if follows:
        return "states"
    if max(min(LONG, meet), second_order_tiles.TILE) <= T:
        return "either" if forgets else "states"
    return "tiles"


@functools.cache
def _say(form: str, bound: int) -> None:
    if form == "either":
        form = f"tiles where a token reaches {bound} keys or fewer on average, else states"
    log.info("second_order_attention: %s", form)


def short_reach(log_decay: Float[Array, "B T N"], runs: Int[Array, "B T"], H: int) -> Bool[Array, ""]:
    """Whether tiles are the form to take: the mean reach of the data, in whole tiles, is short."""
    C = second_order_tiles.TILE
    rates = jnp.moveaxis(log_decay, 2, 1)[:, :, : log_decay.shape[1] // C * C]
    total = jnp.sum(rates.reshape(*rates.shape[:2], -1, C), axis=-1)
    runs = runs[:, : rates.shape[2]].reshape(runs.shape[0], -1, C)
    of_heads = jax.vmap(_first_visible, (0, None, None))
    first = jax.vmap(of_heads)(total, runs[:, :, 0], runs[:, :, -1])
    reach = C * jnp.mean((jnp.arange(total.shape[2]) - first).astype(jnp.float32))
    return reach <= min(MOST, meeting_point(H))


def _first_visible(total: Array, first: Array, last: Array) -> Array:
    """For each tile of queries, the first tile of keys that matters. Only a threshold: plain prefix sums will do.

    (With their rounding errors on the safe side. A total may be a little above 0, and the search needs order.)
    """
    end = -jnp.cumsum(total)
    by_decay = jnp.searchsorted(
        jax.lax.cummax(end), end + total + second_order_tiles.SKIP - 1e-6 * jnp.abs(end)
    )
    return jnp.maximum(by_decay, jnp.searchsorted(last, first)).astype(jnp.int32)


@jax.custom_vjp
def either(tiles: Array, q: Array, k: Array, v: Array, decay: Array, runs: Array) -> Array:
    """The sums of one form or the other, arrays as in second_order_tiles.tiles."""
    return _forward(tiles, q, k, v, decay, runs)[0]


def _forward(tiles, *arrays):
    by = second_order_tiles.tiles, lambda *arrays: second_order_states.states(*arrays, _no_state(*arrays))[0]
    return jax.lax.cond(tiles, *by, *arrays), (tiles, *arrays)


def _backward(residuals, d_out):
    tiles, *arrays = residuals

    def by_tiles(d_out, *arrays):
        return second_order_tiles.gradients(arrays, d_out)[:4]

    def by_states(d_out, *arrays):
        none = _no_state(*arrays)
        return second_order_states.gradients((*arrays, none), (d_out, none))[:4]

    return None, *jax.lax.cond(tiles, by_tiles, by_states, d_out, *arrays), None


def _no_state(q, k, v, decay, runs):
    return jnp.zeros((len(q), second_order_states.expanded_size(q.shape[2]), v.shape[2]), decay.dtype)


either.defvjp(_forward, _backward)
