"""The model applied to tokens: logits of a whole sequence, and generation with a cache.

    logits    tokens [B, T] in, logits [B, T, V] out
    generate  prompts in, [B, max_new_tokens] out: prefill, then all decode steps in one compiled loop
    stream    the same tokens, one column [B] at a time

A prompt is read in pieces of bounded size, so memory for a long prompt is dominated by its cache. Prompts of different
lengths are padded on the left with segment id 0, and every row counts its positions from its own first token.

A generation compiles two programs: one reads the prompt and one decodes. Both are compiled for shapes in buckets
(`_bucket`: the prompt, and prompt and new tokens together), so that other lengths in the same buckets use them again,
in this process and, through the compilation cache, in later ones. Longer prompts compile a third program, for pieces.

**The rotation of a cached generation** (`rope_trace`; it affects only the RoPE types dynamic and longrope, whose
rotation depends on a length n). "exact", the default: one n for the whole generation, the longest prompt plus
max_new_tokens. All cached keys have the same rotation as the queries, so decoding equals the full forward pass at that
n. "hf": n as transformers chooses it at each forward pass. Cached keys keep the rotation they were written with, and
Phi-3 models drop the cache and read the text again when it exceeds the original window. This reproduces the text of
transformers, whose cached decoding differs from its own full forward pass. In both modes the rows of a batch share the
n of the longest row; with other RoPE types rows are independent.
"""

import dataclasses
import functools
import logging
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from lcx import mixers, moved, parameters, sharding
from lcx.errors import UserError, naming_flags
from lcx.extend import rotaries
from lcx.model import Decoder
from lcx.ops.sampling import among, choose

_log = logging.getLogger(__name__)

Tokens = Int[np.ndarray, "B T"] | Int[Array, "B T"]
Prompts = Tokens | Sequence[Sequence[int]]
ROPE_TRACES = ("exact", "hf")
DEFAULT_NEW_TOKENS = 256

_PIECE_TOKENS = 4096  # upper bound on tokens per forward pass over the prompts, all rows together
_GRAIN = 32  # sizes of pieces and caches are multiples of this


# ------------------------------------------------------------------------------------------------ logits


def logits(
    model: Decoder,
    params: Any,
    tokens: Prompts,
    *,
    positions: Tokens | None = None,
    segment_ids: Tokens | None = None,
) -> Float[Array, "B T V"]:
    """Next-token logits at every position, float32; compiled once per model and shape, differentiable.

    `positions` count from 0 in every segment (None: 0 .. T-1). Segment id 0 is padding (None: one segment per row).

    Raises:
      UserError: tokens that are not [B, T] integers in the vocabulary; positions or segment_ids of another shape.
    """
    ids: Any = tokens if isinstance(tokens, jax.Array) else np.asarray(tokens)
    if ids.ndim != 2 or not ids.size or not jnp.issubdtype(ids.dtype, jnp.integer):
        found = f"tokens are {ids.dtype} of shape {ids.shape}"
        raise UserError(f"{found}, expected integers [B, T]: for a single sequence pass tokens[None]")
    if not isinstance(ids, jax.core.Tracer):
        _check_vocabulary(np.asarray(ids), model.vocab_size)
    for name, value in (("positions", positions), ("segment_ids", segment_ids)):
        if value is not None and np.shape(value) != ids.shape:
            raise UserError(f"{name} have shape {np.shape(value)}, expected the shape of tokens, {ids.shape}")
    return _logits(model, parameters.fitting(model, params), ids, positions, segment_ids)


@functools.partial(jax.jit, static_argnames="model")
def _logits(model, params, tokens, positions, segment_ids):
    return model.apply({"params": params}, tokens, positions=positions, segment_ids=segment_ids)


# ------------------------------------------------------------------------------------------------ generation


