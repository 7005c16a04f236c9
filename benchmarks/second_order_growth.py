"""How the time of second-order attention grows with the row on this machine's CPU, from 4K to 64K tokens.

    python benchmarks/second_order_growth.py [--lengths 4096,...] [--rounds 5]
                                             [--output benchmarks/results/second_order_growth_cpu.json]

One row, one head of 64, float32, forward and backward as one program, in the form that the operator picks. Decays:
"slow" forgets nothing (a = -1e-5), "fast" forgets within 300 tokens (a = -0.1, as far as e^-30), "initial" is that of a
new 2Mamba layer (a = -softplus(0)). "kept" is a process that keeps freed memory
(config.keep_freed_memory); "returned" is one with the C library's defaults, for fast and initial decay. All lengths,
decays and both processes take turns. `growth` is the median over the rounds of the time at T over that at T / 2: 2 is
linear. `faults` counts the pages that the kernel handed out in one call.
"""

import argparse
import contextlib
import json
import os
import resource
import sys
import time

CHILD = "--child"
if sys.argv[1:] == [CHILD, "kept"]:
    from lcx import config

    config.keep_freed_memory()

import harness  # noqa: E402
import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402

from lcx.ops.second_order_attention import second_order_attention  # noqa: E402

DECAYS = {"fast": -0.1, "initial": -0.693, "slow": -1e-5}
H = 64


def loss(q, k, v, a):
    y, _ = second_order_attention(q, k, v, log_decay=a)
    return jnp.sum(y * jnp.cos(jnp.arange(H)))


def inputs(T: int, decay: str) -> tuple[jax.Array, ...]:
    rng = np.random.default_rng(T)
    q, k, v = (jnp.array(rng.normal(size=(1, T, 1, H)), jnp.float32) for _ in range(3))
    return q, k, v, jnp.full((1, T, 1), DECAYS[decay], jnp.float32)


def answer() -> None:
    """Answers {"T": ..., "decay": ..., "calls": n} with the seconds; without "calls", with the pages of a call."""
    program, ready, faults = jax.jit(jax.grad(loss, argnums=(0, 1, 2, 3))), {}, {}
    for line in sys.stdin:
        request = json.loads(line)
        key = request["T"], request["decay"]
        if "calls" not in request:
            print("answer", json.dumps(faults[key]), flush=True)
            continue
        if key not in ready:
            ready[key] = inputs(*key)
        before, start = resource.getrusage(resource.RUSAGE_SELF).ru_minflt, time.perf_counter()
        for _ in range(request["calls"]):
            jax.block_until_ready(program(*ready[key]))
        seconds = time.perf_counter() - start
        faults[key] = (resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) // request["calls"]
        print("answer", json.dumps(seconds), flush=True)


def growth(shorter: list[float], longer: list[float]) -> dict[str, float]:
    return harness.Turns({"longer": longer, "shorter": shorter}).ratio("longer", "shorter")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--lengths", default="4096,8192,16384,32768,65536")
    parser.add_argument("--decays", default=",".join(DECAYS))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", default=str(harness.RESULTS / "second_order_growth_cpu.json"))
    args = parser.parse_args()
    lengths, decays = [int(T) for T in args.lengths.split(",")], args.decays.split(",")
    run = harness.Run("growth of second-order attention with the row", threads={"lcx": harness.jax_threads()})
    with contextlib.ExitStack() as stack:
        children = {}
        for memory in ("kept", "returned"):
            children[memory] = harness.Child(sys.executable, os.path.abspath(__file__), CHILD, memory)
            stack.callback(children[memory].close)
        keys = [
            (m, d, T) for m in children for d in decays for T in lengths if (m, d) != ("returned", "slow")
        ]
        sides = {f"{m} {d} {T}": children[m].side({"T": T, "decay": d}) for m, d, T in keys}
        for side in sides.values():  # compiles
            side(1)
        turns = run.turns(sides, rounds=args.rounds, seconds=0.2)
        rows = []
        for memory, decay, T in keys:
            name, half = f"{memory} {decay} {T}", f"{memory} {decay} {T // 2}"
            row = {"memory": memory, "decay": decay, "T": T, "ms": round(1e3 * turns.seconds(name), 1)}
            row["faults"] = children[memory].ask({"T": T, "decay": decay})
            if half in sides:
                row["growth"] = growth(turns.times[half], turns.times[name])
            rows.append(row)
            print(json.dumps(row), flush=True)
    run.write(args.output, H=H, rows=rows)


if __name__ == "__main__":
    if sys.argv[1:2] == [CHILD]:
        answer()
    else:
        main()
