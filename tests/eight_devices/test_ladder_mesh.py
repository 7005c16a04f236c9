"""A ladder whose second rung trains on another mesh: one setting, and the same losses."""

import numpy as np
from tiny_runs import dataset, losses, tiny_model, tiny_trainer, write_text

from lcx.ladder import Ladder, Rung
from lcx.optim import AdamW
from lcx.sharding import MeshShape
from lcx.trainer import Trainer


def test_the_mesh_changes_in_the_middle_of_a_ladder(tmp_path):
    write_text(tmp_path)
    tiny_trainer(tmp_path, model=tiny_model(max_position_embeddings=64), steps=2).run(str(tmp_path / "base"))
    trainer = Trainer(
        init_from=str(tmp_path / "base"),
        data=dataset(tmp_path),
        optimizer=AdamW(learning_rate=1e-3, warmup_steps=1),
        steps=1,
        seq_len=64,
        batch_size=8,
        log_every=1,
        mesh=MeshShape(fsdp=8),
        eval_batches=1,
    )
    found = {}
    for name, changed in {"same": None, "another": MeshShape(fsdp=4, tensor=2)}.items():
        rungs = (Rung(context_length=128, steps=2), Rung(context_length=256, steps=3, mesh=changed))
        Ladder(trainer=trainer, rungs=rungs, rope_scaling={"rope_type": "yarn"}).run(str(tmp_path / name))
        found[name] = losses(tmp_path / name / "256" / "round_0")
    assert len(found["same"]) >= 3
    np.testing.assert_allclose(found["another"], found["same"], rtol=1e-4)
