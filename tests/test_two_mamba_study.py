"""The comparison of the 2Mamba paper's mixers: the rows of recall, and what is told of the runs that are there."""

import json
import math
import pathlib

import doc_scripts
import numpy as np
import pytest

from lcx import config, trainer
from lcx.convert.core.model_source import leaf_shapes
from lcx.mixers.two_mamba import PUBLISHED

ROOT = pathlib.Path(__file__).parent.parent
CONFIGS, STUDY = (ROOT / "configs" / "pretrain" / name for name in ("two_mamba", "two_mamba_study"))
TAIL = "A_mask_type_neg_softplus__in_conv_k_2"


@pytest.fixture
def study(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import two_mamba_study

    return two_mamba_study


@pytest.fixture
def ablations(study):
    import two_mamba_ablations

    return two_mamba_ablations


@pytest.fixture
def figures(study):
    import two_mamba_figures

    return two_mamba_figures


def test_the_assistant_says_the_values_and_nothing_else(study, tmp_path, monkeypatch):
    monkeypatch.setattr(study, "ROWS", 20)
    study.recall(tmp_path)
    rows = [json.loads(line)["messages"] for line in (tmp_path / "recall.jsonl").read_text().splitlines()]
    assert len(rows) == 20 * len(study.PAIRS)
    for turns in rows:
        text = "".join(turn["content"] for turn in turns)
        said = [turn["content"] for turn in turns if turn["role"] == "assistant"]
        pairs = dict(zip(text[0 : 2 * len(said) : 2], text[1 : 2 * len(said) : 2], strict=True))
        asked = [turn["content"][-1] for turn in turns if turn["role"] == "user"][: len(said)]
        assert len(text) == study.LENGTH and len(pairs) == len(said) in study.PAIRS
        assert said == [pairs[key] for key in asked]


def write_run(folder, loss, done=True):
    folder.mkdir(parents=True)
    lines = [{"step": 10, "tokens": 64.0, "loss": 3.0}, {"step": 10, "eval_loss": 3.0}]
    lines += [{"step": 20, "eval_loss": loss}]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if done:
        (folder / "done").touch()


def test_only_runs_that_are_done_count(study, tmp_path):
    for seed, loss in (("0", 2.0), ("1", 2.2), ("2", 9.0)):
        write_run(tmp_path / "text" / f"softmax_{seed}", loss, done=seed != "2")
    result = study.table(tmp_path, ["0", "1", "2"])
    softmax = result["models"]["softmax"]
    assert softmax["runs"] == {"0": [(640, 3.0), (1280, 2.0)], "1": [(640, 3.0), (1280, 2.2)]}
    np.testing.assert_allclose([softmax["loss_mean"], softmax["loss_sd"]], [2.1, 0.1 * 2**0.5])
    assert result["models"]["linear"]["loss_mean"] is None
    assert "2.100 +- 0.141" in study.told(result)
    result["models"]["softmax"]["recall"] = {"32": 99.9, "64": 50.0}
    study.pictures(tmp_path, result)
    names = ("loss_by_tokens", "throughput", "recall_of_all")
    assert all((tmp_path / f"{name}.svg").stat().st_size for name in names)


def test_a_run_without_its_last_evaluation_is_not_compared(study, tmp_path):
    write_run(tmp_path / "run", 2.0)
    with open(tmp_path / "run" / "metrics.jsonl", "a") as file:
        file.write(json.dumps({"step": 30, "tokens": 64.0, "loss": 2.0}) + "\n")
    with pytest.raises(SystemExit, match="was stopped in its last evaluation: remove it"):
        study.curve(tmp_path / "run")


def test_the_published_memory_of_decoding_is_that_of_its_shapes(study):
    """A head's state is that of the saved one, 135,392 numbers at 64; beside it, masks and the scores of one layer."""
    import two_mamba_decode

    assert two_mamba_decode.efficient_bytes(0, layers=1, heads=24) == 4 * 3_249_408  # of a medium layer
    pairs = two_mamba_decode.efficient_bytes(8192, layers=27, heads=24) - 27 * 4 * 3_249_408
    assert pairs == 27 * 8192**2 + 24 * 4 * 8192**2
    rows = json.loads((ROOT / "benchmarks/results/two_mamba_decode_cpu.json").read_text())["rows"]
    stored = {row["context"]: row["published_efficient_bytes"] for row in rows if row["mixer"] == "two_mamba"}
    assert stored == {length: two_mamba_decode.efficient_bytes(length) for length in stored} and 65536 in stored


def test_every_published_mixer_is_in_a_figure_and_every_run_has_a_configuration(figures, study):
    drawn = {line.model for figure in figures.FIGURES for line in figure.lines}
    names = {"two_mamba": "squared", "two_mamba_e": "exp"}  # how the study calls two of them
    short = {f"{score}__sm_norm__{TAIL}": name for name, score in names.items()}
    same = {f"linear__out_norm__{TAIL}"}  # a second spelling
    assert {short.get(name, name) for name in ("softmax", "mamba", *PUBLISHED)} - same == drawn
    runs = figures.runs(figures.SIZES["cpu"], 120, ["stdlib", "b c.txt"])
    assert len(runs) == len(set(runs)) == 56
    for model, *_ in runs.values():
        assert model in study.LABELS or (CONFIGS / f"{model}.gin").exists(), model
    assert runs["mamba_wider_1.5"][1:] == [
        "--gin.Decoder.hidden_size=96",
        "--gin.HEADS=3",
        "--gin.Stage.repeat=3",
        "--gin.Mlp.intermediate_size=138",
    ]
    assert runs["softmax_rows_4"][1:] == ["--gin.SEQ_LEN=1024", "--gin.Trainer.batch_size=4"]
    wide, long = (runs[f"mamba_{change}"][1:] for change in ("wider_1.5", "rows_4"))
    assert runs["mamba_wider_1.5_rows_4"][1:] == [*wide[:3], *long, *wide[3:]]
    assert runs["softmax_longer_4"][1:] == ["--gin.STEPS=480", "--gin.Trainer.eval_every=160"]
    assert runs["softmax_other_2"][1:] == ["--gin.TEXT='b c.txt'"]
    assert not [name for name in figures.runs(figures.SIZES["gpu"], 8000, []) if "other" in name]


def job_of(run):
    """What lcx.train would train with the flags of a run, over the study's configuration for a CPU."""
    model, *flags = run
    names = {"two_mamba": f"squared__sm_norm__{TAIL}"}
    flags = [flag.removeprefix("--gin.").split("=", 1) for flag in ("TEXT='text'", *flags)]
    config.parse([str(CONFIGS / f"{names.get(model, model)}.gin"), str(STUDY / "cpu.gin")], [tuple(f) for f in flags])
    return config._arguments(trainer.train, {"workdir": "nowhere"})["job"]


def test_the_flags_of_a_run_make_it_wider_longer_and_as_large_as_the_others(figures):
    runs = figures.runs(figures.SIZES["cpu"], 120, ["other"])
    jobs = {name: job_of(runs[f"{name}_wider_1.5"]) for name in ("softmax", "two_mamba", "mamba")}
    sizes = {name: sum(map(math.prod, leaf_shapes(job.model).values())) for name, job in jobs.items()}
    assert max(sizes.values()) / min(sizes.values()) < 1.02, sizes
    model = jobs["two_mamba"].model
    assert (model.hidden_size, model.stages[0].repeat, model.stages[0].pattern[0].mixer.num_heads) == (96, 3, 3)
    longer = job_of(runs["softmax_rows_4"])
    assert (longer.seq_len, longer.batch_size, longer.model.max_position_embeddings) == (1024, 4, 1024)
    more = job_of(runs["mamba_longer_4"])
    assert (more.steps, more.eval_every) == (480, 160)
    assert job_of(runs["softmax_other_1"]).data.source == "other"


def test_differences_count_only_beyond_the_noise_of_the_seeds(ablations):
    """Losses that are a number of the model and one of the seed have no noise; what is beyond them is."""
    offsets = {"0": 0.0, "1": 0.3, "2": -0.1}
    rest = np.random.default_rng(0).normal(size=(4, 3)) * 0.01
    models = {
        f"m{i}": {
            "runs": {
                seed: [(1, 9.0), (2, i + x + e)] for (seed, x), e in zip(offsets.items(), own, strict=True)
            }
        }
        for i, own in enumerate(rest)
    }
    centred = rest - rest.mean(0) - rest.mean(1, keepdims=True) + rest.mean()
    expected = (2 * (centred**2).sum() / 6) ** 0.5
    np.testing.assert_allclose(ablations.noise({"models": models, "seeds": list(offsets)}), expected)
    assert np.isnan(ablations.noise({"models": models, "seeds": ["0"]}))
    assert [ablations.verdict(0.1, ours, 0.01) for ours in (0.03, -0.03, 0.02, -0.01)] == [
        "holds",
        "reversed",
        "open",
        "open",
    ]
    assert ablations.verdict(0.1, 0.5, float("nan")) == "open"


def test_the_table_and_the_page_say_where_the_order_of_the_paper_holds(
    ablations, figures, tmp_path, monkeypatch
):
    study = {"seeds": ["0", "1"], "models": {name: {"runs": {}} for name in ("softmax", "mamba", "linear")}}
    for (name, about), loss in zip(study["models"].items(), (2.0, 2.1, 2.5), strict=True):
        about["runs"] = {
            "0": [[64, 3.0], [128, loss]],
            "1": [[64, 3.0], [128, loss + 0.005 * (name == "mamba")]],
        }
    study["models"] |= {name: {"runs": {}} for name in ("two_mamba", "two_mamba_e")}
    (tmp_path / "results.json").write_text(json.dumps(study))
    write_run(tmp_path / "ablations" / figures.OUT, 2.2)
    write_run(tmp_path / "ablations" / f"{figures.OUT}__ReLU", 2.501)
    write_run(tmp_path / "ablations" / f"{figures.OUT}__in_conv_k_2", 1.5, done=False)
    result = ablations.table(tmp_path)
    assert result == json.loads((tmp_path / "ablations.json").read_text()) | {"runs": result["runs"]}
    found = {figure["name"]: figure for figure in result["figures"]}
    assert {name: len(figure["lines"]) for name, figure in found.items()} == {
        "base": 3,
        "norm": 3,
        "buildup": 2,
    }
    assert [pair["verdict"] for pair in found["base"]["pairs"]] == ["holds"] * 3
    assert [pair["verdict"] for pair in found["norm"]["pairs"]] == ["open", "reversed", "reversed"]
    assert "of 3 pairs 0 as in the paper, 2 reversed" in ablations.told(result)
    assert ablations.told(result | {"noise": math.nan}).startswith("one seed does not tell how far apart")
    monkeypatch.syspath_prepend(ROOT / "scripts")
    import figure_two_mamba

    page = figure_two_mamba.ablations(result)
    assert "| RMSNorm of the output | 2.200 | 3.134 |" in page
    assert "Of 7 pairs of runs of which the paper has both losses, 4 have its order here, 2 the reversed one" in page
    assert "56 of 61 runs have not been made yet" in page
    assert "“RMSNorm of the output” is before “sum of the scores, ReLU”" in page
    ablations.pictures(tmp_path, result)
    drawn = {path.stem.removeprefix("two_mamba_") for path in tmp_path.glob("*.svg")}
    assert drawn == {"ablation_base", "ablation_buildup", "ablation_norm", "orders"}


def test_flags_behind_the_dashes_go_to_every_training_and_those_of_the_text_not_to_recall(tmp_path):
    words = "bash scripts/reproduce_two_mamba.sh --output=out --seeds=7 --steps=3 --recall_steps=4 --"
    words += " --gin.AdamW.weight_decay=0.5 --gin.SEQ_LEN=64 --gin.STEPS=9"
    commands = [command[3:] for command in doc_scripts.commands_of(words.split(), tmp_path) if "lcx.train" in command]
    assert len(commands) == 2 * 6
    for flags in commands:
        assert "--gin.AdamW.weight_decay=0.5" in flags and "--gin.Trainer.seed=7" in flags
        lengths = [flag for flag in flags if flag.startswith(("--gin.STEPS=", "--gin.SEQ_LEN="))]
        if any("/recall/" in flag for flag in flags):
            assert lengths == ["--gin.STEPS=4"]
        else:
            assert lengths == ["--gin.STEPS=3", "--gin.SEQ_LEN=64", "--gin.STEPS=9"]
