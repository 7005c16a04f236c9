"""Passkey retrieval: a number hidden in filler text, asked for k tokens later (Mohtashami & Jaggi 2023).

The protocol is that of position interpolation (Chen et al. 2023, arXiv 2306.15595, section 3.3.2): evenly spaced
distances k, some trials each, and k_max, the largest k up to which the success rate stays above a threshold. Only the
continuation is scored, by the first integer in it: a model that says nothing scores 0.
"""

import dataclasses
import functools
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from lcx import sampler
from lcx.data import Tokenizer, check_vocabulary, special_tokens
from lcx.errors import UserError
from lcx.evals import Result
from lcx.evals.support import figures, scoring
from lcx.evals.support.intervals import wilson
from lcx.evals.support.model_facts import facts
from lcx.model import Decoder

TASK = (
    "There is an important info hidden inside a lot of irrelevant text. Find it and memorize them. I will quiz you"
    " about the important information there.\n"
)
FILLER = (
    "The grass is green.", "The sky is blue.", "The sun is yellow.", "Here we go.", "There and back again."
)  # fmt: skip
QUESTION = "\nWhat is the pass key? The pass key is"
_SHAPES = 8  # groups of similar length, so that few shapes compile


@dataclasses.dataclass(frozen=True)
class Prompt:
    """One trial: the tokens given, the number expected, and k, the tokens between the number and the end."""

    tokens: list[int]
    key: int
    distance: int


@dataclasses.dataclass(frozen=True)
class Passkey:
    """Success rate by distance, and k_max.

    A prompt holds the task, the key, as many filler sentences as bring the key to the wanted distance from the end,
    and the question. With its answer it fits the context: the longest distance is what that leaves.

    Attributes:
      context_length: the longest prompt in tokens; None for the model's.
      num_distances: distances k, evenly spaced up to the longest.
      trials: prompts at each distance, each with a key of its own.
      digits: of the key; it does not begin with 0.
      threshold: the success rate that counts, for k_max.
      full_length: True puts filler before the key too, so that every prompt fills the context. False makes a prompt
        as long as its distance needs, so that a model with a short context still answers the short ones.
      max_new_tokens: of the greedy continuation.
      batch_size: prompts in one generation.
      seed: of the keys.
      add_bos: True begins each prompt with BOS, False with the text; None leaves it to the tokenizer.
    """

    context_length: int | None = None
    num_distances: int = 32
    trials: int = 10
    digits: int = 5
    threshold: float = 0.2
    full_length: bool = False
    max_new_tokens: int = 10
    batch_size: int = 16
    seed: int = 0
    add_bos: bool | None = None
    name: str = "passkey"

    def __post_init__(self):
        for field in ("num_distances", "trials", "digits", "max_new_tokens", "batch_size"):
            if getattr(self, field) < 1:
                raise UserError(f"Passkey.{field} is {getattr(self, field)}, expected at least 1")
        if not 0 < self.threshold <= 1:
            raise UserError(f"Passkey.threshold is {self.threshold}, expected a rate above 0 and at most 1")

    def __call__(self, model: Decoder, params: Any, tokenizer: Tokenizer | None) -> Result:
        if tokenizer is None:
            raise UserError(
                "Passkey needs a tokenizer and the checkpoint has none: put its tokenizer.json beside it"
            )
        check_vocabulary(tokenizer, model.vocab_size)
        context = self.context_length or model.max_position_embeddings
        prompts = self.prompts(tokenizer, context)
        answers = self._answers(model, params, tokenizer, [prompt for row in prompts for prompt in row])
        distances = []
        for i, row in enumerate(prompts):
            texts = answers[i * self.trials : (i + 1) * self.trials]
            hits = sum(is_correct(text, prompt.key) for text, prompt in zip(texts, row, strict=True))
            low, high = wilson(hits, self.trials)
            distances.append(
                {
                    "k": min(prompt.distance for prompt in row),
                    "prompt_tokens": max(len(prompt.tokens) for prompt in row),
                    "successes": hits,
                    "trials": self.trials,
                    "rate": hits / self.trials,
                    "wilson_low": low,
                    "wilson_high": high,
                    "example": {"expected": row[0].key, "continuation": texts[0]},
                }
            )
        return self._result(model, context, distances)

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
        """[distance][trial] prompts for a context of so many tokens.

        Raises:
          UserError: a context that does not hold the shortest prompt and its answer.
        """
        room = context - self.max_new_tokens
        build = functools.partial(_build, tokenizer, add_bos=self.add_bos)
        rng = np.random.default_rng(self.seed)
        keys = rng.integers(10 ** (self.digits - 1), 10**self.digits, (self.num_distances, self.trials))
        shortest = build(int(keys[0, 0]), after=0)
        if len(shortest.tokens) > room:
            raise UserError(
                f"Passkey: a context of {context} tokens is too short, expected at least"
                f" {len(shortest.tokens) + self.max_new_tokens} (the shortest prompt and its answer):"
                " set Passkey.context_length"
            )
        per_sentence = _tokens_per_sentence(tokenizer)
        longest = shortest.distance + room - len(shortest.tokens)
        rows = []
        for i in range(self.num_distances):
            wanted = longest * (i + 1) / self.num_distances
            after = max(0, round((wanted - shortest.distance) / per_sentence))
            rows.append([self._fitted(build, int(key), after, room, per_sentence) for key in keys[i]])
        return rows

    def _fitted(self, build: Any, key: int, after: int, room: int, per_sentence: float) -> Prompt:
        """The prompt, with sentences taken away until it fits and, at full length, added before the key."""
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

    def _answers(
        self, model: Decoder, params: Any, tokenizer: Tokenizer, prompts: Sequence[Prompt]
    ) -> list[str]:
        """The greedy continuations, in the order of the prompts."""
        from tqdm import tqdm

        stop = () if tokenizer.eos_id is None else (tokenizer.eos_id,)
        answers = [""] * len(prompts)
        bar = tqdm(total=len(prompts), desc=self.name, unit="prompt", disable=None, delay=1)
        with scoring.on_mesh(params), bar:
            for batch in batches([len(prompt.tokens) for prompt in prompts], self.batch_size):
                # Every batch has the same number of rows: its last prompt is repeated.
                filled = [*batch, *[batch[-1]] * (self.batch_size - len(batch))]
                rows = [prompts[i].tokens for i in filled]
                new = sampler.generate(
                    model, params, rows, max_new_tokens=self.max_new_tokens, stop_tokens=stop
                )
                for i, ids in zip(batch, np.asarray(new), strict=False):
                    answers[i] = tokenizer.decode(ids.tolist())
                bar.update(len(batch))
        return answers

    def _definition(self, context: int) -> str:
        fill = (
            "filler before and after the key fills the context"
            if self.full_length
            else "no filler before the key"
        )
        return (
            f"passkey of {self.digits} digits (Mohtashami & Jaggi 2023, arXiv 2305.16300), {self.num_distances}"
            f" distances k evenly spaced over a context of {context} tokens, {self.trials} trials each; k is the number"
            f" of tokens from the end of the key's last mention to the end of the prompt; {fill}; greedy continuation"
            f" of {self.max_new_tokens} tokens, right if the first integer in it is the key; k_max: the largest k such"
            f" that every k' <= k has a success rate of at least {self.threshold:g}; 95% Wilson intervals"
        )

    def plot(self, axes: Any, results: Mapping[str, Result]) -> None:
        _strips(axes, results) if len(results) > 2 else _curves(axes, results)
        axes.set_xlabel("k: tokens between the key and the end of the prompt")
        figures.mark_window(axes, results)


