"""Training runs in a report: their curves, a table, and what they show in words."""

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from lcx.evals.support import figures
from lcx.reporting import pages, pictures
from lcx.wording import quantity

Curves = Mapping[
    str, Sequence[Mapping[str, float]]
]  # for each run, the lines of its metrics.jsonl, ordered by step
_SPEED = "tokens_per_second"
_UNIT = (  # metrics.jsonl does not record it
    "The loss is in nats per token, except where a run minimises something else, such as attention transfer, whose"
    " loss is 1000 times a mean squared error."
)
_MARKERS = 12  # on a curve, so that they do not hide it


def section(curves: Curves, runs: Mapping[str, Mapping[str, Any]]) -> tuple[str, dict[str, bytes]]:
    """(HTML, files to write) of the training runs; their curves have the colours of the evaluated models, `runs`."""
    rows = []
    for label, lines in curves.items():
        steps = int(lines[-1]["step"]) if lines else 0
        held_out = last(lines, "eval_loss")
        rows.append(
            [label, steps, _value(last(lines, "loss")), _value(held_out), _value(last(lines, _SPEED))]
        )
    head = ["run", "steps", "last loss", "last held-out loss", "tokens per second"]
    alt = "; ".join(f"{row[0]}: loss {pages.number(row[2])} after {quantity(row[1], 'step')}" for row in rows)
    plot = pictures.drawn("training_loss", lambda axes: draw(axes, curves, runs), alt)
    return pages.section("Training", plot.html + pages.table(head, rows) + pages.notes([_UNIT])), plot.files


def draw(axes: Any, curves: Curves, runs: Mapping[str, Mapping[str, Any]]) -> None:
    """Loss by step on matplotlib axes: lines for training, larger hollow markers for held-out data."""
    look = figures.styles({**runs, **{label: {} for label in curves if label not in runs}})
    held_out = False
    for label, lines in curves.items():
        style = look[label]
        for key in ("loss", "eval_loss"):
            found = points(lines, key)
            if not found:
                continue
            x, y = zip(*found, strict=True)
            if key == "loss":
                axes.plot(x, y, label=label, markevery=max(1, len(x) // _MARKERS), **style)
            else:
                held_out = True
                hollow = {**style, "linestyle": "none", "markerfacecolor": "none", "markersize": 9}
                axes.plot(x, y, label=None if points(lines, "loss") else label, **hollow)
    figures.step_axis(axes)
    axes.set_ylabel("loss")
    axes.set_title("Training loss" + " (large hollow markers: held-out data)" * held_out)
    figures.legend(axes, list(curves))


def points(lines: Sequence[Mapping[str, float]], key: str) -> list[tuple[float, float]]:
    """(step, value) of a metric, without what is not finite."""
    return [(line["step"], line[key]) for line in lines if math.isfinite(line.get(key, math.nan))]


def last(lines: Sequence[Mapping[str, float]], key: str) -> tuple[float, float] | None:
    """The last (step, value) of a metric, which may be NaN."""
    return next(((line["step"], line[key]) for line in reversed(lines) if key in line), None)


def _value(point: tuple[float, float] | None) -> float | None:
    return None if point is None else point[1]


def finding(curves: Curves) -> str:
    """What the runs show: from which loss to which, and the held-out loss beside it."""
    if len(curves) == 1:
        return _alone(*next(iter(curves.items())))
    parts = [f"“{label}” {_short(lines)}" for label, lines in list(curves.items())[:6]]
    more = f"; and {len(curves) - 6} more" if len(curves) > 6 else ""
    ends = {last(lines, "eval_loss") for lines in curves.values()}
    note = "" if None in ends else ". These are single runs, without an uncertainty between runs"
    return f"the last losses are: {'; '.join(parts)}{more}{note}"


def _short(lines: Sequence[Mapping[str, float]]) -> str:
    held_out, loss = last(lines, "eval_loss"), last(lines, "loss")
    if held_out is not None:
        return f"{held_out[1]:.3f} on held-out data at step {held_out[0]:.0f}"
    return f"{loss[1]:.3f} in training at step {loss[0]:.0f}" if loss else "has no loss yet"


def _alone(label: str, lines: Sequence[Mapping[str, float]]) -> str:
    found = points(lines, "loss")
    broken = sum(not math.isfinite(line["loss"]) for line in lines if "loss" in line)
    if not found:
        return f"“{label}” has logged no finite loss"
    (first, start), (end, stop) = found[0], found[-1]
    tail = [value for _, value in found[-max(1, len(found) // 10) :]]
    spread = (
        f" ± {statistics.stdev(tail):.3f} (spread of its last {len(tail)} log lines)" if len(tail) > 1 else ""
    )
    text = (
        f"over steps {first:.0f} to {end:.0f} of “{label}”, the loss went from {start:.3f} to"
        f" {statistics.fmean(tail):.3f}{spread}"
    )
    if len(found) == 1:
        text = f"“{label}” has logged one loss, {stop:.3f} at step {end:.0f}"
    return (
        text
        + _held_out(points(lines, "eval_loss"))
        + (f"; {quantity(broken, 'logged loss is', 'logged losses are')} not finite" * (broken > 0))
    )


def _held_out(found: Sequence[tuple[float, float]]) -> str:
    if not found:
        return "; nothing was measured on held-out data"
    step, value = found[-1]
    text = f"; on held-out data it is {value:.3f} at step {step:.0f}"
    best_step, best = min(found, key=lambda point: point[1])
    return text + (f", after a lower {best:.3f} at step {best_step:.0f}" if best < value else "")
