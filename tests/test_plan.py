"""Plans: of the step that would run, with numbers that agree with counts made another way, and clear refusals."""

import dataclasses
import itertools
import json
import math
import os
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest
from tiny_runs import GIN, ROOT, tiny_model, tiny_trainer, write_text

from kernels_pallas import aot
from lcx import objectives, sharding
from lcx.blockwise import Blocks
from lcx.errors import UserError
from lcx.ladder import Ladder, Rung
from lcx.linearize import Linearize
from lcx.lora import LoRA
from lcx.optim import AdamW
from lcx.planning import (
    abstract,
    cache,
    compiled,
    cpu_speed,
    flops,
    longest,
    program,
    report,
    roofline,
    search,
    topology,
    traffic,
)

KEYS = {  # what programs read; DESIGN names the first five
    *("peak_bytes", "memory_bytes", "fits", "step_seconds", "largest_seq_len"),
    *("topology", "devices", "mesh", "seq_len", "batch_size", "accumulation", "remat", "model_parameters"),
    *("trained_parameters", "parameter_bytes", "runtime_bytes"),
    *("host_bytes", "host_copy_bytes", "host_memory_bytes", "host_seconds"),
    *("optimizer_bytes", "batch_bytes", "activation_bytes", "largest_buffers", "model_flops", "executed_flops"),
    *("collective_bytes", "step_seconds_overlapped", "compute_seconds", "memory_seconds", "link_seconds", "mfu"),
    *("tokens_per_second", "steps", "tokens", "days", "device_hours", "compile_seconds", "assumptions", "notes"),
}
TOY = topology.Chip("toy", 100, flops=1e3, bandwidth=1e2, link=10.0, far=1.0, near=8, host=topology.Host(5e9, 80, 8))
B, T, L, V, D, F, N, K, H = 8, 32, 2, 258, 32, 64, 4, 2, 8  # the run of GIN
LAYER = D * N * H + 2 * D * K * H + N * H * D + 3 * D * F  # weights of matrix products
NORMS = (2 * L + 1) * D
WEIGHTS = 2 * V * D + L * LAYER + NORMS


@pytest.fixture(scope="module")
def plan(tmp_path_factory):
    """The JSON that the command prints for two CPU devices."""
    folder = tmp_path_factory.mktemp("plan")
    (folder / "run.gin").write_text(GIN.format(folder=folder) + "trainer.Trainer.remat = 'full'\n")
    command = [sys.executable, "-m", "lcx.plan", f"--gin_file={folder}/run.gin", "--topology=cpu:2", "--json"]
    environment = {**os.environ, "JAX_COMPILATION_CACHE_DIR": str(folder / "xla")}  # nothing was planned before
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


