"""Sequence mixers: one file each. This page is the whole contract between a mixer and the rest of the library.

**A mixer maps a stretch of T tokens and the state before it to outputs and the state after it, differentiably in
both.** Training on whole rows, prefill in pieces, decoding token by token and training in pieces are uses of this one
sentence. In code, a mixer is any Flax module with two methods (the protocol `Mixer` below)::

    __call__(x [B,T,D], *, positions [B,T] | None, segment_ids [B,T] | None, cache=None) -> (y [B,T,D], cache)
    init_cache(batch_size, length, dtype) -> pytree of arrays, the state before the first token

Rules that the battery in ``tests/test_mixers.py`` holds every mixer to:

- y[:, t] depends on x[:, :t + 1] alone, and only on tokens of the same segment; segment id 0 is padding.
- Padding before or after the tokens of a row changes none of them, in value and gradient, whatever is in it. Padding
  between two tokens of one document is outside this contract: convolutions count it as distance, others may not.
- ``positions`` count from 0 in every segment; None means 0..T-1 for every row, and segment_ids None means one segment.
- With a cache the T tokens follow those already in it, and the returned cache holds them too, in arrays of the same
  shapes and dtypes: one stretch, two, and token by token give the same outputs.
- Two stretches give the gradients of one: what follows a stretch reaches its inputs and the parameters through the
  cache. (Integers in a cache, such as segment ids and counts, have no gradient.)

Everything else that the library asks of a mixer is optional. The mixer says it in its own file; the functions below
are the only place that asks, and they give the default or raise an error:

    what                      how a mixer says it                           where it says nothing
    ------------------------  --------------------------------------------  --------------------------------------------
    cost of a token           macs_per_token(seq_len) -> float              UserError; a run then logs no `mfu`
    cache grows with text     append_cache(cache, added), and `deferred`    the state has one size
    prompt in one piece       whole_prompt = True                           a prompt may come in pieces
    rotary embedding          fields rope and head_dim                      there is none to extend
    length it rotates for     "rope_length" in the cache, int32 scalar      no length to set
    what LoRA may target      projections made of lcx.layers.Linear         no pairs, and the run says so
    how weights are divided   axis names (layers.named_param, RULES)        whole on every device
    how its work is divided   sharding.island, on rows and heads            the compiler decides
    auxiliary losses          self.sow("losses", name, value)               none
    its name in reports       kind = "Name"                                 the name of its class

**A cache that grows.** With ``deferred=True`` the mixer returns (y, what these tokens add to the cache), and
``append_cache(cache, added) -> cache`` puts that in place, for one layer or for several stacked ones. A decoder asks
for it because its scan over layers would otherwise copy the whole cache for every token.

**Export.** The format "lcx" stores every mixer by its class and fields; the class must be importable where the
checkpoint is read. Other formats name the mixers that they can hold (``lcx/convert``) and refuse the rest.

There is no registry: a config or a user's own package names the class.
"""

from typing import Any, NamedTuple, Protocol

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from lcx.errors import UserError
from lcx.rope import Rope

Cache = Any  # a pytree of arrays, or None
ROPE_LENGTH = "rope_length"


class Mixer(Protocol):
    """What every mixer has. A mixer need not inherit from this."""

    def __call__(
        self,
        x: Float[Array, "B T D"],
        *,
        positions: Int[Array, "B T"] | None = None,
        segment_ids: Int[Array, "B T"] | None = None,
        cache: Cache = None,
    ) -> tuple[Float[Array, "B T D"], Cache]:
        """(outputs, the cache with these tokens in it: None where none was given)."""
        ...

    def init_cache(self, batch_size: int, length: int, dtype: jnp.dtype) -> Cache:
        """The state before the first token, with room for `length` tokens; activations in it have `dtype`."""
        ...


class Rotary(NamedTuple):
    """The rotary embedding of a mixer, and the size of the heads that it turns; None where the mixer does not say."""

    rope: Rope
    head_dim: int | None


def kind(mixer: nn.Module | None) -> str:
    """The mixer's name in reports, messages and the records of adapters."""
    value = getattr(mixer, "kind", None)
    return value if isinstance(value, str) else type(mixer).__name__


# ------------------------------------------------------------------------------------------------ tokens and state


def mix(
    mixer: Any,
    x: Float[Array, "B T D"],
    *,
    positions: Int[Array, "B T"] | None,
    segment_ids: Int[Array, "B T"] | None,
    cache: Cache,
) -> tuple[Float[Array, "B T D"], Cache]:
    """(y, what `state_after` takes): the mixer's new cache, or what is to be appended to a growing one.

    Raises:
      UserError: the mixer returns something else than outputs of the shape of x, and a cache.
    """
    deferred = {"deferred": True} if cache is not None and grows(mixer) else {}
    given = mixer(x, positions=positions, segment_ids=segment_ids, cache=cache, **deferred)
    if not isinstance(given, tuple) or len(given) != 2 or getattr(given[0], "shape", None) != x.shape:
        found = jax.tree.map(lambda leaf: getattr(leaf, "shape", type(leaf).__name__), given)
        raise UserError(
            f"{kind(mixer)}.__call__ returned {found}, expected (y, cache) with y of shape {x.shape}, that of x: "
            "change what it returns"
        )
    return given


