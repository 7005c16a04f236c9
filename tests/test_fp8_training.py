"""Training with FP8 projections: delayed scaling against an emulation of Transformer Engine's rules in torch."""

import dataclasses
import functools
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from lcx import sharding
from lcx.convert.__main__ import main
from lcx.data import ByteTokenizer, Dataset
from lcx.layers import Linear
from lcx.lora import LoRA
from lcx.objectives import next_token, over_pieces
from lcx.ops import fp8
from lcx.optim import AdamW
from lcx.parameters import init_params
from lcx.pieces import Pieces
from lcx.striped_hyena import striped_hyena
from lcx.trainer import Trainer
from lcx.training import fp8_scaling, run, step

LARGEST = torch.tensor([448.0, 448.0, 57344.0])


class Emulated:
    """One projection's delayed scaling as Transformer Engine's DelayedScaling with the algorithm "max" has it."""

    def __init__(self, margin=0):
        self.scale, self.history, self.margin = torch.ones(3), torch.zeros(16, 3), margin

    def seen(self, place, tensor):
        self.history[0, place] = torch.maximum(self.history[0, place], tensor.abs().max())

    def cast(self, place, tensor):
        kind = torch.float8_e5m2 if place == 2 else torch.float8_e4m3fn
        self.seen(place, tensor)
        return (tensor * self.scale[place]).clamp(-LARGEST[place], LARGEST[place]).to(kind).float()

    def stepped(self):
        amax = self.history.max(dim=0).values
        wanted = (LARGEST / amax) / 2**self.margin
        wanted = torch.where(torch.isfinite(amax) & (amax > 0), wanted, self.scale)
        self.scale = torch.where(torch.isinf(wanted), torch.finfo(torch.float32).max, wanted)
        self.history = torch.roll(self.history, -1, 0)
        self.history[0] = 0


def bits(x):
    return np.asarray(x, np.float32).view(np.uint32)


@pytest.mark.parametrize("margin", [0, 3])
def test_scales_follow_the_rules_to_the_bit(margin):
    """Ordinary, growing, vanishing, zero, tiny, huge and infinite magnitudes; more steps than the history has rows."""
    rng = np.random.default_rng(0)
    seen = np.exp2(rng.uniform(-8, 8, (60, 3))).astype(np.float32)
    seen[5:8] = 0
    seen[20, 0], seen[21, 1], seen[22, 2] = np.inf, np.nan, 3e38
    seen[40:58, 1] = 2e-37  # whose scale would be infinite
    emulated, update = Emulated(margin), jax.jit(functools.partial(fp8.next_scales, margin=margin))
    scales, history = jnp.ones(3), jnp.zeros((16, 3))
    kept = []
    for row in seen:
        scales, history = update(scales, history, row)
        emulated.history[0] = torch.tensor(row)
        emulated.stepped()
        np.testing.assert_array_equal(bits(scales), bits(emulated.scale.numpy()))
        np.testing.assert_array_equal(np.asarray(history), emulated.history.numpy())
        kept.append(np.asarray(scales))
    assert kept[30][0] == kept[19][0] and kept[57][1] == np.finfo(np.float32).max


def test_a_projection_trains_as_emulated_to_the_bit():
    """20 steps of a projection: products, gradients, scales and history, with so few terms that sums are exact."""
    rng = np.random.default_rng(1)
    linear = Linear((8,), (16,), ("embed", "channels"), fp8=True)
    w = rng.standard_normal((8, 16)).astype(np.float32)
    variables = {"params": {"kernel": jnp.asarray(w), "fp8_scales": jnp.ones(2)}}
    state = {"in_proj": {"history": jnp.zeros((16, 3)), "gradient_scale": jnp.ones(())}}
    emulated = Emulated()

    @jax.jit
    def one(params, scaling, x, dy):
        y, pull = jax.vjp(lambda p, s, x: linear.apply({"params": p, "fp8": s}, x), params, scaling["in_proj"], x)
        grads, recorded, dx = pull(dy)
        after, new = fp8_scaling.after_step({"in_proj": params}, {"fp8": scaling}, {"fp8": {"in_proj": recorded}})
        return y, grads["kernel"], dx, after["in_proj"], new["fp8"]

    for number in range(20):
        size = np.float32(2.0 ** rng.integers(-6, 7) if number % 3 else 1)
        x, dy = (size * rng.standard_normal((4, n)).astype(np.float32) for n in (8, 16))
        y, dw, dx, variables["params"], state = one(variables["params"], state, x, dy)
        x8, w8 = emulated.cast(0, torch.tensor(x)), emulated.cast(1, torch.tensor(w))
        dy8 = emulated.cast(2, torch.tensor(dy))
        sx, sw, sg = emulated.scale
        for ours, theirs in ((y, x8 @ w8 * (1 / (sx * sw))), (dx, dy8 @ w8.T * (1 / (sg * sw)))):
            np.testing.assert_array_equal(np.asarray(ours), theirs.numpy())
        np.testing.assert_array_equal(np.asarray(dw), (x8.T @ dy8 * (1 / (sg * sx))).numpy())
        emulated.stepped()
        w = w - np.float32(0.125) * np.asarray(dw) / np.float32(size)
        variables["params"] = variables["params"] | {"kernel": jnp.asarray(w)}
        np.testing.assert_array_equal(bits(variables["params"]["fp8_scales"]), bits(emulated.scale[:2].numpy()))
        np.testing.assert_array_equal(bits(state["in_proj"]["gradient_scale"]), bits(emulated.scale[2].numpy()))
        np.testing.assert_array_equal(np.asarray(state["in_proj"]["history"]), emulated.history.numpy())


