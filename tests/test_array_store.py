"""Streaming arrays in and out of a checkpoint: the same bytes, in the memory of one slice.

The file is also the worker of its own subprocess tests: `python tests/test_array_store.py WORKER ARGUMENTS`.
"""

from __future__ import annotations

import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import ml_dtypes
import numpy as np
import pytest

from lcx.checkpoint.folder import find_step, read_json, read_record
from lcx.checkpoint.slices import StepReader, StepWriter, _chunk_shape
from lcx.errors import UserError

ROOT = pathlib.Path(__file__).resolve().parents[1]
MEGABYTE = 1 << 20


def arrays_of(seed: int) -> dict[tuple[str, ...], np.ndarray]:
    rng = np.random.default_rng(seed)
    return {
        ("embed", "embedding"): rng.normal(size=(9001, 130)).astype(np.float32),  # rows in ragged groups
        ("stages_0", "block_0", "kernel"): rng.normal(size=(5, 33, 64)).astype(ml_dtypes.bfloat16),
        ("stages_0", "block_0", "wide"): rng.normal(size=(3, 640, 1000)).astype(
            np.float32
        ),  # a layer a chunk
        ("stages_0", "block_0", "scale"): rng.normal(size=(5, 33)).astype(np.float16),
        ("count",): np.array(-7, np.int32),
        ("words",): rng.integers(0, 2**32, 11, np.uint32),
        ("bytes",): rng.integers(-128, 128, (2, 3), np.int8),
        ("mask",): rng.random(9) > 0.5,
        ("no_rows",): np.zeros((0, 3), np.float32),
        ("no_columns",): np.zeros((3, 0), np.float32),
    }


def specs(arrays):
    return {path: (x.shape, x.dtype) for path, x in arrays.items()}


def tree_of(arrays):
    tree: dict = {}
    for path, x in arrays.items():
        node = tree
        for name in path[:-1]:
            node = node.setdefault(name, {})
        node[path[-1]] = x
    return tree


def write_sliced(step_dir, arrays, seed: int = 0) -> None:
    """In pieces and out of order, each array its own way."""
    rng = np.random.default_rng(seed)
    with StepWriter(step_dir, "params", specs(arrays)) as writer:
        for path, x in arrays.items():
            if path[-1] in ("kernel", "wide", "words"):
                for i in rng.permutation(x.shape[0]):
                    writer.write(path, int(i), x[i])
            elif path[-1] in ("embedding", "scale", "mask"):
                cuts = [0, *sorted(rng.choice(np.arange(1, x.shape[0]), 3, replace=False).tolist()), None]
                for low, high in list(zip(cuts, cuts[1:], strict=False))[::-1]:
                    writer.write(path, slice(low, high), x[low:high])
            else:
                writer.write(path, None, x)
        writer.finish({"meta": {"written": "in slices"}})


@pytest.fixture
def step_dir(tmp_path):
    write_sliced(tmp_path / "checkpoints" / "40", arrays_of(0))
    return tmp_path / "checkpoints" / "40"


def test_checkpointer_reads_what_was_written_in_slices(step_dir):
    import jax

    from lcx.checkpoint import Checkpointer

    expected = tree_of(arrays_of(0))
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), expected)
    assert find_step(step_dir.parent.parent) == (step_dir.parent, 40)
    step, items, documents = Checkpointer(step_dir.parent).restore({"params": abstract})
    assert (step, documents) == (40, {"meta": {"written": "in slices"}})
    for x, y in zip(jax.tree.leaves(items["params"]), jax.tree.leaves(expected), strict=True):
        assert (x.shape, x.dtype) == (y.shape, y.dtype)
        assert np.asarray(x).tobytes() == y.tobytes()


def test_the_record_is_the_one_that_a_checkpointer_writes(step_dir, tmp_path):
    from lcx.checkpoint import Checkpointer

    with Checkpointer(tmp_path / "other") as checkpointer:
        checkpointer.save(1, {"params": tree_of(arrays_of(0))}, json={"meta": {"written": "in slices"}})
    assert read_record(step_dir) == read_record(tmp_path / "other" / "1")


