"""How a whole training step of 2Mamba grows with its one row on this machine's CPU, from 4K to 64K tokens.

    python benchmarks/step_growth.py [--decays softplus,none] [--lengths 4096,...] [--slow_until 16384] [--rounds 7]
                                     [--remat full] [--layers 7] [--malloc kept] [--output FILE.json]

The model of train_step.py's width "small": seven layers of four heads of 64, forward, backward and AdamW, float32, in
the form that the operator picks, with the remat of configs/pretrain/two_mamba. Decay "softplus" is 2Mamba's, of a new
model; "none" forgets nothing, takes several times as long, and is measured up to --slow_until. All lengths of a decay
take turns, one step each, in a process with memory as the commands have it (lcx/huge_pages.py).

`growth` is the median over the rounds of the time at T over that at T / 2, with an interval that holds it with 95%: 2
is linear. `user_seconds` is the time that the CPUs computed for a step, `system_seconds` what the kernel took.

XLA's CPU programs get their temporary memory from the C library at each call. By default glibc hands large blocks back
to the kernel after it, which clears each page anew for the next call, and a virtual machine may even give them to its
host: at 64K tokens that took a seventh of the step's CPU time. With --malloc kept, the setting of docs/how-to/speed.md
for long rows, freed memory stays with the process. A quarter of an hour, and one more for "none" up to 65536.
"""

import argparse
import functools
import os
import resource
import statistics
import sys

import harness
from train_step import MODELS, WIDTHS, Step, llama

from lcx import huge_pages
from lcx import model as model_lib
from lcx.mixers.two_mamba import TwoMamba

KEPT = "glibc.malloc.arena_max=1:glibc.malloc.mmap_threshold=1099511627776:glibc.malloc.trim_threshold=1099511627776"


def two_mamba(width: dict, *, decay: str, **shared) -> model_lib.Decoder:
    return model_lib.map_mixers(
        llama(width, **shared), lambda old: TwoMamba(old.num_heads, old.head_dim, decay=decay, parent=None)
    )


class Timed:
    """The steps of one model at one length, with the CPU time of each."""

    def __init__(self, decay: str, T: int, width: dict, remat: str):
        MODELS["two_mamba"] = functools.partial(two_mamba, decay=decay)
        self.step = Step("two_mamba", width, B=1, T=T, dtype="float32", remat=remat)
        self.user: list[float] = []
        self.system: list[float] = []

    def __call__(self) -> None:
        before = resource.getrusage(resource.RUSAGE_SELF)
        self.step.run(1)
        after = resource.getrusage(resource.RUSAGE_SELF)
        self.user.append(after.ru_utime - before.ru_utime)
        self.system.append(after.ru_stime - before.ru_stime)

    def row(self) -> dict:
        """Medians of all steps but the first."""
        temporary = self.step.compiled.memory_analysis().temp_size_in_bytes
        return {
            "user_seconds": round(statistics.median(self.user[1:]), 2),
            "system_seconds": round(statistics.median(self.system[1:]), 2),
            "temporary_mib": round(temporary / 2**20),
        }

    def user_growth(self, half: "Timed") -> float:
        pairs = zip(self.user[1:], half.user[1:], strict=True)
        return round(statistics.median(mine / theirs for mine, theirs in pairs), 3)


def of_decay(
    run: harness.Run, decay: str, lengths: list[int], *, width: dict, remat: str, rounds: int
) -> list[dict]:
    """A row for each length."""
    steps = {T: Timed(decay, T, width, remat) for T in lengths}
    turns = run.turns({str(T): harness.calls(step) for T, step in steps.items()}, rounds=rounds)
    rows = []
    for T, step in steps.items():
        row = {"decay": decay, "T": T, "seconds": round(turns.seconds(str(T)), 2), **step.row()}
        if half := steps.get(T // 2):
            names = str(T), str(T // 2)
            row["growth"] = turns.ratio(*names) | {"interval": turns.interval(*names)}
            row["user_growth"] = step.user_growth(half)
        rows.append(row)
        print(row, flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--decays", default="softplus,none")
    parser.add_argument("--lengths", default="4096,8192,16384,32768,65536")
    parser.add_argument("--slow_until", type=int, default=16384, help='longest row of decay "none"')
    parser.add_argument("--remat", default="full")
    parser.add_argument(
        "--malloc", choices=("commands", "kept"), default="commands", help="whether freed memory stays"
    )
    parser.add_argument("--layers", type=int, default=7)
    parser.add_argument("--rounds", type=int, default=7, help="at least 6, for the interval")
    parser.add_argument("--output", default=str(harness.RESULTS / "step_growth_cpu.json"))
    args = parser.parse_args()
    if args.rounds < 6:
        parser.error(f"--rounds={args.rounds}; expected at least 6, which an interval of 95% needs")
    if huge_pages.wanted(os.environ):
        kept = {huge_pages.TUNABLES: KEPT} if args.malloc == "kept" else {}
        os.execve(sys.executable, sys.orig_argv, huge_pages.with_tunable({**os.environ, **kept}))
    run = harness.Run("growth of a step of 2Mamba with the row", threads={"lcx": harness.jax_threads()})
    width = WIDTHS["small"] | {"layers": args.layers}
    lengths, rows = [int(T) for T in args.lengths.split(",")], []
    for decay in args.decays.split(","):
        longest = args.slow_until if decay == "none" else lengths[-1]
        rows += of_decay(
            run,
            decay,
            [T for T in lengths if longest >= T],
            width=width,
            remat=args.remat,
            rounds=args.rounds,
        )
        run.write(args.output, width=width, remat=args.remat, malloc=args.malloc, rows=rows)


if __name__ == "__main__":
    main()
