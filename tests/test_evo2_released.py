"""Files with the key names of Evo 2's released checkpoints, at toy size, and their input projections in FP8."""

import collections
import dataclasses
import functools
import io
import json
import logging
import os
import pickle
import sys
import types

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import lcx
from lcx import lora as lora_lib
from lcx.convert import api
from lcx.convert.__main__ import main
from lcx.convert.evo2 import fp8_states, weight_files
from lcx.errors import UserError
from lcx.layers import Linear
from lcx.ops import fp8
from lcx.striped_hyena import with_input_projections

ATTENTION, HYENA, LI = (3,), (0, 1, 2), (2,)


@pytest.fixture(scope="module")
def weights(reference):
    load_file = pytest.importorskip("safetensors.torch").load_file
    return load_file(reference / "reference" / "evo2" / "tiny_a_vortex_weights.safetensors")


@dataclasses.dataclass
class Recipe:  # stands for transformer_engine.common.recipe.DelayedScaling
    margin: int = 0
    fp8_format: object = None


def history_of(scale):
    return torch.tensor(np.random.default_rng(int(100 * scale[0])).random((16, 3), np.float32))


def state(scale, *, form, recipe=False):
    """An extra state as Transformer Engine writes it: `scale` for input and weight."""
    if scale is None:
        return {"none": None, "uint8": torch.empty(0, dtype=torch.uint8), "BytesIO": io.BytesIO()}[form]
    forward = torch.tensor([*scale, 1.0], dtype=torch.float32)
    found = {
        "scale_fwd": forward,
        "scale_inv_fwd": 1 / forward,
        "amax_history_fwd": history_of(scale),
        "scale_bwd": torch.ones(2),
        "extra_fp8_variables": {"num_gemms": 1, "fp8_group": None},
    }
    if recipe:
        found["recipe"] = Recipe()
    if form == "BytesIO":
        file = io.BytesIO()
        torch.save(found, file)
        file.seek(0)
        return file
    data = pickle.dumps(found)
    return data if form == "bytes" else torch.frombuffer(bytearray(data), dtype=torch.uint8)


def released(weights, kind):
    """The weights under the names that public reports list for a checkpoint, without FP8 scales."""
    found = dict(weights)
    if kind in ("7b", "40b"):
        for i in LI:
            found[f"blocks.{i}.mixer.mixer.filter.t"] = torch.arange(8.0)[None, None]
    for i in ATTENTION:
        found[f"blocks.{i}.mixer.dense._extra_state"] = state(None, form="uint8")
        if kind != "1b":
            found[f"blocks.{i}.mixer.attn._extra_state"] = state(None, form="none")
    if kind == "40b":
        for i in range(4):
            names = [f"mlp.l{n}" for n in (1, 2, 3)] + ["out_filter_dense" if i in HYENA else "inner_mha_cls.Wqkv"]
            found |= {f"blocks.{i}.{name}._extra_state": state(None, form="BytesIO") for name in names}
    return collections.OrderedDict(found)


def same(params, expected):
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(np.asarray(a), np.asarray(b)), params, expected)


@pytest.fixture(scope="module")
def plain(weights, tmp_path_factory):
    torch.save(weights, tmp_path_factory.mktemp("plain") / "evo2.pt")
    return lcx.load(next(tmp_path_factory.getbasetemp().glob("plain*/evo2.pt")))