def _curves(axes: Any, results: Mapping[str, Result]) -> None:
    """Success rates with their intervals: for one model or two, whose bands can still be told apart."""
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
    """A row for each model, a cell for each distance, as full as its success rate."""
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
    axes.set_yticks(range(len(results)), [_with_k_max(label, result) for label, result in results.items()])
    axes.set_xlim(0, max(result["distances"][-1]["k"] for result in results.values()))
    axes.invert_yaxis()
    axes.grid(False)
    axes.figure.set_figheight(1.6 + 0.5 * len(results))
    axes.set_title("Passkey found (full colour: always; pale: never)")


def _with_k_max(label: str, result: Result) -> str:
    return f"{label} (k_max {result['k_max']})"


def is_correct(continuation: str, key: int) -> bool:
    """Whether the first integer in the continuation is the key, exactly."""
    found = re.search(r"[0-9]+", continuation)
    return found is not None and int(found[0]) == key


def k_max(distances: Sequence[Mapping[str, Any]], threshold: float) -> int:
    """The largest k such that every distance up to it has at least this success rate; 0 where the first has not."""
    best = 0
    for k in sorted({d["k"] for d in distances}):
        same = [d for d in distances if d["k"] == k]
        if sum(d["successes"] for d in same) < threshold * sum(d["trials"] for d in same):
            break
        best = k
    return best


def batches(lengths: Sequence[int], size: int) -> list[list[int]]:
    """Indices in batches of at most `size` that together take few different longest lengths.

    The prompts are divided by length into at most _SHAPES groups. Within a group each batch takes every n-th, from
    the longest down, so that all its batches are about as long as the group's longest.
    """
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    per_group = max(size, -(-len(order) // _SHAPES))
    out = []
    for start in range(0, len(order), per_group):
        group = order[start : start + per_group]
        count = -(-len(group) // size)
        out += [group[i::count] for i in range(count)]
    return out


def _build(
    tokenizer: Tokenizer, key: int, *, after: int, before: int = 0, add_bos: bool | None = None
) -> Prompt:
    """The prompt with so many filler sentences after and before the key; linear in its length.

    The whole prompt is encoded at once: the tokens of its parts need not be the tokens of the whole.
    """
    lead = f"{TASK}{_filler(before)}{chr(10) if before else ''}The pass key is {key}. Remember it. {key}"
    rest = f" is the pass key.{chr(10) if after else ''}{_filler(after)}{QUESTION}"
    start = special_tokens(tokenizer, add_bos=add_bos).before
    tokens = [*start, *tokenizer.encode(lead + rest).tolist()]
    return Prompt(tokens, key, len(tokens) - len(start) - len(tokenizer.encode(lead)))


def _filler(sentences: int) -> str:
    return " ".join(FILLER[i % len(FILLER)] for i in range(sentences))


def _tokens_per_sentence(tokenizer: Tokenizer) -> float:
    """Mean over whole rounds of the filler, without what its beginning and end cost."""
    rounds = 8 * len(FILLER)
    return (len(tokenizer.encode(_filler(2 * rounds))) - len(tokenizer.encode(_filler(rounds)))) / rounds
