"""Passkey retrieval: the model is asked for a number that was hidden in filler text k tokens earlier.

The task is that of Mohtashami & Jaggi 2023 (arXiv 2305.16300), with the protocol of position interpolation (Chen et
al. 2023, arXiv 2306.15595, section 3.3.2): evenly spaced distances k, some trials at each, and k_max, the largest k up
to which the success rate stays above a threshold. Only the continuation is scored. It is correct if its first integer
is the key, so a continuation without an integer is wrong.
"""

import dataclasses
import functools
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from lcx.data import Tokenizer, special_tokens
from lcx.errors import UserError
from lcx.evals import Result
from lcx.evals.support import answers, figures
from lcx.evals.support.intervals import wilson
from lcx.evals.support.model_facts import facts
from lcx.evals.support.progress import progress
from lcx.model import Decoder
from lcx.wording import quantity

TASK = (
    "There is an important info hidden inside a lot of irrelevant text. Find it and memorize them. I will quiz you"
    " about the important information there.\n"
)
FILLER = (
    "The grass is green.", "The sky is blue.", "The sun is yellow.", "Here we go.", "There and back again."
)  # fmt: skip
QUESTION = "\nWhat is the pass key? The pass key is"
_MOST_DIGITS = 18  # numpy draws keys as int64


@dataclasses.dataclass(frozen=True)
class Prompt:
    """One trial.

    Attributes:
      tokens: the prompt.
      key: the number expected in the continuation.
      distance: k, the tokens from the end of the last mention of the key to the end of the prompt.
    """

    tokens: list[int]
    key: int
    distance: int


