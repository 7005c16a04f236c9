"""Evo 2's checkpoints in and out: the published files and logits, every way to split them, files that are no good."""

import argparse
import collections
import io
import json
import logging
import os
import shutil
import tracemalloc

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import lcx
from lcx import model as model_lib
from lcx.convert import api, formats
from lcx.convert.__main__ import main
from lcx.convert.evo2 import savanna, vortex
from lcx.convert.evo2 import striped_hyena as stripedhyena
from lcx.convert.files import tensor_io
from lcx.convert.hf.rope_parameters import to_hf
from lcx.data import ByteTokenizer
from lcx.errors import UserError
from lcx.extend import extend_model, rotaries
from lcx.generate import main as generate_main
from lcx.rope import Rope
from lcx.striped_hyena import striped_hyena
from lcx.terminal import tokenizer_of

MR = "sequential.3.mixer.mixer.filter."
ATTENTION = "sequential.5.mixer."


@pytest.fixture(scope="module")
def published(reference):
    load_file = pytest.importorskip("safetensors.torch").load_file
    return lambda name: load_file(reference / "reference" / "evo2" / f"{name}.safetensors")


@pytest.fixture
def state(published):
    return published("tiny_a_savanna_weights")


def save_ranks(folder, states, **beside):
    folder.mkdir(parents=True)
    for rank, state in enumerate(states):
        torch.save({"module": state, **beside}, folder / f"mp_rank_{rank:02d}_model_states.pt")
    return folder


def ranks(folder):
    files = sorted((folder / "global_step0").iterdir())
    return [torch.load(file, weights_only=True)["module"] for file in files]


def assert_equal_states(found, expected):
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name


def convert(src, dst, dst_format, *more):
    return main([f"--src={src}", f"--dst={dst}", f"--dst_format={dst_format}", *more])


def arrays(params):
    return jax.tree.map(np.asarray, params)


def assert_same_params(found, expected):
    jax.tree.map(np.testing.assert_array_equal, arrays(found), arrays(expected))


# ------------------------------------------------------------------------------------------------- reading


def test_logits_of_savanna_and_vortex(published, state, tmp_path):
    io = published("tiny_a_savanna_io")
    torch.save({"module": state}, tmp_path / "evo2.pt")
    torch.save(published("tiny_a_vortex_weights"), tmp_path / "vortex.pt")
    for name, length in (("evo2.pt", 256), ("vortex.pt", 8192)):
        model, params = lcx.load(tmp_path / name)
        assert model.max_position_embeddings == length and model.tie_word_embeddings
        logits = lcx.logits(model, params, jnp.asarray(io["tokens"].numpy()))
        np.testing.assert_allclose(logits, io["logits"].numpy(), atol=3e-4)
        assert tokenizer_of(str(tmp_path / name)) == ByteTokenizer(bos_id=None, eos_id=0, vocab_size=512)


