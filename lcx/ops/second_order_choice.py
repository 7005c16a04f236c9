"""Chooses the form of second-order attention, so that time grows at most linearly with T from 4K tokens on.

With tiles, the cost per token is proportional to its reach: the number of earlier keys in its document whose decay is
above e^-30, on average T / 2 if nothing is forgotten. With states, the cost per token depends only on the head size.
The two are equal at a reach of

    GPU, TPU   H^2. As kernels, forward and backward: 9 H times the reach against 7 P H + 4.5 C H multiply-adds, with
               P = 3/4 H^2 features and chunks of C tokens, at two thirds of the tiles' rate (an estimate from compiled
               programs: each operand is materialised, and 8 P / C H bytes per token go through memory). Not measured.
    CPU        80 H: benchmarks/results/second_order_forms_cpu.json, made by benchmarks/second_order_forms.py.

From LONG tokens on (or from twice that meeting point, if it is lower) the reach decides, which is known only at run
time: tiles if it is at most a bound that does not depend on T, otherwise states. For a given decay this selects the
same form for T and 2 T, and both forms are linear in T. Using tiles up to the meeting point would be faster for some T
in between, if H is large and nothing is forgotten, but time could then quadruple when T doubles.

In this case both forms are compiled, and the program branches at run time, forward and backward. Shorter rows use
tiles, unless nothing is forgotten and they are beyond the meeting point.

Rows with an initial state (pieces, parts on a mesh, prompts in a cache) use states, which read it anyway, up to LONG
tokens, if nothing is forgotten, and on a GPU or TPU, whose kernel for tiles takes no state. From LONG tokens on the
reach decides here too: with a short one only tiles near the ends of the row have to do with states
(second_order_ends.py).
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from lcx.ops import dispatch, second_order_ends, second_order_rows

LONG = 4096
MOST = LONG // 4  # a longer reach would still grow with T there


def meeting_point(H: int) -> int:
    """The reach, in tokens, at which both forms take equally long on the current platform."""
    return 80 * H if dispatch.platform() == "cpu" else H * H


def choose(form: str | None, T: int, H: int, *, follows: bool, forgets: bool) -> str:
    """ "tiles", "states", or "either", if the data decides at run time.

    Args:
      form: the form that the caller set, or None.
      follows: whether there is an initial state.
      forgets: whether there is a decay or there may be several documents.
    """
    if form is None:
        form = _choose(T, 2 * meeting_point(H), follows, forgets)
    return form


def in_words(form: str | None, T: int, H: int, *, follows: bool) -> str:
    """How rows of T tokens with documents are computed, for the log; the arguments are those of `choose`."""
    bound = min(MOST, meeting_point(H))
    return {
        "tiles": "in tiles (quadratic)",
        "states": "by states (linear)",
        "recurrent": "by a step for each token",
        "either": f"in tiles where a token reaches {bound} keys or fewer on average, else by states (linear)",
    }[choose(form, T, H, follows=follows, forgets=True)]


def _choose(T: int, meet: int, follows: bool, forgets: bool) -> str:
    if follows and (T < LONG or not forgets or dispatch.platform() != "cpu"):
        return "states"
    if max(min(LONG, meet), second_order_rows.TILE) <= T:
        return "either" if forgets else "states"
    return "tiles"


def short_reach(log_decay: Float[Array, "B T N"], runs: Int[Array, "B T"], H: int) -> Bool[Array, ""]:
    """Whether to use tiles: true if the mean reach of the data, in whole tiles, is short."""
    C = second_order_rows.TILE
    rates = jnp.moveaxis(log_decay, 2, 1)[:, :, : log_decay.shape[1] // C * C]
    total = jnp.sum(rates.reshape(*rates.shape[:2], -1, C), axis=-1)
    runs = runs[:, : rates.shape[2]].reshape(runs.shape[0], -1, C)
    of_heads = jax.vmap(_first_visible, (0, None, None))
    first = jax.vmap(of_heads)(total, runs[:, :, 0], runs[:, :, -1])
    reach = C * jnp.mean((jnp.arange(total.shape[2]) - first).astype(jnp.float32))
    return reach <= min(MOST, meeting_point(H))


def _first_visible(total: Array, first: Array, last: Array) -> Array:
    """For each tile of queries, the first tile of keys that is not negligible.

    As this is only a threshold, prefix sums are accurate enough; their rounding errors are on the safe side. A total
    may be slightly above 0, while the search needs sorted values.
    """
    end = -jnp.cumsum(total)
    by_decay = jnp.searchsorted(
        jax.lax.cummax(end), end + total + second_order_ends.SKIP - 1e-6 * jnp.abs(end)
    )
    return jnp.maximum(by_decay, jnp.searchsorted(last, first)).astype(jnp.int32)