def test_orbax_reads_it_with_and_without_being_told_how(step_dir):
    import jax
    import orbax.checkpoint as ocp
    from orbax.checkpoint import v1

    stored = {path: x for path, x in arrays_of(0).items() if x.size}
    expected = tree_of(stored)
    manager = ocp.CheckpointManager(step_dir.parent)
    assert manager.all_steps() == [40]
    plain = manager.restore(
        40, args=ocp.args.Composite(params=ocp.args.PyTreeRestore(), meta=ocp.args.JsonRestore())
    )
    assert plain["meta"] == {"written": "in slices"}
    jax.tree.map(np.testing.assert_array_equal, plain["params"], expected)
    jax.tree.map(np.testing.assert_array_equal, v1.load(step_dir, checkpointable_name="params"), expected)


@pytest.mark.parametrize("writer", ["slices", "orbax"])
def test_reader_reads_both_layouts_by_any_slice(step_dir, tmp_path, writer):
    arrays = arrays_of(0)
    if writer == "orbax":
        from lcx.checkpoint import Checkpointer

        step_dir = tmp_path / "other" / "1"
        with Checkpointer(step_dir.parent) as checkpointer:
            checkpointer.save(1, {"params": tree_of(arrays)})
        assert (step_dir / "params" / "manifest.ocdbt").exists()
    reader = StepReader(step_dir, "params")
    assert reader.arrays == specs(arrays)
    assert len(reader.unread()) == len(arrays) - 2  # all but the two without elements
    for path, x in arrays.items():
        np.testing.assert_array_equal(reader.read(path), x, strict=True)
    assert reader.unread() == []
    reader = StepReader(step_dir, "params")
    kernel = ("stages_0", "block_0", "kernel")
    for i in (3, 0, -1, 1, 2):
        np.testing.assert_array_equal(reader.read(kernel, i), arrays[kernel][i], strict=True)
    assert kernel not in reader.unread()
    embed = ("embed", "embedding")
    np.testing.assert_array_equal(reader.read(embed, slice(77, 4100)), arrays[embed][77:4100], strict=True)
    np.testing.assert_array_equal(reader.read(embed, slice(9000, None)), arrays[embed][9000:], strict=True)
    assert embed in reader.unread()
    np.testing.assert_array_equal(reader.read(embed, (5, slice(2, 9))), arrays[embed][5, 2:9], strict=True)
    assert embed not in reader.unread()  # a part is read of an array that is verified
    with pytest.raises(IndexError):
        reader.read(kernel, 5)
    with pytest.raises(ValueError, match="stride 2"):
        reader.read(kernel, slice(0, 4, 2))
    with pytest.raises(KeyError):
        reader.read(("nowhere",))


def test_copying_a_checkpoint_in_slices_keeps_its_record(step_dir, tmp_path):
    reader = StepReader(step_dir, "params")
    with StepWriter(tmp_path / "copy" / "0", "params", reader.arrays) as writer:
        for path, (shape, _) in reader.arrays.items():
            for i in range(shape[0]) if len(shape) == 3 else [None]:
                writer.write(path, i, reader.read(path, i))
        writer.finish({"meta": read_json(step_dir, "meta")})
    assert read_record(tmp_path / "copy" / "0") == read_record(step_dir)


def test_typed_keys_are_read_as_their_data(tmp_path):
    import jax

    from lcx.checkpoint import Checkpointer

    key = jax.random.key(3)
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, {"extra": {"key": key}})
    reader = StepReader(tmp_path / "1", "extra")
    np.testing.assert_array_equal(reader.read(("key",)), jax.random.key_data(key))


