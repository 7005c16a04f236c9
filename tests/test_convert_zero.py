"""DeepSpeed's directories: float32 weights out of the optimizer's shares, and whatever else such a folder says."""

import argparse
import collections
import io
import logging

import jax
import numpy as np
import pytest

import lcx
from lcx import model as model_lib
from lcx.convert import formats
from lcx.convert.__main__ import main
from lcx.errors import UserError
from lcx.striped_hyena import striped_hyena

torch = pytest.importorskip("torch")
BUFFERS = ("inv_freq", ".t", ".decay")
MODEL = striped_hyena(
    pattern="SDH*", hidden_size=32, intermediate_size=48, num_heads=2, max_position_embeddings=160, se_groups=4,
    mr_groups=8, vocab_size=64, init_length=160,
)  # fmt: skip


@pytest.fixture(scope="module")
def shares(tmp_path_factory):
    """The float32 tensors of two model-parallel ranks of a random model."""
    folder = tmp_path_factory.mktemp("float32")
    rng = np.random.default_rng(0)
    abstract = model_lib.abstract_params(MODEL)
    params = jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(np.float32), abstract)
    lcx.save(folder / "run", MODEL, params, format="savanna", model_parallel=2)
    files = sorted((folder / "run" / "global_step0").iterdir())
    return params, [torch.load(file, weights_only=True)["module"] for file in files]


def groups_of(state):
    """Matrices, which decay, and the rest, as trainers group them; buffers are no parameters."""
    trained = {name: x for name, x in state.items() if not name.endswith(BUFFERS)}
    matrices = collections.OrderedDict((name, x) for name, x in trained.items() if x.ndim > 1)
    return [matrices, collections.OrderedDict((n, x) for n, x in trained.items() if n not in matrices)]


def save_zero(folder, states, *, ranks=3, pad=0, prefix="bf16_", stage=1, **beside):
    """A step as a trainer in bfloat16 writes it: rounded weights, and float32 ones in shares with padding."""
    step = folder / "global_step7"
    step.mkdir(parents=True)
    (folder / "latest").write_text("global_step7")
    for mp, state in enumerate(states):
        groups = groups_of(state)
        module = {name: x if name.endswith(BUFFERS) else x.bfloat16() for name, x in state.items()}
        shapes = [collections.OrderedDict((name, x.shape) for name, x in group.items()) for group in groups]
        torch.save(
            {"module": module, "optimizer": None, "param_shapes": shapes, "dp_world_size": ranks,
             "mp_world_size": len(states), "buffer_names": [], "ds_version": "0.19.8", "iteration": 7,
             "random_rng_state": np.random.RandomState(0).get_state()} | beside,
            step / f"mp_rank_{mp:02d}_model_states.pt",
        )  # fmt: skip
        flats = [torch.cat([x.reshape(-1) for x in group.values()]) for group in groups]
        unit = 2 * ranks
        flats = [torch.nn.functional.pad(x, (0, -len(x) % unit + pad * unit), value=9.0) for x in flats]
        for rank in range(ranks):
            parts = [flat.chunk(ranks)[rank].clone() for flat in flats]
            moments = {0: {"step": 7, "exp_avg": torch.zeros_like(parts[0])}}
            state_dict = {
                "single_partition_of_fp32_groups": parts, "partition_count": [ranks] * 2, "zero_stage": stage,
                "group_paddings": [0, 0], "base_optimizer_state": {"state": moments}, "clip_grad": 1.0,
                "loss_scaler": argparse.Namespace(cur_scale=1),
            }  # fmt: skip
            name = f"{prefix}zero_pp_rank_{rank}_mp_rank_{mp:02d}_optim_states.pt"
            torch.save({"optimizer_state_dict": state_dict, "ds_version": "0.19.8"}, step / name)
    return folder


def assert_same(found, expected):
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(np.asarray(a, np.float32), b), found, expected)