def test_what_the_command_prints(plan):
    assert set(plan) == KEYS
    assert plan["mesh"] == {"data": 1, "fsdp": 2, "context": 1, "tensor": 1} and plan["devices"] == 2
    assert plan["model_parameters"] == plan["trained_parameters"] == WEIGHTS
    split = WEIGHTS - NORMS  # norms are on every device
    assert plan["parameter_bytes"] == 4 * (split // 2 + NORMS)
    assert 0 <= plan["optimizer_bytes"] - 2 * plan["parameter_bytes"] <= 64  # two moments, and counters
    assert plan["batch_bytes"] == 5 * 4 * B * T // 2
    parts = ("parameter_bytes", "optimizer_bytes", "batch_bytes", "activation_bytes", "runtime_bytes")
    assert plan["peak_bytes"] == sum(plan[part] for part in parts) and plan["activation_bytes"] > 0
    assert plan["fits"] and plan["peak_bytes"] < plan["memory_bytes"] and plan["host_bytes"] == 0
    assert plan["mfu"] is plan["largest_seq_len"] is None
    parts = ("compute_seconds", "memory_seconds", "link_seconds")
    assert plan["step_seconds"] == sum(plan[part] for part in parts) and all(plan[part] > 0 for part in parts)
    assert plan["tokens_per_second"] == B * T / plan["step_seconds"]
    assert any("which this machine's cores reached" in line for line in plan["assumptions"])


def test_the_work_of_a_step(plan):
    mixing = L * 2 * N * H * (T + 1) / 2  # multiplications of scores and values for a token
    head = V * D
    assert plan["model_flops"] == 6 * B * T * (L * LAYER + head + NORMS + mixing)
    # Forward, recomputed but for the last product of a block, backward; attention is estimated in its loop of tiles.
    products = 6 * (L * LAYER + head) + 2 * L * (LAYER - D * F)
    assert plan["executed_flops"] == B * T * (products + 2 * mixing * 4.5)
    # Over fsdp every weight is gathered for both passes, and every gradient is reduced: half of it by each of two.
    gathered = 4 * (2 * L * LAYER + 2 * V * D) / 2
    reduced = 4 * (L * LAYER + 2 * V * D)
    assert list(plan["collective_bytes"]) == ["fsdp"]
    assert gathered + reduced / 2 <= plan["collective_bytes"]["fsdp"] <= 1.5 * (gathered + reduced)


def test_the_work_of_a_step_with_frozen_weights(tmp_path):
    """Forward and the gradients of inputs for frozen weights, and those of weights for low-rank ones: as traced."""
    trainer = tiny_trainer(tmp_path, lora=LoRA(rank=2), remat="none")
    mesh = trainer.mesh.build(jax.devices()[:1])
    run = abstract.run_of(trainer, mesh)
    with jax.set_mesh(mesh):
        batch = compiled.batch_of(trainer, run, mesh)
        traced = trainer.step_function(run).trace(run.abstract, batch, jax.ShapeDtypeStruct((), jnp.int32))
    work = roofline.work(compiled.Step(run, None, flops.count(traced), None, 0.0), trainer, dict(mesh.shape), TOY)
    tokens, mixing = trainer.batch_size * trainer.seq_len, L * 2 * N * H * (trainer.seq_len + 1) / 2
    low_rank = {"pairs": L * 2 * (4 * D + 2 * N * H + 2 * K * H), "scales": L * 4}
    assert sum(low_rank.values()) == sum(x.size for x in jax.tree.leaves(run.abstract["lora"]))
    products = 4 * (L * LAYER + V * D) + 6 * low_rank["pairs"]
    assert work.model_flops == tokens * (products + 6 * mixing + 4 * NORMS + 6 * low_rank["scales"])
    # The gradient of the head is traced with that of its input, though nothing uses it.
    assert work.executed_flops == tokens * (products + 2 * V * D + 2 * mixing * 3.5)


def test_the_largest_buffers(plan):
    buffers = plan["largest_buffers"]
    sizes = [buffer["bytes"] for buffer in buffers]
    assert len(buffers) == 5 and sizes == sorted(sizes, reverse=True)
    for buffer in buffers:
        assert buffer["bytes"] == 4 * math.prod(buffer["shape"]), "all of this step is float32 or int32"
        assert "MeshShape." in buffer["setting"]
        advises_dtype = "Trainer.dtype" in buffer["setting"]
        assert not (advises_dtype and buffer["dtype"] in ("s32", "pred")), "no setting makes integers smaller"


GPU, CPU, TPU = ("h200", "h200:0", "h200:2x4"), ("cpu:2x2", "cpu:-1"), ("v5p", "v5e:4x", "v5e:0x4", "v5e:32x32")


@pytest.mark.parametrize("name", [*GPU, *CPU, *TPU, "v9:4", ""])
def test_unknown_topologies(name):
    with pytest.raises(UserError, match="--topology is .*expected a"):
        topology.find(name)


def test_what_does_not_match(monkeypatch, tmp_path):
    place = topology.Topology("cpu:1", None, jax.devices()[:1], 2**34)
    with pytest.raises(UserError, match=r"--topology=cpu:1 does not match Trainer.mesh: .*needs 2 devices, found 1"):
        compiled.mesh_of(tiny_trainer(tmp_path, mesh=sharding.MeshShape(fsdp=1, tensor=2)), place)
    with pytest.raises(UserError, match="only a Trainer, a Ladder or Blocks can be planned"):
        abstract.trainer_of(object())
    with pytest.raises(UserError, match=r"cannot be planned: set Trainer\.lora"):
        abstract.trainer_of(tiny_trainer(tmp_path, init_from="x", adapter="y"))
    monkeypatch.setattr(aot, "available", lambda target: f"no compiler for {target}")
    for name in ("v5e:2x2", "h100:8"):
        with pytest.raises(UserError, match=r"no compiler for .*; install lcx\[aot\]"):
            topology.find(name)
    monkeypatch.setattr(aot, "available", lambda target: None)
    with pytest.raises(UserError, match="up to 8 GPUs or whole hosts of 8"):
        topology.find("h100:12")


def test_a_plan_is_kept(tmp_path, monkeypatch):
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "xla"))
    key = cache.key("module @a", "v5e:2x2")
    assert key != cache.key("module @b", "v5e:2x2") and key != cache.key("module @a", "v5e:4x4")
    assert cache.read(key) is None
    cache.write(key, cache.Compiled(7, 3, "HloModule"))
    assert cache.read(key) == cache.Compiled(7, 3, "HloModule")
    (file,) = (tmp_path / "plans").iterdir()
    for damaged in (file.read_bytes()[:-9], b"", b"no gzip"):
        file.write_bytes(damaged)
        assert cache.read(key) is None, "compiled again"
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(file / "xla"))  # a folder that cannot be made
    cache.write(key, cache.Compiled(7, 0, None))


