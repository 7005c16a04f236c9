"""Writes one HTML page that compares models: the results of their evaluations, and their training curves.

Examples:
  python -m lcx.report --results /tmp/eval_unscaled /tmp/eval_yarn /tmp/eval_yarn_tuned --output=/tmp/report
  python -m lcx.report --results=/tmp/eval --workdir=/tmp/run --output=/tmp/report --title='YaRN, 4 x 256 tokens'

--results: folders written by `python -m lcx.evaluate`, in the order in which they should appear. --workdir: training
runs whose loss curves are drawn. The page, report.html, is a single file that contains its plots; each plot is also
written to the same folder as a PNG file.
"""

import base64
import html
import io
import json
import math
import os
import pathlib
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from lcx import config, paths
from lcx.errors import UserError

RESULTS, PAGE = "results.json", "report.html"
_SIZE = (9.0, 4.4)  # inches, without the legend
_DPI = 144


def main(argv=None) -> int:
    parser = config.parser(__doc__, gin=False)
    parser.add_argument(
        "--results",
        required=True,
        nargs="+",
        action="extend",
        metavar="DIR",
        help="folders with results.json",
    )
    parser.add_argument("--output", required=True, metavar="DIR", help="folder for report.html and the plots")
    parser.add_argument(
        "--workdir", nargs="+", action="extend", metavar="DIR", help="training runs whose loss is drawn"
    )
    parser.add_argument("--title", metavar="TEXT", help="title of the page")
    return config.run(parser, "lcx.report:build", argv)


def build(
    *, results: Sequence[str], output: str, workdir: Sequence[str] = (), title: str = "Evaluation"
) -> pathlib.Path:
    """Writes report.html and the plots; returns the path of the page.

    Args:
      results: folders with a results.json (or such files), in the order of the tables and legends.
      output: the folder to write to.
      workdir: workdirs of training runs, whose metrics.jsonl is drawn.
      title: title of the page.

    Raises:
      UserError: a folder has no results, or the output cannot be written.
    """
    runs = labelled([read_results(path) for path in results])
    curves = {}
    for path in workdir:
        curves |= _named_as_models(read_curves(path), path, runs)
    folder = paths.destination(output, "--output")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        sections = [_evaluation_section(name, runs, folder) for name in _names(runs)]
        if curves:
            sections.append(_training_section(curves, runs, folder))
        text = _page(title, [*_error_notes(runs), *sections, _models_section(runs), _origin_section(runs)])
        _write(folder / PAGE, text.encode())
    except OSError as error:
        raise UserError(f"cannot write the report to {folder}: {error.strerror}; change --output") from None
    print(f"report: {folder / PAGE}", file=sys.stderr)
    return folder / PAGE


# ------------------------------------------------------------------------------------------------ reading


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
    """{label: run}; a name that occurs again gets a number, as in "yarn (2)"."""
    out: dict[str, dict[str, Any]] = {}
    for run in runs:
        label, number = str(run["name"]), 2
        while label in out:
            label, number = f"{run['name']} ({number})", number + 1
        out[label] = run
    return out