@dataclasses.dataclass(frozen=True)
class Passkey:
    """Success rate by distance, and k_max.

    A prompt consists of the task, the key, as many filler sentences as bring the key to the wanted distance from the
    end, and the question. The longest distance is chosen such that the prompt and its answer just fit the context.

    Attributes:
      context_length: tokens of the longest prompt with its answer; None: the model's context length, or the smallest
        multiple of it (2, 4, ...) that the shortest prompt fits, which is then beyond its window.
      num_distances: number of distances k, evenly spaced up to the longest.
      trials: prompts per distance, each with its own key.
      digits: of the key, which does not start with 0.
      threshold: the success rate required for k_max.
      full_length: True also puts filler before the key, so that every prompt fills the context. False makes a prompt
        only as long as its distance requires, so that a model with a short context can answer the short ones.
      max_new_tokens: length of the greedy continuation.
      batch_size: prompts generated at once.
      seed: for the random keys.
      add_bos: whether each prompt starts with BOS; None: as the tokenizer does.
      name: key in results.json.
    """

    context_length: int | None = None
    num_distances: int = 32
    trials: int = 10
    digits: int = 5
    threshold: float = 0.2
    full_length: bool = False
    max_new_tokens: int = 10
    batch_size: int = 32
    seed: int = 0
    add_bos: bool | None = None
    name: str = "passkey"

    def __post_init__(self):
        for field in ("num_distances", "trials", "digits", "max_new_tokens", "batch_size"):
            if getattr(self, field) < 1:
                raise UserError(f"Passkey.{field} is {getattr(self, field)}, expected at least 1")
        if self.digits > _MOST_DIGITS:
            raise UserError(f"Passkey.digits is {self.digits}, expected at most {_MOST_DIGITS}")
        if self.seed < 0:
            raise UserError(f"Passkey.seed is {self.seed}, expected at least 0")
        if not 0 < self.threshold <= 1:
            raise UserError(f"Passkey.threshold is {self.threshold}, expected a rate above 0 and at most 1")

    def check_model(self, model: Decoder, tokenizer: Tokenizer | None) -> None:
        tokenizer = answers.needed(tokenizer, model, "Passkey")
        self._check_fits(self._shortest(tokenizer), self._context(model, tokenizer))

    def _check_fits(self, shortest: int, context: int) -> None:
        if shortest > context:
            raise UserError(
                f"Passkey: a context of {context} tokens is too short, expected at least {shortest} (the shortest"
                " prompt and its answer): set Passkey.context_length"
            )

    def __call__(self, model: Decoder, params: Any, tokenizer: Tokenizer | None) -> Result:
        tokenizer = answers.needed(tokenizer, model, "Passkey")
        context, window = self._context(model, tokenizer), model.max_position_embeddings
        prompts = self.prompts(tokenizer, context)
        rows = [prompt.tokens for row in prompts for prompt in row]
        with progress(self.name, sum(len(row) + self.max_new_tokens for row in rows), "tokens") as bar:
            found = answers.continuations(
                model,
                params,
                tokenizer,
                rows,
                max_new_tokens=self.max_new_tokens,
                batch_size=self.batch_size,
                bar=bar,
            )
        distances = []
        for i, row in enumerate(prompts):
            texts = found[i * self.trials : (i + 1) * self.trials]
            scores = [float(is_correct(text, one.key)) for text, one in zip(texts, row, strict=True)]
            hits = int(sum(scores))
            low, high = wilson(hits, self.trials)
            distances.append(
                {
                    "k": min(prompt.distance for prompt in row),
                    "prompt_tokens": max(len(prompt.tokens) for prompt in row),
                    "successes": hits,
                    "trials": self.trials,
                    "rate": hits / self.trials,
                    "scores": scores,
                    "wilson_low": low,
                    "wilson_high": high,
                    "example": {"expected": row[0].key, "continuation": texts[0]},
                }
            )
        beyond = f"the shortest prompt does not fit the model's window of {window} tokens: measured up to {context}"
        notes = [beyond] if self.context_length is None and context > window else []
        return {**self._result(model, context, distances), "notes": notes}

    def _context(self, model: Decoder, tokenizer: Tokenizer) -> int:
        """Tokens of the longest prompt with its answer."""
        context = self.context_length or model.max_position_embeddings
        while self.context_length is None and context < self._shortest(tokenizer):
            context *= 2
        return context

    def _shortest(self, tokenizer: Tokenizer) -> int:
        """Tokens of the shortest prompt and its answer."""
        prompt = _build(tokenizer, 10**self.digits - 1, after=0, add_bos=self.add_bos)
        return len(prompt.tokens) + self.max_new_tokens

    def _result(self, model: Decoder, context: int, distances: list[dict[str, Any]]) -> Result:
        best = k_max(distances, self.threshold)
        mean = sum(d["rate"] for d in distances) / len(distances)
        return {
            "definition": self._definition(context),
            "summary": f"k_max {best} of {distances[-1]['k']} tokens, mean success {mean:.0%}",
            "table": {
                "k_max (tokens)": best,
                "longest k": distances[-1]["k"],
                "mean success": round(mean, 4),
            },
            "model": facts(model),
            "context_length": context,
            "threshold": self.threshold,
            "k_max": best,
            "mean_rate": mean,
            "distances": distances,
        }

    def prompts(self, tokenizer: Tokenizer, context: int) -> list[list[Prompt]]:
        """Prompts for a context of `context` tokens, indexed [distance][trial].

        Raises:
          UserError: the shortest prompt and its answer do not fit the context.
        """
        room = context - self.max_new_tokens
        build = functools.partial(_build, tokenizer, add_bos=self.add_bos)
        rng = np.random.default_rng(self.seed)
        keys = rng.integers(10 ** (self.digits - 1), 10**self.digits, (self.num_distances, self.trials))
        shortest = build(int(keys[0, 0]), after=0)
        self._check_fits(len(shortest.tokens) + self.max_new_tokens, context)
        per_sentence = _tokens_per_sentence(tokenizer)
        longest = shortest.distance + room - len(shortest.tokens)
        rows = []
        for i in range(self.num_distances):
            wanted = longest * (i + 1) / self.num_distances
            after = max(0, round((wanted - shortest.distance) / per_sentence))
            rows.append([self._fitted(build, int(key), after, room, per_sentence) for key in keys[i]])
        return rows

    def _fitted(self, build: Any, key: int, after: int, room: int, per_sentence: float) -> Prompt:
        """The prompt, with filler removed until it fits `room` tokens; full_length adds filler before the key."""
        prompt = build(key, after=after)
        while len(prompt.tokens) > room and after > 0:
            after = max(0, after - max(1, int((len(prompt.tokens) - room) / per_sentence)))
            prompt = build(key, after=after)
        before = int((room - len(prompt.tokens)) / per_sentence) if self.full_length else 0
        while before > 0:
            longer = build(key, after=after, before=before)
            if len(longer.tokens) <= room:
                return longer
            before -= 1
        return prompt

    def _definition(self, context: int) -> str:
        fill = (
            "filler before and after the key fills the context"
            if self.full_length
            else "no filler before the key"
        )
        return (
            f"passkey of {self.digits} digits (Mohtashami & Jaggi 2023, arXiv 2305.16300), {self.num_distances}"
            f" distances k evenly spaced over a context of {context} tokens,"
            f" {quantity(self.trials, 'trial')} each; k is the number of"
            f" tokens from the end of the key's last mention to the end of the prompt; {fill}; greedy continuation"
            f" of {self.max_new_tokens} tokens, right if the first integer in it is the key; k_max: the largest k such"
            f" that every k' <= k has a success rate of at least {self.threshold:g}; 95% Wilson intervals"
        )

    def finding(self, results: Mapping[str, Result]) -> str:
        """How often each model finds the key, with 95% Wilson intervals, and up to which distance."""
        parts = []
        for label, result in results.items():
            rows = result["distances"]
            hits, trials = (sum(row.get(key, 0) for row in rows) for key in ("successes", "trials"))
            low, high = wilson(hits, trials)
            who = f"“{label}” finds" if len(results) > 1 else "finds"
            parts.append(
                f"{who} the passkey in {hits} of {trials} prompts (95% interval {low:.0%} to {high:.0%}) up to"
                f" {rows[-1]['k']} tokens back; k_max {result['k_max']}"
            )
        return "; ".join(parts)

    def plot(self, axes: Any, results: Mapping[str, Result]) -> None:
        _strips(axes, results) if len(results) > 2 else _curves(axes, results)
        axes.set_xlabel("k: tokens between the key and the end of the prompt")
        figures.mark_window(axes, results)


