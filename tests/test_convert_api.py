"""lcx.load and lcx.save: every kind of folder, any mesh, merged low-rank pairs, extension."""

import json
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import quick_xla
import transformers

import lcx
from lcx import model as model_lib
from lcx.checkpoint import Checkpointer, model_json
from lcx.convert import api, formats
from lcx.convert.core import model_source
from lcx.convert.files import tensor_io
from lcx.convert.hf.source import HfSource
from lcx.errors import UserError
from lcx.rope import Rope
from lcx.striped_hyena import striped_hyena


def tiny(**changes):
    keys = dict(
        vocab_size=30,
        hidden_size=16,
        intermediate_size=24,
        num_layers=3,
        num_heads=4,
        num_kv_heads=2,
        max_position_embeddings=32,
        layer_windows=(None, 5, None),
        qkv_bias=True,
        model_type="qwen2",
    )
    return model_lib.llama(**keys | changes)


def random_params(model, dtype=jnp.float32, seed=0):
    leaves, structure = jax.tree.flatten(model_lib.abstract_params(model))
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    values = [jax.random.normal(key, leaf.shape, dtype) * 0.3 for key, leaf in zip(keys, leaves, strict=True)]
    return jax.tree.unflatten(structure, values)


def assert_equal_trees(found, expected):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("format", ["hf", "lcx"])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_save_then_load(tmp_path, format, dtype):
    model = tiny(dtype=jnp.dtype(dtype).name)
    params = random_params(model, dtype)
    lcx.save(tmp_path / "out", model, params, format=format)
    found_model, found = lcx.load(tmp_path / "out")
    assert found_model == model
    assert_equal_trees(found, params)
    as_float_model, as_float = lcx.load(str(tmp_path / "out"), format=format, dtype="float32")
    assert as_float_model.dtype == "float32"
    assert_equal_trees(as_float, jax.tree.map(lambda x: x.astype(jnp.float32), params))


def test_every_kind_of_lcx_path(tmp_path):
    model, params = tiny(), random_params(tiny())
    lcx.save(tmp_path / "run", model, params, format="lcx")
    for path in ("run", "run/checkpoints", "run/checkpoints/0"):
        assert_equal_trees(lcx.load(tmp_path / path)[1], params)


def test_damaged_newest_step_falls_back_but_a_named_one_does_not(tmp_path):
    model = tiny()
    with Checkpointer(tmp_path / "checkpoints") as checkpointer:
        for step in (1, 2):
            items = {"params": random_params(model, seed=step)}
            checkpointer.save(step, items, json={"meta": {"model": model_json.to_json(model)}}, wait=True)
    data = [path for path in (tmp_path / "checkpoints" / "2" / "params").rglob("d/*") if path.is_file()]
    assert data
    for path in data:
        os.truncate(path, path.stat().st_size // 2)
    assert_equal_trees(lcx.load(tmp_path)[1], random_params(model, seed=1))
    with pytest.raises(UserError):
        lcx.load(tmp_path / "checkpoints" / "2")


def test_replacing_needs_to_be_asked_for(tmp_path):
    model, params = tiny(), random_params(tiny())
    lcx.save(tmp_path / "out", model, params, format="hf")
    with pytest.raises(UserError, match="already exists"):
        lcx.save(tmp_path / "out", model, random_params(model, seed=1), format="lcx")
    assert_equal_trees(lcx.load(tmp_path / "out")[1], params)
    lcx.save(tmp_path / "out", model, random_params(model, seed=1), format="lcx", overwrite=True)
    assert_equal_trees(lcx.load(tmp_path / "out")[1], random_params(model, seed=1))
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.txt").write_text("five years")
    with pytest.raises(UserError, match="not a checkpoint folder"):
        lcx.save(tmp_path / "home", model, params, format="lcx", overwrite=True)
    assert (tmp_path / "home" / "thesis.txt").read_text() == "five years"


def test_clear_errors(tmp_path):
    model, params = tiny(), random_params(tiny())
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("x")
    cases = [
        (lambda: lcx.load(tmp_path / "nothing"), "does not exist"),
        (lambda: lcx.load(tmp_path / "empty"), "an empty folder"),
        (lambda: lcx.load(tmp_path / "file"), "a file, expected the folder"),
        (lambda: lcx.load(tmp_path / "empty", format="gguf"), "expected one of lcx, hf"),
        (lambda: lcx.load(tmp_path / "empty", dtype="int8"), "dtype is 'int8'"),
        (lambda: lcx.save(tmp_path / "o", model, params, format="savanna?"), "format is 'savanna?'"),
        (
            lambda: lcx.save(tmp_path / "o", model, {"embed": params["embed"]}, format="lcx"),
            "do not fit the model",
        ),
        (
            lambda: lcx.save(tmp_path / "o", tiny(vocab_size=31), params, format="hf"),
            "embed/embedding is (30, 16)",
        ),
    ]
    for call, message in cases:
        with pytest.raises(UserError) as error:
            call()
        assert message in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "o").exists()


