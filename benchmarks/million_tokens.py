"""Models of a billion parameters on rows of millions of tokens, on devices that need not exist: does a step fit?

    python benchmarks/million_tokens.py [--models llama,linearized,...] [--topologies h200:8,v5p:2x2x2,...]
                                        [--length 1048576] [--piece 16384] [--output benchmarks/results/FILE.json]

    python benchmarks/million_tokens.py --topologies h200:1 --length 8388608 --piece 16384 \\
                                        --models linearized,two_mamba,hyena

The trainer's step on one row, which all devices share along `context` (forward, backward, AdamW, bfloat16 activations,
full rematerialisation), compiled ahead of time with the kernels inside: the compiler's memory, the way in which
attention sends its keys, what the devices send each other, and which collectives it made asynchronous. With --piece the
row is also cut in time. `hyena` is StripedHyena 2 with a layer of MR in place of each layer of attention. Plans in the
file that are not made again are kept. Needs the extra `aot`; minutes for each.
"""

import argparse
import functools
import json
import os
import subprocess
import sys

HERE = os.path.dirname(os.path.abspath(__file__))
MODELS = ("llama", "linearized", "two_mamba", "striped_hyena")  # and "hyena"
WHAT = "steps of models of a billion parameters on one long row"
TOPOLOGIES = ("h200:8", "v5p:2x2x2", "h200:64", "v5p:4x4x4")


def plan(name: str, topology: str, length: int, piece: int | None) -> dict:
    """One process: the plan of a step, as `python -m lcx.plan --json` prints it."""
    from train_step import MODELS as BUILD
    from train_step import PATTERN, WIDTHS, hyena

    from lcx.data import Dataset
    from lcx.optim import AdamW
    from lcx.planning import report
    from lcx.planning.compiled import mesh_of, step_of
    from lcx.planning.topology import find
    from lcx.sharding import MeshShape
    from lcx.trainer import Trainer
    from lcx.training import statements

    build = BUILD | {"hyena": functools.partial(hyena, pattern=PATTERN.replace("*", "D"))}
    model = build[name](WIDTHS["1b"], max_position_embeddings=length, dtype="bfloat16", remat="full")
    trainer = Trainer(
        data=Dataset(source="text", tokenizer="bytes"),
        steps=1000,
        batch_size=1,
        seq_len=length,
        model=model,
        piece_length=piece,
        optimizer=AdamW(1e-4, "constant", warmup_steps=0, weight_decay=0.1),
        mesh=MeshShape(fsdp=1, context=-1),
    )
    place = find(topology)
    step = step_of(trainer, place)
    made = report.plan(step, trainer, place, None, [])
    made["sends"] = list(statements._context(model, mesh_of(trainer, place), length))
    if step.program is not None:
        runs = [run.instruction.op for run in step.program.runs()]
        made["collectives"] = {op: runs.count(op) for op in sorted(set(runs)) if op.startswith(KINDS)}
    return {key: value for key, value in made.items() if key not in ("assumptions", "notes", "largest_buffers")}


KINDS = ("all-gather", "all-reduce", "all-to-all", "reduce-scatter", "collective-permute")


def row(name: str, topology: str, args: argparse.Namespace) -> dict:
    """The plan, made in a process of its own; {"error": ...} if it cannot be made."""
    command = [sys.executable, __file__, "--one", name, topology, "--length", str(args.length)]
    command += ["--piece", str(args.piece)] if args.piece else []
    found = {"model": name, "topology": topology, "T": args.length, "piece": args.piece}
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=args.timeout)
    except subprocess.TimeoutExpired:
        return found | {"error": f"no answer in {args.timeout} s"}
    if result.returncode:
        return found | {"error": (result.stderr.strip().splitlines() or ["no message"])[-1][:300]}
    return found | json.loads(result.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--topologies", default=",".join(TOPOLOGIES))
    parser.add_argument("--length", type=int, default=1 << 20)
    parser.add_argument("--piece", type=int)
    parser.add_argument("--timeout", type=int, default=3600, help="seconds for each plan")
    parser.add_argument("--output", default=os.path.join(HERE, "results", "million_tokens.json"))
    parser.add_argument("--one", nargs=2, metavar=("MODEL", "TOPOLOGY"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(plan(*args.one, args.length, args.piece)))
        return
    rows = {}
    if os.path.exists(args.output):
        with open(args.output) as file:
            rows = {(x["model"], x["topology"], x["T"], x["piece"]): x for x in json.load(file)["rows"]}
    for topology in args.topologies.split(","):
        for name in args.models.split(","):
            made = rows[name, topology, args.length, args.piece] = row(name, topology, args)
            shown = ("model", "topology", "error", "peak_bytes", "fits", "sends")
            print({key: made.get(key) for key in shown}, flush=True)
            with open(args.output, "w") as file:
                text = json.dumps({"what": WHAT, "rows": list(rows.values())})
                file.write(text.replace('{"model"', '\n{"model"') + "\n")


if __name__ == "__main__":
    main()
