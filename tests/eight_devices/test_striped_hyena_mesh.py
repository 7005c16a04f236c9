"""A StripedHyena 2 goes from mesh to mesh by its sharding alone: one checkpoint, one function, no file rewritten.

What this replaces: projections whose rows are three blocks of roles, [x1; x2; v], were cut into one contiguous share a
device, so that a device took rows of one role for those of another. `by_shares` is that cut. It gives another function
for blocks, and the same one for interleaved rows, which are the shards of this library's arrays.
"""

import functools
import hashlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_runs import losses

import lcx
from lcx import model as model_lib
from lcx import objectives
from lcx.data import ByteTokenizer, Dataset
from lcx.mixers.hyena import HyenaLI, HyenaMR, HyenaSE
from lcx.optim import AdamW
from lcx.sharding import MeshShape
from lcx.striped_hyena import striped_hyena
from lcx.trainer import Trainer

C, K, T, STEPS, WRITTEN = 64, 3, 160, 4, 2
SE_GROUPS, MR_GROUPS = 8, 16
MODEL = striped_hyena(
    pattern="SDH*", hidden_size=C, intermediate_size=96, num_heads=8, max_position_embeddings=T,
    se_groups=SE_GROUPS, mr_groups=MR_GROUPS, vocab_size=512, init_length=T,
)  # fmt: skip
TENSOR = (1, 2, 4, 8)
TRAINED = (1, 2)  # alone; with other axes in use. As many devices as groups of SE: test_hyena_mesh.py


class Some(MeshShape):
    """A mesh of as many devices as its sizes say, not of all."""

    def build(self, devices=None):
        return super().build(jax.devices()[: self.data * self.fsdp * self.tensor])


def mesh_of(tensor: int) -> MeshShape:
    """One of them with other axes in use."""
    return Some(fsdp=4 if tensor == 2 else 1, tensor=tensor)


def trainer(folder, mesh):
    dataset = Dataset(
        str(folder / "genome.fa"),
        tokenizer=ByteTokenizer(bos_id=None, eos_id=0, vocab_size=512),
        document_mask=False,
        cache_dir=str(folder / "cache"),
    )
    return Trainer(
        init_from=str(folder / "start"), data=dataset, objective=objectives.nucleotides, mesh=mesh,
        optimizer=AdamW(learning_rate=1e-2, warmup_steps=0), steps=STEPS, batch_size=8, seq_len=T, log_every=1,
        checkpoint_every=WRITTEN,
    )  # fmt: skip


def train(folder, mesh, workdir):
    """Without the evaluation at the end, which would be one more program for each mesh."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "held_out_loss", lambda *_: 0.0)
        return trainer(folder, mesh).run(str(workdir))


def noisy(tree):
    """Filters of a size that matters: as they start, those of MR are next to nothing."""
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda x: np.asarray(x) + rng.normal(0, 0.1, x.shape).astype(np.float32), tree)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A folder with a genome, a run of one device, and its checkpoint of step 2 alone."""
    folder = tmp_path_factory.mktemp("base")
    letters = np.random.default_rng(0).choice(
        list("ACGTacgt"), 20_000, p=[0.2, 0.2, 0.2, 0.2, 0.05, 0.05, 0.05, 0.05]
    )
    (folder / "genome.fa").write_text(">one\n" + "".join(letters) + "\n")
    params = noisy(model_lib.init_params(MODEL, jax.random.key(0)))
    lcx.save(folder / "start", MODEL, params, format="lcx")
    train(folder, mesh_of(1), folder / "whole")
    shutil.copytree(folder / "whole", folder / "run")
    shutil.rmtree(folder / "run" / "checkpoints" / str(STEPS))
    model, params = lcx.load(folder / "run")
    lcx.save(folder / "savanna", model, params, format="savanna", model_parallel=2)
    return folder


def files(folder):
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@pytest.fixture(scope="module")
def expected(base):
    """(tokens, logits of one device)."""
    tokens = jnp.asarray(np.random.default_rng(1).choice(list(b"ACGT"), (8, T)), jnp.int32)
    return tokens, np.asarray(lcx.logits(*lcx.load(base / "run"), tokens))


@pytest.mark.parametrize("tensor", TENSOR)
def test_one_checkpoint_on_every_mesh(base, expected, tensor, tmp_path):
    tokens, logits = expected
    before = {name: files(base / name) for name in ("run", "savanna")}
    mesh = mesh_of(tensor).build()
    for name in before:
        model, params = lcx.load(base / name, mesh=mesh)
        with jax.set_mesh(mesh):
            found = lcx.logits(model, params, tokens)
        np.testing.assert_allclose(found, logits, atol=2e-5 * np.abs(logits).max())
        assert len(jax.tree.leaves(params)[0].sharding.device_set) == mesh.size
    if tensor in TRAINED:
        goes_on(base, tensor, tmp_path)
    assert {name: files(base / name) for name in before} == before


def goes_on(base, tensor, tmp_path):
    """The run from its checkpoint of step 2, to the losses of the whole run."""
    shutil.copytree(base / "run", tmp_path / "run")
    run = train(base, mesh_of(tensor), tmp_path / "run")
    assert run.step == STEPS
    assert (
        run.state["params"]["stages_0"]["block_0"]["mixer"]["featurizer"].sharding.mesh.shape["tensor"]
        == tensor
    )
    np.testing.assert_allclose(losses(tmp_path / "run"), losses(base / "whole"), rtol=2e-5)
    written = files(tmp_path / "run" / "checkpoints" / str(WRITTEN))
    assert written == files(base / "run" / "checkpoints" / str(WRITTEN)) and len(written) > 5