def every_kind(state, folder):
    """The same weights in every kind of file that they are published or trained in."""
    two = dict(state)
    run = folder / "run"
    save_ranks(run / "global_step10", [{name: x * 0 for name, x in two.items()}])
    save_ranks(
        run / "global_step9",
        [two],
        mp_world_size=1,
        iteration=9,
        ds_config={"zero": 1},
        args=argparse.Namespace(a=1),
        np_rng_state=np.random.RandomState(0).get_state(),
        scalar=np.float32(3),
    )
    (run / "latest").write_text("global_step9\n")
    yield run
    yield run / "global_step9"
    torch.save({"module": two}, folder / "whole.pt")
    data = (folder / "whole.pt").read_bytes()
    cuts = [0, 1000, len(data) // 2, len(data)]
    (folder / "pieces").mkdir()
    for i in range(3):
        (folder / "pieces" / f"evo2.pt.part{i}").write_bytes(data[cuts[i] : cuts[i + 1]])
    yield folder / "pieces"
    yield folder / "pieces" / "evo2.pt"
    yield folder / "pieces" / "evo2.pt.part1"
    fast = {n: x.squeeze(1) if n.endswith("proj_conv.short_conv_weight") else x for n, x in two.items()}
    fast |= {"sequential.2.mixer.dense._extra_state": torch.zeros(3, dtype=torch.uint8)}
    fast |= {"sequential.3.mixer.dense._extra_state": io.BytesIO(b"scales")}
    fast["sequential.6.norm.weight"] = fast.pop("sequential.7.norm.scale")  # where the 20B has it
    torch.save(collections.OrderedDict(fast), folder / "bare.pt")
    yield folder / "bare.pt"


def test_every_kind_of_file(state, tmp_path):
    torch.save({"module": state}, tmp_path / "evo2.pt")
    model, params = lcx.load(tmp_path / "evo2.pt")
    for path in every_kind(state, tmp_path / "kinds"):
        assert api.detect(path) == "savanna"
        found_model, found = lcx.load(path)
        assert found_model == model, path
        assert_same_params(found, params)


def test_legacy_rows_are_interleaved_rank_by_rank(published, tmp_path):
    """On one rank to the published tool's bits; on two as each rank of the published tool would do it alone."""
    legacy, expected = published("tools_legacy_te_mp_rank_00"), published("tools_interleaved_mp_rank_00")
    save_ranks(tmp_path / "one", [legacy])
    assert convert(tmp_path / "one", tmp_path / "out", "savanna", "--src_format=savanna_legacy") == 0
    assert_equal_states(ranks(tmp_path / "out")[0], expected)
    halves = [published(f"tools_mp2_mp_rank_0{rank}") for rank in range(2)]
    blocks = []
    for half in halves:
        mixed = dict(half)
        for layer in (2, 3, 4):
            for name in (stripedhyena.PROJECTION, stripedhyena.FEATURIZER):
                rows = mixed[f"sequential.{layer}.{name}"]
                by_role = rows.reshape(-1, 3, *rows.shape[1:]).transpose(0, 1).reshape(rows.shape)
                mixed[f"sequential.{layer}.{name}"] = by_role.contiguous()
        blocks.append(mixed)
    save_ranks(tmp_path / "two", blocks)
    assert convert(tmp_path / "two", tmp_path / "merged", "savanna", "--src_format=savanna_legacy") == 0
    assert_equal_states(ranks(tmp_path / "merged")[0], expected)


def test_partial_reads(published, tmp_path):
    """Rows across ranks, roles and heads are those of the whole."""
    save_ranks(tmp_path / "two", [published(f"tools_mp2_mp_rank_0{rank}") for rank in range(2)])
    source = savanna.SavannaSource(tmp_path / "two", legacy=True)
    for path, info in source.leaves.items():
        whole = source.read(path, tuple(slice(0, size) for size in info.shape))
        for axis, size in enumerate(info.shape):
            low, high = size // 3, max(size // 3 + 1, size - size // 4)
            index = tuple(slice(low, high) if i == axis else slice(0, n) for i, n in enumerate(info.shape))
            np.testing.assert_array_equal(source.read(path, index), whole[index])


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_frequencies_are_those_of_the_file(state, tmp_path, caplog, dtype):
    """To the bit those of a base, or rounded: then they are listed, reported, and kept by position interpolation."""
    name = ATTENTION + "rotary_emb.inv_freq"
    exact = torch.tensor(np.asarray(Rope(rope_theta=1e6).frequencies(16, 1)[0]))
    state[name] = exact if dtype is None else exact.to(dtype)
    torch.save({"module": state}, tmp_path / "evo2.pt")
    with caplog.at_level(logging.WARNING):
        model, _ = lcx.load(tmp_path / "evo2.pt", rope_scaling={"rope_type": "linear", "factor": 4.0})
    rope = model.stages[0].pattern[3].mixer.rope
    assert (rope.rope_type, rope.rope_theta, rope.factor) == ("linear", 1e6, 4.0)
    assert model.max_position_embeddings == 1024
    np.testing.assert_array_equal(rope.frequencies(16, 1)[0], state[name].float().numpy() / 4)
    assert ("the bfloat16 rounding of 1e+06" in caplog.text) == (dtype is not None)
    assert convert(tmp_path / "evo2.pt", tmp_path / "mp2", "savanna", "--model_parallel=2") == 0
    assert all(
        torch.equal(share[name], state[name]) and share[name].dtype == state[name].dtype
        for share in ranks(tmp_path / "mp2")
    )
    base = '--rope_scaling={"rope_type": "default", "rope_theta": 1e11}'
    assert convert(tmp_path / "evo2.pt", tmp_path / "abf", "savanna", base) == 0
    found = ranks(tmp_path / "abf")[0][name]
    np.testing.assert_array_equal(found, Rope(rope_theta=1e11).frequencies(16, 1)[0])
    if dtype is not None:
        with pytest.raises(UserError, match="computes them from rope_theta"):
            lcx.load(tmp_path / "evo2.pt", rope_scaling={"rope_type": "ntk", "factor": 4.0})


def test_listed_frequencies_are_checked():
    with pytest.raises(UserError, match="inv_freq has 2 numbers, expected 8"):
        Rope(inv_freq=(1.0, 0.1)).frequencies(16, 1)
    with pytest.raises(UserError, match="inv_freq has no effect on rope_type 'ntk'"):
        Rope(rope_type="ntk", factor=2.0, inv_freq=(1.0, 0.1))
    with pytest.raises(UserError, match="no list of inv_freq"):
        to_hf(Rope(inv_freq=(1.0, 0.1)), max_position_embeddings=8)


# ------------------------------------------------------------------------------------------------- writing


def test_any_number_of_ranks_and_back(published, tmp_path, capsys):
    """1 -> 2 (the published tool's bits) -> 4 -> 1, with the dead taps and unused norms that the first one had."""
    start = published("tools_interleaved_mp_rank_00")
    save_ranks(tmp_path / "mp1", [start])
    assert convert(tmp_path / "mp1", tmp_path / "mp2", "savanna", "--model_parallel=2") == 0
    out = capsys.readouterr().out
    assert "read back and checked: 55 tensors" in out and "so the same logits" in out
    for rank, found in enumerate(ranks(tmp_path / "mp2")):
        assert_equal_states(found, published(f"tools_mp2_mp_rank_0{rank}"))
    assert convert(tmp_path / "mp2", tmp_path / "mp4", "savanna", "--model_parallel=4") == 0
    assert convert(tmp_path / "mp4", tmp_path / "back", "savanna") == 0
    assert_equal_states(ranks(tmp_path / "back")[0], start)
    file = torch.load(tmp_path / "mp4/global_step0/mp_rank_03_model_states.pt", weights_only=True)
    assert (file["mp_world_size"], file["dp_world_size"]) == (4, 1)
    shapes = file["param_shapes"][0]
    assert shapes["sequential.3.mixer.mixer.filter.h"] == (4, 256)
    assert not any(name.endswith(("decay", "inv_freq", ".t")) for name in shapes)


def test_through_lcx(published, tmp_path, capsys):
    """A model has no dead taps and no unused norms; what it has returns to the bit."""
    start = published("tools_interleaved_mp_rank_00")
    save_ranks(tmp_path / "mp1", [start])
    assert convert(tmp_path / "mp1", tmp_path / "lcx", "lcx") == 0
    assert convert(tmp_path / "lcx", tmp_path / "out", "savanna", "--model_parallel=2") == 0
    assert convert(tmp_path / "out", tmp_path / "one", "savanna") == 0
    expected = dict(start)
    for name, tensor in start.items():
        if name.startswith(MR) and name.endswith((".h", ".decay")):
            expected[name] = torch.where(torch.arange(256) < 128, tensor, 0)
        if "post_attention_layernorm" in name or "outer_mlp_layernorm" in name:
            expected[name] = torch.ones_like(tensor)
    assert_equal_states(ranks(tmp_path / "one")[0], expected)
    out = capsys.readouterr().out.splitlines()
    assert sum("so the same logits" in line for line in out) == 3


def test_another_length(published, tmp_path):
    """As the published tool extends filters: 128 taps copied, zeros behind them, times counted anew."""
    start = published("tools_interleaved_mp_rank_00")
    save_ranks(tmp_path / "mp1", [start])
    scaling = '--rope_scaling={"rope_type": "linear", "factor": 4.0}'
    assert convert(tmp_path / "mp1", tmp_path / "long", "savanna", "--model_parallel=2", scaling) == 0
    assert convert(tmp_path / "long", tmp_path / "one", "savanna") == 0
    expected = dict(start)
    for name in ("h", "decay"):
        expected[MR + name] = torch.nn.functional.pad(start[MR + name][:, :128], (0, 1024 - 128))
    expected["sequential.4.mixer.mixer.filter.t"] = torch.arange(1024.0)[None, None]
    assert_equal_states(ranks(tmp_path / "one")[0], expected)
    assert lcx.load(tmp_path / "one")[0].max_position_embeddings == 1024


def test_to_vortex_and_back(published, state, tmp_path, capsys):
    torch.save({"module": state}, tmp_path / "evo2.pt")
    assert convert(tmp_path / "evo2.pt", tmp_path / "vortex", "vortex") == 0
    out = capsys.readouterr().out
    assert "4 parameters are stored otherwise" in out and "verified: logits differ by " in out
    found, expected = (
        torch.load(tmp_path / "vortex" / vortex.FILE, weights_only=True),
        published("tiny_a_vortex_weights"),
    )
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-6, atol=0)
    assert api.detect(tmp_path / "vortex") == "vortex"
    assert convert(tmp_path / "vortex", tmp_path / "lcx", "lcx") == 0
    scaling = '{"rope_type": "linear", "factor": 4}'
    assert convert(tmp_path / "lcx", tmp_path / "again", "vortex", f"--rope_scaling={scaling}") == 0
    plain, scaled = (api.source(tmp_path / name).model for name in ("lcx", "again"))
    wanted = extend_model(plain, json.loads(scaling), None)
    assert scaled.max_position_embeddings == wanted.max_position_embeddings == 1024  # from its config.json
    assert rotaries(scaled) == rotaries(wanted)
    assert_equal_states(torch.load(tmp_path / "again" / vortex.FILE, weights_only=True), found)


