"""Checkpoints: what is saved comes back bit for bit, what does not fit is said, and where they are found."""

from __future__ import annotations

import json
import os
import shutil
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from checkpoint_steps import steps_dir_fixture, three_steps_fixture  # noqa: F401
from checkpoint_workers import abstract_of, assert_same, largest_file, state_of, write_steps

from lcx.checkpoint import Checkpointer, find_step, metadata, read_json, read_record, shards, slices
from lcx.checkpoint import checkpointer as checkpoint
from lcx.checkpoint import fingerprint as fingerprints
from lcx.checkpoint.fingerprint import fingerprint, partial
from lcx.checkpoint.shards import read_arrays
from lcx.errors import UserError

# --- what is saved comes back


def test_round_trip_is_bitwise(tmp_path):
    state = state_of(7)
    with Checkpointer(tmp_path / "a" / "checkpoints") as checkpointer:
        document = {"model": {"layers": 4, "rate": 0.1}, "seen": np.int64(12), "list": [1, None, "x"]}
        assert checkpointer.save(7, state, json={"meta": document})
    step, items, documents = Checkpointer(tmp_path / "a" / "checkpoints").restore(abstract_of(state))
    assert step == 7
    assert_same(items, state)
    assert documents == {"meta": {**document, "seen": 12}}


def test_donated_and_changed_arrays_are_saved_as_they_were(tmp_path):
    host = np.arange(1 << 20, dtype=np.float32)
    x = jnp.asarray(host) + 1
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, {"params": {"x": x, "host": host}})
        x = jax.jit(lambda x: x * 0, donate_argnums=0)(x)
        host[:] = -1
    _, items, _ = Checkpointer(tmp_path).restore(abstract_of({"params": {"x": x, "host": host}}))
    np.testing.assert_array_equal(items["params"]["host"], np.arange(1 << 20))
    np.testing.assert_array_equal(items["params"]["x"], np.arange(1 << 20) + 1)


def test_typed_keys_keep_their_randomness(steps_dir):
    _, items, _ = Checkpointer(steps_dir).restore({"extra": abstract_of(state_of(3)["extra"])})
    for name in ("key", "keys"):
        expected = state_of(3)["extra"][name]
        assert jax.random.key_impl(items["extra"][name]) == jax.random.key_impl(expected)
        draw = jax.vmap(jax.random.bits) if expected.ndim else jax.random.bits
        np.testing.assert_array_equal(draw(items["extra"][name]), draw(expected))


def test_containers_may_change_but_names_may_not(tmp_path):
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, {"opt_state": (optax.EmptyState(), {"mu": jnp.ones(3)})})
    abstract = [None, optax.TraceState(trace=jax.ShapeDtypeStruct((3,), jnp.float32))]
    with pytest.raises(UserError, match="missing 1/trace; unexpected 1/mu"):
        Checkpointer(tmp_path).restore({"opt_state": abstract})
    _, items, _ = Checkpointer(tmp_path).restore({"opt_state": [None, {"mu": abstract[1].trace}]})
    np.testing.assert_array_equal(items["opt_state"][1]["mu"], np.ones(3))


def test_keeps_the_newest_and_leaves_no_rubbish(tmp_path):
    write_steps(tmp_path, [1, 2, 5, 10, 11], max_to_keep=2)
    assert Checkpointer(tmp_path).steps() == [10, 11]
    assert sorted(os.listdir(tmp_path)) == ["10", "11"]


def test_a_save_at_a_preemption_after_a_resume_removes_old_steps(tmp_path, monkeypatch, caplog):
    from jax.experimental import multihost_utils

    write_steps(tmp_path, [1, 2], max_to_keep=2)
    monkeypatch.setattr(multihost_utils, "reached_preemption_sync_point", lambda step: step == 3)
    write_steps(tmp_path, [3], max_to_keep=2)
    assert "cleanup" not in caplog.text
    assert sorted(path.name for path in tmp_path.iterdir() if path.name.isdigit()) == ["2", "3"]


def test_large_stacked_arrays_are_cut_between_layers(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "_CHUNK_BYTES", 1 << 20)
    state = {"params": {"kernel": jnp.zeros((6, 512, 256)), "embedding": jnp.zeros((4096, 128))}}
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, state)
    shapes = json.loads((tmp_path / "1" / "params" / "array_metadatas" / "process_0").read_text())
    chunks = {
        m["array_metadata"]["param_name"]: m["array_metadata"]["chunk_shape"]
        for m in shapes["array_metadatas"]
    }
    assert chunks["kernel"] == [1, 512, 256]
    assert chunks["embedding"][1] == 128
    _, items, _ = Checkpointer(tmp_path).restore(abstract_of(state))
    assert_same(items, state)