def test_numbers_beyond_float16_are_refused(tmp_path):
    model, params = tiny(), random_params(tiny())
    params["final_norm"]["scale"] = params["final_norm"]["scale"].at[3].set(1e6)
    lcx.save(tmp_path / "out", model, params, format="hf")
    with pytest.raises(UserError, match="beyond the range of float16"):
        lcx.load(tmp_path / "out", dtype="float16")


@pytest.mark.parametrize("format", ["hf", "lcx"])
def test_extension_while_loading(tmp_path, format):
    model = tiny()
    lcx.save(tmp_path / "out", model, random_params(model), format=format)
    longer, _ = lcx.load(
        tmp_path / "out", rope_scaling={"rope_type": "yarn", "factor": 4.0}, context_length=128
    )
    ropes = {block.mixer.rope for stage in longer.stages for block in stage.pattern}
    assert ropes == {Rope("yarn", 10000.0, factor=4.0, original_max_position_embeddings=32)}
    assert longer.max_position_embeddings == 128
    with pytest.raises(UserError, match="context_length"):
        lcx.load(tmp_path / "out", rope_scaling={"rope_type": "yarn", "factor": 4.0}, context_length=256)


def lora_tree(model, rank=2):
    """Pairs for every q_proj and down_proj, with a leading axis of layers as in the parameters."""
    rng = np.random.default_rng(5)
    tree = {}
    for s, stage in enumerate(model.stages):
        for b in range(len(stage.pattern)):
            L, block = stage.repeat, tree.setdefault(f"stages_{s}", {}).setdefault(f"block_{b}", {})
            block["mixer"] = {"q_proj": pair(rng, L, (16,), rank, (4, 4))}
            block["mlp"] = {"down_proj": pair(rng, L, (24,), rank, (16,))}
    return tree


def pair(rng, layers, inputs, rank, outputs):
    a, b = rng.normal(size=(layers, *inputs, rank)), rng.normal(size=(layers, rank, *outputs))
    scale = rng.uniform(0.5, 2, size=layers)
    return {name: jnp.asarray(x, jnp.float32) for name, x in (("a", a), ("b", b), ("scale", scale))}


def test_low_rank_pairs_are_merged(tmp_path):
    model = tiny()
    params, lora = random_params(model), lora_tree(tiny())
    with Checkpointer(tmp_path / "run" / "checkpoints") as checkpointer:
        meta = {"model": model_json.to_json(model)}
        checkpointer.save(7, {"params": params, "lora": lora}, json={"meta": meta}, wait=True)
    tokens = jnp.arange(11)[None] % 30
    run = jax.jit(lambda variables: model.apply(variables, tokens))
    expected = run({"params": params, "lora": lora})
    _, loaded = lcx.load(tmp_path / "run")
    np.testing.assert_allclose(run({"params": loaded}), expected, atol=1e-4)
    assert np.abs(run({"params": params}) - expected).max() > 0.1
    api.write(tmp_path / "hf", formats.named("lcx").open(tmp_path / "run"), format="hf")
    _, converted = lcx.load(tmp_path / "hf")
    np.testing.assert_allclose(run({"params": converted}), expected, atol=1e-4)


