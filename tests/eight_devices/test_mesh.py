"""One run on every mesh: the same losses, checkpoints that move between meshes, collectives that are counted.

How many collectives, and why, for blocks of 7 kernels (a stage is a loop: its body is compiled once):

    data      gradients are summed once they are there: one all-reduce in the backward loop, one outside
    fsdp      the same sums, and each kernel is gathered where it is used: 7 all-gathers in the forward loop, 7 in the
              backward loop (a gathered kernel is never kept), one each for the embedding and the head
    tensor    two sums of activations a block and pass (attention, mlp), as Megatron has them (arXiv 1909.08053)
    context   what each mixer sends: test_context_mesh.py; here heads of attention, all-to-all

XLA for CPUs has no reduce-scatter: it sums whole gradients and cuts them.
"""

import collections
import dataclasses
import functools
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from collectives import Collective, collectives
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from tiny_runs import dataset, lines, losses, tiny_model, tiny_trainer, write_text

import lcx
from lcx import model as model_lib
from lcx import objectives, sharding
from lcx.checkpoint import Checkpointer
from lcx.ladder import Ladder, Rung
from lcx.lora import LoRA
from lcx.optim import AdamW
from lcx.sharding import MeshShape
from lcx.training import step as train_step

MESHES = {
    "data8": MeshShape(data=8, fsdp=1),
    "fsdp8": MeshShape(fsdp=8),
    "data2_fsdp2_tensor2": MeshShape(data=2, fsdp=2, tensor=2),
    "fsdp4_context2": MeshShape(fsdp=4, context=2),
    "fsdp2_tensor4": MeshShape(fsdp=2, tensor=4),  # two kv heads on four devices
}
STEPS = 4


B, T, D = 16, 24, 32  # T is no other size: an activation is known by it


class OneDevice(MeshShape):
    def build(self, devices=None):
        return super().build(jax.devices()[:1])


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A folder with text, and a model to start from."""
    folder = tmp_path_factory.mktemp("base")
    write_text(folder)
    model = tiny_model()
    lcx.save(folder / "start", model, model_lib.init_params(model, jax.random.key(0)), format="lcx")
    return folder


def trainer(base, **changes):
    settings = dict(
        init_from=str(base / "start"),
        steps=STEPS,
        batch_size=B,
        seq_len=T,
        log_every=1,
        checkpoint_every=2,
        optimizer=AdamW(learning_rate=1e-2, warmup_steps=0),
    )
    return tiny_trainer(base, **{**settings, **changes})


def train(trainer, workdir):
    """Without the evaluation at the end, which would be one more program for each mesh."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(trainer), "held_out_loss", lambda *_: 0.0)
        return trainer.run(str(workdir))