# --- the fingerprint


def python_fingerprint(x: np.ndarray) -> int:
    """Written from the definition, one element at a time, in whole numbers."""
    words = x.reshape(-1).view({1: np.uint8, 2: np.uint16}.get(x.itemsize, np.uint32))
    total = 0
    for index, word in enumerate(words.tolist()):
        mixed = word ^ (index * 0x9E3779B1 % 2**32)
        mixed = (mixed ^ (mixed >> 16)) * 0x21F0AAAD % 2**32
        total += mixed ^ (mixed >> 15)
    return total % 2**32


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "int32", "uint32", "int8", "bool"])
@pytest.mark.parametrize("shape", [(), (1,), (63,), (3, 5, 7), (0, 4)])
def test_fingerprint_equals_its_definition(dtype, shape):
    x = (np.random.default_rng(0).normal(size=shape) * 9).astype(jnp.dtype(dtype))
    expected = python_fingerprint(x)
    assert int(fingerprint(jnp.asarray(x))) == expected == partial(x)


@pytest.mark.parametrize("shape", [(1001,), (7, 13, 5), (5, 401), (2, 3, 130)])
def test_fingerprint_in_blocks_equals_its_definition(monkeypatch, shape):
    monkeypatch.setattr(fingerprints, "_DEVICE_BLOCK", 128)
    fingerprints._program.cache_clear()  # compiled with larger blocks
    x = np.random.default_rng(0).normal(size=shape).astype(jnp.bfloat16)
    assert int(fingerprint(jnp.asarray(x))) == python_fingerprint(x)
    fingerprints._program.cache_clear()


def test_fingerprint_takes_memory_for_a_block():
    x = jax.ShapeDtypeStruct((40, 512, 1024), jnp.float32)
    held = fingerprints._program(None, None).lower(x).compile().memory_analysis().temp_size_in_bytes
    assert held < x.size  # a quarter of the array


def test_partial_fingerprints_add_up_across_numpy_blocks():
    x = np.random.default_rng(1).normal(size=(5, 77_777)).astype(np.float32)
    parts = [partial(x[i], i * x.shape[1]) for i in (3, 0, 4, 1, 2)]
    assert sum(parts) % 2**32 == partial(x) == int(fingerprint(jnp.asarray(x)))
    wide = np.random.default_rng(2).normal(size=(3, 100))  # 8 bytes: two words an element
    assert (partial(wide[:1]) + partial(wide[1:], 100)) % 2**32 == partial(wide)


def test_fingerprint_sees_small_and_structured_changes():
    rng = np.random.default_rng(3)
    x = (
        rng.normal(size=(64, 64)).astype(jnp.bfloat16).astype(np.float32)
    )  # low halves all zero, as after a cast
    original = partial(x)
    for _ in range(200):
        i, j = rng.choice(x.size, 2, replace=False)
        flipped, swapped, signs = x.copy().reshape(-1), x.copy().reshape(-1), x.copy().reshape(-1)
        flipped.view(np.uint32)[i] ^= np.uint32(1) << np.uint32(rng.integers(32))
        swapped[[i, j]] = swapped[[j, i]]
        signs[[i, j]] *= -1
        assert partial(flipped) != original
        assert partial(swapped) != original or x.reshape(-1)[i] == x.reshape(-1)[j]
        assert partial(signs) != original
    assert partial(np.roll(x, 1, axis=0)) != original
    assert partial(x.T) != original


# --- trees that do not fit


def test_misfits_are_named_and_do_not_fall_back(steps_dir):
    def restore(change):
        params = abstract_of(state_of(3)["params"])
        change(params)
        with pytest.raises(UserError) as caught:
            Checkpointer(steps_dir).restore({"params": params})
        assert "\n" not in str(caught.value)
        return str(caught.value)

    struct = jax.ShapeDtypeStruct
    kernel = "stages_0/block_0/kernel"
    assert "missing head/scale" in restore(lambda p: p.update(head={"scale": struct((2,), jnp.float32)}))
    assert "unexpected embed/embedding" in restore(lambda p: p.pop("embed"))
    wrong_shape = restore(lambda p: p["embed"].update(embedding=struct((48, 65), jnp.float32)))
    assert "embed/embedding is float32[48, 64], not float32[48, 65]" in wrong_shape
    wrong_dtype = restore(lambda p: p["stages_0"]["block_0"].update(kernel=struct((4, 64, 16), jnp.float32)))
    assert f"{kernel} is bfloat16[4, 64, 16], not float32[4, 64, 16]" in wrong_dtype
    many = restore(lambda p: p.update({f"x{i}": struct((), jnp.int32) for i in range(9)}))
    assert "missing x0, x1, x2 and 6 more" in many