def generate(
    model: Decoder,
    params: Any,
    tokens: Prompts,
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    stop_tokens: Sequence[int] = (),
    rope_trace: str = "exact",
    lora: Any = None,
    top_k: int | None = None,
    allowed_tokens: Sequence[int] | None = None,
) -> Int[np.ndarray, "B new"]:
    """Continues every prompt by max_new_tokens tokens (the prompt itself is not returned).

    A row that has produced one of `stop_tokens` is filled with it to the end. Decoding ends once all rows have stopped.

    Args:
      tokens: [B, T] integers, or a list of lists of different lengths.
      temperature: 0 takes the most likely token; otherwise logits are divided by it and a token is sampled.
      top_p: sample from the smallest set of most likely tokens with at least this total probability (Holtzman et al.
        2020, arXiv 1904.09751), as TopPLogitsWarper of transformers does. No effect at temperature 0.
      seed: the same seed gives the same tokens. Each row has its own key, derived from the seed and its index in the
        batch, so its text does not depend on the other rows.
      rope_trace: "exact" or "hf"; see the docstring of this module.
      lora: a `lora` collection, applied without merging it into the parameters.
      top_k: sample among the k most likely tokens, before top_p; None: among all. No effect at temperature 0.
      allowed_tokens: only these are generated (those of stop_tokens too only if they are among them); None: all.

    Raises:
      UserError: an empty prompt, ids outside the vocabulary, a setting out of range, or more tokens than the window of
        a model with rotary embeddings (its max_position_embeddings). For other models the last is a warning.
    """
    job = _job(model, params, tokens, max_new_tokens, temperature, top_p, seed, stop_tokens, rope_trace, lora)
    job = dataclasses.replace(job, sampling=among(job.sampling, model.vocab_size, top_k, allowed_tokens))
    state = job.advance(job.start(), max_new_tokens)
    produced, last = np.asarray(state.tokens)[:, :max_new_tokens], np.asarray(state.last)
    return np.where(np.arange(max_new_tokens) < int(state.step), produced, last[:, None])


def stream(
    model: Decoder,
    params: Any,
    tokens: Prompts,
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    stop_tokens: Sequence[int] = (),
    rope_trace: str = "exact",
    lora: Any = None,
    top_k: int | None = None,
    allowed_tokens: Sequence[int] | None = None,
) -> Iterator[Int[np.ndarray, " B"]]:
    """Yields the columns [B] of `generate` as they are produced; ends early once every row has stopped."""
    job = _job(model, params, tokens, max_new_tokens, temperature, top_p, seed, stop_tokens, rope_trace, lora)
    job = dataclasses.replace(job, sampling=among(job.sampling, model.vocab_size, top_k, allowed_tokens))
    return job.columns()


def timed(model: Decoder, params: Any, tokens: Prompts, *, max_new_tokens: int) -> tuple[float, float]:
    """Seconds of a greedy generation: until the first token of each row is on the host, and from then to the last."""
    job = _job(model, params, tokens, max_new_tokens, 0.0, 1.0, 0, (), "exact", None)
    begun = time.perf_counter()
    state = job.start()
    np.asarray(state.last)
    first = time.perf_counter()
    np.asarray(job.advance(state, max_new_tokens).tokens)
    return first - begun, time.perf_counter() - first


class _State(NamedTuple):
    """The state of a generation. `tokens` has room for all columns; `step` of them are filled, `last` is the newest.

    `nan`: whether the logits after the prompt held a NaN.
    """

    cache: Any
    tokens: Int[Array, "B room"]
    last: Int[Array, " B"]
    done: Bool[Array, " B"]
    step: Int[Array, ""]
    nan: Bool[Array, ""]


