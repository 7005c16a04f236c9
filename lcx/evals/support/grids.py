"""Results of many samples in cells, such as length x depth: rates with intervals, differences, heat maps."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from lcx.evals.support import figures
from lcx.evals.support.intervals import wilson

Cell = dict[str, Any]


def cell(scores: Sequence[float], **place: Any) -> Cell:
    """A cell of a grid as JSON: where it is, its mean score in [0, 1], a 95% interval, and the score of each sample.

    The interval is Wilson's, with the sum of the scores as the number of successes; for scores between 0 and 1 that is
    wider than it would have to be.
    """
    total = float(sum(scores))
    low, high = wilson_of(total, len(scores))
    return {
        **place,
        "score": total / len(scores) if scores else None,
        "low": low,
        "high": high,
        "samples": len(scores),
        "scores": [round(float(score), 4) for score in scores],
    }


def wilson_of(total: float, trials: int) -> tuple[float, float]:
    """Wilson's interval for a sum of scores in [0, 1]."""
    return wilson(total, trials)  # type: ignore[arg-type]  # the formula takes any number


def mean(cells: Sequence[Cell]) -> float | None:
    """The mean score over all samples of some cells."""
    scores = [score for one in cells for score in one["scores"]]
    return sum(scores) / len(scores) if scores else None


def by(cells: Sequence[Cell], key: str) -> dict[Any, list[Cell]]:
    """The cells by one of their places, in order of appearance."""
    found: dict[Any, list[Cell]] = {}
    for one in cells:
        found.setdefault(one[key], []).append(one)
    return found


def at_longest(results: Mapping[str, Any]) -> Iterator[tuple[str, str, int]]:
    """What each model finds at its longest length, for the sentence of a report.

    Yields:
      ("“label” finds", or "finds" for a single model; "97% (95% interval 90% to 99%)", by Wilson; the length).
    """
    for label, result in results.items():
        length = max(one["length"] for one in result["cells"])
        scores = [score for one in result["cells"] if one["length"] == length for score in one["scores"]]
        low, high = wilson_of(sum(scores), len(scores))
        share = f"{100 * sum(scores) / len(scores):.0f}% (95% interval {low:.0%} to {high:.0%})"
        yield f"“{label}” finds" if len(results) > 1 else "finds", share, length


def heat_maps(
    axes: Any,
    results: Mapping[str, Mapping[str, Any]],
    *,
    across: str,
    down: str,
    xlabel: str,
    ylabel: str,
    title: str,
) -> None:
    """One heat map per model, one below the other, with the score in percent in every cell."""
    figure = axes.figure
    grids = {label: _grid(result["cells"], across, down) for label, result in results.items()}
    rows = max(len(downs) for _, downs, _ in grids.values())
    height = max(figure.get_figheight() * 0.5, len(grids) * (1.1 + 0.27 * rows)) + 0.6
    figure.set_figheight(height)
    panels = [axes]
    if len(grids) > 1:
        axes.set_axis_off()
        share, gap = 1 / len(grids), 0.65 / height  # inches for the ticks of one panel and the name of the next
        panels = [axes.inset_axes((0, 1 - (i + 1) * share + gap / 2, 1, share - gap)) for i in range(len(grids))]
    for panel, (label, (xs, ys, values)) in zip(panels, grids.items(), strict=True):
        _heat_map(panel, xs, ys, values)
        panel.set_ylabel(ylabel)
        if len(grids) > 1:
            panel.set_title(figures.wrapped(label, 60), fontsize="medium", pad=4)
    panels[-1].set_xlabel(xlabel)
    axes.set_title(title)


def _grid(cells: Sequence[Cell], across: str, down: str) -> tuple[list[Any], list[Any], np.ndarray]:
    xs, ys = (_in_order(one[key] for one in cells) for key in (across, down))
    values = np.full((len(ys), len(xs)), np.nan)
    for (x, y), own in _places(cells, across, down).items():
        score = mean(own)
        values[ys.index(y), xs.index(x)] = np.nan if score is None else score
    return xs, ys, values


def _in_order(values: Iterable[Any]) -> list[Any]:
    """The different values: numbers by size, since models may have other lengths, names in order of appearance."""
    found = list(dict.fromkeys(values))
    return sorted(found) if all(isinstance(value, int | float) for value in found) else found


def _places(cells: Sequence[Cell], across: str, down: str) -> dict[tuple[Any, Any], list[Cell]]:
    found: dict[tuple[Any, Any], list[Cell]] = {}
    for one in cells:
        found.setdefault((one[across], one[down]), []).append(one)
    return found


def _heat_map(axes: Any, xs: Sequence[Any], ys: Sequence[Any], values: np.ndarray) -> None:
    axes.imshow(values, vmin=0, vmax=1, cmap="cividis", aspect="auto")
    axes.set_xticks(range(len(xs)), [_tick(x) for x in xs])
    axes.set_yticks(range(len(ys)), [_tick(y) for y in ys])
    axes.grid(False)
    for spine in axes.spines.values():
        spine.set_visible(False)
    if values.size > 240:
        return
    for (row, column), value in np.ndenumerate(values):
        if np.isfinite(value):
            ink = "#111111" if value > 0.55 else "#F4F4F4"
            axes.text(
                column, row, f"{100 * value:.0f}", ha="center", va="center", color=ink, fontsize="small"
            )


def _tick(value: Any) -> str:
    if isinstance(value, float):
        return f"{100 * value:.0f}%"
    return figures.short(value) if isinstance(value, int) else str(value)


def curves(
    axes: Any, results: Mapping[str, Mapping[str, Any]], *, across: str, ylabel: str, title: str
) -> None:
    """The mean score by length of each model, with its interval."""
    styles = figures.styles(results)
    for label, result in results.items():
        lengths = by(result["cells"], across)
        xs = sorted(lengths)
        scores = [[score for one in lengths[x] for score in one["scores"]] for x in xs]
        middle = [100 * sum(own) / max(1, len(own)) for own in scores]
        bounds = [wilson_of(sum(own), len(own)) for own in scores]
        low, high = ([100 * bound[side] for bound in bounds] for side in (0, 1))
        axes.fill_between(xs, low, high, color=styles[label]["color"], alpha=0.13, lw=0)
        axes.plot(xs, middle, label=label, **styles[label])
    figures.position_axis(axes, "length of the prompt with its answer (tokens)")
    figures.mark_window(axes, results)
    axes.set_ylim(-3, 103)
    axes.set_ylabel(ylabel)
    axes.set_title(title)
    figures.legend(axes, list(results))
