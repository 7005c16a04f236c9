"""How far the time of a plan is from what a step takes: the small configurations of plan_errors.py on this machine.

    python benchmarks/plan_times.py [--only NAME;...] [--output benchmarks/results/plan_times.json]

Each configuration runs in a process of its own. Planned is `step_seconds` of `python -m lcx.plan --topology=cpu:N`, a
roofline at the speeds that this process measures first. Measured is the median of real steps, for three seconds and at
least five. The error is planned / measured - 1; below 0 the step takes longer than the plan says.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time

import harness
import plan_errors

SECONDS, FEWEST = 3.0, 5


def one(name: str) -> dict:
    """Planned and measured seconds of a configuration, in this process."""
    import jax
    import numpy as np

    from lcx.planning import compiled, report, topology

    devices = plan_errors.CASES[name][2]
    place, trainer = topology.find(f"cpu:{devices}"), plan_errors.trainer_of(name)
    planned = compiled.step_of(trainer, place)
    made = report.plan(planned, trainer, place, None, [])
    mesh = compiled.mesh_of(trainer, place)
    with jax.set_mesh(mesh):
        step, batch = plan_errors.compiled_step(trainer, planned.run, mesh)
        state = jax.tree.map(plan_errors.made, planned.run.abstract)
        times: list[float] = []
        while len(times) <= FEWEST or sum(times) < SECONDS:
            start = time.perf_counter()
            state, _ = jax.block_until_ready(step(state, batch, np.int32(len(times))))
            times.append(time.perf_counter() - start)
    measured = statistics.median(times[1:])  # the first one starts threads
    found = {"name": name, "devices": devices, "planned_s": made["step_seconds"], "measured_s": measured}
    found |= {key: made[f"{key}_seconds"] for key in ("compute", "memory", "link")}
    return found | {"error": round(made["step_seconds"] / measured - 1, 3)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help="some of the configurations, by name")
    output = os.path.join(plan_errors.HERE, "results", "plan_times.json")
    parser.add_argument("--output", default=output, help="- for none")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(one(args.one)))
        return
    run = harness.Run("seconds of a training step: planned, and measured", threads={"lcx": {"threads": os.cpu_count()}})
    rows = []
    with run.watched():
        for name in args.only.split(";") if args.only else plan_errors.CASES:
            command = [sys.executable, __file__, "--one", name]
            environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
            result = subprocess.run(command, env=environment, capture_output=True, text=True)
            if result.returncode:
                raise SystemExit(f"{name}: {result.stderr.strip().splitlines()[-1]}")
            rows.append(json.loads(result.stdout.splitlines()[-1]))
            print(json.dumps(rows[-1]), flush=True)
    run.write(args.output, rows=rows)


if __name__ == "__main__":
    main()