def _curves(axes: Any, results: Mapping[str, Result]) -> None:
    """Success rates with confidence bands, for one or two models; more bands would overlap too much."""
    styles = figures.styles(results)
    for label, result in results.items():
        rows = result["distances"]
        k = [row["k"] for row in rows]
        low, high = ([100 * row[f"wilson_{end}"] for row in rows] for end in ("low", "high"))
        axes.fill_between(k, low, high, color=styles[label]["color"], alpha=0.13, lw=0)
        axes.plot(k, [100 * row["rate"] for row in rows], label=_with_k_max(label, result), **styles[label])
    axes.axhline(100 * next(iter(results.values()))["threshold"], lw=1, ls=":", color="C6")
    axes.set_ylim(-3, 103)
    axes.set_ylabel("key found (% of trials)")
    axes.set_title("Passkey retrieval (band: 95% Wilson interval; dotted: threshold of k_max)")
    figures.legend(axes, [_with_k_max(label, result) for label, result in results.items()])


def _strips(axes: Any, results: Mapping[str, Result]) -> None:
    """One row per model and one cell per distance, with an opacity proportional to the success rate."""
    styles = figures.styles(results)
    for row, (label, result) in enumerate(results.items()):
        k = [0, *(entry["k"] for entry in result["distances"])]
        rates = [entry["rate"] for entry in result["distances"]]
        for start, end, rate in zip(k[:-1], k[1:], rates, strict=True):
            axes.barh(
                row,
                end - start,
                left=start,
                height=0.7,
                color=styles[label]["color"],
                alpha=0.06 + 0.94 * rate,
            )
    names = [_with_k_max(label, result) for label, result in results.items()]
    width = 14 if figures.is_narrow(axes) else 30
    axes.set_yticks(range(len(results)), [figures.wrapped(name, width) for name in names])
    axes.set_xlim(0, max(result["distances"][-1]["k"] for result in results.values()))
    axes.invert_yaxis()
    axes.grid(False)
    axes.figure.set_figheight(1.6 + 0.5 * len(results))
    axes.set_title("Passkey found (full colour: always; pale: never)")


def _with_k_max(label: str, result: Result) -> str:
    return f"{label} (k_max {result['k_max']})"


def is_correct(continuation: str, key: int) -> bool:
    """Whether the first integer in the continuation equals the key."""
    found = re.search(r"[0-9]+", continuation)
    return found is not None and int(found[0]) == key


def k_max(distances: Sequence[Mapping[str, Any]], threshold: float) -> int:
    """The largest k such that every distance up to it has at least this success rate; 0 if the first one does not."""
    best = 0
    for k in sorted({d["k"] for d in distances}):
        same = [d for d in distances if d["k"] == k]
        if sum(d["successes"] for d in same) < threshold * sum(d["trials"] for d in same):
            break
        best = k
    return best


def _build(
    tokenizer: Tokenizer, key: int, *, after: int, before: int = 0, add_bos: bool | None = None
) -> Prompt:
    """The prompt with `after` filler sentences after the key and `before` sentences before it.

    The whole prompt is encoded at once, because encoding its parts separately may give other tokens.
    """
    lead = f"{TASK}{_filler(before)}{chr(10) if before else ''}The pass key is {key}. Remember it. {key}"
    rest = f" is the pass key.{chr(10) if after else ''}{_filler(after)}{QUESTION}"
    start = special_tokens(tokenizer, add_bos=add_bos).before
    tokens = [*start, *tokenizer.encode(lead + rest).tolist()]
    return Prompt(tokens, key, len(tokens) - len(start) - len(tokenizer.encode(lead)))


def _filler(sentences: int) -> str:
    return " ".join(FILLER[i % len(FILLER)] for i in range(sentences))


def _tokens_per_sentence(tokenizer: Tokenizer) -> float:
    """Mean tokens per filler sentence. The difference of two lengths cancels the tokens at the start and end."""
    rounds = 8 * len(FILLER)
    return (len(tokenizer.encode(_filler(2 * rounds))) - len(tokenizer.encode(_filler(rounds)))) / rounds
