"""LoLCATS files on a Hugging Face folder: the published model's logits, round trips to the bit."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from flax.traverse_util import flatten_dict, unflatten_dict
from lolcats_files import (  # noqa: F401
    FACTORS,
    SETTINGS,
    files_fixture,
    is_map,
    load,
    made_fixture,
    published_fixture,
    state,
    tensors_of,
)

import lcx
from lcx import model as model_lib
from lcx.checkpoint import Checkpointer
from lcx.convert.__main__ import main
from lcx.convert.files.safetensors import SafetensorsFile
from lcx.convert.lolcats import settings as lolcats_settings
from lcx.convert.lolcats import writer as lolcats_writer
from lcx.convert.lolcats.format import Lolcats, LolcatsSource
from lcx.convert.peft import adapter as peft
from lcx.convert.workdir.source import read_meta
from lcx.errors import UserError
from lcx.linearize import Linearize
from lcx.lora import LoRA
from lcx.mixers.linear_attention import LinearAttention
from lcx.objectives import attention_transfer


def collection(model, tensors):
    """Pairs by their published names as the `lora` collection."""
    lora = LoRA(rank=8, alpha=16.0).init(jax.random.key(0), model)
    for name, (part,) in peft.modules(model).items():
        module = f"base_model.model.{name}.lora_"
        if f"{module}A.default.weight" in tensors:
            node = lora
            for key in part.path.split("/"):
                node = node[key]
            for key, side in (("a", "A"), ("b", "B")):
                matrix = tensors[f"{module}{side}.default.weight"].numpy().T
                node[key] = node[key].at[part.repeat].set(matrix.reshape(node[key].shape[1:]))
    return lora


def assert_equal_states(found, expected):
    assert list(found) == list(expected) or set(found) == set(expected)
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name


def assert_same(found, expected):
    (model, params), (wanted, values) = found, expected
    assert model == wanted
    jax.tree.map(np.testing.assert_array_equal, params, values)
    assert jax.tree.map(lambda x: x.dtype, params) == jax.tree.map(lambda x: x.dtype, values)


# ------------------------------------------------------------------------------------------------- reading


def test_logits_of_the_published_model(published, made):
    tokens = jnp.array(published["input_ids"], jnp.int32)
    start = Lolcats(made / "start_distill.pt", None, SETTINGS)
    after = Lolcats(made / "x_distill.pt", made / "x_ft.pt", SETTINGS, lora_alpha=16)
    for files, name in ((start, "student/logits"), (after, "stage2/merged_logits")):
        logits = lcx.logits(*lcx.load(made / "hf", lolcats=files), tokens)
        np.testing.assert_allclose(logits, published[name], atol=2e-5 * np.abs(published[name]).max())


def test_greedy_generation_of_the_published_model(published, made):
    """A prompt of 13 tokens, no multiple of the window: its blocks are counted from the end."""
    files = Lolcats(made / "start_distill.pt", None, SETTINGS, published_quirks=True)
    model, params = lcx.load(made / "hf", lolcats=files)
    prompt, wanted = jnp.array(published["gen/prompt"], jnp.int32), published["gen/logits"]

    @jax.jit
    def run(tokens, cache):
        x, cache = model.apply({"params": params}, tokens, cache=cache, method="hidden")
        return x[:, -1] @ model.head(params).T, cache

    logits, cache = run(prompt, model.init_cache(2, 40))
    found = [logits]
    for token in published["gen/tokens"].T:
        np.testing.assert_array_equal(jnp.argmax(found[-1], axis=-1), token)
        logits, cache = run(jnp.array(token, jnp.int32)[:, None], cache)
        found.append(logits)
    np.testing.assert_allclose(jnp.stack(found, axis=1), wanted, atol=2e-5 * np.abs(wanted).max())


def trained(loss, values, rows, lr):
    """(losses, values at the end) of AdamW, two rows an update."""
    optimizer = optax.adamw(lr, weight_decay=0.0)

    @jax.jit
    def update(values, state, two):
        losses, grads = jax.vmap(jax.value_and_grad(loss), (None, 0))(values, two)
        updates, state = optimizer.update(jax.tree.map(lambda g: g.mean(0), grads), state, values)
        return losses, optax.apply_updates(values, updates), state

    state, losses = optimizer.init(values), []
    for two in jnp.array(rows, jnp.int32).reshape(-1, 2, 1, rows.shape[-1]):
        found, values, state = update(values, state, two)
        losses += found.tolist()
    return losses, values


def test_published_attention_transfer(published, made):
    """Twelve rows, six updates: our objective and mixer, their feature maps before and after."""
    model, params = lcx.load(made / "hf", lolcats=Lolcats(made / "start_distill.pt", None, SETTINGS))
    flat, (_, after) = flatten_dict(params, sep="/"), load(made, lora=False)
    learned = {path: x for path, x in flat.items() if is_map(path)}

    def loss(learned, tokens):
        places = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        batch = {"tokens": tokens, "positions": places, "segment_ids": jnp.ones_like(tokens)}
        total, count = attention_transfer(model, {"params": unflatten_dict(flat | learned, sep="/")}, batch)
        return total / count

    losses, learned = trained(loss, learned, published["train1/data"], 1e-2)
    np.testing.assert_allclose(losses, published["train1/losses"], rtol=2e-5)
    after = flatten_dict(after, sep="/")
    for path, x in learned.items():
        np.testing.assert_allclose(x, after[path], atol=2e-5 * np.abs(after[path]).max(), err_msg=path)


def test_published_lora(published, made):
    """Eight rows, four updates on the maps that attention transfer left."""
    model, params = load(made, lora=False)
    start, end = (
        collection(model, tensors_of(published, f"stage2/lora_{name}/")) for name in ("init", "final")
    )

    def loss(lora, tokens):
        logits = model.apply({"params": params, "lora": lora}, tokens)[:, :-1]
        chosen = jnp.take_along_axis(jax.nn.log_softmax(logits), tokens[:, 1:, None], axis=-1)
        return -jnp.mean(chosen)

    losses, lora = trained(loss, start, published["train1/data"][:8], 1e-4)
    np.testing.assert_allclose(losses, published["stage2/losses"], rtol=2e-5)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=2e-6), lora, end)


def test_every_way_to_give_the_files(published, files):
    expected = load(files)
    maps, pairs = state(files / "x_distill.pt"), state(files / "x_ft.pt")
    whole = {**maps, **pairs}
    torch.save(whole, files / "model.pt")
    given = [Lolcats(files / "model.pt", None, SETTINGS)]
    for prefix in ("model.", "base_model.model."):
        renamed = {name if name in pairs else prefix + name: x for name, x in whole.items()}
        aliases = {f"{prefix}{FACTORS.format(i)}"[:-1]: maps[FACTORS.format(i)] for i in (0, 1)}
        torch.save({"model_state_dict": renamed | aliases}, files / f"{prefix}pt")
        given.append(Lolcats(files / f"{prefix}pt", None, SETTINGS))
    shutil.copy(files / "x_distill.pt", files / "dl-m=distill_llama_lk_smd_wtk8_fd8_w01-s=0_distill.pt")
    given.append(Lolcats(files / "dl-m=distill_llama_lk_smd_wtk8_fd8_w01-s=0_distill.pt", files / "x_ft.pt"))
    (files / "c.yaml").write_text(
        "model: {name: llama}\nattention:\n  attention_type: lolcats_llama_window_tk\n  window_size: 8\n"
        "  layer_idx: null # to set\n  feature_map: softmax_dim\n  feature_map_kwargs: {eps: 1e-12, fullspace: true}\n"
        "  learned_kernel: untied_head_einsum\n  learned_kernel_kwargs: {feature_dim: 8, bias: false}\n"
    )
    given.append(Lolcats(files / "x_distill.pt", files / "x_ft.pt", files / "c.yaml", lora_alpha=16.0))
    for one in given:
        assert_same(lcx.load(files / "hf", lolcats=one), expected)
    for name in ("x_distill.pt", "x_ft.pt"):
        shutil.copy(files / name, files / "hf" / name)
    (files / "hf" / "lolcats.json").write_text(json.dumps({"attention": SETTINGS}))
    assert_same(lcx.load(files / "hf"), expected)


def test_maps_trained_on_in_the_second_stage_count(published, files):
    pairs = state(files / "x_ft.pt")
    name = FACTORS.format(1)
    torch.save(
        {"model_state_dict": pairs | {f"base_model.model.{name}": torch.ones(1, 4, 1, 1)}}, files / "x_ft.pt"
    )
    _, params = load(files)
    factors = params["stages_0"]["block_0"]["mixer"]["window_factors"]
    np.testing.assert_array_equal(factors[1], np.ones(4))
    np.testing.assert_array_equal(factors[0], published["train1/final/" + FACTORS.format(0)].reshape(-1))


VARIANTS = {
    "t2r": Linearize(window=None, feature_map="relu", feature_dim=16, feature_bias=True),
    "sliding_affine_tied_half": Linearize(
        5, "sliding", 0.5, feature_dim=6, full_space=False, tied=True, affine=True, published_quirks=True
    ),
    "adapter": Linearize(8, adapter=3, feature_dim=16, feature_map="exp_dim"),
    "skip_elu_first_softmax": Linearize(
        8, feature_dim=16, skip=True, feature_map="pos_elu", feature_init="identity", keep_softmax=(0,)
    ),
}


@pytest.mark.parametrize("linearize", VARIANTS.values(), ids=VARIANTS)
def test_every_variant_there_and_back(linearize, files, tmp_path):
    """The folder says all that is needed, and its feature maps alone with the .json do too."""
    softmax, _ = lcx.load(files / "hf")
    model, rng = linearize.model(softmax), np.random.default_rng(0)
    params = jax.tree.map(
        lambda x: rng.normal(size=x.shape).astype(x.dtype), model_lib.abstract_params(model)
    )
    lcx.save(tmp_path / "out", model, params, format="lolcats")
    assert_same(lcx.load(tmp_path / "out"), (model, params))
    maps = Lolcats(tmp_path / "out" / "model_distill.pt", None, tmp_path / "out" / "lolcats.json")
    shutil.copy(tmp_path / "out" / "model.safetensors", files / "hf" / "model.safetensors")
    assert_same(lcx.load(files / "hf", lolcats=maps), (model, params))
    found = set(state(tmp_path / "out" / "model_distill.pt"))
    assert {int(name.split(".")[2]) for name in found} == {0, 1} - set(linearize.keep_softmax)


def test_blocks_that_were_trained_apart(files):
    """Their names count from 0 in every block; the file's name says from where."""
    expected, maps = load(files, lora=False), state(files / "x_distill.pt")
    (files / "blocks").mkdir()
    for i in (0, 1):
        own = {name.replace(f".{i}.", ".0."): x for name, x in maps.items() if f"layers.{i}." in name}
        torch.save({"model_state_dict": own}, files / "blocks" / f"x-in={i:03d}-out={i:03d}_distill.pt")
    assert_same(lcx.load(files / "hf", lolcats=Lolcats(files / "blocks", None, SETTINGS)), expected)
    (files / "blocks" / "x-in=000-out=000_distill.pt").unlink()
    with pytest.raises(UserError, match="3 tensors are missing.*layers.0"):
        lcx.load(files / "hf", lolcats=Lolcats(files / "blocks", None, SETTINGS))


