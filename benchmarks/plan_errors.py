"""How far the plan of a training step is from what the step takes: small configurations on this machine's CPUs.

    python benchmarks/plan_errors.py [--only NAME;...] [--output benchmarks/results/plan_errors.json]

Each configuration runs in a process of its own; --only measures some and keeps the others of the file. Memory alone is
measured, no time, so other work on the machine does not matter. Planned is what
`python -m lcx.plan --topology=cpu:N` gives, over all N devices. Measured is the highest resident memory of the process
in three real steps, less its resident memory after an earlier step whose arrays were freed. glibc is asked to give
memory back at once (MALLOC_ENVIRONMENT), so that no freed memory of the compiler hides what a step takes. The error is
planned / measured - 1; below 0 the plan promised too little. Linux only.
"""

import argparse
import ctypes
import gc
import json
import os
import re
import subprocess
import sys

HERE = os.path.dirname(os.path.abspath(__file__))
MALLOC_ENVIRONMENT = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}
LLAMA = {"vocab_size": 512, "hidden_size": 256, "intermediate_size": 768, "num_layers": 4, "num_heads": 4}
# name -> (model, Trainer settings, devices). The model: settings of model.llama, and "mixer" for another one; or with a
# "pattern", of a StripedHyena 2.
CASES = {
    "nothing recomputed": ({}, {"batch_size": 8, "seq_len": 512, "remat": "none"}, 1),
    "remat dots": ({}, {"batch_size": 8, "seq_len": 512, "remat": "dots"}, 1),
    "remat full": ({}, {"batch_size": 8, "seq_len": 512, "remat": "full"}, 1),
    "remat full, bfloat16": ({}, {"batch_size": 8, "seq_len": 512, "remat": "full", "dtype": "bfloat16"}, 1),
    "accumulation 4": ({}, {"batch_size": 16, "seq_len": 512, "remat": "dots", "accumulation": 4}, 1),
    "LoRA": (
        {"hidden_size": 512, "intermediate_size": 1536},
        {"batch_size": 2, "seq_len": 512, "lora": 8},
        1,
    ),
    "wide vocabulary": ({"vocab_size": 32768}, {"batch_size": 2, "seq_len": 512, "remat": "full"}, 1),
    "2 devices, fsdp": ({}, {"batch_size": 8, "seq_len": 512, "remat": "dots", "mesh": {"fsdp": 2}}, 2),
    "2 devices, context": ({}, {"batch_size": 2, "seq_len": 2048, "mesh": {"fsdp": 1, "context": 2}}, 2),
    "Mamba-2": ({"mixer": "mamba2"}, {"batch_size": 2, "seq_len": 1024, "remat": "full"}, 1),
    "2Mamba": ({"mixer": "two_mamba"}, {"batch_size": 2, "seq_len": 1024, "remat": "full"}, 1),
    "StripedHyena 2": ({"pattern": "SDH*"}, {"batch_size": 2, "seq_len": 1024, "remat": "full"}, 1),
    "one long row": ({}, {"batch_size": 1, "seq_len": 4096, "remat": "full"}, 1),
    "a long row in pieces": ({}, {"batch_size": 1, "seq_len": 4096, "remat": "full", "piece_length": 512}, 1),
    "12 layers": ({"num_layers": 12}, {"batch_size": 4, "seq_len": 512, "remat": "dots"}, 1),
    "one kv head": ({"num_kv_heads": 1}, {"batch_size": 8, "seq_len": 512, "remat": "none"}, 1),
    "tied embeddings": (
        {"vocab_size": 32768, "tie_word_embeddings": True},
        {"batch_size": 2, "seq_len": 512, "remat": "full"},
        1,
    ),
    "2 devices, data": ({}, {"batch_size": 8, "seq_len": 512, "remat": "dots", "mesh": {"data": 2, "fsdp": 1}}, 2),
    "2 devices, tensor": ({}, {"batch_size": 4, "seq_len": 512, "remat": "dots", "mesh": {"fsdp": 1, "tensor": 2}}, 2),
    "4 devices, fsdp and context": (
        {},
        {"batch_size": 4, "seq_len": 1024, "remat": "full", "mesh": {"fsdp": 2, "context": 2}},
        4,
    ),
}


def trainer_of(name: str):
    from lcx import data, lora, model, sharding, trainer

    sizes, settings, _ = CASES[name]
    own = {key: value for key, value in sizes.items() if key != "mixer"}
    if "pattern" in sizes:
        made = striped_hyena_2(sizes["pattern"], settings["seq_len"])
    else:
        made = model.llama(**{**LLAMA, **own}, max_position_embeddings=settings["seq_len"])
    if "mixer" in sizes:
        made = model.map_mixers(made, lambda mixer: other_mixer(sizes["mixer"], LLAMA["hidden_size"]))
    settings = dict(settings)
    if "lora" in settings:
        settings["lora"] = lora.LoRA(rank=settings["lora"])
    settings["mesh"] = sharding.MeshShape(**settings.get("mesh", {}))
    return trainer.Trainer(data=data.Dataset(source="none"), steps=3, model=made, **settings)