def test_tokenizer_files_and_ids_go_along(tmp_path, reference):
    folder = reference / "data" / "weights" / "stories260K" / "hf"
    model, params = lcx.load(folder)
    lcx.save(tmp_path / "out", model, params, format="hf", like=folder)
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {path.name for path in folder.iterdir()}
    for name in names - {"config.json", "model.safetensors"}:
        assert (tmp_path / "out" / name).read_bytes() == (folder / name).read_bytes()
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["bos_token_id"], config["eos_token_id"]) == (1, 2)
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "out")("Once").input_ids


def test_reading_a_shard_reads_a_shard(tmp_path, monkeypatch):
    model = tiny(layer_windows=None, hidden_size=32, head_dim=8)
    lcx.save(tmp_path / "out", model, random_params(model), format="hf")
    source = HfSource(tmp_path / "out")
    read, total = tensor_io.read_array, []

    def counting(*arguments, **named):
        array = read(*arguments, **named)
        total.append(array.nbytes)
        return array

    monkeypatch.setattr(tensor_io, "read_array", counting)
    path = "stages_0/block_0/mixer/q_proj/kernel"
    part = source.read(path, (slice(1, 2), slice(0, 32), slice(2, 3), slice(0, 8)))
    assert part.shape == (1, 32, 1, 8) and sum(total) == 32 * 8 * 4


MESHES = """
import sys, jax, numpy as np, lcx
from lcx import model as model_lib, sharding
assert jax.device_count() == 8
for path in sys.argv[1:]:
    model, expected = lcx.load(path)
    for sizes in (dict(fsdp=8), dict(fsdp=2, tensor=2, data=2), dict(fsdp=4, tensor=2)):
        mesh = sharding.make_mesh(**{"data": 1, "fsdp": 1, "context": 1, "tensor": 1} | sizes)
        _, params = lcx.load(path, mesh=mesh)
        shardings = model_lib.param_shardings(model, mesh)
        cut = 0
        for array, one, wanted in zip(*map(jax.tree.leaves, (params, expected, shardings)), strict=True):
            assert array.sharding == wanted, (array.sharding, wanted)
            cut += array.addressable_shards[0].data.size < array.size
            np.testing.assert_array_equal(array, one)
        assert cut > 8, cut
print("equal")
"""


def test_any_mesh_gets_the_same_arrays_in_its_own_shards(tmp_path):
    model = tiny(hidden_size=32, head_dim=8, vocab_size=64)
    for format in ("hf", "lcx"):
        lcx.save(tmp_path / format, model, random_params(model), format=format)
    evo2 = striped_hyena(
        pattern="SDH*" * 2,
        hidden_size=64,
        intermediate_size=48,
        num_heads=2,
        max_position_embeddings=160,
        se_groups=8,
        mr_groups=16,
    )
    lcx.save(tmp_path / "savanna", evo2, random_params(evo2), format="savanna", model_parallel=2)
    env = os.environ | {
        "XLA_FLAGS": quick_xla.flags("--xla_force_host_platform_device_count=8"),
        "NPROC": "32",
        "PYTHONPATH": str(pathlib.Path(__file__).parent.parent),
    }
    command = [sys.executable, "-c", MESHES, *(str(tmp_path / name) for name in ("hf", "lcx", "savanna"))]
    result = subprocess.run(command, env=env, capture_output=True, text=True)
    assert result.stdout == "equal\n", result.stderr[-3000:]


def test_sources_agree(tmp_path):
    """The same model read from memory, from Hugging Face files and from an lcx step, whole and in part."""
    model, params = tiny(), random_params(tiny())
    for format in ("hf", "lcx"):
        lcx.save(tmp_path / format, model, params, format=format)
    memory = model_source.TreeSource(model, params)
    others = [formats.named(format).open(tmp_path / format) for format in ("hf", "lcx")]
    for path, info in memory.leaves.items():
        whole = tuple(slice(0, size) for size in info.shape)
        part = tuple(slice(size // 2, size) for size in info.shape)
        for index in (whole, part):
            expected = memory.read(path, index)
            assert expected.shape == tuple(s.stop - s.start for s in index)
            for other in others:
                assert other.leaves[path].shape == info.shape and other.leaves[path].dtype == info.dtype
                np.testing.assert_array_equal(other.read(path, index), expected)
