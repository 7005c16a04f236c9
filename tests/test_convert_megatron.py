"""Distributed checkpoints of bionemo: torch_dist folders made by torch.distributed.checkpoint itself, zarr folders."""

import io
import json
import logging
import os
import pathlib
import pickle
import re
import shutil

import jax
import numpy as np
import pytest
import tensorstore as ts
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

import lcx
from lcx.convert import api
from lcx.convert.evo2 import fp8_states, weight_files
from lcx.convert.files.torch_dist import TorchDist
from lcx.convert.files.zarr_folder import ZarrFolder
from lcx.errors import UserError

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
logging.getLogger("c10d-NullHandler-dcp_logger").disabled = True
NONE = re.compile("(?!)")
CONFIG = "model:\n  num_attention_heads: 4\n  rotary_base: 10000\n  seq_length: 256\n"


@pytest.fixture(scope="module")
def savanna(reference):
    load_file = pytest.importorskip("safetensors.torch").load_file
    return load_file(reference / "reference" / "evo2" / "tiny_a_savanna_weights.safetensors")


def bionemo(savanna, *, fused=True, prefix="module."):
    """savanna's tensors under the names that bionemo's model has, with Transformer Engine (`fused`) or without."""
    found, attention = {}, {name for name in savanna if name.endswith("rotary_emb.inv_freq")}
    attention = {name.split(".")[1] for name in attention}
    layers = sorted({int(m[1]) for name in savanna if (m := re.match(r"sequential\.(\d+)\.mlp", name))})
    for name, x in savanna.items():
        _, number, rest = name.replace("layernorm.scale", "layernorm.weight").split(".", 2)
        is_attention = number in attention
        if rest == "word_embeddings.weight":
            found["embedding." + rest] = x
        elif int(number) > layers[-1]:
            found["decoder.final_norm.weight"] = x
        else:
            owner = "self_attention.linear_qkv" if is_attention else "mixer.dense_projection"
            plain = "input_layernorm.weight" if is_attention else "norm.weight"
            names = {
                "input_layernorm.weight": f"{owner}.layer_norm_weight" if fused else plain,
                "pre_mlp_layernorm.weight": "mlp.linear_fc1.layer_norm_weight" if fused else "pre_mlp_layernorm.weight",
                "mlp.w3.weight": "mlp.linear_fc2.weight",
            }
            if is_attention:
                names |= {f"mixer.dense.{kind}": f"self_attention.linear_proj.{kind}" for kind in ("weight", "bias")}
                names["mixer.dense_projection.weight"] = "self_attention.linear_qkv.weight"
            dropped = ("post_attention_layernorm", "outer_mlp_layernorm", "inv_freq", "filter.t", "mlp.w1", "mlp.w2")
            if any(part in rest for part in dropped):
                continue
            x = x[:, :128] if rest.endswith(("filter.h", "filter.decay")) else x
            x = x.squeeze(1) if rest.endswith("hyena_proj_conv.short_conv_weight") else x
            found[f"decoder.layers.{int(number) - 2}.{names.get(rest, rest)}"] = x.contiguous()
    for number in layers:
        gates = [savanna[f"sequential.{number}.mlp.w{i}.weight"] for i in (1, 2)]
        found[f"decoder.layers.{number - 2}.mlp.linear_fc1.weight"] = torch.cat(gates)
    return {prefix + name: x for name, x in found.items()}


def others():
    """What a run stores beside the weights."""
    empty = io.BytesIO()
    return {
        "optimizer.state.exp_avg.module.decoder.layers.0.mlp.linear_fc2.weight": torch.zeros(3),
        "module.decoder.layers.0.mlp.linear_fc1._extra_state/shard_0_1": empty,
        "rng_state/shard_0.0_1.1": io.BytesIO(b"x"),
    }


def save(folder, tensors):
    dcp.save(tensors, checkpoint_id=str(folder), no_dist=True)