@pytest.mark.parametrize("kind", ["1b", "7b", "40b"])
@pytest.mark.parametrize("files", ["pt", "parts", "safetensors", "shards", "hub"])
def test_released_files_open(kind, files, weights, plain, tmp_path):
    found, folder = released(weights, kind), tmp_path / "evo2"
    folder.mkdir()
    path = folder / f"evo2_{kind}.pt"
    if files in ("safetensors", "shards"):
        save_file = pytest.importorskip("safetensors.torch").save_file
        tensors = {name: x.clone() for name, x in found.items() if isinstance(x, torch.Tensor)}
        names = sorted(tensors)
        parts = [names] if files == "safetensors" else [names[::2], names[1::2]]
        mapped = {}
        for i, part in enumerate(parts):
            name = "model.safetensors" if len(parts) == 1 else f"model-0000{i + 1}-of-00002.safetensors"
            save_file({one: tensors[one] for one in part}, folder / name)
            mapped |= dict.fromkeys(part, name)
        if len(parts) > 1:
            (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": mapped}))
        path = folder
    else:
        torch.save(found, path)
    if files == "parts":
        data = path.read_bytes()
        path.unlink()
        for i in range(3):
            (folder / f"{path.name}.part{i}").write_bytes(data[i * len(data) // 3 : (i + 1) * len(data) // 3])
        path = folder
    if files == "hub":  # as a repository of the hub holds it
        (folder / "config.json").write_text(json.dumps({"model_name": "shc-evo2", "hidden_size": 64}))
        (folder / "README.md").write_text("x")
        path = folder
    assert api.detect(path) == "vortex"
    model, params = lcx.load(path)
    assert model == plain[0]
    same(params, plain[1])


INTERPOLATED, FACTOR = "use_interpolated_rotary_pos_emb", "rotary_emb_scaling_factor"


@pytest.mark.parametrize(
    "name, text, window, factor",
    [
        ("config.json", json.dumps({"max_seqlen": 1 << 20, INTERPOLATED: True, FACTOR: 128}), 1 << 20, 128),
        ("config.json", json.dumps({"max_seqlen": True, FACTOR: 128}), None, None),
        ("config.json", json.dumps({"max_seqlen": -1, INTERPOLATED: True, FACTOR: "x"}), None, None),
        ("config.yml", f"max_seqlen: 32768 # tokens\n{INTERPOLATED}: True\n{FACTOR}: 4.5\n", 32768, 4.5),
        ("config.yaml", f"max_seqlen: 8_192\n{INTERPOLATED}: False\n{FACTOR}: 4\n", None, None),
    ],
)
def test_vortex_configurations_state_window_and_interpolation(tmp_path, name, text, window, factor):
    (tmp_path / name).write_text(text)
    config = weight_files.beside(tmp_path / "model.pt")
    assert (weight_files.window_of(config), weight_files.interpolation_of(config)) == (window, factor)


def test_a_missing_shard_is_named(weights, tmp_path):
    save_file = pytest.importorskip("safetensors.torch").save_file
    save_file({name: x.clone() for name, x in weights.items()}, tmp_path / "model-00001-of-00002.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}})
    )
    with pytest.raises(UserError, match="model-00002-of-00002.safetensors"):
        lcx.load(tmp_path)


# ---------------------------------------------------------------------------------------------------- arithmetic


def test_every_number_is_rounded_as_torch_rounds_it():
    rng = np.random.default_rng(0)
    every = (np.arange(2**16, dtype=np.uint32) << 16).view(np.float32)  # all of bfloat16
    some = rng.integers(0, 2**32, 2**18, dtype=np.uint32).view(np.float32)
    near = (rng.standard_normal(2**18) * np.exp2(rng.uniform(-20, 12, 2**18))).astype(np.float32)
    x = np.concatenate([every, some, near])
    for ours, largest, theirs in (
        (fp8.e4m3, 448, torch.float8_e4m3fn),
        (fp8.e5m2, 57344, torch.float8_e5m2),
    ):
        expected = torch.tensor(x).clamp(-largest, largest).to(theirs).float().numpy()
        np.testing.assert_array_equal(jax.jit(ours)(x), expected)


def torch_product(x, w, scales):
    """(product, its rounded factors, scales) in torch: x [T, D], w [D, F] float32."""
    x, w = (torch.tensor(np.asarray(one, np.float32)) for one in (x, w))
    pairs = zip(scales, (x, w), strict=True)
    # torch divides a number by a tensor as number * (1 / tensor), which rounds twice; Transformer Engine divides
    sx, sw = (torch.tensor(s) if s else torch.tensor(448.0) / one.abs().max() for s, one in pairs)
    x8, w8 = ((one * s).clamp(-448, 448).to(torch.float8_e4m3fn).float() for one, s in ((x, sx), (w, sw)))
    return (x8 @ w8) * (1 / (sx * sw)), x8, w8, sx, sw


@pytest.mark.parametrize("scales", [(0.0, 0.0), (61.3, 507.1), (900.0, 4000.0)], ids=["current", "stored", "clipped"])
@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16], ids=["float32", "bfloat16"])
def test_a_projection_equals_torch_to_the_bit(scales, dtype):
    """In float32 with few enough terms that every order of summation is exact, in bfloat16 with many."""
    rng = np.random.default_rng(1)
    D = 16 if dtype == np.float32 else 256
    x = jnp.asarray(rng.standard_normal((2, 9, D)), dtype)
    w = jnp.asarray(rng.standard_normal((D, 8, 3)) / 8, np.float32)
    params = {"kernel": w, "fp8_scales": jnp.asarray(scales, jnp.float32)}
    y = Linear((D,), (8, 3), ("embed", "channels", None), fp8=True).apply({"params": params}, x)
    expected = torch_product(x.astype(jnp.float32).reshape(-1, D), w.astype(dtype).reshape(D, 24), scales)[0]
    expected = expected if dtype == np.float32 else expected.bfloat16().float()
    assert y.dtype == dtype
    if dtype == np.float32:
        np.testing.assert_allclose(np.asarray(y).reshape(-1, 24), expected.numpy(), rtol=2e-7, atol=2e-7)
    else:
        np.testing.assert_array_equal(np.asarray(y.astype(jnp.float32)).reshape(-1, 24), expected.numpy())


@pytest.mark.parametrize("platform", ["cpu", "gpu", "tpu"])  # which multiply float32, FP8 and bfloat16
def test_gradients_are_straight_through_in_e5m2(platform, monkeypatch):
    monkeypatch.setattr(fp8.dispatch, "platform", lambda: platform)
    rng = np.random.default_rng(2)
    x, w, dy = (rng.standard_normal(shape).astype(np.float32) for shape in ((7, 16), (16, 24), (7, 24)))
    x, w, dy = map(jnp.asarray, (x, w, dy))
    scales = jnp.asarray((61.3, 507.1), jnp.float32)
    multiply = functools.partial(jnp.matmul, preferred_element_type=jnp.float32)
    y, pull = jax.vjp(functools.partial(fp8.product, multiply), x, w, jnp.append(scales, 0), jnp.zeros(3))
    dx, dw, ds, seen = pull(dy)
    expected, x8, w8, sx, sw = torch_product(x, w, (61.3, 507.1))
    np.testing.assert_allclose(y, expected.numpy(), rtol=1e-6, atol=1e-6)
    dy = torch.tensor(np.asarray(dy))
    scale = torch.tensor(57344.0) / dy.abs().max()
    dy8 = (dy * scale).clamp(-57344, 57344).to(torch.float8_e5m2).float()
    np.testing.assert_allclose(dx, (dy8 @ w8.T / (scale * sw)).numpy(), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(dw, (x8.T @ dy8 / (scale * sx)).numpy(), rtol=1e-5, atol=1e-5)
    assert not np.any(ds)
    np.testing.assert_array_equal(seen, [jnp.abs(one).max() for one in (x, w, jnp.asarray(dy.numpy()))])


# --------------------------------------------------------------------------------------------------- checkpoints

SCALES = {i: (50.5 + i, 300.25 + 7 * i) for i in HYENA}


def in_fp8(weights, form, **options):
    found = released(weights, "1b")
    found |= {f"blocks.{i}.projections._extra_state": state(s, form=form, **options) for i, s in SCALES.items()}
    return found


def scales_of(params):
    blocks = params["stages_0"]
    return {i: tuple(blocks[f"block_{i}"]["mixer"]["in_proj"]["fp8_scales"][0].tolist()) for i in HYENA}


@pytest.fixture(scope="module")
def fp8_file(weights, tmp_path_factory):
    path = tmp_path_factory.mktemp("fp8") / "evo2_1b.pt"
    torch.save(in_fp8(weights, "BytesIO"), path)
    return path


@pytest.mark.parametrize("form", ["BytesIO", "uint8", "bytes", "BytesIO with recipe", "uint8 with recipe"])
def test_scales_are_read_from_every_form(form, weights, tmp_path, monkeypatch):
    monkeypatch.setattr(Recipe, "__module__", "transformer_engine.common.recipe")
    names = ("transformer_engine", "transformer_engine.common", "transformer_engine.common.recipe")
    for name in names:
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    sys.modules[names[-1]].Recipe = Recipe
    form, _, recipe = form.partition(" ")
    torch.save(in_fp8(weights, form, recipe=bool(recipe)), tmp_path / "evo2.pt")
    for name in names:
        monkeypatch.delitem(sys.modules, name)
    model, params = lcx.load(tmp_path / "evo2.pt")
    assert [block.mixer.fp8 for block in model.stages[0].pattern[:3]] == [True] * 3
    assert scales_of(params) == SCALES


def test_the_model_computes_in_fp8_by_default(fp8_file, plain, caplog):
    tokens = np.frombuffer(b"ACGTTGCATTAC", np.uint8)[None].astype(np.int32)
    model, params = lcx.load(fp8_file)
    found = lcx.logits(model, params, tokens)

    def emulated(model, params):
        with nn.intercept_methods(rounded):
            return model.apply({"params": params}, tokens)

    def rounded(next_fun, args, kwargs, context):  # an emulation of its own, in the place of the projections' products
        if isinstance(context.module, Linear) and context.module.fp8:
            kernel, scales = (context.module.get_variable("params", n) for n in ("kernel", "fp8_scales"))
            pairs = zip(scales, (args[0], kernel), strict=True)
            scales = [jnp.where(scale > 0, scale, 448 / jnp.abs(value).max()) for scale, value in pairs]
            x8, w8 = (
                jnp.clip(value * scale, -448, 448).astype(jnp.float8_e4m3fn).astype(jnp.float32)
                for value, scale in zip((args[0], kernel), scales, strict=True)
            )
            return jnp.einsum("btd,dcr->btcr", x8, w8) / (scales[0] * scales[1])
        return next_fun(*args, **kwargs)

    np.testing.assert_allclose(found, emulated(model, params), atol=2e-4)
    assert np.abs(found - lcx.logits(*plain, tokens)).max() > 1e-2
    with caplog.at_level(logging.WARNING):
        without = lcx.load(fp8_file, input_projections="plain")
    assert "without FP8" in caplog.text
    assert without[0] == plain[0]
    same(without[1], plain[1])
    current = lcx.load(fp8_file.parent, input_projections="fp8", dtype="bfloat16")
    assert scales_of(current[1]) == SCALES  # in float32, whatever the dtype
    added = with_input_projections(*plain, "fp8")
    np.testing.assert_allclose(lcx.logits(*added, tokens), emulated(*added), atol=2e-4)
    with pytest.raises(UserError, match="expected one of fp8, plain"):
        lcx.load(fp8_file, input_projections="int8")


@pytest.mark.parametrize("middle", ["savanna", "vortex", "lcx"])
def test_scales_are_kept_both_ways(middle, fp8_file, tmp_path):
    model, params = lcx.load(fp8_file)
    words = [f"--src={fp8_file}", f"--dst={tmp_path / '0'}", f"--dst_format={middle}"]
    assert main(words + ["--model_parallel=2"] * (middle == "savanna")) == 0
    api.write(tmp_path / "1", api.source(tmp_path / "0"), format="vortex")
    again, found = lcx.load(tmp_path / "1")
    assert scales_of(found) == SCALES and [s.pattern for s in again.stages] == [s.pattern for s in model.stages]
    written = torch.load(tmp_path / "1" / "model.pt", weights_only=True)
    read = pickle.loads(written["blocks.1.projections._extra_state"].numpy().tobytes())  # as Transformer Engine does
    assert read["scale_fwd"].tolist() == [*SCALES[1], 1.0] and read["amax_history_fwd"].shape == (16, 3)
    assert torch.equal(read["amax_history_fwd"][:, :2], history_of(SCALES[1])[:, :2])
    del params


@pytest.mark.parametrize("said", [True, False])
def test_a_configuration_decides(said, weights, tmp_path, caplog):
    torch.save(released(weights, "1b") if said else in_fp8(weights, "uint8"), tmp_path / "evo2.pt")
    (tmp_path / "config.yml").write_text(f"model_name: x\nuse_fp8_input_projections: {said}\n")
    model, params = lcx.load(tmp_path / "evo2.pt")
    assert model.stages[0].pattern[0].mixer.fp8 is said
    if said:
        assert scales_of(params) == dict.fromkeys(HYENA, (0.0, 0.0))  # current scaling


class Hostile:
    def __reduce__(self):
        return os.system, ("touch executed",)


@pytest.mark.parametrize("wrap", [pickle.dumps, lambda x: pickle.dumps({"scale_fwd": x}), lambda _: b"\x80\x04garbage"])
def test_nothing_in_a_state_is_executed(wrap, weights, tmp_path, monkeypatch, caplog):
    monkeypatch.chdir(tmp_path)
    found = in_fp8(weights, "uint8")
    found["blocks.0.projections._extra_state"] = torch.frombuffer(bytearray(wrap(Hostile())), dtype=torch.uint8)
    torch.save(found, "evo2.pt")
    with caplog.at_level(logging.WARNING):
        _, params = lcx.load("evo2.pt")
    assert "1 FP8 states are not read, and their scales not used" in caplog.text
    assert not os.path.exists("executed")
    assert scales_of(params) == SCALES | {0: (0.0, 0.0)}


def test_lora_reaches_the_projections(fp8_file):
    model, _ = lcx.load(fp8_file)
    paths = lora_lib.LoRA(rank=2).paths(model)
    names = {path.rpartition("/")[2] for path in paths}
    assert names == {"in_proj", "out_proj", "q_proj", "k_proj", "v_proj", "o_proj"}


def test_a_state_of_ours_is_read_back():
    history = np.random.default_rng(0).random((16, 3), np.float32)
    for scales, expected in (((3.0, 5.5), (3.0, 5.5)), ((0.0, 5.5), (1.0, 5.5))):
        read = fp8_states.read(fp8_states.written(fp8_states.State(scales, 7.0, history)))
        assert read.scales == expected and read.gradient_scale == 7
        np.testing.assert_array_equal(read.history, history)
    assert fp8_states.read(b"") is None and fp8_states.read(pickle.dumps(None)) is None
