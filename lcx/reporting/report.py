"""Builds a report: one HTML page about evaluated models and training runs, and its plots."""

import os
import pathlib
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from lcx import paths
from lcx.errors import UserError
from lcx.locks import LOCK, refuse_held
from lcx.reporting import differences, opening, pages, pictures, training
from lcx.reporting.runs import evaluation_of, labelled, named_as_models, read_curves, read_results
from lcx.wording import quantity

PAGE = "report.html"
_LOCK = ".lcx-report-lock"  # not that of an evaluation, which writes a report into its own folder


def build(
    *,
    output: str,
    results: Sequence[str] = (),
    workdir: Sequence[str] = (),
    title: str | None = None,
    overwrite: bool = False,
) -> pathlib.Path:
    """Writes report.html and the plots; returns the path of the page.

    Args:
      output: the folder to write to.
      results: folders with a results.json (or such files), in the order of the tables and legends.
      workdir: workdirs of training runs, whose metrics.jsonl is drawn.
      title: title of the page; None: from what it shows.
      overwrite: whether to replace files of an earlier report.

    Raises:
      UserError: there is nothing to show, a folder has no results, the output cannot be written, or it holds a report.
    """
    if not results and not workdir:
        raise UserError(
            "nothing to report: set --results (of lcx.evaluate), --workdir (of lcx.train), or both"
        )
    if title is not None and not (title.strip() and title.isprintable()):
        raise UserError(f"--title is {title!r:.80}, expected one line of text: change --title")
    _check_given("--results", results)
    _check_given("--workdir", workdir)
    folder = paths.destination(output, "--output")
    if not overwrite:
        _refuse_to_replace(folder, [PAGE])
        refuse_held(folder / LOCK, of=str(folder), setting="--output")  # an evaluation, which would replace the page
    with paths.claimed(folder, "--output", lock=_LOCK):
        runs = labelled([read_results(path) for path in results])
        curves = {}
        for path in workdir:
            curves |= _distinct(named_as_models(read_curves(path), path, runs), curves)
        sections, files = [], {}
        for name in opening.evaluations(runs):
            text, plots = _evaluation_section(name, runs)
            sections, files = [*sections, text], files | plots
        if curves:
            text, plots = training.section(curves, runs)
            sections, files = [*sections, text], files | plots
        about = [differences.section(runs), _models_section(runs), _origin_section(runs)] if runs else []
        lead = pages.lead(opening.paragraphs(runs, curves))
        title = title or ("Evaluation" if runs else "Training")
        files[PAGE] = pages.page(title, [lead, *_error_notes(runs), *sections, *about]).encode()
        if not overwrite:
            _refuse_to_replace(folder, files)
        _write(folder, files)
    print(f"report: {folder / PAGE}", file=sys.stderr)
    return folder / PAGE


def _check_given(setting: str, folders: Sequence[str]) -> None:
    """Raises UserError for an empty path, or one that is given twice."""
    if not all(folder.strip() for folder in folders):
        raise UserError(f"{setting} is empty, expected a folder: change {setting}")
    places = [os.path.realpath(os.path.expanduser(folder)) for folder in folders]
    if twice := next((folder for folder, place in zip(folders, places) if places.count(place) > 1), None):
        raise UserError(f"{setting} names {twice} twice, expected different folders: change {setting}")


def _distinct(more: dict[str, Any], curves: Mapping[str, Any]) -> dict[str, Any]:
    """`more` under names that `curves` does not have: a name that occurs again gets a number."""
    out: dict[str, Any] = {}
    for name, lines in more.items():
        label, number = name, 2
        while label in curves or label in out:
            label, number = f"{name} ({number})", number + 1
        out[label] = lines
    return out


def _refuse_to_replace(folder: pathlib.Path, names: Iterable[str]) -> None:
    there = sorted(name for name in names if (folder / name).exists())
    if there:
        raise UserError(
            f"{folder / there[0]} exists: choose another --output, or replace it with --overwrite"
        )


