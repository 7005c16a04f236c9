"""Sequence mixers: one file each. This page is the whole contract between a mixer and the rest of the library.

**A mixer maps a stretch of T tokens and the state before it to outputs and the state after it, differentiably in
both.** Training on whole rows, prefill in pieces, decoding token by token and training in pieces are uses of this one
sentence. In code, a mixer is any Flax module with two methods (the protocol `Mixer` below)::

    __call__(x [B,T,D], *, positions [B,T] | None, segment_ids [B,T] | None, cache=None) -> (y [B,T,D], cache)
    init_cache(batch_size, length, dtype) -> pytree of arrays, the state before the first token

Rules that the battery in ``tests/test_mixers.py`` holds every mixer to:

- y[:, t] depends on x[:, :t + 1] only, and only on tokens of the same segment; segment id 0 is padding.
- Padding before or after the tokens of a row does not change their outputs or gradients, whatever values the padding
  holds. Padding between two tokens of one document is outside this contract: convolutions count it as distance, other
  mixers may ignore it.
- ``positions`` count from 0 in every segment; None means 0..T-1 for every row, and segment_ids None means one segment.
- With a cache, the T tokens follow those already in it, and the returned cache also holds the new ones, in arrays of
  the same shapes and dtypes. Processing a sequence at once, in two stretches or token by token gives the same outputs.
- Two stretches give the same gradients as one: the loss on later tokens reaches the inputs of an earlier stretch, and
  the parameters, through the cache. (Integers in a cache, such as segment ids and counts, have no gradient.)

Every other capability is optional. A mixer declares it in its own file; the functions below are the only code that
looks for it, and they return the default or raise an error:

    capability                how a mixer declares it                       if it does not
    ------------------------  --------------------------------------------  --------------------------------------------
    cost of a token           macs_per_token(seq_len) -> float              UserError; a run then logs no `mfu`
    growing cache             append_cache(cache, added), and `deferred`    the state has a fixed size
    cache read in place       reads_in_place(num_tokens) -> bool            a layer's cache is copied for each token
    prompt in one piece       whole_prompt = True                           a prompt may be read in pieces
    rotary embedding          fields rope and head_dim                      nothing to extend
    length it rotates for     "rope_length" in the cache, int32 scalar      no length to set
    LoRA targets              projections made of lcx.layers.Linear         no LoRA pairs; the run reports it
    sharding of weights       axis names (layers.named_param, RULES)        replicated on every device
    sharding of computation   sharding.island, over rows, T and heads       the compiler decides
    what `context` sends      context_method(devices, tensor, seq_len)      whole rows, gathered
    form of a row, in words   form_of_rows(seq_len, follows) -> str | None  nothing is said
    auxiliary losses          self.sow("losses", name, value)               none
    name in reports           kind = "Name"                                 the name of its class

**A growing cache.** With ``deferred=True`` the mixer returns (y, the entries that these tokens add to the cache), and
``append_cache(cache, added) -> cache`` writes them, for one layer or for several stacked layers. The decoder uses this
because its scan over layers would otherwise copy the whole cache for every token. A mixer ignores slots that are not
filled yet, whatever they hold: the backward pass of ``lcx/pieces.py`` passes the filled cache of a whole row, and only
the other arrays of the state tell how many slots came before.

**A cache read in place.** Where ``reads_in_place(T)`` is True, a call with ``deferred=True`` may receive as its cache a
pair (the caches of all layers of its stage, stacked; the number of its layer), see ``kv_cache.LayerOf``. Otherwise the
scan over layers cuts out each layer's cache, which costs more than reading it when few tokens are new.

**Export.** The format "lcx" stores every mixer by its class and fields; the class must be importable where the
checkpoint is read. Other formats list the mixers that they support (``lcx/convert``) and reject the others.

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
    """The two methods that every mixer has. A mixer need not inherit from this class."""

    def __call__(
        self,
        x: Float[Array, "B T D"],
        *,
        positions: Int[Array, "B T"] | None = None,
        segment_ids: Int[Array, "B T"] | None = None,
        cache: Cache = None,
    ) -> tuple[Float[Array, "B T D"], Cache]:
        """Returns the outputs and the cache with these tokens appended (None if no cache was given)."""
        ...

    def init_cache(self, batch_size: int, length: int, dtype: jnp.dtype) -> Cache:
        """The state before the first token, with room for `length` tokens; activations are stored in `dtype`."""
        ...


class Rotary(NamedTuple):
    """The rotary embedding of a mixer and the size of the heads it rotates (None if the mixer has no `head_dim`)."""

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
    """Applies the mixer: (y, new), where `new` is its new cache, or the entries to append if its cache grows.

    Pass `new` to `state_after` to get the next state.

    Raises:
      UserError: the mixer does not return a pair (y, cache) with y of the shape of x.
    """
    deferred = {"deferred": True} if cache is not None and grows(mixer) else {}
    given = mixer(x, positions=positions, segment_ids=segment_ids, cache=cache, **deferred)
    if not isinstance(given, tuple) or len(given) != 2 or getattr(given[0], "shape", None) != x.shape:
        found = jax.tree.map(lambda leaf: getattr(leaf, "shape", type(leaf).__name__), given)
        raise UserError(
            f"{kind(mixer)}.__call__ returned {found}, expected (y, cache) with y of the shape of x, {x.shape}: "
            "change its return value"
        )
    return given


def empty_state(mixer: Any, batch_size: int, length: int, dtype: jnp.dtype) -> Cache:
    """The mixer's state before the first token; {} if `mixer` is None.

    Raises:
      UserError: the mixer has no init_cache.
    """
    if mixer is None:
        return {}
    if not hasattr(mixer, "init_cache"):
        raise UserError(
            f"{kind(mixer)} has no method init_cache(batch_size, length, dtype), expected one: without it the model "
            "trains on whole rows alone (Trainer.piece_length = None, stateful = False) and cannot generate; add the "
            "method"
        )
    return mixer.init_cache(batch_size, length, dtype)


def grows(mixer: nn.Module | None) -> bool:
    """Whether the mixer's cache grows with the sequence, so that entries are appended to it."""
    return hasattr(mixer, "append_cache")


