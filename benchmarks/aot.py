"""Compiler statistics of every operator for TPUs and an H200, on a machine that has neither.

    python benchmarks/aot.py [--operators fir_conv_7,...] [--targets h200,v5e,v5p,v6e] [--lengths 4096,8192]
                             [--implementations best,xla] [--bundles v5e] [--output benchmarks/results/aot.json]

For each operator (benchmarks/operators.py, two rows at model sizes in bfloat16), target and T, this compiles the
forward pass, and forward and backward as one program. A record holds the temporary bytes and a report on each Pallas
kernel: on the H200 registers, spills, shared memory and tensor-core instructions; on a TPU scoped VMEM, and with
--bundles the static schedule (slow: 5 to 100 s per program, 11 minutes for a program of ten kernels; raise --timeout).
Each operator is compiled in a separate process with a time limit, so that a compiler that hangs costs only one record.
Needs the extra `aot`.

--compare benchmarks/results/aot.json prints what has grown by more than 5% since that file was written, and exits with
status 1 if anything has.
"""

import argparse
import dataclasses
import importlib.metadata
import json
import os
import subprocess
import sys
import time

from operators import OPERATORS, VARIANTS

ROWS = 2
SCHEDULE_SECONDS = 1800  # per program; the ten kernels of the state form take 11 minutes


def record(name: str, target: str, T: int, *, train: bool, implementation: str | None, bundles: bool) -> dict:
    """The record of one program; {"error": ...} if it does not compile."""
    from kernels_pallas import aot

    operator = VARIANTS[name]
    arrays = operator.structs(operator.size, B=ROWS, T=T, dtype="bfloat16")
    args = (arrays, operator.result(arrays)) if train else (arrays,)
    fn = operator.gradients(implementation) if train else operator.forward(implementation)
    out = {
        "operator": name,
        "target": target,
        "T": T,
        "train": train,
        "implementation": implementation or "best",
    }
    start = time.perf_counter()
    try:
        report = aot.compile_h200(fn, *args) if target == "h200" else aot.compile_tpu(fn, *args, chip=target)
    except Exception as error:  # any layer from Pallas to the assembler may raise
        return out | {"error": f"{type(error).__name__}: {error}"[:500]}
    out |= {"temp_bytes": report.temp_bytes, "compile_seconds": round(time.perf_counter() - start, 2)}
    kernels = [dataclasses.asdict(k) for k in report.kernels if target != "h200" or k.pallas]
    if bundles and target != "h200":
        try:
            schedules = aot.tpu_bundles(fn, *args, chip=target, timeout=SCHEDULE_SECONDS)
        except subprocess.SubprocessError as error:  # keep the other facts about the program
            out["schedule_error"] = str(error)[:500]
        else:
            kernels = [kernel | {"schedule": schedules.get(kernel["name"])} for kernel in kernels]
    return out | {"kernels": [{k: v for k, v in kernel.items() if k != "pallas"} for kernel in kernels]}


def one(name: str, args: argparse.Namespace) -> None:
    """Prints all records of an operator, one JSON object per line."""
    lengths = [int(T) for T in args.lengths.split(",")]
    for target in args.targets.split(","):
        for implementation in args.implementations.split(","):
            for train in (False, True):
                for T in lengths:
                    row = record(
                        name,
                        target,
                        T,
                        train=train,
                        implementation=None if implementation == "best" else implementation,
                        bundles=target in args.bundles.split(",")
                        and lengths[0] == T
                        and implementation == "best",
                    )
                    print(json.dumps(row), flush=True)


def all_operators(args: argparse.Namespace) -> list[dict]:
    rows: list[dict] = []
    for name in args.operators.split(","):
        command = [sys.executable, __file__, "--one", name, *sys.argv[1:]]
        environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
        process = subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        try:
            out, err = process.communicate(timeout=args.timeout)
        except subprocess.TimeoutExpired:
            process.kill()
            out, err = process.communicate()
            err += f"\nno result within {args.timeout} s"
        found = [json.loads(line) for line in out.splitlines() if line.startswith("{")]
        if process.returncode:
            found.append({"operator": name, "error": err.strip().splitlines()[-1]})
        for row in found:
            print(summary(row), flush=True)
        rows += found
    return rows


