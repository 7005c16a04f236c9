"""What an evaluation costs beside a plain forward pass over as many tokens of the same rows.

    python benchmarks/evaluation.py --model=HF_FOLDER --text=FILE [--output=benchmarks/results/evaluation_cpu.json]

The plain pass computes the loss of every token of rows of the model's window, compiled once, on data that is there. An
evaluation also makes its samples, pads them, moves them, and scores them. `over_plain` is its time per token that the
model reads, over that of the plain pass. The passkey generates its answers; it is timed as a whole, 320 trials.
"""

import argparse
import dataclasses
import pathlib
import time

import harness
import jax
import numpy as np

from lcx.convert.api import load
from lcx.data import Dataset, load_tokenizer
from lcx.evals.needle_grid import NeedleGrid
from lcx.evals.passkey import Passkey
from lcx.evals.perplexity import Perplexity
from lcx.evals.recall import Recall
from lcx.ops.cross_entropy import token_nll

TOKENS = 16384  # of a batch
SECONDS = 1.0  # of a turn
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


def calls(fn, clock) -> harness.Side:
    """A side that calls `fn`, by this clock: CPU seconds say something on a machine that others use, too."""

    def run(n: int) -> float:
        start = clock()
        for _ in range(n):
            fn()
        return clock() - start

    return run


def plain(model, params, text: np.ndarray, clock) -> harness.Side:
    """A forward pass with the loss of every token of TOKENS tokens."""
    T = model.max_position_embeddings
    tokens = np.resize(text, (TOKENS // T, T)).astype(np.int32)

    @jax.jit
    def loss(params, tokens, labels):
        x, _ = model.apply({"params": params}, tokens, method="hidden")
        return token_nll(x, model.head(params), labels, transform=model.logit_transform)

    return calls(lambda: np.asarray(loss(params, tokens, np.roll(tokens, -1, 1))), clock)


def evaluations(dataset: Dataset, T: int) -> dict:
    """name: (evaluation, the tokens that the model reads for it, given its result)."""
    perplexity = Perplexity(dataset, windows=(T,), max_tokens=2 * TOKENS)

    def windows(result):
        return T * result["windows"][0]["forward_passes_of_one_window"]

    def rows(result):
        return sum(cell["length"] * cell["samples"] for cell in result["cells"])

    return {
        "perplexity, non-overlapping": (dataclasses.replace(perplexity, kind="non_overlapping"), windows),
        "perplexity, sliding by a quarter": (dataclasses.replace(perplexity, stride=T // 4), windows),
        "needle grid": (NeedleGrid(lengths=(T,), depths=(0.0, 0.5, 1.0), trials=22), rows),
        "recall": (Recall(lengths=(T,), rows=64, pairs=8), rows),
    }


def measured(run: harness.Run, args: argparse.Namespace) -> dict:
    model, params = load(args.model, context_length=args.length, rope_scaling={"rope_type": "default"})
    tokenizer = load_tokenizer(args.model)
    dataset = Dataset(args.text, tokenizer=args.model, separator="<|endoftext|>", eval_fraction=1.0)
    text = np.concatenate([ids for ids, _ in zip(dataset.document_tokens("eval"), range(200), strict=False)])
    clock = CLOCKS[args.clock]
    base, rows = plain(model, params, text, clock), []
    for name, (task, read) in evaluations(dataset, args.length).items():
        tokens = read(task(model, params, tokenizer))
        sides = {"plain": base, name: calls(lambda task=task: task(model, params, tokenizer), clock)}
        turns = run.turns(sides, rounds=args.rounds, seconds=SECONDS)
        over = {key: round(value * TOKENS / tokens, 3) for key, value in turns.ratio(name, "plain").items()}
        per = {side: 1e6 * turns.seconds(side) / n for side, n in (("plain", TOKENS), (name, tokens))}
        rows.append(
            {
                "evaluation": name,
                "tokens": tokens,
                "us_per_token": per[name],
                "plain_us_per_token": per["plain"],
            }
            | {"over_plain": over}
        )
        print(rows[-1], flush=True)
    return {
        "rows": rows,
        "length": args.length,
        "clock": args.clock,
        "passkey_320_trials_s": _passkey(run, model, params, tokenizer, clock),
    }


def _passkey(run: harness.Run, model, params, tokenizer, clock) -> float:
    """Seconds for 32 distances of 10 trials each, after one run of few trials that compiles."""
    task = Passkey(num_distances=32, trials=10)
    task(model, params, tokenizer)
    with run.watched():
        start = clock()
        task(model, params, tokenizer)
        return clock() - start


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True)
    parser.add_argument("--text", required=True)
    parser.add_argument("--length", type=int, default=1024, help="tokens of a row")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--clock", choices=CLOCKS, default="wall", help="cpu: CPU seconds of this process")
    parser.add_argument("--output", default=str(harness.RESULTS / "evaluation_cpu.json"))
    args = parser.parse_args()
    run = harness.Run("evaluations beside a plain forward pass", threads={"lcx": harness.jax_threads()})
    found = measured(run, args)
    run.write(pathlib.Path(args.output), **found)


if __name__ == "__main__":
    main()