def test_a_key_of_another_generator_does_not_fit(tmp_path):
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, {"extra": {"key": jax.random.key(0, impl="rbg")}})
    wanted = {"extra": {"key": abstract_of(jax.random.key(0, impl="unsafe_rbg"))}}
    with pytest.raises(UserError, match="key is a rbg key"):
        Checkpointer(tmp_path).restore(wanted)


def test_items_can_be_left_out_or_optional(steps_dir):
    params = abstract_of(state_of(3)["params"])
    step, items, documents = Checkpointer(steps_dir).restore(
        {"params": params, "lora": {}}, optional=("lora",)
    )
    assert (step, list(items), documents["meta"]["step"]) == (3, ["params"], 3)
    assert_same(items["params"], state_of(3)["params"])
    with pytest.raises(UserError, match="no item 'lora'; found extra, opt_state, params"):
        Checkpointer(steps_dir).restore({"params": params, "lora": {}})
    assert Checkpointer(steps_dir).restore({}) == (3, {}, {"meta": {"step": 3, "name": "tiny"}})


def test_an_item_without_arrays_is_an_item(tmp_path):
    state = {"opt_state": (optax.EmptyState(), None), "params": {"w": jnp.ones(2)}}
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, state)
    _, items, _ = Checkpointer(tmp_path).restore(abstract_of(state))
    assert_same(items, state)


@pytest.mark.parametrize("wanted", [((48, 32), jnp.float32), ((48, 64), jnp.bfloat16)])
def test_what_is_stored_is_not_cast_or_cut(wanted, steps_dir):
    with pytest.raises(ValueError, match=r"found float32\[48, 64\], expected "):
        struct = jax.ShapeDtypeStruct(*wanted, sharding=jnp.ones(1).sharding)
        read_arrays(steps_dir / "3" / "params", {"embed/embedding": struct})


@pytest.mark.parametrize(
    "wanted",
    [
        [((0, 5), (0, 11)), ((5, 7), (0, 11)), ((0, 7), (2, 3)), ((0, 7), (2, 3))],
        [((0, 4), (0, 6)), ((0, 4), (6, 11)), ((4, 7), (0, 6)), ((4, 7), (6, 11))],
        [((0, 1), (0, 11)), ((2, 3), (0, 11)), ((4, 5), (0, 11)), ((6, 7), (0, 11))],  # one process of two
    ],
    ids=["overlapping", "all", "every second row"],
)
def test_each_chunk_is_read_once_for_all_shards(wanted, tmp_path, monkeypatch):
    """Of an array whose chunks and shards divide it differently, onto devices that share parts of it."""
    x = np.arange(7 * 11, dtype=np.float32).reshape(7, 11)
    monkeypatch.setattr(slices, "_chunk_shape", lambda shape, itemsize: (3, 4))
    with slices.StepWriter(tmp_path / "1", "params", {("w",): (x.shape, x.dtype)}) as writer:
        writer.write(("w",), None, x)
        writer.finish({})
    store = slices.open_array(tmp_path / "1" / "params", ("w",), x, shards.ts.Context())
    places = {number: tuple(slice(*axis) for axis in bounds) for number, bounds in enumerate(wanted)}
    sharding = types.SimpleNamespace(addressable_devices_indices_map=lambda shape: places)
    struct = types.SimpleNamespace(shape=x.shape, dtype=x.dtype, sharding=sharding)
    array, budget = shards._Array("w", struct, store, {}), shards._Budget(1)
    monkeypatch.setattr(shards._Array, "_place", lambda self: None)
    for cell, bounds in array.cells():
        budget.take(array.nbytes(cell))  # larger than the budget: one at a time
        array.read(cell, bounds, budget)
    assert len(array.cells()) == 9 and len(array._buffers) == len(set(wanted))
    for bounds, found in array._buffers.items():
        np.testing.assert_array_equal(found, x[tuple(slice(*axis) for axis in bounds)])
        assert found.ctypes.data % 64 == 0, "a CPU device takes it over without a copy"


