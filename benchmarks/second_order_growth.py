"""How the time of second-order attention grows with the row on this machine's CPU, from 4K to 64K tokens.

    python benchmarks/second_order_growth.py [--lengths 4096,...] [--rounds 41]
                                             [--output benchmarks/results/second_order_growth_cpu.json]

One row, one head of 64, float32, forward and backward as one program, in the form that the operator picks. Decays:
"slow" forgets nothing (a = -1e-5), "fast" forgets within 300 tokens (a = -0.1, as far as e^-30), "initial" is that of a
new 2Mamba layer (a = -softplus(0)). All lengths and decays take turns. `growth` is the median over the rounds of the
time at T over that at T / 2, with an interval that holds it with 95%: 2 is linear. Ten minutes. `faults` counts the
pages that the kernel handed out in one call, `temporary_mib` is what XLA allocates for temporaries in one call. Memory
is had as by the commands (lcx/huge_pages.py).
"""

import argparse
import functools
import json
import os
import resource
import sys

import harness
import jax
import jax.numpy as jnp
import numpy as np

from lcx import huge_pages
from lcx.ops.second_order_attention import second_order_attention

DECAYS = {"fast": -0.1, "initial": -0.693, "slow": -1e-5}
H = 64


def loss(q, k, v, a):
    y, _ = second_order_attention(q, k, v, log_decay=a)
    return jnp.sum(y * jnp.cos(jnp.arange(H)))


def inputs(T: int, decay: str) -> tuple[jax.Array, ...]:
    rng = np.random.default_rng(T)
    q, k, v = (jnp.array(rng.normal(size=(1, T, 1, H)), jnp.float32) for _ in range(3))
    return q, k, v, jnp.full((1, T, 1), DECAYS[decay], jnp.float32)


def faults(call) -> int:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    call()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--lengths", default="4096,8192,16384,32768,65536")
    parser.add_argument("--decays", default=",".join(DECAYS))
    parser.add_argument("--rounds", type=int, default=41)
    parser.add_argument("--output", default=str(harness.RESULTS / "second_order_growth_cpu.json"))
    args = parser.parse_args()
    if huge_pages.wanted(os.environ):
        os.execve(sys.executable, sys.orig_argv, huge_pages.with_tunable(os.environ))
    lengths, decays = [int(T) for T in args.lengths.split(",")], args.decays.split(",")
    run = harness.Run("growth of second-order attention with the row", threads={"lcx": harness.jax_threads()})
    step = jax.jit(jax.grad(loss, argnums=(0, 1, 2, 3)))
    programs = {T: step.lower(*inputs(T, decays[0])).compile() for T in lengths}

    def call(T: int, arrays: tuple[jax.Array, ...]) -> None:
        jax.block_until_ready(programs[T](*arrays))

    keys = [(decay, T) for decay in decays for T in lengths]
    called = {f"{decay} {T}": functools.partial(call, T, inputs(T, decay)) for decay, T in keys}
    turns = run.turns(
        {name: harness.calls(fn) for name, fn in called.items()}, rounds=args.rounds, seconds=0.2
    )
    rows = []
    for decay, T in keys:
        name, half = f"{decay} {T}", f"{decay} {T // 2}"
        row = {"decay": decay, "T": T, "ms": round(1e3 * turns.seconds(name), 1)}
        row["faults"] = min(faults(called[name]) for _ in range(3))
        row["temporary_mib"] = round(programs[T].memory_analysis().temp_size_in_bytes / 2**20, 1)
        if half in called:
            row["growth"] = turns.ratio(name, half) | {"interval": turns.interval(name, half)}
        rows.append(row)
        print(json.dumps(row), flush=True)
    run.write(args.output, H=H, rows=rows)


if __name__ == "__main__":
    main()
