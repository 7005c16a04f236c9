"""configs/pretrain/two_mamba: as the script writes it, of the published sizes, with the published learning rates."""

import math
import runpy

import numpy as np
import pytest
from test_configs import ROOT

from lcx import config, trainer
from lcx.convert.core import model_source
from lcx.convert.two_mamba import settings_writer
from lcx.optim import AdamW

SCRIPT = runpy.run_path(str(ROOT / "scripts" / "two_mamba_configs.py"))
SQUARE = "squared__sm_norm__A_mask_type_neg_softplus__in_conv_k_2"
# millions of parameters, as published
PARAMETERS = [
    (SQUARE, "small", 275.8),
    (SQUARE, "medium", 736.8),
    ("softmax", "small", 275.3),
    ("mamba", "medium", 682.4),
]


def test_the_files_are_those_that_the_script_writes():
    folder, files = SCRIPT["FOLDER"], SCRIPT["files"]()
    found = {path.relative_to(folder).as_posix(): path.read_text() for path in folder.rglob("*.gin")}
    assert found == files
    assert len(files) == 28 + 4


def job_of(name, size):
    paths = [str(SCRIPT["FOLDER"] / f"{name}.gin"), str(SCRIPT["FOLDER"] / "sizes" / f"{size}.gin")]
    config.parse(paths, [("TEXT", "'text'"), ("TOKENIZER", "'bytes'")])
    return config._arguments(trainer.train, {"workdir": "nowhere"})["job"]


@pytest.mark.parametrize(("name", "size", "millions"), PARAMETERS)
def test_the_sizes_are_the_published_ones(name, size, millions):
    model = job_of(name, size).model
    shapes = model_source.leaf_shapes(model)
    total = sum(map(math.prod, shapes.values()))
    assert round(total / 1e6, 1) == millions
    assert settings_writer.model_size(model) == size  # by which the published code builds it
    assert settings_writer.model_size(model.clone(hidden_size=1000, parent=None)) is None


def test_the_learning_rates_are_the_published_ones(reference):
    job = job_of(SQUARE, "small")
    with np.load(reference / "reference" / "two_mamba" / "lr_schedule.npz") as file:
        saved = {key: file[key] for key in file.files}
    rates = job.optimizer.learning_rates(job.steps)
    some = [0, 1, 2, 3, 5000, 9999, 10000, 10001, 10002, 10049]
    ulp = 1e-4 * 2**-23  # optax computes the schedule in float32, as a difference from its end
    used = np.array([rates(i) for i in some])
    np.testing.assert_allclose(used, saved["lr_used"][some], rtol=1e-6, atol=ulp)
    after = np.array([rates(int(step) + 1) for step in saved["far_steps"]])  # of the update after step `far`
    np.testing.assert_allclose(after, saved["far_lr_after"], rtol=1e-6, atol=ulp)
    expected = AdamW(1e-4, "linear", 1, 10_000, final_fraction=0.0, b2=0.999, eps=1e-7, weight_decay=0.01)
    assert job.optimizer == AdamW(**vars(expected) | {"decay": ".", "clip_norm": None})
    assert (job.steps, job.last_step, job.dtype) == (1_000_000, 100_001, "bfloat16")
