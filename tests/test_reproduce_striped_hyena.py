"""The comparison of a StripedHyena 2 with a Llama, and the benchmark of its mixers."""

import json
import math
import os
import pathlib
import random
import statistics
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parent.parent


@pytest.fixture
def compare(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import striped_hyena_vs_llama

    return striped_hyena_vs_llama


def letters(count, seed=0):
    return "".join(random.Random(seed).choices("ACGTacgtN", k=count))


def records(path):
    found, name = {}, ""
    for line in path.read_text().splitlines():
        if line.startswith(">"):
            name = line[1:]
            found[name] = ""
        else:
            found[name] += line
    return found


@pytest.mark.parametrize("sizes", [[60_000], [30_000, 20_000, 10_000], [57_000, 0, 3_000]])
def test_the_held_out_region_is_apart(compare, tmp_path, sizes):
    """The first nine tenths, and the tenth after them: nothing in both, nothing left out, no record across two."""
    texts = [letters(size, seed) for seed, size in enumerate(sizes)]
    (tmp_path / "a.fa").write_text("".join(f">r{i} x\n{text}\n" for i, text in enumerate(texts)))
    compare.split(str(tmp_path / "a.fa"), str(tmp_path), letters=10**6)
    trained, held_out = (records(tmp_path / name) for name in ("train.fa", "held_out.fa"))
    assert "".join([*trained.values(), *held_out.values()]) == "".join(texts)
    assert len("".join(held_out.values())) == 6_000
    assert max(map(len, held_out.values())) <= compare.PIECE
    for name, text in {**trained, **held_out}.items():
        record, _, place = name.partition(":")
        first, last = map(int, place.split("-"))
        assert texts[int(record[1:])][first - 1 : last] == text


def test_as_many_letters_as_asked_for(compare, tmp_path):
    (tmp_path / "a.fa").write_text(">a\n" + letters(200_000) + "\n")
    compare.split(str(tmp_path / "a.fa"), str(tmp_path), letters=9000)
    assert [len(text) for text in records(tmp_path / "held_out.fa").values()] == [8192, 808]


def write_run(folder, *, rate, seed, nll, loss, parameters):
    work = folder / f"rate{rate}_seed{seed}"
    (work / "eval").mkdir(parents=True)
    rows = [{"step": 5, "tokens_per_second": 100.0}, {"step": 10, "eval_loss": loss}]
    (work / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (work / "seconds").write_text("7\n3\n")
    (work / "operative_config.gin").write_text(
        "STEPS = 10\ntrainer.Trainer.steps = %STEPS\ntrainer.Trainer.batch_size = 4\nTrainer.seq_len = 32\n"
    )
    found = {"nll": nll, "perplexity": math.exp(nll), "standard_error": 0.01, "sequences": [{"scored": 9}]}
    results = {"model": {"num_params": parameters}, "evaluations": {"sequence_likelihood": found}}
    (work / "eval" / "results.json").write_text(json.dumps(results))


def test_the_table(compare, tmp_path):
    nlls = {"striped_hyena": [1.30, 1.32, 1.31], "llama": [1.35, 1.33, 1.36]}
    for model, parameters in (("striped_hyena", 1000), ("llama", 1005)):
        for seed, nll in enumerate(nlls[model]):
            write_run(tmp_path / model, rate="3e-3", seed=seed, nll=nll, loss=1.2, parameters=parameters)
        write_run(tmp_path / model, rate="1e-2", seed=0, nll=9.0, loss=1.3, parameters=parameters)
        write_run(tmp_path / model, rate="1e-3", seed=0, nll=0.1, loss=math.nan, parameters=parameters)
    result = compare.compare(str(tmp_path), ["1e-3", "3e-3", "1e-2"], ["0", "1", "2"])
    ours = result["models"]["striped_hyena"]
    assert (ours["learning_rate"], ours["tokens"], ours["parameters"]) == (3e-3, 10 * 4 * 32, 1000)
    perplexities = [math.exp(x) for x in nlls["striped_hyena"]]
    assert ours["perplexity_mean"] == pytest.approx(statistics.mean(perplexities))
    assert ours["perplexity_sd"] == pytest.approx(statistics.stdev(perplexities))
    assert ours["runs"][0]["train_seconds"] == 10
    assert result["loss_difference"]["by_seed"] == pytest.approx([-0.05, -0.01, -0.05])
    text = compare.table(result)
    assert "0.0367 nats a letter below the Llama (by seed: -0.0500, -0.0100, -0.0500)" in text
    assert "not equal" not in text
    result["parameter_ratio"] = 1.02
    assert "not equal: 1.020x the parameters" in compare.table(result)
    compare.draw(result, tmp_path / "a.png")
    assert (tmp_path / "a.png").stat().st_size > 5000


PARAMETERS = """
import os, sys
import gin
from lcx import config, data, model, trainer
for path in sys.argv[1:]:
    if os.fork() == 0:
        config.parse([path], [("FASTA", "'a.fa'")])
        found = gin.query_parameter("lcx.trainer.Trainer.model").scoped_configurable_fn()
        print(model.num_params(found), flush=True)
        os._exit(0)
    assert os.wait()[1] == 0, path
"""


def test_the_two_have_equally_many_parameters():
    """Each file in a process of its own, since gin remembers what was read before."""
    names = [f"{name}{size}" for size in ("", "_large") for name in ("striped_hyena", "llama")]
    done = subprocess.run(
        [sys.executable, "-c", PARAMETERS, *(f"configs/pretrain/genome/{name}.gin" for name in names)],
        cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    small, llama, large, llama_large = map(int, done.stdout.split())
    assert small == pytest.approx(llama, rel=0.01) and large == pytest.approx(llama_large, rel=0.01)
    assert large > 2 * small


def test_end_to_end(tmp_path):
    """Everything that the script does, in tiny; a second call finds all of it done."""
    place = tmp_path / "repository"
    (place / "scripts").mkdir(parents=True)
    for name in ("lcx", "configs", "benchmarks", "kernels_pallas"):
        (place / name).symlink_to(ROOT / name)
    own = (
        ROOT / "scripts" / "_env.sh"
    ).read_text() + 'use_venv() { cd "$(dirname "${BASH_SOURCE[0]}")/.."; }\n'
    (place / "scripts" / "_env.sh").write_text(own)  # without an environment of its own
    script = place / "scripts" / "reproduce_striped_hyena.sh"
    script.symlink_to(ROOT / "scripts" / script.name)
    (tmp_path / "a.fa").write_text(">a\n" + letters(20_000) + "\n")
    out = tmp_path / "out"
    sizes = {
        "PATTERN": "'S'",
        "LAYERS": 1,
        "WIDTH": 16,
        "HEADS": 2,
        "GROUPS": 4,
        "SEQ_LEN": 32,
        "BATCH_SIZE": 2,
    }
    tiny = [f"--gin.{name}={value}" for name, value in sizes.items()]
    command = [
        "bash",
        str(script),
        f"--fasta={tmp_path / 'a.fa'}",
        f"--output={out}",
        "--steps=3",
        "--rates=3e-3",
    ]
    command += ["--seeds=5", "--letters=500", "--", *tiny, "--gin.STRIPED_HYENA_MLP=32", "--gin.LLAMA_MLP=36"]
    env = os.environ | {
        "PATH": f"{pathlib.Path(sys.executable).parent}:{os.environ['PATH']}",
        "LCX_CACHE": str(tmp_path / "cache"),
        "JAX_NUM_CPU_DEVICES": "1",
        "JAX_PLATFORMS": "cpu",
    }
    first = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True)
    assert first.returncode == 0, first.stderr[-3000:]
    result = json.loads((out / "results.json").read_text())
    assert result["same_tokens"] and abs(result["parameter_ratio"] - 1) < 0.03
    for model in result["models"].values():
        assert model["tokens"] == 3 * 2 * 32 and model["learning_rate"] == 3e-3
        assert [run["seed"] for run in model["runs"]] == [5] and model["runs"][0]["letters_scored"] == 499
        assert 3 < model["perplexity_mean"] < 1000
    assert "nats a letter" in first.stdout and (out / "perplexity.png").exists()
    second = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True)
    assert second.returncode == 0 and "lcx.train" not in second.stderr and "lcx.evaluate" not in second.stderr
    assert second.stdout == first.stdout


def test_arguments_are_checked():
    script = ROOT / "scripts" / "reproduce_striped_hyena.sh"
    for arguments, message in (([], "--fasta is missing"), (["--step=3"], "unknown argument --step=3")):
        done = subprocess.run(["bash", str(script), *arguments], capture_output=True, text=True)
        assert done.returncode == 2 and message in done.stderr


def test_the_benchmark_compares_equal_functions(monkeypatch):
    """vortex's formulation, written anew there, in outputs and gradients."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import striped_hyena

    monkeypatch.setattr(striped_hyena, "CHECKED", 257)
    found = striped_hyena.check(32)
    assert 0 < max(found.values()) < 1e-5
