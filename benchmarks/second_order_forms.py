"""Second-order attention by tiles against states on this machine's CPU: where each is faster, and how both grow.

    python benchmarks/second_order_forms.py [--lengths 1024,2048,...] [--sizes 16,32,64]
                                            [--output benchmarks/results/second_order_forms_cpu.json]

One row, one head, float32, forward and backward as one program, on one thread. The forms take turns; of each the
processor's time (time.process_time) is the least of two runs. Decays: "slow" forgets nothing (a = -1e-5), "fast"
forgets within 300 tokens (a = -0.1, as far as e^-30), "initial" is that of a new 2Mamba layer (a = -softplus(0)). A
form that would take longer than --seconds by its last measurement is left out, and the file says so. "default" is
what the operator picks.
"""

import argparse
import json
import os
import time

os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"
)

import harness
import jax
import jax.numpy as jnp
import numpy as np

from lcx.ops.second_order_attention import second_order_attention

DECAYS = {"slow": -1e-5, "fast": -0.1, "initial": -0.693}


def program(form: str | None):
    def loss(q, k, v, a):
        y, _ = second_order_attention(q, k, v, log_decay=a, form=form)
        return jnp.sum(y * jnp.cos(jnp.arange(y.shape[-1])))

    return jax.jit(jax.grad(loss, argnums=(0, 1, 2, 3)))


def side(program, arrays) -> harness.Side:
    def run(n: int) -> float:
        start = time.process_time()
        for _ in range(n):
            jax.block_until_ready(program(*arrays))
        return time.process_time() - start

    return run


def measure(run: harness.Run, T: int, H: int, forms: list[str | None], decays: list[str]) -> list[dict]:
    rng = np.random.default_rng(T)
    q, k, v = (jnp.array(rng.normal(size=(1, T, 1, H)), jnp.float32) for _ in range(3))
    inputs = {name: (q, k, v, jnp.full((1, T, 1), DECAYS[name], jnp.float32)) for name in decays}
    programs = {form or "default": program(form) for form in forms}
    sides = {f"{form} {name}": side(programs[form], inputs[name]) for form in programs for name in decays}
    for compiled in sides.values():
        compiled(1)
    turns = run.turns(sides, rounds=2, slow=2.0)
    return [
        {"T": T, "H": H, "form": form, "decay": name, "seconds": round(min(turns.times[f"{form} {name}"]), 5)}
        for form in programs
        for name in decays
    ]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--lengths", default="1024,2048,4096,8192,16384,32768,65536")
    parser.add_argument("--sizes", default="64,16,32")
    parser.add_argument("--forms", default="tiles,states,default")
    parser.add_argument("--seconds", type=float, default=3.0)
    parser.add_argument("--output", default="benchmarks/results/second_order_forms_cpu.json")
    args = parser.parse_args()
    forms = [None if form == "default" else form for form in args.forms.split(",")]
    run = harness.Run("second-order attention, CPU seconds by form", threads={"lcx": {"threads": 1}})
    left_out = f"forms behind slow decays, where 4 times the last length's time was above {args.seconds} s"
    records: list[dict] = []
    for H in map(int, args.sizes.split(",")):
        slow: dict[str, float] = {}
        for T in map(int, args.lengths.split(",")):
            for decays in (["slow"], ["fast", "initial"]):
                own = [
                    f for f in forms if decays != ["slow"] or 4 * slow.get(f or "default", 0) < args.seconds
                ]
                new = measure(run, T, H, own, decays)
                slow |= {row["form"]: row["seconds"] for row in new if row["decay"] == "slow"}
                records += new
                for row in new:
                    print(json.dumps(row), flush=True)
                run.write(args.output, left_out=left_out, records=records)


if __name__ == "__main__":
    main()
