"""Reads what a report shows: the results of evaluations, and the metrics of training runs."""

import json
import pathlib
from collections.abc import Iterable, Mapping
from typing import Any

from lcx.errors import UserError

RESULTS = "results.json"


def read_results(path: str) -> dict[str, Any]:
    """The contents of a folder's results.json. Raises UserError if there is none or it is damaged."""
    place = pathlib.Path(path).expanduser()
    file = place / RESULTS if place.is_dir() else place
    if not file.is_file():
        raise UserError(
            f"no {RESULTS} at {path}: expected a folder that `python -m lcx.evaluate` wrote; change --results"
        )
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        return {"name": found["name"], **found, "evaluations": dict(found["evaluations"]), "file": str(file)}
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise UserError(f"{file} is not a readable evaluation result ({error}); evaluate again") from None


def labelled(runs: Iterable[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """{label: run}; a name that occurs again gets a number, as in "yarn (2)".

    Results of one model with different evaluations are one run, which has them all.
    """
    out: dict[str, dict[str, Any]] = {}
    for run in runs:
        label, number = str(run["name"]), 2
        while label in out and not _joins(run, out[label]):
            label, number = f"{run['name']} ({number})", number + 1
        out[label] = _joined(out[label], run) if label in out else run
    return out


def models(runs: Mapping[str, Mapping[str, Any]]) -> int:
    """The number of different models of these results: of different weights, or used differently."""
    return len({_identity(run) or label for label, run in runs.items()})


def _identity(run: Mapping[str, Any]) -> str | None:
    """The same for results of the same model; None if they do not say."""
    if run.get("weights") is None:
        return None
    return json.dumps([run["weights"], run["model"]["description"] or run["checkpoint"]], sort_keys=True)


def _joins(run: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether these results are of one model, and none is of the same evaluation."""
    own = _identity(run)
    return own is not None and own == _identity(other) and not _measured(run) & _measured(other)


def _measured(run: Mapping[str, Any]) -> set[str]:
    return {*run["evaluations"], *(run.get("errors") or {}), *(run.get("skipped") or {})}


def _joined(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, Any]:
    kinds = ("evaluations", "errors", "skipped")
    every = {kind: {**(first.get(kind) or {}), **(second.get(kind) or {})} for kind in kinds}
    return {**first, **every, "seconds": (first.get("seconds") or 0) + (second.get("seconds") or 0)}


def read_curves(workdir: str) -> dict[str, list[dict[str, float]]]:
    """{name: lines of metrics.jsonl, ordered by step} of a workdir, or of the runs inside it, such as a ladder's.

    A line that is not valid JSON (cut short by a kill) is ignored. Values of a step that was repeated replace the
    earlier ones. Raises UserError if there is no metrics.jsonl, or no line in it.
    """
    folder = pathlib.Path(workdir).expanduser()
    files = [folder / "metrics.jsonl"]
    if not files[0].is_file():
        inside = [*folder.glob("*/metrics.jsonl"), *folder.glob("*/*/metrics.jsonl")]  # 8192/round_0 of a ladder
        files = sorted(inside, key=lambda f: (f.stat().st_mtime, f))
    if not files:
        raise UserError(
            f"no metrics.jsonl in {workdir}: expected the workdir of a training run that has logged a step; change "
            "--workdir"
        )
    curves = {}
    for file in files:
        steps: dict[float, dict[str, float]] = {}
        for line in file.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                values = json.loads(line)
                steps[values["step"]] = steps.get(values["step"], {}) | {
                    k: float(v) for k, v in values.items()
                }
            except (ValueError, KeyError, TypeError):
                continue
        name = (folder.resolve().name / file.parent.relative_to(folder)).as_posix()
        curves[name] = [steps[step] for step in sorted(steps)]
    if not any(curves.values()):
        raise UserError(f"{files[0]} has no line of a step: expected a run that has logged one; change --workdir")
    return curves


def named_as_models(
    curves: dict[str, list[dict[str, float]]], workdir: str, runs: Mapping[str, Mapping[str, Any]]
) -> dict[str, list[dict[str, float]]]:
    """Gives the curve of a run the label of the model that was evaluated from its checkpoint, if there is one."""
    folder = pathlib.Path(workdir).expanduser().resolve()
    for label, run in runs.items():
        place = pathlib.Path(str(run.get("checkpoint")))
        if len(curves) == 1 and (place == folder or folder in place.parents):
            return {label: next(iter(curves.values()))}
    return curves


def evaluation_of(name: str, results: Mapping[str, Mapping[str, Any]]) -> Any:
    """The evaluation that produced these results, rebuilt from its recorded settings to draw and to explain them."""
    from lcx.checkpoint import model_json

    described = next((result["evaluation"] for result in results.values() if result.get("evaluation")), None)
    if described is None:
        raise UserError(f"the results do not record the settings of {name}")
    return model_json.from_json(described)