def test_what_a_compiler_refuses():
    error = jax.errors.JaxRuntimeError
    told = "Ran out of memory on HBM, the total memory required for HLO temporaries (60.50G) exceeds available HBM"
    assert compiled._refused(error(f"RESOURCE_EXHAUSTED: {told} (15.75G).")) == 60.5 * 2**30
    older = "Ran out of memory in memory space hbm. Used 512.00M of 15.75G hbm. Exceeded hbm capacity by 1G."
    assert compiled._refused(error(older)) == 2**29
    with pytest.raises(UserError, match="the compiler refuses the training step: INTERNAL: no"):
        compiled._refused(error("INTERNAL: no\nmore"))


# ------------------------------------------------------------------------------------------- the run, without weights


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """A Hugging Face folder of bfloat16 weights, and one with its config.json alone."""
    import lcx
    from lcx import model as model_lib

    folder, bare = tmp_path_factory.mktemp("hf") / "whole", tmp_path_factory.mktemp("bare")
    model = tiny_model()
    lcx.save(folder, model, model_lib.init_params(model, jax.random.key(0), dtype=jnp.bfloat16), format="hf")
    shutil.copy(folder / "config.json", bare)
    return folder, bare


RUNS = {
    "extended": {"context_length": 64, "rope_scaling": {"rope_type": "yarn"}},
    "LoRA": {"lora": LoRA(rank=2)},
    "linearized": {"linearize": Linearize(window=8), "lora": LoRA(rank=2), "dtype": "bfloat16"},
}


@pytest.mark.parametrize("name", RUNS)
def test_the_state_is_that_of_the_run(name, llama, tmp_path):
    folder, bare = llama
    trainer = tiny_trainer(tmp_path, init_from=str(folder), **RUNS[name])
    mesh = trainer.mesh.build(jax.devices()[:1])
    with jax.set_mesh(mesh):
        real = trainer._start(mesh)
    for path in (folder, bare):
        planned = abstract.run_of(tiny_trainer(tmp_path, init_from=str(path), **RUNS[name]), mesh)
        assert planned.model == real.model and planned.trains == real.trains
        assert jax.tree.structure(planned.abstract) == jax.tree.structure(real.state)
        same = jax.tree.map(lambda a, b: (a.shape, a.dtype) == (b.shape, b.dtype), planned.abstract, real.state)
        assert all(jax.tree.leaves(same))


def test_the_batch_is_that_of_the_run(tmp_path):
    write_text(tmp_path)
    trainer = tiny_trainer(tmp_path)
    with trainer._batches("train", trainer.model, trainer.mesh.build(jax.devices()[:1])) as batches:
        batch = next(batches)
    assert {name: x.dtype for name, x in batch.items()} == abstract.FIELDS


def test_a_ladder_is_planned_at_its_longest_rung(llama, tmp_path):
    trainer = tiny_trainer(tmp_path, init_from=str(llama[1]))
    ladder = Ladder(trainer, (Rung(64, 5), Rung(256, 7)), {"rope_type": "yarn"})
    planned, notes = abstract.trainer_of(ladder)
    assert (planned.seq_len, planned.context_length, planned.steps) == (256, 256, 7)
    assert "longest rung, 256 tokens" in notes[0]


# ------------------------------------------------------------------------------------------------ counting, by hand