def reads_in_place(mixer: nn.Module | None, num_tokens: int) -> bool:
    """Whether the mixer reads its layer's cache for so many new tokens out of the stacked caches of all layers."""
    return grows(mixer) and hasattr(mixer, "reads_in_place") and mixer.reads_in_place(num_tokens)


def state_after(mixer: Any, before: Cache, given: Cache) -> Cache:
    """The state after some tokens: the result of `mix`, appended to `before` if the cache grows.

    Arrays may have a leading axis of stacked layers.

    Raises:
      UserError: the new state differs from the old one in structure, shapes or dtypes.
    """
    after = mixer.append_cache(before, given) if grows(mixer) else given
    was, now = (str(jax.tree.structure(state)) for state in (before, after))
    if was != now:
        raise UserError(f"{kind(mixer)} returned a cache of {now}, expected {was} as returned by init_cache")
    leaves = zip(jax.tree_util.tree_leaves_with_path(before), jax.tree.leaves(after), strict=True)
    for (path, old), new in leaves:
        if (old.shape, old.dtype) != (new.shape, new.dtype):
            raise UserError(
                f"{kind(mixer)} returned a cache whose {jax.tree_util.keystr(path)} is {new.dtype} {new.shape}, "
                f"expected {old.dtype} {old.shape} as returned by init_cache"
            )
    return after


def whole_prompt(mixer: nn.Module | None) -> bool:
    """Whether a prompt must be read in one piece, because a second prefill would not continue the first.

    Raises:
      UserError: whole_prompt is neither True nor False.
    """
    value = getattr(mixer, "whole_prompt", False)
    if not isinstance(value, bool):
        raise UserError(
            f"{kind(mixer)}.whole_prompt is a {type(value).__name__}, expected True or False: make it an attribute or "
            "a property"
        )
    return value


# ------------------------------------------------------------------------------------------------ over devices


def context_method(mixer: Any, *, devices: int, tensor: int, seq_len: int, cached: bool = False) -> str:
    """What the devices of the mesh axis `context` send each other in this mixer, in words.

    Args:
      devices, tensor: the sizes of the mesh axes `context` and `tensor`.
      seq_len: tokens that are processed at once.
      cached: whether they follow those in a cache.

    Raises:
      UserError: the mixer's settings do not fit these sizes.
    """
    if devices > seq_len or not hasattr(mixer, "context_method"):
        return "whole rows, gathered"
    if cached and grows(mixer):  # some of its heads, or all of it
        return "what its cache gets, to the devices that hold it"
    return mixer.context_method(devices=devices, tensor=tensor, seq_len=seq_len)


def form_of_rows(mixer: Any, *, seq_len: int, follows: bool) -> str | None:
    """How the mixer computes so many tokens at once, which may follow a state; None if it does not say."""
    return mixer.form_of_rows(seq_len=seq_len, follows=follows) if hasattr(mixer, "form_of_rows") else None


# ------------------------------------------------------------------------------------------------ cost


def macs_per_token(mixer: Any, seq_len: int) -> float:
    """Multiply-adds per token in a sequence of `seq_len`, in addition to one per weight; 0 if `mixer` is None.

    Raises:
      UserError: the mixer has no method macs_per_token.
    """
    if mixer is None:
        return 0.0
    if not hasattr(mixer, "macs_per_token"):
        raise UserError(
            f"{kind(mixer)} does not define the cost of a token: add a method macs_per_token(seq_len) that returns its "
            "multiply-adds per token in addition to one per weight (0.0 if there are none)"
        )
    return float(mixer.macs_per_token(seq_len))


# ------------------------------------------------------------------------------------------------ rotary embedding


def can_rotate(mixer: nn.Module | None) -> bool:
    """Whether the mixer has a field `rope`, which may be None."""
    return hasattr(mixer, "rope")


def rotary(mixer: nn.Module | None) -> Rotary | None:
    """The mixer's rotary embedding; None if it has no field `rope` or the field is None.

    Raises:
      UserError: its field `rope` is not a Rope.
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
    """The cache (of one mixer or of a whole model) with `rope_length` set, for RoPE types that depend on the length.

    A cached generation needs one length for all its tokens, so that cached keys have the rotation of later queries.
    """

    def leaf(path: tuple[Any, ...], x: Array) -> Array:
        return jnp.full_like(x, length) if path[-1] == jax.tree_util.DictKey(ROPE_LENGTH) else x

    return jax.tree_util.tree_map_with_path(leaf, cache)