# ------------------------------------------------------------------------------------------------------ whole runs


def tiny(pattern="SS"):
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_heads": 1, "se_groups": 4, "mr_groups": 4}
    return striped_hyena(pattern=pattern, vocab_size=256, max_position_embeddings=256, fp8=True, **sizes)


def one_step(model, batch, **options):
    """The state after a step of the trainer, from parameters and a history that are the same each time."""
    pieces = options.pop("pieces", None)
    mesh = sharding.make_mesh(fsdp=1, devices=jax.devices()[:1])
    with jax.set_mesh(mesh):
        params = init_params(model, jax.random.key(0), mesh=mesh)
        prepared = run.prepared(AdamW(schedule="constant"), 10, model, mesh, options.pop("lora", None))
        objective = next_token if pieces is None else over_pieces(next_token, Pieces(pieces))
        one = step.make_step(
            model,
            prepared.optimizer,
            objective,
            lambda number: 1e-3,
            accumulation=options.pop("accumulation", 1),
            abstract=prepared.abstract,
            trains=prepared.trains,
        )
        weights = {"params": params}
        if prepared.lora is not None:
            weights["lora"] = prepared.lora.init(jax.random.key(1), model, mesh=mesh)
        opt_state = step.init_opt_state(prepared.optimizer, weights, prepared.abstract, prepared.trains)
        state = fp8_scaling.begun({**weights, "opt_state": opt_state}, prepared.abstract, {})
        return one(state, sharding.shard_batch(batch, mesh), np.int32(0))[0]


def test_micro_batches_pieces_and_pairs_record_the_same():
    """Inputs and weights of the first layer are the same however a batch is divided; gradients nearly so."""
    tokens = np.random.default_rng(0).integers(0, 256, (4, 33)).astype(np.int32)
    batch = {"tokens": tokens[:, :-1], "labels": tokens[:, 1:], "loss_weights": np.ones((4, 32), np.float32)}
    batch |= {"positions": np.tile(np.arange(32, dtype=np.int32), (4, 1)), "segment_ids": np.ones((4, 32), np.int32)}
    first = lambda state: state["fp8"]["stages_0"]["block_0"]["mixer"]["in_proj"]["history"][0]  # noqa: E731
    model = tiny("S")
    whole = one_step(model, batch)
    recorded = np.asarray(first(whole))
    assert (recorded[-1] > 0).all() and not recorded[:-1].any()
    scales = np.asarray(whole["params"]["stages_0"]["block_0"]["mixer"]["in_proj"]["fp8_scales"])[0]
    np.testing.assert_array_equal(scales, np.float32(448) / recorded[-1, :2])
    for options in ({"accumulation": 2}, {"pieces": 16}, {"lora": LoRA(rank=2)}):
        other = np.asarray(first(one_step(model, batch, **options)))
        np.testing.assert_array_equal(other[:, :2], recorded[:, :2])
        np.testing.assert_allclose(other[:, 2], recorded[:, 2], rtol=0.05)


def test_a_resumed_run_goes_on_bit_for_bit_and_is_exported(tmp_path):
    """6 steps at once, and 3 and 3; the histories arrive in a vortex file, from where another run goes on."""
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "a.txt").write_text("ACGTTGCA" * 200)
    data = Dataset(str(tmp_path / "text"), cache_dir=str(tmp_path / "cache"), tokenizer=ByteTokenizer(None, 0, 256))
    trainer = Trainer(data=data, model=tiny(), steps=6, batch_size=2, seq_len=32, checkpoint_every=3)
    whole = trainer.run(str(tmp_path / "whole")).state
    dataclasses.replace(trainer, stop_at=3).run(str(tmp_path / "halves"))
    halves = trainer.run(str(tmp_path / "halves")).state
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(bits(a), bits(b)), whole["fp8"], halves["fp8"])
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(bits(a), bits(b)), whole["params"], halves["params"])

    assert main([f"--src={tmp_path / 'halves'}", f"--dst={tmp_path / 'vortex'}", "--dst_format=vortex"]) == 0
    stored = torch.load(tmp_path / "vortex" / "model.pt", weights_only=True)
    ours = whole["fp8"]["stages_0"]
    for i in range(2):
        data = stored[f"blocks.{i}.projections._extra_state"].numpy().tobytes()
        state = pickle.loads(data)
        block = ours[f"block_{i}"]["mixer"]["in_proj"]
        history = np.asarray(block["history"][0])
        np.testing.assert_array_equal(bits(state["amax_history_fwd"][:, :2]), bits(history[:, :2]))
        np.testing.assert_array_equal(bits(state["amax_history_bwd"][:, 0]), bits(history[:, 2]))
        assert state["scale_bwd"][0] == float(block["gradient_scale"][0])
        assert np.count_nonzero(history[:, 0]) == 6
    assert main([f"--src={tmp_path / 'vortex'}", f"--dst={tmp_path / 'lcx'}", "--dst_format=lcx"]) == 0
    for name in ("vortex", "lcx"):
        begun = Trainer(data=trainer.data, init_from=str(tmp_path / name), steps=1, batch_size=2, seq_len=32)
        again = begun._start(begun.mesh.build()).state["fp8"]
        jax.tree.map(lambda a, b: np.testing.assert_array_equal(bits(a), bits(b)), again, whole["fp8"])
