"""The plan of a linearization, against what is published of the three sizes."""

import argparse
import importlib.util
import pathlib
import sys

import pytest

PATH = pathlib.Path(__file__).parents[1] / "benchmarks" / "linearize_plan.py"
SETTINGS = argparse.Namespace(
    tokens=20.5e6, seq_len=1024, batch_size=8, accumulation=1, peak_tflops=989.0, mfu=0.4
)


@pytest.fixture(scope="module")
def planner():
    spec = importlib.util.spec_from_file_location("linearize_plan", PATH)
    module = importlib.util.module_from_spec(spec)
    sys.modules["linearize_plan"] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("size", "layers", "parameters", "new", "terabytes"),
    [
        ("8b", 32, 8_030_261_248, 16.8e6, 0.168),
        ("70b", 5, 70_553_706_496, 83.9e6, 5.4),  # arXiv 2410.10254: 5.4 and 9.4 TB, 264M at 405B
        ("405b", 9, 405_853_388_800, 264e6, 9.4),
    ],
)
def test_published_counts(planner, size, layers, parameters, new, terabytes):
    found = planner.plan(size, layers, 8, SETTINGS)
    assert found["parameters"] == parameters
    assert found["new_parameters"] == pytest.approx(new, rel=2e-3)
    assert found["input_bytes"] / 1e12 == pytest.approx(terabytes, rel=1e-2)
    assert found["transfer"]["trained_parameters"] * found["blocks"] == pytest.approx(new, rel=2e-3)
    if found["blocks"] > 1:  # a block is less than the whole
        assert found["gb_per_device"]["transfer"] < found["gb_per_device"]["lora"] / 3
