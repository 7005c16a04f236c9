"""The style of plots: colour-blind safe colours, positions in powers of two, legends next to the data.

Lines differ by colour, dashes and marker, so that they can be told apart without colours too.

Colours are referred to by their number in matplotlib's property cycle ("C0" ...), so the theme (light or dark) sets
their values.
"""

import math
import textwrap
from collections.abc import Mapping
from typing import Any

Style = dict[str, Any]

# Colour-blind safe colours after Okabe & Ito 2008, in the order of _PLACES; lighter ones for a dark background.
LIGHT = ("#0072B2", "#D55E00", "#B87A00", "#B0528A", "#007A5A", "#3A94C8", "#555555")
DARK = ("#56B4E9", "#FF8A4A", "#F0C24A", "#E79CC6", "#2FC79A", "#9AD5F5", "#BBBBBB")
_PLACES = {"yarn": 0, "default": 1, "linear": 2, "dynamic": 3, "ntk": 3, "longrope": 4, "llama3": 5}
_WIDTHS: tuple[Any, ...] = ("--", "-.", ":", (0, (7, 2, 1, 2, 1, 2)), (0, (9, 3)))
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
_LABEL_WIDTH = {False: 26, True: 40}  # characters of a line of a legend, on wide and on narrow figures


def theme(*, dark: bool, narrow: bool = False) -> Any:
    """matplotlib settings (a dict) for a figure on a light or a dark page, narrow as a phone or wide."""
    from cycler import cycler

    ink, page, grid = ("#E8E8EA", "#1B1D21", "#3A3D44") if dark else ("#222222", "#FFFFFF", "#DDDDDD")
    inks = ("text.color", "axes.labelcolor", "axes.titlecolor", "xtick.color", "ytick.color")
    return {name: ink for name in inks} | {
        "axes.prop_cycle": cycler(color=DARK if dark else LIGHT),
        "figure.facecolor": page,
        "axes.facecolor": page,
        "savefig.facecolor": page,
        "axes.edgecolor": grid,
        "grid.color": grid,
        "axes.grid": True,
        "axes.axisbelow": True,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.titlesize": 10 if narrow else 12,
        "axes.titlelocation": "left",
        "axes.titlepad": 22,
        "lines.linewidth": 1.8 if narrow else 2.2,
        "lines.markersize": 4 if narrow else 5.5,
        "legend.frameon": False,
        "font.size": 9 if narrow else 10.5,
    }


def is_narrow(axes: Any) -> bool:
    """Whether axes belong to a figure for the width of a phone."""
    return axes.figure.get_figwidth() < 6


def styles(results: Mapping[str, Mapping[str, Any]]) -> dict[str, Style]:
    """The line style of each model, {label: style}: one colour per RoPE scaling, and markers to tell all lines apart.

    If several models have the same scaling (before and after fine-tuning), the last one is solid and the others are
    dashed. If all models have the same scaling, each gets its own colour instead; with more models than colours, those
    of the same colour differ by dashes.
    """
    kinds = {label: (result.get("model") or {}).get("rope", label) for label, result in results.items()}
    if len(set(kinds.values())) == 1:
        kinds = {label: label for label in results}
    taken: dict[str, int] = {}
    for label, kind in kinds.items():
        place = _PLACES.get((results[label].get("model") or {}).get("rope_type", ""), 0)
        free = [i for i in range(len(LIGHT)) if i not in taken.values()] or [len(taken) % len(LIGHT)]
        taken.setdefault(kind, place if place in free else free[0])
    out = {}
    for place, (label, kind) in enumerate(kinds.items()):
        same = [other for other in kinds if taken[kinds[other]] == taken[kind]]
        number = same.index(label)
        line = "-" if number == len(same) - 1 else _WIDTHS[number % len(_WIDTHS)]
        out[label] = {
            "color": f"C{taken[kind]}",
            "linestyle": line,
            "marker": _MARKERS[place % len(_MARKERS)],
        }
    return out


def position_axis(axes: Any, label: str) -> None:
    """A logarithmic x axis whose ticks are powers of two, written as numbers."""
    log_axis(axes, "x")
    axes.set_xlabel(label)


def log_axis(axes: Any, which: str) -> None:
    """Makes axis "x" or "y" logarithmic with ticks at powers of two, or at round numbers within one power."""
    from matplotlib import ticker

    set_scale, axis = {"x": (axes.set_xscale, axes.xaxis), "y": (axes.set_yscale, axes.yaxis)}[which]
    set_scale("log", base=2)
    most = 7 if is_narrow(axes) else 14
    axis.set_major_locator(_powers_of_two(most))
    axis.set_minor_locator(ticker.NullLocator())
    axis.set_major_formatter(ticker.FuncFormatter(lambda value, _: short(value)))


