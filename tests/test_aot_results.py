"""What the compilers said last is on file, whole; and what has grown since then is found."""

import json
import pathlib
import sys

import pytest

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent / "benchmarks"))
from aot import grown
from test_kernels_compile import KERNELS

RESULTS = pathlib.Path(__file__).parent.parent / "benchmarks" / "results" / "aot.json"


@pytest.fixture(scope="module")
def records():
    return json.loads(RESULTS.read_text())["records"]


@pytest.mark.parametrize("name", KERNELS)
def test_every_kernel_is_on_file(records, name):
    """Forward and with gradients for every target, with the static schedules on v5e."""
    own = [row for row in records if row["operator"] == name and row.get("implementation") == "best"]
    for target in KERNELS[name]:
        for train in (False, True):
            (row, *_) = [row for row in own if (row["target"], row["train"]) == (target, train)]
            assert row["kernels"] and "error" not in row, (target, train)
            assert not any(kernel.get("spills") for kernel in row["kernels"])
            if target == "v5e":  # of kernels that are equal libtpu schedules one
                stems = {kernel["name"].rpartition(".")[0] for kernel in row["kernels"]}
                known = {
                    k["name"].rpartition(".")[0]
                    for k in row["kernels"]
                    if (k.get("schedule") or {}).get("bundles")
                }
                assert known == stems


def test_what_has_grown_is_found(records):
    (row,) = [
        r
        for r in records
        if (r["operator"], r.get("target"), r.get("train")) == ("linear_attention", "h200", False)
        and r["implementation"] == "best"
    ]
    assert not grown([row], [row])
    kernels = [kernel | {"spills": 4, "registers": kernel["registers"] + 1} for kernel in row["kernels"]]
    (first, *_) = lines = grown([row | {"kernels": kernels, "temp_bytes": 2 * row["temp_bytes"]}], [row])
    assert "temp_bytes" in first and len(lines) == 1 + len(kernels)  # one register more is no news
    assert "spills 0 -> 4" in lines[1]
    (line,) = grown([{**row, "kernels": [], "error": "VMEM"}], [row])
    assert line.endswith("VMEM")
