"""benchmarks/accelerator.sh: its dry run, killed and taken up again, and that no kernel is missing from its table."""

import json
import os
import signal
import subprocess
import sys

import pytest
from doc_pages import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))
import accelerator
import kernels
from operators import VARIANTS

UNITS = [
    "check/short_conv/bfloat16",
    "check/short_conv_packed/bfloat16",
    "speed/short_conv/64",
    "step/llama/64",
]
HANGS = """
import accelerator, os, signal
accelerator.step = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
accelerator.KINDS["step"] = accelerator.step
raise SystemExit(accelerator.main())
"""


def test_dry_run_killed_and_taken_up(tmp_path):
    """What was done before the kill stays as it is; what was running is done again, and given up the second time."""
    output = tmp_path / "dry.json"
    flags = ["--dry", "--operators=short_conv,short_conv_packed", "--models=llama", f"--output={output}"]
    environment = os.environ | {
        "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'benchmarks'}",
        "PYTHON": sys.executable,
    }
    command = [sys.executable, "-c", HANGS, *flags]
    killed = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    before = json.loads(output.read_text())["units"]
    assert [name for name in UNITS if "result" in before.get(name, {})] == UNITS[:3]
    assert before[UNITS[3]] == {"attempts": 1}

    command = ["bash", ROOT / "benchmarks" / "accelerator.sh", *flags]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    after = json.loads(output.read_text())
    assert {name: after["units"][name] for name in UNITS[:3]} == {name: before[name] for name in UNITS[:3]}
    step = after["units"][UNITS[3]]
    assert step["attempts"] == 2 and step["result"]["loss"] > 5.0 and step["result"]["tokens_per_second"] > 0
    assert set(after["units"][UNITS[0]]["result"]["errors"]) == {"triton", "xla"}
    assert {row["form"] for row in after["units"][UNITS[2]]["result"]["rows"]} == {"triton", "xla"}
    assert all(name in done.stdout for name in after["units"]) and "not reached: nothing" in done.stdout


def test_what_ended_its_process_twice_is_given_up():
    result = {"units": {"a": {"attempts": 1}, "b": {"attempts": 2}, "c": {"attempts": 1, "result": {}}}}
    assert accelerator.pending(result, ["a", "b", "c", "d"]) == ["d", "a"]
    assert "2 times" in accelerator.line("b", result["units"]["b"])


@pytest.mark.parametrize("platform", ["gpu", "tpu"])
def test_every_kernel_is_in_the_table(monkeypatch, platform):
    """A kernel that no operator of benchmarks/operators.py reaches would be neither checked nor timed."""
    called = set()

    def recorded(name, fn):
        def call(*args, **kwargs):
            called.add(name)
            return fn(*args, **kwargs)

        return call

    entries = accelerator.entries()
    assert len(entries) >= 8
    with accelerator.interpreted(platform):
        for name, fn in entries.items():
            module, key = name.split(".")
            monkeypatch.setattr(f"kernels_pallas.{module}.{key}", recorded(name, fn))
        for name, operator in VARIANTS.items():
            form = {"gpu": "triton", "tpu": "tpu"}[platform]
            arrays = operator.structs(
                operator.size, B=1, T=8192 if "either" in name else 512, dtype="bfloat16"
            )
            if form in kernels.forms_here(operator, operator.size, "bfloat16", (form,)):
                kernels.jax.eval_shape(operator.forward(form), arrays)
    assert called == set(entries)
    assert {name.split("/")[1] for name in accelerator.units(arguments()) if name.startswith("check")} == set(
        VARIANTS
    )


def arguments():
    return type("Arguments", (), {"operators": None, "dry": False, "models": "llama"})