def empty_state(mixer: Any, batch_size: int, length: int, dtype: jnp.dtype) -> Cache:
    """The mixer's state before the first token; {} for no mixer.

    Raises:
      UserError: the mixer has no init_cache.
    """
    if mixer is None:
        return {}
    if not hasattr(mixer, "init_cache"):
        raise UserError(
            f"{kind(mixer)} has no method init_cache(batch_size, length, dtype), expected one: without it the model "
            "trains, but cannot generate; add the method"
        )
    return mixer.init_cache(batch_size, length, dtype)


def grows(mixer: nn.Module | None) -> bool:
    """Whether the mixer's cache gets longer with the text, so that tokens are appended to it."""
    return hasattr(mixer, "append_cache")


def state_after(mixer: Any, before: Cache, given: Cache) -> Cache:
    """The state after some tokens: what `mix` gave, appended where the cache grows. Layers may be stacked in front.

    Raises:
      UserError: the state after has not the arrays of the state before.
    """
    after = mixer.append_cache(before, given) if grows(mixer) else given
    was, now = (str(jax.tree.structure(state)) for state in (before, after))
    if was != now:
        raise UserError(f"{kind(mixer)} returned a cache of {now}, expected {was} as init_cache gives it")
    leaves = zip(jax.tree_util.tree_leaves_with_path(before), jax.tree.leaves(after), strict=True)
    for (path, old), new in leaves:
        if (old.shape, old.dtype) != (new.shape, new.dtype):
            raise UserError(
                f"{kind(mixer)} returned a cache whose {jax.tree_util.keystr(path)} is {new.dtype} {new.shape}, "
                f"expected {old.dtype} {old.shape} as init_cache gives it"
            )
    return after


def whole_prompt(mixer: nn.Module | None) -> bool:
    """Whether a prompt must come in one piece: a second prefill would not be the rest of the first.

    Raises:
      UserError: whole_prompt is something else than True or False.
    """
    value = getattr(mixer, "whole_prompt", False)
    if not isinstance(value, bool):
        raise UserError(
            f"{kind(mixer)}.whole_prompt is a {type(value).__name__}, expected True or False: make it an attribute or "
            "a property"
        )
    return value


# ------------------------------------------------------------------------------------------------ cost


def macs_per_token(mixer: Any, seq_len: int) -> float:
    """Multiply-adds per token in a sequence of `seq_len`, beside one for each of the mixer's weights; 0 for no mixer.

    Raises:
      UserError: the mixer does not say.
    """
    if mixer is None:
        return 0.0
    if not hasattr(mixer, "macs_per_token"):
        raise UserError(
            f"{kind(mixer)} does not say what a token costs: give it a method macs_per_token(seq_len) that returns its "
            "multiply-adds per token beside one for each weight (0.0 if there are none)"
        )
    return float(mixer.macs_per_token(seq_len))


# ------------------------------------------------------------------------------------------------ rotary embedding


def rotary(mixer: nn.Module | None) -> Rotary | None:
    """The mixer's rotary embedding; None where it has no field `rope`, or None in it.

    Raises:
      UserError: its field `rope` is something else than a Rope.
    """
    rope = getattr(mixer, "rope", None)
    if rope is None:
        return None
    if not isinstance(rope, Rope):
        raise UserError(
            f"{kind(mixer)}.rope is {rope!r:.80}, expected a lcx.rope.Rope or None: the field `rope` of a mixer is "
            "its rotary embedding; rename it if it is something else"
        )
    return Rotary(rope, getattr(mixer, "head_dim", None))


def with_rope(mixer: nn.Module, rope: Rope) -> nn.Module:
    """The mixer with another rotary embedding."""
    return mixer.clone(rope=rope, parent=None)


def with_rope_length(cache: Cache, length: Int[Array, ""] | int) -> Cache:
    """The cache (of one mixer or of a whole model) with this length for the RoPE types whose rotation depends on one.

    A cached generation needs one length for all its tokens, so that cached keys fit later queries.
    """

    def leaf(path: tuple[Any, ...], x: Array) -> Array:
        return jnp.full_like(x, length) if path[-1] == jax.tree_util.DictKey(ROPE_LENGTH) else x

    return jax.tree_util.tree_map_with_path(leaf, cache)