# --- what the published tools have to take care of


def mixer_of(kind):
    """c -> the mixer of c of the channels."""
    return {
        "se": lambda c: HyenaSE(num_channels=c, num_groups=SE_GROUPS * c // C),
        "mr": lambda c: HyenaMR(num_channels=c, num_groups=MR_GROUPS * c // C, init_length=T),
        "li": lambda c: HyenaLI(num_channels=c, init_length=T),
    }[kind]


def by_shares(apply, params, x, shares, interleaved):
    """The sum of what each device makes of its contiguous share of every array, the rows of in_proj as they lie."""
    order = (1, 2, 0) if interleaved else (2, 1, 0)  # [D, C, 3] -> rows of channels, or of roles
    rows = np.transpose(params["in_proj"]["kernel"], order).reshape(3 * C, C)
    order = (0, 1, 2) if interleaved else (1, 0, 2)  # [C, 3, K]
    taps = np.transpose(params["featurizer"], order).reshape(3 * C, K)
    total = 0.0
    for rank in range(shares):
        mine = {
            name: np.split(value, shares)[rank]
            for name, value in params.items()
            if name not in ("in_proj", "featurizer", "out_proj")
        }
        part, kept = np.split(rows, shares)[rank], np.split(taps, shares)[rank]
        c = C // shares
        roles = part.reshape((c, 3, C) if interleaved else (3, c, C))
        kept = kept.reshape((c, 3, K) if interleaved else (3, c, K))
        mine["in_proj"] = {"kernel": np.transpose(roles, (2, 0, 1) if interleaved else (2, 1, 0))}
        mine["featurizer"] = kept if interleaved else np.transpose(kept, (1, 0, 2))
        out = params["out_proj"]
        mine["out_proj"] = {"kernel": np.split(out["kernel"], shares)[rank], "bias": out["bias"] / shares}
        total = total + np.asarray(apply(c)({"params": mine}, x)[0])
    return total


@pytest.mark.parametrize("kind", ["se", "mr", "li"])
def test_blocks_of_roles_that_are_split_are_another_function(kind):
    """The published failure, shown; and that whole channels, the only thing that a mesh can split, are free of it."""
    make = mixer_of(kind)
    x = jax.random.normal(jax.random.key(0), (2, 32, C))
    params = jax.jit(make(C).init)(jax.random.key(1), x)["params"]
    params = noisy(
        jax.tree.map(lambda leaf: leaf.unbox(), params, is_leaf=lambda leaf: hasattr(leaf, "unbox"))
    )
    apply = functools.cache(lambda channels: jax.jit(make(channels).apply))
    whole = np.asarray(apply(C)({"params": params}, x)[0])
    scale = np.abs(whole).max()
    same = {
        (shares, interleaved): np.abs(by_shares(apply, params, x, shares, interleaved) - whole).max() / scale
        for shares in (1, 2)
        for interleaved in (True, False)
    }
    assert same[1, True] == same[1, False] == 0
    assert same[2, True] < 1e-5
    assert same[2, False] > 0.3


def index_of(array, axis):
    """Where each device's part begins and ends along an axis, by device."""
    size = array.shape[axis]
    return {
        shard.device: (
            shard.index[axis].start or 0,
            size if shard.index[axis].stop is None else shard.index[axis].stop,
        )
        for shard in array.addressable_shards
    }


@pytest.mark.parametrize("tensor", TENSOR)
def test_devices_hold_whole_channels_and_their_filters(base, tensor):
    """Every array of a layer is cut at the same channels: all roles, the filters, the rows of the output."""
    mesh = mesh_of(tensor).build()
    _, params = lcx.load(base / "run", mesh=mesh)
    for block, groups in (("block_0", SE_GROUPS), ("block_1", MR_GROUPS), ("block_2", C)):
        mixer = params["stages_0"][block]["mixer"]
        kernel = mixer["in_proj"]["kernel"]  # [layers, D, C, 3]
        assert kernel.shape[-2:] == (C, 3)
        channels = index_of(kernel, kernel.ndim - 2)
        assert set(channels.values()) == {(i * C // tensor, (i + 1) * C // tensor) for i in range(tensor)}
        assert set(index_of(kernel, kernel.ndim - 1).values()) == {(0, 3)}
        for name, value in mixer.items():
            if name == "in_proj":
                continue
            array = value["kernel"] if name == "out_proj" else value
            per_row = C // groups if name in ("h", "decay") else 1
            rows = index_of(array, 1)
            assert {device: (a * per_row, b * per_row) for device, (a, b) in rows.items()} == channels, name
            if name == "featurizer":
                assert set(index_of(array, 2).values()) == {(0, 3)}


def test_a_shard_is_a_rank_of_savanna(base):
    """tensor = 2 holds what two model-parallel ranks of a published checkpoint hold, row for row."""
    torch = pytest.importorskip("torch")
    _, params = lcx.load(base / "savanna", mesh=Some(fsdp=1, tensor=2).build())
    for rank in range(2):
        file = base / "savanna" / "global_step0" / f"mp_rank_{rank:02d}_model_states.pt"
        module = torch.load(file, weights_only=True)["module"]
        for layer in range(3):
            mixer = params["stages_0"][f"block_{layer}"]["mixer"]
            shard = mixer["in_proj"]["kernel"].addressable_shards[rank]
            assert shard.device == jax.devices()[rank]
            stored = module[f"sequential.{layer + 2}.mixer.dense_projection.weight"].numpy()
            np.testing.assert_array_equal(
                np.asarray(shard.data)[0].transpose(1, 2, 0).reshape(stored.shape), stored
            )
