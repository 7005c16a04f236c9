"""Evo 2's ladder in small: a StripedHyena 2 of 256 bases climbs to 512 and 1024 on E. coli."""

import gzip
import json
import pathlib

import jax
import numpy as np

import lcx
from lcx import objectives
from lcx.data import ByteTokenizer, Dataset
from lcx.ladder import Ladder, Rung
from lcx.optim import AdamW
from lcx.striped_hyena import striped_hyena
from lcx.trainer import Trainer


def test_the_ladder_of_evo2(tmp_path, reference):
    with gzip.open(reference / "data" / "genomes" / "ecoli_k12_mg1655.fna.gz", "rt") as file:
        header, *lines = file.read(80_000).splitlines()
    pieces = ["".join(lines[i : i + 30]) for i in range(0, len(lines), 30)]
    (tmp_path / "e.fa").write_text("".join(f">piece{i}\n{piece}\n" for i, piece in enumerate(pieces)))
    model = striped_hyena(
        pattern="DH*", hidden_size=32, intermediate_size=48, num_heads=2, max_position_embeddings=256,
        se_groups=4, mr_groups=8, init_length=256,
    )  # fmt: skip
    shared = dict(
        data=Dataset(
            str(tmp_path / "e.fa"),
            tokenizer=ByteTokenizer(bos_id=None, eos_id=0, vocab_size=512),
            document_mask=False,
            eval_fraction=0.0,  # one program less for each length
            cache_dir=str(tmp_path / "cache"),
        ),
        objective=objectives.nucleotides,
        optimizer=AdamW(learning_rate=3e-3, warmup_steps=2, weight_decay=0.1),
        steps=6,
        batch_size=4,
        seq_len=256,
        log_every=1,
        checkpoint_every=6,
    )
    Trainer(model=model, **shared).run(str(tmp_path / "base"))
    ladder = Ladder(
        trainer=Trainer(init_from=str(tmp_path / "base"), **shared),
        rope_scaling={"rope_type": "linear"},
        scale_learning_rate=False,
        rungs=(
            Rung(context_length=512, steps=3, batch_size=2),
            Rung(context_length=1024, steps=3, batch_size=1, rope_theta=1e6),
        ),
    )
    last = ladder.run(str(tmp_path / "ladder"))
    metrics = [json.loads(line) for line in pathlib.Path(last, "metrics.jsonl").read_text().splitlines()]
    steps = [row for row in metrics if "learning_rate" in row]
    assert max(row["learning_rate"] for row in steps) == np.float32(3e-3)  # not divided by the square root of 4
    assert all(np.isfinite(row["loss"]) and row["loss"] < 6 for row in steps)
    extended, params = lcx.load(last)
    (rope,) = {b.mixer.rope for s in extended.stages for b in s.pattern if hasattr(b.mixer, "rope")}
    assert (rope.rope_type, rope.factor, rope.rope_theta) == ("linear", 4.0, 1e6)
    assert extended.max_position_embeddings == 1024
    _, before = lcx.load(tmp_path / "base")
    assert jax.tree.map(np.shape, params) == jax.tree.map(np.shape, before)  # filters need no extension
    decay, kept = (tree["stages_0"]["block_0"]["mixer"]["decay"] for tree in (params, before))
    np.testing.assert_array_equal(decay, kept)  # copied, never trained or computed again
    tokens = np.frombuffer("".join(lines).encode()[: 2 * 1024], np.uint8).astype(np.int32).reshape(2, 1024)
    assert np.isfinite(np.asarray(lcx.logits(extended, params, tokens))).all()