def read_curves(workdir: str) -> dict[str, list[dict[str, float]]]:
    """{name: lines of metrics.jsonl, ordered by step} of a workdir, or of the runs in its subfolders.

    A line that is not valid JSON (cut short by a kill) is ignored. Values of a step that was repeated replace the
    earlier ones. Raises UserError if there is no metrics.jsonl.
    """
    folder = pathlib.Path(workdir).expanduser()
    files = [folder / "metrics.jsonl"]
    if not files[0].is_file():
        files = sorted(folder.glob("*/metrics.jsonl"), key=lambda f: (f.stat().st_mtime, f.name))
    if not files:
        raise UserError(
            f"no metrics.jsonl in {workdir}: expected the workdir of a training run; change --workdir"
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
        name = (
            folder.resolve().name if file.parent == folder else f"{folder.resolve().name}/{file.parent.name}"
        )
        curves[name] = [steps[step] for step in sorted(steps)]
    return curves


def _names(runs: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """The evaluations of all runs, in order of appearance."""
    return list(dict.fromkeys(name for run in runs.values() for name in run["evaluations"]))


# ------------------------------------------------------------------------------------------------ sections


def _evaluation_section(name: str, runs: Mapping[str, Mapping[str, Any]], folder: pathlib.Path) -> str:
    results = {label: run["evaluations"][name] for label, run in runs.items() if name in run["evaluations"]}
    alt = "; ".join(f"{label}: {result.get('summary', '')}" for label, result in results.items())
    picture = _drawn(name, lambda axes: _evaluation_of(name, results).plot(axes, results), folder, alt)
    unit = next((result["unit"] for result in results.values() if "unit" in result), "")
    columns = list(dict.fromkeys(column for result in results.values() for column in result.get("table", {})))
    rows = [[label, *(result.get("table", {}).get(c) for c in columns)] for label, result in results.items()]
    caption = f"{_spoken(name)}, {unit}" if unit else ""
    definitions: dict[str, list[str]] = {}
    for label, result in results.items():
        definitions.setdefault(result.get("definition", ""), []).append(label)
    notes = ""
    for text, labels in definitions.items():
        whose = f"<b>{_esc(', '.join(labels))}:</b> " if len(definitions) > 1 else ""
        notes += f"<p>{whose}{_esc(text)}</p>"
    details = f"<details><summary>Definition</summary>{notes}</details>"
    return _section(_spoken(name), picture + _table(["model", *columns], rows, caption) + details)


def _evaluation_of(name: str, results: Mapping[str, Mapping[str, Any]]) -> Any:
    """The evaluation that produced these results, rebuilt from its recorded settings to draw them."""
    from lcx.checkpoint import model_json

    described = next((result["evaluation"] for result in results.values() if result.get("evaluation")), None)
    if described is None:
        raise UserError(f"the results do not record the settings of {name}")
    return model_json.from_json(described)


def _named_as_models(
    curves: dict[str, list[dict[str, float]]], workdir: str, runs: Mapping[str, Mapping[str, Any]]
) -> dict[str, list[dict[str, float]]]:
    """Gives the curve of a run the label of the model that was evaluated from its checkpoint, if there is one."""
    folder = pathlib.Path(workdir).expanduser().resolve()
    for label, run in runs.items():
        place = pathlib.Path(str(run.get("checkpoint")))
        if len(curves) == 1 and (place == folder or folder in place.parents):
            return {label: next(iter(curves.values()))}
    return curves


def _training_section(
    curves: Mapping[str, list[dict[str, float]]], runs: Mapping[str, Mapping[str, Any]], folder: pathlib.Path
) -> str:
    def draw(axes: Any) -> None:
        from lcx.evals.support import figures

        known = figures.styles(runs)
        for number, (label, lines) in enumerate(curves.items()):
            color = known[label]["color"] if label in known else f"C{(6 - number) % 7}"
            for key, style in (("loss", {"label": label}), ("eval_loss", {"marker": "o", "ls": "", "ms": 5})):
                points = [
                    (line["step"], line[key]) for line in lines if math.isfinite(line.get(key, math.nan))
                ]
                if points:
                    axes.plot(*zip(*points, strict=True), color=color, **style)
        figures.log_axis(axes, "x")
        axes.set(xlabel="step", ylabel="loss (nats per token)", title="Training loss (dots: held-out data)")
        figures.legend(axes, list(curves))

    rows = []
    for label, lines in curves.items():
        last = {
            key: line[key]
            for line in lines
            for key in ("loss", "eval_loss", "tokens_per_second")
            if key in line
        }
        steps = int(lines[-1]["step"]) if lines else 0
        rows.append([label, steps, last.get("loss"), last.get("eval_loss"), last.get("tokens_per_second")])
    head = ["run", "steps", "last loss", "last held-out loss", "tokens per second"]
    alt = "; ".join(f"{row[0]}: loss {_number(row[2])} after {row[1]} steps" for row in rows)
    return _section("Training", _drawn("training_loss", draw, folder, alt) + _table(head, rows))


def _models_section(runs: Mapping[str, Mapping[str, Any]]) -> str:
    head = ["model", "parameters", "RoPE", "original window", "window", "dtype", "checkpoint"]
    keys = ("num_params", "rope", "original_window", "window", "dtype")
    rows = []
    for label, run in runs.items():
        about = run.get("model") or {}
        rows.append([label, *(about.get(key) for key in keys), run.get("checkpoint")])
    return _section("Models", _table(head, rows))


def _origin_section(runs: Mapping[str, Mapping[str, Any]]) -> str:
    rows = []
    for label, run in runs.items():
        versions = ", ".join(f"{name} {version}" for name, version in (run.get("versions") or {}).items())
        machine = run.get("machine") or {}
        place = f"{machine.get('devices', '?')} x {machine.get('device', '?')}, {machine.get('cpu_cores', '?')} cores"
        rows.append([label, run.get("created"), run.get("seconds"), place, versions])
    return _section("Origin", _table(["model", "evaluated", "seconds", "machine", "versions"], rows))


def _error_notes(runs: Mapping[str, Mapping[str, Any]]) -> list[str]:
    failed = [(label, *item) for label, run in runs.items() for item in (run.get("errors") or {}).items()]
    notes = [f"<li><b>{_esc(label)}</b>, {_esc(name)}: {_esc(error)}</li>" for label, name, error in failed]
    return [f'<section class="failed"><h2>Failed</h2><ul>{"".join(notes)}</ul></section>'] if notes else []


# ------------------------------------------------------------------------------------------------ pictures


def _drawn(name: str, draw: Callable[[Any], None], folder: pathlib.Path, alt: str) -> str:
    """HTML of a plot in a light and a dark version. The light one is also written to a PNG file.

    If drawing fails, the HTML is a note with the reason.
    """
    try:
        light, dark = (picture(draw, dark=dark) for dark in (False, True))
    except Exception as error:  # the report is still useful without one plot
        print(f"warning: no plot of {name}: {type(error).__name__}: {error}", file=sys.stderr)
        return f"<p>No plot: {_esc(str(error))}</p>"
    _write(folder / f"{''.join(c if c.isalnum() else '_' for c in name)}.png", light)
    sources = [f"data:image/png;base64,{base64.b64encode(png).decode()}" for png in (light, dark)]
    width = round(
        int.from_bytes(light[16:20], "big") * 96 / _DPI
    )  # from the PNG header; this scale makes the text of all plots the same size
    return (
        f'<figure><picture><source media="(prefers-color-scheme: dark)" srcset="{sources[1]}">'
        f'<img src="{sources[0]}" width="{width}" alt="{_esc(alt)}"></picture></figure>'
    )


def picture(draw: Callable[[Any], None], *, dark: bool = False) -> bytes:
    """A PNG file as bytes, of what `draw` puts on matplotlib axes."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    from lcx.evals.support import figures

    with matplotlib.rc_context(figures.theme(dark=dark)):
        figure = Figure(figsize=_SIZE, dpi=_DPI)
        FigureCanvasAgg(figure)
        draw(figure.add_subplot())
        out = io.BytesIO()
        figure.savefig(out, format="png", bbox_inches="tight", pad_inches=0.15)
    return out.getvalue()


def _write(path: pathlib.Path, data: bytes) -> None:
    partial = path.with_name(f"{path.name}.partial")
    partial.write_bytes(data)
    os.replace(partial, path)


# ------------------------------------------------------------------------------------------------ html

_TEXT = ' class="text"'  # a cell with words
_STYLE = """
:root { color-scheme: light dark; --page: #fff; --ink: #222; --soft: #666; --line: #ddd; --stripe: #f6f7f9; }
@media (prefers-color-scheme: dark) {
  :root { --page: #1b1d21; --ink: #e8e8ea; --soft: #a0a3aa; --line: #3a3d44; --stripe: #24272c; }
}
body { background: var(--page); color: var(--ink); font: 16px/1.5 system-ui, sans-serif; margin: 0 auto;
  max-width: 1080px; padding: 1.5rem; }
h1 { font-size: 1.7rem; margin: 0 0 1rem; }
h2 { font-size: 1.2rem; margin: 2.2rem 0 .6rem; }
figure { margin: 0 0 1rem; }
img { max-width: 100%; height: auto; display: block; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: .92rem; font-variant-numeric: tabular-nums; }
caption { text-align: left; white-space: nowrap; color: var(--soft); padding-bottom: .3rem; }
th, td { padding: .3rem .8rem; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap; }
th:first-child, td:first-child { text-align: left; padding-left: 0; }
.text { text-align: left; white-space: normal; }
tbody tr:nth-child(even) { background: var(--stripe); }
details { margin-top: .6rem; color: var(--soft); font-size: .9rem; }
.failed { border-left: 4px solid #d55e00; padding-left: 1rem; }
"""


def _page(title: str, sections: Iterable[str]) -> str:
    head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{_esc(title)}</title>'
    body = f"<h1>{_esc(title)}</h1>{''.join(sections)}"
    return f'<!doctype html>\n<html lang="en"><head>{head}<style>{_STYLE}</style></head><body>{body}</body></html>\n'


def _section(title: str, body: str) -> str:
    return f"<section><h2>{_esc(title)}</h2>{body}</section>\n"


def _table(head: Sequence[str], rows: Sequence[Sequence[Any]], caption: str = "") -> str:
    """An HTML table. Text is left-aligned, numbers right-aligned; the first cell of a row is its header."""
    words = [bool(rows) and all(isinstance(row[i], str) for row in rows) for i in range(len(head))]
    top = "".join(
        f'<th scope="col"{_TEXT * word}>{_esc(name)}</th>' for name, word in zip(head, words, strict=True)
    )
    lines = []
    for first, *rest in rows:
        cells = "".join(f"<td{_TEXT * isinstance(value, str)}>{_esc(_cell(value))}</td>" for value in rest)
        lines.append(f'<tr><th scope="row">{_esc(str(first))}</th>{cells}</tr>')
    title = f"<caption>{_esc(caption)}</caption>" if caption else ""
    body = f"<thead><tr>{top}</tr></thead><tbody>{''.join(lines)}</tbody>"
    return f'<div class="wide"><table>{title}{body}</table></div>'


def _cell(value: Any) -> str:
    return (value or "–") if isinstance(value, str) else _number(value)


def _number(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.3f}" if abs(value) < 1000 else f"{value:,.0f}"


def _spoken(name: str) -> str:
    return name.replace("_", " ").capitalize()


def _esc(text: str) -> str:
    return html.escape(text, quote=True)


if __name__ == "__main__":
    sys.exit(main())