def _write(folder: pathlib.Path, files: Mapping[str, bytes]) -> None:
    """Writes each file whole; the page, which is the last of `files`, when its plots are there."""
    try:
        for name, data in files.items():
            partial = folder / f"{name}.partial"
            partial.write_bytes(data)
            os.replace(partial, folder / name)
    except OSError as error:
        raise UserError(f"cannot write the report to {folder}: {error.strerror}; change --output") from None


# ------------------------------------------------------------------------------------------------ sections


def _evaluation_section(name: str, runs: Mapping[str, Mapping[str, Any]]) -> tuple[str, dict[str, bytes]]:
    """(HTML, files to write) of an evaluation: plot, table, remarks, definition."""
    results = {label: run["evaluations"][name] for label, run in runs.items() if name in run["evaluations"]}
    alt = "; ".join(f"{label}: {result.get('summary', '')}" for label, result in results.items())
    plot = pictures.drawn(name, lambda axes: evaluation_of(name, results).plot(axes, results), alt)
    unit = next((result["unit"] for result in results.values() if "unit" in result), "")
    columns = list(dict.fromkeys(column for result in results.values() for column in result.get("table", {})))
    rows = [[label, *(result.get("table", {}).get(c) for c in columns)] for label, result in results.items()]
    caption = f"{pages.spoken(name)}, {unit}" if unit else ""
    body = plot.html + pages.table(["model", *columns], rows, caption)
    body += pages.notes(_named({label: "; ".join(r.get("notes", ())) for label, r in results.items()}))
    definitions = _named({label: result.get("definition", "") for label, result in results.items()})
    body += f"<details><summary>Definition</summary>{pages.notes(definitions)}</details>"
    return pages.section(pages.spoken(name), body), plot.files


def _named(texts: Mapping[str, str]) -> list[str]:
    """Each different text once, after the labels that it belongs to if not all have the same."""
    by_text: dict[str, list[str]] = {}
    for label, text in texts.items():
        by_text.setdefault(text, []).append(label)
    named = len(by_text) > 1
    whole = {text: text[:1].upper() + text[1:] for text in by_text}
    return [
        f"{', '.join(labels)}: {text}" if named else whole[text] for text, labels in by_text.items() if text
    ]


def _models_section(runs: Mapping[str, Mapping[str, Any]]) -> str:
    head = ["model", "parameters", "RoPE", "original window", "window", "dtype", "checkpoint"]
    keys = ("num_params", "rope", "original_window", "window", "dtype")
    rows = []
    for label, run in runs.items():
        about = run.get("model") or {}
        rows.append([label, *(about.get(key) for key in keys), run.get("checkpoint")])
    return pages.section("Models", pages.table(head, rows))


def _origin_section(runs: Mapping[str, Mapping[str, Any]]) -> str:
    rows = []
    for label, run in runs.items():
        versions = ", ".join(f"{name} {version}" for name, version in (run.get("versions") or {}).items())
        machine = run.get("machine") or {}
        cores = quantity(machine.get("cpu_cores", "?"), "core")
        place = f"{machine.get('devices', '?')} x {machine.get('device', '?')}, {cores}"
        seconds = run.get("seconds")
        created = str(run.get("created") or "").replace("T", " ").replace("+00:00", " UTC")
        rows.append([label, created, None if seconds is None else round(seconds), place, versions])
    head = ["model", "evaluated", "seconds", "machine", "versions"]
    return pages.section("Origin", pages.table(head, rows))


def _error_notes(runs: Mapping[str, Mapping[str, Any]]) -> list[str]:
    esc = pages.esc
    failed = [(label, *item) for label, run in runs.items() for item in (run.get("errors") or {}).items()]
    notes = [f"<li><b>{esc(label)}</b>, {esc(name)}: {esc(error)}</li>" for label, name, error in failed]
    return [f'<section class="failed"><h2>Failed</h2><ul>{"".join(notes)}</ul></section>'] if notes else []