def test_bfloat16_files(files):
    halved = {name: x.bfloat16() for name, x in state(files / "x_distill.pt").items()}
    torch.save({"model_state_dict": halved}, files / "x_distill.pt")
    model, params = load(files)
    mixer = params["stages_0"]["block_0"]["mixer"]
    assert (
        mixer["feature_map_q"]["layer"].dtype == jnp.bfloat16
        and mixer["q_proj"]["kernel"].dtype == jnp.float32
    )
    assert model.dtype == "float32"


# ------------------------------------------------------------------------------------------------- commands


def convert(src, dst, dst_format, *more):
    return main([f"--src={src}", f"--dst={dst}", f"--dst_format={dst_format}", *more])


def test_commands(files, tmp_path, capsys):
    given = [f"--feature_maps={files / 'x_distill.pt'}", f"--attention={json.dumps(SETTINGS)}"]
    assert convert(files / "hf", tmp_path / "run", "lcx", *given, f"--lora={files / 'x_ft.pt'}") == 0
    assert "read back and checked" in capsys.readouterr().out
    expected = load(files)
    assert_same(lcx.load(tmp_path / "run"), expected)
    assert convert(tmp_path / "run", tmp_path / "out", "lolcats") == 0
    assert "verified: the same model and the same numbers" in capsys.readouterr().out
    assert_same(lcx.load(tmp_path / "out"), expected)
    assert_equal_states(state(tmp_path / "out" / "model_distill.pt"), state(files / "x_distill.pt"))
    assert convert(tmp_path / "out", tmp_path / "hf", "hf") == 2
    assert "format 'lcx'" in capsys.readouterr().err
    assert convert(files / "hf", tmp_path / "no", "lolcats") == 2
    assert "no linear attention" in capsys.readouterr().err
    assert convert(files / "hf", tmp_path / "no", "lolcats_files") == 2
    assert (
        "holds a model of format 'hf'; 'lolcats_files' is written from the workdir"
        in capsys.readouterr().err
    )
    assert convert(files / "x_distill.pt", tmp_path / "no", "lcx") == 2
    assert "pass that folder, and this file as --feature_maps" in capsys.readouterr().err
    assert convert(files / "hf", tmp_path / "no", "lcx", "--src_format=hf", *given) == 2
    assert "expected 'lolcats'" in capsys.readouterr().err
    assert not (tmp_path / "no").exists()