@pytest.fixture(scope="module")
def one_device(base, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("one_device")
    trainer(base, mesh=OneDevice()).run(str(workdir))
    found = losses(workdir)
    assert len(found) == STEPS and found[-1] < found[0] - 0.5
    return workdir


@pytest.fixture(scope="module")
def runs(base, tmp_path_factory):
    """Workdirs of the runs on each mesh, trained when first asked for."""

    class Runs(dict):
        def __missing__(self, name):
            self[name] = tmp_path_factory.mktemp(name)
            train(trainer(base, mesh=MESHES[name]), self[name])
            return self[name]

    return Runs()


def assert_same_losses(workdir, expected):
    """Sums are taken in another order: float32 rounding, which four steps of training do not blow up."""
    np.testing.assert_allclose(losses(workdir), losses(expected), rtol=2e-5)


@pytest.mark.parametrize("name", MESHES)
def test_every_mesh_gives_the_same_losses(name, runs, one_device):
    assert_same_losses(runs[name], one_device)
    (a, params), (b, expected) = lcx.load(runs[name]), lcx.load(one_device)
    assert a == b
    for x, y in zip(jax.tree.leaves(params), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(x, y, atol=2e-4)  # a step of Adam is as large where the gradient is tiny


def test_the_evaluation_is_the_same(runs, one_device, base):
    """Of the run's last state, by hand on eight devices and as one device logged it."""
    found = trainer(base, mesh=MESHES["data2_fsdp2_tensor2"])
    mesh = found.mesh.build()
    with jax.set_mesh(mesh):
        model, params = lcx.load(one_device, mesh=mesh)
        loss = found.held_out_loss(model, {"params": params}, mesh)
    assert loss == pytest.approx(lines(one_device)[-1]["eval_loss"], rel=1e-5)


def test_a_random_start_knows_of_no_mesh(base):
    model, params = lcx.load(base / "start")
    mesh = MESHES["data2_fsdp2_tensor2"].build()
    made = model_lib.init_params(model, jax.random.key(0), mesh=mesh)
    for x, y in zip(jax.tree.leaves(made), jax.tree.leaves(params), strict=True):
        assert len(x.sharding.device_set) == 8
        np.testing.assert_array_equal(x, y)


ON = [
    "fsdp8 data8",
    "one_device data2_fsdp2_tensor2",
    "fsdp2_tensor4 one_device",
    "fsdp4_context2 fsdp2_tensor4",
]


@pytest.mark.parametrize("where", ON)
def test_a_checkpoint_goes_on_on_any_other_mesh(where, runs, one_device, base, tmp_path):
    written, restored = where.split()
    shutil.copytree(one_device if written == "one_device" else runs[written], tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / str(STEPS))
    run = train(trainer(base, mesh=MESHES.get(restored, OneDevice())), tmp_path / "run")
    assert run.step == STEPS
    assert len(jax.tree.leaves(run.state)[0].sharding.device_set) == (1 if restored == "one_device" else 8)
    assert_same_losses(tmp_path / "run", one_device)


def test_a_save_compiles_nothing_for_small_arrays(tmp_path, caplog):
    """Devices that hold the same array do not each cut out and write a part of it, unless the parts are large."""
    mesh = MeshShape(data=2, fsdp=2, tensor=2).build()
    specs = (P(), P("fsdp"), P(None, "tensor"))
    arrays = {
        f"{cols} {spec}": jax.device_put(np.full((8, cols), cols, np.float32), NamedSharding(mesh, spec))
        for cols in (34, 38)
        for spec in specs
    }
    with Checkpointer(tmp_path) as checkpoints, jax.log_compiles():
        checkpoints.save(1, {"params": arrays}, wait=True)
        assert "Compiling" not in caplog.text
        large = jax.device_put(np.ones((8, 2**20), np.float32), NamedSharding(mesh, P()))
        checkpoints.save(2, {"params": {"large": large}}, wait=True)
        assert "Compiling jit(dynamic_slice)" in caplog.text or "Compiling jit(slice)" in caplog.text
        _, found, _ = checkpoints.restore({"params": jax.eval_shape(lambda: {"large": large})})
    np.testing.assert_array_equal(found["params"]["large"], large)


def test_the_mesh_changes_in_the_middle_of_a_ladder(base, tmp_path):
    """By one setting of its second rung, which has the losses of the mesh before; the first one is not repeated."""
    start = trainer(base, steps=1, mesh=MESHES["fsdp8"], batch_size=8)
    rungs = (Rung(64, steps=1), Rung(128, steps=2))
    found = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(start), "held_out_loss", lambda *_: 0.0)
        for last in (rungs[1], dataclasses.replace(rungs[1], mesh=MESHES["fsdp2_tensor4"])):
            shutil.rmtree(tmp_path / "128", ignore_errors=True)
            Ladder(trainer=start, rungs=(rungs[0], last), rope_scaling={"rope_type": "yarn"}).run(str(tmp_path))
            found.append(losses(tmp_path / "128" / "round_0"))
    assert len(found[0]) == 2 and len(losses(tmp_path / "64" / "round_0")) == 1
    np.testing.assert_allclose(found[1], found[0], rtol=2e-5)


# --- other models


def losses_of_steps(model, weights, batches, mesh, accumulation) -> list[float]:
    """The losses of some steps, without a trainer around them."""
    optimizer = AdamW(learning_rate=1e-2, warmup_steps=0)
    abstract = {"params": model_lib.abstract_params(model, mesh=mesh)}
    if "lora" in weights:
        abstract["lora"] = PAIRS.abstract(model, mesh=mesh)
    transformation = optimizer.build(train_step.moving(abstract), 9)
    abstract = train_step.abstract_state(abstract, transformation, mesh)
    placed = {name: jax.device_put(x, shardings(abstract[name])) for name, x in weights.items()}
    found = []
    with jax.set_mesh(mesh):
        step = train_step.make_step(
            model,
            transformation,
            objectives.next_token,
            optimizer.learning_rates(9),
            accumulation=accumulation,
            abstract=abstract,
        )
        state = {**placed, "opt_state": train_step.init_opt_state(transformation, placed, abstract)}
        for number, batch in enumerate(batches):
            state, metrics = step(state, sharding.shard_batch(batch, mesh), np.int32(number))
            found.append(float(metrics["loss"]))
    return found


def shardings(tree):
    return jax.tree.map(lambda x: x.sharding, tree)


PAIRS = LoRA(rank=4, targets="_proj")
ODD = {
    "nothing divides": dict(
        vocab_size=259,
        intermediate_size=63,
        hidden_size=36,
        num_heads=6,
        num_kv_heads=3,
        tie_word_embeddings=True,
        layer_windows=(None, 8),
    ),
    "lora, remat, accumulation": dict(remat="host", num_kv_heads=1),
}


@pytest.mark.parametrize("name", ODD)
def test_odd_models_on_eight_devices_and_one(name, base):
    model, lora = tiny_model(**ODD[name]), name.startswith("lora")
    rng = np.random.default_rng(0)

    def noise(tree):
        return jax.tree.map(lambda x: rng.normal(0, 0.1, x.shape).astype(np.float32), tree)

    weights = {"params": noise(model_lib.abstract_params(model))}
    if lora:
        weights["lora"] = noise(PAIRS.abstract(model))
    with dataset(base).batches("train", global_batch_size=B - 1, seq_len=T) as batches:
        batches = [next(batches) for _ in range(3)]  # 15 rows: with one of padding on two devices along fsdp
    meshes = OneDevice().build(), MESHES["fsdp2_tensor4"].build()
    one, eight = (losses_of_steps(model, weights, batches, mesh, 2 if lora else 1) for mesh in meshes)
    assert one[-1] < one[0]
    np.testing.assert_allclose(eight, one, rtol=2e-5)


# --- collectives

@pytest.fixture(scope="module")
def compiled(base):
    """(mesh name, remat, accumulation) -> collectives of the compiled train step."""
    return functools.cache(
        lambda name, **changes: collectives(compile_step(trainer(base, mesh=MESHES[name], **changes)))
    )


def compile_step(trainer) -> str:
    mesh = trainer.mesh.build()
    model = trainer.adjusted(tiny_model())
    with jax.set_mesh(mesh):
        weights = {"params": model_lib.abstract_params(model, mesh=mesh)}
        transformation = trainer.optimizer.build(train_step.moving(weights), trainer.steps)
        abstract = train_step.abstract_state(weights, transformation, mesh)
        step = train_step.make_step(
            model,
            transformation,
            trainer.objective,
            trainer.optimizer.learning_rates(trainer.steps),
            accumulation=trainer.accumulation,
            abstract=abstract,
        )
        where = sharding.batch_sharding(mesh)
        names = ("tokens", "labels", "segment_ids", "positions")
        batch = {name: jax.ShapeDtypeStruct((B, T), jnp.int32, sharding=where) for name in names}
        batch["loss_weights"] = jax.ShapeDtypeStruct((B, T), jnp.float32, sharding=where)
        return step.lower(abstract, batch, np.int32(0)).compile().as_text()


def counts(found: list[Collective]) -> dict[tuple[str, bool], int]:
    return dict(collections.Counter((c.kind, c.loop) for c in found))


def elements(shape) -> int:
    return int(np.prod(shape, dtype=np.int64))


def test_data_parallel_sums_gradients_and_nothing_else(compiled):
    found = compiled("data8")
    assert counts(found) == {("all-reduce", True): 1, ("all-reduce", False): 1}
    summed = sum(elements(shape) for c in found for shape in c.shapes)
    per_block = (model_lib.num_params(tiny_model()) - 2 * 258 * D - D) // 2
    assert summed == 2 * 258 * D + D + per_block + 2  # each gradient once, the loss and the weight
    assert all(c.devices > 1 for c in found)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_fsdp_gathers_parameters_where_they_are_used_and_nothing_else(compiled, accumulation):
    settings = {} if accumulation == 1 else {"accumulation": 2, "remat": "dots"}
    found = compiled("fsdp8", **settings)
    kinds = counts(found)
    assert {kind for kind, _ in kinds} == {"all-gather", "all-reduce"}  # no all-to-all, no collective-permute
    assert kinds["all-gather", True] == 14  # seven kernels, forward and backward
    assert kinds["all-gather", False] == 2  # embedding and head, once for all micro-batches
    sizes = collections.Counter(elements(s) for c in found if c.kind == "all-gather" for s in c.shapes)
    model = model_lib.abstract_params(tiny_model())
    kernels = [leaf.size // 2 for leaf in jax.tree.leaves(model["stages_0"]) if leaf.ndim > 2]
    assert sizes == collections.Counter([258 * D] * 2 + kernels * 2)
    assert kinds["all-reduce", True] == (1 if accumulation == 1 else 2)
    assert kinds["all-reduce", False] <= 3  # embedding and head; norms of the gradient over their pieces


def is_activation(shape) -> bool:
    return T in shape or elements(shape) % (T * D) == 0 and elements(shape) > 0


@pytest.mark.parametrize("name", ["data8", "fsdp8", "data2_fsdp2_tensor2"])
def test_no_activation_is_gathered_or_moved(compiled, name):
    for c in compiled(name):
        if c.kind != "all-reduce":
            assert not any(map(is_activation, c.shapes)), c


def test_tensor_parallel_sums_activations_twice_a_block_and_pass(compiled):
    found = compiled("data2_fsdp2_tensor2")
    assert {c.kind for c in found} == {"all-gather", "all-reduce"}
    local = (B // 4) * T * D
    in_loops = [c for c in found if c.loop and c.kind == "all-reduce" and elements(c.shapes[0]) == local]
    # forward: after attention and mlp; backward: into each; the summands of one input may come side by side
    assert len(in_loops) == 4
    assert counts(found)["all-gather", True] == 14


def test_kv_heads_fewer_than_tensor_devices_gather_no_queries(compiled):
    found = compiled("fsdp2_tensor4")
    assert {c.kind for c in found} == {"all-gather", "all-reduce"}
    moved = [c.shapes for c in found if c.kind == "all-gather" and any(map(is_activation, c.shapes))]
    # the gradients of k and v, to the weights that every tensor device has whole
    assert moved == [[(B // 2, T, 2, 8)]] * 2


def test_context_moves_heads_and_gathers_nothing(compiled):
    """Queries, keys, values and outputs go from tokens to heads or back: once forward, once backward."""
    found = compiled("fsdp4_context2")
    assert {c.kind for c in found} == {"all-gather", "all-reduce", "all-to-all"}
    assert not [c for c in found if c.kind == "all-gather" and c.floating and any(map(is_activation, c.shapes))]
    moved = [c for c in found if c.kind == "all-to-all"]
    assert all(c.loop for c in moved) and len(moved) == 8


# --- rows


def test_rows_of_a_process(monkeypatch):
    """Meshes of eight devices in two or four processes, as each process sees them."""

    class Device:
        def __init__(self, process_index):
            self.process_index = process_index

    class Mesh:
        def __init__(self, processes, **shape):
            self.shape = {"data": 1, "fsdp": 1, "context": 1, "tensor": 1} | shape
            devices = [Device(i * processes // 8) for i in range(8)]
            self.devices = np.array(devices).reshape(tuple(self.shape.values()))

    def rows(process, *args, **kwargs):
        monkeypatch.setattr(jax, "process_index", lambda: process)
        return sharding.process_rows(Mesh(*args, **kwargs))

    assert [rows(i, 2, fsdp=8) for i in (0, 1)] == [(0, 2), (1, 2)]
    assert [rows(i, 4, data=2, fsdp=4) for i in range(4)] == [(0, 4), (1, 4), (2, 4), (3, 4)]
    assert [rows(i, 2, fsdp=2, tensor=4) for i in (0, 1)] == [(0, 2), (1, 2)]
    assert [rows(i, 4, fsdp=2, tensor=4) for i in range(4)] == [
        (0, 2),
        (0, 2),
        (1, 2),
        (1, 2),
    ]  # tensor reaches over two
    assert [rows(i, 2, tensor=8) for i in (0, 1)] == [(0, 1), (0, 1)]