@pytest.mark.parametrize("ranks, prefix", [(1, "bf16_"), (3, "bf16_"), (4, "")])
def test_float32_weights_come_out_to_the_bit(shares, tmp_path, ranks, prefix):
    params, states = shares
    folder = save_zero(tmp_path / "run", states, ranks=ranks, prefix=prefix)
    model, found = lcx.load(folder, format="savanna_fp32")
    assert model.dtype == "float32" and model == MODEL
    assert_same(found, params)
    for path in (folder / "global_step7", folder / "global_step7" / "mp_rank_00_model_states.pt"):
        if path.is_dir():
            assert_same(lcx.load(path, format="savanna_fp32")[1], params)
    _, rounded = lcx.load(folder)  # by default the weights that the model computes with
    embedding = rounded["embed"]["embedding"]
    assert embedding.dtype == "bfloat16"
    np.testing.assert_array_equal(embedding, params["embed"]["embedding"].astype(embedding.dtype))


def test_any_slice_across_the_shares(shares, tmp_path):
    """Rows of a parameter that two data-parallel ranks share, and of one that lies on two model-parallel ranks."""
    params, states = shares
    source = formats.named("savanna_fp32").open(save_zero(tmp_path / "run", states, ranks=4))
    flat = {
        "/".join(str(key.key) for key in path): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(params)
    }
    rng = np.random.default_rng(0)
    for path, info in source.leaves.items():
        for _ in range(3):
            lows = [int(rng.integers(0, size)) for size in info.shape]
            index = tuple(
                slice(low, int(rng.integers(low, size)) + 1)
                for low, size in zip(lows, info.shape, strict=True)
            )
            np.testing.assert_array_equal(source.read(path, index), flat[path][index], err_msg=path)


def test_legacy_rows_and_a_conversion(shares, tmp_path, capsys):
    params, states = shares
    blocks = []
    for state in states:
        state = dict(state)
        for name, x in state.items():
            layer = name.rpartition(".mixer.")[0]
            if (
                name.endswith(("mixer.dense_projection.weight", "short_conv_weight"))
                and "mixer.mixer" not in name
            ):
                if layer + ".mixer.hyena_proj_conv.short_conv_weight" in state:
                    state[name] = torch.cat([x[role::3] for role in range(3)])
        blocks.append(state)
    folder = save_zero(tmp_path / "run", blocks)
    assert_same(lcx.load(folder, format="savanna_legacy_fp32")[1], params)
    arguments = ["--src_format=savanna_legacy_fp32", "--dst_format=savanna", f"--dst={tmp_path / 'out'}"]
    assert main([f"--src={folder}", *arguments]) == 0
    assert "so the same logits" in capsys.readouterr().out
    assert_same(lcx.load(tmp_path / "out")[1], params)


def without_a_share(folder):
    (folder / "global_step7" / "bf16_zero_pp_rank_1_mp_rank_01_optim_states.pt").unlink()
    return "those of the data-parallel ranks 1 are missing"


def without_the_last_share(folder):
    (folder / "global_step7" / "bf16_zero_pp_rank_2_mp_rank_00_optim_states.pt").unlink()
    return "is one of 3 shares, found 2"


def without_any(folder):
    for file in folder.glob("*/*optim*"):
        file.unlink()
    return "is next to it, which holds the float32 weights"


def of_another_step(folder):
    file = folder / "global_step7" / "bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt"
    state = torch.load(file, weights_only=False)
    for part in state["optimizer_state_dict"]["single_partition_of_fp32_groups"]:
        part += 0.5
    torch.save(state, file)
    return "away from those of the module"


@pytest.mark.parametrize("damage", [without_a_share, without_the_last_share, without_any, of_another_step])
def test_folders_that_are_not_whole(shares, tmp_path, capsys, damage):
    message = damage(save_zero(tmp_path / "run", shares[1]))
    arguments = ["--src_format=savanna_fp32", "--dst_format=lcx", f"--dst={tmp_path / 'out'}"]
    assert main([f"--src={tmp_path / 'run'}", *arguments]) == 2
    err = capsys.readouterr().err
    assert message in err and err.strip().count("\n") == 0
    assert not (tmp_path / "out").exists()


