"""How a whole training step of 2Mamba grows with its one row on this machine's CPU, from 4K to 64K tokens.

    python benchmarks/step_growth.py [--decays softplus,none] [--lengths 4096,...] [--steps 3]
                                     [--output benchmarks/results/step_growth_cpu.json]

The model of train_step.py's width "small": seven layers of four heads of 64, forward, backward and AdamW, float32, in
the form that the operator picks. Decay "softplus" is 2Mamba's, of a new model; "none" forgets nothing. Each case is a
process of its own, with memory as the commands have it (lcx/huge_pages.py); one step, then --steps that are timed, of
which medians are kept.

`user_seconds` is the time that the CPUs computed for a step, `system_seconds` what the kernel took, nearly all of it
for clearing pages: XLA's CPU programs get their temporary memory anew at each call. `growth` is the ratio to the row
of half the length: 2 is linear. A virtual machine may hand pages that were given back to its host, and then wait for
each one at the next call: rows that need more memory than it keeps take more system time.

With --output FILE.json the cases of the file that are not run again are kept. Half an hour.
"""

import argparse
import functools
import json
import os
import pathlib
import resource
import statistics
import subprocess
import sys
import time

import harness
from train_step import MODELS, WIDTHS, Step, llama

from lcx import huge_pages
from lcx import model as model_lib
from lcx.mixers.two_mamba import TwoMamba

MEASURED = ("seconds", "user_seconds", "system_seconds")


def two_mamba(width: dict, *, decay: str, **shared) -> model_lib.Decoder:
    return model_lib.map_mixers(
        llama(width, **shared), lambda old: TwoMamba(old.num_heads, old.head_dim, decay=decay, parent=None)
    )


def case(decay: str, T: int, steps: int) -> dict:
    """One process: one model at one length."""
    MODELS["two_mamba"] = functools.partial(two_mamba, decay=decay)
    step = Step("two_mamba", WIDTHS["small"], B=1, T=T, dtype="float32", remat="dots")
    step.run(1)
    taken = []
    for _ in range(steps):
        before, start = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter()
        step.run(1)
        seconds, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_SELF)
        taken.append((seconds, after.ru_utime - before.ru_utime, after.ru_stime - before.ru_stime))
    medians = [round(statistics.median(column), 2) for column in zip(*taken, strict=True)]
    temporary = step.compiled.memory_analysis().temp_size_in_bytes
    return dict(zip(MEASURED, medians, strict=True)) | {"temporary_mib": round(temporary / 2**20)}


def with_growth(rows: dict) -> list[dict]:
    """The rows in order, each with its ratios to the row of half the length."""
    for (decay, T), row in rows.items():
        if half := rows.get((decay, T // 2)):
            row["growth"] = {name: round(row[name] / half[name], 3) for name in MEASURED[:2]}
    return [rows[key] for key in sorted(rows)]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--decays", default="softplus,none")
    parser.add_argument("--lengths", default="4096,8192,16384,32768,65536")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--output", default=str(harness.RESULTS / "step_growth_cpu.json"))
    parser.add_argument("--case", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.case:
        print("answer", json.dumps(case(args.case[0], int(args.case[1]), args.steps)))
        return
    if huge_pages.wanted(os.environ):
        os.execve(sys.executable, sys.orig_argv, huge_pages.with_tunable(os.environ))
    run = harness.Run("growth of a step of 2Mamba with the row", threads={"lcx": harness.jax_threads()})
    rows: dict = {}
    if os.path.exists(args.output):
        saved = json.loads(pathlib.Path(args.output).read_text())["rows"]
        rows = {(row["decay"], row["T"]): row for row in saved}
    for decay in args.decays.split(","):
        for T in map(int, args.lengths.split(",")):
            command = [sys.executable, __file__, "--steps", str(args.steps), "--case", decay, str(T)]
            with run.watched():
                out = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            rows[decay, T] = {"decay": decay, "T": T, **json.loads(out.stdout.split("answer ")[-1])}
            print(rows[decay, T], flush=True)
            # Written at once, as the next case may take long.
            run.write(args.output, width=WIDTHS["small"], rows=with_growth(rows))


if __name__ == "__main__":
    main()