@dataclasses.dataclass(frozen=True)
class _Job:
    """The constants of one generation. `sampling` is empty (greedy), or keyword arguments of `choose`."""

    model: Decoder
    variables: dict[str, Any]
    rows: list[np.ndarray]
    max_new_tokens: int
    sampling: dict[str, Any]
    stop: np.ndarray
    rope_trace: str

    @property
    def lengths(self) -> np.ndarray:
        return np.array([len(row) for row in self.rows], np.int32)

    def columns(self) -> Iterator[Int[np.ndarray, " B"]]:
        state = self.start()
        for step in range(1, self.max_new_tokens + 1):
            state = self.advance(state, step)
            yield np.asarray(state.last)
            if np.asarray(state.done).all():
                return

    def start(self) -> _State:
        """Reads the prompts and chooses the first token."""
        last_logits, cache = self.read(self.rows, self.max_new_tokens)
        room = _bucket(self.max_new_tokens)
        state = _first_jit(last_logits, self.sampling, self.stop, room=room)
        if bool(state.nan):
            raise UserError(
                f"the logits after the prompt are NaN: the weights contain NaN, or activations overflow in "
                f"{self.model.dtype}; check the checkpoint, or load it with dtype float32"
            )
        return state._replace(cache=cache)

    def read(self, rows: list[np.ndarray], num_more: int) -> tuple[Float[Array, "B V"], Any]:
        """(logits after the last token of each row, a new cache that holds the rows and has room for `num_more`)."""
        longest = max(map(len, rows))
        pieces = [_bucket(longest)] if _whole_prompt(self.model) else _pieces(len(rows), longest)
        tokens, positions, segment_ids = _left_padded(rows, sum(pieces))
        exact = self.rope_trace == "exact"
        slots = _bucket(sum(pieces) + num_more)
        rope_length = np.int32(longest + num_more if exact else 0)
        n = None if exact else np.int32(longest)  # transformers reads a prompt in one forward pass
        # A prompt of one piece creates its cache in the program that reads it; several share one program.
        cache = None if len(pieces) == 1 else _empty_cache(self.model, len(rows), slots, rope_length)
        for start, piece in zip(np.cumsum(pieces) - pieces, pieces, strict=True):
            new = slice(start, start + piece)
            arrays = tokens[:, new], positions[:, new], segment_ids[:, new]
            if cache is None:
                last_logits, cache = _read_jit(self.model, self.variables, slots, rope_length, *arrays, n)
            else:
                last_logits, cache = _append_jit(self.model, self.variables, cache, *arrays, n)
        return last_logits, cache

    def advance(self, state: _State, until: int) -> _State:
        """Decodes until `until` tokens have been produced or all rows have stopped."""
        again = self._reads_again_at()
        if again is not None and again < until:
            state = self._decode(state, again)
            if int(state.step) == again and not np.asarray(state.done).all():
                produced = np.asarray(state.tokens)[:, :again]
                rows = [np.concatenate(pair) for pair in zip(self.rows, produced, strict=True)]
                last_logits, cache = self.read(rows, self.max_new_tokens - again)
                state = _take_jit(state._replace(cache=cache), last_logits, self.sampling, self.stop)
        return self._decode(state, until)

    def _reads_again_at(self) -> int | None:
        """The step at which transformers drops its cache and reads the text again; None if it never does.

        Some families do so when the text exceeds the original window.
        """
        from lcx.convert.hf import families

        family = families.find(self.model.model_type)
        if self.rope_trace != "hf" or family is None or not family.rereads:
            return None
        ropes = _ropes(self.model, "longrope")
        step = ropes[0].original_max_position_embeddings + 1 - self.lengths.max() if ropes else 0
        return int(step) if step > 0 else None

    def _decode(self, state: _State, until: int) -> _State:
        if until == 1:  # the prefill already gave the first token: avoid compiling the decode loop
            return state
        arguments = state, self.lengths, self.sampling, self.stop, np.int32(until)
        return _decode_jit(self.model, self.variables, *arguments, hf=self.rope_trace == "hf")


# ------------------------------------------------------------------------------------------------ compiled parts


def _append(model, variables, cache, tokens, positions, segment_ids, n):
    """Appends tokens to the cache: (logits [B, V] after the last of them, cache). `n`: the length of the "hf" trace."""

    def last_logits(model, cache):
        x, cache = model.hidden(tokens, positions=positions, segment_ids=segment_ids, cache=cache)
        # Replicated: each process chooses, and reads, the tokens of all rows.
        return sharding.constrain(model.logits(x[:, -1:])[:, 0], None, None), cache

    if n is not None:  # the text only grows, so transformers' dynamic type uses its current length, too
        cache = mixers.with_rope_length(cache, n)
    return model.apply(variables, cache, method=last_logits)


_append_jit = jax.jit(_append, static_argnums=0, donate_argnames="cache")


@functools.partial(jax.jit, static_argnums=(0, 2))
def _read_jit(model, variables, slots: int, rope_length, tokens, positions, segment_ids, n):
    """`_append` to an empty cache of so many slots."""
    cache = _empty_cache(model, tokens.shape[0], slots, rope_length)
    return _append(model, variables, cache, tokens, positions, segment_ids, n)


def _take(state: _State, last_logits: Array, sampling: Mapping[str, Any], stop: Array) -> _State:
    """Chooses the next token of every row; rows that have stopped repeat theirs."""
    chosen = jnp.where(state.done, state.last, choose(last_logits, step=state.step, **sampling))
    chosen = sharding.constrain(chosen, None)
    return state._replace(
        tokens=jax.lax.dynamic_update_slice_in_dim(state.tokens, chosen[:, None], state.step, axis=1),
        last=chosen,
        done=state.done | jnp.any(chosen[:, None] == stop, axis=1),
        step=state.step + 1,
    )


_take_jit = jax.jit(_take, donate_argnames="state")


