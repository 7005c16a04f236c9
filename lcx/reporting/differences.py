"""Differences between models on the same samples, with bootstrap intervals, as a section of a report."""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from lcx.evals.support import words
from lcx.evals.support.intervals import paired_difference
from lcx.reporting import pages

Runs = Mapping[str, Mapping[str, Any]]
_PLACES = ("task", "length", "depth", "position")
_NOTE = (
    "Each row compares a model with the first one on the samples that both answered, or the documents that both"
    " read. The interval is a paired bootstrap (2000 draws); a difference counts as established if it excludes 0."
    " Intervals do not allow for the number of comparisons."
)


def section(runs: Runs) -> str:
    """HTML of the table; "" if no two models were measured on the same samples."""
    rows = [
        [
            row["evaluation"],
            row["model"],
            row["first"],
            row["difference"],
            row["interval"],
            row["samples"],
            row["found"],
        ]
        for row in found(runs)
    ]
    if not rows:
        return ""
    head = ["evaluation", "model", "compared with", "difference", "95% interval", "samples", "established"]
    return pages.section("Differences", pages.table(head, rows) + pages.notes([_NOTE]))


def found(runs: Runs) -> Iterator[dict[str, Any]]:
    """The difference of each model from the first, for every evaluation that both have samples of."""
    labels = list(runs)
    for name in dict.fromkeys(name for run in runs.values() for name in run["evaluations"]):
        for label in labels[1:]:
            pair = [runs[one]["evaluations"].get(name) for one in (labels[0], label)]
            if None in pair:
                continue
            for what, unit, a, b, weights in _samples(*pair):
                gap, low, high = paired_difference(a, b, weights=weights)
                scale = 100 if unit == "%" else 1
                yield {
                    "evaluation": f"{pages.spoken(name)}{what}",
                    "model": label,
                    "first": labels[0],
                    "difference": f"{scale * gap:+.3g} {unit}",
                    "interval": f"{scale * low:+.3g} to {scale * high:+.3g}",
                    "samples": len(a),
                    "found": "no" if low <= 0 <= high else "yes",
                }


def _samples(first: Mapping[str, Any], other: Mapping[str, Any]) -> Iterator[tuple[str, str, Any, Any, Any]]:
    """(what, unit, the samples of each model, their weights) of two results of one evaluation."""
    if "cells" in first and "cells" in other:
        both = _common_cells(first["cells"], other["cells"])
        if both:
            a, b = (np.array([score for one in cells for score in one["scores"]]) for cells in zip(*both))
            yield "", "%", a, b, None
    elif "distances" in first and "distances" in other:
        sides = [[(d["k"], d.get("scores") or ()) for d in result["distances"]] for result in (first, other)]
        if [(k, len(own)) for k, own in sides[0]] == [(k, len(own)) for k, own in sides[1]] and sides[0][0][1]:
            a, b = (np.array([score for _, own in side for score in own]) for side in sides)
            yield "", "%", a, b, None
    elif "windows" in first and "windows" in other and words.same_tokens([first, other]):
        known = {entry["window"]: entry.get("by_document") for entry in first["windows"]}
        for entry in other["windows"]:
            one, two = known.get(entry["window"]), entry.get("by_document")
            if one and two and [n for _, n in one] == [n for _, n in two] and len(one) > 1:
                a, b = (np.array([total for total, _ in side]) for side in (one, two))
                yield (
                    f", window {entry['window']}",
                    first["unit"].replace("per", "nats per"),
                    a,
                    b,
                    np.array([n for _, n in one]),
                )


def _common_cells(first: list[Any], other: list[Any]) -> list[tuple[Any, Any]]:
    """The cells that both have, at the same place and with as many samples."""
    known = {tuple(cell.get(place) for place in _PLACES): cell for cell in other}
    pairs = [(cell, known.get(tuple(cell.get(place) for place in _PLACES))) for cell in first]
    return [(a, b) for a, b in pairs if b is not None and len(a["scores"]) == len(b["scores"]) > 0]
