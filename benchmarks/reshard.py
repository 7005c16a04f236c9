"""A checkpoint of 2 GB, written on fsdp=8: the time to restore it on that mesh, on tensor=4 x fsdp=2 and on one device.

    python benchmarks/reshard.py --prepare            # writes the checkpoint (once)
    python benchmarks/reshard.py --output=benchmarks/results/reshard_cpu.json

Every mesh has a process of its own, with eight virtual devices. Restoring on the mesh that wrote the checkpoint is the
plain read: it moves nothing between devices. `peak_over_arrays` is the highest memory that a process held beyond its
start, over the bytes of its own part of the arrays. The two processes at the end have half of the devices each, and
count the bytes that they read from disk.
"""

import argparse
import json
import math
import os
import pathlib
import re
import shutil
import socket
import sys
import time

DEVICES = 8
MESHES = {
    "fsdp=8": {"fsdp": 8},
    "tensor=4 x fsdp=2": {"fsdp": 2, "tensor": 4},
    "one device": {},
}
LAYERS, WIDTH, INNER = 16, 2048, 8192


def abstract(mesh):
    """Two stacks of kernels in float32, 1.07 GB each, as a model holds them: [L, D, F] and [L, F, D]."""
    import jax
    from jax.sharding import NamedSharding, PartitionSpec

    def of(shape, *names):
        sharding = NamedSharding(mesh, PartitionSpec(None, *names))
        return jax.ShapeDtypeStruct(shape, "float32", sharding=sharding)

    return {
        "up": {"kernel": of((LAYERS, WIDTH, INNER), "fsdp", "tensor")},
        "down": {"kernel": of((LAYERS, INNER, WIDTH), "tensor", "fsdp")},
    }


def built(sizes):
    import jax

    from lcx import sharding

    shape = sharding.MeshShape(**({"data": 1, "fsdp": 1, "context": 1, "tensor": 1} | sizes))
    return shape.build(jax.devices()[: math.prod(sizes.values())])


def prepare(folder):
    import jax
    import jax.numpy as jnp

    from lcx.checkpoint import Checkpointer

    tree = abstract(built(MESHES["fsdp=8"]))
    make = jax.jit(
        lambda: jax.tree.map(lambda x: jax.random.normal(jax.random.key(0), x.shape, jnp.float32), tree),
        out_shardings=jax.tree.map(lambda x: x.sharding, tree),
    )
    arrays = make()
    with Checkpointer(folder) as checkpointer:
        checkpointer.save(1, {"params": arrays}, wait=True)


def status(name):
    """The numbers of a file of /proc/self."""
    text = pathlib.Path("/proc/self", name).read_text()
    return {key: int(number) for key, number in re.findall(r"(\w+):\s+(\d+)", text)}


def restored(folder, tree):
    import jax

    from lcx.checkpoint import Checkpointer

    with Checkpointer(folder) as checkpointer:
        _, items, _ = checkpointer.restore({"params": tree})
    return jax.block_until_ready(items)


def serve(folder, mesh):
    """A process of one mesh: seconds for so many restores, and the memory that they took."""
    tree = abstract(mesh)
    base = status("status")["VmHWM"]
    for line in sys.stdin:
        request = json.loads(line)
        if request.get("memory"):
            mine = sum(local_bytes(x) for x in (tree["up"]["kernel"], tree["down"]["kernel"]))
            read = status("io")["rchar"]
            held = 1024 * (status("status")["VmHWM"] - base)
            answer = {"own_gb": mine / 1e9, "peak_over_arrays": round(held / mine, 2), "read_gb": read / 1e9}
        else:
            start = time.perf_counter()
            for _ in range(request["calls"]):
                restored(folder, tree)
            answer = time.perf_counter() - start
        print(f"answer {json.dumps(answer)}", flush=True)


def local_bytes(x):
    local = [device for device in x.sharding.device_set if device.process_index == jax_process()]
    return len(local) * math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize


def jax_process():
    import jax

    return jax.process_index()


def children(folder):
    import harness

    command = (sys.executable, __file__, f"--folder={folder}")
    env = {"JAX_NUM_CPU_DEVICES": str(DEVICES), "JAX_PLATFORMS": "cpu"}
    return {name: harness.Child(*command, f"--serve={name}", env=env) for name in MESHES}


def two_processes(folder):
    """What each of two processes, with half of the devices each, holds and reads of tensor=4 x fsdp=2."""
    import harness

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    env = {"JAX_NUM_CPU_DEVICES": str(DEVICES // 2), "JAX_PLATFORMS": "cpu"}
    both = [
        harness.Child(
            *(sys.executable, __file__, f"--folder={folder}", "--serve=tensor=4 x fsdp=2"),
            *(f"--port={port}", f"--process={number}"),
            env=env,
        )
        for number in range(2)
    ]
    for child in both:
        child.process.stdin.write(json.dumps({"calls": 1}) + "\n")
        child.process.stdin.flush()
    for child in both:
        for line in child.process.stdout:
            if line.startswith("answer "):
                break
    answers = [child.ask({"memory": True}) for child in both]
    for child in both:
        child.process.stdin.close()  # of both: each leaves only together with the other
    for child in both:
        child.close()
    return answers


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", default="/tmp/lcx-reshard", help="where the checkpoint is")
    parser.add_argument("--prepare", action="store_true")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--output", default="-")
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    parser.add_argument("--port", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--process", type=int, help=argparse.SUPPRESS)
    flags = parser.parse_args()
    if flags.serve:
        if flags.port:
            import jax

            jax.distributed.initialize(f"127.0.0.1:{flags.port}", 2, flags.process)
        serve(flags.folder, built(MESHES[flags.serve]))
        return
    if flags.prepare:
        os.environ["JAX_NUM_CPU_DEVICES"] = str(DEVICES)
        shutil.rmtree(flags.folder, ignore_errors=True)
        prepare(flags.folder)
        return
    import harness

    threads = {"lcx": {"devices": DEVICES, "threads": os.cpu_count()}}
    run = harness.Run("restore a 2 GB checkpoint written on fsdp=8", threads=threads)
    sides = children(flags.folder)
    turns = run.turns({name: child.side({}) for name, child in sides.items()}, rounds=flags.rounds)
    rows = []
    for name, child in sides.items():
        memory = child.ask({"memory": True})
        child.close()
        ratio = turns.ratio(name, "fsdp=8")
        rows.append(
            {"mesh": name, "seconds": round(turns.seconds(name), 2), "over_plain_read": ratio}
            | {"peak_over_arrays": memory["peak_over_arrays"]}
        )
        print(rows[-1], flush=True)
    pair = two_processes(flags.folder)
    print(pair, flush=True)
    run.write(flags.output, rows=rows, two_processes=pair)


if __name__ == "__main__":
    main()
