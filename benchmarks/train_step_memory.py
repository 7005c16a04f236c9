"""The memory of a whole training step on a device that you do not have: does a context length fit?

    python benchmarks/train_step_memory.py [--target h200|v5e|v5p|v6e] [--models llama,...] [--width 1b]
                                           [--lengths 8192,65536,262144] [--output FILE.json]

The step of `train_step.py` (forward, backward, AdamW; full rematerialisation, bfloat16 activations, packed rows) is
compiled ahead of time for one device of the target, with one row of T tokens, and XLA's count is printed: weights and
optimizer state, and the peak of everything else. It needs no device, but the extra `aot`.
"""

import argparse
import json
import os
import time

import aot as records
import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from train_step import HERE, MODELS, WIDTHS

from kernels_pallas import aot
from lcx import model as model_lib
from lcx import objectives, sharding
from lcx.optim import AdamW
from lcx.training import step as train_step

MEMORY = {"h200": 141e9, "v5e": 16 * 2**30, "v5p": 95 * 2**30, "v6e": 32 * 2**30}  # data sheets


def compiled(name: str, width: dict, T: int, mesh):
    """The trainer's step on one row."""
    model = MODELS[name](width, max_position_embeddings=T, dtype="bfloat16", remat="full")
    schedule = AdamW(1e-4, "constant", warmup_steps=0, weight_decay=0.1)
    rates = schedule.learning_rates(1000)
    shapes = {"params": model_lib.abstract_params(model, mesh=mesh)}
    optimizer = schedule.build(train_step.moving(shapes), 1000)
    abstract = train_step.abstract_state(shapes, optimizer, mesh)
    rows = NamedSharding(mesh, PartitionSpec(sharding.BATCH_AXES, "context"))
    types = dict.fromkeys(("tokens", "labels", "positions", "segment_ids"), np.int32)
    types["loss_weights"] = np.float32
    batch = {key: jax.ShapeDtypeStruct((1, T), dtype, sharding=rows) for key, dtype in types.items()}
    with jax.set_mesh(mesh):  # the mesh of another machine: nothing may run on it
        step = train_step.make_step(
            model, optimizer, objectives.next_token, rates, accumulation=1, abstract=abstract
        )
        return step.lower(abstract, batch, jax.ShapeDtypeStruct((), np.int32)).compile()


def measure(name: str, T: int, args) -> dict:
    devices = aot.h200_devices(1) if args.target == "h200" else aot.tpu_devices(args.target)
    mesh = sharding.make_mesh(fsdp=1, data=1, tensor=1, devices=devices[:1])
    row, start = {"model": name, "T": T}, time.perf_counter()
    try:
        memory = compiled(name, WIDTHS[args.width], T, mesh).memory_analysis()
    except jax.errors.JaxRuntimeError as error:  # libtpu refuses what does not fit
        return row | {"fits": False, "error": str(error).splitlines()[0][:200]}
    state, temp = memory.argument_size_in_bytes, memory.temp_size_in_bytes
    return row | {
        "state_gib": round(state / 2**30, 2),
        "temp_gib": round(temp / 2**30, 2),
        "fits": state + temp < MEMORY[args.target],
        "compile_seconds": round(time.perf_counter() - start, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--target", default="h200", choices=MEMORY)
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--width", default="1b", choices=WIDTHS)
    parser.add_argument("--lengths", default="8192,65536,262144")
    parser.add_argument("--output", help="benchmarks/results/train_step_memory_<target>.json; - for none")
    args = parser.parse_args()
    if reason := aot.available("h200" if args.target == "h200" else "tpu"):
        raise SystemExit(reason)
    rows = []
    for name in args.models.split(","):
        for T in map(int, args.lengths.split(",")):
            rows.append(measure(name, T, args))
            print(json.dumps(rows[-1]), flush=True)
    output = args.output or os.path.join(HERE, "results", f"train_step_memory_{args.target}.json")
    if output != "-":
        what = "memory of a training step, one row of T tokens, compiled ahead of time"
        result = {
            "what": what,
            "target": args.target,
            "width": WIDTHS[args.width],
            "versions": records.versions(),
        }
        with open(output, "w") as file:
            file.write(json.dumps(result | {"rows": rows}).replace('{"model"', '\n{"model"') + "\n")


if __name__ == "__main__":
    main()