def test_bfloat16_keeps_what_must_be_float32(state, tmp_path):
    torch.save({"module": state}, tmp_path / "evo2.pt")
    assert convert(tmp_path / "evo2.pt", tmp_path / "vortex", "vortex", "--dtype=bfloat16") == 0
    found = torch.load(tmp_path / "vortex" / vortex.FILE, weights_only=True)
    single = {name.split(".", 2)[2] for name, x in found.items() if x.dtype == torch.float32}
    assert single == {"filter.log_poles", "filter.residues", "inner_mha_cls.rotary_emb.inv_freq"}
    model, params = lcx.load(tmp_path / "vortex")
    assert model.dtype == "bfloat16"
    assert model.max_position_embeddings == 256  # from the config.json that is written beside the file
    assert tokenizer_of(str(tmp_path / "vortex")).decode([65, 67]) == "AC"  # which is not that of Hugging Face
    assert params["stages_0"]["block_2"]["mixer"]["p"].dtype == jnp.float32


def test_a_deeper_model_that_lcx_made(tmp_path):
    """Stages that repeat, other sizes than the published, saved from Python in two ranks."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "max_position_embeddings": 160}
    groups = {"se_groups": 4, "mr_groups": 8}
    model = striped_hyena(pattern="SDH*" * 2 + "SDH", vocab_size=64, init_length=160, **sizes, **groups)
    abstract = model_lib.abstract_params(model)
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape), jnp.float32), abstract)
    lcx.save(tmp_path / "out", model, params, format="savanna", model_parallel=2)
    found_model, found = lcx.load(tmp_path / "out")
    assert found_model == model
    assert_same_params(found, params)


# ----------------------------------------------------------------------------------------- what is refused


class Payload:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def hostile(folder, state):
    save_ranks(folder, [state], args=Payload(folder.parent / "executed"))
    return "nothing in it was executed (it asks for"


class Command(Payload):
    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def hostile_where_weights_should_be(folder, state):
    save_ranks(folder, [state | {MR + "h": Command(folder.parent / "executed")}])
    return "nothing in it was executed (it asks for posix.system)"


def with_a_setting_for_a_weight(folder, state):
    save_ranks(folder, [state | {MR + "h": argparse.Namespace(a=1)}])
    return "expected a plain dense tensor"


def truncated(folder, state):
    save_ranks(folder, [state])
    file = folder / "mp_rank_00_model_states.pt"
    os.truncate(file, file.stat().st_size - 100_000)
    return "copy or download it again"


def without_a_middle_rank(folder, state):
    save_ranks(folder, [state] * 3)
    (folder / "mp_rank_01_model_states.pt").unlink()
    return "the files of ranks 1 are missing"


def without_the_last_rank(folder, state):
    save_ranks(folder, [state], mp_world_size=2)
    return "is of 2 model-parallel ranks, found 1 files"


def without_the_last_rank_as_savanna_says_it(folder, state):
    save_ranks(folder, [state], args={"model_parallel_size": 4, "num_layers": 4})
    return "is of 4 model-parallel ranks, found 1 files"


def with_a_share_taken_for_the_whole(folder, state):
    state[ATTENTION + "dense.weight"] = state[ATTENTION + "dense.weight"][:, :32].clone()
    save_ranks(folder, [state])
    return "sequential.5.mixer.dense.weight is (64, 32), expected (64, 64)"


def with_a_tensor_too_few(folder, state):
    del state[MR + "decay"]
    save_ranks(folder, [state])
    return "1 missing: sequential.3.mixer.mixer.filter.decay"


def with_a_layer_too_few(folder, state):
    save_ranks(folder, [{name: x for name, x in state.items() if not name.startswith("sequential.4.")}])
    return "found layers 2, 3, 5"


def of_different_ranks(folder, state):
    other = state | {MR + "h": state[MR + "h"][:, :200].clone()}
    save_ranks(folder, [state, other])
    return "is (16, 256) float32 on rank 0 and (16, 200) float32 on rank 1"


def with_latest_elsewhere(folder, state):
    save_ranks(folder / "global_step1", [state])
    (folder / "latest").write_text("../outside")
    return "names the step '../outside'"


@pytest.mark.parametrize(
    "damage",
    [
        hostile,
        hostile_where_weights_should_be,
        with_a_setting_for_a_weight,
        truncated,
        without_a_middle_rank,
        without_the_last_rank,
        without_the_last_rank_as_savanna_says_it,
        with_a_share_taken_for_the_whole,
        with_a_tensor_too_few,
        with_a_layer_too_few,
        of_different_ranks,
        with_latest_elsewhere,
    ],
)
def test_bad_files_are_refused_in_one_line(state, tmp_path, capsys, damage):
    message = damage(tmp_path / "ckpt", state)
    assert convert(tmp_path / "ckpt", tmp_path / "out", "lcx") == 2
    err = capsys.readouterr().err
    assert message in err and err.strip().count("\n") == 0
    assert not (tmp_path / "out").exists() and not (tmp_path / "executed").exists()


@pytest.mark.parametrize(
    "size, message",
    [
        (3, "sequential.0.word_embeddings.weight has 512 along axis 0"),
        (8, "sequential.5.mixer.dense_projection.weight has 4 groups of 48 rows"),
    ],
)
def test_sizes_that_do_not_divide_are_refused(state, tmp_path, capsys, size, message):
    torch.save({"module": state}, tmp_path / "evo2.pt")
    assert convert(tmp_path / "evo2.pt", tmp_path / "out", "savanna", f"--model_parallel={size}") == 2
    assert f"{message}, which do not divide by --model_parallel={size}" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_models_that_the_formats_cannot_say(tmp_path):
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "max_position_embeddings": 160}
    plain = {"pattern": "SDH*", "se_groups": 4, "mr_groups": 8} | sizes
    for changes, message in (
        ({"activated_layers": None}, "layer 1 has activation 'gelu', and this format means 'identity'"),
        ({"tie_word_embeddings": False}, "the output head is not the embedding"),
        ({"rope": Rope(rope_type="ntk", factor=2.0)}, "rope_type 'ntk' cannot be expressed"),
        ({"norm_eps": 1e-5}, "its norms have an eps of 1e-05"),
        ({"mr_length": 64}, "its MR filters have 64 taps"),
    ):
        model = striped_hyena(**plain | changes)
        params = jax.tree.map(lambda x: jnp.zeros(x.shape), model_lib.abstract_params(model))
        with pytest.raises(UserError, match=message):
            lcx.save(tmp_path / "out", model, params, format="savanna")
    with pytest.raises(UserError, match="format is 'savanna_legacy', expected one of lcx, hf"):
        lcx.save(tmp_path / "out", model, params, format="savanna_legacy")
    of_savanna = "model_parallel is the number of model-parallel files of 'savanna', and the format is 'vortex'"
    with pytest.raises(UserError, match=of_savanna):
        lcx.save(tmp_path / "out", model, params, format="vortex", model_parallel=2)


def test_overwrite_leaves_other_folders_alone(state, tmp_path):
    torch.save({"module": state}, tmp_path / "evo2.pt")
    assert convert(tmp_path / "evo2.pt", tmp_path / "out", "vortex") == 0
    assert convert(tmp_path / "evo2.pt", tmp_path / "out", "savanna", "--overwrite") == 0
    home = tmp_path / "home"
    home.mkdir()
    shutil.copy(tmp_path / "evo2.pt", home / "evo2.pt")
    (home / "letters").mkdir()
    assert convert(tmp_path / "evo2.pt", home, "savanna", "--overwrite") == 2
    assert (home / "letters").is_dir()


@pytest.mark.parametrize("through", ["savanna", "lcx"])
def test_memory_stays_within_the_largest_tensor(state, tmp_path, monkeypatch, through):
    """Padded filters above all: 16 of 65536 taps are 4 MiB, of which one piece is there at a time."""
    for name in ("h", "decay"):
        state[MR + name] = torch.nn.functional.pad(state[MR + name], (0, 65536 - 256))
    state["sequential.4.mixer.mixer.filter.t"] = torch.arange(65536.0)[None, None]
    torch.save({"module": state}, tmp_path / "evo2.pt")
    source = savanna.SavannaSource(tmp_path / "evo2.pt")
    if through == "lcx":
        lcx.save(tmp_path / "lcx", *lcx.load(tmp_path / "evo2.pt"), format="lcx")
        source = formats.named("lcx").open(tmp_path / "lcx")
    monkeypatch.setattr(tensor_io, "PIECE_BYTES", 1 << 18)
    api.write(tmp_path / "first", source, format="savanna")  # whatever is imported or cached on the way
    tracemalloc.start()
    api.write(tmp_path / "out", source, format=formats.writer("savanna", model_parallel=2))
    source = savanna.SavannaSource(tmp_path / "out")
    source.read("stages_0/block_1/mixer/h", (slice(0, 1), slice(0, 16), slice(0, 128)))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 2 << 20
    assert source.model.max_position_embeddings == 65536


def test_generate_from_a_checkpoint_file(state, tmp_path, capsys):
    """As long a prompt as users type: four tokens."""
    torch.save({"module": state}, tmp_path / "evo2.pt")
    assert generate_main([f"--checkpoint={tmp_path}/evo2.pt", "--prompt=ACGT", "--max_new_tokens=8"]) == 0
    assert "8 tokens; prompt of 4" in capsys.readouterr().err