def striped_hyena_2(pattern: str, length: int):
    from lcx.striped_hyena import striped_hyena

    groups = {"se_groups": 16, "mr_groups": 16, "init_length": length}
    sizes = {key: LLAMA[key] for key in ("hidden_size", "intermediate_size", "num_heads")}
    return striped_hyena(pattern=pattern, **sizes, **groups, max_position_embeddings=length)


def other_mixer(name: str, hidden: int):
    from lcx.mixers import mamba2, two_mamba

    sizes = {"num_heads": 4, "head_dim": hidden // 4}
    return {"mamba2": mamba2.Mamba2, "two_mamba": two_mamba.TwoMamba}[name](**sizes)


def one(name: str) -> dict:
    """Planned and measured bytes of a configuration, in this process."""
    import jax
    import numpy as np

    from lcx.planning import abstract, compiled, topology

    devices = CASES[name][2]
    place, trainer = topology.find(f"cpu:{devices}"), trainer_of(name)
    mesh = compiled.mesh_of(trainer, place)
    run = abstract.run_of(trainer, mesh)
    with jax.set_mesh(mesh):
        step, batch = compiled_step(trainer, run, mesh)
        planned = compiled._peak(step.memory_analysis()) * devices + compiled.CPU_RUNTIME
        state = jax.block_until_ready(step(jax.tree.map(made, run.abstract), batch, np.int32(0))[0])
        del state  # the first step touched code and started threads
        base = resident()
        state = jax.tree.map(made, run.abstract)
        trim()
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")  # the highest resident memory from here on
        for number in range(3):
            state, _ = jax.block_until_ready(step(state, batch, np.int32(number)))
        measured = memory("VmHWM") - base
    return {
        "name": name,
        "devices": devices,
        "planned_mib": round(planned / 2**20, 1),
        "measured_mib": round(measured / 2**20, 1),
        "error": round(planned / measured - 1, 3),
    }


def compiled_step(trainer, run, mesh):
    """The step, compiled, and a batch for it on the devices."""
    import numpy as np

    from lcx import sharding

    shape = (trainer.batch_size, trainer.seq_len)
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, run.model.vocab_size, shape, np.int32)
    places = np.broadcast_to(np.arange(shape[1], dtype=np.int32), shape).copy()
    ones = np.ones(shape, np.int32)
    batch = {"tokens": tokens, "labels": np.roll(tokens, -1, 1), "positions": places, "segment_ids": ones}
    batch = sharding.shard_batch(batch | {"loss_weights": ones.astype(np.float32)}, mesh)
    return trainer.step_function(run).lower(run.abstract, batch, np.int32(0)).compile(), batch


def made(leaf):
    """An array of these numbers, small and not all equal, in its shards."""
    import jax
    import numpy as np

    values = np.random.default_rng(0).standard_normal(leaf.shape, np.float32) if leaf.ndim else np.zeros(())
    x = jax.device_put((values * 0.02).astype(leaf.dtype), leaf.sharding, may_alias=False)
    return x.block_until_ready()


def trim() -> None:
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)


def resident() -> int:
    trim()
    return memory("VmRSS")


def memory(field: str) -> int:
    with open("/proc/self/status") as file:
        return int(re.search(rf"{field}:\s+(\d+) kB", file.read())[1]) * 1024


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", help="some of the configurations, by name")
    parser.add_argument(
        "--output", default=os.path.join(HERE, "results", "plan_errors.json"), help="- for none"
    )
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(one(args.one)))
        return
    kept = {}
    if args.only and os.path.exists(args.output):
        with open(args.output) as file:
            kept = {row["name"]: row for row in json.load(file)["rows"]}
    environment = {**os.environ, **MALLOC_ENVIRONMENT, "JAX_PLATFORMS": "cpu"}
    for name in args.only.split(";") if args.only else CASES:
        command = [sys.executable, __file__, "--one", name]
        result = subprocess.run(command, env=environment, capture_output=True, text=True)
        if result.returncode:
            raise SystemExit(f"{name}: {result.stderr.strip().splitlines()[-1]}")
        kept[name] = json.loads(result.stdout.splitlines()[-1])
        print(json.dumps(kept[name]), flush=True)
        if args.output != "-":  # after each, so that a run that is interrupted has what it measured
            write(args.output, [kept[name] for name in CASES if name in kept])


def write(path: str, rows: list[dict]) -> None:
    import harness

    what = "peak memory of a training step: planned, and measured as the growth of the resident memory"
    text = json.dumps({"what": what, "machine": harness.machine(), "rows": rows})
    with open(path, "w") as file:
        file.write(text.replace('{"name"', '\n{"name"') + "\n")


if __name__ == "__main__":
    main()