def test_layouts_that_are_not_this_one(shares, tmp_path):
    _, states = shares
    with pytest.raises(UserError, match="of ZeRO stage 3, expected 1 or 2"):
        lcx.load(save_zero(tmp_path / "stage3", states, stage=3), format="savanna_fp32")
    with pytest.raises(UserError, match="the files are not of one run"):
        lcx.load(save_zero(tmp_path / "long", states, pad=1), format="savanna_fp32")
    groups = [
        collections.OrderedDict((n, x.shape) for n, x in group.items()) for group in groups_of(states[0])
    ]
    with pytest.raises(UserError, match="param_shapes has 1 groups, and the optimizer states 2"):
        lcx.load(save_zero(tmp_path / "one", states, param_shapes=groups[0]), format="savanna_fp32")
    groups[0].popitem()
    with pytest.raises(UserError, match="away from those of the module|not of one run"):
        lcx.load(save_zero(tmp_path / "less", states, param_shapes=groups), format="savanna_fp32")


# ------------------------------------------------------------------------------------- what else a folder says


def test_a_configured_base_that_is_not_the_stored_one_is_reported(shares, tmp_path, caplog):
    """savanna restores inv_freq from the checkpoint, whatever base the run had configured."""
    settings = {"rotary_emb_base": 1e11, "rotary_emb_scaling_factor": 128, "name": "x", "nested": {"a": 1}}
    folder = save_zero(tmp_path / "run", shares[1], args=settings)
    with caplog.at_level(logging.WARNING):
        model, _ = lcx.load(folder)
    assert "had configured rope_theta 1e+11, and inv_freq is that of 10000" in caplog.text
    assert "divided positions by 128" in caplog.text
    assert model.stages[0].pattern[3].mixer.rope.rope_theta == 1e4
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        scaling = {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e6}
        model, _ = lcx.load(folder, rope_scaling=scaling)
    assert "is that of rope_theta 10000, and the configured rope_theta 1e+06 replaces it" in caplog.text
    assert model.stages[0].pattern[3].mixer.rope.rope_theta == 1e6
    caplog.clear()
    same = save_zero(tmp_path / "same", shares[1], args={"rotary_emb_base": 10000})
    with caplog.at_level(logging.WARNING):
        lcx.load(same)
    assert "rope_theta" not in caplog.text


def test_padded_mlps_are_the_same_function(shares, tmp_path):
    """As the published tool pads: zeros behind each model-parallel rank's rows, so scattered once ranks are merged."""
    params, states = shares
    padded = []
    for state in states:
        state = dict(state)
        for name, x in state.items():
            if ".mlp.w" in name:
                extra = (0, 8) if name.endswith("w3.weight") else (0, 0, 0, 8)
                state[name] = torch.nn.functional.pad(x, extra)
        padded.append(state)
    (tmp_path / "run").mkdir()
    for rank, state in enumerate(padded):
        torch.save({"module": state}, tmp_path / "run" / f"mp_rank_{rank:02d}_model_states.pt")
    model, found = lcx.load(tmp_path / "run")
    assert model.stages[0].pattern[0].mlp.intermediate_size == 48 + 16
    kernel = np.asarray(found["stages_0"]["block_0"]["mlp"]["gate_proj"]["kernel"])[0]
    assert not kernel[:, 24:32].any() and not kernel[:, 56:].any() and kernel[:, 32:56].any()
    tokens = np.random.default_rng(0).integers(0, 64, (2, 40)).astype(np.int32)
    expected = lcx.logits(MODEL, params, tokens)
    np.testing.assert_allclose(lcx.logits(model, found, tokens), expected, atol=1e-5 * np.abs(expected).max())


def test_norms_by_either_name_and_scales_of_fp8(shares, tmp_path):
    """savanna's own norms are `.scale`, Transformer Engine's `.weight`, with entries of another kind beside them."""
    params, states = shares
    (tmp_path / "run").mkdir()
    for rank, state in enumerate(states):
        other = {
            name[: -len("weight")] + "scale" if "layernorm" in name or ".norm." in name else name: x
            for name, x in state.items()
        }
        other["sequential.2.mixer.dense_projection._extra_state"] = io.BytesIO(b"amax")
        torch.save({"module": other}, tmp_path / "run" / f"mp_rank_{rank:02d}_model_states.pt")
    assert_same(lcx.load(tmp_path / "run")[1], params)
