"""The committed tables of plans and of their errors agree with the scripts that made them and with the recipes."""

import json
import pathlib
import re
import sys

import pytest
from tiny_runs import ROOT

sys.path.insert(0, str(pathlib.Path(ROOT) / "benchmarks"))

PLANNED = re.compile(r"# Planned: +(.+) on (\S+): ([\d.]+) GiB of each device(, which does not fit)?$", re.MULTILINE)


def test_the_table_of_errors():
    """The committed comparison with measured memory is of all configurations that the script has."""
    import plan_errors

    rows = json.loads((ROOT / "benchmarks" / "results" / "plan_errors.json").read_text())["rows"]
    assert [row["name"] for row in rows] == list(plan_errors.CASES)
    for row in rows:
        assert row["error"] >= -0.01, "never promises less than what was measured"
        assert row["error"] == pytest.approx(row["planned_mib"] / row["measured_mib"] - 1, abs=2e-3)


def test_headers_of_recipes_agree_with_the_committed_plans():
    import plan_table

    found = json.loads((ROOT / "benchmarks" / "results" / "plans.json").read_text())["rows"]
    plans = {(row["name"], row["topology"]): row for row in found if "error" not in row}
    promised = set()
    for path in sorted((ROOT / "configs").rglob("*.gin")):
        for name, place, gib, large in PLANNED.findall(path.read_text()):
            row = plans[name, place]
            assert (f"{row['peak_bytes'] / 2**30:.1f}", not large) == (gib, row["fits"]), (path, name, place)
            recipes = plan_table.ROWS[name].gin_files or ("configs/extend/evo2_ladder.gin",)
            assert str(path.relative_to(ROOT)) in recipes, f"{path} promises what another recipe needs"
            promised.add((name, place))
    assert promised, "no recipe names a plan"
    for (name, place), row in plans.items():
        recipe, kind = plan_table.ROWS[name], place.split(":")[0]
        assert place == plan_table.slice_of(recipe, kind)
        assert tuple(row["mesh"].values())[1:] == recipe.elsewhere.get(kind, recipe.mesh)


def test_what_would_fit():
    import plan_table

    made = {"parameter_bytes": 10, "optimizer_bytes": 20, "batch_bytes": 0, "activation_bytes": 70 + 10}
    made |= {"trained_parameters": 5, "model_parameters": 5, "mesh": {"fsdp": 4, "context": 2}, "topology": "v6e:2x4"}
    assert plan_table.would_fit(made | {"memory_bytes": 80}) == {"fsdp": 4, "context": 4}, "40 + 70 / 2 of 76"
    assert plan_table.would_fit(made | {"memory_bytes": 40}) == {"fsdp": 8, "context": 8}, "20 + 70 / 4 of 38"
    wide = made | {"memory_bytes": 80, "mesh": {"fsdp": 64, "context": 2}}
    assert plan_table.would_fit(wide | {"topology": "v5p:4x4x8"}) == {"fsdp": 64, "context": 4}
    assert plan_table.would_fit(wide) == {"fsdp": 64, "context": 4}, "256 chips, all of a pod"
    assert plan_table.would_fit(wide | {"memory_bytes": 40}) == {}, "there are no 1024 chips"