HLO = """HloModule jit_step, is_scheduled=true

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  ROOT %b = f32[] parameter(1)
}

%fused (p0: f32[4,8,128], p1: f32[8,128]) -> f32[4,8,128] {
  %p0 = f32[4,8,128]{2,1,0} parameter(0)
  %p1 = f32[8,128]{1,0} parameter(1)
  %zero = s32[] constant(0)
  ROOT %dus = f32[4,8,128]{2,1,0} dynamic-update-slice(%p0, %p1, %zero, %zero, %zero)
}

%cond (s: (s32[], f32[8,128])) -> pred[] {
  %s = (s32[], f32[8,128]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%s), index=0
  %n = s32[] constant(3)
  ROOT %lt = pred[] compare(%i, %n), direction=LT
}

%body (s: (s32[], f32[8,128])) -> (s32[], f32[8,128]) {
  %s = (s32[], f32[8,128]{1,0}) parameter(0)
  %x = f32[8,128]{1,0} get-tuple-element(%s), index=1
  %sum = f32[8,128]{1,0} all-reduce(%x), channel_id=1, replica_groups=[2,4]<=[8], to_apply=%add
  ROOT %out = (s32[], f32[8,128]{1,0}) tuple(%i, %sum)
}

ENTRY %main (x: f32[8,128], y: bf16[4,20]) -> f32[8,128] {
  %x = f32[8,128]{1,0} parameter(0)
  %y = bf16[4,20]{1,0:T(8,128)(2,1)} parameter(1)
  %kept = bf16[4,20]{1,0:T(8,128)(2,1)S(1)} copy(%y)
  %start = (s32[], f32[8,128]{1,0}) tuple(%zero, %x)
  %loop = (s32[], f32[8,128]{1,0}) while(%start), condition=%cond, body=%body, metadata={op_name="jit(step)/while"}
  %stack = f32[4,8,128]{2,1,0} fusion(%w, %x), kind=kLoop, calls=%fused
  %again = f32[4,8,128]{2,1,0} dynamic-update-slice(%stack, %x, %zero, %zero, %zero)
  ROOT %end = f32[8,128]{1,0} get-tuple-element(%loop), index=1
}
"""


def test_a_program():
    parsed = program.parse(HLO)
    assert parsed.entry == "main" and parsed.unknown_loops == 0
    times = {run.instruction.name: run.times for run in parsed.runs()}
    assert times["sum"] == 3 and times["stack"] == 1 and "lt" not in times
    y, kept = (one for one in parsed.computations["main"] if one.name in ("y", "kept"))
    assert (y.nbytes, y.held) == (4 * 20 * 2, 8 * 128 * 2), "a TPU's tile is whole"
    assert kept.held == 0, "vector memory is not the device's memory"
    matrix = 8 * 128 * 4
    # Three sums and, twice, one row of the stack are written and read; both parameters are read.
    assert traffic.memory_bytes(parsed) == 2 * (3 * matrix + 2 * matrix) + matrix + y.held


@pytest.mark.parametrize(
    ("line", "axes", "nbytes"),
    [
        ("f32[10]{0} all-reduce(%x), replica_groups=[4,2]<=[8]", "tensor", 40),
        ("f32[10]{0} all-reduce(%x), replica_groups=[2,4]<=[2,2,2]T(2,0,1)", "data+fsdp", 60),
        ("f32[12]{0} all-gather(%x), replica_groups={{0,4},{1,5},{2,6},{3,7}}", "data", 24),
        ("f32[12]{0} all-gather(%x), replica_groups=mesh['a'=2,'b'=2,'c'=2] {'b'}", "fsdp", 24),
        ("(f32[6]{0}, f32[12]{0}) all-gather-start(%x), replica_groups=[4,2]<=[8]", "tensor", 24),
        ("f32[6]{0} reduce-scatter(%x), replica_groups=[4,2]<=[8]", "tensor", 24),
        ("((f32[12]{0}), (f32[6]{0})) reduce-scatter-start(%x), replica_groups=[4,2]<=[8]", "tensor", 24),
        ("f32[10]{0} collective-permute(%x), source_target_pairs={{0,1},{1,0}}", "tensor", 40),
        ("(f32[10], f32[10], u32[], u32[]) collective-permute-start(%x), source_target_pairs={{0,2}}", "fsdp", 40),
        ("bf16[8,8]{1,0} all-to-all(%x), replica_groups={}", "data+fsdp+tensor", 112),
        ("f32[10]{0} all-reduce(%x), replica_groups={{0},{1},{2},{3},{4},{5},{6},{7}}", None, 0),
    ],
)
def test_what_a_collective_sends(line, axes, nbytes):
    text = f"ENTRY %main (x: f32[10]) -> f32[10] {{\n  ROOT %y = {line}, channel_id=1\n}}\n"
    mesh = {"data": 2, "fsdp": 2, "context": 1, "tensor": 2}
    assert traffic.by_axis(traffic.collectives(program.parse(text), mesh)) == ({axes: nbytes} if axes else {})


