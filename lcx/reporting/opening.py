"""The opening of a report: what was compared, and what was found, in words."""

from collections.abc import Mapping, Sequence
from typing import Any

from lcx.errors import UserError
from lcx.evals.support.words import INTERVAL, listed, quoted
from lcx.reporting import training
from lcx.reporting.pages import spoken
from lcx.reporting.runs import evaluation_of, models
from lcx.wording import quantity

Runs = Mapping[str, Mapping[str, Any]]


def paragraphs(runs: Runs, curves: training.Curves) -> list[str]:
    """Plain text: the first sentence says what was compared and, if that was measured, how far it reads."""
    names = sorted(evaluations(runs), key=lambda name: not _reads(name, runs))
    found = [_clause(name, runs) for name in names]
    trained = [training.finding(curves)] if curves else []
    if runs:
        who = _who(runs)
        kinds = [spoken(name).lower() for name in names]
        by = f"{who} by {listed(kinds, most=6)}: {found[0]}." if found else ""
        out = [by or f"{who}, but no evaluation has a result."]
        out += [f"{spoken(name)}: {text}." for name, text in zip(names[1:], found[1:], strict=True)]
        out += [f"Training: {text}." for text in trained]
    elif len(curves) == 1:
        out = [f"One training run: {trained[0]}."]
    else:
        out = [f"{len(curves)} training runs are compared: {trained[0]}."]
    return out + _remarks(runs, out)


def _who(runs: Runs) -> str:
    """What the results are of, as the beginning of a sentence."""
    count = models(runs)
    if count == 1:
        times = f" {len(runs)} times" if len(runs) > 1 else ""
        return f"“{next(iter(runs))}” is evaluated{times}"
    return f"{count} models are compared" + (f" in {len(runs)} results" if len(runs) > count else "")


def evaluations(runs: Runs) -> list[str]:
    """The names of the evaluations of all runs, in order of appearance."""
    return list(dict.fromkeys(name for run in runs.values() for name in run["evaluations"]))


def _reads(name: str, runs: Runs) -> bool:
    """Whether an evaluation measured by length what a model finds, which loss and perplexity do not show."""
    results = [run["evaluations"][name] for run in runs.values() if name in run["evaluations"]]
    return any("length" in cell for result in results for cell in result.get("cells", ()))


def _clause(name: str, runs: Runs) -> str:
    """What an evaluation found, in words; its summaries if it does not say, or if its class is gone."""
    results = {label: run["evaluations"][name] for label, run in runs.items() if name in run["evaluations"]}
    try:
        finding = getattr(evaluation_of(name, results), "finding", None)
        text = finding(results) if finding else None
    except (UserError, LookupError, TypeError, ValueError):  # of an older version, or written by hand
        text = None
    if text is None:
        parts = [f"“{label}”: {result.get('summary', 'no summary')}" for label, result in results.items()]
        text = (
            "; ".join(parts)
            if len(runs) > 1
            else str(next(iter(results.values())).get("summary", "no summary"))
        )
    missing = [label for label in runs if label not in results]
    if models(runs) == 1:
        return text
    if missing and len(results) == 1:  # a finding about one model does not name it
        return f"{text}; measured of {quoted(results)[0]} alone"
    return text + (f"; {listed(quoted(missing))} not measured" if missing else "")


def _remarks(runs: Runs, texts: Sequence[str]) -> list[str]:
    """How to read the numbers, and what stands in the way of comparing them."""
    remarks = []
    if any("±" in text and "spread" not in text for text in texts):
        remarks.append(
            f"{INTERVAL.capitalize()} over rows or documents; differences are judged as if independent."
        )
    for name in evaluations(runs):
        results = [run["evaluations"][name] for run in runs.values() if name in run["evaluations"]]
        if len({result.get("definition") for result in results}) > 1:
            remarks.append(
                f"{spoken(name)} was not measured in the same way every time: see its definitions."
            )
    failed = sum(len(run.get("errors") or {}) for run in runs.values())
    if failed:
        remarks.append(f"{quantity(failed, 'evaluation')} failed: see below.")
    return [" ".join(remarks)] if remarks else []