def save_zarr(folder, tensors):
    for name, x in tensors.items():
        kind = "bfloat16" if x.dtype == torch.bfloat16 else np.dtype(str(x.dtype).removeprefix("torch.")).str
        chunks = [max(1, -(-x.shape[0] // 2)), *x.shape[1:]]
        metadata = {"shape": list(x.shape), "chunks": chunks, "dtype": kind, "compressor": None}
        spec = {"driver": "zarr", "kvstore": {"driver": "file", "path": f"{folder / name}/"}, "metadata": metadata}
        store = ts.open(spec, create=True).result()
        values = x.float().numpy().astype(store.dtype.numpy_dtype)
        store.write(values).result()
    (folder / "metadata.json").write_text(json.dumps({"sharded_backend": "zarr", "sharded_backend_version": 1}))


@pytest.fixture(scope="module")
def expected(savanna, tmp_path_factory):
    path = tmp_path_factory.mktemp("savanna") / "evo2.pt"
    torch.save({"module": savanna}, path)
    return lcx.load(path)


LAYOUTS = ["torch_dist", "without_te", "nemo", "iterations", "zarr"]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_checkpoint_is_the_model_that_savanna_stores(layout, savanna, expected, tmp_path, caplog):
    weights = bionemo(savanna, fused=layout != "without_te", prefix="" if layout == "iterations" else "module.")
    folder = tmp_path / {"nemo": "run/weights", "iterations": "run/iter_0000020"}.get(layout, "run")
    folder.mkdir(parents=True)
    (save_zarr if layout == "zarr" else save)(folder, weights if layout == "zarr" else weights | others())
    config = folder / "run_config.yaml"
    if layout == "nemo":
        config = tmp_path / "run" / "context" / "model.yaml"
        config.parent.mkdir()
    config.write_text(CONFIG)
    if layout == "iterations":
        save(tmp_path / "run" / "iter_0000030", {"module.x": torch.zeros(1)})
        (tmp_path / "run" / "latest_checkpointed_iteration.txt").write_text("20\n")
    assert api.detect(tmp_path / "run") == "megatron"
    model, params = lcx.load(tmp_path / "run")
    warned = [one for one in caplog.records if one.name.startswith("lcx") and one.levelname == "WARNING"]
    assert not warned
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(np.asarray(a), np.asarray(b)), params, expected[1])
    assert model == expected[0]


def test_what_no_tensor_holds_is_said(savanna, tmp_path, caplog):
    save(tmp_path, bionemo(savanna))
    with pytest.raises(UserError, match="64 channels are no whole number of heads of 128"):
        lcx.load(tmp_path)
    assert "no configuration with rotary_base" in caplog.text
    (tmp_path / "run_config.yaml").write_text(CONFIG + "  seq_len_interpolation_factor: 4\n")
    lcx.load(tmp_path)
    assert "the run divided positions by 4" in caplog.text
    (tmp_path / "run_config.yaml").write_text(CONFIG + "  remove_activation_post_first_layer: false\n")
    with pytest.raises(UserError, match="a gelu in every layer"):
        lcx.load(tmp_path)


def test_scales_of_fp8_projections_are_read(savanna, tmp_path):
    history = np.random.default_rng(0).random((16, 3), np.float32)

    def state(scale):
        file, forward = io.BytesIO(), torch.tensor([scale, 2 * scale, 1.0])
        torch.save({"scale_fwd": forward, "amax_history_fwd": torch.tensor(history), "recipe": None}, file)
        return file

    name = "module.decoder.layers.{}.mixer.dense_projection._extra_state/shard_0_1"
    states = {name.format(i): state(3.0 + i) for i in (0, 2)}
    states[name.format(2)] = torch.frombuffer(bytearray(states[name.format(2)].getvalue()), dtype=torch.uint8)
    save(tmp_path / "run", bionemo(savanna) | states)
    (tmp_path / "run" / "run_config.yaml").write_text(CONFIG)
    model, params = lcx.load(tmp_path / "run")
    blocks = {path: x for path, x in jax.tree_util.tree_leaves_with_path(params) if "fp8_scales" in str(path)}
    scales = [tuple(np.asarray(x)[0].tolist()) for x in blocks.values()]
    assert scales == [(3.0, 6.0), (0.0, 0.0), (5.0, 10.0)] and model.stages[0].pattern[0].mixer.fp8
    for src, dst in (("run", "lcx"), ("lcx", "vortex"), ("run", "direct")):  # histories travel through lcx too
        format = "lcx" if dst == "lcx" else "vortex"
        api.write(tmp_path / dst, api.source(tmp_path / src), format=format)
    states = [weight_files.open_file(tmp_path / name / "model.pt") for name in ("vortex", "direct")]
    for i in range(3):
        data = [file.extra_state(f"blocks.{i}.projections._extra_state") for file in states]
        ours, direct = map(fp8_states.read, data)
        assert (ours.scales, ours.gradient_scale) == (direct.scales, direct.gradient_scale)
        np.testing.assert_array_equal(ours.history, direct.history)
        np.testing.assert_array_equal(ours.history[:, :2], history[:, :2] * (i != 1))  # layer 1 has none


# ------------------------------------------------------------------------------------------------------ the container


@pytest.fixture
def chunked(tmp_path):
    """A tensor [5, 6] of bfloat16 in four chunks, by torch's own writer, as four ranks leave it."""
    whole = torch.arange(30.0).reshape(5, 6).bfloat16()
    writer = dcp.FileSystemWriter(str(tmp_path), single_file_per_rank=False, sync_files=False)
    cuts = [((0, 0), (2, 4)), ((0, 4), (2, 2)), ((2, 0), (3, 4)), ((2, 4), (3, 2))]
    chunks = [ChunkStorageMetadata(torch.Size(at), torch.Size(size)) for at, size in cuts]
    properties = TensorProperties(dtype=torch.bfloat16)
    items = [
        WriteItem(MetadataIndex("w", chunk.offsets, i), WriteItemType.SHARD,
                  tensor_data=TensorWriteData(chunk=chunk, properties=properties, size=whole.shape))
        for i, chunk in enumerate(chunks)
    ]  # fmt: skip

    class Planner:
        def resolve_data(self, item):
            at, size = item.index.offset, item.tensor_data.chunk.sizes
            return whole[at[0] : at[0] + size[0], at[1] : at[1] + size[1]]

    writer.set_up_storage_writer(True)
    plan = writer.prepare_local_plan(dcp.SavePlan(items, usable=True) if hasattr(dcp, "SavePlan") else None)
    plan = writer.prepare_global_plan([plan])[0]
    results = writer.write_data(plan, Planner()).wait()
    writer.finish(Metadata({"w": TensorStorageMetadata(properties, whole.shape, chunks)}), [results])
    return tmp_path, whole


def test_chunks_are_put_together(chunked):
    folder, whole = chunked
    source = TorchDist(folder, NONE)
    for start, stop in ((0, 5), (1, 4), (2, 3), (3, 3)):
        found = source.read("w", start, stop)
        assert str(found.dtype) == "bfloat16"
        np.testing.assert_array_equal(found.astype(np.float32), whole[start:stop].float().numpy())


def changed(folder, change):
    path = folder / ".metadata"
    metadata = pickle.loads(path.read_bytes())
    change(metadata)
    path.write_bytes(pickle.dumps(metadata))


def first(metadata):
    return next(key for key in metadata.storage_data)


def set_place(metadata, **fields):
    for name, value in fields.items():
        setattr(metadata.storage_data[first(metadata)], name, value)


BROKEN = {
    "a chunk that is stored nowhere": (lambda m: m.storage_data.pop(first(m)), "is stored nowhere"),
    "a chunk that is not listed": (lambda m: m.state_dict_metadata["w"].chunks.pop(), "a chunk is missing"),
    "two chunks of one place": (
        lambda m: m.state_dict_metadata["w"].chunks.append(m.state_dict_metadata["w"].chunks[0]),
        "or overlap",
    ),
    "bytes beyond the file": (lambda m: set_place(m, length=1 << 40), "it is truncated"),
    "a negative place": (lambda m: set_place(m, offset=-1), "it is truncated"),
    "a path out of the folder": (lambda m: set_place(m, relative_path="../x"), "a plain file name"),
    "another shape": (lambda m: setattr(m.state_dict_metadata["w"], "size", torch.Size([1 << 40, 6])), "of its"),
    "the bytes of another chunk": (
        lambda m: set_place(m, **vars(list(m.storage_data.values())[1])),
        "not of one checkpoint",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_folder_is_one_line(case, chunked):
    folder, _ = chunked
    change, message = BROKEN[case]
    changed(folder, change)
    with pytest.raises(UserError, match=message) as error:
        TorchDist(folder, NONE).read("w")
    assert "\n" not in str(error.value)


class Attribute:
    """Asks for an attribute of a class that is admitted."""

    def __reduce__(self):
        return getattr, (torch.Size, "count")


class Hostile:
    def __reduce__(self):
        return os.system, ("touch executed",)


def test_nothing_is_executed_and_damage_is_one_line(chunked, tmp_path, monkeypatch):
    folder, _ = chunked
    monkeypatch.chdir(tmp_path)
    good = (folder / ".metadata").read_bytes()
    metadata = pickle.loads(good)
    metadata.planner_data = Hostile()
    hostile = (pickle.dumps(x) for x in (metadata, Hostile(), Attribute(), {"a": 1}))
    for data in (*hostile, b"", b"\x80\x04garbage", *(good[: len(good) * i // 9] for i in range(1, 9))):
        (folder / ".metadata").write_bytes(data)
        with pytest.raises(UserError, match="nothing in it was executed") as error:
            TorchDist(folder, NONE)
        assert "\n" not in str(error.value)
    (folder / ".metadata").write_bytes(good)
    chunk = sorted(folder.glob("*.distcp"))[0]
    chunk.write_bytes(pickle.dumps(Hostile()) + chunk.read_bytes()[len(pickle.dumps(Hostile())) :])
    with pytest.raises(UserError):
        TorchDist(folder, NONE).read("w")
    chunk.write_bytes(chunk.read_bytes()[:-30])
    with pytest.raises(UserError, match="it is truncated"):
        TorchDist(folder, NONE)
    assert not pathlib.Path("executed").exists()


def test_zarr_in_bfloat16_and_broken(tmp_path):
    whole = torch.arange(30.0).reshape(5, 6).bfloat16()
    save_zarr(tmp_path, {"w": whole})
    source = ZarrFolder(tmp_path, NONE)
    np.testing.assert_array_equal(source.read("w", 1, 4).astype(np.float32), whole[1:4].float().numpy())
    chunk = tmp_path / "w" / "1.0"
    data = chunk.read_bytes()
    chunk.write_bytes(data[:-4])
    with pytest.raises(UserError, match="a chunk is damaged"):
        ZarrFolder(tmp_path, NONE).read("w")
    chunk.unlink()
    with pytest.raises(UserError, match="has 1 of its 2 chunks"):
        ZarrFolder(tmp_path, NONE)
    (tmp_path / "w" / ".zarray").write_text("{")
    with pytest.raises(UserError, match="not valid JSON"):
        ZarrFolder(tmp_path, NONE)


def test_other_models_are_refused(savanna, tmp_path):
    save(tmp_path, bionemo(savanna) | {"module.decoder.layers.0.mlp.router.weight": torch.zeros(3)})
    with pytest.raises(UserError, match="not those of Evo 2 in bionemo; found 'module.decoder.layers.0.mlp.router"):
        lcx.load(tmp_path)
    shutil.rmtree(tmp_path)
    save(tmp_path, {"model.embed": torch.zeros(3)})
    with pytest.raises(UserError, match="found 'model.embed'"):
        lcx.load(tmp_path)