def test_flops_in_loops_recomputation_and_shards():
    mesh = sharding.make_mesh(fsdp=1, devices=jax.devices()[:1])
    x, w = jnp.zeros((3, 4)), jnp.zeros((5, 4, 4))
    one = 2 * 3 * 4 * 4

    def deep(x, w):
        layer = jax.checkpoint(lambda x, w: jnp.sin(jnp.sin(x @ w) @ w))
        return jnp.sum(jax.lax.scan(lambda x, w: (layer(x, w), None), x, w)[0])

    def count(f, *args):
        return flops.count(jax.jit(f).trace(*args))

    assert count(lambda x, w: x @ w[0], x, w).flops == one
    assert count(deep, x, w).flops == 5 * 2 * one
    assert count(jax.grad(deep, argnums=1), x, w).flops == 5 * (2 + 2 + 4) * one, "forward, again, two each backward"
    loop = count(lambda x, w, n: jax.lax.fori_loop(0, n, lambda _, x: x @ w[0], x), x, w, 3)
    assert (loop.flops, loop.loops) == (0, 1), "its length is not known: counted in another way, and said"
    experts = count(lambda x, w: jax.lax.ragged_dot(x, w, jnp.array([1, 1, 1, 0, 0])), x, w)
    assert experts.flops == one
    spec = jax.sharding.PartitionSpec()
    island = count(jax.shard_map(lambda x, w: x @ w[0], mesh=mesh, in_specs=(spec, spec), out_specs=spec), x, w)
    assert island.flops == one * mesh.size
    assert count(jnp.fft.fft, jnp.zeros((3, 64), jnp.complex64)).flops == 5 * 3 * 64 * 6
    assert count(lambda x: jnp.fft.irfft(jnp.fft.rfft(x)), jnp.zeros((3, 64))).flops == 5 * 3 * 64 * 6
    lhs, rhs = jnp.zeros((2, 10, 6)), jnp.zeros((3, 3, 8))  # NWC, 2 groups of 3 channels
    dims = ("NWC", "WIO", "NWC")
    conv = count(
        lambda a, b: jax.lax.conv_general_dilated(a, b, (1,), "SAME", dimension_numbers=dims, feature_group_count=2),
        lhs, rhs,
    )  # fmt: skip
    assert conv.flops == 2 * (2 * 10 * 8) * 3 * 3


@pytest.mark.parametrize("power", [1.0, 1.3, 0.8])
@pytest.mark.parametrize("start", [128, 5000, 3_000_000])
def test_the_longest_rows(power, start):
    tried = []

    def peak(seq_len):
        tried.append(seq_len)
        return int(1000 + seq_len**power)

    memory = 1000 + int(100_000**power)
    found = longest.longest(peak, memory, start=start, unit=128, tries=20)
    assert found % 128 == 0 and 100_000 * 15 / 16 - 128 <= found <= 100_000
    assert found in tried and len(tried) <= 14
    assert longest.longest(lambda seq_len: 2, 1, start=1024, unit=128) == 0, "nothing fits"


REMATS = {"none": (9, 3), "dots": (5, 4), "full": (2, 5), "host": (1, 5.6)}  # bytes of a row's tokens, and time
DEVICES, ROWS, LENGTH = 8, 16, 1 << 16


