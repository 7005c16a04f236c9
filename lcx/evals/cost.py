"""What reading and writing costs: time to the first token, tokens per second, memory and state, by length."""

import dataclasses
import resource
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from lcx import sampler
from lcx.data import Tokenizer
from lcx.errors import UserError, check_sizes
from lcx.evals import Result
from lcx.evals.support import figures, scoring
from lcx.evals.support.model_facts import facts
from lcx.model import Decoder


@dataclasses.dataclass(frozen=True)
class Cost:
    """Speed and memory of one model on this machine, on random tokens. Compilation is not counted.

    Attributes:
      lengths: of the prompts, in tokens; None: a quarter of the model's context length, and all of it.
      batch_size: prompts at once.
      new_tokens: generated after each prompt.
      repeats: of each measurement, of which the fastest counts.
      name: key in results.json.
    """

    lengths: tuple[int, ...] | None = None
    batch_size: int = 1
    new_tokens: int = 32
    repeats: int = 2
    name: str = "cost"

    def __post_init__(self):
        check_sizes("Cost", batch_size=self.batch_size, new_tokens=self.new_tokens, repeats=self.repeats)
        if self.new_tokens < 2:
            raise UserError(f"Cost.new_tokens is {self.new_tokens}, expected at least 2")
        if self.lengths is not None and (not self.lengths or min(self.lengths) < 1):
            raise UserError(f"Cost.lengths is {self.lengths}, expected lengths of at least 1 token")

    def __call__(self, model: Decoder, params: Any, tokenizer: Tokenizer | None) -> Result:
        window = model.max_position_embeddings
        lengths = self.lengths or tuple(n for n in (window // 4, window - self.new_tokens) if n > 0)
        measured = [self._measure(model, params, length) for length in sorted(set(lengths))]
        last = measured[-1]
        return {
            "definition": (
                f"{self.batch_size} prompt(s) of random tokens, greedy; time to the first token: until it is on"
                f" the host; writing: {self.new_tokens} tokens after the first; the fastest of"
                f" {self.repeats} runs after one that compiles; state: bytes of the cache for prompt and new"
                " tokens; peak memory: of the first device since the process began, on a CPU of the process"
            ),
            "summary": (
                f"at {last['length']} tokens: first token after {last['first_token_seconds']:.3g} s, then"
                f" {last['tokens_per_second']:.3g} tokens/s, state of {_size(last['state_bytes'])}"
            ),
            "table": {
                "tokens read per second": round(last["read_per_second"], 1),
                "first token (s)": round(last["first_token_seconds"], 4),
                "tokens written per second": round(last["tokens_per_second"], 1),
                "state": _size(last["state_bytes"]),
                "peak memory": _size(last["peak_bytes"]),
            },
            "unit": f"at {last['length']} tokens",
            "model": facts(model),
            "lengths": measured,
        }

    def _measure(self, model: Decoder, params: Any, length: int) -> dict[str, Any]:
        rng = np.random.default_rng(length)
        tokens = rng.integers(0, model.vocab_size, (self.batch_size, length)).astype(np.int32)
        total = length + self.new_tokens
        if total > model.max_position_embeddings:
            model = model.clone(parent=None, max_position_embeddings=total)

        with scoring.on_mesh(params):
            times = [
                sampler.timed(model, params, tokens, max_new_tokens=self.new_tokens)
                for _ in range(self.repeats + 1)
            ]
        first, rest = (min(of) for of in zip(*times[1:], strict=True))
        state = jax.eval_shape(lambda: model.init_cache(self.batch_size, total))
        return {
            "length": length,
            "first_token_seconds": first,
            "read_per_second": self.batch_size * length / first,
            "tokens_per_second": self.batch_size * (self.new_tokens - 1) / rest,
            "state_bytes": sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state)),
            "peak_bytes": _peak_bytes(),
        }

    def finding(self, results: Mapping[str, Result]) -> str:
        """Speed and state of each model at its longest prompt."""
        parts = []
        for label, result in results.items():
            who = f"“{label}”: " if len(results) > 1 else ""
            parts.append(f"{who}{result['summary']}")
        return "; ".join(parts)

    def plot(self, axes: Any, results: Mapping[str, Result]) -> None:
        styles = figures.styles(results)
        for label, result in results.items():
            xs = [entry["length"] for entry in result["lengths"]]
            axes.plot(xs, [e["tokens_per_second"] for e in result["lengths"]], label=label, **styles[label])
        figures.position_axis(axes, "length of the prompt (tokens)")
        figures.log_axis(axes, "y")
        axes.set_ylabel("tokens written per second")
        axes.set_title("Speed of generation after prompts of different lengths")
        figures.legend(axes, list(results))


def _peak_bytes() -> int:
    stats = jax.local_devices()[0].memory_stats() or {}
    return int(stats.get("peak_bytes_in_use") or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)


def _size(count: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024 or unit == "GiB":
            return f"{count:.3g} {unit}"
        count /= 1024
    raise AssertionError
