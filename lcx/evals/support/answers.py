"""Continuations of many prompts: in batches of similar length, kept in the journal, scored by nobody here.

Nothing is ever cut from a prompt: a text that was shortened would be another task. A prompt beyond the model's window
is read as it is, because evaluations are about what happens there.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from lcx import sampler
from lcx.data import Tokenizer, check_vocabulary
from lcx.errors import UserError
from lcx.evals.support import journal, scoring
from lcx.model import Decoder

TOKENS_PER_BATCH = 1 << 16
_SHAPES = 8  # groups of prompts of similar length; each different length in a batch compiles another program


def needed(tokenizer: Tokenizer | None, model: Decoder, owner: str) -> Tokenizer:
    """The tokenizer, which an evaluation of texts cannot do without.

    Raises:
      UserError: there is none, or it has ids that the model does not have.
    """
    if tokenizer is None:
        raise UserError(
            f"{owner} needs a tokenizer and the checkpoint has none: put its tokenizer.json into the same folder"
        )
    check_vocabulary(tokenizer, model.vocab_size)
    return tokenizer


def continuations(
    model: Decoder,
    params: Any,
    tokenizer: Tokenizer,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    batch_size: int,
    bar: Any = None,
    tokens_per_batch: int = TOKENS_PER_BATCH,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
) -> list[str]:
    """The text that follows each prompt, up to a token that ends a text; in the order of the prompts.

    Args:
      prompts: token ids.
      max_new_tokens: of each continuation.
      batch_size: prompts at once, fewer where that would be more than `tokens_per_batch` tokens.
      bar: a progress bar, which is moved on by the tokens of each prompt.
      temperature, top_p, seed: as in lcx.generate; 0 takes the likeliest token.
    """
    known = journal.current()
    settings = [max_new_tokens, temperature, top_p, seed]
    keys = [journal.key_of(np.asarray(prompt, np.int32).tobytes(), settings) for prompt in prompts]
    found: list[str | None] = [None if known is None else known.get(key) for key in keys]
    _move(bar, sum(len(p) + max_new_tokens for p, text in zip(prompts, found) if text is not None))
    left = [i for i, text in enumerate(found) if text is None]
    longest = max((len(prompts[i]) for i in left), default=0) + max_new_tokens
    size = max(1, min(batch_size, tokens_per_batch // max(longest, 1)))
    window = max(model.max_position_embeddings, longest)
    model = model.clone(parent=None, max_position_embeddings=window)
    sampling: dict[str, Any] = {"temperature": temperature, "top_p": top_p} if temperature > 0 else {}
    with scoring.on_mesh(params):
        for group in batches([len(prompts[i]) for i in left], size):
            batch = [left[i] for i in group]
            # A smaller last batch is filled with copies of its last prompt: another shape would compile again.
            filled = [*batch, *[batch[-1]] * (size - len(batch))]
            if sampling:
                sampling["seed"] = _seed(seed, batch[0])
            new = sampler.generate(
                model,
                params,
                [list(prompts[i]) for i in filled],
                max_new_tokens=max_new_tokens,
                stop_tokens=stop_tokens(tokenizer),
                **sampling,
            )
            for i, ids in zip(batch, np.asarray(new).tolist(), strict=False):
                found[i] = tokenizer.decode(_until_stop(ids, stop_tokens(tokenizer)))
                if known is not None:
                    known.put(keys[i], found[i])
            _move(bar, sum(len(prompts[i]) + max_new_tokens for i in batch))
    return [text or "" for text in found]


def stop_tokens(tokenizer: Tokenizer) -> tuple[int, ...]:
    """The ids that end a text: EOS, and the tokenizer's own."""
    ends = {tokenizer.eos_id, *getattr(tokenizer, "stop_ids", ())}
    return tuple(sorted(token for token in ends if token is not None))


def batches(lengths: Sequence[int], size: int) -> list[list[int]]:
    """Groups the indices of prompts into batches of at most `size`, whose longest lengths take few different values.

    Fewer different lengths mean fewer compilations. The prompts are sorted by length and divided into at most _SHAPES
    groups. If a group has n batches, each takes every n-th prompt, so the longest prompts of all batches in a group
    have about the same length.
    """
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    per_group = max(size, -(-len(order) // _SHAPES))
    out = []
    for start in range(0, len(order), per_group):
        group = order[start : start + per_group]
        count = -(-len(group) // size)
        out += [group[i::count] for i in range(count)]
    return out


def _until_stop(ids: list[int], stops: tuple[int, ...]) -> list[int]:
    end = next((i for i, token in enumerate(ids) if token in stops), len(ids))
    return ids[:end]


def _seed(seed: int, index: int) -> int:
    """Another seed for every batch: rows of two batches must not draw the same numbers."""
    return int(np.random.SeedSequence([seed, index]).generate_state(1)[0])


def _move(bar: Any, tokens: int) -> None:
    if bar is not None and tokens:
        bar.update(tokens)