def toy_plan(memory):
    """A plan in which time and memory are known: weights are gathered once for every micro-batch."""

    def plan(trainer):
        mesh, (nbytes, seconds) = trainer.mesh, REMATS[trainer.remat]
        if mesh.tensor == 8:
            raise UserError("no such slice")
        rows = ROWS // trainer.accumulation / mesh.fsdp
        length = trainer.piece_length or LENGTH
        peak = 1000 / mesh.fsdp / mesh.tensor + nbytes * rows * length / 1024 / mesh.context
        made = {"mesh": dataclasses.asdict(mesh), "remat": trainer.remat, "accumulation": trainer.accumulation}
        time = seconds * (1.2 if trainer.piece_length else 1) + trainer.accumulation / 8
        time += mesh.context * mesh.tensor / 9
        made |= {"peak_bytes": peak, "fits": peak <= memory, "step_seconds": time, "mfu": None}
        return made | {"executed_flops": 0}

    return plan


@pytest.mark.parametrize("hosts", [False, True])
@pytest.mark.parametrize("memory", [160, 200, 300, 500, 1000, 10_000])
def test_the_search_finds_the_fastest(tmp_path, memory, hosts):
    trainer = tiny_trainer(tmp_path, batch_size=ROWS, seq_len=LENGTH)
    plan = toy_plan(memory)

    def possible(choice):  # weights alone
        return 1000 / choice.mesh.fsdp / choice.mesh.tensor <= memory or choice.mesh.tensor == 8

    found = search.search(trainer, DEVICES, plan, limit=1000, possible=possible, hosts=hosts)
    assert {choice.mesh.tensor for choice, _ in found.refused} == {8} and not found.untried
    assert (found.too_large > 0) == (memory < 1000)
    assert all(made["mesh"]["fsdp"] * made["mesh"]["tensor"] * memory >= 1000 for made in found.plans)
    tried, best = 0, math.inf
    for mesh in search.meshes(trainer, DEVICES):
        assert mesh.fsdp * mesh.context * mesh.tensor == DEVICES and ROWS % mesh.fsdp == 0
        counts = [count for count in (1, 2, 4, 8, 16) if ROWS // mesh.fsdp % count == 0]
        for piece in (None, search.PIECE) if mesh.tensor < 8 else ():
            remats = [remat for remat in REMATS if remat != "host" or (hosts and piece is None)]
            choices = (search.Choice(mesh, *rest, piece) for rest in itertools.product(remats, counts))
            plans = [plan(choice.of(trainer)) for choice in choices]
            tried += len(plans)
            if times := [made["step_seconds"] for made in plans if made["fits"]]:
                best = min(best, *times)
                break  # pieces are for what does not fit otherwise
    assert len(found.plans) < tried / 2, "most are never compiled"
    assert found.plans[0]["fits"] and found.plans[0]["step_seconds"] == best
    told = search.text(found, str)
    best = found.plans[0]
    assert f"--gin.Trainer.accumulation={best['accumulation']}" in told
    lines = told.split(".gin file\n")[1].splitlines()
    assert "trainer.Trainer.mesh = @sharding.MeshShape()" in lines
    assert f"sharding.MeshShape.fsdp = {best['mesh']['fsdp']}" in lines
    assert f"trainer.Trainer.remat = {best['remat']!r}" in lines
    assert "refused: tensor=8: no such slice" in told


def test_a_search_ends(tmp_path):
    trainer = tiny_trainer(tmp_path, batch_size=ROWS, seq_len=LENGTH)
    found = search.search(trainer, DEVICES, toy_plan(10_000), limit=4)
    assert len(found.plans) == 4 and "not tried: " in search.text(found, str)
    assert not search.search(trainer, DEVICES, toy_plan(10_000), limit=4, seconds=0).plans
    nothing = search.search(trainer, DEVICES, toy_plan(1), limit=1000)
    assert search.text(nothing, str).startswith("nothing that was tried fits")


def test_the_time_of_a_step():
    work = roofline.Work(5e3, 8e3, False, {"fsdp": 30.0}, 200.0, (20.0, 10.0), host_bytes=15e9)
    time = roofline.time_of(work, TOY, devices=4)
    assert (time.compute, time.memory, time.links, time.host) == (2.0, 2.0, 12.0, 3.0)
    assert time.total == 19.0 and time.overlapped == 12.0
    not_compiled = dataclasses.replace(work, memory_bytes=None)
    assert roofline.time_of(not_compiled, TOY, devices=4) is None


COPIES = """
%body (s: (bf16[4,8]{1,0:S(5)}, bf16[1,8])) -> (bf16[4,8]{1,0:S(5)}, bf16[1,8]) {
  %stack = bf16[4,8]{1,0:S(5)} get-tuple-element(%s), index=0
  %row = bf16[1,8]{1,0} get-tuple-element(%s), index=1
  %start = ((bf16[4,8]{1,0:S(5)}, bf16[1,8]{1,0}, s32[]), bf16[4,8]{1,0:S(5)}, u32[]) fusion-start(%stack, %row, %i)
  %done = bf16[4,8]{1,0:S(5)} fusion-done(%start)
  %read = bf16[1,8]{1,0} dynamic-slice(%done, %i, %i), dynamic_slice_sizes={1,8}
  ROOT %out = (bf16[4,8]{1,0:S(5)}, bf16[1,8]) tuple(%done, %read)
}

ENTRY %main (x: bf16[1,8]) -> bf16[4,8] {
  %x = bf16[1,8]{1,0} parameter(0)
  %empty = bf16[4,8]{1,0:S(5)} custom-call(), custom_call_target="AllocateBuffer"
  %s = (bf16[4,8]{1,0:S(5)}, bf16[1,8]) tuple(%empty, %x)
  %w = (bf16[4,8]{1,0:S(5)}, bf16[1,8]) while(%s), condition=%c, body=%body, c={"known_trip_count":{"n":"4"}}
  %all = bf16[4,8]{1,0:S(5)} get-tuple-element(%w), index=0
  ROOT %back = bf16[4,8]{1,0} copy(%all)
}
"""


def test_copies_to_the_memory_of_the_host():
    row = 2 * 8
    assert traffic.host_bytes(program.parse(COPIES)) == 4 * (row + row) + 4 * row, "slices, and once the whole"
    assert traffic.host_bytes(program.parse(HLO)) == 0
    gpus = topology.Topology("toy:2", TOY, [0, 1], 100)
    assert gpus.host_memory == 40 and gpus.fits(100, 40) and not gpus.fits(100, 41) and not gpus.fits(101, 0)
    assert gpus.needed(30, 10) == 30 and gpus.needed(30, 41) > 100
    chip = dataclasses.replace(TOY, near=0)
    assert topology.Topology("toy:2", chip, [0, 1], 100).host_memory == 10, "machines with fewer TPUs are smaller"
    cpus = topology.Topology("cpu:1", None, [0], 100)
    assert cpus.host_memory is None and cpus.fits(100, 50)
    assert "run at 5 GB/s in one direction" in roofline.assumptions(TOY, measured=False, devices=2, copies=True)[-1]


def test_the_speed_of_cpus_is_shared_by_their_devices(monkeypatch):
    monkeypatch.setattr(cpu_speed, "_best", lambda step, x: 2.0)
    chips = [cpu_speed.measured.__wrapped__(devices, "float32") for devices in (1, 4)]
    assert chips[0].flops == 4 * chips[1].flops == 2.0**30 and chips[0].bandwidth == 4 * chips[1].bandwidth == 2.0**27


def test_blocks_are_planned_at_their_largest(llama, tmp_path):
    """The state and the batch are those of the run that trains the block."""
    optimizer = AdamW(trainable="feature_map_|window_factors")
    objective = objectives.attention_transfer
    settings = {"linearize": Linearize(window=8), "objective": objective, "optimizer": optimizer, "dtype": "bfloat16"}
    trainer = tiny_trainer(tmp_path, init_from=str(llama[1]), **settings)
    planned, notes = abstract.trainer_of(Blocks(trainer, layers_per_block=1))
    assert (planned.first, planned.last) == (0, 1) and "largest of 2 blocks, layers 0 to 0" in notes[0]
    mesh = trainer.mesh.build(jax.devices()[:1])
    whole = dataclasses.replace(trainer, init_from=str(llama[0]))
    with jax.set_mesh(mesh):
        real = Blocks(whole, layers_per_block=1).block_trainer(tmp_path, 0, 1)._start(mesh)
        run = abstract.run_of(planned, mesh)
    assert run.model == real.model and run.trains == real.trains
    same = jax.tree.map(lambda a, b: (a.shape, a.dtype) == (b.shape, b.dtype), run.abstract, real.state)
    assert all(jax.tree.leaves(same))
    place = topology.Topology("cpu:1", None, jax.devices()[:1], 2**34)
    step = compiled.step_of(planned, place)
    assert report.plan(step, planned, place, None, notes)["fits"] and step.memory.batch == B * T * (2 * D + 8)
