"""Answers to requests for completions: prompts to tokens, generation, stop texts, log-probabilities."""

import dataclasses
import functools
import secrets
import time
import uuid
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from lcx import sampler
from lcx.data import Tokenizer, check_vocabulary
from lcx.model import Decoder
from lcx.serving.request import Request, RequestError
from lcx.terminal import end_of
from lcx.text import ids_of, stop_ids

_GRAIN = 64  # rows whose log-probabilities are computed are padded to a multiple of this


@dataclasses.dataclass(frozen=True)
class Choice:
    """One completion.

    Attributes:
      prompt: its token ids, special tokens included.
      new: generated ids, without the token that ended the text, up to a stop text.
      text: of `new`, up to the stop text.
      generated: how many tokens were generated, the last one included.
      finish_reason: "stop" at a stop text or a token that ends a text, else "length".
    """

    prompt: list[int]
    new: list[int]
    text: str
    generated: int
    finish_reason: str


@dataclasses.dataclass(frozen=True)
class Completer:
    """A model that answers requests.

    Attributes:
      name: of the model, which requests may give.

    Raises:
      UserError: the tokenizer has ids that the model does not have.
    """

    model: Decoder
    params: Any
    tokenizer: Tokenizer
    name: str

    def __post_init__(self):
        check_vocabulary(self.tokenizer, self.model.vocab_size)

    def answer(self, request: Request) -> dict[str, Any]:
        """The response as JSON.

        Raises:
          UserError: the prompt and max_tokens exceed the model's window, or an id is not in its vocabulary.
        """
        rows = [self._ids(prompt) for prompt in request.prompts for _ in range(request.n)]
        self._check_window(max(map(len, rows)), request.max_tokens)
        choices = self.complete(rows, request)
        texts = [prompt for prompt in request.prompts for _ in range(request.n)]
        made = []
        for i, (choice, prompt) in enumerate(zip(choices, texts, strict=True)):
            said = self._said(prompt)
            text = said + choice.text if request.echo else choice.text
            logprobs = None if request.logprobs is None else self._logprobs(choice, request, len(said))
            reason = choice.finish_reason
            made.append({"index": i, "text": text, "logprobs": logprobs, "finish_reason": reason})
        read = sum(len(row) for row in rows[:: request.n])
        generated = sum(choice.generated for choice in choices)
        return {
            "id": f"cmpl-{uuid.uuid4().hex}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": self.name,
            "choices": made,
            "usage": {
                "prompt_tokens": read,
                "completion_tokens": generated,
                "total_tokens": read + generated,
            },
        }

    def _check_window(self, length: int, max_tokens: int) -> None:
        """Refuses more than the window, for all models: without a limit, one request could keep the server busy."""
        window = sampler.context_window(self.model)
        if length + max_tokens > window:
            found = f"a prompt of {length} and max_tokens {max_tokens} are more than the window of {window} tokens"
            raise RequestError(
                f"{found}: send less, or start the server with --context_length", field="prompt"
            )

    def complete(self, rows: Sequence[list[int]], request: Request) -> list[Choice]:
        """The completions of rows of tokens, in their order."""
        if request.max_tokens == 0:
            return [Choice(row, [], "", 0, "length") for row in rows]
        seed = secrets.randbits(31) if request.seed is None else request.seed
        columns = sampler.stream(
            self.model,
            self.params,
            rows,
            max_new_tokens=request.max_tokens,
            temperature=request.temperature,
            top_p=request.top_p,
            seed=seed,
            stop_tokens=stop_ids(self.tokenizer),
        )
        return self._ended(rows, columns, request.stop)

    def _ended(
        self, rows: Sequence[list[int]], columns: Iterable[Int[np.ndarray, " B"]], stop: Sequence[str]
    ) -> list[Choice]:
        """Collects columns until each row has ended by itself or reached a stop text."""
        ends = set(stop_ids(self.tokenizer))
        new: list[list[int]] = [[] for _ in rows]
        done: dict[int, Choice] = {}
        for column in columns:
            for i in (i for i in range(len(rows)) if i not in done):
                token = int(column[i])
                if token in ends:
                    text = self._text(rows[i], new[i])
                    done[i] = Choice(rows[i], new[i], text, len(new[i]) + 1, "stop")
                    continue
                new[i].append(token)
                if stop and (place := _first(text := self._text(rows[i], new[i]), stop)) is not None:
                    kept = self._within(rows[i], new[i], place)
                    done[i] = Choice(rows[i], kept, text[:place], len(new[i]), "stop")
            if len(done) == len(rows):
                break
        for i in set(range(len(rows))) - set(done):
            done[i] = Choice(rows[i], new[i], self._text(rows[i], new[i]), len(new[i]), "length")
        return [done[i] for i in range(len(rows))]

    def _within(self, row: list[int], new: list[int], place: int) -> list[int]:
        """The tokens of which the first `place` characters are made."""
        count = next(n for n in range(len(new) + 1) if len(self._text(row, new[:n])) >= place)
        return new[:count]

    def _text(self, row: list[int], new: list[int]) -> str:
        # Decoded after the end of the prompt, because some tokenizers drop the space before the first word of a text.
        before = end_of(self.tokenizer, row)
        return self.tokenizer.decode(before + new)[len(self.tokenizer.decode(before)) :]

    def _ids(self, prompt: str | tuple[int, ...]) -> list[int]:
        if isinstance(prompt, str):
            return ids_of(self.tokenizer, prompt)
        if (most := max(prompt)) >= self.model.vocab_size:
            found = f"token id {most} is outside the vocabulary of {self.model.vocab_size} tokens"
            raise RequestError(f"{found}: change prompt", field="prompt")
        return list(prompt)

    def _said(self, prompt: str | tuple[int, ...]) -> str:
        return prompt if isinstance(prompt, str) else self.tokenizer.decode(list(prompt))

    def _logprobs(self, choice: Choice, request: Request, said: int) -> dict[str, Any]:
        """The log-probabilities of the tokens of the answer, before temperature and top_p, and of the likeliest.

        Args:
          said: characters of the prompt, which offsets count even if it is not part of the answer.
        """
        tokens = choice.prompt + choice.new
        first = 0 if request.echo else len(choice.prompt)
        count = request.logprobs or 0
        own, ids, values = likelihoods(self.model, self.params, tokens, max(count, 1))
        pieces = [self._text(tokens[:i], tokens[i : i + 1]) for i in range(first, len(tokens))]
        start = 0 if request.echo else said
        top: list[dict[str, float] | None] | None = None
        if count:
            top = [self._likeliest(tokens[:i], ids[i, :count], values[i]) for i in range(first, len(tokens))]
        scores: list[float | None] = [float(own[i]) for i in range(first, len(tokens))]
        if first == 0:  # nothing comes before the first token
            scores[0] = None
            if top is not None:
                top[0] = None
        return {
            "tokens": pieces,
            "token_logprobs": scores,
            "top_logprobs": top,
            "text_offset": [start + sum(map(len, pieces[:i])) for i in range(len(pieces))],
        }

    def _likeliest(self, before: list[int], ids: np.ndarray, values: np.ndarray) -> dict[str, float]:
        """The log-probabilities by text; of tokens with the same text, that of the likeliest."""
        found: dict[str, float] = {}
        for token, value in zip(ids.tolist(), values.tolist(), strict=False):
            found.setdefault(self._text(before, [token]), value)
        return found