def test_a_run_with_lora_leaves_both_files(files, tmp_path, capsys):
    """To the bit, from a checkpoint and from memory; the pairs are those of PEFT."""
    model, params = load(files, lora=False)
    lora = collection(model, state(files / "x_ft.pt"))
    lolcats_writer.save(tmp_path / "memory", model, params, lora)
    lcx.save(tmp_path / "lcx", model, params, format="lcx")
    with Checkpointer(tmp_path / "run" / "checkpoints") as checkpointer:
        meta = read_meta(tmp_path / "lcx" / "checkpoints" / "0")
        checkpointer.save(1, {"params": params, "lora": lora}, json={"meta": meta})
    assert convert(tmp_path / "run", tmp_path / "disk", "lolcats_files") == 0
    assert "lolcats.json, model_distill.pt, model_ft.pt, read back" in capsys.readouterr().out
    for folder in (tmp_path / "memory", tmp_path / "disk"):
        for name in ("distill", "ft"):
            assert_equal_states(state(folder / f"model_{name}.pt"), state(files / f"x_{name}.pt"))
        kwargs = json.loads((folder / "lolcats.json").read_text())["finetune"]["kwargs"]
        assert (kwargs["r"], kwargs["lora_alpha"]) == (8, 16)
        parts = Lolcats(folder / "model_distill.pt", folder / "model_ft.pt")
        for given in (
            Lolcats(folder),
            parts,
            Lolcats(folder, folder),
        ):  # what lies beside them states the window
            assert_same(lcx.load(files / "hf", lolcats=given), load(files))
    with pytest.raises(UserError, match="already exists"):
        lolcats_writer.export(tmp_path / "run", tmp_path / "disk")
    lolcats_writer.export(tmp_path / "run", tmp_path / "disk", overwrite=True)
    assert convert(tmp_path / "run", tmp_path / "peft", "peft") == 0
    assert "warning: the pairs were trained on " in capsys.readouterr().out
    with pytest.raises(UserError, match="the adapter trained on .* LinearAttention, and this model has .* Attention"):
        lcx.load(files / "hf", adapter=tmp_path / "peft")
    with Checkpointer(tmp_path / "run" / "checkpoints") as checkpointer:
        moments = {"mu": {"params": {"final_norm": {"scale": jax.numpy.ones(3)}}}}
        items = {"params": params, "lora": lora, "opt_state": {"1": moments}}
        checkpointer.save(2, items, json={"meta": meta})
    with pytest.raises(UserError, match="1 parameters trained that are neither .*, such as final_norm/scale"):
        lolcats_writer.export(tmp_path / "run", tmp_path / "disk", overwrite=True)
    lora["stages_0"]["block_0"]["mixer"]["q_proj"]["scale"] *= 2
    with pytest.raises(UserError, match="2 ranks or scales"):
        lolcats_writer.save(tmp_path / "other", model, params, lora)