@functools.partial(jax.jit, static_argnames="room")
def _first_jit(last_logits, sampling, stop, *, room: int) -> _State:
    """The state after the first token, with room for so many, but without its cache."""
    B = last_logits.shape[0]
    tokens, nan = jnp.zeros((B, room), jnp.int32), jnp.isnan(last_logits).any()
    state = _State(None, tokens, tokens[:, 0], jnp.zeros(B, bool), jnp.int32(0), nan)
    return _take(state, last_logits, sampling, stop)


@functools.partial(jax.jit, static_argnames=("model", "hf"), donate_argnames="state")
def _decode_jit(model, variables, state: _State, lengths, sampling, stop, until, *, hf: bool) -> _State:
    """Decode steps until `until` tokens have been produced, without returning to the host in between."""

    def step(state: _State) -> _State:
        positions = lengths + state.step - 1  # of the newest token, which is not in the cache yet
        n = jnp.max(positions) + 1 if hf else None
        new = state.last[:, None], positions[:, None], jnp.ones_like(state.last)[:, None]
        last_logits, cache = _append(model, variables, state.cache, *new, n)
        return _take(state._replace(cache=cache), last_logits, sampling, stop)

    return jax.lax.while_loop(lambda s: (s.step < until) & ~jnp.all(s.done), step, state)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _empty_cache(model: Decoder, batch_size: int, slots: int, n):
    """init_cache with rope length n: `slots` is rounded up, and the rotation must not depend on the rounding."""
    return mixers.with_rope_length(model.init_cache(batch_size, slots), n)


def _ropes(model: Decoder, rope_type: str) -> list[Any]:
    """The model's rotary embeddings of this type."""
    return [rope for rope, _ in rotaries(model) if rope.rope_type == rope_type]


# ------------------------------------------------------------------------------------------------ checks, shapes


def _job(model, params, tokens, max_new_tokens, temperature, top_p, seed, stop_tokens, rope_trace, lora) -> _Job:
    """Checks the arguments of `generate` and collects them in a _Job."""
    check_settings(max_new_tokens, temperature, top_p, seed, rope_trace)
    rows = _rows(tokens, model.vocab_size)
    stop = np.array(list(stop_tokens), np.int32).reshape(-1)
    _check_window(model, max(map(len, rows)), max_new_tokens)
    sampling: dict[str, Any] = {}
    if temperature > 0:
        keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed), jnp.arange(len(rows)))
        sampling = {"keys": keys, "temperature": np.float32(temperature)}
        if top_p < 1:
            sampling["top_p"] = np.float32(top_p)
    variables = {"params": parameters.fitting(model, params)} | ({} if lora is None else {"lora": lora})
    return _Job(model, variables, rows, int(max_new_tokens), sampling, stop, rope_trace)


def default_new_tokens(model: Decoder, prompt_length: int) -> int:
    """How many tokens to generate where nothing is set: DEFAULT_NEW_TOKENS, or fewer if the model's window ends before.

    At least 1, so that a prompt without room behind it is an error of `generate`.
    """
    if not rotaries(model):
        return DEFAULT_NEW_TOKENS
    return max(1, min(DEFAULT_NEW_TOKENS, context_window(model) - prompt_length))


@naming_flags("rope_scaling", "context_length", "max_new_tokens")
def _check_window(model: Decoder, prompt_length: int, max_new_tokens: int) -> None:
    """Refuses positions beyond the window of a model with rotary embeddings; of other models it only warns."""
    total, window = prompt_length + max_new_tokens, context_window(model)
    if total <= window:
        return
    found = (
        f"a prompt of {prompt_length} and max_new_tokens {max_new_tokens} are {total} tokens together, more than the "
        f"model's window of {window} (max_position_embeddings)"
    )
    if not rotaries(model):
        _log.warning("%s: the model was not trained on texts of this length", found)
        return
    lower = "shorten the prompt" if prompt_length >= window else f"lower max_new_tokens to {window - prompt_length}"
    raise UserError(
        f"{found}: {lower}, or extend the window with context_length {total} and, unless the model has its own, a "
        'rope_scaling ({"rope_type": "default"} leaves it unscaled)'
    )