def _powers_of_two(most: int) -> Any:
    from matplotlib import ticker

    class Locator(ticker.Locator):
        """Every power of two, or every second, third, ...; at most `most`, and at least two numbers of any kind."""

        def __call__(self) -> Any:
            low, high = sorted(self.axis.get_view_interval())
            if not 0 < low < high < math.inf:
                return []
            first, last = math.ceil(math.log2(low)), math.floor(math.log2(high))
            if last - first < 1:
                ticks = ticker.MaxNLocator(4).tick_values(low, high)
                return [tick for tick in ticks if low <= tick <= high]
            step = -(-(last - first + 1) // most)
            return [2.0**power for power in range(first, last + 1, step)]

    return Locator()


def step_axis(axes: Any) -> None:
    """A linear x axis of training steps, with whole numbers."""
    from matplotlib import ticker

    axes.xaxis.set_major_locator(ticker.MaxNLocator(5 if is_narrow(axes) else 10, integer=True, min_n_ticks=1))
    axes.xaxis.set_major_formatter(ticker.FuncFormatter(lambda value, _: f"{value:.10g}"))
    axes.set_xlabel("training step")


def short(value: float) -> str:
    """1024 -> "1024", 32768 -> "32K", 1048576 -> "1M"."""
    for size, unit in ((1 << 20, "M"), (1 << 10, "K")):
        if value >= 8 * 1024 and value % size == 0:
            return f"{value / size:.10g}{unit}"
    return f"{value:.10g}"


def mark_window(axes: Any, results: Mapping[str, Mapping[str, Any]]) -> None:
    """Draws a vertical line at the context length of pretraining and shades the range beyond it."""
    from matplotlib import rcParams

    windows = {result["model"]["original_window"] for result in results.values() if result.get("model")}
    low, high = axes.get_xlim()
    ink = rcParams["text.color"]
    for window in sorted(windows):
        if not low < window < high:
            continue
        axes.axvline(window, color=ink, lw=1.2, ls=(0, (4, 3)), zorder=1.5)
        axes.annotate(
            f"trained window: {window}",
            (window, 1),
            xycoords=("data", "axes fraction"),
            xytext=(0, 3),
            textcoords="offset points",
            ha="center",
            va="bottom",
            fontsize=rcParams["font.size"] - 1,
        )
    inside = [window for window in windows if low < window < high]
    if inside:
        axes.axvspan(max(inside), high, color=ink, alpha=0.05, lw=0, zorder=0.5)
    axes.set_xlim(low, high)


def legend(axes: Any, order: list[str]) -> None:
    """Draws a legend to the right of the data, or below it on a narrow figure, with the labels in `order`.

    There is none for a single line.
    """
    handles = dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
    names = [name for name in order if name in handles]
    if len(names) < 2:
        return
    narrow = is_narrow(axes)
    texts = [wrapped(name, _LABEL_WIDTH[narrow]) for name in names]
    lines = [handles[name] for name in names]
    if not narrow:
        axes.legend(lines, texts, loc="center left", bbox_to_anchor=(1.01, 0.5), handlelength=3)
        return
    axes.figure.legend(lines, texts, loc="outside lower left", handlelength=3)
    rows = sum(text.count("\n") + 1 for text in texts)
    axes.figure.set_figheight(axes.figure.get_figheight() + 0.17 * rows)


def wrapped(label: str, width: int) -> str:
    """A label in lines of at most `width` characters."""
    return "\n".join(textwrap.wrap(label, width)) or label


def bars(
    axes: Any,
    values: Mapping[str, float],
    results: Mapping[str, Mapping[str, Any]],
    *,
    texts: Mapping[str, str],
) -> None:
    """Draws horizontal bars from top to bottom, each with its text; logarithmic if they differ by more than 10x."""
    look = styles(results)
    labels = list(values)
    axes.figure.set_figheight(1.4 + 0.5 * len(labels))
    finite = [value for value in values.values() if math.isfinite(value)]
    for row, label in enumerate(labels):
        solid = look[label]["linestyle"] == "-"
        axes.barh(row, values[label], height=0.62, color=look[label]["color"], alpha=1 if solid else 0.55)
        if math.isfinite(values[label]):
            axes.annotate(
                texts[label],
                (values[label], row),
                xytext=(5, 0),
                textcoords="offset points",
                va="center",
                fontsize="small",
            )
    width = 14 if is_narrow(axes) else 30
    axes.set_yticks(range(len(labels)), [wrapped(label, width) for label in labels])
    axes.invert_yaxis()
    axes.grid(False, axis="y")
    if finite and max(finite) > 10 * min(finite):
        log_axis(axes, "x")
    low, high = axes.get_xlim()
    logarithmic = axes.get_xscale() == "log"
    axes.set_xlim(min(low, 1.0) if logarithmic else 0, high * 3 if logarithmic else high * 1.25)