# ------------------------------------------------------------------------------------------------- settings, memory


def test_layers_of_different_settings_are_refused(files, tmp_path):
    model, params = load(files)
    mixer = model.stages[0].pattern[0].mixer
    blocks = tuple(
        model.stages[0].pattern[0].clone(mixer=mixer.clone(window=w, parent=None), parent=None)
        for w in (4, 8)
    )
    model = model.clone(stages=(model_lib.Stage(blocks),), parent=None)
    halves = {
        f"block_{i}": jax.tree.map(lambda x, i=i: x[i : i + 1], params["stages_0"]["block_0"]) for i in (0, 1)
    }
    with pytest.raises(UserError, match="2 different settings"):
        lcx.save(tmp_path / "out", model, params | {"stages_0": halves}, format="lolcats")


def test_the_configuration_that_is_written_is_read_again():
    mixer = LinearAttention(4, 2, 16, window=None, feature_bias=True)
    stated = lolcats_settings.read(lolcats_settings.to_json(mixer, [1], {"r": 4, "lora_alpha": 8}))
    assert stated.lora_alpha == 8 and stated.get("softmax_attentions", None) == [1]
    assert stated.get("learned_kernel_kwargs.bias", None) is True
    assert lolcats_settings.window_of(stated, has_factors=False)[0] is None


def test_memory_is_a_layer_of_one_parameter(files):
    """Rows are merged as they are read: nothing else of the folder is touched."""
    source = LolcatsSource(files / "hf", Lolcats(files / "x_distill.pt", files / "x_ft.pt", SETTINGS))
    asked = []
    original = SafetensorsFile.read

    def read(self, name, start=0, stop=None):
        asked.append((name, start, stop))
        return original(self, name, start, stop)

    path = "stages_0/block_0/mixer/q_proj/kernel"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SafetensorsFile, "read", read)
        part = source.read(path, (slice(1, 2), slice(0, 64), slice(1, 2), slice(0, 16)))
    assert asked == [("model.layers.1.self_attn.q_proj.weight", 16, 32)]
    whole = source.read(path, (slice(0, 2), slice(0, 64), slice(0, 4), slice(0, 16)))
    # A product of fewer rows may be summed in another order, so that the last bit differs.
    np.testing.assert_allclose(part, whole[1:2, :, 1:2], rtol=0, atol=1e-7)