def check_settings(max_new_tokens, temperature, top_p, seed, rope_trace=ROPE_TRACES[0]) -> None:
    """Raises UserError for a setting of `generate` that is out of range."""
    if not _is_integer(max_new_tokens) or max_new_tokens < 1:
        raise UserError(f"max_new_tokens is {max_new_tokens!r}, expected an integer >= 1: change max_new_tokens")
    if not _is_number(temperature) or not 0 <= temperature < math.inf:
        raise UserError(f"temperature is {temperature!r}, expected a number >= 0 (0 takes the likeliest token)")
    if not _is_number(top_p) or not 0 < top_p <= 1:
        raise UserError(f"top_p is {top_p!r}, expected a number above 0 and at most 1 (1 switches it off)")
    if not _is_integer(seed) or not -(2**31) <= seed < 2**32:  # jax.random.key keeps 32 bits of a seed
        raise UserError(f"seed is {seed!r}, expected an integer of 32 bits: change seed")
    if rope_trace not in ROPE_TRACES:
        raise UserError(f"rope_trace is {rope_trace!r}, expected one of {', '.join(ROPE_TRACES)}")


def _is_integer(value: Any) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float | np.number) and not isinstance(value, bool)


def _rows(tokens: Prompts, vocab_size: int) -> list[np.ndarray]:
    """One int32 array per prompt.

    Raises:
      UserError: text instead of ids, a prompt that is empty or not a list of integers, ids outside the vocabulary.
    """
    if isinstance(tokens, str) or (not hasattr(tokens, "ndim") and any(isinstance(row, str) for row in tokens)):
        raise UserError(
            "tokens is text, expected token ids: use lcx.generate_text(model, params, tokenizer, text), or encode it "
            "with lcx.load_tokenizer(path).encode(text)"
        )
    if hasattr(tokens, "ndim"):
        if tokens.ndim != 2:
            raise UserError(
                f"tokens have shape {tokens.shape}, expected [B, T]: for a single prompt pass tokens[None]"
            )
        tokens = np.asarray(tokens)
    rows = []
    for i, row in enumerate(tokens):
        row = np.asarray(row)
        if row.ndim != 1:
            raise UserError(
                f"prompt {i} has shape {row.shape}, expected a list of token ids: pass a list of prompts"
            )
        if not row.size:
            raise UserError(f"prompt {i} is empty, expected at least one token (such as BOS): change tokens")
        if not np.issubdtype(row.dtype, np.integer):
            raise UserError(f"prompt {i} holds {row.dtype}, expected integer token ids: change tokens")
        _check_vocabulary(row, vocab_size)
        rows.append(row.astype(np.int32))
    if not rows:
        raise UserError("no prompts, expected at least one row of tokens: change tokens")
    return rows


def _check_vocabulary(tokens: np.ndarray, vocab_size: int) -> None:
    outside = tokens[(tokens < 0) | (tokens >= vocab_size)]
    if outside.size:
        found = f"token id {outside[0]} is outside the model's vocabulary"
        raise UserError(
            f"{found}, expected 0 to {vocab_size - 1}: use the tokenizer that belongs to the model"
        )


def context_window(model: Decoder) -> int:
    """The model's context window. With dynamic RoPE, max_position_embeddings may be the window before scaling."""
    ropes = _ropes(model, "dynamic")
    scaled = [int(rope.factor * rope.original_max_position_embeddings) for rope in ropes]
    return max([model.max_position_embeddings, *scaled])


def _whole_prompt(model: Decoder) -> bool:
    """Whether some mixer must read a prompt in one piece."""
    return any(mixers.whole_prompt(block.mixer) for stage in model.stages for block in stage.pattern)


def _bucket(size: int) -> int:
    """The smallest bucket that holds `size`. Up to 512 there are two in each octave, up to 4096 four, then eight.

    So at most a half, a quarter, an eighth of the size is added. Fewer buckets compile fewer programs.
    """
    octave = 1 << max(size - 1, 0).bit_length()
    grain = max(octave // (4 if octave <= 512 else 8 if octave <= 4096 else 16), _GRAIN)
    return -(-size // grain) * grain


def _pieces(batch_size: int, width: int) -> list[int]:
    """The sizes of the pieces in which prompts of `width` tokens are read; all but the first are equal."""
    most = max(_PIECE_TOKENS // batch_size // _GRAIN * _GRAIN, _GRAIN)
    while _bucket(most) != most:  # down to a bucket
        most -= _GRAIN
    count = -(-width // most)
    return [_bucket(width - (count - 1) * most), *[most] * (count - 1)]


def _left_padded(rows: list[np.ndarray], width: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(tokens, positions, segment_ids) [B, width]; padding has segment id 0."""
    tokens, positions, segment_ids = (np.zeros((len(rows), width), np.int32) for _ in range(3))
    for i, row in enumerate(rows):
        first = width - len(row)
        tokens[i, first:], positions[i, first:], segment_ids[i, first:] = row, np.arange(len(row)), 1
    return tokens, positions, segment_ids


__getattr__ = moved.names_of(__name__)