def test_what_cannot_be_saved_is_refused(tmp_path):
    checkpointer = Checkpointer(tmp_path)
    with pytest.raises(UserError, match="params/w as float64"):
        checkpointer.save(1, {"params": {"w": np.zeros(2)}})
    with pytest.raises(ValueError, match="names must not be empty"):
        checkpointer.save(1, {"params": {"a/b": jnp.zeros(2)}})
    with pytest.raises(ValueError, match="named twice"):
        checkpointer.save(1, {"params": {"a": jnp.zeros(2)}}, json={"params": {}})
    with pytest.raises(UserError, match="max_to_keep=0"):
        Checkpointer(tmp_path, max_to_keep=0)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot create"):
        Checkpointer(tmp_path / "file" / "checkpoints").save(1, {"params": {"a": jnp.zeros(2)}})


def test_a_new_run_does_not_write_over_an_old_one(steps_dir):
    for step in (2, 3):
        with pytest.raises(UserError, match=f"already holds step 3, found a save of step {step}"):
            Checkpointer(steps_dir).save(step, state_of(step))
    assert Checkpointer(steps_dir).steps() == [1, 2, 3]
    with Checkpointer(steps_dir) as checkpointer:
        checkpointer.restore({})
        with pytest.raises(ValueError, match="steps must increase"):
            checkpointer.save(2, state_of(2))


# --- finding checkpoints


def test_find_step(steps_dir, tmp_path):
    assert find_step(tmp_path) == (steps_dir, 3)
    assert find_step(str(steps_dir)) == (steps_dir, 3)
    assert find_step(steps_dir / "2") == (steps_dir, 2)
    (steps_dir / "3" / "commit_success.txt").unlink()
    assert find_step(tmp_path) == (steps_dir, 2)
    for path, message in [
        (tmp_path / "no", "nothing is there"),
        (largest_file(steps_dir), "a file is there"),
        (steps_dir / "3", "never finished"),
        (steps_dir / "2" / "params", "no step folders"),
    ]:
        with pytest.raises(UserError, match=message):
            find_step(path)
    shutil.copytree(steps_dir / "2", tmp_path / "best")
    with pytest.raises(UserError, match="rename it to its step number"):
        find_step(tmp_path / "best")
    for step in (1, 2):
        (steps_dir / str(step) / "commit_success.txt").unlink()
    with pytest.raises(UserError, match=r"only unfinished saves \(1, 2, 3\)"):
        find_step(tmp_path)
    with pytest.raises(UserError, match="no checkpoint in"):
        Checkpointer(steps_dir).restore({})


def test_metadata_and_json_without_loading(steps_dir, tmp_path):
    found = metadata(tmp_path)
    assert sorted(found) == ["extra", "opt_state", "params"]
    assert found["params"]["stages_0"]["block_0"]["kernel"] == jax.ShapeDtypeStruct((4, 64, 16), jnp.bfloat16)
    assert found["extra"]["key"] == jax.ShapeDtypeStruct((2,), jnp.uint32)
    assert read_json(steps_dir / "2", "meta") == {"step": 2, "name": "tiny"}
    assert read_record(steps_dir / "2").arrays["params"]["embed/embedding"].shape == (48, 64)
    with pytest.raises(UserError, match="no item 'data'; found meta"):
        read_json(steps_dir / "2", "data")
    path = steps_dir / "2" / "meta" / "metadata"
    path.write_text(path.read_text().replace("tiny", "tinz"))
    with pytest.raises(UserError, match="meta does not match its checksum"):
        read_json(steps_dir / "2", "meta")
    shutil.rmtree(steps_dir / "1" / "fingerprints")
    with pytest.raises(UserError, match="not written by lcx"):
        metadata(steps_dir / "1")


def test_unfinished_steps_are_ignored_and_cleaned_by_the_next_save_only(steps_dir):
    (steps_dir / "3" / "commit_success.txt").unlink()
    reader = Checkpointer(steps_dir)
    assert reader.steps() == [1, 2]
    assert reader.restore({})[0] == 2
    reader.close()
    assert (steps_dir / "3").exists()  # it may be a save under way
    with Checkpointer(steps_dir) as writer:
        writer.restore({})
        writer.save(4, state_of(4))
    assert sorted(os.listdir(steps_dir)) == ["1", "2", "4"]