def test_reader_notices_damage(step_dir):
    kernel = ("stages_0", "block_0", "kernel")
    folder = step_dir / "params" / "stages_0.block_0.kernel"
    chunk = next(f for f in folder.iterdir() if f.name != ".zarray")
    good = chunk.read_bytes()
    x = arrays_of(0)[kernel]
    # Other numbers under a valid encoding: only the fingerprint can tell.
    import tensorstore as ts

    spec = {"driver": "zarr", "kvstore": {"driver": "file", "path": f"{folder}/"}}
    ts.open(spec).result()[2, 5, 6].write(x[2, 5, 6] * 2).result()
    reader = StepReader(step_dir, "params")
    for i in range(4):
        reader.read(kernel, i)
    with pytest.raises(
        UserError, match="params/stages_0/block_0/kernel does not match the saved fingerprint"
    ):
        reader.read(kernel, 4)
    with pytest.raises(UserError, match="does not match the saved fingerprint"):
        StepReader(step_dir, "params").read(kernel, (0, slice(1), slice(1)))
    for damage in (good[: len(good) // 2], None):
        chunk.unlink()
        if damage is not None:
            chunk.write_bytes(damage)
        with pytest.raises(UserError, match=r"is damaged: params is unreadable \([^)]+\)") as caught:
            StepReader(step_dir, "params").read(kernel)
        assert len(str(caught.value)) < 500
        assert "\n" not in str(caught.value)


def test_reader_says_what_is_missing(step_dir):
    with pytest.raises(UserError, match="no item 'lora'; found params"):
        StepReader(step_dir, "lora")
    with pytest.raises(UserError, match="not a committed checkpoint step"):
        StepReader(step_dir.parent, "params")


def test_writer_refuses_what_does_not_add_up(tmp_path):
    spec = {("w",): ((4, 3), np.float32), ("b",): ((), np.int32)}
    writer = StepWriter(tmp_path / "0", "params", spec)
    with pytest.raises(ValueError, match=r"w: got float64\[3\], not float32\[1, 3\]|w: got float64"):
        writer.write(("w",), 0, np.zeros(3))
    with pytest.raises(ValueError, match=r"w: got float32\[1, 4\], not float32\[1, 3\]"):
        writer.write(("w",), 0, np.zeros(4, np.float32))
    writer.write(("w",), slice(0, 2), np.ones((2, 3), np.float32))
    with pytest.raises(ValueError, match="rows 1 to 2 were written before"):
        writer.write(("w",), 1, np.zeros(3, np.float32))
    with pytest.raises(KeyError):
        writer.write(("x",), 1, np.zeros(3, np.float32))
    with pytest.raises(ValueError, match="rows missing in w, b"):
        writer.finish({})
    writer.write(("w",), slice(2, 4), np.ones((2, 3), np.float32))
    writer.write(("b",), ..., np.array(3, np.int32))
    writer.finish({})
    with pytest.raises(UserError, match="already holds a checkpoint"):
        StepWriter(tmp_path / "0", "params", spec)
    with pytest.raises(UserError, match="named by a step number"):
        StepWriter(tmp_path / "best", "params", spec)
    with pytest.raises(ValueError, match="names must not be empty"):
        StepWriter(tmp_path / "1", "params", {("a.b",): ((), np.int32)})
    assert sorted(os.listdir(tmp_path)) == ["0"]


def test_an_error_on_the_way_removes_the_step(tmp_path):
    with (
        pytest.raises(KeyError),
        StepWriter(tmp_path / "0", "params", {("w",): ((4,), np.float32)}) as writer,
    ):
        writer.write(("w",), None, np.zeros(4, np.float32))
        raise KeyError
    assert os.listdir(tmp_path) == []


def test_a_full_disk_is_one_clear_line(tmp_path):
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = shutil.which("mount")
    command = [mount or "mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(folder)]
    if not mount or os.geteuid() != 0 or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("needs the right to mount a tmpfs")
    try:
        x = np.random.default_rng(0).integers(0, 2**32, (4, MEGABYTE // 4), np.uint32)
        with (
            pytest.raises(UserError, match="no space left.*needs up to 4.2 MB, .* are free") as caught,
            StepWriter(folder / "0", "params", {("w",): (x.shape, x.dtype)}) as writer,
        ):
            for i in range(4):
                writer.write(("w",), i, x[i])
        assert "\n" not in str(caught.value)
        assert os.listdir(folder) == []
    finally:
        subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.parametrize(
    "shape",
    [(), (1,), (50257, 768), (128256, 4096), (32, 4096, 14336), (32, 4096), (2, 3, 5, 7), (8, 1 << 26)],
)
def test_chunks_are_neither_many_nor_large(shape):
    chunk = _chunk_shape(shape, 2)
    assert len(chunk) == len(shape)
    assert all(1 <= c <= n for c, n in zip(chunk, shape, strict=True))
    size = int(np.prod(chunk, dtype=np.int64)) * 2
    total = int(np.prod(shape, dtype=np.int64)) * 2
    assert size <= 64 * MEGABYTE
    count = int(np.prod([-(-n // c) for n, c in zip(shape, chunk, strict=True)]))
    assert count <= 1 + total // (MEGABYTE // 2)
    assert count * size <= total * 1.05 + 64  # little padding in ragged last chunks


# --- processes: memory, and being killed


def worker(*arguments) -> list[str]:
    return [sys.executable, __file__, *map(str, arguments)]


def environment() -> dict[str, str]:
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    return {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": path}


LAYERS, LAYER_BYTES = 80, 4 * MEGABYTE


def test_memory_is_that_of_a_slice(tmp_path):
    """Writes and reads back 320 MB in slices of 4 MB; both together may not cost a third of it."""
    done = subprocess.run(
        worker("stream", tmp_path), env=environment(), capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    grown = json.loads(done.stdout)
    total = LAYERS * LAYER_BYTES
    assert grown["write"] < 0.3 * total, {k: v / MEGABYTE for k, v in grown.items()}
    assert grown["read"] < 0.3 * total, {k: v / MEGABYTE for k, v in grown.items()}


def stream(folder: str) -> None:
    peak = _peak_meter()
    step_dir, spec = (
        pathlib.Path(folder) / "0",
        {("kernel",): ((LAYERS, LAYER_BYTES // 4), np.dtype(np.uint32))},
    )
    layer = np.random.default_rng(0).integers(0, 2**32, LAYER_BYTES // 4, np.uint32)
    start = peak()
    with StepWriter(step_dir, "params", spec) as writer:
        for i in range(LAYERS):
            writer.write(("kernel",), i, layer + np.uint32(i))
        writer.finish({})
    written = peak() - start
    reader = StepReader(step_dir, "params")
    for i in range(LAYERS):
        assert np.array_equal(reader.read(("kernel",), i), layer + np.uint32(i))
    assert reader.unread() == []
    print(json.dumps({"write": written, "read": peak() - start}))


def _peak_meter():
    """() -> bytes of the largest resident set of this process so far."""
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def test_being_killed_leaves_no_step(tmp_path):
    rng = np.random.default_rng(0)
    for _ in range(3):
        with subprocess.Popen(
            worker("write_forever", tmp_path), env=environment(), stdout=subprocess.PIPE, text=True
        ) as process:
            assert process.stdout is not None
            assert process.stdout.readline() == "started\n"
            time.sleep(rng.uniform(0.0, 0.3))
            process.send_signal(signal.SIGKILL)
        with pytest.raises(UserError, match="only unfinished saves|never finished|no step folders"):
            find_step(tmp_path)
    write_sliced(tmp_path / "0", arrays_of(0))  # takes the place of the unfinished one
    assert find_step(tmp_path) == (tmp_path, 0)
    reader = StepReader(tmp_path / "0", "params")
    for path, x in arrays_of(0).items():
        np.testing.assert_array_equal(reader.read(path), x, strict=True)


def write_forever(folder: str) -> None:
    rows = 1 << 20
    writer = StepWriter(pathlib.Path(folder) / "0", "params", {("w",): ((rows, MEGABYTE // 4), np.float32)})
    print("started", flush=True)
    for i in range(rows):
        writer.write(("w",), i, np.full(MEGABYTE // 4, i, np.float32))


if __name__ == "__main__":
    {"stream": stream, "write_forever": write_forever}[sys.argv[1]](sys.argv[2])