def likelihoods(
    model: Decoder, params: Any, tokens: Sequence[int], count: int
) -> tuple[Float[np.ndarray, " T"], Int[np.ndarray, "T count"], Float[np.ndarray, "T count"]]:
    """(log p of each token after those before it, the ids of the `count` likeliest there, their log p).

    The first token has nothing before it; its entries mean nothing.
    """
    width = -(-len(tokens) // _GRAIN) * _GRAIN
    padded, segment_ids = np.zeros((2, 1, width), np.int32)
    padded[0, : len(tokens)], segment_ids[0, : len(tokens)] = tokens, 1
    count = min(count, model.vocab_size)
    found = _likelihoods(model, params, padded, segment_ids, count=count)
    own, ids, values = (np.roll(np.asarray(value), 1, axis=0)[: len(tokens)] for value in found)
    return own, ids, values


@functools.partial(jax.jit, static_argnames=("model", "count"))
def _likelihoods(model, params, tokens, segment_ids, *, count: int):
    logp = jax.nn.log_softmax(model.apply({"params": params}, tokens, segment_ids=segment_ids)[0])
    own = jnp.take_along_axis(logp, jnp.roll(tokens[0], -1)[:, None], axis=1)[:, 0]
    values, ids = jax.lax.top_k(logp, count)
    return own, ids, values


def _first(text: str, stops: Sequence[str]) -> int | None:
    """Where the first stop text begins; None if there is none."""
    places = [place for place in map(text.find, stops) if place >= 0]
    return min(places, default=None)
