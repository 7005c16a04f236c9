"""What the checkpoint tests share, and the processes that they start, kill and fill disks with.

Run as `python tests/checkpoint_workers.py WORKER ARGUMENTS` by the tests.
"""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import quick_xla

from lcx.checkpoint import Checkpointer
from lcx.checkpoint import checkpointer as checkpoint
from lcx.checkpoint import tree as checkpoint_tree
from lcx.errors import UserError

ROOT = pathlib.Path(__file__).resolve().parents[1]


def state_of(step: int, width: int = 64) -> dict:
    """Arrays of every kind that training saves, different at every step and reproducible anywhere."""
    rng = np.random.default_rng(step)
    params = {
        "embed": {"embedding": jnp.asarray(rng.normal(size=(48, width)), jnp.float32)},
        "stages_0": {"block_0": {"kernel": jnp.asarray(rng.normal(size=(4, width, 16)), jnp.bfloat16)}},
        "empty": {},
        "nothing": None,
    }
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3))
    opt_state = jax.tree.map(lambda x: x + step, optimizer.init(params))
    extra = {
        "key": jax.random.key(step),
        "keys": jax.random.split(jax.random.key(step, impl="rbg"), 3),
        "seed": jax.random.PRNGKey(step),
        "count": jnp.int32(-step),
        "words": jnp.asarray(rng.integers(0, 2**32, 5, np.uint32)),
        "bytes": jnp.asarray(rng.integers(-128, 128, (3, 3), np.int8)),
        "mask": jnp.asarray(rng.random(7) > 0.5),
        "no_rows": jnp.zeros((0, 3)),
        "host": rng.normal(size=5).astype(np.float32),
    }
    return {"params": params, "opt_state": opt_state, "extra": extra}


def raw(x) -> bytes:
    x = jax.random.key_data(x) if checkpoint_tree.is_prng_key(x) else x
    return np.asarray(x).tobytes()


def assert_same(got, expected) -> None:
    """Bitwise, with the same structure, dtypes and shapes."""
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        assert isinstance(x, jax.Array)
        assert (x.dtype, x.shape) == (y.dtype, y.shape)
        assert raw(x) == raw(y)


def abstract_of(state):
    return jax.eval_shape(lambda: state)


def write_steps(directory, steps, *, max_to_keep: int = 9) -> None:
    with Checkpointer(directory, max_to_keep=max_to_keep) as checkpointer:
        for step in steps:
            assert checkpointer.save(step, state_of(step), json={"meta": {"step": step, "name": "tiny"}})


def largest_file(folder: pathlib.Path) -> pathlib.Path:
    return max((f for f in folder.rglob("*") if f.is_file()), key=lambda f: f.stat().st_size)


def run_worker(*arguments: object, timeout: float = 120, **env: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        worker_command(*arguments), env=worker_env(**env), capture_output=True, text=True, timeout=timeout
    )


def worker_command(*arguments: object) -> list[str]:
    return [sys.executable, __file__, *map(str, arguments)]