def summary(row: dict) -> str:
    what = f"{row['operator']:20} {row.get('target', ''):5} T={row.get('T', ''):<6} "
    what += f"{'train' if row.get('train') else 'fwd':5} {row.get('implementation', ''):5}"
    if "error" in row:
        return f"{what} ERROR {row['error'][:150]}"
    parts = [f"temp {row['temp_bytes'] / 2**20:.1f} MiB, {row['compile_seconds']} s"]
    for k in row["kernels"]:
        if "registers" in k:
            facts = f"{k['registers']} regs {k['spills']} spills {k['shared_bytes'] >> 10} KiB"
            facts += f" {k['wgmma']}/{k['mma']} mma"
        else:
            facts = f"{k['vmem_bytes'] / 2**20:.1f} MiB VMEM"
            if schedule := k.get("schedule"):
                facts += f" {schedule['bundles']} bundles {schedule.get('VLOAD:FILL', 0)} fills"
        parts.append(f"{k['name']}: {facts}")
    return f"{what} {'; '.join(parts)}"


def facts(row: dict) -> dict[str, float]:
    """The numbers that should not grow, by name."""
    found = {"temp_bytes": row["temp_bytes"]} if "temp_bytes" in row else {}
    for kernel in row.get("kernels", ()):
        numbers = {**kernel, **{"bundles": (kernel.get("schedule") or {}).get("bundles")}}
        for name in ("registers", "spills", "stack_bytes", "shared_bytes", "vmem_bytes", "bundles"):
            if numbers.get(name) is not None:
                found[f"{kernel['name']} {name}"] = numbers[name]
    return found


def key(row: dict) -> tuple:
    return tuple(row.get(name) for name in ("operator", "target", "T", "train", "implementation"))


def updated(path: str, rows: list[dict]) -> list[dict]:
    """The records of the file, updated with these; only these if the file was written with other compilers."""
    if not os.path.exists(path):
        return rows
    with open(path) as file:
        before = json.load(file)
    if before["versions"] != versions():
        return rows
    return list(({key(row): row for row in before["records"]} | {key(row): row for row in rows}).values())


def grown(rows: list[dict], before: list[dict]) -> list[str]:
    """A line for each number that has grown by more than 5%, and for each program that no longer compiles."""
    old, lines = {key(row): row for row in before}, []
    for row in rows:
        was, what = old.get(key(row), {}), " ".join(map(str, key(row)))
        if "error" in row and "error" not in was:
            lines.append(f"{what}: {row['error'][:150]}")
        known = facts(was)
        for name, value in facts(row).items():
            if name in known and value > 1.05 * known[name]:
                lines.append(f"{what}: {name} {known[name]} -> {value}")
    return lines


def versions() -> dict[str, str]:
    names = ("jax", "jaxlib", "libtpu", "jax-cuda12-plugin", "jax-cuda13-plugin")
    found = {}
    for name in names:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    others = ", ".join(name for name in VARIANTS if name not in OPERATORS)
    parser.add_argument("--operators", default=",".join(OPERATORS), help=f"also {others}")
    parser.add_argument("--targets", default="h200,v5e,v5p,v6e")
    parser.add_argument("--lengths", default="4096,8192", help="--bundles reads the first one only")
    parser.add_argument("--implementations", default="best,xla")
    parser.add_argument("--bundles", default="", help="TPU targets whose schedules are read")
    parser.add_argument("--timeout", type=float, default=900, help="seconds per operator")
    parser.add_argument("--output", help="an existing file of the same compilers is updated")
    parser.add_argument("--compare", metavar="FILE.json", help="an earlier result of this program")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def main() -> int:
    args = parse()
    if args.one:
        one(args.one, args)
        return 0
    before = []
    if args.compare:
        with open(args.compare) as file:
            before = json.load(file)["records"]
    rows = all_operators(args)
    if args.output:
        result = {
            "what": "programs compiled ahead of time; kernels as their machine code has them",
            "rows": ROWS,
            "versions": versions(),
            "sizes": {name: dataclasses.asdict(op.size) for name, op in OPERATORS.items()},
            "records": updated(args.output, rows),
        }
        with open(args.output, "w") as file:
            file.write(json.dumps(result).replace('{"operator"', '\n{"operator"') + "\n")
    worse = grown(rows, before)
    print(*worse, sep="\n", end="\n" if worse else "")
    return 1 if worse else 0


if __name__ == "__main__":
    sys.exit(main())
