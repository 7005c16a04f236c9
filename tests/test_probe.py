"""The probe finds a signal that is there, and none in noise."""

import json
import pathlib
import sys

import numpy as np
import pytest
from doc_pages import ROOT

sys.path.insert(0, str(ROOT / "scripts"))
import train_probe

rng = np.random.default_rng(0)
X = rng.standard_normal((200, 12)).astype(np.float32)


@pytest.mark.parametrize("hidden", [0, 16])
def test_signal_and_noise(hidden):
    y = X @ rng.standard_normal(12) + 0.1 * rng.standard_normal(200)
    settings = {"hidden": hidden, "steps": 300, "seed": 0}
    assert train_probe.probe(X, [str(v) for v in y], **settings)["r2"] > 0.8
    words = np.array(["high", "low"])[(y > 0).astype(int)].tolist()
    found = train_probe.probe(X, words, **settings)
    assert found["accuracy"] > 0.85 > found["accuracy_of_the_most_frequent"]
    noise = train_probe.probe(X, rng.permutation(words).tolist(), **settings)
    assert noise["accuracy"] < 0.75


def test_a_probe_of_files(tmp_path, monkeypatch, capsys):
    names = [f"g.fa:r{i // 2}" for i in range(40)]  # two windows each
    signal = np.repeat(np.arange(20) % 2, 2)[:, None] + 0.01 * rng.standard_normal((40, 3))
    np.savez(tmp_path / "e.npz", record=names, start=np.zeros(40), stop=np.ones(40), **{"layers.1": signal})
    rows = ["record\tlabel", *(f"r{i}\t{'ab'[i % 2]}" for i in range(19))]
    (tmp_path / "labels.tsv").write_text("\n".join(rows))
    words = [f"--embeddings={tmp_path}/e.npz", f"--labels={tmp_path}/labels.tsv", f"--output={tmp_path}/r.json"]
    monkeypatch.setattr(sys, "argv", ["train_probe", *words, "--steps=100"])
    assert train_probe.main() == 0
    assert json.loads(pathlib.Path(tmp_path / "r.json").read_text())["accuracy"] == 1
    assert "19 of 20 sequences have a label" in capsys.readouterr().err
    (tmp_path / "labels.tsv").write_text("a\tb\n1\t2\n")
    assert train_probe.main() == 2 and "columns record and label" in capsys.readouterr().err