def worker_env(**env: str) -> dict[str, str]:
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    return {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": path, "XLA_FLAGS": quick_xla.flags(), **env}


def fill_disk(folder: str) -> None:
    disk = pathlib.Path(folder)
    failed, steps_while_full = [], None
    checkpointer = Checkpointer(disk / "checkpoints", max_to_keep=2)
    for step in range(1, 8):
        if step == 4:
            checkpointer.close()
            free = shutil.disk_usage(disk).free
            (disk / "stranger").write_bytes(b"x" * (free - 200_000))
        if step == 6:
            with contextlib.suppress(UserError):
                checkpointer.close()
            failed = [int(line.split()[3]) for line in checkpointer.failures]
            steps_while_full = checkpointer.steps()
            (disk / "stranger").unlink()
        state = {
            "params": {"w": jnp.asarray(np.random.default_rng(step).integers(0, 2**32, 100_000, np.uint32))}
        }
        checkpointer.save(step, state)
    checkpointer.close()
    for step in checkpointer.steps():
        Checkpointer(disk / "checkpoints").restore(abstract_of(state), step=step)
    print(json.dumps({"failed": failed, "steps_while_full": steps_while_full, "steps": checkpointer.steps()}))


def save_forever(folder: str, expected: str) -> None:
    """Resumes, then saves without end; prints each step of its own that is on disk."""
    checkpointer = Checkpointer(folder, max_to_keep=2)
    step = checkpointer.restore(abstract_of(state_of(1, 256)))[0] if checkpointer.steps() else 0
    assert step == int(expected)
    while True:
        step += 1
        checkpointer.save(step, state_of(step, 256), json={"data": {"step": step}})
        if checkpointer.steps() and checkpointer.steps()[-1] > int(expected):
            print(checkpointer.steps()[-1], flush=True)


def mesh_structs(tree, shape: tuple[int, int, int]):
    """Large leaves sharded over (data, fsdp, tensor), the rest replicated."""
    mesh = jax.make_mesh(shape, ("data", "fsdp", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 3)

    def struct(x):
        spec = jax.sharding.PartitionSpec(
            *{2: ("fsdp", "tensor"), 3: (None, "fsdp", ("tensor", "data"))}.get(x.ndim, ())
        )
        spec = (
            jax.sharding.PartitionSpec()
            if checkpoint_tree.is_prng_key(x) or min(x.shape, default=0) < 4
            else spec
        )
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=jax.sharding.NamedSharding(mesh, spec))

    return jax.tree.map(struct, abstract_of(tree))


def reshard(folder: str) -> None:
    assert jax.device_count() == 8
    state = state_of(1)
    checkpointer = Checkpointer(folder, max_to_keep=9)
    for step, shape in [(2, (1, 8, 1)), (3, (2, 2, 2)), (4, (1, 2, 4))]:
        wanted = mesh_structs(state, shape)
        found, items, _ = checkpointer.restore(wanted)
        assert found == step - 1
        assert_same(items, state)
        for x, y in zip(jax.tree.leaves(items), jax.tree.leaves(wanted), strict=True):
            assert x.sharding.is_equivalent_to(y.sharding, x.ndim)
        assert len(items["params"]["embed"]["embedding"].sharding.device_set) == 8
        checkpointer.save(step, items, wait=True)
    checkpointer.close()


def process(rank: str, port: str, folder: str) -> None:
    jax.distributed.initialize(
        f"127.0.0.1:{port}", num_processes=2, process_id=int(rank), initialization_timeout=60
    )
    mesh = jax.make_mesh((2,), ("fsdp",), axis_types=(jax.sharding.AxisType.Auto,))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("fsdp"))
    checkpointer = Checkpointer(folder, max_to_keep=3)
    for step in (1, 2, 3):
        full = np.arange(24, dtype=np.float32).reshape(4, 6) + step
        w = jax.make_array_from_callback(full.shape, sharding, lambda index, full=full: full[index])
        checkpointer.save(step, {"params": {"w": w}}, json={"data": {"step": step}})
        checkpointer.poll()
    read = checkpoint._read_arrays

    def broken_on_rank_1(item_dir, wanted):
        if rank == "1" and item_dir.parent.name == "3":
            raise OSError("broken on this host")
        return read(item_dir, wanted)

    checkpoint._read_arrays = broken_on_rank_1
    wanted = {"params": {"w": jax.ShapeDtypeStruct((4, 6), jnp.float32, sharding=sharding)}}
    step, items, documents = checkpointer.restore(wanted)
    assert (step, documents["data"]["step"]) == (2, 2)
    for shard in items["params"]["w"].addressable_shards:
        np.testing.assert_array_equal(shard.data, (np.arange(24).reshape(4, 6) + 2)[shard.index])
    checkpointer.close()
    print("done", flush=True)


def restore(folder: str) -> None:
    print(Checkpointer(folder).restore(abstract_of(state_of(3)))[0])


if __name__ == "__main__":
    workers = [fill_disk, save_forever, reshard, process, restore]
    {worker.__name__: worker for worker in workers}[sys.argv[1]](*sys.argv[2:])
